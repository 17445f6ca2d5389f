"""The trade-off front: dominance, hypervolume, membership with confidence, and the three named picks.

Points are rows of a float array in which every column is to be made small: quality is negated, costs are as they are.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.errors import SpecError, suggest_nearest
from autopeft.records import Cost, FrontMember, Pick, PickName, TrialRecord
from autopeft.tasks.scorers import resample_scores, score_predictions
from autopeft.wording import say_count

Points = npt.NDArray[np.float64]

OBJECTIVES = ("quality", "vram", "params", "size", "latency")
"""Quality up; peak VRAM, trainable parameters, bytes of the saved adapter and seconds of a forward pass down."""

LATENCY_STEP = 0.05
"""Latencies count in steps of 5%: medians of the same model, minutes apart on a shared machine, differ by less."""

_RESAMPLES = 400
_SEED_SHARE = 0.5
"""What retraining changes, in standard errors by examples, before it has been seen: 0.53 over the five trials with more
seeds in reports/sst2-minilm.html."""


class Run(NamedTuple):
    """One full-length training of a configuration: the answers it gave on the search-validation split."""

    number: int
    predictions: npt.NDArray[Any]
    """(N,) as the task's scorer takes them, such as class indices."""


class Front(NamedTuple):
    members: tuple[FrontMember, ...]
    picks: tuple[Pick, ...]
    hypervolume: float
    ties: tuple[tuple[int, ...], ...] = ()
    """Groups of members whose quality cannot be told apart, the best first."""
    beats_baseline: bool | None = None
    """Whether the best pick clearly is, on the same examples; None where the baseline's answers are not known."""


