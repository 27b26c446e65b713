"""Generated pictures as files: one for each image and pose, with its settings recorded in the PNG.

`DIRECTORY/pose1/NAME.png` to `DIRECTORY/poseM/NAME.png`, and contact sheets in `DIRECTORY/sheets`: the layout that the
published evaluation reads, and `Centralizer(generated=DIRECTORY)`. Where DIRECTORY is a URL, the same files are in
shards there (`pose2id.ipg.shards`).
"""

from __future__ import annotations

import hashlib
import inspect
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from pose2id.datasets.tables import TABLES, listed_images
from pose2id.io.beside import Beside
from pose2id.io.checks import checked_count, checked_flag, checked_flags, first_few
from pose2id.io.images import content_key, image_files, load_image
from pose2id.io.rows import blocks
from pose2id.io.urls import is_url, opened
from pose2id.io.whole_files import check_folder, whole_file
from pose2id.ipg.folder import NOTE, read_note
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import References, load_poses, to_size
from pose2id.ipg.sampler import denoise
from pose2id.ipg.sampling import Sampling
from pose2id.ipg.shards import Shards, ShardWriter
from pose2id.ipg.weights import PARTS

logger = logging.getLogger(__name__)

SHEETS = "sheets"
_GAP = 4  # pixels between the pictures of a contact sheet
_READ_AT_ONCE = 1024  # images whose keys are asked for together
_PENDING = 64  # pictures that wait for the thread that writes them: two batches of CUDA's
_SAMPLED = 256  # values of each tensor that a fingerprint looks at


@dataclass(frozen=True)
class Written:
    """How many pictures `generate_files` wrote, and how many it kept because they were there already."""

    written: int
    kept: int


def collect_images(
    images: Iterable[str | os.PathLike[str]],
    without: str | os.PathLike[str] | None = None,
    root: str | os.PathLike[str] | None = None,
    *,
    missing: bool = False,
) -> dict[str, Path]:
    """Name to file, in order, of image files, of those that tables list, and of those below directories.

    Hidden files and folders are left out, and what a directory has below `without`: pictures that were generated into
    it. A table is a .csv or .tsv file with the columns path and identity (`pose2id.datasets.read_table`), of which all
    images count but "unknown" ones.

    A file's name is its path without suffix: below `root`, else below the directory, or the last part for a file given
    by itself. Images of a table are named from `common_folder` on. With `missing` some of these need not be there, and
    the others have the names that they have without them. Two files of one name are errors.
    """
    if isinstance(images, (str, os.PathLike)):
        raise TypeError(f"images must be a sequence of files and directories, got {images!r}. Wrap it in a list.")
    found: dict[str, Path] = {}
    for given in map(Path, images):
        files, start = _files_of(given, without, missing)
        below = Path(os.path.abspath(start if root is None else root))
        for path in files:
            absolute = Path(os.path.abspath(path))  # a table's paths may have ".." in them
            inside = absolute.is_relative_to(below)
            if not inside and not (missing and not path.exists()):
                raise ValueError(f"images must be below root, {below}, got {path}.")
            name = absolute.relative_to(below if inside else absolute.anchor).with_suffix("").as_posix()
            if name in found:
                raise ValueError(f"images must have different names, got {found[name]} and {path}. Pass their folder.")
            found[name] = path
    if not found:
        raise ValueError("images must name at least one file or directory, got none.")
    return found


def common_folder(folder: str | os.PathLike[str], images: Iterable[str | os.PathLike[str]]) -> Path:
    """A folder, such as a table's, if all images are below it, else the deepest one that has them all."""
    parents = {os.path.dirname(os.path.abspath(image)) for image in images}
    inside = all(Path(parent).is_relative_to(os.path.abspath(folder)) for parent in parents)
    return Path(folder) if inside else Path(os.path.commonpath(parents))


def check_place(directory: str | os.PathLike[str], grid: bool) -> None:
    """Raise for what is no place for pictures, as far as a look at its name and at what is there tells."""
    if not is_url(directory):
        check_folder(Path(directory))
    elif grid:
        raise ValueError(f"grid must be False for a URL, whose shards have no contact sheets, got {directory}.")
    else:
        opened(os.fspath(directory))


