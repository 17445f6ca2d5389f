"""Which trial is meant: a pick of the study, a number, or the best that meets conditions such as `vram<24GB`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from autopeft.errors import ExportError, SpecError, suggest_nearest
from autopeft.records import Cost, StudyRecord, TrialRecord
from autopeft.search.front import find_surest
from autopeft.search.limits import needed_bytes
from autopeft.search.request import parse_bytes, parse_count

_PICKS = ("best", "knee", "smallest")
_CONDITION = re.compile(r"\s*(?P<name>[a-z_]+)\s*(?P<relation><=|<)\s*(?P<value>\S.*?)\s*")
_RELATIONS: dict[str, Callable[[Any, Any], bool]] = {"<": operator.lt, "<=": operator.le}


class _Quantity(NamedTuple):
    """A cost that a condition may bound."""

    read: Callable[[Cost], int]
    parse: Callable[[str], int]


_QUANTITIES = {
    "vram": _Quantity(needed_bytes, parse_bytes),
    "params": _Quantity(lambda cost: cost.trainable_parameters, parse_count),
}
"""Peak bytes as limits judge them, and trainable parameters without the head."""


class _Condition(NamedTuple):
    name: str
    relation: str
    bound: int

    def holds(self, cost: Cost) -> bool:
        return _RELATIONS[self.relation](_QUANTITIES[self.name].read(cost), self.bound)


def find_trial(record: StudyRecord, pick: str) -> TrialRecord:
    """The trial that a pick's name, a number or conditions mean. Raises ExportError with what there is."""
    name = record.config.name
    if pick.isdecimal():
        for trial in record.trials:
            if trial.number == int(pick):
                return trial
        raise ExportError(f"The study '{name}' has trials 0 to {len(record.trials) - 1}, but --pick is {pick}.")
    if "<" in pick:
        return _find_best(record, pick, [_parse_condition(part, pick) for part in pick.split(",")])
    picks = {chosen.name: chosen.number for chosen in record.picks}
    if pick in picks:
        return next(trial for trial in record.trials if trial.number == picks[pick])
    if pick in _PICKS:
        raise ExportError(
            f"The study '{name}' has no '{pick}' yet: no trial has reached its full length. Go on with "
            f"autopeft resume {name}, or pick a trial by number."
        )
    raise ExportError(
        f"There is no pick '{pick}'. {suggest_nearest(pick, _PICKS)} Or a trial's number, or conditions such as "
        "'vram<24GB' and 'params<1M', joined by commas."
    )


def _parse_condition(text: str, pick: str) -> _Condition:
    fit = _CONDITION.fullmatch(text.lower())
    if fit is None:
        raise ExportError(
            f"--pick takes conditions such as 'vram<24GB' or 'vram<24GB,params<1M', but '{text.strip()}' of '{pick}' "
            "is none. Write a cost, < or <=, and a bound."
        )
    if fit["name"] not in _QUANTITIES:
        raise ExportError(f"--pick cannot bound '{fit['name']}'. {suggest_nearest(fit['name'], _QUANTITIES)}")
    try:
        bound = _QUANTITIES[fit["name"]].parse(fit["value"])
    except SpecError as exc:
        example = "24GB or 800MB" if fit["name"] == "vram" else "500k or 10M"
        raise ExportError(
            f"In --pick '{pick}' the bound of {fit['name']} is written like {example}, but is '{fit['value']}'."
        ) from exc
    return _Condition(fit["name"], fit["relation"], bound)


def _find_best(record: StudyRecord, pick: str, conditions: Sequence[_Condition]) -> TrialRecord:
    """By search-validation quality, of the surest; the study's picks are among them."""
    complete = [trial for trial in record.trials if trial.state == "complete" and trial.cost is not None]
    if not complete:
        raise ExportError(
            f"--pick '{pick}' chooses among trials of full length, of which the study '{record.config.name}' has none "
            f"yet. Go on with autopeft resume {record.config.name}, or pick a trial by number."
        )
    fitting = [trial for trial in complete if trial.cost and all(c.holds(trial.cost) for c in conditions)]
    if not fitting:
        raise ExportError(
            f"No trial of the study '{record.config.name}' that reached its full length satisfies --pick '{pick}': "
            f"{_say_least(complete, conditions)}. Raise the bound, or search again with the limit (--max-vram, "
            "--max-params)."
        )
    return max(find_surest(fitting, {chosen.number for chosen in record.picks}), key=_rank)


def _rank(trial: TrialRecord) -> tuple[float, int, int]:
    """Quality, then fewer parameters, then the earlier."""
    assert trial.quality is not None
    assert trial.cost is not None
    return trial.quality, -trial.cost.trainable_parameters, -trial.number


def _say_least(trials: Sequence[TrialRecord], conditions: Sequence[_Condition]) -> str:
    """What the most modest trials need of each cost that is bounded."""
    words = []
    for name in dict.fromkeys(condition.name for condition in conditions):
        least = min(_QUANTITIES[name].read(trial.cost) for trial in trials if trial.cost)
        words.append(
            f"the least VRAM is {least / 2**30:.2f} GiB" if name == "vram" else f"the fewest parameters are {least:,}"
        )
    return " and ".join(words)
