"""What configurations score and cost before they are trained: Gaussian processes over a space's settings.

Methods share what they have in common: the learning rate relative to their recipe's, the number of parameters, the
targets and the width of the base. What is a method's own is compared within the method alone.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.methods import METHODS
from autopeft.methods.base import Dimension
from autopeft.records import Scalar, TrialSpec
from autopeft.spaces.dimensions import recipe_rate
from autopeft.spaces.space import SHARED, SearchSpace

Floats = npt.NDArray[np.float64]
Answers = Mapping[str, Scalar]
"""`method`, and a configuration's settings as `SearchSpace.params` names them."""

_FIT_ON = 64
"""Observations that the kernel's settings are weighed on; an even choice of more says the same."""
_LEAST_DEVIATION = 0.03
"""Of quality between configurations, before they have shown any."""
PRIOR_DEVIATION = 0.1
PRIOR_COUNT = 3
"""What is thought of that deviation, and how many configurations it counts for. With two scored the deviation they show
says little."""
_DROP = 0.2
_NEAR = 0.3
_FAR = 1.5
"""Quality is expected to drop by `_DROP` times the square of the decades beyond `_NEAR` that a learning rate is off its
method's recipe, and no further beyond `_FAR`. On the 150 recorded configurations of sst2 mean accuracy is 0.81 within
0.3 decades of the recipe's rate, 0.78 to 0.6, 0.71 to 1 and 0.65 beyond."""

_SLOPE = 0.015
"""How much better a configuration is expected to be than one with a tenth of its trainable parameters. Without it the
search begins with what is cheapest, which on a hard task learns nothing. Near their recipes' learning rates, recorded
configurations gain 0.004 a decade on sst2, 0.035 on trec and 0.049 on cola."""


class Row(NamedTuple):
    """One configuration as numbers; differences of 1 are large but for `rate` and `width`."""

    answers: Answers
    method: int
    """Its place in the space."""
    rate: float
    """Decades above the recipe's learning rate."""
    shared: list[float]
    """Settings that all methods have: targets, bits, batch size, schedule, ..."""
    own: list[float]
    """The method's own, not comparable between methods."""
    width: float
    """Logarithm of the method's own sizes, such as its rank: what parameters go up with in proportion."""


class Features(NamedTuple):
    """N rows as arrays."""

    methods: npt.NDArray[np.int64]
    rates: Floats
    shared: Floats
    """(N, S)"""
    own: Floats
    """(N, D)"""
    widths: Floats

    def choose(self, rows: npt.NDArray[np.int64]) -> Features:
        methods, *numbers = self
        return Features(methods[rows], *(values[rows] for values in numbers))


def stack(rows: Sequence[Row]) -> Features:
    """Of at least one."""
    _, methods, rates, shared, own, widths = zip(*rows, strict=True)
    return Features(
        np.array(methods, dtype=np.int64), np.array(rates), np.array(shared), np.array(own), np.array(widths)
    )


class _Code(NamedTuple):
    """How the answer to one question becomes numbers."""

    name: str
    dimension: Dimension
    choices: dict[Scalar, list[float]]
    """Each 1 away from the others; empty for a range, which becomes a place in [0, 1]."""
    absent: list[float]
    """For what a method lacks: none of the choices."""

    def encode(self, value: Scalar | None) -> list[float]:
        if value is None:
            return self.absent
        return self.choices[value] if self.choices else [place_in_range(self.dimension, value)]


