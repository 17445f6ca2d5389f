"""Does what did well on other tasks help on a new one? Searches of a recorded table with a warm start and without.

    python benchmarks/warm_start.py benchmarks/results/table-*.npz --seeds 20 --out warm-start
    python benchmarks/warm_start.py benchmarks/results/table-trec-minilm.npz --sources leaderboards/sst2/minilm.json

Each table is searched in turn, the other tables being the sources, all that was trained to its end on them, or the
leaderboards that `--sources` names; and with an earlier study of the same task as the source, which is what the part of
the table that a seed does not search comes to. The searches are the product's, on one worker with a simulated clock; a
configuration that was not recorded is answered by the nearest that was. Every seed searches another random part of the
table. Hypervolumes are shares of what training everything gives, budgets shares of what that takes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pool import make_pool
from searchers import OurSearch, volume_at
from tables import PART, Table, draw_part, read_table
from written import tell_result

from autopeft.records import WarmStart
from autopeft.report.priors import read_sources
from autopeft.search.plan import restore_space
from autopeft.search.warm_start import Source, Trained, choose_first

SHARES = (1 / 20, 1 / 10, 1 / 6, 1 / 5, 1 / 3, 1 / 2)


def main() -> None:
    arguments = _parse_arguments()
    tables = [read_table(path, path.stem) for path in arguments.tables]
    lines = [
        "| searched | sources | start | " + " | ".join(f"at 1/{round(1 / share)}" for share in SHARES) + " |",
        "|---|---|---|" + "--:|" * len(SHARES),
    ]
    record = []
    for table in tables:
        sources = read_sources(arguments.sources, Path()) if arguments.sources else []
        sources = sources or [make_source(other) for other in tables if other is not table]
        parts = [draw_part(table, seed) for seed in range(arguments.seeds)]
        earlier = [make_source(_leave_out(table, part)) for part in parts]
        cold = OurSearch(source="chosen")
        same = [
            replace(cold, warm_start=choose_recorded(part, [one])) for part, one in zip(parts, earlier, strict=True)
        ]
        others = ", ".join(source.title for source in sources)
        rows = [("recipes", "", [cold] * len(parts)), ("warm", f"the other {1 - PART:.0%} of {table.name}", same)]
        if sources:
            rows.append(("warm", others, [replace(cold, warm_start=choose_recorded(part, sources)) for part in parts]))
        for title, names, searches in rows:
            volumes = [measure(parts, searches, share) for share in SHARES]
            cells = " | ".join(f"{volume:.3f}" for volume in volumes)
            lines.append(f"| {_name(table)} | {names} | {title} | {cells} |")
            record.append({"searched": _name(table), "sources": names, "start": title, "volumes": volumes})
            print(f"{lines[-1]}", file=sys.stderr, flush=True)
    text = f"Medians over {arguments.seeds} seeds, each on another random {PART:.0%} of the table.\n\n" + "\n".join(
        lines
    )
    tell_result(text, record, name=arguments.out)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", type=Path, help="recordings of several tasks in one space")
    parser.add_argument("--seeds", type=int, default=20, metavar="K")
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    parser.add_argument("--sources", nargs="+", metavar="JSON", help="leaderboards instead of the other tables")
    return parser.parse_args()


def make_source(table: Table) -> Source:
    """All that was trained to its end, as a study of the whole table would have left it."""
    config = table.recording.curves.config
    return Source(
        title=table.name,
        task_name=config.task_name,
        model=config.model,
        majority_quality=config.majority_quality,
        trained=tuple(
            Trained(
                spec=curve.spec, quality=curve.rungs[-1].quality, num_seeds=1,
                peak_vram_bytes=curve.cost.peak_vram_bytes, trainable_parameters=curve.cost.trainable_parameters,
            )
            for curve in table.curves
            if curve.failed is None
        ),
    )  # fmt: skip


def _leave_out(table: Table, part: Table) -> Table:
    return table.choose([place for key, place in table.index_of.items() if key not in part.index_of], table.name)


def choose_recorded(table: Table, sources: Sequence[Source]) -> WarmStart:
    """The portfolio, each configuration replaced by the nearest that the table holds."""
    config = table.recording.curves.config
    space = restore_space(config)
    warm = choose_first(sources, space, objectives=config.objectives, max_steps=config.rungs[-1], seed=config.seed)
    pool, unused, first = make_pool(table), set(range(len(table.curves))), []
    for spec in warm.first:
        answers = space.params(spec)
        assert answers is not None
        nearest = pool.find_nearest(answers, unused)
        unused.remove(nearest)
        first.append(table.curves[nearest].spec)
    return WarmStart(sources=warm.sources, first=tuple(first), weighed=warm.weighed)


def measure(parts: Sequence[Table], searches: Sequence[OurSearch], share: float) -> float:
    """The median share of the hypervolume that was had by the end of the budget, over a search of each part."""
    return statistics.median(
        volume_at(part, search.play(part, seed, share), share)
        for seed, (part, search) in enumerate(zip(parts, searches, strict=True))
    )


def _name(table: Table) -> str:
    return table.recording.curves.config.task_name


if __name__ == "__main__":
    main()
