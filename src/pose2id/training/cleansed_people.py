"""Data cleansing at the start of a run: by features of the generator's own identity encoder, once for the whole run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pose2id.io.checks import first_few
from pose2id.ipg.batch import fingerprint
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pixels import load_reference, pixels
from pose2id.training.cache import identity_features
from pose2id.training.cleansed_table import farthest_dropped
from pose2id.training.cleansing import FAR, NEAR, clean_people
from pose2id.training.table import PersonImage

logger = logging.getLogger(__name__)

LEAST_CLEANSED = 50
"""With fewer images nothing is left out.

Below 200 images the quantiles of p = 0.005 lie among the two farthest and the two nearest: one image goes at each end,
good or bad. Of 50 images that is 2 % at each end instead of 0.5 %; of fewer it costs more than it is likely to gain.
"""
_BATCH = 16  # images


@dataclass(frozen=True)
class Dropped:
    """An image that was left out.

    Attributes:
        place: among the images that were judged.
        image: name of its file.
        identity: of the person whom the table names.
        distance: of its feature to the person's mean.
        reason: "far" or "near".
    """

    place: int
    image: str
    identity: str
    distance: float
    reason: str


@dataclass(frozen=True)
class Cleansed:
    """What cleansing left out; a run keeps it in `run.json`, and does not judge again.

    Attributes:
        key: a digest of the images that were judged and of the identity encoder.
        num_images: how many were judged.
        dropped: images that were left out, farthest first.
    """

    key: str
    num_images: int
    dropped: tuple[Dropped, ...] = ()

    def __str__(self) -> str:
        """How many were left out of how many, and why, with the first few names."""
        if self.num_images < LEAST_CLEANSED:
            return f"data cleansing: none left out, {self.num_images} images are fewer than {LEAST_CLEANSED}"
        counts = Counter(image.reason for image in self.dropped)
        names = [f"{image.image} {image.reason}" for image in self.dropped]
        shown = f" ({first_few(names, most=5, separator='; ')})" if names else ""
        return (
            f"data cleansing: left out {len(self.dropped)} of {self.num_images} images, {counts[FAR]} far from their "
            f"person's mean, {counts[NEAR]} near it{shown}"
        )

    def to_json(self) -> dict[str, Any]:
        """As `run.json` holds it."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: Any) -> Cleansed | None:
        """What `to_json` gave; None if this is something else."""
        if not isinstance(content, Mapping):
            return None
        try:
            return cls(**{**content, "dropped": tuple(Dropped(**image) for image in content["dropped"])})
        except (KeyError, TypeError):
            return None


def key_of(images: Sequence[PersonImage], digests: Sequence[str], generator: IdentityGenerator) -> str:
    """The `Cleansed.key` of what `cleanse` would say of these."""
    rows = [[image.identity, image.path.name, digest] for image, digest in zip(images, digests, strict=True)]
    encoder = fingerprint(generator, ("identity_encoder",), sampling=False)
    return hashlib.sha256(json.dumps([rows, encoder]).encode()).hexdigest()


def cleanse(
    images: Sequence[PersonImage],
    digests: Sequence[str],
    generator: IdentityGenerator,
    known: Cleansed | None,
    *,
    workers: int = 0,
    progress: bool = True,
) -> Cleansed:
    """What to leave out of images, by `cleansing.clean` on the features that condition the generator.

    Args:
        images: of people with two images or more.
        digests: SHA-256 of their files.
        generator: its identity encoder computes the features, in batches.
        known: what the run left out before, which holds for the same images and encoder: features computed on another
            device may differ in the last digits, and a run must not lose an image on the way.
        workers: processes that load images.
        progress: show a bar on a terminal.
    """
    key = key_of(images, digests, generator)
    if known is not None and known.key == key:
        return known
    if len(images) < LEAST_CLEANSED:
        return Cleansed(key, len(images))
    members: dict[str, list[int]] = defaultdict(list)
    for i, image in enumerate(images):
        members[image.identity].append(i)
    logger.info("data cleansing: features of %d images of %d people, once in a run", len(images), len(members))
    order = [i for places in members.values() for i in places]
    crops = _Crops([images[i].path for i in order], generator.identity_encoder.image_size)
    with tqdm(total=len(images), desc="cleansing", unit="img", disable=None if progress else True) as bar:

        def people() -> Iterator[Tensor]:
            """One person's features after another's."""
            counts = iter([len(places) for places in members.values()])
            rows = torch.empty(0, device="cpu")  # whatever the default device is: features come to the CPU
            count = next(counts)
            for batch in DataLoader(crops, batch_size=_BATCH, num_workers=workers):
                features = identity_features(generator.networks, batch.to(generator.device)).float().cpu()
                rows = torch.cat([rows.reshape(-1, features.shape[1]), features])
                bar.update(len(batch))
                while count and len(rows) >= count:
                    yield rows[:count]
                    rows, count = rows[count:], next(counts, 0)

        found = clean_people(people())
    dropped = []
    for row in farthest_dropped(found):
        image, distance = images[order[row]], float(found.distances[row])
        dropped.append(Dropped(order[row], image.path.name, image.identity, distance, found.reasons[row]))
    logger.info("data cleansing: %d of %d images are left out", len(dropped), len(images))
    return Cleansed(key, len(images), tuple(dropped))


class _Crops(Dataset[Tensor]):
    """Images as the identity encoder sees references, without augmentation: (3, h, w) in [0, 1]."""

    def __init__(self, paths: list[Path], size: Sequence[int]) -> None:
        self._paths = paths
        self._size = (int(size[0]), int(size[1]))

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, i: int) -> Tensor:
        return pixels(load_reference(self._paths[i], "training image"), self._size)
