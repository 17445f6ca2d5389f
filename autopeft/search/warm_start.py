"""What to try first, by what did well elsewhere: a portfolio from other studies, leaderboards, or the shipped priors.

The rule. Every configuration that a source trained to its full length is moved into the new space (`move_spec`); those
that the space cannot hold are left out. Each source is scaled to a hypervolume of its own: quality from what always
answering the most frequent label gives to the best that was seen, costs as shares of the dearest that was trained.
Then the configuration is taken that adds most to the hypervolume, averaged over the sources, then the one that adds
most to that, and so on (greedy maximization of a submodular function: at least 1 - 1/e of what the best portfolio of
that size has, doi:10.1007/BF01588971). Methods differ along a front, so the portfolio is diverse where that pays, and
what a configuration lacks to the front of its source, its regret, is what it fails to add. A source whose best is
hardly better than always answering the most frequent label shows nothing.

What a configuration is worth on a source is the mean of what was trained there, weighted by nearness: others of the
same method count the less the farther their settings are. So a lucky score is drawn towards its neighbours, and one
source's configuration can be judged on the others. Where nothing is near, it is worth nothing there.

Only the choice is taken over. Scores of other studies enter neither rungs, fronts nor what the surrogate learns from.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.errors import SpecError
from autopeft.methods import METHODS, fill_settings, refuse_spec
from autopeft.methods.base import Dimension
from autopeft.records import Scalar, TaskKind, TrialSpec, WarmStart, from_record
from autopeft.search.front import Points
from autopeft.search.gain import expected_improvement
from autopeft.spaces.dimensions import default_dimensions, widest_bits
from autopeft.spaces.space import SHARED, MethodSpace, SearchSpace, is_open, make_spec, spec_values

PRIORS = Path(__file__).parent / "priors.json"
"""Made from the leaderboards of the repository: `python -m autopeft.report.priors`."""

MOST_FIRST = 3
"""Configurations of a portfolio. More of them would wait longer for what the new task itself shows."""
_LEAST_GAIN = 1e-4
"""Of the hypervolume: below, a configuration repeats what the portfolio has."""
_BANDWIDTH = 0.15
"""Of nearness, in widths of a method's ranges: half a decade of learning rate, where the range is two, halves it."""
_NEAR = 0.05
"""The least nearness that says anything."""
_LEAST_LEAD = 0.03
"""Of a source's best over what no learning gives: two standard errors of an accuracy near one half on 1,000 examples,
which is as many as are scored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """A configuration at its full length, and what came of it."""

    spec: TrialSpec
    quality: float
    """On search-validation, mean over seeds."""
    num_seeds: int
    peak_vram_bytes: int
    trainable_parameters: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What was trained on one version of a task and a model."""

    title: str
    task_name: str
    model: str
    majority_quality: float
    trained: tuple[Trained, ...]
    task_kind: TaskKind = field(default="classification", metadata={"leave_out_default": True})


class _Candidate(NamedTuple):
    """A configuration of the new space."""

    spec: TrialSpec
    costs: npt.NDArray[np.float64]
    """(cost objectives,) as shares of the dearest of its source."""


class _Measured(NamedTuple):
    """A source in the new space."""

    specs: list[TrialSpec]
    shortfalls: npt.NDArray[np.float64]
    """(N,) of quality: 0 for the source's best, 1 for no better than the most frequent label."""
    weights: npt.NDArray[np.float64]
    """(N,) seeds."""


@cache
def read_priors() -> tuple[Source, ...]:
    """The shipped sources."""
    return tuple(decode_sources(json.loads(PRIORS.read_text(encoding="utf-8")), PRIORS.name))


def decode_sources(data: list[object], where: str) -> list[Source]:
    """Sources of an earlier autopeft too: methods may have gained settings since, or gone."""
    return [from_record(Source, item, f"{where}[{i}]") for i, item in enumerate(data)]


