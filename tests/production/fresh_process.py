"""`plain` in one process for many jobs: starting it takes seconds, a job takes milliseconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import autopeft
from autopeft.production import finished, plain

REALLY_FRESH = finished.run_plain
"""What users get."""


@functools.cache
def _process(with_autopeft: bool) -> subprocess.Popen[str]:
    environment = dict(os.environ)
    if with_autopeft:
        environment["PYTHONPATH"] = str(Path(autopeft.__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-P", plain.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env=environment,
    )  # fmt: skip
    atexit.register(process.kill)
    return process


def _ask(what: str, folder: Path, *, with_autopeft: bool) -> str:
    process = _process(with_autopeft)
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(json.dumps([what, str(folder)]) + "\n")
    process.stdin.flush()
    return "" if process.stdout.readline() else "the process ended"


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of a test go to a process that others have used, which is none of the training's all the same."""
    monkeypatch.setattr(finished, "run_plain", _ask)
