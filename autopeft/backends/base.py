"""The protocol between driver and workers: what a worker is told, what it reports, and what a backend must do.

Messages are records, sent as one JSON object a line, so that a worker may sit behind any pipe.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from autopeft.records import Cost, FailureReason, Inference, Latency, TrialSpec, from_record, to_record

Purpose = Literal["search", "confirm", "baseline"]

CONTEXT_BYTES = 512 * 2**20
"""Assumed for what the driver keeps for a process with kernels loaded, outside PyTorch's allocator and its figures. It
depends on driver, GPU and libraries, commonly 0.3 to 0.6 GiB; `benchmarks/vram.py` prints what it is on a GPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelledGpu:
    """What of a GPU memory depends on."""

    name: str
    capability: tuple[int, int]
    """CUDA's compute capability."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSetup:
    """Everything a worker needs to know of the study, once."""

    backend: str
    model: str
    """As the user named it: `minilm`, a hub id or a folder."""
    task: str
    """The task file's text."""
    data_dir: str | None
    split_seed: int
    study_dir: str
    device: str
    """`cpu` or `cuda:0`."""
    threads: int
    latency: bool = False
    """Whether latency is an objective, so that workers measure what the driver has to compare."""
    role: Literal["train", "cost"] = "train"
    planned_gpu: ModelledGpu | None = None
    """Whose costs are asked for, where it is not the device itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Train one trial from a step to a step, then score it. To step 0: score the base as it is."""

    job: int
    """Unique within a driver's life; events carry it back."""
    trial: int
    spec: TrialSpec
    purpose: Purpose
    from_step: int
    to_step: int
    checkpoint: str | None = None
    """To go on from, relative to the study's folder; None at step 0."""
    checkpoint_digest: str | None = None
    save: bool = False
    """Whether to write a checkpoint at the end."""
    score_test: bool = False
    """Only ever true for confirmations, at full length, and for the untrained base."""
    score_batch_size: int | None = None
    """Examples at a time in evaluation, so that it needs no more memory than training; None leaves it to the worker."""
    measure_inference: bool = False
    """Whether to time forward passes too: in confirmations, and where latency has to be known before it can be judged.
    """


@dataclass(frozen=True, slots=True, kw_only=True)
class Pack:
    """What one worker is given at a time. One stretch for now; later several adapters may share a base's forward."""

    stretches: tuple[Stretch, ...]
    kind: Literal["pack"] = "pack"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostRequest:
    """Asks the cost process for a configuration's cost."""

    spec: TrialSpec
    kind: Literal["cost_request"] = "cost_request"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A worker holds model and data and waits for work."""

    device_name: str
    packages: dict[str, str]
    model_digest: str
    num_parameters: int
    notes: tuple[str, ...] = ()
    """What a reader of the study must know of this model, such as what target groups mean on it."""
    unquantized_share: float = 0.0
    """Of the weights in the model's blocks those that 4 and 8 bits leave as they are."""
    latency: Latency | None = None
    """Of the unquantized base, where latency is an objective."""
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """A sign of life during a stretch."""

    job: int
    step: int
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Of one split."""

    quality: float
    loss: float
    num_examples: int
    quality_sd: float | None = None
    """As in `RungScore`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A stretch reached its last step and was scored."""

    job: int
    validation: Score
    test: Score | None
    scores_file: str
    scores_digest: str
    train_seconds: float
    checkpoint: str | None
    checkpoint_digest: str | None
    load_seconds: float = 0.0
    """In which a GPU's base was loaded that the worker did not hold, by its clock; 0 on a CPU, which keeps all."""
    peak_vram_bytes: int | None = None
    reserved_vram_bytes: int | None = None
    simulated_seconds: float | None = None
    """Device-seconds by a simulated clock; None where the clock is real."""
    inference: Inference | None = None
    """Where the stretch asked for it."""
    kind: Literal["finished"] = "finished"


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A stretch that has no score: an outcome of the trial, not a fault of the search."""

    job: int
    reason: FailureReason
    detail: str
    peak_vram_bytes: int | None = None
    simulated_seconds: float | None = None
    """As in `Finished`."""
    kind: Literal["ended"] = "ended"


@dataclass(frozen=True, slots=True, kw_only=True)
class Listening:
    """The cost process holds the model and waits for requests: what it dies of from here on is one of them."""

    kind: Literal["listening"] = "listening"


@dataclass(frozen=True, slots=True, kw_only=True)
class CostReply:
    """The cost, or the rule by which the configuration cannot be built."""

    cost: Cost | None
    refused: str | None
    kind: Literal["cost_reply"] = "cost_reply"


@dataclass(frozen=True, slots=True, kw_only=True)
class Broken:
    """The worker cannot go on. `usage` tells a mistake of the user's from a fault of ours."""

    detail: str
    usage: bool
    ends_study: bool = False
    """Whether every other trial would meet the same."""
    kind: Literal["broken"] = "broken"


Command = Pack | CostRequest
Event = Ready | Progress | Finished | Ended | Listening | CostReply | Broken


class Backend(Protocol):
    """What trains. One instance lives in each worker process and keeps the base model loaded."""

    def ready(self) -> Ready: ...

    def run(self, stretch: Stretch, emit: Callable[[Event], None]) -> Finished | Ended:
        """Trains and scores one stretch; out of memory and divergence come back as `Ended`."""
        ...


class CostModel(Protocol):
    """Counts and estimates what configurations cost, without training them."""

    def cost(self, spec: TrialSpec) -> Cost:
        """Raises SpecError where the model cannot take the configuration."""
        ...


def encode_message(message: Command | Event | WorkerSetup) -> str:
    return json.dumps(to_record(message), separators=(",", ":"))


def decode_command(line: str) -> Command:
    return from_record(Command, json.loads(line), "command")  # type: ignore[arg-type]


def decode_event(line: str) -> Event:
    return from_record(Event, json.loads(line), "event")  # type: ignore[arg-type]
