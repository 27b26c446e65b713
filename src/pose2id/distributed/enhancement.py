"""NFC of a file of features that is larger than memory, by many processes and machines."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pose2id.centralization.nfc import mutual_neighbors, summed
from pose2id.distributed.cluster import connected
from pose2id.distributed.searching import LONGEST, Recall, Searching
from pose2id.distributed.shared_rows import share, working
from pose2id.distributed.workers import Workers
from pose2id.io.array_files import read_array
from pose2id.io.checks import BLOCK_BYTES, checked_count, checked_flag, checked_flags
from pose2id.io.rows import Rows
from pose2id.io.whole_files import new_file
from pose2id.neighbors.search import distinct
from pose2id.neighbors.space import Centred


@dataclass(frozen=True)
class Done:
    """What `nfc_file` did.

    Attributes:
        path: the file that was written.
        rows: how many features.
        workers: how many workers searched.
        seconds: in all.
        lists, probes: inverted lists, and how many of them each row looked at; 0 for an exact search.
        recall: of the approximate search; None for an exact one.
    """

    path: Path
    rows: int
    workers: int
    seconds: float
    lists: int = 0
    probes: int = 0
    recall: Recall | None = None

    def __str__(self) -> str:
        """In a sentence."""
        how = "exact" if self.recall is None else f"{self.probes} of {self.lists} lists looked at; {self.recall}"
        return f"{self.rows} features by {self.workers} workers in {self.seconds:.0f} s, {how}"


def nfc_file(
    features: str | os.PathLike[str],
    out: str | os.PathLike[str],
    k1: int = 2,
    k2: int = 2,
    *,
    normalize: bool = True,
    address: str | None = None,
    workers: int | None = None,
    approximate: bool = False,
    nprobe: int | None = None,
    exact: bool = False,
    block_rows: int | None = None,
    overwrite: bool = False,
) -> Done:
    """`pose2id.nfc` of an .npy file into another one, by the workers of a Ray cluster.

    Exact, the file is that of `nfc(features, k1, k2, out=out)` bit for bit, whatever the workers and blocks. This
    process holds lists of neighbours, about 250 bytes a row; features stay on disk.

    Args:
        features: .npy file of (N, D) float16, float32 or float64 features of one set. Machines that see the same file
            map it; if one does not, all rows go through Ray's object store.
        out: .npy file to write; it appears whole or not at all.
        k1: as in `nfc`.
        k2: as in `nfc`.
        normalize: as in `nfc`.
        address: of a Ray cluster: "auto", "host:port" or "ray://host:port"; None: one of its own, on this machine.
        workers: how many; None: one a GPU, or where there is none, one a machine.
        approximate: search in faiss's inverted lists, and measure the recall of mutual edges on a sample.
        nprobe: how many lists a row looks at; None: so many that the lists hold 97.5 % of a sample's mutual edges.
        exact: search exactly, even if the first task tells that all take more than 24 hours.
        block_rows: rows of a block; None: at most 64 MiB of float32, and at least two blocks a worker.
        overwrite: replace an existing file.

    Raises:
        ConnectionError: nothing answers at the address.
        ImportError: Ray is not installed.
        FileExistsError, FileNotFoundError, OSError: as of `nfc`; there is no file `features`.
        ValueError, TypeError: not an .npy file of finite floating features (N, D); bad counts.
        RuntimeError: an exact search would take more than 24 hours; the recall is below 0.9, so that nothing is
            written; what `Workers.results` raises.
    """
    started = time.perf_counter()
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    checked_flags(approximate=approximate, exact=exact, normalize=normalize)
    if approximate and exact:
        raise ValueError("exact must be False with approximate=True.")
    if nprobe is not None:
        checked_count(nprobe, "nprobe")
        if not approximate:
            raise ValueError("nprobe must be None without approximate=True: an exact search has no lists.")
    if block_rows is not None:
        checked_count(block_rows, "block_rows")
    target = new_file(out, overwrite=checked_flag(overwrite, "overwrite"), suffixes=(".npy",))
    path = Path(features)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"features must be an .npy file of one set, got {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    array = read_array(path)
    with connected(address, workers) as cluster:
        z = Rows(array, f"features of {path}", normalize=normalize)
        done: dict[str, Any] = {}
        k = min(max(k1, k2), z.n - 1)
        nearest = torch.empty((z.n, 0), dtype=torch.int64, device="cpu")
        if k > 0:
            kept, twin = distinct(z, k + 1, BLOCK_BYTES)
            rows = share(cluster, path, array, normalize, Centred(z, kept, BLOCK_BYTES).centre)
            with Workers(cluster, working(rows)) as pool:
                search = Searching(pool, cluster.workers, kept, z.dim, k, block_rows, cluster.ray.put)
                if approximate:
                    found, *about = search.approximate(k1, k2, nprobe)
                    done = dict(zip(("lists", "probes", "recall"), about, strict=True))
                else:
                    found = search.exact(math.inf if exact else LONGEST)
            nearest = torch.where(found < 0, -1, kept[found])
            nearest = nearest if twin is None else nearest[twin]
    summed(z, None, nearest, mutual_neighbors(nearest, k1, k2), normalize, None, target, replace=overwrite)
    return Done(target, z.n, cluster.workers, time.perf_counter() - started, **done)
