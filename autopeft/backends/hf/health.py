"""Whether the libraries that train work on this machine, and not only whether they are there."""

from __future__ import annotations

import logging
from typing import NamedTuple

import torch

from autopeft.errors import DeviceError
from autopeft.wording import say_count


class TorchFacts(NamedTuple):
    has_cuda: bool
    detail: str
    built_for: str | None
    """The CUDA version that torch was compiled for; None for a build without."""


def examine_torch() -> TorchFacts:
    has_cuda = torch.cuda.is_available()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    seen = f", sees {say_count(torch.cuda.device_count(), 'GPU')}" if has_cuda else ""
    return TorchFacts(has_cuda, f"{torch.__version__}, {build}{seen}", torch.version.cuda)


def check_cuda() -> None:
    """Raises DeviceError where torch cannot use the GPU that nvidia-smi has shown."""
    facts = examine_torch()
    if not facts.has_cuda:
        raise DeviceError(
            f"Workers train on the GPUs that nvidia-smi shows, but torch {facts.detail}, cannot use them: autopeft "
            "doctor says what to install or update. Where CUDA_VISIBLE_DEVICES is empty, new searches run on the CPU."
        )


def examine_bitsandbytes(device: str) -> str | None:
    """Quantizes a matrix and multiplies by it; why that fails, or None. Imported is not yet working."""
    logger = logging.getLogger("bitsandbytes")
    level = logger.level
    # It advises of faster kernels from elsewhere.
    logger.setLevel(logging.CRITICAL)
    try:
        import bitsandbytes

        weight = torch.randn(64, 64, device=device)
        packed, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        product = bitsandbytes.matmul_4bit(torch.randn(4, 64, device=device), packed.t(), quant_state=state)
        return None if bool(torch.isfinite(product).all()) else "its product is not finite"
    except Exception as exc:
        # Whatever a broken installation raises is what the user wants to know.
        return " ".join(f"{type(exc).__name__}: {exc}".split())[:200]
    finally:
        logger.setLevel(level)
