"""Readers of data sets: a folder or a table to images with identities and cameras, in query, gallery, train."""

from pose2id.datasets.cuhk03 import cuhk03
from pose2id.datasets.dataset import Dataset, Split
from pose2id.datasets.folders import folders
from pose2id.datasets.market1501 import market1501
from pose2id.datasets.mars import mars
from pose2id.datasets.msmt17 import msmt17
from pose2id.datasets.occluded_reid import occluded_reid
from pose2id.datasets.opening import READERS, open_dataset
from pose2id.datasets.regdb import regdb
from pose2id.datasets.sysu_mm01 import sysu_mm01
from pose2id.datasets.tables import read_table
from pose2id.datasets.vehicleid import vehicleid
from pose2id.datasets.veri776 import veri776

__all__ = [
    "READERS",
    "Dataset",
    "Split",
    "cuhk03",
    "folders",
    "market1501",
    "mars",
    "msmt17",
    "occluded_reid",
    "open_dataset",
    "read_table",
    "regdb",
    "sysu_mm01",
    "vehicleid",
    "veri776",
]
