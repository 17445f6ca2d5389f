"""Whether the exported stand-alone script is the trial: its steps, its seeds, compared on the same rows.

    python benchmarks/export_reproduce.py STUDY --trials 0,10 --out benchmarks/results/export-reproduce

Exports each trial for `trainer`, runs `train.py` where autopeft cannot be imported, and compares its per-example scores
with those that the study kept: of the search on the search-validation split, of confirmations on the test split.
Trials of an earlier run on the same machine stay in the table, so that a long list can be done one by one.
Predictions are compared by McNemar's exact test (Biometrika 12, 1947), losses by their paired differences.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from exported import make_parser, open_study, write_results
from machine import describe_machine

from autopeft.cli.session import read_local
from autopeft.export import export_trial
from autopeft.records import StudyRecord, TrialRecord
from autopeft.report.words import describe_spec
from autopeft.search.store import StudyStore
from autopeft.tasks.data import Splits, load_splits
from autopeft.tasks.spec import parse_task


class Run(NamedTuple):
    """One training that the study kept scores of."""

    trial: int
    seed: int
    split: str
    scores_file: str


class Comparison(NamedTuple):
    trial: int
    title: str
    seed: int
    split: str
    num_examples: int
    study_accuracy: float
    script_accuracy: float
    only_study_right: int
    only_script_right: int
    p: float
    """McNemar's, exact and two-sided: of so uneven a division of the rows that one alone got right, were both alike."""
    mean_difference: float
    """Of losses in nats, the script's less the study's."""
    standard_error: float
    largest_difference: float


def mcnemar(first: int, second: int) -> float:
    total = first + second
    tail: float = sum(math.comb(total, k) for k in range(min(first, second) + 1)) / 2**total
    return min(1.0, 2 * tail)


def list_runs(trial: TrialRecord) -> Iterator[Run]:
    yield Run(trial.number, trial.spec.seed, "validation", trial.rungs[-1].scores_file)
    for confirmation in trial.confirmations:
        yield Run(trial.number, confirmation.seed, "test", confirmation.scores_file)


def run_script(folder: Path, trial: TrialRecord, seed: int) -> dict[str, npt.NDArray[np.float32]]:
    spec = trial.spec
    out = folder / f"seed{seed}"
    command = [
        sys.executable, "train.py", "--max-steps", str(spec.max_steps), "--seed", str(seed), "--out", str(out),
        "--save-steps", str(spec.max_steps),
    ]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    with np.load(out / "scores.npz") as scores:
        return dict(scores)


def compare(
    run: Run, title: str, mine: dict[str, npt.NDArray[np.float32]], store: StudyStore, rows: Splits
) -> Comparison:
    labels = np.array([example.label for example in getattr(rows, run.split)])
    theirs = {name: store.read_scores(run.scores_file, f"{run.split}_{name}") for name in ("predictions", "losses")}
    script_right = mine[f"{run.split}_predictions"] == labels
    study_right = theirs["predictions"] == labels
    differences = mine[f"{run.split}_losses"].astype(np.float64) - theirs["losses"].astype(np.float64)
    only_study, only_script = int((study_right & ~script_right).sum()), int((script_right & ~study_right).sum())
    return Comparison(
        trial=run.trial,
        title=title,
        seed=run.seed,
        split=run.split,
        num_examples=len(labels),
        study_accuracy=float(study_right.mean()),
        script_accuracy=float(script_right.mean()),
        only_study_right=only_study,
        only_script_right=only_script,
        p=mcnemar(only_study, only_script),
        mean_difference=float(differences.mean()),
        standard_error=float(differences.std(ddof=1) / math.sqrt(len(differences))),
        largest_difference=float(np.abs(differences).max()),
    )


def reproduce(record: StudyRecord, store: StudyStore, numbers: list[int]) -> Iterator[Comparison]:
    local = read_local(store)
    task = parse_task(record.config.task, record.config.task_name)
    rows = load_splits(task, local["data_dir"], seed=record.config.seed)
    for trial in (trial for trial in record.trials if trial.number in numbers):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "export"
            export_trial(
                record, trial, model=str(local["model"]), target="trainer", out=folder, data_dir=local["data_dir"]
            )
            for run in list_runs(trial):
                scores = run_script(folder, trial, run.seed)
                yield compare(run, describe_spec(trial.spec), scores, store, rows)


def read_others(out: Path, study: str, numbers: list[int]) -> list[Comparison]:
    """Comparisons of the study's trials that are not run now, where machine and libraries are the same."""
    path = out.with_suffix(".json")
    if not path.is_file():
        return []
    content = json.loads(path.read_text(encoding="utf-8"))
    if (content["machine"], content.get("study")) != (describe_machine(), study):
        return []
    return [Comparison(**row) for row in content["comparisons"] if row["trial"] not in numbers]


def write(found: list[Comparison], study: str, out: Path) -> None:
    found = sorted(found, key=lambda row: (row.trial, row.seed))
    lines = [
        "| trial | seed | split | rows | study | script | only one right | p | loss difference (s.e.) | largest |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in found:
        lines.append(
            f"| {row.trial}: {row.title} | {row.seed} | {row.split} | {row.num_examples} | {row.study_accuracy:.4f} | "
            f"{row.script_accuracy:.4f} | {row.only_study_right} / {row.only_script_right} | {row.p:.2f} | "
            f"{row.mean_difference:+.1e} ({row.standard_error:.1e}) | {row.largest_difference:.1e} |"
        )
    write_results(
        out,
        {"study": study, "comparisons": [row._asdict() for row in found]},
        title="The exported stand-alone script against the trials of a study",
        command="benchmarks/export_reproduce.py",
        text="Each row is a training by `train.py` of the target `trainer`, without autopeft, for the trial's steps "
        "and seed. *Only one right*: rows that the study's model alone and the script's model alone got right; *p* is "
        "McNemar's exact test of the two. Losses in nats a row, the script's less the study's; the study keeps them in "
        "float16.",
        table=lines,
    )


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trials", required=True, help="numbers, joined by commas")
    args = parser.parse_args()
    store, record = open_study(args)
    numbers = [int(number) for number in args.trials.split(",")]
    found = read_others(args.out, record.uid, numbers)
    for comparison in reproduce(record, store, numbers):
        found.append(comparison)
        print(comparison)
        write(found, record.uid, args.out)


if __name__ == "__main__":
    main()
