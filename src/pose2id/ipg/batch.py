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
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from pose2id.io.checks import checked_flag, checked_flags, first_few
from pose2id.io.images import content_key, image_files, load_image
from pose2id.io.urls import is_url
from pose2id.io.whole_files import check_folder, whole_file
from pose2id.ipg.folder import NOTE, read_note
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import References, load_poses
from pose2id.ipg.sampler import denoise
from pose2id.ipg.sampling import Sampling
from pose2id.ipg.shards import Shards, ShardWriter
from pose2id.ipg.weights import PARTS

logger = logging.getLogger(__name__)

SHEETS = "sheets"
_GAP = 4  # pixels between the pictures of a contact sheet
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
) -> dict[str, Path]:
    """Name to file, in order, of image files and of all image files below directories, hidden ones left out.

    A file's name is its path without suffix: below `root`, else below the directory, or the last part for a file given
    by itself. What a directory has below `without` is left out: pictures that were generated into it. Two files of one
    name are errors.
    """
    if isinstance(images, (str, os.PathLike)):
        raise TypeError(f"images must be a sequence of files and directories, got {images!r}. Wrap it in a list.")
    found: dict[str, Path] = {}
    for given in map(Path, images):
        for path in _files_of(given, without):
            below = Path(root) if root is not None else given if given.is_dir() else given.parent
            if not path.is_relative_to(below):
                raise ValueError(f"images must be below root, {below}, got {path}.")
            name = path.relative_to(below).with_suffix("").as_posix()
            if name in found:
                raise ValueError(f"images must have different names, got {found[name]} and {path}. Pass their folder.")
            found[name] = path
    if not found:
        raise ValueError("images must name at least one file or directory, got none.")
    return found


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
        images: files, and directories with image files at any depth (`collect_images`). Each is decoded twice at most:
            to see what is there already, and to generate.
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
        root: folder below which an image's path is its NAME; None: that which was given, or the file's own.
        **settings: `num_inference_steps`, `guidance_scale`, `seed`, `size`, `ablation` of `IdentityGenerator.generate`.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad input, named, before anything is written.
        FileExistsError: there are files that were made from something else, or pictures in more poses.
    """
    checked_flag(progress, "progress")
    generator.networks.resolve_batch_size(batch_size)
    sampling = generator.checked_sampling(sampling, **settings)
    job = _Job(generator, images, directory, poses, sampling, grid, overwrite, root)
    results = iter(())
    if job.incomplete:
        references = job.references.some(list(job.incomplete))
        results = generator.generate_iter(
            references, poses, sampling=sampling, batch_size=batch_size, progress=progress
        )
    with job.writer or nullcontext():
        for i in range(len(job.names)):
            if i in job.incomplete:
                job.write(i, next(results))
            if grid:
                job.write_sheet(i)
    return Written(job.missing, len(job.names) * len(job.poses) - job.missing)


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
    sampling = generator.checked_sampling(sampling, **settings)
    return _Job(generator, images, directory, poses, sampling, False, overwrite).missing


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


class _Job:
    """What is to be made, from what, and what of it is there."""

    def __init__(
        self,
        generator: IdentityGenerator,
        images: Iterable[str | os.PathLike[str]],
        directory: str | os.PathLike[str],
        poses: Any,
        sampling: Sampling,
        grid: bool,
        overwrite: bool,
        root: str | os.PathLike[str] | None = None,
    ) -> None:
        checked_flags(grid=grid, overwrite=overwrite)
        if is_url(directory) and grid:
            raise ValueError(f"grid must be False for a URL, whose shards have no contact sheets, got {directory}.")
        self.place = os.fspath(directory)
        self.shards = Shards(directory) if is_url(directory) else None
        self.writer = None if self.shards is None else ShardWriter(self.shards)
        # Pictures in shards go by their paths below the URL.
        self.directory = Path(directory if self.shards is None else "")
        check_folder(self.directory)
        found = collect_images(images, directory, root)
        self.names, self.overwrite = list(found), overwrite
        self.poses = load_poses(poses)
        if self.shards is None:
            for folder in (*(f"pose{m + 1}" for m in range(len(self.poses))), SHEETS):
                check_folder(self.directory / folder)
        self.references = References(list(found.values()), [f"image {name}" for name in found])
        self._keys = _content_keys(found, self.references)
        self._made_with = {
            "generated": True,
            **sampling.note(),
            "dtype": str(generator.dtype).removeprefix("torch."),
            "generator": fingerprint(generator),
            "weights": generator.sources,
        }
        there = self._there(grid)
        every = range(len(self.names))
        # A dictionary for its order, which is that of the results.
        self.incomplete = dict.fromkeys(i for i in every if not there.issuperset(self._pictures(i)))
        self.missing = sum(target not in there for i in every for target in self._pictures(i))

    def write(self, i: int, pictures: Sequence[Image.Image]) -> None:
        """Save an image's pictures, except those that are there; in a shard they stay together."""
        if self.writer is not None:
            notes = self._pictures(i).values()
            self.writer.write(self.names[i], [(_png(*pair), pair[1]) for pair in zip(pictures, notes, strict=True)])
            return
        for (target, note), picture in zip(self._pictures(i).items(), pictures, strict=True):
            self._write(picture, target, note)

    def write_sheet(self, i: int) -> None:
        """Save an image's contact sheet, made of the files, unless it is there."""

        def sheet() -> Image.Image:
            pictures = [load_image(target, "picture") for target in self._pictures(i)]
            return contact_sheet(self.references[i], [drawing for _, drawing in self.poses], pictures)

        self._write(sheet, *self._sheet(i))

    def _write(self, picture: Image.Image | Callable[[], Image.Image], target: Path, note: dict[str, Any]) -> None:
        # Looked at again: another run may write here too.
        found = _look(target)
        if found == note:
            return
        if found is not None and not self.overwrite:
            raise self._others([(target, found, note)])
        _save(picture() if callable(picture) else picture, target, json.dumps(note, sort_keys=True))

    def _pictures(self, i: int) -> dict[Path, dict[str, Any]]:
        """The files of an image, one for each pose, with their notes."""
        made_from = {"image": self._keys[i], **self._made_with}
        folders = ((self.directory / f"pose{m}", key) for m, (key, _) in enumerate(self.poses, 1))
        return {folder / f"{self.names[i]}.png": {"pose": key, **made_from} for folder, key in folders}

    def _sheet(self, i: int) -> tuple[Path, dict[str, Any]]:
        note = {"image": self._keys[i], "pose": [key for key, _ in self.poses], **self._made_with}
        return self.directory / SHEETS / f"{self.names[i]}.png", note

    def _there(self, grid: bool) -> set[Path]:
        """Files that are what they should be; raises if others are in their place, or pictures in more poses."""
        more = f"pose{len(self.poses) + 1}"
        if (self.directory / more).exists() if self.shards is None else self.shards.num_poses > len(self.poses):
            rule = f"must not hold pictures in more than {len(self.poses)} poses, got {more}"
            remedy = "Choose another" + (", or remove the folders" if self.shards is None else "")
            raise FileExistsError(f"{self.place} {rule}. {remedy}.")
        there: set[Path] = set()
        others: list[tuple[Path, dict[str, Any], dict[str, Any]]] = []
        for i in range(len(self.names)):
            targets = dict([*self._pictures(i).items(), *([self._sheet(i)] if grid else [])])
            found = self._found(i, targets)
            fitting = [target for target, note in targets.items() if found.get(target) == note]
            # In a shard an image's pictures stay together: those of fewer poses are made anew.
            there.update(fitting if self.shards is None or len(fitting) == len(targets) else [])
            others += [(key, one, targets[key]) for key, one in found.items() if one not in (None, targets[key])]
        if others and not self.overwrite:
            raise self._others(others)
        return there

    def _found(self, i: int, targets: Iterable[Path]) -> dict[Path, dict[str, Any] | None]:
        """What is in the place of an image's files: notes."""
        if self.shards is None:
            return {target: _look(target) for target in targets}
        return dict(zip(targets, self.shards.notes(self.names[i]), strict=False))

    def _others(self, others: Sequence[tuple[Path, dict[str, Any], dict[str, Any]]]) -> FileExistsError:
        target, found, note = others[0]
        keys = dict.fromkeys([*note, *found])  # a setting at its default may have no entry
        differing = [key for key in keys if found.get(key) != note.get(key)] if found else ["no note of pose2id"]
        where = target if self.shards is None else f"{self.place}: {target}"
        return FileExistsError(
            f"{len(others)} files are in the place of new pictures, made from other images, settings or weights; "
            f"{where} is the first, different in: {', '.join(differing)}. Choose another directory, or overwrite them "
            "(overwrite=True, --overwrite)."
        )


