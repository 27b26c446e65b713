"""Re-ranking that does no harm: camera-aware with cameras, k-reciprocal where people repeat, plain distances elsewhere.

With cameras both sets together are centred, mapped and summed with linked neighbours (`centralization.links`), then
compared by the camera-aware Jaccard distance. A method of this library around the published distance.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pose2id.centralization.cameras import Centres, known_cameras, mapped, sum_weights
from pose2id.centralization.enhancement import added
from pose2id.centralization.guard import Guard
from pose2id.centralization.links import Searched, links_among, map_of
from pose2id.io.checks import BLOCK_BYTES, checked_count
from pose2id.io.rows import Rows, blocks
from pose2id.neighbors.distance import nearest_columns
from pose2id.neighbors.members import Compared
from pose2id.neighbors.search import tying_distances
from pose2id.retrieval.rerank import k_reciprocal

PLAIN_K1, PLAIN_K2 = 10, 3  # of k-reciprocal re-ranking without cameras


def reranked(
    query: Rows,
    gallery: Rows,
    camids: tuple[Any, Any],
    *,
    topk: int | None,
    force: bool,
    backend: str,
    max_memory: int | None,
) -> tuple[Any, str]:
    """Distances of normalised queries to the gallery, or the `topk` least and their indices; and which, and why."""
    count = None if topk is None else checked_count(topk, "topk")
    of_query, of_gallery, _ = known_cameras(query, gallery, *camids, None)
    cameras = torch.cat([of_query, of_gallery])
    known = int((torch.unique(cameras) != -1).sum())
    if known > 1 and 2 * int((cameras != -1).sum()) >= len(cameras):  # unknown ones would be taken for one camera
        rows = joined_features(query, gallery, of_query, of_gallery, known, backend, max_memory)
        everything = rows.read(slice(None))
        found: Any = k_reciprocal(
            everything[: query.n],
            everything[query.n :],
            q_camids=of_query,
            g_camids=of_gallery,
            normalize=False,
            topk=count,
            max_memory=max_memory,
        )
        return found, f"camera-aware, {known} cameras"
    guard = Guard(Compared(gallery, None, backend, max_memory))
    if force or guard.evidence.gate > 0:
        options: dict[str, Any] = {"normalize": False, "topk": count, "backend": backend, "max_memory": max_memory}
        found = k_reciprocal(query.read(slice(None)), gallery.read(slice(None)), PLAIN_K1, PLAIN_K2, **options)
        return found, f"k-reciprocal, k1 {PLAIN_K1}, k2 {PLAIN_K2}, no cameras. {guard.evidence.numbers}"
    return _plain(query, gallery, count), f"plain distances, no cameras. {guard.evidence.numbers}"


def joined_features(
    query: Rows,
    gallery: Rows,
    of_query: Tensor,
    of_gallery: Tensor,
    num_cameras: int,
    backend: str,
    max_memory: int | None,
) -> Rows:
    """Queries and gallery, centred, mapped and summed together."""
    cameras = torch.cat([of_query, of_gallery])
    sides = [(query, of_query), (gallery, of_gallery)]
    centres = Centres.of(sides)
    rows = Rows(torch.cat([centres.applied(*side).read(slice(None)) for side in sides]), "features")
    rows = mapped(rows, map_of(Compared(rows, None, backend, max_memory), cameras))
    links = links_among(Searched(Compared(rows, None, backend, max_memory), cameras))
    return added(rows, sum_weights(links, cameras, cameras, num_cameras), rows)


def _plain(query: Rows, gallery: Rows, count: int | None) -> Any:
    """Squared Euclidean distances (Q, G) float32, or the least of each query and their indices."""
    to_gallery, dtype = tying_distances(gallery), torch.promote_types(query.dtype, gallery.dtype)
    width = gallery.n if count is None else min(count, gallery.n)
    distances = torch.empty((query.n, width), dtype=torch.float32, device=query.device)
    indices = torch.empty((query.n, width), dtype=torch.int64, device=query.device)
    for block in blocks(query.n, BLOCK_BYTES // (16 * gallery.n)):
        found = to_gallery(query.read(block, dtype)).clamp_(min=0)
        if count is not None:
            indices[block] = nearest_columns(found, width)
            found = found.gather(1, indices[block])
        distances[block] = found
    return distances if count is None else (distances, indices)
