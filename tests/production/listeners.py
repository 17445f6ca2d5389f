"""Who is told of a training and says nothing."""

from __future__ import annotations

from collections.abc import Sequence

from autopeft.production.job import Progress
from autopeft.production.recipe import Recipe


class Silent:
    """A `production.run.Listener`."""

    def begin(self, recipe: Recipe, *, from_step: int, notes: Sequence[str]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def scoring(self) -> None: ...
