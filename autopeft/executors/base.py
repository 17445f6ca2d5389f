"""Where workers run: what the scheduler may ask of an executor."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from autopeft.backends.base import CostReply, Event, Pack, Ready
from autopeft.errors import WorkerError
from autopeft.records import TrialSpec
from autopeft.wording import last_line


class WorkerEvent(NamedTuple):
    """An event, and which worker it came from; `event` is None where the worker died."""

    worker: int
    event: Event | None
    at_seconds: float
    """On the executor's clock."""
    detail: str = ""


class Executor(Protocol):
    """Runs workers. Its clock is the study's clock, so that simulated studies take no time."""

    num_workers: int
    device_rate: float
    """Device-seconds that one busy worker is charged each second: 1 for a GPU, its threads for a CPU worker."""

    def start(self) -> list[Ready]:
        """Starts all workers and waits until each is ready. Raises what a worker says it broke on."""
        ...

    def assign(self, worker: int, pack: Pack) -> None: ...

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        """Events in order of arrival; empty after `timeout_seconds` without one."""
        ...

    def restart(self, worker: int) -> None:
        """Replaces a worker that died. It may be assigned work at once; that it is `Ready`, or has died again, comes
        as an event."""
        ...

    def cost(self, spec: TrialSpec) -> CostReply: ...

    def now(self) -> float:
        """Seconds on the executor's clock."""
        ...

    def close(self) -> None:
        """Ends all workers at once."""
        ...


def make_worker_error(sentence: str, words: str) -> WorkerError:
    """`sentence` and the last line of a worker's words, all of which stand below a traceback of it."""
    error = WorkerError(f"{sentence} {last_line(words)}")
    error.add_note(words)
    return error
