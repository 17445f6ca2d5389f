"""Searches of a space that never runs out, emulated from a recording: what a finite table cannot show.

    python benchmarks/endless.py benchmarks/results/table-cola-minilm.npz --shares 1/10 1/6 1/3 --out endless-cola

In a table whatever promises much is tried sooner or later, and then there is no more of it. A space always has another
one, and a search that begins too many, or too many of one kind, is found out only there. Here the product asks its own
space. What it asks for is answered by one of the three recorded configurations of its method that are nearest to it,
drawn by its settings: its curve and its losses, with a final quality that is off by a normal deviate of half the spread
among the three and with costs interpolated from all. Configurations at chance stay there where their neighbours do.

So neighbours of what is good are good now and then and may be better than anything recorded: hypervolumes are shares of
the recording's, and may exceed 1. Random search draws from the same space and trains everything to its end.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from configurations import draw_specs
from pool import Pool, make_pool
from searchers import make_search, plan_replay
from tables import Floats, Table, read_table
from written import tell_result

from autopeft.backends.base import Ended, Event, Finished, Stretch
from autopeft.backends.replay import Curve, ReplayBackend, ReplayCostModel
from autopeft.records import Cost, RungScore, TrialSpec, to_record
from autopeft.search.front import scale_point
from autopeft.search.plan import restore_space
from autopeft.search.sampler import Sampler
from autopeft.search.store import Trial
from autopeft.search.surrogate import Answers, Encoder, Features, interpolate_costs, stack
from autopeft.spaces.space import SearchSpace

NEIGHBOURS = 3
_JITTER = 0.5
"""Of the spread among the neighbours' final qualities."""
_LEARNED = 0.02
"""Quality beyond the majority class's from which a curve's own shape says when it was learned."""
_RISES = np.array([1.0, 0.0])
"""Parameters go up with a method's sizes in proportion, memory does not."""
_MOST_TRIALS = 10_000


class Answer(NamedTuple):
    curve: Curve
    place: int
    """In the table, of the recorded one whose losses it has."""


class EndlessSpace:
    """A table's space, every configuration of which has an answer."""

    def __init__(self, table: Table) -> None:
        self.table = table
        config = table.recording.curves.config
        recorded = {curve.spec.method for curve in table.curves}
        space = restore_space(config)
        self.space: SearchSpace = replace(
            space,
            methods={name: method for name, method in space.methods.items() if name in recorded},
            recipes=tuple(spec for spec in space.recipes if spec.method in recorded),
        )
        self._majority = config.majority_quality
        self._encoder = Encoder(self.space)
        self._answers: dict[str, Answer] = {}

    @cached_property
    def _pool(self) -> Pool:
        return make_pool(self.table)

    @cached_property
    def _features(self) -> Features:
        return stack([self._encoder.encode(params) for params in self._pool.params])

    @cached_property
    def _costs(self) -> Floats:
        """(N, 2) of what was recorded: parameters, memory."""
        costs = [curve.cost for curve in self.table.curves]
        return np.array([[cost.trainable_parameters, cost.peak_vram_bytes] for cost in costs], dtype=float)

    def answer(self, spec: TrialSpec) -> Answer:
        key = spec.key()
        if key not in self._answers:
            place = self.table.index_of.get(key)
            self._answers[key] = self._emulate(spec) if place is None else Answer(self.table.curves[place], place)
        return self._answers[key]

    def _emulate(self, spec: TrialSpec) -> Answer:
        asked = self.space.params(spec)
        assert asked is not None, "it was drawn from this space"
        rng = random.Random(spec.key())
        same = {place for place, params in enumerate(self._pool.params) if params["method"] == spec.method}
        nearest = []
        for _ in range(min(NEIGHBOURS, len(same))):
            nearest.append(self._pool.find_nearest(asked, same))
            same.remove(nearest[-1])
        place = rng.choice(nearest)
        curve = replace(self.table.curves[place], spec=spec, cost=self._interpolate(spec.method, asked, place))
        ends = [end for near in nearest if (end := self.table.curves[near].final_quality) is not None]
        if curve.failed is None:
            shift = rng.gauss(0.0, _JITTER * statistics.pstdev(ends))
            curve = replace(curve, rungs=tuple(self._shift(score, curve.rungs[-1], shift) for score in curve.rungs))
        return Answer(curve, place)

    def _shift(self, score: RungScore, last: RungScore, shift: float) -> RungScore:
        """By as much of it as had been learned by then."""
        gained = last.quality - self._majority
        if gained > _LEARNED:
            share = min(1.0, max(0.0, (score.quality - self._majority) / gained))
        else:
            share = (score.step / last.step) ** 2
        least = min(score.quality, self._majority)
        return replace(score, quality=min(max(score.quality + shift * share, least), 0.995))

    def _interpolate(self, method: str, asked: Answers, place: int) -> Cost:
        """Within what was recorded of the method."""
        wanted = stack([self._encoder.encode(asked)])
        found = np.expm1(interpolate_costs(self._features, np.log1p(self._costs), _RISES, wanted)[0])
        same = self._costs[[curve.spec.method == method for curve in self.table.curves]]
        parameters, memory = np.clip(found, same.min(axis=0), same.max(axis=0))
        return replace(self.table.curves[place].cost, trainable_parameters=int(parameters), peak_vram_bytes=int(memory))


class EndlessBackend(ReplayBackend):
    """Trains whatever the space holds, on a simulated clock."""

    def __init__(self, endless: EndlessSpace) -> None:
        super().__init__(endless.table.recording)
        self._endless = endless

    def run(self, stretch: Stretch, emit: Callable[[Event], None]) -> Finished | Ended:
        curve, place = self._endless.answer(stretch.spec)
        self.add(curve, place)
        return super().run(stretch, emit)


