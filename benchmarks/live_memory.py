"""What generation and training ask of a GPU, counted without one, on shapes alone: bytes of tensors, and operators.

Not counted: what an allocator adds by rounding and fragmentation, workspaces of cuDNN, and the CUDA context; nor the
kernels within an operator, such as a convolution's changes of layout.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peaks(call: Callable[[], Any], modules: Mapping[str, nn.Module]) -> dict[str, int]:
    """Most bytes alive, of tensors that the call makes, from one module's turn to the next one's.

    The call is on the meta device. Its weights and arguments are not counted.
    """
    live = _Live()
    hooks = [
        module.register_forward_pre_hook(lambda *_, name=name: live.turn_of(name)) for name, module in modules.items()
    ]
    try:
        with torch.no_grad(), live, _fused_attention():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return live.peaks


def step_peak(loss: Callable[[], torch.Tensor]) -> int:
    """Most bytes alive, of tensors that a loss and its way back make, gradients of weights among them.

    The loss is on the meta device. Gradients that are there before stay, and are not counted.
    """
    live = _Live()
    with live, _fused_attention():
        loss().backward()
    return live.peaks[""]


def operators(call: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """How often the call, on the meta device, runs an operator: by its name, and the class of the module that asks.

    Views are not counted. An attention is one operator, "new_empty". Outside of any module: "".
    """
    counts = _Counts()
    hooks = [
        register_module_forward_pre_hook(lambda module, *_: counts.modules.append(type(module).__name__)),
        register_module_forward_hook(lambda *_: counts.modules.pop() and None),
    ]
    try:
        with torch.no_grad(), counts, _fused_attention():
            call()
    finally:
        for hook in hooks:
            hook.remove()
    return counts.found


class _Counts(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()
        self.modules: list[str] = [""]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # Views move nothing. Numbers of the scheduler's tables are on the CPU.
        view = func.is_view or func is torch.ops.aten._unsafe_view.default
        if not view and any(_is_tensor(item) and item.is_meta for item in tree_leaves((args, kwargs))):
            self.found[func.overloadpacket.__name__, self.modules[-1]] += 1
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default and args[1].is_contiguous(memory_format=torch.channels_last):
            output = output.contiguous(memory_format=torch.channels_last)  # as cuDNN gives it for such weights
        return output


class _Live(TorchDispatchMode):
    """Counts every storage from the operation that makes it until nobody holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peaks, self.turn = 0, {"": 0}, ""
        self._counted: dict[int, int] = {}

    def turn_of(self, name: str) -> None:
        """From here on, the peak is this module's."""
        self.turn = name
        self.peaks.setdefault(name, self.live)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(output)):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._counted:
                self._counted[storage._cdata] = storage.nbytes()
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata)
        self.peaks[self.turn] = max(self.peaks[self.turn], self.live + _copied(func, args))
        return output

    def _free(self, storage: int) -> None:
        self.live -= self._counted.pop(storage)


def _is_tensor(item: Any) -> bool:
    return isinstance(item, torch.Tensor)


def _copied(func: Any, args: Any) -> int:
    """Bytes of the copy that cuDNN gets of an input that lies in another order than the convolution's weights."""
    if func is not torch.ops.aten.convolution.default or args[1].is_contiguous():
        return 0
    return 0 if args[0].is_contiguous(memory_format=torch.channels_last) else int(args[0].nbytes)


def _fused_attention() -> Any:
    """Attention in one kernel, as CUDA has it: there is no matrix of all pairs."""
    # Not a function mode of torch, which would be off on the way back, where checkpointing computes again.
    return mock.patch.object(
        F, "scaled_dot_product_attention", lambda query, key, value, *_, **__: _Kernel.apply(query, key, value)
    )


class _Kernel(torch.autograd.Function):
    """Keeps its inputs, its output, and a number for each row of it."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        batch, heads, length, _ = query.shape
        output = query.new_empty(batch, length, heads, value.shape[-1]).transpose(1, 2)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, output, query.new_empty(batch, heads, length))
        return output

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])
