"""What going on is worth: the expected growth of the front's hypervolume per second.

Costs are exact before training, or nearly so, and only quality is uncertain. What is believed of it joins a trial's own
scores, carried forward by how trials grow (`gain.py`), with what configurations like it have shown (`surrogate.py`). A
configuration not started yet is believed on the second alone.

A stretch ends in a score, after which one may stop, be the trial new or paused. So it is worth the highest price per
second at which it still pays: with gain G(q) once the score has shown quality to be q, t seconds to that score and T
from there to the end,

    max over sets of outcomes S:  E[G(q); q in S] / (t + P(q in S) T),

as of a box that costs t to open (Weitzman, Econometrica 47, 1979). Promotions and new trials are compared by these
prices, so that breadth and depth need no rule of their own.

A space never runs out, so that a first score which is thought to tell more than it does is bought over and over. What
it tells is therefore bounded by how much of it is news where others like it have theirs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.records import Bits, Cost, Failed, RungScore, TrialSource, TrialSpec
from autopeft.search.front import (
    OBJECTIVES,
    cost_value,
    find_first_layers,
    find_nondominated,
    scale_cost,
    scale_quality,
)
from autopeft.search.gain import QUANTILES, Forecast, GrowthModel, expected_improvement
from autopeft.search.lengths import next_rung
from autopeft.search.speed import Kind, Speed, kind_of
from autopeft.search.store import Trial
from autopeft.search.surrogate import (
    PRIOR_COUNT,
    PRIOR_DEVIATION,
    Answers,
    Features,
    QualitySurrogate,
    Row,
    expect_quality,
    find_alike,
    interpolate_costs,
    stack,
)

Floats = npt.NDArray[np.float64]

QUALITY_EVERY = 5
"""Of so many stretches one goes by quality whatever it costs. The hypervolume gives nothing to what costs as much as
its reference, full fine-tuning foremost, and little to what costs nearly that much: without turns of its own the
accurate end of the front would be found last or never."""
_MOST_OBSERVED = 300
"""Trials that the surrogate learns from; more only make it slower."""
_NUM_PARENTS = 32
_DIVERGED_DEVIATION = 0.03


class Newcomer(NamedTuple):
    """A configuration that could be started."""

    kind: Kind
    row: Row | None
    """None where the space cannot express it."""
    spec: TrialSpec | None = None
    """Where it has been made already."""
    source: TrialSource = "sampler"
    cost: Cost | None = None
    """Interpolated from others' where it is not known."""


class _Beliefs(NamedTuple):
    """Of N configurations' qualities at full length: normal."""

    means: Floats
    variances: Floats


class _Learned(NamedTuple):
    surrogate: QualitySurrogate
    joined: dict[int, Forecast]
    """By trial number: its own scores and what others like it have shown."""


class _Stretches(NamedTuple):
    """N stretches of training, each to the next score."""

    kinds: Sequence[Kind]
    steps: Sequence[int]
    """From where, 0 for what is new."""


class _Told(NamedTuple):
    """(N,) each, what scores tell of the ends."""

    before: Floats
    """Deviations of the forecasts from the last scores, infinite where there is none."""
    surprises: Floats
    """Variances of what the next scores may forecast: the most that they can show."""


class _Expressed(NamedTuple):
    """Those of N configurations that the space can express."""

    places: list[int]
    features: Features
    sizes: Floats
    """Decades of parameters."""


class _Times(NamedTuple):
    """(N,) seconds, or steps where nothing may depend on a clock: to the next score, and from there to the end."""

    to_score: Floats
    to_end: Floats


