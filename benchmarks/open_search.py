"""Real searches in the whole space, beside the random ones that a recording holds.

    python benchmarks/open_search.py benchmarks/results/table-sst2-minilm.npz --share 0.1 --runs 3 --out open-sst2

A recording by `racing.py record` is a random search that trained everything to its end: recipes, then configurations
drawn at random from the default space. Replays of it cannot show what a search gains by choosing freely, since there it
may only have what was recorded. Here the product searches for real, with workers and a clock, on the same rows at the
same length, for a share of the device time that the recording would take on this machine now. Its front is measured as
the recording's is, with the same reference, as a share of the hypervolume of everything recorded.

Machines differ, and shared ones from hour to hour. So before each run the recording's recipes are trained for some
steps on the same workers, and a run has as much more time as they take longer than when they were recorded. The
recording's time is that of its fastest stretches; so is theirs.

Every run has the recording's seed, for its rows; runs differ as any two with a clock and several workers do. Finished
ones in --work are not run again: empty it after a change of the search.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from configurations import limit_rows
from listed_search import Asked, NeverStop, plan_listed, train_listed
from peers import PEERS, play
from searchers import volume_at
from tables import Table, read_table
from written import tell_result

from autopeft.backends.replay import Curve
from autopeft.budget import parse_budget
from autopeft.executors.local import LocalExecutor
from autopeft.records import StudyRecord, TrialRecord, to_record
from autopeft.search.front import scaled_points
from autopeft.search.plan import Plan, make_provenance
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore
from autopeft.search.study import Search

SHARES = (1 / 20, 1 / 10, 1 / 6, 1 / 5, 1 / 3, 1 / 2, 1.0)
"""Of the device time of training everything recorded."""
ORDERS = 200
"""Of the recorded configurations, for random search."""
VALIDATION_ROWS = 1000
"""As in the recordings."""
PACE_RUNGS = (20, 60)
"""Of the recipes that say how fast the machine is: the first steps of a worker take longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One search, or random search's medians."""

    title: str
    pace: float | None
    """Seconds of a training step, as a multiple of the recording's."""
    volumes: tuple[float | None, ...]
    """At each of SHARES, of everything recorded; None beyond the budget."""
    share_for_all: float | None
    """Of the recording's device time at this pace, when the hypervolume of everything recorded was reached."""
    num_begun: int | None
    num_complete: int | None
    best_quality: float | None
    """Of the search-validation split."""


def main() -> None:
    arguments = _parse_arguments()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    table = read_table(arguments.table, arguments.table.stem)
    plan = _make_plan(arguments, table)
    rows = []
    for run in range(arguments.runs):
        record = _search(plan, table, arguments, run)
        rows.append(_measure(record, table, f"autopeft, run {run + 1}", arguments.share))
        print(f"{rows[-1].title}: {rows[-1]}", file=sys.stderr, flush=True)
    if len(rows) > 2:
        rows.append(take_medians(rows))
    rows.append(_measure_random(table))
    text = describe(table, rows, plan)
    tell_result(text, to_record(rows), name=arguments.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path, help="a recording made by racing.py record")
    parser.add_argument("--share", type=float, default=1 / 5, help="of the recording's device time, as the budget")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "autopeft-open", metavar="DIR",
                        help="the studies")  # fmt: skip
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("name the folder that holds TASK/train.jsonl with --data-dir or AUTOPEFT_DATA_DIR")
    return arguments


def _make_plan(arguments: argparse.Namespace, table: Table) -> Plan:
    """What the command line would plan with this budget, but for confirmation: nothing is kept for it."""
    recorded = table.recording.curves.config
    task, seed = recorded.task_name, recorded.seed
    rows = limit_rows(arguments.data_dir.resolve(), task, VALIDATION_ROWS, arguments.work / "data", seed=seed)
    plan = plan_listed(Asked(task, str(rows), table.rungs[-1], seed, budget=_make_budget(table, arguments.share, 1.0)))
    if make_provenance(plan).task_digest != table.recording.curves.provenance.task_digest:
        sys.exit(f"The recording is of other rows of '{task}' than those in {arguments.data_dir}: they do not compare.")
    return replace(plan, config=replace(plan.config, confirm_share=0.0, confirm_seeds=0))


def _make_budget(table: Table, share: float, pace: float) -> str:
    return f"{share * pace * table.total_seconds / 60:.2f}cpu-min"


def _measure_pace(plan: Plan, table: Table) -> float:
    """How much longer a training step takes than in the recording: of all recipes, each at its fastest."""
    places = [table.index_of[spec.key()] for spec in plan.space.recipes if spec.key() in table.index_of]
    recipes = [table.curves[place] for place in places]
    short = [replace(curve.spec, max_steps=PACE_RUNGS[-1]) for curve in recipes]
    with tempfile.TemporaryDirectory() as root:
        trained = train_listed(plan, short, Path(root), rungs=PACE_RUNGS, racing=NeverStop())
    now = sum(map(_find_fastest, trained.record.trials))
    return now / sum(map(_find_fastest, recipes))


