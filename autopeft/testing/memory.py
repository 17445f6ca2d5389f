"""What a step on a CPU really holds, to hold estimates to: counted by storage, and as the allocator tells it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.memory import Rehearsal, find_peak
from autopeft.backends.hf.steps import checkpoint_activations
from autopeft.records import Estimate, StepSettings, TrialSpec

SAME_BYTES = 0.01
"""Share of the counted bytes by which an estimate may differ."""


class Agreement(NamedTuple):
    """Peaks in bytes, estimated without weights and counted in real steps of the same configuration."""

    training_estimated: int
    training_counted: int
    scoring_estimated: int
    scoring_counted: int

    @property
    def training_error(self) -> float:
        return self.training_estimated / self.training_counted - 1

    @property
    def scoring_error(self) -> float:
        return self.scoring_estimated / self.scoring_counted - 1

    @property
    def worst(self) -> float:
        return max(abs(self.training_error), abs(self.scoring_error))


def compare_with_real_steps(
    estimate: Estimate, model: Any, spec: TrialSpec, settings: StepSettings, batch: Batch
) -> Agreement:
    """Takes a training step and a scoring pass on real CPU tensors; the weights stay as they are.

    `batch` has any number of rows; they are repeated for as many as each pass takes. One of them should be padded, as
    in nearly every real batch: without any padding transformers drops the mask.
    """
    if settings.checkpoint_activations:
        checkpoint_activations(model)
    rehearsal = Rehearsal(model, spec, on_gpu=False)
    # Two parts hold what any more of them do.
    parts = min(settings.micro_batches, 2)
    trained = rehearsal.train(repeat_rows(batch, spec.batch_size * parts), micro_batches=parts)
    scored = rehearsal.score(repeat_rows(batch, estimate.scoring_batch_size))
    return Agreement(estimate.peak_bytes, find_peak(trained).total, estimate.scoring_bytes, find_peak(scored).total)


def repeat_rows(batch: Batch, count: int) -> Batch:
    """As many rows, from the last one backwards: the tiny models' batches end with their padded row."""
    num_rows = len(batch["labels"])
    rows = torch.arange(-1, -count - 1, -1) % num_rows
    return {name: tensor[rows] for name, tensor in batch.items()}


def allocated_peak_bytes(model: Any, spec: TrialSpec, batch: Batch) -> int:
    """Highest sum of the CPU allocator's own events over a step, on top of what was there before.

    PyTorch's profiler tells of every allocation, those inside operators too, which no dispatch mode sees.
    """
    rehearsal = Rehearsal(model, spec, on_gpu=False)
    held = rehearsal.count_held(batch)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        rehearsal.step(batch)
    events: list[tuple[int, int]] = []
    profiler: Any = profile.profiler
    pending = list(profiler.kineto_results.experimental_event_tree())
    while pending:
        event = pending.pop()
        pending += event.children
        if event.tag.name == "Allocation":
            events.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, num_bytes in sorted(events):
        live += num_bytes
        peak = max(peak, live)
    return held + peak
