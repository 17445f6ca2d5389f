"""Measured latencies and counted sizes: what they are, and that nothing of the trial is changed by them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.data import Rows
from autopeft.backends.hf.latency import measure_latencies
from autopeft.backends.hf.saved import copy_adapter, count_saved_bytes, save_adapter, save_trained
from autopeft.backends.hf.trial import HfBackend
from autopeft.methods import METHODS
from autopeft.testing.subject import Case, width_for
from autopeft.testing.tiny_models import NUM_LABELS, tiny_base, tiny_folder, tiny_task

LENGTHS = list(range(1, 101))


class Sleeper(nn.Module):
    """Takes a millisecond a row and `extra_seconds`; remembers what it was given."""

    def __init__(self, extra_seconds: float) -> None:
        super().__init__()
        self.extra_seconds = extra_seconds
        self.seen: list[int] = []

    def forward(self, input_ids: torch.Tensor) -> None:
        assert not self.training
        self.seen.append(len(input_ids))
        time.sleep(1e-3 * len(input_ids) + self.extra_seconds)


def collate(indices: Sequence[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor(indices), "labels": torch.zeros(len(indices))}


ROWS = Rows(LENGTHS, collate, "cpu")


def test_latency_is_per_example_and_tells_models_apart() -> None:
    quick, slow = Sleeper(0.0), Sleeper(0.01)
    of_quick, of_slow = measure_latencies([quick, slow], ROWS, batch_size=4)
    # The example's millisecond, or a fourth of what is the same for all of a batch.
    assert 1e-3 <= of_quick.single_seconds < 8e-3
    assert 1e-3 <= of_quick.batch_seconds < 4e-3
    assert 1.1e-2 <= of_slow.single_seconds < 2.2e-2
    assert 3.5e-3 <= of_slow.batch_seconds < 8e-3
    assert (of_slow.batch_size, of_slow.num_batches) == (4, 25)


def test_models_take_turns_on_the_same_batches() -> None:
    seen: list[tuple[str, int]] = []

    class Noting(nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

        def forward(self, input_ids: torch.Tensor) -> None:
            seen.append((self.name, int(input_ids[0])))

    measure_latencies([Noting("a"), Noting("b")], ROWS, batch_size=200)
    timed = seen[4 : 4 + 62]
    assert [row for name, row in timed if name == "a"] == [row for name, row in timed if name == "b"]
    assert [name for name, _ in timed[:4]] == ["a", "b", "b", "a"]
    rows = sorted(row for name, row in timed if name == "a")
    # Spread over the lengths: of 31 rows about 8 lie in every quarter.
    assert all(6 <= sum(25 * q <= row < 25 * (q + 1) for row in rows) <= 10 for q in range(4))


def test_measuring_leaves_the_mode_and_takes_short_splits() -> None:
    model = Sleeper(0.0).train()
    (latency,) = measure_latencies([model], Rows([3, 5], collate, "cpu"), batch_size=16)
    assert model.training
    assert latency.batch_size == 2


# --- sizes


def saved_bytes(folder: Path) -> int:
    files = list(folder.glob("*.safetensors"))
    assert files
    tensors = [tensor for path in files for tensor in load_file(path).values()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def every_method() -> list[Any]:
    everyday = {"lora", "vera", "prompt_tuning", "bottleneck", "shira", "ia3"}
    names = [name for name, method in METHODS.items() if method.searched]
    return [pytest.param(name, marks=() if name in everyday else pytest.mark.slow) for name in names]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", every_method())
def test_the_size_known_in_advance_is_that_of_the_file(name: str, tmp_path: Path) -> None:
    method = METHODS[name]
    architecture = "bert" if "encoder" in method.models else "llama"
    case = Case(method, architecture, width_for(method))  # type: ignore[arg-type]
    base = tiny_base(case.architecture, case.bits)
    model = build_trial_model(base, case.spec())
    if isinstance(model, peft.PeftModel):
        save_adapter(model, case.spec(), tmp_path)
    elif name == "full":
        model.save_pretrained(tmp_path)
    else:
        save_trained(model, case.spec(), tmp_path)
    costs = HfCostModel(tiny_folder(case.architecture), num_labels=NUM_LABELS, device_kind="cpu", longest_tokens=12)
    assert costs.cost(case.spec()).adapter_bytes == saved_bytes(tmp_path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["default", "pissa"])
def test_a_lora_that_moved_a_part_of_the_base_is_saved_at_twice_its_rank(init: str, tmp_path: Path) -> None:
    spec = Case(METHODS["lora"], "bert", 32, (("init", init),)).spec()
    base = tiny_base("bert", 32)
    model = build_trial_model(base, spec)
    save_adapter(model, spec, tmp_path, initial=copy_adapter(model))
    assert count_saved_bytes(model, spec) == saved_bytes(tmp_path)


# --- in a worker


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> HfBackend:
    setup = WorkerSetup(
        backend="hf", model=tiny_folder("bert"), task=tiny_task(), data_dir=None, split_seed=0,
        study_dir=str(tmp_path_factory.mktemp("study")), device="cpu", threads=1, latency=True,
    )  # fmt: skip
    return HfBackend(setup)


def run(backend: HfBackend, method: str, *, measure: bool, trial: int) -> Finished:
    spec = Case(METHODS[method], "bert", 32).spec()
    stretch = Stretch(
        job=1, trial=trial, spec=spec, purpose="search", from_step=0, to_step=4, measure_inference=measure
    )
    finished = backend.run(stretch, lambda event: None)
    assert isinstance(finished, Finished)
    return finished


def test_a_worker_measures_where_it_is_asked_to(backend: HfBackend) -> None:
    assert backend.ready().latency is not None
    finished = run(backend, "lora", measure=True, trial=0)
    assert finished.inference is not None
    assert finished.inference.merged == finished.inference.base
    # An adapter beside its base cannot be quicker than the base alone; a tiny model leaves noise of some percent.
    assert finished.inference.base is not None
    assert finished.inference.unmerged.single_seconds > 0.9 * finished.inference.base.single_seconds
    assert run(backend, "lora", measure=False, trial=1).inference is None


def test_what_does_not_merge_has_no_merged_latency(backend: HfBackend) -> None:
    finished = run(backend, "bottleneck", measure=True, trial=2)
    assert finished.inference is not None
    assert finished.inference.merged is None
    assert finished.inference.base is not None


def test_measuring_changes_nothing_of_the_training(backend: HfBackend) -> None:
    measured, plain = (run(backend, "prompt_tuning", measure=measure, trial=3 + measure) for measure in (True, False))
    assert measured.scores_digest == plain.scores_digest
