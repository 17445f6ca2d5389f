"""Faster float32 matrix products on CPUs that are not Intel's.

PyTorch sends them to MKL, which runs its AVX-512 kernels on Intel's processors alone: on an AMD EPYC with AVX-512 it
makes 114 GFLOP/s a core where oneDNN, which PyTorch ships beside it, makes 255. Three quarters of a training step on
CPU are such products. They stay float32; their sums are only added up in another order.
"""

from __future__ import annotations

import functools
import os
import warnings
from pathlib import Path

import torch

_FEWEST_MULTIPLICATIONS = 1 << 20
"""Below a few 10 microseconds of work, calling through Python costs more than the faster kernel saves."""

_SHAPES_KEPT = "64"
"""oneDNN and PyTorch's layer above it compile code for each shape, 0.6 MB each, and keep the last 1024. Batches differ
in length, so all of that would be used; a step uses each of its shapes once a layer, and compiling takes a third of one
product's time."""

_library: torch.library.Library | None = None


@functools.cache
def prefers_onednn() -> bool:
    """A rule, not a timing: the same machine must always compute the same bits."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available() and cpu_vendor() == "AuthenticAMD"


def cpu_vendor() -> str:
    """As the processor names it; `` where the system does not tell (only Linux does)."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


def install_onednn_products() -> None:
    """From now on, `mm` and `addmm` on CPU float32 tensors of this process are oneDNN's, forward and backward alike.

    Autograd, fake tensors and every other type and device are untouched. Called once by a worker; again does nothing.
    """
    global _library
    if _library is None:
        # Read at the first product.
        for cache in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
            os.environ.setdefault(cache, _SHAPES_KEPT)
        _library = torch.library.Library("aten", "IMPL")
        with warnings.catch_warnings():
            # PyTorch warns that kernels are being replaced, which is what we want.
            warnings.simplefilter("ignore")
            _library.impl("mm", _mm, "CPU")
            _library.impl("addmm", _addmm, "CPU")


def _mm(a_MK: torch.Tensor, b_KN: torch.Tensor) -> torch.Tensor:
    if _is_worth_it(a_MK, b_KN):
        return _linear(a_MK, b_KN, None)
    # The variant with `out` is another operator, whose kernel is still PyTorch's own.
    return torch.mm(a_MK, b_KN, out=a_MK.new_empty((a_MK.shape[0], b_KN.shape[1])))


def _addmm(
    bias: torch.Tensor, a_MK: torch.Tensor, b_KN: torch.Tensor, *, beta: float = 1, alpha: float = 1
) -> torch.Tensor:
    if bias.dim() == 1 and beta == 1 and alpha == 1 and bias.dtype == a_MK.dtype and _is_worth_it(a_MK, b_KN):
        return _linear(a_MK, b_KN, bias)
    out = a_MK.new_empty((a_MK.shape[0], b_KN.shape[1]))
    return torch.addmm(bias, a_MK, b_KN, beta=beta, alpha=alpha, out=out)


def _is_worth_it(a_MK: torch.Tensor, b_KN: torch.Tensor) -> bool:
    return (
        a_MK.dtype == b_KN.dtype == torch.float32
        and a_MK.shape[1] == b_KN.shape[0]
        and a_MK.shape[0] * a_MK.shape[1] * b_KN.shape[1] >= _FEWEST_MULTIPLICATIONS
    )


def _linear(a_MK: torch.Tensor, b_KN: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    # A transposed view costs no copy, but for a part of a larger matrix (VeRA's slices) oneDNN falls back on plain
    # loops, a thousand times slower.
    weight_NK = b_KN.t() if b_KN.is_contiguous() or b_KN.t().is_contiguous() else b_KN.t().contiguous()
    # What torch.compile calls for a linear layer.
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a_MK, weight_NK, bias, "none", [], "")
    return product
