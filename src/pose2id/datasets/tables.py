"""Tables of images: CSV files, DataFrames, the metadata of wildlife-datasets."""

from __future__ import annotations

import csv
import io
import numbers
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id.datasets.dataset import Dataset, Split
from pose2id.io.checks import first_few, labels_together

TABLES = (".csv", ".tsv")
ROLES = {
    "path": ("path", "image", "file", "filename", "filepath"),
    "identity": ("identity", "pid", "person", "vehicle", "label"),
    "camera": ("camera", "camid", "cam"),
    "split": ("split", "subset", "set"),
}
SPLITS = {
    "train": "train",
    "training": "train",
    "query": "query",
    "probe": "query",
    "gallery": "gallery",
    "database": "gallery",
    "test": "test",
}
UNKNOWN = "unknown"  # what wildlife-datasets calls animals that nobody could tell
_DELIMITERS = ",;\t"


@dataclass(frozen=True)
class _Table:
    """Columns of text by role; `lines` says where each row stands."""

    where: str
    columns: dict[str, list[str]]
    lines: list[str]
    notes: tuple[str, ...]

    def fail(self, rule: str, rows: Iterable[int], given: Iterable[str] | None = None) -> ValueError:
        rows = list(rows)
        shown = (
            [self.lines[row] for row in rows]
            if given is None
            else [f"{cell!r} in {self.lines[row]}" for row, cell in zip(rows, given, strict=True)]
        )
        return ValueError(f"{self.where} {rule}, got {first_few(shown)}.")


def read_table(table: Any, *, root: str | os.PathLike[str] | None = None) -> Dataset:
    """Read a data set from a table with one row per image.

    The columns, under any of these names, in upper or lower case (others are ignored):

    * path, image, file, filename or filepath: the image, from `root` on;
    * identity, pid, person, vehicle or label: who it is, a whole number or a string;
    * camera, camid or cam (optional);
    * split, subset or set (optional): train, query (probe), gallery (database) or test.

    An optional column whose cells are all empty counts as none.

    That fits the metadata of wildlife-datasets: `read_table(dataset.df, root=dataset.root)`. Rows whose identity is
    "unknown" are left out. Images of the split "test", or all where there is no split, are query and gallery at once:
    each is searched for among all others.

    Args:
        table: path of a CSV file (UTF-8; commas, semicolons or tabs), or a DataFrame of pandas or alike.
        root: the folder that paths start from; None: the CSV's own, or the current one for a DataFrame.

    Returns:
        The data set in the table's order, with the protocol "market1501", or "leave-one-out" where query and gallery
        are one. Identities and cameras are strings.

    Raises:
        FileNotFoundError: there is no such table, or an image is missing.
        TypeError: neither a path nor a DataFrame, or a cell that is neither text nor a whole number.
        ValueError: columns, cells, splits or paths that do not fit; lines are named.
    """
    if isinstance(table, (str, os.PathLike)):
        path = Path(table).expanduser()
        rows, name, base = _from_csv(path), path.stem, path.parent
    elif hasattr(table, "columns") and hasattr(table, "__getitem__"):
        rows, name, base = _from_frame(table), "table", Path()
    else:
        raise TypeError(f"table must be the path of a CSV file or a DataFrame, got {type(table).__name__}.")
    base = base if root is None else Path(root).expanduser()
    for role in ("camera", "split"):  # a column without any is none: `pose2id table` always writes one of cameras
        if not any(rows.columns.get(role, ())):
            rows.columns.pop(role, None)
    _check_cells(rows)
    paths = [str(base / cell) for cell in rows.columns["path"]]
    _check_once(rows, paths)
    _check_there(rows, paths, "Give root=")
    known = np.array([person != UNKNOWN for person in rows.columns["identity"]], dtype=bool)
    unknown = int((~known).sum())
    notes = rows.notes
    notes += (f'Left out: {unknown:,} images of identity "{UNKNOWN}".',) if unknown else ()
    if not known.any():
        raise ValueError(f"{rows.where} must have images of known identity, got {unknown} of {UNKNOWN!r} alone.")
    for role in ("identity", "camera"):
        check_words(
            [cell for cell, use in zip(rows.columns.get(role, ()), known, strict=False) if use], f"{role} cells"
        )
    splits = {split: _split(rows, paths, at) for split, at in _rows_of_splits(rows, known).items()}
    train, test = splits.get("train"), splits.get("test")
    query, gallery = splits.get("query", test), splits.get("gallery", test)
    assert query is not None and gallery is not None  # noqa: PT018
    protocol = "market1501" if test is None else "leave-one-out"
    return Dataset(name, base, query, gallery, train, protocol, notes=notes)


