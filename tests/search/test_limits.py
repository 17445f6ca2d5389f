"""What is refused, and how measurements change that; measurements are made up, because they need a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.backends.base import CONTEXT_BYTES, Ended, Finished, Stretch
from autopeft.errors import SpecError
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Completed, Cost, Failed, TrialSpec
from autopeft.search.costs import measured_cost
from autopeft.search.limits import Limits, fit_overhead, needed_bytes
from autopeft.search.plan import restore_space
from autopeft.search.request import parse_count
from autopeft.search.store import Trial
from autopeft.search.study import Search

MIB = 2**20
GIB = 2**30
MakeSpec = Callable[..., TrialSpec]


def estimated(num_bytes: int, *, params: int = 1000, scoring: int | None = None) -> Cost:
    return Cost(
        trainable_parameters=params, head_parameters=2, peak_vram_bytes=num_bytes, vram_source="estimated",
        scoring_vram_bytes=scoring,
    )  # fmt: skip


@pytest.fixture
def make_trial(make_spec: MakeSpec) -> Callable[..., Trial]:
    def make(number: int, cost: Cost, *, measured: int | None = None, ran_out: bool = False, bits: int = 16) -> Trial:
        trial = Trial(number=number, spec=make_spec("lora", bits=bits), source="sampler", cost=cost)
        if measured is not None:
            trial.cost = measured_cost(cost, measured, None)
            trial.outcome = Failed(reason="out_of_memory", detail="") if ran_out else Completed()
        return trial

    return make


@pytest.fixture
def config(studies: Any) -> Any:
    return studies.config(device_kind="cuda")


# --- the fit


def test_without_measurements_nothing_is_added():
    assert fit_overhead([]).correct(7 * GIB) == 7 * GIB


def test_one_measurement_teaches_a_constant():
    assert fit_overhead([(4 * GIB, 4 * GIB + 60 * MIB)]).correct(9 * GIB) == 9 * GIB + 60 * MIB


@given(
    fixed=st.integers(-50, 500),
    share=st.floats(-0.05, 0.2),
    sizes=st.lists(st.integers(1, 400), min_size=4, max_size=9, unique=True),
    asked=st.integers(1, 1000),
)
def test_a_fixed_and_a_proportional_overhead_are_both_recovered(fixed, share, sizes, asked):
    # From 1 to at least 1.5 times, or a slope would not be fitted.
    sizes = [*sizes, 2 * max(sizes)]
    pairs = [(size * 64 * MIB, round(size * 64 * MIB * (1 + share) + fixed * MIB)) for size in sizes]
    expected = asked * 64 * MIB * (1 + share) + fixed * MIB
    assert fit_overhead(pairs).correct(asked * 64 * MIB) == pytest.approx(max(0.0, expected), rel=1e-4, abs=4096)


def test_one_odd_measurement_does_not_move_the_fit():
    pairs = [(size * GIB, size * GIB + 100 * MIB) for size in (2, 3, 4, 5, 6, 7, 8)]
    pairs[3] = (5 * GIB, 9 * GIB)
    assert fit_overhead(pairs).correct(10 * GIB) == pytest.approx(10 * GIB + 100 * MIB, rel=0.001)


def test_measurements_of_another_width_count_only_while_there_are_none_of_its_own(config, make_trial):
    trials = [make_trial(0, estimated(8 * GIB), measured=8 * GIB + 300 * MIB, bits=4)]
    limits = Limits(config, trials, None)
    assert limits.correct(estimated(GIB), 16).corrected_vram_bytes == GIB + 300 * MIB
    trials.append(make_trial(1, estimated(8 * GIB), measured=8 * GIB + 100 * MIB, bits=16))
    assert limits.correct(estimated(GIB), 16).corrected_vram_bytes == GIB + 100 * MIB


def test_a_measured_cost_is_not_corrected(config, make_trial):
    trial = make_trial(0, estimated(8 * GIB), measured=9 * GIB)
    assert trial.cost is not None
    assert Limits(config, [trial], None).correct(trial.cost, 16) == trial.cost


# --- the limits


def test_a_correction_can_refuse_what_an_estimate_allows(config, make_trial):
    config = replace(config, max_vram_bytes=10 * GIB)
    measured = make_trial(0, estimated(8 * GIB), measured=9 * GIB)
    limits = Limits(config, [measured], None)
    trial = make_trial(1, estimated(int(9.5 * GIB)))
    assert limits.judge(trial).rule is None
    trial.cost = limits.correct(trial.cost, 16)
    judgement = limits.judge(trial)
    assert "corrected" in (judgement.rule or "")
    assert "10.50 GiB" in (judgement.rule or "")
    assert judgement.excess == pytest.approx(0.05)


def test_the_worst_limit_is_the_one_named(config, make_trial):
    config = replace(config, max_vram_bytes=10 * GIB, max_params=100)
    judgement = Limits(config, [], None).judge(make_trial(0, estimated(11 * GIB, params=200)))
    assert "--max-params" in (judgement.rule or "")
    assert judgement.excess == 1.0


def test_memory_that_other_processes_hold_is_not_offered(config, make_trial):
    trial = make_trial(0, estimated(10 * GIB))
    assert Limits(config, [], 10 * GIB + CONTEXT_BYTES).judge(trial).rule is None
    assert "free" in (Limits(config, [], 10 * GIB).judge(trial).rule or "")


def test_what_needs_as_much_as_what_ran_out_of_memory_is_refused(config, make_trial):
    failed = make_trial(0, estimated(20 * GIB), measured=18 * GIB, ran_out=True)
    limits = Limits(config, [failed], None)
    assert "trial 0 ran out of memory" in (limits.judge(make_trial(1, estimated(20 * GIB))).rule or "")
    assert limits.judge(make_trial(2, estimated(19 * GIB))).rule is None
    # What it held when it failed is no peak of a whole step.
    assert limits.overhead(16).num_trials == 0


def test_what_ran_out_where_more_has_fitted_refuses_nothing(config, make_trial):
    failed = make_trial(0, estimated(10 * GIB), measured=2 * GIB, ran_out=True)
    another = make_trial(1, estimated(12 * GIB))
    assert "trial 0 ran out of memory" in (Limits(config, [failed], None).judge(another).rule or "")
    fitted = make_trial(2, estimated(20 * GIB), measured=20 * GIB)
    limits = Limits(config, [failed, fitted], None)
    assert limits.judge(another).rule is None
    assert "vram" not in limits.most()
    # That was on a larger GPU than there is now.
    assert Limits(config, [failed, fitted], 15 * GIB).judge(another).rule is not None


def test_what_ran_out_on_a_smaller_gpu_refuses_nothing_on_a_larger_one(config, make_trial):
    failed = make_trial(0, estimated(20 * GIB), measured=18 * GIB, ran_out=True)
    failed.outcome = replace(failed.outcome, room_bytes=22 * GIB)
    another = make_trial(1, estimated(21 * GIB))
    for free, is_refused in ((22 * GIB, True), (22.5 * GIB, True), (40 * GIB, False)):
        rule = Limits(config, [failed], round(free) + CONTEXT_BYTES).judge(another).rule
        assert (rule is not None) == is_refused


def test_an_evaluation_that_needs_more_than_training_counts(config, make_trial):
    assert needed_bytes(estimated(4 * GIB, scoring=5 * GIB)) == 5 * GIB
    assert needed_bytes(estimated(4 * GIB, scoring=3 * GIB)) == 4 * GIB


@pytest.mark.parametrize(("text", "count"), [("500k", 500_000), ("1.5M", 1_500_000), ("12", 12), ("2B", 2_000_000_000)])
def test_counts_are_read_with_their_units(text, count):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "many", "-3", "0", "inf", "nan", "5GB"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(SpecError, match="--max-params"):
        parse_count(text)


# --- in a study


def test_max_params_refuses_before_starting(studies):
    record = studies.run(studies.create_default(budget="24trials", max_params=5_000))
    started = [trial for trial in record.trials if trial.rungs]
    refused = [trial for trial in record.trials if trial.outcome is not None and trial.outcome.kind == "refused"]
    assert started
    assert refused
    assert all(trial.cost.trainable_parameters <= 5_000 for trial in started)
    assert all("--max-params" in trial.outcome.rule for trial in refused)


class _CardOf(InlineExecutor):
    """A GPU that measures 10% more than is estimated, and has only so much."""

    most: int = 0

    def assign(self, worker: int, pack: Any) -> None:
        backend, costs, most = self._backend, self._costs, self.most

        class Measuring:
            def run(self, stretch: Stretch, emit: Any) -> Finished | Ended:
                need = round(1.1 * costs.cost(stretch.spec).peak_vram_bytes)
                if need > most and stretch.purpose == "search":
                    return Ended(job=stretch.job, reason="out_of_memory", detail="CUDA", peak_vram_bytes=most)
                done = backend.run(stretch, emit)
                measured = need if stretch.from_step == 0 else None
                return replace(done, peak_vram_bytes=measured) if isinstance(done, Finished) else done

        self._backend = Measuring()  # type: ignore[assignment]
        try:
            super().assign(worker, pack)
        finally:
            self._backend = backend


def test_a_trial_that_runs_out_of_memory_ends_and_later_ones_are_judged_by_it(studies):
    # By the fake costs, full fine-tuning of 1M parameters needs 16.2 MB, which is 17.8 MB measured.
    space = "methods: {full: {}, lora: {rank: {low: 1, high: 64}, bits: [unquantized]}}"
    store = studies.create(space=space, budget="10trials")
    executor = studies.executor(store)
    executor.__class__ = _CardOf
    executor.most = 12_000_000
    record = Search(store, executor, restore_space(store.config)).run()
    ran_out = [
        t for t in record.trials if t.outcome is not None and getattr(t.outcome, "reason", "") == "out_of_memory"
    ]
    assert ran_out
    assert all(trial.cost.peak_vram_bytes == 12_000_000 for trial in ran_out)
    completed = [trial for trial in record.trials if trial.state == "complete"]
    assert completed
    # From the second on they are corrected, by the tenth that they were off.
    last = max((t for t in completed if t.cost.corrected_vram_bytes is not None), key=lambda trial: trial.number)
    assert last.cost.corrected_vram_bytes == pytest.approx(last.cost.peak_vram_bytes, rel=0.02)


class _Crowded(InlineExecutor):
    """LoRA's first stretches run out of memory, because another process has taken it."""

    times: int = 0
    purpose: str = "search"

    def assign(self, worker: int, pack: Any) -> None:
        super().assign(worker, pack)
        (stretch,) = pack.stretches
        if stretch.spec.method == "lora" and stretch.purpose == self.purpose and self.times:
            self.times -= 1
            due, job, event = self._due.pop()
            ended = Ended(job=stretch.job, reason="out_of_memory", detail="CUDA", peak_vram_bytes=1000)
            self._due.append((due, job, event._replace(event=ended)))


