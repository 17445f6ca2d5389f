"""Dominance, hypervolume and picks, against closed forms and independent computations."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from autopeft.errors import SpecError
from autopeft.records import Completed, Confirmation, Cost, Failed, RungScore, TrialRecord, TrialSpec, TrialState
from autopeft.search.front import (
    Front,
    Run,
    _resample_qualities,
    analyze_front,
    cost_vector,
    find_nondominated,
    hypervolume,
    parse_objectives,
    peel_layers,
)

Points = npt.NDArray[np.float64]

GRID = hnp.arrays(
    float, st.tuples(st.integers(1, 7), st.integers(1, 3)), elements=st.integers(0, 6).map(float)
)  # fmt: skip
"""Few distinct values, so that ties and duplicates are common."""


def volume_by_inclusion_and_exclusion(points: Points, reference: float) -> float:
    """Independent of slicing: the union of boxes from each point to the reference."""
    boxes = np.maximum(reference - points, 0.0)
    total = 0.0
    for size in range(1, len(points) + 1):
        for chosen in itertools.combinations(range(len(points)), size):
            total += (-1) ** (size + 1) * float(np.prod(boxes[list(chosen)].min(axis=0)))
    return total


@given(GRID)
def test_hypervolume_equals_inclusion_and_exclusion(points: Points) -> None:
    reference = [5.0] * points.shape[1]
    assert hypervolume(points, reference) == pytest.approx(volume_by_inclusion_and_exclusion(points, 5.0))


@given(GRID)
def test_hypervolume_comes_from_nondominated_points_alone(points: Points) -> None:
    reference = [7.0] * points.shape[1]
    assert hypervolume(points[find_nondominated(points)], reference) == pytest.approx(hypervolume(points, reference))


@given(GRID)
def test_another_point_never_lowers_hypervolume(points: Points) -> None:
    reference = [7.0] * points.shape[1]
    assert hypervolume(points[:-1], reference) <= hypervolume(points, reference) + 1e-9


def test_the_hypervolume_of_one_point_is_its_box() -> None:
    assert hypervolume(np.array([[1.0, 2.0, 3.0]]), [2.0, 4.0, 6.0]) == pytest.approx(1 * 2 * 3)


def test_the_hypervolume_of_a_staircase_is_the_sum_of_its_steps() -> None:
    # Boxes 3x1, 2x2, 1x3 under (4, 4) overlap: 3 + 2 + 1 unit squares remain.
    assert hypervolume(np.array([[1.0, 3.0], [2.0, 2.0], [3.0, 1.0]]), [4.0, 4.0]) == pytest.approx(6.0)


def test_points_beyond_the_reference_dominate_nothing() -> None:
    assert hypervolume(np.array([[5.0, 0.0], [0.0, 5.0]]), [4.0, 4.0]) == 0.0


def test_no_points_have_no_hypervolume() -> None:
    assert hypervolume(np.empty((0, 2)), [1.0, 1.0]) == 0.0


@given(GRID)
def test_a_point_is_kept_exactly_where_no_other_dominates_it(points: Points) -> None:
    kept = find_nondominated(points)
    for i, point in enumerate(points):
        beaten = any((other <= point).all() and (other < point).any() for other in points)
        assert kept[i] == (not beaten)


@given(GRID)
def test_some_point_is_always_nondominated(points: Points) -> None:
    assert find_nondominated(points).any()


@given(GRID)
def test_layers_hold_every_point_once_and_dominate_downwards(points: Points) -> None:
    layers = list(peel_layers(points))
    assert sorted(int(row) for layer in layers for row in layer) == list(range(len(points)))
    assert list(layers[0]) == list(np.flatnonzero(find_nondominated(points)))
    for upper, lower in itertools.pairwise(layers):
        for row in points[lower]:
            assert ((points[upper] <= row).all(axis=1) & (points[upper] < row).any(axis=1)).any()


@given(GRID)
def test_equal_points_are_kept_or_dropped_together(points: Points) -> None:
    twice = np.concatenate([points, points])
    kept = find_nondominated(twice)
    assert (kept[: len(points)] == kept[len(points) :]).all()


@given(GRID)
def test_dominance_does_not_depend_on_an_objectives_scale(points: Points) -> None:
    assert (find_nondominated(points) == find_nondominated(np.exp(points) * 3 + 1)).all()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("quality", ("quality",)),
        ("params,quality", ("quality", "params")),
        (" quality , vram ,params", ("quality", "vram", "params")),
        ("quality,quality,vram", ("quality", "vram")),
    ],
)
def test_objectives_are_read_in_any_order(text: str, names: tuple[str, ...]) -> None:
    assert parse_objectives(text) == names


def test_an_unknown_objective_gets_the_nearest_name() -> None:
    with pytest.raises(SpecError, match=r"'vran'.*Did you mean 'vram'"):
        parse_objectives("quality,vran")


def test_objectives_without_quality_are_refused() -> None:
    with pytest.raises(SpecError, match="must contain quality"):
        parse_objectives("vram,params")


COST = Cost(trainable_parameters=7, head_parameters=5, peak_vram_bytes=9, vram_source="estimated")


@pytest.mark.parametrize(
    ("objectives", "vector"),
    [(("quality",), ()), (("quality", "params"), (7.0,)), (("quality", "vram", "params"), (9.0, 7.0))],
)
def test_costs_follow_the_chosen_objectives_and_leave_out_the_head(
    objectives: tuple[str, ...], vector: tuple[float, ...]
) -> None:
    assert cost_vector(COST, objectives) == vector


# --- a study's front


LABELS = np.array([0, 1] * 100)


def answers(accuracy: float, seed: int) -> npt.NDArray[np.int64]:
    """Exactly `accuracy` of the labels right, at random places."""
    wrong = np.random.default_rng(seed).permutation(len(LABELS))[: round((1 - accuracy) * len(LABELS))]
    predictions = LABELS.copy()
    predictions[wrong] = 1 - predictions[wrong]
    return predictions


def make_trial(spec: TrialSpec, number: int, quality: float, vram: int, params: int, seeds: int = 0) -> TrialRecord:
    common = {"quality": quality, "loss": 1 - quality, "device_seconds": 1.0, "scores_file": "x", "scores_digest": "x"}
    return TrialRecord(
        number=number,
        spec=spec,
        source="sampler",
        state="complete",
        cost=Cost(trainable_parameters=params, head_parameters=1, peak_vram_bytes=vram, vram_source="estimated"),
        rungs=(RungScore(rung=0, step=160, num_examples=200, train_seconds=1.0, **common),),
        outcome=Completed(),
        device_seconds=1.0,
        confirmations=tuple(
            Confirmation(seed=i + 1, test_quality=quality, test_loss=0.1, num_test_examples=200, **common)
            for i in range(seeds)
        ),
    )


@pytest.fixture(scope="module")
def analyze(make_spec: Callable[..., TrialSpec]) -> Callable[..., Front]:
    def analyze(
        *rows: tuple[float, int, int, int],
        objectives: tuple[str, ...] = ("quality", "vram", "params"),
        baseline: tuple[float, int, int] | None = None,
        baseline_answers: npt.NDArray[np.int64] | None = None,
        order: Sequence[int] = (),
        also: Sequence[TrialRecord] = (),
    ) -> Front:
        """Rows of (quality, VRAM, parameters, confirmations). A trial's number is its place in `order`."""
        order = order or range(len(rows))
        trials, runs = [], []
        for number, row in enumerate(order):
            trials.append(make_trial(make_spec(learning_rate=1e-3 + 1e-5 * row), number, *rows[row]))
            runs += [Run(number, answers(rows[row][0], 10 * row + seed)) for seed in range(1 + rows[row][3])]
        head = make_trial(make_spec("head"), -1, *baseline) if baseline else None
        if baseline_answers is not None:
            runs.append(Run(-1, baseline_answers))
        reference = {"quality": 0.5, "vram": 1000.0, "params": 1000.0}
        reference = {name: reference[name] for name in objectives}
        return analyze_front(
            [*trials, *also], head, runs, LABELS, objectives=objectives, scorer="accuracy", reference=reference, seed=0
        )

    return analyze


