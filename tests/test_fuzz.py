"""Generated input: valid input against literal float64 restatements, hostile input against clear errors.

A short run with one seed by default; `--stress` draws thousands of cases from another seed each time and says which.
"""

from __future__ import annotations

import inspect
import random
import warnings
from fractions import Fraction

import numpy as np
import reference
import torch

import pose2id
from pose2id import Centralizer
from pose2id.neighbors.search import exact_neighbors

CASES = {"valid": (150, 3000), "hostile": (400, 9000)}  # by default, with --stress


def cases(request, kind):
    """A generator for each case, reproducible by what the test prints when it fails."""
    stress = request.config.getoption("--stress")
    seed = random.SystemRandom().randrange(2**31) if stress else 0
    for case in range(CASES[kind][stress]):
        yield f"seed {seed}, case {case}", random.Random(f"{seed}/{case}")


KINDS = {
    "plain": lambda x, rng: x,
    "copies": lambda x, rng: x[rng.integers(0, max(1, len(x) // 3), len(x))],
    "zeros": lambda x, rng: x * (rng.random(len(x)) < 0.7)[:, None],
    "sizes": lambda x, rng: x * 10.0 ** rng.integers(-15, 15, (len(x), 1)),
    "large mean": lambda x, rng: x + 100,
    "grid": lambda x, rng: rng.integers(-2, 3, x.shape),
    "alike": lambda x, rng: x[:1] + 1e-3 * x,
}
LAYOUTS = {
    "as it is": np.ascontiguousarray,
    "Fortran": np.asfortranarray,
    "reversed": lambda x: x[::-1].copy()[::-1],
    "read-only": lambda x: np.frombuffer(x.tobytes(), x.dtype).reshape(x.shape),
    "float64": lambda x: x.astype(np.float64),
    "torch": lambda x: torch.from_numpy(x.copy()),
    "strided tensor": lambda x: torch.from_numpy(np.repeat(x, 2, axis=1))[:, ::2],
}


def features(draw, n, d):
    """Rows of some kind, float32, as a float64 array; and the same in some container and layout."""
    rng = np.random.default_rng(draw.randrange(2**32))
    kind, layout = draw.choice(sorted(KINDS)), draw.choice(sorted(LAYOUTS))
    x = np.float32(KINDS[kind](rng.standard_normal((n, d)), rng))
    return x.astype(np.float64), LAYOUTS[layout](x)


def close(found, expected, case, *, atol=2e-5):
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=atol, rtol=0, err_msg=case)


def test_valid_input_gives_what_the_restatements_give(request):
    for case, draw in cases(request, "valid"):
        n, d, k1, k2 = draw.randint(1, 14), draw.randint(1, 9), draw.randint(1, 6), draw.randint(1, 6)
        x, given = features(draw, n, d)
        lists = reference.nearest(x, max(k1, k2))
        found = np.asarray(
            pose2id.nearest_neighbors(given, max(k1, k2), backend=draw.choice(["faiss", "torch", "auto"]))
        )
        squared = ((x[:, None] - x) ** 2).sum(-1)
        own = np.arange(n)[:, None]
        # What is equal but for the last digit has one order or the other.
        assert all(len({i, *row}) == 1 + len(row) for i, row in enumerate(found.tolist())), case
        np.testing.assert_allclose(squared[own, found], squared[own, np.array(lists, int).reshape(found.shape)], 1e-12)
        if found.tolist() == lists:
            size = max(1, np.abs(x).max())
            centralized = np.asarray(pose2id.nfc(given, k1, k2, normalize=False), np.float64)
            close(centralized / size, reference.nfc(x, k1, k2, normalize=False) / size, case)
        g, other = features(draw, draw.randint(1, 14), d)
        if type(given) is type(other):
            indices = exact_neighbors(given, other, k1)[0]
            expected = np.sqrt(((x[:, None] - g) ** 2).sum(-1))
            at = np.asarray(indices)[:, : len(g)]
            np.testing.assert_allclose(expected[np.arange(n)[:, None], at], np.sort(expected, axis=1)[:, :k1], 1e-12)
        pids = draw.choice([[draw.randint(-1, 4) for _ in range(n)], [draw.choice("abc") for _ in range(n)]])
        other_pids = [draw.choice(pids) for _ in g]
        matrix = np.sqrt(((x[:, None] - g) ** 2).sum(-1))
        try:
            expected = reference.evaluate_rank(matrix, pids, other_pids, max_rank=9)
        except RuntimeWarning:  # the mean of no query at all
            expected = None
        if expected is not None:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "distmat looks like similarities")
                result = pose2id.evaluate_rank(matrix, pids, other_pids, max_rank=9)
            close([result.mAP, result.mINP, *result.cmc], [expected[0], expected[2], *expected[1]], case, atol=1e-9)
        m = draw.randint(1, 3)
        poses = np.random.default_rng(draw.randrange(2**32)).standard_normal((n, m, d))
        if (np.abs(x).max(1) > 0).all():
            close(pose2id.fuse(x, poses, 0.7), reference.fuse(x, poses, 0.7), case)


WELL = {
    "nfc": {"features": np.eye(4)},
    "fuse": {"features": np.eye(3), "generated": np.ones((3, 2, 3))},
    "id2_score": {"features": np.eye(4), "pids": [1, 1, 2, 2]},
    "identity_density": {"features": np.eye(4), "pids": [1, 1, 2, 2]},
    "nfc_diagnostics": {"features": np.eye(4)},
    "generation_diagnostics": {"features": np.eye(3), "generated": np.ones((3, 2, 3))},
    "nearest_neighbors": {"features": np.eye(4), "k": 2},
    "part_distances": {"qf": np.ones((2, 3, 4)), "gf": np.ones((3, 3, 4))},
    "evaluate": {"qf": np.eye(3), "gf": np.eye(3), "q_pids": [1, 2, 3], "g_pids": [1, 2, 3]},
    "evaluate_rank": {"distmat": np.ones((3, 3)), "q_pids": [1, 2, 3], "g_pids": [1, 2, 3]},
    "k_reciprocal": {"qf": np.eye(4), "gf": np.eye(4)},
    "re_ranking": {"q_g_dist": np.ones((2, 3)), "q_q_dist": np.ones((2, 2)), "g_g_dist": np.ones((3, 3))},
    "query_expansion": {"query_feats": np.eye(4), "gallery_feats": np.eye(4)},
    "database_augmentation": {"gallery_feats": np.eye(4)},
    "aqe": {"query_feats": np.eye(4), "gallery_feats": np.eye(4)},
    "graph_propagation": {"query_feats": np.eye(4), "gallery_feats": np.eye(4)},
}
HOSTILE = [
    None, True, 0, -1, 3, 2.5, float("nan"), float("inf"), 10**400, 1j, "x", "", b"x", [], {}, set(), object(), len,
    Fraction(1, 3), [1, 2], [[1], [1, 2]], ["a", 2, None], range(3), np.float32(1), np.zeros(0), np.zeros((0, 4)),
    np.zeros((4, 0)), np.zeros((2, 2, 2, 2)), np.full((4, 4), np.nan), np.full((3, 3), np.inf),
    np.ones((4, 4), complex),
    np.ones((4, 4), bool), np.ones((4, 4), int), np.array(["a", "b"]), np.array([1, "b", None], dtype=object),
    np.ma.masked_array(np.ones((4, 4)), np.eye(4)), np.ones((4, 4), np.longdouble), np.zeros((4, 4), "datetime64[s]"),
    np.ones(3, dtype=[("a", "f4")]), torch.ones(4, 4, dtype=torch.complex64), torch.ones(4, 4, device="meta"),
    torch.eye(4).to_sparse(), torch.zeros(0, 4), torch.ones(4, 4, dtype=torch.float8_e4m3fn), torch.eye(5),
    torch.ones(4, dtype=torch.bool), np.ones((5, 4)), np.ones((4, 5)), np.ones(4), [1, 1, 2, 2, 2], [0, 1, 2], [-1] * 4,
]  # fmt: skip


def shown(value):
    return f"{type(value).__name__} {str(value)[:60] if not isinstance(value, int) else len(str(value))!r}"


def test_hostile_input_gives_a_result_or_a_clear_error(request):
    """Clear: a TypeError or ValueError that names an argument."""
    unclear = []
    for case, draw in cases(request, "hostile"):
        name = draw.choice([*WELL, "enhance", "Centralizer"])
        function = {"enhance": Centralizer().enhance, "Centralizer": Centralizer}.get(name) or getattr(pose2id, name)
        well = {"enhance": WELL["aqe"], "Centralizer": {}}.get(name) or WELL.get(name, {})
        names = [
            p.name
            for p in inspect.signature(function).parameters.values()
            if p.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        names = [one for one in names if one not in ("out", "extractor", "pictures", "neighbors")]
        changed = {one: draw.choice(HOSTILE) for one in draw.sample(names, min(len(names), draw.randint(1, 2)))}
        what = f"{case}: {name}({', '.join(f'{key}={shown(value)}' for key, value in changed.items())})"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                function(**{**well, **changed})
        except (TypeError, ValueError) as error:
            if not any(one in str(error) for one in names):
                unclear.append(f"{what}: {type(error).__name__}: {error}")
        except Exception as error:
            unclear.append(f"{what}: {type(error).__name__}: {error}")
    assert not unclear, f"{len(unclear)} unclear:\n" + "\n".join(unclear[:30])
