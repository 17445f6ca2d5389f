"""Configurations that could be tried next: drawn anywhere in the space, and near the trials that promise most."""

from __future__ import annotations

import random
from collections.abc import Sequence

from autopeft.methods.base import Dimension
from autopeft.records import Scalar
from autopeft.search.surrogate import Answers, place_in_range
from autopeft.spaces.space import MethodSpace, SearchSpace

_NUM_ANYWHERE = 160
_NUM_NEAR = 120
_STEP = 0.15
"""Standard deviation of a perturbation, as a share of a range."""
_MOVES_RATE = 0.7
"""How often a perturbation moves the learning rate: it matters most, and its best value least follows from others."""


def draw_candidates(space: SearchSpace, parents: Sequence[Answers], rng: random.Random) -> list[dict[str, Scalar]]:
    """Every method as often as any other, then neighbours of `parents` in turn, as answers to the space's questions."""
    methods = list(space.methods.values())
    drawn = [_draw(methods[turn % len(methods)], rng) for turn in range(_NUM_ANYWHERE)]
    for turn in range(_NUM_NEAR if parents else 0):
        parent = parents[turn % len(parents)]
        drawn.append(_perturb(space.methods[str(parent["method"])], parent, rng))
    return drawn


def _draw(method: MethodSpace, rng: random.Random) -> dict[str, Scalar]:
    return method.answer({d.name: _at(d, rng.random()) for d in method.dimensions})


def _perturb(method: MethodSpace, parent: Answers, rng: random.Random) -> dict[str, Scalar]:
    """The learning rate moves mostly, and of the others about two."""
    others = max(1, len(method.dimensions) - 1)
    wanted: dict[str, Scalar] = {}
    for dimension in method.dimensions:
        old = parent.get(f"{method.method}.{dimension.name}", dimension.default)
        chance = _MOVES_RATE if dimension.name == "learning_rate" else min(0.5, 2 / others)
        wanted[dimension.name] = old
        if rng.random() >= chance:
            continue
        if dimension.kind == "choice":
            wanted[dimension.name] = rng.choice(dimension.choices)
        else:
            place = place_in_range(dimension, old) + rng.gauss(0, _STEP)
            wanted[dimension.name] = _at(dimension, min(1.0, max(0.0, place)))
    return method.answer(wanted)


def _at(dimension: Dimension, place: float) -> Scalar:
    """The value at a place in [0, 1] of a range, or of the choices."""
    if dimension.kind == "choice":
        return dimension.choices[min(int(place * len(dimension.choices)), len(dimension.choices) - 1)]
    assert dimension.low is not None
    assert dimension.high is not None
    low, high = dimension.low, dimension.high
    value = low * (high / low) ** place if dimension.log else low + (high - low) * place
    value = min(max(value, low), high)
    return round(value) if dimension.kind == "int" else value
