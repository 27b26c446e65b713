"""`IdentityGenerator`: pictures of the person on a reference image, in given poses.

The parts meet here, in the order of the paper's figure: identity encoder and tokens, VAE and reference UNet, pose
encoder, denoising UNet and scheduler, VAE. Tensors of images are RGB floats (B, 3, H, W) in [0, 1] at every door.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, Protocol

import numpy as np
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id._inputs import checked_count, checked_number
from pose2id.extractor import checked_device, checked_images, load_image
from pose2id.ipg import reference, sampler, weights
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.pose_encoder import PoseEncoder

PARTS = tuple(weights.PARTS)
_VAE_BATCH = 8  # pictures that are decoded at once: enough to fill a GPU, and the decoder's peak stays a few GB


class IdentityEncoder(Protocol):
    """A ReID model as IPG needs it: a torch module from images to one feature each.

    It gets RGB float images (B, 3, *image_size) in [-1, 1]; an image of zeros is the unconditional identity.
    """

    image_size: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the identity tokens."""


class IdentityGenerator:
    """Identity-guided pedestrian generation, IPG (Pose2ID, section 3.2), from built parts; nothing here is trained.

    Parts are adapted in place: put into eval mode, the UNets given their attention processors, the reference UNet
    relieved of its output head. State dicts keep the names of stock UNets.

    Args:
        identity_encoder: see `IdentityEncoder`. The tokens were trained with one encoder, and fit no other.
        identity_tokens: the encoder's feature as tokens (B, N, D).
        reference_unet: stock UNet that the reference image passes through.
        denoising_unet: stock UNet of the same self-attentions; pose features are added after its first convolution.
        pose_encoder: drawn poses (P, 3, H, W) to features (P, C, h, w) of that convolution.
        vae: its latents are scaled by `vae.config.scaling_factor`.
        scheduler: any diffusers scheduler that fits the weights' prediction type and noise schedule.
        image_size: (height, width) that pictures are generated at, in pixels.
        round_bank: round what the reference UNet wrote to float16, as the published code does. Without it images of
            float32 parts differ from the published ones by up to 0.04/255 (docs, "How IPG works"). Half precision
            rounds anyway; float64 is never rounded. May be assigned, as may `scheduler`.
        sources: repository to commit, of the weights that came from the Hub.

    Raises:
        TypeError: a scheduler that is none.
        ValueError: parts that do not fit each other, named, with the sizes, dtypes or devices that differ.
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
        scheduler: Any,
        image_size: tuple[int, int] = (512, 256),
        round_bank: bool = True,
        sources: Mapping[str, str] | None = None,
    ) -> None:
        self.identity_encoder = identity_encoder
        self.identity_tokens = identity_tokens
        self.reference_unet = reference_unet
        self.denoising_unet = denoising_unet
        self.pose_encoder = pose_encoder
        self.vae = vae
        self.scheduler = scheduler
        self.image_size = _checked_size(image_size, "image_size")
        self.round_bank = round_bank
        self.sources = dict(sources or {})
        self._unconditional: tuple[list[Any], Tensor] | None = None
        _checked_size(identity_encoder.image_size, "identity_encoder.image_size")
        _check_scheduler(scheduler)
        _check_unets(reference_unet, denoising_unet)
        self._check_parts()
        for part in self.parts.values():
            part.eval()
        reference.install_writer(reference_unet)
        reference.install_reader(denoising_unet)

    @classmethod
    def from_pretrained(
        cls,
        repo_or_dir: str | os.PathLike[str],
        *,
        revision: str = "main",
        vae: str | os.PathLike[str] = weights.VAE_REPO,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> IdentityGenerator:
        """Load weights from a directory or the Hugging Face Hub, in the published layout or that of `save_pretrained`.

        The published layout is denoising_unet.pth, reference_unet.pth, IFR.pth, pose_guider.pth and transformer_20.pth;
        no code in them is ever run. Parts are read one after the other, straight to `dtype` on `device`.

        Args:
            repo_or_dir: a directory, or a repository such as "yuanc3/Pose2ID".
            revision: branch, tag or commit of that repository. `sources` of the result has the commit.
            vae: directory or repository of the VAE, for weights that bring none (the published ones);
                "user/name@commit" pins it. Any other than the default replaces the one that weights bring.
            dtype: torch.float32, float16, bfloat16 or float64, of all parts.
            device: None: "cuda" where there is one, else "cpu".
            cache_dir: where the Hub's client keeps its files; None: its default.
            local_files_only: take only what is in the cache.
            token: for the Hub; None: the one that the client is logged in with, if any; False: none.

        Raises:
            FileNotFoundError: no such directory, repository, revision or file; or not in the cache, and no connection.
            ConnectionError: a download that broke off; trying again goes on with it.
            TypeError: a dtype that is none.
            ValueError: a device that isn't there; a file that holds something else: per part, the missing, unexpected
                and mis-shaped keys.
        """
        weights.checked_dtype(dtype)
        cuda = torch.cuda.is_available()
        target = checked_device(("cuda" if cuda else "cpu") if device is None else device)
        if target.type == "cuda" and not cuda:
            raise ValueError(f"device must be one that torch sees, got {device!r}, and torch sees no CUDA device here.")
        source = weights.open_weights(
            repo_or_dir,
            revision=revision,
            vae=vae,
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        parts: dict[str, Any] = {name: source.load(name, dtype=dtype, device=target) for name in PARTS}
        return cls(**parts, scheduler=source.scheduler(), **source.settings, sources=source.sources)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write one safetensors file per part, one JSON of configurations and a model card with the licence note.

        Args:
            directory: new, or empty. Nothing is left in it when writing fails.

        Raises:
            FileExistsError: the directory holds something.
            TypeError: a part of another class than the published one's, whose configuration the JSON can't hold.
        """
        weights.save(
            directory,
            {name: weights.config_of(name, part) for name, part in self.parts.items()},
            ((name, part.state_dict()) for name, part in self.parts.items()),
            scheduler_config=weights.scheduler_config(self.scheduler),
            settings={"image_size": list(self.image_size), "round_bank": self.round_bank},
            sources=self.sources,
        )

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str = "Upload pose2id weights",
    ) -> str:
        """Upload what `save_pretrained` writes, and return the commit's address.

        Args:
            repo_id: "user/name"; made if it isn't there.
            private: of a new repository; None: the Hub's default.
            token: with write access; None: the one that the client is logged in with.
            commit_message: first line of the commit.
        """
        return weights.push(self.save_pretrained, repo_id, private=private, token=token, commit_message=commit_message)

    def __repr__(self) -> str:
        height, width = self.image_size
        sources = f", {self.sources}" if self.sources else ""
        return f"IdentityGenerator({height} x {width}, {self.dtype} on {self.device}{sources})"

    @property
    def parts(self) -> dict[str, nn.Module]:
        """The torch modules by name; the scheduler is none."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def device(self) -> torch.device:
        """Where the denoising UNet is."""
        device: torch.device = self.denoising_unet.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoising UNet computes in."""
        dtype: torch.dtype = self.denoising_unet.dtype
        return dtype

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IdentityGenerator:
        """Move all parts, and return the generator."""
        device = None if device is None else checked_device(device)
        dtype = None if dtype is None else weights.checked_dtype(dtype)
        for part in self.parts.values():
            # Not diffusers' own `to`: it warns of float32 modules, in a list that is empty.
            nn.Module.to(part, device=device, dtype=dtype)
        return self

    def generate(
        self,
        images: Sequence[Any],
        poses: Sequence[Any],
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        size: tuple[int, int] | None = (256, 128),
        progress: bool = True,
    ) -> list[list[Image.Image]]:
        """Every person in every pose.

        Args:
            images: N reference images: paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) floats in [0, 1].
            poses: M drawn poses of the same kinds: the OpenPose palette in RGB order on black.
            num_inference_steps: of the scheduler.
            guidance_scale: at least 0; 1 leaves guidance out.
            generator: of the noise, drawn on its device as (M, 4, h, w) per image, in the images' order: with the
                published seed on CUDA, and the published order of images, the published noise. None: torch's own.
            latents: (N, M, 4, h, w) float noise in place of drawn noise. `generator` then serves only schedulers that
                add noise in their steps.
            size: (height, width) of the results, resized as the published code does (bicubic); None: as generated.
            progress: show a bar on a terminal.

        Returns:
            N lists of M RGB pictures.

        Raises:
            TypeError, ValueError: bad input, named; pictures that are not finite, which half precision can cause.
        """
        images, poses = checked_images(images, "images"), checked_images(poses, "poses")
        self._check_sampling(num_inference_steps, guidance_scale)
        if size is not None:
            size = _checked_size(size, "size")
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}. For a seed pass "
                "torch.Generator().manual_seed(seed)."
            )
        if latents is not None:
            _check_shape(latents, "latents", (len(images), len(poses), *self.latent_shape))
        drawn = torch.stack([pixels(load_image(pose, f"poses[{i}]"), self.image_size) for i, pose in enumerate(poses)])
        pose_features = self.encode_poses(self._on_device(drawn))
        pictures = []
        for i, image in enumerate(tqdm(images, unit="img", disable=None if progress else True)):
            picture = load_image(image, f"images[{i}]")
            noise = self._noise(len(poses), generator)[None] if latents is None else latents[i : i + 1]
            generated = self.sample(
                self._on_device(pixels(picture, self.identity_encoder.image_size)[None]),
                self._on_device(pixels(picture, self.image_size)[None]),
                pose_features,
                noise,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                generator=generator,
            )
            pictures.append(to_pictures(generated[0], size))
        return pictures

    @torch.no_grad()
    def sample(
        self,
        identity_images: Tensor,
        references: Tensor,
        pose_features: Tensor,
        latents: Tensor,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """R references in P poses: everything that `generate` computes for them.

        Args:
            identity_images: (R, 3, *identity_encoder.image_size).
            references: (R, 3, *image_size), the same pictures.
            pose_features: (P, C, h, w), made by `encode_poses`.
            latents: (R, P, 4, h, w) float noise.
            num_inference_steps: of the scheduler.
            guidance_scale: see `generate`.
            generator: for schedulers that add noise in their steps.

        Returns:
            (R, P, 3, *image_size) in [0, 1].

        Raises:
            TypeError, ValueError: shapes or numbers that do not fit.
        """
        _check_shape(identity_images, "identity_images", (len(references), 3, *self.identity_encoder.image_size))
        _check_shape(references, "references", (len(references), 3, *self.image_size))
        _check_shape(latents, "latents", (len(references), len(pose_features), *self.latent_shape))
        self._check_sampling(num_inference_steps, guidance_scale)
        tokens = self.encode_identity(identity_images)
        bank = reference.write(
            self.reference_unet,
            self.encode_images(references),
            tokens,
            round_to=torch.float16 if self.round_bank and self.dtype == torch.float32 else None,
        )
        condition = reference.project(
            self.denoising_unet,
            bank,
            tokens,
            poses=len(pose_features),
            unconditional=self.unconditional_tokens() if sampler.guided(guidance_scale) else None,
        )
        # Steps add up in at least single precision: a half holds too few digits for the sum of many small changes.
        noise = latents.to(self.device, torch.promote_types(self.dtype, torch.float32))
        denoised = sampler.denoise(
            self.denoising_unet,
            self.scheduler,
            noise,
            pose_features,
            condition,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=generator,
        )
        images = self.decode(denoised.flatten(0, 1))
        return images.view(*noise.shape[:2], *images.shape[1:])

    @torch.no_grad()
    def encode_identity(self, images: Tensor) -> Tensor:
        """Identity tokens (B, N, D) of images (B, 3, *identity_encoder.image_size) in [0, 1]."""
        return self._tokens(images * 2 - 1)

    @torch.no_grad()
    def unconditional_tokens(self) -> Tensor:
        """(1, N, D): the tokens of nobody, those of a mid-grey image. A constant of the weights, computed once."""
        kind = self.device.type
        made_from: list[Any] = [torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)]
        for part in (self.identity_encoder, self.identity_tokens):
            made_from.append(part)
            for tensor in part.state_dict().values():
                version = 0 if tensor.is_inference() else tensor._version
                made_from.append((tensor.data_ptr(), version, tensor.dtype, tensor.device))
        if self._unconditional is None or self._unconditional[0] != made_from:
            grey = torch.zeros(1, 3, *self.identity_encoder.image_size, device=self.device, dtype=self.dtype)
            self._unconditional = made_from, self._tokens(grey)
        return self._unconditional[1]

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w), the mean of the VAE's distribution, of images (B, 3, H, W) in [0, 1]."""
        latents: Tensor = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist.mean
        latents = latents * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    @torch.no_grad()
    def encode_poses(self, images: Tensor) -> Tensor:
        """Pose features (P, C, h, w) of drawn poses (P, 3, H, W) in [0, 1]; one set serves any number of references."""
        _check_shape(images, "images", (len(images), 3, *self.image_size))
        features: Tensor = self.pose_encoder(images)
        return features

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of scaled latents (B, 4, h, w)."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in scaled.split(_VAE_BATCH)])
        images = decoded / 2 + 0.5
        # Infinity must not be clamped to white and go unnoticed: its difference with itself is NaN.
        return images.clamp(0, 1) + (images - images)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one picture's latents."""
        height, width = (side // self.vae_scale_factor for side in self.image_size)
        return (self.denoising_unet.config.in_channels, height, width)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels of a picture for one of its latents, on each side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    def _tokens(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.identity_tokens(self.identity_encoder(images))
        return tokens

    def _noise(self, poses: int, generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        return torch.randn((poses, *self.latent_shape), generator=generator, device=device, dtype=torch.float32)

    def _check_sampling(self, num_inference_steps: Any, guidance_scale: Any) -> None:
        checked_count(num_inference_steps, "num_inference_steps", most=self.scheduler.config.num_train_timesteps)
        checked_number(guidance_scale, "guidance_scale", 0, 1000)

    def _on_device(self, images: Tensor) -> Tensor:
        return images.to(self.device, self.dtype)

    def _check_parts(self) -> None:
        for first, second in _EQUAL_SIZES:
            part, _, attribute = first.partition(".")
            if "." not in attribute and not hasattr(getattr(self, part), attribute):
                continue  # a part of the caller's own needn't tell
            given, needed = attrgetter(first)(self), attrgetter(second)(self)
            if given != needed:
                raise ValueError(
                    f"{first} and {second} must be equal, got {given} and {needed}. Take parts of one model."
                )
        if any(side % self.vae_scale_factor for side in self.image_size):
            raise ValueError(f"image_size must be in multiples of {self.vae_scale_factor}, got {self.image_size}.")
        computing = {name: next(part.parameters(), None) for name, part in self.parts.items()}
        devices = {name: tensor.device for name, tensor in computing.items() if tensor is not None}
        dtypes = {name: tensor.dtype for name, tensor in computing.items() if tensor is not None and name != "vae"}
        for what, given_by in (("device", devices), ("dtype", dtypes)):
            if len(set(given_by.values())) > 1:
                shown = ", ".join(f"{name} {value}" for name, value in given_by.items())
                raise ValueError(f"parts must be of one {what} (the VAE's dtype may differ), got {shown}.")


# Where the parts meet.
_EQUAL_SIZES = (
    ("identity_encoder.feature_dim", "identity_tokens.feature_dim"),
    ("identity_tokens.dim", "denoising_unet.config.cross_attention_dim"),
    ("identity_tokens.dim", "reference_unet.config.cross_attention_dim"),
    ("pose_encoder.out_channels", "denoising_unet.conv_in.out_channels"),
    ("pose_encoder.downscale", "vae_scale_factor"),
    ("vae.config.latent_channels", "denoising_unet.config.in_channels"),
    ("vae.config.latent_channels", "reference_unet.config.in_channels"),
)


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
        raise ValueError(
            "reference_unet and denoising_unet must have the same self-attentions, got two architectures: "
            f"{len(differing)} differ, from {differing[0]} on."
        )


def _checked_size(size: Any, name: str) -> tuple[int, int]:
    if not isinstance(size, Sequence) or len(size) != 2:
        raise ValueError(f"{name} must be (height, width) in pixels, got {size!r}.")
    return (checked_count(size[0], name), checked_count(size[1], name))


def _check_shape(tensor: Any, name: str, shape: tuple[int, ...]) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        given = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"{name} must be a float tensor of shape {shape}, got {given}.")
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be a float tensor of shape {shape}, got shape {tuple(tensor.shape)}.")


def _check_scheduler(scheduler: Any) -> None:
    needed = ("config", "init_noise_sigma", "scale_model_input", "set_timesteps", "step")
    lacking = [name for name in needed if not hasattr(scheduler, name)]
    if lacking:
        raise TypeError(
            f"scheduler must be a diffusers scheduler for noise prediction, such as DDIMScheduler; "
            f"{type(scheduler).__name__} has no {', '.join(lacking)}."
        )


def to_pictures(images: Tensor, size: tuple[int, int] | None) -> list[Image.Image]:
    """RGB pictures of images (B, 3, H, W) in [0, 1], made and resized as the published code does.

    Values are truncated to 8 bits, not rounded; `size` (height, width) is reached with Pillow's bicubic filter.

    Raises:
        ValueError: values that are not finite.
    """
    if not torch.isfinite(images).all():
        raise ValueError(
            "generated pictures must be finite, got NaN or infinity: a half precision overflowed, or a weight is not "
            "finite. Try dtype=torch.bfloat16 or torch.float32."
        )
    arrays = (images.float() * 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    pictures = [Image.fromarray(array) for array in arrays]
    return pictures if size is None else [picture.resize(size[::-1], Image.Resampling.BICUBIC) for picture in pictures]


def pixels(picture: Image.Image, size: tuple[int, int]) -> Tensor:
    """(3, height, width) float32 RGB in [0, 1], resized as the published code does: Lanczos, aspect not kept."""
    resized = picture.convert("RGB").resize(size[::-1], Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1).float() / 255
