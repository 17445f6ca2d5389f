"""What else one would search with, on the same tables and the same budget: each says what to train next, and is told
what that scored.

A peer that has done all it was made for is let go on with what it left behind, in its own order, so that every curve
reaches the budget's end; where it would have ended by itself is kept.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import optuna
from pool import make_pool
from searchers import Ended, Trace
from tables import Table

from autopeft.search.distributions import optuna_directions
from autopeft.search.front import peel_layers

Floats = npt.NDArray[np.float64]

ETA = 2
"""Of all halving here: rungs double, as ours do."""


class Ask(NamedTuple):
    """Train a configuration up to a rung, and score it there."""

    place: int
    """In the table."""
    rung: int


class Done(NamedTuple):
    """The searcher's own end; what it asks for from here on is left-overs."""


Peer = Callable[[Table, np.random.Generator], Iterator[Ask | Done]]


def play(peer: Peer, table: Table, seed: int) -> Trace:
    """Charges what is asked for, and notes what reached its full length."""
    last = len(table.rungs) - 1
    reached: dict[int, int] = {}
    ended: list[Ended] = []
    spent = 0.0
    own_end: float | None = None
    for asked in peer(table, np.random.default_rng(seed)):
        if isinstance(asked, Done):
            own_end = spent
            continue
        spent += table.count_seconds(asked.place, reached.get(asked.place, -1) + 1, asked.rung)
        reached[asked.place] = asked.rung
        if asked.rung == last and table.score(asked.place, last) is not None:
            ended.append(Ended(spent, asked.place))
    return Trace(tuple(ended), spent if own_end is None else own_end)


# --- whole trainings


def random_search(table: Table, rng: np.random.Generator) -> Iterator[Ask | Done]:
    """Configurations at random, each to its end."""
    for index in rng.permutation(len(table.curves)):
        yield Ask(int(index), len(table.rungs) - 1)


