"""The sampler: classifier-free guidance and the scheduler's steps, from noise to latents."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from pose2id.ipg.reference import Condition


class Sampler(Protocol):
    """From noise to latents, with the steps of a scheduler: `denoise`, or a function of your own like it."""

    def __call__(
        self,
        unet: UNet2DConditionModel,
        scheduler: Any,
        noise: Tensor,
        pose_features: Tensor,
        condition: Condition,
        /,
        *,
        num_inference_steps: int,
        guidance_scale: float,
        generator: torch.Generator | list[torch.Generator] | None,
    ) -> Tensor:
        """(R, P, 4, h, w) scaled latents; the arguments are those of `denoise`."""


def denoise(
    unet: UNet2DConditionModel,
    scheduler: Any,
    noise: Tensor,
    pose_features: Tensor,
    condition: Condition,
    *,
    num_inference_steps: int,
    guidance_scale: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Tensor:
    """Latents of R references in P poses.

    Args:
        unet: made by `install_reader`.
        scheduler: a diffusers scheduler; its timesteps are set here.
        noise: (R, P, 4, h, w) standard normal; latents stay in its dtype, whatever the UNet computes in.
        pose_features: (P, C, h, w), shared by the references.
        condition: made by `project` for the same R and P; with unconditional rows exactly if `guided(guidance_scale)`.
        num_inference_steps: steps of the scheduler.
        guidance_scale: prediction = unconditional + scale * (conditional - unconditional).
        generator: for schedulers that add noise in their steps: one, or one for each of R * P.

    Returns:
        (R, P, 4, h, w) scaled latents.
    """
    scheduler.set_timesteps(num_inference_steps)
    copies = 2 if guided(guidance_scale) else 1  # the unconditional rows come first
    pose_rows = pose_features.to(unet.dtype).repeat(copies * len(noise), 1, 1, 1)
    latents = noise.flatten(0, 1) * scheduler.init_noise_sigma
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    step_options = {"generator": generator} if takes_generator else {}
    # The scheduler's own stay where it looks numbers up; the UNet's are copied once, not waited for in each step.
    for timestep, of_unet in zip(scheduler.timesteps, scheduler.timesteps.to(noise.device), strict=True):
        inputs = scheduler.scale_model_input(latents, timestep).to(unet.dtype).repeat(copies, 1, 1, 1)
        prediction = unet(
            torch.cat([inputs, pose_rows], dim=1),
            of_unet,
            encoder_hidden_states=None,  # the condition holds their keys and values
            cross_attention_kwargs={"condition": condition},
            return_dict=False,
        )[0].to(latents)
        if copies == 2:
            unconditional, conditional = prediction.chunk(2)
            prediction = unconditional + guidance_scale * (conditional - unconditional)
        latents = scheduler.step(prediction, timestep, latents, return_dict=False, **step_options)[0]
    return latents.view_as(noise)


def checked_scheduler(scheduler: Any) -> Any:
    """A diffusers scheduler that can take the steps of `denoise`.

    Raises:
        TypeError: not a scheduler for predictions of noise or v, or one whose steps need more than these.
        ValueError: a scheduler of flows, or of sigmas of its own (without `alphas_cumprod`); one of another prediction
            type, or whose steps lead from images to noise.
    """
    name, rule = type(scheduler).__name__, "scheduler must be a diffusers scheduler for noise prediction"
    needed = ("config", "init_noise_sigma", "scale_model_input", "set_timesteps", "step")
    lacking = [attribute for attribute in needed if not hasattr(scheduler, attribute)]
    if lacking:
        raise TypeError(f"{rule}, got {name} without {', '.join(lacking)}.")
    try:
        inspect.signature(scheduler.step).bind(None, None, None, return_dict=False)
    except TypeError as error:
        raise TypeError(f"{rule}, got {name}, whose step needs more ({error}).") from error
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod") or config.get("use_flow_sigmas"):
        raise ValueError(f"{rule}, got {name}, of another kind of noise schedule. Take DDIM, Euler or DPM-Solver.")
    if config.get("prediction_type") not in (None, "epsilon", "v_prediction", "sample"):
        raise ValueError(f"{rule}, got {name} of prediction_type {config['prediction_type']!r}.")
    timesteps = getattr(scheduler, "timesteps", None)  # from the start, but PNDM's
    if timesteps is not None and timesteps[0] < timesteps[-1]:
        raise ValueError(f"{rule}, got {name}, whose steps lead from images to noise.")
    return scheduler


def guided(guidance_scale: float) -> bool:
    """Whether unconditional rows have a weight: at scale 1 they have none."""
    return guidance_scale != 1
