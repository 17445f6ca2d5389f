"""A table as a pool: a searcher that asks for a configuration gets the nearest recorded one that it has not had yet."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from tables import Table

from autopeft.records import Scalar
from autopeft.search.distributions import distributions
from autopeft.search.plan import restore_space

_OTHER_METHOD = 1e6
"""Farther than any two configurations of one method."""
_COMMON = ("learning_rate", "bits", "target_modules")


@dataclass(frozen=True)
class Pool:
    """What is recorded, as answers to a sampler's questions."""

    params: tuple[Mapping[str, Scalar], ...]
    """Of each configuration, by the questions' names; `method` among them."""
    distributions: Mapping[str, BaseDistribution]

    def ask(self, trial: optuna.Trial) -> dict[str, Scalar]:
        """A configuration as the sampler wants it: its method, then what is asked of that method."""
        method = str(trial.suggest_categorical("method", sorted({str(p["method"]) for p in self.params})))
        asked = {name for params in self.params if params["method"] == method for name in params}
        wanted: dict[str, Scalar] = {"method": method}
        for name in sorted(asked - {"method"}):
            wanted[name] = trial._suggest(name, self.distributions[name])
        return wanted

    def find_nearest(self, wanted: Mapping[str, Scalar], unused: set[int]) -> int:
        """The unused configuration of the same method, where there is one, whose answers differ least."""
        return min(sorted(unused), key=lambda index: self._distance(wanted, self.params[index]))

    def _distance(self, one: Mapping[str, Scalar], other: Mapping[str, Scalar]) -> float:
        if one["method"] != other["method"]:
            # Once the method has none left: what all methods have in common says more than the table's order.
            return _OTHER_METHOD + sum(
                _difference_of_places(self.distributions[a], one[a], self.distributions[b], other[b]) ** 2
                for setting in _COMMON
                if (a := f"{one['method']}.{setting}") in one and (b := f"{other['method']}.{setting}") in other
            )
        names = (set(one) | set(other)) - {"method"}
        # A question that only one of them was asked counts as answered differently.
        return sum(
            _difference(self.distributions[name], one[name], other[name]) ** 2 if name in one and name in other else 1.0
            for name in names
        )


def _difference(distribution: BaseDistribution, one: Scalar, other: Scalar) -> float:
    """In [0, 1]."""
    return _difference_of_places(distribution, one, distribution, other)


def _difference_of_places(first: BaseDistribution, one: Scalar, second: BaseDistribution, other: Scalar) -> float:
    """In [0, 1], each by its own range: methods' best learning rates are magnitudes apart."""
    places = _place(first, one), _place(second, other)
    return float(one != other) if places[0] is None or places[1] is None else abs(places[0] - places[1])


def _place(distribution: BaseDistribution, value: Scalar) -> float | None:
    """In [0, 1] of a range; None for a choice."""
    if not isinstance(distribution, FloatDistribution | IntDistribution):
        return None
    low, high, at = float(distribution.low), float(distribution.high), float(value)
    if distribution.log:
        low, high, at = (math.log(number) for number in (low, high, at))
    return (at - low) / (high - low) if high > low else 0.0


def make_pool(table: Table) -> Pool:
    """By the space that the configurations were drawn from; where they were set by hand, by method, learning rate and
    number of parameters."""
    config = table.recording.curves.config
    if not table.is_listed:
        space = restore_space(config)
        params = [space.params(curve.spec) for curve in table.curves]
        known = []
        for answers, curve in zip(params, table.curves, strict=True):
            assert answers is not None, f"the space does not hold {curve.spec}"
            known.append(answers)
        found: dict[str, BaseDistribution] = {}
        # Methods of which nothing is recorded may be asked for, too.
        for name, method in space.methods.items():
            asked = {f"{name}.{dimension.name}": dimension.default for dimension in method.dimensions}
            found |= distributions(space, {"method": name, **asked})
        return Pool(tuple(known), found)
    by_hand: list[Mapping[str, Scalar]] = [
        {
            "method": curve.spec.method,
            "learning_rate": curve.spec.learning_rate,
            "parameters": curve.cost.trainable_parameters,
        }
        for curve in table.curves
    ]
    rates = [float(answers["learning_rate"]) for answers in by_hand]
    sizes = [int(answers["parameters"]) for answers in by_hand]
    return Pool(
        tuple(by_hand),
        {
            "method": CategoricalDistribution(sorted({str(answers["method"]) for answers in by_hand})),
            "learning_rate": FloatDistribution(min(rates), max(rates), log=True),
            "parameters": IntDistribution(min(sizes), max(sizes), log=True),
        },
    )
