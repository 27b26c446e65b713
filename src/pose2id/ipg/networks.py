"""The six networks of IPG: how they fit together, where they compute, and what each makes of images.

In the order of the paper's figure: identity encoder and tokens, VAE and reference UNet, pose encoder, denoising UNet,
VAE. Image tensors are RGB floats (B, 3, H, W) in [0, 1]. They may come from any device; results are on the networks'.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor, nn

from pose2id.io.checks import checked_count, checked_device, checked_size
from pose2id.ipg import reference
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.pose_encoder import PoseEncoder
from pose2id.ipg.weights import MOST_PIXELS, checked_dtype

_VAE_BATCH = 4  # images that the VAE takes at once: enough to fill a GPU, and its memory stays small
_CPU_BATCH, _CUDA_BATCH = 8, 32  # images: rows to fill the small levels of a GPU (assumed); a CPU needs none

# Where the networks meet.
_EQUAL_SIZES = (
    ("identity_encoder.feature_dim", "identity_tokens.feature_dim"),
    ("identity_tokens.dim", "denoising_unet.config.cross_attention_dim"),
    ("identity_tokens.dim", "reference_unet.config.cross_attention_dim"),
    ("pose_encoder.out_channels", "denoising_unet.conv_in.out_channels"),
    ("pose_encoder.downscale", "vae_scale_factor"),
    ("vae.config.latent_channels", "denoising_unet.config.in_channels"),
    ("vae.config.latent_channels", "reference_unet.config.in_channels"),
)


class IdentityEncoder(Protocol):
    """A ReID model as IPG needs it: a torch module from images to one feature each.

    It gets RGB float images (B, 3, *image_size) in [-1, 1]; an image of zeros is the unconditional identity.
    """

    image_size: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the identity tokens."""


