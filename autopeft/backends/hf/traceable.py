"""peft's methods that read values while they build or step, made to do without: the cost model's tensors have none.

Shapes and lifetimes stay those of the real code; a test compares both with real tensors. Everything is put back
when the context ends.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.adamss import layer as adamss_layer
from peft.tuners.unilora.model import UniLoraModel
from peft.utils.integrations import dequantize_bnb_weight
from torch.overrides import TorchFunctionMode

from autopeft.backends.hf.live_bytes import find_loose
from autopeft.backends.hf.peft_stand_ins import replacing


@contextlib.contextmanager
def building_without_values() -> Iterator[None]:
    """For a build on the meta device. Decompositions, clusters and counts give tensors of the right shape."""
    with replacing(
        (adamss_layer, "clustering_Z", _cluster_evenly),
        (UniLoraModel, "_assign_unilora_indices_and_scales", _assign_scales),
    ):
        yield


@contextlib.contextmanager
def stepping_without_values(model: torch.nn.Module) -> Iterator[None]:
    """For a step of `model` on fake tensors. What a value would decide goes as in almost every real step."""
    _fake_loose_tensors(model)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_Decided())
        if importlib.util.find_spec("bitsandbytes") is not None:
            # The package's own attribute of that name is None.
            hira_bnb = importlib.import_module("peft.tuners.hira.bnb")
            stack.enter_context(replacing((hira_bnb, "dequantize_bnb_weight", _dequantize)))
        yield


def _fake_loose_tensors(model: torch.nn.Module) -> None:
    """Those in plain dictionaries, where nothing else that fakes a model finds them."""
    fakes: dict[int, torch.Tensor] = {}

    def fake(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        return fakes.setdefault(id(value), torch.empty(value.shape, dtype=value.dtype))

    for module in model.modules():
        for name, kept in find_loose(module):
            setattr(module, name, {key: fake(value) for key, value in kept.items()})


class _Decided(TorchFunctionMode):
    """LoHa and LoKr draw whether a module drops out (it stays), VB-LoRA looks for infinite logits (there are none)."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (torch.Tensor.gt, torch.Tensor.__gt__) and getattr(args[0], "_drawn", False):
            return True
        if func is torch.Tensor.any and getattr(args[0], "_is_infinite", False):
            return False
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and args == (1,):
            result._drawn = True
        elif func is torch.Tensor.isinf:
            result._is_infinite = True
        return result


def _cluster_evenly(rows: torch.Tensor, num_subspaces: int, num_iterations: int) -> tuple[torch.Tensor, int]:
    """AdaMSS trains as many numbers however the rows fall into clusters (of rank 1, as autopeft has it)."""
    num_clusters = min(num_subspaces, rows.shape[0])
    return torch.arange(rows.shape[0], device="cpu") % num_clusters, num_clusters


def _assign_scales(self: Any, adapter_name: str) -> None:
    for module in self._iter_unilora_layers():
        if adapter_name in module.unilora_indices_A:
            scales = (module.unilora_indices_A[adapter_name].float(), module.unilora_indices_B[adapter_name].float())
            module.update_scaling(adapter_name, *scales)


def _dequantize(weight: torch.nn.Parameter, state: Any) -> torch.Tensor:
    """peft tells packed weights by the name of their class, which a fake parameter does not have."""
    import bitsandbytes

    packed = isinstance(state, bitsandbytes.functional.QuantState)
    dequantized: torch.Tensor = (
        bitsandbytes.functional.dequantize_4bit(weight.data, state) if packed else dequantize_bnb_weight(weight, state)
    )
    return dequantized
