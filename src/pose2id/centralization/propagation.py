"""GCR, graph convolution re-ranking: features become means over a graph of their neighbours, round after round.

A rival of centralization, for comparison. Source: Zhang et al., "Graph Convolution Based Efficient Re-Ranking for
Visual Retrieval", IEEE TMM 2023, and the code published with it (WesleyZhang1991/GCN_rerank, mode "nonsym").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pose2id.io.checks import BLOCK_BYTES, cameras_together, checked_count, checked_memory, checked_number
from pose2id.io.rows import FeatureArray, JoinedRows, Rows, checked_pair, unit
from pose2id.neighbors.groups import search_across
from pose2id.neighbors.search import search


def graph_propagation(
    query_feats: FeatureArray,
    gallery_feats: FeatureArray,
    query_camids: Any = None,
    gallery_camids: Any = None,
    *,
    k: int = 6,
    k_across: int = 6,
    rounds: int = 3,
    alpha: float = 0.5,
    beta: float = 0.2,
    backend: str = "auto",
    max_memory: int | None = None,
) -> tuple[FeatureArray, FeatureArray]:
    """GCR: propagate features over their nearest neighbours and those of other cameras, in the union of both sets.

        S_ij = exp(x_i . x_j / beta)  for i itself and its k - 1 nearest others j, else 0
        L    = R^-1/2 S C^-1/2        R and C diagonal: sums of the rows and of the columns of S
        X   <- normalize((1 - alpha) L X + alpha L' X)

    with X the L2-normalised rows of query and gallery, and L' like L with k_across and the nearest others of other
    cameras. Every round looks for neighbours again. S is not symmetric: i may list j and not be listed.

    Equation and order of steps are those of the published code. Its names: K1, K2 (k and k_across; they count the
    feature itself), GAL_ROUND (rounds), SCALE (alpha), BETA1 and BETA2 (beta). Its values: 15, 3, 3, 0.3 and 0.2 for
    Market1501 and MARS, 13 in place of 15 for DukeMTMC; where no data set is named 45, 90, 3, 0.7 and 0.08. The
    defaults here are ours, for people with a few images each: 6, 6, 3, 0.5 and 0.2. What the published code does
    before, it calls PVG: centring and whitening per camera. That is not done here; where cameras differ, centre the
    features first.

    Joint, as all re-ranking: what a query gets depends on the other queries, and the gallery on the queries, so figures
    are not comparable with those of methods that keep the sets apart (`nfc`). Differences from the published code,
    which compares similarities as they are rounded: of equally near features those with the lower index count, queries
    first; a feature is in its own list however many copies it has; where other cameras have too few features, none of
    the own camera fill the list.

    Args:
        query_feats: (Q, D) raw or normalised features, floating numpy array (memory-mapped too) or torch tensor. Not
            modified.
        gallery_feats: (G, D) features of the same model, on the same device.
        query_camids: (Q,) cameras: integers, whole floats or strings; give both or neither. Without them there is no
            L', and k_across and alpha are not used.
        gallery_camids: (G,) cameras.
        k: features that are averaged, the feature itself among them, at least 2; more than Q + G means all.
        k_across: the same for other cameras.
        rounds: how often.
        alpha: share of other cameras, in [0, 1]. 0: L alone; 1: L' alone.
        beta: temperature of the weights, above 0; the larger, the more do distant neighbours count.
        backend: as in `pose2id.nearest_neighbors`; faiss cannot search other cameras.
        max_memory: as in `pose2id.nearest_neighbors`, then for blocks of sums. On top come 32 bytes for every feature
            and every entry of its lists, and two copies of both sets in float32 (float64 for float64).

    Returns:
        (query, gallery), L2-normalised, each in the container, dtype and device it came in. A zero row stays zero and
        adds nothing.

    Raises:
        ValueError: one set's cameras without the other's; features or numbers out of range.
    """
    k, k_across = checked_count(k, "k", least=2), checked_count(k_across, "k_across", least=2)
    rounds = checked_count(rounds, "rounds")
    alpha, beta = checked_number(alpha, "alpha", 0, 1), checked_number(beta, "beta", 1e-6, 1e6)
    query = Rows(query_feats, "query_feats", normalize=True)
    gallery = Rows(gallery_feats, "gallery_feats", normalize=True)
    checked_pair(query, gallery, "query_feats", "gallery_feats")
    sides = {"query_camids": (query_camids, query.n), "gallery_camids": (gallery_camids, gallery.n)}
    known = cameras_together(sides)
    cameras = None if known is None else torch.cat([torch.from_numpy(side) for side in known]).to(query.device)
    rows: Rows = JoinedRows(query, gallery)
    block_bytes = min(BLOCK_BYTES, checked_memory(max_memory)) // 2  # up to 8 copies of a block are alive
    for _ in range(rounds):
        graphs = []
        if cameras is not None and alpha > 0:
            across = search_across(rows, cameras, min(k_across, rows.n) - 1, backend, max_memory)
            graphs.append(_edges(rows, across, alpha, beta, block_bytes))
        if cameras is None or alpha < 1:
            nearest = search(rows, k - 1, backend, max_memory)
            graphs.append(_edges(rows, nearest, 1 if cameras is None else 1 - alpha, beta, block_bytes))
        to, weights = (torch.cat(of_each, 1) for of_each in zip(*graphs, strict=True))
        x = torch.empty((rows.n, rows.dim), dtype=rows.dtype, device=rows.device)
        for block in rows.blocks(block_bytes):
            x[block] = unit(_weighted_sums(rows, to[block], weights[block]))
        rows = Rows(x, "features")
    results: tuple[Any, Any] = query.empty(), gallery.empty()
    query.write(results[0], slice(None), x[: query.n])
    gallery.write(results[1], slice(None), x[query.n :])
    return results


def _edges(rows: Rows, nearest: Tensor, share: float, beta: float, block_bytes: int) -> tuple[Tensor, Tensor]:
    """Row by row, what the graph of `nearest` (n, k - 1) links it to, itself first, and `share` of L: both (n, k)."""
    own = torch.arange(rows.n, device=rows.device)[:, None]
    linked, to = nearest >= 0, torch.cat([own, torch.where(nearest < 0, own, nearest)], 1)
    # L stays the same if all of S is divided by exp(1 / beta): the weight of a row to itself becomes 1, and no other
    # overflows. Unit rows: x_i . x_j - 1 = -|x_i - x_j|^2 / 2.
    weights = torch.ones(to.shape, dtype=torch.float64, device=rows.device)
    for block in rows.blocks(block_bytes):
        x = rows.read(block, torch.float64)
        for at in range(1, to.shape[1]):
            squares = (x - rows.read(to[block, at], torch.float64)).square_().sum(1)
            weights[block, at] = torch.exp(squares / (-2 * beta))
    directed = rows.norms > 0
    weights[:, 1:] *= linked & directed[:, None] & directed[to[:, 1:]]
    columns = torch.zeros(rows.n, dtype=torch.float64, device=rows.device)
    columns.index_add_(0, to.flatten(), weights.flatten())
    return to, share * weights / (weights.sum(1, keepdim=True) * columns[to]).sqrt_()


def _weighted_sums(rows: Rows, to: Tensor, weights: Tensor) -> Tensor:
    """(B, D) float64 sums of the rows at `to` (B, k), weighted."""
    total = torch.zeros((len(to), rows.dim), dtype=torch.float64, device=rows.device)
    # Neighbour by neighbour: a fixed order of sums, and no (B, k, D) temporary.
    for at, weight in zip(to.T, weights.T, strict=True):
        total += weight[:, None] * rows.read(at, torch.float64)
    return total
