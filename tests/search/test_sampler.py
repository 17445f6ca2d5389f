"""Suggestions are a function of history, seed and number; never a repetition, never what the machine cannot train."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.methods import refuse_spec
from autopeft.records import TrialSpec
from autopeft.search.sampler import Observation, suggest_spec, thin_history
from autopeft.spaces.load import find_space, parse_space
from autopeft.spaces.space import SearchSpace

OBJECTIVES = ("quality", "vram", "params")


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    name, text = find_space("default")
    return parse_space(text, name=name, device_kind="cpu", max_steps=160)


def suggest(
    space: SearchSpace, history: list[Observation], *, known: set[str], seed: int = 0, number: int = 0
) -> TrialSpec | None:
    return suggest_spec(space, history, objectives=OBJECTIVES, known=known, max_steps=160, seed=seed, number=number)


def make_history(space: SearchSpace, count: int, seed: int = 0) -> list[Observation]:
    """Scored, paused and refused trials, as a study would hold them."""
    history: list[Observation] = []
    for number in range(count):
        spec = suggest(space, [], known=set(), seed=seed + 100, number=number)
        assert spec is not None
        params = space.params(spec)
        assert params is not None
        values = None if number % 5 == 4 else (0.5 + number / 100, 1e6 * (1 + number % 3), 1e3 * (1 + number % 4))
        history.append(Observation(params, values, [0.0, 0.5, 0.75, 0.0, 1.0][number % 5]))
    return history


@given(seed=st.integers(0, 2**31 - 1), number=st.integers(0, 500), count=st.sampled_from([0, 3, 12, 15]))
@settings(max_examples=15)
def test_a_suggestion_depends_only_on_history_seed_and_number(
    space: SearchSpace, seed: int, number: int, count: int
) -> None:
    history = make_history(space, count)
    first = suggest(space, history, known=set(), seed=seed, number=number)
    assert first is not None
    assert suggest(space, list(history), known=set(), seed=seed, number=number) == first


@given(number=st.integers(0, 500), count=st.sampled_from([0, 15]))
@settings(max_examples=10)
def test_a_known_configuration_is_never_suggested_again(space: SearchSpace, number: int, count: int) -> None:
    history = make_history(space, count)
    known: set[str] = set()
    for _ in range(3):
        spec = suggest(space, history, known=known, number=number)
        assert spec is not None
        assert spec.key() not in known
        known.add(spec.key())


def test_different_numbers_ask_different_questions(space: SearchSpace) -> None:
    keys = set()
    for number in range(10):
        spec = suggest(space, [], known=set(), number=number)
        assert spec is not None
        keys.add(spec.key())
    assert len(keys) == 10


def test_what_the_machine_refuses_is_never_suggested() -> None:
    text = "methods: {lora: {dora: [true, false], init: [default, pissa], bits: [8, unquantized]}}"
    space = parse_space(text, name="x", device_kind="cpu", max_steps=160)
    for number in range(15):
        spec = suggest(space, [], known=set(), number=number)
        assert spec is not None
        assert refuse_spec(spec, "cpu") is None


def test_an_exhausted_finite_space_gives_nothing() -> None:
    text = "methods: {ia3: {bits: [4, unquantized], learning_rate: [0.01]}}"
    space = parse_space(text, name="x", device_kind="cpu", max_steps=160)
    known: set[str] = set()
    # 2 widths x 2 places.
    for number in range(4):
        spec = suggest(space, [], known=known, number=number)
        assert spec is not None
        known.add(spec.key())
    assert suggest(space, [], known=known, number=4) is None


def test_suggestions_move_towards_what_scored_well(space: SearchSpace) -> None:
    history = []
    for number, observation in enumerate(make_history(space, 40, seed=5)):
        good = observation.params["method"] == "ia3"
        history.append(observation._replace(values=(0.9 if good else 0.5, 1e6, 1e3 + number), missing=0.0))
    assert any(observation.params["method"] == "ia3" for observation in history)
    methods = []
    for number in range(40, 60):
        spec = suggest(space, history, known=set(), number=number)
        assert spec is not None
        methods.append(spec.method)
    # One in six by chance.
    assert methods.count("ia3") >= 8


OBSERVATIONS = st.lists(
    st.tuples(st.integers(1, 20), st.integers(1, 20), st.sampled_from([0.0, 0.0, 0.5, 0.75])), max_size=900
).map(lambda rows: [Observation({"method": str(i)}, (q / 20, float(c)), m) for i, (q, c, m) in enumerate(rows)])


@given(OBSERVATIONS)
@settings(max_examples=20)
def test_a_long_history_is_thinned_in_its_order_and_a_short_one_is_left(history: list[Observation]) -> None:
    thinned = thin_history(history)
    assert len(thinned) == min(len(history), 300)
    places = [int(str(seen.params["method"])) for seen in thinned]
    assert places == sorted(set(places))


def test_thinning_keeps_the_front_of_what_is_complete() -> None:
    dominated = [Observation({"method": str(i)}, (0.5, 10.0), 0.0) for i in range(1000)]
    front = [Observation({"method": f"front {i}"}, (0.6 + i / 100, 1.0 + i), 0.0) for i in range(9)]
    thinned = thin_history([*dominated[:500], *front, *dominated[500:]])
    assert all(seen in thinned for seen in front)