def numbers(front: Front) -> list[int]:
    return [member.number for member in front.members]


def pick(front: Front, name: str) -> int:
    return next(pick.number for pick in front.picks if pick.name == name)


def test_the_front_of_nothing_is_empty(analyze: Callable[..., Front]) -> None:
    assert analyze() == Front((), (), 0.0)


def test_a_dominated_trial_is_not_on_the_front(analyze: Callable[..., Front]) -> None:
    assert numbers(analyze((0.9, 500, 100, 0), (0.8, 600, 200, 0), (0.7, 100, 10, 0))) == [0, 2]


def test_what_the_trained_head_dominates_is_on_no_front(analyze: Callable[..., Front]) -> None:
    front = analyze((0.9, 500, 100, 0), (0.55, 90, 10, 0), baseline=(0.6, 80, 0))
    assert numbers(front) == [0]


def test_a_trial_cheaper_than_the_trained_head_stays_on_the_front(analyze: Callable[..., Front]) -> None:
    front = analyze((0.9, 500, 100, 0), (0.55, 70, 10, 0), baseline=(0.6, 80, 0))
    assert numbers(front) == [0, 1]


def test_confidences_are_shares(analyze: Callable[..., Front]) -> None:
    front = analyze((0.9, 500, 100, 0), (0.88, 400, 200, 0), (0.7, 100, 10, 0))
    assert all(0 <= member.confidence <= 1 for member in front.members)