def optuna_search(make_sampler: Callable[[int], optuna.samplers.BaseSampler]) -> Peer:
    """A sampler of Optuna's on all objectives, without pruning: Optuna prunes no multi-objective study."""

    def search(table: Table, rng: np.random.Generator) -> Iterator[Ask | Done]:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        pool = make_pool(table)
        last = len(table.rungs) - 1
        unused = set(range(len(table.curves)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                directions=optuna_directions(table.objectives), sampler=make_sampler(int(rng.integers(2**31)))
            )
            while unused:
                trial = study.ask()
                index = pool.find_nearest(pool.ask(trial), unused)
                unused.remove(index)
                yield Ask(index, last)
                score = table.score(index, last)
                if score is None:
                    study.tell(trial, state=optuna.trial.TrialState.FAIL)
                else:
                    study.tell(trial, [score.quality, *table.costs[index]])

    return search


# --- halving


def successive_halving(table: Table, rng: np.random.Generator) -> Iterator[Ask | Done]:
    """Synchronous, on loss alone (arXiv:1502.07943): of those at a rung, the better half goes on."""
    alive = [int(index) for index in rng.permutation(len(table.curves))]
    left: list[int] = []
    for rung in range(len(table.rungs)):
        if rung:
            ranked = sorted(alive, key=lambda index: _loss(table, index, rung - 1))
            kept = max(1, len(ranked) // ETA)
            alive, left = ranked[:kept], ranked[kept:] + left
        for index in alive:
            yield Ask(index, rung)
    yield Done()
    yield from _finish(table, left)


def mo_asha(table: Table, rng: np.random.Generator) -> Iterator[Ask | Done]:
    """Multi-objective ASHA (arXiv:2106.12639): as arXiv:1810.05934, promoting from the top of a non-dominated sort of
    (loss, costs) in which an epsilon-net orders each layer."""
    arriving = [int(index) for index in rng.permutation(len(table.curves))]
    at: list[list[int]] = [[] for _ in table.rungs]
    promoted: list[set[int]] = [set() for _ in table.rungs]

    def find_promotable() -> Ask | None:
        for rung in reversed(range(len(table.rungs) - 1)):
            ranked = [at[rung][place] for place in sort_nondominated(_objectives(table, at[rung], rung))]
            for index in ranked[: len(ranked) // ETA]:
                if index not in promoted[rung]:
                    promoted[rung].add(index)
                    return Ask(index, rung + 1)
        return None

    while True:
        asked = find_promotable()
        if asked is None and not arriving:
            break
        asked = asked or Ask(arriving.pop(), 0)
        yield asked
        if table.score(*asked) is not None:
            at[asked.rung].append(asked.place)
    yield Done()
    for rung in reversed(range(len(table.rungs) - 1)):
        ranked = [at[rung][place] for place in sort_nondominated(_objectives(table, at[rung], rung))]
        yield from _finish(table, [index for index in ranked if index not in promoted[rung]])


def syne_tune_moasha(table: Table, rng: np.random.Generator) -> Iterator[Ask | Done]:
    """Syne Tune's own MOASHA (pip install syne-tune), asked after every rung whether the trial goes on."""
    from syne_tune.backend.trial_status import Trial
    from syne_tune.optimizer.scheduler import SchedulerDecision
    from syne_tune.optimizer.schedulers.multiobjective.moasha import MOASHA

    names = ["loss", *table.objectives[1:]]
    scheduler = MOASHA(
        {}, names, time_attr="step", max_t=table.rungs[-1], grace_period=table.rungs[0], reduction_factor=ETA,
        random_seed=int(rng.integers(2**31)),
    )  # fmt: skip
    stopped: list[tuple[int, int]] = []
    for number, index in enumerate(int(index) for index in rng.permutation(len(table.curves))):
        trial = Trial(trial_id=number, config={}, creation_time=None)
        scheduler.on_trial_add(trial)
        for rung, step in enumerate(table.rungs):
            yield Ask(index, rung)
            score = table.score(index, rung)
            if score is None:
                break
            result = dict(zip(names, [score.loss, *table.costs[index]], strict=True)) | {"step": step}
            if scheduler.on_trial_result(trial, result) != SchedulerDecision.CONTINUE:
                if rung < len(table.rungs) - 1:
                    stopped.append((-rung, index))
                break
    yield Done()
    yield from _finish(table, [index for _, index in sorted(stopped)])


def _finish(table: Table, left: Sequence[int]) -> Iterator[Ask]:
    """Left-overs to their end. What failed has nowhere to go."""
    for index in left:
        if table.curves[index].failed is None:
            yield Ask(index, len(table.rungs) - 1)


def _loss(table: Table, index: int, rung: int) -> float:
    score = table.score(index, rung)
    return math.inf if score is None else score.loss


def _objectives(table: Table, indices: Sequence[int], rung: int) -> Floats:
    """(N, objectives), all to be made small."""
    losses = np.array([_loss(table, index, rung) for index in indices])
    return np.column_stack([losses, table.costs[list(indices)]])


def sort_nondominated(points: Floats) -> list[int]:
    """Rows of (N, D) from best to worst: layer by layer, each in the order of its epsilon-net."""
    return [int(layer[place]) for layer in peel_layers(points) for place in order_by_epsilon_net(points[layer])]


def order_by_epsilon_net(points: Floats) -> list[int]:
    """The best in the first objective, then always the row farthest from those before it, scaled to the unit cube."""
    spread = np.ptp(points, axis=0)
    scaled = (points - points.min(axis=0)) / np.where(spread > 0, spread, 1.0)
    order = [int(np.argmin(scaled[:, 0]))]
    distance = np.linalg.norm(scaled - scaled[order[0]], axis=1)
    while len(order) < len(points):
        distance[order] = -1.0
        order.append(int(np.argmax(distance)))
        distance = np.minimum(distance, np.linalg.norm(scaled - scaled[order[-1]], axis=1))
    return order


PEERS: dict[str, Peer] = {
    "random search": random_search,
    "Optuna TPE": optuna_search(lambda seed: optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed)),
    "Optuna NSGA-II": optuna_search(lambda seed: optuna.samplers.NSGAIISampler(seed=seed)),
    "halving on loss": successive_halving,
    "MO-ASHA": mo_asha,
    "Syne Tune MOASHA": syne_tune_moasha,
}


def is_installed(name: str) -> bool:
    return not name.startswith("Syne Tune") or importlib.util.find_spec("syne_tune") is not None
