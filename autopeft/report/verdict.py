"""The answer in plain words: what won, what is nearly as good and cheaper, and whether it was worth it at all."""

from __future__ import annotations

import math
from collections import Counter

from autopeft.records import StudyRecord, TrialRecord, TrialState
from autopeft.report.certainty import say_best_tie, say_more
from autopeft.report.scores import all_trials, held_out_score, standard_error, validation_score
from autopeft.report.words import (
    describe_settings,
    format_count,
    format_learning_rate,
    format_quality,
    title_method,
    title_scorer,
)

_CLEAR = 2.0
"""A difference counts as clear from this many standard errors on."""

_ORDER: tuple[TrialState, ...] = ("complete", "stopped", "paused", "running", "waiting", "failed", "refused")


def write_verdict(study: StudyRecord) -> str:
    """A few sentences, the answer first."""
    best = picked_trial(study, "best")
    if best is None or not best.rungs:
        return " ".join([_say_nothing_won(study), _say_baselines(study)])
    sentences = [
        _say_best(study, best),
        say_best_tie(study, best.number),
        _say_smallest(study, best),
        _say_baselines(study),
        _say_doubt(study, best),
        say_more(study),
    ]
    return " ".join(filter(None, sentences))


def picked_trial(study: StudyRecord, name: str) -> TrialRecord | None:
    numbers = [pick.number for pick in study.picks if pick.name == name]
    return next((trial for trial in all_trials(study) if trial.number in numbers), None)


def count_states(study: StudyRecord) -> str:
    """`18 complete, 9 stopped, 1 refused`, most finished first."""
    counts = Counter(trial.state for trial in study.trials)
    return ", ".join(f"{counts[state]} {state}" for state in _ORDER if counts[state])


def _say_best(study: StudyRecord, best: TrialRecord) -> str:
    scorer = study.config.scorer
    score, test = validation_score(best, scorer), held_out_score(best, scorer)
    assert score is not None
    tried = sum(bool(trial.rungs) or trial.state not in ("waiting", "refused") for trial in study.trials)
    settings = [describe_settings(best.spec), f"lr {format_learning_rate(best.spec.learning_rate)}"]
    name = f"{title_method(best.spec.method)} ({', '.join(filter(None, settings))})"
    of = f"Of {tried} configurations tried, {name} is the best" if tried > 1 else f"{name} was the only trial"
    found = f"{of}: {score.text(scorer)} {title_scorer(scorer)} on search-validation ({score.basis()})"
    return f"{found} and {test.text(scorer)} on held-out test data." if test else f"{found}. It was not confirmed."


def _say_smallest(study: StudyRecord, best: TrialRecord) -> str:
    small = picked_trial(study, "smallest")
    score = None if small is None else validation_score(small, study.config.scorer)
    if small is None or score is None or small.cost is None or best.cost is None:
        return ""
    if small.number == best.number:
        among = "None of the other confirmed ones" if best.confirmations else "Nothing"
        return f"{among} with fewer trainable parameters came within noise of it."
    few, many = (format_count(trial.cost.trainable_parameters) for trial in (small, best) if trial.cost)
    what = (
        "A smaller one of the same method" if small.spec.method == best.spec.method else title_method(small.spec.method)
    )
    settings = f" ({describe_settings(small.spec)})" if describe_settings(small.spec) else ""
    quality = format_quality(score.mean, study.config.scorer)
    return (
        f"{what}{settings} comes within noise of it, at {quality}, with {few} trainable parameters instead of {many}."
    )


def _say_baselines(study: StudyRecord) -> str:
    scorer = study.config.scorer
    floor = format_quality(study.config.majority_quality, scorer)
    if study.config.task_kind == "generation":
        test = format_quality(study.config.majority_test_quality, scorer)
        scored = study.baseline is not None and study.baseline.quality is not None
        return f"The untrained base gives {floor}, and {test} on the test data." if scored else ""
    majority = f"always answering the most frequent label gives {floor}"
    if study.baseline is None or study.baseline.quality is None:
        return f"For comparison, {majority}."
    return f"A trained head alone gives {format_quality(study.baseline.quality, scorer)}; {majority}."


def _say_doubt(study: StudyRecord, best: TrialRecord) -> str:
    """Says so where the best is not clearly above a baseline.

    On the same examples, as the study itself has compared them; older studies have not, and what nobody compared by
    examples is told apart by standard errors, which is rather too careful.
    """
    scorer = study.config.scorer
    quality, error = best.quality or 0.0, _find_error(best, scorer)
    is_generation = study.config.task_kind == "generation"
    base = None if study.baseline is None else study.baseline.quality
    noise = error if study.baseline is None else math.hypot(error, _find_error(study.baseline, scorer))
    if is_generation and study.beats_baseline is not None:
        beats_floor = study.beats_baseline
    else:
        beats_floor = quality - study.config.majority_quality > _CLEAR * (noise if is_generation else error)
    if not beats_floor:
        return (
            "Nothing is clearly better than that: the budget was too small for this task, "
            "or none of these configurations suits it."
        )
    if base is None or is_generation or study.beats_baseline:
        return ""
    if base - quality > _CLEAR * noise:
        return "The trained head alone is clearly better, and trains nothing else."
    if study.beats_baseline is None and quality - base > _CLEAR * noise:
        return ""
    examples = best.rungs[-1].num_examples
    return f"The best is not clearly above the trained head: {examples:,} examples cannot tell them apart."


def _find_error(trial: TrialRecord, scorer: str) -> float:
    """The standard error of its quality, by examples; 0 where it is not known."""
    if trial.quality is None or not trial.rungs:
        return 0.0
    last = trial.rungs[-1]
    return standard_error(trial.quality, last.num_examples, scorer, last.quality_sd) or 0.0


def _say_nothing_won(study: StudyRecord) -> str:
    if not study.trials:
        return "No configuration was tried, so there is nothing to recommend."
    if any(trial.state == "complete" for trial in study.trials):
        return f"No configuration was picked. Of {len(study.trials)}: {count_states(study)}."
    return f"No configuration reached full length, so there is nothing to recommend ({count_states(study)})."
