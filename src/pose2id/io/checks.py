"""Checks of arguments where a value enters. An error names the argument, the rule, what was given, and the remedy."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_MAX_VISIBILITY = 1 + 1e-6  # rounding
_LEAST_VISIBILITY = 1e-100  # products of two larger ones don't vanish
_WHOLE = re.compile(r"0*(-?[0-9]{1,19})")
FIRST_WORD = 2**62
MIN_BLOCK_BYTES = 1 << 20
BLOCK_BYTES = 32 << 20  # what one block of temporaries takes unless the caller sets max_memory


def checked_count(value: Any, name: str, least: int = 1, most: int = 2**63 - 1) -> int:
    """An integer in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {_shown(value)}.")
    number = int(value)
    if not least <= number <= most:
        bound = f"at least {least}" if number < least else f"at most {most}"
        raise ValueError(f"{name} must be {bound}, got {_shown(number)}.")
    return number


def checked_number(value: Any, name: str, low: float, high: float) -> float:
    """A finite real number in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {_shown(value)}.")
    exact = int(value) if isinstance(value, numbers.Integral) else float(value)  # 10**400 is beyond floats
    if not low <= exact <= high:  # NaN fails too
        raise ValueError(f"{name} must be in [{low:g}, {high:g}], got {_shown(value)}.")
    return float(value)


def checked_choice(value: Any, name: str, choices: tuple[str, ...]) -> str:
    """One of a few strings."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {_shown(value)}.")
    return str(value)


def checked_size(size: Any, name: str = "size", most: int = 65_535) -> tuple[int, int]:
    """A (height, width) in pixels, of which JPEG has at most 65,535 on a side."""
    if not isinstance(size, Sequence) or isinstance(size, str) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width) in pixels, got {_shown(size)}.")
    return checked_count(size[0], name, most=most), checked_count(size[1], name, most=most)


def checked_memory(max_memory: Any) -> int:
    """Bytes for one block of temporaries, at least 1 MiB; None: the default."""
    if max_memory is None:
        return BLOCK_BYTES
    whole = int(max_memory) if isinstance(max_memory, float) and max_memory.is_integer() else max_memory  # 1e9
    return checked_count(whole, "max_memory", least=MIN_BLOCK_BYTES)


def checked_labels(labels: Any, name: str, length: int) -> NDArray[np.int64]:
    """Labels (array, tensor or sequence of integers, whole floats or strings) as a (length,) int64 array."""
    return labels_together({name: (labels, length)})[0]


def checked_identities(identities: Any, name: str, length: int) -> NDArray[np.int64]:
    """Who is on each image, as (length,) int64: texts, as in a table (007 is not 7), or what `checked_labels` takes."""
    texts = isinstance(identities, (list, tuple, np.ndarray)) and all(isinstance(name, str) for name in identities)
    if not texts or len(identities) != length:
        return checked_labels(identities, name, length)
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(text, len(numbers)) for text in identities], dtype=np.int64)


def labels_together(sides: Mapping[str, tuple[Any, int]]) -> list[NDArray[np.int64]]:
    """`checked_labels` of several sides, by name: what is equal on two sides gets one number.

    A string that spells an integer is that integer: "-1" stays junk and "0000" a distractor. Others count from 2**62.
    """
    arrays = [_label_array(labels, name, length) for name, (labels, length) in sides.items()]
    words = {word for array in arrays if array.dtype.kind == "U" for word in array.tolist()}
    numbers = {word: int(found[1]) for word in words if (found := _WHOLE.fullmatch(word))}
    numbers = {word: number for word, number in numbers.items() if abs(number) < FIRST_WORD}
    for name, array in zip(sides, arrays, strict=True):
        if len(numbers) < len(words) and array.size and array.dtype.kind == "i":
            other = next(name for name, array in zip(sides, arrays, strict=True) if array.dtype.kind == "U")
            raise TypeError(f"{other} must hold integers, as {name} does; it holds strings. Use one kind for both.")
    numbers |= {word: FIRST_WORD + at for at, word in enumerate(sorted(words - numbers.keys()))}
    return [
        np.array([numbers[word] for word in array.tolist()], dtype=np.int64) if array.dtype.kind == "U" else array
        for array in arrays
    ]


def camera_numbers(sides: Mapping[str, tuple[Any, int]]) -> list[Tensor]:
    """Cameras of several sides, by name, as int64 tensors; None, NaN, pandas.NA, or None for all, is unknown: -1."""
    known = {}
    for name, (labels, length) in sides.items():
        values = _numbered(labels)
        # A side without any known camera has no kind that others must share.
        if labels is not None and (labels_together({name: (values, length)})[0] != -1).any():
            known[name] = (values, length)
    found = dict(zip(known, labels_together(known), strict=True))
    return [torch.from_numpy(found.get(name, np.full(length, -1))) for name, (_, length) in sides.items()]


def is_missing(value: Any) -> bool:
    """Whether a label is None, NaN or pandas.NA."""
    if value is None or type(value).__name__ == "NAType":  # pandas is not needed to know it
        return True
    return isinstance(value, (float, np.floating)) and bool(np.isnan(value))


def _numbered(labels: Any) -> Any:
    """Labels with -1 in the place of None, NaN and pandas.NA."""
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.layout == torch.strided:
        labels = as_numpy(labels)
    if isinstance(labels, str) or not np.iterable(labels) or getattr(labels, "dtype", None) in (np.int64, torch.int64):
        return labels
    values = list(labels)
    missing = [is_missing(value) for value in values]
    if not any(missing):
        return labels
    unknown = "-1" if any(isinstance(value, str) for value in values) else -1
    return [unknown if gone else value for gone, value in zip(missing, values, strict=True)]


