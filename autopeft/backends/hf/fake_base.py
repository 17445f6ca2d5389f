"""A base model without weights: first on the meta device, where adapters are put on it, then on fake CPU tensors.

Fake tensors know shape, type and lifetime and hold no data, so that a 70B model fits into a laptop. Fake CUDA tensors
would need a CUDA build of PyTorch; where a GPU keeps other tensors than a CPU, `cuda_rules` sees to it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from autopeft.backends.hf.base_model import (
    BaseModel,
    build_meta_model,
    compute_dtype,
    find_head,
    make_base,
    quantization_config,
)
from autopeft.records import Bits


def build_meta_base(config: Any, *, bits: Bits, device_kind: str) -> BaseModel:
    """What `load_base` gives, on the meta device: adapters can be put on it, but it cannot run."""
    model = build_meta_model(config, compute_dtype(device_kind))
    if bits < 16:
        head = find_head(model)
        quantization = quantization_config(bits, head, compute_dtype(device_kind))
        # Only here: without bitsandbytes everything but 4 and 8 bits works.
        from autopeft.backends.hf.fake_quantized import quantize_fake

        # As transformers' quantizers do: T5 keeps the projection out of its feed-forward.
        kept = [*head, *(model._keep_in_fp32_modules or [])]
        quantize_fake(model, quantization, kept, on_gpu=device_kind == "cuda")
        # peft chooses its layers by these flags.
        model.is_quantized = True
        setattr(model, f"is_loaded_in_{bits}bit", True)
    model.requires_grad_(False)
    return make_base(model, bits)


def make_fake(model: Any) -> dict[int, torch.Tensor]:
    """Replaces a meta model's tensors by fake ones of the FakeTensorMode that is active: now it runs.

    Returns the fakes by the `id` of what they replace, which the caller must hold for it to mean anything.

    Adapters are put on before: peft moves its modules with `Module.to`, which fake tensors do not survive.
    """
    fakes: dict[int, torch.Tensor] = {}
    parameters: dict[int, nn.Parameter] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        # Tied weights must stay tied, or they would count twice, and their gradients too.
        if id(tensor) not in fakes:
            fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
        return fakes[id(tensor)]

    def fake_parameter(parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in parameters:
            parameters[id(parameter)] = _fake_parameter(parameter, fake)
        return parameters[id(parameter)]

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = fake_parameter(parameter)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
        if getattr(module, "is_fake_8bit", False):
            module.state = _fake_state(module.state, fake)
            module.state.CB = module.weight.data
    if hasattr(model, "prompt_tokens"):
        # peft keeps the ids of virtual tokens in a plain dictionary.
        model.prompt_tokens = {name: fake(ids) for name, ids in model.prompt_tokens.items()}
    return fakes


def _fake_parameter(parameter: nn.Parameter, fake: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    replaced = nn.Parameter(fake(parameter), requires_grad=parameter.requires_grad)
    for name, value in vars(parameter).items():
        setattr(replaced, name, _fake_state(value, fake) if name == "quant_state" else value)
    return replaced


def _fake_state(state: Any, fake: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of a quantization state, the nested one included; the base keeps its own."""
    replaced = copy.copy(state)
    for name, value in vars(state).items():
        if isinstance(value, torch.Tensor):
            setattr(replaced, name, fake(value))
        elif name == "state2" and value is not None:
            replaced.state2 = _fake_state(value, fake)
    return replaced


class OneEndOfSequence(TorchFunctionMode):
    """T5 and BART classify by the hidden state of each row's one end-of-sequence token, which fake ids cannot show."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.unique_consecutive:
            return args[0].new_empty(1)
        if func is torch.Tensor.__getitem__ and _picks_tokens(args[1]):
            return args[0][:, -1].clone()
        return func(*args, **(kwargs or {}))


def keep_function_modes() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For `checkpoint_activations`: a layer runs again under the function modes that it ran under the first time.

    Otherwise it would run under none: `Tensor.backward` is itself handled by every mode, each is off while it handles,
    and inside of the last autograd begins.
    """
    return nullcontext(), _under(_get_current_function_mode_stack())


@contextmanager
def _under(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    with ExitStack() as stack:
        for mode in modes:
            if mode not in _get_current_function_mode_stack():
                stack.enter_context(mode)
        yield


def _picks_tokens(index: Any) -> bool:
    mask_BT = index[0] if isinstance(index, tuple) and len(index) == 2 and index[1] == slice(None) else None
    return isinstance(mask_BT, torch.Tensor) and mask_BT.dtype == torch.bool and mask_BT.dim() == 2


class EveryLayerAndExpert(TorchFunctionMode):
    """Skips no layer, which LayerDrop would decide by a drawn number, and computes experts' products in float32, which
    CPUs do and PyTorch's fakes refuse."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.rand and args == ([],):
            return 1.0
        if getattr(func, "__name__", "") == "_grouped_mm" and args[0].dtype != torch.bfloat16:
            return _GroupedProduct.apply(args[0], args[1])
        return func(*args, **(kwargs or {}))


class _GroupedProduct(torch.autograd.Function):
    """Experts' products in float32, which CPUs compute and PyTorch's fakes refuse: the same results, without values."""

    @staticmethod
    def forward(ctx: Any, input_SK: torch.Tensor, weight_EKN: torch.Tensor) -> torch.Tensor:
        needs_input, needs_weight = ctx.needs_input_grad
        # As the real one: frozen experts need no input, and what is not differentiated no weight.
        ctx.save_for_backward(input_SK if needs_weight else None, weight_EKN if needs_input else None)
        # A gradient laid out otherwise than its parameter would be copied.
        ctx.layouts = (input_SK.shape, input_SK.stride()), (weight_EKN.shape, weight_EKN.stride())
        return input_SK.new_empty(input_SK.shape[0], weight_EKN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        _ = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad
        of_input, of_weight = ctx.layouts
        return (
            grad_SN.new_empty_strided(*of_input) if needs_input else None,
            grad_SN.new_empty_strided(*of_weight) if needs_weight else None,
        )
