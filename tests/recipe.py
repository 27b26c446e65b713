"""The weights that the golden vectors were made with, from nothing but the names and shapes of a state dict.

A parameter is z = standard_normal(shape) in float32, of a generator seeded with the crc32 of salt + name, then
    running_mean: 0.05 z                 running_var: 1 + 0.05 |z|         num_batches_tracked: 0
    two or more dimensions: z / sqrt(values per output)
    one dimension: 1 + 0.05 z if its name ends in "weight", else 0.05 z
"""

from __future__ import annotations

import math
import zlib

import numpy as np
import torch


def value(name, shape, salt=""):
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, np.int64)
    z = np.random.default_rng(zlib.crc32((salt + name).encode())).standard_normal(tuple(shape), dtype=np.float32)
    small = np.float32(0.05) * z
    if name.endswith("running_mean"):
        return small
    if name.endswith("running_var"):
        return np.float32(1) + np.abs(small)
    if len(shape) >= 2:
        return z / np.float32(math.sqrt(math.prod(shape[1:])))
    return np.float32(1) + small if name.endswith("weight") else small


def tensors(shapes, salt=""):
    """A state dict of the given names and shapes."""
    return {name: torch.from_numpy(np.asarray(value(name, shape, salt))) for name, shape in shapes.items()}


def filled(module, salt=""):
    """The module with the recipe's weights, in place."""
    module.load_state_dict(tensors({name: tuple(t.shape) for name, t in module.state_dict().items()}, salt))
    return module
