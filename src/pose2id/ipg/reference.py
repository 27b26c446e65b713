"""Reference attention: what the reference UNet sees of a picture, read by the denoising UNet's self-attention.

Both are stock `diffusers.UNet2DConditionModel`. Their attention processors take what they need from the call's
`cross_attention_kwargs` and keep nothing, so that no picture is left behind in a model.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

Bank = dict[str, Tensor]
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Condition:
    """What the denoising UNet sees of R references, projected once for all steps.

    Attributes:
        bank: per self-attention, keys and values (R, heads, L, d) of the references; empty for no references.
        tokens: per cross-attention, keys and values (rows, heads, N, d) of the identity tokens, one entry per row of
            the UNet's batch: first the unconditional rows, if any, then P rows for each reference.
        poses: P, the rows of one reference.
    """

    bank: dict[str, KeysValues]
    tokens: dict[str, KeysValues]
    poses: int

    def conditional(self, rows: int) -> Condition:
        """Without unconditional rows: what the last `rows`, R * P, of the UNet's batch see."""
        return replace(self, tokens={name: (keys[-rows:], vals[-rows:]) for name, (keys, vals) in self.tokens.items()})


def install_writer(unet: UNet2DConditionModel) -> None:
    """Make `unet` a reference UNet, in place: its self-attentions write their input, its output head is removed."""
    unet.set_attn_processor(_processors(unet, _Writer, _CrossAttention))
    # Nothing reads the output: published weights have no head.
    unet.conv_norm_out = unet.conv_out = nn.Identity()


def install_reader(unet: UNet2DConditionModel) -> None:
    """Make `unet` a denoising UNet, in place: it reads a `Condition`, and its input carries pose features."""
    unet.set_attn_processor(_processors(unet, _BankReader, _TokenReader))
    if not isinstance(unet.conv_in, PosedConv2d):
        unet.conv_in = PosedConv2d(unet.conv_in)


def self_attentions(unet: UNet2DConditionModel) -> dict[str, int]:
    """Path to width of every self-attention; both UNets must have the same."""
    names = [name for name in _attentions(unet) if _is_self_attention(name)]
    return {name: unet.get_submodule(name).to_k.in_features for name in names}


def write(unet: UNet2DConditionModel, latents: Tensor, tokens: Tensor, *, round_to: torch.dtype | None = None) -> Bank:
    """One pass of the reference UNet, at timestep 0.

    Args:
        unet: made by `install_writer`.
        latents: (R, 4, h, w) clean, scaled latents of the reference images.
        tokens: (R, N, D) identity tokens of the same images.
        round_to: dtype that the bank is rounded to; it stays in the UNet's. None: not rounded.

    Returns:
        The bank: per self-attention (named by its path) its normalised input (R, L, C).
    """
    bank: Bank = {}
    unet(latents, 0, encoder_hidden_states=tokens, cross_attention_kwargs={"bank": bank}, return_dict=False)
    return bank if round_to is None else {name: states.to(round_to).to(states) for name, states in bank.items()}


def project(
    unet: UNet2DConditionModel,
    bank: Bank,
    tokens: Tensor,
    *,
    poses: int,
    unconditional: Tensor | None = None,
    unconditional_rows: int | None = None,
) -> Condition:
    """Keys and values that the denoising UNet reads, from its own projections.

    Args:
        unet: made by `install_reader`.
        bank: made by `write`, for R references.
        tokens: (R, N, D) identity tokens of the references.
        poses: rows of each reference in the UNet's batch.
        unconditional: (1, N, D) tokens of the unconditional rows; None: there are none.
        unconditional_rows: how many; None: R * P, the sampler's. They come first in the UNet's batch.
    """
    alone = len(tokens) * poses if unconditional_rows is None else unconditional_rows
    read_bank: dict[str, KeysValues] = {}
    read_tokens: dict[str, KeysValues] = {}
    if unconditional is None:
        groups, alone = tokens, 0
    else:
        groups = torch.cat([unconditional[:alone], tokens])  # of one row, or of none
    for name in _attentions(unet):
        attention = unet.get_submodule(name)
        if name in bank:
            read_bank[name] = _keys_values(attention, bank[name])
        elif not _is_self_attention(name):
            keys, values = (_per_row(projected, alone, poses) for projected in _keys_values(attention, groups))
            read_tokens[name] = keys, values
    return Condition(read_bank, read_tokens, poses)