def _find_fastest(trained: TrialRecord | Curve) -> float:
    """Seconds of a step."""
    steps = [0, *(score.step for score in trained.rungs)]
    return min(score.train_seconds / (score.step - before) for before, score in zip(steps, trained.rungs, strict=False))


def _search(plan: Plan, table: Table, arguments: argparse.Namespace, run: int) -> StudyRecord:
    root: Path = arguments.work
    name = f"{plan.config.task_name}-{arguments.share:.3f}-{run}"
    if (root / name / "study.db").exists():
        store = StudyStore.open(root, name)
        if store.finished:
            return build_record(store)
    else:
        budget = _make_budget(table, arguments.share, _measure_pace(plan, table))
        config = replace(plan.config, name=name, budget=budget)
        plan = replace(plan, config=config)
        store = StudyStore.create(root, config, make_provenance(plan), plan.validation_labels())
    executor = LocalExecutor(plan.setup(root), list(plan.devices))
    with store.lock():
        return Search(store, executor, plan.space).run()


def _measure(record: StudyRecord, table: Table, title: str, share: float) -> Row:
    """By the clock, all workers counted busy from the start."""
    ended_at = {segment.trial: segment.end_seconds for segment in record.segments if segment.purpose == "search"}
    complete = [trial for trial in record.trials if trial.state == "complete"]
    complete.sort(key=lambda trial: ended_at[trial.number])
    budget = parse_budget(record.config.budget)
    assert budget.device_seconds is not None
    rate = record.config.workers * record.provenance.threads
    ends = [ended_at[trial.number] * rate / budget.device_seconds * share for trial in complete]
    reference = table.recording.curves.reference
    volumes = [table.share(scaled_points(complete[: count + 1], reference)) for count in range(len(complete))]
    reached = [end for end, volume in zip(ends, volumes, strict=True) if volume >= 1]
    return Row(
        title=title,
        pace=budget.device_seconds / (share * table.total_seconds),
        volumes=tuple(
            max((volume for end, volume in zip(ends, volumes, strict=True) if end <= at), default=0.0)
            if at <= share * (1 + 1e-9)
            else None
            for at in SHARES
        ),
        share_for_all=min(reached, default=None),
        num_begun=sum(bool(trial.rungs) for trial in record.trials),
        num_complete=len(complete),
        best_quality=max((trial.rungs[-1].quality for trial in complete), default=None),
    )


def take_medians(runs: Sequence[Row]) -> Row:
    """A run that never had all of the recording's hypervolume counts as one that has it last."""
    columns = zip(*(run.volumes for run in runs), strict=True)
    share = statistics.median(math.inf if run.share_for_all is None else run.share_for_all for run in runs)
    return Row(
        title=f"autopeft, median of {len(runs)}",
        pace=statistics.median(run.pace for run in runs if run.pace is not None),
        volumes=tuple(
            statistics.median(known) if (known := [v for v in column if v is not None]) else None for column in columns
        ),
        share_for_all=None if math.isinf(share) else share,
        num_begun=_median_of([run.num_begun for run in runs]),
        num_complete=_median_of([run.num_complete for run in runs]),
        best_quality=statistics.median(run.best_quality for run in runs if run.best_quality is not None),
    )


def _median_of(counts: Sequence[int | None]) -> int:
    """Of two in the middle the lower."""
    return statistics.median_low(count for count in counts if count is not None)


def _measure_random(table: Table) -> Row:
    volumes = []
    for order in range(ORDERS):
        trace = play(PEERS["random search"], table, order)
        volumes.append([volume_at(table, trace, share) for share in SHARES])
    qualities = [quality for curve in table.curves if (quality := curve.final_quality) is not None]
    return Row(
        title=f"random search, median of {ORDERS} orders", pace=None,
        volumes=tuple(statistics.median(column) for column in zip(*volumes, strict=True)),
        share_for_all=None, num_begun=None, num_complete=len(qualities), best_quality=max(qualities),
    )  # fmt: skip


def describe(table: Table, rows: Sequence[Row], plan: Plan) -> str:
    config = table.recording.curves.config
    lines = [
        f"{len(table.curves)} configurations recorded, {config.model} on {config.task_name}, {table.rungs[-1]} steps, "
        f"{table.total_seconds / 3600:.2f} device-hours for all; {plan.device_title}. Hypervolumes are shares of what "
        f"all of it gives, over {', '.join(config.objectives)}, budgets shares of the time that it would take at a "
        "run's pace: how much longer a training step takes than when it was recorded.",
        "",
        "| search | pace | " + " | ".join("all" if share == 1 else f"at 1/{round(1 / share)}" for share in SHARES)
        + " | budget for the recording's | begun | to the end | best quality |",
        "|---|" + "--:|" * (len(SHARES) + 5),
    ]  # fmt: skip
    for row in rows:
        cells = ["-" if row.pace is None else f"{row.pace:.2f}"]
        cells += ["-" if volume is None else f"{volume:.3f}" for volume in row.volumes]
        cells.append("-" if row.share_for_all is None else f"{row.share_for_all:.3f}")
        cells += ["-" if count is None else str(count) for count in (row.num_begun, row.num_complete)]
        cells.append("-" if row.best_quality is None else f"{row.best_quality:.3f}")
        lines.append(f"| {row.title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
