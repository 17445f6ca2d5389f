"""Searches on GPUs, which hold one base at a time: what loading another costs, and that it is avoided."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from autopeft.backends.base import Finished, Pack
from autopeft.executors.base import WorkerEvent
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Bits, StudyRecord
from autopeft.search.plan import restore_space
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

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        (stretch,) = pack.stretches
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


def run(studies: FakeStudies, monkeypatch: pytest.MonkeyPatch, *, knows: bool) -> tuple[StudyRecord, Loading, Search]:
    methods = "methods: {lora: {rank: {low: 1, high: 64}, bits: [4, 8, unquantized], learning_rate: 1.0e-3}}"
    store = studies.create(space=methods, device_kind="cuda", workers=2, budget="10gpu-min", confirm_seeds=0)
    executor = Loading(studies.executor(store)._setup, 2)
    search = Search(store, executor, restore_space(store.config))
    if not knows:
        monkeypatch.setattr(search, "_find_held", lambda worker: None)
    return search.run(), executor, search


def test_a_search_that_knows_what_its_workers_hold_loads_less_and_trains_more(
    make_studies: Callable[[], FakeStudies], monkeypatch: pytest.MonkeyPatch
) -> None:
    (knowing, few, _), (blind, many, _) = (run(make_studies(), monkeypatch, knows=knows) for knows in (True, False))
    assert few.num_loads < 0.8 * many.num_loads
    scores, fewer = (sum(len(trial.rungs) for trial in record.trials) for record in (knowing, blind))
    assert scores > 1.1 * fewer


def test_loading_is_told_apart_and_known_again_by_a_resume(
    studies: FakeStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, executor, search = run(studies, monkeypatch, knows=True)
    loads = [segment.loading_seconds for segment in record.segments if segment.loading_seconds]
    assert loads == [LOAD_SECONDS] * executor.num_loads
    # What a stretch takes by itself, as if its base had been there.
    assert search.speed.predict("lora", 40) == pytest.approx(4.0 + 1.0, abs=0.01)
    assert search.speed.predict_load(4, 16) == LOAD_SECONDS
    resumed = studies.search(studies.open())
    resumed._start()
    assert resumed._held == search._held == executor.held
    assert vars(resumed.speed) == vars(search.speed)
