"""Training samples: two images of one person, a reference and a target with a pose, and everything random about them.

Sample n is a function of the seed and n alone: a run that stopped goes on exactly where it was, and any number of
processes or workers draws the same samples.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from pose2id.io.checks import checked_choice, first_few
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import load_reference, pixels
from pose2id.poses import KEYPOINTS, Pose, check_pose, draw
from pose2id.training.augmentation import augment
from pose2id.training.occlusion import occluded
from pose2id.training.settings import POSES, TrainingSettings
from pose2id.training.table import PersonImage

if TYPE_CHECKING:
    from pose2id.training.cleansed_people import Cleansed

LEAST_KEYPOINTS = 8
_NECK, _HIPS = KEYPOINTS.index("neck"), [KEYPOINTS.index("right_hip"), KEYPOINTS.index("left_hip")]
_THREADS = 8  # that read images: decoding is C code, and waits for disks
# First number of every seed, so that streams of different subjects never meet.
_SAMPLE, _ORDER, _VARIANT = 1, 2, 3


@dataclass(frozen=True)
class Selection:
    """The part of a table that can be trained on.

    Attributes:
        images: readable images of people with two of them or more, one of them a target.
        targets: indices into `images` of those with a drawable pose, and if valid ones were asked for, a valid one.
        refused: names of images that are references only because their pose is not valid, and why.
        cleansed: what data cleansing left out; None: it was not asked for.
        num_refused: how many of `images` are drawable and in `refused`.
        unreadable: images left out because they cannot be read, and why.
        alone: images left out because no pair can be made of their person's images.
        digests: SHA-256 of the files of `images`.
    """

    images: list[PersonImage]
    targets: list[int]
    unreadable: list[str]
    alone: list[PersonImage]
    digests: list[str]
    refused: list[tuple[str, str]] = field(default_factory=list)
    cleansed: Cleansed | None = None
    num_refused: int = 0

    @property
    def without_pose(self) -> int:
        """How many of `images` are references only."""
        return len(self.images) - len(self.targets)

    @property
    def digest(self) -> str:
        """Which images these are, in which order and pose; not in which folder, so that they may move."""
        rows = [
            [image.identity, image.path.name, digest, "" if image.pose is None else image.pose.key]
            for image, digest in zip(self.images, self.digests, strict=True)
        ]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def __str__(self) -> str:
        """What is trained on, and what was left out, with the first few names."""
        people = len({image.identity for image in self.images})
        reasons = {
            "without a drawable pose": self.without_pose - self.num_refused,
            "whose pose is not valid": self.num_refused,
        }
        why = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        counts = f"{len(self.targets)} targets, {self.without_pose} references only{f' ({why})' if why else ''}"
        # The first line goes into model cards: no names.
        lines = [f"{len(self.images)} images of {people} people: {counts}"]
        if self.cleansed is not None:
            lines.append(str(self.cleansed))
        if self.refused:
            lines.append(f"poses that are not valid: {_some([f'{name}: {why}' for name, why in self.refused])}")
        if self.unreadable:
            lines.append(f"left out, unreadable: {len(self.unreadable)} ({_some(self.unreadable)})")
        if self.alone:
            names = [image.path for image in self.alone]
            lines.append(f"left out, no second image or no pose of the person: {len(self.alone)} ({_some(names)})")
        return "\n".join(lines)


def is_drawable(pose: Pose | None) -> bool:
    """Whether a pose is enough to draw a person by: it shows neck, a hip, and at least 8 of the 18 keypoints."""
    if pose is None:
        return False
    visible = pose.visible
    return bool(visible[_NECK] and visible[_HIPS].any() and visible.sum() >= LEAST_KEYPOINTS)


def select(
    images: Sequence[PersonImage],
    *,
    poses: str = "all",
    cleanse: Callable[[list[PersonImage], list[str]], Cleansed] | None = None,
) -> Selection:
    """Select what can be trained on; every image is read and decoded.

    Args:
        images: of people.
        poses: "all": images with a drawable pose (`is_drawable`) are targets; "valid": of these only what `check_pose`
            accepts too, in the image's proportions.
        cleanse: gets what could be trained on, and the files' SHA-256, and tells what of it to leave out; None: nothing
            is left out.

    Raises:
        ValueError: nothing is left; with what was left out.
    """
    checked_choice(poses, "poses", POSES)
    with ThreadPoolExecutor(_THREADS) as pool:
        problems, digests, sizes = zip(*pool.map(_read, images), strict=True) if images else ((), (), ())
    unreadable = [problem for problem in problems if problem]
    if images and len(unreadable) == len(images):
        given = f"got {len(images)} of which none can ({_some(unreadable)})"
        raise ValueError(f"images must be files that can be read, {given}. Paths start at the table's folder.")
    readable = [i for i, problem in enumerate(problems) if not problem]
    drawable = [i for i in readable if is_drawable(images[i].pose)]
    judged = [i for i in readable if images[i].pose is not None and poses == "valid"]
    verdicts = {i: check_pose(cast("Pose", images[i].pose), size=sizes[i]) for i in judged}
    refused = {i for i, verdict in verdicts.items() if not verdict}
    fit = set(drawable) - refused
    kept, alone = _parted(images, readable, fit)
    cleansed = None
    if cleanse is not None and kept:
        cleansed = cleanse([images[i] for i in kept], [digests[i] for i in kept])
        dropped = {kept[image.place] for image in cleansed.dropped}
        # A person may have lost the second image, or the only target.
        kept, alone = _parted(images, [i for i in readable if i not in dropped], fit - dropped)
        refused -= dropped
        verdicts = {i: verdict for i, verdict in verdicts.items() if i not in dropped}
        fit -= dropped
    targets = [place for place, i in enumerate(kept) if i in fit]
    selection = Selection(
        images=[images[i] for i in kept],
        targets=targets,
        unreadable=unreadable,
        alone=[images[i] for i in alone],
        digests=[digests[i] for i in kept],
        refused=[(images[i].path.name, verdict.reasons[0]) for i, verdict in verdicts.items() if i in refused],
        cleansed=cleansed,
        num_refused=len(refused.intersection(kept, drawable)),
    )
    if not targets:
        remedies = []
        if cleansed is not None and cleansed.dropped:
            remedies.append("clean=False (--no-clean) trains on images that data cleansing leaves out.")
        if refused.intersection(drawable):
            remedies.append('poses="all" (--poses all) takes poses that are not valid as targets, too.')
        raise ValueError(" ".join([_rule(images), *remedies, str(selection)]))
    return selection


def require_pairs(images: Sequence[PersonImage]) -> None:
    """Raise the ValueError of `select` if the table alone shows that no pair can be made; no image is read."""
    drawable = {i for i, image in enumerate(images) if is_drawable(image.pose)}
    if not _parted(images, range(len(images)), drawable)[0]:
        raise ValueError(_rule(images))


def _parted(
    images: Sequence[PersonImage], readable: Iterable[int], fit: Collection[int]
) -> tuple[list[int], list[int]]:
    """Images of people of whom a pair can be made, and the others; `fit`: those that can be targets."""
    people: dict[str, list[int]] = defaultdict(list)
    for i in readable:
        people[images[i].identity].append(i)
    kept: list[int] = []
    alone: list[int] = []
    for members in people.values():
        pair = len(members) > 1 and any(i in fit for i in members)
        (kept if pair else alone).extend(members)
    return kept, alone


def _rule(images: Sequence[PersonImage]) -> str:
    """The error of images without a pair."""
    drawable = sum(is_drawable(image.pose) for image in images)
    several = sum(count > 1 for count in Counter(image.identity for image in images).values())
    hint = "" if drawable else " Add keypoints: `pose2id table --keypoints DIR` or `--detect`."
    return (
        "images must hold two images of a person at least, one of them with a pose that shows neck, a hip and "
        f"{LEAST_KEYPOINTS} keypoints, got {len(images)} images of which none can be used: {drawable} have such a "
        f"pose, {several} people have two images or more.{hint}"
    )


@dataclass(frozen=True)
class PairSettings:
    """What a sample depends on, besides the images; see `TrainingSettings` for what is not named here.

    Attributes:
        image_size: (height, width) of targets and references, in pixels.
        identity_size: (height, width) of references for the identity encoder, in pixels.
        latent_shape: (channels, height, width) of the noise.
        num_train_timesteps: timesteps are drawn below it.
        variants: `reference_variants`.
    """

    seed: int
    image_size: tuple[int, int]
    identity_size: tuple[int, int]
    latent_shape: tuple[int, int, int]
    num_train_timesteps: int = 1000
    unconditional_ratio: float = 0.1
    noise_offset: float = 0.0
    flip: float = 0.5
    erase: float = 0.5
    occlude: float = 0.0
    variants: int | None = None

    @classmethod
    def of(cls, settings: TrainingSettings, generator: IdentityGenerator) -> PairSettings:
        """Those of a run."""
        given = {name: value for name, value in asdict(settings).items() if name in cls.__dataclass_fields__}
        return cls(
            **given,
            image_size=generator.image_size,
            identity_size=tuple(generator.identity_encoder.image_size),
            latent_shape=generator.latent_shape,
            num_train_timesteps=generator.scheduler.config.num_train_timesteps,
            variants=settings.reference_variants,
        )


class Pairs(Dataset[dict[str, Tensor]]):
    """Sample n of a run, for n from 0 without end.

    In each epoch every target comes once, in an order of its own, with a reference drawn among the person's other
    images.

    Args:
        selection: what to train on.
        settings: what is drawn.

    Attributes:
        latents: `cache.Latents` to take from, in place of images; needs settings with `variants`.
    """

    latents: Any = None

    def __init__(self, selection: Selection, settings: PairSettings) -> None:
        self.selection, self.settings = selection, settings
        self._people: dict[str, list[int]] = defaultdict(list)
        for i, image in enumerate(selection.images):
            self._people[image.identity].append(i)
        self._order: tuple[int, NDArray[np.int64]] = (-1, np.empty(0, np.int64))  # of one epoch, the newest

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        """Tensors of one sample.

        Returns:
            pose (3, H, W) in [0, 1], noise (C, h, w), timestep () int64, unconditional () bool; and either target and
            reference (3, H, W) and identity (3, h', w'), all in [0, 1], or target_latents, reference_latents (C, h, w)
            and features (F,).
        """
        given = self.settings
        epoch, place = divmod(n, len(self.selection.targets))
        target = self.selection.targets[self._permutation(epoch)[place]]
        draws = np.random.default_rng([_SAMPLE, given.seed, n])
        others = [i for i in self._people[self.selection.images[target].identity] if i != target]
        reference = others[draws.integers(len(others))]
        noise = torch.from_numpy(draws.standard_normal(given.latent_shape, dtype=np.float32))
        offset = draws.standard_normal((given.latent_shape[0], 1, 1), dtype=np.float32)
        sample = {
            "pose": pixels(draw(self.selection.images[target].pose), given.image_size),
            "noise": noise + given.noise_offset * torch.from_numpy(offset),
            "timestep": torch.tensor(draws.integers(given.num_train_timesteps), device="cpu"),
            "unconditional": torch.tensor(draws.random() < given.unconditional_ratio, device="cpu"),
        }
        variant = draws if given.variants is None else int(draws.integers(given.variants))
        if self.latents is not None:
            return {**sample, **self.latents.take(target, reference, variant)}
        return {**sample, "target": self.target(target), **self.reference(reference, variant)}

    def target(self, i: int) -> Tensor:
        """(3, H, W) of an image as a target."""
        return pixels(self._picture(i), self.settings.image_size)

    def reference(self, i: int, variant: int | np.random.Generator) -> dict[str, Tensor]:
        """An image as a reference, augmented by the variant's draws or the given ones.

        Returns:
            reference (3, H, W) and identity (3, h', w'), in [0, 1].
        """
        given = self.settings
        draws = np.random.default_rng([_VARIANT, given.seed, i, variant]) if isinstance(variant, int) else variant
        image, pose = np.asarray(self._picture(i)), self.selection.images[i].pose
        # A stream of its own: without occluders, and with them, all else is drawn the same.
        (of_occluder,) = draws.spawn(1)
        if of_occluder.random() < given.occlude:
            image = occluded(image, pose, of_occluder)
        # One augmentation, for the reference UNet and the identity encoder.
        augmented = augment(image, draws, flip=given.flip, erase=given.erase)
        picture = Image.fromarray(augmented)
        return {"reference": pixels(picture, given.image_size), "identity": pixels(picture, given.identity_size)}

    def _permutation(self, epoch: int) -> NDArray[np.int64]:
        if self._order[0] != epoch:
            draws = np.random.default_rng([_ORDER, self.settings.seed, epoch])
            self._order = epoch, draws.permutation(len(self.selection.targets))
        return self._order[1]

    def _picture(self, i: int) -> Image.Image:
        return load_reference(self.selection.images[i].path, "training image")


def _read(image: PersonImage) -> tuple[str, str, tuple[int, int]]:
    """Why an image cannot be used, empty if it can; its file's SHA-256; (height, width)."""
    try:
        width, height = load_reference(image.path, "training image").size
        return "", hashlib.sha256(image.path.read_bytes()).hexdigest(), (height, width)
    except (OSError, ValueError) as error:
        return str(error) if str(image.path) in str(error) else f"{image.path}: {error}", "", (0, 0)


def _some(names: Sequence[Any]) -> str:
    return first_few(names, most=5, separator="; ")
