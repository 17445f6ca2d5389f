"""The HTML page: one file that opens offline, with everything a reader needs to believe or doubt the result."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from autopeft.methods import METHODS
from autopeft.records import StudyRecord, TrialRecord, WarmStart
from autopeft.report.cards import FindWay, Way, list_cards
from autopeft.report.certainty import list_extensions, say_stopped, say_ties
from autopeft.report.charts import Figure
from autopeft.report.figures import PURPOSES, curves_figure, timeline_figure
from autopeft.report.files import write_atomically
from autopeft.report.front_figure import CostAxis, cost_value, front_figure
from autopeft.report.memory import describe_memory
from autopeft.report.palette import Mark, mark_methods
from autopeft.report.rows import has_head, list_columns, list_rows, list_states
from autopeft.report.scores import all_trials, vram_title
from autopeft.report.spending import list_spending
from autopeft.report.verdict import count_states, write_verdict
from autopeft.report.words import format_quality, title_method, title_objective, title_scorer
from autopeft.tasks.scorers import GENERATION_SCORERS
from autopeft.wording import say_count

_FOLDER = Path(__file__).parent


def find_way_by_method(trial: TrialRecord) -> Way:
    """peft, unless the trial's method says that it cannot; for records that no target can be asked about."""
    method = METHODS.get(trial.spec.method)
    return Way("peft") if method is None or method.peft is not None else Way(None, method.why_not_peft)


def write_page(study: StudyRecord, path: Path, *, find_way: FindWay = find_way_by_method) -> None:
    """Writes the page atomically, making its folder where needed."""
    write_atomically(path, build_page(study, find_way=find_way))


def build_page(study: StudyRecord, *, find_way: FindWay = find_way_by_method) -> str:
    """The page's HTML: a function of the record alone, so that the same study gives the same bytes.

    `find_way` says how a pick is taken home (`export.find_way`, which the report's layer cannot import).
    """
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["code"] = mark_code
    trials = all_trials(study)
    marks = mark_methods(trial.spec.method for trial in trials)
    rows = list_rows(study, marks)
    titles = [title_objective(name) for name in study.config.objectives]
    return environment.get_template("template.html.j2").render(
        study=study,
        config=study.config,
        provenance=study.provenance,
        facts=_list_facts(study),
        verdict=write_verdict(study),
        states=count_states(study),
        notes=_list_notes(study),
        cards=list_cards(study, marks, find_way),
        legend=_legend(trials_methods=(trial.spec.method for trial in trials if trial.rungs), marks=marks),
        has_scores=any(trial.rungs for trial in trials),
        has_own=any(trial.source == "included" for trial in trials),
        num_off_axis=sum(bool(trial.rungs and trial.cost) and cost_value(trial, "params") is None for trial in trials),
        columns=list_columns(study),
        rows=rows,
        row_states=list_states(rows),
        ties=say_ties(study),
        stopped=say_stopped(study),
        extensions=list_extensions(study),
        spending=list_spending(study),
        purposes={segment.purpose: PURPOSES[segment.purpose] for segment in study.segments},
        marks=marks.values(),
        objectives=" and ".join(filter(None, [", ".join(titles[:-1]), *titles[-1:]])),
        scorer=title_scorer(study.config.scorer),
        scorer_meaning=GENERATION_SCORERS.get(study.config.scorer, ""),
        has_head=has_head(study),
        cost_axes=list(_list_cost_axes(study).items()),
        quality=lambda value: format_quality(value, study.config.scorer),
        origins=_list_origins(study),
        figures=embed_json(share_texts(_figures(study, marks))),
        style=_read("page.css"),
        script=_read("page.js"),
        plotly=Markup(get_plotlyjs()),  # holds no closing script tag, says a test
    )


def mark_code(text: str) -> Markup:
    """Text for terminals and Markdown as HTML, what stands between backticks as code."""
    parts = re.split("`([^`]*)`", text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if index % 2 else part for index, part in enumerate(parts)
    )


