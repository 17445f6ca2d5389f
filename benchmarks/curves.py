"""Recorded learning curves, and an executor that plays them back on a simulated clock.

One unpruned study costs half an hour; replayed, any racing rule and any budget is tried on it in seconds.
"""

from __future__ import annotations

import heapq
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.backends.base import CostReply, Ended, Event, Finished, Pack, Ready, Score, Stretch
from autopeft.executors.base import WorkerEvent
from autopeft.methods import fill_settings
from autopeft.records import Cost, Failed, Provenance, RungScore, StudyConfig, TrialSpec, from_record, to_record
from autopeft.search.store import StudyStore, Trial


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One configuration, trained to its full length or to its failure."""

    spec: TrialSpec
    cost: Cost
    rungs: tuple[RungScore, ...]
    failed: Failed | None
    lost_seconds: float
    """Device-seconds of the stretch that failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curves:
    """A recorded study. Arrays have one row a curve and rung, in the order of `curves`."""

    config: StudyConfig
    provenance: Provenance
    reference: dict[str, float]
    """Of the hypervolume."""
    device_rate: float
    wall_seconds: tuple[float, ...]
    """Of each recording session's search, by the real clock."""
    machine: dict[str, str]
    curves: tuple[Curve, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """Curves with what each answered on the search-validation split."""

    curves: Curves
    losses: npt.NDArray[np.float16]
    """(curves * rungs, examples); NaN where a curve ended earlier."""
    predictions: npt.NDArray[np.int16]
    labels: npt.NDArray[np.int64]


def write_recording(recording: Recording, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(
        part,
        curves=np.array(json.dumps(to_record(recording.curves))),
        losses=recording.losses,
        predictions=recording.predictions,
        labels=recording.labels,
    )
    part.replace(path)


def read_recording(path: Path) -> Recording:
    with np.load(path) as arrays:
        curves: Curves = from_record(Curves, json.loads(str(arrays["curves"])), path.name)
        filled = tuple(replace(curve, spec=fill_settings(curve.spec)) for curve in curves.curves)
        return Recording(
            curves=replace(curves, curves=filled),
            losses=arrays["losses"],
            predictions=arrays["predictions"],
            labels=arrays["labels"],
        )


def make_recording(store: StudyStore, *, device_rate: float, wall_seconds: float, machine: dict[str, str]) -> Recording:
    """What an unpruned study recorded."""
    trials = [trial for trial in store.trials if trial.cost is not None and trial.state in ("complete", "failed")]
    rungs = store.config.rungs
    labels = store.read_labels()
    losses = np.full((len(trials) * len(rungs), len(labels)), np.nan, dtype=np.float16)
    predictions = np.zeros(losses.shape, dtype=np.int16)
    for t, trial in enumerate(trials):
        for r, score in enumerate(trial.rungs):
            losses[t * len(rungs) + r] = store.read_scores(score.scores_file, "validation_losses")
            predictions[t * len(rungs) + r] = store.read_scores(score.scores_file, "validation_predictions")
    curves = Curves(
        # The configurations stand in the curves; listing them twice would only make the file larger.
        config=replace(store.config, included=()),
        provenance=store.provenance,
        reference=store.reference,
        device_rate=device_rate,
        wall_seconds=(wall_seconds,),
        machine=machine,
        curves=tuple(_make_curve(trial) for trial in trials),
    )
    return Recording(curves=curves, losses=losses, predictions=predictions, labels=labels)


def _make_curve(trial: Trial) -> Curve:
    assert trial.cost is not None
    return Curve(
        spec=trial.spec,
        cost=trial.cost,
        rungs=tuple(trial.rungs),
        failed=trial.outcome if isinstance(trial.outcome, Failed) else None,
        lost_seconds=max(0.0, trial.device_seconds - sum(score.device_seconds for score in trial.rungs)),
    )


def join_recordings(first: Recording, second: Recording) -> Recording:
    """Curves of both. Raises ValueError where they do not measure the same."""
    for name in ("rungs", "task_name", "model", "seed", "objectives"):
        if getattr(first.curves.config, name) != getattr(second.curves.config, name):
            raise ValueError(f"the recordings differ in {name}: start another with --record FILE")
    if first.curves.provenance.task_digest != second.curves.provenance.task_digest:
        raise ValueError("the recordings differ in their data: start another with --record FILE")
    curves = replace(
        first.curves,
        wall_seconds=first.curves.wall_seconds + second.curves.wall_seconds,
        curves=first.curves.curves + second.curves.curves,
    )
    return Recording(
        curves=curves,
        losses=np.concatenate([first.losses, second.losses]),
        predictions=np.concatenate([first.predictions, second.predictions]),
        labels=first.labels,
    )


def even_pace(recording: Recording) -> Recording:
    """The same scores at the pace of each curve's fastest stretch, for a machine that was shared while recording.

    Neighbours make some stretches slower than others. Shares of time then say when the neighbours were busy; with one
    pace a curve, per step and per scoring pass, they say how many steps and passes were saved.
    """
    rate = recording.curves.device_rate
    curves = []
    for curve in recording.curves.curves:
        if not curve.rungs:
            curves.append(curve)
            continue
        steps = [b.step - (a.step if a else 0) for a, b in zip((None, *curve.rungs), curve.rungs, strict=False)]
        per_step = min(score.train_seconds / n for score, n in zip(curve.rungs, steps, strict=True))
        scoring = min(score.device_seconds / rate - score.train_seconds for score in curve.rungs)
        rungs = tuple(
            replace(score, train_seconds=n * per_step, device_seconds=(n * per_step + scoring) * rate)
            for score, n in zip(curve.rungs, steps, strict=True)
        )
        curves.append(replace(curve, rungs=rungs))
    return replace(recording, curves=replace(recording.curves, curves=tuple(curves)))


class ReplayExecutor:
    """Answers every stretch from a recording, when simulated time reaches its end."""

    def __init__(self, recording: Recording, scores_dir: Path, num_workers: int) -> None:
        """`scores_dir` holds the files that `write_scores` wrote."""
        self.num_workers = num_workers
        self.device_rate = recording.curves.device_rate
        self._provenance = recording.curves.provenance
        self._scores_dir = scores_dir
        self._curves: Mapping[str, Curve] = {curve.spec.key(): curve for curve in recording.curves.curves}
        self._costs = {curve.spec.cost_key(): curve.cost for curve in recording.curves.curves}
        self._now = 0.0
        self._due: list[tuple[float, int, WorkerEvent]] = []

    def start(self) -> list[Ready]:
        ready = Ready(
            device_name=self._provenance.device, packages=self._provenance.packages,
            model_digest=self._provenance.model_digest, num_parameters=0,
        )  # fmt: skip
        return [ready] * self.num_workers

    def assign(self, worker: int, pack: Pack) -> None:
        for stretch in pack.stretches:
            event, device_seconds = self._answer(stretch)
            due = self._now + device_seconds / self.device_rate
            heapq.heappush(self._due, (due, stretch.job, WorkerEvent(worker, event, due)))

    def _answer(self, stretch: Stretch) -> tuple[Event, float]:
        curve = self._curves[stretch.spec.key()]
        passed = [score for score in curve.rungs if stretch.from_step < score.step <= stretch.to_step]
        if not passed or passed[-1].step < stretch.to_step:
            assert curve.failed is not None, f"no score was recorded at step {stretch.to_step}"
            seconds = sum(score.device_seconds for score in passed) + curve.lost_seconds
            return Ended(job=stretch.job, reason=curve.failed.reason, detail=curve.failed.detail), seconds
        last = passed[-1]
        train_seconds = sum(score.train_seconds for score in passed)
        finished = Finished(
            job=stretch.job,
            validation=Score(quality=last.quality, loss=last.loss, num_examples=last.num_examples),
            test=None,
            # Absolute, so that the study's own folder is left out of it.
            scores_file=str(self._scores_dir / _scores_name(curve.spec, last.step)),
            scores_digest=last.scores_digest,
            train_seconds=train_seconds,
            checkpoint=f"checkpoints/trial-{stretch.trial:05d}" if stretch.save else None,
            checkpoint_digest=None,
        )
        # A rung that is passed over costs its steps, not its scoring and pausing.
        overhead = last.device_seconds - last.train_seconds * self.device_rate
        return finished, train_seconds * self.device_rate + max(0.0, overhead)

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        if not self._due or self._due[0][0] > self._now + timeout_seconds:
            assert math.isfinite(timeout_seconds), "waiting for ever with nothing running"
            self._now += timeout_seconds
            return []
        due, _, event = heapq.heappop(self._due)
        self._now = max(self._now, due)
        return [event]

    def restart(self, worker: int) -> None:
        raise AssertionError("replayed workers do not die")

    def cost(self, spec: TrialSpec) -> CostReply:
        return CostReply(cost=self._costs[spec.cost_key()], refused=None)

    def now(self) -> float:
        return self._now

    def close(self) -> None:
        self._due.clear()


def write_scores(recording: Recording, folder: Path) -> None:
    """Per-example files as a worker writes them, once for all replays."""
    folder.mkdir(parents=True, exist_ok=True)
    rungs = recording.curves.config.rungs
    for t, curve in enumerate(recording.curves.curves):
        for r, score in enumerate(curve.rungs):
            row = t * len(rungs) + r
            arrays: dict[str, Any] = {
                "validation_losses": recording.losses[row],
                "validation_predictions": recording.predictions[row],
            }
            np.savez(folder / _scores_name(curve.spec, score.step), **arrays)


def _scores_name(spec: TrialSpec, step: int) -> str:
    return f"{spec.key()}-{step}.npz"
