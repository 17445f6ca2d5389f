"""bitsandbytes' layers and optimizer states without data. The only module of the cost model that needs bitsandbytes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.autograd._functions import MatMul8bitLt
from torch import nn
from transformers.integrations.bitsandbytes import replace_with_bnb_linear

# NF4 with double quantization (QLoRA, arXiv:2305.14314), laid out as by bitsandbytes' quantize_4bit.
_WEIGHTS_PER_SCALE = 64
_SCALES_PER_SCALE = 256
_NUMBERS_IN_A_CODE = 256


def quantize_fake(model: Any, quantization: Any, kept: Sequence[str], *, on_gpu: bool) -> None:
    """Replaces a meta model's linear layers by quantized ones, but for those `kept`, laid out as bitsandbytes does."""
    replace_with_bnb_linear(model, list(kept), quantization)
    with torch.device("meta"):
        for module in model.modules():
            if isinstance(module, bitsandbytes.nn.Linear4bit):
                _quantize_to_4bit(module)
            elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
                _quantize_to_8bit(module, on_gpu=on_gpu)


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
    is_fake_8bit = True

    @property
    def W_q(self) -> Any:
        return self.weight

    def dequantize(self) -> torch.Tensor:
        dequantized: torch.Tensor = bitsandbytes.functional.int8_vectorwise_dequant(self.weight.data, self.state.SCB)
        return dequantized


class _FakeLinear8bitOnGpu(_FakeLinear8bit):
    """bitsandbytes picks the function by the tensor's device: on CPU it would dequantize the weight instead.

    Without outlier columns, whose number depends on the data: a few in thousands (arXiv:2208.07339).
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