def embed_json(data: Any) -> Markup:
    """JSON that no HTML parser can take for markup, whatever its strings hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def share_texts(figures: dict[str, dict[str, Figure]]) -> dict[str, Any]:
    """The figures with each hover text replaced by its place in one list: a trial's stands in several of them."""
    places: dict[str, int] = {}
    views = [view for views in figures.values() for view in views.values()]
    for trace in (trace for view in views for trace in view["data"] if "hovertext" in trace):
        trace["hovertext"] = [
            None if text is None else places.setdefault(text, len(places)) for text in trace["hovertext"]
        ]
    return {"texts": list(places), "figures": figures}


def _read(name: str) -> Markup:
    return Markup((_FOLDER / name).read_text(encoding="utf-8"))


def _figures(study: StudyRecord, marks: dict[str, Mark]) -> dict[str, dict[str, Figure]]:
    return {
        "front": {cost: front_figure(study, cost, marks) for cost in _list_cost_axes(study)},
        "curves": {
            "quality": curves_figure(study, "quality", marks),
            "loss": curves_figure(study, "loss", marks),
        },
        "timeline": {"time": timeline_figure(study)},
    }


def _list_cost_axes(study: StudyRecord) -> dict[CostAxis, str]:
    """Title by cost; size and latency only where they are objectives."""
    axes: dict[CostAxis, str] = {"vram": vram_title(all_trials(study)), "params": "Trainable parameters"}
    serving: dict[CostAxis, str] = {"size": "Saved size", "latency": "Latency"}
    return axes | {cost: title for cost, title in serving.items() if cost in study.config.objectives}


def _legend(trials_methods: Iterable[str], marks: dict[str, Mark]) -> list[tuple[str, str, Mark]]:
    """(key, title, mark) of each method that appears in a figure."""
    return [(method, title_method(method), marks[method]) for method in sorted(set(trials_methods))]


def _list_facts(study: StudyRecord) -> list[tuple[str, str]]:
    config = study.config
    return [
        ("Task", config.task_name),
        ("Model", config.model),
        ("Budget", config.budget),
        ("Device", _describe_device(study)),
        ("Trials", count_states(study) or "none"),
    ]


def _describe_device(study: StudyRecord) -> str:
    """`2 x NVIDIA H100`, or the processor with the threads that each worker may use."""
    provenance = study.provenance
    count = f"{provenance.device_count} \u00d7 " if provenance.device_count > 1 else ""
    threads = "1 thread" if provenance.threads == 1 else f"{provenance.threads} threads"
    return f"{count}{provenance.device}" + (f", {threads} a worker" if study.config.device_kind == "cpu" else "")


def _list_notes(study: StudyRecord) -> list[str]:
    unfinished = f"This study is not finished. Continue it with: autopeft resume {shlex.quote(study.config.name)}"
    return [*study.notes, *([] if study.finished else [unfinished])]


def _describe_warm_start(warm_start: WarmStart) -> str:
    first = say_count(len(warm_start.first), "first configuration")
    return f"{first} by {', '.join(warm_start.sources)}; none of their results are in this study"


def _list_origins(study: StudyRecord) -> list[tuple[str, str]]:
    """What a sceptic would ask for: versions, digests, device, seeds, splits."""
    config, provenance = study.config, study.provenance
    return [
        ("Study", f"{config.name} ({study.uid})"),
        ("Started, UTC", provenance.created_at),
        ("autopeft", f"{provenance.autopeft}, Python {provenance.python}, {config.backend} backend"),
        ("Platform", provenance.platform),
        ("Device", _describe_device(study)),
        ("Model", f"{config.model}, digest {provenance.model_digest}"),
        ("Task", f"{config.task_name}, digest {provenance.task_digest}"),
        (
            "Examples",
            f"{provenance.num_train:,} training, {provenance.num_validation:,} search-validation, "
            f"{provenance.num_test:,} test",
        ),
        (
            "Search",
            f"space {config.space_name}, objectives {', '.join(config.objectives)}, "
            f"{say_count(config.workers, 'worker')}",
        ),
        ("Memory", describe_memory(study)),
        *([("Warm start", _describe_warm_start(config.warm_start))] if config.warm_start else []),
        ("Seed", f"{config.seed}; finalists confirmed with up to {config.confirm_seeds} more"),
        ("Packages", ", ".join(f"{name} {version}" for name, version in sorted(provenance.packages.items())) or "none"),
    ]
