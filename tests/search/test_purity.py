"""Decisions are a function of the recorded state: whoever opens a running study on disk decides as its driver does."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from autopeft.backends.base import CONTEXT_BYTES, Stretch
from autopeft.records import Bits, StudyRecord
from autopeft.search.early_end import EarlyEnd
from autopeft.search.plan import restore_space
from autopeft.search.recovery import find_held
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore, Trial
from autopeft.search.study import Search

if TYPE_CHECKING:
    from conftest import FakeStudies


class Doubled(Search):
    """Before each decision another search, opened anew on a copy of the study's files, takes the same."""

    def __init__(self, *arguments: Any, copies: Path, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.copies = copies
        self.num_compared = 0

    def _next_stretch(self, held: Bits | None) -> tuple[Trial, Stretch] | None:
        num_started = self.account.ledger.trials_started
        theirs = self._decide_anew(held)
        self.account.ledger.trials_started = num_started
        mine = super()._next_stretch(held)
        assert _tell(mine) == _tell(theirs), f"decision {self.num_compared}"
        self.num_compared += 1
        return mine

    def _decide_anew(self, held: Bits | None) -> tuple[Trial, Stretch] | None:
        folder = self.copies / str(self.num_compared)
        shutil.copytree(self.store.folder, folder / self.store.folder.name)
        store = StudyStore.open(folder, self.store.folder.name)
        other = Search(store, self.executor, self.space, free_bytes=self.limits._free_bytes)
        # The clock is the driver's, what was learned of time is not.
        other.account, other.phase = self.account, self.phase
        other.early_end = EarlyEnd(store, self.account)
        every = [*store.trials, *([store.baseline] if store.baseline else [])]
        other.speed.learn_all(every)
        other._held = find_held(every)
        other._confirm_queue = [(store.trials[trial.number], seed) for trial, seed in self._confirm_queue]
        return other._next_stretch(held)


def _tell(decision: tuple[Trial, Stretch] | None) -> object:
    if decision is None:
        return None
    trial, stretch = decision
    return trial.number, trial.source, trial.spec, stretch.purpose, stretch.from_step, stretch.to_step


@pytest.mark.parametrize(
    "changes",
    [
        {"budget": "12trials", "workers": 2},
        {"budget": "2min", "workers": 2},
        pytest.param(
            {"budget": "12trials", "device_kind": "cuda", "max_vram_bytes": 3_400_000}, marks=pytest.mark.slow
        ),
        {"budget": "8trials", "max_params": 300, "confirm_seeds": 0},
    ],
    ids=["trials", "clock", "limit", "nothing new fits"],
)
def test_a_search_opened_anew_decides_as_the_one_that_runs(
    studies: FakeStudies, tmp_path: Path, changes: dict[str, Any]
) -> None:
    store = studies.create_default(**changes)
    search = Doubled(store, studies.executor(store), restore_space(store.config), copies=tmp_path / "copies")
    record = search.run()
    assert search.num_compared > len([trial for trial in record.trials if trial.rungs])
    assert sum(trial.state == "refused" for trial in record.trials) > 0 or "max" not in str(changes)


def test_a_search_that_gave_up_finding_what_fits_gives_up_again_when_resumed(studies: FakeStudies) -> None:
    first = studies.run(studies.create_default(budget="40trials", max_params=200))
    assert any("found nothing new" in note for note in first.notes)
    again = studies.run(studies.open())
    assert _states(again) == _states(first)
    assert again.notes == first.notes
    assert build_record(studies.open()).trials == again.trials


def test_what_a_fuller_gpu_refused_is_no_reason_to_give_up_on_an_emptier_one(studies: FakeStudies) -> None:
    store = studies.create_default(budget="8trials", device_kind="cuda")
    full = studies.search(store, free_bytes=CONTEXT_BYTES + 100_000).run()
    assert {trial.state for trial in full.trials} == {"refused"}
    again = studies.search(studies.open(), free_bytes=2**40).run()
    assert sum(bool(trial.rungs) for trial in again.trials) > 0


def _states(record: StudyRecord) -> list[tuple[int, str, int]]:
    return [(trial.number, trial.state, len(trial.rungs)) for trial in record.trials]
