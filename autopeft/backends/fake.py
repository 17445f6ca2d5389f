"""Synthetic learning curves on a simulated clock: whole studies in seconds, for tests of everything but training.

Quality rises with log(parameters) and falls with the distance from the method's best learning rate; per-example losses
carry noise that is shared by all trials, as real examples' difficulty is, so paired comparisons work as on real data.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.backends.base import Ended, Event, Finished, Ready, Score, Stretch, WorkerSetup
from autopeft.methods import METHODS, check_spec
from autopeft.records import Cost, Inference, Latency, TrialSpec
from autopeft.tasks.spec import parse_task

_NUM_EXAMPLES = 300
_HIDDEN = 64
_LAYERS = 4
_HEAD = 130


class FakeBackend:
    """Answers stretches without training. Files are written as the real backend writes them."""

    def __init__(self, setup: WorkerSetup) -> None:
        self.setup = setup
        # Of a generation task predictions are the examples' scores, so that the right one is always 1.
        is_generation = bool(setup.task) and parse_task(setup.task, "task").kind == "generation"
        self.labels = np.array([1 if is_generation else i % 2 for i in range(_NUM_EXAMPLES)])

    def ready(self) -> Ready:
        return Ready(
            device_name="simulated",
            packages={},
            model_digest="fake",
            num_parameters=1_000_000,
            latency=fake_latency(1.0) if self.setup.latency else None,
        )

    def run(self, stretch: Stretch, emit: Callable[[Event], None]) -> Finished | Ended:
        spec = stretch.spec
        if spec.learning_rate > 0.25:
            return Ended(job=stretch.job, reason="diverged", detail="the training loss is nan")
        losses, predictions = self._scores(spec, stretch.to_step)
        arrays: dict[str, Any] = {
            "validation_losses": losses.astype(np.float16),
            "validation_predictions": predictions.astype(np.int16),
        }
        test = None
        if stretch.score_test:
            arrays |= {"test_losses": arrays["validation_losses"], "test_predictions": arrays["validation_predictions"]}
            test = self._score(losses, predictions)
        name = f"scores/trial-{stretch.trial:05d}-{stretch.purpose}-seed{spec.seed}-step{stretch.to_step}.npz"
        path = Path(self.setup.study_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, **arrays)
        checkpoint = None
        if stretch.save:
            checkpoint = f"checkpoints/trial-{stretch.trial:05d}-step{stretch.to_step}.pt"
            (path.parent.parent / checkpoint).parent.mkdir(parents=True, exist_ok=True)
            (path.parent.parent / checkpoint).write_text(str(stretch.to_step))
        seconds = (stretch.to_step - stretch.from_step) * 0.1 + 1.0
        return Finished(
            job=stretch.job,
            validation=self._score(losses, predictions),
            test=test,
            scores_file=name,
            scores_digest="fake",
            train_seconds=seconds,
            checkpoint=checkpoint,
            checkpoint_digest=None,
            simulated_seconds=seconds,
            inference=fake_inference(spec) if stretch.measure_inference else None,
        )

    def _scores(self, spec: TrialSpec, step: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
        strength = fake_strength(spec)
        learned = 1 - math.exp(-3.0 * step / spec.max_steps)
        # The examples' difficulty is the same for all trials; a trial's own noise is small beside it.
        difficulty = np.random.default_rng(7).normal(0.0, 1.0, _NUM_EXAMPLES)
        own = np.random.default_rng(random.Random(f"{spec.key()}{spec.seed}{step}").randrange(2**32))
        margin = 3.0 * strength * learned - 1.0 * difficulty + own.normal(0.0, 0.3, _NUM_EXAMPLES)
        losses = np.logaddexp(0.0, -margin)
        return losses, np.where(margin > 0, self.labels, 1 - self.labels)

    def _score(self, losses: npt.NDArray[np.float64], predictions: npt.NDArray[np.int64]) -> Score:
        quality = float(np.mean(predictions == self.labels))
        return Score(quality=quality, loss=float(losses.mean()), num_examples=_NUM_EXAMPLES)


def fake_strength(spec: TrialSpec) -> float:
    """How good a configuration truly is, in (0, 1)."""
    low, high = METHODS[spec.method].learning_rate
    best = math.sqrt(low * high)
    off = math.log10(spec.learning_rate / best)
    size = math.log10(1 + fake_parameters(spec)) / 6
    return max(0.02, min(1.0, size)) * math.exp(-(off**2)) * (0.97 if spec.bits == 4 else 1.0)


def fake_inference(spec: TrialSpec) -> Inference:
    """What does not merge answers more slowly, the more so the more it adds."""
    merges = METHODS[spec.method].merges
    return Inference(
        unmerged=fake_latency(1.1 + fake_parameters(spec) / 1e6),
        merged=fake_latency(1.0) if merges else None,
        base=fake_latency(1.0),
        adapter_bytes=4 * (fake_parameters(spec) + _HEAD),
        device="simulated",
    )


def fake_latency(times: float) -> Latency:
    return Latency(single_seconds=0.01 * times, batch_seconds=0.002 * times, batch_size=32, num_batches=31)


def fake_parameters(spec: TrialSpec) -> int:
    sizes = {"lora": "rank", "bottleneck": "bottleneck_size"}
    if spec.method == "full":
        return 1_000_000
    if spec.method in sizes:
        modules = {"attention-qv": 2, "attention": 4, "mlp": 2}.get(spec.target_modules or "", 6)
        return int(spec.settings[sizes[spec.method]]) * 2 * _HIDDEN * _LAYERS * modules
    if "num_virtual_tokens" in spec.settings:
        per_token = _HIDDEN * (2 * _LAYERS if spec.method == "prefix_tuning" else 1)
        return int(spec.settings["num_virtual_tokens"]) * per_token
    return 0 if spec.method == "head" else _HIDDEN * _LAYERS * (3 if spec.settings.get("feedforward", True) else 2)


class FakeCostModel:
    """Costs by a formula: weights by bits, gradients and optimizer by parameters, activations by batch."""

    def cost(self, spec: TrialSpec) -> Cost:
        check_spec(spec)
        parameters = fake_parameters(spec)
        weights = 1_000_000 * spec.bits // 8
        activations = spec.batch_size * 10_000
        return Cost(
            trainable_parameters=parameters,
            head_parameters=_HEAD,
            peak_vram_bytes=weights + 12 * parameters + activations,
            vram_source="estimated",
            adapter_bytes=4 * (parameters + _HEAD),
        )
