"""The figure a report is opened for: quality against what it costs, and the front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

from autopeft.records import StudyRecord, TrialRecord
from autopeft.report.charts import Figure, axis, compact, layout, quality_axis, reference_line
from autopeft.report.hover import hover_text
from autopeft.report.palette import Mark
from autopeft.report.scores import Score, all_trials, undominated, validation_score, vram_title
from autopeft.report.words import describe_floor, format_quality

CostAxis = Literal["vram", "params", "size", "latency"]
Standing = Literal["front", "complete", "unfinished"]

# Standing -> (marker size, opacity). Unfinished trials are drawn open besides.
_LOOKS: dict[Standing, tuple[int, float]] = {"unfinished": (8, 0.5), "complete": (8, 0.45), "front": (12, 1.0)}


class Point(NamedTuple):
    """One trial on the figure."""

    trial: TrialRecord
    x: float
    score: Score
    standing: Standing


def front_figure(study: StudyRecord, cost: CostAxis, marks: dict[str, Mark]) -> Figure:
    """Quality against one cost. Trials without a score or a cost have no place on it."""
    points = list_points(study, cost)
    traces = [_front_line(points)] if cost in study.config.objectives else []
    for standing in _LOOKS:
        for method in marks:
            group = [p for p in points if p.standing == standing and p.trial.spec.method == method]
            if group:
                traces.append(_trace(study, group, marks[method]))
    traces += _rings(points)
    shapes, labels = _references(study)
    ranges = {"all": _range(points, shapes), "front": _range([p for p in points if p.standing == "front"], [])}
    return {
        "data": traces,
        "layout": layout(
            _cost_axis(study, cost, points),
            quality_axis(study.config.scorer, range=ranges["all"]),
            height=480,
            shapes=shapes,
            annotations=[*labels, *_pick_labels(study, points, cost)],
            meta={"ranges": ranges},
        ),
    }


def list_points(study: StudyRecord, cost: CostAxis) -> list[Point]:
    """Scored trials in the order of their numbers, worst standing decided by state, best by the study's front."""
    members = {member.number for member in study.front}
    points = []
    for trial in all_trials(study):
        score, x = validation_score(trial, study.config.scorer), cost_value(trial, cost)
        if score is None or x is None or not math.isfinite(score.mean):
            continue
        finished: Standing = "complete" if trial.state == "complete" else "unfinished"
        points.append(Point(trial, x, score, "front" if trial.number in members else finished))
    return points


def cost_value(trial: TrialRecord, cost: CostAxis) -> float | None:
    """GiB, trainable parameters without the head, saved MiB, or milliseconds; None where unknown, or zero, which a log
    axis cannot show."""
    if trial.cost is None:
        return None
    if cost == "vram":
        return trial.cost.peak_vram_bytes / 2**30
    if cost == "size":
        return (trial.cost.adapter_bytes or 0) / 2**20 or None
    if cost == "latency":
        return None if trial.cost.latency_seconds is None else 1e3 * trial.cost.latency_seconds
    return float(trial.cost.trainable_parameters) or None


def _trace(study: StudyRecord, group: Sequence[Point], mark: Mark) -> dict[str, Any]:
    standing = group[0].standing
    size, opacity = _LOOKS[standing]
    closed = standing != "unfinished"
    trace: dict[str, Any] = {
        "type": "scatter",
        "mode": "markers",
        "legendgroup": group[0].trial.spec.method,
        "x": [compact(p.x) for p in group],
        "y": [compact(p.score.mean) for p in group],
        "hoverinfo": "text",
        "hovertext": [hover_text(study, p.trial) for p in group],
        "marker": {
            "color": mark.colour,
            "symbol": mark.symbol if closed else f"{mark.symbol}-open",
            "size": size,
            "opacity": [1.0 if p.trial.source == "included" else opacity for p in group],
            "line": {"color": "@paper" if closed else mark.colour, "width": 1.2},
        },
    }
    if standing == "front":
        spreads = [compact(p.score.spread or 0.0) for p in group]
        trace["error_y"] = {"type": "data", "array": spreads, "color": mark.colour, "thickness": 1.5, "width": 4}
    return trace


