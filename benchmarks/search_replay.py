"""Searches against recorded learning curves: ours and what else one would use, on the same budget.

    python benchmarks/search_replay.py metamathqa                      # the 63 real runs in --data-dir
    python benchmarks/search_replay.py metamathqa --objectives quality,vram,params
    python benchmarks/search_replay.py metamathqa --halves             # settings chosen on one half, tried on the other
    python benchmarks/search_replay.py benchmarks/results/curves-sst2-minilm.npz

Hypervolumes are shares of what training everything gives, budgets shares of what that takes. Of a recording of ours
every seed plays another random three quarters: a search that chooses by its expectations hardly depends on a seed, and
on one table it would be measured once. `--docs` writes the table and the figure into docs/search.md.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from peers import PEERS, is_installed, play
from searchers import OurSearch, Source, Trace, ended_by, volume_at
from svg import draw_lines
from tables import PART, Table, choose_since, draw_part, read_metamathqa, read_table
from written import tell_result

from autopeft.records import to_record
from autopeft.search.front import parse_objectives
from autopeft.search.racing import LearnedRacing

DOCS = Path(__file__).parent.parent / "docs"
SHARES = (1 / 20, 1 / 10, 1 / 6, 1 / 5, 1 / 3, 1 / 2)
"""Budgets."""
ENOUGH = 0.99
"""Of the hypervolume."""
METAMATHQA_RUNGS = (250, 500, 1000, 2000, 5000)
"""Doubling, as far as the full length lets them: nothing was recorded before step 250."""
FRONT_AT = SHARES.index(1 / 6)
"""Where the front's members are counted."""
GAP_AT = SHARES.index(1 / 5)
"""Where quality is compared with the best there is."""
_LEAST_COMPLETED = (3, 4, 5, 6)
_WIDENINGS = (0.5, 1.0, 1.5, 2.0)


def main() -> None:
    arguments = _parse_arguments()
    table = _read(arguments)
    if arguments.halves:
        text, record = compare_halves(table, arguments.seeds)
    else:
        rows = compare(table, arguments.seeds, arguments.peers)
        text, record = describe_table(table, rows, arguments.seeds), to_record(rows)
        if arguments.since:
            text = f"The recipes, and what was recorded after the first {arguments.since}: {text}"
    tell_result(text, record, name=arguments.out)
    if arguments.docs:
        put_into_docs(DOCS / "search.md", arguments.docs, text)
        if not arguments.halves:
            figure = draw(table, rows)
            (DOCS / "search").mkdir(exist_ok=True)
            (DOCS / "search" / f"{arguments.docs}.svg").write_text(figure, encoding="utf-8")


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", help="`metamathqa`, or a recording made by racing.py record")
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
    parser.add_argument("--objectives", default=None, help="of a study; quality,vram for metamathqa")
    parser.add_argument("--seeds", type=int, default=20, metavar="K")
    parser.add_argument("--peers", nargs="*", choices=list(PEERS), default=None, help="all that are installed")
    parser.add_argument("--since", type=int, default=0, metavar="N",
                        help="only recipes and what was recorded after the first N configurations")  # fmt: skip
    parser.add_argument("--halves", action="store_true", help="choose settings on random halves of the table")
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    parser.add_argument("--docs", metavar="NAME", help="fill the place NAME in docs/search.md, and its figure")
    arguments = parser.parse_args()
    missing = [name for name in PEERS if not is_installed(name)]
    if arguments.peers is None:
        arguments.peers = [name for name in PEERS if name not in missing]
        print("".join(f"Left out, for it is not installed: {name}.\n" for name in missing), end="", file=sys.stderr)
    elif set(arguments.peers) & set(missing):
        parser.error(f"not installed: {', '.join(missing)}. Say pip install syne-tune, or name other --peers")
    if arguments.table == "metamathqa" and arguments.data_dir is None:
        parser.error("name the folder that holds peft_metamathqa with --data-dir or AUTOPEFT_DATA_DIR")
    if arguments.since < 0 or (arguments.since and arguments.table == "metamathqa"):
        parser.error("--since takes a number of configurations, of a recording made by racing.py record")
    if arguments.seeds < 2 and not arguments.halves:
        parser.error("--seeds takes at least 2: searchers are compared with a standard error")
    if arguments.halves and arguments.table != "metamathqa":
        parser.error("--halves is for tables without per-example losses, whose noise scale has settings")
    return arguments