class Encoder:
    """A space's answers to numbers."""

    def __init__(self, space: SearchSpace) -> None:
        self._methods = {name: place for place, name in enumerate(space.methods)}
        self._fixed = {name: method.fixed for name, method in space.methods.items()}
        self._recipe_rates = {name: math.log10(recipe_rate(METHODS[name], space.task_kind)) for name in space.methods}
        shared: dict[str, Dimension] = {}
        choices: dict[str, dict[Scalar, None]] = {}
        for method in space.methods.values():
            searched = {d.name: d for d in method.dimensions if d.name in SHARED and d.name != "learning_rate"}
            shared |= searched
            for name in SHARED:
                if name in searched:
                    choices.setdefault(name, {}).update(dict.fromkeys(searched[name].choices))
                elif name in method.fixed:
                    choices.setdefault(name, {})[method.fixed[name]] = None
        self._shared = [_make_code(name, d, list(choices.get(name, {}))) for name, d in shared.items()]
        self._own = {
            name: [_make_code(f"{name}.{d.name}", d, d.choices) for d in method.dimensions if d.name not in SHARED]
            for name, method in space.methods.items()
        }
        self._num_own = max((sum(len(c.absent) for c in codes) for codes in self._own.values()), default=0)

    def encode(self, answers: Answers) -> Row:
        method = str(answers["method"])
        fixed = self._fixed[method]
        shared: list[float] = []
        for code in self._shared:
            name = f"{method}.{code.name}"
            shared += code.encode(answers[name] if name in answers else fixed.get(code.name))
        own: list[float] = []
        logarithms = []
        for code in self._own[method]:
            value = answers.get(code.name, code.dimension.default)
            own += code.encode(value)
            if code.dimension.kind == "int" and code.dimension.log:
                logarithms.append(math.log(float(value)))
        own += [0.0] * (self._num_own - len(own))
        rate = answers.get(f"{method}.learning_rate", fixed.get("learning_rate"))
        assert rate is not None
        return Row(
            answers,
            self._methods[method],
            math.log10(float(rate)) - self._recipe_rates[method],
            shared,
            own,
            # Where a method has two sizes, each is taken for half of them.
            sum(logarithms) / len(logarithms) if logarithms else 0.0,
        )


def encode_spec(encoder: Encoder, space: SearchSpace, spec: TrialSpec) -> Row | None:
    """None where the space cannot express it."""
    answers = space.params(spec)
    return None if answers is None else encoder.encode(answers)


def _make_code(name: str, dimension: Dimension, choices: Sequence[Scalar]) -> _Code:
    if dimension.kind != "choice":
        return _Code(name, dimension, {}, [0.0])
    codes = {choice: [math.sqrt(0.5) if choice == other else 0.0 for other in choices] for choice in choices}
    return _Code(name, dimension, codes, [0.0] * len(choices))


def place_in_range(dimension: Dimension, value: Scalar) -> float:
    """In [0, 1] of a range's values, by their logarithms where the range is logarithmic."""
    assert dimension.low is not None
    assert dimension.high is not None
    low, high, at = dimension.low, dimension.high, float(value)
    if dimension.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return (at - low) / (high - low) if high > low else 0.0


class Estimates(NamedTuple):
    """Normal, (N,)."""

    means: Floats
    variances: Floats


class _Setting(NamedTuple):
    """Of the kernel. Lengths are how far a setting has to move to make two configurations half strangers."""

    across: float
    """Share of the variance that methods have in common."""
    rate: float
    """In decades of the learning rate."""
    rest: float
    """Times the usual lengths of all others."""
    luck: float
    """Share of the variance that no setting explains, seeds' for one."""


_SETTINGS = tuple(
    _Setting(*values) for values in itertools.product((0.25, 0.6), (0.35, 0.8), (0.7, 1.5, 3.0), (0.03, 0.15))
)
_SIZE_LENGTH = 1.5
"""Decades of the number of parameters."""
_SHARED_LENGTH = 1.5
_OWN_LENGTH = 1.0


_FAILS_RATE = 0.5
"""Decades of the learning rate over which failures to learn go together."""
_FAILS_ACROSS = 0.2
"""How far one method's failure is another's, at most."""
_FAILS_REST = 3.0
"""Times the usual lengths of all other settings."""


class _Distances(NamedTuple):
    """Squares, (N, M)."""

    same: Floats
    """1 where the method is the same."""
    rates: Floats
    rest_shared: Floats
    rest_own: Floats


