"""Optuna's multivariate TPE in the place of our own choice, asked through a study made anew from the history each time.

The history holds paused trials at their last rung, with the missing share of training as a constraint. Asking the
stored study itself would show TPE only finished trials, and its constant liar would drive it away from every trial that
is paused because it is good. A study made anew also makes each answer a function of (history, seed) alone, so a resumed
search decides as an uninterrupted one would.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import optuna

from autopeft.methods import refuse_spec
from autopeft.records import Scalar, TrialSpec
from autopeft.search.distributions import distributions, optuna_directions
from autopeft.search.front import cost_vector, find_first_layers
from autopeft.search.store import Trial
from autopeft.spaces.space import SearchSpace

_STARTUP_TRIALS = 10
"""TPE answers at random below this many observations (its default)."""
_ATTEMPTS = 50
_MOST_OBSERVATIONS = 300
"""TPE models its best 25 and all the rest; more of the rest only make it slower (0.85 s a question at 2,000)."""


class Observation(NamedTuple):
    """What is known of a trial that the space can express."""

    params: dict[str, Scalar]
    values: tuple[float, ...] | None
    """In the objectives' order; None where it was never scored."""
    missing: float
    """Share of the full length not trained, in [0, 1]; above 0 for what was stopped or failed."""


def observe(space: SearchSpace, trials: Sequence[Trial], objectives: Sequence[str]) -> list[Observation]:
    history = []
    for trial in trials:
        params = space.params(trial.spec)
        if params is None or trial.state == "waiting":
            continue
        values = None
        if trial.rungs and trial.cost is not None:
            values = (trial.rungs[-1].quality, *cost_vector(trial.cost, objectives))
        missing = 1 - trial.step / trial.spec.max_steps if values is not None else 1.0
        history.append(Observation(params, values, missing))
    return history


def suggest_spec(
    space: SearchSpace,
    history: Sequence[Observation],
    *,
    objectives: Sequence[str],
    known: set[str],
    max_steps: int,
    seed: int,
    number: int,
) -> TrialSpec | None:
    """A configuration that is new (`known` holds keys) and that the machine can train; None where none was found."""
    directions = optuna_directions(objectives)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            n_startup_trials=_STARTUP_TRIALS, multivariate=True, group=True, constant_liar=False,
            seed=int(np.random.SeedSequence([seed, number]).generate_state(1)[0]),
        )  # fmt: skip
        study = optuna.create_study(directions=directions, sampler=sampler)
        study.add_trials([_freeze(space, observation, len(objectives)) for observation in thin_history(history)])
        for _ in range(_ATTEMPTS):
            trial = study.ask()
            spec = space.suggest(trial, max_steps=max_steps, seed=seed)
            if spec.key() not in known and refuse_spec(spec, space.device_kind) is None:
                return spec
            # Forbidden by a rule or tried before: known to the sampler as infeasible, so that it looks elsewhere.
            trial.set_constraint("missing", 1.0)
            study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    return None


def thin_history(history: Sequence[Observation]) -> list[Observation]:
    """At most `_MOST_OBSERVATIONS`, in their order: what TPE would take for the best, and an even choice of the rest.

    The best are the complete ones, layer by layer of what dominates what, and then those that lack least.
    """
    if len(history) <= _MOST_OBSERVATIONS:
        return list(history)
    most = _MOST_OBSERVATIONS // 2
    best = _find_layers([i for i, seen in enumerate(history) if seen.missing <= 0], history, most)
    incomplete = [i for i, seen in enumerate(history) if seen.missing > 0]
    best += sorted(incomplete, key=lambda i: history[i].missing)[: most - len(best)]
    rest = sorted(set(range(len(history))) - set(best))
    count = _MOST_OBSERVATIONS - len(best)
    chosen = {*best, *(rest[i * len(rest) // count] for i in range(count))}
    return [history[i] for i in sorted(chosen)]


def _find_layers(numbers: Sequence[int], history: Sequence[Observation], most: int) -> list[int]:
    """Layer by layer until there are `most`."""
    left = np.array([i for i in numbers if history[i].values is not None], dtype=int)
    # Quality comes first and is to be made large.
    points = np.array([history[i].values for i in left], dtype=float).reshape(len(left), -1) * _signs(history)
    return [int(left[place]) for place in find_first_layers(points, most)]


def _signs(history: Sequence[Observation]) -> npt.NDArray[np.float64]:
    width = max((len(seen.values) for seen in history if seen.values is not None), default=1)
    return np.array([-1.0] + [1.0] * (width - 1))


def _freeze(space: SearchSpace, observation: Observation, num_objectives: int) -> optuna.trial.FrozenTrial:
    scored = observation.values is not None
    return optuna.trial.create_trial(
        state=optuna.trial.TrialState.COMPLETE if scored else optuna.trial.TrialState.PRUNED,
        values=list(observation.values) if observation.values is not None else None,
        params=dict(observation.params),
        distributions=distributions(space, observation.params),
        constraints={"missing": observation.missing},
    )