class Networks(nn.Module):
    """The networks as one module, adapted in place; `IdentityGenerator` has the arguments.

    They are put into eval mode, the UNets get their attention processors, and the reference UNet loses its output head.

    Raises:
        ValueError: networks that do not fit each other, with the sizes, dtypes or devices that differ.
    """

    def __init__(
        self,
        *,
        identity_encoder: Any,
        identity_tokens: IdentityTokens,
        reference_unet: UNet2DConditionModel,
        denoising_unet: UNet2DConditionModel,
        pose_encoder: PoseEncoder,
        vae: AutoencoderKL,
        image_size: tuple[int, int] = (512, 256),
    ) -> None:
        super().__init__()
        self.identity_encoder = identity_encoder
        self.identity_tokens = identity_tokens
        self.reference_unet = reference_unet
        self.denoising_unet = denoising_unet
        self.pose_encoder = pose_encoder
        self.vae = vae
        self.image_size = checked_size(image_size, "image_size", MOST_PIXELS)
        self.offload_device: torch.device | None = None
        checked_size(identity_encoder.image_size, "identity_encoder.image_size")
        _check_unets(reference_unet, denoising_unet)
        self._check_fit()
        self.eval()
        reference.install_writer(reference_unet)
        reference.install_reader(denoising_unet)

    @property
    def device(self) -> torch.device:
        """Where the networks compute; with offload, not where they rest."""
        device: torch.device = self.denoising_unet.device
        return device if self.offload_device is None else self.offload_device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoising UNet computes in."""
        return self.denoising_unet.dtype

    @property
    def wide_dtype(self) -> torch.dtype:
        """At least single precision: of images, noise and sums over steps, whatever the networks compute in."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of an image for one of its latents, on each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image's latents."""
        height, width = (side // self.vae_scale_factor for side in self.image_size)
        return (self.denoising_unet.config.in_channels, height, width)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Networks:  # type: ignore[override]
        """Move all networks. A device ends `enable_model_cpu_offload`.

        Raises:
            TypeError, ValueError: not a torch dtype; a device that is not available.
        """
        dtype = None if dtype is None else checked_dtype(dtype)
        if device is not None:
            device, self.offload_device = present_device(device), None
        super().to(device=device, dtype=dtype)
        self.lay_out()
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the networks on the CPU, and bring each to `device` for as long as it is used.

        For small GPUs: of the published weights in half precision it holds 1.7 GB at a time instead of 3.9 GB. Load
        with `device="cpu", dtype=torch.float16` where even loading must not fill it. `to("cuda")` ends it.

        Raises:
            ValueError: a device that is not available.
        """
        target = present_device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        self.to("cpu")
        self.offload_device = target
        self.lay_out()

    def compile(self, **options: Any) -> None:
        """Compile the denoising UNet and the VAE's decoder in place, with `torch.compile` and its options.

        The first batches take much longer, those of another shape too: it pays for thousands of pictures. Names in
        state dicts stay as they are.
        """
        self.denoising_unet.compile(**options)
        self.vae.decoder.compile(**options)

    def lay_out(self) -> None:
        """Convolutions channels last on CUDA, where half precision computes in that order."""
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        nn.Module.to(self, memory_format=layout)  # type: ignore[call-overload]  # torch documents it

    @contextmanager
    def at_work(self, *names: str) -> Iterator[None]:
        """Networks where they compute: with offload, brought there for as long as it takes."""
        resting = []
        try:
            if self.offload_device is not None:
                for network in map(self.get_submodule, names):
                    for tensor in chain(network.parameters(), network.buffers()):
                        resting.append((tensor, tensor.data))
                        tensor.data = tensor.data.to(self.offload_device)
            yield
        finally:
            # Weights do not change at work: what stayed on the CPU is still right.
            for tensor, data in resting:
                tensor.data = data

    @torch.no_grad()
    def encode_identity(self, images: Tensor) -> Tensor:
        """Identity tokens (B, N, D) of images (B, 3, *identity_encoder.image_size) in [0, 1]."""
        return self._tokens((images * 2 - 1).to(self.device, self.dtype))

    @torch.no_grad()
    def unconditional_tokens(self) -> Tensor:
        """(1, N, D): the unconditional tokens, those of a mid-grey image."""
        size = self.identity_encoder.image_size
        return self._tokens(torch.zeros(1, 3, *size, device=self.device, dtype=self.dtype))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w), the mean of the VAE's distribution, of images (B, 3, H, W) in [0, 1]."""
        scaled = (images * 2 - 1).to(self.device, self.vae.dtype)
        with self.at_work("vae"):
            means: list[Tensor] = [self.vae.encode(some).latent_dist.mean for some in scaled.split(_VAE_BATCH)]
        latents: Tensor = torch.cat(means) * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    @torch.no_grad()
    def encode_poses(self, images: Tensor) -> Tensor:
        """Pose features (P, C, h, w) of drawn poses (P, 3, H, W) in [0, 1]; one set serves any number of references."""
        check_shape(images, "images", (len(images), 3, *self.image_size))
        with self.at_work("pose_encoder"):
            features: list[Tensor] = [
                self.pose_encoder(some.to(self.device, self.dtype)) for some in images.split(_VAE_BATCH)
            ]
        return torch.cat(features)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], of at least single precision, of scaled latents (B, 4, h, w)."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        wide = torch.promote_types(self.vae.dtype, torch.float32)
        with self.at_work("vae"):
            # Into new memory at once: a compiled decoder may write its next output over the last one.
            images = torch.cat(
                [self.vae.decode(some, return_dict=False)[0].to(wide) / 2 + 0.5 for some in scaled.split(_VAE_BATCH)]
            )
        # Infinity must not be clamped to white and go unnoticed: its difference with itself is NaN.
        return images.clamp(0, 1) + (images - images)

    def resolve_batch_size(self, batch_size: int | str) -> int:
        """Images per forward of the denoising UNet; "auto": for the free memory of the device."""
        if batch_size != "auto":
            return checked_count(batch_size, "batch_size")
        if self.device.type != "cuda":
            return _CPU_BATCH
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if self.offload_device is not None:  # the weights at work are not there yet
            free -= max(sum(tensor.nbytes for tensor in network.parameters()) for network in self.children())
        scale = self.image_size[0] * self.image_size[1] / (512 * 256) * self.dtype.itemsize / 2
        # Counted at full size in half precision (benchmarks/generation.py --count-memory): 76 MiB for an image's two
        # rows of a step and its share of its reference. 1000 for what is not counted, or not at that moment.
        return max(1, min(_CUDA_BATCH, int((0.9 * free / scale / 2**20 - 1000) / 80)))

    def _tokens(self, images: Tensor) -> Tensor:
        with self.at_work("identity_encoder", "identity_tokens"):
            features = self.identity_encoder(images)
            expected = (len(images), self.identity_tokens.feature_dim)
            if features.shape != expected:
                given = f"{expected}, as for identity_tokens, got {tuple(features.shape)}"
                raise ValueError(f"identity_encoder must give features of shape {given}.")
            tokens: Tensor = self.identity_tokens(features)
        return tokens

    def _check_fit(self) -> None:
        for first, second in _EQUAL_SIZES:
            network, _, attribute = first.partition(".")
            if "." not in attribute and not hasattr(getattr(self, network), attribute):
                continue  # custom networks may omit it
            given, needed = attrgetter(first)(self), attrgetter(second)(self)
            if given != needed:
                raise ValueError(f"{first} and {second} must be equal, got {given} and {needed}. Take networks of one.")
        if any(side % self.vae_scale_factor for side in self.image_size):
            raise ValueError(f"image_size must be in multiples of {self.vae_scale_factor}, got {self.image_size}.")
        computing = {name: next(network.parameters(), None) for name, network in self.named_children()}
        devices = {name: tensor.device for name, tensor in computing.items() if tensor is not None}
        dtypes = {name: tensor.dtype for name, tensor in computing.items() if tensor is not None and name != "vae"}
        for what, given_by in (("device", devices), ("dtype", dtypes)):
            if len(set(given_by.values())) > 1:
                shown = ", ".join(f"{name} {value}" for name, value in given_by.items())
                raise ValueError(f"networks must be of one {what} (the VAE's dtype may differ), got {shown}.")