def _measure(one: Features, sizes: Floats, other: Features, other_sizes: Floats) -> _Distances:
    return _Distances(
        (one.methods[:, None] == other.methods[None, :]).astype(float),
        _squares(one.rates[:, None], other.rates[:, None]),
        _squares(one.shared, other.shared) / _SHARED_LENGTH**2
        + _squares(sizes[:, None], other_sizes[:, None]) / _SIZE_LENGTH**2,
        _squares(one.own, other.own) / _OWN_LENGTH**2,
    )


def _squares(one: Floats, other: Floats) -> Floats:
    squares = (one**2).sum(axis=1)[:, None] + (other**2).sum(axis=1)[None, :] - 2 * one @ other.T
    clipped: Floats = np.maximum(squares, 0.0)
    return clipped


def _correlate(distances: _Distances, setting: _Setting) -> Floats:
    """A sum of what holds for all methods, what holds for one, and what holds for one's own settings."""
    common = np.exp(-0.5 * (distances.rates / setting.rate**2 + distances.rest_shared / setting.rest**2))
    own = common * np.exp(-0.5 * distances.rest_own / setting.rest**2)
    within = distances.same * (1 / 3 + 2 / 3 * own)
    correlations: Floats = setting.across * common + (1 - setting.across) * within
    return correlations


def expect_quality(features: Features, sizes: Floats) -> Floats:
    """(N,) before anything has been tried, up to a constant: by the distance of the learning rate from its method's
    recipe, and by `sizes`, decades of parameters."""
    drop = _DROP * np.clip(np.abs(features.rates) - _NEAR, 0.0, _FAR - _NEAR) ** 2
    expected: Floats = _SLOPE * sizes - drop
    return expected


class QualitySurrogate:
    """Quality, at full length or as first scores forecast it, from what trials have shown of theirs."""

    def __init__(self, features: Features, sizes: Floats, means: Floats, variances: Floats) -> None:
        """`sizes` (N,) are decades of parameters; `means` and `variances` (N,) what each trial's scores say of its
        quality. N is at least 1."""
        self._features, self._sizes = features, sizes
        self._residuals = means - expect_quality(features, sizes)
        self._noise = variances
        weights = 1 / (variances + _LEAST_DEVIATION**2)
        self._centre = float(np.average(self._residuals, weights=weights))
        spread = float(np.average((self._residuals - self._centre) ** 2, weights=weights))
        count = len(means)
        self._variance = (count * spread + PRIOR_COUNT * PRIOR_DEVIATION**2) / (count + PRIOR_COUNT)
        self._residuals = self._residuals - self._centre
        distances = _measure(features, sizes, features, sizes)
        self._setting = self._choose_setting(distances)
        self._condition(distances)

    def believe(self, features: Features, sizes: Floats) -> None:
        """Takes configurations under way to score what is expected of them, so that none like them is tried as well."""
        if not len(sizes):
            return
        means = self.estimate(features, sizes).means - expect_quality(features, sizes) - self._centre
        self._features = Features(*(np.concatenate(pair) for pair in zip(self._features, features, strict=True)))
        self._sizes = np.concatenate([self._sizes, sizes])
        self._residuals = np.concatenate([self._residuals, means])
        self._noise = np.concatenate([self._noise, np.zeros(len(means))])
        self._condition(_measure(self._features, self._sizes, self._features, self._sizes))

    def _choose_setting(self, distances: _Distances) -> _Setting:
        """The likeliest of a few, so that there is nothing to overfit or to fail to converge."""
        count = len(self._residuals)
        rows = np.unique(np.linspace(0, count - 1, min(count, _FIT_ON)).round().astype(int))
        few = _Distances(*(values[np.ix_(rows, rows)] for values in distances))
        noise, seen = self._noise[rows], self._residuals[rows]

        def likelihood(setting: _Setting) -> float:
            factor = np.linalg.cholesky(self._covariance(few, setting, noise))
            whitened = np.linalg.solve(factor, seen)
            return float(-0.5 * whitened @ whitened - np.log(np.diag(factor)).sum())

        return max(_SETTINGS, key=likelihood)

    def _covariance(self, distances: _Distances, setting: _Setting, noise: Floats) -> Floats:
        covariance = self._variance * _correlate(distances, setting)
        covariance[np.diag_indices_from(covariance)] += noise + self._variance * setting.luck
        return covariance

    def _condition(self, distances: _Distances) -> None:
        self._inverse = np.linalg.inv(self._covariance(distances, self._setting, self._noise))
        self._weights = self._inverse @ self._residuals

    def smooth(self) -> Estimates:
        """(N,) of the trials themselves and of those believed: drawn to what others show, the more the less is sure."""
        residuals = self._residuals - self._noise * self._weights
        left = self._noise - self._noise**2 * np.diag(self._inverse)
        means = self._centre + expect_quality(self._features, self._sizes) + residuals
        return Estimates(means, np.maximum(left, 0.0))

    def estimate(self, features: Features, sizes: Floats) -> Estimates:
        """(M,) of configurations not tried yet; their own luck is in the variance."""
        cross = self._variance * _correlate(_measure(self._features, self._sizes, features, sizes), self._setting)
        left = self._variance * (1 + self._setting.luck) - (cross * (self._inverse @ cross)).sum(axis=0)
        means = self._centre + expect_quality(features, sizes) + cross.T @ self._weights
        return Estimates(means, np.maximum(left, 1e-12))


