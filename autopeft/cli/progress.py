"""Progress: a live display on a terminal, plain lines when piped."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, cast

from autopeft.cli.session import say, stop_printing
from autopeft.records import StudyConfig, TrialState
from autopeft.report.words import describe_spec, format_quality, format_seconds
from autopeft.search.status import Status
from autopeft.search.store import Trial
from autopeft.wording import last_line

_WHY_WIDTH = 120
"""Characters of what a library said of a failure, which may go on for pages."""
_STATES: tuple[TrialState, ...] = ("running", "paused", "complete", "stopped", "failed", "refused")


@contextlib.contextmanager
def show_progress(config: StudyConfig) -> Iterator[Callable[[Status], None]]:
    """A callback to be told of every change."""
    if not sys.stdout.isatty():
        yield _Lines(config)
        return
    from rich.console import Console
    from rich.live import Live

    # Of its own, written to from a thread as well: neither ends the search where the terminal was closed.
    with Live(console=Console(file=cast(IO[str], _Terminal())), refresh_per_second=4, transient=False) as live:
        # A target's pattern may have brackets, which are no markup.
        lines = _Lines(config, functools.partial(live.console.print, highlight=False, markup=False, soft_wrap=True))

        def update(status: Status) -> None:
            lines(status)
            live.update(_render(config, status))

        yield update


class _Terminal(io.TextIOBase):
    """Standard output, as long as it is there."""

    def __init__(self) -> None:
        self._output = sys.stdout

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self._output.encoding or "utf-8"

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._output.fileno()

    def write(self, text: str) -> int:
        with self._as_long_as_it_is_there():
            self._output.write(text)
        return len(text)

    def flush(self) -> None:
        with self._as_long_as_it_is_there():
            self._output.flush()

    @contextlib.contextmanager
    def _as_long_as_it_is_there(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            stop_printing()


class _Lines:
    """One line when a trial reaches a rung or ends."""

    def __init__(self, config: StudyConfig, write: Callable[[str], object] | None = None) -> None:
        self._config = config
        self._write = write or say
        self._seen: dict[int, tuple[object, ...]] = {}
        self._phase = ""

    def __call__(self, status: Status) -> None:
        if status.phase != self._phase:
            self._phase = status.phase
            if status.phase == "confirm":
                self._write("confirming finalists with other seeds, then the test split")
        for trial in status.trials:
            state = (trial.state, len(trial.rungs), len(trial.confirmations))
            if trial.number not in self._seen:
                # Trials of an earlier run of the study are no news.
                self._seen[trial.number] = ("waiting", 0, 0) if trial.state in ("waiting", "running") else state
            if self._seen[trial.number] != state and trial.state not in ("waiting", "running"):
                self._seen[trial.number] = state
                self._write(self._line(trial, status))

    def _line(self, trial: Trial, status: Status) -> str:
        spent = f"{status.spent_share:4.0%} " if status.spent_share is not None else ""
        words = f"{spent}trial {trial.number:>3} {trial.state:<9}"
        if trial.confirmations:
            last = trial.confirmations[-1]
            quality, test = (format_quality(value, self._config.scorer) for value in (last.quality, last.test_quality))
            return f"{spent}trial {trial.number:>3} seed {last.seed:<5} {quality} test {test}"
        if trial.rungs:
            words += f" step {trial.step:>5}  {format_quality(trial.rungs[-1].quality, self._config.scorer)}"
        why = ""
        if trial.outcome is not None and trial.outcome.kind == "failed":
            words += f" {trial.outcome.reason}"
            why = textwrap.shorten(last_line(trial.outcome.detail), _WHY_WIDTH, placeholder=" ...")
        elif trial.outcome is not None and trial.outcome.kind == "refused":
            why = trial.outcome.rule
        return f"{words}  {describe_spec(trial.spec)}{why and f': {why}'}"


def _render(config: StudyConfig, status: Status):  # type: ignore[no-untyped-def]
    """The live part: budget, trials by state, current best, what runs, time left."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    counts = Counter(trial.state for trial in status.trials)
    if status.spent_share is not None:
        bar = Table.grid(padding=(0, 1))
        bar.add_row(
            ProgressBar(total=1.0, completed=status.spent_share, width=40),
            f"{status.spent_share:.0%} of {config.budget}, {format_seconds(max(0.0, status.seconds_left))} left",
        )
        grid.add_row("budget", bar)
    elif not math.isinf(status.trials_left):
        grid.add_row("budget", f"{config.budget}, {status.trials_left:.0f} to start")
    grid.add_row("trials", ", ".join(f"{counts[state]} {state}" for state in _STATES if counts[state]) or "none yet")
    scored = [trial for trial in status.trials if trial.rungs and trial.state != "refused"]
    if scored:
        best = max(scored, key=lambda trial: trial.rungs[-1].quality)
        quality = format_quality(best.rungs[-1].quality, config.scorer)
        grid.add_row("best", Text(f"{quality}  trial {best.number}: {describe_spec(best.spec)}"))
    for worker, (number, purpose, step, to_step) in sorted(status.running.items()):
        name = "baseline" if purpose == "baseline" else f"trial {number}" + (" again" if purpose == "confirm" else "")
        doing = f"{name}, step {step} of {to_step}" if to_step else "scoring the untrained base"
        grid.add_row(f"worker {worker}", doing)
    return Group(Text(f"{config.name}: {status.phase}", style="bold"), grid)