def _front_line(points: Sequence[Point]) -> dict[str, Any]:
    """A step line through the members that nothing dominates on the two axes shown, drawn on to the right edge."""
    members = [p for p in points if p.standing == "front"]
    kept = undominated([(p.x, -p.score.mean) for p in members])
    steps = sorted((p.x, p.score.mean) for p, keep in zip(members, kept, strict=True) if keep)
    if steps:
        steps.append((max(p.x for p in points), steps[-1][1]))
    return {
        "type": "scatter",
        "mode": "lines",
        "x": [compact(x) for x, _ in steps],
        "y": [compact(y) for _, y in steps],
        "line": {"shape": "hv", "color": "@ink", "width": 1.5},
        "opacity": 0.55,
        "hoverinfo": "skip",
    }


def _rings(points: Sequence[Point]) -> list[dict[str, Any]]:
    """A ring and the word `yours` on each configuration that the user brought; hidden along with its method."""
    return [
        {
            "type": "scatter",
            "mode": "markers+text",
            "legendgroup": point.trial.spec.method,
            "x": [compact(point.x)],
            "y": [compact(point.score.mean)],
            "text": ["yours"],
            "textposition": "bottom center",
            "textfont": {"size": 12, "color": "@ink"},
            "marker": {"symbol": "circle-open", "size": 20, "color": "@ink", "line": {"width": 1.8}},
            "hoverinfo": "skip",
        }
        for point in points
        if point.trial.source == "included"
    ]


def _references(study: StudyRecord) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Lines at what no learning gives and at the trained head; the higher one is labelled above its line."""
    scorer, kind, floor = study.config.scorer, study.config.task_kind, study.config.majority_quality
    lines = [(floor, f"{describe_floor(kind)} {format_quality(floor, scorer)}")]
    head = None if study.baseline is None else study.baseline.quality
    if head is not None and kind == "classification":
        lines.append((head, f"trained head alone {format_quality(head, scorer)}"))
    # Sorted, so that of two at the same height one is labelled above and one below.
    lines = sorted((y, text) for y, text in lines if math.isfinite(y))
    drawn = [reference_line(y, text, above=place == len(lines) - 1) for place, (y, text) in enumerate(lines)]
    return [shape for shape, _ in drawn], [label for _, label in drawn]


def _pick_labels(study: StudyRecord, points: Sequence[Point], cost: CostAxis) -> list[dict[str, Any]]:
    """One arrow for each picked trial, with all the names it was picked under."""
    by_number = {p.trial.number: p for p in points}
    names: dict[int, list[str]] = {}
    for pick in study.picks:
        names.setdefault(pick.number, []).append(pick.name)
    labels = []
    for number, picked in names.items():
        if (point := by_number.get(number)) is None:
            continue
        below = picked == ["knee"]  # its neighbours on the front lie above it or to its left
        labels.append(
            {
                "x": math.log10(point.x)
                if cost in ("params", "size")
                else point.x,  # plotly wants exponents on log axes
                "y": point.score.mean,
                "text": ", ".join(picked),
                "ax": 26 if below else -26 if "smallest" in picked else 0,
                "ay": 40 if below else -36,
                "arrowcolor": "@muted",
                "arrowwidth": 1,
                "arrowhead": 0,
                "standoff": 8,
                "font": {"size": 13, "color": "@ink"},
            }
        )
    return labels


def _cost_axis(study: StudyRecord, cost: CostAxis, points: Sequence[Point]) -> dict[str, Any]:
    aside = "" if cost in study.config.objectives else " (not an objective of this study)"
    if cost == "vram":
        return axis(f"{vram_title([p.trial for p in points])}, GiB{aside}")
    if cost == "latency":
        return axis(f"Latency of one example, ms{aside}")
    if cost == "size":
        return axis(f"Saved size, MiB{aside}", type="log", dtick=_decades(points))
    apart = ", head apart" if study.config.task_kind == "classification" else ""
    return axis(f"Trainable parameters{apart}{aside}", type="log", tickformat="~s", dtick=_decades(points))


def _decades(points: Sequence[Point]) -> int | str:
    """A tick at every power of ten, or at 1, 2, 5 where there is hardly one."""
    xs = [p.x for p in points]
    return 1 if xs and max(xs) / min(xs) > 30 else "D2"


def _range(points: Sequence[Point], shapes: Sequence[dict[str, Any]]) -> list[float] | None:
    """Of the quality axis, so that all points, their bars and the reference lines lie inside with room for labels."""
    ends = [end for p in points for end in (p.score.mean - (p.score.spread or 0), p.score.mean + (p.score.spread or 0))]
    ends += [shape["y0"] for shape in shapes]
    if not ends:
        return None
    room = 0.12 * (max(ends) - min(ends)) or 0.05
    return [round(min(ends) - room, 5), round(max(ends) + room, 5)]
