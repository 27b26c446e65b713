"""Arrays by name out of .npz, .mat (both kinds), .pt and .npy files. Nothing in a file is ever executed."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pose2id.io.checks import as_numpy, first_few, require_modules

SUFFIXES = (".npz", ".mat", ".pt", ".pth")
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100  # Deflate makes a thousandth of zeros
# Damaged files can end the process of scipy or HDF5: another one reads the file first.
_MAT5 = "import sys; from scipy.io import loadmat; loadmat(sys.argv[1])"
_MAT73 = "import sys, h5py; file = h5py.File(sys.argv[1], 'r'); [x[()] for x in file.values() if hasattr(x, 'dtype')]"


def read_arrays(path: Path) -> dict[str, Any]:
    """Everything in a file, by name.

    Raises:
        ValueError: a damaged file, pickled objects, an array that is there twice, an .npz of more than 1 GiB that is
            packed to less than a hundredth, or a .pt that holds no mapping.
        ImportError: MATLAB 7.3 without h5py.
    """
    suffix = path.suffix.lower()
    return _read_npz(path) if suffix == ".npz" else _read_mat(path) if suffix == ".mat" else _read_pt(path)


def read_array(path: Path) -> Any:
    """The one array of an .npy file, memory-mapped, or the one tensor of a .pt file."""
    if path.suffix.lower() == ".npy":
        try:
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path} is damaged, or not an .npy file of numbers ({error}).") from error
    content = _loaded(path)
    if not isinstance(content, Tensor):
        raise ValueError(f"{path} must hold one tensor, got {type(content).__name__}. Give files of one kind.")
    return _plain(content)


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
        file = np.load(path, allow_pickle=False)
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path} is damaged, or not an .npz file ({error}).") from error
    arrays = {}
    with file:
        twice = {name for name in file.files if file.files.count(name) > 1}
        if twice:
            raise ValueError(f"{path} must hold each array once, got {first_few(sorted(twice))} more than once.")
        if unpacked > max(_BOMB_BYTES, _BOMB_RATIO * path.stat().st_size):
            given = f"{unpacked / 1e9:.3g} GB packed into {path.stat().st_size:,} bytes"
            raise ValueError(f"{path} must hold features, which hardly pack, got {given}. Write it uncompressed.")
        for name in file.files:
            try:
                arrays[name] = file[name]
            except Exception as error:
                raise ValueError(
                    f"{name} of {path} cannot be read ({error}). Pickled objects, which can run code, are refused."
                ) from error
    return arrays


def _read_mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat  # noqa: PLC0415 - slow to import

    with path.open("rb") as file:
        new = file.read(19) == b"MATLAB 7.3 MAT-file"
    if new:
        require_modules(f'{path} is of MATLAB 7.3, which needs the extra "mat"', '"pose2id[mat]"', "h5py")
    reading = [sys.executable, "-c", _MAT73 if new else _MAT5, str(path)]
    done = subprocess.run(reading, capture_output=True, text=True, check=False)
    if done.returncode:  # of an exception, too, of many kinds
        problem = done.stderr.strip().rpartition("\n")[2] or f"its reader ended with status {done.returncode}"
        raise ValueError(f"{path} cannot be read ({problem}). Save it in MATLAB with -v7, or as .npz.")
    content = _mat73(path) if new else loadmat(path)
    return {name: value for name, value in content.items() if not name.startswith("__")}


def _mat73(path: Path | str) -> dict[str, Any]:
    """Numbers of a MATLAB 7.3 file, which is HDF5 with dimensions in reverse; cells, structs and text are left out."""
    import h5py  # noqa: PLC0415 - optional

    with h5py.File(path, "r") as file:
        plain = {
            name: item for name, item in file.items() if isinstance(item, h5py.Dataset) and item.dtype.kind in "iufb"
        }
        text = {name for name, item in plain.items() if item.attrs.get("MATLAB_class") == b"char"}
        return {name: item[()].T for name, item in plain.items() if name not in text}


def _read_pt(path: Path) -> dict[str, Any]:
    content = _loaded(path)
    if not isinstance(content, Mapping):
        given = type(content).__name__
        raise ValueError(f"{path} must hold a dict of tensors, got {given}. One tensor a file comes in pairs.")
    return {str(name): _plain(value) for name, value in content.items()}


def _loaded(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can fail in any way
        problem = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} cannot be read as tensors ({problem}). Objects, which can run code, are refused."
        ) from error


def _plain(value: Any) -> Any:
    """Tensors as numpy arrays; lists of labels as they are."""
    return as_numpy(value) if isinstance(value, Tensor) else value
