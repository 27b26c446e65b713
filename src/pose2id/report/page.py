"""A page to look at: what a method did to a set of features, with the queries that it helped and those that it harmed.

One HTML file beside its pictures; no server, no script, nothing from elsewhere.
"""

from __future__ import annotations

import html
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id.io.checks import require_modules
from pose2id.io.images import load_image
from pose2id.io.rows import Rows
from pose2id.io.whole_files import new_directory, whole_directory
from pose2id.report import svg
from pose2id.report.comparison import Row
from pose2id.report.tables import cells
from pose2id.report.ways import Pair
from pose2id.retrieval.evaluation import RankingProtocol, feature_distances
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

_MARK = "<!-- pose2id report -->"
_SHOWN, _LENGTH, _JUNK = 4, 8, 2  # queries of a kind, images of a list that count, and the nearest that don't
_THUMBNAIL = (64, 128)
_BINS = 100
_PEOPLE = 10  # of the map
_SAME = 1e-9  # average precisions that differ less are equal

Curves = Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]]


def check_folder(folder: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
    """The folder to write: new, empty, or with `overwrite` a page of ours.

    Raises:
        FileExistsError: it holds something else, or a page without `overwrite`.
    """
    path = Path(folder)
    if overwrite and path.is_dir() and any(path.iterdir()):
        index = path / "index.html"
        if not index.is_file() or _MARK not in index.read_text(encoding="utf-8", errors="replace"):
            raise FileExistsError(f"{folder} must be a page of pose2id to be overwritten, and holds something else.")
        return path
    return new_directory(path)


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
    sheets: Sequence[tuple[Any, Sequence[Any]]] = (),
    curves: Curves | None = None,
    title: str = "What centralization does",
    facts: Sequence[str] = (),
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write FOLDER/index.html and its pictures; whole or not at all.

    Args:
        folder: new or empty, in a folder that exists.
        rows: of the table, as of `pose2id.report.compare`; the first one is of the features as they are.
        before: features (Q, D) and (G, D) as they are.
        after: features of the method whose lists, distances and map are shown.
        labels: (q_pids, g_pids) or with (..., q_camids, g_camids), as in `pose2id.evaluate`.
        names: of before and after.
        query_paths: Q image files (or any images of `Extractor`); None: labels are shown instead.
        gallery_paths: G image files.
        protocol: of several trials the first one is shown.
        sheets: an image and its generated images, for each that is shown.
        curves: title to lines by name, each (parameters, fractions).
        title: heading.
        facts: lines of text below it.
        seed: of the queries shown at random, and of the map.
        overwrite: replace a page that was written before.

    Returns:
        The page, FOLDER/index.html.

    Raises:
        FileExistsError: the folder holds something.
        ImportError: the extra "plots" is not installed.
        ValueError: unreadable images, named.
    """
    require_modules('A page needs the extra "plots"', '"pose2id[plots]"', "sklearn")
    target = check_folder(folder, overwrite=overwrite)
    shown = _Shown(before, after, labels, protocol, query_paths, gallery_paths, seed)
    with _replaced(target) as unfinished:
        (unfinished / "images").mkdir()
        pictures = _Pictures(unfinished / "images")
        body = [
            f"<h1>{html.escape(title)}</h1>",
            *(f'<pre class="scroll" tabindex="0">{html.escape(fact)}</pre>' for fact in facts),
            _verdict(rows, shown, names),
            "<h2>Figures</h2>",
            _table(rows),
            "<h2>Gain in mAP</h2>",
            svg.bars({row.name: 100 * (row.result.mAP - rows[0].result.mAP) for row in rows[1:]}),
            *_lists(shown, names, pictures),
            *_distances(shown, names),
            *_maps(shown, names, seed),
            *(
                part
                for name, lines in (curves or {}).items()
                for part in (f"<h2>{html.escape(name)}</h2>", svg.curves(lines, name))
            ),
            *_sheets(sheets, pictures),
        ]
        style = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
        page = _PAGE.format(mark=_MARK, title=html.escape(title), style=style, body="\n".join(filter(None, body)))
        (unfinished / "index.html").write_text(page, encoding="utf-8")
    return target / "index.html"


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A directory to fill that becomes `target`, in the place of a page that was there."""
    if not target.exists() or not any(target.iterdir()):
        with whole_directory(target, "index.html") as unfinished:
            yield unfinished
        return
    beside = target.with_name(f".{target.name}.new-{os.getpid()}")
    with whole_directory(beside, "index.html") as unfinished:
        yield unfinished
    shutil.rmtree(target)
    beside.rename(target)


class _Shown:
    """The first trial's features, labels and images, and how each query fared."""

    def __init__(
        self,
        before: Pair,
        after: Pair,
        labels: Sequence[Any],
        protocol: EvaluationProtocol,
        query_paths: Any,
        gallery_paths: Any,
        seed: int,
    ) -> None:
        q_pids, g_pids, q_camids, g_camids = (*labels, None, None)[:4]
        given = (q_pids, g_pids, q_camids, g_camids)
        trial = protocol.trials(*given, g_names=gallery_paths)[0]
        self.trials = protocol.num_trials
        self.pairs = [trial.of(pair) for pair in (before, after)]
        self.paths = trial.of((query_paths, gallery_paths))
        self.pids, self.camids = trial.of((q_pids, g_pids)), trial.of((q_camids, g_camids))
        self.labels = (*self.pids, *self.camids)
        self.rule: RankingProtocol = protocol.rule(len(self.pids[0]), len(self.pids[1]), *self.labels)
        self.precision = [protocol.measure(pair, *self.labels).average_precision for pair in self.pairs]
        self.gain = self.precision[1] - self.precision[0]
        self.valid = np.flatnonzero(np.isfinite(self.gain))
        self.chosen = self._chosen(seed)

    def _chosen(self, seed: int) -> dict[str, list[int]]:
        """Queries of each kind: those helped most, those harmed most, and others at random."""
        order = self.valid[np.argsort(self.gain[self.valid], kind="stable")]
        harmed = [int(i) for i in order[:_SHOWN] if self.gain[i] < -_SAME]
        helped = [int(i) for i in order[::-1][:_SHOWN] if self.gain[i] > _SAME]
        others = np.setdiff1d(self.valid, [*harmed, *helped])
        drawn = np.random.default_rng(seed).permutation(others)[:_SHOWN]
        return {"Most helped": helped, "Most harmed": harmed, "At random": [int(i) for i in drawn]}

    def counts(self) -> tuple[int, int, int]:
        """Queries whose average precision rose, stayed, fell."""
        gain = self.gain[self.valid]
        up, down = int((gain > _SAME).sum()), int((gain < -_SAME).sum())
        return up, len(gain) - up - down, down

    def rows(self, side: int) -> Iterator[NDArray[Any]]:
        """Each query's Euclidean distances to the gallery, in [0, 2], before (0) or after (1)."""
        return (np.sqrt(np.clip(row, 0, 4)) for row in feature_distances(*self.pairs[side])[0])


def _verdict(rows: Sequence[Row], shown: _Shown, names: tuple[str, str]) -> str:
    up, same, down = shown.counts()
    total = up + same + down
    text = f"Of {total:,} queries, {names[1]} helped {up:,}, left {same:,} as they were and harmed {down:,}."
    worse = [row.name for row in rows[1:] if row.result.mAP < rows[0].result.mAP - _SAME]
    worse_first = [row.name for row in rows[1:] if row.result.rank1 < rows[0].result.rank1 - _SAME]
    lines = [text]
    for what, losing in (("mAP", worse), ("Rank-1", worse_first)):
        if losing:
            lines.append(f"Rows with a lower {what} than the features as they are: {', '.join(losing)}.")
    if shown.trials > 1:
        lines.append(f"Figures are means of {shown.trials} trials; lists, distances and map are of the first one.")
    return "".join(f'<p class="verdict">{html.escape(line)}</p>' for line in lines)


def _table(rows: Sequence[Row]) -> str:
    head, *lines = cells(rows)
    base = [float(cell) if cell != "-" else None for cell in lines[0][1:6]]
    body = []
    for line in lines:
        row = [f"<th scope='row'>{html.escape(line[0])}</th>"]
        for at, cell in enumerate(line[1:]):
            first = base[at] if at < len(base) else None
            delta = None if first is None or line is lines[0] or cell == "-" else float(cell) - first
            row.append(f"<td>{cell}{_delta(delta)}</td>")
        body.append(f"<tr>{''.join(row)}</tr>")
    top = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in head)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _delta(value: float | None) -> str:
    if value is None:
        return ""
    kind = "gain" if value > 0 else "loss" if value < 0 else "even"
    return f' <small class="{kind}">{value:+.2f}</small>'


