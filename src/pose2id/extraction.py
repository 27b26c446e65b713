"""Features of many images in a file: read by workers, reused when nothing has changed, and begun only once."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pose2id.extractor import Extraction, Extractor, Images, SideInputs
from pose2id.io.checks import as_numpy, checked_count, checked_flags, first_few
from pose2id.io.images import image_from_bytes, load_image
from pose2id.io.rows import blocks
from pose2id.io.whole_files import new_file, whole_file

logger = logging.getLogger(__name__)
_SAVED_ROWS = 4096  # how often what is done is written down
_PROGRESS = ("done", "dim")


def extract(
    extractor: Extractor,
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    key: str | None = None,
    workers: int = 0,
    amp: bool = False,
    progress: bool = True,
    overwrite: bool = False,
    side_inputs: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """Raw features of image files, in an .npy file that grows on disk and not in memory.

    Beside it, OUT.json says what they were made from: `key`, the images' bytes in their order, `amp` and the side
    inputs. If all of it is the same, the file is used as it is. A run that was killed left OUT.partial, and the next
    one goes on there.

    Args:
        extractor: of features (B, D).
        paths: N image files.
        out: the .npy file.
        key: what decides the extractor's features, as `pose2id.models.LoadedModel.digest`. None: unknown, and nothing
            is ever used again.
        workers: threads that read and transform images beside the model, so the transform must bear threads; 0: none. A
            model that reads images itself (inputs="images") needs none.
        amp: compute in float16 on CUDA, in bfloat16 on the CPU (torch.autocast).
        progress: show a bar on a terminal.
        overwrite: replace features that were made from something else.
        side_inputs: keywords of the model with one entry per image, as in `Extractor.__call__`.

    Returns:
        (N, D) float32, memory-mapped, read-only; not normalised.

    Raises:
        FileExistsError: OUT was made from something else, and `overwrite` is False.
        FileNotFoundError: images are missing; the first few are named.
        ValueError: an unreadable image, named; features in parts, or not finite. What is done is kept.
    """
    checked_flags(amp=amp, progress=progress, overwrite=overwrite)
    checked_count(workers, "workers", least=0)
    if extractor.inputs == "batch" and extractor.transform is None:
        raise ValueError("extractor must have a transform, or inputs='images', to read image files.")

    def features(start: int) -> Iterator[NDArray[Any]]:
        images = Files(paths[start:], extractor, workers, SideInputs(side_inputs or {}, len(paths)), start)
        yield from features_of(images, amp, progress)

    return stored_features(paths, out, features, key=key, amp=amp, overwrite=overwrite, side_inputs=side_inputs)


def stored_features(
    paths: Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    features: Callable[[int], Iterator[NDArray[Any]]],
    *,
    key: str | None,
    amp: bool,
    overwrite: bool,
    side_inputs: Mapping[str, Any] | None = None,
) -> NDArray[np.float32]:
    """The file of `extract`: as it is, or with the rows that `features` gives, in order, from a row on."""
    target = _target(out)
    made_from = _made_from(paths, key, amp=amp, side_inputs=side_inputs)
    _settle(target, made_from, len(paths))
    if target.exists():
        if key is not None and _journal(target) == made_from:
            logger.info("extract: %s is of these images and this model, and is used again", out)
            return _opened(target)
        if not overwrite:
            differing = _differing(_journal(target), made_from)
            remedy = "Choose another name, or overwrite it (overwrite=True, --overwrite)"
            raise FileExistsError(f"{out} exists, of other {differing}. {remedy}.")
    run = _Run(target, made_from, len(paths), again=key is not None)
    if run.done:
        logger.info("extract: goes on after %d of %d images", run.done, len(paths))
    try:
        with closing(features(run.done)) as some:  # type: ignore[type-var]
            for rows in some:
                with _named(out):
                    run.add(rows)
        run.finish()
    finally:
        run.close()
    return _opened(target)


def features_of(images: Files, amp: bool, progress: bool) -> Iterator[NDArray[Any]]:
    """Raw features (B, D) of image files, batch by batch."""
    n = len(images.paths)
    with images.extractor.at_work(n, progress) as model, _precision(model, amp):
        for block in blocks(n, images.extractor.batch_size):
            features, visibility = model.next_features(images, block.stop - block.start)
            if features.ndim != 2 or visibility is not None:
                given = tuple(features.shape)
                raise ValueError(f"extractor must return features (B, D) for a file, got {given}.")
            yield as_numpy(features) if isinstance(features, Tensor) else features


class Files(Images):
    """Image files, read and transformed by workers where there are any.

    Args:
        paths: of the files.
        extractor: of features.
        workers: threads.
        side_inputs: of all images.
        first: place of the first file among all images.
        contents: of the files, where they were read elsewhere.
    """

    def __init__(
        self,
        paths: Sequence[Any],
        extractor: Extractor,
        workers: int,
        side_inputs: SideInputs,
        first: int = 0,
        contents: Sequence[bytes] | None = None,
    ) -> None:
        self.paths, self.taken, self.first = paths, first, first
        self.side_inputs = side_inputs
        self.extractor = extractor
        if extractor.inputs == "images":
            self.stream = iter(paths)
            return
        # What comes is transformed already.
        self.extractor = Extractor(
            extractor.model,
            batch_size=extractor.batch_size,
            device=extractor.device,
            flip=extractor.flip,
            pad_last_batch=extractor.pad_last_batch,
        )
        transform: Any = extractor.transform

        def image(i: int) -> Image.Image:
            name = f"images[{first + i}]"
            return load_image(paths[i], name) if contents is None else image_from_bytes(contents[i], name, paths[i])

        def read(block: slice) -> list[Tensor]:
            return [transform(image(i)) for i in range(len(paths))[block]]

        self.stream = _read(read, list(blocks(len(paths), extractor.batch_size)), workers)

    def name(self, row: int) -> str:
        """What errors call an image."""
        return f"images[{row}] ({os.fspath(self.paths[row - self.first])})"


def _read(read: Callable[[slice], list[Tensor]], some: list[slice], workers: int) -> Iterator[Tensor]:
    """Transformed images of blocks, in order; with workers a few batches ahead.

    Threads, not processes: Pillow and torch let others run while they work, and a batch of pixels need not be copied
    from one process to another.
    """
    rest = iter(some)
    if not workers:
        for block in rest:
            yield from read(block)
        return
    with ThreadPoolExecutor(workers, "pose2id-read") as pool:
        ahead = deque(pool.submit(read, block) for block in islice(rest, 2 * workers))
        try:
            while ahead:
                batch = ahead.popleft().result()
                ahead += [pool.submit(read, block) for block in islice(rest, 1)]
                yield from batch
        finally:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _named(out: str | os.PathLike[str]) -> Iterator[None]:
    """Errors of the system, such as a full disk, tell which file, and what to do."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{out} cannot be written: {error.strerror or error}. Run again to go on.") from error


