"""A moment of a study, for whoever displays it."""

from __future__ import annotations

from typing import Literal, NamedTuple

from autopeft.backends.base import Purpose
from autopeft.search.store import Trial

Phase = Literal["search", "confirm", "done"]


class Status(NamedTuple):
    phase: Phase
    trials: list[Trial]
    running: dict[int, tuple[int, Purpose, int, int]]
    """Worker -> (trial, purpose, step reached, step to reach)."""
    spent_share: float | None
    """Of the budget, in [0, 1]; None where only trials bound it."""
    seconds_left: float
    trials_left: float
