"""How sure a study is of its front, and what it left undone, in words for the page and the terminal."""

from __future__ import annotations

from typing import NamedTuple

from autopeft.records import GainForecast, StudyRecord, TrialRecord
from autopeft.report.words import format_seconds, title_method, title_scorer
from autopeft.wording import say_count

_MOST_NAMED = 4
"""Of a tie; the others are counted."""


class Extension(NamedTuple):
    """A larger budget, and what it is expected to bring."""

    device_time: str
    trials: str
    gain: str
    between: str


def say_ties(study: StudyRecord) -> list[str]:
    """One sentence a group of the front's members that cannot be told from their first."""
    trials = {trial.number: trial for trial in study.trials}
    return [_say_tie(study, [trials[number] for number in group if number in trials]) for group in study.ties]


def say_best_tie(study: StudyRecord, best: int) -> str:
    """Whether the best is alone; empty where it is, or the record does not say."""
    group = next((group for group in study.ties if best in group), ())
    # Two others of a group may differ clearly; all of it were compared with its first.
    tied = group[1:] if group[:1] == (best,) else group[:1]
    others = [trial for trial in study.trials if trial.number in tied]
    if not others:
        return ""
    return f"On the front, {_join(others)} cannot be told from it."


def tie_letter(study: StudyRecord, number: int) -> str:
    """`A` for members of the first tie, `B` for those of the second; empty for others."""
    place = next((place for place, group in enumerate(study.ties) if number in group), None)
    return "" if place is None else chr(ord("A") + place) if place < 26 else str(place + 1)


def say_stopped(study: StudyRecord) -> str:
    """What was spent on trials that were stopped, what that saved, and what they might have been."""
    stopped = [trial for trial in study.trials if trial.state == "stopped"]
    outlook = study.outlook
    if not stopped:
        return "No trial was stopped before its full length."
    if outlook is None:
        return f"Stopped before the full length: {len(stopped)}. What they might have been was not estimated."
    searched = study.ledger.search_seconds
    share = f" ({outlook.stopped_seconds / searched:.0%} of the search)" if searched > 0 else ""
    one = len(stopped) == 1
    members = outlook.stopped_members
    fate = (
        f"By its last scores it would have been on the front with a probability of {members:.0%}."
        if one
        else f"By their last scores {_about(members)} of the {len(stopped)} would have been on the front."
    )
    return (
        f"{len(stopped)} {'trial was' if one else 'trials were'} stopped before the full length, having taken "
        f"{format_seconds(outlook.stopped_seconds)} of device time{share}; to the end {'it' if one else 'they'} would "
        f"have taken {format_seconds(outlook.saved_seconds)} more. {fate}"
    )


def list_extensions(study: StudyRecord) -> list[Extension]:
    return [] if study.outlook is None else [_extend(forecast) for forecast in study.outlook.forecasts]


def say_more(study: StudyRecord) -> str:
    """What twice the search would bring; empty where too little was tried to say."""
    if study.outlook is None or not study.outlook.forecasts:
        return ""
    largest = study.outlook.forecasts[-1]
    found = _extend(largest)
    trials = say_count(int(found.trials), "trial")
    return (
        f"Searching for {found.device_time} of device time more (about {trials}) is expected to enlarge "
        f"the front by {found.gain} (four times in five {found.between})."
    )


def format_gain(share: float, *, least: str = "less than 0.1%") -> str:
    """`0.4%` of the front's hypervolume; `least` for what rounds to nothing."""
    percent = 100 * share
    if percent < 0.05:
        return least if share > 0 else "0%"
    return f"{percent:.0f}%" if percent >= 9.95 else f"{percent:.1f}%"


def _extend(forecast: GainForecast) -> Extension:
    return Extension(
        format_seconds(forecast.device_seconds),
        f"{forecast.trials:.0f}" if forecast.trials >= 1.5 else "1",
        format_gain(forecast.gain),
        f"{format_gain(forecast.low, least='0%')} to {format_gain(forecast.high)}",
    )


def _say_tie(study: StudyRecord, group: list[TrialRecord]) -> str:
    return f"{_join(group[1:])} cannot be told from {_join(group[:1])} in {title_scorer(study.config.scorer)}."


def _join(trials: list[TrialRecord]) -> str:
    """`LoRA #3, IA3 #7 and Prefix tuning #9`."""
    names = [f"{title_method(trial.spec.method)} #{trial.number}" for trial in trials[:_MOST_NAMED]]
    if len(trials) > _MOST_NAMED:
        names.append(f"{len(trials) - _MOST_NAMED} more")
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _about(number: float) -> str:
    if number < 0.05:
        return "almost none"
    return f"about {number:.1f}" if number < 9.95 else f"about {number:.0f}"
