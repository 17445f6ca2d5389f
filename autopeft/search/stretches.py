"""Stretches: what workers are told, and what the study keeps of what they report."""

from __future__ import annotations

from dataclasses import replace

from autopeft.backends.base import Finished, Purpose, Stretch
from autopeft.records import Confirmation, Inference, Provenance, RungScore, TrialSpec
from autopeft.search.store import Trial
from autopeft.wording import say_count


def make_stretch(
    job: int,
    trial: Trial,
    purpose: Purpose,
    to_step: int,
    *,
    spec: TrialSpec | None = None,
    score_test: bool = False,
    measure_inference: bool = False,
) -> Stretch:
    """A search goes on from where the trial stands, anything else from the start; `spec` is the trial's own, or with
    another seed."""
    spec = spec or trial.spec
    from_step = trial.step if purpose == "search" else 0
    return Stretch(
        job=job,
        trial=trial.number,
        spec=spec,
        purpose=purpose,
        from_step=from_step,
        to_step=to_step,
        checkpoint=trial.checkpoint if from_step else None,
        checkpoint_digest=trial.checkpoint_digest if from_step else None,
        save=purpose == "search" and to_step < spec.max_steps,
        score_test=score_test,
        measure_inference=measure_inference,
        score_batch_size=trial.cost.scoring_batch_size if trial.cost is not None else None,
    )


def make_rung_score(finished: Finished, *, rung: int, step: int, device_seconds: float) -> RungScore:
    return RungScore(
        rung=rung,
        step=step,
        quality=finished.validation.quality,
        quality_sd=finished.validation.quality_sd,
        loss=finished.validation.loss,
        num_examples=finished.validation.num_examples,
        device_seconds=device_seconds,
        train_seconds=finished.train_seconds,
        scores_file=finished.scores_file,
        scores_digest=finished.scores_digest,
    )


def make_confirmation(
    finished: Finished, stretch: Stretch, provenance: Provenance, *, device_kind: str, device_seconds: float
) -> Confirmation:
    assert finished.test is not None
    return Confirmation(
        seed=stretch.spec.seed,
        quality=finished.validation.quality,
        loss=finished.validation.loss,
        test_quality=finished.test.quality,
        test_loss=finished.test.loss,
        test_quality_sd=finished.test.quality_sd,
        num_test_examples=finished.test.num_examples,
        device_seconds=device_seconds,
        scores_file=finished.scores_file,
        scores_digest=finished.scores_digest,
        inference=_name_device(finished.inference, provenance, device_kind),
    )


def _name_device(inference: Inference | None, provenance: Provenance, device_kind: str) -> Inference | None:
    """With the device's name as the study has it; a worker on CPU knows only the architecture."""
    if inference is None:
        return None
    count = say_count(provenance.threads, "thread")
    return replace(inference, device=provenance.device if device_kind == "cuda" else f"{provenance.device}, {count}")
