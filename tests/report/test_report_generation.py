"""A study of a generation task reads as one: no classes, no head, and the untrained base to beat."""

from __future__ import annotations

import dataclasses
import json

import pytest

from autopeft.cli.session import print_summary
from autopeft.records import StudyRecord, from_record, to_record
from autopeft.report.entries import list_entries
from autopeft.report.leaderboard import update_leaderboard
from autopeft.report.page import build_page
from autopeft.report.scores import all_trials, validation_score
from autopeft.report.verdict import write_verdict

OF_CLASSES = ("most frequent label", "trained head", "Head only", "task head", "majority")


@pytest.fixture
def study(study_of) -> StudyRecord:
    study = study_of(
        task_kind="generation", scorer="token_accuracy", majority_quality=0.412, majority_test_quality=0.408
    )
    base = study.baseline
    rung = dataclasses.replace(base.rungs[-1], step=0, quality=0.412)
    return dataclasses.replace(study, baseline=dataclasses.replace(base, rungs=(rung,)))


def test_the_page_speaks_of_the_untrained_base(study):
    page = build_page(study)
    text = page[: page.index("<script")] + page[page.rindex("</script>") :]
    assert "The untrained base gives 41.2%, and 40.8% on the test data." in text
    assert "token accuracy (share of a completion&#39;s tokens" in text
    assert "scoring the untrained base" in text
    assert "nats per token" in page
    assert not [words for words in OF_CLASSES if words in text]


def test_the_untrained_base_is_a_line_and_no_trial(study):
    assert all(trial.number >= 0 for trial in all_trials(study))
    assert "the untrained base 41.2%" in build_page(study)


def test_the_verdict_doubts_a_best_that_is_no_better_than_the_base(study):
    level = dataclasses.replace(study.config, majority_quality=0.9)
    assert "Nothing is clearly better than that" in write_verdict(dataclasses.replace(study, config=level))
    assert "Nothing is clearly better" not in write_verdict(study)


def test_the_verdict_goes_by_what_the_study_has_compared(study):
    assert "Nothing is clearly better" in write_verdict(dataclasses.replace(study, beats_baseline=False))
    level = dataclasses.replace(study, config=dataclasses.replace(study.config, majority_quality=0.9))
    assert "Nothing is clearly better" not in write_verdict(dataclasses.replace(level, beats_baseline=True))


def test_a_recorded_spread_gives_the_error_of_one_run(study):
    trial = next(t for t in study.trials if not t.confirmations and t.rungs)
    rung = dataclasses.replace(trial.rungs[-1], quality_sd=0.1, num_examples=400)
    score = validation_score(dataclasses.replace(trial, rungs=(rung,)), "token_accuracy")
    assert score is not None
    assert score.spread == pytest.approx(0.1 / 20)


def test_the_leaderboard_has_the_untrained_base_once_and_unranked(study, tmp_path):
    kinds = [entry.kind for entry in list_entries(study)]
    assert kinds.count("base") == 1
    assert not {"head", "majority"} & set(kinds)
    board = update_leaderboard(study, tmp_path)
    markdown = board.with_suffix(".md").read_text()
    row = next(line for line in markdown.splitlines() if "untrained base" in line)
    assert "41.2%" in row
    assert "40.8%" in row
    # Read back and written again, it is the same.
    update_leaderboard(study, tmp_path)
    assert board.with_suffix(".md").read_text() == markdown


def test_the_summary_speaks_of_the_untrained_base(study, capsys):
    print_summary(study)
    printed = capsys.readouterr().out
    assert "untrained base 41.2%, test 40.8%" in printed
    assert not [words for words in OF_CLASSES if words in printed]
    print_summary(dataclasses.replace(study, baseline=None))
    assert "the untrained base was not scored" in capsys.readouterr().out


def test_a_record_from_before_there_were_generation_tasks_is_of_classes(study_of):
    old = to_record(study_of())
    assert "task_kind" not in json.dumps(old)
    assert "quality_sd" not in json.dumps(old)
    assert from_record(StudyRecord, old).config.task_kind == "classification"
