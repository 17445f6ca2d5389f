"""Whether the export to TRL is the trial: its steps, several seeds, compared on the same rows.

    python benchmarks/export_trl.py STUDY --trial 0 --trl .venvs/trl/bin/trl --seeds 0,1,2,3,4 \\
        --out benchmarks/results/export-trl

Exports the trial of a generation task with `--to trl` at its own length, runs `trl sft --config sft.yaml` as the
export's README says (`make export-check` installs TRL there), and scores TRL's adapter on the rows that the study
scored. The study's own scores are those that it kept; seeds that it did not confirm are trained by its backend now.

TRL draws batches and LoRA's start in another order, so the same seed is another draw: it is seeds that are compared, by
exact permutation tests of their means over the rows. A trial's batches are of rows of like length, TRL's of any: to see
what that makes, the study's backend trains every seed once more with batches drawn from all rows, as TRL draws them.

Trainings that were scored before stand in `--work` and are not repeated, so that a long list can be done one by one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import peft
import torch
from exported import make_parser, open_study, write_results

import autopeft.backends.hf.data as backend_data
from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import load_base
from autopeft.backends.hf.scoring import score_split
from autopeft.backends.hf.trial import HfBackend
from autopeft.cli.session import read_local
from autopeft.export import export_trial
from autopeft.records import StudyRecord, TrialRecord
from autopeft.report.words import describe_spec
from autopeft.search.store import StudyStore
from autopeft.tasks.spec import parse_task

Floats = npt.NDArray[np.float64]
_BATCH_SIZE = 32
SPLITS = ("validation", "test")


class Scores(NamedTuple):
    """Of one training on one split, by row."""

    losses: Floats
    accuracies: Floats
    """Shares of the tokens that were the likeliest."""


class Side(NamedTuple):
    """All seeds of one way to train, on one split."""

    split: str
    num_examples: int
    title: str
    losses: list[float]
    """Mean over the rows, in nats a token, one a seed."""
    accuracies: list[float]
    """The task's score."""
    difference: float
    """Of TRL's mean loss, less this one's."""
    standard_error: float
    """Of that, from the seeds."""
    loss_p: float
    """Of means that far apart, were TRL and this one trained alike: exact, two-sided, by permutation of the seeds."""
    accuracy_p: float


TITLES = {"study": "study", "shuffled": "study, batches from all rows", "trl": "TRL"}


def train_here(store: StudyStore, record: StudyRecord, trial: TrialRecord, seed: int, folder: Path) -> Path:
    """By the study's own backend; the file with the scores."""
    local, config = read_local(store), record.config
    setup = WorkerSetup(
        backend="hf", model=str(local["model"]), task=config.task, data_dir=local["data_dir"], split_seed=config.seed,
        study_dir=str(folder), device="cpu", threads=torch.get_num_threads(),
    )  # fmt: skip
    stretch = Stretch(
        job=0, trial=trial.number, spec=dataclasses.replace(trial.spec, seed=seed), purpose="confirm", from_step=0,
        to_step=trial.spec.max_steps, score_test=True,
    )  # fmt: skip
    finished = HfBackend(setup).run(stretch, lambda event: None)
    assert isinstance(finished, Finished), finished
    return folder / finished.scores_file


def read_study(
    store: StudyStore, record: StudyRecord, trial: TrialRecord, seed: int, folder: Path
) -> dict[str, Scores]:
    """By split; seeds that the study did not confirm are trained now, its own among them, for their test scores."""
    kept = {c.seed: store.folder / c.scores_file for c in trial.confirmations}
    return read_scores(kept.get(seed) or train_here(store, record, trial, seed, folder))


def train_shuffled(
    store: StudyStore, record: StudyRecord, trial: TrialRecord, seed: int, folder: Path
) -> dict[str, Scores]:
    """With batches drawn from all rows: buckets of one batch are not sorted into batches of like length."""
    before = backend_data._BUCKET_BATCHES
    backend_data._BUCKET_BATCHES = 1
    try:
        return read_scores(train_here(store, record, trial, seed, folder))
    finally:
        backend_data._BUCKET_BATCHES = before


def read_scores(path: Path) -> dict[str, Scores]:
    """By split, of a file as the study keeps them."""
    with np.load(path) as arrays:
        return {
            split: Scores(*(arrays[f"{split}_{name}"].astype(np.float64) for name in ("losses", "predictions")))
            for split in SPLITS
        }


def write_scores(path: Path, scores: dict[str, Scores]) -> None:
    arrays = {f"{split}_losses": side.losses for split, side in scores.items()}
    arrays |= {f"{split}_predictions": side.accuracies for split, side in scores.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)  # type: ignore[arg-type]


def run_trl(trl: Path, folder: Path, seed: int) -> Path:
    """The folder with the trained adapter."""
    out = f"seed{seed}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    subprocess.run(
        [trl.absolute(), "sft", "--config", "sft.yaml", "--seed", str(seed), "--output_dir", out],
        cwd=folder, env=environment | {"HF_HUB_OFFLINE": "1"}, check=True,
    )  # fmt: skip
    return folder / out


def score_adapter(adapter: Path, data: backend_data.TaskData, model: str) -> dict[str, Scores]:
    trained = peft.PeftModel.from_pretrained(load_base(model, num_labels=None, bits=32, device="cpu").model, adapter)
    found = {}
    for split in SPLITS:
        scores = score_split(trained, data, getattr(data, split), batch_size=_BATCH_SIZE, device="cpu")
        found[split] = Scores(scores.losses.astype(np.float64), scores.predictions.astype(np.float64))
    return found


