"""Data sets: pedestrians drawn by code, and a classical descriptor to try them with."""

from pose2id.datasets.stripes import colour_stripes
from pose2id.datasets.synthetic import Sample, SyntheticPedestrians

__all__ = ["Sample", "SyntheticPedestrians", "colour_stripes"]