def _lists(shown: _Shown, names: tuple[str, str], pictures: _Pictures) -> list[str]:
    wanted = sorted({query for queries in shown.chosen.values() for query in queries})
    ranked: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for side in (0, 1):
        for query, row in enumerate(shown.rows(side)):
            if query in wanted:
                dropped = shown.rule.of_query(query)[1]
                order = np.argsort(row, kind="stable")
                kept = np.flatnonzero(~np.isin(order, dropped))[:_LENGTH]
                junk = np.setdiff1d(np.arange(kept[-1] if len(kept) else 0), kept)[:_JUNK]
                ranked[query, side] = [(int(i), float(row[i])) for i in order[np.union1d(kept, junk)]]
    legend = (
        "Each query with its nearest gallery images and their distances: ✓ the same identity, ✗ another one, "
        "grey and ~ dropped by the protocol, as images of the query's own camera are (the nearest two are shown)."
    )
    parts = ["<h2>Ranked lists</h2>", f"<p>{legend}</p>"]
    for kind, queries in shown.chosen.items():
        parts.append(f"<h3>{kind}</h3>")
        if not queries:
            parts.append("<p>None.</p>")
        for query in queries:
            parts.append('<div class="query">')
            for side in (0, 1):
                precision = f"{names[side]}: average precision {shown.precision[side][query]:.1%}"
                parts.append(f"<p>{html.escape(precision)}</p>")
                cards = [_card(shown, pictures, 0, query, "asked", "query")]
                matches, dropped = shown.rule.of_query(query)
                for image, distance in ranked[query, side]:
                    state = "junk" if image in dropped else "right" if image in matches else "wrong"
                    cards.append(_card(shown, pictures, 1, image, state, f"{distance:.3f}"))
                parts.append(f'<div class="scroll" tabindex="0"><div class="list">{"".join(cards)}</div></div>')
            parts.append("</div>")
    return parts


