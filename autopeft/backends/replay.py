"""Recorded learning curves as a backend on a simulated clock: any search, any budget, in seconds.

A recording holds what configurations scored at every rung when they were trained to their end, and what that took.
Asked for a stretch, the backend answers from it. Nothing is interpolated: what was not recorded cannot be asked for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.backends.base import Ended, Event, Finished, Ready, Score, Stretch
from autopeft.errors import SpecError
from autopeft.methods import fill_settings
from autopeft.records import Cost, Failed, Provenance, RungScore, StudyConfig, TrialSpec, from_record, to_record


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """One configuration, trained to its full length or to its failure."""

    spec: TrialSpec
    cost: Cost
    rungs: tuple[RungScore, ...]
    failed: Failed | None
    lost_seconds: float
    """Device-seconds of the stretch that failed."""
    test_quality: float | None = None
    """At full length on examples that no search sees; None where only search-validation was scored."""

    @property
    def final_quality(self) -> float | None:
        """What the configuration is worth: on the test split where that is known. None where it failed."""
        if self.failed is not None:
            return None
        return self.rungs[-1].quality if self.test_quality is None else self.test_quality


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
    """Curves with what each answered on the search-validation split, where that was kept."""

    curves: Curves
    losses: npt.NDArray[np.float16] | None
    """(curves * rungs, examples); NaN where a curve ended earlier. None where only means were recorded."""
    predictions: npt.NDArray[np.int16] | None
    labels: npt.NDArray[np.int64]


def write_recording(recording: Recording, path: Path) -> None:
    assert recording.losses is not None
    assert recording.predictions is not None
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


def join_recordings(first: Recording, second: Recording) -> Recording:
    """Curves of both. Raises ValueError where they do not measure the same."""
    for name in ("rungs", "task_name", "model", "seed", "objectives"):
        if getattr(first.curves.config, name) != getattr(second.curves.config, name):
            raise ValueError(f"the recordings differ in {name}: start another with --record FILE")
    if first.curves.provenance.task_digest != second.curves.provenance.task_digest:
        raise ValueError("the recordings differ in their data: start another with --record FILE")
    assert first.losses is not None
    assert first.predictions is not None
    assert second.losses is not None
    assert second.predictions is not None
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


class ReplayBackend:
    """Answers every stretch from a recording. Files are not written: `read_scores` gives what they would hold."""

    def __init__(self, recording: Recording) -> None:
        self.recording = recording
        self._rows: dict[str, int] = {}
        self._curves: dict[str, Curve] = {}
        for place, curve in enumerate(recording.curves.curves):
            self.add(curve, place)

    def add(self, curve: Curve, place: int) -> None:
        """A curve to be had, whose per-example losses and predictions are those of the recording's at `place`."""
        self._curves[curve.spec.key()] = curve
        for rung, score in enumerate(curve.rungs):
            self._rows[_scores_name(curve.spec, score.step)] = place * len(self.recording.curves.config.rungs) + rung

    def ready(self) -> Ready:
        provenance = self.recording.curves.provenance
        return Ready(
            device_name=provenance.device, packages=provenance.packages, model_digest=provenance.model_digest,
            num_parameters=0,
        )  # fmt: skip

    def run(self, stretch: Stretch, emit: Callable[[Event], None]) -> Finished | Ended:
        curve = self._curves[stretch.spec.key()]
        passed = [score for score in curve.rungs if stretch.from_step < score.step <= stretch.to_step]
        if not passed or passed[-1].step < stretch.to_step:
            assert curve.failed is not None, f"no score was recorded at step {stretch.to_step}"
            seconds = sum(score.device_seconds for score in passed) + curve.lost_seconds
            failed = curve.failed
            return Ended(job=stretch.job, reason=failed.reason, detail=failed.detail, simulated_seconds=seconds)
        last = passed[-1]
        rate = self.recording.curves.device_rate
        train_seconds = sum(score.train_seconds for score in passed)
        # A rung that is passed over costs its steps, not its scoring and pausing.
        overhead = max(0.0, last.device_seconds - last.train_seconds * rate)
        return Finished(
            job=stretch.job,
            validation=Score(
                quality=last.quality, loss=last.loss, num_examples=last.num_examples, quality_sd=last.quality_sd
            ),
            test=None,
            scores_file=_scores_name(curve.spec, last.step),
            scores_digest=last.scores_digest,
            train_seconds=train_seconds,
            checkpoint=f"checkpoints/trial-{stretch.trial:05d}" if stretch.save else None,
            checkpoint_digest=None,
            simulated_seconds=train_seconds * rate + overhead,
        )

    def read_scores(self, scores_file: str, key: str) -> npt.NDArray[Any] | None:
        """`validation_losses` or `validation_predictions`, (N,); None where the recording kept means alone."""
        arrays = {"validation_losses": self.recording.losses, "validation_predictions": self.recording.predictions}
        rows = arrays[key]
        return None if rows is None else rows[self._rows[scores_file]]


class ReplayCostModel:
    """Costs as they were recorded."""

    def __init__(self, recording: Recording) -> None:
        self._costs = {curve.spec.cost_key(): curve.cost for curve in recording.curves.curves}

    def cost(self, spec: TrialSpec) -> Cost:
        if spec.cost_key() not in self._costs:
            raise SpecError(f"This configuration of {spec.method} was not recorded. Ask for the nearest that was.")
        return self._costs[spec.cost_key()]


def _scores_name(spec: TrialSpec, step: int) -> str:
    return f"{spec.key()}-{step}"
