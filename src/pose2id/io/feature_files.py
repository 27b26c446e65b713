"""Feature files: query and gallery features with their labels, as .npz or as the field's .mat.

Both are read as plain arrays: nothing in a file is ever executed. Written files appear whole or not at all.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.checks import checked_labels
from pose2id.io.rows import Rows, checked_pair
from pose2id.io.whole_files import whole_file

_MAT_NAME_LENGTH = 63
_NPZ_KEYS = {
    "query_feats": "query_feats",
    "gallery_feats": "gallery_feats",
    "q_pids": "q_pids",
    "g_pids": "g_pids",
    "q_camids": "q_camids",
    "g_camids": "g_camids",
}
# The layout in which Market1501 features are commonly passed around between Python and MATLAB.
_MAT_KEYS = {
    "query_feats": "query_f",
    "gallery_feats": "gallery_f",
    "q_pids": "query_label",
    "g_pids": "gallery_label",
    "q_camids": "query_cam",
    "g_camids": "gallery_cam",
}


@dataclass(frozen=True, eq=False)
class FeatureFile:
    """The content of a feature file.

    Attributes:
        query_feats: (Q, D) floating features.
        gallery_feats: (G, D) floating features.
        q_pids, g_pids, q_camids, g_camids: (Q,) or (G,) int64 labels, or None where the file has none.
        others: every other array of the file, by name; kept when the file is written again.
    """

    query_feats: NDArray[Any]
    gallery_feats: NDArray[Any]
    q_pids: NDArray[np.int64] | None = None
    g_pids: NDArray[np.int64] | None = None
    q_camids: NDArray[np.int64] | None = None
    g_camids: NDArray[np.int64] | None = None
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
        The arrays, checked: features are finite and of one width, labels integers and as many as features.

    Raises:
        ValueError: another ending, a broken file, pickled objects, a missing array, or bad content, named.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    keys = _keys(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    arrays = _read_npz(path) if _suffix(path) == ".npz" else _read_mat(path)
    missing = [key for key in (keys["query_feats"], keys["gallery_feats"]) if key not in arrays]
    if missing:
        raise ValueError(f"{path} must hold {' and '.join(missing)}; it holds {', '.join(arrays) or 'nothing'}.")
    found: dict[str, Any] = {name: arrays.pop(key, None) for name, key in keys.items()}
    query, gallery = (Rows(found[name], f"{keys[name]} of {path}") for name in ("query_feats", "gallery_feats"))
    checked_pair(query, gallery, keys["query_feats"], keys["gallery_feats"])
    for name in ("q_pids", "g_pids", "q_camids", "g_camids"):
        if found[name] is not None:
            labels = _integral(np.asarray(found[name]))
            found[name] = checked_labels(labels, f"{keys[name]} of {path}", (query if name[0] == "q" else gallery).n)
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
    check_target(path, overwrite=overwrite)
    path = Path(path).resolve()  # what a link points to, not the link, is replaced
    named = {key: getattr(features, name) for name, key in _keys(path).items() if getattr(features, name) is not None}
    collisions = sorted(set(_keys(path).values()) & set(features.others))
    if collisions:
        raise ValueError(f"{', '.join(collisions)} in the file's other arrays would replace the features or labels.")
    write = _write_npz if _suffix(path) == ".npz" else _write_mat
    with whole_file(path) as unfinished, unfinished.open("xb") as file:
        write(file, {**named, **features.others})


def _write_npz(file: Any, arrays: Mapping[str, Any]) -> None:
    pickled = [name for name, value in arrays.items() if np.asanyarray(value).dtype.hasobject]
    if pickled:
        raise ValueError(f"{', '.join(pickled)} cannot be written to .npz without pickling. Write a .mat file.")
    # Not numpy.savez: its keywords cannot hold every name, and it would pickle.
    with zipfile.ZipFile(file, "w", allowZip64=True) as archive:
        for name, value in arrays.items():
            if isinstance(value, bytes):  # a member that is no array
                archive.writestr(name, value)
                continue
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, np.asanyarray(value), allow_pickle=False)


def _write_mat(file: Any, arrays: Mapping[str, Any]) -> None:
    from scipy.io import savemat  # noqa: PLC0415 - slow to import

    bad = [name for name in arrays if not name.isidentifier() or name.startswith("_") or len(name) > _MAT_NAME_LENGTH]
    if bad:
        raise ValueError(f"{', '.join(bad)} cannot be names in a .mat file. Write an .npz file.")
    # MATLAB knows no half precision.
    wide = {name: value.astype(np.float32) if _is_half(value) else value for name, value in arrays.items()}
    savemat(file, wide, do_compression=True, long_field_names=True)


def _is_half(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.dtype == np.float16


def check_target(
    path: str | os.PathLike[str], *, overwrite: bool = False, suffixes: tuple[str, ...] = (".npz", ".mat")
) -> None:
    """Raise before any work what would hinder writing this file: its ending, a missing folder, a file that exists."""
    path = Path(path)
    if _suffix(path) not in suffixes:
        raise ValueError(f"Files to write here end in {' or '.join(suffixes)}, got {path}.")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to.")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Choose another name, or say to overwrite it (--overwrite).")


def _suffix(path: Path) -> str:
    return path.suffix.lower()


def _keys(path: Path) -> dict[str, str]:
    if _suffix(path) not in (".npz", ".mat"):
        raise ValueError(f"Feature files end in .npz or .mat, got {path}.")
    return _NPZ_KEYS if _suffix(path) == ".npz" else _MAT_KEYS


def _read_npz(path: Path) -> dict[str, Any]:
    try:
        with zipfile.ZipFile(path):
            pass
        file = np.load(path, allow_pickle=False)
    except (zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"{path} is damaged, or no .npz file ({error}). Write it again with numpy.savez.") from error
    arrays = {}
    with file:
        for name in file.files:
            try:
                arrays[name] = file[name]
            except (ValueError, zipfile.BadZipFile, EOFError, zlib.error) as error:
                raise ValueError(
                    f"{name} of {path} cannot be read ({error}). Pickled objects can run code and are refused; save "
                    "plain arrays with numpy.savez."
                ) from error
    return arrays


def _read_mat(path: Path) -> dict[str, Any]:
    from scipy.io import loadmat  # noqa: PLC0415 - slow to import

    try:
        content = loadmat(path)
    except Exception as error:  # loadmat raises many kinds, NotImplementedError for version 7.3 among them
        raise ValueError(f"{path} cannot be read ({error}). Save it in MATLAB with -v7, or as .npz.") from error
    return {name: value for name, value in content.items() if not name.startswith("__")}


def _integral(labels: NDArray[Any]) -> NDArray[Any]:
    """MATLAB has rows for vectors and doubles for integers."""
    flat = labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else labels
    is_whole = flat.dtype.kind == "f" and bool(((flat == np.rint(flat)) & (np.abs(flat) < 2**53)).all())
    return flat.astype(np.int64) if is_whole else flat
