"""What a target is: a trainer, what it cannot say, and the files that it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from autopeft.export.bundle import Bundle
from autopeft.export.files import Files
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec


class Export(NamedTuple):
    """What one export adds to the files that every one has."""

    files: Files
    commands: tuple[str, ...]
    """To be run inside of the folder, in this order."""
    notes: tuple[str, ...] = ()
    """What is not as it was in the trial, and what a reader must know of the files."""


class Target(NamedTuple):
    """A row of `TARGETS`."""

    title: str
    package: str
    """As pip names it, with the version that the files were checked with."""
    refuse: Callable[[Recipe, TaskSpec], str | None]
    """Why it cannot say a configuration, as sentences, or None. Asks neither model nor rows."""
    write: Callable[[Bundle], Export]
    """Raises `Unsaid` where the model or the rows are what cannot be said."""
