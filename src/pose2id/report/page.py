"""One HTML page that a person looks at: what the method gained, and what it lost. Needs the extra "report".

The page and its pictures are a folder of plain files: no server, no network and no script is needed to look at it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id import __version__
from pose2id.centralization.diagnostics import GenerationDiagnostics
from pose2id.io.checks import checked_flag, require_modules
from pose2id.io.whole_files import check_folder as check_no_file
from pose2id.io.whole_files import new_directory, whole_directory, whole_file
from pose2id.plots.content import Pair, map_of, mapped_images, pair_distances
from pose2id.report import drawing
from pose2id.report.comparison import Row
from pose2id.report.lists import Card, Change, change, chosen_queries, labels_of_image, query_lists
from pose2id.report.thumbnails import Thumbnails
from pose2id.retrieval.evaluation import RankingProtocol
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

_PAGE, _IMAGES = "index.html", "images"
_PICTURE = re.compile(r"[0-9a-f]{16}\.jpg")
_RANKS = (1, 5, 10)
_MAX_QUERIES = 2000  # whose distances are counted
_MOST_MAPPED = 600  # images on a map
_MOST_SHEETS, _MOST_ON_SHEET = 12, 16
Curves = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise if a report cannot be written there; for callers who measure for a long time before.

    Args:
        folder: where the report will be.
        overwrite: whether it may hold something.

    Raises:
        FileExistsError: it exists and is not empty, or is a file.
        ImportError: the extra "report" is not installed.
    """
    require_modules('The report needs the extra "report"', '"pose2id[report]"', "jinja2", "sklearn")
    if checked_flag(overwrite, "overwrite"):
        check_no_file(Path(folder).expanduser())
    else:
        new_directory(folder)


