"""A trial's life inside a worker, top to bottom: build, start from rows, probe, train, score, checkpoint.

The driver decides between stretches; here one stretch is run. The model of the last stretch is kept, so that a trial
which is promoted at once on the same worker goes on without being rebuilt; the result is the same to the bit.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import gc
import hashlib
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from autopeft.backends.base import Ended, Event, Finished, Progress, Ready, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import (
    BaseModel,
    count_unquantized_share,
    describe_base,
    digest_file,
    load_base,
    resolve_model,
)
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.data import TaskData, TokenizedSplit, longest_batch, plan_batches
from autopeft.backends.hf.health import check_cuda
from autopeft.backends.hf.kernels import install_onednn_products, prefers_onednn
from autopeft.backends.hf.latency import measure_latencies
from autopeft.backends.hf.row_start import start_from_rows
from autopeft.backends.hf.saved import count_saved_bytes, telling_the_disk
from autopeft.backends.hf.scoring import pack_scores, score_split, summarize
from autopeft.backends.hf.steps import (
    Diverged,
    SplitScores,
    bind_after_step,
    build_optimizer,
    learning_rate_at,
    restore_optimizer,
    train_step,
)
from autopeft.errors import ModelError, StudyError
from autopeft.hub import find_cached, find_weights
from autopeft.methods import find_method
from autopeft.methods.targets import GROUPS, explain_targets
from autopeft.records import Bits, Inference, Latency, TrialSpec
from autopeft.tasks.spec import parse_task

_PROBE_STEPS = 3
_LATENCY_BATCH_SIZE = 8
_PROGRESS_SECONDS = 1.0
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "optuna", "numpy")


class Vram(NamedTuple):
    peak_bytes: int
    reserved_bytes: int


class LiveTrial:
    """A model being trained, and everything that a checkpoint of it must hold."""

    def __init__(self, model: Any, spec: TrialSpec) -> None:
        self.model = model
        self.spec = spec
        self.optimizer = build_optimizer(model, spec)
        self.stepping = find_method(spec.method).stepping
        self.step = 0

    def state(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "trainable": {name: p.detach() for name, p in trainable_parameters(self.model).items()},
            "optimizer": self.optimizer.state_dict(),
            "stepping": self.stepping.state(self.model) if self.stepping else None,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        }

    def restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in trainable_parameters(self.model).items():
                parameter.copy_(state["trainable"][name])
        restore_optimizer(self.optimizer, state["optimizer"])
        if self.stepping:
            self.stepping.restore(self.model, state["stepping"])
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda_random"].cpu())
        self.step = state["step"]


class _Signs:
    """Tells the driver now and then how far a stretch is, and so that its worker is alive."""

    def __init__(self, emit: Callable[[Event], None], stretch: Stretch) -> None:
        self._emit = emit
        self._job = stretch.job
        self._last = time.monotonic()

    def __call__(self, step: int) -> None:
        if time.monotonic() - self._last > _PROGRESS_SECONDS:
            self._last = time.monotonic()
            self._emit(Progress(job=self._job, step=step))


class HfBackend:
    """Trains on real models. One a worker process; holds the resident bases and the tokenized task."""

    def __init__(self, setup: WorkerSetup) -> None:
        torch.set_num_threads(setup.threads)
        # Inter-op threads would only contend: a trial is one chain of operations.
        with contextlib.suppress(RuntimeError):
            torch.set_num_interop_threads(1)
        if setup.device == "cpu" and prefers_onednn():
            install_onednn_products()
        self.setup = setup
        if self._on_gpu:
            check_cuda()
        self.task = parse_task(setup.task, "task")
        self.data = TaskData(self.task, model=setup.model, data_dir=setup.data_dir, split_seed=setup.split_seed)
        self._bases: dict[Bits, BaseModel] = {}
        self._live: LiveTrial | None = None
        self._live_of: tuple[int, str, int] | None = None
        self._base_latency: Latency | None = None
        self._load_seconds = 0.0
        """Of the stretch that is run."""
        self._sign: Callable[[int], None] = lambda step: None

    def ready(self) -> Ready:
        """Loads the unquantized base, so that a model that cannot be had is known before any trial starts."""
        base = self._ready_base()
        return Ready(
            device_name=describe_device(self.setup.device),
            packages={name: version(name) for name in _PACKAGES if _has(name)},
            model_digest=digest_weights(self.setup.model),
            num_parameters=sum(p.numel() for p in base.model.parameters()),
            notes=tuple(filter(None, (explain_targets(group, base.linear_names) for group in GROUPS))),
            unquantized_share=count_unquantized_share(base.model),
            latency=self._base_latency if self.setup.latency else None,
        )

    def _ready_base(self) -> BaseModel:
        """The unquantized base, its latency timed where that will be asked for; without weights where it is too large
        for the GPU, on which it may still be trained in 8 or 4 bits."""
        try:
            base = self._base(16 if self._on_gpu else 32)
            if self.setup.latency or self._on_gpu:
                # On a GPU another base will take its place.
                self._base_latency = self._time([base.model], None)[0]
            return base
        except RuntimeError as exc:
            if not self._on_gpu or not is_out_of_memory(exc):
                raise
        # Only here: the exception's traceback held what was loaded.
        self._bases.clear()
        release_memory()
        if self.setup.latency:
            free, total = torch.cuda.mem_get_info()
            raise ModelError(
                f"Latencies are compared with the unquantized base's, but '{self.setup.model}' does not fit in 16 bits "
                f"into the GPU, which has {free / 2**30:.1f} of {total / 2**30:.1f} GiB free. Leave latency out of "
                "--objectives, or take a larger GPU or a smaller --model."
            )
        return describe_base(self.setup.model, num_labels=self.task.num_labels, bits=16)

    def run(self, stretch: Stretch, emit: Callable[[Event], None]) -> Finished | Ended:
        self._load_seconds = 0.0
        self._sign = _Signs(emit, stretch)
        if self._on_gpu:
            # A trial that goes on is not probed: without this, running out it would report an earlier trial's peak.
            torch.cuda.reset_peak_memory_stats()
        try:
            return replace(self._run(stretch), load_seconds=self._load_seconds)
        except Diverged as exc:
            ended = Ended(job=stretch.job, reason="diverged", detail=str(exc))
        except (MemoryError, RuntimeError) as exc:
            if not is_out_of_memory(exc):
                raise
            peak = torch.cuda.max_memory_allocated() if self._on_gpu else None
            ended = Ended(job=stretch.job, reason="out_of_memory", detail=str(exc)[:300], peak_vram_bytes=peak)
        # Only here: the exception's traceback held the step's tensors, and whatever holds them keeps them.
        self._drop_live()
        return ended

    def _run(self, stretch: Stretch) -> Finished:
        if stretch.to_step == 0:
            return self._score_untrained(stretch)
        live, vram = self._resume_or_build(stretch)
        # Values that training changes make no difference to it.
        inference = self._measure_inference(live, stretch.score_batch_size) if stretch.measure_inference else None
        train_seconds = self._train(live, stretch)
        return replace(self._finish(live.model, stretch, vram, train_seconds, live), inference=inference)

    @property
    def _on_gpu(self) -> bool:
        return self.setup.device.startswith("cuda")

    # --- build

    def _base(self, bits: Bits, *, aside: bool = False) -> BaseModel:
        """`aside`: an unquantized one in the machine's memory instead of the GPU's."""
        if bits not in self._bases:
            if self._on_gpu:
                # One base at a time on a GPU: a second one would count into the measured peak.
                self._drop_live()
                self._bases.clear()
                release_memory()
            started = time.monotonic()
            self._bases[bits] = load_base(
                self.setup.model, num_labels=self.task.num_labels, bits=bits, device=self.setup.device
            )
            if self._on_gpu:
                self._load_seconds += time.monotonic() - started
        base = self._bases[bits]
        if bits >= 16:
            base.model.to("cpu" if aside else self.setup.device)
        return base

    def _resume_or_build(self, stretch: Stretch) -> tuple[LiveTrial, Vram | None]:
        at = (stretch.trial, f"{stretch.spec.key()}-{stretch.spec.seed}", stretch.from_step)
        if self._live is not None and self._live_of == at:
            return self._live, None
        self._drop_live()
        # Production would not keep a second copy of the weights, so neither may the measured peak, nor what a trial
        # needs to be built: that would not fit where the trial does.
        aside = self._on_gpu and find_method(stretch.spec.method).writes_base(stretch.spec)
        base = self._base(stretch.spec.bits, aside=aside)
        if aside:
            release_memory()
        self._live = LiveTrial(build_trial_model(base, stretch.spec, device=self.setup.device), stretch.spec)
        vram = None
        if stretch.from_step == 0:
            start_from_rows(self._live.model, stretch.spec, self.data.rows(self.data.train, self.setup.device))
            vram = self._probe(self._live)
        else:
            assert stretch.checkpoint is not None
            path = Path(self.setup.study_dir) / stretch.checkpoint
            self._live.restore(torch.load(path, map_location=self.setup.device, weights_only=True))
        return self._live, vram

    def _drop_live(self) -> None:
        self._live = self._live_of = None
        if self._on_gpu:
            release_memory()

    # --- probe

    def _probe(self, live: LiveTrial) -> Vram | None:
        """Peak memory of three steps on the longest rows, measured on CUDA; leaves no trace in the trial.

        Three, because the optimizer's state is there from the second on, and the allocator settles by the third.
        """
        if not self._on_gpu:
            return None
        before = {name: p.detach().to("cpu", copy=True) for name, p in trainable_parameters(live.model).items()}
        stepping_before = copy.deepcopy(live.stepping.state(live.model)) if live.stepping else {}
        random_state, cuda_state = torch.get_rng_state(), torch.cuda.get_rng_state()
        batch = longest_batch(self.data.rows(self.data.train, self.setup.device), live.spec.batch_size)
        release_memory()
        torch.cuda.reset_peak_memory_stats()
        for step in range(1, _PROBE_STEPS + 1):
            after_step = bind_after_step(live.model, live.spec, step)
            train_step(
                live.model,
                live.optimizer,
                dict(batch),
                learning_rate=0.0,
                device=self.setup.device,
                after_step=after_step,
            )
        torch.cuda.synchronize()
        vram = Vram(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        with torch.no_grad():
            for name, parameter in trainable_parameters(live.model).items():
                parameter.copy_(before[name])
        if live.stepping:
            live.stepping.restore(live.model, stepping_before)
        live.optimizer = build_optimizer(live.model, live.spec)
        torch.set_rng_state(random_state)
        torch.cuda.set_rng_state(cuda_state)
        return vram

    # --- what it costs to serve

    def _measure_inference(self, live: LiveTrial, score_batch_size: int | None) -> Inference:
        """On search-validation rows, beside the unquantized base where that is at hand.

        Merging leaves the base's modules with other values in them, so the base's latency is the merged model's.
        """
        method = find_method(live.spec.method)
        resident = self._bases.get(16 if self._on_gpu else 32)
        base = self._base_latency
        if resident is not None and not (self._on_gpu and method.writes_base(live.spec)):
            unmerged, base = self._time([live.model, resident.model], score_batch_size)
        else:
            (unmerged,) = self._time([live.model], score_batch_size)
        return Inference(
            unmerged=unmerged,
            merged=base if method.merges else None,
            base=base,
            adapter_bytes=count_saved_bytes(live.model, live.spec),
            device=describe_device(self.setup.device),
        )

    def _time(self, models: Sequence[Any], batch_size: int | None) -> list[Latency]:
        rows = self.data.rows(self.data.validation, self.setup.device)
        random_state = torch.get_rng_state()
        latencies = measure_latencies(models, rows, batch_size=batch_size or _LATENCY_BATCH_SIZE)
        torch.set_rng_state(random_state)
        return latencies

    # --- train

    def _train(self, live: LiveTrial, stretch: Stretch) -> float:
        spec, device = stretch.spec, self.setup.device
        batches = plan_batches(
            self.data.train.lengths(), batch_size=spec.batch_size, num_steps=stretch.to_step, seed=spec.seed
        )
        started = time.monotonic()
        for step in range(live.step, stretch.to_step):
            batch = self.data.collate(self.data.train, batches[step], device)
            loss = train_step(
                live.model,
                live.optimizer,
                batch,
                learning_rate=learning_rate_at(step, spec),
                device=device,
                after_step=bind_after_step(live.model, spec, step + 1),
            )
            # Reading the loss waits for the GPU, so only every eighth step there.
            if (device == "cpu" or step % 8 == 7) and not torch.isfinite(loss):
                raise Diverged(f"the training loss is {loss.item()} at step {step + 1}")
            live.step = step + 1
            self._sign(live.step)
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.monotonic() - started

    # --- score, checkpoint

    def _score_untrained(self, stretch: Stretch) -> Finished:
        """The base as it is; on CUDA with the peak of scoring it."""
        self._drop_live()
        model = build_trial_model(self._base(stretch.spec.bits), stretch.spec)
        if self._on_gpu:
            release_memory()
            torch.cuda.reset_peak_memory_stats()
        finished = self._finish(model, stretch, None, 0.0, None)
        if not self._on_gpu:
            return finished
        vram = Vram(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
        return replace(finished, peak_vram_bytes=vram.peak_bytes, reserved_vram_bytes=vram.reserved_bytes)

    def _finish(
        self, model: Any, stretch: Stretch, vram: Vram | None, train_seconds: float, live: LiveTrial | None
    ) -> Finished:
        """`live` is None where nothing was trained, and so nothing can go on."""
        validation = self._score(model, self.data.validation, stretch)
        arrays: dict[str, Any] = pack_scores("validation", validation)
        test = None
        if stretch.score_test:
            test_scores = self._score(model, self.data.test, stretch)
            arrays |= pack_scores("test", test_scores)
            test = summarize(self.task, self.data.test, test_scores)
        name = f"scores/trial-{stretch.trial:05d}-{stretch.purpose}-seed{stretch.spec.seed}-step{stretch.to_step}.npz"
        digest = self._write(name, lambda file: np.savez_compressed(file, **arrays))
        checkpoint = checkpoint_digest = None
        if stretch.save and live is not None:
            # The step is in the name, so a crash while writing leaves the earlier checkpoint usable.
            checkpoint = f"checkpoints/trial-{stretch.trial:05d}-step{stretch.to_step}.pt"
            checkpoint_digest = self._write(checkpoint, lambda file: torch.save(live.state(), file))
        if live is not None:
            self._live_of = (stretch.trial, f"{stretch.spec.key()}-{stretch.spec.seed}", stretch.to_step)
        return Finished(
            job=stretch.job,
            validation=summarize(self.task, self.data.validation, validation),
            test=test,
            scores_file=name,
            scores_digest=digest,
            train_seconds=train_seconds,
            checkpoint=checkpoint,
            checkpoint_digest=checkpoint_digest,
            peak_vram_bytes=vram.peak_bytes if vram else None,
            reserved_vram_bytes=vram.reserved_bytes if vram else None,
        )

    def _write(self, name: str, write: Callable[[Any], object]) -> str:
        """The digest of what was written. Raises StudyError where the study's folder has no room for it."""
        folder = Path(self.setup.study_dir)
        try:
            return write_whole(folder / name, write)
        except OSError as exc:
            remedy = "Make room" if exc.errno in _NO_ROOM else "See that it can be written"
            raise StudyError(
                f"What a trial has learned is kept in its study's folder, but '{folder / name}' cannot be written: "
                f"{exc.strerror or exc}. {remedy}, then go on with: autopeft resume {folder.name}."
            ) from exc

    def _score(self, model: Any, split: TokenizedSplit, stretch: Stretch) -> SplitScores:
        # Without activations kept for a backward pass, twice the training batch mostly needs less memory.
        batch_size = stretch.score_batch_size or 2 * stretch.spec.batch_size
        return score_split(
            model, self.data, split, batch_size=batch_size, device=self.setup.device,
            on_batch=lambda: self._sign(stretch.to_step),
        )  # fmt: skip