def _read(arguments: argparse.Namespace) -> Table:
    if arguments.table == "metamathqa":
        objectives = parse_objectives(arguments.objectives or "quality,vram")
        return read_metamathqa(Path(arguments.data_dir), objectives=objectives, rungs=METAMATHQA_RUNGS)
    path = Path(arguments.table)
    table = read_table(
        path, path.stem, objectives=parse_objectives(arguments.objectives) if arguments.objectives else None
    )
    return choose_since(table, arguments.since) if arguments.since else table


# --- measure


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One searcher's figures: medians over the seeds."""

    searcher: str
    times_cheaper: float | None
    """Than training everything, at the searcher's own end; None for one that ends where its budget does."""
    end_volume: float
    """Share of the hypervolume at that end, or with the largest budget."""
    end_front: float
    """Members of the true front that were trained to their end by then."""
    true_front: float
    """How many there are."""
    volumes: tuple[float, ...]
    """Share of the hypervolume at each of SHARES."""
    volumes_by_seed: tuple[tuple[float, ...], ...]
    """(seeds, SHARES)"""
    fronts: tuple[float, ...]
    """Members of the true front that were trained to their end, at each of SHARES."""
    enough_share: float | None
    """Share of the whole budget that ENOUGH of the hypervolume took; None where most seeds never had it."""
    quality_gap: float
    """Final quality that the best one found lacks to the best there is, at GAP_AT: the mean over the seeds."""


class End(NamedTuple):
    """Of one search, where it ended by itself or with its budget."""

    times_cheaper: float
    volume: float
    front: int
    """Members of the true front that were trained to their end."""
    true_front: int
    """How many there are."""


class Played(NamedTuple):
    """One seed's traces: `at` holds one for each of SHARES where the searcher plans for its budget."""

    table: Table
    whole: Trace | None
    at: Sequence[Trace]


def compare(table: Table, num_seeds: int, peers: Sequence[str]) -> list[Row]:
    if table.is_listed:
        ours: list[tuple[str, Source, bool]] = [
            ("autopeft", "given", True), ("autopeft, to its end", "given", False),
            ("autopeft, one by one", "one by one", False),
        ]  # fmt: skip
    else:
        # Of a space drawn at random nobody would train everything.
        ours = [("autopeft", "chosen", True), ("autopeft, random arrival", "one by one", True),
                ("Optuna TPE, raced by autopeft", "tpe", True)]  # fmt: skip
    tables = [draw_part(table, seed) for seed in range(num_seeds)]
    rows = []
    for name, source, clocked in ours:
        search = OurSearch(source=source)
        rows.append(_measure(name, [_play_ours(search, part, seed, clocked) for seed, part in enumerate(tables)]))
        print(f"{name} played.", file=sys.stderr)
    for name in peers:
        traces = [play(PEERS[name], part, seed) for seed, part in enumerate(tables)]
        played = [Played(part, one, [one] * len(SHARES)) for part, one in zip(tables, traces, strict=True)]
        rows.append(_measure(name, played))
        print(f"{name} played.", file=sys.stderr)
    return rows


def _play_ours(search: OurSearch, table: Table, seed: int, clocked: bool) -> Played:
    if clocked:
        return Played(table, None, [search.play(table, seed, share) for share in SHARES])
    whole = search.play(table, seed)
    return Played(table, whole, [whole] * len(SHARES))


def _measure(name: str, played: Sequence[Played]) -> Row:
    ends = [_find_end(one.table, one.whole or one.at[-1]) for one in played]
    enough = [_find_enough(one) for one in played]
    volumes = tuple(
        tuple(volume_at(one.table, trace, share) for trace, share in zip(one.at, SHARES, strict=True)) for one in played
    )
    return Row(
        searcher=name,
        times_cheaper=statistics.median(end.times_cheaper for end in ends)
        if all(one.whole for one in played)
        else None,
        end_volume=statistics.median(end.volume for end in ends),
        end_front=statistics.median(end.front for end in ends),
        true_front=statistics.median(end.true_front for end in ends),
        volumes=tuple(map(statistics.median, zip(*volumes, strict=True))),
        volumes_by_seed=volumes,
        fronts=tuple(
            statistics.median(len(one.table.front & set(ended_by(one.table, one.at[place], share))) for one in played)
            for place, share in enumerate(SHARES)
        ),
        enough_share=None if statistics.median(enough) > 1 else statistics.median(enough),
        quality_gap=statistics.mean(_gap_at(one.table, one.at[GAP_AT], SHARES[GAP_AT]) for one in played),
    )


