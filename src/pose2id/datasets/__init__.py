"""Data sets: pedestrians drawn by code, a classical descriptor to try them with, and tables of images of people."""

from pose2id.datasets.stripes import colour_stripes
from pose2id.datasets.synthetic import Sample, SyntheticPedestrians
from pose2id.datasets.table import PersonImage, read_table, table_of_folder, write_people, write_table

__all__ = [
    "PersonImage",
    "Sample",
    "SyntheticPedestrians",
    "colour_stripes",
    "read_table",
    "table_of_folder",
    "write_people",
    "write_table",
]