def parse_objectives(text: str) -> tuple[str, ...]:
    """`quality,vram` -> names. Raises SpecError for unknown ones, and where quality is missing."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    for name in names:
        if name not in OBJECTIVES:
            raise SpecError(f"There is no objective '{name}'. {suggest_nearest(name, OBJECTIVES)}")
    if "quality" not in names:
        raise SpecError(f"--objectives must contain quality, but asks for '{text}'. Write quality,vram,params.")
    return tuple(name for name in OBJECTIVES if name in names)


def cost_vector(cost: Cost, objectives: Sequence[str]) -> tuple[float, ...]:
    """What the configuration costs on each chosen cost objective; the head is the same for all and left out of the
    parameters."""
    return tuple(cost_value(cost, name) for name in objectives if name != "quality")


def cost_value(cost: Cost, objective: str) -> float:
    """On one cost objective; infinite where it should have been known by now and is not."""
    if objective == "vram":
        return float(cost.peak_vram_bytes)
    if objective == "params":
        return float(cost.trainable_parameters)
    if objective == "size":
        return math.inf if cost.adapter_bytes is None else float(cost.adapter_bytes)
    return math.inf if cost.latency_seconds is None else round_latency(cost.latency_seconds)


def round_latency(seconds: float) -> float:
    """To the nearest power of 1.05, so that noise ranks nothing."""
    return float((1 + LATENCY_STEP) ** round(math.log(seconds, 1 + LATENCY_STEP)))


def find_nondominated(points: Points) -> npt.NDArray[np.bool_]:
    """(N, D) -> (N,): rows that no other row equals or beats everywhere and beats somewhere."""
    left = np.arange(len(points))
    place = 0
    # What one row dominates is dropped at once, so that the work goes with the front's length rather than with N.
    while place < len(left):
        rest, point = points[left], points[left[place]]
        stays = ~((point <= rest).all(axis=1) & (point < rest).any(axis=1))
        place = int(np.count_nonzero(stays[:place])) + 1
        left = left[stays]
    keep = np.zeros(len(points), dtype=bool)
    keep[left] = True
    return keep


def peel_layers(points: Points) -> Iterator[npt.NDArray[np.int64]]:
    """(N, D) -> rows layer by layer: what no other dominates, then what no other of the rest does, and so on."""
    left = np.arange(len(points))
    while len(left):
        first = find_nondominated(points[left])
        yield left[first]
        left = left[~first]


def find_first_layers(points: Points, most: int) -> list[int]:
    """(N, D) -> at most so many rows, those of the first layers."""
    return [int(row) for row in itertools.islice(itertools.chain.from_iterable(peel_layers(points)), most)]


def hypervolume(points: Points, reference: Sequence[float]) -> float:
    """Volume that the points dominate up to `reference` (to be made small), by slicing along the last column."""
    inside = points[(points < np.asarray(reference)).all(axis=1)]
    if len(inside) == 0:
        return 0.0
    if inside.shape[1] == 1:
        return float(reference[0] - inside.min())
    if inside.shape[1] > 2:
        # A slice's points are many more than its front's, and each would be sliced again.
        inside = inside[find_nondominated(inside)]
    inside = inside[np.argsort(inside[:, -1], kind="stable")]
    edges = np.append(inside[1:, -1], reference[-1])
    if inside.shape[1] == 2:
        return math.fsum((edges - inside[:, 1]) * (reference[0] - np.minimum.accumulate(inside[:, 0])))
    return math.fsum(
        float(edge - point[-1]) * hypervolume(inside[: i + 1, :-1], reference[:-1])
        for i, (point, edge) in enumerate(zip(inside, edges, strict=True))
        if edge > point[-1]
    )


def scale_point(quality: float, cost: Cost, reference: Mapping[str, float]) -> list[float]:
    """In [0, 1] per objective, 1 at the reference: quality from it to 1, VRAM and latency linear, sizes logarithmic."""
    costs = [scale_cost(name, cost_value(cost, name), reference) for name in OBJECTIVES[1:] if name in reference]
    return [scale_quality(quality, reference), *costs]


def scale_quality(quality: float, reference: Mapping[str, float]) -> float:
    return 1 - (quality - reference["quality"]) / (1 - reference["quality"])


def scale_cost(name: str, value: float, reference: Mapping[str, float]) -> float:
    if name in ("params", "size"):
        return math.log1p(value) / math.log1p(reference[name])
    return value / reference[name]


def scaled_points(trials: Sequence[TrialRecord], reference: dict[str, float]) -> Points:
    rows = [scale_point(t.quality, t.cost, reference) for t in trials if t.cost is not None and t.quality is not None]
    return np.array(rows, dtype=float).reshape(len(rows), len(reference))


def analyze_front(
    trials: Sequence[TrialRecord],
    baseline: TrialRecord | None,
    runs: Sequence[Run],
    labels: npt.NDArray[np.int64],
    *,
    objectives: Sequence[str],
    scorer: str,
    reference: dict[str, float],
    seed: int,
    awaited: Collection[int] = (),
) -> Front:
    """The front of complete trials, each member's confidence, the picks, and the hypervolume in [0, 1].

    `awaited` are the numbers of what is to be confirmed before anything else.

    What the trained-head baseline dominates is on no front: nobody needs an adapter that is worse than none. Picks come
    from the front of those that may be picked: a single lucky score, which may not, puts none of them off it.

    Confidence and ties come from a bootstrap over validation examples and seeds, see `_resample_qualities`.
    """
    complete = [trial for trial in trials if trial.state == "complete" and trial.cost and trial.quality is not None]
    if not complete:
        return Front((), (), 0.0)
    # Who is named of equals depends on what they are, not on who came first.
    complete.sort(key=lambda trial: trial.spec.key())
    rows = np.random.default_rng(seed).integers(0, len(labels), (_RESAMPLES, len(labels)))
    resampled = _resample_qualities(complete, runs, labels, scorer, rows, seed)
    answers = next((run.predictions for run in runs if baseline is not None and run.number == baseline.number), None)
    base = None if answers is None else resample_scores(scorer, labels, answers, rows)
    costs = np.array([cost_vector(trial.cost, objectives) for trial in complete if trial.cost])
    points = _points([trial.quality or 0.0 for trial in complete], costs)
    floor = np.empty((0, points.shape[1]))
    floors: Sequence[Points] = [floor] * _RESAMPLES
    if baseline is not None and baseline.cost is not None and baseline.quality is not None:
        base_costs = np.array([cost_vector(baseline.cost, objectives)])
        floor = _points([baseline.quality], base_costs)
        floors = [floor] * _RESAMPLES if base is None else [_points([quality], base_costs) for quality in base]
    on_front = _is_on_front(points, floor)
    shares = [_is_on_front(_points(row, costs), below) for row, below in zip(resampled, floors, strict=True)]
    members = [
        FrontMember(number=trial.number, confidence=float(share))
        for trial, on, share in zip(complete, on_front, np.mean(shares, axis=0), strict=True)
        if on
    ]
    picks = _pick(complete, points, floor, resampled, objectives, awaited)
    best = next(place for place, trial in enumerate(complete) if trial.number == picks[0].number)
    return Front(
        tuple(sorted(members, key=lambda member: member.number)),
        picks,
        hypervolume(scaled_points(complete, reference), [1.0] * len(reference)),
        _group_ties(complete, on_front, resampled),
        None if base is None else bool(np.quantile(resampled[:, best] - base, 0.025) > 0),
    )


def _points(qualities: Sequence[float] | Points, costs: Points) -> Points:
    return np.column_stack([-np.asarray(qualities), costs.reshape(len(costs), -1)])


def _is_on_front(points: Points, floor: Points) -> npt.NDArray[np.bool_]:
    """(N,) of the points, the floor's (none or one) beside them."""
    return find_nondominated(np.vstack([points, floor]))[: len(points)]


