"""The published schedule of generation restated: what is computed how often and in which batches, on stock UNets.

One batch for each reference image, of as many rows as there are poses, twice; float32. Kinder than the original in
three places: pictures are 4-D tensors and not videos of one frame, rows are taken by slices and not by masks, and
nothing is read from files or written to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import Tensor, nn

Bank = dict[str, Tensor]


class PublishedSchedule:
    """Pictures of the person on one reference image in P poses, as the published code computes them.

    Args:
        parts: those of an `IdentityGenerator`, in no generator: they get other attention processors here.
        scheduler: DDIM.
    """

    def __init__(self, parts: Mapping[str, Any], scheduler: Any) -> None:
        self.parts, self.scheduler = dict(parts), scheduler
        self.reference_unet, self.unet, self.vae = (
            self.parts[name] for name in ("reference_unet", "denoising_unet", "vae")
        )
        self.pose_features: Tensor | None = None
        self.reference_unet.conv_norm_out = self.reference_unet.conv_out = nn.Identity()
        bank: Bank = {}
        for unet, processor in ((self.reference_unet, _Write), (self.unet, _Read)):
            unet.set_attn_processor(
                {
                    name: processor(name, bank) if name.endswith("attn1.processor") else AttnProcessor2_0()
                    for name in unet.attn_processors
                }
            )
        self.unet.conv_in.register_forward_hook(lambda _, __, output: output + self.pose_features)

    @torch.no_grad()
    def __call__(
        self,
        identity_image: Tensor,
        reference: Tensor,
        poses: Tensor,
        latents: Tensor,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.5,
    ) -> Tensor:
        """Images (P, 3, H, W) in [0, 1].

        Args:
            identity_image: (1, 3, h, w) in [0, 1], the reference image in the identity encoder's size.
            reference: (1, 3, H, W) in [0, 1], the same in the pictures' size.
            poses: (P, 3, H, W) in [0, 1], drawn.
            latents: (P, 4, H/8, W/8) noise.
            num_inference_steps: of the scheduler.
            guidance_scale: of the conditional rows.
        """
        tokens = self.prepare(identity_image, reference, poses)
        return self.decode(self.denoise(latents, tokens, num_inference_steps, guidance_scale))

    @torch.no_grad()
    def prepare(self, identity_image: Tensor, reference: Tensor, poses: Tensor) -> Tensor:
        """All that comes before the steps, for every row anew: fills the bank and returns tokens (2P, N, D)."""
        count = len(poses)
        people = (identity_image * 2 - 1).repeat(count, 1, 1, 1)
        features = self.parts["identity_encoder"](torch.cat([torch.zeros_like(people), people]))
        tokens: Tensor = self.parts["identity_tokens"](features)
        latents = self.vae.encode((reference * 2 - 1).repeat(count, 1, 1, 1)).latent_dist.mean
        latents = (latents * self.vae.config.scaling_factor).repeat(2, 1, 1, 1)
        self.reference_unet(latents, 0, encoder_hidden_states=tokens, return_dict=False)
        self.pose_features = self.parts["pose_encoder"](poses).repeat(2, 1, 1, 1)
        return tokens

    @torch.no_grad()
    def denoise(self, latents: Tensor, tokens: Tensor, num_inference_steps: int, guidance_scale: float) -> Tensor:
        """Denoised latents (P, 4, H/8, W/8)."""
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            rows = self.unet(latents.repeat(2, 1, 1, 1), timestep, encoder_hidden_states=tokens, return_dict=False)[0]
            unconditional, conditional = rows.chunk(2)
            noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, timestep, latents, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Images (P, 3, H, W), one after the other."""
        scaled = latents / self.vae.config.scaling_factor
        images = torch.cat([self.vae.decode(picture, return_dict=False)[0] for picture in scaled.split(1)])
        return (images / 2 + 0.5).clamp(0, 1)


class _Write(AttnProcessor2_0):
    """Self-attention of the reference UNet: its input goes to the bank, in float16."""

    def __init__(self, name: str, bank: Bank) -> None:
        super().__init__()
        self.name, self.bank = name, bank

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self.bank[self.name] = hidden_states.half()
        return super().__call__(attn, hidden_states)


class _Read(_Write):
    """Self-attention of the denoising UNet: every row over itself and the bank, then half of them over themselves."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        seen = torch.cat([hidden_states, self.bank[self.name].to(hidden_states)], dim=1)
        attended = AttnProcessor2_0.__call__(self, attn, hidden_states, seen)
        alone = hidden_states[: len(hidden_states) // 2]
        attended[: len(alone)] = AttnProcessor2_0.__call__(self, attn, alone, alone)
        return attended