def test_the_cheapest_trial_is_on_the_front_for_certain(analyze: Callable[..., Front]) -> None:
    front = analyze((0.9, 500, 100, 0), (0.55, 100, 10, 0))
    assert {member.number: member.confidence for member in front.members}[1] == 1.0


def test_a_member_that_is_barely_better_than_a_cheaper_one_is_uncertain(analyze: Callable[..., Front]) -> None:
    front = analyze((0.805, 500, 100, 0), (0.80, 400, 50, 0))
    assert 0.3 < {member.number: member.confidence for member in front.members}[0] < 0.8


def test_the_best_pick_has_the_highest_quality(analyze: Callable[..., Front]) -> None:
    assert pick(analyze((0.9, 900, 900, 0), (0.8, 500, 100, 0), (0.7, 100, 10, 0)), "best") == 0


def test_the_smallest_pick_has_the_fewest_parameters_within_noise_of_the_best(analyze: Callable[..., Front]) -> None:
    front = analyze((0.90, 900, 900, 0), (0.895, 500, 100, 0), (0.60, 100, 10, 0))
    assert pick(front, "smallest") == 1


def test_the_knee_gives_up_little_quality_for_much_memory(analyze: Callable[..., Front]) -> None:
    assert pick(analyze((0.90, 900, 900, 0), (0.88, 200, 100, 0), (0.60, 100, 10, 0)), "knee") == 1


def test_once_some_are_confirmed_only_those_are_picked(analyze: Callable[..., Front]) -> None:
    front = analyze((0.92, 900, 900, 0), (0.90, 800, 800, 2), (0.60, 100, 10, 2))
    assert {chosen.number for chosen in front.picks} <= {1, 2}


def test_a_lucky_score_that_was_not_confirmed_puts_no_confirmed_one_out_of_the_choice(
    analyze: Callable[..., Front],
) -> None:
    # The second dominates the first, and may not be picked.
    front = analyze((0.90, 900, 900, 2), (0.905, 800, 800, 0), (0.60, 100, 10, 2))
    assert numbers(front) == [1, 2]
    assert pick(front, "best") == 0
    assert front.picks[0].why == "highest mean quality of those confirmed on the search-validation split"