def permute(ours: list[float], theirs: list[float]) -> float:
    """The share of all divisions of the values into two such groups whose means are as far apart, or farther."""
    values, size = np.array([*ours, *theirs]), len(ours)
    found = abs(values[:size].mean() - values[size:].mean())
    chosen = [list(indices) for indices in itertools.combinations(range(len(values)), size)]
    sums = np.array([values[indices].sum() for indices in chosen])
    distances = np.abs(sums / size - (values.sum() - sums) / len(theirs))
    # The division as it was found is among them, whatever rounding says.
    return float((distances >= found * (1 - 1e-12)).mean())


def compare(split: str, sides: dict[str, list[dict[str, Scores]]]) -> Iterator[Side]:
    losses = {name: [float(seed[split].losses.mean()) for seed in seeds] for name, seeds in sides.items()}
    accuracies = {name: [float(seed[split].accuracies.mean()) for seed in seeds] for name, seeds in sides.items()}
    for name, seeds in sides.items():
        pair = (losses[name], losses["trl"])
        yield Side(
            split=split,
            num_examples=len(seeds[0][split].losses),
            title=TITLES[name],
            losses=losses[name],
            accuracies=accuracies[name],
            difference=float(np.mean(losses["trl"]) - np.mean(losses[name])),
            standard_error=math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in pair)),
            loss_p=permute(*pair),
            accuracy_p=permute(accuracies[name], accuracies["trl"]),
        )


def reproduce(
    record: StudyRecord, store: StudyStore, trial: TrialRecord, trl: Path, seeds: list[int], work: Path
) -> Iterator[Side]:
    local = read_local(store)
    model, data_dir = str(local["model"]), local["data_dir"]
    task = parse_task(record.config.task, record.config.task_name)
    data = backend_data.TaskData(task, model=model, data_dir=data_dir, split_seed=record.config.seed)
    sides: dict[str, list[dict[str, Scores]]] = {name: [] for name in TITLES}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "export"
        export_trial(
            record, trial, model=model, target="trl", out=folder, data_dir=data_dir, steps=trial.spec.max_steps
        )
        known = (store, record, trial)
        for seed in seeds:
            ways: dict[str, Callable[[], dict[str, Scores]]] = {
                "study": lambda: read_study(*known, seed, Path(scratch) / "study"),  # noqa: B023 (called at once)
                "shuffled": lambda: train_shuffled(*known, seed, Path(scratch) / "shuffled"),  # noqa: B023
                "trl": lambda: score_adapter(run_trl(trl, folder, seed), data, model),  # noqa: B023
            }
            for name, train in ways.items():
                path = work / f"{record.uid}-{trial.number}-seed{seed}-{name}.npz"
                if not path.is_file():
                    write_scores(path, train())
                sides[name].append(read_scores(path))
            print(seed, *(f"{seen[-1]['test'].losses.mean():.4f}" for seen in sides.values()), flush=True)
    for split in SPLITS:
        yield from compare(split, sides)


def write(title: str, found: list[Side], seeds: list[int], version: str, out: Path) -> None:
    lines = [
        "| split | rows | trained by | token accuracy (sd) | p | loss (sd) | TRL less it (s.e.) | p |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for side in found:
        accuracy, loss = (f"{np.mean(v):.4f} ({np.std(v, ddof=1):.4f})" for v in (side.accuracies, side.losses))
        against = [
            f"{side.accuracy_p:.2f}",
            f"{side.difference:+.4f} ({side.standard_error:.4f})",
            f"{side.loss_p:.2f}",
        ]
        if side.title == TITLES["trl"]:
            against = [""] * 3
        lines.append(
            f"| {side.split} | {side.num_examples} | {side.title} | {accuracy} | {against[0]} | {loss} | {against[1]} "
            f"| {against[2]} |"
        )
    write_results(
        out,
        {"trial": title, "seeds": seeds, "trl": version, "sides": [side._asdict() for side in found]},
        title="The export to TRL against the trial of a study",
        command="benchmarks/export_trl.py",
        also=version,
        text=f"{title}. Each of {len(seeds)} seeds was trained by the study's backend, and by `trl sft --config "
        "sft.yaml` on what `autopeft export --to trl` wrote for the trial's own steps. Losses in nats a token, mean "
        "over rows; *TRL less it* with its standard error from the seeds. *p*: exact permutation test over the seeds "
        "against TRL. A trial's batches are of rows of like length, TRL's are drawn from all rows; the second row of "
        "each split is the study's backend with batches as TRL draws them. TRL's warm-up begins with a step at a "
        "learning rate of zero.",
        table=lines,
    )


def find_version(trl: Path) -> str:
    command = [str(trl.parent / "python"), "-c", "from importlib.metadata import version; print('trl', version('trl'))"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return str(done.stdout).strip()


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--trial", type=int, required=True)
    parser.add_argument("--trl", type=Path, default=Path(".venvs/trl/bin/trl"), help="TRL's command")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="joined by commas; at least two")
    parser.add_argument("--work", type=Path, default=Path("export-trl-work"), help="scores of each seed")
    args = parser.parse_args()
    store, record = open_study(args)
    trial = next(trial for trial in record.trials if trial.number == args.trial)
    seeds = [int(seed) for seed in args.seeds.split(",")]
    spec = trial.spec
    title = f"{record.config.task_name} on {record.config.model}, {describe_spec(spec)}, {spec.max_steps} steps"
    found = list(reproduce(record, store, trial, args.trl, seeds, args.work))
    write(title, found, seeds, find_version(args.trl), args.out)


if __name__ == "__main__":
    main()
