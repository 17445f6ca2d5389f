"""Parts of peft 0.21.2 done otherwise: BOFT's block-diagonal product without a compiler, and what some methods read
from values, for models that have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import peft.tuners.boft.layer as boft
import peft.tuners.shira.config as shira_config
import peft.tuners.shira.layer as shira
import peft.tuners.waveft.layer as waveft
import torch
from peft.utils.quantization_utils import Bnb4bitBackend
from torch.overrides import TorchFunctionMode

# N = butterfly factors, D = blocks of each, H = width of a block


class _BlockDiagonal:
    """What peft compiles from CUDA sources at first use, in PyTorch."""

    def forward(self, blocks_NDHH: torch.Tensor) -> list[torch.Tensor]:
        return [torch.stack([torch.block_diag(*blocks_DHH) for blocks_DHH in blocks_NDHH])]

    def backward(self, gradient: torch.Tensor, blocks_NDHH: torch.Tensor) -> list[torch.Tensor]:
        num_factors, num_blocks, width, _ = blocks_NDHH.shape
        grid = gradient.view(num_factors, num_blocks, width, num_blocks, width)
        return [grid.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)]


def install_block_diagonal() -> None:
    """Lets BOFT have butterfly factors on every machine.

    Where its CUDA kernel cannot be compiled, peft would train a single factor instead, and where it can, would start a
    compiler in the middle of a trial.
    """
    boft._FBD_CUDA = _BlockDiagonal()


@contextlib.contextmanager
def replacing(*stand_ins: tuple[Any, str, Any]) -> Iterator[None]:
    """Puts each (owner, name, stand-in) in place of what a class or module itself defines, until the context ends."""
    # Not by getattr, which would bring a static method back as a plain function.
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in stand_ins]
    try:
        for owner, name, stand_in in stand_ins:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


@contextlib.contextmanager
def shapes_without_values() -> Iterator[None]:
    """For models on the meta device or of fake tensors, which can tell no number: the same shapes from no values."""
    with replacing(
        (boft.BOFTLayer, "block_butterfly_perm", lambda self, width, *rest: torch.empty(width, dtype=torch.int64)),
        (boft.BOFTLayer, "perm2mat", lambda self, order: torch.empty(len(order), len(order))),
        (shira_config, "random_mask", lambda *arguments, **keywords: None),
        (shira.ShiraLayer, "update_layer", _update_shira_layer),
        (shira.Linear, "get_delta_weight", lambda layer, adapter: _SparseUpdate(layer, adapter)),
        (waveft.WaveFTLayer, "get_delta_weight", _wavelet_update),
        # A fake parameter is never a `Params4bit`, by which peft would know it (`_FakeLinear4bit`).
        (Bnb4bitBackend, "get_base_weight", lambda self, layer: layer.dequantize()),
    ):
        yield


def _update_shira_layer(layer: Any, adapter: str, mask: None, r: int, *arguments: Any, **keywords: Any) -> None:
    _UPDATE_SHIRA_LAYER(layer, adapter, mask, r, *arguments, **keywords)
    layer.shira_indices[adapter] = torch.empty(2, layer.shira_weight[adapter].numel(), dtype=torch.int32)


_UPDATE_SHIRA_LAYER = shira.ShiraLayer.update_layer


class _SparseUpdate:
    """SHiRA's update, a sparse tensor, which fake tensors cannot differentiate: what is kept of it, to be added."""

    def __init__(self, layer: Any, adapter: str) -> None:
        # PyTorch's sparse tensors take indices of 64 bits, and peft keeps 32.
        self.indices = layer.shira_indices[adapter].long()
        self.values = layer.shira_weight[adapter] * layer.scaling[adapter]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func in (torch.Tensor.__iadd__, torch.Tensor.add_), func
        dense, update = args
        return _AddSparse.apply(dense, update.values, update.indices)


class _AddSparse(torch.autograd.Function):
    """dense += sparse, in which dense gets no gradient."""

    @staticmethod
    def forward(ctx: Any, dense: torch.Tensor, values: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(dense)
        ctx.save_for_backward(values, indices)
        return dense

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, torch.Tensor, None]:
        values, indices = ctx.saved_tensors
        # The gradient at those places, as a sparse tensor with indices of its own.
        taken, _ = torch.empty_like(values), indices.clone()
        return None, taken, None


def _wavelet_update(layer: Any, adapter: str) -> torch.Tensor:
    with _EveryPlaceIsInside():
        update: torch.Tensor = _WAVELET_UPDATE(layer, adapter)
    return update


_WAVELET_UPDATE = waveft.WaveFTLayer.get_delta_weight


class _EveryPlaceIsInside(TorchFunctionMode):
    """WaveFT selects by a mask the places that lie inside of its padded spectrum, which are all."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.__getitem__:
            values, index = args
            if _is_mask(index):
                return _SelectAll.apply(values, index)
            if isinstance(index, tuple) and _is_mask(index[-1]):
                return values.clone()
        return func(*args, **(kwargs or {}))


def _is_mask(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.bool


class _SelectAll(torch.autograd.Function):
    """Selection by a mask that leaves nothing out: keeps what the real one keeps."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(mask)
        return values.new_empty(values.shape)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient.new_zeros(gradient.shape), None
