"""A space in Optuna's terms: what its dashboard and its storage understand."""

from __future__ import annotations

from collections.abc import Sequence

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

from autopeft.methods.base import Dimension
from autopeft.records import Scalar
from autopeft.spaces.space import SearchSpace


def optuna_directions(objectives: Sequence[str]) -> list[optuna.study.StudyDirection]:
    """Quality is made large, costs small."""
    directions = optuna.study.StudyDirection
    return [directions.MAXIMIZE if name == "quality" else directions.MINIMIZE for name in objectives]


def distributions(space: SearchSpace, params: dict[str, Scalar]) -> dict[str, BaseDistribution]:
    """Optuna's distributions of the dimensions that `params` answers."""
    found: dict[str, BaseDistribution] = {"method": CategoricalDistribution(list(space.methods))}
    method = str(params["method"])
    for dimension in space.methods[method].dimensions:
        name = f"{method}.{dimension.name}"
        if name in params:
            found[name] = _distribution(dimension)
    return found


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(list(dimension.choices))
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
