"""What a free worker does next: whatever promises most, the cheap beside the accurate, and never what cannot end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.records import Bits, Cost, RungScore, TrialSpec
from autopeft.search.policy import Promote, Situation, StartNew, StartWaiting, Wait, choose_next, order_by_price
from autopeft.search.speed import Kind, Speed
from autopeft.search.store import Trial
from autopeft.search.worth import QUALITY_EVERY, Appraiser, Newcomer

RUNGS = (40, 80, 160)
REFERENCE = {"quality": 0.3, "vram": 1000.0}
MakeSpec = Callable[..., TrialSpec]
MakeTrial = Callable[..., Trial]


def make_score(rung: int, quality: float, loss: float | None = None, seconds: float = 40.0) -> RungScore:
    return RungScore(
        rung=rung,
        step=RUNGS[rung],
        quality=quality,
        loss=1 - quality if loss is None else loss,
        num_examples=100,
        device_seconds=seconds,
        train_seconds=seconds,
        scores_file="x",
        scores_digest="x",
    )


@pytest.fixture(scope="session")
def make_trial(make_spec: MakeSpec) -> MakeTrial:
    def make_trial(number: int, qualities: Sequence[float], *, state: str = "paused", vram: int = 100) -> Trial:
        """A trial scored at as many rungs as there are qualities."""
        return Trial(
            number=number,
            spec=make_spec(),
            source="sampler",
            state=state,  # type: ignore[arg-type]
            cost=Cost(trainable_parameters=vram, head_parameters=1, peak_vram_bytes=vram, vram_source="estimated"),
            rungs=[make_score(rung, quality) for rung, quality in enumerate(qualities)],
        )

    return make_trial


def make_situation(trials: Sequence[Trial], **changes: object) -> Situation:
    situation = Situation(
        trials=trials, rungs=RUNGS, seconds_left=math.inf, trials_left=10, can_suggest=True, waiting=[]
    )  # fmt: skip
    return situation._replace(**changes)


@pytest.fixture(scope="session")
def one_a_second(make_spec: MakeSpec) -> Speed:
    """A step takes a second, scoring nothing."""
    speed = Speed()
    speed.learn(make_spec(), make_score(0, 0.5), 40, 40.0)
    return speed


def make_newcomer(vram: int = 100, bits: Bits = 32, **settings: object) -> Newcomer:
    cost = Cost(trainable_parameters=vram, head_parameters=1, peak_vram_bytes=vram, vram_source="estimated")
    return Newcomer(Kind("lora", bits, 16), None, cost=cost)._replace(**settings)


def appraise(trials: Sequence[Trial], speed: Speed | None = None, **settings: object) -> Appraiser:
    known: dict[str, object] = {"is_clocked": speed is not None, "has_learned": lambda score: True} | settings
    return Appraiser(trials, RUNGS, REFERENCE, speed or Speed(), **known)  # type: ignore[arg-type]


def never(score: RungScore) -> bool:
    return False


def decide(
    situation: Situation, speed: Speed | None = None, newcomers: Sequence[Newcomer] = ()
) -> StartNew | Promote | Wait:
    return choose_next(situation, speed or Speed(), appraise(situation.trials, speed), lambda: newcomers)


def order(trials: Sequence[Trial]) -> list[int]:
    appraiser = appraise(trials)
    ordered = order_by_price(trials, appraiser, by_quality=appraiser.is_turn_of_quality)
    return [each.trial.number for each in ordered]


def test_a_study_begins_with_something_new() -> None:
    newcomer = make_newcomer()
    assert decide(make_situation([]), newcomers=[newcomer]) == StartNew((newcomer,))


def test_what_waits_comes_before_whatever_promises_more(make_trial: MakeTrial) -> None:
    trials = [make_trial(i, [0.5 + i / 10]) for i in range(4)]
    assert decide(make_situation(trials, waiting=[make_trial(4, [])]), newcomers=[make_newcomer()]) == StartWaiting(4)


def test_a_good_trial_goes_on_before_an_unknown_one_of_its_cost_is_begun(make_trial: MakeTrial) -> None:
    trials = [make_trial(0, [0.9]), make_trial(1, [0.4]), make_trial(2, [0.4])]
    assert decide(make_situation(trials), newcomers=[make_newcomer()]) == Promote(0)


def test_something_new_is_begun_before_what_has_shown_little_goes_on(make_trial: MakeTrial) -> None:
    done = [make_trial(i, [0.7, 0.8, 0.9], state="complete") for i in range(3)]
    poor = make_trial(3, [0.35])
    choice = decide(make_situation([*done, poor]), newcomers=[make_newcomer(50)])
    assert choice == StartNew((make_newcomer(50),))


def test_of_new_ones_the_cheaper_is_begun_first() -> None:
    dear, cheap = make_newcomer(800), make_newcomer(50)
    assert decide(make_situation([]), newcomers=[dear, cheap]) == StartNew((cheap, dear))


def test_everything_alive_goes_on_once_nothing_new_can_be_started(make_trial: MakeTrial) -> None:
    trials = [make_trial(i, [0.5 + i / 10]) for i in range(3)]
    chosen = []
    while isinstance(choice := decide(make_situation(trials, trials_left=0)), Promote):
        chosen.append(choice.number)
        trials[choice.number].state = "running"
    assert sorted(chosen) == [0, 1, 2]


@pytest.mark.parametrize("state", ["stopped", "failed", "refused", "complete", "running", "waiting"])
def test_only_paused_trials_are_promoted(make_trial: MakeTrial, state: str) -> None:
    trials = [make_trial(0, [0.9], state=state), make_trial(1, [0.5])]
    assert decide(make_situation(trials, trials_left=0)) == Promote(1)


def test_the_cheap_end_is_promoted_beside_the_accurate_end(make_trial: MakeTrial) -> None:
    # The middle one is dominated by the accurate one at equal cost.
    trials = [make_trial(0, [0.9], vram=500), make_trial(1, [0.8], vram=500), make_trial(2, [0.7], vram=50)]
    assert order(trials) == [2, 0, 1]


def test_what_is_at_the_references_quality_waits_behind_what_is_above_it(make_trial: MakeTrial) -> None:
    # The cheapest by far, but nothing yet says that it will ever be better than doing nothing.
    trials = [make_trial(0, [0.3], vram=50), make_trial(1, [0.9], vram=500), make_trial(2, [0.8], vram=100)]
    assert order(trials) == [2, 1, 0]


@given(st.permutations(range(5)), st.lists(st.integers(1, 99), min_size=5, max_size=5, unique=True))
def test_the_order_of_promotion_does_not_depend_on_the_order_of_arrival(
    make_trial: MakeTrial, places: list[int], percents: list[int]
) -> None:
    trials = [make_trial(i, [percent / 100], vram=100 + 50 * (i % 3)) for i, percent in enumerate(percents)]
    assert order([trials[i] for i in places]) == order(trials)


def test_time_that_nothing_else_can_use_goes_to_a_stopped_trial(make_trial: MakeTrial, one_a_second: Speed) -> None:
    stopped = [make_trial(0, [0.5], state="stopped"), make_trial(1, [0.9], state="stopped")]
    situation = make_situation(stopped, trials_left=0, seconds_left=120.0, revivable=stopped)
    assert decide(situation, one_a_second) == Promote(1)
    assert decide(situation._replace(seconds_left=119.0), one_a_second) == Wait("trials")


def test_what_is_paused_comes_before_what_was_stopped(make_trial: MakeTrial, one_a_second: Speed) -> None:
    stopped, paused = make_trial(0, [0.9], state="stopped"), make_trial(1, [0.5])
    situation = make_situation([stopped, paused], trials_left=0, seconds_left=500.0, revivable=[stopped])
    assert decide(situation, one_a_second) == Promote(1)


def test_without_a_clock_no_verdict_is_overruled(make_trial: MakeTrial) -> None:
    stopped = [make_trial(0, [0.9], state="stopped")]
    assert decide(make_situation(stopped, trials_left=0, revivable=stopped)) == Wait("trials")


def test_what_needs_less_to_its_end_goes_first_at_the_same_promise(make_trial: MakeTrial) -> None:
    assert order([make_trial(0, [0.9]), make_trial(1, [0.9, 0.9])])[0] == 1


def test_some_stretches_go_by_quality_whatever_it_costs(make_trial: MakeTrial) -> None:
    # As dear as the reference, so it adds nothing to the hypervolume.
    dearest, cheap = make_trial(0, [0.9], vram=1000), make_trial(1, [0.7], vram=100)
    others = [make_trial(2 + i, [0.5], vram=300) for i in range(QUALITY_EVERY)]
    chosen = [order([dearest, cheap, *others[:n]])[0] for n in range(QUALITY_EVERY)]
    assert chosen.count(0) == 1
    assert chosen.count(1) == QUALITY_EVERY - 1


def test_while_nothing_is_learned_quality_alone_decides(make_trial: MakeTrial) -> None:
    # As dear as the reference, so it adds nothing to the hypervolume.
    dearest, cheap = make_trial(0, [0.52], vram=1000), make_trial(1, [0.51], vram=100)
    appraisers = [appraise([dearest, cheap], has_learned=rule) for rule in (lambda score: score.quality > 0.515, never)]
    chosen = [choose_next(make_situation([dearest, cheap]), Speed(), each, list) for each in appraisers]
    assert chosen == [Promote(1), Promote(0)]
    newcomers = [make_newcomer(vram=1000), make_newcomer(vram=100)]
    dear, small = appraise([cheap], has_learned=never).price_new(newcomers, by_quality=True)
    assert dear == pytest.approx(small)


def test_what_has_been_learned_once_can_be_learned(make_trial: MakeTrial) -> None:
    failed, other = make_trial(0, [0.7], state="failed"), make_trial(1, [0.5])
    rule = {"has_learned": lambda score: score.quality > 0.6}
    assert not appraise([], **rule).is_turn_of_quality
    assert appraise([other], **rule).is_turn_of_quality
    assert not appraise([failed, other], **rule).is_turn_of_quality


def test_qualitys_turn_passes_where_nothing_can_reach_a_better_one(make_trial: MakeTrial) -> None:
    # One that is as dear as the reference has learned everything; the better of the others is dearer, too.
    done = [make_trial(i, [0.999] * 3, state="complete", vram=1000) for i in range(3)]
    trials = [make_trial(3, [0.75], vram=900), make_trial(4, [0.7], vram=50)]
    appraiser = appraise([*done, *trials], has_learned=never)
    assert appraiser.is_turn_of_quality
    assert not appraiser.price_paused(trials, by_quality=True).any()
    assert choose_next(make_situation([*done, *trials]), Speed(), appraiser, list) == Promote(4)


def test_what_a_running_trial_will_bring_is_not_sought_twice(make_trial: MakeTrial) -> None:
    # The best forecast costs as much as what runs already; the cheap one adds more beside it.
    trials = [make_trial(0, [0.95], vram=300), make_trial(1, [0.76], vram=100)]
    assert order(trials)[0] == 0
    running = make_trial(2, [0.97, 0.97], state="running", vram=300)
    prices = appraise([*trials, running]).price_paused(trials)
    assert prices[1] > prices[0]


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([0.5, 0.7, 0.9]), min_size=1, max_size=2), st.sampled_from([50, 100, 200])),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_a_choice_is_always_possible(
    make_trial: MakeTrial, rows: list[tuple[list[float], int]], trials_left: int
) -> None:
    trials = [make_trial(i, qualities, vram=vram) for i, (qualities, vram) in enumerate(rows)]
    choice = decide(make_situation(trials, trials_left=trials_left), newcomers=[make_newcomer()])
    if isinstance(choice, Promote):
        assert trials[choice.number].state == "paused"
    elif isinstance(choice, StartNew):
        assert trials_left > 0
    else:
        # Unclocked, whatever is paused can go on.
        raise AssertionError(f"{choice} while {len(trials)} trials are paused")


def test_a_trial_whose_full_length_is_out_of_reach_is_not_promoted(make_trial: MakeTrial, one_a_second: Speed) -> None:
    # 120 steps are missing, of a second each.
    within = make_situation([make_trial(0, [0.9])], trials_left=0, seconds_left=120.0)
    assert decide(within, one_a_second) == Promote(0)
    assert decide(within._replace(seconds_left=119.0), one_a_second) == Wait("time")


@pytest.fixture
def slow_loads(make_spec: MakeSpec) -> Speed:
    """A step takes a second, and a base of another width half a minute."""
    speed = Speed()
    speed.learn(make_spec(), make_score(0, 0.5), 40, 40.0)
    speed.learn_load(4, 30.0)
    return speed


def decide_for(held: Bits | None, situation: Situation, speed: Speed, newcomers: Sequence[Newcomer] = ()) -> object:
    appraiser = appraise(situation.trials, speed, held=held)
    return choose_next(situation._replace(held=held), speed, appraiser, lambda: newcomers)


def test_of_trials_that_promise_as_much_the_one_goes_on_whose_base_the_worker_holds(
    make_trial: MakeTrial, slow_loads: Speed
) -> None:
    trials = [make_trial(0, [0.7]), make_trial(1, [0.7]), make_trial(2, [0.4])]
    for trial, bits in zip(trials, (16, 4, 16), strict=True):
        trial.spec = replace(trial.spec, bits=bits)  # type: ignore[arg-type]
    situation = make_situation(trials, trials_left=0)
    assert [decide_for(held, situation, slow_loads) for held in (16, 4)] == [Promote(0), Promote(1)]
    # What promises much more is worth the time.
    trials[0].state = "complete"
    assert decide_for(16, situation._replace(trials=trials[1:]), slow_loads) == Promote(1)


def test_of_new_ones_that_promise_as_much_the_one_is_begun_whose_base_the_worker_holds(slow_loads: Speed) -> None:
    unquantized, quantized = (make_newcomer(bits=bits) for bits in (16, 4))
    for held, first, second in ((16, unquantized, quantized), (4, quantized, unquantized)):
        for newcomers in ((first, second), (second, first)):
            assert decide_for(held, make_situation([]), slow_loads, newcomers) == StartNew((first, second))  # type: ignore[arg-type]


def test_what_waits_and_no_longer_fits_holds_up_nothing(make_trial: MakeTrial, one_a_second: Speed) -> None:
    long, short = make_trial(0, []), make_trial(1, [])
    long.spec = replace(long.spec, batch_size=2 * long.spec.batch_size)
    situation = make_situation([], waiting=[long, short], seconds_left=200.0)
    newcomers = [make_newcomer()]
    assert decide(situation, one_a_second, newcomers) == StartWaiting(1)
    assert decide(situation._replace(seconds_left=400.0), one_a_second, newcomers) == StartWaiting(0)
    assert decide(situation._replace(waiting=[long]), one_a_second, newcomers) == StartNew(tuple(newcomers))


def test_loading_has_to_fit_too(make_trial: MakeTrial, slow_loads: Speed) -> None:
    trial = make_trial(0, [0.9])
    trial.spec = replace(trial.spec, bits=4)
    within = make_situation([trial], trials_left=0, seconds_left=149.0)
    assert decide_for(4, within, slow_loads) == Promote(0)
    assert decide_for(16, within, slow_loads) == Wait("time")
    assert decide_for(16, within._replace(seconds_left=150.0), slow_loads) == Promote(0)
    waits = within._replace(trials=[], waiting=[replace(trial, state="waiting", rungs=[])], trials_left=1)
    assert decide_for(4, waits._replace(seconds_left=160.0), slow_loads) == StartWaiting(0)
    assert decide_for(16, waits._replace(seconds_left=189.0), slow_loads) == Wait("time")


def test_a_nearly_finished_trial_goes_on_where_a_better_one_cannot_end(
    make_trial: MakeTrial, one_a_second: Speed
) -> None:
    trials = [make_trial(0, [0.9]), make_trial(1, [0.5, 0.6])]
    assert decide(make_situation(trials, trials_left=0, seconds_left=90.0), one_a_second) == Promote(1)


def test_nothing_new_is_begun_that_cannot_end_in_time(make_trial: MakeTrial, one_a_second: Speed) -> None:
    within = make_situation([], seconds_left=160.0)
    assert decide(within, one_a_second, [make_newcomer()]) == StartNew((make_newcomer(),))
    assert decide(within._replace(seconds_left=159.0), one_a_second, [make_newcomer()]) == Wait("time")
    assert decide(within._replace(waiting=[make_trial(0, [])], seconds_left=159.0), one_a_second) == Wait("time")


def test_no_trials_left_means_waiting() -> None:
    assert decide(make_situation([], trials_left=0), newcomers=[make_newcomer()]) == Wait("trials")


def test_an_exhausted_space_means_nothing_is_left() -> None:
    assert decide(make_situation([], can_suggest=False)) == Wait("none_left")


def test_new_ones_are_looked_for_only_where_one_may_be_begun(make_trial: MakeTrial) -> None:
    def fail() -> list[Newcomer]:
        raise AssertionError("looked for")

    trials = [make_trial(0, [0.9])]
    for situation in (make_situation(trials, trials_left=0), make_situation(trials, can_suggest=False)):
        assert choose_next(situation, Speed(), appraise(trials), fail) == Promote(0)
