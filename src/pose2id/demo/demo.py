"""The whole method on a sample: what each half of it does to features, as a table and as a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pose2id.centralization.diagnostics import generation_diagnostics, nfc_diagnostics
from pose2id.centralizer import Centralizer
from pose2id.demo.people import Sample, SyntheticPedestrians
from pose2id.demo.stripes import colour_stripes
from pose2id.io.feature_files import FeatureFile
from pose2id.io.rows import Rows
from pose2id.io.whole_files import new_file, whole_file
from pose2id.report import Pair, by_number, compare, number_table, table, with_nfc
from pose2id.retrieval.evaluation import RankingProtocol, evaluate

FEW = 30  # people: enough to tell that they repeat
_LIST_LENGTH = 10
_SHEET_PEOPLE = 3
_ABOUT_MAPS = "t-SNE of 10 identities, one colour per identity; the two maps are fitted apart"
_Images = tuple[Sequence[NDArray[np.uint8]], Sequence[NDArray[np.uint8]]]
_Sets = Mapping[str, Pair]  # the features before and after, by what they are called


@dataclass(frozen=True)
class Settings:
    """How the tiny weights are used, here and in benchmarks/tiny.py; chosen on people of seed 0 (docs/results.md).

    Attributes:
        num_inference_steps: of the sampler.
        guidance_scale: of the sampler; 1 is none.
        eta: weight of the generated images in eq. 9.
    """

    num_inference_steps: int = 10
    guidance_scale: float = 1.0
    eta: float = 1.0


TINY = Settings()


@dataclass(frozen=True, eq=False)
class Generated:
    """What was generated from a demo's images.

    Attributes:
        query_feats: (Q, M, D) raw features of the queries' generated images.
        gallery_feats: (G, M, D), likewise.
        query_pictures: for each query its M generated pictures.
    """

    query_feats: NDArray[Any]
    gallery_feats: NDArray[Any]
    query_pictures: Sequence[Sequence[Image.Image]]

    @property
    def feats(self) -> Pair:
        """Those of the queries and of the gallery."""
        return self.query_feats, self.gallery_feats


@dataclass(frozen=True, eq=False)
class Demo:
    """Features to show, with their pictures where there are any.

    Attributes:
        title: what the features are of.
        features: features and labels; raw features, where there are generated ones.
        images: (H, W, 3) uint8 RGB pictures of the queries and of the gallery, or None.
        generated: features and pictures of generated images, or None.
    """

    title: str
    features: FeatureFile
    images: _Images | None = None
    generated: Generated | None = None


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
    images = _drawn(people)
    features = colour_stripe_extractor().extract(images, progress=progress)
    return Demo(_title(people), split(people, features), _split_images(people, images))


def once(demo: Demo) -> Demo:
    """The same people, each once among the queries and once in the gallery, by another camera: nobody repeats.

    Features alone are kept; every person must have an image by another camera than the first query's.
    """
    features: Any = demo.features
    q = np.unique(features.q_pids, return_index=True)[1]
    others = (features.g_pids == features.q_pids[q, None]) & (features.g_camids != features.q_camids[q, None])
    g = others.argmax(1)
    chosen = {name: getattr(features, name)[q] for name in ("query_feats", "q_pids", "q_camids")}
    chosen |= {name: getattr(features, name)[g] for name in ("gallery_feats", "g_pids", "g_camids")}
    title = f"The same people, once each: {len(q)} queries by one camera, {len(g)} gallery images by another"
    return Demo(title, replace(features, **chosen))


def generation_demo(
    *, num_identities: int = 20, seed: int = 1, settings: Settings = TINY, progress: bool = True
) -> Demo:
    """Features of drawn pedestrians whom the tiny weights have never seen, and of pictures generated from them.

    Args:
        num_identities: people drawn, each by 4 cameras twice.
        seed: of the drawing: chooses people and cameras. The weights were trained on those of seed 1000.
        settings: of the generation.
        progress: show bars on a terminal.

    Returns:
        The demo's features and pictures, with the generated ones.
    """
    from pose2id.ipg import IdentityGenerator  # noqa: PLC0415 - diffusers takes seconds to import

    people = SyntheticPedestrians(num_identities, images_per_camera=2, seed=seed)
    images = _drawn(people)
    album = _Album(IdentityGenerator.from_pretrained("tiny"))
    options = {"num_inference_steps": settings.num_inference_steps, "guidance_scale": settings.guidance_scale}
    extractor = colour_stripe_extractor(generator=album, generate_options={**options, "size": None})
    features = extractor.extract(images, normalize=False, progress=progress)
    generated = extractor.extract_generated(images, progress=progress)
    q, g = people.query_gallery()
    content = Generated(generated[q], generated[g], [album.pictures[i] for i in q])
    title = (
        f"{_title(people)}\n{generated.shape[1]} pictures generated from each image: tiny weights, "
        f"{settings.num_inference_steps} steps, guidance {settings.guidance_scale:g}"
    )
    return Demo(title, split(people, features), _split_images(people, images), content)


def colour_stripe_extractor(**options: Any) -> Centralizer:
    """The hand-made descriptor as a model that reads images itself, with further parameters of `Centralizer`."""
    return Centralizer(lambda batch: colour_stripes(np.stack(batch)), inputs="images", batch_size=16, **options)


def split(people: SyntheticPedestrians, features: NDArray[Any]) -> FeatureFile:
    """Features of all items as queries and gallery, with labels."""
    q, g = people.query_gallery()
    return FeatureFile(features[q], features[g], people.pids[q], people.pids[g], people.camids[q], people.camids[g])


def report(demo: Demo, centralizer: Centralizer) -> str:
    """The tables, and what the label-free diagnostics say, as text."""
    features, generated = demo.features, None if demo.generated is None else demo.generated.feats
    lines = [demo.title, "", table(compare(features, centralizer=centralizer, generated=generated, control=True)), ""]
    if generated is not None:
        curves = number_table(by_number(features, generated, centralizer=centralizer))
        lines += [
            "control: everybody's mean generated feature in place of a person's own",
            "",
            f"by number of generated images, eta {centralizer.eta:g}:",
            curves,
            "",
        ]
    for name, feats, camids in (
        ("query", features.query_feats, features.q_camids),
        ("gallery", features.gallery_feats, features.g_camids),
    ):
        if len(feats) > 1:
            lines.append(f"{name}: {nfc_diagnostics(feats, centralizer.k1, centralizer.k2, camids=camids)}")
    if generated is not None:
        originals = np.concatenate([features.query_feats, features.gallery_feats])
        # The reading is for real people.
        lines.append(generation_diagnostics(originals, np.concatenate(generated)).summary)
    return "\n".join(lines)


def draw(demo: Demo, centralizer: Centralizer, path: str | os.PathLike[str]) -> None:
    """Write a picture: feature maps before and after centralization and, where there are images, ranked lists.

    The lists are those of the query that centralization helps most, of the median one, and of the one that it harms
    most. Where there are generated images, some are shown, and mAP by their number.

    Args:
        demo: what to show; identity labels are needed.
        centralizer: whose `enhance` is shown or, where there are generated images, `fuse` and the published NFC.
        path: .png, .svg or .pdf, in a folder that exists; an existing file is replaced.

    Raises:
        ImportError: the extra "plots" is not installed.
        ValueError: there are no identity labels, or too few images to draw a map.
    """
    features, images, generated = demo.features, demo.images, demo.generated
    if features.q_pids is None or features.g_pids is None:
        raise ValueError("q_pids and g_pids must be given to draw identities.")
    labels = features.q_pids, features.g_pids, features.q_camids, features.g_camids
    before: Pair = features.query_feats, features.gallery_feats
    if images is None or generated is None:
        cameras: dict[str, Any] = {"query_camids": features.q_camids, "gallery_camids": features.g_camids}
        sets = {"before": before, f"after {centralizer.method}": centralizer.enhance(*before, **cameras)}
        figure = _figure_of_features(demo.title, images, labels, sets)
    else:
        query, gallery = (centralizer.fuse(x, of_x) for x, of_x in zip(before, generated.feats, strict=True))
        sets = {"as they are": before, "with IPG + NFC": with_nfc((query, gallery), centralizer)}
        curves = by_number(features, generated.feats, centralizer=centralizer)
        figure = _figure_of_all(demo.title, images, labels, sets, generated, curves)
    with whole_file(new_file(path, overwrite=True)) as unfinished:
        figure.savefig(unfinished, dpi=110, format=Path(path).suffix[1:].lower())


class _Album:
    """A generator that keeps the pictures which pass through it."""

    def __init__(self, generator: Any) -> None:
        self.generator = generator
        self.pictures: list[Sequence[Image.Image]] = []

    def generate_iter(self, images: Any, poses: Any, *, progress: bool, **options: Any) -> Iterator[Any]:
        for pictures in self.generator.generate_iter(images, poses, progress=progress, **options):
            self.pictures.append(pictures)
            yield pictures


def _drawn(people: SyntheticPedestrians) -> list[NDArray[np.uint8]]:
    samples: list[Sample] = people[:]
    return [sample.image for sample in samples]


def _split_images(people: SyntheticPedestrians, images: Sequence[NDArray[np.uint8]]) -> _Images:
    q, g = people.query_gallery()
    return [images[i] for i in q], [images[i] for i in g]


def _title(people: SyntheticPedestrians) -> str:
    q, g = people.query_gallery()
    return f"{people.name}, {len(q)} queries, {len(g)} gallery images, colour-stripe features"


def _figure_of_features(title: str, images: _Images | None, labels: tuple[Any, ...], sets: _Sets) -> Any:
    from pose2id.plots import new_figure  # noqa: PLC0415 - an extra

    figure: Any = new_figure(10, 4 if images is None else 11)
    maps = figure
    if images is not None:
        maps, lists = figure.subfigures(2, 1, height_ratios=[1, 2.2])
        _draw_lists(lists, images, labels, sets)
    maps.suptitle(f"{title}\n{_ABOUT_MAPS}", fontsize=9)
    _draw_maps(maps.subplots(1, 2), labels, sets)
    return figure


def _figure_of_all(
    title: str,
    images: _Images,
    labels: tuple[Any, ...],
    sets: _Sets,
    generated: Generated,
    curves: Mapping[str, Sequence[float]],
) -> Any:
    from pose2id.plots import new_figure, number_curves  # noqa: PLC0415

    figure: Any = new_figure(10, 13)
    figure.suptitle(title, fontsize=9)
    left, right = figure.subfigures(1, 2, width_ratios=[1.8, 1])
    sheet, lists = left.subfigures(2, 1, height_ratios=[1, 1.42])
    _draw_sheet(sheet.subplots(), images[0], labels[0], generated.query_pictures)
    _draw_lists(lists, images, labels, sets)
    first, *maps = right.subplots(3, 1)
    number_curves(first, curves, title="mAP by number of generated images")
    _draw_maps(maps, labels, sets)
    maps[-1].set_xlabel(_ABOUT_MAPS.replace("; ", "\n"), fontsize=8)
    return figure


def _draw_sheet(
    axes: Any, images: Sequence[NDArray[np.uint8]], pids: NDArray[np.int64], pictures: Sequence[Sequence[Image.Image]]
) -> None:
    """The first few people, each by another camera: nothing is picked for how well it went."""
    from pose2id import poses  # noqa: PLC0415
    from pose2id.plots import pose_sheet  # noqa: PLC0415

    axes.set_anchor("W")
    by_person = [np.flatnonzero(pids == pid) for pid in np.unique(pids)[:_SHEET_PEOPLE]]
    shown = [int(queries[i % len(queries)]) for i, queries in enumerate(by_person)]
    pose_sheet(
        axes,
        [Image.fromarray(images[i]) for i in shown],
        [poses.draw(pose) for pose in poses.standard()],
        [pictures[i] for i in shown],
        title=f"queries of the first {len(shown)} drawn people, and what was generated from them in the 8 poses",
    )


def _draw_maps(axes: Any, labels: tuple[Any, ...], sets: _Sets) -> None:
    from pose2id.plots import feature_maps  # noqa: PLC0415

    pids = np.concatenate(labels[:2])
    feature_maps(axes, {name: np.concatenate(pair) for name, pair in sets.items()}, pids)


def _draw_lists(figure: Any, images: _Images, labels: tuple[Any, ...], sets: _Sets) -> None:
    from pose2id.plots import ranked_list  # noqa: PLC0415

    precision = {name: evaluate(*pair, *labels).average_precision for name, pair in sets.items()}
    before, after = precision.values()
    chosen = _shown_queries(after - before)
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


def _shown_queries(gain: NDArray[np.float64]) -> dict[str, int]:
    valid = np.flatnonzero(np.isfinite(gain))
    order = valid[np.argsort(gain[valid], kind="stable")]
    return {"most helped": int(order[-1]), "median": int(order[len(order) // 2]), "most harmed": int(order[0])}


def _ranking(qf: NDArray[Any], gf: NDArray[Any], query: int, dropped: NDArray[np.int64]) -> NDArray[np.int64]:
    """Gallery indices, nearest first, without the dropped ones."""
    q, g = (Rows(x, "features", normalize=True).read(slice(None)).numpy() for x in (qf[query : query + 1], gf))
    order: NDArray[np.int64] = np.argsort(-(g @ q[0]), kind="stable")
    kept: NDArray[np.int64] = order[~np.isin(order, dropped)]
    return kept