class Appraiser:
    """Prices of stretches in one state of a study, whatever the order of its trials."""

    def __init__(
        self,
        trials: Sequence[Trial],
        rungs: Sequence[int],
        reference: Mapping[str, float],
        speed: Speed,
        *,
        is_clocked: bool,
        has_learned: Callable[[RungScore], bool],
        rows: Mapping[int, Row | None] | None = None,
        most: Mapping[str, float] | None = None,
        held: Bits | None = None,
    ) -> None:
        """`reference` is the hypervolume's, with every objective. Without a clock in the budget (`is_clocked`) nothing
        may depend on one. `has_learned` tells whether a score clearly beats what no learning gives. `rows` are trials
        in the space's terms, by number; without them configurations that were never scored are believed to score as
        others do. What costs more than `most` is worth nothing. `held` is the width of the one base that the worker in
        question holds; to train on another takes the time to load it."""
        self._trials = sorted(trials, key=_content)
        self._rungs = tuple(rungs)
        self._reference = reference
        self._objectives = [name for name in OBJECTIVES[1:] if name in reference]
        self._speed = speed
        self._is_clocked = is_clocked
        self._has_learned = has_learned
        self._rows = rows or {}
        self._most = most or {}
        self._held: Bits | None = held

    @cached_property
    def is_turn_of_quality(self) -> bool:
        scores = [score for trial in self._trials for score in trial.rungs]
        if scores and not any(map(self._has_learned, scores)):
            # The cheapest promise most as long as all are thought to learn, and on a hard task they learn last.
            return True
        stretches = sum(len(trial.rungs) + (trial.state == "running") for trial in self._trials)
        return stretches % QUALITY_EVERY == QUALITY_EVERY - 1

    def price_paused(self, trials: Sequence[Trial], *, by_quality: bool = False) -> Floats:
        """(N,) of scored trials below their end; `by_quality` whatever they cost."""
        if not trials:
            return np.zeros(0)
        params = np.array([float(trial.cost.trainable_parameters) for trial in trials if trial.cost is not None])
        hopes = self._find_hopes(_express([self._rows.get(trial.number) for trial in trials], params), len(trials))
        return self._price(
            _Stretches([kind_of(trial.spec) for trial in trials], [trial.step for trial in trials]),
            self._believe_scored(trials),
            _Told(
                np.array([self._growth.deviation_at(trial.step) for trial in trials]),
                np.full(len(trials), math.inf),
            ),
            np.array([self._scale(trial.cost) for trial in trials if trial.cost is not None]),
            self._find_had("complete", "running"),
            np.where([self._has_learned(trial.rungs[-1]) for trial in trials], 1.0, hopes),
            by_quality=by_quality,
        )

    def price_new(self, newcomers: Sequence[Newcomer], *, by_quality: bool = False) -> Floats:
        """(N,) of configurations not started; 0 for what costs too much. `by_quality` whatever they cost."""
        if not newcomers:
            return np.zeros(0)
        costs = self._cost_new(newcomers)
        scaled = [[scale_cost(name, value, self._reference) for value in costs[name]] for name in self._objectives]
        known = _express([newcomer.row for newcomer in newcomers], costs["params"])
        prices = self._price(
            _Stretches([new.kind for new in newcomers], [0] * len(newcomers)),
            self._believe_new(known, len(newcomers)),
            _Told(np.full(len(newcomers), math.inf), self._find_surprises(known, len(newcomers))),
            np.array(scaled).reshape(len(self._objectives), len(newcomers)).T,
            # What is paused can be had by going on with it: something new has to add to that.
            self._find_had("complete", "running", "paused"),
            self._find_hopes(known, len(newcomers)),
            by_quality=by_quality,
        )
        for name, most in self._most.items():
            prices[costs[name] > most] = 0.0
        return prices

    def find_parents(self) -> list[Answers]:
        """What promises most so far, the best front first: where to look for more."""
        over = ("stopped", "failed", "refused")
        known = [trial for trial in self._observed if trial.rungs and trial.state not in over]
        points = np.array([self._points[trial.number] for trial in known]).reshape(
            len(known), 1 + len(self._objectives)
        )
        parents = [self._rows.get(known[place].number) for place in find_first_layers(points, _NUM_PARENTS)]
        return [row.answers for row in parents if row is not None]

    # --- beliefs

    @cached_property
    def _growth(self) -> GrowthModel:
        return GrowthModel(self._trials, self._rungs)

    @cached_property
    def _forecasts(self) -> dict[int, Forecast]:
        """By trial number; of what diverged, that it is no better than the reference."""
        found = {}
        for trial in self._trials:
            if _has_diverged(trial):
                found[trial.number] = Forecast(self._reference["quality"], _DIVERGED_DEVIATION)
            elif trial.rungs and trial.cost is not None:
                found[trial.number] = self._growth.forecast(trial)
        return found

    @cached_property
    def _points(self) -> dict[int, list[float]]:
        """Where trials are expected to end, scaled."""
        return {
            trial.number: [scale_quality(self._forecasts[trial.number].mean, self._reference), *self._scale(trial.cost)]
            for trial in self._trials
            if trial.number in self._forecasts and trial.cost is not None
        }

    @cached_property
    def _observed(self) -> list[Trial]:
        """What the surrogate learns from: the front, and of more than enough others an even choice."""
        known = [trial for trial in self._trials if trial.number in self._points]
        if len(known) <= _MOST_OBSERVED:
            return known
        alive = [place for place, trial in enumerate(known) if trial.state in ("running", "paused", "complete")]
        front = find_nondominated(np.array([self._points[known[place].number] for place in alive]))
        chosen = [place for place, is_best in zip(alive, front, strict=True) if is_best][:_MOST_OBSERVED]
        rest = sorted(set(range(len(known))) - set(chosen))
        count = _MOST_OBSERVED - len(chosen)
        chosen += [rest[turn * len(rest) // count] for turn in range(count)]
        return [known[place] for place in sorted(chosen)]

    @cached_property
    def _learned(self) -> _Learned | None:
        """None where nothing that the space can express has been scored."""
        seen = self._expressible(self._observed)
        if not seen:
            return None
        forecasts = [self._forecasts[trial.number] for trial, _ in seen]
        surrogate = QualitySurrogate(
            *_describe(seen),
            np.array([forecast.mean for forecast in forecasts]),
            np.array([forecast.deviation**2 for forecast in forecasts]),
        )
        joined = {
            trial.number: Forecast(float(mean), math.sqrt(float(variance)))
            for (trial, _), mean, variance in zip(seen, *surrogate.smooth(), strict=True)
        }
        self._believe_pending(surrogate)
        return _Learned(surrogate, joined)

    @cached_property
    def _foreseen(self) -> QualitySurrogate | None:
        """Forecasts from first scores; None where nothing that the space can express has one."""
        seen = [(trial, row) for trial, row in self._expressible(self._observed) if trial.rungs]
        if not seen:
            return None
        firsts = [trial.rungs[0] for trial, _ in seen]
        surrogate = QualitySurrogate(
            *_describe(seen),
            np.array([self._growth.forecast_from(score).mean for score in firsts]),
            np.array([self._growth.measure(score).deviation ** 2 for score in firsts]),
        )
        self._believe_pending(surrogate)
        return surrogate

    def _believe_pending(self, surrogate: QualitySurrogate) -> None:
        pending = self._expressible([t for t in self._trials if t.state == "running" and not t.rungs and t.cost])
        if pending:
            surrogate.believe(*_describe(pending))

    def _expressible(self, trials: Sequence[Trial]) -> list[tuple[Trial, Row]]:
        return [(trial, row) for trial in trials if (row := self._rows.get(trial.number)) is not None]

    def _believe_scored(self, trials: Sequence[Trial]) -> _Beliefs:
        joined = {} if self._learned is None else self._learned.joined | self._join_others(self._learned, trials)
        forecasts = [joined.get(trial.number, self._forecasts[trial.number]) for trial in trials]
        return _Beliefs(
            np.array([forecast.mean for forecast in forecasts]),
            np.array([forecast.deviation**2 for forecast in forecasts]),
        )

    def _join_others(self, learned: _Learned, trials: Sequence[Trial]) -> dict[int, Forecast]:
        """Of trials that the surrogate did not learn from, by number: their own scores beside what it expects."""
        others = self._expressible([trial for trial in trials if trial.number not in learned.joined])
        if not others:
            return {}
        joined = {}
        for (trial, _), mean, variance in zip(others, *learned.surrogate.estimate(*_describe(others)), strict=True):
            own = self._forecasts[trial.number]
            share = variance / (variance + own.deviation**2)
            joined[trial.number] = Forecast(
                float(mean + share * (own.mean - mean)), own.deviation * math.sqrt(float(share))
            )
        return joined

    def _believe_new(self, known: _Expressed | None, count: int) -> _Beliefs:
        qualities = [forecast.mean for forecast in self._forecasts.values()]
        centre = float(np.mean(qualities)) if qualities else (1 + self._reference["quality"]) / 2
        means = np.full(count, centre)
        squares = float(np.sum((np.array(qualities) - centre) ** 2)) + PRIOR_COUNT * PRIOR_DEVIATION**2
        variances = np.full(count, squares / (len(qualities) + PRIOR_COUNT))
        if known is not None:
            if self._learned is not None:
                estimates = self._learned.surrogate.estimate(known.features, known.sizes)
                means[known.places], variances[known.places] = estimates
            else:
                expected = expect_quality(known.features, known.sizes)
                means[known.places] += expected - expected.mean()
        return _Beliefs(means, variances)

    # --- costs

    def _scale(self, cost: Cost | None) -> list[float]:
        assert cost is not None
        return [scale_cost(name, cost_value(cost, name), self._reference) for name in self._objectives]

    def _cost_new(self, newcomers: Sequence[Newcomer]) -> dict[str, Floats]:
        """By objective, parameters and memory always among them. What is like nothing known costs as the reference."""
        names = list(dict.fromkeys(["params", "vram", *self._objectives]))
        values = np.array(
            [
                [math.nan if newcomer.cost is None else cost_value(newcomer.cost, name) for name in names]
                for newcomer in newcomers
            ]
        )
        values[~np.isfinite(values)] = math.nan
        unknown = np.isnan(values).any(axis=1)
        lacking = [place for place, newcomer in enumerate(newcomers) if unknown[place] and newcomer.row is not None]
        sources = [*self._costed, *((new.row, new.cost) for new in newcomers if new.row and new.cost)]
        if lacking and sources:
            known = np.array([[cost_value(cost, name) for name in names] for _, cost in sources])
            found = interpolate_costs(
                stack([row for row, _ in sources]),
                np.log1p(np.where(np.isfinite(known), known, math.nan)),
                np.array([1.0 if name in ("params", "size") else 0.0 for name in names]),
                stack([row for place in lacking if (row := newcomers[place].row) is not None]),
            )
            values[lacking] = np.where(np.isnan(values[lacking]), np.expm1(found), values[lacking])
        worst = np.array([self._reference.get(name, math.nan) for name in names])
        values = np.where(np.isnan(values), worst, values)
        # Without an objective of its own a cost may still be unknown; it then counts for nothing.
        return dict(zip(names, np.nan_to_num(values, nan=0.0).T, strict=True))

    @cached_property
    def _costed(self) -> list[tuple[Row, Cost]]:
        """What costs are interpolated from, as thinly as trials are observed."""
        known = [(row, trial.cost) for trial, row in self._expressible(self._trials) if trial.cost is not None]
        if len(known) <= _MOST_OBSERVED:
            return known
        return [known[turn * len(known) // _MOST_OBSERVED] for turn in range(_MOST_OBSERVED)]

    # --- prices

    def _find_had(self, *states: str) -> Floats:
        """(P, objectives): where trials in these states have ended or are expected to."""
        rows = [
            self._points[trial.number]
            for trial in self._trials
            if trial.state in states and trial.number in self._points
        ]
        return np.array(rows, dtype=float).reshape(len(rows), 1 + len(self._objectives))

    def _price(
        self,
        stretches: _Stretches,
        beliefs: _Beliefs,
        told: _Told,
        costs: Floats,
        had: Floats,
        hopes: Floats,
        *,
        by_quality: bool,
    ) -> Floats:
        """(N,) each. The next score's forecast takes the place of the last one's, and what likeness has shown stays."""
        times = self._time(stretches)
        nexts = np.array([self._growth.deviation_at(next_rung(step, self._rungs)) for step in stretches.steps])
        likeness = np.maximum(_precision(np.sqrt(beliefs.variances)) - _precision(told.before), 0.0)
        left = np.minimum(1 / (likeness + _precision(nexts)), beliefs.variances)
        # As far as a belief moves with a forecast, and no farther than forecasts differ.
        moved = np.maximum(1 - left / np.maximum(beliefs.variances, 1e-12), 1e-12)
        left = np.maximum(left, beliefs.variances - moved**2 * told.surprises)
        if by_quality:
            costs, had = costs[:, :0], had[:, :1]
        means, shown = self._scale_beliefs(beliefs.means, beliefs.variances - left)
        _, deviations = self._scale_beliefs(beliefs.means, left)
        # What the score may make of the mean, and the gain that is then expected.
        count = len(QUANTILES)
        outcomes = means + np.multiply.outer(QUANTILES, shown)
        ordered = -np.sort(-expected_improvement(outcomes, deviations, costs, had), axis=0)
        # Going on after the best outcomes only, as many of them as pay.
        shares = np.arange(1, count + 1)[:, None] / count
        prices = np.cumsum(ordered, axis=0) / count / (times.to_score + shares * times.to_end)
        dearest: Floats = prices.max(axis=0) * hopes
        return dearest

    def _find_surprises(self, known: _Expressed | None, count: int) -> Floats:
        """(count,) variances of the forecasts from first scores, of configurations not started: what those like them
        had will be nearly theirs, and shows nothing new, however little it tells of the end."""
        surprises = np.full(count, math.inf)
        if known is not None and self._foreseen is not None:
            surprises[known.places] = self._foreseen.estimate(known.features, known.sizes).variances
        return surprises

    def _find_hopes(self, known: _Expressed | None, count: int) -> Floats:
        """(count,) shares of those alike, one more that did counted in, that had learned something at their end.

        Qualities below what no learning gives do not exist, so that beliefs, which are normal, always give some chance
        to what is cheap. Where nothing has learned, there is little.
        """
        hopes = np.ones(count)
        ended = self._expressible([t for t in self._trials if t.state == "complete" and t.cost is not None])
        if ended and known is not None:
            alike = find_alike(*_describe(ended), known.features, known.sizes)
            learned = np.array([self._has_learned(trial.rungs[-1]) for trial, _ in ended], dtype=float)
            hopes[known.places] = (1 + learned @ alike) / (1 + alike.sum(axis=0))
        return hopes

    def _scale_beliefs(self, means: Floats, variances: Floats) -> tuple[Floats, Floats]:
        scale = 1 - self._reference["quality"]
        return 1 - (means - self._reference["quality"]) / scale, np.sqrt(np.maximum(variances, 0.0)) / scale

    def _time(self, stretches: _Stretches) -> _Times:
        first, rest = [], []
        for kind, step in zip(*stretches, strict=True):
            rung = next_rung(step, self._rungs)
            seconds = self._speed.predict(kind, rung - step, unseen=statistics.median) if self._is_clocked else 0.0
            if seconds > 0:
                first.append(seconds + self._speed.predict_load(kind.bits, self._held))
                rest.append(self._speed.predict_to_end(kind, rung, self._rungs, unseen=statistics.median))
            else:
                # Before the first stretch a clock has told nothing.
                first.append(float(rung - step))
                rest.append(float(self._rungs[-1] - rung))
        return _Times(np.array(first), np.array(rest))


def _precision(deviations: Floats) -> Floats:
    precisions: Floats = 1 / np.maximum(deviations**2, 1e-12)
    return precisions


def _has_diverged(trial: Trial) -> bool:
    return isinstance(trial.outcome, Failed) and trial.outcome.reason == "diverged" and trial.cost is not None


def _content(trial: Trial) -> tuple[object, ...]:
    """Sorts trials whatever their numbers."""
    cost = trial.cost
    costs = (0, 0) if cost is None else (cost.peak_vram_bytes, cost.trainable_parameters)
    loss = trial.rungs[-1].loss if trial.rungs else 0.0
    return (trial.spec.method, trial.spec.learning_rate, *costs, trial.spec.bits, trial.step, loss)


def _describe(seen: Sequence[tuple[Trial, Row]]) -> tuple[Features, Floats]:
    """Of trials whose costs are known, at least one, with their decades of parameters."""
    counts = [float(trial.cost.trainable_parameters) for trial, _ in seen if trial.cost is not None]
    return stack([row for _, row in seen]), _decades(counts)


def _express(rows: Sequence[Row | None], params: Floats) -> _Expressed | None:
    """None where the space can express none."""
    places = [place for place, row in enumerate(rows) if row is not None]
    if not places:
        return None
    return _Expressed(places, stack([row for row in rows if row is not None]), _decades(params[places]))


def _decades(counts: Sequence[float] | Floats) -> Floats:
    decades: Floats = np.log10(1 + np.asarray(counts, dtype=float))
    return decades
