"""Prices: what they rise and fall with, and that neither order nor numbers of trials enter them."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.backends.fake import FakeCostModel
from autopeft.methods import METHODS, refuse_spec
from autopeft.records import Cost, Failed, RungScore, TrialSpec
from autopeft.search.candidates import draw_candidates
from autopeft.search.gain import expected_improvement
from autopeft.search.speed import Kind, Speed, kind_of
from autopeft.search.store import Trial
from autopeft.search.surrogate import Encoder, Row, encode_spec
from autopeft.search.worth import Appraiser, Newcomer, _Beliefs, _express, _Expressed, _Stretches, _Told
from autopeft.spaces.load import find_space, parse_space
from autopeft.spaces.space import SearchSpace, make_spec

RUNGS = (40, 80, 160)
REFERENCE = {"quality": 0.5, "vram": 1.5e7, "params": 1e6}


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    name, text = find_space("default")
    return parse_space(text, name=name, device_kind="cpu", max_steps=160)


@pytest.fixture(scope="module")
def specs(space: SearchSpace) -> list[TrialSpec]:
    drawn = draw_candidates(space, [], random.Random(0))
    made = [
        make_spec(m, space.methods[m].read_answers(answers), max_steps=160, seed=0)
        for answers in drawn
        if (m := str(answers["method"])) not in ("full", "prompt_tuning")
    ]
    return [spec for spec in made if refuse_spec(spec, "cpu") is None][:40]


def make_trial(number: int, spec: TrialSpec, qualities: Sequence[float], state: str = "paused") -> Trial:
    rungs = [
        RungScore(
            rung=rung, step=RUNGS[rung], quality=quality, loss=1 - quality, num_examples=1000, device_seconds=1.0,
            train_seconds=1.0, scores_file="x", scores_digest="x",
        )
        for rung, quality in enumerate(qualities)
    ]  # fmt: skip
    cost = FakeCostModel().cost(spec)
    return Trial(number=number, spec=spec, source="sampler", state=state, cost=cost, rungs=rungs)  # type: ignore[arg-type]


def rate_of(spec: TrialSpec) -> float:
    """Decades above the recipe's."""
    return float(np.log10(spec.learning_rate / METHODS[spec.method].recipe.learning_rate))


def appraise(space: SearchSpace, trials: Sequence[Trial], **changes: object) -> Appraiser:
    encoder = Encoder(space)
    rows = {trial.number: encode_spec(encoder, space, trial.spec) for trial in trials}
    known: dict[str, object] = {"is_clocked": False, "rows": rows, "has_learned": lambda s: s.quality > 0.55} | changes
    return Appraiser(trials, RUNGS, REFERENCE, Speed(), **known)  # type: ignore[arg-type]


def newcomer_of(space: SearchSpace, spec: TrialSpec, cost: Cost | None = None) -> Newcomer:
    return Newcomer(kind_of(spec), encode_spec(Encoder(space), space, spec), spec=spec, cost=cost)


def test_what_is_like_the_good_ones_is_worth_more(space: SearchSpace, specs: list[TrialSpec]) -> None:
    # Only low rates learn anything here, for every method.
    trials = [
        make_trial(i, spec, [0.8 if rate_of(spec) < 0 else 0.5] * 3, "complete") for i, spec in enumerate(specs[:30])
    ]
    base = next(spec for spec in specs[30:] if spec.method == "lora")
    usual = METHODS["lora"].recipe.learning_rate
    pair = [dataclasses.replace(base, learning_rate=usual * factor) for factor in (0.6, 3.0)]
    cheap = Cost(trainable_parameters=10, head_parameters=1, peak_vram_bytes=1_000_000, vram_source="estimated")
    low, high = appraise(space, trials).price_new([newcomer_of(space, spec, cheap) for spec in pair])
    assert low > high