def present_device(device: torch.device | str) -> torch.device:
    """A device that is there."""
    target = checked_device(device)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if target.type == "cuda" and (target.index or 0) >= count:
        given = f"{str(device)!r}: it sees {count or 'no'} CUDA device(s)"
        raise ValueError(f"device must be one that torch sees, got {given}.")
    try:
        torch.empty(1, device=target)  # "mps" is not everywhere
    except (AssertionError, RuntimeError) as error:
        raise ValueError(f"device must be one that torch can compute on here, got {str(device)!r}.") from error
    return target


def check_shape(tensor: Any, name: str, shape: tuple[int, ...]) -> None:
    """Raise unless it is a float tensor of this shape."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float tensor of shape {shape}, got {given}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be a float tensor of shape {shape}, got shape {tuple(tensor.shape)}.")


def _check_unets(reference_unet: UNet2DConditionModel, denoising_unet: UNet2DConditionModel) -> None:
    if denoising_unet is reference_unet:
        raise ValueError("reference_unet and denoising_unet must be two modules, got one: their weights differ.")
    if isinstance(reference_unet.conv_in, reference.PosedConv2d):
        raise ValueError("reference_unet must not be the denoising_unet of another generator. Load it once more.")
    if isinstance(denoising_unet.conv_out, nn.Identity):
        raise ValueError("denoising_unet must not be the reference_unet of another generator. Load it once more.")
    if denoising_unet.config.center_input_sample:
        raise ValueError("denoising_unet.config.center_input_sample must be False: it would rescale pose features.")
    writers, readers = (reference.self_attentions(unet) for unet in (reference_unet, denoising_unet))
    if writers != readers:
        differing = sorted({name for name, _ in writers.items() ^ readers.items()})
        given = f"{len(differing)} differ, from {differing[0]} on"
        raise ValueError(f"reference_unet and denoising_unet must have the same self-attentions; {given}.")
