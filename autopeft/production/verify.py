"""Whether a finished folder is what it says: loaded by a fresh process, it must score as it is recorded to.

Digests of rows, base and trained weights are compared first, so that a difference has a name. Then plain peft or plain
transformers, without autopeft in the process, answers the whole test split again; only methods that peft lacks are
loaded by autopeft itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from autopeft.backends.hf.base_model import digest_file
from autopeft.backends.hf.language import match_answer
from autopeft.backends.hf.trial import digest_weights
from autopeft.errors import VerificationError
from autopeft.production.finished import Finished, ask_fresh_process, load_data, make_job
from autopeft.tasks.scorers import score_predictions

_MOST_ROWS = 32
"""At a time; fewer where training scored fewer, for which there was the memory."""


class Tolerance(NamedTuple):
    """How far a reproduced score may be from the recorded one."""

    quality: float
    loss: float
    """Nats, of the mean over examples."""
    why: str


class Verification(NamedTuple):
    recorded_quality: float
    quality: float
    recorded_loss: float
    loss: float
    num_examples: int
    num_changed: int | None
    """Examples whose answer is not the recorded one; None where the answers were not kept."""
    largest_loss_difference: float | None
    """Of one example, in nats; None where they were not kept."""
    tolerance: Tolerance
    loader: str
    """What loaded it: peft, transformers or autopeft."""
    device: str


def verify(finished: Finished, *, device: str | None = None) -> Verification:
    """Reproduces the recorded test score. Raises VerificationError where digests or scores differ, saying which.

    `device` is by default the kind that it was trained on, where there is one.
    """
    device = device or _choose_device(finished)
    data = load_data(finished)
    _check_digests(finished, data.splits.digest)
    test = data.test
    batch_size = min(_MOST_ROWS, finished.recipe.scoring_batch)
    job = make_job(finished, data, range(len(test.labels)), device=device, batch_size=batch_size)
    if finished.task.scorer == "exact_match":
        job |= {
            "prompts": [test.prompt_ids(i) for i in range(len(test.labels))],
            "max_new_tokens": finished.task.max_new_tokens,
            "eos_token_id": data.tokenizer.eos_token_id,
        }
    answers = ask_fresh_process("score", job)
    recorded = read_recorded(finished)
    predictions: npt.NDArray[Any] = answers["predictions"]
    if finished.num_labels is not None:
        predictions = predictions.astype(np.int64)
    elif "written" in answers:
        texts = data.tokenizer.batch_decode(answers["written"].astype(np.int64), skip_special_tokens=True)
        pairs = zip(texts, test.completions, strict=True)
        predictions = np.array([match_answer(finished.task, text, known) for text, known in pairs], dtype=np.float64)
    result = finished.result
    found = Verification(
        recorded_quality=result.test_quality,
        quality=score_predictions(result.scorer, test.labels, predictions),
        recorded_loss=result.test_loss,
        loss=float(answers["losses"].mean()),
        num_examples=len(test.labels),
        num_changed=_count_changed(recorded, predictions),
        largest_loss_difference=_largest_difference(recorded, answers["losses"]),
        tolerance=choose_tolerance(finished, device),
        loader=result.saved_as,
        device=device,
    )
    check_scores(finished, found)
    return found


def choose_tolerance(finished: Finished, device: str) -> Tolerance:
    """In float32 only the order of additions differs: an example or two on the edge may fall to the other side. With
    bfloat16 or rounded weights, or on another kind of device, arithmetic itself differs."""
    least = 2 / max(finished.result.num_test, 1)
    trained_on = finished.recipe.trains_on
    if trained_on == "cpu" and device == "cpu" and finished.recipe.bits == 32:
        return Tolerance(max(least, 0.001), 0.001, "float32 on the same kind of device")
    if (device == "cpu") == (trained_on == "cpu"):
        return Tolerance(max(least, 0.005), 0.01, "rounded weights or bfloat16")
    return Tolerance(max(least, 0.01), 0.03, f"it was trained on {'a GPU' if trained_on == 'cuda' else 'a CPU'}")


def check_scores(finished: Finished, found: Verification) -> None:
    """Raises VerificationError where they differ beyond the tolerance."""
    off_quality = abs(found.quality - found.recorded_quality)
    off_loss = abs(found.loss - found.recorded_loss)
    # A share of examples is no number with an exact difference.
    if off_quality <= found.tolerance.quality + 1e-9 and off_loss <= found.tolerance.loss:
        return
    raise VerificationError(
        f"'{finished.folder}' must reproduce its test score within {found.tolerance.quality:.4f} and its mean loss "
        f"within {found.tolerance.loss:.4f} ({found.tolerance.why}), but loaded by a fresh process with {found.loader} "
        f"it scores {found.quality:.4f} where {found.recorded_quality:.4f} is recorded, with a loss of "
        f"{found.loss:.4f} where {found.recorded_loss:.4f} is. Rows, base and trained weights are the recorded ones, "
        "so libraries differ: compare with the versions in result.json."
    )


def _choose_device(finished: Finished) -> str:
    return "cuda:0" if finished.recipe.trains_on == "cuda" and torch.cuda.is_available() else "cpu"


def _check_digests(finished: Finished, data_digest: str) -> None:
    """Of the trained weights, the rows and the base, in this order."""
    result = finished.result
    for name, digest in result.weights_digests.items():
        path = finished.adapter / name
        found = digest_file(path) if path.is_file() else "nothing"
        if found != digest:
            raise VerificationError(
                f"The trained weights '{path}' must have the SHA-256 {digest} that the training wrote down, but have "
                f"{found}: they were changed or replaced since. Train again, or take the folder from where it was made."
            )
    if data_digest != result.data_digest:
        raise VerificationError(
            f"The rows of task '{result.task_name}' must have the digest {result.data_digest}, with which "
            f"'{finished.folder}' was trained and scored, but have {data_digest} here: rows, their order or their "
            "split differ, and so would the score. Give the rows it was trained on: --data-dir DIR."
        )
    model_digest = digest_weights(finished.model)
    if result.model_digest and model_digest != result.model_digest:
        raise VerificationError(
            f"The base model '{result.model}' must have the digest {result.model_digest}, with which "
            f"'{finished.folder}' was trained, but has {model_digest} here: an adapter is right on its own base only. "
            "Name the base it was trained on: --model FOLDER."
        )


def read_recorded(finished: Finished) -> dict[str, npt.NDArray[Any]]:
    """Losses and answers that the training wrote down, by split; empty where they were not kept."""
    path = finished.folder / finished.result.scores_file
    if not Path(path).is_file():
        return {}
    with np.load(path) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _count_changed(recorded: dict[str, npt.NDArray[Any]], predictions: npt.NDArray[Any]) -> int | None:
    kept = recorded.get("test_predictions")
    if kept is None or kept.shape != predictions.shape:
        return None
    # Shares of tokens are kept in three digits.
    return int(np.sum(np.abs(kept.astype(np.float64) - predictions) > 1e-3))


def _largest_difference(recorded: dict[str, npt.NDArray[Any]], losses: npt.NDArray[np.float64]) -> float | None:
    kept = recorded.get("test_losses")
    if kept is None or kept.shape != losses.shape:
        return None
    return float(np.abs(kept.astype(np.float64) - losses).max())
