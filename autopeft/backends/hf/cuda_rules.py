"""Where CUDA keeps other tensors than a CPU, so that a step on fake CPU tensors holds what it would hold on a GPU.

Fake CUDA tensors would need a CUDA build of PyTorch. Everything here is read from sources that are named; a GPU of its
own checks it with `benchmarks/vram.py`.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import subprocess
from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from autopeft.backends.base import ModelledGpu
from autopeft.backends.hf.live_bytes import cpu_workspaces, round_up_bytes, workspace_of_8bit_matmul

_IN_FLOAT32 = frozenset({
    "__pow__", "__rpow__", "__rtruediv__", "__rdiv__", "acos", "asin", "binary_cross_entropy_with_logits",
    "cosh", "cosine_embedding_loss", "cosine_similarity", "cross_entropy", "cumprod", "cumsum", "dist",
    "erfinv", "exp", "expm1", "group_norm", "kl_div", "l1_loss", "layer_norm", "log", "log10", "log1p", "log2",
    "log_softmax", "mse_loss", "nll_loss", "norm", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh",
    "smooth_l1_loss", "softmax", "softplus", "sum", "tan",
})  # fmt: skip
"""Functions that CUDA's autocast runs in float32, by their Python names
(docs.pytorch.org/docs/stable/amp.html#cuda-ops-that-can-autocast-to-float32); the CPU's has other lists."""


class GpuRules(TorchFunctionMode):
    """CUDA's autocast, dropout and attention instead of the CPU's."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention and "dropout_p" in kwargs:
            # CUDA's fused kernels take dropout, while a CPU then keeps all attention weights.
            kwargs["dropout_p"] = 0.0
        elif func is F.dropout:
            return _dropout(*args, **kwargs)
        elif getattr(func, "__name__", "") in _IN_FLOAT32 and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map(_to_float32, (args, kwargs))
        return func(*args, **kwargs)


def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
    """CUDA keeps a mask of one byte a number (native/Dropout.cpp, is_fused_kernel_acceptable), a CPU all the noise."""
    if training and 0 < p < 1:
        dropped: torch.Tensor = torch.native_dropout(input, p, True)[0]
        return dropped
    return F.dropout(input, p, training, inplace)


def _to_float32(value: Any) -> Any:
    is_low = isinstance(value, torch.Tensor) and value.dtype in (torch.bfloat16, torch.float16)
    return value.float() if is_low else value


class OnGpu(nn.Module):
    """A model on fake CPU tensors under bfloat16 autocast, as `train_step` puts it on CUDA."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **batch: torch.Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(**batch)


# --- what operators allocate for themselves


def _workspace_of_attention_backward(grad: torch.Tensor, query: torch.Tensor, *_: object) -> int:
    """Flash attention sums the query's gradient in float32, with tokens rounded up to 128 and the head's width to 32,
    beside a float32 number a query (native/transformers/cuda/flash_attn/flash_api.cpp, mha_bwd); the memory-efficient
    kernel, which takes masks, does alike."""
    *batch, tokens, width = query.shape
    rounded = prod(batch) * (-(-tokens // 128) * 128)
    return round_up_bytes(4 * rounded * (-(-width // 32) * 32)) + round_up_bytes(4 * rounded)


def _workspace_of_8bit_quantization(input: torch.Tensor, *_: object) -> int:
    """Absolute values in float16, then the outliers' mask (bitsandbytes/backends/cuda/ops.py)."""
    return round_up_bytes(2 * input.numel()) + round_up_bytes(input.numel())


@functools.cache
def cuda_workspaces() -> dict[Any, Callable[..., int]]:
    """By operator, in place of a CPU's."""
    workspaces = dict(cpu_workspaces())
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    workspaces[attention] = _workspace_of_attention_backward
    if importlib.util.find_spec("bitsandbytes") is not None:
        workspaces[torch.ops.bitsandbytes.int8_scaled_mm.default] = workspace_of_8bit_matmul
        workspaces[torch.ops.bitsandbytes.int8_vectorwise_quant.default] = _workspace_of_8bit_quantization
    return workspaces


# --- what the libraries keep


MODELLED_GPU = ModelledGpu(name="H100", capability=(9, 0))
"""Modelled where no GPU is at hand and none is named."""

_NUM_HANDLES = 2
"""The forward pass runs in the caller's thread and the backward pass in autograd's, each with a cuBLAS handle."""


def cublas_workspace_bytes(gpu: ModelledGpu) -> int:
    """Of both handles, allocated through PyTorch's allocator at the first product and kept, so part of every peak.

    ATen/cuda/CublasHandlePool.cpp of PyTorch 2.8 to 2.13, parseChosenWorkspaceSize: `:4096:2:16:8` KiB, and 32 MiB on
    compute capability 9, 10 and 12; cuBLASLt shares it. The environment variable wins.
    """
    chosen = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    pairs = re.findall(r":(\d+):(\d+)", chosen)
    if not pairs:
        pairs = [("4096", "8")] if gpu.capability[0] in (9, 10, 12) else [("4096", "2"), ("16", "8")]
    return _NUM_HANDLES * sum(int(size) * 1024 * int(count) for size, count in pairs)


def find_gpu(number: str | None = None) -> ModelledGpu | None:
    """The GPU of this machine that nvidia-smi has under that number, or its first; without loading CUDA. None where
    there is none."""
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    query += [] if number is None else [f"--id={number}"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
        name, capability = output.splitlines()[0].rsplit(",", 1)
        major, minor = capability.strip().split(".")
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None
    return ModelledGpu(name=name.strip(), capability=(int(major), int(minor)))