def _find_end(table: Table, trace: Trace) -> End:
    kept = [ended.place for ended in trace.ended if ended.at_seconds <= trace.own_end_seconds]
    return End(
        table.total_seconds / trace.own_end_seconds,
        table.volume(kept) / table.total_volume,
        len(table.front & set(kept)),
        len(table.front),
    )


def _gap_at(table: Table, trace: Trace, share: float) -> float:
    """To the best final quality of the table, from the majority class's where nothing has ended yet."""
    floor = table.recording.curves.config.majority_quality
    qualities = [floor if (quality := curve.final_quality) is None else quality for curve in table.curves]
    return max(qualities) - max((qualities[place] for place in ended_by(table, trace, share)), default=floor)


def _find_enough(played: Played) -> float:
    """The least share at which ENOUGH was had; above 1 for never."""
    if played.whole is None:
        shares = [share for share, trace in zip(SHARES, played.at, strict=True)
                  if volume_at(played.table, trace, share) >= ENOUGH]  # fmt: skip
        return min(shares, default=2.0)
    for ended in played.whole.ended:
        share = ended.at_seconds / played.table.total_seconds
        if volume_at(played.table, played.whole, share) >= ENOUGH:
            return share
    return 2.0


# --- halves


def compare_halves(table: Table, num_seeds: int) -> tuple[str, object]:
    """The noise scale's settings chosen on one random half: the cheapest that keeps ENOUGH there. Then the others."""
    chosen: dict[tuple[int, float], int] = {}
    tuned, other, shipped = [], [], []
    for seed in range(num_seeds):
        order = random.Random(seed).sample(range(len(table.curves)), len(table.curves))
        middle = len(order) // 2
        halves = [table.choose(sorted(part), "half") for part in (order[:middle], order[middle:])]
        grid = {setting: _race_half(halves[0], LearnedRacing(least_completed=setting[0], widening=setting[1]))
                for setting in product(_LEAST_COMPLETED, _WIDENINGS)}  # fmt: skip
        best = max(grid, key=lambda setting: (grid[setting].volume >= ENOUGH, grid[setting].times_cheaper))
        chosen[best] = chosen.get(best, 0) + 1
        tuned.append(grid[best])
        other.append(_race_half(halves[1], LearnedRacing(least_completed=best[0], widening=best[1])))
        shipped.append(_race_half(halves[1], LearnedRacing()))
    usual = max(chosen, key=lambda setting: (chosen[setting], setting))
    whole = _race_half(table, LearnedRacing(least_completed=usual[0], widening=usual[1]))
    lines = [
        f"{num_seeds} random halves of {len(table.curves)} runs, objectives {', '.join(table.objectives)}; medians.",
        "",
        "| | times cheaper | hypervolume | share of the front |",
        "|---|--:|--:|--:|",
        _half_line("half that settings were chosen on", tuned),
        _half_line("the other half, the same settings", other),
        _half_line("the other half, as shipped", shipped),
        _half_line(f"all runs, what was chosen most often ({usual[0]} completed, widening {usual[1]:g})", [whole]),
        _half_line("all runs, as shipped", [_race_half(table, LearnedRacing())]),
    ]
    record = {"chosen": [[*setting, count] for setting, count in sorted(chosen.items())], "lines": lines}
    return "\n".join(lines), record


def _race_half(half: Table, rule: LearnedRacing) -> End:
    return _find_end(half, OurSearch(racing=rule).play(half, 0))


