"""How sure a study is and what it left undone, as the page, the leaderboard and the terminal say it."""

import dataclasses
import re

import pytest
from plotly.offline import get_plotlyjs

from autopeft.cli.session import print_summary
from autopeft.records import GainForecast, Outlook, WarmStart, from_record, to_record
from autopeft.records import StudyRecord as Study
from autopeft.report.certainty import format_gain, list_extensions, say_best_tie, say_more, say_stopped, say_ties
from autopeft.report.page import build_page
from autopeft.report.verdict import write_verdict

OUTLOOK = Outlook(
    stopped_seconds=590.0,
    saved_seconds=1800.0,
    stopped_members=0.31,
    forecasts=(
        GainForecast(device_seconds=300.0, trials=8.0, gain=0.006, low=0.0, high=0.019),
        GainForecast(device_seconds=1200.0, trials=31.6, gain=0.014, low=0.0003, high=0.12),
    ),
)


@pytest.fixture(scope="module")
def uncertain(study_of, trial_of):
    """Two that are tied, one apart, and one that was stopped."""
    trials = [
        trial_of(0, final=0.85, vram_bytes=9, parameters=90),
        trial_of(1, final=0.84, vram_bytes=8, parameters=80),
        trial_of(2, final=0.70, vram_bytes=7, parameters=70),
        trial_of(3, "stopped", upto=1),
    ]
    return dataclasses.replace(study_of(trials=trials), ties=((0, 1),), outlook=OUTLOOK)


def words_of(study):
    page = build_page(study).replace(get_plotlyjs(), "")
    return " ".join(re.sub(r"<style>.*?</style>|<script.*?</script>|<[^>]*>", " ", page, flags=re.DOTALL).split())


def test_a_tie_names_its_members(uncertain):
    assert say_ties(uncertain) == ["LoRA #1 cannot be told from LoRA #0 in accuracy."]


def test_a_long_tie_names_the_first_and_counts_the_others(study_of, trial_of):
    study = dataclasses.replace(study_of(trials=[trial_of(n) for n in range(7)]), ties=(tuple(range(7)),))
    assert say_ties(study) == ["LoRA #1, LoRA #2, LoRA #3, LoRA #4 and 2 more cannot be told from LoRA #0 in accuracy."]


def test_the_verdict_says_what_ties_with_the_best_and_what_more_would_bring(uncertain):
    verdict = write_verdict(uncertain)
    assert "On the front, LoRA #1 cannot be told from it." in verdict
    assert verdict.endswith(
        "Searching for 20 min of device time more (about 32 trials) is expected to enlarge the front by 1.4% (four "
        "times in five 0% to 12%)."
    )


def test_nothing_is_said_of_a_tie_that_the_best_is_not_in(uncertain):
    assert say_best_tie(uncertain, 2) == ""


def test_the_cost_of_what_was_stopped_is_told_with_what_it_might_have_been(uncertain):
    # 590 of 1180 s of search
    assert say_stopped(uncertain) == (
        "1 trial was stopped before the full length, having taken 9.8 min of device time (50% of the search); to the "
        "end it would have taken 30 min more. By its last scores it would have been on the front with a probability "
        "of 31%."
    )


def test_a_study_without_stops_says_so(study_of, trial_of):
    assert say_stopped(study_of(trials=[trial_of(0)])) == "No trial was stopped before its full length."


def test_every_extension_has_its_time_trials_and_interval(uncertain):
    assert [tuple(extension) for extension in list_extensions(uncertain)] == [
        ("5 min", "8", "0.6%", "0% to 1.9%"),
        ("20 min", "32", "1.4%", "0% to 12%"),
    ]


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.0004, "less than 0.1%"), (0.0042, "0.4%"), (0.1, "10%"), (1.234, "123%")]
)
def test_gains_are_rounded_to_what_they_are_worth(share, text):
    assert format_gain(share) == text


def test_the_page_shows_ties_stops_and_what_more_would_bring(uncertain):
    words = words_of(uncertain)
    section = words.split("How sure, and what is left")[1].split("Learning curves")[0]
    assert "LoRA #1 cannot be told from LoRA #0 in accuracy." in section
    assert "1 trial was stopped before the full length" in section
    assert "5 min 8 0.6% 0% to 1.9%" in section
    assert words.count("tie A") == 2


def test_a_study_of_an_earlier_autopeft_says_only_what_it_knows(study_of, trial_of):
    study = study_of(trials=[trial_of(0), trial_of(1, "stopped", upto=1)])
    words = words_of(study)
    assert "Stopped before the full length: 1." in words
    assert "Too little was tried to say." in words
    assert say_more(study) == ""


def test_the_terminal_says_the_same(uncertain, capsys):
    print_summary(uncertain)
    said = capsys.readouterr().out
    for sentence in (*say_ties(uncertain), say_stopped(uncertain), say_more(uncertain)):
        assert sentence in said


def test_a_warm_start_is_named_in_the_provenance(study_of, trial_of, spec_of):
    warm = WarmStart(sources=("study before (c0ffee-c0ffee)",), first=(spec_of(),), weighed=("lora",))
    words = words_of(study_of(trials=[trial_of(0, source="prior")], warm_start=warm))
    assert "1 first configuration by study before (c0ffee-c0ffee); none of their results are in this study" in words
    assert "warm start" in words.rsplit("All trials", 1)[1]


def test_what_is_uncertain_survives_its_json_record(uncertain):
    assert from_record(Study, to_record(uncertain)) == uncertain


def test_records_of_certain_studies_are_as_they_were(study):
    record = to_record(study)
    assert "ties" not in record
    assert "outlook" not in record
    assert not {"warm_start", "least_gain"} & set(record["config"])
