"""A leaderboard's standings as Markdown, to read, and as CSV, to compute with."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import NamedTuple

from autopeft.report.standings import Standing, group_rivals
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
    title_scorer,
)
from autopeft.wording import say_count

_COLUMNS = (
    "rank",
    "first_place",
    "last_place",
    "method",
    "configuration",
    "bits",
    "learning_rate",
    "steps",
    "quality",
    "quality_sd",
    "num_seeds",
    "test_quality",
    "test_quality_sd",
    "num_test_seeds",
    "trainable_parameters",
    "head_parameters",
    "peak_vram_bytes",
    "vram_source",
    "adapter_bytes",
    "latency_seconds",
    "latency_device",
    "device_seconds",
    "on_front",
    "studies",
    "date",
    "scorer",
    "scoring",
    "task_digest",
    "model_digest",
    "key",
)


def render_csv(standings: Sequence[Standing]) -> str:
    """Every number at full precision; empty where it was not measured."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(_COLUMNS)
    writer.writerows(_csv_row(standing) for standing in standings)
    return out.getvalue()


def render_markdown(task_name: str, model: str, standings: Sequence[Standing]) -> str:
    groups = group_rivals(standings)
    lines = [f"# {escape_markdown(task_name)} on {escape_markdown(model)}", "", *_explain(standings)]
    for (task_digest, model_digest, scorer, scoring), group in groups.items():
        if len(groups) > 1:
            parts = (f"Data {task_digest}", f"weights {model_digest}", title_scorer(scorer), scoring)
            lines += ["", f"## {', '.join(escape_markdown(part) for part in parts if part)}"]
        lines += ["", *_markdown_table(group)]
    return "\n".join(lines) + "\n"


def escape_markdown(text: str) -> str:
    """`text` as Markdown shows it literally, inside a table too."""
    text = " ".join(text.split())
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*\[\]|~$#!])", r"\\\1", text)
    return re.sub(r"(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])", r"\\_", text)


def _csv_row(standing: Standing) -> list[object]:
    entry, spec, cost = standing.entry, standing.entry.spec, standing.cost
    return [
        standing.rank,
        *(standing.places or (None, None)),
        standing.title if spec is None or entry.kind != "trial" else spec.method,
        "" if spec is None else describe_settings(spec),
        None if spec is None else spec.bits,
        None if spec is None else spec.learning_rate,
        None if spec is None else spec.max_steps,
        standing.quality,
        standing.quality_sd,
        None if spec is None else standing.num_seeds,
        standing.test_quality,
        standing.test_quality_sd,
        None if spec is None else standing.num_test_seeds,
        None if cost is None else cost.trainable_parameters,
        None if cost is None else cost.head_parameters,
        None if cost is None else cost.peak_vram_bytes,
        None if cost is None else cost.vram_source,
        standing.adapter_bytes,
        standing.latency_seconds,
        standing.latency_device,
        None if entry.kind == "majority" else standing.device_seconds,
        standing.on_front,
        "; ".join(standing.studies),
        standing.date,
        entry.scorer,
        entry.scoring,
        entry.task_digest,
        entry.model_digest,
        entry.key,
    ]


def _explain(standings: Sequence[Standing]) -> list[str]:
    scorers = {standing.entry.scorer for standing in standings}
    scorer = title_scorer(*scorers) if len(scorers) == 1 else "quality"
    return [
        f"Ranked by {escape_markdown(scorer)} on search-validation, mean over seeds ± standard deviation; test scores "
        "stand beside it and rank nothing. In brackets after a rank, where the data leave it open: the ranks that it "
        "may have, for differences below two standard errors, over examples and seeds. Only full-length runs are here. "
        "Front: no other row is at least as good in quality, peak VRAM and trainable parameters, and better in one; "
        "baselines are not ranked. Device time is that of one run. Saved size and latency, where a study knew them, "
        "stand beside it and decide nothing: latency is that of one example alone, merged where the method merges.",
    ]


