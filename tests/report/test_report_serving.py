"""What serving costs, in a report: shown where it was measured, drawn where it is an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from autopeft.records import Inference, Latency, StudyRecord, TrialRecord
from autopeft.report.front_figure import list_points
from autopeft.report.page import build_page
from autopeft.report.palette import mark_methods
from autopeft.report.rows import Cell, list_columns, list_rows
from autopeft.report.scores import all_trials, serving_seconds
from autopeft.report.words import describe_latency, format_latency, title_objective

StudyOf = Callable[..., StudyRecord]
TrialOf = Callable[..., TrialRecord]


def make_latency(seconds: float) -> Latency:
    return Latency(single_seconds=seconds, batch_seconds=seconds / 5, batch_size=32, num_batches=31)


def with_costs(trial: TrialRecord, *, size: int | None, latency: float | None) -> TrialRecord:
    assert trial.cost is not None
    return dataclasses.replace(trial, cost=dataclasses.replace(trial.cost, adapter_bytes=size, latency_seconds=latency))


def with_inference(trial: TrialRecord, merged: float | None) -> TrialRecord:
    inference = Inference(
        unmerged=make_latency(0.02), merged=None if merged is None else make_latency(merged), base=make_latency(0.01),
        adapter_bytes=1000, device="a CPU",
    )  # fmt: skip
    confirmed = tuple(dataclasses.replace(c, inference=inference) for c in trial.confirmations)
    return dataclasses.replace(trial, confirmations=confirmed)


def titles(study: StudyRecord) -> list[str]:
    return [column.title for column in list_columns(study)]


def cell(study: StudyRecord, number: int, title: str) -> str:
    return find_cell(study, number, title).text


def note(study: StudyRecord, number: int, title: str) -> str:
    return find_cell(study, number, title).note


def find_cell(study: StudyRecord, number: int, title: str) -> Cell:
    marks = mark_methods(trial.spec.method for trial in all_trials(study))
    rows = list_rows(study, marks)
    assert all(len(row.cells) == len(list_columns(study)) for row in rows)
    row = next(row for row in rows if row.cells[0].value == number)
    return row.cells[titles(study).index(title)]


def test_a_study_from_before_it_was_measured_has_no_empty_columns(study_of: StudyOf) -> None:
    assert not {"Saved", "Latency"} & set(titles(study_of()))


def test_size_and_latency_have_columns_where_they_are_known(study_of: StudyOf, trial_of: TrialOf) -> None:
    study = study_of(trials=[with_costs(trial_of(0), size=3 * 2**20, latency=0.0123), trial_of(1)])
    assert cell(study, 0, "Saved") == "3 MiB"
    assert cell(study, 0, "Latency") == "12.3 ms"
    assert cell(study, 1, "Saved") == cell(study, 1, "Latency") == "\u2013"


def test_latency_is_that_of_serving_merged_where_the_method_merges(study_of: StudyOf) -> None:
    confirmed = next(trial for trial in study_of().trials if trial.confirmations)
    assert serving_seconds(confirmed) is None
    assert serving_seconds(with_inference(confirmed, merged=0.01)) == 0.01
    assert serving_seconds(with_inference(confirmed, merged=None)) == 0.02


def test_the_latency_of_a_confirmed_trial_says_what_it_is_unmerged(study_of: StudyOf) -> None:
    confirmed = next(trial for trial in study_of().trials if trial.confirmations)
    merged, alone = (
        study_of(trials=[with_inference(confirmed, merged=merged)], with_picks=False) for merged in (0.01, None)
    )
    assert note(merged, confirmed.number, "Latency") == "20 ms unmerged"
    assert note(alone, confirmed.number, "Latency") == ""


def test_the_front_can_be_seen_over_each_objective(study_of: StudyOf) -> None:
    trials = [with_costs(trial, size=1000 + trial.number, latency=0.01) for trial in study_of().trials if trial.cost]
    plain = build_page(study_of(trials=trials))
    asked = build_page(study_of(trials=trials, objectives=("quality", "size", "latency")))
    assert 'data-view="latency"' not in plain
    assert 'data-view="latency"' in asked
    assert 'data-view="size"' in asked


def test_points_lie_at_milliseconds_and_mebibytes(study_of: StudyOf, trial_of: TrialOf) -> None:
    study = study_of(trials=[with_costs(trial_of(0), size=2**21, latency=0.0123)])
    assert [round(point.x, 4) for point in list_points(study, "latency")] == [12.3]
    assert [point.x for point in list_points(study, "size")] == [2.0]
    unknown = study_of(trials=[trial_of(0)])
    assert list_points(unknown, "latency") == list_points(unknown, "size") == []


def test_latency_in_words_is_alone_and_in_batches_unmerged_and_merged() -> None:
    inference = Inference(
        unmerged=make_latency(0.012), merged=make_latency(0.0098), base=None, adapter_bytes=10, device="a CPU"
    )
    alone = "12 ms an example alone, 2.4 ms in batches of 32"
    assert describe_latency(inference) == f"{alone}; merged 9.8 ms and 1.96 ms"
    assert describe_latency(dataclasses.replace(inference, merged=None)) == alone


def test_words() -> None:
    assert (format_latency(0.00421), format_latency(0.9999), format_latency(12.0)) == ("4.21 ms", "1 s", "12 s")
    assert title_objective("size") == "saved size"