@pytest.mark.parametrize("purpose", ["search", "confirm"])
@pytest.mark.parametrize(
    ("times", "free_bytes", "num_failed"), [(1, 10 * GIB, 0), (2, 10 * GIB, 1), (1, 20_000_000 + CONTEXT_BYTES, 0),
                                            (1, 5_000_000 + CONTEXT_BYTES, 1), (1, None, 1)]
)  # fmt: skip
def test_what_runs_out_of_memory_beside_ample_room_is_tried_once_more(studies, purpose, times, free_bytes, num_failed):
    # LoRA's recipe is estimated at 4.45 MB.
    space = "methods: {lora: {rank: 8, learning_rate: [0.0001, 0.001], bits: [unquantized]}}"
    store = studies.create(space=space, budget="2trials")
    executor = studies.executor(store)
    executor.__class__ = _Crowded
    executor.times, executor.purpose = times, purpose
    record = Search(store, executor, restore_space(store.config), free_bytes=free_bytes).run()
    lost = [segment for segment in record.segments if segment.purpose == "lost"]
    assert len(lost) == (free_bytes is not None and times > num_failed)
    if purpose == "search":
        failed = [trial for trial in record.trials if trial.state == "failed"]
        assert [trial.outcome.reason for trial in failed] == ["out_of_memory"] * num_failed
        assert [trial.outcome.room_bytes for trial in failed] == [
            None if free_bytes is None else free_bytes - CONTEXT_BYTES
        ] * num_failed
    else:
        failed = [each for trial in record.trials for each in trial.failed_confirmations]
        assert [each.reason for each in failed] == ["out_of_memory"] * num_failed
    assert sum(len(trial.confirmations) for trial in record.trials) > 0


def test_a_trial_that_is_measured_to_need_more_than_max_vram_is_refused_though_its_estimate_fitted(studies):
    # A LoRA of rank 8, the recipe, is estimated at 4.45 MB and measured at a tenth more; of rank 1 it fits.
    space = "methods: {lora: {rank: {low: 1, high: 64}, bits: [unquantized]}}"
    store = studies.create(space=space, budget="10trials", max_vram_bytes=4_700_000)
    executor = studies.executor(store)
    executor.__class__ = _CardOf
    executor.most = 10**9
    record = Search(store, executor, restore_space(store.config)).run()
    refused = [trial for trial in record.trials if trial.state == "refused" and trial.rungs]
    assert refused
    assert all("as its first steps measured, and --max-vram is" in trial.outcome.rule for trial in refused)
    assert all(trial.cost.vram_source == "measured" for trial in refused)
    complete = [trial for trial in record.trials if trial.state == "complete"]
    assert all(trial.cost.peak_vram_bytes <= 4_700_000 for trial in complete)
    assert not {trial.number for trial in refused} & {pick.number for pick in record.picks}
