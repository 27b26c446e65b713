"""Feature files: query and gallery features with their labels, as .npz or as the field's .mat.

Both are read as plain arrays: nothing in a file is ever executed. Written files appear whole or not at all.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import first_few, labels_together
from pose2id.io.rows import Rows, checked_pair
from pose2id.io.whole_files import new_file, whole_file

_MAT_NAME_LENGTH = 63
_BOMB_BYTES, _BOMB_RATIO = 1 << 30, 100  # Deflate makes a thousandth of zeros
_LABELS = ("q_pids", "g_pids", "q_camids", "g_camids")
_NPZ_KEYS = {name: name for name in ("query_feats", "gallery_feats", *_LABELS)}
# The layout in which Market1501 features are commonly passed around between Python and MATLAB.
_MAT_KEYS = dict(
    zip(_NPZ_KEYS, ("query_f", "gallery_f", "query_label", "gallery_label", "query_cam", "gallery_cam"), strict=True)
)
_KEYS = {".npz": _NPZ_KEYS, ".mat": _MAT_KEYS}
# Names of arguments, easily taken for those of arrays.
_MISTAKEN = dict(zip(("query_pids", "gallery_pids", "query_camids", "gallery_camids"), _LABELS, strict=True))


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """The content of a feature file.

    Attributes:
        query_feats: (Q, D) floating features.
        gallery_feats: (G, D) floating features.
        q_pids, g_pids, q_camids, g_camids: (Q,) or (G,) labels, int64 or strings, or None where the file has none.
        others: every other array of the file, by name; kept when the file is written again.
    """

    query_feats: NDArray[Any]
    gallery_feats: NDArray[Any]
    q_pids: NDArray[Any] | None = None
    g_pids: NDArray[Any] | None = None
    q_camids: NDArray[Any] | None = None
    g_camids: NDArray[Any] | None = None
    others: dict[str, Any] = field(default_factory=dict)

    def with_features(self, query_feats: NDArray[Any], gallery_feats: NDArray[Any]) -> FeatureFile:
        """The same file with other features."""
        return replace(self, query_feats=query_feats, gallery_feats=gallery_feats)


def load_features(path: str | os.PathLike[str]) -> FeatureFile:
    """Read a feature file.

    .npz: `query_feats` (Q, D), `gallery_feats` (G, D); optional `q_pids`, `g_pids`, `q_camids`, `g_camids`.
    .mat (up to version 7): `query_f`, `gallery_f`; optional `query_label`, `gallery_label`, `query_cam`, `gallery_cam`.

    Args:
        path: the file; its ending tells the format.

    Returns:
        The arrays, checked: features are finite and of one width, labels integers (or strings) and as many as features.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another ending, a broken file, pickled objects, an array that is missing or there twice, labels by
            the name of an argument (query_camids), an .npz of more than 1 GiB that is packed to less than a hundredth,
            or bad content, named.
    """
    path = Path(path)
    keys = _keys(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    arrays = (_read_npz if keys is _NPZ_KEYS else _read_mat)(path)
    missing = [keys[name] for name in ("query_feats", "gallery_feats") if keys[name] not in arrays]
    if missing:
        raise ValueError(f"{path} must hold {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}.")
    for taken, name in _MISTAKEN.items():
        if taken in arrays and keys[name] not in arrays:
            raise ValueError(
                f"{path} must call its labels {keys[name]}, got {taken}, which would be ignored. Rename it."
            )
    found: dict[str, Any] = {name: arrays.pop(key, None) for name, key in keys.items()}
    query, gallery = (Rows(found[name], f"{keys[name]} of {path}") for name in ("query_feats", "gallery_feats"))
    checked_pair(query, gallery, keys["query_feats"], keys["gallery_feats"])
    for names in (_LABELS[:2], _LABELS[2:]):
        given = {name: _flat(np.asarray(found[name])) for name in names if found[name] is not None}
        sizes = {"q": query.n, "g": gallery.n}
        sides = {f"{keys[name]} of {path}": (labels, sizes[name[0]]) for name, labels in given.items()}
        for (name, labels), integers in zip(given.items(), labels_together(sides), strict=True):
            found[name] = labels if labels.dtype.kind == "U" else integers
    return FeatureFile(**found, others=arrays)


def save_features(features: FeatureFile, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Write a feature file in the format of the path's ending; it appears whole or not at all.

    Args:
        features: what to write, its other arrays included.
        path: .npz or .mat; float16 becomes float32 in .mat.
        overwrite: replace an existing file.

    Raises:
        ValueError: another ending, or names or MATLAB cells that the format cannot hold.
        FileExistsError: the file exists and `overwrite` is False.
    """
    target, keys = new_feature_file(path, overwrite=overwrite), _keys(Path(path))
    named = {key: getattr(features, name) for name, key in keys.items() if getattr(features, name) is not None}
    collisions = sorted(set(keys.values()) & set(features.others))
    if collisions:
        raise ValueError(f"{', '.join(collisions)} in the file's other arrays would replace the features or labels.")
    write = _write_npz if keys is _NPZ_KEYS else _write_mat
    with whole_file(target) as unfinished, unfinished.open("xb") as file:
        write(file, {**named, **features.others})


def new_feature_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """As `whole_files.new_file`, for the endings of feature files."""
    return new_file(path, overwrite=overwrite, suffixes=tuple(_KEYS))


def _keys(path: Path) -> dict[str, str]:
    if path.suffix.lower() not in _KEYS:
        raise ValueError(f"{path} must end in {' or '.join(_KEYS)}.")
    return _KEYS[path.suffix.lower()]


def _write_npz(file: Any, arrays: Mapping[str, Any]) -> None:
    pickled = [name for name, value in arrays.items() if np.asanyarray(value).dtype.hasobject]
    if pickled:
        raise ValueError(f"{', '.join(pickled)} cannot be written to .npz without pickling. Write a .mat file.")
    # Not numpy.savez: its keywords cannot hold every name, and it would pickle.
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, value in arrays.items():
            if isinstance(value, bytes):  # not an array
                archive.writestr(name, value)
                continue
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def _write_mat(file: Any, arrays: Mapping[str, Any]) -> None:
    from scipy.io import savemat  # noqa: PLC0415 - slow to import

    bad = [name for name in arrays if not name.isidentifier() or name.startswith("_") or len(name) > _MAT_NAME_LENGTH]
    if bad:
        raise ValueError(f"{', '.join(bad)} cannot be names in a .mat file. Write an .npz file.")
    # MATLAB has no half precision.
    half = {name for name, value in arrays.items() if isinstance(value, np.ndarray) and value.dtype == np.float16}
    wide = {name: value.astype(np.float32) if name in half else value for name, value in arrays.items()}
    savemat(file, wide, do_compression=True, long_field_names=True)


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

    # Damaged files can end scipy's process: another one reads the file first.
    reading = [sys.executable, "-c", "import sys; from scipy.io import loadmat; loadmat(sys.argv[1])", str(path)]
    done = subprocess.run(reading, capture_output=True, text=True, check=False)
    if done.returncode:  # of an exception, too: NotImplementedError for version 7.3, and many kinds
        problem = done.stderr.strip().rpartition("\n")[2] or f"scipy's reader ended with status {done.returncode}"
        raise ValueError(f"{path} cannot be read ({problem}). Save it in MATLAB with -v7, or as .npz.")
    content = loadmat(path)
    return {name: value for name, value in content.items() if not name.startswith("__")}


def _flat(labels: NDArray[Any]) -> NDArray[Any]:
    """MATLAB has rows for vectors."""
    return labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else labels
