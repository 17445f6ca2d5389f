"""Trials a minute: this system against the scripts a user would write instead, on the same configurations.

    python benchmarks/throughput.py                       # the full comparison
    python benchmarks/throughput.py --configurations 3 --steps 20 --validation 200   # a quick look

Each system runs in a fresh process, one after another, on the CPU; README.md says what each does. What racing adds is
measured by racing.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from configurations import PLAIN_PEFT, describe, draw_specs, limit_rows
from listed_search import Asked, plan_listed
from machine import MemoryWatch, describe_machine
from systems import SYSTEMS, Job, Result

from autopeft.records import from_record, to_record

RESULTS = Path(__file__).parent / "results"
TARGETS = {"plain": 2.5, "careful": 1.3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One run of one system, as seen from outside."""

    system: str
    wall_seconds: float
    """From the process's start to its end, imports included."""
    peak_pss_bytes: int
    high_water_bytes: int
    result: Result


def main() -> None:
    arguments = _parse_arguments()
    # All three systems train on the CPU, also where there is a GPU; children inherit it.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as name:
        job = _make_job(arguments, Path(name))
        runs = []
        for turn in range(arguments.repeat):
            for system in rotate(arguments.systems, turn):
                print(f"{system} ({turn + 1} of {arguments.repeat}) ...", file=sys.stderr, flush=True)
                runs.append(measure(system, job, Path(name)))
    table = make_table(job, runs)
    print(table)
    if arguments.out:
        write_results(arguments.out, job, runs, table)


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configurations", type=int, default=12, metavar="N")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--validation", type=int, default=1000, metavar="ROWS", help="search-validation rows, at most")
    parser.add_argument("--seed", type=int, default=0, help="of configurations, splits and trials")
    parser.add_argument(
        "--repeat", type=int, default=1, help="runs of each system, in rotating order; medians are told"
    )
    parser.add_argument("--workers", type=int, help="of autopeft; one a core unless given")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--data-dir", type=Path, default=os.environ.get("AUTOPEFT_DATA_DIR"))
    parser.add_argument("--out", metavar="NAME", help="write results/NAME.json and results/NAME.md")
    arguments = parser.parse_args()
    if arguments.data_dir is None:
        parser.error("name the folder that holds sst2/train.jsonl with --data-dir or AUTOPEFT_DATA_DIR")
    return arguments


def _make_job(arguments: argparse.Namespace, folder: Path) -> Job:
    data_dir = limit_rows(
        arguments.data_dir.resolve(), "sst2", arguments.validation, folder / "data", seed=arguments.seed
    )
    asked = Asked("sst2", str(data_dir), arguments.steps, arguments.seed, methods=PLAIN_PEFT, bits=32)
    space = plan_listed(asked).space
    specs = draw_specs(space, arguments.configurations, max_steps=arguments.steps, seed=arguments.seed)
    return Job(
        task="sst2", data_dir=str(data_dir), seed=arguments.seed, steps=arguments.steps, workers=arguments.workers,
        specs=tuple(specs),
    )  # fmt: skip


def rotate(systems: Sequence[str], turn: int) -> list[str]:
    """Another one first each turn: a machine that warms up or is shared then disfavours none."""
    start = turn % len(systems)
    return [*systems[start:], *systems[:start]]


def measure(system: str, job: Job, folder: Path) -> Measured:
    """Runs the system in a process of its own. Raises RuntimeError with its last words where it fails."""
    job_file, result_file, log_file = (folder / f"{system}.{kind}" for kind in ("job", "result", "log"))
    job_file.write_text(json.dumps(to_record(job)), encoding="utf-8")
    script = Path(__file__).with_name("systems.py")
    with log_file.open("w") as log:
        started = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, str(script), system, str(job_file), str(result_file)],
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        watch = MemoryWatch(process.pid)
        code = process.wait()
        seconds = time.monotonic() - started
    watch.stop()
    if code != 0:
        raise RuntimeError(f"{system} ended with status {code}: {log_file.read_text()[-3000:]}")
    return Measured(
        system=system,
        wall_seconds=seconds,
        peak_pss_bytes=watch.peak_pss_bytes,
        high_water_bytes=watch.high_water_bytes,
        result=from_record(Result, json.loads(result_file.read_text(encoding="utf-8")), system),
    )


