"""`IdentityGenerator`: images and poses in, pictures of the same people in these poses out.

Image tensors are RGB floats (B, 3, H, W) in [0, 1]. They may come from any device; results are on the generator's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from pose2id.io.checks import checked_choice, checked_count, checked_flag
from pose2id.io.images import checked_images, content_key
from pose2id.io.rows import blocks
from pose2id.io.threads import use_threads
from pose2id.ipg import reference, weights
from pose2id.ipg.identity import IdentityTokens
from pose2id.ipg.networks import Networks, check_shape, present_device
from pose2id.ipg.noise import Noise, steps_seed
from pose2id.ipg.pixels import References, load_poses, pixels, to_pictures, to_tensor
from pose2id.ipg.pose_encoder import PoseEncoder
from pose2id.ipg.sampler import Sampler, checked_scheduler, denoise, guided
from pose2id.ipg.sampling import Sampling

logger = logging.getLogger(__name__)

OUTPUTS = ("pil", "tensor")


def _of_networks(name: str) -> Any:
    """An attribute of `networks`, read-only: they were checked together."""
    return property(attrgetter(f"networks.{name}"), doc=f"See `Networks.{name}`.")


class IdentityGenerator:
    """Identity-guided pedestrian generation, IPG (Pose2ID, section 3.2), from built networks; nothing here is trained.

    Not for several threads at once: they would share one scheduler's timesteps. Networks are adapted in place (see
    `Networks`); state dicts keep the names of stock UNets.

    Args:
        identity_encoder: see `IdentityEncoder`. The tokens were trained with one encoder, and fit no other.
        identity_tokens: the encoder's feature as tokens (B, N, D).
        reference_unet: stock UNet that the reference image passes through.
        denoising_unet: stock UNet of the same self-attentions; pose features are added after its first convolution.
        pose_encoder: drawn poses (P, 3, H, W) to features (P, C, h, w) of that convolution.
        vae: its latents are scaled by `vae.config.scaling_factor`.
        scheduler: any diffusers scheduler that fits the weights' prediction type and noise schedule.
        sampler: from noise to latents, with the scheduler's steps (`pose2id.ipg.sampler.Sampler`). Default: `denoise`,
            classifier-free guidance in every step.
        image_size: (height, width) that pictures are generated at, in pixels.
        round_bank: round what the reference UNet wrote to float16, as the published code does. Without it images of
            float32 networks differ from the published ones by up to 0.04/255 (docs, "Conventions"). Half precision
            rounds anyway; float64 is never rounded. May be assigned, as may `scheduler` and `sampler`.
        sources: repository to commit, of the weights that came from the Hub.
        license: of the UNets, as the Hub names it ("mit", "other"); `save_pretrained` writes it. Default: that of all
            weights which were derived from Stable Diffusion v1.5, the published ones among them. May be assigned.

    Attributes:
        networks: the six as one torch module.

    Raises:
        TypeError: not a diffusers scheduler.
        ValueError: a scheduler of flows or of sigmas of its own, or from images to noise; networks that do not fit each
            other, named, with the sizes, dtypes or devices that differ.
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
        sampler: Sampler = denoise,
        image_size: tuple[int, int] = (512, 256),
        round_bank: bool = True,
        sources: Mapping[str, str] | None = None,
        license: str = weights.OPENRAIL,  # noqa: A002 - what the Hub calls it
    ) -> None:
        _check_sampler(sampler)
        self.networks = Networks(
            identity_encoder=identity_encoder,
            identity_tokens=identity_tokens,
            reference_unet=reference_unet,
            denoising_unet=denoising_unet,
            pose_encoder=pose_encoder,
            vae=vae,
            image_size=image_size,
        )
        self.scheduler = scheduler
        self.sampler = sampler
        self.round_bank = checked_flag(round_bank, "round_bank")
        self.sources = dict(sources or {})
        self.license = weights.checked_license(license)

    identity_encoder = _of_networks("identity_encoder")
    identity_tokens = _of_networks("identity_tokens")
    reference_unet = _of_networks("reference_unet")
    denoising_unet = _of_networks("denoising_unet")
    pose_encoder = _of_networks("pose_encoder")
    vae = _of_networks("vae")
    image_size: tuple[int, int] = _of_networks("image_size")
    vae_scale_factor: int = _of_networks("vae_scale_factor")
    latent_shape: tuple[int, int, int] = _of_networks("latent_shape")
    device: torch.device = _of_networks("device")
    dtype: torch.dtype = _of_networks("dtype")

    @property
    def scheduler(self) -> Any:
        """A diffusers scheduler; one that is assigned is checked as the constructor's."""
        return self._scheduler

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self._scheduler = checked_scheduler(scheduler)

    def encode_identity(self, images: Tensor) -> Tensor:
        """Identity tokens (B, N, D) of images (B, 3, *identity_encoder.image_size) in [0, 1]."""
        return self.networks.encode_identity(images)

    def unconditional_tokens(self) -> Tensor:
        """(1, N, D): the tokens of a mid-grey image."""
        return self.networks.unconditional_tokens()

    def encode_images(self, images: Tensor) -> Tensor:
        """Scaled latents (B, 4, h, w) of images (B, 3, H, W) in [0, 1]."""
        return self.networks.encode_images(images)

    def encode_poses(self, images: Tensor) -> Tensor:
        """Pose features (P, C, h, w) of drawn poses (P, 3, H, W) in [0, 1]."""
        return self.networks.encode_poses(images)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of scaled latents (B, 4, h, w)."""
        return self.networks.decode(latents)

    def enable_model_cpu_offload(self, device: torch.device | str = "cuda") -> None:
        """Keep the networks on the CPU, each on `device` while it computes: see `Networks`."""
        self.networks.enable_model_cpu_offload(device)

    def compile(self, **options: Any) -> None:
        """Compile the denoising UNet and the VAE's decoder with `torch.compile` and its options."""
        self.networks.compile(**options)

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
        sampler: Sampler = denoise,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> IdentityGenerator:
        """Load weights from a directory or the Hugging Face Hub, in the published layout or that of `save_pretrained`.

        The published layout is denoising_unet.pth, reference_unet.pth, IFR.pth, pose_guider.pth and transformer_20.pth;
        no code in them is ever run. Networks are read one after the other, straight to `dtype` on `device`.

        Args:
            repo_or_dir: a directory, or a repository such as "yuanc3/Pose2ID", or "tiny": small weights that come with
                the package, for tests and demos on drawn people ("./tiny" is a directory of that name).
            revision: branch, tag or commit of that repository. `sources` of the result has the commit.
            vae: directory or repository of the VAE, for weights that bring none (the published ones);
                "user/name@commit" pins it. Any other than the default replaces the one that weights bring.
            dtype: torch.float32, float16, bfloat16 or float64, of all networks. None: float16 on CUDA, else float32.
            device: None: "cuda" where there is one, else "cpu". "mps" is not tested.
            compile: see `compile`.
            identity_encoder: an encoder of your own (`IdentityEncoder`) in place of the weights', only together with
                `identity_tokens`. Both are moved to `device` and `dtype`.
            identity_tokens: the tokens that were trained with that encoder, and with these UNets.
            sampler: as of the class.
            cache_dir: where the Hub's client keeps its files; None: its default.
            local_files_only: take only what is in the cache.
            token: for the Hub; None: the one that the client is logged in with, if any; False: none.

        Raises:
            FileNotFoundError: no such directory, repository, revision or file; or not in the cache, and no connection.
            ConnectionError: a download that broke off; trying again goes on with it.
            TypeError: not a torch dtype.
            ValueError: a device that is not available; an encoder without tokens; damaged files; missing, unexpected or
                mis-shaped keys, per network.
        """
        checked_flag(compile, "compile")
        _check_sampler(sampler)
        target = present_device(("cuda" if torch.cuda.is_available() else "cpu") if device is None else device)
        if target.type == "meta":  # where networks can go, to be counted
            raise ValueError("device must be one that torch can compute on here, got 'meta'.")
        dtype = _default_dtype(target) if dtype is None else weights.checked_dtype(dtype)
        own = {"identity_encoder": identity_encoder, "identity_tokens": identity_tokens}
        own = {name: network for name, network in own.items() if network is not None}
        if len(own) == 1:
            pair = f"got {next(iter(own))} alone: tokens are trained with an encoder"
            raise ValueError(f"identity_encoder and identity_tokens must be given together, {pair}.")
        source = weights.open_weights(
            repo_or_dir,
            revision=revision,
            vae=vae,
            without=tuple(own),
            cache_dir=cache_dir,
            local_files_only=local_files_only,
            token=token,
        )
        networks: dict[str, Any] = {
            name: nn.Module.to(own[name], device=target, dtype=dtype)
            if name in own
            else source.load(name, dtype=dtype, device=target)
            for name in weights.PARTS
        }
        loaded = cls(
            **networks,
            scheduler=source.scheduler(),
            sampler=sampler,
            **source.settings,
            sources=source.sources,
            license=source.license,
        )
        loaded.networks.lay_out()
        if compile:
            loaded.compile()
        return loaded

    def save_pretrained(self, directory: str | os.PathLike[str], *, notes: str = "") -> None:
        """Write one safetensors file per network, one JSON of configurations and a model card with the licence note.

        Args:
            directory: new, or empty. Nothing is left in it when writing fails. A sampler of your own is not saved.
            notes: Markdown that ends the model card.

        Raises:
            FileExistsError: the directory holds something.
            TypeError: a network of another class than the published one's, whose configuration the JSON can't hold.
        """
        states = ((name, network.state_dict()) for name, network in self.parts.items())
        weights.save(directory, self.described(), states, notes=notes)

    def described(self) -> weights.Weights:
        """What `save_pretrained` writes, without tensors and files; its TypeError if it cannot."""
        return weights.Weights(
            files={},
            configs={name: weights.config_of(name, network) for name, network in self.parts.items()},
            scheduler_config=weights.scheduler_config(self.scheduler),
            settings={"image_size": list(self.image_size), "round_bank": self.round_bank},
            sources=self.sources,
            license=self.license,
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
            repo_id: "user/name"; made if there is none.
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
        """The networks by name."""
        return dict(self.networks.named_children())

    def replaced(self, **changes: Any) -> IdentityGenerator:
        """A new generator of the same networks and settings up to these; networks are shared, not copied.

        Args:
            **changes: arguments of `IdentityGenerator`, by name. With another UNet, `license` has its default again.
        """
        settings = ["scheduler", "sampler", "image_size", "round_bank", "sources"]
        if not changes.keys() & {"reference_unet", "denoising_unet"}:
            settings.append("license")
        own: dict[str, Any] = {name: getattr(self, name) for name in settings}
        replaced = IdentityGenerator(**{**self.parts, **own, **changes})
        replaced.networks.offload_device = self.networks.offload_device
        return replaced

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> IdentityGenerator:
        """Move all networks, and return the generator: see `Networks.to`."""
        self.networks.to(device, dtype)
        return self

    def generate(
        self,
        images: Sequence[Any],
        poses: Any = "standard",
        *,
        colors: str = "rgb",
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
        seed: int = 42,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        batch_size: int | str = "auto",
        size: tuple[int, int] | None = (256, 128),
        ablation: str = "none",
        output: str = "pil",
        progress: bool = True,
    ) -> Any:
        """Every person in every pose.

        By default the noise that a picture begins as is a function of the seed, the reference's pixels and the pose
        alone: not of batches, order, process or device. No seed gives the paper's (42) or the published code's (12580)
        pictures: they come from one generator that draws for a whole run. To reproduce such a run pass `generator` or
        `latents`.

        Args:
            images: N reference images: paths, PIL pictures, (H, W, 3) uint8 RGB arrays or (3, H, W) floats in [0, 1],
                of any size from 8 x 8 pixels. Pictures in any 8-bit mode become RGB: grey (infrared) gets equal
                channels, transparency is ignored, EXIF rotation is applied.
            colors: order of the channels in images that are arrays or tensors: "rgb", or "bgr" as OpenCV has them.
                Paths and PIL pictures carry their own order; drawings and results are always RGB.
            poses: "standard" for the 8 standard poses, or M `pose2id.poses.Pose`, or drawings: images of the OpenPose
                palette in RGB order on black.
            num_inference_steps: of the scheduler.
            guidance_scale: from 0 to 1000; 1 leaves guidance out.
            seed: at least 0.
            generator: draws the noise in place of the seed, on its device, as (M, 4, h, w) per image in the images'
                order: with the published seed on CUDA, and the published order of images, the published noise. For
                schedulers that add noise in their steps it gives a seed, of which each picture's steps draw alone.
            latents: (N, M, 4, h, w) float noise in place of drawn noise. `seed` or `generator` then serve only
                schedulers that add noise in their steps.
            batch_size: pictures per forward. "auto": 32 on CUDA, fewer where its free memory is small; else 8. When
                CUDA runs out of memory it is halved, once.
            size: (height, width) of the results, resized as the published code does (bicubic); None: as generated.
            ablation: what pictures do without, one of the paper's ablations (`Sampling.ablation`).
            output: "pil" or "tensor".
            progress: show a bar on a terminal.

        Returns:
            N lists of M RGB pictures; for "tensor" the same pixels, (N, M, 3, height, width) float32 in [0, 1], on the
            CPU.

        Raises:
            torch.cuda.OutOfMemoryError: half the batch is too large as well.
        """
        results = self.generate_iter(
            images,
            poses,
            colors=colors,
            sampling=Sampling(num_inference_steps, guidance_scale, seed, size, ablation),
            generator=generator,
            latents=latents,
            batch_size=batch_size,
            output=output,
            progress=progress,
        )
        return torch.stack(list(results)) if output == "tensor" else list(results)

    def generate_iter(
        self,
        images: Sequence[Any] | References,
        poses: Any = "standard",
        *,
        colors: str = "rgb",
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        latents: Tensor | None = None,
        batch_size: int | str = "auto",
        output: str = "pil",
        progress: bool = True,
        **settings: Any,
    ) -> Iterator[Any]:
        """`generate` as a stream: one list of M pictures, or one (M, 3, height, width) tensor, for each image in order.

        What it holds does not grow with the number of images. Arguments and images are checked by the call, before the
        first picture is asked for; images beyond the latest 64 MiB of pixels are decoded once more for their picture.

        Arguments are those of `generate`, or `sampling` in place of steps, guidance, seed, size and ablation. Images
        may be `pose2id.ipg.pixels.References`, which are taken as checked, in RGB.
        """
        if isinstance(images, References) and colors != "rgb":
            raise ValueError(f"colors must be 'rgb' with References, which hold RGB pictures, got {colors!r}.")
        references = images if isinstance(images, References) else References(checked_images(images, colors=colors))
        drawn = load_poses(poses)
        sampling = self.checked_sampling(sampling, **settings)
        checked_choice(output, "output", OUTPUTS)
        checked_flag(progress, "progress")
        use_threads(self.device)
        if generator is not None and not isinstance(generator, torch.Generator):
            given = type(generator).__name__
            raise TypeError(f"generator must be a torch.Generator, got {given}. For a seed pass seed=.")
        if latents is not None:
            check_shape(latents, "latents", (len(references), len(drawn), *self.latent_shape))
            if not torch.isfinite(latents).all():
                raise ValueError("latents must be finite, got NaN or infinity.")
        batch_size = self.networks.resolve_batch_size(batch_size)
        if references is not images:
            for i in range(len(references)):
                references[i]  # whole: a header does not tell that its file breaks off

        seed = sampling.seed if generator is None else steps_seed(generator, drawn_from=latents is None)
        noise = Noise(self.latent_shape, [key for key, _ in drawn], seed, generator, latents)
        stream = self._stream(references, [drawing for _, drawing in drawn], noise, sampling, batch_size, progress)
        pictures = (to_pictures(images, sampling.size, f"pictures of images[{i}]") for i, images in enumerate(stream))
        return pictures if output == "pil" else map(to_tensor, pictures)

    def _stream(
        self,
        references: References,
        drawings: Sequence[Image.Image],
        noise: Noise,
        sampling: Sampling,
        batch_size: int,
        progress: bool,
    ) -> Iterator[Tensor]:
        """(M, 3, *image_size) for each image; as many images at a time as make a batch."""
        networks, halved = self.networks, False
        pose_features = networks.encode_poses(self._tensor(drawings, networks.image_size))
        with tqdm(total=len(references) * len(drawings), unit="img", disable=None if progress else True) as bar:
            for some in blocks(len(references), batch_size // len(drawings)):
                pictures = [references[i] for i in range(some.start, some.stop)]
                keys = [content_key(picture) for picture in pictures]
                batch = (
                    self._tensor(pictures, networks.identity_encoder.image_size),
                    self._tensor(pictures, networks.image_size),
                    pose_features,
                    torch.stack([noise.initial(i, key, self.device) for i, key in enumerate(keys, some.start)]),
                )
                generated = None
                while generated is None:
                    steps_draw = noise.of_steps(keys)
                    try:
                        generated = self.sample(*batch, sampling=sampling, generator=steps_draw, batch_size=batch_size)
                    except torch.cuda.OutOfMemoryError as error:
                        if halved or batch_size == 1:
                            lacking = f"{self.device} has too little memory for batch_size={batch_size}"
                            remedy = "Pass a smaller one, or enable_model_cpu_offload()"
                            raise torch.cuda.OutOfMemoryError(f"{lacking}. {remedy}.") from error
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
        sampling: Sampling | None = None,
        generator: torch.Generator | Sequence[Sequence[torch.Generator]] | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Tensor:
        """R references in P poses: everything that `generate` computes for them.

        Args:
            identity_images: (R, 3, *identity_encoder.image_size).
            references: (R, 3, *image_size), the same pictures.
            pose_features: (P, C, h, w), made by `encode_poses`.
            latents: (R, P, 4, h, w) float noise.
            sampling: of which steps, guidance and ablation count; None: the default.
            generator: for schedulers that add noise in their steps: one for all, or R lists of one for each pose.
            batch_size: pictures per forward; None: all.
            **settings: `num_inference_steps`, `guidance_scale`, `ablation`, as for `generate`.

        Returns:
            (R, P, 3, *image_size) in [0, 1].
        """
        networks, count = self.networks, len(references)
        check_shape(identity_images, "identity_images", (count, 3, *networks.identity_encoder.image_size))
        check_shape(references, "references", (count, 3, *networks.image_size))
        check_shape(latents, "latents", (count, len(pose_features), *networks.latent_shape))
        sampling = self.checked_sampling(sampling, **settings)
        nobody = networks.unconditional_tokens() if guided(sampling.guidance) or not sampling.sees("tokens") else None
        unconditional = nobody if guided(sampling.guidance) else None
        round_to = torch.float16 if self.round_bank and networks.dtype == torch.float32 else None
        # Steps add up in at least single precision: a half holds too few digits for the sum of many small changes.
        noise = latents.to(networks.device, networks.wide_dtype)
        pose_features = pose_features.to(networks.device)
        if not sampling.sees("pose"):
            pose_features = torch.zeros_like(pose_features)
        at_once = count * len(pose_features) if batch_size is None else checked_count(batch_size, "batch_size")
        results = []
        for some in blocks(count, at_once // len(pose_features)):
            shown = identity_images[some]
            tokens = networks.encode_identity(shown) if nobody is None or sampling.sees("tokens") else nobody
            tokens = tokens.expand(len(shown), -1, -1)
            bank = {}
            if sampling.sees("bank"):
                seen = networks.encode_images(references[some])
                with networks.at_work("reference_unet"):
                    bank = reference.write(networks.reference_unet, seen, tokens, round_to=round_to)
            in_poses = []
            for these in blocks(len(pose_features), at_once):
                poses = pose_features[these]
                with networks.at_work("denoising_unet"):
                    unet = networks.denoising_unet
                    condition = reference.project(unet, bank, tokens, poses=len(poses), unconditional=unconditional)
                    denoised = self.sampler(
                        unet,
                        self.scheduler,
                        noise[some, these],
                        poses,
                        condition,
                        num_inference_steps=sampling.steps,
                        guidance_scale=sampling.guidance,
                        generator=_of_block(generator, some, these),
                    )
                check_shape(denoised, "the sampler's latents", tuple(noise[some, these].shape))
                in_poses.append(networks.decode(denoised.flatten(0, 1)).unflatten(0, denoised.shape[:2]))
            results.append(torch.cat(in_poses, dim=1))
        return torch.cat(results)

    def checked_sampling(self, sampling: Sampling | None = None, **settings: Any) -> Sampling:
        """A `Sampling`, changed by the keywords of `generate`, whose steps the scheduler has."""
        chosen = (sampling or Sampling()).replaced(**settings)
        checked_count(chosen.steps, "steps (num_inference_steps)", most=self.scheduler.config.num_train_timesteps)
        return chosen

    def _tensor(self, pictures: Sequence[Image.Image], size: tuple[int, int]) -> Tensor:
        # Not in half precision: networks get it after scaling to their range, which would round once more.
        return torch.stack([pixels(picture, size) for picture in pictures]).to(self.device, self.networks.wide_dtype)


def _check_sampler(sampler: Any) -> None:
    if not callable(sampler):
        raise TypeError(f"sampler must be callable, such as pose2id.ipg.sampler.denoise, got {sampler!r}.")


def _default_dtype(device: torch.device) -> torch.dtype:
    return torch.float16 if device.type == "cuda" else torch.float32


def _of_block(
    generator: torch.Generator | Sequence[Sequence[torch.Generator]] | None, some: slice, these: slice
) -> torch.Generator | list[torch.Generator] | None:
    """What diffusers takes for a batch of pictures: one generator, or a list with one for each of them."""
    if generator is None or isinstance(generator, torch.Generator):
        return generator
    return [of_picture for of_image in generator[some] for of_picture in of_image[these]]
