"""Parts of peft 0.21.2 done otherwise: BOFT's block-diagonal product without a compiler, and what some methods read
from values, for models that have none."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import peft.tuners.boft.layer as boft
import peft.tuners.fourierft.layer as fourierft
import peft.tuners.shira.config as shira_config
import peft.tuners.shira.layer as shira
import peft.tuners.waveft.layer as waveft
import torch
from peft.utils.quantization_utils import Bnb4bitBackend

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
def shapes_without_values() -> Iterator[None]:
    """For models on the meta device or of fake tensors, which can tell no number: the same shapes from no values."""
    replaced: list[tuple[Any, str, Any]] = [
        (boft.BOFTLayer, "block_butterfly_perm", lambda self, width, *rest: torch.empty(width, dtype=torch.int64)),
        (boft.BOFTLayer, "perm2mat", lambda self, order: torch.empty(len(order), len(order))),
        (shira_config, "random_mask", lambda *arguments, **keywords: None),
        (shira.Linear, "get_delta_weight", _dense_update),
        (fourierft.FourierFTLayer, "get_delta_weight", _fourier_update),
        (waveft.WaveFTLayer, "get_delta_weight", _wavelet_update),
        # A fake parameter is never a `Params4bit`, by which peft would know it (`_FakeLinear4bit`).
        (Bnb4bitBackend, "get_base_weight", lambda self, layer: layer.dequantize()),
    ]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    try:
        for owner, name, stand_in in replaced:
            setattr(owner, name, stand_in)
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _dense_update(layer: Any, adapter: str) -> torch.Tensor:
    """SHiRA's update without its sparse tensor, which fake tensors cannot differentiate."""
    return _scatter(layer.shira_weight[adapter], layer.out_features, layer.in_features)


def _fourier_update(layer: Any, adapter: str) -> torch.Tensor:
    """FourierFT's update without its places, which peft keeps where nothing that fakes a model finds them."""
    spectrum = layer.fourierft_spectrum[adapter]
    dense = _scatter(spectrum.float(), layer.out_features, layer.in_features)
    update: torch.Tensor = torch.fft.ifft2(dense).real * layer.fourierft_scaling[adapter]
    return update.to(spectrum.dtype)


def _wavelet_update(layer: Any, adapter: str) -> torch.Tensor:
    """WaveFT's update without its check that every place lies inside, which asks for the places' values."""
    family = layer.waveft_wavelet_family[adapter]
    rows, columns = (
        size + lost + (size + lost) % 2
        for size, lost in zip((layer.out_features, layer.in_features), waveft.WAVELET_REDUCTIONS[family], strict=True)
    )
    upper, lower = _scatter(layer.waveft_spectrum[adapter], rows, columns).chunk(2)
    (average, horizontal), (vertical, diagonal) = upper.chunk(2, dim=1), lower.chunk(2, dim=1)
    update = waveft.waverec2d((average, (horizontal, vertical, diagonal)), family) * layer.waveft_scaling[adapter]
    cropped: torch.Tensor = update[: layer.out_features, : layer.in_features]
    return cropped


def _scatter(values: torch.Tensor, num_rows: int, num_columns: int) -> torch.Tensor:
    places = torch.empty(values.shape, dtype=torch.int64)
    return torch.zeros(num_rows * num_columns, dtype=values.dtype).index_put((places,), values).view(num_rows, -1)
