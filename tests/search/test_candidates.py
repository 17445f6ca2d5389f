"""Candidates are answers that the space itself would accept, of every method, near and far."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autopeft.errors import SpecError
from autopeft.search.candidates import draw_candidates
from autopeft.search.surrogate import Answers
from autopeft.spaces.load import find_space, parse_space
from autopeft.spaces.space import SearchSpace, make_spec


@pytest.fixture(scope="module")
def space() -> SearchSpace:
    name, text = find_space("everything")
    return parse_space(text, name=name, device_kind="cpu", max_steps=160)


def parents_of(space: SearchSpace, count: int = 5) -> list[Answers]:
    return [answers for spec in space.recipes[:count] if (answers := space.params(spec)) is not None]


@given(seed=st.integers(0, 2**31 - 1), with_parents=st.booleans())
@settings(max_examples=20)
def test_a_candidate_is_what_the_space_says_of_the_configuration_it_stands_for(
    space: SearchSpace, seed: int, with_parents: bool
) -> None:
    made = 0
    for answers in draw_candidates(space, parents_of(space) if with_parents else [], random.Random(seed)):
        method = str(answers["method"])
        try:
            spec = make_spec(method, space.methods[method].read_answers(answers), max_steps=160, seed=0)
        except SpecError:
            # Settings that no method takes together; the search passes over them.
            continue
        made += 1
        assert space.params(spec) == answers
    assert made > 100


def test_every_method_is_drawn_as_often_as_any_other(space: SearchSpace) -> None:
    counts = Counter(answers["method"] for answers in draw_candidates(space, [], random.Random(0)))
    assert set(counts) == set(space.methods)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_neighbours_keep_most_of_their_parent_and_are_not_it(space: SearchSpace) -> None:
    parent = next(answers for answers in parents_of(space) if answers["method"] == "lora")
    near = draw_candidates(space, [parent], random.Random(0))[len(draw_candidates(space, [], random.Random(0))) :]
    assert {answers["method"] for answers in near} == {"lora"}
    changed = [sum(answers.get(name) != value for name, value in parent.items()) for answers in near]
    assert 0.5 < sum(changed) / len(changed) < 5
    assert sum(count == 0 for count in changed) < len(changed) / 4


def test_the_same_state_draws_the_same(space: SearchSpace) -> None:
    first, again, other = (draw_candidates(space, parents_of(space), random.Random(seed)) for seed in (1, 1, 2))
    assert first == again != other