# --- what is printed


def make_table(job: Job, runs: Sequence[Measured]) -> str:
    systems = [system for system in SYSTEMS if any(run.system == system for run in runs)]
    by_system = {system: [run for run in runs if run.system == system] for system in systems}
    count = len(job.specs)
    lines = [
        f"{count} configurations, {job.steps} steps of 16, sst2, MiniLM; medians of {len(by_system[systems[0]])} "
        "run(s) a system.",
        "",
        "| system | trials/min | autopeft is | trials/min, start-up apart | autopeft is | wall s | peak memory (PSS) "
        "| sum of VmHWM | mean accuracy |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    rates = {system: (_median_rate(by_system[system], count), _median_rate(by_system[system], count, inner=True))
             for system in systems}  # fmt: skip
    for system in systems:
        found = by_system[system]
        wall = statistics.median(run.wall_seconds for run in found)
        pss, high = (
            statistics.median(getattr(run, name) for run in found) for name in ("peak_pss_bytes", "high_water_bytes")
        )
        scored = [quality for quality in found[0].result.qualities if quality is not None]
        ratios = [_ratio(rates, system, index) for index in (0, 1)]
        lines.append(
            f"| {system} | {rates[system][0]:.2f} | {ratios[0]} | {rates[system][1]:.2f} | {ratios[1]} | {wall:.0f} "
            f"| {pss / 2**20:.0f} MiB | {high / 2**20:.0f} MiB | {statistics.mean(scored):.4f} |"
        )
    return "\n".join([*lines, "", *_phase_lines(by_system), "", *_quality_lines(job, by_system), "", *_machine_lines()])


def _median_rate(runs: Sequence[Measured], count: int, *, inner: bool = False) -> float:
    return statistics.median(60 * count / (run.result.trials_seconds if inner else run.wall_seconds) for run in runs)


def _ratio(rates: dict[str, tuple[float, float]], system: str, index: int) -> str:
    if system == "autopeft" or "autopeft" not in rates:
        return ""
    ratio = rates["autopeft"][index] / rates[system][index]
    return f"{ratio:.2f}x (target {TARGETS[system]}x)"


def _phase_lines(by_system: dict[str, list[Measured]]) -> list[str]:
    lines = ["Seconds by phase, first run (autopeft: summed over its workers):", ""]
    for system, runs in by_system.items():
        phases = ", ".join(f"{name} {seconds:.1f}" for name, seconds in runs[0].result.phase_seconds.items())
        lines.append(f"- {system}: {phases}")
    return lines


def _quality_lines(job: Job, by_system: dict[str, list[Measured]]) -> list[str]:
    lines = [
        "Accuracy on the search-validation split, first run:",
        "",
        f"| configuration | {' | '.join(by_system)} |",
        "|---|" + "--:|" * len(by_system),
    ]
    for index, spec in enumerate(job.specs):
        qualities = [runs[0].result.qualities[index] for runs in by_system.values()]
        cells = ["failed" if quality is None else f"{quality:.3f}" for quality in qualities]
        lines.append(f"| {describe(spec)} | {' | '.join(cells)} |")
    return lines


def _machine_lines() -> list[str]:
    return ["; ".join(f"{name} {value}" for name, value in describe_machine().items())]


def write_results(name: str, job: Job, runs: Sequence[Measured], table: str) -> None:
    RESULTS.mkdir(exist_ok=True)
    record = {
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        # Without the data's folder: results are published.
        "job": {key: value for key, value in to_record(job).items() if key != "data_dir"},
        "runs": to_record(runs),
    }
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
