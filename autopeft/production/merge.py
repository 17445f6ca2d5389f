"""A finished training folded into one plain model, checked against the model that it came from.

What is written is what `save_pretrained` of plain transformers writes, and what older readers want beside it: config,
safetensors under the names that the base's own checkpoint has, generation settings, tokenizer; nothing of peft. A base
of 4 or 8 bits is dequantized first: the adapter was trained on rounded weights, so it is those, not the original ones,
that it is merged into. Rounding the sum again would change small weights by more than was learned, so that is not
offered.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import torch
import transformers

from autopeft.backends.hf.base_model import QuietLoading, load_tokenizer, resolve_model
from autopeft.backends.hf.saved import merge_adapter
from autopeft.errors import ExportError, SpecError, suggest_nearest
from autopeft.methods import find_method
from autopeft.production import plain
from autopeft.production.finished import Finished, ask_fresh_process, load_data, make_job
from autopeft.production.layout import complete_folder
from autopeft.production.verify import choose_tolerance, read_recorded
from autopeft.report.files import check_new_folder, new_folder
from autopeft.wording import say_count

Dtype = Literal["float32", "bfloat16", "float16"]

MOST_DIFFERENCE = 1e-4
"""Between merged and unmerged logits in float32, for logits of about one; larger ones may differ in proportion."""
NUM_ROWS = 32
_BATCH_SIZE = 8
_DEQUANTIZING = logging.getLogger("transformers.integrations.bitsandbytes")


class Merged(NamedTuple):
    """What was written, and how far its answers are from the unmerged model's."""

    folder: Path
    num_rows: int
    """Of the test split that both answered; differences below are the largest over them and all logits."""
    largest_logit: float
    difference: float
    """In float32, merged against unmerged on the same base (dequantized, where it was quantized)."""
    quantization_difference: float | None
    """In float32, merged into the dequantized base against unmerged on the quantized one; None where it was none."""
    dtype: Dtype
    written_difference: float
    """As written and loaded by a fresh process, in `dtype`, against the unmerged model as it was trained."""
    same_answers: float
    """Share of the rows whose likeliest class or next token is the same, as written."""
    loss: float
    """Mean cross-entropy of the rows in nats, of the model as it was trained."""
    written_loss: float
    """The same of the model as written: what merging, dequantizing and `dtype` cost together."""


