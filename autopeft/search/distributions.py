"""A space in Optuna's terms: what its dashboard and its storage understand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)

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


def keep_known(
    asked: Mapping[str, BaseDistribution], known: Mapping[str, BaseDistribution], params: Mapping[str, Scalar]
) -> dict[str, BaseDistribution]:
    """What can be asked in a study that knows distributions of these names already.

    Optuna takes no other choices for a name than those that it saw first, but autopeft learns new ones: a study that
    was begun before keeps the old ones, and a value that they lack stands in the trial's record alone.
    """
    kept = {}
    for name, distribution in asked.items():
        old = known.get(name, distribution)
        try:
            check_distribution_compatibility(old, distribution)
            kept[name] = distribution
        except ValueError:
            if isinstance(old, CategoricalDistribution) and params[name] in old.choices:
                kept[name] = old
    return kept


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(list(dimension.choices))
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.kind == "int":
        return IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
    return FloatDistribution(dimension.low, dimension.high, log=dimension.log)
