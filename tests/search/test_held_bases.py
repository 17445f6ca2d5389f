"""Searches on GPUs, which hold one base at a time: what loading another costs, and that it is avoided."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from autopeft.backends.base import Finished, Pack, Ready
from autopeft.executors.base import WorkerEvent
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Bits
from autopeft.search.plan import restore_space
from autopeft.search.speed import Kind
from autopeft.search.study import Search

if TYPE_CHECKING:
    from conftest import FakeStudies

LOAD_SECONDS = 10.0
"""As long as two short stretches."""


class Loading(InlineExecutor):
    """Workers that load a base whenever they are given a trial on another than they hold."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.held: dict[int, Bits] = {}
        self.num_loads = 0
        self.job_to_die_of = 0

    def restart(self, worker: int) -> None:
        super().restart(worker)
        del self.held[worker]

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        (stretch,) = pack.stretches
        if stretch.job == self.job_to_die_of:
            (due,) = (due for due in self._due if due[1] == stretch.job)
            self._due.remove(due)
            self._due.append((due[0], due[1], WorkerEvent(worker, None, due[0], "killed")))
            heapq.heapify(self._due)
            return
        if self.held.get(worker, 16) != stretch.spec.bits:
            self.num_loads += 1
            (due,) = (due for due in self._due if due[1] == stretch.job)
            self._due.remove(due)
            at, job, event = due
            assert isinstance(event.event, Finished)
            loaded = replace(event.event, load_seconds=LOAD_SECONDS)
            self._due.append((at + LOAD_SECONDS, job, WorkerEvent(worker, loaded, at + LOAD_SECONDS)))
            heapq.heapify(self._due)
        self.held[worker] = stretch.spec.bits


METHODS = "methods: {lora: {rank: {low: 1, high: 64}, bits: [4, 8, unquantized], learning_rate: 1.0e-3}}"


def make_search(studies: FakeStudies, **changes: Any) -> tuple[Search, Loading]:
    store = studies.create(space=METHODS, device_kind="cuda", budget="10gpu-min", **({"workers": 2} | changes))
    executor = Loading(studies.executor(store)._setup, store.config.workers)
    return Search(store, executor, restore_space(store.config)), executor


def test_a_search_that_knows_what_its_workers_hold_loads_less_and_trains_more(
    make_studies: Callable[[], FakeStudies], monkeypatch: pytest.MonkeyPatch
) -> None:
    (knowing, few), (blind, many) = (make_search(make_studies(), confirm_seeds=0) for _ in range(2))
    monkeypatch.setattr(blind, "_find_held", lambda worker: None)
    scores, fewer = (sum(len(trial.rungs) for trial in search.run().trials) for search in (knowing, blind))
    assert few.num_loads < 0.8 * many.num_loads
    assert scores > 1.1 * fewer


def test_loading_is_told_apart_and_known_again_by_a_resume(studies: FakeStudies) -> None:
    search, executor = make_search(studies)
    executor.job_to_die_of = 20
    record = search.run()
    assert record.ledger.lost_seconds > 0
    assert [s.base_seconds for s in record.segments if s.base_seconds] == [LOAD_SECONDS] * executor.num_loads
    # What a stretch takes by itself, as if its base had been there.
    assert search.speed.predict(Kind("lora", 16, 16), 40) == pytest.approx(4.0 + 1.0, abs=0.01)
    assert search.speed.predict_load(4, 16) == LOAD_SECONDS
    resumed = studies.search(studies.open())
    resumed._start()
    assert resumed._held == search._held == executor.held
    assert resumed.speed._loads == search.speed._loads


def test_coming_up_again_is_no_loading_of_a_base(studies: FakeStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    search, executor = make_search(studies)
    executor.job_to_die_of = 20
    restart = executor.restart

    def restart_slowly(worker: int) -> None:
        restart(worker)
        # It is assigned its next stretch at once, and is ready only then.
        _, job, event = executor._due.pop(0)
        assert isinstance(event.event, Ready)
        later = executor.now() + 90.0
        executor._due.append((later, job, event._replace(at_seconds=later)))
        heapq.heapify(executor._due)

    monkeypatch.setattr(executor, "restart", restart_slowly)
    search.run()
    assert set(search.speed._loads) <= {4, 8, 16}
    assert {seconds for loads in search.speed._loads.values() for seconds in loads} == {LOAD_SECONDS}


def test_what_workers_held_is_forgotten_where_they_began_anew(studies: FakeStudies) -> None:
    search, _ = make_search(studies)

    def interrupt(status: Any) -> None:
        if sum(bool(trial.rungs) for trial in status.trials) == 5 and len(status.running) == 2:
            raise KeyboardInterrupt

    search.on_change = interrupt
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert search._held
    resumed = studies.search(studies.open())
    resumed._start()
    assert resumed._held == {}


def test_a_worker_for_which_nothing_fits_keeps_none_from_work(
    studies: FakeStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    search, _ = make_search(studies, workers=3)
    search._start()
    stretch = search._next_stretch(16)
    assert stretch is not None
    asked: list[Bits | None] = []

    def answer(held: Bits | None) -> Any:
        asked.append(held)
        return stretch if held == 4 else None

    monkeypatch.setattr(search, "_next_stretch", answer)
    # The first two hold the unquantized base.
    search._held = {2: 4}
    search._assign_idle_workers()
    assert set(search._running) == {2}
    assert asked == [16, 4]
