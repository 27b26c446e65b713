"""`IdentityGenerator`: pictures of the person on a reference image, in given poses.

The parts meet here, in the order of the paper's figure: identity encoder and tokens, VAE and reference UNet, pose
encoder, denoising UNet and scheduler, VAE. Tensors of images are RGB floats (B, 3, H, W) in [0, 1] at every door. They
may come from any device; what comes back is on the generator's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from operator import attrgetter
from typing import Any, Protocol

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id.io.checks import checked_choice, checked_count, checked_device, checked_number, checked_size
from pose2id.io.images import checked_images
from pose2id.io.rows import blocks
from pose2id.ipg import reference, sampler, weights
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.noise import Noise
from pose2id.ipg.pixels import load_poses, load_reference, pixels, to_pictures, to_tensor
from pose2id.ipg.pose_encoder import PoseEncoder

logger = logging.getLogger(__name__)

PARTS = tuple(weights.PARTS)
OUTPUTS = ("pil", "tensor")
_VAE_BATCH = 4  # pictures that the VAE takes at once: enough to fill a GPU, and what it needs stays small
_CPU_BATCH, _CUDA_BATCH = 8, 32  # pictures: rows to fill the small levels of a GPU (assumed); a CPU needs none


class IdentityEncoder(Protocol):
    """A ReID model as IPG needs it: a torch module from images to one feature each.

    It gets RGB float images (B, 3, *image_size) in [-1, 1]; an image of zeros is the unconditional identity.
    """

    image_size: tuple[int, int]

    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, feature_dim) of the identity tokens."""


