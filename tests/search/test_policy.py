"""What a free worker does next: breadth before depth, the cheap beside the accurate, and never what cannot end."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.records import Cost, RungScore, TrialSpec
from autopeft.search.policy import Promote, Situation, Speed, StartNew, Wait, choose_next, next_rung, order_paused
from autopeft.search.store import Trial

RUNGS = (40, 80, 160)
MakeSpec = Callable[..., TrialSpec]


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
def make_trial(make_spec: MakeSpec) -> Callable[..., Trial]:
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
        trials=trials,
        rungs=RUNGS,
        reference={"quality": 0.3, "vram": 1000.0},
        num_workers=1,
        seconds_left=math.inf,
        trials_left=10,
        can_suggest=True,
        recipes_left=False,
    )
    return situation._replace(**changes)


@pytest.fixture(scope="session")
def one_a_second(make_spec: MakeSpec) -> Speed:
    """A step takes a second, scoring nothing."""
    speed = Speed()
    speed.learn(make_spec(), make_score(0, 0.5, seconds=40.0), 40, 1.0)
    return speed


def test_a_study_begins_with_something_new() -> None:
    assert choose_next(make_situation([]), Speed()) == StartNew()


def test_recipes_come_before_promotions(make_trial: Callable[..., Trial]) -> None:
    trials = [make_trial(i, [0.5 + i / 10]) for i in range(4)]
    assert choose_next(make_situation(trials, recipes_left=True), Speed()) == StartNew()


def test_one_in_two_of_a_rung_goes_on_while_new_trials_can_be_started(make_trial: Callable[..., Trial]) -> None:
    trials = [make_trial(i, [0.9 - i / 10]) for i in range(4)]
    first = choose_next(make_situation(trials), Speed())
    assert first == Promote(0)
    trials[0].state = "running"
    assert choose_next(make_situation(trials), Speed()) == Promote(1)
    trials[1].state = "running"
    assert choose_next(make_situation(trials), Speed()) == StartNew()


def test_a_lone_trial_waits_for_company_at_its_rung(make_trial: Callable[..., Trial]) -> None:
    assert choose_next(make_situation([make_trial(0, [0.9])]), Speed()) == StartNew()


def test_everything_alive_goes_on_once_nothing_new_can_be_started(make_trial: Callable[..., Trial]) -> None:
    trials = [make_trial(i, [0.5 + i / 10]) for i in range(3)]
    chosen = []
    while isinstance(choice := choose_next(make_situation(trials, trials_left=0), Speed()), Promote):
        chosen.append(choice.number)
        trials[choice.number].state = "running"
    assert sorted(chosen) == [0, 1, 2]


@pytest.mark.parametrize("state", ["stopped", "failed", "refused", "complete", "running", "waiting"])
def test_only_paused_trials_are_promoted(make_trial: Callable[..., Trial], state: str) -> None:
    trials = [make_trial(0, [0.9], state=state), make_trial(1, [0.5])]
    choice = choose_next(make_situation(trials, trials_left=0), Speed())
    assert choice == Promote(1)


def test_the_cheap_end_is_promoted_beside_the_accurate_end(make_trial: Callable[..., Trial]) -> None:
    # The middle one is dominated by the accurate one at equal cost.
    trials = [make_trial(0, [0.9], vram=500), make_trial(1, [0.8], vram=500), make_trial(2, [0.6], vram=50)]
    assert [trial.number for trial in order_paused(make_situation(trials), Speed())] == [0, 2, 1]


def test_what_is_at_the_references_quality_waits_behind_what_is_above_it(make_trial: Callable[..., Trial]) -> None:
    # The cheapest by far, but nothing yet says that it will ever be better than doing nothing.
    trials = [make_trial(0, [0.3], vram=50), make_trial(1, [0.9], vram=500), make_trial(2, [0.8], vram=100)]
    assert [trial.number for trial in order_paused(make_situation(trials), Speed())] == [2, 1, 0]


@given(st.permutations(range(5)), st.lists(st.integers(1, 99), min_size=5, max_size=5, unique=True))
def test_the_order_of_promotion_does_not_depend_on_the_order_of_arrival(
    make_trial: Callable[..., Trial], order: list[int], percents: list[int]
) -> None:
    trials = [make_trial(i, [percent / 100], vram=100 + 50 * (i % 3)) for i, percent in enumerate(percents)]
    shuffled = [trials[i] for i in order]
    one, other = (order_paused(make_situation(field), Speed()) for field in (trials, shuffled))
    assert [trial.number for trial in one] == [trial.number for trial in other]


def test_time_that_nothing_else_can_use_goes_to_a_stopped_trial(
    make_trial: Callable[..., Trial], one_a_second: Speed
) -> None:
    stopped = [make_trial(0, [0.5], state="stopped"), make_trial(1, [0.9], state="stopped")]
    situation = make_situation(stopped, trials_left=0, seconds_left=120.0, revivable=stopped)
    assert choose_next(situation, one_a_second) == Promote(1)
    assert choose_next(situation._replace(seconds_left=119.0), one_a_second) == Wait("trials")


def test_what_is_paused_comes_before_what_was_stopped(make_trial: Callable[..., Trial], one_a_second: Speed) -> None:
    stopped, paused = make_trial(0, [0.9], state="stopped"), make_trial(1, [0.5])
    situation = make_situation([stopped, paused], trials_left=0, seconds_left=500.0, revivable=[stopped])
    assert choose_next(situation, one_a_second) == Promote(1)


def test_without_a_clock_no_verdict_is_overruled(make_trial: Callable[..., Trial]) -> None:
    stopped = [make_trial(0, [0.9], state="stopped")]
    assert choose_next(make_situation(stopped, trials_left=0, revivable=stopped), Speed()) == Wait("trials")


def test_what_needs_less_to_its_end_goes_first_at_the_same_promise(make_trial: Callable[..., Trial]) -> None:
    trials = [make_trial(0, [0.9]), make_trial(1, [0.9, 0.9])]
    assert order_paused(make_situation(trials), Speed())[0].number == 1


def test_every_third_promotion_goes_by_quality_whatever_it_costs(make_trial: Callable[..., Trial]) -> None:
    # As dear as the reference, so it adds nothing to the hypervolume.
    dearest, cheap = make_trial(0, [0.9], vram=1000), make_trial(1, [0.7], vram=100)
    gone_on = [make_trial(2 + i, [0.5, 0.5], vram=300) for i in range(4)]
    chosen = [order_paused(make_situation([dearest, cheap, *gone_on[:n]]), Speed())[0].number for n in range(3)]
    assert chosen == [1, 1, 0]


def test_what_a_running_trial_will_bring_is_not_sought_twice(make_trial: Callable[..., Trial]) -> None:
    # The best forecast costs as much as what runs already; the cheap one adds more beside it.
    trials = [make_trial(0, [0.95], vram=300), make_trial(1, [0.5], vram=100)]
    assert order_paused(make_situation(trials), Speed())[0].number == 0
    running = make_trial(2, [0.95], state="running", vram=300)
    assert order_paused(make_situation([*trials, running]), Speed())[0].number == 1


@given(
    st.lists(
        st.tuples(st.lists(st.sampled_from([0.5, 0.7, 0.9]), min_size=1, max_size=2), st.sampled_from([50, 100, 200])),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 3),
)
def test_a_choice_is_always_possible(
    make_trial: Callable[..., Trial], rows: list[tuple[list[float], int]], trials_left: int
) -> None:
    trials = [make_trial(i, qualities, vram=vram) for i, (qualities, vram) in enumerate(rows)]
    choice = choose_next(make_situation(trials, trials_left=trials_left), Speed())
    if isinstance(choice, Promote):
        assert trials[choice.number].state == "paused"
    elif isinstance(choice, StartNew):
        assert trials_left > 0
    else:
        # Unclocked, whatever is paused can go on.
        raise AssertionError(f"{choice} while {len(trials)} trials are paused")


def test_a_trial_whose_full_length_is_out_of_reach_is_not_promoted(
    make_trial: Callable[..., Trial], one_a_second: Speed
) -> None:
    # 120 steps are missing, of a second each.
    trials = [make_trial(0, [0.9])]
    within = make_situation(trials, trials_left=0, seconds_left=120.0)
    assert choose_next(within, one_a_second) == Promote(0)
    assert choose_next(within._replace(seconds_left=119.0), one_a_second) == Wait("time")


def test_a_nearly_finished_trial_goes_on_where_a_better_one_cannot_end(
    make_trial: Callable[..., Trial], one_a_second: Speed
) -> None:
    trials = [make_trial(0, [0.9]), make_trial(1, [0.5, 0.6])]
    assert choose_next(make_situation(trials, trials_left=0, seconds_left=90.0), one_a_second) == Promote(1)


def test_nothing_new_is_started_in_time_that_paused_trials_need(
    make_trial: Callable[..., Trial], one_a_second: Speed
) -> None:
    # A first stretch takes 40 s, and the better half of the paused (one of two) 120 s more.
    trials = [make_trial(0, [0.9]), make_trial(1, [0.5])]
    trials[0].state = "running"
    enough = make_situation(trials, seconds_left=40.0 + 240.0)
    assert choose_next(enough, one_a_second) == StartNew()
    assert choose_next(enough._replace(seconds_left=279.0), one_a_second) == Promote(1)


def test_a_first_stretch_that_does_not_fit_is_not_started(one_a_second: Speed) -> None:
    assert choose_next(make_situation([], seconds_left=40.0), one_a_second) == StartNew()
    assert choose_next(make_situation([], seconds_left=39.0), one_a_second) == Wait("time")


def test_no_trials_left_means_waiting() -> None:
    assert choose_next(make_situation([], trials_left=0), Speed()) == Wait("trials")


def test_an_exhausted_space_means_nothing_is_left() -> None:
    assert choose_next(make_situation([], can_suggest=False), Speed()) == Wait("none_left")


def test_the_next_rung_is_the_first_not_reached(make_trial: Callable[..., Trial]) -> None:
    assert [next_rung(make_trial(0, qualities), RUNGS) for qualities in ([], [0.5], [0.5, 0.6])] == [40, 80, 160]


# --- predicted seconds


def test_nothing_is_predicted_before_anything_was_measured(make_spec: MakeSpec) -> None:
    assert Speed().predict(make_spec(), 100) == 0.0


def test_steps_and_a_scoring_pass_are_predicted(make_spec: MakeSpec) -> None:
    speed = Speed()
    score = make_score(0, 0.5, seconds=20.0)
    # Two threads charged 2 x (20 s training + 5 s scoring).
    speed.learn(make_spec(), RungScore(**{**_fields(score), "device_seconds": 50.0}), 40, 2.0)
    assert speed.predict(make_spec(), 100) == pytest.approx(100 * 0.5 + 5.0)


def test_an_unseen_method_is_predicted_at_the_slowest_pace(make_spec: MakeSpec) -> None:
    speed = Speed()
    speed.learn(make_spec("ia3"), make_score(0, 0.5, seconds=10.0), 40, 1.0)
    speed.learn(make_spec("full"), make_score(0, 0.5, seconds=40.0), 40, 1.0)
    assert speed.predict(make_spec("lora"), 40) == pytest.approx(40.0)
    assert speed.predict(make_spec("ia3"), 40) == pytest.approx(10.0)
    assert speed.predict(None, 40) == pytest.approx(40.0)


def _fields(score: RungScore) -> dict[str, object]:
    return {name: getattr(score, name) for name in score.__dataclass_fields__}
