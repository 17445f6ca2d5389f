"""What a leaderboard holds: entries, one a configuration, with their runs; and how studies' entries are merged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from autopeft.methods import fill_settings
from autopeft.records import Cost, StudyRecord, TrialRecord, TrialSpec, digest_json
from autopeft.report.scores import serving_seconds
from autopeft.tasks.spec import describe_scoring

EntryKind = Literal["trial", "head", "majority", "base"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One training of a configuration; or one study's majority class or untrained base, whose trial and seed are
    None."""

    study_uid: str
    study: str
    trial: int | None
    seed: int | None
    quality: float
    test_quality: float | None
    num_examples: int
    cost: Cost | None
    """With the latency of serving it on `device`, wherever that was measured, an objective or not."""
    device_seconds: float
    device: str
    autopeft: str
    created_at: str
    quality_sd: float | None = field(default=None, metadata={"leave_out_default": True})
    """Over the examples, where the quality is no share of right answers."""

    def identity(self) -> tuple[str, int, int]:
        return (self.study_uid, -1 if self.trial is None else self.trial, -1 if self.seed is None else self.seed)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One configuration on one version of the data and the weights, with all its runs."""

    key: str
    kind: EntryKind
    spec: TrialSpec | None
    """With the seed of its first run; None for what was not trained, the majority class and the untrained base."""
    scorer: str
    task_digest: str
    model_digest: str
    runs: tuple[Run, ...]
    scoring: str | None = field(default=None, metadata={"leave_out_default": True})
    """What else decides scores on the same rows, such as `max_length 128`; None in rows from before it was written."""

    def rivalry(self) -> tuple[str, str, str, str]:
        """What qualities must share to be compared: the digests of data and weights, and how they are scored."""
        return (self.task_digest, self.model_digest, self.scorer, self.scoring or "")


def list_entries(study: StudyRecord) -> list[Entry]:
    """What a study adds: its complete trials, the trained head where it is complete, and what no learning gives.

    Not what diverged with another seed: its score was luck.
    """
    entries = [_floor_entry(study)] if _has_floor(study) else []
    entries += [
        _trial_entry(study, trial, "trial")
        for trial in study.trials
        if _is_full_length(trial) and trial.source != "baseline" and not trial.diverges
    ]
    if study.baseline is not None and _is_full_length(study.baseline) and study.config.task_kind != "generation":
        entries.append(_trial_entry(study, study.baseline, "head"))
    return entries


def drop_study(entries: Iterable[Entry], uid: str) -> list[Entry]:
    """Without a study's runs: what it has to say now stands in their place."""
    left = [replace(entry, runs=tuple(run for run in entry.runs if run.study_uid != uid)) for entry in entries]
    return [entry for entry in left if entry.runs]


def merge_entries(entries: Iterable[Entry]) -> list[Entry]:
    """One entry a key and each run once, a later copy replacing an earlier; the order depends on the content alone."""
    merged: dict[str, Entry] = {}
    for entry in map(fill_entry, entries):
        known = merged.get(entry.key)
        runs = {run.identity(): run for run in (*(known.runs if known else ()), *entry.runs)}
        ordered = tuple(runs[identity] for identity in sorted(runs))
        merged[entry.key] = replace(entry, spec=_with_seed(entry.spec, ordered[0].seed), runs=ordered)
    return [merged[key] for key in sorted(merged)]


def _is_full_length(trial: TrialRecord) -> bool:
    return trial.state == "complete" and bool(trial.rungs) and math.isfinite(trial.rungs[-1].quality)


def _with_seed(spec: TrialSpec | None, seed: int | None) -> TrialSpec | None:
    return spec if spec is None or seed is None else replace(spec, seed=seed)


def _trial_entry(study: StudyRecord, trial: TrialRecord, kind: EntryKind) -> Entry:
    last = trial.rungs[-1]
    searched = _run(
        study,
        trial=trial.number,
        seed=trial.spec.seed,
        quality=last.quality,
        quality_sd=last.quality_sd,
        num_examples=last.num_examples,
        cost=trial.cost and replace(trial.cost, latency_seconds=serving_seconds(trial)),
        # What an interrupt lost belongs to no run.
        device_seconds=sum(score.device_seconds for score in trial.rungs),
    )
    confirmed = [
        replace(
            searched,
            seed=confirmation.seed,
            quality=confirmation.quality,
            test_quality=confirmation.test_quality,
            device_seconds=confirmation.device_seconds,
        )
        for confirmation in trial.confirmations
        if math.isfinite(confirmation.quality) and math.isfinite(confirmation.test_quality)
    ]
    return _entry(study, kind, trial.spec, (searched, *confirmed))


def _has_floor(study: StudyRecord) -> bool:
    if study.config.task_kind == "generation":
        return study.baseline is not None and _is_full_length(study.baseline)
    return math.isfinite(study.config.majority_quality)


def _floor_entry(study: StudyRecord) -> Entry:
    config = study.config
    run = _run(study, quality=config.majority_quality, num_examples=study.provenance.num_validation)
    run = replace(run, test_quality=config.majority_test_quality)
    if config.task_kind == "classification":
        return _entry(study, "majority", None, (run,))
    assert study.baseline is not None
    run = replace(run, cost=study.baseline.cost, device_seconds=study.baseline.device_seconds)
    return _entry(study, "base", None, (run,))


def _entry(study: StudyRecord, kind: EntryKind, spec: TrialSpec | None, runs: tuple[Run, ...]) -> Entry:
    provenance = study.provenance
    return _with_key(
        Entry(
            key="",
            kind=kind,
            spec=spec,
            scorer=study.config.scorer,
            scoring=describe_scoring(study.config.task),
            task_digest=provenance.task_digest,
            model_digest=provenance.model_digest,
            runs=runs,
        )
    )


def fill_entry(entry: Entry) -> Entry:
    """With what its method can be set to since it was written, at the defaults that it had then: the same configuration
    has the same key again."""
    return _with_key(replace(entry, spec=None if entry.spec is None else fill_settings(entry.spec)))


def _with_key(entry: Entry) -> Entry:
    rivalry = [part for part in entry.rivalry() if part]
    return replace(entry, key=digest_json([entry.kind, None if entry.spec is None else entry.spec.key(), *rivalry]))


def _run(study: StudyRecord, *, quality: float, num_examples: int, **known: Any) -> Run:
    unknown: dict[str, Any] = {"trial": None, "seed": None, "test_quality": None, "cost": None, "device_seconds": 0.0}
    return Run(
        study_uid=study.uid,
        study=study.config.name,
        quality=quality,
        num_examples=num_examples,
        device=study.provenance.device,
        autopeft=study.provenance.autopeft,
        created_at=study.provenance.created_at,
        **{**unknown, **known},
    )
