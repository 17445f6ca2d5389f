"""Every method with its recipe, once: what works out of the box, what it costs, and which recipes learn nothing.

    python benchmarks/breadth.py                          # 60 steps; those that learned nothing again with 200
    python benchmarks/breadth.py --methods vera hra --rates 3 10 --steps 200    # other learning rates, nothing written

The studies are the real thing (workers, cost process, store), without racing, baseline or confirmation.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from listed_search import Asked, NeverStop, plan_listed, train_listed
from machine import describe_machine

from autopeft.methods import METHODS, find_method, refuse_spec
from autopeft.methods.faults import make_recipe_spec
from autopeft.records import StudyRecord, TrialRecord, TrialSpec
from autopeft.report.files import write_atomically
from autopeft.search.racing import beats_majority
from autopeft.search.status import Status

OUT = Path(__file__).parent.parent / "leaderboards" / "sst2" / "minilm-recipes.md"
LONG = 200
"""Steps by which every recipe must have learned something."""


@dataclass(frozen=True, slots=True)
class Row:
    method: str
    family: str
    learning_rate: float
    target_modules: str
    quality: float | None
    longer_quality: float | None
    """After `LONG` steps, where the short run did not beat the majority class."""
    learned: bool
    trainable_parameters: int | None
    vram_mib: float | None
    step_seconds: float | None
    remark: str


def main() -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    arguments = _parse_arguments()
    names = arguments.methods or [name for name, method in METHODS.items() if "encoder" in method.models]
    specs = [
        replace(spec, learning_rate=spec.learning_rate * factor)
        for spec in (_recipe(name, arguments.steps) for name in names)
        for factor in arguments.rates
    ]
    short, majority = _train(specs, arguments)
    rows = [_make_row(trial, None, majority) for trial in short.trials]
    behind = [i for i, row in enumerate(rows) if not row.learned and row.quality is not None]
    if behind and arguments.steps < LONG:
        again = [replace(short.trials[i].spec, max_steps=LONG) for i in behind]
        longer, _ = _train(again, arguments)
        for i, trial in zip(behind, longer.trials, strict=True):
            rows[i] = _make_row(short.trials[i], trial, majority)
    rows.sort(key=lambda row: -(row.quality or 0.0))
    print(_render(rows, arguments, majority))
    if not arguments.methods and arguments.rates == [1.0]:
        write_atomically(OUT, _render(rows, arguments, majority) + "\n")
        write_atomically(OUT.with_suffix(".csv"), _render_csv(rows))


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="these alone; nothing is written then")
    parser.add_argument("--rates", nargs="+", type=float, default=[1.0], metavar="X",
                        help="factors on the recipes' learning rates; nothing is written then")  # fmt: skip
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("name the folder that holds sst2/train.jsonl with --data-dir or AUTOPEFT_DATA_DIR")
    for name in arguments.methods or ():
        find_method(name)
    return arguments


def _recipe(name: str, steps: int) -> TrialSpec:
    spec = replace(make_recipe_spec(METHODS[name], device_kind="cpu"), max_steps=steps)
    rule = refuse_spec(spec, "cpu")
    assert rule is None, f"{name}: {rule}"
    return spec


def _train(specs: Sequence[TrialSpec], arguments: argparse.Namespace) -> tuple[StudyRecord, float]:
    """The study of exactly these configurations at full length, and the majority class's quality."""
    steps = specs[0].max_steps
    plan = plan_listed(Asked("sst2", str(Path(arguments.data_dir).resolve()), steps, arguments.seed))
    with tempfile.TemporaryDirectory() as name:
        trained = train_listed(
            plan, specs, Path(name), rungs=(steps,), racing=NeverStop(), on_change=_progress_printer()
        )
    return trained.record, plan.config.majority_quality


def _progress_printer() -> Callable[[Status], None]:
    printed = -1

    def show(status: Status) -> None:
        nonlocal printed
        ended = sum(trial.state not in ("waiting", "running") for trial in status.trials)
        if ended != printed:
            printed = ended
            print(f"{ended} of {len(status.trials)} trials", file=sys.stderr, flush=True)

    return show


def _make_row(trial: TrialRecord, longer: TrialRecord | None, majority: float) -> Row:
    spec, cost = trial.spec, trial.cost
    judged = longer if longer is not None and longer.rungs else trial
    learned = bool(judged.rungs) and beats_majority(judged.rungs[-1].quality, majority, judged.rungs[-1].num_examples)
    return Row(
        method=spec.method,
        family=METHODS[spec.method].family,
        learning_rate=spec.learning_rate,
        target_modules=spec.target_modules or "",
        quality=trial.quality,
        longer_quality=longer.quality if longer is not None else None,
        learned=learned,
        trainable_parameters=cost.trainable_parameters if cost else None,
        vram_mib=cost.peak_vram_bytes / 2**20 if cost else None,
        step_seconds=trial.rungs[-1].train_seconds / spec.max_steps if trial.rungs else None,
        remark="" if trial.state == "complete" else f"{trial.state}: {trial.outcome}",
    )


def _render(rows: Sequence[Row], arguments: argparse.Namespace, majority: float) -> str:
    behind = [row.method for row in rows if not row.learned]
    verdict = f"Learned nothing: {', '.join(behind)}." if behind else "Every recipe beats the majority class."
    machine = "; ".join(f"{name} {value}" for name, value in describe_machine().items())
    lines = [
        "# Recipes on sst2, MiniLM",
        "",
        f"Every method that trains encoders, with its recipe, {arguments.steps} steps of 16, one seed; those that did "
        f"not beat the majority class ({majority:.3f}) by then once more with {LONG} steps. {verdict}",
        "",
        "One seed and so few steps rank nothing: this shows that recipes work and what they cost. Memory is estimated, "
        "for the longest rows; steps were timed with two workers, a thread each.",
        "",
        f"Made by `python benchmarks/breadth.py --steps {arguments.steps} --seed {arguments.seed}`.",
        "",
        f"| method | family | learning rate | target modules | accuracy | at {LONG} steps | trainable parameters "
        "| estimated memory, MiB | s/step |",
        "|---|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        cells = (
            row.method, row.family, f"{row.learning_rate:.0e}", row.target_modules, _format(row.quality, ".3f"),
            _format(row.longer_quality, ".3f"), _format(row.trainable_parameters, ","), _format(row.vram_mib, ".0f"),
            _format(row.step_seconds, ".3f"),
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |{row.remark and ' ' + row.remark}")
    return "\n".join([*lines, "", machine])


def _render_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(Row.__slots__)
    writer.writerows([[getattr(row, name) for name in Row.__slots__] for row in rows])
    return out.getvalue()


def _format(value: float | int | None, how: str) -> str:
    return "" if value is None else format(value, how)


if __name__ == "__main__":
    main()
