"""Our own search on a table of recorded configurations: the real driver, and what it had finished when."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from listed_search import ListedSearch
from memory_study import MemoryStore
from pool import Pool, make_pool
from tables import LISTED, Table
from tpe import observe, suggest_spec

from autopeft.backends.replay import ReplayBackend, ReplayCostModel
from autopeft.executors.inline import InlineExecutor
from autopeft.records import Scalar, StudyConfig, TrialSpec, WarmStart
from autopeft.search.plan import restore_space
from autopeft.search.racing import LearnedRacing, PairedRacing, RacingRule
from autopeft.search.sampler import Sampler
from autopeft.search.speed import kind_of
from autopeft.search.store import Trial
from autopeft.search.worth import Appraiser, Newcomer
from autopeft.spaces.space import SearchSpace

Source = Literal["given", "one by one", "chosen", "tpe"]
"""Where configurations come from: all to be tried, as with --include; one after another in an order drawn by the seed;
chosen among those recorded; or as Optuna's TPE wants them, each the nearest recorded one."""


class Ended(NamedTuple):
    """A configuration that reached its full length."""

    at_seconds: float
    """Device-seconds that the search had spent by then."""
    place: int
    """In the table."""


class Trace(NamedTuple):
    """What a search had trained to its end, and when."""

    ended: tuple[Ended, ...]
    own_end_seconds: float
    """When it had nothing left to do, or its budget was spent."""


class PoolSampler(Sampler):
    """Answers with recorded configurations alone, each time with all that were not tried yet."""

    table: Table
    pool: Pool

    def draw(self, appraiser: Appraiser) -> list[Newcomer]:
        known = self.known_keys() | {spec.key() for spec in self.recipes}
        unused = self.choose(sorted(index for key, index in self.table.index_of.items() if key not in known))
        rows = [self.encoder.encode(self.pool.params[index]) for index in unused]
        specs = [self.table.curves[index].spec for index in unused]
        return [Newcomer(kind_of(spec), row, spec=spec) for spec, row in zip(specs, rows, strict=True)]

    def choose(self, unused: list[int]) -> list[int]:
        return unused


class TpeSampler(PoolSampler):
    """Answers as Optuna's TPE wants it, with what was recorded nearest to that."""

    def choose(self, unused: list[int]) -> list[int]:
        return [self.pool.find_nearest(self._ask_tpe(), set(unused))] if unused else []

    def _ask_tpe(self) -> Mapping[str, Scalar]:
        config = self.store.config
        spec = suggest_spec(
            self.space,
            observe(self.space, self.store.trials, config.objectives),
            objectives=config.objectives,
            known=self.known_keys(),
            max_steps=config.rungs[-1],
            seed=config.seed,
            number=len(self.store.trials),
        )
        assert spec is not None
        answers = self.space.params(spec)
        assert answers is not None
        return answers


class ReplaySearch(ListedSearch):
    """A search over recorded configurations alone, whose methods need not be ours."""

    def _is_feasible(self, trial: Trial) -> bool:
        trial.cost = self.costs.find(trial.spec).cost
        assert trial.cost is not None
        return True


@dataclass(frozen=True, kw_only=True)
class OurSearch:
    """The product's search on one worker. `racing` is what suits the table where it is not given."""

    source: Source = "given"
    racing: RacingRule | None = None
    warm_start: WarmStart | None = None
    """Of recorded configurations."""

    def play(self, table: Table, seed: int, share: float | None = None) -> Trace:
        """`share` of the time that training everything takes is the budget; None bounds the search by trials alone."""
        return read_trace(self.search(table, seed, share), table)

    def search(self, table: Table, seed: int, share: float | None = None) -> list[Trial]:
        """The trials as the search left them."""
        specs = [curve.spec for curve in table.curves]
        random.Random(seed).shuffle(specs)
        config = plan_replay(table, seed, num_trials=len(specs), share=share)
        included = tuple(specs) if self.source == "given" else ()
        config = replace(config, included=included, warm_start=self.warm_start)
        backend, costs = ReplayBackend(table.recording), ReplayCostModel(table.recording)
        search = make_search(table, config, _find_space(table, self.source), backend, costs, specs, self.racing)
        if self.source in ("chosen", "tpe"):
            sampler = (TpeSampler if self.source == "tpe" else PoolSampler)(search.store, search.space, search.costs)
            sampler.table, sampler.pool = table, make_pool(table)
            search.sampler = sampler
        search.drive()
        return search.store.trials


def plan_replay(table: Table, seed: int, *, num_trials: int, share: float | None) -> StudyConfig:
    """Of one worker; nothing is kept for confirmation."""
    recorded = table.recording.curves
    budget = f"{num_trials}trials"
    if share is not None:
        budget += f",{share * table.total_seconds / recorded.device_rate / 60:.6f}min"
    return replace(
        recorded.config, name="replay", budget=budget, workers=1, seed=seed, confirm_share=0.0, confirm_seeds=0,
        included=(), warm_start=None,
    )  # fmt: skip


def make_search(
    table: Table,
    config: StudyConfig,
    space: SearchSpace,
    backend: ReplayBackend,
    costs: ReplayCostModel,
    specs: Sequence[TrialSpec] = (),
    racing: RacingRule | None = None,
) -> ReplaySearch:
    """The product's driver on a simulated machine. `racing` is what suits the table where it is not given."""
    store = MemoryStore(backend, config)
    store.save_baseline(Trial(number=-1, spec=table.curves[0].spec, source="baseline", state="complete"))
    executor = InlineExecutor(None, 1, backend=backend, costs=costs, device_rate=table.recording.curves.device_rate)
    return ReplaySearch(store, executor, space, specs, racing=racing or find_rule(table))


def find_rule(table: Table) -> RacingRule:
    """What suits the recording: pairs of per-example losses where there are any."""
    return LearnedRacing() if table.recording.losses is None else PairedRacing()


def _find_space(table: Table, source: Source) -> SearchSpace:
    config = table.recording.curves.config
    if source in ("chosen", "tpe"):
        space = restore_space(config)
        # A recipe that was not recorded cannot be played.
        return replace(space, recipes=tuple(spec for spec in space.recipes if spec.key() in table.index_of))
    return SearchSpace(name=LISTED, device_kind=config.device_kind, methods={}, recipes=())


def read_trace(trials: Sequence[Trial], table: Table) -> Trace:
    rate = table.recording.curves.device_rate
    ended = sorted(
        Ended(trial.segments[-1].end_seconds * rate, table.index_of[trial.spec.key()])
        for trial in trials
        if trial.state == "complete"
    )
    return Trace(tuple(ended), sum(trial.device_seconds for trial in trials))


def ended_by(table: Table, trace: Trace, share: float) -> list[int]:
    """Places of what reached its full length within that share of the time that training everything takes."""
    # Sums of the same seconds in another order may differ in the last digit.
    within = share * table.total_seconds * (1 + 1e-9)
    return [ended.place for ended in trace.ended if ended.at_seconds <= within]


def volume_at(table: Table, trace: Trace, share: float) -> float:
    """Share of the whole table's hypervolume that was had by then."""
    return table.volume(ended_by(table, trace, share)) / table.total_volume
