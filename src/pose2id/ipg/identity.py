"""Who is on the picture: the identity encoder (a frozen ReID model) and the tokens that its feature becomes.

The tokens take the place of a prompt's: every cross-attention of both UNets takes its keys and values from them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pose2id.io.checks import checked_count, checked_flag


class TransReID(nn.Module):
    """The identity encoder of the published weights: TransReID (ViT, overlapping patches, JPM), before the neck.

    Rearranged from "TransReID: Transformer-based Object Re-Identification" (ICCV 2021) with neither camera nor view
    embedding. Only what inference needs is built: the last block stands in the two heads, without the classifiers and
    batch norms of the training. Parameters are named as in the published state dict.

    Args:
        image_size: (height, width) of the input, in pixels.
        patch_size: side of a patch, in pixels.
        stride: step between patches, in pixels; below `patch_size` they overlap.
        dim: width of a token.
        depth: blocks, the one in the heads included.
        heads: attention heads.
        parts: groups of patches that the jigsaw head describes one by one.
        shift: sequence position (0 is the class token) at which the jigsaw starts to count.
        groups: how many interleaved groups the jigsaw shuffles patches into.

    Raises:
        ValueError: the patches cannot be shuffled into `groups`, or the width not be split into `heads`.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 128),
        *,
        patch_size: int = 16,
        stride: int = 12,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        parts: int = 4,
        shift: int = 5,
        groups: int = 2,
    ) -> None:
        super().__init__()
        height, width = image_size
        patches = ((height - patch_size) // stride + 1) * ((width - patch_size) // stride + 1)
        if dim % heads:
            raise ValueError(f"dim must be a multiple of heads, got {dim} and {heads}.")
        if patches % groups or patches < parts:
            rule = f"a multiple of groups={groups}, at least parts={parts}"
            raise ValueError(f"image_size, patch_size and stride must give patches in {rule}, got {patches}.")
        self.config = {
            "image_size": [height, width],
            "patch_size": patch_size,
            "stride": stride,
            "dim": dim,
            "depth": depth,
            "heads": heads,
            "parts": parts,
            "shift": shift,
            "groups": groups,
        }
        self.image_size = (height, width)
        self.feature_dim = (1 + parts) * dim
        self._parts, self._shift, self._groups = parts, shift, groups
        self.base = _Trunk(patches, patch_size, stride, dim, depth - 1, heads)
        self.b1 = nn.Sequential(_Block(dim, heads), nn.LayerNorm(dim, eps=1e-6))
        self.b2 = nn.Sequential(_Block(dim, heads), nn.LayerNorm(dim, eps=1e-6))

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, (1 + parts) * dim), not normalised, of images (B, 3, H, W): RGB, float, in [-1, 1]."""
        tokens = self.base(images)
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        # The jigsaw: count from another patch, then deal the patches out in turn, so that every part sees all heights.
        shuffled = patches.roll(1 - self._shift, dims=1).unflatten(1, (self._groups, -1)).transpose(1, 2).flatten(1, 2)
        length = shuffled.shape[1] // self._parts  # a remainder of patches belongs to no part
        parts = shuffled[:, : length * self._parts].unflatten(1, (self._parts, length))
        parts = torch.cat([class_token[:, None].expand(-1, self._parts, -1, -1), parts], dim=2)
        local_features = self.b2(parts.flatten(0, 1))[:, 0].unflatten(0, (-1, self._parts))
        global_feature = self.b1(tokens)[:, :1]
        return torch.cat([global_feature, local_features / self._parts], dim=1).flatten(1)


class IdentityTokens(nn.Module):
    """IFR, the Identity Feature Redistribution of the paper (eq. 5): LayerNorm(Linear(feature)) as N tokens of width D.

    Args:
        feature_dim: width of the identity encoder's feature.
        num_tokens: N; None: 20, or without IFR feature_dim / dim, which is then the only one.
        dim: D, the width that the UNets' cross-attention takes.
        ifr: False: the paper's ablation without IFR. The tokens are the feature itself, cut into D values each, and
            nothing is learned.

    Raises:
        ValueError: without IFR, a feature that cannot be cut into such tokens.
    """

    def __init__(
        self, feature_dim: int = 3840, num_tokens: int | None = None, dim: int = 768, *, ifr: bool = True
    ) -> None:
        super().__init__()
        self.feature_dim, self.dim = checked_count(feature_dim, "feature_dim"), checked_count(dim, "dim")
        self.ifr = checked_flag(ifr, "ifr")
        if num_tokens is None:
            num_tokens = 20 if ifr else max(1, feature_dim // dim)
        self.num_tokens = checked_count(num_tokens, "num_tokens")
        self.config = {"feature_dim": self.feature_dim, "num_tokens": self.num_tokens, "dim": self.dim}
        if not ifr:
            if num_tokens * dim != feature_dim:
                rule = "a multiple of cross_attention_dim without IFR, num_tokens times as many"
                given = f"feature_dim {feature_dim} (of the identity encoder), cross_attention_dim {dim} (of the UNets)"
                remedy = "Take UNets whose cross_attention_dim divides feature_dim"
                raise ValueError(f"feature_dim must be {rule}, got {given}, num_tokens {num_tokens}. {remedy}.")
            self.config["ifr"] = False  # else not named: older versions read the configuration of IFR
            return
        # The names of the published state dict.
        self.proj_motion = nn.Linear(self.feature_dim, self.num_tokens * self.dim)
        self.norm_motion = nn.LayerNorm(self.dim)

    def forward(self, features: Tensor) -> Tensor:
        """Tokens (B, N, D) of identity features (B, feature_dim)."""
        values = self.proj_motion(features) if self.ifr else features
        tokens = values.unflatten(1, (self.num_tokens, self.dim))
        return self.norm_motion(tokens) if self.ifr else tokens


class _Trunk(nn.Module):
    """Patches to tokens: the class token and the patch tokens after all blocks but the last, without a final norm."""

    def __init__(self, patches: int, patch_size: int, stride: int, dim: int, depth: int, heads: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + patches, dim))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, dim, patch_size, stride)})
        self.blocks = nn.Sequential(*(_Block(dim, heads) for _ in range(depth)))

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patch_embed["proj"](images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(images), -1, -1), patches], dim=1) + self.pos_embed
        return self.blocks(tokens)


class _Block(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = _Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = _MLP(dim)

    def forward(self, tokens: Tensor) -> Tensor:
        tokens = tokens + self.attn(self.norm1(tokens))
        return tokens + self.mlp(self.norm2(tokens))


class _Attention(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(tokens)))
