"""What a study writes down: frozen, typed records and their JSON codec.

Standard library only, so that every layer, the driver and the workers can read them. Records are the product: a
measurement that was not made is `None`, never a number. Numbers carry their unit last (`_bytes`, `_seconds`, `_steps`).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import types
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from autopeft.errors import RecordError, suggest_nearest

SCHEMA_VERSION = 1
"""Raised when a record changes in a way that older code would misread; `tests/golden` keeps one file per version."""

Scalar = bool | int | float | str
Bits = Literal[4, 8, 16, 32]
Optimizer = Literal["adamw", "adamw_8bit", "paged_adamw_8bit"]
VramSource = Literal["estimated", "measured"]
FailureReason = Literal["out_of_memory", "diverged", "worker_died", "error"]
TrialSource = Literal["recipe", "included", "prior", "sampler", "baseline"]
TaskKind = Literal["classification", "generation"]
"""A class for a text, by a head on the model; or text after a prompt, by the model itself."""
PickName = Literal["best", "knee", "smallest"]
TrialState = Literal["waiting", "running", "paused", "stopped", "complete", "failed", "refused"]

R = TypeVar("R")


def _optional() -> Any:
    """A field that older records lack, and that is left out of newer ones where it is None."""
    return dataclasses.field(default=None, metadata={"leave_out_default": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialSpec:
    """One configuration, complete enough to train it again."""

    method: str
    """Key into `autopeft.methods.METHODS`."""
    settings: dict[str, Scalar]
    """The method's own dimensions without their prefix, e.g. {"rank": 8}."""
    target_modules: str | None
    """A group (`attention`, `all-linear`), `names:` and module names, or `re:` and a regular expression; None where the
    method has no targets."""
    bits: Bits
    """Width of the base weights: 4 (NF4) and 8 (int8) by bitsandbytes, 16 on GPU, 32 on CPU."""
    learning_rate: float
    batch_size: int
    max_steps: int
    """Optimizer steps of the full length; the schedule is laid out over them."""
    warmup_ratio: float
    schedule: Literal["linear", "cosine", "constant"]
    weight_decay: float
    seed: int
    optimizer: Optimizer = dataclasses.field(default="adamw", metadata={"leave_out_default": True})
    """AdamW with its states in float32, in 8 bits (arXiv:2110.02861), or in 8 bits that a GPU may page out."""

    def key(self) -> str:
        """Identity of the configuration, seed apart: two trials with equal keys ask the same question."""
        fields = to_record(self)
        del fields["seed"]
        return digest_json(fields)

    def cost_key(self) -> str:
        """Identity of everything that memory and parameter counts depend on."""
        fields = to_record(self)
        for name in ("seed", "learning_rate", "max_steps", "warmup_ratio", "schedule", "weight_decay"):
            del fields[name]
        return digest_json(fields)

    def modules_key(self) -> str:
        """Identity of everything that the trained model's modules depend on, and so its latency."""
        return digest_json([self.method, self.settings, self.target_modules, self.bits])


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What a configuration costs, known before it is trained; VRAM is replaced by the probe's measurement on CUDA."""

    trainable_parameters: int
    """Exact; the task head is not in it."""
    head_parameters: int
    """Trainable parameters of the task head."""
    peak_vram_bytes: int
    """Peak bytes allocated while training on the worst-case batch, evaluation excluded."""
    vram_source: VramSource
    reserved_vram_bytes: int | None = None
    """The caching allocator's peak, only where measured."""
    estimated_vram_bytes: int | None = None
    """What had been estimated, kept beside a measurement."""
    corrected_vram_bytes: int | None = _optional()
    """The estimate plus what earlier measurements of the study taught it to add, where that differs."""
    scoring_vram_bytes: int | None = _optional()
    """Peak of the evaluation pass, estimated."""
    scoring_batch_size: int | None = _optional()
    """Examples at a time in evaluation; None leaves it to the worker."""
    adapter_bytes: int | None = _optional()
    """Exact: tensors of what is saved of a training, the head included; for full fine-tuning the whole model."""
    latency_seconds: float | None = _optional()
    """Of one example alone, served as fast as it can be: merged where the method merges. Known once one trial with the
    same modules was measured; None where latency is no objective."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Wall seconds a forward pass takes, loading and tokenizing left out: medians over batches of real rows."""

    single_seconds: float
    """Of one example alone."""
    batch_seconds: float
    """Per example, in batches of `batch_size`."""
    batch_size: int
    num_batches: int
    """Timed of either kind, after a warm-up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Inference:
    """What a trained configuration costs to serve."""

    unmerged: Latency
    """As it was trained: base and adapter apart, the base at its width."""
    merged: Latency | None
    """Of the plain unquantized model that it merges into; None where the method does not merge."""
    base: Latency | None
    """Of the unquantized base alone, in the same process: what `unmerged` compares with, however busy the machine."""
    adapter_bytes: int
    """Weight files on disk, the head included."""
    device: str
    """The machine's, such as `NVIDIA H100 80GB` or a processor's name with the threads used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSettings:
    """How a step is taken, beside what a TrialSpec says."""

    micro_batches: int = 1
    """Parts, of the batch size each, whose gradients are accumulated before an update."""
    checkpoint_activations: bool = False
    """Whether each layer keeps its input alone and runs forward again in its backward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Where a configuration's memory goes, by one step on fake tensors. The parts up to `library_bytes` add up to the
    peak of what PyTorch allocates; what comes on top of that is apart."""

    device: str
    """What was modelled, such as `CUDA, as on a H100`; never what it was computed on."""
    trainable_parameters: int
    """Exact; the task head is not in it."""
    head_parameters: int
    base_parameters: int
    base_bytes: int
    adapter_bytes: int
    """What trains, the head included, and what the method keeps frozen beside it."""
    gradient_bytes: int
    """At the peak."""
    optimizer_bytes: int
    activation_bytes: int
    """At the peak, temporaries included."""
    library_bytes: int
    """cuBLAS's workspaces, which PyTorch allocates; 0 on CPU."""
    scoring_bytes: int
    """Peak of the evaluation pass, everything included that the training peak includes."""
    scoring_batch_size: int
    """The most examples, up to twice the training batch, with which scoring needs no more than training."""
    allocator_bytes: int
    """Estimated on top: what the caching allocator reserves beyond what is allocated; 0 on CPU."""
    context_bytes: int
    """Assumed on top: what the driver keeps for the process; 0 on CPU."""
    paged_bytes: int
    """Optimizer states in unified memory, in no other figure; a GPU short of memory pages them out to the host."""
    checkpoint_bytes: int
    """Tensors of a checkpoint to resume from."""
    exported_bytes: int
    """Tensors of the adapter as it is exported, the head included."""
    layers_measured: tuple[int, int] | None = None
    """Depths of the two shallower models that this was extrapolated from; None where all layers were run."""

    @property
    def peak_bytes(self) -> int:
        return (
            self.base_bytes + self.adapter_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes
            + self.library_bytes
        )  # fmt: skip

    @property
    def device_bytes(self) -> int:
        """What a GPU must have free for the process."""
        return max(self.peak_bytes, self.scoring_bytes) + self.allocator_bytes + self.context_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class RungScore:
    """A trial's score on the search-validation split after `step` optimizer steps."""

    rung: int
    step: int
    quality: float
    loss: float
    """Mean per-example loss in nats; the racing signal."""
    num_examples: int
    device_seconds: float
    """Of the stretch that ended here: assignment to release, evaluation included; times threads on CPU."""
    train_seconds: float
    """Of the stretch's optimizer steps alone, by the worker's clock."""
    scores_file: str
    """Per-example losses and predictions, relative to the study's folder."""
    scores_digest: str
    quality_sd: float | None = _optional()
    """Over the examples, where the quality is no share of right answers: sd over the root of `num_examples` is its
    standard error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completed:
    """Reached its last rung."""

    kind: Literal["completed"] = "completed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped:
    """Ended at a rung because a rival that costs no more was clearly better there."""

    rung: int
    rival: int
    """Number of the trial that was better."""
    detail: str
    kind: Literal["stopped"] = "stopped"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """Ended without a score. Out of memory and divergence are facts about the configuration, not errors."""

    reason: FailureReason
    detail: str
    room_bytes: int | None = _optional()
    """Where it ran out of memory: what the GPU had free for it when the search began."""
    kind: Literal["failed"] = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """Never started, because its cost or a rule forbids it."""

    rule: str
    kind: Literal["refused"] = "refused"


Outcome = Completed | Stopped | Failed | Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """One retraining of a finalist at full length with another seed."""

    seed: int
    quality: float
    loss: float
    test_quality: float
    test_loss: float
    num_test_examples: int
    device_seconds: float
    scores_file: str
    scores_digest: str
    inference: Inference | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    test_quality_sd: float | None = _optional()
    """As in `RungScore`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FailedConfirmation:
    """A retraining of a finalist that ended without a score."""

    seed: int
    reason: FailureReason
    detail: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """A trial as everybody outside the search reads it."""

    number: int
    spec: TrialSpec
    source: TrialSource
    state: TrialState
    cost: Cost | None
    rungs: tuple[RungScore, ...]
    outcome: Outcome | None
    device_seconds: float
    """All stretches, the unfinished ones included; confirmations apart."""
    confirmations: tuple[Confirmation, ...]
    failed_confirmations: tuple[FailedConfirmation, ...] = dataclasses.field(
        default=(), metadata={"leave_out_default": True}
    )

    @property
    def diverges(self) -> bool:
        """Whether it did with another seed: what it scored with the first was luck."""
        return any(failed.reason == "diverged" for failed in self.failed_confirmations)

    @property
    def quality(self) -> float | None:
        """Search-validation quality: mean over seeds where confirmed, else of the last rung; None before the first."""
        if not self.rungs:
            return None
        values = [self.rungs[-1].quality, *(c.quality for c in self.confirmations)]
        return sum(values) / len(values)

    @property
    def test_quality(self) -> float | None:
        """Mean over the confirmed seeds; None where none was confirmed."""
        if not self.confirmations:
            return None
        return sum(c.test_quality for c in self.confirmations) / len(self.confirmations)


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where the numbers come from. Holds digests of data and weights, never a local path."""

    autopeft: str
    python: str
    packages: dict[str, str]
    platform: str
    device: str
    device_count: int
    threads: int
    model_digest: str
    task_digest: str
    num_train: int
    num_validation: int
    num_test: int
    created_at: str
    """UTC, ISO 8601."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WarmStart:
    """What a study takes over from others: what to try first, and nothing of their results."""

    sources: tuple[str, ...]
    """Who they are, for a reader."""
    first: tuple[TrialSpec, ...]
    """Moved into the study's own space, the most promising first."""
    weighed: tuple[str, ...]
    """Methods that the sources have trained: what did well of them is among `first`, so they need no recipe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """What was asked for. Enough, with the study's folder, to resume it."""

    name: str
    task: str
    """The task file's text, shipped or the user's own."""
    task_name: str
    model: str
    """`minilm`, a hub id, or a folder's last name: records are published, and hold no local path."""
    budget: str
    objectives: tuple[str, ...]
    rungs: tuple[int, ...]
    """Step counts, ascending; the last is the full length."""
    seed: int
    workers: int
    device_kind: Literal["cpu", "cuda"]
    space: str
    """The search space's YAML text."""
    space_name: str
    methods: tuple[str, ...] | None
    fixed: dict[str, Scalar]
    included: tuple[TrialSpec, ...]
    max_vram_bytes: int | None
    confirm_share: float
    confirm_seeds: int
    until: str | None
    price_per_device_hour: float | None
    majority_quality: float
    """Search-validation quality without learning: of always answering with the most frequent training label; for a
    generation task of the untrained base, 0 until that was scored."""
    majority_test_quality: float
    scorer: str
    backend: str = "hf"
    max_params: int | None = _optional()
    """The most trainable parameters that a configuration may have, the head left out."""
    task_kind: TaskKind = dataclasses.field(default="classification", metadata={"leave_out_default": True})
    model_kind: Literal["encoder", "decoder", "encoder-decoder"] | None = _optional()
    """Told from the model's configuration; None where it was not at hand, and in studies from before."""
    least_gain: float | None = _optional()
    """The search ends once what is left of the budget is expected to add less than this share to the hypervolume."""
    warm_start: WarmStart | None = dataclasses.field(default=None, metadata={"leave_out_default": True})


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerRecord:
    """Where the budget went, in device-seconds: GPU seconds, or core seconds on CPU."""

    search_seconds: float
    confirm_seconds: float
    baseline_seconds: float
    lost_seconds: float
    """Spent on stretches that a crash or an interrupt cut off."""
    wall_seconds: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of one device's time, for the budget timeline."""

    worker: int
    trial: int
    purpose: Literal["search", "confirm", "baseline", "lost"]
    start_seconds: float
    """Wall seconds since the study began, pauses of the study itself left out."""
    end_seconds: float
    step: int
    loading_seconds: float = dataclasses.field(default=0.0, metadata={"leave_out_default": True})
    """In which a worker that had died came up again."""
    base_seconds: float = dataclasses.field(default=0.0, metadata={"leave_out_default": True})
    """In which a GPU's worker loaded a base of another width than it held."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontMember:
    """A member of the trade-off front."""

    number: int
    confidence: float
    """Share of bootstrap resamples, of validation examples and seeds, in which it is on the front, in [0, 1]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """A configuration chosen from the front, by name."""

    name: PickName
    number: int
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GainForecast:
    """What a larger budget is expected to bring."""

    device_seconds: float
    """More of search; where the budget is in trials, what so many would take."""
    trials: float
    """More to start, about."""
    gain: float
    """Expected growth of the front's hypervolume, as a share of what it is."""
    low: float
    high: float
    """Between which four in five such gains lie."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What a search left undone. All of it is estimated, see `search/outlook.py`; nothing was measured."""

    stopped_seconds: float
    """Device-seconds spent on trials that were stopped."""
    saved_seconds: float
    """Device-seconds that bringing those to their full length would have taken beside."""
    stopped_members: float
    """How many of them would have been on the front, on average."""
    forecasts: tuple[GainForecast, ...]
    """Of larger budgets, ascending; empty where too little was tried to say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyRecord:
    """A whole study, as reports, leaderboards and exports read it."""

    uid: str
    config: StudyConfig
    provenance: Provenance
    trials: tuple[TrialRecord, ...]
    baseline: TrialRecord | None
    """A trained head on the frozen base; for a generation task, which has no head, the base as it is."""
    ledger: LedgerRecord
    segments: tuple[Segment, ...]
    front: tuple[FrontMember, ...]
    picks: tuple[Pick, ...]
    hypervolume: float | None
    notes: tuple[str, ...]
    """Sentences that a reader must know: budget too small, overrun, interrupted."""
    finished: bool
    reference: dict[str, float] = dataclasses.field(default_factory=dict)
    """The hypervolume's fixed reference: the worst quality and costs that count, by objective."""
    ties: tuple[tuple[int, ...], ...] = dataclasses.field(default=(), metadata={"leave_out_default": True})
    """Groups of the front's members whose quality cannot be told apart, the best first."""
    outlook: Outlook | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    beats_baseline: bool | None = _optional()
    """Whether the best pick is clearly better than the baseline, on the same examples; None where that is not known."""
    schema_version: int = SCHEMA_VERSION


