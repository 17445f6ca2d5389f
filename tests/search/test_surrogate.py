"""What is thought of configurations not tried yet: costs by their laws, quality by what methods have in common."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from autopeft.methods import METHODS
from autopeft.records import Scalar, TaskKind
from autopeft.search.candidates import draw_candidates
from autopeft.search.surrogate import Encoder, Features, QualitySurrogate, encode_spec, interpolate_costs, stack
from autopeft.spaces.load import find_space, parse_space
from autopeft.spaces.space import SearchSpace

WIDTHS = {"attention-qv": 2.0, "attention": 4.0, "mlp": 5.0, "all-linear": 9.0}
Answers = dict[str, Scalar]


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    name, text = find_space("default")
    return parse_space(text, name=name, device_kind="cpu", max_steps=160, methods=("lora", "miss"))


def draw(space: SearchSpace, count: int, seed: int = 0) -> list[Answers]:
    return draw_candidates(space, [], random.Random(seed))[:count]


def encode(space: SearchSpace, rows: list[Answers]) -> Features:
    encoder = Encoder(space)
    return stack([encoder.encode(row) for row in rows])


def at(row: Answers, name: str) -> Scalar:
    return row[f"{row['method']}.{name}"]


def decades_above_recipe(row: Answers) -> float:
    return math.log10(float(at(row, "learning_rate")) / METHODS[str(row["method"])].recipe.learning_rate)


def surrogate_of(space: SearchSpace, rows: list[Answers], means: list[float]) -> QualitySurrogate:
    return QualitySurrogate(encode(space, rows), np.full(len(rows), 4.0), np.array(means), np.full(len(rows), 0.005**2))


def test_costs_that_are_products_of_settings_are_found_from_few(space: SearchSpace) -> None:
    def cost_of(row: Answers) -> list[float]:
        size = float(at(row, "rank")) * WIDTHS[str(at(row, "target_modules"))] * (3 if row["method"] == "lora" else 1)
        return [math.log(1e8 * float(at(row, "bits")) + 100 * size), math.log(size)]

    seen, wanted = draw(space, 40), draw(space, 100, 1)
    known = np.array([cost_of(row) for row in seen])
    # Some were never measured on one of them.
    known[::5, 0] = math.nan
    found = interpolate_costs(encode(space, seen), known, np.array([0.0, 1.0]), encode(space, wanted))
    # In logarithms: a tenth is 10%.
    assert np.quantile(abs(found - np.array([cost_of(row) for row in wanted])), 0.9) < 0.1


def test_a_cost_that_nobody_knows_stays_unknown(space: SearchSpace) -> None:
    rows = draw(space, 5)
    found = interpolate_costs(encode(space, rows), np.full((5, 1), math.nan), np.array([0.0]), encode(space, rows))
    assert np.isnan(found).all()


@pytest.mark.parametrize("task_kind", ["classification", "generation"])
def test_a_recipe_is_at_its_own_learning_rate_in_either_kind_of_task(task_kind: TaskKind) -> None:
    name, text = find_space("decoder")
    space = parse_space(text, name=name, device_kind="cuda", max_steps=160, task_kind=task_kind)
    encoder = Encoder(space)
    rows = [encode_spec(encoder, space, spec) for spec in space.recipes]
    assert len(rows) > 3
    assert [row.rate for row in rows if row is not None] == pytest.approx([0.0] * len(rows))


def test_before_much_is_known_a_rate_near_the_recipes_is_trusted_most(space: SearchSpace) -> None:
    row = {"method": "lora", "lora.bits": 32, "lora.target_modules": "mlp", "lora.rank": 16}
    usual = METHODS["lora"].recipe.learning_rate
    rows = [row | {"lora.learning_rate": usual * factor} for factor in (1.0, 1.5, 10.0, 0.1)]
    near, nearly, high, low = surrogate_of(space, rows[:1], [0.8]).estimate(encode(space, rows), np.full(4, 4.0)).means
    assert near == pytest.approx(nearly, abs=0.02)
    assert max(high, low) < near - 0.05


def test_more_parameters_are_expected_to_be_better_until_scores_say_otherwise(space: SearchSpace) -> None:
    rows = draw(space, 1) * 3
    sizes = np.array([3.0, 5.0, 7.0])

    def estimate(means: list[float]) -> list[float]:
        surrogate = QualitySurrogate(encode(space, rows), sizes, np.array(means), np.full(3, 0.005**2))
        return list(surrogate.estimate(encode(space, rows), sizes).means)

    seen = QualitySurrogate(encode(space, rows[:1]), sizes[1:2], np.array([0.6]), np.full(1, 0.005**2))
    small, middle, large = seen.estimate(encode(space, rows), sizes).means
    assert small + 0.02 < middle < large - 0.02
    assert estimate([0.9, 0.7, 0.5]) == sorted(estimate([0.9, 0.7, 0.5]), reverse=True)


def test_a_rate_that_is_bad_for_one_method_is_suspect_for_the_other(space: SearchSpace) -> None:
    rows = draw(space, 100)
    seen = [row for row in rows if row["method"] == "lora" or abs(decades_above_recipe(row)) < 0.3]
    # Against what is believed beforehand, LoRA does best at a tenth of its recipe's rate.
    means = [0.85 - 0.2 * min(abs(decades_above_recipe(row) + 1), 1.5) for row in seen]
    surrogate = surrogate_of(space, seen, means)
    unseen = {"method": "miss", "miss.bits": 32, "miss.target_modules": "mlp", "miss.rank": 16}
    usual = METHODS["miss"].recipe.learning_rate
    features = encode(space, [unseen | {"miss.learning_rate": usual * factor} for factor in (0.15, 6.0)])
    low, high = surrogate.estimate(features, np.array([4.0, 4.0])).means
    assert low > high + 0.05


def test_it_is_surest_where_it_has_seen_most(space: SearchSpace) -> None:
    rows = [row for row in draw(space, 60) if row["method"] == "lora"]
    surrogate = surrogate_of(space, rows, [0.7 + 0.1 * math.sin(i) for i in range(len(rows))])
    other = [row for row in draw(space, 60, 1) if row["method"] == "miss"]
    near = surrogate.estimate(encode(space, rows), np.full(len(rows), 4.0)).variances
    far = surrogate.estimate(encode(space, other), np.full(len(other), 4.0)).variances
    assert near.max() < far.min()


def test_what_is_under_way_leaves_less_to_be_found_there_and_changes_no_mean(space: SearchSpace) -> None:
    rows = draw(space, 30)
    surrogate = surrogate_of(space, rows, [0.7 + 0.1 * math.sin(i) for i in range(len(rows))])
    pending = encode(space, draw(space, 1, 1))
    before = surrogate.estimate(pending, np.array([4.0]))
    surrogate.believe(pending, np.array([4.0]))
    after = surrogate.estimate(pending, np.array([4.0]))
    assert after.variances[0] < before.variances[0]
    assert after.means[0] == pytest.approx(before.means[0], abs=1e-6)
    assert surrogate.smooth().means[-1] == pytest.approx(before.means[0], abs=1e-6)


def test_a_score_that_is_all_luck_is_drawn_to_its_neighbours(space: SearchSpace) -> None:
    features = encode(space, draw(space, 1) * 9)
    means = np.array([0.8] * 8 + [0.9])
    sure = QualitySurrogate(features, np.full(9, 4.0), means, np.full(9, 0.001**2)).smooth()
    unsure = QualitySurrogate(features, np.full(9, 4.0), means, np.array([0.001] * 8 + [0.2]) ** 2).smooth()
    assert sure.means[-1] == pytest.approx(0.9, abs=0.01)
    assert unsure.means[-1] == pytest.approx(0.8, abs=0.03)
    assert unsure.variances[-1] < 0.2**2
