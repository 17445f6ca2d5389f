"""Whole studies on the fake backend: no training, a simulated clock, and the real driver, sampler and store."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from autopeft.backends.base import WorkerSetup
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Provenance, StudyConfig, StudyRecord
from autopeft.search.plan import restore_space
from autopeft.search.status import Status
from autopeft.search.store import StudyStore
from autopeft.search.study import Search
from autopeft.spaces.load import find_space

SMALL_SPACE = """
methods:
  lora: {rank: {low: 1, high: 64}, bits: [unquantized]}
  prompt_tuning: {bits: [unquantized]}
  ia3: {bits: [unquantized]}
"""


class FakeStudies:
    """Creates, runs and resumes studies in one folder."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def config(self, **changes: Any) -> StudyConfig:
        values: dict[str, Any] = {
            "name": "study", "task": "name: demo", "task_name": "demo", "model": "minilm", "budget": "6trials",
            "objectives": ("quality", "vram", "params"), "rungs": (40, 80, 160), "seed": 0, "workers": 1,
            "device_kind": "cpu", "space": SMALL_SPACE, "space_name": "small", "methods": None, "fixed": {},
            "included": (), "max_vram_bytes": None, "confirm_share": 0.25, "confirm_seeds": 2, "until": None,
            "price_per_device_hour": None, "majority_quality": 0.5, "majority_test_quality": 0.5, "scorer": "accuracy",
            "backend": "fake",
        }  # fmt: skip
        return StudyConfig(**(values | changes))

    def create(self, **changes: Any) -> StudyStore:
        provenance = Provenance(
            autopeft="0", python="3", packages={}, platform="x", device="x", device_count=1, threads=1, model_digest="",
            task_digest="x", num_train=1, num_validation=300, num_test=1, created_at="2026-01-01T00:00:00+00:00",
        )  # fmt: skip
        labels = np.array([i % 2 for i in range(300)])
        return StudyStore.create(self.root, self.config(**changes), provenance, labels)

    def create_default(self, **changes: Any) -> StudyStore:
        """On the shipped default space."""
        name, text = find_space("default")
        return self.create(space=text, space_name=name, **changes)

    def open(self, name: str = "study") -> StudyStore:
        return StudyStore.open(self.root, name)

    def executor(self, store: StudyStore) -> InlineExecutor:
        setup = WorkerSetup(
            backend="fake", model="", task=store.config.task if store.config.task_kind == "generation" else "",
            data_dir=None, split_seed=0, study_dir=str(store.folder), device="cpu", threads=1,
            latency="latency" in store.config.objectives,
        )  # fmt: skip
        return InlineExecutor(setup, store.config.workers)

    def search(self, store: StudyStore, **arguments: Any) -> Search:
        return Search(store, self.executor(store), restore_space(store.config), **arguments)

    def run(self, store: StudyStore, *, on_change: Callable[[Status], None] | None = None) -> StudyRecord:
        return self.search(store, **({"on_change": on_change} if on_change else {})).run()


@pytest.fixture
def studies(tmp_path: Path) -> FakeStudies:
    return FakeStudies(tmp_path / "studies")


@pytest.fixture(scope="session")
def make_studies(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], FakeStudies]:
    """A fresh folder of studies at each call, for tests that need several."""
    return lambda: FakeStudies(tmp_path_factory.mktemp("studies"))
