"""Pieces of a search: within a block, between two, of queries; merged they are the search of the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pose2id.io.rows import Rows
from pose2id.neighbors import pieces
from pose2id.neighbors.engines import Faiss, Half, Products
from pose2id.neighbors.pieces import first_lists, nearest_between, nearest_of_queries, nearest_within
from pose2id.neighbors.search import distinct, search
from pose2id.neighbors.space import Centred

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
ENGINES = {
    "faiss": (Faiss,),
    "half": (lambda space: Half(space, torch.bfloat16), Products),
    "float32": (Products,),
    "auto": None,
}


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    engines = ENGINES[request.param]
    if engines is not None:
        monkeypatch.setattr(pieces, "default_engines", lambda *_: engines)
        both = {make: pieces._BOTH[make] for make in engines if make in pieces._BOTH}
        half = {make: lambda space: pieces._BothHalf(space, torch.bfloat16) for make in engines if make not in both}
        monkeypatch.setattr(pieces, "_BOTH", {**both, **half})


def hard(rng, n, dim):
    """Copies, ties, points that rounding hardly tells apart."""
    x = rng.standard_normal((n, dim)).astype(np.float32)
    x[::3] = rng.integers(-1, 2, x[::3].shape)
    x[1::9] = x[1] + 1e-7 * rng.standard_normal(x[1::9].shape)
    x[2::11] = x[2]
    return x


def lists_of_pieces(x, k, block, device):
    whole = Rows(torch.from_numpy(x).to(device), "x", normalize=True)
    kept, twin = distinct(whole, k + 1, 1 << 25)
    centre = Centred(whole, kept, 1 << 25).centre
    chosen = x[kept.cpu().numpy()]
    n = len(kept)
    best = torch.full((n, k), -1), torch.full((n, k), torch.inf, dtype=torch.float64)

    def rows(*parts):
        return Rows(torch.from_numpy(np.concatenate([chosen[part] for part in parts])).to(device), "x", normalize=True)

    def add(part, positions, exact, start):
        positions, exact = positions.cpu(), exact.cpu()
        assert (positions < 0).equal(exact.isinf())
        moved = torch.where(positions < 0, -1, positions + start)
        best[0][part], best[1][part] = first_lists(
            torch.cat([best[0][part], moved], 1), torch.cat([best[1][part], exact], 1), k=k
        )

    parts = [slice(low, min(low + block, n)) for low in range(0, n, block)]
    for at, first in enumerate(parts):
        add(first, *nearest_within(rows(first), k, centre), first.start)
        for second in parts[at + 1 :]:
            m = first.stop - first.start
            positions, exact = nearest_between(rows(first, second), m, k, centre)
            add(first, positions[:m], exact[:m], second.start - m)
            add(second, positions[m:], exact[m:], first.start)
    found = kept.cpu()[best[0]]
    return whole, found if twin is None else found[twin.cpu()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "dim", "k", "block"), [(500, 5, 3, 140), (500, 20, 1, 499), (90, 4, 8, 7), (9, 3, 8, 4)])
def test_pieces_give_the_lists_of_the_whole(engine, rng, n, dim, k, block, device):
    whole, found = lists_of_pieces(hard(rng, n, dim), k, block, device)
    torch.testing.assert_close(found, search(whole, k).cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_large_pieces(rng, device):
    x = rng.standard_normal((60, 256))[rng.integers(0, 60, 5000)] + 0.7 * rng.standard_normal((5000, 256))
    whole, found = lists_of_pieces(x.astype(np.float32), 2, 3100, device)
    torch.testing.assert_close(found, search(whole, 2).cpu(), rtol=0, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_queries_find_themselves_and_their_copies_in_order(rng, device):
    x = hard(rng, 300, 6)
    rows = Rows(torch.from_numpy(x).to(device), "x", normalize=True)
    kept = distinct(rows, 5, 1 << 25)[0]
    centre = Centred(rows, kept, 1 << 25).centre
    chosen = torch.from_numpy(x).to(device)[kept]
    asking = torch.arange(0, len(kept), 7, device=device)
    joined = Rows(torch.cat([chosen, chosen[asking]]), "x", normalize=True)
    positions, exact = nearest_of_queries(joined, len(asking), 4, centre)
    expected = search(Rows(chosen, "x", normalize=True), 4, own=True)[asking]
    torch.testing.assert_close(positions, expected, rtol=0, atol=0)
    assert (exact.diff(dim=1) >= 0).all()
