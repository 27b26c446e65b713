"""`pose2id extract` on many processes: images go out as the files' bytes, features come back into one file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pose2id.distributed.cluster import Cluster
from pose2id.distributed.workers import Workers
from pose2id.extraction import Files, features_of, stored_features
from pose2id.extractor import SideInputs
from pose2id.io.checks import checked_count, checked_flags
from pose2id.io.rows import blocks

if TYPE_CHECKING:
    from pose2id.models import LoadedModel

_BATCHES = 4  # of a task: a second or so, of 64 images each on a CPU


def extract(
    cluster: Cluster,
    load: Callable[[], LoadedModel],
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    readers: int = 2,
    amp: bool = False,
    progress: bool = True,
    overwrite: bool = False,
) -> NDArray[np.float32]:
    """`pose2id.extraction.extract` by the workers of a cluster: the same file, from the same batches.

    This process reads the image files and writes the features, so the workers need neither; only of a model that reads
    images itself they get paths, which must lead to the images everywhere.

    Args:
        cluster: to work on.
        load: called once by each worker: the model. It travels by pickle.
        paths: N image files.
        out: the .npy file; beside it, OUT.json and, while it is unfinished, OUT.partial.
        readers: threads of each worker that decode and transform images beside the model; 0: none.
        amp: compute in float16 on CUDA, in bfloat16 on the CPU.
        progress: show a bar on a terminal.
        overwrite: replace features that were made from something else.

    Returns:
        (N, D) float32, memory-mapped, read-only; not normalised.

    Raises:
        As `pose2id.extraction.extract`, and as `Workers.results`.
    """
    checked_flags(amp=amp, progress=progress, overwrite=overwrite)
    checked_count(readers, "readers", least=0)
    with Workers(cluster, partial(_worker, load, readers, amp)) as workers:
        ((_, (key, batch_size, by_path)),) = workers.results([None])

        def features(start: int) -> Iterator[NDArray[Any]]:
            with tqdm(total=len(paths) - start, unit="img", disable=None if progress else True) as bar:
                tasks = (
                    (start + some.start, [os.fspath(path) for path in paths[start:][some]], not by_path)
                    for some in blocks(len(paths) - start, _BATCHES * batch_size)
                )
                for rows in _in_order(workers.results(_with_content(*task) for task in tasks)):
                    bar.update(len(rows))
                    yield rows

        return stored_features(paths, out, features, key=key, amp=amp, overwrite=overwrite)


def _with_content(first: int, paths: list[str], read: bool) -> tuple[int, list[str], list[bytes] | None]:
    return first, paths, [Path(path).read_bytes() for path in paths] if read else None


def _in_order(results: Iterator[tuple[int, Any]]) -> Iterator[Any]:
    waiting: dict[int, Any] = {}
    wanted = 0
    for place, result in results:
        waiting[place] = result
        while wanted in waiting:
            yield waiting.pop(wanted)
            wanted += 1


def _worker(load: Callable[[], LoadedModel], readers: int, amp: bool) -> Callable[[Any], Any]:
    """A worker's function: features of some images; of no task what the others are to know of the model."""
    model = load()
    extractor = model.extractor
    if extractor.inputs == "batch" and extractor.transform is None:
        raise ValueError("extractor must have a transform, or inputs='images', to read image files.")

    def work(task: tuple[int, list[str], list[bytes] | None] | None) -> Any:
        if task is None:
            return model.digest, extractor.batch_size, extractor.inputs == "images"
        first, paths, contents = task
        images = Files(paths, extractor, readers, SideInputs({}, 0), first, contents)
        return np.concatenate(list(features_of(images, amp, False)))

    return work
