"""What the frozen parts make of the training images, kept in .npy files: computed once, not in every epoch."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from pose2id._outputs import write_npy
from pose2id.ipg.generator import IdentityGenerator
from pose2id.ipg.pairs import Pairs

_KEY = "key.json"
_TARGETS, _REFERENCES, _FEATURES = "targets.npy", "references.npy", "features.npy"
_BATCH = 16  # images


class Latents:
    """Latents of targets, and latents and identity features of references in each of their variants.

    Args:
        directory: made by `build`.
        pairs: whose samples they are of.
    """

    def __init__(self, directory: Path, pairs: Pairs) -> None:
        # Mapped, not read: a large set's are larger than memory.
        self._targets, self._references, self._features = (
            np.load(directory / name, mmap_mode="r") for name in (_TARGETS, _REFERENCES, _FEATURES)
        )
        self._place = {image: place for place, image in enumerate(pairs.selection.targets)}
        self._variants = pairs.settings.variants or 0

    def take(self, target: int, reference: int, variant: int) -> dict[str, Tensor]:
        """target_latents and reference_latents (C, h, w) and features (F,) of one sample, float32."""
        row = reference * self._variants + variant
        return {
            "target_latents": _tensor(self._targets[self._place[target]]),
            "reference_latents": _tensor(self._references[row]),
            "features": _tensor(self._features[row]),
        }


def build(
    directory: Path, pairs: Pairs, generator: IdentityGenerator, *, key: str, workers: int = 0, progress: bool = True
) -> None:
    """Compute what `Latents` reads, unless the directory holds it for the same key.

    Raises:
        OSError: it cannot be written; nothing is left that would pass for whole.
    """
    content = json.dumps({"key": key})
    if (directory / _KEY).is_file() and (directory / _KEY).read_text(encoding="utf-8") == content:
        return
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    selection, variants = pairs.selection, pairs.settings.variants or 0
    shape = generator.latent_shape
    targets = _Images(pairs, [(i, None) for i in selection.targets])
    references = _Images(pairs, [(i, variant) for i in range(len(selection.images)) for variant in range(variants)])
    with tqdm(total=len(targets) + len(references), unit="img", disable=None if progress else True) as bar:

        def latents(images: _Images, features: list[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
            for batch in DataLoader(images, batch_size=_BATCH, num_workers=workers):
                pictures = {name: tensor.to(generator.device) for name, tensor in batch.items()}
                if "identity" in pictures:
                    features.append(identity_features(generator, pictures["identity"]).cpu().numpy())
                yield generator.encode_images(pictures["image"]).cpu().numpy()
                bar.update(len(pictures["image"]))

        features: list[NDArray[np.float32]] = []
        kind = np.dtype(np.float32)
        write_npy(directory / _TARGETS, (len(targets), *shape), kind, latents(targets, []))
        write_npy(directory / _REFERENCES, (len(references), *shape), kind, latents(references, features))
    width = features[0].shape[1]
    write_npy(directory / _FEATURES, (len(references), width), kind, features)
    (directory / _KEY).write_text(content, encoding="utf-8")


@torch.no_grad()
def identity_features(generator: IdentityGenerator, images: Tensor) -> Tensor:
    """Features (B, F) that identity tokens are made of, of images (B, 3, h', w') in [0, 1]."""
    features: Tensor = generator.identity_encoder((images * 2 - 1).to(generator.dtype))
    return features


class _Images(Dataset[dict[str, Tensor]]):
    """Targets, or references in their variants, for a loader with workers."""

    def __init__(self, pairs: Pairs, items: list[tuple[int, Any]]) -> None:
        self._pairs, self._items = pairs, items

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, place: int) -> dict[str, Tensor]:
        i, variant = self._items[place]
        if variant is None:
            return {"image": self._pairs.target(i)}
        seen = self._pairs.reference(i, variant)
        return {"image": seen["reference"], "identity": seen["identity"]}


def _tensor(values: NDArray[np.float32]) -> Tensor:
    return torch.from_numpy(np.array(values))
