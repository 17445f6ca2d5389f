"""The real search over a given list of configurations: what it decides is untouched, what it tries is fixed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.executors.base import Executor
from autopeft.executors.local import LocalExecutor
from autopeft.records import Provenance, StudyConfig, StudyRecord, TrialSpec
from autopeft.search.plan import Plan, make_plan, make_provenance
from autopeft.search.racing import Contender, LossCurve, RacingRule, Verdict
from autopeft.search.request import Request
from autopeft.search.sampler import Sampler
from autopeft.search.status import Status
from autopeft.search.store import StudyStore, Trial
from autopeft.search.study import Search
from autopeft.search.worth import Appraiser, Newcomer
from autopeft.spaces.space import SearchSpace

Arrival = Literal["included", "sampled"]
"""Whether all configurations wait from the start, or come one by one as from a sampler.

Waiting ones are all started before any goes on past the first rung; sampled ones take turns with promotions.
"""


class NeverStop:
    """No racing: every trial goes to its full length."""

    def learn(self, curves: Sequence[LossCurve]) -> NeverStop:
        return self

    def judge(
        self, trial: Contender, rivals: Sequence[Contender], *, progress: float, majority_quality: float
    ) -> Verdict | None:
        return None


class ListedSampler(Sampler):
    """Answers from a list, one configuration after another."""

    arriving: Sequence[TrialSpec] = ()

    def draw(self, appraiser: Appraiser) -> list[Newcomer]:
        known = self.known_keys()
        spec = next((spec for spec in self.arriving if spec.key() not in known), None)
        return [] if spec is None else [self.make_newcomer(spec, "sampler")]


class ListedSearch(Search):
    """A search that tries what is listed."""

    def __init__(
        self,
        store: StudyStore,
        executor: Executor,
        space: SearchSpace,
        arriving: Sequence[TrialSpec],
        *,
        racing: RacingRule | None = None,
    ) -> None:
        super().__init__(store, executor, space, racing=racing)
        self.sampler = ListedSampler(store, space, self.costs)
        self.sampler.arriving = arriving


class Asked(NamedTuple):
    """What to search: a task's data, and how long trials are."""

    task: str
    data_dir: str
    steps: int
    seed: int
    methods: tuple[str, ...] | None = None
    bits: int | None = None
    workers: int | None = None
    budget: str = "1trials"


def plan_listed(asked: Asked) -> Plan:
    """The plan that `autopeft search` would make; its space is what configurations are drawn from."""
    return make_plan(
        Request(
            task=asked.task,
            budget=asked.budget,
            model="minilm",
            methods=",".join(asked.methods) if asked.methods else None,
            fix=() if asked.bits is None else (f"bits={asked.bits}",),
            max_steps=asked.steps,
            seed=asked.seed,
            workers=asked.workers,
            name="benchmark",
            data_dir=asked.data_dir,
        ),
        studies=Path("/nonexistent"),
    )


def create_study(
    base: StudyConfig,
    provenance: Provenance,
    labels: npt.NDArray[np.int64],
    specs: Sequence[TrialSpec],
    root: Path,
    *,
    name: str = "benchmark",
    rungs: tuple[int, ...],
    budget: str | None = None,
    arrival: Arrival = "included",
) -> StudyStore:
    """A study of exactly these configurations, without confirmation and without the baseline.

    The baseline, a head on the frozen base, is a training more than was listed: it is stored as done.
    """
    config = replace(
        base,
        name=name,
        budget=budget or f"{len(specs)}trials",
        included=tuple(specs) if arrival == "included" else (),
        rungs=rungs,
        confirm_share=0.0,
        confirm_seeds=0,
    )
    store = StudyStore.create(root, config, provenance, labels)
    store.save_baseline(Trial(number=-1, spec=specs[0], source="baseline", state="complete"))
    return store


class Trained(NamedTuple):
    record: StudyRecord
    store: StudyStore
    executor: LocalExecutor


def train_listed(
    plan: Plan,
    specs: Sequence[TrialSpec],
    root: Path,
    *,
    name: str = "benchmark",
    rungs: tuple[int, ...],
    racing: RacingRule,
    on_change: Callable[[Status], None] = lambda status: None,
) -> Trained:
    """Trains exactly these on the plan's workers. A study of this name in `root` goes on where it was."""
    if (root / name / "study.db").exists():
        store = StudyStore.open(root, name)
    else:
        store = create_study(
            plan.config, make_provenance(plan), plan.validation_labels(), specs, root, name=name, rungs=rungs
        )
    executor = LocalExecutor(replace(plan.setup(root), study_dir=str((root / name).resolve())), list(plan.devices))
    with store.lock():
        record = Search(store, executor, plan.space, racing=racing, on_change=on_change).run()
    return Trained(record, store, executor)


class Spent(NamedTuple):
    """Of the search alone: from the first assignment to the last release."""

    wall_seconds: float
    device_seconds: float


def count_spent(record: StudyRecord) -> Spent:
    starts = [segment.start_seconds for segment in record.segments]
    ends = [segment.end_seconds for segment in record.segments]
    return Spent(max(ends) - min(starts), sum(trial.device_seconds for trial in record.trials))
