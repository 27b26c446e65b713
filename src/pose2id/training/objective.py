"""What is trained, and on what (eq. 6): one step of the sampler, on a target that is known.

The trained networks of a generator stand here as one module, whose forward is the sampler's own path: the reference
UNet writes, `project` makes keys and values, the denoising UNet reads. Unconditional samples go where the sampler's
unconditional rows go.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from pose2id.ipg import reference
from pose2id.ipg.networks import Networks

TRAINED = ("reference_unet", "denoising_unet", "identity_tokens", "pose_encoder")
PREDICTIONS = ("v_prediction", "epsilon")


class TrainedParts(nn.Module):
    """Both UNets, the identity tokens (IFR) and the pose encoder of a generator, shared with it.

    Parameters that the loss does not depend on are frozen: the reference UNet behind its last self-attention's input.

    Args:
        networks: of a generator; the identity encoder gives the unconditional feature, that of a grey image.
    """

    unconditional_feature: Tensor

    def __init__(self, networks: Networks) -> None:
        super().__init__()
        self.reference_unet = networks.reference_unet
        self.denoising_unet = networks.denoising_unet
        self.identity_tokens = networks.identity_tokens
        self.pose_encoder = networks.pose_encoder
        like: dict[str, Any] = {"device": networks.device, "dtype": networks.dtype}
        grey = torch.zeros(1, 3, *networks.identity_encoder.image_size, **like)
        with torch.no_grad():
            self.register_buffer("unconditional_feature", networks.identity_encoder(grey), persistent=False)
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.modules()):
            raise ValueError("unet must have a dropout of 0: a resumed run would draw other units.")
        self.requires_grad_(True)
        self._freeze_unread(torch.zeros(1, *networks.latent_shape, **like))

    def forward(
        self,
        noisy: Tensor,
        timesteps: Tensor,
        poses: Tensor,
        reference_latents: Tensor,
        features: Tensor,
        unconditional: Tensor,
    ) -> Tensor:
        """The denoising UNet's prediction (B, C, h, w).

        Args:
            noisy: (B, C, h, w) latents of the targets with noise.
            timesteps: (B,) int64.
            poses: (B, 3, H, W) drawn poses in [0, 1].
            reference_latents: (B, C, h, w) scaled latents of the references, without noise.
            features: (B, F) of the references, from the identity encoder.
            unconditional: (B,) bool, on the CPU: samples that see their pose, but neither reference nor identity.
        """
        order = torch.argsort(~unconditional, stable=True)  # unconditional rows come first, as in the sampler
        alone = int(unconditional.sum())
        paired = order[alone:]
        tokens = self.identity_tokens(features[paired])
        bank = reference.write(self.reference_unet, reference_latents[paired], tokens) if len(paired) else {}
        condition = reference.project(
            self.denoising_unet,
            bank,
            tokens,
            poses=1,
            unconditional=self.identity_tokens(self.unconditional_feature) if alone else None,
            unconditional_rows=alone,
        )
        prediction: Tensor = self.denoising_unet(
            torch.cat([noisy[order], self.pose_encoder(poses[order])], dim=1),
            timesteps[order],
            encoder_hidden_states=None,
            cross_attention_kwargs={"condition": condition},
            return_dict=False,
        )[0]
        return prediction[torch.argsort(order)]

    def _freeze_unread(self, latents: Tensor) -> None:
        """Freeze what no gradient of the bank reaches."""
        bank = reference.write(self.reference_unet, latents, self.identity_tokens(self.unconditional_feature))
        parameters = list(self.reference_unet.parameters())
        total = torch.stack([states.float().sum() for states in bank.values()]).sum()
        gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)


class Objective:
    """Mean squared error between prediction and target at a drawn noise level (eq. 6).

    Args:
        scheduler: the generator's; it says how much noise a timestep has, and what is predicted.
        snr_gamma: weight samples by "Efficient Diffusion Training via Min-SNR Weighting Strategy" (ICCV 2023) with this
            gamma; None: all alike. For v-prediction the weight is min(SNR + 1, gamma) / (SNR + 1), not that paper's
            min(SNR, gamma) / (SNR + 1), which is 0 at zero terminal SNR: the sampler's first step would not be learned.

    Raises:
        ValueError: a scheduler whose prediction is neither "v_prediction" nor "epsilon".
    """

    def __init__(self, scheduler: Any, snr_gamma: float | None = None) -> None:
        self.prediction = scheduler.config.prediction_type
        if self.prediction not in PREDICTIONS:
            wanted = f"one of {', '.join(PREDICTIONS)}, got {self.prediction!r}"
            raise ValueError(f"scheduler.config.prediction_type must be {wanted}.")
        # Whatever scheduler the generator samples with: DDIM's has the formulas of training.
        self._scheduler: Any = diffusers.DDIMScheduler.from_config(scheduler.config)
        self._gamma = snr_gamma

    def noisy(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """sqrt(a) latents + sqrt(1 - a) noise, (B, C, h, w)."""
        return self._scheduler.add_noise(latents, noise, timesteps)

    def target(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """What is to be predicted: v = sqrt(a) noise - sqrt(1 - a) latents, or the noise."""
        if self.prediction == "epsilon":
            return noise
        return self._scheduler.get_velocity(latents, noise, timesteps)

    def loss(self, prediction: Tensor, target: Tensor, timesteps: Tensor) -> Tensor:
        """Eq. 6: the mean squared error of the prediction, over samples weighted by `weights`."""
        errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
        return (errors * self.weights(timesteps).to(errors)).mean()

    def weights(self, timesteps: Tensor) -> Tensor:
        """(B,) float32."""
        if self._gamma is None:
            return torch.ones(len(timesteps), device=timesteps.device)
        signal = self._scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        ratio = signal / (1 - signal)
        whole = ratio + 1 if self.prediction == "v_prediction" else ratio
        # 1 in the limit of an epsilon-prediction, where there is nothing but noise.
        return torch.where(whole > 0, whole.clamp(max=self._gamma) / whole, 1.0)


def checkpoint_gradients(networks: Any, wanted: bool) -> None:
    """Compute both UNets' activations again on the way back, or keep them."""
    for unet in (networks.reference_unet, networks.denoising_unet):
        unet.enable_gradient_checkpointing() if wanted else unet.disable_gradient_checkpointing()
