"""Words and numbers as people read them."""

import math
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.report.files import safe_file_name, write_atomically
from autopeft.report.scores import standard_error, summarize, undominated
from autopeft.report.words import (
    describe_spec,
    describe_training,
    format_bytes,
    format_count,
    format_learning_rate,
    format_quality,
    format_seconds,
)

points = st.lists(st.tuples(*[st.integers(0, 6).map(float)] * 3), max_size=30)


def test_a_configuration_is_described_in_one_line(spec_of):
    assert describe_spec(spec_of()) == "LoRA, rank 8, alpha/rank 2, all-linear, 32 bits, lr 2.1e-3"


def test_titles_given_replace_our_own(spec_of):
    assert describe_spec(spec_of(), {"lora": "Low rank"}).startswith("Low rank, ")


def test_an_unknown_method_is_described_all_the_same(spec_of):
    spec = spec_of("my_method", settings={"num_blocks": 3, "tied": False, "kind": "a_b"})
    assert describe_spec(spec) == "my method, blocks 3, no tied, kind a_b, 32 bits, lr 2.1e-3"


def test_what_is_off_by_default_is_left_out_and_variants_are_spelled_as_in_their_papers(spec_of):
    spec = spec_of(settings={"rank": 8, "dora": True, "rslora": False, "dropout": 0.0, "init": "pissa"})
    assert describe_spec(spec).startswith("LoRA, rank 8, DoRA, init PiSSA, ")


def test_a_default_that_is_switched_off_is_said(spec_of):
    assert "no feedforward" in describe_spec(spec_of("ia3", settings={"feedforward": False}))


def test_the_training_is_described_with_its_seed(spec_of):
    assert describe_training(spec_of(max_steps=12_000)) == (
        "batch 16, 12,000 steps, linear schedule, warm-up 0.06, weight decay 0.01, seed 7"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (512, "512 B"), (412 * 2**20, "412 MiB"), (13.94 * 2**30, "13.9 GiB"), (2**30 - 1, "1 GiB")],
)
def test_bytes_are_shown_in_binary_units(value, text):
    assert format_bytes(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (512, "512"), (9_216, "9.2k"), (147_456, "147k"), (999_960, "1M"), (22_713_216, "22.7M"), (7e9, "7B")],
)
def test_counts_are_shown_with_their_magnitude(value, text):
    assert format_count(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 s"), (8.23, "8.2 s"), (45, "45 s"), (720, "12 min"), (12_240, "3.4 h"), (1e6, "278 h")]
)
def test_durations_are_shown_in_the_unit_one_would_say(value, text):
    assert format_seconds(value) == text


@pytest.mark.parametrize(
    ("value", "scorer", "text"),
    [
        (0.8423, "accuracy", "84.2%"),
        (0.5, "macro_f1", "50.0%"),
        (0.5123, "matthews_correlation", "0.512"),
        (-0.02, "matthews_correlation", "\u22120.020"),
        (27.3, "bleu", "27.300"),
        (math.nan, "accuracy", "\u2013"),
    ],
)
def test_shares_are_percentages_and_correlations_plain_numbers(value, scorer, text):
    assert format_quality(value, scorer) == text


@given(st.floats(1e-8, 10.0))
def test_a_learning_rate_reads_back_to_within_its_two_digits(value):
    assert float(format_learning_rate(value)) == pytest.approx(value, rel=0.051)


def test_one_seed_gets_the_binomial_error_of_its_examples():
    # sqrt(0.8 * 0.2 / 400) = 0.02
    assert summarize([0.8], 400, "accuracy").spread == pytest.approx(0.02)


def test_several_seeds_get_their_standard_deviation():
    assert summarize([0.8, 0.82, 0.84], 400, "accuracy").spread == pytest.approx(0.02)


def test_a_correlation_of_one_has_no_error_and_one_without_examples_an_unknown_one():
    assert standard_error(1.0, 100, "matthews_correlation") == 0.0
    assert standard_error(0.5, 1, "matthews_correlation") is None


@given(points)
def test_every_dominated_point_is_dominated_by_a_kept_one(sample):
    kept = [p for p, keep in zip(sample, undominated(sample), strict=True) if keep]
    for point, keep in zip(sample, undominated(sample), strict=True):
        beaten = any(other != point and all(a <= b for a, b in zip(other, point, strict=True)) for other in kept)
        assert keep != beaten


@given(st.text())
def test_any_name_becomes_one_visible_path_component(name):
    safe = safe_file_name(name)
    assert safe
    assert "/" not in safe
    assert "\\" not in safe
    assert not safe.startswith(".")
    assert len(safe.encode()) < 200


@given(st.text(), st.text())
def test_names_that_lose_characters_stay_apart(a, b):
    if a.replace("/", "--").replace(":", "-") != b.replace("/", "--").replace(":", "-"):
        assert safe_file_name(a) != safe_file_name(b)


def test_a_hub_name_keeps_its_organisation():
    assert safe_file_name("org/model-1.5") == "org--model-1.5"


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    path = tmp_path / "page.html"
    write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "new \ud800")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_words_and_leaderboards_import_nothing_heavy():
    code = "import sys, autopeft.report.words, autopeft.report.leaderboard; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {"pandas", "numpy", "plotly", "jinja2", "torch", "optuna"}.isdisjoint(modules)
