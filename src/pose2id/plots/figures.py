"""The figures of the paper (Yuan et al., CVPR 2025, arXiv 2503.00938), of your own features and images.

| figure | what it shows | function |
|---|---|---|
| 2 | how far apart images of one identity and of two are | `distance_distributions` |
| 4 | t-SNE of some identities, without and with the method | `identity_maps` |
| 6, 7 | images generated from references, also in the place of real ones | `generated_sheet` |
| 8, 9 | quality by eta, k1 and k2 | `parameter_curves` |
| 11 | ranked lists without and with the method | `ranked_lists` |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id.plots.axes import new_figure, pose_sheet, ranked_list, require_plots
from pose2id.plots.content import Pair, letterboxed, map_of, pair_distances, ranked_of
from pose2id.retrieval.evaluation import RankingProtocol
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = "os^Dv<>P*X"
_LINES = ("-", "--", ":", "-.")
_NAMES = ("as they are", "centralized")
# Of Okabe and Ito, without black: told apart with every kind of colour vision.
_COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#7F7F7F",
    "#8C510A",
    "#5E3C99",
    "#01665E",
)
Side = Sequence[Any] | NDArray[Any]


def distance_distributions(
    before: Pair,
    after: Pair,
    labels: Sequence[Any],
    *,
    names: tuple[str, str] = _NAMES,
    protocol: EvaluationProtocol = MARKET1501,
    max_queries: int | None = None,
    seed: int = 0,
) -> Figure:
    """Distances of pairs of one identity and of two, and the threshold of equal error; as figure 2.

    All pairs that the protocol counts (in its first trial) are counted, one query at a time.

    Args:
        before: features (Q, D) and (G, D), numpy arrays or torch tensors, L2-normalised here.
        after: the same images' features with the method.
        labels: (q_pids, g_pids) or (q_pids, g_pids, q_camids, g_camids), as in `pose2id.evaluate`.
        names: of both, for titles.
        protocol: which pairs count.
        max_queries: of more queries, that many are drawn, which the figure says; None: all.
        seed: of the draw.

    Raises:
        ImportError: the extra "plots" is not installed.
    """
    require_plots()
    sides, rule, _ = _first_trial((before, after), labels, protocol)
    figure = new_figure(8, 3.2)
    for axes, name, pair in zip(figure.subplots(1, 2, sharex=True, sharey=True), names, sides, strict=True):
        counts = pair_distances(pair, rule, max_queries=max_queries, seed=seed)
        edges, positive, negative = counts.coarse()
        axes.stairs(positive, edges, fill=True, alpha=0.25, color=_COLOURS[0])
        axes.stairs(positive, edges, color=_COLOURS[0], label="one identity")
        axes.stairs(negative, edges, fill=True, alpha=0.25, color=_COLOURS[1])
        axes.stairs(negative, edges, color=_COLOURS[1], linestyle="--", label="two identities")
        if np.isfinite(counts.threshold):
            text = f"equal error {counts.equal_error:.1%} at {counts.threshold:.3f}"
            axes.axvline(counts.threshold, color="black", linestyle=":", label=text)
        drawn = (
            "" if counts.num_queries == len(rule.q_pids) else f" ({counts.num_queries} of {len(rule.q_pids)} queries)"
        )
        axes.set_title(f"{name}{drawn}", fontsize=9)
        axes.set_xlabel("distance", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.legend(fontsize=7)
    figure.axes[0].set_ylabel("share of pairs", fontsize=8)
    return figure


def identity_maps(features: Mapping[str, Any], pids: Any, *, num_identities: int = 10, seed: int = 0) -> Figure:
    """t-SNE of the images of some identities, one map for each set of features; as figure 4.

    Args:
        features: title to (N, D) features of the same images, numpy arrays or torch tensors, L2-normalised here.
        pids: (N,) identities, as in `pose2id.evaluate`.
        num_identities: those with the most images, at least 1; never -1 and 0. At most 1,000 images are shown.
        seed: of the t-SNE.

    Raises:
        ImportError: the extra "plots" is not installed.
        ValueError: fewer than 3 images of identities above 0.
    """
    require_plots()
    if not features:
        raise ValueError("features must hold at least one set, got none.")
    figure = new_figure(4 * len(features), 4)
    for axes, (title, values) in zip(np.ravel(figure.subplots(1, len(features))), features.items(), strict=True):
        places, identities = map_of(values, pids, name=f"features[{title!r}]", num_identities=num_identities, seed=seed)
        for who in np.unique(identities).tolist():
            colour, marker = _COLOURS[who % len(_COLOURS)], _MARKERS[who % len(_MARKERS)]
            axes.scatter(*places[identities == who].T, c=colour, marker=marker, s=22)
        axes.set_title(title, fontsize=9)
        axes.set(xticks=[], yticks=[])
    return figure


def generated_sheet(
    references: Side,
    generated: Sequence[Side],
    *,
    poses: Side | None = None,
    size: tuple[int, int] = (128, 64),
    title: str = "",
) -> Figure:
    """One row per person: the reference, and the images generated from it; as figures 6 and 7.

    Args:
        references: images of any size: paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) float tensors in
            [0, 1].
        generated: for each reference its M images, likewise.
        poses: M drawn poses, likewise, for a row above; None: no such row.
        size: (height, width) in which each is shown, its aspect kept.
        title: text above.

    Raises:
        ImportError: the extra "plots" is not installed.
        ValueError: an image cannot be read, or references do not have equally many generated images.
    """
    counts = {len(images) for images in generated}
    if len(references) == 0 or len(generated) != len(references) or len(counts) != 1:
        raise ValueError(
            f"generated must hold M images for each of at least one reference, got {len(references)} references and"
            f" {len(generated)} lists of {sorted(counts)} images."
        )
    shown = [_all(images, f"generated[{number}]", size) for number, images in enumerate(generated)]
    drawings = None if poses is None else _all(poses, "poses", size)
    rows = len(references) + (drawings is not None)
    figure = new_figure(min(12.0, 0.8 * (len(shown[0]) + 1)), min(16.0, 0.8 * rows * size[0] / size[1]) + 0.3)
    pose_sheet(figure.subplots(), _all(references, "references", size), drawings, shown, title=title)
    return figure


def parameter_curves(
    curves: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]], *, ylabel: str = "mAP in %"
) -> Figure:
    """Quality by a parameter, a panel for each parameter and a line for each name; as figures 8 (eta) and 9 (k1, k2).

    Args:
        curves: for each panel, by its label below, from names to (xs, values); fractions in [0, 1], shown in percent.
        ylabel: text at the left.

    Raises:
        ImportError: the extra "plots" is not installed.
    """
    if not curves:
        raise ValueError("curves must hold at least one panel, got none.")
    figure = new_figure(4 * len(curves), 3)
    for axes, (label, lines) in zip(np.ravel(figure.subplots(1, len(curves))), curves.items(), strict=True):
        for number, (name, (xs, values)) in enumerate(lines.items()):
            style = {"linestyle": _LINES[number % len(_LINES)], "marker": _MARKERS[number % len(_MARKERS)]}
            axes.plot(xs, 100 * np.asarray(values), color=_COLOURS[number % len(_COLOURS)], label=name, ms=4, **style)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.axes[0].set_ylabel(ylabel, fontsize=8)
    return figure


def ranked_lists(
    before: Pair,
    after: Pair,
    labels: Sequence[Any],
    images: tuple[Side, Side],
    queries: Sequence[int],
    *,
    length: int = 10,
    names: tuple[str, str] = _NAMES,
    protocol: EvaluationProtocol = MARKET1501,
    size: tuple[int, int] = (128, 64),
) -> Figure:
    """The first images of some queries' ranked lists, without and with the method, and distances; as figure 11.

    Right matches have a solid green frame, wrong ones a dashed red one. The two nearest images that the protocol drops
    (junk) are greyed in their places.

    Args:
        before: features (Q, D) and (G, D), L2-normalised here; of the protocol's first trial where it has several.
        after: the same images' features with the method.
        labels: as in `distance_distributions`.
        images: Q images of the queries and G of the gallery, of any size, as in `generated_sheet`; only those that are
            shown are read.
        queries: rows of queries.
        length: images that count.
        names: of both, for titles.
        protocol: what matches and what is dropped.
        size: (height, width) in which each image is shown, its aspect kept.

    Raises:
        ImportError: the extra "plots" is not installed.
        ValueError: an image cannot be read.
    """
    if not len(queries):
        raise ValueError("queries must hold at least one row, got none.")
    sides, rule, (query_images, gallery_images) = _first_trial((before, after), labels, protocol, images)
    lists = [ranked_of(pair, rule, queries, length) for pair in sides]
    height = 0.32 + 0.75 * size[0] / size[1]
    figure = new_figure(0.85 * (length + 3), 2 * len(queries) * height)
    axes = iter(np.ravel(figure.subplots(2 * len(queries), 1)))
    for number, query in enumerate(queries):
        reference = np.asarray(letterboxed(query_images[query], f"images[0][{query}]", size))
        for name, of_side in zip(names, lists, strict=True):
            entries = of_side[number]
            ranked_list(
                next(axes),
                reference,
                [np.asarray(letterboxed(gallery_images[e.index], f"images[1][{e.index}]", size)) for e in entries],
                [None if e.rank is None else e.right for e in entries],
                captions=[f"{'junk' if e.rank is None else e.rank}: {e.distance:.2f}" for e in entries],
                title=f"query {query}, {name}",
            )
    return figure


def _first_trial(
    sides: tuple[Pair, Pair],
    labels: Sequence[Any],
    protocol: EvaluationProtocol,
    images: tuple[Any, Any] = (None, None),
) -> tuple[tuple[Pair, Pair], RankingProtocol, tuple[Any, Any]]:
    """Features, rule and images of a protocol's first trial."""
    if len(labels) not in (2, 4):
        raise ValueError(f"labels must be (q_pids, g_pids) or have cameras as well, got {len(labels)} of them.")
    pids, camids = tuple(labels[:2]), tuple(labels[2:]) or (None, None)
    trial = protocol.trials(*pids, *camids)[0]
    rule = protocol.rule(len(trial.query), len(trial.gallery), *trial.of(pids), *trial.of(camids))
    return (trial.of(sides[0]), trial.of(sides[1])), rule, trial.of(images)


def _all(images: Side, name: str, size: tuple[int, int]) -> list[Image.Image]:
    return [letterboxed(image, f"{name}[{at}]", size) for at, image in enumerate(images)]
