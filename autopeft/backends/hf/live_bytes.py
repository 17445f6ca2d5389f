"""Peak of the bytes that tensors hold while code runs, on real and on fake tensors alike.

PyTorch's own `torch.distributed._tools.MemTracker` fails on frozen parameters.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

# bitsandbytes' operators must be registered before their names below mean anything.
import bitsandbytes  # noqa: F401
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ALLOCATION_UNIT_BYTES = 512
"""The CUDA caching allocator hands out multiples of this (c10/cuda/CUDACachingAllocator.h, kMinBlockSize)."""


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator returns from its birth to its death, each rounded up to 512 bytes.

    Entered as a context. What existed before is counted only where `add` was told of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._storages: dict[int, weakref.ref[Any]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the tensor's storage, once, until nothing holds it any more."""
        if tensor.layout == torch.sparse_coo:
            self.add(tensor._indices())
            self.add(tensor._values())
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._storages:
            return
        num_bytes = round_up_bytes(storage.nbytes())

        def forget(_: object) -> None:
            del self._storages[address]
            self.live_bytes -= num_bytes

        # PyTorch keeps one Python object a storage for as long as any tensor uses it, so this fires at its true end.
        self._storages[address] = weakref.ref(storage, forget)
        self.live_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.add(leaf)
        if func in _WORKSPACES:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes + _WORKSPACES[func](*args))
        return result


def round_up_bytes(num_bytes: int) -> int:
    return -(-num_bytes // ALLOCATION_UNIT_BYTES) * ALLOCATION_UNIT_BYTES


def _workspace_of_4bit_matmul(input: torch.Tensor, packed: torch.Tensor, shape: list[int], *_: object) -> int:
    """The whole weight in the input's type, and its scales in float32 before and after their offset is added.

    That is bitsandbytes/backends/default/ops.py, `_gemm_4bit_default_impl`. Its CUDA kernel spares the weight for few
    tokens only; a training step has many.
    """
    scales = round_up_bytes(-(-prod(shape) // 64) * 4)
    return round_up_bytes(prod(shape) * input.element_size()) + scales


def _workspace_of_8bit_matmul(quantized_input: torch.Tensor, quantized_weight: torch.Tensor, *_: object) -> int:
    """The product in int32 and in float16, before it is cast: bitsandbytes/backends/{default,cuda}/ops.py."""
    size = quantized_input.numel() // quantized_input.shape[-1] * quantized_weight.shape[0]
    return round_up_bytes(4 * size) + round_up_bytes(2 * size)


# What operators allocate and free inside themselves, where no dispatch mode sees it.
_WORKSPACES: dict[Any, Callable[..., int]] = {
    torch.ops.bitsandbytes.gemm_4bit.default: _workspace_of_4bit_matmul,
    torch.ops.bitsandbytes.int8_scaled_mm.default: _workspace_of_8bit_matmul,
}


def list_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Everything a model holds: parameters, buffers, and the quantization states that are neither."""
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        weight = module._parameters.get("weight")
        states = [getattr(weight, "quant_state", None), getattr(module, "state", None)]
        states += [getattr(state, "state2", None) for state in states]
        for state in states:
            yield from (value for value in getattr(state, "__dict__", {}).values() if isinstance(value, torch.Tensor))
