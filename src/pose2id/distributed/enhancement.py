"""A file of features that is larger than memory centralized by many processes and machines."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pose2id.centralization.cameras import Centres, mapped_block, sum_weights
from pose2id.centralization.enhancement import METHODS, OPEN, added_block, known_of, reason
from pose2id.centralization.guard import Guard
from pose2id.centralization.links import Searched, links_among, map_of
from pose2id.centralization.nfc import mutual_neighbors, summed
from pose2id.distributed.cluster import Cluster, connected
from pose2id.distributed.searching import LONGEST, ComparedByWorkers, Recall, Searching, check_faiss
from pose2id.distributed.shared_rows import share, working
from pose2id.distributed.workers import Workers
from pose2id.io.array_files import read_array
from pose2id.io.checks import BLOCK_BYTES, camera_numbers, checked_choice, checked_count, checked_flag, checked_flags
from pose2id.io.rows import Rows
from pose2id.io.whole_files import folder_beside, new_file, write_npy
from pose2id.neighbors.members import Compared, Links, in_blocks
from pose2id.neighbors.search import distinct
from pose2id.neighbors.space import Centred

logger = logging.getLogger(__name__)


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
        reason: which method ran, and on what evidence.
    """

    path: Path
    rows: int
    workers: int
    seconds: float
    lists: int = 0
    probes: int = 0
    recall: Recall | None = None
    reason: str = ""

    def __str__(self) -> str:
        """In a sentence."""
        how = "exact" if self.recall is None else f"{self.probes} of {self.lists} lists looked at; {self.recall}"
        return f"{self.rows} features by {self.workers} workers in {self.seconds:.0f} s, {how}. {self.reason}"


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
    progress: bool = True,
) -> Done:
    """`pose2id.nfc` of an .npy file into another one, by the workers of a Ray cluster.

    Exact, the file is that of `nfc(features, k1, k2, out=out)` bit for bit, whatever the workers and blocks. This
    process holds lists of neighbours, about 250 bytes a row, and 4 more for each list that an approximate search looks
    at (8 GiB of these at most); features stay on disk.

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
        exact: search exactly, even if early tasks tell that all take more than 24 hours.
        block_rows: rows of a block; None: at most 64 MiB of float32, and at least two blocks a worker.
        overwrite: replace an existing file.
        progress: show bars of tasks on a terminal.

    Raises:
        ConnectionError: nothing answers at the address.
        ImportError: Ray is not installed.
        FileExistsError, FileNotFoundError, OSError: as of `nfc`; there is no file `features`.
        ValueError, TypeError: not an .npy file of finite floating features (N, D); bad counts.
        RuntimeError: an exact search would take more than 24 hours; faiss, for approximate=True, cannot be used; the
            recall is below 0.9, so that nothing is written; what `Workers.results` raises.
    """
    started = time.perf_counter()
    k1, k2 = checked_count(k1, "k1"), checked_count(k2, "k2")
    checked_flags(approximate=approximate, exact=exact, normalize=normalize, progress=progress)
    if approximate and exact:
        raise ValueError("exact must be False with approximate=True, which looks in lists. Leave one of them out.")
    if nprobe is not None:
        checked_count(nprobe, "nprobe")
        if not approximate:
            raise ValueError("nprobe must be None without approximate=True: an exact search has no lists.")
    if block_rows is not None:
        checked_count(block_rows, "block_rows")
    path, target = _files(features, out, overwrite)
    array = read_array(path)
    if approximate:
        check_faiss()
    with connected(address, workers) as cluster:
        logger.info("reading %s", path)
        z = Rows(array, f"features of {path}", normalize=normalize)
        done: dict[str, Any] = {}
        k = min(max(k1, k2), z.n - 1)
        nearest = torch.empty((z.n, 0), dtype=torch.int64, device="cpu")
        if k > 0:
            kept, twin = distinct(z, k + 1, BLOCK_BYTES)
            rows = share(cluster, path, array, normalize, Centred(z, kept, BLOCK_BYTES).centre)
            with Workers(cluster, working(rows)) as pool:
                search = Searching(pool, kept, z.dim, k, block_rows, cluster.ray.put, progress=progress)
                if approximate:
                    found, *about = search.approximate(k1, k2, nprobe)
                    done = dict(zip(("lists", "probes", "recall"), about, strict=True))
                else:
                    found = search.exact(math.inf if exact else LONGEST)
            nearest = torch.where(found < 0, -1, kept[found])
            nearest = nearest if twin is None else nearest[twin]
    logger.info("summing neighbours, writing %s", target)
    summed(z, None, nearest, mutual_neighbors(nearest, k1, k2), normalize, None, target, replace=overwrite)
    why = f"nfc, k1 {k1}, k2 {k2}, whatever the evidence"
    return Done(target, z.n, cluster.workers, time.perf_counter() - started, reason=why, **done)


