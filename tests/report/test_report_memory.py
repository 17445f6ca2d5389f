"""The sentence about estimates and measurements."""

from __future__ import annotations

import dataclasses

from autopeft.records import Cost, Failed, StudyRecord
from autopeft.report.memory import describe_memory
from autopeft.report.page import build_page

GIB = 2**30


def with_costs(study: StudyRecord, costs: list[Cost], *, ran_out: bool = False) -> StudyRecord:
    trials = [dataclasses.replace(trial, cost=cost) for trial, cost in zip(study.trials, costs, strict=False)]
    if ran_out:
        trials[0] = dataclasses.replace(trials[0], outcome=Failed(reason="out_of_memory", detail="CUDA"))
    return dataclasses.replace(study, trials=tuple(trials), baseline=None)


def measured(estimated: float, peak: float, corrected: float | None = None) -> Cost:
    return Cost(
        trainable_parameters=1, head_parameters=1, peak_vram_bytes=int(peak * GIB), vram_source="measured",
        estimated_vram_bytes=int(estimated * GIB),
        corrected_vram_bytes=None if corrected is None else int(corrected * GIB),
    )  # fmt: skip


def test_agreement_is_told_before_and_after_correction(study):
    text = describe_memory(with_costs(study, [measured(9, 10), measured(9.5, 10, 9.9), measured(9.8, 10, 10.0)]))
    # Off by 10%, 5% and 2%; corrected by 1% and 0%.
    assert "3 peaks measured" in text
    assert "5.0% in the median, 10.0% at worst" in text
    assert "0.5% in the median, 1.0% at worst once corrected" in text


def test_what_ran_out_of_memory_is_no_measurement(study):
    text = describe_memory(with_costs(study, [measured(20, 12), measured(9, 10)], ran_out=True))
    assert "1 peak measured" in text
    assert "1 ran out of memory" in text


def test_the_page_says_where_peaks_come_from(study):
    assert describe_memory(study) in build_page(study)
