"""Checks of arguments where a value enters. An error names the argument, the rule, what was given, and the remedy."""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_VISIBILITY = 1 + 1e-6  # rounding
_LEAST_VISIBILITY = 1e-100  # products of two larger ones don't vanish
MIN_BLOCK_BYTES = 1 << 20
BLOCK_BYTES = 32 << 20  # what one block of temporaries takes unless the caller sets max_memory


def checked_count(value: Any, name: str, least: int = 1, most: int = 2**63 - 1) -> int:
    """An integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}.")
    number = int(value)
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, got {number}.")
    return number


def checked_number(value: Any, name: str, low: float, high: float) -> float:
    """A finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not low <= float(value) <= high:  # NaN fails too
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {value!r}.")
    return float(value)


def checked_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """One of a few strings."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}.")
    return str(value)


def checked_size(size: Any, name: str = "size") -> tuple[int, int]:
    """A (height, width) in pixels."""
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width) in pixels, got {size!r}.")
    return checked_count(size[0], name), checked_count(size[1], name)


def checked_memory(max_memory: Any) -> int:
    """Bytes for one block of temporaries, at least 1 MiB; None: the default."""
    if max_memory is None:
        return BLOCK_BYTES
    whole = int(max_memory) if isinstance(max_memory, float) and max_memory.is_integer() else max_memory  # 1e9
    return checked_count(whole, "max_memory", least=MIN_BLOCK_BYTES)


def checked_labels(labels: Any, name: str, length: int) -> NDArray[np.int64]:
    """Integer labels (array, tensor or sequence) as a (length,) int64 array."""
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.size == 0 and length == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        given = f"dtype {array.dtype}. Try numpy.unique(labels, return_inverse=True)[1]"
        raise TypeError(f"{name} must hold integers, got {None if labels is None else given}.")
    if array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into 64-bit signed integers, got {array.max()}.")
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), one label per row, got {array.shape}.")
    return array.astype(np.int64)


def checked_distances(distances: Any, name: str) -> NDArray[Any]:
    """A (Q, G) matrix of distances as a floating numpy array, without a copy where it is one already."""
    if isinstance(distances, Tensor):
        distances = distances.detach().cpu()
        distances = (distances.float() if distances.dtype in (torch.float16, torch.bfloat16) else distances).numpy()
    if not isinstance(distances, np.ndarray) or distances.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a numpy array or a torch tensor of numbers, got {_kind(distances)}.")
    if distances.ndim != 2 or 0 in distances.shape:
        raise ValueError(f"{name} must have two dimensions with at least one entry, got shape {distances.shape}.")
    return distances if distances.dtype.kind == "f" else distances.astype(np.float64)


def checked_visibility(visibility: Any, name: str, shape: tuple[int, ...] | None) -> Tensor:
    """Visibility of parts, of any numeric dtype, as a float64 tensor on the CPU; None: whole features have none."""
    if isinstance(visibility, np.ndarray) and visibility.dtype.kind in "biuf":
        weights = torch.from_numpy(visibility.astype(np.float64))
    elif isinstance(visibility, Tensor) and not visibility.is_complex():
        weights = visibility.detach().cpu().double()
    else:
        raise TypeError(f"{name} must be a numeric numpy array or torch tensor, got {_kind(visibility)}.")
    if shape is None:
        raise ValueError(f"{name} must be None for whole features, got shape {tuple(weights.shape)}.")
    if tuple(weights.shape) != shape:
        raise ValueError(f"{name} must have shape {shape}, one value per part, got {tuple(weights.shape)}.")
    if not ((weights >= 0) & (weights <= _MAX_VISIBILITY)).all():  # NaN compares false
        given = f"[{weights.min():g}, {weights.max():g}]"
        raise ValueError(f"{name} must be in [0, 1], got values in {given}. Divide by the largest.")
    return torch.where(weights >= _LEAST_VISIBILITY, weights, 0.0)


def checked_device(device: Any) -> torch.device:
    """A torch device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}.") from error


def checked_flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")
    return value


def require_modules(need: str, install: str, *modules: str) -> None:
    """Import modules, or raise an ImportError: what needs them, and the pip command."""
    try:
        for module in modules:
            import_module(module)
    except ImportError as error:
        raise ImportError(f"{need}: pip install {install} ({error}).") from error


def first_few(names: Iterable[Any], total: int | None = None, most: int = 3, separator: str = ", ") -> str:
    """What an error lists of many: "a, b, c, ... and 7 more"; `total` counts those too that are not in `names`."""
    given = list(names)
    shown = [str(name) for name in given[:most]]
    hidden = (len(given) if total is None else total) - len(shown)
    return separator.join([*shown, f"... and {hidden} more"] if hidden else shown)


def _kind(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else type(value).__name__