class IdentityGenerator:
    """Identity-guided pedestrian generation, IPG (Pose2ID, section 3.2), from built parts; nothing here is trained.

    Not for several threads at once: they would share one scheduler's timesteps. Parts are adapted in place: put into
    eval mode, the UNets given their attention processors, the reference UNet relieved of its output head. State dicts
    keep the names of stock UNets.

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
        license: of the UNets, as the Hub names it ("mit", "other"); `save_pretrained` writes it. Default: that of all
            weights which were derived from Stable Diffusion v1.5, the published ones among them. May be assigned.

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
        license: str = weights.OPENRAIL,  # noqa: A002 - what the Hub calls it
    ) -> None:
        self.identity_encoder = identity_encoder
        self.identity_tokens = identity_tokens
        self.reference_unet = reference_unet
        self.denoising_unet = denoising_unet
        self.pose_encoder = pose_encoder
        self.vae = vae
        self.scheduler = scheduler
        self.image_size = checked_size(image_size, "image_size")
        self.round_bank = round_bank
        self.sources = dict(sources or {})
        self.license = weights.checked_license(license)
        self._unconditional: tuple[list[Any], Tensor] | None = None
        self._offload_device: torch.device | None = None
        checked_size(identity_encoder.image_size, "identity_encoder.image_size")
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
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compile: bool = False,  # noqa: A002 - what torch and the field call it
        identity_encoder: Any = None,
        identity_tokens: IdentityTokens | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> IdentityGenerator:
        """Load weights from a directory or the Hugging Face Hub, in the published layout or that of `save_pretrained`.

        The published layout is denoising_unet.pth, reference_unet.pth, IFR.pth, pose_guider.pth and transformer_20.pth;
        no code in them is ever run. Parts are read one after the other, straight to `dtype` on `device`.

        Args:
            repo_or_dir: a directory, or a repository such as "yuanc3/Pose2ID", or "tiny": small weights that come with
                the package, for tests and demos on drawn people ("./tiny" is a directory of that name).
            revision: branch, tag or commit of that repository. `sources` of the result has the commit.
            vae: directory or repository of the VAE, for weights that bring none (the published ones);
                "user/name@commit" pins it. Any other than the default replaces the one that weights bring.
            dtype: torch.float32, float16, bfloat16 or float64, of all parts. None: float16 on CUDA, else float32.
            device: None: "cuda" where there is one, else "cpu". "mps" is not tested.
            compile: see `compile`.
            identity_encoder: an encoder of your own (`IdentityEncoder`) in place of the weights', only together with
                `identity_tokens`. Both are moved to `device` and `dtype`.
            identity_tokens: the tokens that were trained with that encoder, and with these UNets.
            cache_dir: where the Hub's client keeps its files; None: its default.
            local_files_only: take only what is in the cache.
            token: for the Hub; None: the one that the client is logged in with, if any; False: none.

        Raises:
            FileNotFoundError: no such directory, repository, revision or file; or not in the cache, and no connection.
            ConnectionError: a download that broke off; trying again goes on with it.
            TypeError: a dtype that is none.
            ValueError: a device that isn't there; an encoder without tokens; a file that holds something else: per
                part, the missing, unexpected and mis-shaped keys.
        """
        target = _present_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        dtype = _default_dtype(target) if dtype is None else weights.checked_dtype(dtype)
        own = {
            name: part
            for name, part in (("identity_encoder", identity_encoder), ("identity_tokens", identity_tokens))
            if part is not None
        }
        if len(own) == 1:
            raise ValueError(
                "identity_encoder and identity_tokens must be given together: tokens are a linear layer trained on the "
                f"features of one encoder, and features of another mean nothing to it. Got {next(iter(own))} alone."
            )
        source = weights.open_weights(
            repo_or_dir,
            revision=revision,
            vae=vae,
            without=tuple(own),
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        parts: dict[str, Any] = {
            name: nn.Module.to(own[name], device=target, dtype=dtype)
            if name in own
            else source.load(name, dtype=dtype, device=target)
            for name in PARTS
        }
        loaded = cls(
            **parts,
            scheduler=source.scheduler(),
            **source.settings,
            sources=source.sources,
            license=source.license,
        )
        loaded._lay_out()
        if compile:
            loaded.compile()
        return loaded

    def save_pretrained(self, directory: str | os.PathLike[str], *, notes: str = "") -> None:
        """Write one safetensors file per part, one JSON of configurations and a model card with the licence note.

        Args:
            directory: new, or empty. Nothing is left in it when writing fails.
            notes: Markdown that ends the model card.

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
            license=self.license,
            notes=notes,
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
        """Where pictures are computed; with offload, not where the parts rest."""
        device: torch.device = self.denoising_unet.device
        return device if self._offload_device is None else self._offload_device

    @property
    def dtype(self) -> torch.dtype:
        """What the denoising UNet computes in."""
        dtype: torch.dtype = self.denoising_unet.dtype
        return dtype

    def replaced(self, **changes: Any) -> IdentityGenerator:
        """A new generator of the same parts and settings but for these; parts that stay are shared, not copied.

        Args:
            **changes: arguments of `IdentityGenerator`, by name. With another UNet, `license` has its default again.

        Raises:
            TypeError, ValueError: as `IdentityGenerator`.
        """
        own: dict[str, Any] = {
            "scheduler": self.scheduler,
            "image_size": self.image_size,
            "round_bank": self.round_bank,
            "sources": self.sources,
        }
        if not changes.keys() & {"reference_unet", "denoising_unet"}:
            own["license"] = self.license
        replaced = IdentityGenerator(**{**self.parts, **own, **changes})
        replaced._offload_device = self._offload_device
        return replaced

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IdentityGenerator:
        """Move all parts, and return the generator. A device ends `enable_model_cpu_offload`.

        Raises:
            TypeError, ValueError: a dtype that is none; a device that isn't there.
        """
        device = None if device is None else _present_device(device)
        dtype = None if dtype is None else weights.checked_dtype(dtype)
        if device is not None:
            self._offload_device = None
        for part in self.parts.values():
            # Not diffusers' own `to`: it warns of float32 modules, in a list that is empty.
            nn.Module.to(part, device=device, dtype=dtype)
        self._lay_out()
        return self

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the parts on the CPU, and bring each to `device` for as long as it is used.

        For small GPUs: of the published weights in half precision it holds 1.7 GB at a time instead of 3.9 GB. Load
        with `device="cpu", dtype=torch.float16` where even loading must not fill it. `to("cuda")` ends it.

        Raises:
            ValueError: a device that isn't there.
        """
        target = _present_device(device)
        if target.type == "cuda" and target.index is None:
            target = torch.device("cuda", torch.cuda.current_device())
        self.to("cpu")
        self._offload_device = target
        self._lay_out()

    def compile(self, **options: Any) -> None:
        """Compile the denoising UNet and the VAE's decoder in place, with `torch.compile` and its options.

        The first batches take much longer, those of another shape too: it pays for thousands of pictures. Names in
        state dicts stay as they are.
        """
        self.denoising_unet.compile(**options)
        self.vae.decoder.compile(**options)

    def generate(
        self,
        images: Sequence[Any],
        poses: Any = "standard",
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        batch_size: int | str = "auto",
        size: tuple[int, int] | None = (256, 128),
        output: str = "pil",
        progress: bool = True,
    ) -> Any:
        """Every person in every pose.

        By default the noise that a picture begins as is a function of the seed, the reference's pixels and the pose
        alone: not of batches, order, process or device. No seed gives the paper's (42) or the published code's (12580)
        pictures: they come from one generator that draws for a whole run. `generator` and `latents` serve those who
        have its order.

        Args:
            images: N reference images: paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) floats in [0, 1],
                of any size from 8 x 8 pixels. Pictures in any 8-bit mode become RGB: grey (infrared) gets equal
                channels, transparency is ignored, EXIF rotation is applied.
            poses: "standard" for the 8 standard poses, or M `pose2id.poses.Pose`, or drawings: images of the OpenPose
                palette in RGB order on black.
            num_inference_steps: of the scheduler.
            guidance_scale: from 0 to 1000; 1 leaves guidance out.
            seed: at least 0.
            generator: draws the noise in place of the seed, on its device, as (M, 4, h, w) per image in the images'
                order: with the published seed on CUDA, and the published order of images, the published noise.
            latents: (N, M, 4, h, w) float noise in place of drawn noise. `seed` or `generator` then serve only
                schedulers that add noise in their steps.
            batch_size: pictures per forward. "auto": 32 on CUDA, fewer where its free memory is small; else 8. When
                CUDA runs out of memory it is halved, once.
            size: (height, width) of the results, resized as the published code does (bicubic); None: as generated.
            output: "pil" or "tensor".
            progress: show a bar on a terminal.

        Returns:
            N lists of M RGB pictures; for "tensor" the same pixels, (N, M, 3, height, width) float32 in [0, 1], on the
            CPU.

        Raises:
            TypeError, ValueError: bad input, named, before anything is generated; pictures that are not finite, which
                half precision can cause.
            torch.cuda.OutOfMemoryError: half the batch is too large as well.
        """
        results = self.generate_iter(
            images,
            poses,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            seed=seed,
            generator=generator,
            latents=latents,
            batch_size=batch_size,
            size=size,
            output=output,
            progress=progress,
        )
        return torch.stack(list(results)) if output == "tensor" else list(results)

    def generate_iter(
        self,
        images: Sequence[Any],
        poses: Any = "standard",
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        batch_size: int | str = "auto",
        size: tuple[int, int] | None = (256, 128),
        output: str = "pil",
        progress: bool = True,
    ) -> Iterator[Any]:
        """`generate` as a stream: one list of M pictures, or one (M, 3, height, width) tensor, for each image in order.

        What it holds does not grow with the number of images. Arguments and images are checked by the call, before the
        first picture is asked for: every image is read once for that.
        """
        images = checked_images(images, "images")
        drawn = load_poses(poses)
        settings = self.checked_settings(num_inference_steps, guidance_scale, seed, size)
        checked_choice(output, "output", OUTPUTS)
        if generator is not None and not isinstance(generator, torch.Generator):
            raise TypeError(
                f"generator must be a torch.Generator, got {type(generator).__name__}. For a seed pass seed=, or for "
                "torch's order of noise torch.Generator().manual_seed(seed)."
            )
        if latents is not None:
            _check_shape(latents, "latents", (len(images), len(drawn), *self.latent_shape))
            if not torch.isfinite(latents).all():
                raise ValueError("latents must be finite, got NaN or infinity.")
        batch_size = self.resolve_batch_size(batch_size)
        for i in range(len(images)):
            load_reference(images[i], f"images[{i}]")

        noise = Noise(self.latent_shape, [key for key, _ in drawn], settings.pop("seed"), generator, latents)
        size = settings.pop("size")
        drawings = [picture for _, picture in drawn]
        generated = self._stream(images, drawings, noise, batch_size, progress, settings)
        pictures = (to_pictures(in_poses, size, f"pictures of images[{i}]") for i, in_poses in enumerate(generated))
        return pictures if output == "pil" else map(to_tensor, pictures)

    def _stream(
        self,
        images: Sequence[Any],
        drawings: Sequence[Image.Image],
        noise: Noise,
        batch_size: int,
        progress: bool,
        sampling: Mapping[str, Any],
    ) -> Iterator[Tensor]:
        """(M, 3, *image_size) for each image; as many images at a time as make a batch."""
        pose_features = self.encode_poses(self._read(drawings, self.image_size))
        at_once, halved = max(1, batch_size // len(drawings)), False
        with tqdm(total=len(images) * len(drawings), unit="img", disable=None if progress else True) as bar:
            for low in range(0, len(images), at_once):
                index = range(low, min(low + at_once, len(images)))
                pictures = [load_reference(images[i], f"images[{i}]") for i in index]
                batch = (
                    self._read(pictures, self.identity_encoder.image_size),
                    self._read(pictures, self.image_size),
                    pose_features,
                    torch.stack(
                        [noise.initial(i, picture, self.device) for i, picture in zip(index, pictures, strict=True)]
                    ),
                )
                generated = None
                while generated is None:
                    options = {**sampling, "generator": noise.of_steps(pictures), "batch_size": batch_size}
                    try:
                        generated = self.sample(*batch, **options)
                    except torch.cuda.OutOfMemoryError as error:
                        if halved or batch_size == 1:
                            raise torch.cuda.OutOfMemoryError(
                                f"{self.device} has too little memory for batch_size={batch_size}. Pass a smaller one, "
                                "use weights in half precision, or enable_model_cpu_offload()."
                            ) from error
                        batch_size, halved = batch_size // 2, True
                        logger.warning("%s ran out of memory; going on with batch_size=%d", self.device, batch_size)
                for in_poses in generated:
                    yield in_poses
                    bar.update(len(drawings))

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
        generator: torch.Generator | Sequence[Sequence[torch.Generator]] | None = None,
        batch_size: int | None = None,
    ) -> Tensor:
        """R references in P poses: everything that `generate` computes for them.

        Args:
            identity_images: (R, 3, *identity_encoder.image_size).
            references: (R, 3, *image_size), the same pictures.
            pose_features: (P, C, h, w), made by `encode_poses`.
            latents: (R, P, 4, h, w) float noise.
            num_inference_steps: of the scheduler.
            guidance_scale: see `generate`.
            generator: for schedulers that add noise in their steps: one for all, or R lists of one for each pose.
            batch_size: pictures per forward; None: all.

        Returns:
            (R, P, 3, *image_size) in [0, 1].

        Raises:
            TypeError, ValueError: shapes or numbers that do not fit.
        """
        _check_shape(identity_images, "identity_images", (len(references), 3, *self.identity_encoder.image_size))
        _check_shape(references, "references", (len(references), 3, *self.image_size))
        _check_shape(latents, "latents", (len(references), len(pose_features), *self.latent_shape))
        self._check_sampling(num_inference_steps, guidance_scale)
        unconditional = self.unconditional_tokens() if sampler.guided(guidance_scale) else None
        # Steps add up in at least single precision: a half holds too few digits for the sum of many small changes.
        noise = latents.to(self.device, torch.promote_types(self.dtype, torch.float32))
        pose_features = pose_features.to(self.device)
        pictures = (
            len(references) * len(pose_features) if batch_size is None else checked_count(batch_size, "batch_size")
        )
        results = []
        for some in blocks(len(references), pictures // len(pose_features)):
            tokens = self.encode_identity(identity_images[some])
            latents_seen = self.encode_images(references[some])
            with self._at_work("reference_unet"):
                round_to = torch.float16 if self.round_bank and self.dtype == torch.float32 else None
                bank = reference.write(self.reference_unet, latents_seen, tokens, round_to=round_to)
            in_poses = []
            for these in blocks(len(pose_features), pictures):
                with self._at_work("denoising_unet"):
                    condition = reference.project(
                        self.denoising_unet, bank, tokens, poses=len(pose_features[these]), unconditional=unconditional
                    )
                    denoised = sampler.denoise(
                        self.denoising_unet,
                        self.scheduler,
                        noise[some, these],
                        pose_features[these],
                        condition,
                        num_inference_steps=num_inference_steps,
                        guidance_scale=guidance_scale,
                        generator=_of_block(generator, some, these),
                    )
                in_poses.append(self.decode(denoised.flatten(0, 1)).unflatten(0, denoised.shape[:2]))
            results.append(torch.cat(in_poses, dim=1))
        return torch.cat(results)

    @torch.no_grad()
    def encode_identity(self, images: Tensor) -> Tensor:
        """Identity tokens (B, N, D) of images (B, 3, *identity_encoder.image_size) in [0, 1]."""
        return self._tokens((images * 2 - 1).to(self.device, self.dtype))

    @torch.no_grad()
    def unconditional_tokens(self) -> Tensor:
        """(1, N, D): the tokens of nobody, those of a mid-grey image. A constant of the weights, computed once."""
        kind = self.device.type
        made_from: list[Any] = [
            self.device,
            self.dtype,
            torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind),
        ]
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
        scaled = (images * 2 - 1).to(self.device, self.vae.dtype)
        with self._at_work("vae"):
            means: list[Tensor] = [self.vae.encode(part).latent_dist.mean for part in scaled.split(_VAE_BATCH)]
        latents: Tensor = torch.cat(means) * self.vae.config.scaling_factor
        return latents.to(self.dtype)

    @torch.no_grad()
    def encode_poses(self, images: Tensor) -> Tensor:
        """Pose features (P, C, h, w) of drawn poses (P, 3, H, W) in [0, 1]; one set serves any number of references."""
        _check_shape(images, "images", (len(images), 3, *self.image_size))
        with self._at_work("pose_encoder"):
            features: list[Tensor] = [
                self.pose_encoder(part.to(self.device, self.dtype)) for part in images.split(_VAE_BATCH)
            ]
        return torch.cat(features)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], of at least single precision, of scaled latents (B, 4, h, w)."""
        scaled = (latents / self.vae.config.scaling_factor).to(self.device, self.vae.dtype)
        wide = torch.promote_types(self.vae.dtype, torch.float32)
        with self._at_work("vae"):
            # Into new memory at once: a compiled decoder may write its next output over the last one.
            images = torch.cat(
                [self.vae.decode(part, return_dict=False)[0].to(wide) / 2 + 0.5 for part in scaled.split(_VAE_BATCH)]
            )
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
        with self._at_work("identity_encoder", "identity_tokens"):
            features = self.identity_encoder(images)
            if features.shape != (len(images), self.identity_tokens.feature_dim):
                raise ValueError(
                    f"identity_encoder must give features of shape {(len(images), self.identity_tokens.feature_dim)}, "
                    f"which identity_tokens were trained on, got {tuple(features.shape)}."
                )
            tokens: Tensor = self.identity_tokens(features)
        return tokens

    def resolve_batch_size(self, batch_size: int | str) -> int:
        """Pictures per forward, for the free memory of the device if `batch_size` is "auto"."""
        if batch_size != "auto":
            return checked_count(batch_size, "batch_size")
        if self.device.type != "cuda":
            return _CPU_BATCH
        free, _ = torch.cuda.mem_get_info(self.device)
        free += torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        if self._offload_device is not None:  # the weights at work are not there yet
            free -= max(sum(tensor.nbytes for tensor in part.parameters()) for part in self.parts.values())
        scale = self.image_size[0] * self.image_size[1] / (512 * 256) * self.dtype.itemsize / 2
        # Counted at full size in half precision (benchmarks/generation.py --count-memory): 76 MiB for a picture's two
        # rows of a step and its share of its reference. 1000 for what is not counted, or not at that moment.
        return max(1, min(_CUDA_BATCH, int((0.9 * free / scale / 2**20 - 1000) / 80)))

    def checked_settings(
        self,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        size: tuple[int, int] | None = (256, 128),
    ) -> dict[str, Any]:
        """What `generate` makes of these arguments: plain numbers, by name; or an error that names one."""
        self._check_sampling(num_inference_steps, guidance_scale)
        return {
            "num_inference_steps": int(num_inference_steps),
            "guidance_scale": float(guidance_scale),
            "seed": checked_count(seed, "seed", least=0),
            "size": None if size is None else checked_size(size, "size"),
        }

    def _check_sampling(self, num_inference_steps: Any, guidance_scale: Any) -> None:
        checked_count(num_inference_steps, "num_inference_steps", most=self.scheduler.config.num_train_timesteps)
        checked_number(guidance_scale, "guidance_scale", 0, 1000)

    def _read(self, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        # Not in half precision: networks get it after scaling to their range, which would round once more.
        wide = torch.promote_types(self.dtype, torch.float32)
        return torch.stack([pixels(picture, size) for picture in pictures]).to(self.device, wide)

    @contextmanager
    def _at_work(self, *names: str) -> Iterator[None]:
        """Parts where they compute: with offload, brought there for as long as it takes."""
        resting = []
        try:
            if self._offload_device is not None:
                for part in map(self.parts.__getitem__, names):
                    for tensor in chain(part.parameters(), part.buffers()):
                        resting.append((tensor, tensor.data))
                        tensor.data = tensor.data.to(self._offload_device)
            yield
        finally:
            # Weights do not change at work: what stayed on the CPU is still right.
            for tensor, data in resting:
                tensor.data = data

    def _lay_out(self) -> None:
        """Convolutions channels last on CUDA, where half precision computes in that order."""
        layout = torch.channels_last if self.device.type == "cuda" else torch.contiguous_format
        for part in self.parts.values():
            nn.Module.to(part, memory_format=layout)  # type: ignore[call-overload]  # torch documents it

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


def _present_device(device: torch.device | str) -> torch.device:
    target = checked_device(device)
    if target.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device must be one that torch sees, got {device!r}, and torch sees no CUDA device here.")
    return target


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _of_block(
    generator: torch.Generator | Sequence[Sequence[torch.Generator]] | None, some: slice, these: slice
) -> torch.Generator | list[torch.Generator] | None:
    """What diffusers takes for a batch of pictures: one generator, or a list with one for each of them."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [of_picture for of_image in generator[some] for of_picture in of_image[these]]