def test_the_smallest_within_noise_is_none_that_the_trained_head_dominates(analyze: Callable[..., Front]) -> None:
    rows = ((0.83, 900, 900, 0), (0.80, 500, 10, 0))
    assert pick(analyze(*rows), "smallest") == 1
    assert pick(analyze(*rows, baseline=(0.82, 400, 0)), "smallest") == 0


@pytest.mark.parametrize(("seed", "beats"), [(0, True), (77, False)], ids=["nearly the same answers", "other answers"])
def test_the_best_is_compared_with_the_baseline_on_the_same_examples(
    analyze: Callable[..., Front], seed: int, beats: bool
) -> None:
    # Of 200 answers 12 more are right: more than chance where the others are alike, and less where they are not.
    front = analyze((0.86, 500, 100, 0), baseline=(0.80, 80, 0), baseline_answers=answers(0.80, seed))
    assert front.beats_baseline is beats
    assert analyze((0.86, 500, 100, 0), baseline=(0.80, 80, 0)).beats_baseline is None


def test_a_member_no_surer_than_its_lead_on_the_baseline_is_uncertain(analyze: Callable[..., Front]) -> None:
    # Dearer than the head, so that it is on the front only where it is better.
    fixed, paired = (
        analyze((0.82, 500, 100, 0), baseline=(0.80, 80, 0), baseline_answers=known).members[0].confidence
        for known in (None, answers(0.80, 0))
    )
    assert fixed < paired < 1


ROWS = st.lists(
    st.tuples(
        st.integers(55, 99).map(lambda q: q / 100),
        st.integers(1, 999),
        st.integers(1, 999),
        st.sampled_from([0, 2]),
    ),
    min_size=1,
    max_size=4,
)
"""Of (quality, VRAM, parameters, confirmations)."""
ALIKE = st.lists(
    st.tuples(
        st.sampled_from([0.80, 0.82, 0.90]),
        st.sampled_from([100, 500]),
        st.sampled_from([10, 100]),
        st.sampled_from([0, 2]),
    ),
    min_size=2,
    max_size=5,
)
"""The same with many equals."""


@given(ALIKE, st.permutations(range(5)))
def test_other_numbers_and_another_order_change_nothing(
    analyze: Callable[..., Front], rows: list[tuple[float, int, int, int]], order: list[int]
) -> None:
    order = [place for place in order if place < len(rows)]
    front, other = analyze(*rows, baseline=(0.81, 90, 0)), analyze(*rows, baseline=(0.81, 90, 0), order=order)
    assert {(m.number, m.confidence) for m in front.members} == {(order[m.number], m.confidence) for m in other.members}
    assert [(p.name, p.number, p.why) for p in front.picks] == [(p.name, order[p.number], p.why) for p in other.picks]
    assert front.ties == tuple(tuple(order[number] for number in group) for group in other.ties)
    assert front.hypervolume == pytest.approx(other.hypervolume, rel=1e-12)


@given(ROWS, st.sampled_from(["failed", "refused", "stopped", "paused", "running"]), st.integers(1, 3))
def test_what_did_not_complete_changes_no_front_however_good_it_was(
    analyze: Callable[..., Front],
    make_spec: Callable[..., TrialSpec],
    rows: list[tuple[float, int, int, int]],
    state: TrialState,
    count: int,
) -> None:
    out_of_memory = Failed(reason="out_of_memory", detail="")
    better = [
        replace(make_trial(make_spec(learning_rate=0.1 + i), 100 + i, 0.995, 1, 1), state=state, outcome=out_of_memory)
        for i in range(count)
    ]
    assert analyze(*rows, also=better) == analyze(*rows)


@given(ROWS, st.sampled_from([("quality",), ("quality", "params"), ("quality", "vram", "params")]))
def test_best_and_knee_are_on_the_front_of_what_may_be_picked_and_hypervolume_is_a_share(
    analyze: Callable[..., Front], rows: list[tuple[float, int, int, int]], objectives: tuple[str, ...]
) -> None:
    front = analyze(*rows, objectives=objectives)
    confirmed = [place for place, row in enumerate(rows) if row[3]] or list(range(len(rows)))
    among_them = analyze(*(rows[place] for place in confirmed), objectives=objectives)
    assert {pick(front, "best"), pick(front, "knee")} <= {confirmed[number] for number in numbers(among_them)}
    assert rows[pick(front, "best")][0] == max(rows[place][0] for place in confirmed)
    assert 0 <= front.hypervolume <= 1
    assert math.isfinite(front.hypervolume)


