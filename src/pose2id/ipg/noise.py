"""The noise that a picture begins as."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class ItemNoise:
    """Noise as a function of (seed, image, pose) alone: the same in any batch, order, process and on any device.

    Attributes:
        seed: of the run.
        image_key: `content_key` of the reference image.
        pose_key: `Pose.key`, or the `content_key` of a drawing.
    """

    seed: int
    image_key: str
    pose_key: str

    def latents(self, shape: tuple[int, ...]) -> Tensor:
        """Standard normal float32 noise of this shape, on the CPU."""
        # Philox's 128 bits of key, because torch's CPU generator looks at 32 bits of a seed: among 100,000 pictures
        # some would share their noise.
        generator = np.random.Generator(np.random.Philox(key=int.from_bytes(self._digest()[:16], "little")))
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def generator(self) -> torch.Generator:
        """For schedulers that add noise in their steps."""
        return torch.Generator().manual_seed(int.from_bytes(self._digest()[16:24], "little", signed=True))

    def _digest(self) -> bytes:
        return hashlib.sha256(f"{self.seed}/{self.image_key}/{self.pose_key}".encode()).digest()


@dataclass(frozen=True)
class Noise:
    """Where the noise of a run comes from: given latents, a generator that draws for all of it, or each item alone.

    Attributes:
        shape: (channels, height, width) of one picture's latents.
        pose_keys: of the M poses.
        seed: of `ItemNoise`.
        generator: of the run; draws what pictures begin as in place of the seed.
        latents: (N, M, *shape), in place of drawn ones.
    """

    shape: tuple[int, int, int]
    pose_keys: Sequence[str]
    seed: int
    generator: torch.Generator | None = None
    latents: Tensor | None = None

    def initial(self, i: int, image_key: str, device: torch.device) -> Tensor:
        """(M, *shape) for images[i]. A generator's is drawn on its own device, seeded or not."""
        if self.latents is not None:
            return self.latents[i].to(device)
        if self.generator is None:
            return torch.stack([item.latents(self.shape) for item in self._items(image_key)]).to(device)
        shape, at = (len(self.pose_keys), *self.shape), self.generator.device
        return torch.randn(shape, generator=self.generator, device=at, dtype=torch.float32).to(device)

    def of_steps(self, image_keys: Sequence[str]) -> list[list[torch.Generator]]:
        """For schedulers that add noise in their steps: fresh generators, one for each pose of each image."""
        return [[item.generator() for item in self._items(key)] for key in image_keys]

    def _items(self, image_key: str) -> list[ItemNoise]:
        return [ItemNoise(self.seed, image_key, pose_key) for pose_key in self.pose_keys]


def steps_seed(generator: torch.Generator, *, drawn_from: bool) -> int:
    """The seed of `ItemNoise` that a run's generator gives, for the steps of schedulers that add noise.

    A generator that what pictures begin as is drawn from (`drawn_from`) stays as it is: the published order of draws.
    """
    if drawn_from:
        generator = torch.Generator(generator.device).set_state(generator.get_state())
    return int(torch.randint(2**62, (), generator=generator, device=generator.device))
