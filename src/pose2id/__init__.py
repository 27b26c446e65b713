"""Training-free person re-identification: centralize the features of any ReID model towards their identity's centre.

The public surface is small: `Centralizer` inside a pipeline, made of an `Extractor` (your model) and a source of
pictures of the same people in other poses (`GeneratedPictures` of an `IdentityGenerator`, or a `PictureFolder`);
`nfc` and `fuse` on features, `evaluate` and `id2_score` to measure them. Helpers live in the submodules. Names load on
first use, so that importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pose2id.centralization.cameras import CameraModel, centre_cameras
    from pose2id.centralization.diagnostics import (
        GenerationDiagnostics,
        NFCDiagnostics,
        generation_diagnostics,
        nfc_diagnostics,
    )
    from pose2id.centralization.fusion import fuse
    from pose2id.centralization.guard import Evidence, evidence
    from pose2id.centralization.id2 import IdentityDensity, id2_score, identity_density
    from pose2id.centralization.links import WeightedLinks, link_map, link_weights
    from pose2id.centralization.nfc import nfc
    from pose2id.centralization.propagation import graph_propagation
    from pose2id.centralizer import Centralizer
    from pose2id.extractor import Extractor
    from pose2id.gallery.gallery import Gallery, SearchResult
    from pose2id.gallery.unknown import Threshold
    from pose2id.ipg.generator import IdentityGenerator
    from pose2id.ipg.pictures import GeneratedPictures, PictureFolder
    from pose2id.ipg.sampling import Sampling
    from pose2id.neighbors.search import nearest_neighbors
    from pose2id.neighbors.visible_parts import part_distances
    from pose2id.retrieval.evaluation import EvaluationResult, evaluate, evaluate_rank
    from pose2id.retrieval.expansion import aqe, database_augmentation, query_expansion
    from pose2id.retrieval.rerank import k_reciprocal, re_ranking
    from pose2id.retrieval.verification import OpenSetResult, VerificationResult, open_set, verification

__version__ = "0.1.0"

__all__ = [
    "CameraModel",
    "Centralizer",
    "EvaluationResult",
    "Evidence",
    "Extractor",
    "Gallery",
    "GeneratedPictures",
    "GenerationDiagnostics",
    "IdentityDensity",
    "IdentityGenerator",
    "NFCDiagnostics",
    "OpenSetResult",
    "PictureFolder",
    "Sampling",
    "SearchResult",
    "Threshold",
    "VerificationResult",
    "WeightedLinks",
    "aqe",
    "centre_cameras",
    "database_augmentation",
    "evaluate",
    "evaluate_rank",
    "evidence",
    "fuse",
    "generation_diagnostics",
    "graph_propagation",
    "id2_score",
    "identity_density",
    "k_reciprocal",
    "link_map",
    "link_weights",
    "nearest_neighbors",
    "nfc",
    "nfc_diagnostics",
    "open_set",
    "part_distances",
    "query_expansion",
    "re_ranking",
    "verification",
]

_MODULES = {
    "centralization.cameras": ("CameraModel", "centre_cameras"),
    "centralization.diagnostics": (
        "GenerationDiagnostics",
        "NFCDiagnostics",
        "generation_diagnostics",
        "nfc_diagnostics",
    ),
    "centralization.fusion": ("fuse",),
    "centralization.guard": ("Evidence", "evidence"),
    "centralization.id2": ("IdentityDensity", "id2_score", "identity_density"),
    "centralization.links": ("WeightedLinks", "link_map", "link_weights"),
    "centralization.nfc": ("nfc",),
    "centralization.propagation": ("graph_propagation",),
    "centralizer": ("Centralizer",),
    "extractor": ("Extractor",),
    "gallery.gallery": ("Gallery", "SearchResult"),
    "gallery.unknown": ("Threshold",),
    "ipg.generator": ("IdentityGenerator",),
    "ipg.pictures": ("GeneratedPictures", "PictureFolder"),
    "ipg.sampling": ("Sampling",),
    "neighbors.search": ("nearest_neighbors",),
    "neighbors.visible_parts": ("part_distances",),
    "retrieval.evaluation": ("EvaluationResult", "evaluate", "evaluate_rank"),
    "retrieval.expansion": ("aqe", "database_augmentation", "query_expansion"),
    "retrieval.rerank": ("k_reciprocal", "re_ranking"),
    "retrieval.verification": ("OpenSetResult", "VerificationResult", "open_set", "verification"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

_SUBMODULES = (
    "centralization",
    "datasets",
    "demo",
    "extraction",
    "extractor",
    "gallery",
    "io",
    "ipg",
    "models",
    "neighbors",
    "plots",
    "poses",
    "report",
    "retrieval",
    "training",
)


def __getattr__(name: str) -> object:
    if name in _SUBMODULES:
        return import_module(f"pose2id.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'pose2id' has no attribute {name!r}")
    value: object = getattr(import_module(f"pose2id.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_SUBMODULES, "__version__"])
