"""The three picks, ready for the template: what it is, what it reaches, what it costs, how to take it home."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from autopeft.records import Pick, StudyRecord, TrialRecord
from autopeft.report.palette import Mark
from autopeft.report.scores import Score, all_trials, held_out_score, validation_score
from autopeft.report.words import (
    NOTHING,
    format_bytes,
    format_count,
    format_learning_rate,
    list_settings,
    title_method,
)

TITLES = {"best": "Best quality", "knee": "Knee of the front", "smallest": "Smallest within noise of the best"}


class Way(NamedTuple):
    """How a trial is taken home."""

    target: str | None
    """Of `autopeft export`; None where no target can say it, and `autopeft train` alone trains it."""
    why_not_peft: str | None = None
    """Why it is not `peft`, which every trainer of one's own reads; None where it is."""


FindWay = Callable[[TrialRecord], Way]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """One pick in words."""

    title: str
    number: int
    same_as: str | None
    """Title of an earlier pick of the same trial."""
    method: str
    mark: Mark
    settings: list[str]
    quality: Score | None
    test: Score | None
    parameters: str
    head_parameters: str
    vram: str
    vram_source: str
    why: str
    command: str
    why_not_peft: str | None


def list_cards(study: StudyRecord, marks: dict[str, Mark], find_way: FindWay) -> list[Card]:
    """Cards in the order of `TITLES`; picks of trials that the record lacks are left out."""
    trials = {trial.number: trial for trial in all_trials(study)}
    cards: list[Card] = []
    for pick in sorted(study.picks, key=lambda pick: list(TITLES).index(pick.name)):
        if pick.number in trials:
            same = next((card.title for card in cards if card.number == pick.number), None)
            cards.append(_card(study, pick, trials[pick.number], marks, find_way(trials[pick.number]), same))
    return cards


def take_home_command(study_name: str, pick: str, target: str | None) -> str:
    name = shlex.quote(study_name)
    if target is None:
        return f"autopeft train {name} --pick {pick}"
    return f"autopeft export {name} --pick {pick} --to {target} --out {shlex.quote(f'{study_name}-{pick}')}"


def _card(
    study: StudyRecord, pick: Pick, trial: TrialRecord, marks: dict[str, Mark], way: Way, same: str | None
) -> Card:
    spec, cost = trial.spec, trial.cost
    settings = [*list_settings(spec), f"{spec.bits} bits", f"lr {format_learning_rate(spec.learning_rate)}"]
    training = [f"batch {spec.batch_size}", f"{spec.max_steps:,} steps"]
    return Card(
        title=TITLES[pick.name],
        number=trial.number,
        same_as=same,
        method=title_method(spec.method),
        mark=marks[spec.method],
        settings=[*settings, *training],
        quality=validation_score(trial, study.config.scorer),
        test=held_out_score(trial, study.config.scorer),
        parameters=NOTHING if cost is None else format_count(cost.trainable_parameters),
        head_parameters=NOTHING if cost is None else format_count(cost.head_parameters),
        vram=NOTHING if cost is None else format_bytes(cost.peak_vram_bytes),
        vram_source="" if cost is None else cost.vram_source,
        why=pick.why,
        command=take_home_command(study.config.name, pick.name, way.target),
        why_not_peft=way.why_not_peft,
    )
