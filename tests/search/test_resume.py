"""Interrupts and crashes: no finished trial is lost, none is counted twice, and a resumed study decides as an
uninterrupted one would."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import optuna
import pytest
import sqlalchemy
from sqlalchemy.engine import Engine

from autopeft.backends.base import Ready
from autopeft.errors import BudgetError, ModelError, RecordError, StudyError
from autopeft.executors.base import WorkerEvent
from autopeft.executors.inline import InlineExecutor
from autopeft.records import SCHEMA_VERSION, StudyRecord, from_record, to_record
from autopeft.search import plan
from autopeft.search.plan import restore_space
from autopeft.search.racing import LearnedRacing
from autopeft.search.results import build_record
from autopeft.search.status import Status
from autopeft.search.store import StudyStore
from autopeft.search.study import Search

if TYPE_CHECKING:
    from conftest import FakeStudies

BUDGET = "4trials"


class Killed(Exception):
    """Stands for `kill -9`: nothing can be written after it."""


def decisions(record: StudyRecord) -> list[tuple[object, ...]]:
    return [
        (
            trial.number,
            trial.spec,
            trial.source,
            trial.state,
            [(s.step, s.quality, s.loss) for s in trial.rungs],
            [(c.seed, c.quality, c.test_quality) for c in trial.confirmations],
        )
        for trial in record.trials
    ]


@contextlib.contextmanager
def kill_at_write(number: int) -> Iterator[list[int]]:
    """Every write to a database from the given one on fails. Yields a list whose length is the count of writes."""
    writes: list[int] = []

    def before_commit(connection: object) -> None:
        writes.append(len(writes))
        if len(writes) > number:
            raise Killed

    sqlalchemy.event.listen(Engine, "commit", before_commit)
    try:
        yield writes
    finally:
        sqlalchemy.event.remove(Engine, "commit", before_commit)


@pytest.fixture(scope="module")
def uninterrupted(make_studies: Callable[[], FakeStudies]) -> StudyRecord:
    studies = make_studies()
    return studies.run(studies.create(budget=BUDGET))


@pytest.fixture(scope="module")
def num_writes(make_studies: Callable[[], FakeStudies]) -> int:
    studies = make_studies()
    store = studies.create(budget=BUDGET)
    with kill_at_write(10**9) as writes:
        studies.run(store)
    return len(writes)


@pytest.fixture(scope="module")
def num_changes(make_studies: Callable[[], FakeStudies]) -> int:
    studies = make_studies()
    changes: list[Status] = []
    studies.run(studies.create(budget=BUDGET), on_change=changes.append)
    return len(changes)


def interrupt_at(studies: FakeStudies, change: int, error: type[BaseException] = KeyboardInterrupt) -> None:
    """Runs the study until the given change, where the driver is interrupted."""
    seen = 0

    def on_change(status: Status) -> None:
        nonlocal seen
        seen += 1
        if seen > change:
            raise error

    with pytest.raises(error):
        studies.run(studies.open(), on_change=on_change)


def check_same(resumed: StudyRecord, uninterrupted: StudyRecord) -> None:
    assert decisions(resumed) == decisions(uninterrupted)
    assert resumed.picks == uninterrupted.picks
    assert resumed.front == uninterrupted.front


@pytest.mark.parametrize("share", [0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])
def test_an_interrupted_study_ends_as_an_uninterrupted_one(
    studies: FakeStudies, uninterrupted: StudyRecord, num_changes: int, share: float
) -> None:
    studies.create(budget=BUDGET)
    interrupt_at(studies, int(share * num_changes))
    check_same(studies.run(studies.open()), uninterrupted)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_learned_noise_scale_is_learned_again_after_an_interrupt(
    make_studies: Callable[[], FakeStudies], share: float
) -> None:
    def run(studies: FakeStudies, **arguments: object) -> StudyRecord:
        return studies.search(studies.open(), racing=LearnedRacing(), **arguments).run()

    whole, halved = make_studies(), make_studies()
    for studies in (whole, halved):
        studies.create_default(budget="16trials")
    changes: list[Status] = []
    uninterrupted = run(whole, on_change=changes.append)
    assert any(trial.state == "stopped" for trial in uninterrupted.trials)
    left = int(share * len(changes))

    def on_change(status: Status) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(halved, on_change=on_change)
    assert decisions(run(halved)) == decisions(uninterrupted)


def test_a_study_interrupted_again_and_again_ends_as_an_uninterrupted_one(
    studies: FakeStudies, uninterrupted: StudyRecord
) -> None:
    studies.create(budget=BUDGET)
    for change in (3, 5, 7, 9):
        interrupt_at(studies, change)
    check_same(studies.run(studies.open()), uninterrupted)


@pytest.mark.parametrize("share", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_study_whose_driver_was_killed_ends_as_an_uninterrupted_one(
    studies: FakeStudies, uninterrupted: StudyRecord, num_writes: int, share: float
) -> None:
    check_killed(studies, uninterrupted, int(share * num_writes))


@pytest.mark.slow
def test_a_driver_may_be_killed_at_any_write(
    make_studies: Callable[[], FakeStudies], uninterrupted: StudyRecord, num_writes: int
) -> None:
    failures = []
    for write in range(num_writes):
        try:
            check_killed(make_studies(), uninterrupted, write)
        except Exception as exc:
            failures.append(f"write {write}: {type(exc).__name__} {str(exc)[:200]}")
    assert not failures


def check_killed(studies: FakeStudies, uninterrupted: StudyRecord, write: int) -> None:
    store = studies.create(budget=BUDGET)
    with kill_at_write(write), pytest.raises(Killed):
        studies.run(store)
    check_same(studies.run(studies.open()), uninterrupted)


def test_every_trial_is_told_to_optuna_after_a_kill(studies: FakeStudies, num_writes: int) -> None:
    store = studies.create(budget=BUDGET)
    with kill_at_write(num_writes // 2), pytest.raises(Killed):
        studies.run(store)
    studies.run(studies.open())
    frozen = optuna.load_study(study_name="autopeft", storage=f"sqlite:///{store.folder}/study.db").trials
    assert all(trial.state.is_finished() for trial in frozen)


def test_an_interrupted_stretch_is_charged_as_lost(studies: FakeStudies) -> None:
    store = studies.create(budget=BUDGET)

    class Interrupted(InlineExecutor):
        def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
            self._now += 2.0
            raise KeyboardInterrupt

    executor = Interrupted(studies.executor(store)._setup, 1)
    with pytest.raises(KeyboardInterrupt):
        Search(store, executor, restore_space(store.config)).run()
    assert build_record(studies.open()).ledger.lost_seconds == pytest.approx(2.0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError("no such model")])
def test_a_start_that_fails_leaves_no_worker_running(studies: FakeStudies, error: BaseException) -> None:
    store = studies.create(budget=BUDGET)

    class Failing(InlineExecutor):
        closed = 0

        def start(self) -> list[Ready]:
            raise error

        def close(self) -> None:
            self.closed += 1

    executor = Failing(studies.executor(store)._setup, 1)
    with pytest.raises((KeyboardInterrupt, ModelError)):
        Search(store, executor, restore_space(store.config)).run()
    assert executor.closed == 1
    assert studies.run(studies.open()).finished


def test_an_interrupted_study_can_be_reported(studies: FakeStudies, num_changes: int) -> None:
    studies.create(budget=BUDGET)
    interrupt_at(studies, num_changes // 2)
    record = build_record(studies.open())
    assert not record.finished
    assert from_record(StudyRecord, json.loads(json.dumps(to_record(record)))) == record


def test_what_an_error_interrupts_can_be_resumed_too(studies: FakeStudies, uninterrupted: StudyRecord) -> None:
    studies.create(budget=BUDGET)
    interrupt_at(studies, 6, RuntimeError)
    check_same(studies.run(studies.open()), uninterrupted)


def test_a_trial_whose_checkpoint_is_gone_starts_again(studies: FakeStudies, uninterrupted: StudyRecord) -> None:
    store = studies.create(budget=BUDGET)
    interrupt_at(studies, 8)
    gone = list((store.folder / "checkpoints").glob("*"))
    assert gone
    for path in gone:
        path.unlink()
    assert decisions(studies.run(studies.open()))[0][1] == decisions(uninterrupted)[0][1]
    assert {trial.state for trial in build_record(studies.open()).trials} <= {"complete", "stopped"}
    assert len(build_record(studies.open()).trials) == 4


def test_a_finished_study_changes_nothing_when_it_is_resumed(studies: FakeStudies) -> None:
    first = studies.run(studies.create(budget=BUDGET))
    again = studies.run(studies.open())
    assert decisions(again) == decisions(first)
    assert again.notes == first.notes
    assert again.ledger.search_seconds == first.ledger.search_seconds


def raise_budget(studies: FakeStudies, budget: str) -> None:
    store = studies.open()
    store.save_config(dataclasses.replace(store.config, budget=plan.raise_budget(store, budget)))


def test_a_raised_budget_continues_the_study(studies: FakeStudies) -> None:
    first = studies.run(studies.create(budget="4trials"))
    raise_budget(studies, "6trials")
    more = studies.run(studies.open())
    assert [trial.spec for trial in more.trials[:4]] == [trial.spec for trial in first.trials]
    assert len(more.trials) == 6


def test_trials_that_had_ended_stay_as_they_were_under_a_raised_budget(studies: FakeStudies) -> None:
    first = studies.run(studies.create(budget="4trials"))
    raise_budget(studies, "6trials")
    more = studies.run(studies.open())
    assert [(t.state, t.rungs) for t in more.trials[:4]] == [(t.state, t.rungs) for t in first.trials]


def test_a_note_about_a_small_budget_goes_when_the_budget_is_raised(studies: FakeStudies) -> None:
    small = studies.run(studies.create(budget="0.1min"))
    assert any("too small" in note for note in small.notes)
    raise_budget(studies, "3min")
    assert not any("too small" in note for note in studies.run(studies.open()).notes)


def test_time_spent_before_counts_after_a_resume(studies: FakeStudies) -> None:
    studies.create(budget="2min")
    interrupt_at(studies, 12)
    spent = build_record(studies.open()).ledger.wall_seconds
    assert spent > 0
    record = studies.run(studies.open())
    longest = max(segment.end_seconds - segment.start_seconds for segment in record.segments)
    assert spent < record.ledger.wall_seconds <= 120 + longest


# --- the store


def test_a_study_reads_back_as_it_was_written(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget=BUDGET))
    assert build_record(studies.open()) == record


def test_optuna_opens_a_study_with_values_and_states(studies: FakeStudies) -> None:
    store = studies.create_default(budget="8trials")
    record = studies.run(store)
    study = optuna.load_study(study_name="autopeft", storage=f"sqlite:///{store.folder}/study.db")
    assert len(study.trials) == len(record.trials)
    states = {"complete": "COMPLETE", "stopped": "PRUNED", "failed": "PRUNED", "refused": "PRUNED"}
    for trial, frozen in zip(record.trials, study.trials, strict=True):
        assert frozen.state.name == states[trial.state]
        assert frozen.params["method"] == trial.spec.method
        if trial.state == "complete":
            assert trial.cost is not None
            assert frozen.values == [
                trial.rungs[-1].quality, trial.cost.peak_vram_bytes, trial.cost.trainable_parameters
            ]  # fmt: skip
    assert study.metric_names == ["quality", "vram", "params"]


def test_a_diverged_trial_is_pruned_for_optuna_and_not_failed(studies: FakeStudies, make_spec: Callable) -> None:
    hot = make_spec("prompt_tuning", learning_rate=0.29)
    store = studies.create(budget="1trials", included=(hot,))
    studies.run(store)
    study = optuna.load_study(study_name="autopeft", storage=f"sqlite:///{store.folder}/study.db")
    # Samplers ignore FAIL, and would propose it again.
    assert study.trials[0].state.name == "PRUNED"


@pytest.mark.parametrize(
    "name", ["../escape", "a/b", "/tmp/x", "", ".", "..", ".hidden", "a b", "a\\b", "x" * 101, "é"]
)
def test_a_name_that_is_no_plain_file_name_is_refused(studies: FakeStudies, name: str) -> None:
    with pytest.raises(StudyError, match="--name"):
        studies.create(name=name)
    assert not studies.root.exists() or list(studies.root.rglob("*")) == []


@pytest.mark.parametrize("name", ["a", "sst2-minilm", "my_study.2", "0", "x" * 100])
def test_a_plain_name_is_accepted(studies: FakeStudies, name: str) -> None:
    assert studies.create(name=name).folder.name == name


def test_a_name_that_is_taken_offers_to_resume(studies: FakeStudies) -> None:
    studies.create()
    with pytest.raises(StudyError, match="autopeft resume study"):
        studies.create()


def test_an_unknown_study_gets_the_nearest_name(studies: FakeStudies) -> None:
    studies.create(name="sst2-minilm")
    with pytest.raises(StudyError, match="Did you mean 'sst2-minilm'"):
        studies.open("sst2-minlm")


def test_an_unknown_study_where_there_are_none_says_so(studies: FakeStudies) -> None:
    with pytest.raises(StudyError, match="There are none yet"):
        studies.open("anything")


def test_a_study_of_a_newer_schema_is_refused_and_nothing_is_changed(studies: FakeStudies) -> None:
    store = studies.create()
    store.save_study(schema_version=SCHEMA_VERSION + 1)
    before = (store.folder / "study.db").read_bytes()
    with pytest.raises(RecordError, match="newer autopeft"):
        studies.open()
    assert (store.folder / "study.db").read_bytes() == before


def test_a_damaged_database_is_one_helpful_error(studies: FakeStudies) -> None:
    store = studies.create()
    (store.folder / "study.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StudyError, match=r"study\.db' cannot be read .* Restore it from a copy"):
        studies.open()


def set_pragma(store: StudyStore, pragma: str) -> None:
    """For the one connection that a store keeps."""
    with store._storage.engine.connect() as connection:
        connection.exec_driver_sql(f"PRAGMA {pragma}")


def test_a_disk_that_fills_up_ends_the_search_and_its_workers_and_costs_no_decision(
    studies: FakeStudies, uninterrupted: StudyRecord
) -> None:
    store = studies.create(budget=BUDGET)

    class Counting(InlineExecutor):
        closed = 0

        def close(self) -> None:
            self.closed += 1

    def fill(status: Status) -> None:
        if any(trial.rungs for trial in status.trials):
            # No page more than there are.
            set_pragma(store, "max_page_count = 1")

    executor = Counting(studies.executor(store)._setup, 1)
    with pytest.raises(StudyError, match=r"study\.db' .* disk is full\. Make room .* autopeft resume study"):
        Search(store, executor, restore_space(store.config), on_change=fill).run()
    assert executor.closed == 1
    check_same(studies.run(studies.open()), uninterrupted)


def test_a_database_that_another_program_holds_is_one_helpful_error(
    studies: FakeStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.search.store._LOCKED_SECONDS", 0.01)
    store = studies.create()
    with contextlib.closing(sqlite3.connect(store.folder / "study.db")) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StudyError, match=r"is locked\. End whatever else writes to it"):
            store.save_study(notes=["news"])
    store.save_study(notes=["news"])


@pytest.mark.parametrize("damage", ["gone", "empty", "cut short"])
@pytest.mark.parametrize("file", ["labels", "scores"])
def test_damaged_scores_are_one_helpful_error(studies: FakeStudies, file: str, damage: str) -> None:
    store = studies.create(budget="1trials")
    (trial,) = studies.run(store).trials
    path = store.folder / ("labels.npy" if file == "labels" else trial.rungs[-1].scores_file)
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[: len(whole) // 2] if damage == "cut short" else b"")
    with pytest.raises(StudyError, match=rf"'{re.escape(str(path))}' cannot be read: .*\. Restore it from a copy"):
        build_record(studies.open())


def test_two_drivers_are_locked_out_of_each_other(studies: FakeStudies) -> None:
    store = studies.create()
    with store.lock(), pytest.raises(StudyError, match="another process"), studies.open().lock():
        raise AssertionError("both hold the lock")


def test_a_lock_is_free_again_afterwards(studies: FakeStudies) -> None:
    store = studies.create()
    with store.lock():
        pass
    with studies.open().lock():
        pass


def test_a_study_cut_off_while_it_was_created_leaves_its_name_free(studies: FakeStudies) -> None:
    with kill_at_write(3), pytest.raises(Killed):
        studies.create()
    assert studies.create().config.name == "study"


def test_a_budget_of_another_kind_is_refused_on_resume(studies: FakeStudies) -> None:
    store = studies.create(budget="4trials")
    with pytest.raises(ValueError, match="keeps its kind of budget"):
        plan.raise_budget(store, "2h")


@pytest.mark.parametrize(("budget", "less", "spent"), [("4trials", "3trials", "4trials"), ("4min", "3min", r"3\.\d")])
def test_a_total_that_is_spent_is_no_budget_to_go_on_with(
    studies: FakeStudies, budget: str, less: str, spent: str
) -> None:
    studies.run(studies.create(budget=budget))
    with pytest.raises(BudgetError, match=f"new total.*'{less}' is no more than the {spent}"):
        plan.raise_budget(studies.open(), less)


def test_a_raised_time_is_searched_with_what_confirmation_has_not_had(studies: FakeStudies) -> None:
    first = studies.run(studies.create(budget="8min"))
    assert first.ledger.confirm_seconds > 0
    raise_budget(studies, "10min")
    more = studies.run(studies.open())
    kept = 0.25 * 600 - first.ledger.confirm_seconds
    longest = max(segment.end_seconds - segment.start_seconds for segment in more.segments)
    assert more.ledger.search_seconds - first.ledger.search_seconds > 120 - kept - longest


def test_a_new_trial_is_stored_whole_and_without_a_look_at_the_others(
    studies: FakeStudies, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = studies.create()
    space = restore_space(store.config)

    def fail(*args: object, **kwargs: object) -> None:
        raise AssertionError("a study has thousands")

    with monkeypatch.context() as patch:
        patch.setattr(type(store._study._storage), "get_all_trials", fail)
        added = store.add(space.recipes[0], "recipe", space)
    (frozen,) = store._study.get_trials()
    assert frozen.state == optuna.trial.TrialState.RUNNING
    assert frozen.params == space.params(added.spec)
    (trial,) = studies.open().trials
    assert trial == added


def test_a_trial_that_waits_in_optunas_queue_as_earlier_versions_had_it_is_begun(studies: FakeStudies) -> None:
    store = studies.create(budget="2trials")
    space = restore_space(store.config)
    store.add(space.recipes[0], "recipe", space)
    with sqlite3.connect(store.folder / "study.db") as database:
        database.execute("UPDATE trials SET state = 'WAITING'")
    database.close()
    record = studies.run(studies.open())
    assert [trial.state for trial in record.trials] == ["complete", "complete"]
    assert all(frozen.state.is_finished() for frozen in studies.open()._study.get_trials())


def test_the_configuration_holds_no_path(studies: FakeStudies) -> None:
    store = studies.create()
    assert str(studies.root) not in json.dumps(to_record(dataclasses.asdict(store.config)))


def test_a_study_goes_on_after_a_setting_has_learned_new_choices(studies: FakeStudies) -> None:
    def write_space(choices: str) -> str:
        return f"methods:\n  lora: {{init: [{choices}], bits: [unquantized]}}\n"

    store = studies.create(space=write_space("default, pissa"))
    older = restore_space(store.config)
    newer = restore_space(studies.config(space=write_space("default, pissa, olora, eva")))
    spec = older.recipes[0]
    store.add(spec, "recipe", older)
    for reopened in (False, True):
        if reopened:
            store = studies.open()
        for init in ("pissa", "eva"):
            store.add(dataclasses.replace(spec, settings={**spec.settings, "init": init}), "sampler", newer)
    asked = [trial.params.get("lora.init") for trial in store._study.get_trials()]
    assert asked == ["default", "pissa", None, "pissa", None]
    assert [trial.spec.settings["init"] for trial in studies.open().trials] == ["default", *["pissa", "eva"] * 2]
