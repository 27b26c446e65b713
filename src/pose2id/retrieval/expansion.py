"""Query expansion and its database side: every feature becomes a weighted mean of itself and its nearest neighbours.

Older relatives of NFC, for comparison and combination: they take the nearest features, mutual or not, and weight them
by cosine similarity. Sources: average query expansion (Chum et al., "Total Recall", ICCV 2007); similarities to the
power alpha (Radenovic et al., "Fine-tuning CNN Image Retrieval with No Human Annotation", PAMI 2018); the database side
(Arandjelovic and Zisserman, "Three things everyone should know to improve object retrieval", CVPR 2012).

In all three functions `qe_k` counts the features that are averaged, the feature itself among them, as fast-reid's
QE_K does; the papers' number of neighbours is one less. A neighbour whose similarity is not positive weighs nothing,
whatever alpha; zero rows have similarity 0 to all others, so they stay zero and add nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pose2id.io.checks import BLOCK_BYTES, checked_count, checked_memory, checked_number
from pose2id.io.rows import FeatureArray, JoinedRows, Rows, blocks, checked_pair
from pose2id.neighbors.distance import nearest_columns
from pose2id.neighbors.search import search, tying_distances


def query_expansion(
    query_feats: FeatureArray, gallery_feats: FeatureArray, *, qe_k: int = 5, alpha: float = 3.0, qe_times: int = 1
) -> FeatureArray:
    """Add to every query its nearest gallery features, weighted by similarity (AQE with alpha=0, else alpha-QE).

        q' = normalize(q + sum of (q . g)^alpha g over those of the qe_k - 1 nearest g with q . g > 0)

    with q and g L2-normalised. Each query is expanded on its own, whatever else is in its set; the gallery stays.
    Distances are computed in float32 (float64 where a set is float64), a block of queries at a time; of equally near
    features those with the lower gallery index count.

    Args:
        query_feats: (Q, D) raw or normalised features, floating numpy array or torch tensor. Not modified.
        gallery_feats: (G, D) features of the same model, on the same device.
        qe_k: how many features are averaged, the query itself among them: 1 only normalises, more than G + 1 means the
            whole gallery.
        alpha: power of the similarities, at least 0. 0 is the plain mean; the larger, the less count distant features.
        qe_times: how often: the expanded query looks for neighbours again.

    Returns:
        (Q, D) L2-normalised features in the container, dtype and device of `query_feats`; a zero row stays zero.
    """
    qe_k, alpha, qe_times = _checked(qe_k, alpha, qe_times)
    query = Rows(query_feats, "query_feats", normalize=True)
    gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
    checked_pair(query, gallery, "query_feats", "gallery_feats")
    dtype = torch.promote_types(query.dtype, gallery.dtype)
    count = min(qe_k - 1, gallery.n)
    to_gallery = tying_distances(gallery)
    result = query.empty()
    for block in blocks(query.n, max(64, BLOCK_BYTES // (16 * max(gallery.n, 2 * query.dim)))):
        unit = query.read(block, torch.float64)
        for _ in range(qe_times if count else 0):
            nearest = nearest_columns(to_gallery(unit.to(dtype)), count)
            unit = normalize(unit + _neighbors_sum(unit, gallery, nearest, alpha))
        query.write(result, block, unit)
    return result  # type: ignore[return-value]


def database_augmentation(
    gallery_feats: FeatureArray,
    *,
    qe_k: int = 5,
    alpha: float = 3.0,
    qe_times: int = 1,
    backend: str = "auto",
    max_memory: int | None = None,
) -> FeatureArray:
    """Add to every gallery feature its nearest others, weighted by similarity (DBA): query expansion for the gallery.

        g' = normalize(g + sum of (g . h)^alpha h over those of the qe_k - 1 nearest others h with g . h > 0)

    with g and h L2-normalised. Done once for a gallery. Neighbours are exact, those of `pose2id.nearest_neighbors`: a
    feature is never its own neighbour, its copies are.

    Args:
        gallery_feats: (N, D) raw or normalised features, floating numpy array or torch tensor. Not modified.
        qe_k: how many features are averaged, the feature itself among them: 1 only normalises, more than N means all.
        alpha: as in `query_expansion`.
        qe_times: how often: the augmented features are augmented again.
        backend: as in `pose2id.nearest_neighbors`.
        max_memory: as in `pose2id.nearest_neighbors`, then for blocks of means; from the second time on, one or two
            copies of the features in float32 (float64 for float64) come on top.

    Returns:
        (N, D) L2-normalised features in the container, dtype and device of `gallery_feats`; a zero row stays zero.
    """
    qe_k, alpha, qe_times = _checked(qe_k, alpha, qe_times)
    rows = Rows(gallery_feats, "gallery_feats", normalize=True)
    result = rows.empty()
    for block, mean in _means(rows, qe_k, alpha, qe_times, backend, max_memory):
        rows.write(result, block, normalize(mean))
    return result  # type: ignore[return-value]


def aqe(
    query_feats: FeatureArray,
    gallery_feats: FeatureArray,
    qe_times: int = 1,
    qe_k: int = 5,
    alpha: float = 3.0,
    *,
    backend: str = "auto",
    max_memory: int | None = None,
) -> tuple[FeatureArray, FeatureArray]:
    """fast-reid's query expansion: in the union of both sets, features become means of their neighbourhoods.

        f' = (f + sum of c^alpha h over the qe_k - 1 others h of highest cosine similarity c, where c > 0) / qe_k

    Query and gallery borrow from each other, queries from other queries, too: what a query gets depends on queries that
    a deployed system has not seen yet, and figures are not comparable with those of methods that keep the sets apart
    (`query_expansion`, `database_augmentation`, `nfc`). The defaults are those of fast-reid's configuration
    (TEST.AQE); its function's own default is qe_k=10. Where fast-reid takes the power of a negative similarity, the
    weight here is 0; and a feature is always a part of its mean, however many copies it has.

    Args:
        query_feats: (Q, D) features, floating numpy array or torch tensor: averaged as they are, so raw features count
            with their norms. Not modified.
        gallery_feats: (G, D) features of the same model, on the same device.
        qe_times: how often.
        qe_k: how many features are averaged, the feature itself among them: more than Q + G means all.
        alpha: as in `query_expansion`.
        backend: as in `pose2id.nearest_neighbors`.
        max_memory: as in `database_augmentation`; up to three copies of both sets come on top.

    Returns:
        (query, gallery), not normalised, each in the container, dtype and device it came in.
    """
    qe_k, alpha, qe_times = _checked(qe_k, alpha, qe_times)
    query = Rows(query_feats, "query_feats", normalize=True)
    gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
    checked_pair(query, gallery, "query_feats", "gallery_feats")
    rows = JoinedRows(query, gallery)
    means = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
    for block, mean in _means(rows, qe_k, alpha, qe_times, backend, max_memory, with_lengths=True):
        means[block] = mean
    results: tuple[Any, Any] = query.empty(), gallery.empty()
    query.write(results[0], slice(None), means[: query.n])
    gallery.write(results[1], slice(None), means[query.n :])
    return results


def _checked(qe_k: Any, alpha: Any, qe_times: Any) -> tuple[int, float, int]:
    return checked_count(qe_k, "qe_k"), checked_number(alpha, "alpha", 0, 1e6), checked_count(qe_times, "qe_times")


def _means(
    rows: Rows,
    qe_k: int,
    alpha: float,
    qe_times: int,
    backend: str,
    max_memory: int | None,
    *,
    with_lengths: bool = False,
) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of normalised rows and, in float64, their means with their qe_k - 1 nearest others, by similarity.

    With `with_lengths` each row counts with the length that it had before it was normalised.
    """
    for _ in range(qe_times - 1):
        means = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
        for block, mean in _means(rows, qe_k, alpha, 1, backend, max_memory, with_lengths=with_lengths):
            means[block] = mean
        rows = Rows(means, "means", normalize=True)
    lengths = rows.norms if with_lengths else None
    neighbors = search(rows, qe_k - 1, backend, max_memory)
    for block in rows.blocks(min(BLOCK_BYTES, checked_memory(max_memory)) // 2):  # up to 8 copies of a block are alive
        unit = rows.read(block, torch.float64)
        own = unit if lengths is None else lengths[block, None] * unit
        yield block, (own + _neighbors_sum(unit, rows, neighbors[block], alpha, lengths)) / min(qe_k, rows.n)


def _neighbors_sum(unit: Tensor, rows: Rows, neighbors: Tensor, alpha: float, lengths: Tensor | None = None) -> Tensor:
    """(B, D) sums of the unit rows at neighbors (B, k), weighted by similarity^alpha (and length, where given)."""
    total = torch.zeros_like(unit)
    # Neighbour by neighbour: a fixed order of sums, and no (B, k, D) temporary.
    for at in neighbors.T:
        other = rows.read(at, torch.float64)
        similarity = (unit * other).sum(1)
        # Copies are rounded to just above 1, and a large alpha would make that much.
        weight = torch.where(similarity > 0, similarity.clamp(max=1) ** alpha, 0.0)
        total += (weight if lengths is None else weight * lengths[at])[:, None] * other
    return total