def _resample_qualities(
    trials: Sequence[TrialRecord],
    runs: Sequence[Run],
    labels: npt.NDArray[np.int64],
    scorer: str,
    rows: npt.NDArray[np.int64],
    seed: int,
) -> Points:
    """(resamples, trials): the quality each trial might have shown on other examples, trained with other seeds.

    Each resample draws examples, the same for all trials, so that differences are paired. Seeds add what retraining was
    seen to change: of all trials with several runs, how far each run is from its trial's mean. Drawing from a trial's
    own runs alone would call a single one certain, and three nearly so. Where no trial has several they add what is
    usual, so that finalists are not chosen as if seeds changed nothing. What they add to a trial depends on its
    configuration and on nothing else: neither on its number nor on who is beside it.
    """
    by_trial = [[run.predictions for run in runs if run.number == trial.number] for trial in trials]
    luck = [np.random.default_rng([seed, int(trial.spec.key(), 16)]) for trial in trials]
    qualities = np.column_stack(
        [
            np.mean([resample_scores(scorer, labels, predictions, rows) for predictions in predicted], axis=0)
            for predicted in by_trial
        ]
    )
    residuals = _seed_residuals([[score_predictions(scorer, labels, p) for p in predicted] for predicted in by_trial])
    if not len(residuals):
        deviations: Points = _SEED_SHARE * qualities.std(axis=0)
        return qualities + deviations * np.column_stack([rng.standard_normal(len(rows)) for rng in luck])
    for t, (rng, predicted) in enumerate(zip(luck, by_trial, strict=True)):
        qualities[:, t] += rng.choice(residuals, (len(rows), len(predicted))).mean(axis=1)
    return qualities


def _seed_residuals(qualities: Sequence[Sequence[float]]) -> Points:
    """How far runs lie from their trial's mean, widened by what taking the mean of few narrows; in order of size."""
    several = [np.asarray(values) for values in qualities if len(values) > 1]
    return np.sort(np.concatenate([*((v - v.mean()) * math.sqrt(len(v) / (len(v) - 1)) for v in several), []]))


def _group_ties(
    trials: Sequence[TrialRecord], on_front: npt.NDArray[np.bool_], resampled: Points
) -> tuple[tuple[int, ...], ...]:
    """Members of the front that cannot be told from the best of them, then of the rest, and so on.

    Two are told apart where 97.5% of the resamples have one of them ahead of the other by more than nothing (a
    two-sided bootstrap test of 5%). A group is what cannot be told from its first; two others in it may differ clearly.
    """
    order = sorted(map(int, np.flatnonzero(on_front)), key=lambda i: -(trials[i].quality or 0.0))
    groups = []
    while order:
        best = order[0]
        low, high = np.quantile(resampled[:, [best]] - resampled[:, order], [0.025, 0.975], axis=0)
        tied = [i for i, a, b in zip(order, low, high, strict=True) if i == best or a <= 0 <= b]
        groups.append(tuple(trials[i].number for i in tied))
        order = [i for i in order if i not in tied]
    return tuple(group for group in groups if len(group) > 1)


