"""What a study has trained, as a recording that `autopeft.backends.replay` plays back."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from autopeft.backends.replay import Curve, Curves, Recording
from autopeft.records import Failed
from autopeft.search.store import StudyStore, Trial


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
