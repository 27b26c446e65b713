"""Generated pictures as files: one for each image and pose, each of which tells what it was made from.

`DIRECTORY/pose1/NAME.png` to `DIRECTORY/poseM/NAME.png`, and contact sheets in `DIRECTORY/sheets`: the layout that the
published evaluation reads, and `Centralizer(generated=DIRECTORY)`.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from pose2id.extractor import load_image
from pose2id.generated import SUFFIXES
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pictures import content_key, load_poses, load_reference

SHEETS = "sheets"
_NOTE = "pose2id"  # the PNG text that tells what a picture was made from
_GAP = 4  # pixels between the pictures of a contact sheet


@dataclass(frozen=True)
class Written:
    """What `generate_files` did, in pictures.

    Attributes:
        written: generated and saved.
        kept: were there already, made from the same image, pose, weights and settings.
    """

    written: int
    kept: int


def collect_images(
    images: Iterable[str | os.PathLike[str]], without: str | os.PathLike[str] | None = None
) -> dict[str, Path]:
    """Name to file, in order, of image files and of all image files below directories, hidden ones left out.

    A file's name is its path without suffix: below the directory, or the last part for a file given by itself. What a
    directory has below `without` is left out: pictures that were generated into it.

    Raises:
        FileNotFoundError: neither a file nor a directory, or a directory without images.
        ValueError: two files of one name, or none at all.
    """
    if isinstance(images, (str, os.PathLike)):
        raise TypeError(f"images must be a sequence of files and directories, got {images!r} alone. Wrap it in a list.")
    found: dict[str, Path] = {}
    for given in map(Path, images):
        if not given.exists():
            raise FileNotFoundError(f"images must be files or directories, and there is no {given}.")
        inside = sorted(path for path in given.rglob("*") if _is_image(path) and not _is_below(path, without))
        if given.is_dir() and not inside:
            raise FileNotFoundError(f"{given} must hold image files ({', '.join(SUFFIXES)}), and has none.")
        for path in inside if given.is_dir() else [given]:
            name = path.relative_to(given if given.is_dir() else given.parent).with_suffix("").as_posix()
            if name in found:
                raise ValueError(
                    f"images must have different names, got {found[name]} and {path}: their pictures would be the same "
                    "files. Pass the directory above both, or generate them into two directories."
                )
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
    **options: Any,
) -> Written:
    """Generate every person in every pose into PNG files, and go on where an earlier run stopped.

    A file is kept if its note says that it was made from the same pixels, pose, weights, precision and settings; the
    noise depends on nothing else, so a run that was interrupted and one that was not give the same pictures. Files
    appear whole or not at all.

    Args:
        generator: of the pictures.
        images: files, and directories with image files at any depth (`collect_images`).
        directory: made if it isn't there. Pictures go to `pose{i}/NAME.png`, i from 1.
        poses: see `IdentityGenerator.generate`.
        grid: also write `sheets/NAME.png`: the reference, the poses, the pictures.
        overwrite: replace files that were made from something else, or by something else.
        **options: num_inference_steps, guidance_scale, seed, batch_size, size and progress of
            `IdentityGenerator.generate_iter`.

    Raises:
        FileNotFoundError, TypeError, ValueError: bad input, named, before anything is written.
        FileExistsError: there are files that were made from something else.
    """
    job = _Job(generator, collect_images(images, directory), Path(directory), poses, **options)
    missing = job.missing(overwrite=overwrite)
    if missing:
        results = generator.generate_iter([job.images[name] for name in missing], poses, **options)
        for name, pictures in zip(missing, results, strict=True):
            job.write(name, pictures)
    if grid:
        for name in job.images:
            job.write_sheet(name)
    written = len(missing) * len(job.poses)
    return Written(written, len(job.images) * len(job.poses) - written)


def missing_pictures(
    generator: IdentityGenerator,
    images: Iterable[str | os.PathLike[str]],
    directory: str | os.PathLike[str],
    *,
    poses: Any = "standard",
    overwrite: bool = False,
    **options: Any,
) -> int:
    """How many pictures `generate_files` would generate; arguments and errors are the same."""
    job = _Job(generator, collect_images(images, directory), Path(directory), poses, **options)
    return len(job.missing(overwrite=overwrite)) * len(job.poses)


def seconds_per_picture(
    generator: IdentityGenerator,
    image: Any,
    poses: Any = "standard",
    *,
    num_inference_steps: int = 20,
    **options: Any,
) -> float:
    """A short timed probe: what a picture takes in a long run, from a batch of 1 step and one of 3.

    On CUDA whole batches are timed; elsewhere, where batches gain nothing, single pictures.
    """
    drawings = [drawing for _, drawing in load_poses(poses)]
    if generator.device.type != "cuda":
        drawings = drawings[:1]
    batch_size = generator.resolve_batch_size(options.pop("batch_size", "auto"))
    images = [image] * max(1, batch_size // len(drawings) if generator.device.type == "cuda" else 1)

    def seconds(steps: int) -> float:
        start = time.perf_counter()
        # Pictures come back on the CPU: everything before them has been computed then.
        generator.generate(
            images, drawings, num_inference_steps=steps, batch_size=batch_size, progress=False, **options
        )
        return (time.perf_counter() - start) / (len(images) * len(drawings))

    seconds(1)  # what happens only once: constants, kernels to choose or to compile
    one, three = seconds(1), seconds(3)
    return one + max(0.0, three - one) / 2 * (num_inference_steps - 1)


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


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()


def _is_below(path: Path, directory: str | os.PathLike[str] | None) -> bool:
    return directory is not None and path.resolve().is_relative_to(Path(directory).resolve())


class _Job:
    """What is to be made, from what, and what of it is there."""

    def __init__(
        self,
        generator: IdentityGenerator,
        images: Mapping[str, Path],
        directory: Path,
        poses: Any,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        size: tuple[int, int] | None = (256, 128),
        **_: Any,
    ) -> None:
        self.images, self.directory = images, directory
        self.poses = load_poses(poses)
        self._keys = {name: content_key(load_reference(path, f"image {name}")) for name, path in images.items()}
        self._made_with = {
            "generated": True,
            "seed": seed,
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "size": size and list(size),
            "scheduler": type(generator.scheduler).__name__,
            "dtype": str(generator.dtype).removeprefix("torch."),
            "weights": generator.sources,
        }

    def target(self, name: str, pose: int) -> Path:
        """Where a picture goes."""
        return self.directory / f"pose{pose + 1}" / f"{name}.png"

    def missing(self, *, overwrite: bool) -> list[str]:
        """Names of images without all their pictures; raises if other files are in their place."""
        missing, others = [], []
        for name in self.images:
            states = [self._state(name, pose) for pose in range(len(self.poses))]
            others += [self.target(name, pose) for pose, state in enumerate(states) if state == "other"]
            if set(states) != {"there"}:
                missing.append(name)
        if others and not overwrite:
            raise FileExistsError(
                f"{len(others)} files are in the place of pictures to be generated, and were made from other images, "
                f"settings or weights; {others[0]} is the first. Choose another directory, or overwrite them."
            )
        return missing

    def write(self, name: str, pictures: Sequence[Image.Image]) -> None:
        """Save an image's pictures."""
        for pose, picture in enumerate(pictures):
            _save(picture, self.target(name, pose), self._note(name, pose))

    def write_sheet(self, name: str) -> None:
        """Save an image's contact sheet, made of the files."""
        pictures = [load_image(self.target(name, pose), "picture") for pose in range(len(self.poses))]
        reference = load_reference(self.images[name], f"image {name}")
        sheet = contact_sheet(reference, [drawing for _, drawing in self.poses], pictures)
        _save(sheet, self.directory / SHEETS / f"{name}.png", self._note(name))

    def _note(self, name: str, pose: int | None = None) -> str:
        poses = [key for key, _ in self.poses]
        made_from = {"image": self._keys[name], "pose": poses if pose is None else poses[pose]}
        return json.dumps({**made_from, **self._made_with}, sort_keys=True)

    def _state(self, name: str, pose: int) -> str:
        target = self.target(name, pose)
        if not target.exists():
            return "missing"
        try:
            with Image.open(target) as picture:
                there = picture.info.get(_NOTE) == self._note(name, pose)
        except OSError:
            there = False
        return "there" if there else "other"


def _save(picture: Image.Image, target: Path, note: str) -> None:
    """Write a PNG, whole or not at all."""
    text = PngImagePlugin.PngInfo()
    text.add_text(_NOTE, note)
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        picture.save(unfinished, "PNG", pnginfo=text)
        unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
