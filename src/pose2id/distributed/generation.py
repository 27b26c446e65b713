"""Generated pictures of many workers: they compute, and the process that they work for alone reads and writes files.

So machines need no file system in common, and a worker that dies leaves nothing half-written. What travels to a worker
are image files as they are, and back come finished PNGs.
"""

from __future__ import annotations

import csv
import io
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from pose2id.distributed.workers import Workers
from pose2id.io.beside import Beside
from pose2id.io.checks import checked_flag, checked_flags
from pose2id.io.images import content_key, image_from_bytes
from pose2id.io.whole_files import whole_file
from pose2id.ipg.batch import (
    Job,
    check_place,
    collect_images,
    encoded,
    generator_note,
    pending,
    picture_notes,
    sampling_note,
)
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import References, checked_poses, load_poses, load_reference
from pose2id.ipg.sampling import Sampling

BROKEN = "broken.csv"
# Long enough that handing it out costs nothing beside it, and that only its last batch's pictures are encoded while the
# GPU has nothing to do; short enough that what dies with a worker, or keeps the others waiting at the end, is little.
_TASK_SECONDS = 5.0
_TASK_PICTURES = 256  # about 25 MB of PNG
_TASK_BYTES = 32 << 20  # of image files


@dataclass(frozen=True)
class Generated:
    """What a run did: pictures that it wrote, and kept; why images were left out, by path; seconds of generating."""

    written: int
    kept: int
    broken: Mapping[Path, str]
    seconds: float


@dataclass(frozen=True)
class _Settings:
    """What a task is done with; poses as they were given, to be drawn where they are needed."""

    poses: Sequence[Any]
    sampling: Sampling
    batch_size: int | str


@dataclass(frozen=True)
class _Image:
    name: str
    key: str  # of its content
    file: bytes


class GenerationWorker:
    """A worker's generator, loaded once; called with a task, a function of it.

    Args:
        load: gives the generator. It travels by pickle, so it is a function of a module, or a `functools.partial` of
            one, and what it reads is on every machine, or on the Hub.
    """

    def __init__(self, load: Callable[[], IdentityGenerator]) -> None:
        self.generator = load()
        self.note = generator_note(self.generator)

    def __call__(self, task: Callable[[GenerationWorker], Any]) -> Any:
        """What the task makes of it."""
        return task(self)


def generation_workers(cluster: Any, load: Callable[[], IdentityGenerator]) -> Workers:
    """Workers of a cluster (`connected`) for `generate_on`, each with a generator: see `GenerationWorker`."""
    return Workers(cluster, partial(GenerationWorker, load))


def generate_on(
    workers: Workers,
    images: Iterable[Any],
    directory: Any,
    *,
    poses: Any = "standard",
    grid: bool = False,
    overwrite: bool = False,
    sampling: Sampling | None = None,
    batch_size: int | str = "auto",
    progress: bool = True,
    root: Any = None,
) -> Generated:
    """`pose2id.ipg.generate_files` with many workers: the same files, up to the last digits of other machines.

    This process reads the images and writes the files, none of which the workers need to see. Images that cannot be
    read (of a table also those that are not there), or that were generated, are left out and listed in
    `directory/broken.csv` (path, reason). A run that was interrupted leaves whole files only, and the next one does
    what is missing.

    Args:
        workers: of `generation_workers`.
        images: see `generate_files`.
        directory: see `generate_files`.
        poses: see `generate_files`.
        grid: see `generate_files`; sheets are made in this process.
        overwrite: see `generate_files`.
        sampling: see `generate_files`.
        batch_size: pictures per forward of each worker.
        progress: show a bar on a terminal, with the pictures per second of all workers together.
        root: see `generate_files`.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad input, named; workers of different weights or precision.
        FileExistsError: see `generate_files`.
        OSError: a file cannot be written, such as for lack of room.
        RuntimeError: see `Workers.results`.
    """
    checked_flag(progress, "progress")
    checked_flags(grid=grid, overwrite=overwrite)
    check_place(directory, grid)
    found = collect_images(images, directory, root, missing=True)
    settings = _Settings(list(checked_poses(poses)), sampling or Sampling(), batch_size)
    # No weights are needed here: a worker says what notes will say of them.
    ((_, (made_from, batch)),) = workers.results([partial(_agreed, settings=settings)])
    job = Job(found, directory, poses, made_from, grid=grid, overwrite=overwrite, leave_out=True)
    run = _Run(job, settings, made_from, batch, workers.count)
    start, total = time.monotonic(), len(job.incomplete) * len(job.poses)
    with job.writing(), Beside(most=pending(job.poses)) as writer:
        if job.incomplete:
            with tqdm(total=total, unit="img", disable=None if progress else True) as bar:
                for i, pictures in run.pictures(workers):
                    bar.update(len(job.poses))
                    writer.do(job.write, i, pictures)
                    if grid:
                        writer.do(job.write_sheet, i)
        for i in [i for i in job.keys if grid and i not in job.incomplete]:
            writer.do(job.write_sheet, i)
    broken = {job.paths[i]: job.broken[i] for i in sorted(job.broken)}
    _list_broken(job, broken)
    left_out = [i for i in job.incomplete if i in job.broken]
    missing = job.missing - sum(job.incomplete[i] for i in left_out)
    kept = (len(job.keys) - len(left_out)) * len(job.poses) - missing
    return Generated(missing, kept, broken, time.monotonic() - start)


