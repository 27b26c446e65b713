"""Feature sets that callers hand in: checked once, then read block by block.

Containers: numpy in, numpy out; torch in, torch out, on the same device and in the same dtype. Only `Rows` knows which
of the two it is. Callers' arrays are never modified and never copied whole.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, checked_flag, checked_visibility, dense, first_few
from pose2id.io.threads import use_threads

FeatureArray = TypeVar("FeatureArray", "NDArray[Any]", Tensor)

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MAX_NORM = 1e300  # differences and means of larger float64 rows overflow
_LANES = 32  # columns below which sums go column by column


class Rows:
    """The rows of one feature set, read in blocks as fresh tensors, L2-normalised on the way when asked.

    A row of features in parts holds its parts one after the other, and each is normalised by itself; whole features are
    one part.

    Attributes:
        n, dim: number of rows and of columns.
        parts: number of parts of a row, dim / parts columns each.
        in_parts: whether the features have shape (N, P, D); P may be 1.
        device: where rows are computed: the features' own device, or the CPU for devices without float64 (MPS).
        dtype: what results are computed in: float64 for float64 features, else float32.
        norms: (n,) float64 Euclidean norms.
        directions: (n,) int64, how many parts are not zero.

    Raises:
        TypeError: not a numpy array or torch tensor of a floating dtype.
        ValueError: not two dimensions (with `parts`: or three), no columns, or rows that are not finite, named.
    """

    def __init__(self, features: Any, name: str, *, normalize: bool = False, parts: bool = False) -> None:
        self._array = _checked_features(features, name, parts=parts)
        self.n, *shape = (int(size) for size in self._array.shape)
        self.in_parts = len(shape) > 1
        self.parts, self.dim = shape[0] if self.in_parts else 1, math.prod(shape)
        self.device = torch.device("cpu")
        if isinstance(features, Tensor) and features.device.type == "cuda":
            self.device = features.device
        self.dtype = torch.float64 if self._array.dtype.itemsize == 8 else torch.float32
        use_threads(self.device, self.n * self.dim)
        self._part_norms = self._finite_norms(name)
        self.norms = row_norms(self._part_norms)
        self.directions = (self._part_norms > 0).sum(1)
        # A zero vector has no direction: it stays the zero vector.
        wanted = checked_flag(normalize, "normalize")
        self._divide_by(torch.where(self._part_norms > 0, self._part_norms, 1.0) if wanted else None)
        self._vanishing = wanted and bool(_vanishing(self._part_norms).any())

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Rows at `index` (slice or int64 tensor) as a fresh tensor on `self.device`, in `dtype` or `self.dtype`."""
        dtype = dtype or self.dtype
        if self._scale is None:
            return self._raw(index, dtype)
        rows = self._raw(index, torch.float64 if self._beyond_float32 else dtype)
        if self._vanishing:
            return unit(self.by_part(rows)).flatten(1).to(dtype)
        self.by_part(rows).div_(self._scale[index, :, None].to(rows.dtype))
        return rows.to(dtype)

    def as_given(self, dtype: torch.dtype) -> Tensor:
        """All rows as they came, as a fresh tensor on `self.device`."""
        return self._raw(slice(None), dtype)

    def by_part(self, rows: Tensor) -> Tensor:
        """A view (B, P, D / P) of rows (B, D)."""
        return rows.view(len(rows), self.parts, self.dim // self.parts)

    def visibility(self, given: Any, name: str) -> Tensor:
        """How visible each part is: (n, P) float64 weights on `self.device`. None: every part is fully visible."""
        if given is None:
            return torch.ones((self.n, self.parts), dtype=torch.float64, device=self.device)
        return checked_visibility(given, name, (self.n, self.parts) if self.in_parts else None).to(self.device)

    def _divide_by(self, scale: Tensor | None) -> None:
        self._scale = scale
        # float32 rows divided by such scales lose digits or vanish.
        self._beyond_float32 = scale is not None and bool(((scale < 1e-30) | (scale > 1e30)).any())

    @staticmethod
    def share_scale(*sets: Rows) -> float:
        """Divide several sets by one power of two, so that no square overflows; ratios of distances stay the same."""
        scale = 2.0 ** math.frexp(max(float(rows.norms.max()) for rows in sets))[1]
        for rows in sets:
            rows._divide_by(torch.full_like(rows._part_norms, scale))
        return scale

    def blocks(self, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
        """Slices that cover all rows; four float64 copies of one block take at most `block_bytes`."""
        return blocks(self.n, block_bytes // (32 * self.dim))

    def empty(self, n: int | None = None) -> NDArray[Any] | Tensor:
        """A new array for all rows, or n, in the features' own shape, container, dtype and device."""
        shape = (self.n if n is None else n, *self._array.shape[1:])
        if isinstance(self._array, Tensor):
            return torch.empty(shape, dtype=self._array.dtype, device=self._array.device)
        return np.empty(shape, dtype=self._array.dtype)

    @staticmethod
    def write(result: NDArray[Any] | Tensor, index: slice, rows: Tensor) -> None:
        """Put computed rows (B, D) into an array made by `empty`."""
        rows = rows.reshape(len(rows), *result.shape[1:])
        if isinstance(result, Tensor):
            result[index] = rows.to(result)
        else:
            result[index] = rows.cpu().numpy()

    def _raw(self, index: slice | Tensor, dtype: torch.dtype) -> Tensor:
        if isinstance(self._array, Tensor):
            local = index.to(self._array.device) if isinstance(index, Tensor) else index
            # Indexing gathers the same rows several times as slowly as index_select.
            fresh = isinstance(local, Tensor)  # gathered, so a copy already
            chosen = self._array.index_select(0, local) if isinstance(local, Tensor) else self._array[local]
            chosen = chosen.to(self.device)  # first: a device without float64 cannot convert to it
            chosen = chosen.to(dtype, copy=not fresh, memory_format=torch.contiguous_format)
            return chosen.contiguous().view(-1, self.dim)
        chosen = self._array[index.numpy() if isinstance(index, Tensor) else index]
        # A fresh array: torch takes neither read-only memory, nor negative strides, nor foreign byte order. Row by row
        # in memory, so that sums over a row have one order whatever the layout of the input.
        kind = np.float64 if dtype == torch.float64 else np.float32
        return torch.from_numpy(np.array(chosen, dtype=kind, order="C")).view(-1, self.dim)

    def _finite_norms(self, name: str) -> Tensor:
        """(n, P) float64 norms of the parts."""
        norms = torch.empty((self.n, self.parts), dtype=torch.float64, device=self.device)
        for block in self.blocks(BLOCK_BYTES // 8):  # whatever max_memory will be
            rows = self._raw(block, torch.float64)
            norms[block] = row_norms(self.by_part(rows).flatten(0, 1)).view(-1, self.parts)
        bad = ~(norms <= MAX_NORM)  # NaN compares false
        if bad.any():
            places = [f"{row} part {part}" if self.parts > 1 else row for row, part in bad.nonzero()[:5].tolist()]
            given = f"{bad.any(1).sum()} of {self.n} rows are not (row {first_few(places, int(bad.sum()), most=5)})"
            raise ValueError(f"{name} must be finite; {given}. Drop them and their labels, or set hidden parts to 0.")
        return norms


class JoinedRows(Rows):
    """Two sets with as many columns, on one device, read as one: the first set's rows, then the second's."""

    def __init__(self, first: Rows, second: Rows) -> None:
        self._first, self._second = first, second
        self.n, self.dim = first.n + second.n, first.dim
        self.device = first.device
        self.dtype = torch.promote_types(first.dtype, second.dtype)
        self.norms = torch.cat([first.norms, second.norms])
        self.directions = torch.cat([first.directions, second.directions])
        self.parts, self.in_parts = first.parts, first.in_parts

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""
        if isinstance(index, slice):
            index = torch.arange(*index.indices(self.n), device=self.device)
        dtype, in_first = dtype or self.dtype, index < self._first.n
        sides = ((self._first, in_first, index), (self._second, ~in_first, index - self._first.n))
        for rows, chosen, own in sides:
            if chosen.all():  # without a copy
                return rows.read(own, dtype)
        result = torch.empty((len(index), self.dim), dtype=dtype, device=self.device)
        for rows, chosen, own in sides:
            result[chosen] = rows.read(own[chosen], dtype)
        return result


class ChosenRows(Rows):
    """Some rows of a set, by index (int64 tensor)."""

    def __init__(self, rows: Rows, index: Tensor) -> None:
        self._rows, self._index = rows, index
        self.n, self.dim, self.parts, self.in_parts = len(index), rows.dim, rows.parts, rows.in_parts
        self.device, self.dtype = rows.device, rows.dtype
        self.norms, self.directions = rows.norms[index], rows.directions[index]

    def read(self, index: slice | Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """As `Rows.read`."""
        return self._rows.read(self._index[index], dtype)


def row_norms(rows: Tensor) -> Tensor:
    """(B,) Euclidean norms of rows (B, D), scaled by the largest entry so that no square overflows or vanishes.

    The same on every device, to the last digit, so that neighbours of normalised rows are the same there, too.
    """
    peak = torch.maximum(rows.amax(1), -rows.amin(1))
    scaled = rows / torch.where(peak > 0, peak, 1.0)[:, None]
    return peak * square_root(sum_last(scaled.square_()))


def sum_last(values: Tensor) -> Tensor:
    """Sums over the last dimension of `values`, which are overwritten.

    Halves are added until one column is left: one order of sums, whatever the shape, the device and the number of
    threads, so that equal rows have equal sums. torch's own sum cuts a row in as many pieces as suit the processor.
    """
    width = values.shape[-1]
    while width > _LANES:
        half = width // 2
        values[..., :half].add_(values[..., width - half : width])
        width -= half
    columns = values[..., :width].movedim(-1, 0).contiguous()  # adding a few columns of each row would be slow
    while width > 1:
        half = width // 2
        columns[:half].add_(columns[width - half : width])
        width -= half
    return columns[0]


def square_root(values: Tensor) -> Tensor:
    """Correctly rounded square roots, as CUDA's are; torch's own on CPUs may be off in the last digit."""
    return torch.from_numpy(np.sqrt(values.numpy())) if values.device.type == "cpu" else values.sqrt()


def unit(rows: Tensor) -> Tensor:
    """Rows (..., D), L2-normalised; a zero row has no direction and stays zero."""
    norms = row_norms(rows.flatten(0, -2)).view(rows.shape[:-1])
    small = _vanishing(norms)
    if small.any():
        rows = torch.where(small[..., None], rows / torch.finfo(rows.dtype).tiny, rows)
        norms = row_norms(rows.flatten(0, -2)).view(rows.shape[:-1])
    return rows / torch.where(norms > 0, norms, 1.0)[..., None]


def _vanishing(norms: Tensor) -> Tensor:
    """Which norms are too small to have all digits."""
    return (norms > 0) & (norms < torch.finfo(norms.dtype).tiny)


def blocks(n: int, size: int) -> Iterator[slice]:
    """Slices of at most `size` (at least 1) that cover `range(n)`."""
    size = max(1, size)
    return (slice(low, min(low + size, n)) for low in range(0, n, size))


def as_container(result: Tensor, like: NDArray[Any] | Tensor) -> NDArray[Any] | Tensor:
    """A result in the container of `like` (numpy array or torch tensor on its device), dtype kept."""
    return result.to(like.device) if isinstance(like, Tensor) else result.cpu().numpy()


def checked_pair(first: Rows, second: Rows, first_name: str, second_name: str) -> None:
    """Raise unless both sets have rows, the same parts and columns, and (for tensors) the same device."""
    for rows, name in ((first, first_name), (second, second_name)):
        if rows.n == 0:
            raise ValueError(f"{name} must hold at least one row, got an empty set.")
    kinds = [f"{rows.parts} parts" if rows.in_parts else "whole features" for rows in (first, second)]
    for rule, given in (
        ("have the same parts", kinds),
        ("have the same number of columns", [rows.dim // rows.parts for rows in (first, second)]),
        ("be on one device", [rows.device for rows in (first, second)]),
    ):
        if given[0] != given[1]:
            raise ValueError(f"{first_name} and {second_name} must {rule}, got {given[0]} and {given[1]}.")


def _checked_features(features: Any, name: str, *, parts: bool) -> Any:
    dense(features, name)
    if isinstance(features, Tensor):
        floating = features.dtype in FLOAT_DTYPES
        features = features.detach()
    elif isinstance(features, np.ndarray):
        floating = features.dtype.kind == "f" and features.dtype.itemsize in (2, 4, 8)
    else:
        given = type(features).__name__
        raise TypeError(f"{name} must be a numpy array or a torch tensor, got {given}. Try numpy.asarray.")
    if not floating:
        raise TypeError(f"{name} must be dense, of dtype float16, bfloat16, float32 or float64, got {features.dtype}.")
    if features.ndim != 2 and not (parts and features.ndim == 3):
        wanted = "(N, D), one feature per row" + (", or (N, P, D) for features in parts" if parts else "")
        hint = " Try reshape(N, -1), or pose2id.part_distances." if features.ndim == 3 else ""
        raise ValueError(f"{name} must have shape {wanted}, got shape {tuple(features.shape)}.{hint}")
    if 0 in features.shape[1:]:
        raise ValueError(f"{name} must have at least one column, got shape {tuple(features.shape)}.")
    return features


def centred(x: NDArray[np.float64], group: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows (N, D) minus the mean of their group; (N,) groups' numbers from 0, and how many rows each one has."""
    order = np.argsort(group, kind="stable")
    starts = np.cumsum(counts) - counts
    x = x - x[order[starts]][group]  # so that equal features leave exact zeros
    x -= (np.add.reduceat(x[order], starts, axis=0) / counts[:, None])[group]
    return x
