"""Workers that live in this process on a simulated clock: for backends that simulate."""

from __future__ import annotations

import heapq
import math

from autopeft.backends import load_backend, load_cost_model
from autopeft.backends.base import CostReply, Finished, Pack, Ready, WorkerSetup
from autopeft.errors import SpecError
from autopeft.executors.base import WorkerEvent
from autopeft.records import TrialSpec


class InlineExecutor:
    """Each pack is answered when simulated time reaches its end, whatever the number of workers."""

    def __init__(self, setup: WorkerSetup, num_workers: int) -> None:
        self.num_workers = num_workers
        self.device_rate = 1.0
        self._setup = setup
        self._backend = load_backend(setup)
        self._costs = load_cost_model(setup)
        self._now = 0.0
        self._due: list[tuple[float, int, WorkerEvent]] = []

    def start(self) -> list[Ready]:
        return [self._backend.ready() for _ in range(self.num_workers)]

    def assign(self, worker: int, pack: Pack) -> None:
        for stretch in pack.stretches:
            event = self._backend.run(stretch, lambda _: None)
            seconds = event.simulated_seconds if isinstance(event, Finished) else 1.0
            assert seconds is not None, "the inline executor needs a backend with a simulated clock"
            due = self._now + seconds
            heapq.heappush(self._due, (due, stretch.job, WorkerEvent(worker, event, due)))

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        if not self._due or self._due[0][0] > self._now + timeout_seconds:
            assert math.isfinite(timeout_seconds), "waiting for ever with nothing running"
            self._now += timeout_seconds
            return []
        due, _, event = heapq.heappop(self._due)
        self._now = max(self._now, due)
        return [event]

    def restart(self, worker: int) -> None:
        raise AssertionError("inline workers do not die")

    def cost(self, spec: TrialSpec) -> CostReply:
        try:
            return CostReply(cost=self._costs.cost(spec), refused=None)
        except SpecError as exc:
            return CostReply(cost=None, refused=str(exc))

    def now(self) -> float:
        return self._now

    def close(self) -> None:
        self._due.clear()