def _half_line(title: str, ends: Sequence[End]) -> str:
    cheaper = statistics.median(end.times_cheaper for end in ends)
    volume = statistics.median(end.volume for end in ends)
    front = statistics.median(end.front / end.true_front for end in ends)
    return f"| {title} | {cheaper:.2f} | {volume:.4f} | {front:.2f} |"


# --- tell


def describe_table(table: Table, rows: Sequence[Row], num_seeds: int) -> str:
    curves = table.recording.curves
    failed = sum(curve.failed is not None for curve in table.curves)
    lines = [
        f"{len(table.curves)} configurations ({failed} failed), {curves.config.model} on {curves.config.task_name}, "
        f"rungs {', '.join(map(str, table.rungs))}; objectives {', '.join(table.objectives)}; "
        f"{len(table.front)} on the front; {table.total_seconds / 3600:.2f} device-hours for all. "
        f"Medians over {num_seeds} seeds{_say_part(table)}.",
        "",
        "| searcher | times cheaper at its own end | hypervolume there | of the front | "
        + " | ".join(f"at 1/{round(1 / share)}" for share in SHARES)
        + f" | of the front at 1/{round(1 / SHARES[FRONT_AT])} | budget for {ENOUGH} "
        f"| quality lacking at 1/{round(1 / SHARES[GAP_AT])} |",
        "|---|" + "--:|" * (6 + len(SHARES)),
    ]
    for row in rows:
        cheaper = "-" if row.times_cheaper is None else f"{row.times_cheaper:.2f}"
        enough = "never" if row.enough_share is None else f"{row.enough_share:.3f}"
        volumes = " | ".join(f"{volume:.3f}" for volume in row.volumes)
        lines.append(
            f"| {row.searcher} | {cheaper} | {row.end_volume:.4f} | {row.end_front:g} of {row.true_front:g} "
            f"| {volumes} | {row.fronts[FRONT_AT]:g} | {enough} | {row.quality_gap:.3f} |"
        )
    return "\n".join([*lines, "", *_compare_pairs(rows)])


def _compare_pairs(rows: Sequence[Row]) -> list[str]:
    """The first row's searcher and each of the others on the same seeds."""
    ours, *others = rows
    lines = [
        f"Hypervolume that {ours.searcher} has more than each with the same seed: means and their standard errors.",
        "",
        "| more than | " + " | ".join(f"at 1/{round(1 / share)}" for share in SHARES) + " |",
        "|---|" + "--:|" * len(SHARES),
    ]
    for other in others:
        pairs = zip(zip(*ours.volumes_by_seed, strict=True), zip(*other.volumes_by_seed, strict=True), strict=True)
        gaps = [[one - two for one, two in zip(*pair, strict=True)] for pair in pairs]
        cells = [f"{statistics.fmean(gap):+.3f} ± {statistics.stdev(gap) / len(gap) ** 0.5:.3f}" for gap in gaps]
        lines.append(f"| {other.searcher} | " + " | ".join(cells) + " |")
    return lines


def _say_part(table: Table) -> str:
    if table.is_listed:
        return ""
    return f", each on another random {round(PART * len(table.curves))} of them"


def draw(table: Table, rows: Sequence[Row]) -> str:
    lines = {row.searcher: [*zip(SHARES, row.volumes, strict=True)] for row in rows}
    lowest = min(volume for row in rows for volume in row.volumes)
    floor = max(0.0, min(0.9, int(lowest * 10) / 10))
    return draw_lines(
        f"{table.name}: {', '.join(table.objectives)}",
        "budget, as a share of training everything",
        "hypervolume, as a share of what that gives",
        lines,
        x_range=(SHARES[0], SHARES[-1]),
        y_range=(floor, 1.0),
        x_ticks=SHARES,
        y_ticks=[round(floor + step * (1 - floor) / 5, 3) for step in range(6)],
    )


def put_into_docs(path: Path, place: str, text: str) -> None:
    """Replaces what stands between the two comments that name the place."""
    begin, end = f"<!-- {place} -->\n", f"<!-- end of {place} -->"
    before, _, rest = path.read_text(encoding="utf-8").partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        sys.exit(f"{path} has no place '{place}': write {begin.strip()} and {end} where the table belongs.")
    path.write_text(before + begin + text + "\n" + end + after, encoding="utf-8")


if __name__ == "__main__":
    main()
