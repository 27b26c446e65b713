"""What is this folder? The set is told by the names in it."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pose2id.datasets.cuhk03 import BOXES, cuhk03
from pose2id.datasets.cuhk03 import LAYOUT as CUHK03
from pose2id.datasets.dataset import Dataset
from pose2id.datasets.folders import folders
from pose2id.datasets.layout import Layout, candidates, checked_folder, only
from pose2id.datasets.market1501 import LAYOUT as MARKET1501
from pose2id.datasets.market1501 import market1501
from pose2id.datasets.mars import LAYOUT as MARS
from pose2id.datasets.mars import mars
from pose2id.datasets.msmt17 import LAYOUT as MSMT17
from pose2id.datasets.msmt17 import msmt17
from pose2id.datasets.occluded_reid import LAYOUT as OCCLUDED_REID
from pose2id.datasets.occluded_reid import occluded_reid
from pose2id.datasets.regdb import LAYOUT as REGDB
from pose2id.datasets.regdb import regdb
from pose2id.datasets.sysu_mm01 import LAYOUT as SYSU_MM01
from pose2id.datasets.sysu_mm01 import sysu_mm01
from pose2id.datasets.tables import TABLES, read_table
from pose2id.datasets.vehicleid import LAYOUT as VEHICLEID
from pose2id.datasets.vehicleid import vehicleid
from pose2id.datasets.veri776 import LAYOUT as VERI776
from pose2id.datasets.veri776 import veri776
from pose2id.datasets.withdrawn import refuse_name

READERS: Mapping[str, Callable[..., Dataset]] = {
    "market1501": market1501,
    "msmt17": msmt17,
    "cuhk03": cuhk03,
    "mars": mars,
    "occluded-reid": occluded_reid,
    "sysu-mm01": sysu_mm01,
    "regdb": regdb,
    "veri-776": veri776,
    "vehicleid": vehicleid,
    "folders": folders,
    "table": read_table,
}
_LAYOUTS: Mapping[str, Layout] = {
    "market1501": MARKET1501,
    "msmt17": MSMT17,
    "cuhk03": CUHK03,
    "mars": MARS,
    "occluded-reid": OCCLUDED_REID,
    "sysu-mm01": SYSU_MM01,
    "regdb": REGDB,
    "veri-776": VERI776,
    "vehicleid": VEHICLEID,
}
_OPTIONS = {"boxes": "cuhk03", "direction": "regdb", "trial": "regdb", "size": "vehicleid"}
_FEATURES = (".npz", ".mat", ".npy", ".pt", ".pth")
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".rar", ".7z")


def open_dataset(
    place: str | os.PathLike[str],
    *,
    name: str | None = None,
    boxes: str | None = None,
    direction: str | None = None,
    trial: int | None = None,
    size: str | None = None,
) -> Dataset:
    """Read a data set from where it lies on disk.

    The set is told by the names of the folders and files in it, at `place` or up to two levels below, whatever the
    folders above them are called. A .csv or .tsv file is a table (`read_table`); any other folder is one of folders
    per identity (`folders`).

    Args:
        place: a folder, or a table.
        name: the set, if there are several, or for an error that shows its tree: one of `READERS`.
        boxes: of CUHK03: "detected" or "labeled".
        direction: of RegDB: "visible-to-thermal" or "thermal-to-visible".
        trial: of RegDB: one of its 10 trials, with its training images.
        size: of VehicleID: "small", "medium" or "large".

    Returns:
        The data set. Images are not opened.

    Raises:
        FileNotFoundError: there is nothing at `place`, or a part of the set is missing; the expected tree is shown.
        ValueError: several sets, unknown names, an option of another set, files or lists that do not fit, or DukeMTMC,
            which is not supported.
    """
    path = Path(place).expanduser()
    given = {"boxes": boxes, "direction": direction, "trial": trial, "size": size}
    options = {option: value for option, value in given.items() if value is not None}
    if not path.exists():
        raise FileNotFoundError(f"There is no data set {path}.")
    if path.is_file():
        return _reader(_table_key(path, name), options)(path)
    refuse_name(path.resolve().name, path)
    key, top = _recognised(path) if name is None else (_key(name), path)
    refuse_name(top.resolve().name, top)
    return _reader(key, options)(top, **options)


def _table_key(path: Path, name: str | None) -> str:
    ending = path.suffix.lower()
    if name is not None and _key(name) != "table":
        raise ValueError(f"{path} must be a folder for the set {name!r}, got a file.")
    if ending in TABLES or name is not None:
        return "table"
    advice = ""
    if ending in _FEATURES:
        advice = " A file of features has no images: read it with pose2id.io.feature_files.load_features."
    if ending in _ARCHIVES:
        advice = " Unpack it first."
    raise ValueError(f"{path} must be a folder of images or a table ({', '.join(TABLES)}), got another file.{advice}")


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _key(name: str) -> str:
    found = [key for key in READERS if _plain(key) == _plain(name)]
    refuse_name(name, name)
    if not found:
        raise ValueError(f"name must be one of {', '.join(READERS)}, got {name!r}.")
    return found[0]


def _reader(key: str, options: Mapping[str, Any]) -> Callable[..., Dataset]:
    for option in options:
        if _OPTIONS[option] != key:
            raise ValueError(f"{option} is of {_OPTIONS[option]} alone, and the data set is {key}. Leave it out.")
    return READERS[key]


def _recognised(place: Path) -> tuple[str, Path]:
    found = candidates(checked_folder(place), _LAYOUTS.values())
    if not found:
        return "folders", place
    layout, top = only(found, place)
    key = next(key for key, known in _LAYOUTS.items() if known is layout)
    # CUHK03 is offered in Market1501's layout, too.
    above = [folder.name.lower() for folder in (top.resolve(), top.resolve().parent)]
    if key == "market1501" and (above[0] in BOXES or any("cuhk03" in _plain(folder) for folder in above)):
        key = "cuhk03"
    return key, top
