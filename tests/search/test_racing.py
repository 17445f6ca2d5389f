"""The three laws that every racing rule keeps, and what the paired rule calls clear."""

from __future__ import annotations

import math
import random

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.search.racing import (
    Contender,
    LearnedRacing,
    LossCurve,
    PairedRacing,
    RacingRule,
    paired_gap,
    typical_reversal,
)

NUM_EXAMPLES = 40
PROGRESSES = st.sampled_from([0.125, 0.25, 0.5, 0.75])
RULES: st.SearchStrategy[RacingRule] = st.builds(
    PairedRacing, z_at_end=st.sampled_from([0.0, 0.5, 2.0]), reversal=st.sampled_from([None, 0.01, 0.1])
) | st.builds(LearnedRacing, scale=st.sampled_from([0.0, 0.02, 0.1]))
"""Lenient ones among them: a law that holds only for a careful rule is no law."""


@st.composite
def contenders(draw: st.DrawFn, *, num_costs: int | None = None) -> list[Contender]:
    """A rung's field with few distinct values, so that ties and equal rivals are common."""
    num_costs = draw(st.integers(0, 2)) if num_costs is None else num_costs
    field = []
    for number in range(draw(st.integers(2, 6))):
        noise = np.random.default_rng(draw(st.integers(0, 5))).normal(0, 0.2, NUM_EXAMPLES)
        field.append(
            make_contender(
                number,
                costs=tuple(float(draw(st.integers(1, 3))) for _ in range(num_costs)),
                quality=draw(st.sampled_from([0.3, 0.5, 0.7, 0.8, 0.9])),
                losses=draw(st.sampled_from([0.2, 0.5, 0.9])) + noise,
            )
        )
    return field


def make_contender(
    number: int, *, costs: tuple[float, ...], quality: float, losses: npt.NDArray[np.float64]
) -> Contender:
    return Contender(
        number=number, step=40, costs=costs, quality=quality, num_examples=len(losses), loss=float(losses.mean()),
        losses=losses,
    )  # fmt: skip


def dominates(one: Contender, other: Contender) -> bool:
    """On the objectives: no worse anywhere, better somewhere."""
    mine, theirs = (-one.quality, *one.costs), (-other.quality, *other.costs)
    return all(a <= b for a, b in zip(mine, theirs, strict=True)) and mine != theirs


def stopped(rule: RacingRule, field: list[Contender], progress: float, majority: float = 0.2) -> set[int]:
    return {
        trial.number
        for trial in field
        if rule.judge(trial, field, progress=progress, majority_quality=majority) is not None
    }


@given(contenders(), RULES, PROGRESSES)
def test_a_trial_that_dominates_all_others_is_never_stopped(
    field: list[Contender], rule: RacingRule, progress: float
) -> None:
    losers = stopped(rule, field, progress)
    for trial in field:
        if all(dominates(trial, other) for other in field if other is not trial):
            assert trial.number not in losers


@given(contenders(num_costs=2), RULES, PROGRESSES)
def test_a_trial_is_never_stopped_by_one_that_costs_more_on_any_objective(
    field: list[Contender], rule: RacingRule, progress: float
) -> None:
    for trial in field:
        verdict = rule.judge(trial, field, progress=progress, majority_quality=0.2)
        if verdict is not None:
            rival = field[verdict.rival]
            assert all(r <= t for r, t in zip(rival.costs, trial.costs, strict=True))


@given(contenders(num_costs=1), RULES, PROGRESSES)
def test_the_cheapest_trial_is_never_stopped_by_a_dearer_one(
    field: list[Contender], rule: RacingRule, progress: float
) -> None:
    least = min(trial.costs for trial in field)
    cheapest = [trial for trial in field if trial.costs == least]
    if len(cheapest) == 1:
        assert cheapest[0].number not in stopped(rule, field, progress)


@given(contenders(), RULES, PROGRESSES)
def test_nothing_is_stopped_where_no_trial_beats_the_majority_class(
    field: list[Contender], rule: RacingRule, progress: float
) -> None:
    majority = max(trial.quality for trial in field)
    assert stopped(rule, field, progress, majority) == set()


@given(contenders(), RULES, PROGRESSES)
def test_a_rival_that_beats_the_majority_class_by_less_than_chance_stops_nothing(
    field: list[Contender], rule: RacingRule, progress: float
) -> None:
    # The accuracy of 40 examples has a standard error of at most 0.5 / sqrt(40) = 0.079; two of them are 0.158.
    majority = max(trial.quality for trial in field) - 0.157
    assert stopped(rule, field, progress, majority) == set()