def to_record(value: Any) -> Any:
    """Plain JSON data of a record: dataclasses become objects, tuples become lists."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        # A field that came later and is as everything was before it is left out: keys of stored trials stay theirs,
        # and older code reads the record.
        return {
            f.name: to_record(getattr(value, f.name))
            for f in dataclasses.fields(value)
            if not (f.metadata.get("leave_out_default") and getattr(value, f.name) == f.default)
        }
    if isinstance(value, list | tuple):
        return [to_record(item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): to_record(v) for k, v in value.items()}
    return value


def from_record(cls: type[R], data: Any, where: str = "record") -> R:
    """The inverse of `to_record`, checked field by field.

    Raises RecordError where a key is unknown or missing, a type does not fit, or the schema is newer than this code.
    """
    return _decode(cls, data, where)  # type: ignore[no-any-return]


def digest_json(data: Any) -> str:
    """First 16 hexadecimal digits of the SHA-256 of canonical JSON."""
    text = json.dumps(to_record(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _hints(cls: Any) -> dict[str, Any]:
    return get_type_hints(cls)


def _decode(hint: Any, data: Any, where: str) -> Any:
    origin = get_origin(hint)
    if dataclasses.is_dataclass(hint):
        return _decode_dataclass(hint, data, where)  # type: ignore[arg-type]
    if origin in (Union, types.UnionType):
        return _decode_union(get_args(hint), data, where)
    if origin is Literal:
        if not any(data == known and type(data) is type(known) for known in get_args(hint)):
            raise RecordError(f"{where} must be one of {', '.join(map(str, get_args(hint)))}, but is {data!r}.")
        return data
    if origin is tuple:
        if not isinstance(data, list):
            raise RecordError(f"{where} must be a list, but is {type(data).__name__}.")
        return tuple(_decode(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise RecordError(f"{where} must be an object, but is {type(data).__name__}.")
        return {k: _decode(get_args(hint)[1], v, f"{where}.{k}") for k, v in data.items()}
    if hint is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if hint is type(None):
        if data is not None:
            raise RecordError(f"{where} must be null, but is {data!r}.")
        return None
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise RecordError(f"{where} must be {hint.__name__}, but is {data!r}.")
    return data


def _decode_union(choices: tuple[Any, ...], data: Any, where: str) -> Any:
    if isinstance(data, dict) and "kind" in data:
        for choice in choices:
            if dataclasses.is_dataclass(choice) and _hints(choice).get("kind") == Literal[data["kind"]]:  # type: ignore[arg-type]
                return _decode(choice, data, where)
    if bool in choices and isinstance(data, bool):
        return data
    if int in choices and isinstance(data, int) and not isinstance(data, bool):
        return data
    errors = []
    for choice in choices:
        try:
            return _decode(choice, data, where)
        except RecordError as exc:
            errors.append(str(exc))
    raise RecordError(errors[0])


def _decode_dataclass(cls: type[Any], data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise RecordError(f"{where} must be an object with the fields of {cls.__name__}, but is {type(data).__name__}.")
    if isinstance(data.get("schema_version"), int) and data["schema_version"] > SCHEMA_VERSION:
        raise RecordError(
            f"{where} was written with schema {data['schema_version']}, and this autopeft reads schemas up to "
            f"{SCHEMA_VERSION}. Nothing was changed. Install a newer autopeft to read it."
        )
    hints = _hints(cls)  # type: ignore[arg-type]  # mypy doubts that type[Any] is hashable
    for key in data:
        if key not in hints:
            raise RecordError(f"{where} has the unknown field '{key}'. {suggest_nearest(key, hints)}")
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in data:
            values[field.name] = _decode(hints[field.name], data[field.name], f"{where}.{field.name}")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RecordError(f"{where} lacks the field '{field.name}' of {cls.__name__}.")
    return cls(**values)