def merge(finished: Finished, out: Path, *, dtype: Dtype | None = None) -> Merged:
    """Writes the merged model to the new folder `out`. `dtype` is by default that of the base's own checkpoint.

    Nothing is written where a check fails. Raises SpecError for a method that does not merge, ExportError for a folder
    that cannot be written to or a model that answers otherwise once it is merged.
    """
    check_merges(finished)
    check_new_folder(out)
    dtype = dtype or find_dtype(finished)
    data = load_data(finished)
    rows = np.linspace(0, len(data.test.labels) - 1, min(NUM_ROWS, len(data.test.labels))).astype(int).tolist()
    job = make_job(finished, data, rows, device="cpu", batch_size=_BATCH_SIZE)
    with QuietLoading(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, before, plain_before = _load_unmerged(finished, job)
        if data.splits.digest == finished.result.data_digest:
            _check_recorded(finished, rows, before)
        merged = merge_adapter(model)
        after = _ask(merged, job)
    scale = max(1.0, before.largest)
    difference = _largest(after, plain_before)
    if not difference <= MOST_DIFFERENCE * scale:
        raise ExportError(
            f"A merged model must answer as it did unmerged, within {MOST_DIFFERENCE * scale:.1g} in float32, but on "
            f"{say_count(len(rows), 'row')} of the test split the logits of '{finished.folder}' differ by "
            f"{difference:.1g}. Nothing was written. {advise_unmerged(finished)}"
        )
    _name_labels(merged, finished)
    with new_folder(out) as part:
        _write(merged, finished, part, dtype)
        written_job = {**job, "saved_as": "transformers", "saved": str(part.resolve()), "bits": 32}
        written_job |= {"dtype": dtype, "as_written": True}
        written = _Answers(**ask_fresh_process("logits", written_job))
        if dtype == "float32" and not _largest(written, after) <= MOST_DIFFERENCE * scale:
            raise ExportError(
                f"What is written must answer as what was merged, but loaded from disk its logits differ by "
                f"{_largest(written, after):.1g}. Nothing was kept. Report this, with the base model's name."
            )
    return Merged(
        folder=out,
        num_rows=len(rows),
        largest_logit=before.largest,
        difference=difference,
        quantization_difference=None if job["bits"] >= 16 else _largest(after, before),
        dtype=dtype,
        written_difference=_largest(written, before),
        same_answers=float(np.mean(written.logits.argmax(-1) == before.logits.argmax(-1))),
        loss=float(before.losses.mean()),
        written_loss=float(written.losses.mean()),
    )


# --- before


def check_merges(finished: Finished) -> None:
    """Raises SpecError for a method that cannot be folded into the base, with what to do instead."""
    method = find_method(finished.recipe.spec.method)
    if not method.merges:
        raise SpecError(
            f"'{finished.folder}' was trained with {method.title}, which cannot be folded into the base's weights: "
            f"what it adds is no change of a weight that merging could make. {advise_unmerged(finished)}"
        )


def advise_unmerged(finished: Finished) -> str:
    """How to serve it as it is."""
    if finished.result.saved_as == "autopeft":
        return (
            f"Serve it unmerged: autopeft.backends.hf.saved.load_trained loads '{finished.adapter}' onto the base, as "
            "README.md in the folder shows. Or choose a method that merges: autopeft methods lists them."
        )
    return (
        f"Serve it unmerged: peft's PeftModel.from_pretrained(base, '{finished.adapter}') loads it, as README.md in "
        "the folder shows, and autopeft push publishes it as an adapter. Or choose a method that merges: autopeft "
        "methods lists them."
    )


def find_dtype(finished: Finished) -> Dtype:
    """That of the base's own checkpoint; float32 where it does not say."""
    config = transformers.AutoConfig.from_pretrained(resolve_model(finished.model))
    name = str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")
    return name if name in get_args(Dtype) else "float32"  # type: ignore[return-value]


def parse_dtype(text: str) -> Dtype:
    if text not in get_args(Dtype):
        raise SpecError(f"--dtype must be a width that models are written in. {suggest_nearest(text, get_args(Dtype))}")
    return text  # type: ignore[return-value]


# --- merge


def _load_unmerged(finished: Finished, job: dict[str, Any]) -> tuple[Any, _Answers, _Answers]:
    """The model to merge, on an unquantized base in float32; what the model as it was trained answers; and what the
    model to merge does, which is the same unless the base was quantized."""
    model = plain.load_trained(job)
    before = _ask(model, job)
    if job["bits"] >= 16:
        return model, before, before
    if job["saved_as"] == "peft":
        import peft

        del model
        base = _dequantize(plain.load_base(job, job["base"]))
        model = peft.PeftModel.from_pretrained(base, job["saved"]).eval()
    else:
        model = _dequantize(model)
    return model, before, _ask(model, job)


def _check_recorded(finished: Finished, rows: Sequence[int], found: _Answers) -> None:
    """Raises ExportError where what was loaded is not what was trained: peft computes some methods' frozen parts anew
    at every load (AdaMSS, PSOFT), on a CPU with other numbers than on a GPU."""
    recorded = read_recorded(finished).get("test_losses")
    if recorded is None:
        return
    known, loss = float(recorded[list(rows)].astype(np.float64).mean()), float(found.losses.mean())
    # That of a mean over the whole split; over a part of it, rounding evens out less.
    most = 2 * choose_tolerance(finished, "cpu").loss
    if not abs(loss - known) <= most:
        raise ExportError(
            f"What is merged must answer as it did when it was trained, within {most:g} nats in the mean, but on "
            f"{say_count(len(rows), 'row')} of the test split '{finished.folder}' loaded on the CPU has a loss of "
            f"{loss:.4f} where {known:.4f} is recorded. Nothing was written. Base or libraries differ, or "
            f"{find_method(finished.recipe.spec.method).title} computes a part of itself anew wherever it is loaded: "
            "autopeft verify tells them apart, on the kind of device that it was trained on."
        )


def _dequantize(model: Any) -> Any:
    """The model with plain linear layers that hold the rounded weights, in float32."""
    # That it dequantizes is what it was asked for, and no news.
    level = _DEQUANTIZING.level
    _DEQUANTIZING.setLevel(logging.ERROR)
    try:
        model = model.dequantize()
    finally:
        _DEQUANTIZING.setLevel(level)
    for parameter in model.parameters():
        parameter.data = parameter.data.float()
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        # transformers leaves them as they were, and peft's IA3 refuses to merge by them.
        if getattr(model, flag, False):
            setattr(model, flag, False)
    return model.eval()


class _Answers(NamedTuple):
    """As `plain.read_logits` gives them."""

    logits: npt.NDArray[Any]
    losses: npt.NDArray[np.float64]

    @property
    def largest(self) -> float:
        return float(np.abs(self.logits).max())


def _ask(model: Any, job: dict[str, Any]) -> _Answers:
    return _Answers(**plain.read_logits(model, job))


def _largest(one: _Answers, other: _Answers) -> float:
    """Of all differences between logits."""
    return float(np.abs(one.logits.astype(np.float64) - other.logits).max())


# --- write


def _name_labels(model: Any, finished: Finished) -> None:
    """What pipelines print: the task's labels in place of LABEL_0."""
    if finished.task.labels:
        model.config.id2label = dict(enumerate(finished.task.labels))
        model.config.label2id = {label: index for index, label in enumerate(finished.task.labels)}


def _write(model: Any, finished: Finished, folder: Path, dtype: Dtype) -> None:
    model = model.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if finished.num_labels is None:
        # Training keeps no keys and values; whoever writes text does.
        model.config.get_text_config().use_cache = True
    with QuietLoading():
        model.save_pretrained(folder)
    complete_folder(folder, load_tokenizer(str(finished.adapter)), finished.model)