@given(contenders(), RULES, PROGRESSES)
def test_someone_always_survives(field: list[Contender], rule: RacingRule, progress: float) -> None:
    assert len(stopped(rule, field, progress)) < len(field)


@given(contenders(), PROGRESSES)
def test_in_pairs_a_rival_with_lower_quality_stops_nobody(field: list[Contender], progress: float) -> None:
    for trial in field:
        verdict = PairedRacing(z_at_end=0.0).judge(trial, field, progress=progress, majority_quality=0.2)
        assert verdict is None or field[verdict.rival].quality >= trial.quality


@given(st.integers(0, 1000), PROGRESSES, st.integers(2, 5))
def test_trials_with_identical_losses_never_stop_each_other(seed: int, progress: float, count: int) -> None:
    losses = np.random.default_rng(seed).exponential(1.0, NUM_EXAMPLES)
    field = [make_contender(i, costs=(float(i),), quality=0.5 + i / 20, losses=losses.copy()) for i in range(count)]
    assert stopped(PairedRacing(z_at_end=0.0), field, progress) == set()
    assert stopped(LearnedRacing(scale=0.0), field, progress) == set()


@given(contenders(), PROGRESSES)
def test_a_trial_never_races_itself(field: list[Contender], progress: float) -> None:
    alone = field[:1]
    assert stopped(PairedRacing(z_at_end=0.0), alone, progress) == set()
    # Any gap is clear to it, the one to itself too.
    assert stopped(LearnedRacing(scale=-0.1), alone, progress) == set()


@given(contenders(), RULES, st.permutations(range(6)), PROGRESSES)
def test_whether_a_trial_is_stopped_does_not_depend_on_the_order_of_its_rivals(
    field: list[Contender], rule: RacingRule, order: list[int], progress: float
) -> None:
    shuffled = [field[i] for i in order if i < len(field)]
    assert stopped(rule, field, progress) == stopped(rule, shuffled, progress)


@given(contenders(), PROGRESSES)
def test_asking_for_clearer_differences_stops_no_more_trials(field: list[Contender], progress: float) -> None:
    assert stopped(PairedRacing(z_at_end=3.0), field, progress) <= stopped(PairedRacing(z_at_end=1.0), field, progress)


@given(contenders(), RULES)
def test_a_later_rung_stops_at_least_what_an_earlier_one_would(field: list[Contender], rule: RacingRule) -> None:
    assert stopped(rule, field, 0.25) <= stopped(rule, field, 0.5)


@given(contenders(), RULES, PROGRESSES, st.integers(0, 5))
def test_a_dearer_and_worse_newcomer_changes_no_verdict(
    field: list[Contender], rule: RacingRule, progress: float, place: int
) -> None:
    worst = make_contender(
        len(field),
        costs=tuple(max(trial.costs[c] for trial in field) + 1 for c in range(len(field[0].costs))),
        quality=min(trial.quality for trial in field) - 0.01,
        losses=np.max([trial.losses for trial in field if trial.losses is not None], axis=0) + 0.01,
    )
    more = [*field[:place], worst, *field[place:]]
    assert stopped(rule, more, progress) - {worst.number} == stopped(rule, field, progress)


FIXED: st.SearchStrategy[RacingRule] = st.builds(
    PairedRacing, z_at_end=st.just(0.0), reversal=st.sampled_from([None, 0.01, 0.1])
) | st.builds(LearnedRacing, scale=st.sampled_from([0.0, 0.02, 0.1]))
"""Rules with one margin for all pairs."""


@given(contenders(), FIXED, PROGRESSES, st.integers(0, 5), st.integers(0, 2), st.sampled_from([0.0, 0.1, 0.3]))
def test_a_newcomer_dearer_and_worse_than_one_changes_no_verdict(
    field: list[Contender], rule: RacingRule, progress: float, place: int, dearer: int, worse: float
) -> None:
    # Between the others it may well stop some: but no more than the one that it is behind.
    better = field[place % len(field)]
    assert better.losses is not None
    newcomer = make_contender(
        len(field), costs=tuple(cost + dearer for cost in better.costs), quality=better.quality - worse / 2,
        losses=better.losses + worse,
    )  # fmt: skip
    assert stopped(rule, [*field, newcomer], progress) - {newcomer.number} == stopped(rule, field, progress)


