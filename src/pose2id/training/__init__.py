"""Training IPG: from a table of images to weights that `IdentityGenerator.from_pretrained` loads.

Names load on first use: tables need neither torch's optimizers nor diffusers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pose2id.training.cleansing import Cleansing, clean
    from pose2id.training.run import TrainingResult, train
    from pose2id.training.settings import TrainingSettings
    from pose2id.training.table import PersonImage, read_table, table_of_folder, write_table

__all__ = [
    "Cleansing",
    "PersonImage",
    "TrainingResult",
    "TrainingSettings",
    "clean",
    "read_table",
    "table_of_folder",
    "train",
    "write_table",
]

_MODULES = {
    "cleansing": ("Cleansing", "clean"),
    "table": ("PersonImage", "read_table", "table_of_folder", "write_table"),
    "run": ("TrainingResult", "train"),
    "settings": ("TrainingSettings",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pose2id.training' has no attribute {name!r}")
    value: object = getattr(import_module(f"pose2id.training.{_HOME[name]}"), name)
    globals()[name] = value
    return value
