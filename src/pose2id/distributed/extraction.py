"""`pose2id extract` on many processes: images go out as the files' bytes, features come back into one file."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pose2id.distributed.cluster import Cluster
from pose2id.distributed.workers import Workers, in_order
from pose2id.extraction import Files, features_of, stored_features
from pose2id.extractor import SideInputs
from pose2id.io.checks import checked_count, checked_flags
from pose2id.io.rows import blocks

if TYPE_CHECKING:
    from pose2id.models import LoadedModel

_BATCHES = 4  # of a task: a second or so, of 64 images each on a CPU
_TASK_BYTES = 32 << 20  # of files, after which a task ends with a batch


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
                tasks = _tasks(paths, start, batch_size, key, read=not by_path)
                for rows in in_order(workers.results(tasks, ahead=4 * workers.count)):
                    bar.update(len(rows))
                    yield rows

        return stored_features(paths, out, features, key=key, amp=amp, overwrite=overwrite)


class _Task(NamedTuple):
    first: int  # place of its first image among all
    paths: list[str]
    contents: list[bytes] | None
    key: str | None  # of the model


def _tasks(paths: Sequence[Any], start: int, batch_size: int, key: str | None, *, read: bool) -> Iterator[_Task]:
    """Whole batches, read as they are wanted."""
    task = _Task(start, [], [] if read else None, key)
    for batch in blocks(len(paths) - start, batch_size):
        names = [os.fspath(paths[i]) for i in range(start + batch.start, start + batch.stop)]
        task.paths.extend(names)
        if task.contents is not None:
            task.contents.extend(Path(name).read_bytes() for name in names)
        size = sum(map(len, task.contents or ()))
        if len(task.paths) >= _BATCHES * batch_size or size >= _TASK_BYTES:
            yield task
            task = _Task(start + batch.stop, [], [] if read else None, key)
    if task.paths:
        yield task


def _worker(load: Callable[[], LoadedModel], readers: int, amp: bool) -> Callable[[Any], Any]:
    """A worker's function: features of some images; of no task what the others are to know of the model."""
    model = load()
    extractor = model.extractor
    if extractor.inputs == "batch" and extractor.transform is None:
        raise ValueError("extractor must have a transform, or inputs='images', to read image files.")

    def work(task: _Task | None) -> Any:
        if task is None:
            return model.digest, extractor.batch_size, extractor.inputs == "images"
        if model.digest != task.key:
            given = f"{socket.gethostname()} has {model.digest}, and another one {task.key}"
            raise ValueError(f"model must be the same on all machines; {given}. Bring the same files to all.")
        images = Files(task.paths, extractor, readers, SideInputs({}, 0), task.first, task.contents)
        return np.concatenate(list(features_of(images, amp, False)))

    return work