def listed_images(table: str | os.PathLike[str], *, missing: bool = False) -> list[Path]:
    """The images that a table lists, in its order, whoever is on them, without "unknown" ones, as in `read_table`.

    A relative path starts from the table's folder. Raises as `read_table`, for paths and identities alone; with
    `missing` images need not be there.
    """
    path = Path(table).expanduser()
    rows = _from_csv(path)
    _check_cells(rows, ("path", "identity"))
    paths = [str(path.parent / cell) for cell in rows.columns["path"]]
    _check_once(rows, paths)
    if not missing:
        _check_there(rows, paths, "Mend the paths, which start from the table's folder")
    people = rows.columns["identity"]
    return [Path(image) for image, person in zip(paths, people, strict=True) if person != UNKNOWN]


def check_words(words: Iterable[str], what: str) -> None:
    """Raise for labels that differ as text and are one number, as which evaluation compares them: "1" and "01"."""
    distinct = sorted(set(words))
    found: dict[int, str] = {}
    for word, number in zip(distinct, labels_together({what: (distinct, len(distinct))})[0].tolist(), strict=True):
        other = found.setdefault(number, word)
        if other != word:
            raise ValueError(f"{what} must differ as numbers too, got {other!r} and {word!r}. Rename one of them.")


def _from_csv(path: Path) -> _Table:
    if not path.is_file():
        raise FileNotFoundError(f"There is no table {path}.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} must be UTF-8 text, got something else ({error}). Save it as CSV UTF-8.") from error
    headers = {delimiter: next(_rows(text, delimiter, path), (1, []))[1] for delimiter in _DELIMITERS}
    fitting = [mark for mark, names in headers.items() if not {"path", "identity"} - _by_role(names).keys()]
    delimiter = fitting[0] if fitting else max(headers, key=lambda mark: len(headers[mark]))
    header = headers[delimiter]
    columns, notes = _roles(header, str(path))
    cells: dict[str, list[str]] = {role: [] for role in columns}
    lines = []
    for number, row in list(_rows(text, delimiter, path))[1:]:
        if len(row) != len(header):
            raise ValueError(f"{path} must have {len(header)} cells in each line, got {len(row)} in line {number}.")
        for role, at in columns.items():
            cells[role].append(row[at].strip())
        lines.append(f"line {number}")
    return _Table(str(path), cells, lines, notes)