class EndlessCosts(ReplayCostModel):
    def __init__(self, endless: EndlessSpace) -> None:
        super().__init__(endless.table.recording)
        self._endless = endless

    def cost(self, spec: TrialSpec) -> Cost:
        return self._endless.answer(spec).curve.cost


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One search at one budget: means over the seeds, and the median hypervolume."""

    searcher: str
    share: float
    """Of what training everything recorded takes."""
    volume: float
    standard_error: float
    median_volume: float
    begun: float
    left_at_first: float
    """Of those begun, at their first rung."""
    complete: float


def play(table: Table, seed: int, share: float) -> tuple[EndlessSpace, list[Trial]]:
    """The product's search on one worker, and its trials as it left them."""
    endless = EndlessSpace(table)
    config = plan_replay(table, seed, num_trials=_MOST_TRIALS, share=share)
    search = make_search(table, config, endless.space, EndlessBackend(endless), EndlessCosts(endless))
    search.sampler = Sampler(search.store, endless.space, search.costs)
    search.drive()
    return endless, search.store.trials


def measure_ours(table: Table, share: float, num_seeds: int) -> Row:
    volumes, counts = [], []
    for seed in range(num_seeds):
        endless, trials = play(table, seed, share)
        complete = [trial for trial in trials if trial.state == "complete"]
        volumes.append(_measure(table, [endless.answer(trial.spec).curve for trial in complete]))
        begun = [trial for trial in trials if trial.rungs]
        counts.append((len(begun), sum(len(trial.rungs) == 1 for trial in begun), len(complete)))
    return _make_row("autopeft", share, volumes, counts)


def measure_random(table: Table, shares: Sequence[float], num_seeds: int) -> list[Row]:
    """Every method as often as any other, as what was recorded was drawn."""
    volumes: dict[float, list[float]] = {share: [] for share in shares}
    counts: dict[float, list[tuple[int, int, int]]] = {share: [] for share in shares}
    last = len(table.rungs) - 1
    for seed in range(num_seeds):
        endless = EndlessSpace(table)
        space = replace(endless.space, recipes=())
        drawn = draw_specs(space, 2 * len(table.curves), max_steps=table.rungs[-1], seed=seed)
        random.Random(seed).shuffle(drawn)
        answers = [endless.answer(spec) for spec in drawn]
        ends = np.cumsum([table.count_seconds(place, 0, last) for _, place in answers])
        for share in shares:
            count = int(np.searchsorted(ends, share * table.total_seconds, side="right"))
            volumes[share].append(_measure(table, [curve for curve, _ in answers[:count]]))
            counts[share].append((count, 0, sum(curve.failed is None for curve, _ in answers[:count])))
    return [_make_row("random search", share, volumes[share], counts[share]) for share in shares]


def _measure(table: Table, curves: Sequence[Curve]) -> float:
    """Hypervolume as a share of the recording's."""
    reference = table.recording.curves.reference
    ended = [(quality, curve.cost) for curve in curves if (quality := curve.final_quality) is not None]
    points = [scale_point(quality, cost, reference) for quality, cost in ended]
    return table.share(np.array(points).reshape(-1, len(reference)))


def _make_row(searcher: str, share: float, volumes: list[float], counts: list[tuple[int, int, int]]) -> Row:
    begun, first, complete = (statistics.fmean(column) for column in zip(*counts, strict=True))
    return Row(
        searcher=searcher, share=share, volume=statistics.fmean(volumes), median_volume=statistics.median(volumes),
        standard_error=statistics.stdev(volumes) / len(volumes) ** 0.5, begun=begun, left_at_first=first,
        complete=complete,
    )  # fmt: skip


def main() -> None:
    arguments = _parse_arguments()
    table = read_table(arguments.table, arguments.table.stem)
    rows = measure_random(table, arguments.shares, arguments.seeds)
    for share in arguments.shares:
        rows.append(measure_ours(table, share, arguments.seeds))
        print(f"a share of {share:.3f} played.", file=sys.stderr)
    text = describe(table, rows, arguments.seeds)
    tell_result(text, to_record(rows), name=arguments.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a recording made by racing.py record")
    parser.add_argument("--shares", nargs="+", type=lambda text: float(Fraction(text)), default=[1 / 10, 1 / 5],
                        metavar="SHARE", help="budgets, of what training everything recorded takes")  # fmt: skip
    parser.add_argument("--seeds", type=int, default=20, metavar="K")
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    if arguments.seeds < 2:
        parser.error("--seeds takes at least 2: figures are given with their standard error")
    if not all(0 < share <= 1 for share in arguments.shares):
        parser.error("--shares takes numbers above 0 and up to 1")
    return arguments


def describe(table: Table, rows: Sequence[Row], num_seeds: int) -> str:
    config = table.recording.curves.config
    lines = [
        f"A space emulated from {len(table.curves)} configurations, {config.model} on {config.task_name}, "
        f"{table.rungs[-1]} steps. Means over {num_seeds} seeds; hypervolumes are shares of the recording's, budgets "
        "shares of its device time.",
        "",
        "| search | budget | hypervolume | standard error | median | begun | left at the first rung | to the end |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        budget = Fraction(row.share).limit_denominator(100)
        lines.append(
            f"| {row.searcher} | {budget} | {row.volume:.3f} | {row.standard_error:.3f} | {row.median_volume:.3f} | "
            f"{row.begun:.0f} | {row.left_at_first:.0f} | {row.complete:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
