"""The table of all trials, as cells that know both what they show and what they sort by."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from autopeft.records import Failed, Refused, Stopped, StudyRecord, TrialRecord
from autopeft.report.certainty import tie_letter
from autopeft.report.palette import Mark
from autopeft.report.scores import (
    Score,
    all_trials,
    held_out_score,
    serving_seconds,
    unmerged_seconds,
    validation_score,
    vram_title,
)
from autopeft.report.words import (
    NOTHING,
    describe_settings,
    format_bytes,
    format_count,
    format_latency,
    format_learning_rate,
    format_margin,
    format_quality,
    format_seconds,
    title_method,
    title_scorer,
)


class Column(NamedTuple):
    title: str
    kind: Literal["text", "number"]
    hint: str = ""


class Cell(NamedTuple):
    """What a cell shows, and the value it sorts by; cells without one sort last."""

    text: str
    value: float | str | None
    note: str = ""
    mark: Mark | None = None


class Row(NamedTuple):
    cells: list[Cell]
    state: str
    on_front: bool


EMPTY = Cell(NOTHING, None)


def list_columns(study: StudyRecord) -> list[Column]:
    return [
        Column("#", "number", "Trial number"),
        Column("Method", "text"),
        Column("Configuration", "text"),
        Column("Bits", "number", "Width of the base weights"),
        Column("Learning rate", "number"),
        Column("State", "text", "A stopped trial names the one that was clearly better and costs no more"),
        Column(
            "Quality", "number", f"{title_scorer(study.config.scorer)} on search-validation at the last rung reached"
        ),
        Column("±", "number", "Standard deviation over seeds; with one seed the standard error over the examples"),
        Column("Test", "number", f"{title_scorer(study.config.scorer)} on held-out data, mean over confirmed seeds"),
        Column("Params", "number", f"Trainable parameters, exact{', task head apart' if has_head(study) else ''}"),
        *([Column("Head", "number", "Trainable parameters of the task head")] if has_head(study) else []),
        Column(vram_title(all_trials(study)), "number"),
        *_serving_columns(study),
        Column("Steps", "number", "Optimizer steps reached, of the full length"),
        Column("Device time", "number", "All stretches, confirmations included"),
        Column(
            "On front",
            "number",
            "Share of bootstrap resamples in which it is on the front; members of a tie cannot be told apart",
        ),
    ]


def has_head(study: StudyRecord) -> bool:
    """Whether models have a task head, which trains beside every adapter."""
    return study.config.task_kind == "classification"


def _serving_columns(study: StudyRecord) -> list[Column]:
    """What serving costs, where anything of it is known."""
    columns = []
    if _knows_size(study):
        hint = f"Tensors of the saved adapter{', task head included' if has_head(study) else ''}"
        columns.append(Column("Saved", "number", hint))
    if _knows_latency(study):
        hint = "Of one example alone on the study's device, merged where the method merges; unmerged once confirmed"
        columns.append(Column("Latency", "number", hint))
    return columns


def _knows_size(study: StudyRecord) -> bool:
    return any(trial.cost is not None and trial.cost.adapter_bytes is not None for trial in all_trials(study))


def _knows_latency(study: StudyRecord) -> bool:
    return any(serving_seconds(trial) is not None for trial in all_trials(study))


def list_rows(study: StudyRecord, marks: dict[str, Mark]) -> list[Row]:
    confidence = {member.number: member.confidence for member in study.front}
    mixed = "," not in vram_title(all_trials(study))
    return [
        Row(
            [
                *_what(trial, marks[trial.spec.method]),
                *_scores(study, trial),
                *_costs(trial, mixed, has_head(study)),
                *_serving(study, trial),
                *_effort(trial, confidence, tie_letter(study, trial.number)),
            ],
            trial.state,
            trial.number in confidence,
        )
        for trial in all_trials(study)
    ]


def explain_end(trial: TrialRecord) -> str:
    """Why a trial failed or was refused; empty where it was not."""
    match trial.outcome:
        case Failed(reason=reason, detail=detail):
            return f"{reason.replace('_', ' ').capitalize()}: {detail}"
        case Refused(rule=rule):
            return rule
        case _:
            return ""


def _annotate_state(trial: TrialRecord) -> str:
    """Who stopped a trial, else where it came from."""
    if isinstance(trial.outcome, Stopped):
        return f"lost to #{trial.outcome.rival}"
    return {"included": "yours", "prior": "warm start", "baseline": "baseline", "recipe": "recipe"}.get(
        trial.source, ""
    )


def _what(trial: TrialRecord, mark: Mark) -> list[Cell]:
    spec = trial.spec
    method, settings = title_method(spec.method), describe_settings(spec)
    return [
        Cell(str(trial.number) if trial.number >= 0 else NOTHING, trial.number),
        Cell(method, method.lower(), mark=mark),
        Cell(settings or NOTHING, settings.lower() or None, explain_end(trial)),
        Cell(str(spec.bits), spec.bits),
        Cell(format_learning_rate(spec.learning_rate), spec.learning_rate),
        Cell(trial.state, trial.state, _annotate_state(trial)),
    ]


def _scores(study: StudyRecord, trial: TrialRecord) -> list[Cell]:
    scorer = study.config.scorer
    score, test = validation_score(trial, scorer), held_out_score(trial, scorer)
    spread = None if score is None else score.spread
    return [
        _score_cell(score, scorer),
        EMPTY if spread is None else Cell(format_margin(spread, scorer), spread),
        _score_cell(test, scorer),
    ]


def _score_cell(score: Score | None, scorer: str) -> Cell:
    if score is None:
        return EMPTY
    seeds = f"{score.num_seeds} seeds" if score.num_seeds > 1 else ""
    return Cell(format_quality(score.mean, scorer), score.mean, seeds)


def _costs(trial: TrialRecord, mixed: bool, with_head: bool) -> list[Cell]:
    cost = trial.cost
    if cost is None:
        return [EMPTY] * (3 if with_head else 2)
    return [
        Cell(format_count(cost.trainable_parameters), cost.trainable_parameters),
        *([Cell(format_count(cost.head_parameters), cost.head_parameters)] if with_head else []),
        Cell(format_bytes(cost.peak_vram_bytes), cost.peak_vram_bytes, cost.vram_source if mixed else ""),
    ]


def _serving(study: StudyRecord, trial: TrialRecord) -> list[Cell]:
    cells = []
    if _knows_size(study):
        size = None if trial.cost is None else trial.cost.adapter_bytes
        cells.append(EMPTY if size is None else Cell(format_bytes(size), size))
    if _knows_latency(study):
        seconds, unmerged = serving_seconds(trial), unmerged_seconds(trial)
        note = "" if unmerged is None else f"{format_latency(unmerged)} unmerged"
        cells.append(EMPTY if seconds is None else Cell(format_latency(seconds), seconds, note))
    return cells


def _effort(trial: TrialRecord, confidence: dict[int, float], tie: str) -> list[Cell]:
    steps = trial.rungs[-1].step if trial.rungs else 0
    seconds = trial.device_seconds + sum(c.device_seconds for c in trial.confirmations)
    share = confidence.get(trial.number)
    return [
        Cell(f"{steps:,}", steps, "" if steps >= trial.spec.max_steps else f"of {trial.spec.max_steps:,}"),
        Cell(format_seconds(seconds), seconds) if seconds else EMPTY,
        EMPTY if share is None else Cell(f"{share:.0%}", share, f"tie {tie}" if tie else ""),
    ]


def list_states(rows: Sequence[Row]) -> list[str]:
    return sorted({row.state for row in rows})
