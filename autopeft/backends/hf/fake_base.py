"""A base model without weights: first on the meta device, where adapters are put on it, then on fake CPU tensors.

Fake tensors know shape, type and lifetime and hold no data, so that a 70B model fits into a laptop. Fake CUDA tensors
would need a CUDA build of PyTorch; where a GPU keeps other tensors than a CPU, `cuda_rules` sees to it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

from autopeft.backends.hf.base_model import (
    BaseModel,
    build_meta_model,
    compute_dtype,
    find_head,
    find_linear_names,
    quantization_config,
)
from autopeft.records import Bits

# NF4 with double quantization (QLoRA, arXiv:2305.14314, section 3), laid out as by bitsandbytes' quantize_4bit.
_WEIGHTS_PER_SCALE = 64
_SCALES_PER_SCALE = 256
_NUMBERS_IN_A_CODE = 256


def build_meta_base(config: Any, *, bits: Bits, device_kind: str) -> BaseModel:
    """What `load_base` gives, on the meta device: adapters can be put on it, but it cannot run."""
    model = build_meta_model(config, compute_dtype(device_kind))
    head = find_head(model)
    if bits < 16:
        quantization = quantization_config(bits, head, compute_dtype(device_kind))
        # As transformers' quantizers do: T5 keeps the projection out of its feed-forward.
        replace_with_bnb_linear(model, [*head, *(model._keep_in_fp32_modules or [])], quantization)
        # peft chooses its layers by these flags.
        model.is_quantized = True
        setattr(model, f"is_loaded_in_{bits}bit", True)
    with torch.device("meta"):
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                _quantize_to_4bit(module)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                _quantize_to_8bit(module, on_gpu=device_kind == "cuda")
    model.requires_grad_(False)
    return BaseModel(model=model, bits=bits, head=head, linear_names=find_linear_names(model, head))


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
        if isinstance(module, _FakeLinear8bit):
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


@contextlib.contextmanager
def fake_state_codes() -> Iterator[None]:
    """8-bit optimizers get codebooks without values: bitsandbytes computes theirs from tensors that it reads."""
    compute = bitsandbytes.functional.create_dynamic_map
    bitsandbytes.functional.create_dynamic_map = lambda signed: torch.empty(_NUMBERS_IN_A_CODE)
    try:
        yield
    finally:
        bitsandbytes.functional.create_dynamic_map = compute


class _FakeLinear4bit(bitsandbytes.nn.Linear4bit):
    @property
    def W_q(self) -> Any:
        """peft asks a layer with this attribute to dequantize itself (peft/utils/integrations.py).

        Of any other it would take the packed weight for the weight, because a fake parameter is never a `Params4bit`.
        """
        return self.weight

    def dequantize(self) -> torch.Tensor:
        dequantized: torch.Tensor = bitsandbytes.functional.dequantize_4bit(self.weight.data, self.weight.quant_state)
        return dequantized


class _FakeLinear8bit(bitsandbytes.nn.Linear8bitLt):
    @property
    def W_q(self) -> Any:
        return self.weight

    def dequantize(self) -> torch.Tensor:
        dequantized: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(self.weight.data, self.state.SCB)
        return dequantized


class _FakeLinear8bitOnGpu(_FakeLinear8bit):
    """bitsandbytes picks the function by the tensor's device: on CPU it would dequantize the weight instead.

    Without outlier columns, whose number depends on the data: a few in thousands (arXiv:2208.07339, section 4).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = MatMul8bitLt.apply(x, self.weight, None, self.bias, self.state)
        return output


def _quantize_to_4bit(module: Any) -> None:
    shape = module.weight.shape
    num_scales = -(-shape.numel() // _WEIGHTS_PER_SCALE)
    module.__class__ = _FakeLinear4bit
    # It would repack weights in evaluation, which `load_base` forbids and no GPU does.
    module.support_avx512bf16_for_cpu = False
    module.weight = nn.Parameter(torch.empty(-(-shape.numel() // 2), 1, dtype=torch.uint8), requires_grad=False)
    module.weight.compress_statistics = True
    module.weight.quant_type = "nf4"
    module.weight.quant_state = bitsandbytes.functional.QuantState(
        absmax=torch.empty(num_scales, dtype=torch.uint8),
        shape=shape,
        dtype=module.compute_dtype,
        blocksize=_WEIGHTS_PER_SCALE,
        code=torch.empty(16),
        quant_type="nf4",
        offset=torch.empty(()),
        state2=bitsandbytes.functional.QuantState(
            absmax=torch.empty(-(-num_scales // _SCALES_PER_SCALE)),
            blocksize=_SCALES_PER_SCALE,
            code=torch.empty(256),
            dtype=torch.float32,
        ),
    )


def _quantize_to_8bit(module: Any, *, on_gpu: bool) -> None:
    shape = module.weight.shape
    module.__class__ = _FakeLinear8bitOnGpu if on_gpu else _FakeLinear8bit
    module.weight = nn.Parameter(torch.empty(shape, dtype=torch.int8), requires_grad=False)
    # As after the first forward, which moves both from the weight into the state.
    module.weight.CB = module.weight.SCB = None
    module.state.CB = module.weight.data
    module.state.SCB = torch.empty(shape[0])
    module.state.threshold = 0.0


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
        ctx.save_for_backward(input_SK, weight_EKN)
        return input_SK.new_empty(input_SK.shape[0], weight_EKN.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_SN: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        input_SK, weight_EKN = ctx.saved_tensors
        needs_input, needs_weight = ctx.needs_input_grad
        return (
            torch.empty_like(input_SK) if needs_input else None,
            torch.empty_like(weight_EKN) if needs_weight else None,
        )
