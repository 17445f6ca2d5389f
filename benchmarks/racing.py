"""What racing saves and what it costs: the same configurations, trained to the end and raced.

    python benchmarks/racing.py record            # trains them all unpruned, once; goes on after a stop
    python benchmarks/racing.py record --task trec --configurations 40 --record trec.npz
    python benchmarks/racing.py replay            # races the recorded curves on a simulated clock, in seconds
    python benchmarks/racing.py real              # races them for real, to see that the replay tells the truth

The target: 0.97 of the unpruned hypervolume in a third of the time, read in two ways: the time that racing takes where
the budget is a number of trials, and the hypervolume it reaches where the budget is a third of the unpruned wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from configurations import draw_specs, limit_rows
from curves import make_recording
from listed_search import (
    Arrival,
    Asked,
    ListedSearch,
    NeverStop,
    Trained,
    count_spent,
    plan_listed,
    train_listed,
)
from machine import describe_machine
from memory_study import MemoryStore

from autopeft.backends.replay import (
    Recording,
    ReplayBackend,
    ReplayCostModel,
    even_pace,
    join_recordings,
    read_recording,
    write_recording,
)
from autopeft.executors.inline import InlineExecutor
from autopeft.records import StudyRecord, TrialRecord, TrialSpec, digest_json, to_record
from autopeft.search.front import find_nondominated, hypervolume, scaled_points
from autopeft.search.lengths import plan_rungs
from autopeft.search.plan import Plan, make_provenance, restore_space
from autopeft.search.racing import PairedRacing, RacingRule
from autopeft.search.status import Status
from autopeft.search.store import Trial, delete_study

RESULTS = Path(__file__).parent / "results"
RECORD = RESULTS / "curves-sst2-minilm.npz"


def main() -> None:
    arguments = _parse_arguments()
    # The recording is of CPU workers, also where there is a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    {"record": run_record, "replay": run_replay, "real": run_real}[arguments.command](arguments)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    record, replay, real = (commands.add_parser(name) for name in ("record", "replay", "real"))
    for command in (record, replay, real):
        command.add_argument("--record", type=Path, default=RECORD, metavar="FILE")
    for command in (record, real):
        command.add_argument("--validation", type=int, default=1000, metavar="ROWS")
        command.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
        command.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "autopeft-racing",
                             metavar="DIR", help="studies under way")  # fmt: skip
    record.add_argument("--task", default="sst2")
    record.add_argument("--configurations", type=int, default=24, metavar="N")
    record.add_argument("--part", type=int, default=24, metavar="N", help="configurations between two writings of FILE")
    record.add_argument("--steps", type=int, default=320)
    record.add_argument("--seed", type=int, default=0)
    replay.add_argument("--z", type=float, nargs="*", default=[], help="PairedRacing settings beside the shipped one")
    replay.add_argument("--shares", type=float, nargs="+", default=[1 / 3], help="of the unpruned time, as budgets")
    replay.add_argument("--arrival", nargs="+", choices=("included", "sampled"), default=["included", "sampled"])
    replay.add_argument(
        "--even-pace", action="store_true", help="for recordings of a busy machine, see curves.even_pace"
    )
    replay.add_argument("--orders", type=int, default=5, metavar="K", help="orders of the configurations to try")
    for command in (replay, real):
        command.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    if arguments.command != "replay" and arguments.data_dir is None:
        parser.error("name the folder that holds TASK/train.jsonl with --data-dir or AUTOPEFT_DATA_DIR")
    return arguments


# --- record


def run_record(arguments: argparse.Namespace) -> None:
    """Trains what the record lacks, part by part. The study in --work is the state of the part under way: a stopped
    recording goes on where it was."""
    plan = _make_plan(arguments, arguments.task, arguments.steps, arguments.seed)
    recording = read_recording(arguments.record) if arguments.record.exists() else None
    done = {curve.spec.key() for curve in recording.curves.curves} if recording else set()
    wanted = draw_specs(plan.space, arguments.configurations, max_steps=arguments.steps, seed=arguments.seed)
    missing = [spec for spec in wanted if spec.key() not in done]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} configurations are in {arguments.record}.", file=sys.stderr)
    for start in range(0, len(missing), arguments.part):
        part = missing[start : start + arguments.part]
        name = f"record-{arguments.task}-{digest_json([spec.key() for spec in part])}"
        new = _record_study(plan, part, arguments.work, name)
        recording = join_recordings(recording, new) if recording else new
        write_recording(recording, arguments.record)
        delete_study(arguments.work, name)
        print(f"Wrote {arguments.record}, {arguments.record.stat().st_size / 2**20:.2f} MiB.", file=sys.stderr)


def _record_study(plan: Plan, specs: Sequence[TrialSpec], root: Path, name: str) -> Recording:
    trained = _train(plan, specs, root, name, NeverStop())
    return make_recording(
        trained.store, device_rate=trained.executor.device_rate,
        wall_seconds=count_spent(trained.record).wall_seconds, machine=describe_machine(),
    )  # fmt: skip


def _train(plan: Plan, specs: Sequence[TrialSpec], root: Path, name: str, racing: RacingRule) -> Trained:
    rungs = plan_rungs(specs[0].max_steps)
    return train_listed(plan, specs, root, name=name, rungs=rungs, racing=racing, on_change=_progress_printer())


def _make_plan(arguments: argparse.Namespace, task: str, steps: int, seed: int) -> Plan:
    data_dir = limit_rows(arguments.data_dir.resolve(), task, arguments.validation, arguments.work / "data", seed=seed)
    return plan_listed(Asked(task, str(data_dir), steps, seed))


def _progress_printer() -> Callable[[Status], None]:
    """Prints how many rungs are scored, whenever that changes."""
    printed = -1

    def show(status: Status) -> None:
        nonlocal printed
        scored = sum(len(trial.rungs) for trial in status.trials)
        if scored != printed:
            printed = scored
            states = Counter(trial.state for trial in status.trials)
            print(f"{scored} rungs scored: {dict(states)}", file=sys.stderr, flush=True)

    return show


# --- replay, real


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a study of the recorded configurations came to."""

    wall_seconds: float
    device_seconds: float
    hypervolume: float
    """Of the trials at full length."""
    complete: tuple[str, ...]
    """Keys of their configurations."""
    num_stopped: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One setting's outcomes over the orders, each as a share of the unpruned study in the same order."""

    title: str
    wall_share: float
    """Median, as the next one."""
    device_share: float
    hypervolume_share: float
    """Median."""
    worst_hypervolume_share: float
    front_share: float
    """Of the unpruned front's members, how many reached their full length; mean."""
    num_complete: float
    num_stopped: float


