"""Workers as processes on this machine, one a device, and the cost process beside them."""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from typing import IO

from autopeft.backends.base import (
    Broken,
    Command,
    CostReply,
    CostRequest,
    Listening,
    Pack,
    Progress,
    Ready,
    WorkerSetup,
    decode_event,
    encode_message,
)
from autopeft.errors import ModelError, WorkerError
from autopeft.executors.base import WorkerEvent, make_worker_error
from autopeft.records import TrialSpec
from autopeft.wording import first_line, last_line

_COST = -1
"""The cost process's number among the workers."""
_START_SECONDS = 1800.0
"""A large base may have to be downloaded first."""
_COST_SECONDS = 600.0
_SILENT_SECONDS = 3600.0
"""After which a worker that has something to do and says nothing is taken to hang: training and scoring tell how far
they are each second, and a base is loaded, a trial built and a batch written in less."""
_LOOK_SECONDS = 60.0
"""Between two looks for such."""


class _Process:
    """One worker process, and a thread that moves its events into the common queue."""

    def __init__(self, number: int, setup: WorkerSetup, environment: dict[str, str], events: queue.Queue[WorkerEvent]):
        self.number = number
        # Not a pipe: nobody would read it while the worker trains. Kept to explain a death.
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self.process = subprocess.Popen(
            [sys.executable, "-m", "autopeft.executors.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        self._events = events
        self._awaited = 0
        """Answers: that it is ready, and one to each command, which may be sent before."""
        self._counting = threading.Lock()
        self.heard_at = time.monotonic()
        self._why_killed = ""
        self.send(setup)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, message: Command | WorkerSetup) -> None:
        assert self.process.stdin is not None
        with self._counting:
            self._awaited += 1
            self.heard_at = time.monotonic()
        # A worker that has died is reported by its reader; there is nobody to tell anything.
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(encode_message(message) + "\n")
            self.process.stdin.flush()

    def _read(self) -> None:
        """Puts all events. The last is `Broken` or else the process's end: a death is told once, and nothing after it
        could be taken for its successor's."""
        assert self.process.stdout is not None
        after = ""
        try:
            for line in self.process.stdout:
                event = decode_event(line)
                with self._counting:
                    self._awaited -= not isinstance(event, Progress)
                    self.heard_at = time.monotonic()
                self._events.put(WorkerEvent(self.number, event, time.monotonic()))
                if isinstance(event, Broken):
                    return
        except Exception as exc:
            # A line that a kill cut short, or that no worker wrote: what follows would be no more readable.
            self.process.kill()
            after = f" after a line that is no event ({first_line(exc)})"
        code = self.process.wait()
        words = self.last_words()
        # The last line is what users see; the others are for whoever looks for the cause.
        why = f" {self._why_killed}" if self._why_killed else after
        detail = f"{words}\nexit status {code}{why}. {last_line(words)}".strip()
        self._events.put(WorkerEvent(self.number, None, time.monotonic(), detail))

    def last_words(self) -> str:
        with contextlib.suppress(OSError, ValueError):
            self.log.seek(0, os.SEEK_END)
            self.log.seek(max(0, self.log.tell() - 2000))
            return self.log.read().decode(errors="replace").strip()
        return ""

    def end_if_silent(self) -> None:
        """Its death is told as any other's."""
        silence = time.monotonic() - self.heard_at
        if self._awaited > 0 and silence > _SILENT_SECONDS and not self._why_killed:
            self._why_killed = f"after {silence:.0f} s without a sign of life"
            self.process.kill()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        # The process is gone, so its pipe ends and the reader with it.
        self._reader.join()
        for file in (self.process.stdin, self.process.stdout, self.log):
            assert file is not None
            with contextlib.suppress(BrokenPipeError):
                file.close()


class LocalExecutor:
    """Worker processes on this machine. Its clock is the machine's."""

    def __init__(self, setup: WorkerSetup, devices: list[str]) -> None:
        """`devices` has one entry a worker: `cpu`, or `cuda:N` by the driver's numbering."""
        self.num_workers = len(devices)
        self._setup = setup
        self._devices = devices
        on_cpu = devices[0] == "cpu"
        self.device_rate = float(setup.threads) if on_cpu else 1.0
        self._events: queue.Queue[WorkerEvent] = queue.Queue()
        self._cost_events: queue.Queue[WorkerEvent] = queue.Queue()
        self._cost_process_listens = False
        self._processes: dict[int, _Process] = {}
        self._looked_at = time.monotonic()

    def start(self) -> list[Ready]:
        for worker in range(self.num_workers):
            self._spawn(worker)
        # Needed as soon as the workers are ready, and as long in starting as they are.
        self._spawn(_COST)
        ready: dict[int, Ready] = {}
        deadline = time.monotonic() + _START_SECONDS
        while len(ready) < self.num_workers:
            for event in self.wait(max(0.0, deadline - time.monotonic())) or [self._too_late()]:
                ready[event.worker] = _expect_ready(event)
        return [ready[worker] for worker in range(self.num_workers)]

    def assign(self, worker: int, pack: Pack) -> None:
        self._processes[worker].send(pack)

    def wait(self, timeout_seconds: float) -> list[WorkerEvent]:
        end = time.monotonic() + timeout_seconds
        while True:
            self._look_for_silent()
            left = end - time.monotonic()
            try:
                events = [self._events.get(timeout=max(min(left, _LOOK_SECONDS), 0.001))]
                break
            except queue.Empty:
                if left <= _LOOK_SECONDS:
                    return []
        with contextlib.suppress(queue.Empty):
            while True:
                events.append(self._events.get_nowait())
        return events

    def _look_for_silent(self) -> None:
        now = time.monotonic()
        # In which this process did not look: it was stopped, maybe, and its workers with it.
        missed = max(0.0, now - self._looked_at - 2 * _LOOK_SECONDS)
        self._looked_at = now
        for worker in range(self.num_workers):
            self._processes[worker].heard_at += missed
            self._processes[worker].end_if_silent()

    def restart(self, worker: int) -> None:
        self._processes[worker].kill()
        self._spawn(worker)

    def cost(self, spec: TrialSpec) -> CostReply:
        """Refused where the cost process twice dies of it or gives no answer: others' costs may still be known."""
        for _ in range(2):
            self._await_cost_process()
            self._processes[_COST].send(CostRequest(spec=spec))
            event = self._next_of_costs(_COST_SECONDS)
            if isinstance(event.event, CostReply):
                return event.event
            if isinstance(event.event, Broken):
                raise _death(event)
            self._processes.pop(_COST).kill()
        return CostReply(cost=None, refused=f"its cost cannot be computed, tried twice: {last_line(event.detail)}")

    def now(self) -> float:
        return time.monotonic()

    def close(self) -> None:
        for process in self._processes.values():
            process.kill()
        self._processes.clear()

    def _spawn(self, worker: int) -> None:
        environment = dict(os.environ)
        # Set before torch is loaded; later changes have no effect on its thread pools.
        threads = str(self._setup.threads)
        environment |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        # Threads that spin at barriers take the cores from whatever else runs, the other workers included.
        environment |= {"OMP_WAIT_POLICY": "PASSIVE"}
        # All that a study needs of the hub has been fetched; no worker waits for a network, or meets newer weights.
        environment |= {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
        setup = self._setup
        if worker == _COST:
            # Costs are computed without a device, but modelled for the one that will train.
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
            setup = replace(setup, role="cost", device=self._devices[0])
            # What a predecessor still says, answers no request of now.
            self._cost_events = queue.Queue()
            self._cost_process_listens = False
        elif self._devices[worker] == "cpu":
            environment |= {"CUDA_VISIBLE_DEVICES": ""}
            setup = replace(setup, device="cpu")
        else:
            environment |= {"CUDA_VISIBLE_DEVICES": self._devices[worker].removeprefix("cuda:")}
            # nvidia-smi's numbers, by which it was chosen; CUDA's own begin with the fastest GPU.
            environment |= {"CUDA_DEVICE_ORDER": "PCI_BUS_ID"}
            setup = replace(setup, device="cuda:0")
        events = self._cost_events if worker == _COST else self._events
        self._processes[worker] = _Process(worker, setup, environment, events)

    def _await_cost_process(self) -> None:
        """Raises what it says it broke on, as `start` does."""
        if _COST not in self._processes:
            self._spawn(_COST)
        if not self._cost_process_listens:
            event = self._next_of_costs(_START_SECONDS)
            if not isinstance(event.event, Listening):
                raise _death(event)
            self._cost_process_listens = True

    def _next_of_costs(self, timeout_seconds: float) -> WorkerEvent:
        try:
            return self._cost_events.get(timeout=timeout_seconds)
        except queue.Empty:
            return WorkerEvent(_COST, None, time.monotonic(), f"no answer in {timeout_seconds:.0f} s")

    def _too_late(self) -> WorkerEvent:
        return WorkerEvent(0, None, time.monotonic(), f"not ready after {_START_SECONDS:.0f} s")


def _expect_ready(event: WorkerEvent) -> Ready:
    if isinstance(event.event, Ready):
        return event.event
    raise _death(event)


def _death(event: WorkerEvent) -> WorkerError | ModelError:
    if isinstance(event.event, Broken):
        if event.event.usage:
            return ModelError(event.event.detail)
        return make_worker_error("A worker broke:", event.event.detail)
    return make_worker_error("A worker process died:", event.detail)
