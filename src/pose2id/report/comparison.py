"""What the method does for given features: each half of it and re-ranking, measured alike."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np
from torch import Tensor

from pose2id.centralization.id2 import id2_score
from pose2id.centralizer import Centralizer
from pose2id.io.checks import as_numpy, checked_flags, require_modules
from pose2id.io.feature_files import FeatureFile, load_features
from pose2id.report.tables import as_csv, as_latex, as_markdown, cells, records, table
from pose2id.report.ways import Pair, Sets, Way, unpublished, way_of
from pose2id.retrieval.evaluation import EvaluationResult, mean_of
from pose2id.retrieval.protocols import MARKET1501, EvaluationProtocol

_WITH_CAMERAS = ", cameras"


@dataclass(frozen=True, eq=False)
class Row:
    """One line of the table.

    Attributes:
        name: what was done to the features.
        result: retrieval quality.
        id2: ID² score of query and gallery together (published convention), the mean over trials; None where only
            distances changed.
        published: figures of the paper, fractions, by name ("mAP", "Rank-1"); empty where there are none.
    """

    name: str
    result: EvaluationResult
    id2: float | None
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Comparison(Sequence[Row]):
    """Rows, the first one of the features as they are; a sequence that prints as a table, in notebooks too.

    Attributes:
        rows: the rows.
        features: what was measured, with its labels.
        protocol: by which protocol.
        paths: image files of queries and gallery, where they were given.
        centralizer: whose parameters were used.
    """

    rows: tuple[Row, ...]
    features: FeatureFile
    protocol: EvaluationProtocol
    paths: tuple[Sequence[str], Sequence[str]] | None
    centralizer: Centralizer

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        """Aligned text, in percent."""
        return table(self.rows)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Figures as fractions, by the rows' names."""
        return {record.pop("name"): record for record in records(self.rows)}

    def to_frame(self) -> Any:
        """Figures as fractions in a pandas DataFrame, indexed by the rows' names.

        Raises:
            ImportError: pandas is not installed.
        """
        require_modules("to_frame needs pandas", "pandas", "pandas")
        import pandas as pd  # noqa: PLC0415 - optional

        return pd.DataFrame(records(self.rows)).set_index("name")

    def to_csv(self) -> str:
        """Figures as fractions in CSV."""
        return as_csv(self.rows)

    def to_markdown(self) -> str:
        """The table in Markdown, in percent."""
        return as_markdown(self.rows)

    def to_latex(self) -> str:
        """The table in LaTeX with the rules of booktabs, in percent."""
        return as_latex(self.rows)

    def _repr_html_(self) -> str:
        """The table for notebooks, in percent."""
        head, *lines = cells(self.rows)
        rows = [("th", head), *(("td", line) for line in lines)]
        body = ("".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in line) for tag, line in rows)
        return f"<table>{''.join(f'<tr>{line}</tr>' for line in body)}</table>"


