"""bitsandbytes' paged AdamW, its pages given back when an optimizer is gone and used again by the next.

bitsandbytes 0.50.2 never frees memory that it had CUDA manage: a paged tensor is an array over a pointer that nobody
owns (functional.get_paged), and GlobalPageManager keeps every one. A worker that trains one trial after another would
fill the machine's memory with states of trials that have ended, two sets for each, since the probe has one too.
"""

from __future__ import annotations

import functools
import weakref
from collections import defaultdict
from typing import Any

import torch

_Key = tuple[torch.device, int]
_free: defaultdict[_Key, list[torch.Tensor]] = defaultdict(list)
"""Pages that no optimizer holds, by device and bytes."""


def build_paged_adamw(groups: list[dict[str, Any]], **arguments: Any) -> torch.optim.Optimizer:
    """An 8-bit AdamW whose larger states are paged, on pages of optimizers that are gone as far as there are any."""
    optimizer: torch.optim.Optimizer = _paged_adamw()(groups, **arguments, is_paged=True)
    return optimizer


@functools.cache
def _paged_adamw() -> type[Any]:
    # Only here: without bitsandbytes everything but 4 and 8 bits works.
    import bitsandbytes

    class PagedAdamW(bitsandbytes.optim.AdamW8bit):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self._pages: list[tuple[_Key, torch.Tensor]] = []
            super().__init__(*args, **kwargs)
            weakref.finalize(self, _give_back, self._pages).atexit = False

        def get_state_buffer(self, p: torch.Tensor, dtype: torch.dtype = torch.float32) -> Any:
            key = (p.device, p.numel() * dtype.itemsize)
            page = _free[key].pop() if _free[key] else None
            buffer = super().get_state_buffer(p, dtype=dtype) if page is None else _reuse(page, p, dtype)
            if getattr(buffer, "is_paged", False):
                self._pages.append((key, buffer))
            return buffer

    return PagedAdamW


def _reuse(page: Any, p: torch.Tensor, dtype: torch.dtype) -> Any:
    """The same memory for a parameter of another shape, zeroed."""
    buffer: Any = page.view(torch.uint8).view(-1).view(dtype).view(p.shape)
    if torch.cuda.is_available():
        # The processor writes next, where a kernel of the optimizer before may not have ended.
        torch.cuda.synchronize()
    buffer.zero_()
    buffer.is_paged, buffer.page_deviceid = page.is_paged, page.page_deviceid
    return buffer


def _give_back(pages: list[tuple[_Key, torch.Tensor]]) -> None:
    for key, page in pages:
        _free[key].append(page)