@given(contenders(), RULES, PROGRESSES)
def test_what_a_field_stops_one_of_it_stops_alone(field: list[Contender], rule: RacingRule, progress: float) -> None:
    # By this law only a newcomer has to be compared, and not everybody anew.
    alone = {
        trial.number for trial in field for rival in field if stopped(rule, [trial, rival], progress) >= {trial.number}
    }
    assert stopped(rule, field, progress) == alone


def make_pair(gap: float, *, cost: float = 2.0, rival_cost: float = 1.0, rival_quality: float = 0.9) -> list[Contender]:
    """A trial whose losses are `gap` above its rival's, give or take 0.1."""
    losses = np.linspace(0.1, 0.9, NUM_EXAMPLES)
    wobble = np.where(np.arange(NUM_EXAMPLES) % 2, 0.1, -0.1)
    trial = make_contender(0, costs=(cost,), quality=0.8, losses=losses + gap + wobble)
    return [trial, make_contender(1, costs=(rival_cost,), quality=rival_quality, losses=losses)]


def test_a_clearly_better_rival_that_costs_no_more_stops_a_trial() -> None:
    field = make_pair(gap=0.3)
    verdict = PairedRacing().judge(field[0], field, progress=0.5, majority_quality=0.5)
    assert verdict is not None
    assert verdict.rival == 1


def test_a_verdict_says_by_how_much_the_rival_was_better() -> None:
    field = make_pair(gap=0.3)
    verdict = PairedRacing().judge(field[0], field, progress=0.5, majority_quality=0.5)
    assert verdict is not None
    assert "trial 1" in verdict.detail
    assert "0.300 nats" in verdict.detail


def test_a_rival_at_equal_cost_may_stop_a_trial() -> None:
    field = make_pair(gap=0.3, rival_cost=2.0)
    assert stopped(PairedRacing(), field, 0.5) == {0}


def test_the_same_rival_stops_nothing_once_it_costs_more() -> None:
    field = make_pair(gap=0.3, rival_cost=2.1)
    assert stopped(PairedRacing(), field, 0.5) == set()


def test_without_cost_objectives_the_best_may_stop_all_others() -> None:
    field = [
        make_contender(i, costs=(), quality=q, losses=np.linspace(0, 1, NUM_EXAMPLES) ** (1 + i / 9) + loss)
        for i, (q, loss) in enumerate([(0.9, 0.0), (0.8, 1.0), (0.7, 2.0)])
    ]
    assert stopped(PairedRacing(), field, 0.5) == {1, 2}


def test_the_bar_falls_as_training_progresses() -> None:
    rule = PairedRacing(z_at_end=2.0)
    assert [rule.margin_at(progress, 0.1) for progress in (0.25, 0.5, 1.0)] == pytest.approx([0.8, 0.4, 0.2])
    known = PairedRacing(z_at_end=2.0, reversal=0.15)
    assert [known.margin_at(progress, 0.1) for progress in (0.25, 1.0)] == pytest.approx([math.hypot(0.2, 0.6), 0.25])


def test_the_paired_gap_comes_with_its_standard_error() -> None:
    # Differences 1, 2, 3: mean 2, standard deviation 1, standard error 1/sqrt(3).
    own, rival = np.array([2.0, 4.0, 6.0]), np.array([1.0, 2.0, 3.0])
    assert paired_gap(own, rival) == pytest.approx((2.0, 1 / math.sqrt(3)))


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_the_paired_gap_changes_sign_when_the_two_are_exchanged(one: int, other: int) -> None:
    a, b = (np.random.default_rng(seed).normal(0, 1, NUM_EXAMPLES) for seed in (one, other))
    gap, error = paired_gap(b, a)
    assert paired_gap(a, b) == pytest.approx((-gap, error))


def test_a_constant_gap_has_no_error() -> None:
    assert paired_gap(np.full(5, 2.0), np.full(5, 1.0)) == (1.0, 0.0)


# --- what is learned of reversals

CURVES = st.lists(
    st.tuples(*[st.integers(1, 100).map(lambda percent: percent / 100)] * 3).map(
        lambda losses: dict(zip((0.25, 0.5, 1.0), losses, strict=True))
    ),
    max_size=8,
)


def test_the_scale_is_the_root_mean_square_of_reversed_gaps_times_progress() -> None:
    # At a quarter the first leads the second by 0.4, and ends behind it; at half it is behind already. The third stays
    # far behind. One reversal, 0.4 * 0.25.
    curves: list[LossCurve] = [
        {0.25: 0.2, 0.5: 0.5, 1.0: 0.4},
        {0.25: 0.6, 0.5: 0.4, 1.0: 0.3},
        {0.25: 2.0, 0.5: 2.0, 1.0: 2.0},
    ]
    assert typical_reversal(curves) == pytest.approx(0.1)