def find_alike(one: Features, sizes: Floats, other: Features, other_sizes: Floats) -> Floats:
    """(N, M) in [0, 1]: how far the other fails to learn where the one has failed: mostly within a method, whatever its
    settings, at learning rates near each other."""
    distances = _measure(one, sizes, other, other_sizes)
    near = np.exp(-0.5 * distances.rates / _FAILS_RATE**2)
    elsewhere = _FAILS_ACROSS * near * np.exp(-0.5 * distances.rest_shared / _FAILS_REST**2)
    alike: Floats = np.where(distances.same > 0, near, elsewhere)
    return alike


def interpolate_costs(features: Features, costs: Floats, rises: Floats, wanted: Features) -> Floats:
    """(M, C) logarithms of 1 + costs of configurations from those of others, (N, C); NaN where one is not known.

    Costs are nearly products of what a method's settings and the shared ones contribute, so their logarithms are nearly
    sums, and the kernel is that of a sum. `rises` (C,) is 1 for costs that go up with a method's sizes in proportion,
    as parameters do, and 0 for others, unless what is known shows otherwise.
    """

    def kernel(one: Features, other: Features) -> Floats:
        same = (one.methods[:, None] == other.methods[None, :]).astype(float)
        shared = _augment(one.shared) @ _augment(other.shared).T
        own = _augment(one.own) @ _augment(other.own).T
        near = np.exp(-0.5 * (_squares(one.own, other.own) + _squares(one.shared, other.shared)) / _OWN_LENGTH**2)
        products: Floats = shared + same * (1 + 4 * own + shared + 0.1 * near)
        return products

    interpolated = np.full((len(wanted.methods), costs.shape[1]), np.nan)
    for column in range(costs.shape[1]):
        rows = np.flatnonzero(np.isfinite(costs[:, column]))
        if not len(rows):
            continue
        known = features.choose(rows)
        left = costs[rows, column] - known.widths * rises[column]
        centre = left.mean()
        gram = kernel(known, known)
        gram[np.diag_indices_from(gram)] += 1e-4
        interpolated[:, column] = centre + kernel(wanted, known) @ np.linalg.solve(gram, left - centre)
        interpolated[:, column] += wanted.widths * rises[column]
    # A cost is no less than nothing, of which the logarithm here is 0; far from what is known a sum may be.
    possible: Floats = np.maximum(interpolated, 0.0)
    return possible


def _augment(values: Floats) -> Floats:
    return np.column_stack([values, np.full(len(values), 0.5)])
