"""VAE latents and identity features of the training images, kept in .npy files: computed once, not every epoch."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pose2id.io.whole_files import whole_file, write_npy
from pose2id.ipg.batch import fingerprint
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.networks import Networks
from pose2id.training.checkpoints import to_disk
from pose2id.training.pairs import Pairs

logger = logging.getLogger(__name__)

LATENTS = "latents"
_KEY = "key.json"
_TARGETS, _REFERENCES, _FEATURES = "targets.npy", "references.npy", "features.npy"
_BATCH = 16  # images


class Latents:
    """Latents of targets, and latents and identity features of references in each of their variants.

    Args:
        directory: of the run; `build` made the files.
        pairs: whose samples they are of.
    """

    def __init__(self, directory: Path, pairs: Pairs) -> None:
        self._directory = directory / LATENTS
        self._arrays: tuple[NDArray[np.float32], ...] = ()
        self._place = {image: place for place, image in enumerate(pairs.selection.targets)}
        self._variants = pairs.settings.variants or 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": ()}  # workers map the files anew: a mapped array is pickled whole

    def take(self, target: int, reference: int, variant: int) -> dict[str, Tensor]:
        """target_latents and reference_latents (C, h, w) and features (F,) of one sample, float32."""
        if not self._arrays:
            # Mapped, not read: a large set's are larger than memory.
            names = (_TARGETS, _REFERENCES, _FEATURES)
            self._arrays = tuple(np.load(self._directory / name, mmap_mode="r") for name in names)
        targets, references, features = self._arrays
        row = reference * self._variants + variant
        return {
            "target_latents": _tensor(targets[self._place[target]]),
            "reference_latents": _tensor(references[row]),
            "features": _tensor(features[row]),
        }


def build(
    directory: Path, pairs: Pairs, generator: IdentityGenerator, *, workers: int = 0, progress: bool = True
) -> None:
    """Compute what `Latents` reads, unless the directory holds it, of these images, targets, settings and networks."""
    selection, variants = pairs.selection, pairs.settings.variants or 0
    frozen = fingerprint(generator, ("vae", "identity_encoder"), sampling=False)
    made_from = json.dumps([selection.digest, selection.targets, asdict(pairs.settings), frozen])
    content = json.dumps({"key": hashlib.sha256(made_from.encode()).hexdigest()})
    directory, shape = directory / LATENTS, generator.latent_shape
    targets = _Images(pairs, "target", [(i, 0) for i in selection.targets])
    seen = [(i, variant) for i in range(len(selection.images)) for variant in range(variants)]
    references, identities = _Images(pairs, "reference", seen), _Images(pairs, "identity", seen)
    encode_identity = partial(identity_features, generator.networks)
    files: list[tuple[str, _Images, tuple[int, ...], Callable[[Tensor], Tensor]]] = [
        (_TARGETS, targets, shape, generator.encode_images),
        (_REFERENCES, references, shape, generator.encode_images),
        (_FEATURES, identities, (generator.identity_tokens.feature_dim,), encode_identity),
    ]
    shapes = {name: (len(images), *of_one) for name, images, of_one, _ in files}
    if _is_whole(directory, content, shapes):
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    logger.info("latents and features of %d images, computed once and kept in %s", len(selection.images), directory)
    total = sum(len(images) for _, images, _, _ in files)
    with tqdm(total=total, desc="latents", unit="img", disable=None if progress else True) as bar:

        def encoded(images: _Images, encode: Callable[[Tensor], Tensor]) -> Iterator[NDArray[np.float32]]:
            for batch in DataLoader(images, batch_size=_BATCH, num_workers=workers):
                yield encode(batch.to(generator.device)).cpu().numpy()
                bar.update(len(batch))

        for name, images, _, encode in files:
            write_npy(directory / name, shapes[name], np.dtype(np.float32), encoded(images, encode))
    to_disk(directory)  # before the key: after a power failure it must not stand beside lost files
    with whole_file(directory / _KEY) as unfinished:
        unfinished.write_text(content, encoding="utf-8")


def _is_whole(directory: Path, content: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a directory holds whole files of this key."""
    try:
        if (directory / _KEY).read_text(encoding="utf-8") != content:
            return False
        # A file that was cut off cannot be mapped.
        return all(np.load(directory / name, mmap_mode="r").shape == shape for name, shape in shapes.items())
    except (OSError, ValueError):
        return False


@torch.no_grad()
def identity_features(networks: Networks, images: Tensor) -> Tensor:
    """Features (B, F) of images (B, 3, h', w') in [0, 1], from the identity encoder."""
    return networks.identity_encoder((images * 2 - 1).to(networks.dtype))


class _Images(Dataset[Tensor]):
    """Targets, or references in their variants as one network sees them, for a loader with workers."""

    def __init__(self, pairs: Pairs, seen_as: str, items: Sequence[tuple[int, int]]) -> None:
        self._pairs, self._seen_as, self._items = pairs, seen_as, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> Tensor:
        i, variant = self._items[place]
        return self._pairs.target(i) if self._seen_as == "target" else self._pairs.reference(i, variant)[self._seen_as]


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(values))
