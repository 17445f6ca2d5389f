"""Workers that live in this process on a simulated clock: for backends that simulate."""

from __future__ import annotations

import heapq
import itertools
import math

from autopeft.backends import load_backend, load_cost_model
from autopeft.backends.base import Backend, CostModel, CostReply, Finished, Pack, Ready, WorkerSetup
from autopeft.errors import SpecError
from autopeft.executors.base import WorkerEvent
from autopeft.records import TrialSpec

_SECONDS_TO_FAIL = 1.0
"""Of a stretch that ended without saying how long it took."""


class InlineExecutor:
    """Each pack is answered when simulated time reaches its end, whatever the number of workers."""

    def __init__(
        self,
        setup: WorkerSetup | None,
        num_workers: int,
        *,
        backend: Backend | None = None,
        costs: CostModel | None = None,
        device_rate: float = 1.0,
    ) -> None:
        """What `setup` names, or a backend and a cost model that are there already: a recording that was read."""
        self.num_workers = num_workers
        self.device_rate = device_rate
        self._setup = setup
        if backend is None or costs is None:
            assert setup is not None, "neither a setup nor a backend with its cost model"
            backend, costs = load_backend(setup), load_cost_model(setup)
        self._backend = backend
        self._costs = costs
        self._now = 0.0
        self._due: list[tuple[float, int, WorkerEvent]] = []
        """By time, and of what is due at once by job; restarts, which have none, count down from 0."""
        self._restarts = itertools.count(1)

    def start(self) -> list[Ready]:
        return [self._backend.ready() for _ in range(self.num_workers)]

    def assign(self, worker: int, pack: Pack) -> None:
        for stretch in pack.stretches:
            event = self._backend.run(stretch, lambda _: None)
            seconds = event.simulated_seconds
            if seconds is None:
                assert not isinstance(event, Finished), "the inline executor needs a backend with a simulated clock"
                seconds = _SECONDS_TO_FAIL
            due = self._now + seconds / self.device_rate
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
        """At once: only what is made to, dies here."""
        ready = WorkerEvent(worker, self._backend.ready(), self._now)
        heapq.heappush(self._due, (self._now, -next(self._restarts), ready))

    def cost(self, spec: TrialSpec) -> CostReply:
        try:
            return CostReply(cost=self._costs.cost(spec), refused=None)
        except SpecError as exc:
            return CostReply(cost=None, refused=str(exc))

    def now(self) -> float:
        return self._now

    def close(self) -> None:
        self._due.clear()
