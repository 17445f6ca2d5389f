"""Which trial a pick means."""

from __future__ import annotations

from typing import Any

import pytest
from chosen_trials import make_study, make_trial

from autopeft.errors import ExportError
from autopeft.export import find_trial

GIB = 2**30


def study(**config: Any) -> Any:
    return make_study(
        [
            make_trial(0, quality=0.9, vram_bytes=30 * GIB, parameters=5_000_000),
            make_trial(1, quality=0.8, vram_bytes=20 * GIB, parameters=2_000_000),
            make_trial(2, quality=0.85, vram_bytes=20 * GIB, parameters=900_000, confirmed=0),
            make_trial(3, quality=0.8, vram_bytes=10 * GIB, parameters=1_000_000),
            make_trial(4, quality=0.99, vram_bytes=GIB, parameters=10, state="stopped"),
            make_trial(5, quality=0.5, vram_bytes=2 * GIB, parameters=100, confirmed=0),
        ],
        **config,
    )


@pytest.mark.parametrize(
    ("pick", "number"),
    [
        ("2", 2),
        ("vram<40GB", 0),
        # The unconfirmed trial 2 scored higher, once.
        ("vram<24GB", 3),
        ("vram<=20GB,params<=2M", 3),
        ("VRAM <= 20 GB , params < 1M", 2),
        ("params<500", 5),
    ],
)
def test_conditions_mean_the_best_that_meets_them_confirmed_first_then_smallest(pick: str, number: int) -> None:
    assert find_trial(study(), pick).number == number


@pytest.mark.parametrize(
    ("pick", "words"),
    [
        ("vram<1GB", "the least VRAM is 2.00 GiB"),
        ("vram<40GB,params<50", "the least VRAM is 2.00 GiB and the fewest parameters are 100"),
        ("vrma<24GB", "Did you mean 'vram'?"),
        ("vram<lots", "written like 24GB or 800MB"),
        ("params<few", "written like 500k or 10M"),
        ("vram<24GB,", "'' of 'vram<24GB,' is none"),
        ("vram>24GB", "conditions such as 'vram<24GB'"),
        ("99", "trials 0 to 5"),
        ("beast", "Did you mean 'best'?"),
        ("knee", "no trial has reached its full length"),
    ],
)
def test_what_cannot_be_found_is_said(pick: str, words: str) -> None:
    with pytest.raises(ExportError) as info:
        find_trial(study(), pick)
    assert words in str(info.value)


def test_conditions_need_a_trial_of_full_length() -> None:
    with pytest.raises(ExportError, match="has none yet"):
        find_trial(make_study([make_trial(0, state="paused")]), "vram<24GB")