class _Run:
    """The images of a job on their way through workers."""

    def __init__(self, job: Job, settings: _Settings, made_from: Mapping[str, Any], batch: int, workers: int) -> None:
        self._job, self._workers = job, workers
        self._work = partial(_pictures, settings=settings, made_from=made_from)
        self._left = deque(job.incomplete)
        self._batch = self._at_once = batch
        self._most = max(1, _TASK_PICTURES // len(job.poses) // batch) * batch
        self._given: dict[int, list[int]] = {}  # by place of a task

    def pictures(self, workers: Workers) -> Iterator[tuple[int, list[bytes]]]:
        """(place of the image, PNGs of its poses) as they are done; images that fail are the job's broken ones."""
        for place, (seconds, results) in workers.results(self._tasks()):
            images = self._given.pop(place)
            batches = -(-len(images) // self._batch)
            # Whole batches, the very ones of a single process, so that pictures are the same to the last bit.
            fitting = int(_TASK_SECONDS * batches / max(seconds, 1e-3)) * self._batch
            self._at_once = max(self._batch, min(fitting, self._most))
            for i, result in zip(images, results, strict=True):
                if isinstance(result, str):
                    self._job.broken[i] = result
                else:
                    yield i, result

    def _tasks(self) -> Iterator[Any]:
        """Read as workers become free, so that few files are held."""
        place = 0
        while self._left:
            # The last images are spread over all workers.
            spread = len(self._left) // (2 * self._workers) // self._batch * self._batch
            count, size = max(self._batch, min(self._at_once, spread)), 0
            images: dict[int, _Image] = {}
            while self._left and len(images) < count and (size < _TASK_BYTES or len(images) % self._batch):
                i = self._left.popleft()
                try:
                    file = self._job.paths[i].read_bytes()
                except OSError as error:
                    self._job.broken[i] = f"image {self._job.names[i]} cannot be read: {error}."
                    continue
                size += len(file)
                images[i] = _Image(self._job.names[i], self._job.keys[i], file)
            if images:
                self._given[place] = list(images)
                place += 1
                yield partial(self._work, images=list(images.values()))


def _agreed(worker: GenerationWorker, settings: _Settings) -> tuple[dict[str, Any], int]:
    """What all notes say, and how many images make a batch."""
    sampling = worker.generator.checked_sampling(settings.sampling)
    pictures = worker.generator.networks.resolve_batch_size(settings.batch_size)
    return {**sampling_note(sampling), **worker.note}, max(1, pictures // len(settings.poses))


def _pictures(
    worker: GenerationWorker, settings: _Settings, made_from: Mapping[str, Any], images: Sequence[_Image]
) -> tuple[float, list[list[bytes] | str]]:
    """Seconds, and for each image the PNGs of its poses, or why there are none."""
    start = time.monotonic()
    differing = [name for name, value in worker.note.items() if made_from[name] != value]
    if differing:
        given = "; ".join(f"{name}: {made_from[name]} and {worker.note[name]}" for name in differing)
        raise ValueError(f"a worker's weights and precision must be those of the others, and differ in {given}.")
    results: list[Any] = [_decoded(image) for image in images]
    places = [k for k, result in enumerate(results) if not isinstance(result, str)]
    poses = [key for key, _ in load_poses(settings.poses)]

    def encode(k: int, pictures: Sequence[Any]) -> None:
        notes = picture_notes(images[k].key, poses, made_from)
        results[k] = [encoded(picture, note) for picture, note in zip(pictures, notes, strict=True)]

    if places:
        stream = worker.generator.generate_iter(
            References([results[k] for k in places], [f"image {images[k].name}" for k in places]),
            settings.poses,
            sampling=replace(settings.sampling, size=None),
            batch_size=settings.batch_size,
            progress=False,
        )
        with Beside(most=pending(poses)) as writer:
            for k, pictures in zip(places, stream, strict=True):
                writer.do(encode, k, pictures)
    return time.monotonic() - start, results


def _decoded(image: _Image) -> Any:
    """A picture, or why there is none."""
    try:
        picture = load_reference(image_from_bytes(image.file, f"image {image.name}"), f"image {image.name}")
    except ValueError as error:
        return str(error)
    return picture if content_key(picture) == image.key else f"image {image.name} was changed during the run."


def _list_broken(job: Job, broken: Mapping[Path, str]) -> None:
    """A table of images that were left out; none where none were."""
    table = io.StringIO(newline="")
    csv.writer(table).writerows([("path", "reason"), *broken.items()])
    content = table.getvalue().encode(errors="surrogateescape")  # file names are any bytes
    if job.shards is not None:
        job.shards.write_beside(BROKEN, io.BytesIO(content) if broken else None)
        return
    target = job.directory / BROKEN
    if not broken:
        target.unlink(missing_ok=True)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as unfinished:
        unfinished.write_bytes(content)