class _Run:
    """The unfinished file, and how far it is.

    Rows are written before the journal counts them, so that what the journal counts is there.
    """

    def __init__(self, target: Path, made_from: dict[str, Any], n: int, *, again: bool) -> None:
        self.target, self.made_from, self.n = target, made_from, n
        self.partial = target.with_name(f"{target.name}.partial")
        self.done = self.saved = 0
        self.dim: int | None = None
        # Not a memory map: a full disk would end the process. Locked before anything of it is believed.
        self._file = _locked(self.partial)
        journal = _journal(self.partial) if again else {}
        if {name: value for name, value in journal.items() if name not in _PROGRESS} == made_from:
            with suppress(OSError, ValueError, EOFError):  # of a torn file: from the start, then
                rows = np.load(self.partial, mmap_mode="r", allow_pickle=False)
                if rows.shape == (n, journal["dim"]):
                    self.done = self.saved = journal["done"]
                    self.dim = journal["dim"]
        if not self.done:
            self._file.truncate(0)

    def add(self, features: NDArray[Any]) -> None:
        """Write the next rows."""
        if self.dim is None:
            self.dim = features.shape[1]
            header = {"descr": "<f4", "fortran_order": False, "shape": (self.n, self.dim)}
            np.lib.format.write_array_header_1_0(self._file, header)
            self._file.truncate(self._file.tell() + 4 * self.n * self.dim)
        if features.shape[1] != self.dim:
            wanted = f"features of width {self.dim}, as of the first images"
            raise ValueError(f"extractor must return {wanted}, got {features.shape[1]}.")
        self._file.seek(-4 * (self.n - self.done) * self.dim, os.SEEK_END)
        self._file.write(np.ascontiguousarray(features, "<f4").data)
        self.done += len(features)
        if self.done - self.saved >= _SAVED_ROWS or self.done == self.n:
            self.save()

    def save(self) -> None:
        """Note what is done, after it is on disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        _write_note(self.partial, {**self.made_from, "done": self.done, "dim": self.dim})
        self.saved = self.done

    def close(self) -> None:
        """Note what is done of a run that failed, as far as that is possible."""
        if self._file.closed:
            return
        with suppress(OSError), self._file:
            if self.dim is not None and self.done > self.saved:
                self.save()

    def finish(self) -> None:
        """Give the file its name. Its former note goes first: no file ever stands beside another one's note."""
        if os.name == "nt":  # where open files keep their names
            self._file.close()
        _beside(self.target).unlink(missing_ok=True)
        self.partial.replace(self.target)
        # Locked until here, or another run could begin in the file that has just been finished.
        self._file.close()
        _settle(self.target, self.made_from, self.n)


