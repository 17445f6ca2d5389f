"""Runs the checks of tests/export in the trainers' environments and prints what they said, as Markdown.

    PYTHONPATH=tests python tests/export/run_checks.py VENVS

`make export-check` makes the environments and the cases. Exits with 1 where a check failed.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from own_environments import run_check

HERE = Path(__file__).resolve().parent


class Check(NamedTuple):
    target: str
    environment: str
    script: str
    arguments: tuple[str, ...]
    packages: tuple[str, ...]


CHECKS = (
    Check("peft", "trl", "check_peft.py", ("peft",), ("peft", "transformers", "torch")),
    Check("trainer", "trl", "check_peft.py", ("trainer",), ("peft", "transformers", "torch")),
    Check("trl", "trl", "check_trl.py", (), ("trl", "transformers", "peft", "torch")),
    Check(
        "llama-factory",
        "llama-factory",
        "check_llama_factory.py",
        (),
        ("llamafactory", "transformers", "peft", "torch"),
    ),
    Check("axolotl", "axolotl", "check_axolotl.py", (), ("axolotl", "transformers", "peft", "torch")),
    Check("ms-swift", "ms-swift", "check_ms_swift.py", (), ("ms-swift", "transformers", "peft", "torch")),
    Check("unsloth", "unsloth", "check_unsloth.py", (), ("unsloth", "pydantic")),
)


def run(check: Check, venvs: Path) -> tuple[int, list[str], str]:
    """(exit code, lines that the check printed of itself, versions)."""
    script = HERE / check.script
    answer = run_check(venvs / check.environment, script, venvs / "cases", *check.arguments, packages=check.packages)
    heads = (
        "FAILED",
        *(f"{name}:" for name in ("peft", "trainer", "TRL", "LLaMA-Factory", "Axolotl", "ms-swift", "Unsloth")),
    )
    lines = [line for line in answer.lines if line.startswith(heads)]
    return answer.code, lines or [answer.last_error], answer.versions


def main(venvs: Path) -> int:
    log = (venvs / "cases.log").read_text(encoding="utf-8").splitlines()
    print("# What each trainer's own parser says of exports\n")
    print("`make export-check`: every method, base width and kind of task, and variants of LoRA and of the training,")
    print("exported on a tiny BERT and a tiny Llama; no GPU.\n")
    print("| target | read with | files | passed | refused with a reason |")
    print("|---|---|---|---|---|")
    details, failed = [], 0
    for check in CHECKS:
        code, lines, versions = run(check, venvs)
        failed |= code
        counts = next(line for line in log if line.startswith(f"{check.target}: ")).split()
        passed = lines[-1].split(": ", 1)[-1].split(" of ")[0] if " files passed" in lines[-1] else "0"
        print(f"| {check.target} | {versions} | {counts[1]} | {passed} | {counts[3]} |")
        details += [f"## {check.target}\n", *(f"- {line.split(': ', 1)[-1]}" for line in lines), ""]
    print("\n" + "\n".join(details).rstrip())
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