def run_replay(arguments: argparse.Namespace) -> None:
    recording = read_recording(arguments.record)
    if arguments.even_pace:
        recording = even_pace(recording)
    orders = make_orders([curve.spec for curve in recording.curves.curves], arguments.orders)
    rules: list[tuple[str, RacingRule]] = [("as shipped", PairedRacing())]
    rules += [(f"z_at_end {z:g}", PairedRacing(z_at_end=z)) for z in arguments.z]
    rows = []
    for arrival in arguments.arrival:
        player = Player(recording, arrival)
        unpruned = [player.play(order, NeverStop()) for order in orders]
        for title, rule in rules:
            raced = [player.play(order, rule) for order in orders]
            rows.append(_make_row(recording, f"{arrival}, {title}, budget in trials", raced, unpruned))
            for share in arguments.shares:
                raced = [player.play(order, rule, whole.wall_seconds * share)
                         for order, whole in zip(orders, unpruned, strict=True)]  # fmt: skip
                rows.append(_make_row(recording, f"{arrival}, {title}, {share:.3g} of the time", raced, unpruned))
        for share in arguments.shares:
            # What a shorter budget alone does: the scheduler still chooses what goes on.
            cut = [player.play(order, NeverStop(), whole.wall_seconds * share)
                   for order, whole in zip(orders, unpruned, strict=True)]  # fmt: skip
            rows.append(_make_row(recording, f"{arrival}, no racing, {share:.3g} of the time", cut, unpruned))
    pace = " Stretches at the pace of each configuration's fastest." if arguments.even_pace else ""
    _tell(recording, rows, arguments.out, f"Replayed in {len(orders)} order(s).{pace}")


def make_orders(specs: Sequence[TrialSpec], count: int) -> list[list[TrialSpec]]:
    """The recorded order, then shuffled ones: whom a trial meets first is luck."""
    orders = [list(specs)]
    for seed in range(1, count):
        orders.append(random.Random(seed).sample(list(specs), len(specs)))
    return orders


class Player:
    """Runs searches on a recording."""

    def __init__(self, recording: Recording, arrival: Arrival) -> None:
        self._recording = recording
        self._arrival: Arrival = arrival
        space = restore_space(recording.curves.config)
        known = {curve.spec.key() for curve in recording.curves.curves}
        # A recipe that changed since the recording cannot be played.
        self._space = replace(space, recipes=tuple(spec for spec in space.recipes if spec.key() in known))

    def play(self, specs: Sequence[TrialSpec], racing: RacingRule, wall_seconds: float | None = None) -> Outcome:
        """A search over `specs` in that order, with a budget in trials, and in wall seconds where given."""
        curves = self._recording.curves
        budget = f"{len(specs)}trials" + ("" if wall_seconds is None else f",{wall_seconds / 60:.4f}min")
        config = replace(
            curves.config, name="replay", budget=budget, confirm_share=0.0, confirm_seeds=0,
            included=tuple(specs) if self._arrival == "included" else (),
        )  # fmt: skip
        backend = ReplayBackend(self._recording)
        store = MemoryStore(backend, config)
        store.save_baseline(Trial(number=-1, spec=specs[0], source="baseline", state="complete"))
        executor = InlineExecutor(
            None, config.workers, backend=backend, costs=ReplayCostModel(self._recording),
            device_rate=curves.device_rate,
        )  # fmt: skip
        return summarize(ListedSearch(store, executor, self._space, specs, racing=racing).run())