def _locked(partial: Path) -> Any:
    """The unfinished file, of this process alone where the system has such locks."""
    partial.touch()
    file = partial.open("r+b")
    try:
        import fcntl  # noqa: PLC0415 - of Unix alone
    except ImportError:
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alone = partial.exists() and os.path.samestat(partial.stat(), os.fstat(file.fileno()))
    except BlockingIOError:
        alone = False
    if not alone:
        file.close()
        raise FileExistsError(f"{partial} is being written by another process. Wait for it, or choose another name.")
    return file


def _settle(target: Path, made_from: dict[str, Any], n: int) -> None:
    """Note what a whole file was made from, as its journal has it; also that of a run killed just before."""
    partial = target.with_name(f"{target.name}.partial")
    journal = _journal(partial)
    same = {name: value for name, value in journal.items() if name not in _PROGRESS} == made_from
    if target.exists() and not partial.exists() and same and journal.get("done") == n:
        _write_note(target, made_from)
        _beside(partial).unlink()


def _target(out: str | os.PathLike[str]) -> Path:
    return new_file(out, overwrite=True, suffixes=(".npy",))


def _made_from(
    paths: Sequence[Any], key: str | None, *, amp: bool, side_inputs: Mapping[str, Any] | None
) -> dict[str, Any]:
    if len(paths) == 0:
        raise ValueError("paths must hold at least one image file, got none.")
    gone = [os.fspath(path) for path in paths if not Path(path).is_file()]
    if gone:
        raise FileNotFoundError(f"paths must be image files; {len(gone)} are missing: {first_few(gone)}.")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(hashlib.sha256(Path(path).read_bytes()).digest())
    given = sorted((side_inputs or {}).items())
    inputs = hashlib.sha256()
    for name, value in given:
        inputs.update(f"{name} {np.asarray(value).tolist()!r}".encode())
    return {
        "model": key,
        "images": digest.hexdigest(),
        "count": len(paths),
        "amp": amp,
        "side_inputs": inputs.hexdigest() if given else None,
    }


def _precision(model: Extraction, amp: bool) -> Any:
    if not amp:
        return nullcontext()
    kind = model.device.type
    return torch.autocast(kind, dtype=torch.float16 if kind == "cuda" else torch.bfloat16)


def _opened(path: Path) -> NDArray[np.float32]:
    rows: NDArray[np.float32] = np.load(path, mmap_mode="r", allow_pickle=False)
    return rows


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _journal(path: Path) -> dict[str, Any]:
    """What stands beside a file; {} without a whole note."""
    try:
        note = json.loads(_beside(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def _write_note(path: Path, note: Mapping[str, Any]) -> None:
    with whole_file(_beside(path)) as unfinished:
        unfinished.write_text(json.dumps(note), encoding="utf-8")


def _differing(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    if found.get("model") is None or wanted["model"] is None:
        return "or unknown origin"
    return ", ".join(name for name in wanted if found.get(name) != wanted[name])
