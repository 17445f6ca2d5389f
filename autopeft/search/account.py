"""What a running study has spent and may still spend: the budget's ledger, its clock, and the signs of life."""

from __future__ import annotations

import math
from typing import NamedTuple

from autopeft.budget import Ledger, Purpose, parse_budget
from autopeft.executors.base import Executor
from autopeft.records import Segment, to_record
from autopeft.search.store import StudyStore

_HEARTBEAT_SECONDS = 5.0


class Bill(NamedTuple):
    """One settled stretch of one worker."""

    device_seconds: float
    segment: Segment


class _Open(NamedTuple):
    trial: int
    assigned_at: float


class Account:
    """Charges workers from assignment to release, and tells what is left for search and for everything."""

    def __init__(self, store: StudyStore, executor: Executor, wall_seconds_limit: float) -> None:
        self.budget = parse_budget(store.config.budget)
        self.ledger = Ledger(self.budget)
        self._store = store
        self._executor = executor
        self.num_workers = executor.num_workers
        """That work, or may."""
        self._limit = wall_seconds_limit
        # Workers come up within it: a time of day waits for nobody.
        self._limit_from = executor.now()
        self._open: dict[int, _Open] = {}
        self._wall_before = 0.0
        self._started_at: float | None = None
        self._last_heartbeat = -math.inf

    def reopen(self) -> None:
        """Takes over what earlier drivers spent; what ran at a dead driver's last sign of life is charged as lost."""
        for stretch in self._store.read_ledger(self.ledger):
            self.ledger.charge("lost", float(stretch["device_seconds"]))
        self._wall_before = self.ledger.wall_seconds
        self._store.save_study(running=[])
        self.write()

    def start_clock(self) -> None:
        self._started_at = self._executor.now()

    def lose_worker(self) -> None:
        """One is given up: what is left of device-seconds lasts longer with fewer."""
        self.num_workers -= 1

    # --- charge

    def open(self, worker: int, trial: int) -> None:
        self._open[worker] = _Open(trial, self._executor.now())
        self.heartbeat(force=True)

    def measure_open(self, worker: int, at: float | None = None) -> float:
        """Wall seconds since a worker was assigned what it does."""
        at = self._executor.now() if at is None else at
        return max(0.0, at - self._open[worker].assigned_at)

    def settle(
        self,
        worker: int,
        purpose: Purpose,
        step: int,
        at: float | None = None,
        *,
        loading_seconds: float = 0.0,
        base_seconds: float = 0.0,
    ) -> Bill:
        """Ends a worker's stretch which reached `step`, at the executor's time `at` or now."""
        at = self._executor.now() if at is None else at
        seconds = self.measure_open(worker, at) * self._executor.device_rate
        opened = self._open.pop(worker)
        self.ledger.charge(purpose, seconds)
        segment = Segment(
            worker=worker,
            trial=opened.trial,
            purpose=purpose,
            start_seconds=self._study_seconds(opened.assigned_at),
            end_seconds=self._study_seconds(at),
            step=step,
            loading_seconds=loading_seconds,
            base_seconds=base_seconds,
        )
        return Bill(seconds, segment)

    # --- what is left

    def budget_seconds_left(self) -> float:
        """Wall seconds that the budget buys with all workers busy; below zero once it is overrun."""
        return self._find_left(self._rate)

    def seconds_left(self) -> float:
        """The same, and not beyond this run's own limit."""
        return min(self.budget_seconds_left(), self._limit_left())

    def seconds_left_for_one(self, promised_seconds: float) -> float:
        """Wall seconds that the budget and the limit leave one worker, whether or not the others are busy; what runs
        will have `promised_seconds` more before it ends."""
        rate = self._executor.device_rate
        return min(self._find_left(rate, promised_seconds * rate), self._limit_left())

    def _find_left(self, rate: float, promised_device_seconds: float = 0.0) -> float:
        now = self._executor.now()
        self.ledger.wall_seconds = self._study_seconds(now)
        unbilled = sum((now - opened.assigned_at) * self._executor.device_rate for opened in self._open.values())
        return self.ledger.remaining_wall_seconds(rate, unbilled + promised_device_seconds)

    def _limit_left(self) -> float:
        return self._limit - (self._executor.now() - self._limit_from)

    def search_seconds_left(self) -> float:
        """The same for the search, which leaves a share for confirmation, as far as that has not had it already."""
        total = self.total_seconds
        if math.isinf(total):
            return math.inf
        kept = self._store.config.confirm_share * total - self.ledger.device_seconds["confirm"] / self._rate
        return self.seconds_left() - max(kept, 0.0)

    def search_device_seconds_left(self) -> float:
        return self.search_seconds_left() * self._rate

    @property
    def total_seconds(self) -> float:
        """Wall seconds that the whole budget buys with all workers busy; inf where only trials bound it."""
        return min(self.budget.wall_bound_seconds(self._rate), self._limit)

    @property
    def _rate(self) -> float:
        return self._executor.device_rate * self.num_workers

    def _study_seconds(self, at: float) -> float:
        return self._wall_before + (0.0 if self._started_at is None else at - self._started_at)

    # --- write

    def heartbeat(self, *, force: bool = False) -> None:
        """Writes what is running and since when, so that a killed driver's successor can charge it."""
        now = self._executor.now()
        if not force and now - self._last_heartbeat < _HEARTBEAT_SECONDS:
            return
        self._last_heartbeat = now
        running = [
            {"trial": opened.trial, "device_seconds": (now - opened.assigned_at) * self._executor.device_rate}
            for opened in self._open.values()
        ]
        self.write()
        self._store.save_study(running=running)

    def write(self) -> None:
        self.ledger.wall_seconds = self._study_seconds(self._executor.now())
        self._store.save_study(ledger=to_record(self.ledger.to_record()))
