"""Everything drawn by code: pedestrians, a descriptor for them, the demo, and the tiny weights trained on them."""

from pose2id.demo.people import Sample, SyntheticPedestrians, write_people
from pose2id.demo.stripes import colour_stripes

__all__ = ["Sample", "SyntheticPedestrians", "colour_stripes", "write_people"]