def cameras_together(sides: Mapping[str, tuple[Any, int]]) -> list[NDArray[np.int64]] | None:
    """`labels_together` of the cameras of all sides, or None where no side has any."""
    given = [labels is not None for labels, _ in sides.values()]
    if any(given) and not all(given):
        raise ValueError(f"{' and '.join(sides)} must be given together, or neither; one of them is missing.")
    return labels_together(sides) if all(given) else None


def _label_array(labels: Any, name: str, length: int) -> NDArray[Any]:
    """(length,) int64 or str."""
    dense(labels, name)
    digits = 53
    if isinstance(labels, Tensor):
        if labels.is_floating_point():
            digits, labels = round(1 - math.log2(torch.finfo(labels.dtype).eps)), labels.double()
        labels = labels.numpy(force=True)
    try:
        array = np.asarray(labels)
    except ValueError as error:
        raise ValueError(f"{name} must have shape ({length},), one label per row; it is ragged.") from error
    if array.size == 0 and length == 0:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind == "O" and array.ndim:
        array = _unboxed(array, name)
    if array.dtype.kind == "f":
        digits = min(digits, np.finfo(array.dtype).nmant + 1)  # further numbers share one float
        whole = (array == np.rint(array)) & (np.abs(array) < 2.0**digits)
        array = array.astype(np.int64) if whole.all() else array
    if array.dtype.kind not in "iuUT" or isinstance(labels, str):
        given = None if labels is None else f"dtype {array.dtype}"
        given = f"{given}, of which some are not whole, or beyond 2**{digits}" if array.dtype.kind == "f" else given
        raise TypeError(f"{name} must hold integers, got {given}. Whole floats and strings will do.")
    if array.dtype.kind == "u" and array.size and array.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} must fit into 64-bit signed integers, got {array.max()}.")
    if array.shape != (length,):
        raise ValueError(f"{name} must have shape ({length},), one label per row, got {array.shape}.")
    return np.char.strip(array.astype(str)) if array.dtype.kind in "UT" else array.astype(np.int64)


def _unboxed(array: NDArray[Any], name: str) -> NDArray[Any]:
    """An array of Python's strings (as pandas has) or integers, in numpy's own dtype; others stay."""
    kind = next((kind for kind in (str, int) if all(type(label) is kind for label in array.flat)), object)
    try:
        return array.astype(kind)
    except OverflowError as error:
        raise ValueError(f"{name} must fit into 64-bit signed integers; one does not.") from error


def checked_distances(distances: Any, name: str) -> NDArray[Any]:
    """A (Q, G) matrix of distances as a numpy array of floats or integers, without a copy where it is one already."""
    dense(distances, name)
    if isinstance(distances, Tensor):
        distances = as_numpy(distances)
    if not isinstance(distances, np.ndarray) or distances.dtype.kind not in "fiu":
        raise TypeError(f"{name} must be a numpy array or a torch tensor of numbers, got {_kind(distances)}.")
    if distances.ndim != 2 or 0 in distances.shape:
        raise ValueError(f"{name} must have two dimensions with at least one entry, got shape {distances.shape}.")
    return np.asarray(distances)  # numpy.matrix would give rows with two dimensions


def checked_visibility(visibility: Any, name: str, shape: tuple[int, ...] | None) -> Tensor:
    """Visibility of parts, of any numeric dtype, as a float64 tensor on the CPU; None: whole features have none."""
    dense(visibility, name)
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


def as_numpy(tensor: Tensor) -> NDArray[Any]:
    """A tensor's values on the CPU, in float32 at least where they are floats: numpy has no bfloat16."""
    if tensor.is_floating_point() and tensor.element_size() < 4:
        tensor = tensor.float()
    return tensor.numpy(force=True)


def dense(value: Any, name: str) -> None:
    """Raise for arrays and tensors that don't hold each of their values plainly; anything else may be."""
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"{name} must not be masked, got a MaskedArray. Drop what is masked, or fill it.")
    if isinstance(value, Tensor) and value.is_meta:
        raise TypeError(f"{name} must be dense, with values, got a tensor on the device 'meta'.")
    if isinstance(value, Tensor) and (value.layout != torch.strided or value.is_nested or value.is_quantized):
        kind = "nested" if value.is_nested else value.dtype if value.is_quantized else value.layout
        raise TypeError(f"{name} must be dense, got a tensor that is {kind}. Try to_dense() or dequantize().")


def checked_device(device: Any) -> torch.device:
    """A torch device."""
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        given = _shown(device)
        raise ValueError(f"device must be a torch device such as 'cpu' or 'cuda:0', got {given}.") from error


def checked_flag(value: Any, name: str) -> bool:
    """True or False."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, got {_shown(value)}.")
    return bool(value)


def checked_flags(**flags: Any) -> None:
    """Each True or False."""
    for name, value in flags.items():
        checked_flag(value, name)


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


def duration(seconds: float) -> str:
    """In the unit that shows one or two digits."""
    unit, name = next(((u, n) for u, n in ((3600, "hours"), (60, "minutes")) if seconds >= 2 * u), (1, "seconds"))
    return f"{seconds / unit:.2g} {name}"


def _kind(value: Any) -> Any:
    return value.dtype if hasattr(value, "dtype") else type(value).__name__


def _shown(value: Any) -> str:
    """What an error says of a value: neither a whole array, nor more digits than Python writes."""
    if isinstance(value, (np.ndarray, Tensor)) and value.ndim:
        return f"an array of shape {tuple(value.shape)}"
    return repr(value) if not isinstance(value, int) or value.bit_length() < 1000 else "a number of over 300 digits"