def choose_first(
    sources: Sequence[Source], space: SearchSpace, *, objectives: Sequence[str], max_steps: int, seed: int
) -> WarmStart:
    """The portfolio of the module's docstring, of at most `MOST_FIRST`; in it the order of the sources plays no part.

    Raises SpecError where no source has learned anything or no configuration of theirs fits the space, and for sources
    of the other kind of task, which is trained at other learning rates.
    """
    for source in sources:
        if source.task_kind != space.task_kind:
            raise SpecError(
                f"--warm-start takes what did well in tasks of the same kind, here {space.task_kind}, but "
                f"{source.title} is of {source.task_kind}. Leave it away, or name other studies."
            )
    named = ", ".join(sorted(source.title for source in sources))
    sources = [source for source in sources if _has_learned(source)]
    if not sources:
        raise SpecError(
            f"--warm-start takes what did well elsewhere, but nothing that was trained to its full length in {named} "
            "is clearly better than what no learning gives. Leave it away, or name other studies."
        )
    candidates: dict[str, _Candidate] = {}
    measured = []
    for source in sorted(sources, key=lambda source: (source.title, source.task_name, source.model)):
        moved = [
            (trained, spec)
            for trained in sorted(source.trained, key=_order)
            if (spec := move_spec(trained.spec, space, max_steps=max_steps, seed=seed)) is not None
        ]
        for trained, spec in moved:
            candidates.setdefault(spec.key(), _Candidate(spec, _scale_costs(trained, source, objectives)))
        if moved:
            measured.append(_measure(source, moved))
    if not candidates:
        raise SpecError(
            f"--warm-start takes configurations that fit the search space '{space.name}', but of the "
            f"{sum(len(source.trained) for source in sources)} that its sources have trained none does: they have "
            f"{', '.join(sorted({t.spec.method for s in sources for t in s.trained})) or 'nothing'}, and the space "
            f"{', '.join(space.methods)}. Leave it away, or name other studies."
        )
    first = _choose_portfolio([candidates[key] for key in sorted(candidates)], measured, space.device_kind)
    return WarmStart(
        sources=tuple(sorted(source.title for source in sources)),
        first=tuple(first),
        weighed=tuple(sorted({spec.method for source in measured for spec in source.specs})),
    )


def _has_learned(source: Source) -> bool:
    return max((each.quality for each in source.trained), default=0.0) >= source.majority_quality + _LEAST_LEAD


def _order(trained: Trained) -> tuple[str, int, int, float, int]:
    costs = trained.peak_vram_bytes, trained.trainable_parameters
    return trained.spec.key(), *costs, trained.quality, trained.num_seeds


def move_spec(spec: TrialSpec, space: SearchSpace, *, max_steps: int, seed: int) -> TrialSpec | None:
    """The configuration as the space can express it, or None.

    Numbers, such as the learning rate and sizes, move to the nearest that the space offers; the unquantized width is
    that of the space's device. How all are trained (batch size, schedule and the like) is the space's where it is
    fixed. Any other choice, such as target modules, has to be offered.
    """
    offered = space.methods.get(spec.method)
    if offered is None:
        return None
    try:
        values = _move_values(spec_values(fill_settings(spec)), offered, space.device_kind)
        if values is None:
            return None
        moved = make_spec(spec.method, values, max_steps=max_steps, seed=seed)
    except SpecError:
        return None
    fits = space.params(moved) is not None and refuse_spec(moved, space.device_kind) is None
    return moved if fits else None


_TRAINING = frozenset(SHARED) - {"learning_rate", "target_modules", "bits"}
"""How any method is trained; a space that fixes them speaks for all its trials."""


def _move_values(given: Mapping[str, Scalar], offered: MethodSpace, device_kind: str) -> dict[str, Scalar] | None:
    given = dict(given)
    if given["bits"] in (16, 32):
        given["bits"] = widest_bits(device_kind)
    values = dict(offered.fixed)
    for name, fixed in offered.fixed.items():
        if name not in _TRAINING and not _is_number(fixed) and given.get(name, fixed) != fixed:
            return None
    for dimension in offered.dimensions:
        if not is_open(dimension, values):
            values[dimension.name] = dimension.default
            continue
        value = _move_value(given.get(dimension.name, dimension.default), dimension)
        if value is None:
            return None
        values[dimension.name] = value
    return values


def _move_value(value: Scalar, dimension: Dimension) -> Scalar | None:
    """The nearest that is offered; None where a choice that is no number is not."""
    if dimension.contains(value):
        return value
    if not _is_number(value):
        return None
    if dimension.kind != "choice":
        assert dimension.low is not None
        assert dimension.high is not None
        clipped = min(max(float(value), dimension.low), dimension.high)
        return round(clipped) if dimension.kind == "int" else clipped
    numbers = [choice for choice in dimension.choices if _is_number(choice)]
    return min(numbers, key=lambda choice: abs(float(choice) - float(value)), default=None)