# --- seeds and ties


def test_two_that_differ_by_one_answer_are_tied_and_one_far_behind_is_not(analyze: Callable[..., Front]) -> None:
    front = analyze((0.805, 500, 100, 0), (0.80, 400, 50, 0), (0.55, 100, 10, 0))
    assert front.ties == ((0, 1),)


def test_members_that_all_differ_clearly_make_no_tie(analyze: Callable[..., Front]) -> None:
    assert analyze((0.95, 500, 100, 0), (0.75, 400, 50, 0), (0.55, 100, 10, 0)).ties == ()


def test_a_tie_is_led_by_the_best_and_holds_members_of_the_front_alone(analyze: Callable[..., Front]) -> None:
    front = analyze((0.80, 500, 90, 0), (0.81, 600, 100, 0), (0.80, 700, 100, 0))
    assert front.ties == ((1, 0),)


def draw_rows() -> npt.NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, len(LABELS), (400, len(LABELS)))


def resampled_deviation(make_spec: Callable[..., TrialSpec], *qualities: list[float]) -> npt.NDArray[np.float64]:
    """Over the resamples, of each trial, given the accuracies of its runs."""
    specs = [make_spec(learning_rate=1e-3 + 1e-5 * n) for n in range(len(qualities))]
    trials = [make_trial(specs[n], n, values[0], 500, 100, len(values) - 1) for n, values in enumerate(qualities)]
    runs = [Run(n, answers(q, seed)) for n, values in enumerate(qualities) for seed, q in enumerate(values)]
    return np.asarray(_resample_qualities(trials, runs, LABELS, "accuracy", draw_rows(), 0).std(axis=0))


def test_without_a_second_seed_resamples_spread_as_examples_do_and_half_of_that_for_seeds(
    make_spec: Callable[..., TrialSpec],
) -> None:
    # sqrt(0.8 * 0.2 / 200)
    assert resampled_deviation(make_spec, [0.8])[0] == pytest.approx(0.0283 * math.hypot(1, 0.5), rel=0.1)


def test_what_seeds_change_in_one_trial_makes_a_single_run_of_another_less_certain(
    make_spec: Callable[..., TrialSpec],
) -> None:
    steady, shaky = (resampled_deviation(make_spec, [0.8], values)[0] for values in ([0.7, 0.7, 0.7], [0.6, 0.7, 0.8]))
    assert steady == pytest.approx(0.0283, rel=0.1)
    # Three runs 0.1 apart have a standard deviation of 0.1; the residuals widened by sqrt(3 / 2) are drawn with it.
    assert shaky == pytest.approx(math.hypot(0.0283, 0.1), rel=0.15)


def test_a_mean_over_seeds_is_surer_than_a_single_run(make_spec: Callable[..., TrialSpec]) -> None:
    single, mean = resampled_deviation(make_spec, [0.7], [0.6, 0.7, 0.8])
    assert mean < single


@pytest.mark.parametrize("scorer", ["accuracy", "matthews_correlation"])
def test_any_scorer_is_resampled_over_the_same_examples(make_spec: Callable[..., TrialSpec], scorer: str) -> None:
    trials = [make_trial(make_spec(), n, 0.8, 500, 100, 1) for n in range(2)]
    # Of two seeds alike, so that seeds were seen to change nothing.
    runs = [Run(n, answers(0.8, 3)) for n in range(2) for _ in range(2)]
    qualities = _resample_qualities(trials, runs, LABELS, scorer, draw_rows(), 0)
    assert (qualities[:, 0] == qualities[:, 1]).all()
    assert qualities[:, 0].std() > 0