def _files_of(given: Path, without: str | os.PathLike[str] | None) -> list[Path]:
    if not given.exists():
        raise FileNotFoundError(f"images must be files or directories; there is no {given}.")
    if not given.is_dir():
        return [given]
    left_out = None if without is None or is_url(without) else Path(without).resolve()
    if left_out is not None and given.resolve().is_relative_to(left_out):
        raise ValueError(f"images must not be inside the directory to write, got {given} inside {without}.")
    files = sorted(Path(file) for _, file in image_files(given))
    files = [file for file in files if left_out is None or not file.resolve().is_relative_to(left_out)]
    if not files:
        raise FileNotFoundError(f"{given} must hold image files, and has none.")
    return files


def _content_keys(images: Mapping[str, Path], references: References) -> list[str]:
    """Of all images, or one error for all that are broken."""
    keys, broken = [], []
    for i, (name, path) in enumerate(images.items()):
        try:
            if read_note(path):
                raise ValueError(f"image {name} must be a person's, and {path} was generated by pose2id.")
            keys.append(content_key(references[i]))
        except ValueError as error:
            broken.append(str(error))
    if broken:
        raise ValueError(first_few(broken, most=10, separator="\n"))
    return keys


def _look(target: Path) -> dict[str, Any] | None:
    """A file's note, {} if it has none; None: there is no file, or a damaged one of ours, which is made anew."""
    try:
        return read_note(target) if target.exists() else None
    except ValueError as error:
        logger.warning("%s", error)
        return None


def _save(picture: Image.Image, target: Path, note: str) -> None:
    """Write a PNG, whole or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as unfinished:
        picture.save(unfinished, "PNG", pnginfo=_text(note))


def _png(picture: Image.Image, note: dict[str, Any]) -> bytes:
    """The same file, in memory."""
    file = io.BytesIO()
    picture.save(file, "PNG", pnginfo=_text(json.dumps(note, sort_keys=True)))
    return file.getvalue()


def _text(note: str) -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text(NOTE, note)
    return text