def _is_number(value: Scalar) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- what sources say


def _scale_costs(trained: Trained, source: Source, objectives: Sequence[str]) -> npt.NDArray[np.float64]:
    """As in a study's hypervolume: memory linear, parameters logarithmic, 1 at the dearest that was trained.

    Sources keep no other cost. An adapter's size goes with its parameters; latency is left out.
    """
    most_bytes = max(other.peak_vram_bytes for other in source.trained)
    most_parameters = max(other.trainable_parameters for other in source.trained)
    shares = {
        "vram": trained.peak_vram_bytes / max(most_bytes, 1),
        "params": math.log1p(trained.trainable_parameters) / math.log1p(max(most_parameters, 1)),
    }
    wanted = {"params" if name == "size" else name for name in objectives}
    return np.array([share for name, share in shares.items() if name in wanted])


def _measure(source: Source, moved: Sequence[tuple[Trained, TrialSpec]]) -> _Measured:
    best = max(trained.quality for trained in source.trained)
    height = best - source.majority_quality
    return _Measured(
        specs=[spec for _, spec in moved],
        shortfalls=np.array([min(1.0, (best - trained.quality) / height) for trained, _ in moved]),
        weights=np.array([float(trained.num_seeds) for trained, _ in moved]),
    )


def _choose_portfolio(
    candidates: Sequence[_Candidate], sources: Sequence[_Measured], device_kind: str
) -> list[TrialSpec]:
    # Free of charge, and what costs all that was ever paid, would both have no volume: a little more is the reference.
    costs = np.array([candidate.costs for candidate in candidates]).reshape(len(candidates), -1) / 1.1
    worth = [_judge(candidates, source, device_kind) for source in sources]
    had: list[Points] = [np.empty((0, 1 + costs.shape[1])) for _ in sources]
    chosen: list[int] = []
    certain = np.zeros(len(candidates))
    while len(chosen) < min(MOST_FIRST, len(candidates)):
        gains = np.mean(
            [
                expected_improvement(shortfalls, certain, costs, points)
                for shortfalls, points in zip(worth, had, strict=True)
            ],
            axis=0,
        )
        gains[chosen] = -1.0
        best = int(np.argmax(gains))
        if gains[best] < _LEAST_GAIN:
            break
        chosen.append(best)
        had = [
            np.vstack([points, [shortfalls[best], *costs[best]]]) for shortfalls, points in zip(worth, had, strict=True)
        ]
    return [candidates[index].spec for index in chosen]


def _judge(candidates: Sequence[_Candidate], source: _Measured, device_kind: str) -> npt.NDArray[np.float64]:
    """(N,) shortfall that each candidate is expected to have on the source; 1, which adds nothing, where nothing of
    the kind was trained there."""
    expected = np.ones(len(candidates))
    for index, candidate in enumerate(candidates):
        nearness = np.array([_nearness(candidate.spec, spec, device_kind) for spec in source.specs])
        if nearness.max() >= _NEAR:
            weights = nearness * source.weights
            expected[index] = float(np.sum(weights * source.shortfalls) / np.sum(weights))
    return expected


def _nearness(one: TrialSpec, other: TrialSpec, device_kind: str) -> float:
    """1 for the same settings, 0 for another method."""
    if one.method != other.method:
        return 0.0
    dimensions = default_dimensions(METHODS[one.method], device_kind)
    first, second = spec_values(one), spec_values(other)
    squares = sum(
        _difference(dimensions[name], first[name], second[name]) ** 2 for name in first if first[name] != second[name]
    )
    return math.exp(-squares / (2 * _BANDWIDTH**2))


def _difference(dimension: Dimension, one: Scalar, other: Scalar) -> float:
    """In widths of the method's own range; a choice that differs is as far as three tenths of one."""
    if dimension.kind == "choice":
        return 0.3
    assert dimension.low is not None
    assert dimension.high is not None
    low, high, a, b = float(dimension.low), float(dimension.high), float(one), float(other)
    if dimension.log:
        low, high, a, b = (math.log(value) for value in (low, high, a, b))
    return abs(a - b) / (high - low) if high > low else 0.0