class _Shown(NamedTuple):
    """What one table has columns for, and where its cells must say more, because its rows are not alike in it."""

    vram_sources: set[str]
    size: bool
    latency_devices: set[str]

    @classmethod
    def of(cls, group: Sequence[Standing]) -> _Shown:
        return cls(
            vram_sources={standing.cost.vram_source for standing in group if standing.cost is not None},
            size=any(standing.adapter_bytes is not None for standing in group),
            latency_devices={standing.latency_device for standing in group if standing.latency_device is not None},
        )

    def titles(self) -> list[str]:
        titles = ["Rank", "Method", "Configuration", "Bits", "Learning rate", "Steps", "Quality", "Test"]
        titles += ["Params", "Head", _title("Peak VRAM", self.vram_sources)]
        titles += ["Saved"] if self.size else []
        titles += [_title("Latency", self.latency_devices)] if self.latency_devices else []
        return [*titles, "Device time", "Front", "Studies", "Date"]


def _title(title: str, sources: set[str]) -> str:
    return f"{title}, {min(sources)}" if len(sources) == 1 else title


def _markdown_table(group: Sequence[Standing]) -> list[str]:
    shown = _Shown.of(group)
    header = shown.titles()
    left = {"Method", "Configuration", "Front", "Studies"}
    rule = [":--" if title in left else "--:" for title in header]
    rows = [_markdown_row(standing, shown) for standing in group]
    return [f"| {' | '.join(cells)} |" for cells in ([escape_markdown(title) for title in header], rule, *rows)]


def _markdown_row(standing: Standing, shown: _Shown) -> list[str]:
    entry, spec, cost = standing.entry, standing.entry.spec, standing.cost
    cells = [
        _place(standing),
        standing.title,
        (describe_settings(spec) if spec else "") or NOTHING,
        str(spec.bits) if spec else NOTHING,
        format_learning_rate(spec.learning_rate) if spec else NOTHING,
        f"{spec.max_steps:,}" if spec else NOTHING,
        _score(standing.quality, standing.quality_sd, None if spec is None else standing.num_seeds, entry.scorer),
        _score(
            standing.test_quality,
            standing.test_quality_sd,
            None if spec is None else standing.num_test_seeds,
            entry.scorer,
        ),
        format_count(cost.trainable_parameters) if cost else NOTHING,
        format_count(cost.head_parameters) if cost else NOTHING,
        _sourced(format_bytes(cost.peak_vram_bytes), cost.vram_source, shown.vram_sources) if cost else NOTHING,
        *_serving(standing, shown),
        NOTHING if entry.kind == "majority" else format_seconds(standing.device_seconds),
        "yes" if standing.on_front else "",
        ", ".join(standing.studies),
        standing.date,
    ]
    return [escape_markdown(cell) for cell in cells]


def _serving(standing: Standing, shown: _Shown) -> list[str]:
    cells = []
    if shown.size:
        cells.append(NOTHING if standing.adapter_bytes is None else format_bytes(standing.adapter_bytes))
    if shown.latency_devices:
        seconds, device = standing.latency_seconds, standing.latency_device
        cells.append(
            NOTHING
            if seconds is None or device is None
            else _sourced(format_latency(seconds), device, shown.latency_devices)
        )
    return cells


def _sourced(text: str, source: str, sources: set[str]) -> str:
    """With its source, unless the column's title says it for all."""
    return f"{text} ({source})" if len(sources) > 1 else text


def _place(standing: Standing) -> str:
    """`2 (1\u20134)`: the rank, and those that it cannot be told from."""
    if standing.rank is None:
        return NOTHING
    first, last = standing.places or (standing.rank, standing.rank)
    return str(standing.rank) if first == last else f"{standing.rank} ({first}\u2013{last})"


def _score(mean: float | None, deviation: float | None, num_seeds: int | None, scorer: str) -> str:
    if mean is None:
        return NOTHING
    spread = "" if deviation is None else f" ± {format_margin(deviation, scorer)}"
    seeds = "" if num_seeds is None else f" ({say_count(num_seeds, 'seed')})"
    return f"{format_quality(mean, scorer)}{spread}{seeds}"
