"""A worker process: reads commands from standard input, one JSON object a line, and writes events to standard output.

It dies with its driver: the end of standard input, however it comes about, ends the process at once.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import TextIO

from autopeft.backends.base import (
    Broken,
    CostModel,
    CostReply,
    CostRequest,
    Event,
    Listening,
    WorkerSetup,
    decode_command,
    encode_message,
)
from autopeft.errors import AutopeftError, SpecError, StudyError, UsageError
from autopeft.records import TrialSpec, from_record
from autopeft.wording import first_line


def main() -> None:
    # Ctrl-C reaches the whole terminal; only the driver acts on it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    events = _claim_standard_output()
    lines = _read_lines()
    setup = from_record(WorkerSetup, json.loads(lines.get()), "setup")

    def emit(event: Event) -> None:
        events.write(encode_message(event) + "\n")
        events.flush()

    try:
        if setup.role == "cost":
            _serve_costs(setup, lines, emit)
        else:
            _serve_packs(setup, lines, emit)
    except AutopeftError as exc:
        # Of a trial's own mistakes others know nothing; the study's folder is everybody's.
        emit(Broken(detail=str(exc), usage=isinstance(exc, UsageError), ends_study=isinstance(exc, StudyError)))
    except Exception as exc:
        # Its last line is what users see, and a message of CUDA's ends in advice on debugging.
        emit(Broken(detail=f"{traceback.format_exc()}{type(exc).__name__}: {first_line(exc)}", usage=False))
    os._exit(1)


def _serve_packs(setup: WorkerSetup, lines: queue.Queue[str], emit) -> None:  # type: ignore[no-untyped-def]
    from autopeft.backends import load_backend

    backend = load_backend(setup)
    emit(backend.ready())
    while True:
        command = decode_command(lines.get())
        assert not isinstance(command, CostRequest)
        for stretch in command.stretches:
            emit(backend.run(stretch, emit))


def _serve_costs(setup: WorkerSetup, lines: queue.Queue[str], emit) -> None:  # type: ignore[no-untyped-def]
    from autopeft.backends import load_cost_model

    model = load_cost_model(setup)
    emit(Listening())
    while True:
        command = decode_command(lines.get())
        assert isinstance(command, CostRequest)
        emit(_answer(model, command.spec))


def _answer(model: CostModel, spec: TrialSpec) -> CostReply:
    try:
        return CostReply(cost=model.cost(spec), refused=None)
    except SpecError as exc:
        return CostReply(cost=None, refused=str(exc))
    except AutopeftError:
        raise
    except Exception as exc:
        # Whatever a library makes of one configuration is no reason to end the search of the others.
        return CostReply(cost=None, refused=f"its cost cannot be computed: {type(exc).__name__}: {first_line(exc)}")


def _claim_standard_output() -> TextIO:
    """The pipe to the driver; what libraries print goes to standard error instead, where it breaks no message."""
    pipe = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return pipe


def _read_lines() -> queue.Queue[str]:
    """Standard input's lines, read in a thread so that its end is noticed in the middle of training too."""
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    return lines


if __name__ == "__main__":
    main()
