"""Peak of the bytes that tensors hold while code runs, on real and on fake tensors alike: what for, and when.

PyTorch's own `torch.distributed._tools.MemTracker` fails on frozen parameters.
"""

from __future__ import annotations

import functools
import importlib.util
import weakref
from collections.abc import Callable, Hashable, Iterator, Mapping
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autopeft.backends.hf.allocator import Block, CachingAllocator

ALLOCATION_UNIT_BYTES = 512
"""The CUDA caching allocator hands out multiples of this (c10/core/AllocatorConfig.h, kMinBlockSize)."""

Part = Literal["base", "adapter", "gradients", "optimizer", "activations"]


class Held(NamedTuple):
    """Bytes of live storages by what they are for."""

    base: int = 0
    """Frozen weights, quantization states and buffers of the base model."""
    adapter: int = 0
    """What trains, and what a method keeps frozen beside it."""
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    """Whatever the step itself makes: activations kept for the backward pass, temporaries, the batch."""

    @property
    def total(self) -> int:
        return sum(self)


_INDEX: dict[Part, int] = {"base": 0, "adapter": 1, "gradients": 2, "optimizer": 3, "activations": 4}


class _Entry:
    """A live storage; a class of its own because its part may change."""

    __slots__ = ("block", "index", "num_bytes", "reference")

    def __init__(self, num_bytes: int, index: int, block: Block) -> None:
        self.num_bytes = num_bytes
        self.block = block
        self.index = index
        self.reference: weakref.ref[Any] | None = None


class LiveBytes(TorchDispatchMode):
    """Counts every storage that an operator returns from its birth to its death, each rounded up to 512 bytes.

    Entered as a context. What existed before is counted only where `add` was told of it. `mark` begins a moment; each
    moment has a peak of its own.
    """

    def __init__(self, workspaces: Mapping[Any, Callable[..., int]] | None = None) -> None:
        """`workspaces` tells for operators what they allocate and free inside, where no dispatch mode sees it."""
        super().__init__()
        self.live_bytes = 0
        self.peaks: dict[Hashable, Held] = {}
        """By moment; what was live when the most was."""
        self._workspaces = cpu_workspaces() if workspaces is None else workspaces
        self._held = [0, 0, 0, 0, 0]
        self._moment: Hashable = None
        self._moment_bytes = 0
        self._entries: dict[int, _Entry] = {}
        self._allocator = CachingAllocator()

    @property
    def peak(self) -> Held:
        return max(self.peaks.values(), key=lambda held: held.total, default=Held())

    @property
    def peak_bytes(self) -> int:
        return self.peak.total

    @property
    def wasted_bytes(self) -> int:
        """What a caching allocator would have reserved by now beyond the peak: rounding and gaps between blocks."""
        return max(0, self._allocator.reserved_bytes - self.peak_bytes)

    def mark(self, moment: Hashable) -> None:
        """From now on, what is live counts into `moment`; again into the same peak where it is named a second time."""
        self._moment = moment
        self._moment_bytes = self.peaks[moment].total if moment in self.peaks else -1
        self._note(0)

    def add(self, tensor: torch.Tensor, part: Part = "activations") -> None:
        """Counts the tensor's storage, once, until nothing holds it any more."""
        if tensor.layout == torch.sparse_coo:
            self.add(tensor._indices())
            self.add(tensor._values())
            return
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._entries:
            return
        num_bytes = round_up_bytes(storage.nbytes())
        entry = _Entry(num_bytes, _INDEX[part], self._allocator.allocate(num_bytes))

        def forget(_: object) -> None:
            del self._entries[address]
            self.live_bytes -= entry.num_bytes
            self._held[entry.index] -= entry.num_bytes
            self._allocator.free(entry.block)

        # PyTorch keeps one Python object a storage for as long as any tensor uses it, so this fires at its true end.
        entry.reference = weakref.ref(storage, forget)
        self._entries[address] = entry
        self.live_bytes += entry.num_bytes
        self._held[entry.index] += entry.num_bytes
        if self.live_bytes > self._moment_bytes:
            self._note(0)

    def move(self, tensor: torch.Tensor, part: Part) -> None:
        """From now on the tensor's storage is for something else: an activation has become a gradient."""
        self.add(tensor, part)
        entry = self._entries[tensor.untyped_storage()._cdata]
        self._held[entry.index] -= entry.num_bytes
        entry.index = _INDEX[part]
        self._held[entry.index] += entry.num_bytes

    def _note(self, workspace_bytes: int) -> None:
        self._moment_bytes = max(self._moment_bytes, self.live_bytes + workspace_bytes)
        base, adapter, gradients, optimizer, activations = self._held
        self.peaks[self._moment] = Held(base, adapter, gradients, optimizer, activations + workspace_bytes)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is _FIRST_OF_CLIPPING:
            self.mark("clip")
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.add(result)
        else:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self.add(leaf)
        if func in self._workspaces:
            workspace_bytes = self._workspaces[func](*args)
            self._allocator.free(self._allocator.allocate(workspace_bytes))
            if self.live_bytes + workspace_bytes > self._moment_bytes:
                self._note(workspace_bytes)
        return result