def generate_files(
    generator: IdentityGenerator,
    images: Iterable[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    poses: Any = "standard",
    grid: bool = False,
    overwrite: bool = False,
    sampling: Sampling | None = None,
    batch_size: int | str = "auto",
    progress: bool = True,
    root: str | os.PathLike[str] | None = None,
    share: tuple[int, int] = (0, 1),
    **settings: Any,
) -> Written:
    """Generate every person in every pose into PNG files, and go on where an earlier run stopped.

    A file is kept if its note says that it was made from the same pixels, pose, weights, precision and settings, and
    its checksums that it is whole. The noise depends on nothing else, so a run that was interrupted gives the pictures
    of one that was not, up to the last digits that other batches cost: 1 or 2 of 255 in single values. Files appear
    whole or not at all. Weights are told apart by a hash of some values of each tensor, and of the scheduler's
    configuration.

    Args:
        generator: of the pictures.
        images: files, tables of them (.csv), and directories with image files at any depth (`collect_images`). Each is
            decoded twice at most: to see what is there already, and to generate.
        directory: made if there is none. Pictures go to `pose{i}/NAME.png`, i from 1. Or a URL that fsspec knows
            (s3://, hf://, ...; extra "distributed"): they go into shards there (`pose2id.ipg.shards`), which are only
            added to, 256 images at a time; the unfinished one is lost when a process is killed.
        poses: see `IdentityGenerator.generate`.
        grid: also write `sheets/NAME.png`: the reference, the poses, the pictures. Not to a URL.
        overwrite: replace files that were made from something else, or by something else. In shards newer pictures of
            an image go before older ones, which stay where they are.
        sampling: settings of all pictures; None: the default.
        batch_size: pictures per forward.
        progress: show a bar on a terminal, of the pictures that are missing.
        root: folder below which an image's path is its NAME; None: that which was given, the file's own, or the one
            that all images of a table have in common.
        share: (index, count) of this process among several that write into one directory, each its own images: those
            whose content falls to it.
        **settings: `num_inference_steps`, `guidance_scale`, `seed`, `size`, `ablation` of `IdentityGenerator.generate`.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad input, named, before anything is written.
        FileExistsError: there are files that were made from something else, or pictures in more poses.
    """
    checked_flag(progress, "progress")
    generator.networks.resolve_batch_size(batch_size)
    sampling = generator.checked_sampling(sampling, **settings)
    found = collect_images(images, directory, root)
    made_from = {**sampling_note(sampling), **generator_note(generator)}
    job = Job(found, directory, poses, made_from, grid=grid, overwrite=overwrite, share=share)
    results = iter(())
    if job.incomplete:
        # As they were generated: the thread that writes them resizes them, beside the GPU.
        whole = replace(sampling, size=None)
        references = job.references.some(list(job.incomplete))
        results = generator.generate_iter(references, poses, sampling=whole, batch_size=batch_size, progress=progress)
    with job.writing(), Beside(most=pending(job.poses)) as writer:
        for i in job.keys:
            if i in job.incomplete:
                writer.do(job.write, i, next(results))
            if grid:
                writer.do(job.write_sheet, i)
    return Written(job.missing, len(job.keys) * len(job.poses) - job.missing)


def missing_pictures(
    generator: IdentityGenerator,
    images: Iterable[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    poses: Any = "standard",
    overwrite: bool = False,
    sampling: Sampling | None = None,
    **settings: Any,
) -> int:
    """How many pictures `generate_files` would write; arguments and errors are the same."""
    made_from = {**sampling_note(generator.checked_sampling(sampling, **settings)), **generator_note(generator)}
    return Job(collect_images(images, directory), directory, poses, made_from, overwrite=overwrite).missing


def seconds_per_picture(
    generator: IdentityGenerator,
    image: Any,
    poses: Any = "standard",
    *,
    sampling: Sampling | None = None,
    batch_size: int | str = "auto",
    **settings: Any,
) -> float:
    """A short timed probe: what a picture takes in a run of `generate_files`, from a batch of 1 step and one of 3.

    On CUDA a whole batch is timed; elsewhere, where batches of full-size weights gain nothing, a single picture.
    """
    sampling = generator.checked_sampling(sampling, **settings)
    count = generator.networks.resolve_batch_size(batch_size) if generator.device.type == "cuda" else 1
    drawings = [drawing for _, drawing in load_poses(poses)][:count]
    images = [image] * (count // len(drawings))

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        probe = replace(sampling, steps=steps)
        # Pictures come back on the CPU: everything before them has been computed then.
        list(generator.generate_iter(images, drawings, sampling=probe, batch_size=batch_size, progress=False))
        return (time.perf_counter() - start) / (len(images) * len(drawings))

    seconds(1)  # what happens only once: constants, kernels to choose or to compile
    one, three = seconds(1), seconds(3)
    return one + max(0.0, three - one) / 2 * (sampling.steps - 1)


def contact_sheet(
    reference: Image.Image, drawings: Sequence[Image.Image], pictures: Sequence[Image.Image]
) -> Image.Image:
    """One RGB picture: the reference, and under each drawn pose the picture that was generated in it."""
    width, height = pictures[0].size
    sheet = Image.new("RGB", ((width + _GAP) * (len(pictures) + 1) - _GAP, 2 * height + _GAP), "white")
    places = [(0, 0, reference)]
    for i, (drawing, picture) in enumerate(zip(drawings, pictures, strict=True)):
        places += [(i + 1, 0, drawing), (i + 1, 1, picture)]
    for column, row, content in places:
        resized = content.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        sheet.paste(resized, (column * (width + _GAP), row * (height + _GAP)))
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Contact sheets of one width, one below the other."""
    whole = Image.new("RGB", (sheets[0].width, sum(sheet.height + _GAP for sheet in sheets) - _GAP), "white")
    top = 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + _GAP
    return whole


def fingerprint(generator: IdentityGenerator, names: Iterable[str] = PARTS, *, sampling: bool = True) -> str:
    """A hash of what a generator computes with: weights (some values of each tensor), precision, scheduler, size.

    Only the networks of these names count, and with `sampling` the sampler, and whether the bank is rounded.
    """
    digest = hashlib.sha256()
    for name in names:
        for key, tensor in generator.parts[name].state_dict().items():
            flat = tensor.detach().flatten()
            values = flat[:: max(1, len(flat) // _SAMPLED)].double().cpu().numpy()
            digest.update(f"{name}.{key} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(values.astype("<f8").tobytes())
    scheduler = {key: value for key, value in generator.scheduler.config.items() if not key.startswith("_")}
    scaling = generator.vae.config.scaling_factor
    rounded = generator.round_bank if sampling else None
    rest = [type(generator.scheduler).__name__, scheduler, list(generator.image_size), rounded, scaling]
    if sampling and generator.sampler is not denoise:
        rest.append(_sampler_key(generator.sampler))
    digest.update(json.dumps(rest, sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _sampler_key(sampler: Any) -> str:
    """What tells a sampler from others: its own `key`, or the name of a function of a module."""
    if isinstance(getattr(sampler, "key", None), str):
        return str(sampler.key)
    # Not a method, whose object has settings, a function within another, or one of a script: scripts share a name.
    if not inspect.isfunction(sampler) or "<" in sampler.__qualname__ or sampler.__module__ == "__main__":
        raise ValueError(f"sampler must have a `key`, a string that tells its settings from others, got {sampler!r}.")
    return f"{sampler.__module__}.{sampler.__qualname__}"


def sampling_note(sampling: Sampling) -> dict[str, Any]:
    """What a picture's note says of its settings."""
    return {"generated": True, **sampling.note()}


def generator_note(generator: IdentityGenerator) -> dict[str, Any]:
    """What a picture's note says of the generator."""
    return {
        "dtype": str(generator.dtype).removeprefix("torch."),
        "generator": fingerprint(generator),
        "weights": generator.sources,
    }


def picture_notes(key: str, poses: Iterable[str], made_from: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The notes of an image's pictures: of its content key, the keys of the poses, and what all pictures share."""
    return [{"pose": pose, "image": key, **made_from} for pose in poses]


def pending(poses: Sequence[Any]) -> int:
    """How many images' pictures may wait to be written while others are generated."""
    return max(2, _PENDING // len(poses))


def encoded(picture: Image.Image, note: Mapping[str, Any]) -> bytes:
    """A generated picture as PNG, in the size that its note says."""
    return _png(to_size(picture, note["size"]), note)


class Job:
    """What is to be made, from what, and what of it is there.

    Args:
        found: name to file, of `collect_images`.
        directory: see `generate_files`.
        poses: see `generate_files`.
        made_from: what the notes of all pictures say: `sampling_note` and `generator_note`.
        grid: see `generate_files`.
        overwrite: see `generate_files`.
        share: see `generate_files`.
        leave_out: what cannot be read or was generated is in `broken`, and no error.

    Attributes:
        names: of all images.
        keys: place to content key, of the images of this share.
        broken: place to reason, of images that are left out.
        incomplete: place to number of pictures that are missing.
        shards: of a URL; None of a folder.

    Raises:
        FileExistsError, ValueError: see `generate_files`.
    """

    def __init__(
        self,
        found: Mapping[str, Path],
        directory: str | os.PathLike[str],
        poses: Any,
        made_from: Mapping[str, Any],
        *,
        grid: bool = False,
        overwrite: bool = False,
        share: tuple[int, int] = (0, 1),
        leave_out: bool = False,
    ) -> None:
        checked_flags(grid=grid, overwrite=overwrite)
        processes = checked_count(share[1], "share's count")
        process = checked_count(share[0], "share's index", least=0, most=processes - 1)
        check_place(directory, grid)
        self.place = os.fspath(directory)
        self.shards = Shards(directory) if is_url(directory) else None
        self._writer = None if self.shards is None else ShardWriter(self.shards)
        # Pictures in shards go by their paths below the URL.
        self.directory = Path(directory if self.shards is None else "")
        self.names, self.paths, self.overwrite = list(found), list(found.values()), overwrite
        self.poses = load_poses(poses)
        if self.shards is None:
            for folder in (*(f"pose{m + 1}" for m in range(len(self.poses))), SHEETS):
                check_folder(self.directory / folder)
        self.references = References(self.paths, [f"image {name}" for name in found])
        keys, self.broken = self._content_keys()
        if self.broken and not leave_out:
            raise ValueError(first_few(self.broken.values(), most=10, separator="\n"))
        # By content: equal images of two names are one process's, and no other one's.
        self.keys = {i: key for i, key in keys.items() if int(key[:8], 16) % processes == process}
        self._made_from = dict(made_from)
        self.incomplete = self._incomplete(grid)

    @property
    def missing(self) -> int:
        """How many pictures are to be made."""
        return sum(self.incomplete.values())

    def _content_keys(self) -> tuple[dict[int, str], dict[int, str]]:
        """Keys of images by their places, and reasons why others have none."""
        keys: dict[int, str] = {}
        broken: dict[int, str] = {}

        def key(i: int) -> str | ValueError:
            try:
                if read_note(self.paths[i]):
                    given = f"{self.paths[i]} was generated by pose2id"
                    raise ValueError(f"image {self.names[i]} must be a person's, and {given}.")
                return content_key(self.references[i])
            except ValueError as error:
                return error

        with ThreadPoolExecutor(thread_name_prefix="pose2id-keys") as pool:
            for some in blocks(len(self.paths), _READ_AT_ONCE):
                places = range(some.start, some.stop)
                for i, found in zip(places, pool.map(key, places), strict=True):
                    (keys if isinstance(found, str) else broken)[i] = str(found)
        return keys, broken

    def writing(self) -> AbstractContextManager[Any]:
        """A context to write in: at its end everything is where it belongs."""
        return nullcontext() if self._writer is None else self._writer

    def write(self, i: int, pictures: Sequence[Image.Image | bytes]) -> None:
        """Save an image's pictures, as generated or as PNG, except those that are there; all of them in a shard."""
        if self._writer is not None:
            pairs = zip(pictures, self._pictures(i).values(), strict=True)
            files = [(one if isinstance(one, bytes) else encoded(one, note), note) for one, note in pairs]
            self._writer.write(self.names[i], files)
            return
        for (target, note), picture in zip(self._pictures(i).items(), pictures, strict=True):
            self._write(picture if isinstance(picture, bytes) else partial(encoded, picture, note), target, note)

    def write_sheet(self, i: int) -> None:
        """Save an image's contact sheet, made of the files, unless it is there."""
        target, note = self._sheet(i)

        def sheet() -> bytes:
            pictures = [load_image(target, "picture") for target in self._pictures(i)]
            return _png(contact_sheet(self.references[i], [drawing for _, drawing in self.poses], pictures), note)

        self._write(sheet, target, note)

    def _write(self, content: bytes | Callable[[], bytes], target: Path, note: dict[str, Any]) -> None:
        # Looked at again: another run may write here too.
        found = _look(target)
        if found == note:
            return
        if found is not None and not self.overwrite:
            raise self._others(1, target, found, note)
        _save(content if isinstance(content, bytes) else content(), target)

    def _pictures(self, i: int) -> dict[Path, dict[str, Any]]:
        """The files of an image, one for each pose, with their notes."""
        notes = picture_notes(self.keys[i], [key for key, _ in self.poses], self._made_from)
        return {self.directory / f"pose{m}" / f"{self.names[i]}.png": note for m, note in enumerate(notes, 1)}

    def _sheet(self, i: int) -> tuple[Path, dict[str, Any]]:
        note = {"image": self.keys[i], "pose": [key for key, _ in self.poses], **self._made_from}
        return self.directory / SHEETS / f"{self.names[i]}.png", note

    def _incomplete(self, grid: bool) -> dict[int, int]:
        """Place to number of missing pictures; raises if others are in their place, or pictures in more poses."""
        more = f"pose{len(self.poses) + 1}"
        if (self.directory / more).exists() if self.shards is None else self.shards.num_poses > len(self.poses):
            rule = f"must not hold pictures in more than {len(self.poses)} poses, got {more}"
            remedy = "Choose another" + (", or remove the folders" if self.shards is None else "")
            raise FileExistsError(f"{self.place} {rule}. {remedy}.")
        incomplete: dict[int, int] = {}
        others, first = 0, None
        for i in self.keys:
            pictures = self._pictures(i)
            targets = dict([*pictures.items(), *([self._sheet(i)] if grid else [])])
            found = self._found(i, targets)
            if missing := sum(found.get(target) != note for target, note in pictures.items()):
                # In a shard an image's pictures stay together: those of fewer poses are made anew.
                incomplete[i] = missing if self.shards is None else len(pictures)
            for target, one in found.items():
                if one not in (None, targets[target]):
                    others += 1
                    first = first or (target, one, targets[target])
        if first is not None and not self.overwrite:
            raise self._others(others, *first)
        return incomplete

    def _found(self, i: int, targets: Iterable[Path]) -> dict[Path, dict[str, Any] | None]:
        """What is in the place of an image's files: notes."""
        if self.shards is None:
            return {target: _look(target) for target in targets}
        return dict(zip(targets, self.shards.notes(self.names[i]), strict=False))

    def _others(self, count: int, target: Path, found: dict[str, Any], note: dict[str, Any]) -> FileExistsError:
        keys = dict.fromkeys([*note, *found])  # a setting at its default may have no entry
        differing = [key for key in keys if found.get(key) != note.get(key)] if found else ["no note of pose2id"]
        where = target if self.shards is None else f"{self.place}: {target}"
        return FileExistsError(
            f"{count} files are in the place of new pictures, made from other images, settings or weights; "
            f"{where} is the first, different in: {', '.join(differing)}. Choose another directory, or overwrite them "
            "(overwrite=True, --overwrite)."
        )


def _files_of(given: Path, without: str | os.PathLike[str] | None, missing: bool) -> tuple[list[Path], Path]:
    """Files, and the folder below which their paths are names."""
    if not given.exists():
        raise FileNotFoundError(f"images must be files or directories; there is no {given}.")
    if given.is_file() and given.suffix.lower() in TABLES:
        listed = listed_images(given, missing=missing)
        there = [path for path in listed if path.is_file()]
        if not there:
            listed_images(given)  # whose error says so
        return listed, common_folder(given.parent, there)
    if not given.is_dir():
        return [given], given.parent
    left_out = None if without is None or is_url(without) else Path(without).resolve()
    if left_out is not None and given.resolve().is_relative_to(left_out):
        raise ValueError(f"images must not be inside the directory to write, got {given} inside {without}.")
    files = sorted(Path(file) for _, file in image_files(given))
    files = [file for file in files if left_out is None or not file.resolve().is_relative_to(left_out)]
    if not files:
        raise FileNotFoundError(f"{given} must hold image files, and has none.")
    return files, given


def _look(target: Path) -> dict[str, Any] | None:
    """A file's note, {} if it has none; None: there is no file, or a damaged one of ours, which is made anew."""
    try:
        return read_note(target) if target.exists() else None
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _png(picture: Image.Image, note: Mapping[str, Any]) -> bytes:
    text, content = PngImagePlugin.PngInfo(), io.BytesIO()
    text.add_text(NOTE, json.dumps(note, sort_keys=True))
    picture.save(content, "PNG", pnginfo=text)
    return content.getvalue()


def _save(content: bytes, target: Path) -> None:
    """Write a file, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as unfinished:
        unfinished.write_bytes(content)
