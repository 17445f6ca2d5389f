"""Checkpoints of a training: whole or absent, of one recipe, and small, because only what trains is in them.

    checkpoints/step-00000400/
        checkpoint.json        whose it is, how far, and what was best so far
        trained.pt             trainable parameters, optimizer, and what the method keeps beside them
        random-0.pt            the state of each process's random numbers
        trainer_state.json     what transformers' Trainer keeps of its own

A folder is written under another name and renamed when all of it is there, so that a process killed at any moment
leaves the one before. Two are kept: the newest, and the best on search-validation.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autopeft.backends.hf.saved import telling_the_disk
from autopeft.errors import RecordError
from autopeft.production.options import Options
from autopeft.records import from_record, to_record

CHECKPOINTS = "checkpoints"
_META = "checkpoint.json"
_TRAINED = "trained.pt"
_PREFIX = "step-"
_PART = ".part"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """One scoring of the search-validation split."""

    step: int
    quality: float
    loss: float

    def is_better_than(self, other: Evaluation | None) -> bool:
        """Higher quality; of equal ones the lower loss."""
        return other is None or (self.quality, -self.loss) > (other.quality, -other.loss)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointMeta:
    """What resuming must know before it loads anything."""

    key: str
    """Of the recipe, the data and what else decides the weights."""
    step: int
    processes: int
    seconds: float
    """Wall seconds of all sessions up to here."""
    evaluations: tuple[Evaluation, ...]
    options: Options | None = dataclasses.field(default=None, metadata={"leave_out_default": True})
    """What was asked for: a resumed training is asked for the same where nothing else is."""

    @property
    def best(self) -> Evaluation | None:
        return find_best(self.evaluations)


def find_best(evaluations: tuple[Evaluation, ...]) -> Evaluation | None:
    """The first of the best."""
    best: Evaluation | None = None
    for evaluation in evaluations:
        if evaluation.is_better_than(best):
            best = evaluation
    return best


def count_since_best(evaluations: tuple[Evaluation, ...]) -> int:
    """Evaluations after the best one."""
    best = find_best(evaluations)
    return 0 if best is None else len([e for e in evaluations if e.step > best.step])


def checkpoint_folder(folder: Path, step: int) -> Path:
    return folder / CHECKPOINTS / f"{_PREFIX}{step:08d}"


def begin_checkpoint(folder: Path, step: int) -> Path:
    """An empty folder to write into, by one process."""
    part = checkpoint_folder(folder, step).with_suffix(_PART)
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    return part


def finish_checkpoint(folder: Path, meta: CheckpointMeta, *, keep: tuple[int, ...]) -> None:
    """From now on the checkpoint counts; then all but those of the steps in `keep` and itself are deleted."""
    final = checkpoint_folder(folder, meta.step)
    part = final.with_suffix(_PART)
    (part / _META).write_text(json.dumps(to_record(meta), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(final, ignore_errors=True)
    part.rename(final)
    kept = {checkpoint_folder(folder, step) for step in (*keep, meta.step)}
    for path in (folder / CHECKPOINTS).iterdir():
        if path.name.startswith(_PREFIX) and path not in kept:
            shutil.rmtree(path, ignore_errors=True)


def find_newest(folder: Path) -> CheckpointMeta | None:
    """Of the whole checkpoints; None where there is none. Raises RecordError where one is broken."""
    names = (folder / CHECKPOINTS).glob(f"{_PREFIX}*/{_META}")
    paths = sorted(path for path in names if path.parent.suffix != _PART)
    if not paths:
        return None
    try:
        data = json.loads(paths[-1].read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RecordError(
            f"'{paths[-1]}' must be readable JSON, but is not: {exc}. Delete its folder to go on from the one before."
        ) from exc
    return from_record(CheckpointMeta, data, f"'{paths[-1]}'")


def write_trained(part: Path, state: dict[str, Any]) -> None:
    _save(state, part / _TRAINED)


def read_trained(folder: Path, step: int) -> dict[str, Any]:
    """On the CPU."""
    state: dict[str, Any] = torch.load(
        checkpoint_folder(folder, step) / _TRAINED, map_location="cpu", weights_only=True
    )
    return state


def write_random(part: Path, process: int) -> None:
    """Torch's generators alone: nothing else draws numbers in a step."""
    state = {"cpu": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None}
    _save(state, part / f"random-{process}.pt")


def _save(state: dict[str, Any], path: Path) -> None:
    """Raises OSError."""
    with telling_the_disk(), path.open("wb") as file:
        torch.save(state, file)


def restore_random(path: Path, process: int) -> bool:
    """Whether the checkpoint has this process's: it has not where there were fewer processes then."""
    file = path / f"random-{process}.pt"
    if not file.is_file():
        return False
    state = torch.load(file, map_location="cpu", weights_only=True)
    torch.set_rng_state(state["cpu"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    return True
