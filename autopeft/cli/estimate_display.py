"""How `autopeft estimate` tells what it found: one configuration part by part, several line by line, or JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.backends.hf.cost import HfCostModel
    from autopeft.records import Estimate, StepSettings, TrialSpec


class EstimateRow(NamedTuple):
    """What was asked for, and what came of it: an estimate, or the reason why there is none."""

    method: str
    bits: int
    spec: TrialSpec | None
    """None where the settings are refused already."""
    estimate: Estimate | None = None
    refused: str | None = None
    measured_bytes: int | None = None
    """Of a study's trial, on its GPU."""


def to_json(row: EstimateRow, settings: StepSettings, most: int | None) -> dict[str, Any]:
    from autopeft.records import to_record

    if row.estimate is None or row.spec is None:
        spec = None if row.spec is None else to_record(row.spec)
        return {"method": row.method, "bits": row.bits, "spec": spec, "refused": row.refused}
    return {
        "spec": to_record(row.spec),
        "settings": to_record(settings),
        "estimate": to_record(row.estimate),
        "peak_bytes": row.estimate.peak_bytes,
        "device_bytes": row.estimate.device_bytes,
        "measured_bytes": row.measured_bytes,
        "fits": None if most is None else _need(row.estimate) <= most,
    }


def print_one(row: EstimateRow, settings: StepSettings, costs: HfCostModel, most: int | None) -> None:
    from autopeft.report.words import describe_settings, format_bytes, format_count, title_method

    spec, estimate = row.spec, row.estimate
    assert spec is not None
    assert estimate is not None
    size = f"{spec.batch_size} x {costs.longest_tokens} tokens"
    if settings.micro_batches > 1:
        size += f", gradients of {settings.micro_batches} batches summed"
    if settings.checkpoint_activations:
        size += ", activations checkpointed"
    own = describe_settings(spec)
    print(f"{title_method(spec.method)}{', ' + own if own else ''}, {spec.bits} bits, {spec.optimizer}")
    print(f"{size}; modelled for {estimate.device}\n")
    print(f"{'base parameters':<32}{format_count(estimate.base_parameters):>10}")
    is_classifier = costs.num_labels is not None
    head = f"  and {format_count(estimate.head_parameters)} in the head" if is_classifier else ""
    print(f"{'trainable parameters':<32}{estimate.trainable_parameters:>10,}{head}\n")
    parts = {
        "base weights": estimate.base_bytes,
        "adapter and head" if is_classifier else "adapter": estimate.adapter_bytes,
        "gradients": estimate.gradient_bytes,
        "optimizer": estimate.optimizer_bytes,
        "activations at the peak": estimate.activation_bytes,
        "cuBLAS workspaces": estimate.library_bytes,
    }
    for name, num_bytes in parts.items():
        print(f"{name:<32}{format_bytes(num_bytes):>10}")
    print(f"{'peak while training':<32}{format_bytes(estimate.peak_bytes):>10}")
    if row.measured_bytes is not None:
        print(f"{'measured by the study':<32}{format_bytes(row.measured_bytes):>10}")
    print(
        f"{'peak of the evaluation pass':<32}{format_bytes(estimate.scoring_bytes):>10}"
        f"  {say_count(estimate.scoring_batch_size, 'example')} at a time"
    )
    if most is not None:
        print(f"{_fit(estimate, most) + ' --max-vram':<32}{format_bytes(most):>10}")
    if estimate.context_bytes:
        print(f"\n{'allocator, on top':<32}{format_bytes(estimate.allocator_bytes):>10}  simulated: reserved, not used")
        print(f"{'CUDA context, on top':<32}{format_bytes(estimate.context_bytes):>10}  assumed, depends on the driver")
        print(f"{'what a GPU must have free':<32}{format_bytes(estimate.device_bytes):>10}")
    if estimate.paged_bytes:
        print(f"{'paged optimizer states':<32}{format_bytes(estimate.paged_bytes):>10}  on the GPU where there is room")
    print(f"\n{'checkpoint to resume from':<32}{format_bytes(estimate.checkpoint_bytes):>10}")
    print(f"{'exported adapter':<32}{format_bytes(estimate.exported_bytes):>10}")
    if estimate.layers_measured:
        shallow, deeper = estimate.layers_measured
        print(f"\nExtrapolated from models of {shallow} and {deeper} of its layers, which repeat.")
    if not is_classifier:
        print(_tell_writing(costs))


def _tell_writing(costs: HfCostModel) -> str:
    """Whether the evaluation counted is one in which a language model writes."""
    if costs.writing is None:
        return "The evaluation is by loss. A task scored by exact_match has texts written too: --study counts that."
    new, prompt = costs.writing.new_tokens, costs.writing.prompt_tokens
    return f"In the evaluation up to {new} tokens are written after up to {prompt}."


def print_table(rows: Sequence[EstimateRow], most: int | None) -> None:
    from autopeft.report.words import format_bytes, format_count

    columns = {"trainable": 10, "training": 10, "measured": 10, "evaluation": 11, "GPU, free": 10, "checkpoint": 11}
    if all(row.measured_bytes is None for row in rows):
        del columns["measured"]
    print(" ".join(f"{name:>{width}}" for name, width in columns.items()) + "  configuration")
    for row in rows:
        words, estimate = describe_row(row, rows), row.estimate
        if estimate is None:
            print(" ".join(f"{'-':>{width}}" for width in columns.values()) + f"  {words}: {row.refused}")
            continue
        figures = {
            "training": estimate.peak_bytes,
            "measured": row.measured_bytes,
            "evaluation": estimate.scoring_bytes,
            "GPU, free": estimate.device_bytes if estimate.context_bytes else None,
            "checkpoint": estimate.checkpoint_bytes,
        }
        texts = {name: "-" if number is None else format_bytes(number) for name, number in figures.items()}
        texts["trainable"] = format_count(estimate.trainable_parameters)
        fits = "" if most is None else f" ({_fit(estimate, most)} {format_bytes(most)})"
        print(" ".join(f"{texts[name]:>{width}}" for name, width in columns.items()) + f"  {words}{fits}")
    estimates = [row.estimate for row in rows if row.estimate is not None]
    if estimates:
        print(f"\nModelled for {estimates[0].device}.")


def describe_row(row: EstimateRow, rows: Sequence[EstimateRow]) -> str:
    """By what tells it from the others."""
    from autopeft.report.words import describe_settings, title_method

    words = title_method(row.method)
    if row.spec is None:
        return f"{words}, {row.bits} bits"
    own = describe_settings(row.spec)
    words += f"{', ' + own if own else ''}, {row.bits} bits"
    if row.spec.optimizer != "adamw":
        words += f", {row.spec.optimizer}"
    if len({other.spec.batch_size for other in rows if other.spec is not None}) > 1:
        words += f", batch {row.spec.batch_size}"
    return words


def _fit(estimate: Estimate, most: int) -> str:
    return "within" if _need(estimate) <= most else "over"


def _need(estimate: Estimate) -> int:
    """As a search judges by --max-vram: what the driver and the allocator add is not in it."""
    return max(estimate.peak_bytes, estimate.scoring_bytes)