_SIGNS = {"asked": "", "right": "✓ ", "wrong": "✗ ", "junk": "~ "}


def _card(shown: _Shown, pictures: _Pictures, side: int, i: int, state: str, caption: str) -> str:
    pids, camids, paths = shown.pids[side], shown.camids[side], shown.paths[side]
    camera = "" if camids is None else f", camera {camids[i]}"
    alt = f"{('query', 'gallery image')[side]} {i}: identity {pids[i]}{camera}"
    inner = f"<span>{html.escape(f'identity {pids[i]}{camera}')}</span>"
    if paths is not None:
        name = pictures.file(f"{'qg'[side]}{i}", paths[i])
        width, height = _THUMBNAIL
        inner = f'<img src="images/{name}" alt="{html.escape(alt, quote=True)}" width="{width}" height="{height}">'
    return f'<figure class="{state}">{inner}<figcaption>{_SIGNS[state]}{caption}</figcaption></figure>'


class _Pictures:
    """Thumbnails of a page, each written once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str, image: Any) -> str:
        """The thumbnail's file name; pictures keep their shape, on a grey ground."""
        path = self._folder / f"{name}.jpg"
        if not path.exists():
            picture = load_image(image, f"image {name}")
            picture.thumbnail(_THUMBNAIL, Image.Resampling.LANCZOS)
            ground = Image.new("RGB", _THUMBNAIL, (128, 128, 128))
            left, top = (_THUMBNAIL[0] - picture.width) // 2, (_THUMBNAIL[1] - picture.height) // 2
            ground.paste(picture, (left, top))
            ground.save(path, quality=85)
        return path.name


