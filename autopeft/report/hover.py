"""Text for plotly's hover labels, which render a subset of HTML: everything from a record is escaped here."""

from __future__ import annotations

import html
import textwrap

from autopeft.records import StudyRecord, TrialRecord
from autopeft.report.scores import held_out_score, validation_score
from autopeft.report.words import (
    describe_settings,
    describe_training,
    format_count,
    format_learning_rate,
    format_vram,
    title_method,
)


def escape(text: str) -> str:
    """`text` as plotly shows it literally."""
    return html.escape(text, quote=False)


def number_trial(number: int) -> str:
    """`#3`; the baseline has none."""
    return f"#{number}" if number >= 0 else "baseline"


def hover_text(study: StudyRecord, trial: TrialRecord) -> str:
    """A trial's whole configuration, scores, costs and standing."""
    spec, scorer = trial.spec, study.config.scorer
    training = f"{spec.bits} bits, lr {format_learning_rate(spec.learning_rate)}, {describe_training(spec)}"
    lines = [f"<b>{escape(f'{title_method(spec.method)} {number_trial(trial.number)}')}</b>"]
    for sentence in (describe_settings(spec), training):
        lines += [escape(line) for line in textwrap.wrap(sentence, 58)]
    if (score := validation_score(trial, scorer)) is not None:
        lines.append(f"{score.text(scorer)} at step {trial.rungs[-1].step:,} ({score.basis()})")
    if (test := held_out_score(trial, scorer)) is not None:
        lines.append(f"test {test.text(scorer)} ({test.basis()})")
    if (cost := trial.cost) is not None:
        head = f" + {format_count(cost.head_parameters)} head" if study.config.task_kind == "classification" else ""
        lines.append(f"{format_count(cost.trainable_parameters)} parameters{head}")
        lines.append(f"peak VRAM {format_vram(cost)}")
    return "<br>".join([*lines, escape(describe_standing(study, trial))])


def describe_standing(study: StudyRecord, trial: TrialRecord) -> str:
    """`complete, on the front in 92% of resamples`."""
    words: list[str] = [trial.state]
    if trial.source == "included":
        words.append("yours")
    words += [f"on the front in {m.confidence:.0%} of resamples" for m in study.front if m.number == trial.number]
    return ", ".join(words)
