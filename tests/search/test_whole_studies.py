"""Whole studies on the fake backend: what a budget buys, what is decided, and what the record says."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from autopeft.backends.base import Broken, CostReply, Ended, Finished, Pack, Ready
from autopeft.errors import StudyError, WorkerError
from autopeft.executors.base import WorkerEvent
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Failed, Refused, Stopped, StudyRecord, TrialSpec
from autopeft.search.front import find_nondominated
from autopeft.search.plan import restore_space
from autopeft.search.racing import Contender, LearnedRacing, LossCurve, PairedRacing, RacingRule, Verdict
from autopeft.search.results import analyze, build_record
from autopeft.search.status import Status
from autopeft.search.study import Search

if TYPE_CHECKING:
    from conftest import FakeStudies

MakeSpec = Callable[..., TrialSpec]


def started(record: StudyRecord) -> list[int]:
    return [trial.number for trial in record.trials if trial.state not in ("waiting", "refused")]


def decisions(record: StudyRecord) -> list[tuple[object, ...]]:
    """Everything that must not differ between two runs."""
    return [
        (
            trial.number,
            trial.spec,
            trial.source,
            trial.state,
            trial.outcome,
            [(s.step, s.quality, s.loss) for s in trial.rungs],
            [(c.seed, c.quality, c.test_quality) for c in trial.confirmations],
        )
        for trial in record.trials
    ]


@pytest.fixture(scope="module")
def record(make_studies: Callable[[], FakeStudies]) -> StudyRecord:
    """A study of 12 trials on the shipped space with two workers."""
    studies = make_studies()
    return studies.run(studies.create_default(budget="12trials", workers=2))


# --- budgets


def test_a_budget_in_trials_starts_exactly_that_many(record: StudyRecord) -> None:
    assert len(started(record)) == 12


def test_every_started_trial_is_a_distinct_configuration(record: StudyRecord) -> None:
    assert len({trial.spec.key() for trial in record.trials}) == len(record.trials)


def test_every_started_trial_ends(record: StudyRecord) -> None:
    assert {trial.state for trial in record.trials} <= {"complete", "stopped", "failed", "refused"}


@pytest.mark.parametrize("budget", ["1trials", "3trials", "7trials"])
def test_a_budget_smaller_than_the_recipes_is_kept_too(studies: FakeStudies, budget: str) -> None:
    record = studies.run(studies.create_default(budget=budget))
    assert len(started(record)) == int(budget.removesuffix("trials"))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("budget", ["1min", "2min"])
def test_a_wall_budget_is_overrun_by_at_most_one_stretch(studies: FakeStudies, budget: str, workers: int) -> None:
    record = studies.run(studies.create(budget=budget, workers=workers))
    longest = max(segment.end_seconds - segment.start_seconds for segment in record.segments)
    assert record.ledger.wall_seconds <= 60 * int(budget.removesuffix("min")) + longest


@pytest.mark.parametrize("workers", [1, 3])
def test_a_budget_in_device_time_is_overrun_by_at_most_one_stretch_a_worker(studies: FakeStudies, workers: int) -> None:
    record = studies.run(studies.create(budget="4cpu-min", workers=workers))
    longest = max(segment.end_seconds - segment.start_seconds for segment in record.segments)
    ledger = record.ledger
    spent = ledger.search_seconds + ledger.confirm_seconds + ledger.baseline_seconds + ledger.lost_seconds
    assert spent <= 240 + workers * longest


def test_a_budget_below_one_stretch_is_overrun_by_that_stretch_alone(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="0.1min"))
    assert record.ledger.wall_seconds <= 6 + max(s.end_seconds - s.start_seconds for s in record.segments)


def test_a_study_in_which_nothing_beats_the_majority_class_says_so(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="3trials", majority_quality=0.999))
    assert any("No trial clearly beats" in note for note in record.notes)


@pytest.mark.parametrize(
    ("bits", "share", "is_told"),
    [("[4, unquantized]", 0.93, True), ("[4]", 0.02, False), ("[unquantized]", 0.93, False)],
)
def test_what_stays_unquantized_is_told_where_much_does_and_trials_may_be_quantized(
    studies: FakeStudies, bits: str, share: float, is_told: bool
) -> None:
    class Mixture(InlineExecutor):
        def start(self) -> list[Ready]:
            return [dataclasses.replace(ready, unquantized_share=share) for ready in super().start()]

    store = studies.create(budget="1trials", space=f"methods: {{lora: {{bits: {bits}}}, ia3: {{bits: [unquantized]}}}}")
    executor = Mixture(studies.executor(store)._setup, 1)
    record = Search(store, executor, restore_space(store.config)).run()
    assert any("4 and 8 bits leave 93% as they are" in n for n in record.notes) is is_told


def test_a_budget_too_small_for_anything_says_so(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="0.1min"))
    assert any("too small" in note for note in record.notes)


def test_a_wall_budget_keeps_a_share_for_confirmation(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="4min"))
    assert record.ledger.confirm_seconds > 0
    # The head's and the last stretch may reach into the share kept: 17 and 9 s.
    assert record.ledger.search_seconds <= 0.75 * 240 + 26


def test_of_two_bounds_the_first_reached_ends_the_search(studies: FakeStudies) -> None:
    assert len(started(studies.run(studies.create(budget="10h,4trials")))) == 4


def test_until_ends_a_search_before_its_budget(studies: FakeStudies) -> None:
    store = studies.create(budget="100trials")
    record = studies.search(store, wall_seconds_limit=120.0).run()
    longest = max(segment.end_seconds - segment.start_seconds for segment in record.segments)
    assert record.ledger.wall_seconds <= 120 + longest


def test_with_a_budget_in_trials_decisions_never_read_the_clock(make_studies: Callable[[], FakeStudies]) -> None:
    class Dawdling(InlineExecutor):
        """A clock that runs a thousand times faster, unevenly."""

        def now(self) -> float:
            return super().now() ** 2 * 1000

    records = []
    for make in (InlineExecutor, Dawdling):
        studies = make_studies()
        store = studies.create(budget="8trials")
        executor = make(studies.executor(store)._setup, 1)
        records.append(Search(store, executor, restore_space(store.config)).run())
    assert decisions(records[0]) == decisions(records[1])


# --- determinism


@pytest.mark.parametrize("workers", [1, 2])
def test_two_runs_give_the_same_trials_decisions_and_scores(
    make_studies: Callable[[], FakeStudies], workers: int
) -> None:
    one, other = (
        studies.run(studies.create_default(budget="8trials", workers=workers))
        for studies in (make_studies(), make_studies())
    )
    assert decisions(one) == decisions(other)
    assert (one.front, one.picks, one.hypervolume) == (other.front, other.picks, other.hypervolume)


def test_another_seed_samples_other_configurations(make_studies: Callable[[], FakeStudies]) -> None:
    keys = []
    for seed in (0, 1):
        studies = make_studies()
        record = studies.run(studies.create(budget="6trials", seed=seed))
        keys.append({trial.spec.key() for trial in record.trials if trial.source == "sampler"})
    assert keys[0].isdisjoint(keys[1])


# --- racing


def test_trials_are_scored_at_consecutive_rungs_from_the_first(record: StudyRecord) -> None:
    for trial in record.trials:
        assert [score.step for score in trial.rungs] == list(record.config.rungs[: len(trial.rungs)])
        assert [score.rung for score in trial.rungs] == list(range(len(trial.rungs)))


def test_only_trials_at_the_last_rung_are_complete(record: StudyRecord) -> None:
    for trial in record.trials:
        assert (trial.state == "complete") == (bool(trial.rungs) and trial.rungs[-1].step == 160)


def test_a_stopped_trial_names_a_rival_that_costs_no_more(studies: FakeStudies) -> None:
    record = studies.run(studies.create_default(budget="20trials", workers=2))
    stopped = [trial for trial in record.trials if isinstance(trial.outcome, Stopped)]
    assert stopped
    for trial in stopped:
        assert isinstance(trial.outcome, Stopped)
        rival = record.trials[trial.outcome.rival]
        assert rival.cost is not None
        assert trial.cost is not None
        assert rival.cost.peak_vram_bytes <= trial.cost.peak_vram_bytes
        assert rival.cost.trainable_parameters <= trial.cost.trainable_parameters


def test_every_verdict_can_be_recomputed_from_the_stored_losses(studies: FakeStudies) -> None:
    store = studies.create_default(budget="20trials")
    record = studies.run(store)

    def contender(number: int, rung: int) -> Contender:
        trial = record.trials[number]
        assert trial.cost is not None
        return Contender(
            number=number,
            step=trial.rungs[rung].step,
            costs=(float(trial.cost.peak_vram_bytes), float(trial.cost.trainable_parameters)),
            quality=trial.rungs[rung].quality,
            num_examples=trial.rungs[rung].num_examples,
            loss=trial.rungs[rung].loss,
            losses=store.read_scores(trial.rungs[rung].scores_file, "validation_losses").astype(np.float64),
        )

    stopped = [(trial, trial.outcome) for trial in record.trials if isinstance(trial.outcome, Stopped)]
    assert stopped
    # Every change of what the rule has learned asked for all of them anew.
    curves = [{score.step / 160: score.loss for score in trial.rungs} for trial in record.trials if trial.rungs]
    rule = PairedRacing().learn(curves)
    assert rule.reversal is not None
    for trial, outcome in stopped:
        pair = [contender(number, outcome.rung) for number in (trial.number, outcome.rival)]
        progress = trial.rungs[outcome.rung].step / 160
        assert rule.judge(pair[0], pair, progress=progress, majority_quality=0.5) is not None


def test_nothing_is_stopped_where_the_majority_class_is_never_beaten(studies: FakeStudies) -> None:
    record = studies.run(studies.create(budget="6trials", majority_quality=0.99))
    assert {trial.state for trial in record.trials} == {"complete"}


@pytest.mark.parametrize("racing", [PairedRacing(), LearnedRacing()])
def test_the_order_in_which_configurations_are_given_decides_nothing(
    make_studies: Callable[[], FakeStudies], make_spec: MakeSpec, racing: RacingRule
) -> None:
    specs = [
        make_spec("lora", settings={"rank": 2 ** (i % 5)}, learning_rate=recipe * 1e-4)
        for i, recipe in enumerate((2, 5, 11, 23, 47, 90, 31, 7))
    ]
    fates = []
    for seed in range(3):
        order = random.Random(seed).sample(specs, len(specs))
        studies = make_studies()
        store = studies.create_default(budget="8trials", included=tuple(order))
        record = studies.search(store, racing=racing).run()
        fates.append({trial.spec.key(): (trial.state, len(trial.rungs)) for trial in record.trials})
    assert fates[0] == fates[1] == fates[2]
    assert {state for state, _ in fates[0].values()} == {"complete", "stopped"}


class Doubting:
    """Stops every trial at the first rung but the best, until that has reached its end."""

    def __init__(self, ended: bool = False) -> None:
        self.ended = ended

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Doubting) and self.ended == other.ended

    def learn(self, curves: Sequence[LossCurve]) -> Doubting:
        return Doubting(any(1.0 in curve for curve in curves))

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        best = min(rivals, key=lambda rival: rival.loss)
        return None if self.ended or best.loss >= trial.loss else Verdict(best.number, "doubt")


def test_a_verdict_that_falls_sets_the_trial_going_again(studies: FakeStudies, make_spec: MakeSpec) -> None:
    specs = tuple(make_spec("lora", learning_rate=rate * 1e-4) for rate in (1, 10, 50))
    store = studies.create_default(budget="5trials", included=specs)
    seen: list[set[str]] = []
    search = studies.search(store, racing=Doubting(), on_change=lambda s: seen.append({t.state for t in s.trials}))
    record = search.run()
    assert any("stopped" in states for states in seen)
    assert {trial.state for trial in record.trials} == {"complete"}


def test_time_that_is_left_goes_to_what_was_stopped(studies: FakeStudies, make_spec: MakeSpec) -> None:
    specs = tuple(make_spec("lora", learning_rate=rate * 1e-4) for rate in (1, 10, 50, 90))
    by_trials = studies.search(studies.create_default(name="a", budget="4trials", included=specs)).run()
    by_the_clock = studies.search(studies.create_default(name="b", budget="4trials,60min", included=specs)).run()
    assert "stopped" in {trial.state for trial in by_trials.trials}
    assert {trial.state for trial in by_the_clock.trials} == {"complete"}


@pytest.mark.parametrize(("floor", "by_quality"), [(0.5, 1), (0.999, 4)])
def test_until_something_is_learned_every_turn_is_qualitys(studies: FakeStudies, floor: float, by_quality: int) -> None:
    search = studies.search(studies.create(budget="5trials", majority_quality=floor))
    turns: list[bool] = []
    make = search._make_appraiser

    def note(*held: Any) -> Any:
        appraiser = make(*held)
        turns.append(appraiser.is_turn_of_quality)
        return appraiser

    search._make_appraiser = note  # type: ignore[method-assign]
    search.run()
    assert sum(turns[:5]) == by_quality


# --- infeasible and failed trials


def test_max_vram_refuses_before_starting(studies: FakeStudies) -> None:
    most = 4_180_000
    record = studies.run(studies.create_default(budget="24trials", max_vram_bytes=most))
    refused = [trial for trial in record.trials if isinstance(trial.outcome, Refused)]
    assert refused
    assert all(not trial.rungs and trial.device_seconds == 0 for trial in refused)
    for trial in record.trials:
        assert trial.cost is not None
        assert (trial.state == "refused") == (trial.cost.peak_vram_bytes > most)


def test_refused_trials_do_not_count_towards_the_budget(studies: FakeStudies) -> None:
    record = studies.run(studies.create_default(budget="6trials", max_vram_bytes=4_180_000))
    assert len(started(record)) == 6


def test_a_search_in_which_nothing_fits_ends(studies: FakeStudies, monkeypatch: pytest.MonkeyPatch) -> None:
    store = studies.create(budget="3trials", max_vram_bytes=1)
    add = store.add

    def add_and_count(*arguments: Any) -> Any:
        assert len(store.trials) < 300, "the search goes on suggesting what --max-vram refuses"
        return add(*arguments)

    monkeypatch.setattr(store, "add", add_and_count)
    record = studies.run(store)
    assert started(record) == []
    assert record.picks == ()


def test_what_the_cost_model_cannot_build_is_refused_with_its_rule(studies: FakeStudies, make_spec: MakeSpec) -> None:
    # C. f. a hand-written configuration with a setting that the method lacks.
    wrong = dataclasses.replace(make_spec(), settings=dict(make_spec().settings) | {"rank": 9999})
    record = studies.run(studies.create(budget="2trials", included=(wrong,)))
    outcome = record.trials[0].outcome
    assert isinstance(outcome, Refused)
    assert "rank" in outcome.rule


def test_a_diverged_trial_is_an_outcome_and_the_search_goes_on(studies: FakeStudies, make_spec: MakeSpec) -> None:
    # The fake backend diverges above a learning rate of 0.25.
    hot = make_spec("prompt_tuning", learning_rate=0.29)
    record = studies.run(studies.create(budget="4trials", included=(hot,)))
    assert record.trials[0].state == "failed"
    assert isinstance(record.trials[0].outcome, Failed)
    assert record.trials[0].outcome.reason == "diverged"
    assert len(started(record)) == 4


class OutOfMemory(InlineExecutor):
    """Every LoRA trial runs out of memory."""

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        stretch = pack.stretches[0]
        if stretch.spec.method == "lora":
            due, job, _ = self._due.pop()
            ended = Ended(job=stretch.job, reason="out_of_memory", detail="CUDA out of memory", peak_vram_bytes=2**30)
            self._due.append((due, job, WorkerEvent(worker, ended, due)))


class LaterEnd(InlineExecutor):
    """What learns fast runs out of memory, or kills its worker, whenever it goes on after its first rung."""

    kills = False

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        stretch = pack.stretches[0]
        if stretch.spec.learning_rate > 1e-5 and stretch.from_step > 0:
            due, job, _ = self._due.pop()
            ended = Ended(job=stretch.job, reason="out_of_memory", detail="CUDA out of memory", peak_vram_bytes=None)
            event = WorkerEvent(worker, None, due, "killed by signal 9") if self.kills else None
            self._due.append((due, job, event or WorkerEvent(worker, ended, due)))


@pytest.mark.parametrize("kills", [False, True])
def test_what_fails_after_a_rung_gives_back_what_it_stopped(
    studies: FakeStudies, make_spec: MakeSpec, kills: bool
) -> None:
    good, worse = make_spec(), make_spec(learning_rate=1e-6, settings={"rank": 16})
    store = studies.create(budget="2trials", included=(good, worse))
    executor = LaterEnd(studies.executor(store)._setup, 1)
    executor.kills = kills
    states = []
    search = Search(
        store, executor, restore_space(store.config),
        on_change=lambda status: states.append([trial.state for trial in status.trials]),
    )  # fmt: skip
    search.run()
    assert any(state[1] == "stopped" for state in states if len(state) > 1), "nothing was stopped"
    assert [trial.state for trial in store.trials] == ["failed", "complete"]


def test_out_of_memory_is_an_outcome_and_its_peak_is_kept(studies: FakeStudies) -> None:
    store = studies.create(budget="6trials")
    record = Search(store, OutOfMemory(studies.executor(store)._setup, 1), restore_space(store.config)).run()
    failed = [trial for trial in record.trials if trial.spec.method == "lora"]
    assert failed
    for trial in failed:
        assert isinstance(trial.outcome, Failed)
        assert trial.outcome.reason == "out_of_memory"
        assert trial.cost is not None
        assert (trial.cost.peak_vram_bytes, trial.cost.vram_source) == (2**30, "measured")
        assert trial.cost.estimated_vram_bytes is not None


class Dying(InlineExecutor):
    """A worker dies under its first `deaths` LoRA stretches."""

    deaths = 1
    restarts = 0
    purpose = "search"
    last_event: Broken | None = None

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        (stretch,) = pack.stretches
        if stretch.spec.method == "lora" and stretch.purpose == self.purpose and self.deaths:
            self.deaths -= 1
            due, job, _ = self._due.pop()
            self._due.append((due, job, WorkerEvent(worker, self.last_event, due, "killed by signal 9")))

    def restart(self, worker: int) -> None:
        super().restart(worker)
        self.restarts += 1


def run_dying(studies: FakeStudies, deaths: int) -> tuple[StudyRecord, Dying]:
    store = studies.create(budget="4trials")
    executor = Dying(studies.executor(store)._setup, 1)
    executor.deaths = deaths
    return Search(store, executor, restore_space(store.config)).run(), executor


def test_a_worker_that_dies_costs_its_stretch_and_nothing_more(make_studies: Callable[[], FakeStudies]) -> None:
    spared, _ = run_dying(make_studies(), 0)
    record, executor = run_dying(make_studies(), 1)
    assert decisions(record) == decisions(spared)
    assert executor.restarts == 1
    assert record.ledger.lost_seconds > 0


def test_what_every_trial_would_meet_ends_the_search_and_counts_against_none(
    studies: FakeStudies, make_studies: Callable[[], FakeStudies]
) -> None:
    spared, _ = run_dying(make_studies(), 0)
    store = studies.create(budget="4trials")
    executor = Dying(studies.executor(store)._setup, 1)
    executor.last_event = Broken(detail="No room is left.", usage=True, ends_study=True)
    with pytest.raises(StudyError, match=r"^No room is left\.$"):
        Search(store, executor, restore_space(store.config)).run()
    assert not any(trial.deaths for trial in store.trials)
    record = studies.run(studies.open())
    assert decisions(record) == decisions(spared)
    assert record.ledger.lost_seconds > 0


class BreakingBeside(InlineExecutor):
    """Whenever a worker finishes, the other has broken for good at the same time, and is heard of first."""

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        events = super().wait(timeout_seconds)
        broken = Broken(detail="No room is left.", usage=True, ends_study=True)
        return [*(WorkerEvent(1 - event.worker, broken, event.at_seconds) for event in events), *events]


def test_a_score_that_came_with_the_end_of_the_study_is_kept(studies: FakeStudies) -> None:
    store = studies.create(budget="4trials", workers=2)
    executor = BreakingBeside(studies.executor(store)._setup, 2)
    with pytest.raises(StudyError, match="No room"):
        Search(store, executor, restore_space(store.config)).run()
    kept = studies.open()
    assert kept.baseline is not None
    assert sum(len(trial.rungs) for trial in [*kept.trials, kept.baseline]) == 1


def test_a_trial_that_kills_two_workers_is_given_up(studies: FakeStudies) -> None:
    record, _ = run_dying(studies, 2)
    lora = next(trial for trial in record.trials if trial.spec.method == "lora")
    assert isinstance(lora.outcome, Failed)
    assert lora.outcome.reason == "worker_died"
    assert "signal 9" in lora.outcome.detail
    assert len(started(record)) == 4


def test_a_confirmation_that_kills_two_workers_is_given_up_and_said(studies: FakeStudies) -> None:
    store = studies.create(budget="4trials", space="methods: {lora: {rank: {low: 1, high: 64}, bits: [unquantized]}}")
    executor = Dying(studies.executor(store)._setup, 1)
    executor.deaths, executor.purpose = 2, "confirm"
    record = Search(store, executor, restore_space(store.config)).run()
    assert record.finished
    (note,) = (note for note in record.notes if "ended without a score: worker_died" in note)
    number = int(note.split()[4])
    others = [trial for trial in record.trials if trial.confirmations and trial.number != number]
    assert len(record.trials[number].confirmations) < len(others[0].confirmations)


class Diverging(InlineExecutor):
    """The first confirmation diverges."""

    begun = 0

    def assign(self, worker: int, pack: Pack) -> None:
        super().assign(worker, pack)
        (stretch,) = pack.stretches
        if stretch.purpose == "confirm":
            self.begun += 1
            if self.begun == 1:
                due, job, _ = self._due.pop()
                ended = Ended(job=stretch.job, reason="diverged", detail="loss is nan", peak_vram_bytes=None)
                self._due.append((due, job, WorkerEvent(worker, ended, due)))


def test_what_diverges_with_another_seed_is_not_picked_and_not_retrained_again(studies: FakeStudies) -> None:
    store = studies.create()
    executor = Diverging(studies.executor(store)._setup, 1)
    record = Search(store, executor, restore_space(store.config)).run()
    (shaky,) = (trial for trial in record.trials if trial.failed_confirmations)
    assert [failed.seed for failed in shaky.failed_confirmations] == [1]
    assert shaky.number not in {pick.number for pick in record.picks}
    assert any(
        f"trial {shaky.number} with seed 1 ended without a score: diverged, loss is nan." in note
        for note in record.notes
    )
    again = studies.run(studies.open())
    assert again.trials == record.trials
    assert again.picks == record.picks
    assert again.notes == record.notes


class WithoutDearest(InlineExecutor):
    """Nobody can tell what full fine-tuning costs."""

    def cost(self, spec: TrialSpec) -> CostReply:
        if spec.method == "full":
            return CostReply(cost=None, refused="its cost cannot be computed: RuntimeError: busy")
        return super().cost(spec)


def test_a_reference_without_costs_is_said_and_made_whole_by_a_resume(studies: FakeStudies) -> None:
    store = studies.create(budget="3trials")
    record = Search(store, WithoutDearest(studies.executor(store)._setup, 1), restore_space(store.config)).run()
    assert record.reference.keys() == {"quality"}
    assert any("quality alone" in note and "RuntimeError: busy" in note for note in record.notes)
    again = studies.run(studies.open())
    assert again.reference.keys() == {"quality", "vram", "params"}
    assert not any("quality alone" in note for note in again.notes)


def test_what_was_quick_to_confirm_is_not_all_that_is_picked_from(studies: FakeStudies) -> None:
    """An interrupt after the first confirmation."""
    store = studies.create()

    def interrupt(status: Status) -> None:
        if any(trial.confirmations for trial in status.trials):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        studies.search(store, on_change=interrupt).run()
    wanted = {pick.name: pick.number for pick in analyze(store, confirmed=False).picks}
    picks = {pick.name: pick for pick in build_record(store).picks}
    assert len(set(wanted.values())) > 1
    assert picks["smallest"].number == wanted["smallest"]
    for pick in picks.values():
        is_confirmed = bool(store.trials[pick.number].confirmations)
        assert ("not confirmed with another seed yet" in pick.why) == (not is_confirmed)
    finished = studies.run(studies.open())
    assert all(finished.trials[pick.number].confirmations for pick in finished.picks)
    assert not any("not confirmed" in pick.why for pick in finished.picks)


def test_configurations_that_fail_for_good_end_no_search_in_which_others_finish(
    studies: FakeStudies, make_spec: MakeSpec
) -> None:
    included = [make_spec(settings={"rank": 2**i}) for i in range(5)]
    others = [make_spec("ia3", learning_rate=1e-3 * 2**i) for i in range(5)]
    paired = tuple(itertools.chain(*zip(included, others, strict=True)))
    store = studies.create(budget="10trials", included=paired)
    executor = Dying(studies.executor(store)._setup, 1)
    executor.deaths = 10
    record = Search(store, executor, restore_space(store.config)).run()
    assert [trial.state == "failed" for trial in record.trials] == [True, False] * 5


def test_a_search_whose_workers_die_one_after_another_is_ended(studies: FakeStudies, make_spec: MakeSpec) -> None:
    store = studies.create(budget="8trials", included=tuple(make_spec(settings={"rank": 2**i}) for i in range(6)))
    executor = Dying(studies.executor(store)._setup, 1)
    executor.deaths = 12
    with pytest.raises(WorkerError, match=r"keep dying, .* killed by signal 9"):
        Search(store, executor, restore_space(store.config)).run()
    # What a later run may still try.
    assert any(trial.state == "waiting" for trial in store.trials)


class DyingAfterwards(InlineExecutor):
    """A worker dies whenever it has finished a stretch."""

    restarts = 0

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        events = super().wait(timeout_seconds)
        ended = [event for event in events if isinstance(event.event, Finished)]
        return [*events, *(WorkerEvent(event.worker, None, event.at_seconds, "gone") for event in ended)]

    def restart(self, worker: int) -> None:
        super().restart(worker)
        self.restarts += 1


def test_workers_that_die_between_stretches_end_no_search_in_which_all_finish(studies: FakeStudies) -> None:
    store = studies.create(budget="4trials")
    executor = DyingAfterwards(studies.executor(store)._setup, 1)
    record = Search(store, executor, restore_space(store.config)).run()
    assert record.finished
    assert executor.restarts > 4
    assert {trial.state for trial in record.trials} <= {"complete", "stopped"}


class BreakingDown(InlineExecutor):
    """From some stretch on a worker dies under it, and then each time that it is started."""

    breaks_at: dict[int, int]
    """The stretch, by worker."""
    broken: set[int]

    def assign(self, worker: int, pack: Pack) -> None:
        (stretch,) = pack.stretches
        if self.breaks_at.get(worker, stretch.job + 1) > stretch.job:
            super().assign(worker, pack)
        elif worker not in self.broken:
            self.broken.add(worker)
            self._die(worker, self._now + 1.0)

    def restart(self, worker: int) -> None:
        if worker in self.broken:
            self._die(worker, self._now + 5.0)
        else:
            super().restart(worker)

    def _die(self, worker: int, at: float) -> None:
        heapq.heappush(self._due, (at, -next(self._restarts), WorkerEvent(worker, None, at, "GPU is lost")))


def break_down(studies: FakeStudies, breaks_at: dict[int, int]) -> Search:
    store = studies.create(budget="20cpu-min", workers=2)
    executor = BreakingDown(studies.executor(store)._setup, 2)
    executor.breaks_at, executor.broken = breaks_at, set()
    return Search(store, executor, restore_space(store.config))


def test_a_gpu_that_is_lost_costs_no_trial_and_the_others_have_its_budget(studies: FakeStudies) -> None:
    search = break_down(studies, {1: 8})
    record = search.run()
    assert not any(trial.state == "failed" for trial in record.trials)
    # The one that it was lost under; those that waited for it in vain are as they were.
    assert sum(trial.deaths for trial in search.store.trials) == 1
    assert [note for note in record.notes if "Worker 1 died 4 times while it came up" in note]
    lost = [segment for segment in record.segments if segment.purpose == "lost"]
    assert [segment.worker for segment in lost] == [1] * len(lost)
    assert max(segment.start_seconds for segment in record.segments if segment.worker == 1) < 100.0
    # All but what is too short for another confirmation.
    assert search.account.ledger.spent_device_seconds > 1000.0


def test_a_search_all_of_whose_workers_are_lost_is_ended_and_keeps_its_trials(studies: FakeStudies) -> None:
    search = break_down(studies, {0: 12, 1: 8})
    with pytest.raises(WorkerError, match=r"^Workers die even without work, .* GPU is lost"):
        search.run()
    assert not any(trial.state == "failed" for trial in search.store.trials)
    assert studies.run(studies.open()).finished


# --- recipes, included configurations, the baseline


def test_the_first_trial_and_at_least_every_third_is_a_recipe(record: StudyRecord) -> None:
    wanted = [spec.key() for spec in restore_space(record.config).recipes]
    assert all(trial.spec.key() in wanted for trial in record.trials if trial.source == "recipe")
    sources = [trial.source for trial in record.trials]
    assert sources[0] == "recipe"
    # Of those so far; more of them where they promise most, and none once all have been.
    last = len(sources) - sources[::-1].index("recipe")
    assert all(3 * sources[:count].count("recipe") >= count for count in range(1, last + 1))


def test_every_recipe_is_tried_in_time(studies: FakeStudies) -> None:
    store = studies.create(budget="12trials")
    recipes = {spec.key() for spec in restore_space(store.config).recipes}
    record = studies.run(store)
    assert recipes <= {trial.spec.key() for trial in record.trials}


def test_an_included_configuration_is_raced_first(studies: FakeStudies, make_spec: MakeSpec) -> None:
    mine = make_spec("lora", settings={"rank": 3})
    record = studies.run(studies.create(budget="4trials", included=(mine,)))
    assert record.trials[0].spec == mine
    assert record.trials[0].source == "included"
    assert record.trials[0].rungs


def test_an_included_configuration_outside_the_space_is_raced_too(studies: FakeStudies, make_spec: MakeSpec) -> None:
    mine = make_spec("full", batch_size=3)
    record = studies.run(studies.create(budget="4trials", included=(mine,)))
    assert record.trials[0].spec == mine
    assert record.trials[0].rungs


def test_a_configuration_that_is_included_twice_is_one_trial(studies: FakeStudies, make_spec: MakeSpec) -> None:
    mine = make_spec("lora", settings={"rank": 3})
    record = studies.run(studies.create(budget="4trials", included=(mine, mine)))
    assert len({trial.spec.key() for trial in record.trials}) == 4
    assert len(started(record)) == 4


def test_an_included_recipe_is_not_repeated(studies: FakeStudies, make_spec: MakeSpec) -> None:
    record = studies.run(studies.create(budget="4trials", included=(make_spec("ia3"),)))
    assert len({trial.spec.key() for trial in record.trials}) == len(record.trials)


def test_a_trained_head_on_the_frozen_base_is_the_baseline(record: StudyRecord) -> None:
    assert record.baseline is not None
    assert record.baseline.spec.method == "head"
    assert record.baseline.rungs[-1].step == 160


def test_the_baseline_is_none_of_the_trials(record: StudyRecord) -> None:
    assert all(trial.source != "baseline" for trial in record.trials)


def test_a_space_whose_recipes_the_machine_refuses_is_searched_all_the_same(studies: FakeStudies) -> None:
    # DoRA on int8 crashes on CPU, so LoRA's recipe does not fit; DoRA on 4 bits is fine.
    space = "methods: {lora: {dora: [true], bits: [8, 4]}}"
    record = studies.run(studies.create(budget="3trials", space=space))
    assert len(started(record)) == 3
    assert {trial.spec.bits for trial in record.trials} == {4}


def test_an_exhausted_space_ends_the_search_and_says_so(studies: FakeStudies) -> None:
    space = "methods: {ia3: {bits: [4, unquantized], learning_rate: [0.01]}}"
    record = studies.run(studies.create(budget="50trials", space=space))
    # 2 widths x with or without the feed-forward.
    assert len(started(record)) == 4
    assert any("nothing new" in note for note in record.notes)


# --- confirmation and the record


def test_finalists_are_retrained_with_two_more_seeds_and_scored_on_test(record: StudyRecord) -> None:
    confirmed = [trial for trial in record.trials if trial.confirmations]
    assert 1 <= len(confirmed) <= 5
    for trial in confirmed:
        assert [confirmation.seed for confirmation in trial.confirmations] == [1, 2]
        assert trial.test_quality is not None


def test_only_finalists_have_test_scores(record: StudyRecord) -> None:
    assert all(trial.test_quality is None for trial in record.trials if not trial.confirmations)


def test_many_workers_confirm_side_by_side_in_the_device_time_that_idle_ones_leave(studies: FakeStudies) -> None:
    """A quarter of a minute is kept, and a training takes 20 seconds, however many workers there are."""
    search = studies.search(studies.create(budget="8cpu-min", workers=8))
    record = search.run()
    confirmations = [segment for segment in record.segments if segment.purpose == "confirm"]
    assert len(confirmations) >= 4
    assert len({segment.worker for segment in confirmations}) >= 4
    assert min(segment.end_seconds - segment.start_seconds for segment in confirmations) > 15.0
    assert search.account.ledger.spent_device_seconds <= 480.0


def test_only_complete_trials_are_confirmed(record: StudyRecord) -> None:
    assert all(trial.state == "complete" for trial in record.trials if trial.confirmations)


def test_the_front_is_the_nondominated_complete_trials(record: StudyRecord) -> None:
    complete = [trial for trial in record.trials if trial.state == "complete"]
    assert record.baseline is not None
    points = []
    for trial in [*complete, record.baseline]:
        assert trial.quality is not None
        assert trial.cost is not None
        points.append([-trial.quality, trial.cost.peak_vram_bytes, trial.cost.trainable_parameters])
    on_front = find_nondominated(np.array(points))[:-1]
    assert [member.number for member in record.front] == [
        trial.number for trial, on in zip(complete, on_front, strict=True) if on
    ]


def test_the_best_and_the_knee_come_from_the_front(record: StudyRecord) -> None:
    front = {member.number for member in record.front}
    assert {pick.number for pick in record.picks if pick.name in ("best", "knee")} <= front


def test_every_pick_is_confirmed(record: StudyRecord) -> None:
    assert all(record.trials[pick.number].confirmations for pick in record.picks)


def test_there_is_one_pick_of_each_name(record: StudyRecord) -> None:
    assert [pick.name for pick in record.picks] == ["best", "knee", "smallest"]


def test_hypervolume_is_a_share(record: StudyRecord) -> None:
    assert record.hypervolume is not None
    assert 0 < record.hypervolume < 1


def test_the_ledger_adds_up_to_the_segments(record: StudyRecord) -> None:
    by_purpose: dict[str, list[float]] = {}
    for segment in record.segments:
        by_purpose.setdefault(segment.purpose, []).append(segment.end_seconds - segment.start_seconds)
    ledger = record.ledger
    assert math.fsum(by_purpose["search"]) == pytest.approx(ledger.search_seconds)
    assert math.fsum(by_purpose["confirm"]) == pytest.approx(ledger.confirm_seconds)
    assert math.fsum(by_purpose["baseline"]) == pytest.approx(ledger.baseline_seconds)
    assert ledger.lost_seconds == 0


def test_a_worker_does_one_thing_at_a_time(record: StudyRecord) -> None:
    for worker in range(2):
        own = sorted((s.start_seconds, s.end_seconds) for s in record.segments if s.worker == worker)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(own))


def test_both_workers_are_kept_busy_during_the_search(record: StudyRecord) -> None:
    searching = [s for s in record.segments if s.purpose in ("search", "baseline")]
    span = max(s.end_seconds for s in searching) - min(s.start_seconds for s in searching)
    busy = sum(s.end_seconds - s.start_seconds for s in searching)
    assert busy > 0.8 * 2 * span


def test_no_checkpoint_is_left_when_a_study_has_ended(studies: FakeStudies) -> None:
    store = studies.create(budget="6trials")
    studies.run(store)
    assert list((store.folder / "checkpoints").glob("*")) == []


def test_a_finished_record_says_that_it_is_finished(record: StudyRecord) -> None:
    assert record.finished


def test_the_reference_is_the_majority_class_at_the_cost_of_full_fine_tuning(record: StudyRecord) -> None:
    # 1,000,000 weights of 4 bytes, 12 bytes each for gradient and optimizer, 16 examples of 10,000 bytes.
    assert record.reference == {"quality": 0.5, "vram": 16_160_000.0, "params": 1_000_000.0}


@pytest.mark.parametrize("objectives", [("quality",), ("quality", "params"), ("quality", "vram")])
def test_fewer_objectives_are_searched_too(studies: FakeStudies, objectives: tuple[str, ...]) -> None:
    record = studies.run(studies.create(budget="6trials", objectives=objectives))
    assert set(record.reference) == set(objectives)
    assert len(started(record)) == 6
    assert record.picks


def test_progress_is_told_of_every_worker_and_never_goes_back(studies: FakeStudies) -> None:
    shares: list[float] = []

    def note(status: Any) -> None:
        assert status.spent_share is not None
        shares.append(status.spent_share)

    studies.run(studies.create(budget="2min"), on_change=note)
    assert shares == sorted(shares)
    assert shares[-1] <= 1


class Asked(InlineExecutor):
    """Notes what is asked for its cost, and whether a worker has something to do meanwhile."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.asked: dict[str, bool] = {}

    def cost(self, spec: TrialSpec) -> CostReply:
        self.asked.setdefault(spec.cost_key(), bool(self._due))
        return super().cost(spec)


def test_recipes_are_costed_while_the_baseline_is_trained(studies: FakeStudies, make_spec: MakeSpec) -> None:
    mine = make_spec(settings={"rank": 3})
    store = studies.create_default(budget="3trials", included=(mine,))
    executor = Asked(studies.executor(store)._setup, 1)
    search = Search(store, executor, restore_space(store.config))
    search.run()
    # Full fine-tuning's is the hypervolume's reference, and known before anything runs.
    recipes = [spec for spec in search.sampler.recipes if spec.method != "full"]
    assert all(executor.asked[spec.cost_key()] for spec in (mine, *recipes))


class SlowToStart(InlineExecutor):
    """Ten minutes pass until its workers are ready."""

    def start(self) -> list[Ready]:
        self._now += 600.0
        return super().start()


def test_a_time_of_day_waits_for_no_worker(studies: FakeStudies) -> None:
    store = studies.create_default(budget="100trials", confirm_seeds=0, confirm_share=0.0)
    executor = SlowToStart(studies.executor(store)._setup, 1)
    record = Search(store, executor, restore_space(store.config), wall_seconds_limit=700.0).run()
    assert len(record.trials) > 1
    assert 650.0 < executor.now() < 710.0