def summarize(record: StudyRecord) -> Outcome:
    spent = count_spent(record)
    complete = [trial for trial in record.trials if trial.state == "complete"]
    return Outcome(
        wall_seconds=spent.wall_seconds,
        device_seconds=spent.device_seconds,
        hypervolume=_volume(complete, record.reference),
        complete=tuple(trial.spec.key() for trial in complete),
        num_stopped=sum(trial.state == "stopped" for trial in record.trials),
    )


def _volume(trials: Sequence[TrialRecord], reference: dict[str, float]) -> float:
    return hypervolume(scaled_points(trials, reference), [1.0] * len(reference))


def find_front(recording: Recording) -> set[str]:
    """Keys of the configurations on the unpruned front."""
    curves = [curve for curve in recording.curves.curves if curve.failed is None]
    records = [
        TrialRecord(
            number=number, spec=curve.spec, source="included", state="complete", cost=curve.cost, rungs=curve.rungs,
            outcome=None, device_seconds=0.0, confirmations=(),
        )
        for number, curve in enumerate(curves)
    ]  # fmt: skip
    on_front = find_nondominated(scaled_points(records, recording.curves.reference))
    return {curve.spec.key() for curve, on in zip(curves, on_front, strict=True) if on}


def _make_row(recording: Recording, title: str, raced: Sequence[Outcome], unpruned: Sequence[Outcome]) -> Row:
    pairs = list(zip(raced, unpruned, strict=True))
    front = find_front(recording)
    volumes = [a.hypervolume / b.hypervolume for a, b in pairs]
    return Row(
        title=title,
        wall_share=statistics.median(a.wall_seconds / b.wall_seconds for a, b in pairs),
        device_share=statistics.median(a.device_seconds / b.device_seconds for a, b in pairs),
        hypervolume_share=statistics.median(volumes),
        worst_hypervolume_share=min(volumes),
        front_share=statistics.mean(len(front & set(a.complete)) / len(front) for a in raced),
        num_complete=statistics.mean(len(a.complete) for a in raced),
        num_stopped=statistics.mean(a.num_stopped for a in raced),
    )


def run_real(arguments: argparse.Namespace) -> None:
    """Races the recorded configurations on real workers and compares with the recording."""
    recording = read_recording(arguments.record)
    config = recording.curves.config
    specs = [curve.spec for curve in recording.curves.curves]
    plan = _make_plan(arguments, config.task_name, config.rungs[-1], config.seed)
    if make_provenance(plan).task_digest != recording.curves.provenance.task_digest:
        sys.exit(f"The data differ from those of {arguments.record}: give the --validation it was recorded with.")
    # A study of its own each time: one that was interrupted would have been timed on two machines' moods.
    with tempfile.TemporaryDirectory() as name:
        record = _train(plan, specs, Path(name), "real", PairedRacing()).record
    player = Player(recording, "included")
    unpruned, raced = player.play(specs, NeverStop()), player.play(specs, PairedRacing())
    real = summarize(record)
    recorded = replace(unpruned, wall_seconds=sum(recording.curves.wall_seconds))
    rows = [
        _make_row(recording, "included, as shipped, really run, against the recording", [real], [recorded]),
        _make_row(recording, "included, as shipped, replayed", [raced], [unpruned]),
    ]
    _tell(recording, rows, arguments.out, f"Really raced in {real.wall_seconds:.0f} s.")


# --- what is printed


def _tell(recording: Recording, rows: Sequence[Row], out: str | None, how: str) -> None:
    table = make_table(recording, rows, how)
    print(table)
    if out:
        RESULTS.mkdir(exist_ok=True)
        record = {
            "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "rows": to_record(rows),
        }
        (RESULTS / f"{out}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (RESULTS / f"{out}.md").write_text(table + "\n", encoding="utf-8")


def make_table(recording: Recording, rows: Sequence[Row], how: str) -> str:
    curves = recording.curves
    seconds = sum(score.device_seconds for curve in curves.curves for score in curve.rungs)
    failed = sum(curve.failed is not None for curve in curves.curves)
    lines = [
        f"{len(curves.curves)} configurations ({failed} failed), rungs {', '.join(map(str, curves.config.rungs))}, "
        f"{curves.config.task_name}, {curves.config.model}, {len(recording.labels)} search-validation rows; "
        f"{seconds:.0f} device-seconds unpruned, {len(find_front(recording))} on the front. {how}",
        "",
        "Times and hypervolumes are shares of the unpruned study's. Target: hypervolume 0.97 at time 0.33.",
        "",
        "| arrival, racing, budget | wall time | device time | hypervolume | worst | front kept | complete | stopped |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        lines.append(
            f"| {row.title} | {row.wall_share:.3f} | {row.device_share:.3f} | {row.hypervolume_share:.3f} "
            f"| {row.worst_hypervolume_share:.3f} | {row.front_share:.2f} | {row.num_complete:.1f} "
            f"| {row.num_stopped:.1f} |"
        )
    machine = "; ".join(f"{name} {value}" for name, value in curves.machine.items())
    return "\n".join([*lines, "", f"Recorded on: {machine}"])


if __name__ == "__main__":
    main()
