"""Feature files: query and gallery features with their labels, in the forms that the field passes around.

All are read as plain arrays: nothing in a file is ever executed. Written files appear whole or not at all.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.io.array_files import SUFFIXES, read_array, read_arrays
from pose2id.io.checks import labels_together
from pose2id.io.rows import Rows, checked_pair
from pose2id.io.whole_files import new_file, whole_file

_MAT_NAME_LENGTH = 63
_SIDES = ("query_feats", "gallery_feats")
_ONE_ARRAY = {"is_query", "num_query"}  # what tells the rows of one array apart
_LABELS = ("q_pids", "g_pids", "q_camids", "g_camids")
_NPZ_KEYS = {name: name for name in (*_SIDES, *_LABELS)}
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


def load_features(
    path: str | os.PathLike[str],
    gallery: str | os.PathLike[str] | None = None,
    *,
    labels: str | os.PathLike[str] | None = None,
    name: str | None = None,
) -> FeatureFile:
    """Read features with their labels, in one of three forms.

    Both sets in one file. .npz, .pt (a dict): `query_feats` (Q, D), `gallery_feats` (G, D); optional `q_pids`,
    `g_pids`, `q_camids`, `g_camids`. .mat: `query_f`, `gallery_f`; optional `query_label`, `gallery_label`,
    `query_cam`, `gallery_cam`. MATLAB 7.3 needs h5py: `pip install "pose2id[mat]"`.

    One array (N, D) of both, in one such file: `features`, or any name if it is the only array of features, with
    `is_query` (N,) booleans, or `num_query`: so many rows, the first ones, are queries. Optional `pids`, `camids`.

    A pair of files, .npy (memory-mapped) or .pt with one tensor: queries and gallery. Labels come from a file of the
    first two forms, without features.

    Args:
        path: the file; its ending tells the format.
        gallery: the gallery's file of a pair.
        labels: file with the labels of a pair, in place of those of none.
        name: of the array of features, where a file holds several.

    Returns:
        The arrays, checked: features are finite and of one width, labels integers (or strings) and as many as features.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: MATLAB 7.3 without h5py.
        ValueError: another ending, a broken file, pickled objects, an array that is missing or there twice, labels by
            the name of an argument (query_camids), an .npz of more than 1 GiB that is packed to less than a hundredth,
            or bad content, named.
    """
    path = Path(path)
    if gallery is not None:
        return _checked(path, _pair_of_files(path, Path(gallery), labels), _NPZ_KEYS)
    if labels is not None:
        raise ValueError("labels must come with two files, of query and gallery features.")
    arrays, keys = read_arrays(_existing(path, SUFFIXES)), _KEYS.get(path.suffix.lower(), _NPZ_KEYS)
    missing = [keys[side] for side in _SIDES if keys[side] not in arrays]
    if missing == [keys[side] for side in _SIDES] and _ONE_ARRAY & arrays.keys():
        return _checked(path, _split(path, arrays, name), _NPZ_KEYS)
    if missing:
        one = "or features with is_query or num_query"
        raise ValueError(f"{path} must hold {' and '.join(missing)}, {one}; it holds {', '.join(arrays) or 'nothing'}.")
    if name is not None:
        raise ValueError(f"name must be None for {path}, which holds {keys['query_feats']}, got {name!r}.")
    return _checked(path, arrays, keys)


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


def _existing(path: Path, suffixes: tuple[str, ...]) -> Path:
    if path.suffix.lower() not in suffixes:
        raise ValueError(f"{path} must end in {', '.join(suffixes[:-1])} or {suffixes[-1]}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    return path


def _pair_of_files(path: Path, gallery: Path, labels: str | os.PathLike[str] | None) -> dict[str, Any]:
    sides = [read_array(_existing(file, (".npy", ".pt", ".pth"))) for file in (path, gallery)]
    arrays: dict[str, Any] = dict(zip(_SIDES, sides, strict=True))
    if labels is None:
        return arrays
    labels = _existing(Path(labels), SUFFIXES)
    found, of = read_arrays(labels), _KEYS.get(labels.suffix.lower(), _NPZ_KEYS)
    given = {name: found[of[name]] for name in _LABELS if of[name] in found}
    if not given and _ONE_ARRAY & found.keys():
        n = len(sides[0]) + len(sides[1])
        given = _split_labels(labels, found, _is_query(labels, found, n))
    if not given:
        raise ValueError(f"{labels} must hold {', '.join(_LABELS)}, got {', '.join(found) or 'nothing'}.")
    return {**arrays, **given}


def _split(path: Path, arrays: dict[str, Any], name: str | None) -> dict[str, Any]:
    """Query and gallery of one array for both."""
    wide = [key for key, value in arrays.items() if np.ndim(value) > 1 and np.asarray(value).dtype.kind == "f"]
    wide = [key for key in wide if min(np.shape(arrays[key])[:2]) > 1] or wide  # MATLAB's vectors are (1, N)
    if name is None and len(wide) > 1 and "features" not in wide:
        raise ValueError(f"name must tell which features of {path} to take: {', '.join(wide)}.")
    chosen = name if name is not None else "features" if "features" in wide else wide[0] if wide else "features"
    if chosen not in arrays:
        raise ValueError(f"{path} must hold {chosen}; it holds {', '.join(arrays)}.")
    features = np.asarray(arrays.pop(chosen))
    is_query = _is_query(path, arrays, len(features))
    found = {"query_feats": features[is_query], "gallery_feats": features[~is_query]}
    labels = _split_labels(path, arrays, is_query)
    rest = {key: value for key, value in arrays.items() if key not in ("pids", "camids") and key not in wide}
    return {**found, **labels, **rest}


def _is_query(path: Path, arrays: Mapping[str, Any], n: int) -> NDArray[np.bool_]:
    """(n,) which rows are queries."""
    if "is_query" in arrays:
        flags = _flat(np.asarray(arrays["is_query"]))
        if flags.shape != (n,) or not np.isin(flags, (0, 1)).all():
            raise ValueError(f"is_query of {path} must be ({n},) booleans, got {flags.dtype} of shape {flags.shape}.")
        found = flags.astype(bool)
    else:
        number = np.asarray(arrays["num_query"]).reshape(-1)
        if number.size != 1 or not 0 < number[0] < n or number[0] != int(number[0]):
            raise ValueError(f"num_query of {path} must be one number in 1..{n - 1}, got {number}.")
        found = np.arange(n) < int(number[0])
    if found.all() or not found.any():
        raise ValueError(f"is_query of {path} must have queries and gallery images, got {found.sum()} of {n} queries.")
    return found


def _split_labels(path: Path, arrays: Mapping[str, Any], is_query: NDArray[np.bool_]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("pids", "camids"):
        if arrays.get(name) is not None:
            values = _flat(np.asarray(arrays[name]))
            if values.shape != is_query.shape:
                raise ValueError(f"{name} of {path} must have shape {is_query.shape}, got {values.shape}.")
            found |= {f"q_{name}": values[is_query], f"g_{name}": values[~is_query]}
    return found


def _checked(path: Path, arrays: dict[str, Any], keys: Mapping[str, str]) -> FeatureFile:
    for taken, name in _MISTAKEN.items():
        if taken in arrays and keys[name] not in arrays:
            raise ValueError(
                f"{path} must call its labels {keys[name]}, got {taken}, which would be ignored. Rename it."
            )
    found: dict[str, Any] = {name: arrays.pop(key, None) for name, key in keys.items()}
    query, gallery = (Rows(found[name], f"{keys[name]} of {path}") for name in _SIDES)
    checked_pair(query, gallery, keys["query_feats"], keys["gallery_feats"])
    for names in (_LABELS[:2], _LABELS[2:]):
        given = {name: _flat(np.asarray(found[name])) for name in names if found[name] is not None}
        sizes = {"q": query.n, "g": gallery.n}
        sides = {f"{keys[name]} of {path}": (labels, sizes[name[0]]) for name, labels in given.items()}
        for (name, labels), integers in zip(given.items(), labels_together(sides), strict=True):
            found[name] = labels if labels.dtype.kind == "U" else integers
    return FeatureFile(**found, others=arrays)


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


def _flat(labels: NDArray[Any]) -> NDArray[Any]:
    """MATLAB has rows for vectors."""
    return labels.reshape(-1) if labels.ndim == 2 and 1 in labels.shape else labels
