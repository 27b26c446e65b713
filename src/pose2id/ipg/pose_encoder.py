"""In which pose: the drawn skeleton as features that are added to the denoising UNet's first convolution."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class PoseEncoder(nn.Module):
    """3x3 convolutions from the drawn skeleton to the resolution and width of the UNet's first level (eq. 22-25).

    Parameters are named as in the published state dict.

    Args:
        out_channels: channels of the denoising UNet's first level.
        channels: channels of the levels; each step to the next one halves height and width.
    """

    def __init__(self, out_channels: int = 320, channels: Sequence[int] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.config = {"out_channels": out_channels, "channels": list(channels)}
        self.out_channels = out_channels
        self.downscale = 2 ** (len(channels) - 1)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for narrow, wide in pairwise(channels):
            self.blocks.append(nn.Conv2d(narrow, narrow, 3, padding=1))
            self.blocks.append(nn.Conv2d(narrow, wide, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Features (P, out_channels, H/8, W/8) of drawn poses (P, 3, H, W): RGB, float, in [0, 1], not centred."""
        hidden = F.silu(self.conv_in(images))
        for block in self.blocks:
            hidden = F.silu(block(hidden))
        return self.conv_out(hidden)
