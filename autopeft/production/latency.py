"""What a trained model costs to serve: its latency as it is and merged, and the bytes that it takes on disk."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch

from autopeft.backends.hf.base_model import BaseModel, load_base
from autopeft.backends.hf.data import TaskData
from autopeft.backends.hf.latency import measure_latencies
from autopeft.executors.devices import describe_cpu
from autopeft.methods import find_method
from autopeft.records import Bits, Inference, Latency, TrialSpec
from autopeft.wording import say_count


def measure_inference(
    model: Any, base: BaseModel | None, spec: TrialSpec, data: TaskData, *, name: str, adapter: Path, batch_size: int
) -> Inference:
    """Of a trained model on rows of the test split, alone and in batches of `batch_size`; on the device that it is on.

    `base` is what it was built on, None where it was not kept; `name` is the base as transformers can load it,
    `adapter` the folder that it was saved to. Merging leaves the base's modules with other values in them, so the
    merged model's latency is measured on the unquantized base, the two models taking turns on the same batches. Where
    that base does not fit beside a quantized one, nothing is measured of it.
    """
    parameter = next(model.parameters())
    device = str(parameter.device)
    # On a GPU a base that was kept may have been moved aside for a copy that trains.
    at_hand = base is not None and spec.bits >= 16
    plain = base.model.to(device) if base is not None and at_hand else _load_unquantized(name, data, device)
    models = [model] if plain is None else [model, plain]
    latencies: list[Latency | None] = [
        *measure_latencies(models, data.rows(data.test, device), batch_size=batch_size),
        None,
    ]
    unmerged, of_base = latencies[:2]
    assert unmerged is not None
    return Inference(
        unmerged=unmerged,
        merged=of_base if find_method(spec.method).merges else None,
        base=of_base,
        adapter_bytes=sum(path.stat().st_size for path in adapter.glob("*.safetensors")),
        device=describe_machine(device),
    )


def _load_unquantized(name: str, data: TaskData, device: str) -> Any:
    """The base in the precision that it would be merged in; None where there is no room for it."""
    try:
        bits: Bits = 16 if device.startswith("cuda") else 32
        return load_base(name, num_labels=data.task.num_labels, bits=bits, device=device).model
    except torch.OutOfMemoryError:
        gc.collect()
        torch.cuda.empty_cache()
        return None


def describe_machine(device: str) -> str:
    """`NVIDIA H100 80GB HBM3`, or the processor with the threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{describe_cpu()}, {say_count(torch.get_num_threads(), 'thread')}"
