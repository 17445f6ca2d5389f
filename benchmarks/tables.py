"""Tables of recorded configurations, as searchers meet them: what each scores at every rung, what that takes, and what
it is worth in the end."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from autopeft.backends.replay import Curve, Curves, Recording, even_pace, read_recording
from autopeft.records import Cost, Provenance, RungScore, StudyConfig, TrialSpec
from autopeft.search.front import cost_vector, find_nondominated, hypervolume, scale_point
from autopeft.search.plan import restore_space

Floats = npt.NDArray[np.float64]

METAMATHQA = "peft_metamathqa"
"""Folder below the data directory: the 63 runs of peft's method_comparison, MetaMathQA to GSM8K on Llama-3.2-3B."""
PART = 0.75
"""Of a recording's configurations that a seed plays."""
LISTED = "listed"
"""The space's name where there is none."""
_STEPS_APART = 250
_NUM_VALIDATION = 50
_PLAIN_PYTHON = "3"


@dataclass(frozen=True)
class Table:
    """Configurations that were all trained to their end."""

    name: str
    recording: Recording

    @cached_property
    def curves(self) -> tuple[Curve, ...]:
        return self.recording.curves.curves

    @property
    def rungs(self) -> tuple[int, ...]:
        return self.recording.curves.config.rungs

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.recording.curves.config.objectives

    @property
    def is_listed(self) -> bool:
        """Whether its configurations were set by hand, and not drawn from a space of ours."""
        return self.recording.curves.config.space_name == LISTED

    @cached_property
    def index_of(self) -> dict[str, int]:
        return {curve.spec.key(): index for index, curve in enumerate(self.curves)}

    def score(self, index: int, rung: int) -> RungScore | None:
        """None where the configuration failed before."""
        rungs = self.curves[index].rungs
        return rungs[rung] if rung < len(rungs) else None

    def count_seconds(self, index: int, first: int, last: int) -> float:
        """Device-seconds of one stretch over the rungs from `first` to `last`, scored at its end alone."""
        curve = self.curves[index]
        passed = curve.rungs[first : last + 1]
        if len(passed) < last + 1 - first:
            return sum(score.device_seconds for score in passed) + curve.lost_seconds
        rate = self.recording.curves.device_rate
        overhead = max(0.0, passed[-1].device_seconds - passed[-1].train_seconds * rate)
        return sum(score.train_seconds for score in passed) * rate + overhead

    @cached_property
    def costs(self) -> Floats:
        """(N, cost objectives), exact and known before training."""
        rows = [cost_vector(curve.cost, self.objectives) for curve in self.curves]
        return np.array(rows, dtype=float).reshape(len(rows), len(self.objectives) - 1)

    @cached_property
    def points(self) -> Floats:
        """(N, objectives) scaled as in a study's hypervolume, by final quality; at the reference where it failed."""
        return np.array(
            [
                [1.0] * len(self.objectives)
                if (quality := curve.final_quality) is None
                else scale_point(quality, curve.cost, self.recording.curves.reference)
                for curve in self.curves
            ]
        )

    @cached_property
    def total_seconds(self) -> float:
        """Of training everything to its end, without a stop."""
        return sum(self.count_seconds(index, 0, len(self.rungs) - 1) for index in range(len(self.curves)))

    @cached_property
    def total_volume(self) -> float:
        return self.volume(range(len(self.curves)))

    @cached_property
    def front(self) -> frozenset[int]:
        """Configurations that no other dominates, by final quality; those that failed or only reach the reference are
        on no front."""
        worthwhile = (self.points < 1).all(axis=1) | (self.points[:, 0] < 1)
        return frozenset(int(i) for i in np.flatnonzero(find_nondominated(self.points) & worthwhile))

    def volume(self, indices: Sequence[int]) -> float:
        return self._measure(self.points[sorted(indices)]) if indices else 0.0

    def share(self, points: Floats) -> float:
        """Of the whole table's hypervolume: what (N, objectives) points have that need not be of its configurations,
        scaled by its reference."""
        return self._measure(points) / self.total_volume

    def _measure(self, points: Floats) -> float:
        return hypervolume(points[find_nondominated(points)], [1.0] * len(self.objectives))

    def choose(self, indices: Sequence[int], name: str) -> Table:
        """The same with some of the configurations alone."""
        rows = [index * len(self.rungs) + rung for index in indices for rung in range(len(self.rungs))]
        old = self.recording
        curves = replace(old.curves, curves=tuple(self.curves[index] for index in indices))
        recording = Recording(
            curves=curves,
            losses=None if old.losses is None else old.losses[rows],
            predictions=None if old.predictions is None else old.predictions[rows],
            labels=old.labels,
        )
        return Table(name, recording)


def draw_part(table: Table, seed: int) -> Table:
    """A random part of a recording, another for every seed: a search that chooses by what it expects hardly depends on
    a seed, and on one table it would be measured once. Where configurations were set by hand, all of them."""
    if table.is_listed:
        return table
    count = len(table.curves)
    return table.choose(sorted(random.Random(seed).sample(range(count), round(PART * count))), table.name)


