"""Checks that run in an environment of their own, beside the one that the project is developed in."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_VERSIONS = (
    "import sys; from importlib.metadata import version; print(*(f'{n} {version(n)}' for n in sys.argv[1:]), sep=', ')"
)


class Answer(NamedTuple):
    code: int
    lines: list[str]
    """That the check printed."""
    last_error: str
    """The last line of what it printed as errors."""
    versions: str
    """`torch 2.13.0, peft 0.21.2`, of the packages asked for."""


def run_check(environment: Path, script: Path, *arguments: Path | str, packages: Sequence[str]) -> Answer:
    """A check that fails says all it has to say as an error."""
    python = environment / "bin" / "python"
    done = subprocess.run([python, script, *arguments], capture_output=True, text=True, cwd=script.parent)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
    versions = subprocess.run([python, "-c", _VERSIONS, *packages], capture_output=True, text=True, check=True)
    last_error = next(reversed(done.stderr.strip().splitlines()), "")
    return Answer(done.returncode, done.stdout.splitlines(), last_error, versions.stdout.strip())
