"""A leaderboard's entries ranked against their rivals."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from autopeft.records import Cost
from autopeft.report.entries import Entry, Run
from autopeft.report.scores import standard_error, undominated
from autopeft.report.words import title_method

_BASELINES = {
    "head": "baseline: trained head",
    "majority": "baseline: most frequent label",
    "base": "baseline: untrained base",
}


_CLEAR = 2.0
"""A difference counts as clear from this many standard errors on."""
_NO_GAP = 1e-12
"""Of two scores without any spread: equal ones are level, others are not."""


class Standing(NamedTuple):
    """An entry with what follows from its runs and its rivals."""

    entry: Entry
    rank: int | None
    """From 1; None for baselines."""
    places: tuple[int, int] | None
    """The first and the last rank that it may have: those that are not clearly better or worse may swap with it."""
    on_front: bool
    quality: float
    quality_sd: float | None
    """Over seeds; None with one."""
    num_seeds: int
    test_quality: float | None
    test_quality_sd: float | None
    num_test_seeds: int
    cost: Cost | None
    adapter_bytes: int | None
    """As saved; None where no run's study knew it."""
    latency_seconds: float | None
    """Of one example alone, by the newest run of which it was measured."""
    latency_device: str | None
    """What that was measured on: latencies on other devices are no rivals."""
    device_seconds: float
    """Mean of a full-length run, of those on the newest one's device: seconds of GPUs and of cores are not alike."""
    studies: list[str]
    date: str
    """Of the newest run."""

    @property
    def title(self) -> str:
        if self.entry.kind != "trial":
            return _BASELINES[self.entry.kind]
        return "" if self.entry.spec is None else title_method(self.entry.spec.method)


def rank_entries(entries: Iterable[Entry]) -> list[Standing]:
    """Sorted by search-validation quality: test scores never choose.

    Entries on other data or weights, or scored otherwise, are no rivals: each such group is ranked apart, the most
    recent first.
    """
    groups = group_rivals(_stand(entry) for entry in entries)
    ordered = sorted(groups.items(), key=lambda item: item[0])
    ordered.sort(key=lambda item: max(standing.date for standing in item[1]), reverse=True)
    return [standing for _, group in ordered for standing in _rank_group(group)]


def group_rivals(standings: Iterable[Standing]) -> dict[tuple[str, str, str, str], list[Standing]]:
    """(task digest, model digest, scorer, scoring) -> its standings, both in the order given."""
    groups: dict[tuple[str, str, str, str], list[Standing]] = {}
    for standing in standings:
        groups.setdefault(standing.entry.rivalry(), []).append(standing)
    return groups


def _stand(entry: Entry) -> Standing:
    qualities = _average_by_seed((run.seed, run.quality) for run in entry.runs)
    tests = _average_by_seed((run.seed, run.test_quality) for run in entry.runs if run.test_quality is not None)
    timed = _find_timed(entry)
    newest = max(entry.runs, key=_age)
    return Standing(
        entry=entry,
        rank=None,
        places=None,
        on_front=False,
        quality=statistics.fmean(qualities),
        quality_sd=_deviation(qualities),
        num_seeds=len(qualities),
        test_quality=statistics.fmean(tests) if tests else None,
        test_quality_sd=_deviation(tests),
        num_test_seeds=len(tests),
        cost=_choose_cost(entry),
        adapter_bytes=_find_size(entry),
        latency_seconds=timed.cost.latency_seconds if timed is not None and timed.cost is not None else None,
        latency_device=None if timed is None else timed.device,
        device_seconds=statistics.fmean(run.device_seconds for run in entry.runs if run.device == newest.device),
        studies=sorted({run.study for run in entry.runs}),
        date=newest.created_at[:10],
    )