def _pick(
    trials: Sequence[TrialRecord],
    points: Points,
    floor: Points,
    resampled: Points,
    objectives: Sequence[str],
    awaited: Collection[int],
) -> tuple[Pick, ...]:
    """Best, knee and smallest of the surest, the best first. What is still to be confirmed first is picked from as
    well: where time or the user ends it there, what was quick to confirm is not all that there is."""
    quality = np.array([trial.quality for trial in trials], dtype=float)
    params = np.array([trial.cost.trainable_parameters for trial in trials if trial.cost], dtype=float)
    confirmed = np.array([_is_confirmed(trial) for trial in trials])
    waiting = {trial.number for trial in trials if trial.number in awaited and not _was_tried(trial)}
    surest = {trial.number for trial in find_surest(trials, waiting)}
    eligible = np.flatnonzero([trial.number in surest for trial in trials])
    on_front = _is_on_front(points[eligible], floor)
    front = eligible[on_front] if on_front.any() else eligible
    best = max((int(i) for i in front), key=lambda i: (quality[i], -params[i]))
    # Within noise: in at least 1 of 40 resamples it is no worse than the best (a one-sided 2.5% test).
    ties = [int(i) for i in eligible if np.quantile(resampled[:, best] - resampled[:, i], 0.025) <= 0]
    # What the baseline dominates is tied as well, but nobody needs it.
    needed = [i for i in ties if _is_on_front(points[[i]], floor)[0]] or ties
    smallest = min(needed, key=lambda i: (params[i], -quality[i]))
    among = "confirmed" if confirmed[eligible].all() else "complete"
    of_them = " of those confirmed" if among == "confirmed" and len(eligible) < len(trials) else ""
    tied = f"{len(ties)} of {say_count(len(eligible), f'{among} trial')} cannot be told from the best on this split"
    axis, name = _knee_axis([trial.cost for trial in trials if trial.cost], objectives)
    chosen: list[tuple[PickName, int, str]] = [
        ("best", best, f"highest mean quality{of_them} on the search-validation split"),
        ("knee", _find_knee(quality, axis, front), f"best exchange of quality for {name}"),
        ("smallest", smallest, f"fewest trainable parameters; {tied}"),
    ]
    unsure = "; not confirmed with another seed yet"
    return tuple(
        Pick(name=kind, number=trials[i].number, why=why + (unsure if confirmed.any() and not confirmed[i] else ""))
        for kind, i, why in chosen
    )


def find_surest(trials: Sequence[TrialRecord], also: Collection[int] = ()) -> list[TrialRecord]:
    """Of complete trials those to choose the best from: once some are confirmed, they and the numbers in `also` alone.

    The highest of many single-seed scores is partly luck, and a mean over seeds would lose to it. What diverged with
    another seed is left out as long as there is anything else.
    """
    steady = [trial for trial in trials if not trial.diverges]
    if any(map(_is_confirmed, steady)):
        return [trial for trial in steady if trial.confirmations or trial.number in also]
    return steady or list(trials)


def _is_confirmed(trial: TrialRecord) -> bool:
    return bool(trial.confirmations) and not trial.diverges


def _was_tried(trial: TrialRecord) -> bool:
    return bool(trial.confirmations or trial.failed_confirmations)


def _knee_axis(costs: Sequence[Cost], objectives: Sequence[str]) -> tuple[Points, str]:
    """The first cost objective, else parameters, and its name."""
    names = {"vram": "peak VRAM", "params": "trainable parameters", "size": "bytes on disk", "latency": "latency"}
    first = next((name for name in objectives if name != "quality"), "params")
    return np.array([cost_value(cost, first) for cost in costs], dtype=float), names[first]


def _find_knee(quality: Points, cost: Points, front: npt.NDArray[np.int64]) -> int:
    """The front member farthest above the line from the cheapest to the best, both axes scaled to [0, 1]."""
    flat = front[find_nondominated(np.column_stack([-quality[front], cost[front]]))]

    def scale(values: Points) -> Points:
        spread = values.max() - values.min()
        return (values - values.min()) / spread if spread > 0 else np.zeros(len(values))

    gain = scale(quality[flat]) - scale(cost[flat])
    return int(flat[max(range(len(flat)), key=lambda i: (gain[i], quality[flat[i]]))])
