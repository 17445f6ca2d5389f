"""Is the outlook true? What more budget was expected to bring, beside what it did bring, on recorded runs.

    python benchmarks/outlook.py metamathqa benchmarks/results/table-*.npz --seeds 20 --out outlook

A search with a budget is played, asked what a larger one would bring, and played again with the larger one, on one
worker with a simulated clock. What became of the trials that it had stopped is read from the recording.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from searchers import OurSearch, Source
from tables import Table, draw_part, read_metamathqa, read_table
from written import tell_result

from autopeft.search.front import scale_point
from autopeft.search.outlook import GainModel, count_lost_members
from autopeft.search.store import Trial

SHARES = (1 / 10, 1 / 6, 1 / 4, 1 / 3)
"""Budgets, of what training everything takes."""
MORE = (0.25, 0.5, 1.0)
"""Of the budget."""
_METAMATHQA_RUNGS = (250, 500, 1000, 2000, 5000)


class Asked(NamedTuple):
    """One budget of one seed, and a larger one."""

    share: float
    more: float
    expected: float
    low: float
    high: float
    realised: float


class Fate(NamedTuple):
    """The stopped trials of one budget of one seed."""

    stopped: int
    expected_members: float
    members: int


def main() -> None:
    arguments = _parse_arguments()
    lines, record = [], []
    for name in arguments.tables:
        table = _read(name, arguments.data_dir)
        asked, fates = measure(table, arguments.seeds)
        text = describe(table, asked, fates)
        lines.append(text)
        record.append(
            {"table": table.name, "asked": [a._asdict() for a in asked], "fates": [f._asdict() for f in fates]}
        )
        print(text, "\n", file=sys.stderr, flush=True)
    text = f"{arguments.seeds} seeds.\n\n" + "\n\n".join(lines)
    tell_result(text, record, name=arguments.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="`metamathqa`, or recordings made by racing.py record")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
    parser.add_argument("--seeds", type=int, default=20, metavar="K")
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    if "metamathqa" in arguments.tables and arguments.data_dir is None:
        parser.error("name the folder that holds peft_metamathqa with --data-dir or AUTOPEFT_DATA_DIR")
    return arguments


def _read(name: str, data_dir: Path | None) -> Table:
    if name == "metamathqa":
        assert data_dir is not None
        return read_metamathqa(Path(data_dir), objectives=("quality", "vram"), rungs=_METAMATHQA_RUNGS)
    return read_table(Path(name), Path(name).stem)


def measure(table: Table, num_seeds: int) -> tuple[list[Asked], list[Fate]]:
    # Configurations set by hand have no space to suggest from: they come in an order drawn by the seed.
    source: Source = "one by one" if table.is_listed else "chosen"
    search = OurSearch(source=source)
    asked, fates = [], []
    reference = table.recording.curves.reference
    for seed in range(num_seeds):
        part = draw_part(table, seed)
        for share in SHARES:
            trials = search.search(part, seed, share)
            model = GainModel(trials, reference)
            fates.append(_find_fate(part, trials))
            if not model.can_tell:
                continue
            for more in MORE:
                gain = model.estimate(more * share * part.total_seconds)
                later = GainModel(search.search(part, seed, share * (1 + more)), reference)
                asked.append(Asked(share, more, *gain, later.volume / model.volume - 1))
    return asked, fates


def _find_fate(table: Table, trials: Sequence[Trial]) -> Fate:
    """What the stopped ones would have been, each alone beside the complete ones."""
    reference = table.recording.curves.reference
    stopped = [trial for trial in trials if trial.state == "stopped"]
    ends = {trial.number: table.curves[table.index_of[trial.spec.key()]] for trial in trials}

    def point(trial: Trial) -> list[float]:
        curve = ends[trial.number]
        return scale_point(curve.rungs[-1].quality, curve.cost, reference)

    complete = np.array([point(trial) for trial in trials if trial.state == "complete"]).reshape(-1, len(reference))
    members = sum(
        not ends[trial.number].failed and not (complete <= np.array(point(trial))).all(axis=1).any()
        for trial in stopped
    )
    return Fate(len(stopped), count_lost_members(trials, table.rungs, reference), members)


def describe(table: Table, asked: Sequence[Asked], fates: Sequence[Fate]) -> str:
    lines = [
        f"**{table.name}**: {len(table.curves)} configurations.",
        "",
        "| budget | more | expected | realised | realised within low and high |",
        "|--:|--:|--:|--:|--:|",
    ]
    for share in SHARES:
        for more in MORE:
            found = [one for one in asked if (one.share, one.more) == (share, more)]
            if not found:
                continue
            inside = statistics.fmean(one.low - 1e-9 <= one.realised <= one.high + 1e-9 for one in found)
            lines.append(
                f"| 1/{round(1 / share)} | +{more:.0%} | {statistics.fmean(one.expected for one in found):.2%} "
                f"| {statistics.fmean(one.realised for one in found):.2%} | {inside:.0%} |"
            )
    ratios = [one.realised / one.expected for one in asked if one.expected > 0]
    low, middle, high = np.quantile(ratios, [0.1, 0.5, 0.9])
    lines += ["", f"Realised over expected: {middle:.2f} in the median, four in five from {low:.2f} to {high:.2f}."]
    total = sum(fate.stopped for fate in fates)
    lines += [
        "",
        f"Of {total} trials that were stopped, {sum(fate.expected_members for fate in fates):.1f} were expected to "
        f"have been on the front had they gone on, and {sum(fate.members for fate in fates)} would have been.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