def enhance_file(
    features: str | os.PathLike[str],
    out: str | os.PathLike[str],
    camids: Any = None,
    *,
    method: str = "auto",
    address: str | None = None,
    workers: int | None = None,
    block_rows: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Done:
    """The methods of `Centralizer.enhance` but NFC, of one set: its features become those of that gallery.

    The same, bit for bit, as `enhance` of it with camera_statistics="gallery". Features, and their centred and mapped
    copies in a hidden folder beside `out`, stay on disk; lists and links are held by this process, up to about 3 kB a
    row for each camera (16 kB with six).

    Args:
        features: as in `nfc_file`.
        out: as in `nfc_file`.
        camids: (N,) cameras: integers, whole floats or strings; -1 or None, or None for all: unknown.
        method: "auto", "guarded", "cameras" or "centring", as of `Centralizer`.
        address: as in `nfc_file`.
        workers: as in `nfc_file`.
        block_rows: as in `nfc_file`.
        overwrite: as in `nfc_file`.
        progress: as in `nfc_file`.

    Raises:
        As `nfc_file`, but for times and recall.
        ValueError: another method; "cameras" or "centring" without a known camera.
    """
    started = time.perf_counter()
    checked_choice(method, "method", tuple(name for name in METHODS if name != "nfc"))
    checked_flag(progress, "progress")
    if block_rows is not None:
        checked_count(block_rows, "block_rows")
    path, target = _files(features, out, overwrite)
    array = read_array(path)
    if array.ndim == 2:  # or an error of its rows says so
        cameras = camera_numbers({"camids": (camids, len(array))})[0]
    with connected(address, workers) as cluster, folder_beside(target) as folder:
        z = Rows(array, f"features of {path}", normalize=True)
        if z.n == 0:
            raise ValueError(f"features of {path} must hold at least one row, got an empty set.")
        compared = functools.partial(_compared, cluster, block_rows, progress)
        rows, links, why = _linked(z, path, cameras, method, folder, compared)

        def arrays() -> Iterator[NDArray[Any]]:
            for block in in_blocks(rows):
                part: Any = z.empty(block.stop - block.start)
                z.write(part, slice(None), rows.read(block) if links is None else added_block(rows, links, rows, block))
                yield part

        write_npy(target, array.shape, array.dtype, arrays(), replace=overwrite)
    return Done(target, z.n, cluster.workers, time.perf_counter() - started, reason=why)


def _linked(
    z: Rows, path: Path, cameras: Tensor, method: str, folder: Path, compared: Callable[..., Any]
) -> tuple[Rows, Links | None, str]:
    """Rows to sum, their links if any, and why: as `Enhancement.run` treats a gallery."""
    known, usable = known_of(cameras)
    if method in ("cameras", "centring") and not known:
        raise ValueError(f"camids must name cameras for method={method!r}; none is known.")
    if method in ("auto", "guarded") and not usable:
        with compared(z, path, True) as whole:
            guard = Guard(whole, None)
        return z, _guarded(guard), reason("guarded", known, guard.evidence, centred=False)
    centres = Centres.of([(z, cameras)])
    centred, at = _stored(folder / "centred.npy", z, (centres.centred(z, cameras, block) for block in z.blocks()))
    if method == "centring":
        return centred, None, reason(method, known)
    with compared(centred, at, False) as whole:
        found = None
        if method != "cameras":
            guard = Guard(whole, cameras, keep=method == "auto")
            found = guard.evidence
            if method == "guarded" or found.gate < OPEN:
                return centred, _guarded(guard), reason("guarded", known, found)
        matrix = map_of(whole, cameras)
    mapped, at = _stored(
        folder / "mapped.npy", centred, (mapped_block(centred, matrix, block) for block in centred.blocks())
    )
    with compared(mapped, at, False) as whole:
        links = sum_weights(links_among(Searched(whole, cameras)), cameras, cameras, known)
    return mapped, links, reason("cameras", known, found)


def _guarded(guard: Guard) -> Links | None:
    return guard.gallery_links() if guard.evidence.gate > 0 else None


@contextmanager
def _compared(
    cluster: Cluster, block: int | None, progress: bool, rows: Rows, path: Path, normalize: bool
) -> Iterator[Compared]:
    """Rows of a file whose neighbours workers search."""
    centre = Centred(rows, torch.arange(rows.n, device="cpu"), BLOCK_BYTES).centre
    shared = share(cluster, path, read_array(path), normalize, centre)
    with Workers(cluster, working(shared)) as pool:
        yield ComparedByWorkers(rows, pool, block, progress)


def _stored(path: Path, like: Rows, parts: Iterator[Tensor]) -> tuple[Rows, Path]:
    """Computed rows in a file, instead of in memory."""
    dtype = np.dtype(np.float64 if like.dtype == torch.float64 else np.float32)
    write_npy(path, (like.n, like.dim), dtype, (part.to(like.dtype).numpy() for part in parts))
    return Rows(read_array(path), "features"), path


def _files(features: Any, out: Any, overwrite: Any) -> tuple[Path, Path]:
    target = new_file(out, overwrite=checked_flag(overwrite, "overwrite"), suffixes=(".npy",))
    path = Path(features)
    if path.suffix.lower() != ".npy":
        raise ValueError(f"features must be an .npy file of one set, got {path}.")
    if not path.is_file():
        raise FileNotFoundError(f"There is no feature file {path}.")
    return path, target
