"""Expected growth of the front: against plain hypervolumes, and what it learns of how trials grow."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autopeft.records import Cost, RungScore, TrialSpec
from autopeft.search import gain
from autopeft.search.front import hypervolume
from autopeft.search.gain import GrowthModel, QualityModel, expected_improvement
from autopeft.search.store import Trial

Points = npt.NDArray[np.float64]
RUNGS = (40, 80, 160)
UNIT = st.floats(0.0, 1.2).map(lambda x: round(x, 2))


@st.composite
def fronts(draw: st.DrawFn) -> tuple[Points, Points]:
    """(points, candidates) of the same number of objectives, some of them beyond the reference."""
    width = draw(st.integers(1, 3))
    points = draw(hnp.arrays(float, st.tuples(st.integers(0, 5), st.just(width)), elements=UNIT))
    candidates = draw(hnp.arrays(float, st.tuples(st.integers(1, 4), st.just(width)), elements=UNIT))
    return points, candidates


def improvement_of(candidates: Points, points: Points, deviation: float = 0.0) -> Points:
    deviations = np.full(len(candidates), deviation)
    return expected_improvement(candidates[:, 0], deviations, candidates[:, 1:], points)


@given(fronts())
def test_without_doubt_it_is_the_growth_of_the_hypervolume(case: tuple[Points, Points]) -> None:
    points, candidates = case
    reference = [1.0] * points.shape[1]
    before = hypervolume(points, reference)
    expected = [hypervolume(np.vstack([points, row]), reference) - before for row in candidates]
    assert improvement_of(candidates, points) == pytest.approx(expected, abs=1e-12)


@given(fronts(), st.floats(0.0, 0.3))
def test_candidates_in_pieces_promise_the_same_and_fewer_cells_no_less(
    case: tuple[Points, Points], deviation: float
) -> None:
    points, candidates = case
    gains = improvement_of(candidates, points, deviation)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gain, "_MOST_AT_ONCE", 1)
        assert improvement_of(candidates, points, deviation) == pytest.approx(gains, abs=1e-12)
        patch.setattr(gain, "_MOST_CELLS", 4)
        assert (improvement_of(candidates, points, deviation) >= gains - 1e-12).all()


@given(fronts())
def test_several_outcomes_are_those_one_by_one(case: tuple[Points, Points]) -> None:
    points, candidates = case
    deviations, costs = np.full(len(candidates), 0.1), candidates[:, 1:]
    outcomes = np.stack([candidates[:, 0], candidates[:, 0] - 0.1])
    together = expected_improvement(outcomes, deviations, costs, points)
    alone = [expected_improvement(means, deviations, costs, points) for means in outcomes]
    assert together == pytest.approx(np.array(alone), abs=1e-12)


@given(fronts(), st.floats(0.0, 0.3))
def test_a_better_forecast_or_a_lower_cost_never_promises_less(case: tuple[Points, Points], deviation: float) -> None:
    points, candidates = case
    gains = improvement_of(candidates, points, deviation)
    for column in range(candidates.shape[1]):
        better = candidates.copy()
        better[:, column] -= 0.1
        assert (improvement_of(better, points, deviation) >= gains - 1e-12).all()


@given(fronts(), st.floats(0.0, 0.3))
def test_what_is_had_already_only_lowers_it(case: tuple[Points, Points], deviation: float) -> None:
    points, candidates = case
    more = np.vstack([points, candidates[:1]])
    assert (improvement_of(candidates, more, deviation) <= improvement_of(candidates, points, deviation) + 1e-12).all()


def test_doubt_gives_a_dominated_forecast_a_chance() -> None:
    points = np.array([[0.5, 0.5]])
    behind = np.array([[0.52, 0.6]])
    assert improvement_of(behind, points)[0] == 0.0
    assert improvement_of(behind, points, 0.05)[0] > 0.0


@pytest.fixture(scope="session")
def make_trial(make_spec: Callable[..., TrialSpec]) -> Callable[..., Trial]:
    def make_trial(*qualities: float) -> Trial:
        rungs = [
            RungScore(
                rung=rung, step=RUNGS[rung], quality=quality, loss=1.0, num_examples=10_000, device_seconds=1.0,
                train_seconds=1.0, scores_file="x", scores_digest="x",
            )
            for rung, quality in enumerate(qualities)
        ]  # fmt: skip
        cost = Cost(trainable_parameters=1, head_parameters=1, peak_vram_bytes=1, vram_source="estimated")
        return Trial(number=0, spec=make_spec(), source="sampler", state="paused", cost=cost, rungs=rungs)

    return make_trial


def test_growth_is_learned_rung_by_rung_from_those_that_went_on(make_trial: Callable[..., Trial]) -> None:
    growth = GrowthModel([make_trial(0.5, 0.6), make_trial(0.6, 0.8, 0.85)], RUNGS)
    assert growth.forecast(make_trial(0.5)).mean == pytest.approx(0.5 + 0.15 + 0.05)
    assert growth.forecast(make_trial(0.5, 0.7)).mean == pytest.approx(0.75)
    assert growth.forecast(make_trial(0.5, 0.7, 0.9)).mean == 0.9


def test_a_forecast_from_further_on_is_surer(make_trial: Callable[..., Trial]) -> None:
    growth = GrowthModel([], RUNGS)
    early, later, end = (growth.forecast(make_trial(*[0.8] * count)).deviation for count in (1, 2, 3))
    assert early > later > end == pytest.approx(np.sqrt(0.8 * 0.2 / 10_000), rel=1e-3)


def test_trials_that_grow_alike_make_forecasts_surer(make_trial: Callable[..., Trial]) -> None:
    alike = GrowthModel([make_trial(0.5, 0.6, 0.7)] * 5, RUNGS)
    assert alike.forecast(make_trial(0.5)).deviation < GrowthModel([], RUNGS).forecast(make_trial(0.5)).deviation


# --- luck taken out of a score


def test_where_no_quality_has_moved_yet_loss_tells_who_is_about_to_learn(make_trial: Callable[..., Trial]) -> None:
    def at_loss(trial: Trial, loss: float) -> Trial:
        trial.rungs[0] = dataclasses.replace(trial.rungs[0], loss=loss)
        return trial

    paused = [at_loss(make_trial(0.5), loss) for loss in (0.60, 0.70)]
    shown = [at_loss(make_trial(0.5, quality), loss) for quality, loss in ((0.8, 0.60), (0.5, 0.70)) for _ in range(4)]
    low, high = (GrowthModel([*paused, *shown], RUNGS).forecast(trial).mean for trial in paused)
    # Two standard deviations apart, at this rung by what was shown and at the next by what is thought beforehand.
    assert low - high == pytest.approx(2 * (0.15 * 8 + 0.012 * 3) / (8 + 3) + 2 * 0.012, abs=0.001)
    # What two have shown may be luck.
    low, high = (GrowthModel([*paused, *shown[::4]], RUNGS).forecast(trial).mean for trial in paused)
    assert low - high == pytest.approx(2 * (0.15 * 2 + 0.012 * 3) / (2 + 3) + 2 * 0.012, abs=0.001)
    low, high = (GrowthModel(paused, RUNGS).forecast(trial).mean for trial in paused)
    assert low - high == pytest.approx(2 * 2 * 0.012, abs=0.001)
    # And that the lower loss gains less, where that is what was shown.
    swapped = [
        at_loss(make_trial(0.5, quality), loss) for quality, loss in ((0.5, 0.60), (0.8, 0.70)) for _ in range(9)
    ]
    low, high = (GrowthModel([*paused, *swapped], RUNGS).forecast(trial).mean for trial in paused)
    assert low < high


def make_scores(qualities: list[float], losses: list[float], *, num_examples: int) -> list[RungScore]:
    return [
        RungScore(
            rung=0, step=40, quality=quality, loss=loss, num_examples=num_examples, device_seconds=1.0,
            train_seconds=1.0, scores_file="x", scores_digest="x",
        )
        for quality, loss in zip(qualities, losses, strict=True)
    ]  # fmt: skip


def test_on_few_examples_loss_tells_scores_apart_that_luck_has_mixed() -> None:
    rng = np.random.default_rng(0)
    losses = np.linspace(0.5, 1.2, 30)
    true = 0.5 - 0.6 * np.log(losses)
    scores = make_scores(list(rng.binomial(50, true) / 50), list(losses), num_examples=50)
    estimated = [QualityModel(scores).estimate(score).mean for score in scores]
    assert np.std(estimated - true) < np.std([score.quality for score in scores] - true) / 2


def test_on_many_examples_a_score_speaks_for_itself() -> None:
    rng = np.random.default_rng(0)
    scores = make_scores(list(rng.uniform(0.5, 0.9, 20)), list(rng.uniform(0.3, 0.9, 20)), num_examples=10_000)
    for score in scores:
        assert QualityModel(scores).estimate(score).mean == pytest.approx(score.quality, abs=0.01)


@pytest.mark.parametrize("quality_sd", [None, 0.9, 0.0])
def test_a_correlation_below_zero_is_a_score_as_any_other(quality_sd: float | None) -> None:
    scores = make_scores([-0.2 + i / 20 for i in range(9)], [0.9 - i / 20 for i in range(9)], num_examples=100)
    scores = [dataclasses.replace(score, quality_sd=quality_sd) for score in scores]
    forecast = QualityModel(scores).estimate(scores[0])
    assert forecast.mean == pytest.approx(-0.2, abs=0.05)
    assert 0 < forecast.deviation < 0.1


@pytest.mark.parametrize("losses", [[0.5] * 9, [0.0] * 9, [float("nan")] * 9, [0.5] * 7])
def test_without_a_line_to_learn_a_score_is_taken_as_it_is(losses: list[float]) -> None:
    qualities = [0.5 + i / 20 for i in range(len(losses))]
    scores = make_scores(qualities, losses, num_examples=10_000)
    assert QualityModel(scores).estimate(scores[0]).mean == pytest.approx(qualities[0], abs=0.01)