def write_page(
    folder: str | os.PathLike[str],
    rows: Sequence[Row],
    *,
    before: Pair,
    after: Pair,
    labels: Sequence[Any],
    names: tuple[str, str] = ("as they are", "auto"),
    query_paths: Sequence[Any] | None = None,
    gallery_paths: Sequence[Any] | None = None,
    protocol: EvaluationProtocol = MARKET1501,
    sheets: Sequence[tuple[Any, Sequence[Any]]] | None = None,
    diagnostics: GenerationDiagnostics | None = None,
    curves: Curves | None = None,
    title: str = "",
    facts: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a report: `index.html`, and the small pictures it shows in `images`. It is written whole, or not at all.

    Where the protocol has several trials, figures are means over them, and lists, distances and maps are those of the
    first one. Distances are Euclidean, of L2-normalised features.

    Args:
        folder: new or empty, unless `overwrite`.
        rows: of `compare`, the baseline first.
        before: features (Q, D) and (G, D) as they are, numpy arrays: of both sets, or of the first trial's images.
        after: features with the method, likewise.
        labels: (q_pids, g_pids, q_camids, g_camids), those of cameras may be None; or the first two.
        names: what `before` and `after` are called.
        query_paths: Q images of the queries, as paths or as `Centralizer` takes them; None: labels are shown in their
            place.
        gallery_paths: G images of the gallery.
        protocol: as in `compare`.
        sheets: generated images to show: pairs of a reference and a list of images; the first 12, and 16 of each.
        diagnostics: of generated images, which the page quotes with their reading.
        curves: for each title, from names to (xs, values), of which a line is drawn.
        title: of the page.
        facts: lines that say what was measured, and how.
        seed: of random queries, of the t-SNE, and of the draw where more than 2,000 queries have distances.
        overwrite: write into a folder that holds something: `index.html` is replaced, pictures that only the former
            page used are removed, and nothing else is touched.

    Returns:
        The path of `index.html`.

    Raises:
        FileExistsError: the folder exists and is not empty.
        ImportError: the extra "report" is not installed.
        ValueError: an image cannot be read; or as in `evaluate`.
    """
    check_folder(folder, overwrite=overwrite)
    if not rows:
        raise ValueError("rows must hold at least the baseline, got none.")
    if (query_paths is None) != (gallery_paths is None):
        raise ValueError("query_paths and gallery_paths must be given together, or neither; one of them is missing.")
    pictures, table = Thumbnails(), _table(rows)
    trial = _first_trial(before, after, labels, (query_paths, gallery_paths), protocol)
    content = {
        "title": title or "What feature centralization does here",
        "facts": list(facts),
        "names": names,
        "num_trials": max(1, len(rows[0].result.trials)),
        "table": table,
        "losing": _losing(table),
        "gains": _gains(rows),
        **_lists(trial, pictures, seed),
        **_distances(trial, names, seed),
        "maps": _maps(trial, names, seed),
        "curves": [_curve(name, lines) for name, lines in (curves or {}).items()],
        "sheets": _sheets(sheets or (), pictures),
        "diagnostics": diagnostics,
        "version": __version__,
    }
    return _written(Path(folder).expanduser(), _rendered(content), pictures.files)


@dataclass(frozen=True)
class _Trial:
    """What the lists, distances and maps are of."""

    sides: tuple[Pair, Pair]  # before, after
    labels: tuple[Any, ...]  # q_pids, g_pids, q_camids, g_camids
    paths: tuple[Any, Any]
    protocol: EvaluationProtocol

    def rule(self) -> RankingProtocol:
        return self.protocol.rule(len(self.labels[0]), len(self.labels[1]), *self.labels)


def _first_trial(
    before: Pair, after: Pair, labels: Sequence[Any], paths: tuple[Any, Any], protocol: EvaluationProtocol
) -> _Trial:
    if len(labels) not in (2, 4):
        raise ValueError(f"labels must be (q_pids, g_pids, q_camids, g_camids) or the first two, got {len(labels)}.")
    pids, camids = tuple(labels[:2]), tuple(labels[2:]) or (None, None)
    whole = len(pids[0]), len(pids[1])
    for name, path, n in zip(("query_paths", "gallery_paths"), paths, whole, strict=True):
        if path is not None and len(path) != n:
            raise ValueError(f"{name} must hold {n} images, one per label, got {len(path)}.")
    trial = protocol.trials(*pids, *camids, g_names=paths[1])[0]
    wanted = len(trial.query), len(trial.gallery)
    sides = []
    for name, pair in (("before", before), ("after", after)):
        given = len(pair[0]), len(pair[1])
        if given not in (whole, wanted):
            also = "" if wanted == whole else f", or those of the first trial, {wanted[0]} and {wanted[1]}"
            rule = f"features of {whole[0]} queries and {whole[1]} gallery images{also}"
            raise ValueError(f"{name} must hold {rule}, got {given[0]} and {given[1]}.")
        sides.append(trial.of(pair) if given == whole else pair)
    return _Trial((sides[0], sides[1]), (*trial.of(pids), *trial.of(camids)), trial.of(paths), protocol)


def _table(rows: Sequence[Row]) -> dict[str, Any]:
    """Head and rows of the table: figures in percent with their gain in points, and queries helped and harmed."""
    first = rows[0]
    ranks = [r for r in _RANKS if all(r <= len(row.result.cmc) for row in rows)]
    published = list(dict.fromkeys(name for row in rows for name in row.published))
    lines = []
    for row in rows:
        figures = [(result.mAP, *map(result.rank, ranks), result.mINP) for result in (row.result, first.result)]
        lines.append(
            {
                "name": row.name,
                "figures": [
                    _figure(value, None if row is first else base) for value, base in zip(*figures, strict=True)
                ],
                "id2": None if row.id2 is None else f"{row.id2:.4f}",
                "published": [_percent(row.published.get(name)) for name in published],
                "change": None if row is first else _change(first, row),
            }
        )
    return {"head": ["mAP", *(f"Rank-{r}" for r in ranks), "mINP"], "published": published, "rows": lines}


def _percent(value: float | None) -> str | None:
    return None if value is None else f"{100 * value:.2f}"


def _figure(value: float, base: float | None) -> dict[str, Any]:
    return {"value": f"{100 * value:.2f}", "gain": None if base is None else _points(value - base)}


def _points(gain: float) -> dict[str, str]:
    """A gain in percentage points: its text with a sign, and of what kind it is."""
    rounded = round(100 * gain, 2)
    kind = "same" if rounded == 0 else "gain" if rounded > 0 else "loss"
    sign = "▲ +" if rounded > 0 else "▼ \N{MINUS SIGN}"
    text = "±0.00" if rounded == 0 else f"{sign}{abs(rounded):.2f}"
    return {"text": text, "kind": kind}


def _change(first: Row, row: Row) -> Change | None:
    """None where the rows' queries are not the same ones."""
    before, after = first.result.average_precision, row.result.average_precision
    return change(before, after) if before.shape == after.shape else None


def _losing(table: Mapping[str, Any]) -> list[dict[str, str]]:
    """Rows with a figure below the baseline's, or with more queries harmed than helped, and by how much."""
    found = []
    for row in table["rows"][1:]:
        figures = zip(table["head"], row["figures"], strict=True)
        lost = [f"{name} {figure['gain']['text']}" for name, figure in figures if figure["gain"]["kind"] == "loss"]
        queries = row["change"]
        if queries is not None and queries.harmed > queries.helped:
            lost.append(f"{queries.harmed} queries harmed, {queries.helped} helped")
        if lost:
            found.append({"name": row["name"], "lost": ", ".join(lost)})
    return found


def _gains(rows: Sequence[Row]) -> list[dict[str, Any]]:
    base = rows[0].result
    gains = [(row.name, (row.result.mAP - base.mAP, row.result.rank1 - base.rank1)) for row in rows[1:]]
    most = max((abs(gain) for _, both in gains for gain in both), default=0.0)
    return [
        {
            "name": name,
            "bars": [
                {"measure": measure, "svg": drawing.gain_bar(gain, most), **_points(gain)}
                for measure, gain in zip(("mAP", "Rank-1"), both, strict=True)
            ],
        }
        for name, both in gains
    ]


def _lists(trial: _Trial, pictures: Thumbnails, seed: int) -> dict[str, Any]:
    """How the queries changed, and lists of some of them."""
    measured = [trial.protocol.measure(pair, *trial.labels) for pair in trial.sides]
    precisions = measured[0].average_precision, measured[1].average_precision
    pids, camids = trial.labels[:2], trial.labels[2:]

    def card(side: str, row: int) -> Card:
        at = ("query", "gallery").index(side)
        paths = trial.paths[at]
        picture = None if paths is None else pictures.add(paths[row], f"{side}_paths[{row}]", (side, row))
        return Card(picture, labels_of_image(pids[at], camids[at], row))

    chosen = chosen_queries(*precisions, seed=seed)
    return {
        "change": change(*precisions),
        "mAPs": [f"{result.mAP:.2%}" for result in measured],
        "gain": _points(measured[1].mAP - measured[0].mAP),
        "lists": query_lists(chosen, trial.sides, precisions, trial.rule(), card),
        "points_of": _points,
        "with_pictures": trial.paths[0] is not None,
    }


def _distances(trial: _Trial, names: tuple[str, str], seed: int) -> dict[str, Any]:
    rule = trial.rule()
    counts = [pair_distances(pair, rule, max_queries=_MAX_QUERIES, seed=seed) for pair in trial.sides]
    seen = np.flatnonzero(sum(count.positive + count.negative for count in counts))
    edges = counts[0].edges
    limits = (float(edges[seen[0]]), float(edges[seen[-1] + 1])) if len(seen) else (0.0, 2.0)
    charts = [
        {
            "name": name,
            "svg": drawing.distributions(count, name, limits),
            "threshold": f"{count.threshold:.3f}",
            "equal_error": f"{count.equal_error:.2%}",
            "pairs": (f"{count.positive.sum():,}", f"{count.negative.sum():,}"),
        }
        for name, count in zip(names, counts, strict=True)
    ]
    return {"distances": charts, "num_queries": counts[0].num_queries, "of_queries": len(trial.labels[0])}


def _maps(trial: _Trial, names: tuple[str, str], seed: int) -> list[dict[str, str]]:
    """t-SNE before and after; none where there are too few images of identities."""
    pids = np.concatenate([trial.rule().q_pids, trial.rule().g_pids])
    shown = mapped_images(pids, most_images=_MOST_MAPPED)
    if len(shown) < 3:
        return []
    sides = shown[shown < len(trial.labels[0])], shown[shown >= len(trial.labels[0])] - len(trial.labels[0])
    maps = []
    for name, pair in zip(names, trial.sides, strict=True):
        features = np.concatenate([_flat(x[rows]) for x, rows in zip(pair, sides, strict=True)])
        places, identities = map_of(features, pids[shown], seed=seed)
        maps.append({"name": name, "svg": drawing.identity_map(places, identities, name)})
    return maps


def _flat(features: Any) -> NDArray[Any]:
    return np.asarray(features).reshape(len(features), -1)


def _curve(title: str, lines: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> dict[str, Any]:
    for name, (xs, values) in lines.items():
        if len(xs) != len(values) or not len(xs) or not np.isfinite([*xs, *values]).all():
            raise ValueError(
                f"curves[{title!r}][{name!r}] must be (xs, values), equally many finite numbers, at least one."
            )
    return {"title": title, "svg": drawing.curves(lines, title), "names": list(lines)}


def _sheets(sheets: Sequence[tuple[Any, Sequence[Any]]], pictures: Thumbnails) -> list[dict[str, Any]]:
    return [
        {
            "reference": pictures.add(reference, f"sheets[{number}][0]"),
            "images": [
                pictures.add(item, f"sheets[{number}][1][{at}]") for at, item in enumerate(images[:_MOST_ON_SHEET])
            ],
        }
        for number, (reference, images) in enumerate(sheets[:_MOST_SHEETS])
    ]


def _rendered(content: Mapping[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined  # noqa: PLC0415 - an extra

    environment = Environment(
        loader=PackageLoader("pose2id.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html").render(content)


def _written(folder: Path, page: str, pictures: Mapping[str, bytes]) -> Path:
    if not folder.exists() or not any(folder.iterdir()):
        with whole_directory(folder, _PAGE) as unfinished:
            (unfinished / _IMAGES).mkdir()
            for name, content in pictures.items():
                (unfinished / _IMAGES / name).write_bytes(content)
            (unfinished / _PAGE).write_text(page, encoding="utf-8")
    else:
        _replace(folder, page, pictures)
    return folder / _PAGE


def _replace(folder: Path, page: str, pictures: Mapping[str, bytes]) -> None:
    """New pictures beside those of the former page, then the page, then what only the former one used is removed.

    Pictures are named by their content: whichever page is there, its pictures are.
    """
    images = folder / _IMAGES
    check_no_file(images)
    images.mkdir(exist_ok=True)
    former = {path.name for path in images.iterdir() if _PICTURE.fullmatch(path.name)}
    try:
        for name in pictures.keys() - former:
            with whole_file(images / name) as unfinished:
                unfinished.write_bytes(pictures[name])
        with whole_file(folder / _PAGE) as unfinished:
            unfinished.write_text(page, encoding="utf-8")
    except BaseException:
        _remove(images, pictures.keys() - former)
        raise
    _remove(images, former - pictures.keys())


def _remove(images: Path, names: set[str]) -> None:
    for name in names:
        with suppress(OSError):
            (images / name).unlink()
