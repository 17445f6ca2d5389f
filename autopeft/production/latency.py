"""What a trained model costs to serve: its latency as it is and merged, and the bytes that it takes on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from autopeft.backends.hf.base_model import BaseModel, load_base
from autopeft.backends.hf.data import TaskData
from autopeft.backends.hf.latency import measure_latencies
from autopeft.backends.hf.trial import is_out_of_memory, release_memory
from autopeft.executors.devices import describe_cpu
from autopeft.methods import find_method
from autopeft.records import Bits, Inference, Latency, TrialSpec
from autopeft.wording import say_count


def measure_inference(
    model: Any, base: BaseModel | None, spec: TrialSpec, data: TaskData, *, name: str, adapter: Path, batch_size: int
) -> Inference | None:
    """Of a trained model on rows of the test split, alone and in batches of `batch_size`; on the device that it is on.

    `base` is what it shares its weights with, None where it has its own; `name` is the base as transformers loads it,
    `adapter` the folder that it was saved to. Merging leaves the base's modules with other values in them, so the
    merged model's latency is measured on the unquantized base, the two models taking turns on the same batches. Where
    there is no room for that base beside the model, nothing is measured of it; None where there is not even room to
    answer: a training that is done must not be lost over this.
    """
    device = str(next(model.parameters()).device)
    plain = _find_unquantized(base if spec.bits >= 16 else None, name, data, device)
    latencies = None if plain is None else _time([model, plain], data, batch_size, device)
    if latencies is None:
        if plain is not None:
            plain.to("cpu")
        release_memory()
        latencies = _time([model], data, batch_size, device)
    if latencies is None:
        return None
    of_base = latencies[1] if len(latencies) > 1 else None
    return Inference(
        unmerged=latencies[0],
        merged=of_base if find_method(spec.method).merges else None,
        base=of_base,
        adapter_bytes=sum(path.stat().st_size for path in adapter.glob("*.safetensors")),
        device=describe_machine(device),
    )


def _time(models: list[Any], data: TaskData, batch_size: int, device: str) -> list[Latency] | None:
    """None where there is too little memory."""
    try:
        return measure_latencies(models, data.rows(data.test, device), batch_size=batch_size)
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        return None


def _find_unquantized(base: BaseModel | None, name: str, data: TaskData, device: str) -> Any:
    """The base in the precision that it would be merged in, `base`'s or loaded; None where there is no room for it."""
    if base is not None:
        return base.model
    try:
        bits: Bits = 16 if device.startswith("cuda") else 32
        return load_base(name, num_labels=data.task.num_labels, bits=bits, device=device).model
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
    release_memory()
    return None


def describe_machine(device: str) -> str:
    """`NVIDIA H100 80GB HBM3`, or the processor with the threads in use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{describe_cpu()}, {say_count(torch.get_num_threads(), 'thread')}"