def write_whole(path: Path, write: Callable[[Any], object]) -> str:
    """Writes a file so that it is either whole or absent, and returns its SHA-256. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        with telling_the_disk(), part.open("wb") as file:
            write(file)
    except OSError:
        part.unlink(missing_ok=True)
        raise
    digest = digest_file(part)
    part.replace(path)
    return digest


def is_out_of_memory(error: Exception) -> bool:
    """PyTorch has a type of its own only for its CUDA allocator; what CUDA, cuBLAS and the CPU allocator lack is told
    in a message."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return any(words in str(error) for words in _OUT_OF_MEMORY)


_OUT_OF_MEMORY = (
    "can't allocate memory",
    "not enough memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def describe_device(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    import platform

    return f"CPU {platform.machine()}"


def digest_weights(model: str) -> str:
    """First 16 digits of the SHA-256 over the weight files of a folder or cached hub model; `` where none is found."""
    folder = Path(resolve_model(model))
    if folder.is_dir():
        files = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    else:
        cached = find_cached(model)
        files = [] if cached is None else find_weights(cached)
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(_digest_cached(path).encode())
    return digest.hexdigest()[:16] if files else ""


def _digest_cached(path: Path) -> str:
    """Of a file's content: the cache of the hub names large files so, and links to them."""
    name = path.resolve().name
    return name if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", name) else digest_file(path)


def _has(package: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