def choose_since(table: Table, count: int) -> Table:
    """The recipes, and what was recorded after the first `count`: but for the recipes, new to whatever was chosen with
    those in view."""
    recipes = {spec.key() for spec in restore_space(table.recording.curves.config).recipes}
    places = [place for place, curve in enumerate(table.curves) if place >= count or curve.spec.key() in recipes]
    return table.choose(places, f"{table.name}, since {count}")


def read_table(path: Path, name: str, *, objectives: Sequence[str] | None = None) -> Table:
    """A recording made by `racing.py record`, at each configuration's own best pace."""
    recording = even_pace(read_recording(path))
    curves = recording.curves
    if objectives is not None:
        reference = {key: curves.reference[key] for key in objectives}
        config = replace(curves.config, objectives=tuple(objectives))
        recording = replace(recording, curves=replace(curves, config=config, reference=reference))
    return Table(name, recording)


def read_metamathqa(data_dir: Path, *, objectives: Sequence[str], rungs: Sequence[int]) -> Table:
    """The 63 real runs. Searchers see training loss and accuracy on 50 validation examples; worth is test accuracy.

    Times are those of training and of the validations in between. Loading the base is left out: a worker does it once.
    """
    folder = data_dir / METAMATHQA
    with (folder / "runs.csv").open(encoding="utf-8") as file:
        runs = list(csv.DictReader(file))
    with (folder / "curves.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "valid"]
    by_run: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_run.setdefault(row["experiment_name"], []).append(row)
    curves = [_make_curve(run, by_run[run["experiment_name"]], rungs) for run in runs]
    full = next(curve.cost for curve in curves if curve.spec.method == "full-finetuning")
    worst = {"quality": 0.0, "vram": float(full.peak_vram_bytes), "params": float(full.trainable_parameters)}
    config = StudyConfig(
        name="replay", task="name: metamathqa", task_name="metamathqa", model="meta-llama/Llama-3.2-3B",
        budget=f"{len(curves)}trials", objectives=tuple(objectives), rungs=tuple(rungs), seed=0, workers=1,
        device_kind="cuda", space="methods: {lora: {}}", space_name=LISTED, methods=None, fixed={}, included=(),
        max_vram_bytes=None, confirm_share=0.0, confirm_seeds=0, until=None, price_per_device_hour=None,
        # An answer is a number, so no constant answer is ever right.
        majority_quality=0.0, majority_test_quality=0.0, scorer="accuracy", backend="replay",
    )  # fmt: skip
    provenance = Provenance(
        autopeft="", python=_PLAIN_PYTHON, packages={}, platform="", device=runs[0]["accelerator"], device_count=1,
        threads=1, model_digest="", task_digest="", num_train=0, num_validation=_NUM_VALIDATION, num_test=0,
        created_at=max(run["created_at"] for run in runs),
    )  # fmt: skip
    return Table(
        "63 real runs",
        Recording(
            curves=Curves(
                config=config, provenance=provenance, reference={name: worst[name] for name in objectives},
                device_rate=1.0, wall_seconds=(), machine={"accelerator": runs[0]["accelerator"]}, curves=tuple(curves),
            ),
            losses=None,
            predictions=None,
            labels=np.zeros(_NUM_VALIDATION, dtype=np.int64),
        ),
    )  # fmt: skip


def _make_curve(run: dict[str, str], rows: Sequence[dict[str, str]], rungs: Sequence[int]) -> Curve:
    scores = []
    before = 0
    for number, step in enumerate(rungs):
        passed = [row for row in rows if before < int(row["step"]) <= step]
        assert passed[-1]["step"] == str(step), f"the runs were scored every {_STEPS_APART} steps"
        # They validated every 250 steps, whatever the rungs: that is part of what their training took.
        seconds = sum(float(row["train_time_interval_s"]) + float(row["eval_time_s"]) for row in passed)
        scores.append(
            RungScore(
                rung=number, step=step, quality=float(passed[-1]["valid_accuracy"]),
                loss=float(passed[-1]["train_loss"]), num_examples=_NUM_VALIDATION,
                device_seconds=seconds, train_seconds=seconds, scores_file="", scores_digest="",
            )
        )  # fmt: skip
        before = step
    spec = TrialSpec(
        method=run["peft_type"], settings={"name": run["experiment_name"]}, target_modules=None, bits=16,
        learning_rate=float(run["lr"]), batch_size=int(run["batch_size"]), max_steps=int(run["max_steps"]),
        warmup_ratio=0.0, schedule="cosine", weight_decay=float(run["weight_decay"] or 0.0), seed=0,
    )  # fmt: skip
    cost = Cost(
        trainable_parameters=int(run["num_trainable_params"]), head_parameters=0,
        peak_vram_bytes=int(run["accelerator_memory_max"]), vram_source="measured",
    )  # fmt: skip
    return Curve(spec=spec, cost=cost, rungs=tuple(scores), failed=None, lost_seconds=0.0,
                 test_quality=float(run["test_accuracy"]))  # fmt: skip
