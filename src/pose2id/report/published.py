"""Settings and figures of the paper (Yuan et al., CVPR 2025, arXiv 2503.00938), to be set beside measured ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Settings:
    """The method's parameters on a data set."""

    eta: float
    k1: int
    k2: int


_SETTINGS: Mapping[str, Settings] = {
    "Market1501": Settings(2.0, 2, 2),
    "Occluded-REID": Settings(1.0, 1, 1),
    "SYSU-MM01": Settings(0.25, 2, 2),
}

_BOTH = "IPG + NFC"
# mAP and Rank-1 in %, None where the paper has none; by data set (with the search mode of SYSU-MM01), model and row.
_FIGURES: Mapping[tuple[str, str], Mapping[str, tuple[float, float | None]]] = {
    ("Market1501", "transreid"): {
        "baseline": (79.88, 91.48),
        "NFC": (83.92, 91.83),
        "IPG": (88.02, 94.77),
        _BOTH: (90.39, 94.74),
        "re-ranking": (89.56, None),
        f"{_BOTH} + re-ranking": (92.79, None),
        **{
            f"IPG of both, M = {m}": (mAP, None)
            for m, mAP in enumerate((79.88, 82.13, 85.27, 86.16, 86.75, 87.23, 87.52, 87.76, 88.02))
        },
    },
    ("Market1501", "transreid-camera"): {"baseline": (89.0, None), _BOTH: (93.01, None)},
    ("Market1501", "clip-reid-vit"): {"baseline": (89.7, None), _BOTH: (94.0, None)},
    ("Market1501", "clip-reid-cnn"): {"baseline": (89.8, None), _BOTH: (94.9, 97.3)},
    ("Market1501", "imagenet-vit"): {"baseline": (3.34, 11.4), "IPG": (52.81, 78.92), _BOTH: (57.27, 82.39)},
    ("MSMT17", "transreid"): {"baseline": (67.80, None), _BOTH: (74.06, None)},
    ("Occluded-REID", "kpr"): {"baseline": (79.05, None), _BOTH: (89.34, None)},
    ("Occluded-REID", "bpbreid"): {"baseline": (70.41, None), _BOTH: (86.05, None)},
    ("SYSU-MM01, all", "saai"): {"baseline": (71.81, None), _BOTH: (76.44, None)},
    ("SYSU-MM01, indoor", "saai"): {"baseline": (84.6, None), _BOTH: (86.83, None)},
    ("SYSU-MM01, all", "pmt"): {"baseline": (66.13, None), _BOTH: (75.43, None)},
    ("SYSU-MM01, indoor", "pmt"): {"baseline": (77.81, None), _BOTH: (84.29, None)},
}


def settings(data_set: str) -> Settings:
    """The paper's parameters on a data set; those of Market1501 for sets that it lacks."""
    return _SETTINGS.get(data_set.partition(",")[0], _SETTINGS["Market1501"])


def figures(data_set: str, model: str) -> dict[str, dict[str, float]]:
    """The paper's figures of a model on a data set, as fractions by the rows' names.

    Args:
        data_set: "Market1501", "MSMT17", "Occluded-REID", "SYSU-MM01, all" or "SYSU-MM01, indoor".
        model: "transreid" (without camera labels), "transreid-camera", "clip-reid-vit", "clip-reid-cnn", "imagenet-vit"
            (no ReID training), "kpr" (ImageNet Swin, 256 x 128), "bpbreid", "saai" (without AIM) or "pmt".

    Raises:
        ValueError: the paper has no such pair.
    """
    if (data_set, model) not in _FIGURES:
        known = "; ".join(f"{name} on {place}" for place, name in _FIGURES)
        raise ValueError(f"published must be a model that the paper has on {data_set}, got {model!r}. It has {known}.")
    return {
        row: {name: value / 100 for name, value in zip(("mAP", "Rank-1"), values, strict=True) if value is not None}
        for row, values in _FIGURES[data_set, model].items()
    }
