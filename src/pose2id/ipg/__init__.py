"""Identity-guided pedestrian generation (IPG): the person on a reference image, in other poses.

`Networks` are the six networks, each of which can be replaced; `IdentityGenerator` samples with them. Names load on
first use: diffusers takes seconds to import, and pictures of a folder need none of it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pose2id.ipg.batch import generate_files
    from pose2id.ipg.generator import IdentityGenerator
    from pose2id.ipg.identity import IdentityTokens, TransReID
    from pose2id.ipg.networks import IdentityEncoder, Networks
    from pose2id.ipg.pose_encoder import PoseEncoder
    from pose2id.ipg.sampling import Sampling
    from pose2id.ipg.weights import convert

__all__ = [
    "IdentityEncoder",
    "IdentityGenerator",
    "IdentityTokens",
    "Networks",
    "PoseEncoder",
    "Sampling",
    "TransReID",
    "convert",
    "generate_files",
]

_MODULES = {
    "networks": ("IdentityEncoder", "Networks"),
    "generator": ("IdentityGenerator",),
    "identity": ("IdentityTokens", "TransReID"),
    "pose_encoder": ("PoseEncoder",),
    "sampling": ("Sampling",),
    "weights": ("convert",),
    "batch": ("generate_files",),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'pose2id.ipg' has no attribute {name!r}")
    value: object = getattr(import_module(f"pose2id.ipg.{_HOME[name]}"), name)
    globals()[name] = value
    return value
