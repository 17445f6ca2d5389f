"""What finding a recording's whole front takes at least: for who knows it beforehand, and for who knows each
configuration's end from its first score.

    python benchmarks/foresight.py benchmarks/results/table-*-minilm.npz --out foresight

Shares of the device time of training everything, medians over the random three quarters that searchers are measured on
(`search_replay.py`). The first trains the front's members and nothing else. The second begins everything, since it
knows nothing of what has no score, and takes the members alone to their end, in one stretch.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from tables import Table, draw_part, read_table
from written import tell_result


class Bound(NamedTuple):
    """Shares of the device time of all."""

    members: float
    first_scores: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", type=Path, nargs="+", help="recordings made by racing.py record")
    parser.add_argument("--seeds", type=int, default=20, metavar="K")
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    lines = ["| recording | the front's members alone | everything's first score, and the members |", "|---|--:|--:|"]
    record = {}
    for path in arguments.tables:
        table = read_table(path, path.stem)
        bound = find_median([measure(draw_part(table, seed)) for seed in range(arguments.seeds)])
        name = f"{table.recording.curves.config.task_name}, {len(table.curves)}"
        lines.append(f"| {name} | {bound.members:.3f} | {bound.first_scores:.3f} |")
        record[name] = bound._asdict()
    tell_result("\n".join(lines), record, name=arguments.out)


def measure(table: Table) -> Bound:
    last = len(table.rungs) - 1
    everything = range(len(table.curves))
    members = sum(table.count_seconds(index, 0, last) for index in table.front)
    begun = sum(table.count_seconds(index, 0, 0) for index in everything)
    ended = sum(table.count_seconds(index, 1, last) for index in table.front)
    return Bound(members / table.total_seconds, (begun + ended) / table.total_seconds)


def find_median(bounds: Sequence[Bound]) -> Bound:
    return Bound(*(statistics.median(values) for values in zip(*bounds, strict=True)))


if __name__ == "__main__":
    main()