class PosedConv2d(nn.Conv2d):
    """A UNet's first convolution whose input holds, behind the latents' channels, features to add to its output.

    In place of state in the model, so that one call needs nothing from another. Takes over the given convolution's
    parameters under the same names.
    """

    def __init__(self, conv: Any) -> None:
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, device="meta")
        self.weight, self.bias = conv.weight, conv.bias

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, out, h, w) of latents and pose features (B, in + out, h, w)."""
        latents, pose_features = inputs.split([self.in_channels, self.out_channels], dim=1)
        return super().forward(latents) + pose_features


class _Processor:
    """An attention processor that knows the path of its attention, `down_blocks.0.attentions.0...attn1`."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Writer(_Processor):
    """Self-attention of the reference UNet. diffusers hands it the output of the block's first norm."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, bank: Bank, **__: Any) -> Tensor:
        bank.setdefault(self.name, hidden_states)  # gradient checkpointing comes here again, when it has been read
        return _attend(attn, _query(attn, hidden_states), *_keys_values(attn, hidden_states))


class _CrossAttention(_Processor):
    """Cross-attention of the reference UNet."""

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *_: Any, bank: Bank, **__: Any
    ) -> Tensor:
        del bank  # diffusers passes a call's keywords to every attention, and warns of one that is not taken
        return _attend(attn, _query(attn, hidden_states), *_keys_values(attn, encoder_hidden_states))


class _BankReader(_Processor):
    """Self-attention of the denoising UNet: conditional rows also see their reference, unconditional ones do not."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, condition: Condition, **__: Any) -> Tensor:
        query, (keys, values) = _query(attn, hidden_states), _keys_values(attn, hidden_states)
        if not condition.bank:
            return _attend(attn, query, keys, values)
        banks = condition.bank[self.name]
        unconditional = len(hidden_states) - len(banks[0]) * condition.poses
        keys_seen, values_seen = (
            _with_bank(own[unconditional:], bank, condition.poses)
            for own, bank in zip((keys, values), banks, strict=True)
        )
        attended = _attended(query[unconditional:], keys_seen, values_seen)
        if unconditional:
            alone = _attended(query[:unconditional], keys[:unconditional], values[:unconditional])
            attended = torch.cat([alone, attended])
        return _output(attn, attended)


class _TokenReader(_Processor):
    """Cross-attention of the denoising UNet, with keys and values that are the same in every step."""

    def __call__(self, attn: Any, hidden_states: Tensor, *_: Any, condition: Condition, **__: Any) -> Tensor:
        return _attend(attn, _query(attn, hidden_states), *condition.tokens[self.name])


def _processors(
    unet: UNet2DConditionModel, self_attention: type[_Processor], cross_attention: type[_Processor]
) -> dict[str, _Processor]:
    return {
        f"{name}.processor": (self_attention if _is_self_attention(name) else cross_attention)(name)
        for name in _attentions(unet)
    }


def _attentions(unet: UNet2DConditionModel) -> list[str]:
    return [name.removesuffix(".processor") for name in unet.attn_processors]


def _is_self_attention(name: str) -> bool:
    return name.endswith(".attn1")


def _with_bank(own: Tensor, bank: Tensor, poses: int) -> Tensor:
    """(R * P, heads, L + L', d): each row's own keys (or values), then those of its reference."""
    shared = bank[:, None].expand(-1, poses, -1, -1, -1)
    return torch.cat([own.unflatten(0, (len(bank), poses)), shared], dim=3).flatten(0, 1)


def _per_row(projected: Tensor, unconditional_rows: int, poses: int) -> Tensor:
    if not unconditional_rows:
        return projected.repeat_interleave(poses, dim=0)
    unconditional = projected[:1].expand(unconditional_rows, -1, -1, -1)
    return torch.cat([unconditional, projected[1:].repeat_interleave(poses, dim=0)])


def _query(attn: Any, hidden_states: Tensor) -> Tensor:
    return _split_heads(attn, attn.to_q(hidden_states))


def _keys_values(attn: Any, states: Tensor) -> KeysValues:
    return _split_heads(attn, attn.to_k(states)), _split_heads(attn, attn.to_v(states))


def _split_heads(attn: Any, states: Tensor) -> Tensor:
    return states.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _attend(attn: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return _output(attn, _attended(query, keys, values))


def _attended(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(B, L, C): what all heads attended to. A view: the kernels write heads side by side, as the queries lie."""
    return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)


def _output(attn: Any, attended: Tensor) -> Tensor:
    projection, dropout = attn.to_out
    return dropout(projection(attended))