# The gradients' norms, first in clipping: everything of the backward pass that is not a gradient is gone by then.
_FIRST_OF_CLIPPING = torch.ops.aten._foreach_norm.Scalar


def round_up_bytes(num_bytes: int) -> int:
    return -(-num_bytes // ALLOCATION_UNIT_BYTES) * ALLOCATION_UNIT_BYTES


def _workspace_of_4bit_matmul(input: torch.Tensor, packed: torch.Tensor, shape: list[int], *_: object) -> int:
    """The whole weight in the input's type, and its scales in float32 before and after their offset is added.

    That is bitsandbytes/backends/default/ops.py, `_gemm_4bit_default_impl`. Its CUDA kernel spares the weight for few
    tokens only; a training step has many.
    """
    scales = round_up_bytes(-(-prod(shape) // 64) * 4)
    return round_up_bytes(prod(shape) * input.element_size()) + scales


def _size_of_8bit_product(quantized_input: torch.Tensor, quantized_weight: torch.Tensor) -> int:
    return quantized_input.numel() // quantized_input.shape[-1] * quantized_weight.shape[0]


def workspace_of_8bit_matmul(quantized_input: torch.Tensor, quantized_weight: torch.Tensor, *_: object) -> int:
    """On CUDA: the product in int32 and in float16, before it is cast (bitsandbytes/backends/cuda/ops.py)."""
    size = _size_of_8bit_product(quantized_input, quantized_weight)
    return round_up_bytes(4 * size) + round_up_bytes(2 * size)


def _workspace_of_8bit_matmul_on_cpu(quantized_input: torch.Tensor, quantized_weight: torch.Tensor, *_: object) -> int:
    """The product in int32, and in float32 before it is scaled (bitsandbytes/backends/default/ops.py)."""
    size = _size_of_8bit_product(quantized_input, quantized_weight)
    return 2 * round_up_bytes(4 * size)


def _workspace_of_mixed_8bit_matmul_on_cpu(input: torch.Tensor, *operands: torch.Tensor) -> int:
    return _workspace_of_8bit_matmul_on_cpu(*operands)


@functools.cache
def cpu_workspaces() -> dict[Any, Callable[..., int]]:
    """By operator; empty without bitsandbytes, whose operators they are."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {}
    # It registers its operators, whose names mean nothing before.
    import bitsandbytes  # noqa: F401

    return {
        torch.ops.bitsandbytes.gemm_4bit.default: _workspace_of_4bit_matmul,
        torch.ops.bitsandbytes.int8_scaled_mm.default: _workspace_of_8bit_matmul_on_cpu,
        torch.ops.bitsandbytes.int8_mixed_scaled_mm.default: _workspace_of_mixed_8bit_matmul_on_cpu,
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


def list_loose_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """What methods keep in plain dictionaries of their modules: FourierFT, WaveFT and SHiRA the places that they train,
    AdaMSS its clusters."""
    for module in model.modules():
        for _, kept in find_loose(module):
            yield from (value for value in kept.values() if isinstance(value, torch.Tensor))


def find_loose(module: nn.Module) -> list[tuple[str, dict[Any, Any]]]:
    """Attributes that are dictionaries with tensors; those of nn.Module itself begin with an underscore."""
    return [
        (name, value)
        for name, value in vars(module).items()
        if isinstance(value, dict) and not name.startswith("_") and any(map(torch.is_tensor, value.values()))
    ]
