"""What a study is begun with."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.cli import session
from autopeft.errors import BudgetError


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Begins a study of a hub model that takes ten minutes to fetch; returns the wall seconds that it may run."""
    monkeypatch.chdir(tmp_path)
    clock = SimpleNamespace(now=0.0)
    limits: list[float] = []

    def fetch(model: str, say: Any) -> None:
        clock.now += 600.0

    def run(store: Any, executor: Any, space: Any, limit: float) -> int:
        limits.append(limit)
        return 0

    monkeypatch.setattr(session, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(session, "run_study", run)
    monkeypatch.setattr("autopeft.hub.fetch_model", fetch)
    monkeypatch.setattr("autopeft.search.plan.make_provenance", lambda plan: None)
    monkeypatch.setattr("autopeft.executors.local.LocalExecutor", lambda setup, devices: None)
    monkeypatch.setattr("autopeft.search.store.StudyStore.create", lambda *args: SimpleNamespace(folder=tmp_path))

    def begin(seconds_left: float) -> float:
        plan: Any = SimpleNamespace(
            model_argument="acme/large", wall_seconds_limit=seconds_left, config=SimpleNamespace(until="18:00"),
            data_dir=None, devices=("cpu",), space=None, setup=lambda studies: None, validation_labels=lambda: None,
        )  # fmt: skip
        session.run_new_study(plan)
        return limits.pop()

    return begin


def test_a_download_takes_nothing_of_a_budget_but_of_the_time_to_an_hour(begin: Any) -> None:
    assert begin(3600.0) == 3000.0
    assert begin(math.inf) == math.inf


def test_an_hour_that_passed_during_the_download_is_told(begin: Any) -> None:
    with pytest.raises(BudgetError, match=r"by 18:00, which has passed while 'acme/large' was fetched"):
        begin(300.0)
