"""The two frozen networks of IPG, from scratch: an identity encoder and a VAE, trained on images.

`training` needs both. The published ones are for full size; these functions make small ones in minutes, among them
those of the tiny weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id.io.checks import checked_count, checked_device, checked_flag, checked_labels, checked_number, checked_size
from pose2id.io.images import checked_images
from pose2id.io.rows import blocks
from pose2id.ipg.identity import TransReID
from pose2id.ipg.pixels import load_reference, resized
from pose2id.training.augmentation import augment

_WARM_UP = 0.05  # share of the steps in which the learning rate rises; it falls with the cosine afterwards
_CLIPPED = 1.0  # norm of the gradient
_LABEL_SMOOTHING = 0.1
_KL_WEIGHT = 1e-4  # of a latent's mean divergence from the standard normal, against the mean absolute error of pixels
_ENCODED = 64  # images that latents are measured on at a time


def train_identity_encoder(
    images: Any,
    pids: Any,
    *,
    config: Mapping[str, Any] | None = None,
    steps: int = 6000,
    people_per_batch: int = 16,
    images_per_person: int = 4,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> TransReID:
    """Train a `TransReID` on labelled images: cross-entropy behind a batch norm, and the batch-hard triplet loss.

    The recipe of "Bag of Tricks and a Strong Baseline for Deep Person Re-identification" (CVPRW 2019), with the soft
    margin of "In Defense of the Triplet Loss" (arXiv 1703.07737).

    Args:
        images: N images, as `IdentityGenerator.generate` takes them. All are held in memory, at the encoder's size.
        pids: (N,) integers, who is on them; people with one image are left out.
        config: arguments of `TransReID`; None: its defaults, which are the published ones.
        steps: batches.
        people_per_batch: at least 2.
        images_per_person: in a batch, at least 2, drawn with replacement where there are fewer.
        learning_rate: of AdamW at its highest; it warms up over a twentieth of the steps and falls with a cosine.
        weight_decay: of AdamW.
        seed: of weights, batches and augmentations (flip, shift, random erasing).
        device: where to train.
        progress: show a bar on a terminal.

    Returns:
        The encoder, in eval mode on `device`, without its classifier.
    """
    count = checked_count(people_per_batch, "people_per_batch", least=2)
    each = checked_count(images_per_person, "images_per_person", least=2)
    steps, seed = checked_count(steps, "steps"), checked_count(seed, "seed", least=0)
    learning_rate = checked_number(learning_rate, "learning_rate", 0, 1)
    checked_flag(progress, "progress")
    weight_decay = checked_number(weight_decay, "weight_decay", 0, 1)
    target = checked_device(device)
    items = checked_images(images, "images")
    labels = checked_labels(pids, "pids", len(items))
    people = [np.flatnonzero(labels == pid) for pid in np.unique(labels)]
    people = [members for members in people if len(members) > 1]
    if len(people) < count:
        raise ValueError(
            f"pids must hold at least people_per_batch={count} people with two images or more, got {len(people)}."
        )
    with _seeded(seed):
        encoder = TransReID(**(config or {}))
        head = _Head(encoder.feature_dim, len(people))
        for name, parameter in encoder.named_parameters():
            if name in ("base.pos_embed", "base.cls_token"):
                nn.init.trunc_normal_(parameter, std=0.02)
    model = nn.ModuleDict({"encoder": encoder, "head": head}).to(target)
    loaded = _loaded(items, encoder.image_size)
    draws = np.random.default_rng([seed, 1])

    def loss() -> Tensor:
        chosen = draws.choice(len(people), count, replace=False)
        picked = [draws.choice(people[who], each, replace=len(people[who]) < each) for who in chosen]
        batch = [augment(loaded[i], draws, shift=True) for i in np.concatenate(picked)]
        who = torch.from_numpy(np.repeat(chosen, each)).to(target)
        features = encoder(_centred(np.stack(batch), target))
        result: Tensor = F.cross_entropy(head(features), who, label_smoothing=_LABEL_SMOOTHING)
        return result + _batch_hard_triplet(features, who)

    _optimize(model, loss, steps, learning_rate, weight_decay, progress)
    return encoder.eval().requires_grad_(False)


def train_vae(
    images: Any,
    *,
    image_size: tuple[int, int] = (128, 64),
    config: Mapping[str, Any] | None = None,
    steps: int = 3000,
    batch_size: int = 16,
    learning_rate: float = 1e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> AutoencoderKL:
    """Train a small VAE on images: mean absolute error of pixels, and a weak pull of latents to the standard normal.

    Args:
        images: N images, as `IdentityGenerator.generate` takes them. All are held in memory, at `image_size`.
        image_size: (height, width) in pixels, in multiples of the VAE's downscaling.
        config: arguments of `diffusers.AutoencoderKL`. The default block types are plain ones, one for each of
            `block_out_channels`. `scaling_factor` becomes one over the standard deviation of the images' latents.
        steps: batches.
        batch_size: images in a batch.
        learning_rate: of AdamW at its highest, as in `train_identity_encoder`.
        seed: of weights, batches, flips and latents.
        device: where to train.
        progress: show a bar on a terminal.

    Returns:
        The VAE, in eval mode on `device`.
    """
    size, steps = checked_size(image_size, "image_size"), checked_count(steps, "steps")
    batch_size, seed = checked_count(batch_size, "batch_size"), checked_count(seed, "seed", least=0)
    learning_rate = checked_number(learning_rate, "learning_rate", 0, 1)
    checked_flag(progress, "progress")
    target = checked_device(device)
    given = dict(config or {})
    levels = len(given.get("block_out_channels", (64,)))
    blocks_of = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    with _seeded(seed):
        # A scaling factor is named, or diffusers would load its default in place of the one that is set below.
        vae = AutoencoderKL(**{"scaling_factor": 1.0, **blocks_of, **given}).to(target)
    downscale = 2 ** (len(vae.config.block_out_channels) - 1)
    if size[0] % downscale or size[1] % downscale:
        raise ValueError(f"image_size must be in multiples of {downscale}, the VAE's downscaling, got {size}.")
    loaded = _loaded(checked_images(images, "images"), size)
    draws, noise = np.random.default_rng([seed, 2]), torch.Generator().manual_seed(seed)

    def loss() -> Tensor:
        batch = _centred(loaded[draws.integers(len(loaded), size=batch_size)], target)
        batch = batch.flip(3) if draws.random() < 0.5 else batch
        latents = vae.encode(batch).latent_dist
        drawn = torch.randn(latents.mean.shape, generator=noise).to(target)
        rebuilt = vae.decode(latents.mean + latents.std * drawn).sample
        divergence: Tensor = latents.kl().mean() / latents.mean[0].numel()
        return F.l1_loss(rebuilt, batch) + _KL_WEIGHT * divergence

    _optimize(vae, loss, steps, learning_rate, 0.0, progress)
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        means = [vae.encode(_centred(loaded[some], target)).latent_dist.mean for some in blocks(len(loaded), _ENCODED)]
    vae.register_to_config(scaling_factor=1 / float(torch.cat(means).std()))
    return vae


class _Head(nn.Module):
    """A batch norm without shift, and a linear classifier without bias."""

    def __init__(self, dim: int, people: int) -> None:
        super().__init__()
        self.neck = nn.BatchNorm1d(dim)
        self.neck.bias.requires_grad_(False)
        self.classifier = nn.Linear(dim, people, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        result: Tensor = self.classifier(self.neck(features))
        return result


def _batch_hard_triplet(features: Tensor, who: Tensor) -> Tensor:
    """Mean softplus of (distance to the farthest of the same person - distance to the nearest of another one)."""
    distances = (features[:, None] - features[None]).square().sum(2).clamp_min(1e-12).sqrt()
    same = who[:, None] == who[None]
    farthest = distances.masked_fill(~same, 0).amax(1)
    nearest = distances.masked_fill(same, math.inf).amin(1)
    return F.softplus(farthest - nearest).mean()


def _loaded(items: Sequence[Any], size: tuple[int, int]) -> NDArray[np.uint8]:
    """(N, H, W, 3)."""
    images = np.empty((len(items), *size, 3), dtype=np.uint8)
    for i in range(len(items)):
        images[i] = np.asarray(resized(load_reference(items[i], f"images[{i}]"), size))
    return images


def _centred(images: NDArray[np.uint8], device: torch.device) -> Tensor:
    """(B, 3, H, W) float in [-1, 1] of (B, H, W, 3)."""
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float() / 127.5 - 1


def _optimize(
    model: nn.Module, loss: Any, steps: int, learning_rate: float, weight_decay: float, progress: bool
) -> None:
    """AdamW with a warm-up and a cosine; `loss` draws a batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay)
    warm_up = max(1, int(_WARM_UP * steps))
    model.train()
    with tqdm(range(steps), unit="step", disable=None if progress else True) as bar:
        for step in bar:
            share = min((step + 1) / warm_up, 0.5 * (1 + math.cos(math.pi * step / steps)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * share
            optimizer.zero_grad()
            value = loss()
            value.backward()
            nn.utils.clip_grad_norm_(trained, _CLIPPED)
            optimizer.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{value.item():.4f}")


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Torch's generator of the CPU seeded, and modules made there, whatever the default device is."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)
        yield