def _rows(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in reader:
            if any(cell.strip() for cell in row):
                yield reader.line_num, row
    except csv.Error as error:
        raise ValueError(f"{path} must be a CSV table, got an error in line {reader.line_num} ({error}).") from error


def _from_frame(frame: Any) -> _Table:
    names = list(frame.columns)
    where = f"The {type(frame).__name__}"
    columns, notes = _roles([str(name) for name in names], where)
    cells = {role: [_text(cell, where, role) for cell in frame[names[at]]] for role, at in columns.items()}
    return _Table(where, cells, [f"row {row}" for row in range(len(cells["path"]))], notes)


def _text(cell: Any, where: str, role: str) -> str:
    """A cell as text; nothing for None, NaN and pandas.NA."""
    if cell is None or type(cell).__name__ in ("NAType", "NaTType"):
        return ""
    if isinstance(cell, (str, os.PathLike)):
        return str(os.fspath(cell)).strip()
    if isinstance(cell, (numbers.Integral, float, np.floating)) and not isinstance(cell, bool):
        if cell != cell:  # noqa: PLR0124 - NaN
            return ""
        if float(cell).is_integer():  # pandas makes floats of integers where one is missing
            return str(int(cell))
    raise TypeError(f"{where} must hold text or whole numbers as {role}, got {cell!r}.")


def _by_role(names: list[str]) -> dict[str, list[int]]:
    """Columns for each role that has any, the preferred first."""
    plain = [name.strip().lower() for name in names]
    found = {
        role: [at for name in known for at, own in enumerate(plain) if own == name] for role, known in ROLES.items()
    }
    return {role: places for role, places in found.items() if places}


def _roles(names: list[str], where: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """The column of each role; notes of others that could have been meant."""
    found = _by_role(names)
    gone = [role for role in ("path", "identity") if role not in found]
    if gone:
        wanted = "; ".join(f"{role}: {', '.join(ROLES[role])}" for role in gone)
        raise ValueError(
            f"{where} must have a column for {' and '.join(gone)} ({wanted}), got {first_few(names, most=12)}."
        )
    notes = []
    for role, (first, *others) in found.items():
        if any(names[at].strip().lower() == names[first].strip().lower() for at in others):
            raise ValueError(f"{where} must have one column {names[first]!r}, got several.")
        if others:
            notes.append(f"Read as {role}: column {names[first]!r}, not {first_few(repr(names[at]) for at in others)}.")
    return {role: places[0] for role, places in found.items()}, tuple(notes)


def _check_cells(table: _Table, roles: Iterable[str] = tuple(ROLES)) -> None:
    if not table.lines:
        raise ValueError(f"{table.where} must list at least one image, got none.")
    for role in roles:
        cells = table.columns.get(role, [])
        empty = [row for row, cell in enumerate(cells) if not cell]
        if empty:
            advice = " (drop the column if there are none)" if role in ("camera", "split") else ""
            raise table.fail(f"must give each image's {role}{advice}; empty cells are not allowed", empty)
    splits = table.columns.get("split", []) if "split" in roles else []
    strange = [row for row, cell in enumerate(splits) if cell.lower() not in SPLITS]
    if strange:
        rule = f"must have a split of {', '.join(SPLITS)}"
        raise table.fail(rule, strange, [splits[row] for row in strange])


def _check_once(table: _Table, paths: list[str]) -> None:
    first: dict[str, int] = {}
    for row, path in enumerate(paths):
        other = first.setdefault(os.path.normpath(path), row)
        if other != row:
            lines = f"{table.lines[other]} and {table.lines[row]}"
            raise ValueError(f"{table.where} must have one row per image, got {path} in {lines}.")


def _check_there(table: _Table, paths: list[str], remedy: str) -> None:
    gone = [row for row, path in enumerate(paths) if not os.path.isfile(path)]
    if gone:
        shown = first_few([f"{paths[row]} ({table.lines[row]})" for row in gone])
        raise FileNotFoundError(f"{table.where} must list images that are there; missing: {shown}. {remedy}.")


def _rows_of_splits(table: _Table, known: NDArray[np.bool_]) -> dict[str, NDArray[np.int64]]:
    if "split" not in table.columns:
        return {"test": np.flatnonzero(known)}
    names = np.array([SPLITS[cell.lower()] for cell in table.columns["split"]])
    rows = {split: np.flatnonzero(known & (names == split)) for split in ("train", "query", "gallery", "test")}
    rows = {split: at for split, at in rows.items() if len(at)}
    if rows.keys() - {"train"} not in ({"query", "gallery"}, {"test"}):
        rule = "images of query and gallery, or of test (each searched for among all others)"
        raise ValueError(f"{table.where} must have {rule}, got {' and '.join(rows)}.")
    return rows


def _split(table: _Table, paths: list[str], rows: NDArray[np.int64]) -> Split:
    labels = {
        role: np.array([cells[row] for row in rows], dtype=str)
        for role, cells in table.columns.items()
        if role in ("identity", "camera")
    }
    return Split(tuple(paths[row] for row in rows), labels["identity"], labels.get("camera"))
