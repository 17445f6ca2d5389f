"""What a study is begun with."""

from __future__ import annotations

import functools
import io
import math
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from autopeft.backends.base import Pack, Ready, WorkerSetup
from autopeft.cli import session
from autopeft.errors import BudgetError, WorkerError
from autopeft.executors.base import WorkerEvent
from autopeft.executors.inline import InlineExecutor
from autopeft.search.plan import Plan, make_plan, make_provenance
from autopeft.search.request import Request
from autopeft.search.store import StudyStore


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
            model_argument="acme/large", wall_seconds_limit=seconds_left, limit_read_at=0.0,
            config=SimpleNamespace(until="18:00"),
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


class Broken(InlineExecutor):
    """Its workers break when they start, or under the first trial."""

    def __init__(self, setup: WorkerSetup, devices: list[str], *, starts: bool) -> None:
        super().__init__(replace(setup, backend="fake"), len(devices))
        self._starts = starts

    def start(self) -> list[Ready]:
        if not self._starts:
            raise WorkerError("A worker broke: no kernel")
        return super().start()

    def assign(self, worker: int, pack: Pack) -> None:
        if pack.stretches[0].purpose == "search":
            raise WorkerError("Workers keep dying")
        super().assign(worker, pack)


@pytest.mark.parametrize("starts", [False, True])
def test_a_study_whose_start_failed_leaves_its_name_free_and_one_that_began_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, starts: bool
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    plan = make_plan(Request(task="demo", budget="3trials", model="model", name="mine"), studies=Path("studies"))
    monkeypatch.setattr("autopeft.executors.local.LocalExecutor", functools.partial(Broken, starts=starts))
    with pytest.raises(WorkerError):
        session.run_new_study(plan)
    assert (tmp_path / "studies" / "mine").exists() == starts


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A study of fake workers, in a working directory of its own."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setattr("autopeft.cli.session.keep_places", lambda *arguments: None)
    plan = make_plan(Request(task="demo", budget="3trials", model="model", name="mine"), studies=Path("studies"))
    return replace(plan, config=replace(plan.config, backend="fake", confirm_seeds=0))


def run(plan: Plan, store: StudyStore) -> int:
    setup = replace(plan.setup(Path("studies")), backend="fake")
    return session.run_study(store, InlineExecutor(setup, 1), plan.space, math.inf)


def create(plan: Plan) -> StudyStore:
    labels = np.array([i % 2 for i in range(300)])
    return StudyStore.create(Path("studies"), plan.config, make_provenance(plan), labels)


def test_a_study_is_read_anew_once_no_other_process_can_write_to_it(planned: Plan) -> None:
    store = create(planned)
    early = StudyStore.open(Path("studies"), "mine")
    run(planned, store)
    ended = StudyStore.open(Path("studies"), "mine").trials
    assert len([trial for trial in ended if trial.rungs]) == 3
    # Read before the other process began: written back, its view would undo all of that.
    run(planned, early)
    assert StudyStore.open(Path("studies"), "mine").trials == ended


@pytest.mark.parametrize(
    ("error", "num_written"),
    [(BrokenPipeError(), 0), (OSError(5, "Input/output error"), 0), (OSError(5, "Input/output error"), 5)],
    ids=["pipe", "no terminal", "terminal closed"],
)
def test_a_search_that_nobody_listens_to_any_more_goes_on_and_writes_its_report(
    planned: Plan, monkeypatch: pytest.MonkeyPatch, error: OSError, num_written: int
) -> None:
    class Gone(io.StringIO):
        left = num_written

        def isatty(self) -> bool:
            return not isinstance(error, BrokenPipeError)

        def write(self, text: str) -> int:
            self.left -= 1
            if self.left < 0:
                raise error
            return len(text)

    monkeypatch.setattr("sys.stdout", Gone())
    run(planned, create(planned))
    assert StudyStore.open(Path("studies"), "mine").finished
    assert Path("reports/mine.html").is_file()
    assert Path("leaderboards/demo").is_dir()


@pytest.mark.parametrize(
    ("name", "handler", "code"),
    [("SIGTERM", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_DFL, 130), ("SIGHUP", signal.SIG_IGN, 0)],
    ids=["ended", "terminal closed", "kept by nohup"],
)
def test_a_signal_ends_a_search_as_an_interrupt_does(planned: Plan, name: str, handler: Any, code: int) -> None:
    number = getattr(signal, name)
    kept = signal.signal(number, handler)

    class Signalled(InlineExecutor):
        def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
            os.kill(os.getpid(), number)
            return super().wait(timeout_seconds)

    setup = replace(planned.setup(Path("studies")), backend="fake")
    try:
        assert session.run_study(create(planned), Signalled(setup, 1), planned.space, math.inf) == code
        assert signal.getsignal(number) == handler
    finally:
        signal.signal(number, kept)
    assert StudyStore.open(Path("studies"), "mine").finished == (code == 0)
