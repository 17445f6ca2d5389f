"""How long estimates take and how much memory they need: a 7B and a 70B Llama, and spaces of 50 configurations on each.

Each scenario runs in a fresh process, which tells of its start-up (imports) apart from the estimate itself, and of its
peak resident memory. Only configurations are needed: no weights, no network, no GPU.

    python benchmarks/estimate_speed.py --out estimate-speed
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from machine import describe_machine

RESULTS = Path(__file__).parent / "results"
LLAMAS: dict[str, dict[str, int]] = {
    "7B": {
        "vocab_size": 32_000, "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 32,
    },
    "70B": {
        "vocab_size": 128_256, "hidden_size": 8192, "intermediate_size": 28_672, "num_hidden_layers": 80,
        "num_attention_heads": 64, "num_key_value_heads": 8,
    },
}  # fmt: skip
"""Llama-2-7B's shape and Llama-3-70B's."""


class Scenario(NamedTuple):
    title: str
    model: str
    arguments: tuple[str, ...]
    """Of `autopeft estimate`, beside the model."""
    most_seconds: float
    most_bytes: int | None = None


SCENARIOS = (
    Scenario("7B, LoRA", "7B", ("--method", "lora", "--rank", "16"), 5),
    Scenario("7B, LoRA, 4 bits", "7B", ("--method", "lora", "--rank", "16", "--bits", "4"), 5),
    Scenario("70B, LoRA", "70B", ("--method", "lora", "--rank", "16"), 10, 4 * 10**9),
    Scenario("70B, LoRA, 4 bits", "70B", ("--method", "lora", "--rank", "16", "--bits", "4"), 10, 4 * 10**9),
    Scenario("7B, space default, 50 configurations", "7B", ("--space", "default", "--count", "50"), 60),
    Scenario("7B, space everything, 50 configurations", "7B", ("--space", "everything", "--count", "50"), 60),
    Scenario("70B, space default, 50 configurations", "70B", ("--space", "default", "--count", "50"), 60, 4 * 10**9),
)


class Timing(NamedTuple):
    startup_seconds: float
    """Until everything is imported."""
    seconds: float
    """The command from there on, printing included."""
    cpu_seconds: float
    """The processor's share of that: what a machine that is not shared takes, as one thread works."""
    peak_bytes: int
    num_configurations: int


def measure(scenario: Scenario) -> Timing:
    """In a process of its own."""
    with tempfile.TemporaryDirectory(prefix="autopeft-speed-") as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps({"model_type": "llama", **LLAMAS[scenario.model]}), encoding="utf-8")
        arguments = ["estimate", "--model", str(config), *scenario.arguments, "--json"]
        command = [sys.executable, __file__, "--child", json.dumps(arguments)]
        environment = os.environ | {"HF_HUB_OFFLINE": "1"}
        output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    return Timing(**json.loads(output.splitlines()[-1]))


def run_child(arguments: list[str]) -> None:
    import contextlib
    import io

    started = time.perf_counter()
    import autopeft.backends.hf.cost
    import autopeft.backends.hf.fake_quantized  # noqa: F401
    from autopeft.cli.main import main

    imported, processor = time.perf_counter(), time.process_time()
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(arguments)
    ended, processor = time.perf_counter(), time.process_time() - processor
    if code != 0:
        raise SystemExit(code)
    rows = json.loads(printed.getvalue())
    timing = Timing(
        startup_seconds=imported - started,
        seconds=ended - imported,
        cpu_seconds=processor,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        num_configurations=sum("estimate" in row for row in rows),
    )
    print(json.dumps(timing._asdict()))


def render(timings: dict[Scenario, list[Timing]], threads: str) -> str:
    machine = describe_machine()
    lines = [
        "# How long estimates take",
        "",
        f"`python benchmarks/estimate_speed.py`: medians of {len(next(iter(timings.values())))} processes each, "
        f"{threads} threads. {machine['processor']}, {machine['cores']} cores; torch {machine['torch']}, transformers "
        f"{machine['transformers']}, peft {machine['peft']}. Start-up is importing them. Batch 4 x 512 "
        "tokens, modelled for CUDA.",
        "",
        "| scenario | estimated | start-up, s | estimate, s | processor, s | target, s | memory, GB | target, GB |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for scenario, runs in timings.items():
        most = "" if scenario.most_bytes is None else f"{scenario.most_bytes / 1e9:.0f}"
        lines.append(
            f"| {scenario.title} | {runs[0].num_configurations} "
            f"| {statistics.median(run.startup_seconds for run in runs):.1f} "
            f"| {statistics.median(run.seconds for run in runs):.1f} "
            f"| {statistics.median(run.cpu_seconds for run in runs):.1f} | {scenario.most_seconds:.0f} "
            f"| {max(run.peak_bytes for run in runs) / 1e9:.2f} | {most} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3, help="processes a scenario (default: 3)")
    parser.add_argument("--only", default="", help="scenarios whose title holds this")
    parser.add_argument("--out", default="", help="name under results/; without it the table is printed alone")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        run_child(json.loads(args.child))
        return
    timings: dict[Scenario, list[Timing]] = {}
    for scenario in SCENARIOS:
        if args.only in scenario.title:
            timings[scenario] = [measure(scenario) for _ in range(args.repeat)]
            print(
                scenario.title,
                *(f"{run.seconds:.1f} s ({run.cpu_seconds:.1f})" for run in timings[scenario]),
                flush=True,
            )
    text = render(timings, os.environ.get("OMP_NUM_THREADS", "all"))
    print(text)
    if args.out:
        (RESULTS / f"{args.out}.md").write_text(text, encoding="utf-8")
        records: list[dict[str, Any]] = [
            {"scenario": scenario.title, "runs": [run._asdict() for run in runs]} for scenario, runs in timings.items()
        ]
        (RESULTS / f"{args.out}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