def compare(
    features: FeatureFile | Pair | str | os.PathLike[str],
    labels: Sequence[Any] | None = None,
    *,
    protocol: EvaluationProtocol = MARKET1501,
    paths: tuple[Sequence[str], Sequence[str]] | None = None,
    nfc: bool = True,
    rerank: bool = True,
    centralizer: Centralizer | None = None,
    generated: Pair | None = None,
    control: bool = False,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """Measure the features as they are, with NFC, with the safe default, with generated images (IPG), and re-ranked.

    "NFC" is the published method. The row of the safe default is called by its method, "auto", and comes a second time
    with ", cameras" where both sets have cameras, as does "rerank": `Centralizer.rerank`. Everything is done inside
    each trial of the protocol, with the images of that trial alone. Where queries and gallery are the same images
    (`protocols.LEAVE_ONE_OUT`) nothing is re-ranked: an image and its copy would be each other's neighbours.

    Args:
        features: (qf, gf), arrays (Q, D) and (G, D); or a feature file, or its path (`load_features`).
        labels: (q_pids, g_pids) or (q_pids, g_pids, q_camids, g_camids), as in `evaluate`, with arrays; those of a
            feature file are its own. Camera labels are used where both sets have them.
        protocol: which images are queries and gallery in each trial, and which are dropped: `retrieval.protocols`.
        paths: image files of queries and gallery: for the protocols that go by file names, and for pictures.
        nfc: measure the rows with the published NFC.
        rerank: measure published re-ranking (20, 6, 0.3), of all rows but those of the default, and the safe one.
        centralizer: whose `enhance`, `rerank` and `fuse` are measured; default `Centralizer()`. With method="nfc" its
            k1 and k2 are those of the rows with NFC, beside "auto".
        generated: features (Q, M, D) and (G, M, D) of generated images of the same images: measure the rows with IPG.
            Both they and `features` must then be the model's raw outputs.
        control: also measure IPG with the mean generated feature of all people in each pose. It carries no identity,
            yet changes the scores, ID² above all; only what IPG gains beyond it comes from the generated images.
        published: figures of the paper, fractions by name, for some of the rows: `report.published.figures`.

    Returns:
        The rows, the baseline first.

    Raises:
        ValueError: the features have no identity labels, or no query has a match; or as in `fuse`.
    """
    checked_flags(nfc=nfc, rerank=rerank, control=control)
    content, centralizer = given_features(features, labels), centralizer or Centralizer()
    cameras = content.q_camids is not None and content.g_camids is not None
    sources = ["baseline"]
    if generated is not None:
        sources += ["IPG", "control"] if control else ["IPG"]
    ways, of_paper = _features(sources, unpublished(centralizer).method, nfc=nfc, cameras=cameras)
    if rerank and not protocol.leave_one_out:
        names = {name: "re-ranking" if name == "baseline" else f"{name} + re-ranking" for name in of_paper}
        ways |= {names[name]: _reranked(way) for name, way in of_paper.items()}
        ways["rerank"] = lambda sets: sets.safely_reranked()
        if cameras:
            ways[f"rerank{_WITH_CAMERAS}"] = lambda sets: sets.safely_reranked(cameras=True)
    options: dict[str, Any] = {"protocol": protocol, "paths": paths, "published": published}
    return measure(ways, content, centralizer=centralizer, generated=generated, **options)


def _features(sources: list[str], method: str, *, nfc: bool, cameras: bool) -> tuple[dict[str, Way], dict[str, Way]]:
    """The rows of features, and those among them that are published and get re-ranked."""
    safe = {method: False} | ({f"{method}{_WITH_CAMERAS}": True} if cameras else {})
    if method in ("cameras", "centring"):  # never without cameras
        safe = {method: cameras}
    ways: dict[str, Way] = {}
    published: dict[str, Way] = {}
    for source in sources:
        ways[source] = published[source] = way_of(lambda sets, source: sets.source(source), source)
        if nfc:
            name = "NFC" if source == "baseline" else f"{source} + NFC"
            ways[name] = published[name] = way_of(lambda sets, source: sets.centralized(source), source)
        if source == "baseline":
            ways |= {name: way_of(_safe, source, with_cameras) for name, with_cameras in safe.items()}
        else:
            ways[f"{source} + {method}"] = way_of(_safe, source, next(iter(safe.values())))
    return ways, published


def _several(ways: Way | Sequence[Way]) -> Sequence[Way]:
    return (ways,) if callable(ways) else ways


def _safe(sets: Sets, source: str, cameras: bool) -> Pair:
    return sets.safe(sets.source(source), cameras=cameras)


def _reranked(way: Callable[[Sets], Any]) -> Way:
    return lambda sets: sets.reranked(way(sets))


def measure(
    ways: Mapping[str, Way | Sequence[Way]],
    features: FeatureFile,
    *,
    protocol: EvaluationProtocol = MARKET1501,
    paths: tuple[Sequence[str], Sequence[str]] | None = None,
    centralizer: Centralizer | None = None,
    generated: Pair | None = None,
    published: Mapping[str, Mapping[str, float]] | None = None,
) -> Comparison:
    """One row for each way: what it makes of the features of each trial, measured by the protocol.

    Args:
        ways: from the rows' names to functions of `Sets`, which give both sides' features, or distances (Q, G). Of
            several functions a row has the mean.
        features: features with identity labels.
        protocol: as in `compare`, and so are the following.
        paths: as in `compare`.
        centralizer: as in `compare`.
        generated: as in `compare`.
        published: figures of the paper, fractions by name, for some of the rows.

    Returns:
        The rows in the order of `ways`.
    """
    centralizer = centralizer or Centralizer()
    labels = labels_of(features)
    pids, camids = labels[:2], labels[2:]
    checked_generated(generated)
    results: dict[str, list[EvaluationResult]] = {name: [] for name in ways}
    id2s: dict[str, list[float]] = {name: [] for name in ways}
    protocol.check_features(features.query_feats, features.gallery_feats)
    pair, names = pair_of(features), None if paths is None else paths[1]
    for trial in protocol.trials(*labels, g_names=names):
        sets = Sets(
            trial.of(pair),
            trial.of(camids),
            None if generated is None else trial.of(generated),
            centralizer,
            alone=protocol.leave_one_out,
        )
        of_trial = trial.of(pids)
        for name, way in ((name, way) for name, several in ways.items() for way in _several(several)):
            made = way(sets)
            results[name].append(protocol.measure(made, *trial.of(pids), *trial.of(camids)))
            if isinstance(made, tuple):
                once = slice(1 if protocol.leave_one_out else 2)  # both sides are the same images there
                id2s[name].append(id2_score(np.concatenate(made[once]), np.concatenate(of_trial[once])))
    rows = [
        Row(name, mean_of(found), float(np.mean(id2s[name])) if id2s[name] else None, (published or {}).get(name, {}))
        for name, found in results.items()
    ]
    return Comparison(tuple(rows), features, protocol, paths, centralizer)


def by_number(
    features: FeatureFile, generated: Pair, *, centralizer: Centralizer | None = None
) -> dict[str, list[float]]:
    """Mean average precision by number of generated images, on both sides alike (the paper's Table 6).

    Args:
        features: raw features with identity labels.
        generated: raw features (Q, M, D) and (G, M, D) of their generated images; the first ones are taken.
        centralizer: as in `compare`.

    Returns:
        M + 1 fractions for "IPG", and for "IPG + NFC", as published: with 0 to M images. Those of 0 are the baseline's
        and NFC's.

    Raises:
        ValueError: as in `compare`.
    """
    numbers = range(checked_generated(generated) + 1)
    ways: dict[str, Way | Sequence[Way]] = {}
    for number in numbers:
        ways[f"IPG {number}"] = way_of(_first, number)
        ways[f"IPG + NFC {number}"] = way_of(lambda sets, number: sets.with_nfc(_first(sets, number)), number)
    found = measure(ways, features, centralizer=centralizer, generated=generated).to_dict()
    return {name: [found[f"{name} {number}"]["mAP"] for number in numbers] for name in ("IPG", "IPG + NFC")}


def _first(sets: Sets, number: int) -> Pair:
    query, gallery = sets.generated
    return sets.fused((query[:, :number], gallery[:, :number]))


def given_features(features: FeatureFile | Pair | str | os.PathLike[str], labels: Sequence[Any] | None) -> FeatureFile:
    """Arrays with labels, or a file, as a `FeatureFile`."""
    if isinstance(features, (str, os.PathLike)):
        features = load_features(features)
    if isinstance(features, FeatureFile):
        if labels is not None:
            raise ValueError("labels must be None with a feature file, which has its own.")
        return features
    if not isinstance(features, (tuple, list)) or len(features) != 2:
        given = type(features).__name__
        raise TypeError(f"features must be (qf, gf), a FeatureFile or the path of a feature file, got {given}.")
    if labels is None or len(labels) not in (2, 4):
        given = "None" if labels is None else f"{len(labels)} of them"
        raise ValueError(f"labels must be (q_pids, g_pids) or (q_pids, g_pids, q_camids, g_camids), got {given}.")
    query, gallery = (as_numpy(x) if isinstance(x, Tensor) else x for x in features)
    return FeatureFile(query, gallery, *labels)


def labels_of(features: FeatureFile) -> tuple[Any, ...]:
    """Identities of both sides, then their cameras."""
    if features.q_pids is None or features.g_pids is None:
        raise ValueError("q_pids and g_pids must be given to evaluate features (query_label, gallery_label in .mat).")
    return features.q_pids, features.g_pids, features.q_camids, features.g_camids


def pair_of(features: FeatureFile) -> Pair:
    """Both sides, in single precision at least."""
    # Half precision would round what NFC gives back.
    query, gallery = (
        x.astype(np.float32) if x.dtype == np.float16 else x for x in (features.query_feats, features.gallery_feats)
    )
    return query, gallery


def checked_generated(generated: Pair | None) -> int:
    """How many generated images each image has, the same number on both sides; 0 where there are none."""
    if generated is None:
        return 0
    of_query, of_gallery = (int(x.shape[1]) for x in generated)
    if of_query != of_gallery:
        wanted = f"as many images of a query as of a gallery image, got {of_query} and {of_gallery}"
        raise ValueError(f"generated must have {wanted}. Pass the first {min(of_query, of_gallery)} of each.")
    return of_query
