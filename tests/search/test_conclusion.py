"""What is said at the end of a search."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from autopeft.records import Completed, StudyConfig
from autopeft.search.conclusion import Ending, conclude
from autopeft.search.store import Trial

if TYPE_CHECKING:
    from conftest import FakeStudies

WELL = Ending(beats_floor=True, num_unconfirmed=0, early_gain=None, overrun_seconds=0.0, found_nothing_new=False)


@pytest.fixture
def config(studies: FakeStudies) -> StudyConfig:
    return studies.config(confirm_seeds=0, least_gain=0.005)


@pytest.fixture
def complete(studies: FakeStudies, config: StudyConfig) -> list[Trial]:
    store = studies.create()
    from autopeft.search.plan import restore_space

    spec = restore_space(store.config).recipes[0]
    return [Trial(number=i, spec=spec, source="recipe", state="complete", outcome=Completed()) for i in range(3)]


def test_a_search_that_went_well_needs_no_words(config: StudyConfig, complete: list[Trial]) -> None:
    assert conclude(config, complete, WELL) == []


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (0, "no trial reached its full length"),
        (1, "only 1 trial reached its full length."),
        (2, "only 2 trials reached their full length."),
    ],
)
def test_how_many_reached_their_end_is_said_where_they_are_few(
    count: int, words: str, config: StudyConfig, complete: list[Trial]
) -> None:
    (note,) = conclude(config, complete[:count], WELL)
    assert words in note


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"beats_floor": False}, "No trial clearly beats always answering the most frequent label"),
        ({"num_unconfirmed": 1}, "1 planned confirmation did not fit"),
        ({"num_unconfirmed": 2}, "2 planned confirmations did not fit"),
        ({"early_gain": 0.001}, "by 0.10%, less than --stop-when-gain-below 0.50%"),
        ({"overrun_seconds": 12.3}, "overrun by 12 s"),
        ({"found_nothing_new": True}, "found nothing new"),
    ],
)
def test_whatever_cut_it_short_is_said(
    changes: dict[str, float], words: str, config: StudyConfig, complete: list[Trial]
) -> None:
    (note,) = conclude(config, complete, WELL._replace(**changes))  # type: ignore[arg-type]
    assert words in note


@pytest.mark.parametrize(("num_unconfirmed", "words"), [(2, "within the budget"), (0, "ended without a score")])
def test_why_nothing_could_be_confirmed_is_said(
    num_unconfirmed: int, words: str, config: StudyConfig, complete: list[Trial]
) -> None:
    ending = WELL._replace(num_unconfirmed=num_unconfirmed)
    (note,) = conclude(replace(config, confirm_seeds=2), complete, ending)
    assert words in note


def test_a_budget_without_a_clock_is_never_overrun(config: StudyConfig, complete: list[Trial]) -> None:
    assert conclude(config, complete, WELL._replace(overrun_seconds=float("-inf"))) == []
