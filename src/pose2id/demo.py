"""The main job on a sample: what centralization does to features, as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pose2id._inputs import Rows
from pose2id.centralization import nfc_diagnostics
from pose2id.centralizer import Centralizer
from pose2id.datasets import Sample, SyntheticPedestrians, colour_stripes
from pose2id.evaluation import RankingProtocol, evaluate
from pose2id.feature_files import FeatureFile
from pose2id.report import compare, table

_LIST_LENGTH = 10
_Images = tuple[Sequence[NDArray[np.uint8]], Sequence[NDArray[np.uint8]]]


@dataclass(frozen=True, eq=False)
class Demo:
    """Features to show, with their pictures where there are any.

    Attributes:
        title: what the features are of.
        features: features and labels.
        images: (H, W, 3) uint8 RGB pictures of the queries and of the gallery, or None.
    """

    title: str
    features: FeatureFile
    images: _Images | None = None


def synthetic_demo(*, num_identities: int = 60, seed: int = 0, progress: bool = True) -> Demo:
    """Colour-stripe features of drawn pedestrians, extracted as any model's features would be.

    Args:
        num_identities: people drawn, each by 4 cameras 3 times.
        seed: of the drawing.
        progress: show a bar on a terminal.

    Returns:
        The demo's features and pictures.
    """
    people = SyntheticPedestrians(num_identities, seed=seed)
    samples: list[Sample] = people[:]
    images = [sample.image for sample in samples]
    extractor = Centralizer(lambda batch: colour_stripes(np.stack(batch)), inputs="images", batch_size=16)
    features = extractor.extract(images, progress=progress)
    q, g = people.query_gallery()
    content = FeatureFile(features[q], features[g], people.pids[q], people.pids[g], people.camids[q], people.camids[g])
    title = f"{people.name}, {len(q)} queries, {len(g)} gallery images, colour-stripe features"
    return Demo(title, content, ([images[i] for i in q], [images[i] for i in g]))


def report(demo: Demo, centralizer: Centralizer) -> str:
    """The table, and what the label-free diagnostics say, as text."""
    features = demo.features
    lines = [demo.title, "", table(compare(features, centralizer=centralizer)), ""]
    for name, feats, camids in (
        ("query", features.query_feats, features.q_camids),
        ("gallery", features.gallery_feats, features.g_camids),
    ):
        if len(feats) > 1:
            lines.append(f"{name}: {nfc_diagnostics(feats, centralizer.k1, centralizer.k2, camids=camids)}")
    return "\n".join(lines)


def draw(demo: Demo, centralizer: Centralizer, path: str | os.PathLike[str]) -> None:
    """Write a picture: feature maps before and after NFC and, where there are images, ranked lists.

    The lists are those of the query that NFC helps most, of the median one, and of the one that it harms most.

    Args:
        demo: what to show; identity labels are needed.
        centralizer: whose `enhance` is shown.
        path: .png, .svg or .pdf, in a folder that exists; an existing file is replaced.

    Raises:
        ImportError: the extra "plots" is not installed.
        ValueError: there are no identity labels, or too few images to draw a map.
    """
    from pose2id.plots import feature_maps, new_figure  # noqa: PLC0415 - an extra

    features = demo.features
    if features.q_pids is None or features.g_pids is None:
        raise ValueError("q_pids and g_pids must be given to draw identities.")
    labels = features.q_pids, features.g_pids, features.q_camids, features.g_camids
    sets = {
        "before": (features.query_feats, features.gallery_feats),
        "after NFC": centralizer.enhance(features.query_feats, features.gallery_feats),
    }
    figure = new_figure(10, 4 if demo.images is None else 11)
    maps: Any = figure
    if demo.images is not None:
        halves: Any = figure.subfigures(2, 1, height_ratios=[1, 2.2])
        maps = halves[0]
        _draw_lists(halves[1], demo.images, labels, sets)
    maps.suptitle(f"{demo.title}\nt-SNE of 10 identities, one colour each; the two maps are fitted apart", fontsize=9)
    pids = np.concatenate(labels[:2])
    feature_maps(maps.subplots(1, 2), {name: np.concatenate(pair) for name, pair in sets.items()}, pids)
    figure.savefig(path, dpi=110)


def _draw_lists(
    figure: Any, images: _Images, labels: tuple[Any, ...], sets: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
) -> None:
    from pose2id.plots import ranked_list  # noqa: PLC0415

    precision = {name: evaluate(*pair, *labels).average_precision for name, pair in sets.items()}
    chosen = _telling_queries(precision["after NFC"] - precision["before"])
    protocol = RankingProtocol(len(images[0]), len(images[1]), *labels)
    axes = iter(figure.subplots(2 * len(chosen), 1))
    for what, query in chosen.items():
        for name, pair in sets.items():
            matches, dropped = protocol.of_query(query)
            order = _ranking(*pair, query, dropped)[:_LIST_LENGTH]
            ranked_list(
                next(axes),
                images[0][query],
                [images[1][i] for i in order],
                np.isin(order, matches),
                title=f"{what} query, {name}: average precision {precision[name][query]:.0%}",
            )


def _telling_queries(gain: NDArray[np.float64]) -> dict[str, int]:
    valid = np.flatnonzero(np.isfinite(gain))
    order = valid[np.argsort(gain[valid], kind="stable")]
    return {"most helped": int(order[-1]), "median": int(order[len(order) // 2]), "most harmed": int(order[0])}


def _ranking(qf: NDArray[Any], gf: NDArray[Any], query: int, dropped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gallery indices, nearest first, without the dropped ones."""
    q, g = (Rows(x, "features", normalize=True).read(slice(None)).numpy() for x in (qf[query : query + 1], gf))
    order: NDArray[np.int64] = np.argsort(-(g @ q[0]), kind="stable")
    kept: NDArray[np.int64] = order[~np.isin(order, dropped)]
    return kept