@dataclass
class _Distribution:
    shares: dict[str, NDArray[np.float64]]
    threshold: float
    error: float


def _distances(shown: _Shown, names: tuple[str, str]) -> list[str]:
    edges = np.linspace(0.0, 2.0, _BINS + 1)
    parts = [
        "<h2>Distances</h2>",
        '<p>Shares of pairs by distance (of L2-normalised features): <b class="key positive">same identity</b>, '
        '<b class="key negative">others</b>. The line is the threshold of equal error, to a bin of 0.02.</p>',
    ]
    for side in (0, 1):
        found = _distribution(shown, side, edges)
        title = f"{names[side]}: equal error {found.error:.1%} at {found.threshold:.2f}"
        parts += [f"<h3>{html.escape(title)}</h3>", svg.histogram(edges, found.shares, found.threshold, title)]
    return parts


def _distribution(shown: _Shown, side: int, edges: NDArray[np.float64]) -> _Distribution:
    """Of all pairs that the protocol keeps, counted row by row."""
    positive, negative = np.zeros(_BINS), np.zeros(_BINS)
    for query, row in enumerate(shown.rows(side)):
        matches, dropped = shown.rule.of_query(query)
        others = np.ones(len(row), bool)
        others[dropped] = others[matches] = False
        positive += np.histogram(row[matches], edges)[0]
        negative += np.histogram(row[others], edges)[0]
    shares = {"negative": negative / max(negative.sum(), 1), "positive": positive / max(positive.sum(), 1)}
    missed, false = 1 - shares["positive"].cumsum(), shares["negative"].cumsum()
    at = int(np.argmin(np.abs(missed - false)))
    return _Distribution(shares, float(edges[at + 1]), float((missed[at] + false[at]) / 2))


def _maps(shown: _Shown, names: tuple[str, str], seed: int) -> list[str]:
    """t-SNE of the identities with the most images that are neither junk nor distractors."""
    from sklearn.manifold import TSNE  # noqa: PLC0415 - slow to import

    pids = np.concatenate([np.asarray(side).astype(str) for side in shown.pids])
    people, counts = np.unique(pids[~np.isin(pids, ("-1", "0"))], return_counts=True)
    chosen = people[np.argsort(-counts, kind="stable")[:_PEOPLE]]
    rows = np.flatnonzero(np.isin(pids, chosen))[:2000]
    if len(rows) < 5:
        return []
    groups = np.searchsorted(np.sort(chosen), pids[rows])
    parts = ["<h2>Map of features</h2>", f"<p>t-SNE of the {len(chosen)} identities with the most images.</p>"]
    for side in (0, 1):
        features = np.concatenate(
            [Rows(x, "features", normalize=True).read(slice(None)).numpy() for x in shown.pairs[side]]
        )
        perplexity = min(15.0, (len(rows) - 1) / 3)
        points = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
            features[rows].astype(np.float32)
        )
        parts += [
            f"<h3>{html.escape(names[side])}</h3>",
            svg.scatter(points, groups, f"map of features, {names[side]}"),
        ]
    return parts


def _sheets(sheets: Sequence[tuple[Any, Sequence[Any]]], pictures: _Pictures) -> list[str]:
    if not sheets:
        return []
    width, height = _THUMBNAIL
    parts = [
        "<h2>Generated images</h2>",
        "<p>The reference, then what was generated from it. None of these poses was ever seen.</p>",
    ]
    for i, (reference, generated) in enumerate(sheets):
        cards = []
        for m, image in enumerate((reference, *generated)):
            name = pictures.file(f"s{i}_{m}", image)
            what = "reference" if m == 0 else f"generated {m}"
            img = f'<img src="images/{name}" alt="{what} of image {i}" width="{width}" height="{height}">'
            cards.append(
                f'<figure class="{"asked" if m == 0 else "plain"}">{img}<figcaption>{what}</figcaption></figure>'
            )
        parts.append(f'<div class="scroll" tabindex="0"><div class="list">{"".join(cards)}</div></div>')
    return parts


_PAGE = """<!DOCTYPE html>
<html lang="en">
{mark}
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""