def test_where_nothing_was_reversed_the_median_gap_is_clear() -> None:
    # Gaps at half 0.1, 0.2 and 0.3.
    curves: list[LossCurve] = [{0.5: 0.1, 1.0: 0.1}, {0.5: 0.2, 1.0: 0.2}, {0.5: 0.4, 1.0: 0.4}]
    assert typical_reversal(curves) == pytest.approx(0.5 * 0.2)


def test_nothing_is_clear_before_enough_have_reached_the_end() -> None:
    curves: list[LossCurve] = [{0.5: i / 10, 1.0: i / 10} for i in range(4)]
    running: LossCurve = {0.5: 0.9}
    assert LearnedRacing().learn([*curves[:2], running]).margin_at(0.5) == math.inf
    assert LearnedRacing().learn([*curves[:3], running]).margin_at(0.5) < math.inf


@given(CURVES, st.randoms())
def test_what_is_learned_does_not_depend_on_order_or_on_what_has_not_ended(
    curves: list[LossCurve], random: random.Random
) -> None:
    learned = LearnedRacing().learn(curves)
    shuffled: list[LossCurve] = [*curves, {0.25: 0.7}]
    random.shuffle(shuffled)
    assert LearnedRacing().learn(shuffled).scale == pytest.approx(learned.scale)


@given(CURVES)
def test_learning_again_from_the_same_teaches_nothing(curves: list[LossCurve]) -> None:
    learned = LearnedRacing().learn(curves)
    assert learned.learn(curves) == learned


def test_later_reversals_widen_the_margin() -> None:
    steady: list[LossCurve] = [{0.5: i / 10, 1.0: i / 10} for i in range(4)]
    turned: list[LossCurve] = [*steady, {0.5: 0.0, 1.0: 0.9}]
    assert LearnedRacing().learn(turned).margin_at(0.5) > LearnedRacing().learn(steady).margin_at(0.5)


def test_on_few_examples_a_cheaper_rival_may_be_a_little_behind_in_quality() -> None:
    # 40 examples: two standard errors of a difference of accuracies are 0.22.
    field = make_pair(gap=0.3, rival_quality=0.7)
    assert stopped(LearnedRacing(scale=0.1), field, 0.5) == {0}
    assert stopped(LearnedRacing(scale=0.1), make_pair(gap=0.3, rival_quality=0.55), 0.5) == set()


def test_at_equal_costs_a_rival_must_not_be_behind_in_quality() -> None:
    field = make_pair(gap=0.3, rival_cost=2.0, rival_quality=0.79)
    assert stopped(LearnedRacing(scale=0.1), field, 0.5) == set()


def test_the_paired_rule_learns_what_reverses_once_enough_have_ended() -> None:
    curves: list[LossCurve] = [{0.5: i / 10, 1.0: i / 10} for i in range(7)]
    rule = PairedRacing()
    assert rule.learn([*curves, {0.5: 0.9}]) == rule
    learned = rule.learn([*curves, {0.5: 0.0, 1.0: 0.45}])
    typical = typical_reversal([*curves, {0.5: 0.0, 1.0: 0.45}])
    assert learned.reversal is not None
    assert typical / 2**0.25 <= learned.reversal <= typical * 2**0.25
    # Where early leads are lost more often they count for less, however sure the examples are of them.
    later = rule.learn([*curves, {0.5: 0.0, 1.0: 0.9}])
    assert later.margin_at(0.5, 0.0) > learned.margin_at(0.5, 0.0) > 0
    assert learned.margin_at(0.25, 0.0) == pytest.approx(2 * learned.margin_at(0.5, 0.0))


def test_what_the_paired_rule_learns_changes_seldom() -> None:
    curves: list[LossCurve] = [{0.5: i / 10 + (-1) ** i * 0.08, 1.0: i / 10} for i in range(30)]
    assert len({PairedRacing().learn(curves[:count]).reversal for count in range(8, 30)}) <= 3


@given(st.lists(CURVES.filter(bool), min_size=2, max_size=3), st.randoms())
def test_the_paired_rule_learns_whatever_the_order(parts: list[list[LossCurve]], random: random.Random) -> None:
    curves = [curve for part in parts for curve in part]
    learned = PairedRacing(least_completed=2).learn(curves)
    shuffled: list[LossCurve] = [*curves, {0.25: 0.7}]
    random.shuffle(shuffled)
    assert PairedRacing(least_completed=2).learn(shuffled) == learned
    assert learned.learn(curves) == learned
