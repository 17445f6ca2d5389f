"""What is said of a running study, a line a change."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.cli.progress import show_progress
from autopeft.records import Failed, TrialSpec
from autopeft.search.status import Status
from autopeft.search.store import Trial

MakeSpec = Callable[..., TrialSpec]
Tell = Callable[..., str]


@pytest.fixture
def tell(make_spec: MakeSpec, capsys: pytest.CaptureFixture[str]) -> Tell:
    """What is printed of a trial that failed."""

    def tell(detail: str, **changes: Any) -> str:
        trial = Trial(0, make_spec(**changes), "included")
        status = Status("search", [trial], {}, spent_share=None, seconds_left=math.inf, trials_left=4.0)
        config: Any = SimpleNamespace(name="study", scorer="accuracy", budget="4trials")
        with show_progress(config) as display:
            display(status)
            trial.state, trial.outcome = "failed", Failed(reason="worker_died", detail=detail)
            display(status)
        return capsys.readouterr().out

    return tell


def test_a_failed_trial_is_told_with_the_last_line_of_its_reason(tell: Tell) -> None:
    told = tell("Traceback:\n  File x\nRuntimeError: no kernel")
    assert "failed    worker_died  LoRA, rank 8" in told
    assert told.endswith(": RuntimeError: no kernel\n")


def test_a_long_reason_is_cut(tell: Tell) -> None:
    told = tell("no kernel " * 100)
    assert len(told) < 300
    assert told.endswith(" no ...\n")


def test_brackets_of_a_target_are_no_markup_on_a_terminal(tell: Tell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert r"re:.*\.[qv]_proj[/x]" in tell("no kernel", target_modules=r"re:.*\.[qv]_proj[/x]")