def test_a_lower_cost_is_worth_more(space: SearchSpace, specs: list[TrialSpec]) -> None:
    cost = FakeCostModel().cost(specs[0])
    less = dataclasses.replace(cost, peak_vram_bytes=cost.peak_vram_bytes // 2)
    trials = [make_trial(i, spec, [0.7]) for i, spec in enumerate(specs[1:8])]
    dear, cheap = appraise(space, trials).price_new([newcomer_of(space, specs[0], each) for each in (cost, less)])
    assert cheap > dear > 0


def test_costs_that_are_not_known_are_told_from_others(space: SearchSpace, specs: list[TrialSpec]) -> None:
    trials = [make_trial(i, spec, [0.7]) for i, spec in enumerate(specs[:30])]
    others = specs[30:]
    appraiser = appraise(space, trials)
    told = appraiser.price_new([newcomer_of(space, spec) for spec in others])
    known = appraiser.price_new([newcomer_of(space, spec, FakeCostModel().cost(spec)) for spec in others])
    assert np.corrcoef(told, known)[0, 1] > 0.9


@pytest.mark.parametrize("objective", ["vram", "params"])
def test_what_costs_more_than_is_allowed_is_worth_nothing(
    space: SearchSpace, specs: list[TrialSpec], objective: str
) -> None:
    newcomer = newcomer_of(space, specs[0], FakeCostModel().cost(specs[0]))
    trials = [make_trial(1, specs[1], [0.7])]
    assert appraise(space, trials, most={objective: 1e12}).price_new([newcomer])[0] > 0
    assert appraise(space, trials, most={objective: 10.0}).price_new([newcomer])[0] == 0


def test_what_is_under_way_is_not_begun_twice(space: SearchSpace, specs: list[TrialSpec]) -> None:
    trials = [make_trial(i, spec, [0.6 + i / 100]) for i, spec in enumerate(specs[:8])]
    wanted = newcomer_of(space, specs[10], FakeCostModel().cost(specs[10]))
    # As many stretches in both, so that it is nobody's turn that differs.
    running = make_trial(20, specs[10], [], "running")
    stranger = make_trial(20, specs[20], [], "running")
    beside_its_like, beside_another = (
        appraise(space, [*trials, other]).price_new([wanted])[0] for other in (running, stranger)
    )
    assert beside_its_like < beside_another


def test_what_diverged_speaks_against_its_like(space: SearchSpace, specs: list[TrialSpec]) -> None:
    trials = [make_trial(i, spec, [0.7]) for i, spec in enumerate(specs[:5])]
    failed = make_trial(5, specs[6], [], "failed")
    fresh = newcomer_of(space, specs[6], FakeCostModel().cost(specs[6]))
    before = appraise(space, [*trials, failed]).price_new([fresh])[0]
    failed.outcome = Failed(reason="diverged", detail="loss is nan")
    assert appraise(space, [*trials, failed]).price_new([fresh])[0] < before


@pytest.mark.parametrize("step", [0, RUNGS[0]])
@pytest.mark.parametrize("deviation", [0.02, 0.1, 0.18])
@pytest.mark.parametrize("mean", [0.55, 0.7, 0.85, 0.95])
def test_a_score_buys_the_right_to_stop(
    space: SearchSpace, specs: list[TrialSpec], mean: float, deviation: float, step: int
) -> None:
    appraiser = appraise(space, [make_trial(0, specs[0], [0.9] * 3, "complete")])
    beliefs = _Beliefs(np.array([mean]), np.array([deviation**2]))
    stretches, costs, had = (
        _Stretches([Kind("lora", 32, 16)], [step]),
        np.array([[0.5, 0.5]]),
        appraiser._find_had("complete"),
    )

    def price(surprises: float = math.inf, hopes: float = 1.0) -> float:
        told = _Told(np.array([math.inf if step == 0 else deviation]), np.array([surprises]))
        return float(appraiser._price(stretches, beliefs, told, costs, had, np.array([hopes]), by_quality=False)[0])

    may_stop = price()
    scaled = appraiser._scale_beliefs(beliefs.means, beliefs.variances)
    must_end = float(expected_improvement(*scaled, costs, had)[0] / sum(appraiser._time(stretches))[0])
    # What has no hope has no price, and a score that tells nothing new leaves the right to stop worthless.
    assert price(hopes=0.0) == 0
    assert price(surprises=0.0) == pytest.approx(must_end, rel=0.1)
    # Both are sums over a few quantiles.
    assert may_stop > 0.9 * must_end
    if mean < 0.8 and deviation > 0.15:
        # The front is hard to beat here, and it shows early who will.
        assert may_stop > 1.1 * must_end


def test_the_last_stretch_is_worth_what_it_adds(space: SearchSpace, specs: list[TrialSpec]) -> None:
    appraiser = appraise(space, [make_trial(0, specs[0], [0.9] * 3, "complete")])
    beliefs = _Beliefs(np.array([0.85, 0.7]), np.array([0.01, 0.02]))
    stretches, costs, had = (
        _Stretches([Kind("lora", 32, 16)] * 2, [RUNGS[-2]] * 2),
        np.full((2, 2), 0.5),
        appraiser._find_had("complete"),
    )
    told = _Told(np.sqrt(beliefs.variances), np.full(2, math.inf))
    prices = appraiser._price(stretches, beliefs, told, costs, had, np.ones(2), by_quality=False)
    gains = expected_improvement(*appraiser._scale_beliefs(beliefs.means, beliefs.variances), costs, had)
    assert prices == pytest.approx(gains / appraiser._time(stretches).to_score, rel=0.1)


def test_what_the_surrogate_did_not_learn_from_is_believed_as_if_it_had(
    space: SearchSpace, specs: list[TrialSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    trials = [make_trial(i, spec, [0.6 + 0.02 * (i % 7)]) for i, spec in enumerate(specs)]
    learned = appraise(space, trials)
    monkeypatch.setattr("autopeft.search.worth._MOST_OBSERVED", len(trials) - 1)
    some = appraise(space, trials)
    (left_out,) = set(range(len(trials))) - {trial.number for trial in some._observed}
    alone = some._forecasts[left_out]
    (mean,), (variance,) = some._believe_scored([trials[left_out]])
    (known_mean,), (known_variance,) = learned._believe_scored([trials[left_out]])
    assert mean == pytest.approx(known_mean, abs=0.2 * abs(known_mean - alone.mean) + 0.005)
    assert variance == pytest.approx(known_variance, rel=0.1)
    assert variance < 0.8 * alone.deviation**2


def express(*rows: Row | None) -> _Expressed | None:
    """Each of 100,000 parameters."""
    return _express(rows, np.full(len(rows), 1e5))


def test_what_ended_without_learning_counts_however_many_trials_there_are(
    space: SearchSpace, specs: list[TrialSpec]
) -> None:
    near = newcomer_of(space, dataclasses.replace(specs[0], seed=1))
    failed = [make_trial(i, dataclasses.replace(specs[0], seed=2 + i), [0.5] * 3, "complete") for i in range(10)]
    others = [make_trial(100 + i, dataclasses.replace(specs[i % 30 + 5], seed=i), [0.6]) for i in range(600)]
    few, many = (
        appraise(space, trials)._find_hopes(express(near.row), 1)[0] for trials in (failed, [*failed, *others])
    )
    assert few == many < 0.2


def test_first_scores_surprise_least_where_those_of_its_like_are_known(
    space: SearchSpace, specs: list[TrialSpec]
) -> None:
    lora = [spec for spec in specs if spec.method == "lora"]
    others = [spec for spec in specs if spec.method != "lora"]
    trials = [make_trial(i, spec, [0.55 + (i % 3) / 10]) for i, spec in enumerate([*lora[1:], *others[:3]])]
    appraiser = appraise(space, trials)
    known, unknown = (
        appraiser._find_surprises(express(newcomer_of(space, spec).row), 1)[0]
        for spec in (dataclasses.replace(lora[1], seed=1), others[-1])
    )
    assert known < unknown
    assert appraiser._find_surprises(express(None), 1)[0] == math.inf


def test_where_nothing_of_its_like_has_learned_there_is_little_hope(space: SearchSpace, specs: list[TrialSpec]) -> None:
    lora = [spec for spec in specs if spec.method == "lora"]
    usual = METHODS["lora"].recipe.learning_rate
    failed = [
        make_trial(
            i, dataclasses.replace(lora[i % len(lora)], learning_rate=usual * (1 + i / 100)), [0.5] * 3, "complete"
        )
        for i in range(6)
    ]
    near = newcomer_of(space, dataclasses.replace(lora[0], learning_rate=usual))
    far = newcomer_of(space, dataclasses.replace(lora[0], learning_rate=usual / 10))
    other = newcomer_of(space, next(spec for spec in specs if spec.method not in ("lora", "full")))
    near_hope, far_hope, other_hope, no_hope_known = appraise(space, failed)._find_hopes(
        express(near.row, far.row, other.row, None), 4
    )
    assert near_hope < 0.2 < min(far_hope, other_hope)
    assert no_hope_known == 1
    learned = [make_trial(i, t.spec, [0.8] * 3, "complete") for i, t in enumerate(failed)]
    assert appraise(space, learned)._find_hopes(express(near.row), 1) == 1
    # A paused trial that has learned something itself needs no hope of others'.
    paused = make_trial(9, dataclasses.replace(lora[0], learning_rate=usual), [0.6])
    hopeful, hopeless = (
        appraise(space, [*failed, paused], has_learned=lambda score, has=has: has and score.quality > 0.55)
        for has in (True, False)
    )
    assert hopeless.price_paused([paused])[0] < 0.2 * hopeful.price_paused([paused])[0]
    assert appraise(space, [])._find_hopes(express(near.row), 1) == 1


def test_parents_are_the_front_first(space: SearchSpace, specs: list[TrialSpec]) -> None:
    trials = [make_trial(i, spec, [0.6]) for i, spec in enumerate(specs[:20])]
    best = make_trial(20, specs[20], [0.95] * 3, "complete")
    stopped = make_trial(21, specs[21], [0.99], "stopped")
    parents = appraise(space, [*trials, best, stopped]).find_parents()
    assert space.params(best.spec) in parents[:5]
    assert space.params(stopped.spec) not in parents


@given(st.permutations(range(12)), st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.8]), min_size=12, max_size=12))
@settings(max_examples=15)
def test_neither_order_nor_numbers_enter(
    space: SearchSpace, specs: list[TrialSpec], places: list[int], qualities: list[float]
) -> None:
    trials = [make_trial(i, specs[i], [quality]) for i, quality in enumerate(qualities)]
    renumbered = [make_trial(100 + place, specs[i], [qualities[i]]) for place, i in enumerate(places)]
    newcomers = [newcomer_of(space, spec) for spec in specs[20:30]]
    one, other = appraise(space, trials), appraise(space, renumbered)
    assert one.price_new(newcomers) == pytest.approx(other.price_new(newcomers), rel=1e-9)
    assert one.price_paused(trials)[places] == pytest.approx(other.price_paused(renumbered), rel=1e-9)


def test_of_very_many_trials_enough_are_looked_at(space: SearchSpace, specs: list[TrialSpec]) -> None:
    rng = random.Random(0)
    trials = [
        make_trial(
            i, dataclasses.replace(specs[i % 40], learning_rate=10 ** rng.uniform(-4, -2)), [rng.uniform(0.5, 0.8)]
        )
        for i in range(500)
    ]
    trials[77] = make_trial(77, trials[77].spec, [0.99])
    appraiser = appraise(space, trials)
    assert trials[77] in appraiser._observed
    assert len(appraiser._observed) == 300
    prices = appraiser.price_paused(trials)
    assert prices.shape == (500,)
    assert prices[77] > np.median(prices)