def _average_by_seed(runs: Iterable[tuple[int | None, float]]) -> list[float]:
    """One value a seed: two studies that used the same seed have repeated a run, and tell nothing of the spread."""
    values: dict[int | None, list[float]] = {}
    for seed, value in runs:
        values.setdefault(seed, []).append(value)
    return [statistics.fmean(group) for group in values.values()]


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _choose_cost(entry: Entry) -> Cost | None:
    """The largest measurement, else the largest estimate: what a card must have to train it."""
    costs = [run.cost for run in entry.runs if run.cost is not None]
    return max(costs, key=lambda cost: (cost.vram_source == "measured", cost.peak_vram_bytes), default=None)


def _find_size(entry: Entry) -> int | None:
    """The newest: it is exact, and changes only with what autopeft saves."""
    known = [(run.created_at, run.cost.adapter_bytes) for run in entry.runs if run.cost and run.cost.adapter_bytes]
    return max(known)[1] if known else None


def _find_timed(entry: Entry) -> Run | None:
    """The newest run with a latency."""
    timed = [run for run in entry.runs if run.cost is not None and run.cost.latency_seconds is not None]
    return max(timed, key=_age, default=None)


def _age(run: Run) -> tuple[str, tuple[str, int, int]]:
    """Sorts runs from the oldest to the newest."""
    return run.created_at, run.identity()


def _rank_group(group: Sequence[Standing]) -> list[Standing]:
    ordered = sorted(group, key=lambda standing: (-standing.quality, standing.entry.key))
    rivals = [standing for standing in ordered if standing.entry.kind == "trial"]
    # The trained head or untrained base is ranked nowhere, but what it dominates is on no front.
    priced = [(standing, standing.cost) for standing in ordered if standing.cost is not None]
    points = [(-standing.quality, cost.peak_vram_bytes, cost.trainable_parameters) for standing, cost in priced]
    kept = undominated(points)
    front = {standing.entry.key for (standing, _), keep in zip(priced, kept, strict=True) if keep}
    front &= {standing.entry.key for standing in rivals}
    ranks = {standing.entry.key: place for place, standing in enumerate(rivals, start=1)}
    places = _find_places(rivals)
    return [
        s._replace(rank=ranks.get(s.entry.key), places=places.get(s.entry.key), on_front=s.entry.key in front)
        for s in ordered
    ]


def _find_places(rivals: Sequence[Standing]) -> dict[str, tuple[int, int]]:
    """By key, for rivals from the best to the worst.

    A difference is clear from two standard errors on. Leaderboards keep no answers, so it is judged as if the examples
    were not the same for all, which is rather too careful. What seeds change is known of rivals with several, and taken
    to be alike for all: of two or three runs that came out level nobody knows that they always do. Where nothing is
    known of the examples' part, nothing is clear.
    """
    if any(_example_error(standing) is None for standing in rivals):
        return {standing.entry.key: (1, len(rivals)) for standing in rivals}
    variances = _find_variances(rivals)
    places = {}
    for standing in rivals:
        clear = [
            (rival.quality - standing.quality)
            / max(_CLEAR * math.sqrt(variances[rival.entry.key] + variances[standing.entry.key]), _NO_GAP)
            for rival in rivals
        ]
        better, worse = sum(gap > 1 for gap in clear), sum(gap < -1 for gap in clear)
        places[standing.entry.key] = (1 + better, len(rivals) - worse)
    return places


def _find_variances(rivals: Sequence[Standing]) -> dict[str, float]:
    """Squared standard errors of the rivals' qualities, by key: over examples and seeds."""
    known = [(standing.num_seeds - 1, standing.quality_sd) for standing in rivals if standing.quality_sd is not None]
    of_seeds = sum(n * sd**2 for n, sd in known) / sum(n for n, _ in known) if known else 0.0
    return {
        standing.entry.key: (_example_error(standing) or 0.0) ** 2 + of_seeds / standing.num_seeds
        for standing in rivals
    }


def _example_error(standing: Standing) -> float | None:
    runs = standing.entry.runs
    spreads = [run.quality_sd for run in runs if run.quality_sd is not None]
    examples = min(run.num_examples for run in runs)
    spread = statistics.fmean(spreads) if spreads else None
    return standard_error(standing.quality, examples, standing.entry.scorer, spread)
