"""What a finished training says of serving costs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from finished_folders import make_finished

from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.latency import measure_latencies
from autopeft.production.finished import load_data, open_finished
from autopeft.production.latency import describe_machine, measure_inference
from autopeft.records import Inference, Latency, from_record, to_record
from autopeft.testing.tiny_models import tiny_base, tiny_folder


def measure(tmp_path: Path, method: str, bits: Any = 32) -> Inference | None:
    finished = open_finished(make_finished(tmp_path / "done", method, "bert", bits=bits))
    base = tiny_base("bert", bits)
    model = build_trial_model(base, finished.recipe.spec)
    assert model.training
    found = measure_inference(
        model, base, finished.recipe.spec, load_data(finished), name=tiny_folder("bert"), adapter=finished.adapter,
        batch_size=16,
    )  # fmt: skip
    assert model.training
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "bits", "merges"), [("lora", 32, True), ("lora", 4, True), ("bottleneck", 32, False)]
)
def test_both_latencies_and_the_size_are_measured(method: str, bits: Any, merges: bool, tmp_path: Path) -> None:
    found = measure(tmp_path, method, bits)
    assert found is not None
    assert (found.merged is not None) == merges
    assert found.base is not None
    assert found.unmerged.batch_size == 16
    # 96 test rows make 6 batches of 16.
    assert found.unmerged.num_batches == 6
    assert 0 < found.unmerged.batch_seconds < found.unmerged.single_seconds < 1
    files = list((tmp_path / "done/adapter").glob("*.safetensors"))
    assert found.adapter_bytes == files[0].stat().st_size
    assert found.device == describe_machine("cpu")
    assert from_record(Inference, to_record(found)) == found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("fitting", [1, 0])
def test_too_little_memory_costs_a_measurement_and_no_training(
    fitting: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def time_models(models: list[Any], *args: Any, **kwargs: Any) -> list[Latency]:
        if len(models) > fitting:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measure_latencies(models, *args, **kwargs)

    monkeypatch.setattr("autopeft.production.latency.measure_latencies", time_models)
    found = measure(tmp_path, "lora")
    if fitting == 0:
        assert found is None
    else:
        assert found is not None
        assert found.unmerged.single_seconds > 0
        assert found.base is None
        assert found.merged is None
