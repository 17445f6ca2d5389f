"""The figures below the front: learning curves by rung, and where each worker's time went."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from autopeft.records import RungScore, StudyRecord, TrialRecord
from autopeft.report.charts import CLEAR, Figure, axis, compact, layout, quality_axis, reference_line
from autopeft.report.hover import escape, number_trial
from autopeft.report.palette import Mark
from autopeft.report.scores import all_trials
from autopeft.report.words import describe_floor, describe_spec, format_quality, format_seconds, title_method

Curve = Literal["quality", "loss"]

PURPOSES = {"search": "#64748b", "confirm": "#009e73", "baseline": "#a9b4c2", "lost": "#d55e00"}
"""Purpose of a stretch of device time -> its colour in the timeline and its legend."""


def curves_figure(study: StudyRecord, curve: Curve, marks: dict[str, Mark]) -> Figure:
    """A line for each trial through its rungs; those stopped, failed or refused at last end with a cross."""
    scored = [trial for trial in all_trials(study) if trial.rungs]
    members = {member.number for member in study.front}
    traces = []
    for method, mark in marks.items():
        group = [trial for trial in scored if trial.spec.method == method]
        best = [trial for trial in group if trial.number in members]
        rest = [trial for trial in group if trial.number not in members]
        traces += [_lines(study, rest, curve, mark, opacity=0.4, width=1.3)] if rest else []
        traces += [_lines(study, best, curve, mark, opacity=1.0, width=2.4)] if best else []
        if ended := [trial for trial in group if trial.state in ("stopped", "failed", "refused")]:
            traces.append(_crosses(ended, curve, mark))
    shapes, labels = [], []
    if curve == "quality" and math.isfinite(study.config.majority_quality):
        shape, label = reference_line(
            study.config.majority_quality, describe_floor(study.config.task_kind), above=False
        )
        shapes, labels = [shape], [label]
    unit = "token" if study.config.task_kind == "generation" else "example"
    y = quality_axis(study.config.scorer) if curve == "quality" else axis(f"Search-validation loss, nats per {unit}")
    return {"data": traces, "layout": layout(_step_axis(study), y, height=420, shapes=shapes, annotations=labels)}


def _lines(
    study: StudyRecord, trials: Sequence[TrialRecord], curve: Curve, mark: Mark, *, opacity: float, width: float
) -> dict[str, Any]:
    """All of a method's trials in one trace, with a gap between them: plotly is slow with hundreds of traces."""
    xs: list[int | None] = []
    ys: list[float | None] = []
    texts: list[str | None] = []
    for trial in trials:
        xs += [*(rung.step for rung in trial.rungs), None]
        ys += [*(_height(rung, curve) for rung in trial.rungs), None]
        texts += [*(_rung_text(study, trial, rung) for rung in trial.rungs), None]
    return {
        "type": "scatter",
        "mode": "lines+markers",
        "legendgroup": trials[0].spec.method,
        "x": xs,
        "y": ys,
        "hovertext": texts,
        "hoverinfo": "text",
        "opacity": opacity,
        "line": {"color": mark.colour, "width": width},
        "marker": {"color": mark.colour, "symbol": mark.symbol, "size": 5 if width < 2 else 7},
    }


def _crosses(trials: Sequence[TrialRecord], curve: Curve, mark: Mark) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "markers",
        "legendgroup": trials[0].spec.method,
        "x": [trial.rungs[-1].step for trial in trials],
        "y": [_height(trial.rungs[-1], curve) for trial in trials],
        "hoverinfo": "skip",
        "opacity": 0.8,
        "marker": {"color": mark.colour, "symbol": "x-thin", "size": 9, "line": {"color": mark.colour, "width": 2}},
    }


def _height(rung: RungScore, curve: Curve) -> float | None:
    return compact(rung.quality if curve == "quality" else rung.loss)


def _rung_text(study: StudyRecord, trial: TrialRecord, rung: RungScore) -> str:
    quality = format_quality(rung.quality, study.config.scorer)
    head = f"<b>{number_trial(trial.number)}</b> {escape(describe_spec(trial.spec))}"
    return f"{head}<br>step {rung.step:,}: {quality}, loss {rung.loss:.3f} ({trial.state})"


def _step_axis(study: StudyRecord) -> dict[str, Any]:
    """Ticks at the rungs, on a log scale where they are multiples of each other, as successive halving's are."""
    rungs = study.config.rungs
    ticks = {"tickmode": "array", "tickvals": list(rungs), "ticktext": [f"{step:,}" for step in rungs]}
    scale = "log" if rungs and rungs[0] > 0 and rungs[-1] / rungs[0] >= 4 else "linear"
    return axis("Optimizer steps (rungs)", type=scale, **ticks)


def timeline_figure(study: StudyRecord) -> Figure:
    """A bar for each stretch of each worker's time, by purpose, against wall time."""
    workers = sorted({segment.worker for segment in study.segments})
    last = max((segment.end_seconds for segment in study.segments), default=0.0)
    unit, divisor = ("hours", 3600.0) if last > 5400 else ("minutes", 60.0) if last > 90 else ("seconds", 1.0)
    methods = {trial.number: title_method(trial.spec.method) for trial in all_trials(study)}
    traces = []
    for purpose, colour in PURPOSES.items():
        segments = [segment for segment in study.segments if segment.purpose == purpose]
        if not segments:
            continue
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "y": [f"worker {segment.worker}" for segment in segments],
                "base": [compact(segment.start_seconds / divisor) for segment in segments],
                "x": [compact((segment.end_seconds - segment.start_seconds) / divisor) for segment in segments],
                "hovertext": [
                    f"<b>{number_trial(s.trial)}</b> {escape(methods.get(s.trial, ''))}<br>"
                    f"{purpose} to step {s.step:,}, {format_seconds(s.end_seconds - s.start_seconds)}"
                    for s in segments
                ],
                "hoverinfo": "text",
                "marker": {"color": colour, "line": {"color": "@paper", "width": 1}},
            }
        )
    names = [f"worker {worker}" for worker in workers]
    y = axis(
        "",
        type="category",
        categoryorder="array",
        categoryarray=names,
        autorange="reversed",
        showgrid=False,
        ticks="outside",
        ticklen=6,
        tickcolor=CLEAR,
    )
    x = axis(f"Wall time, {unit}", rangemode="tozero")
    return {"data": traces, "layout": layout(x, y, height=90 + 34 * len(workers), barmode="overlay", bargap=0.25)}
