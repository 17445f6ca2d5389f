"""What the checks in the servers' own environments share. Standard library only: autopeft is not installed there."""

from __future__ import annotations

import json
import math
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

NUM_NEW = 16
NUM_LOGPROBS = 5
MOST_DIFFERENCE = 1e-3
"""Of a log-probability, in float32: kernels add in another order, and these models' logits reach some tens."""


class Answer(NamedTuple):
    new: list[int]
    """The likeliest continuation, as token ids; empty of a classifier."""
    logprobs: dict[int, float]
    """Of the likeliest first new tokens, or of all classes."""


class Case(NamedTuple):
    name: str
    folder: Path
    base: Path
    kind: str
    content: dict[str, Any]

    def prompts(self) -> list[str]:
        return [row["prompt"] for row in self.content["merged"]]

    def check_ids(self, found: list[list[int]]) -> None:
        """That the prompts become the tokens that they were in training."""
        for row, ids in zip(self.content["merged"], found, strict=True):
            assert ids == row["ids"], f"{row['prompt']!r} became {ids} instead of {row['ids']}"

    def check(self, which: str, answers: list[Answer]) -> str:
        """That the `merged` model, or the base with the `adapter`, answers as in plain transformers; in words."""
        largest = 0.0
        for row, answer in zip(self.content[which], answers, strict=True):
            assert answer.logprobs, "no probabilities"
            for token, value in answer.logprobs.items():
                difference = abs(value - row["logprobs"][token])
                assert math.isfinite(difference), f"{row['prompt']!r} has log-probability {value}"
                largest = max(largest, difference)
            assert answer.new == row["new"], f"{row['prompt']!r} went on {answer.new} instead of {row['new']}"
        assert largest <= MOST_DIFFERENCE, f"log-probabilities differ by {largest:.1e}"
        count = sum(len(answer.new) for answer in answers)
        tokens = f" and {count} tokens that follow" if count else ""
        distance = f"within {largest:.0e}" if largest else "equal"
        return f"{len(answers)} prompts{tokens} alike, log-probabilities {distance}"


def read_cases(folder: Path) -> Iterator[Case]:
    for name, content in json.loads((folder / "cases.json").read_text(encoding="utf-8")).items():
        yield Case(name, folder / name, Path(content["model"]), content["kind"], content)


def run(check: Callable[[Case], Iterator[tuple[str, str]]]) -> None:
    """Prints `CASE: what: words` of everything that a check yields; exits with 1 where one fails."""
    failed = False
    for case in read_cases(Path(sys.argv[1]).resolve()):
        try:
            for what, words in check(case):
                print(f"{case.name}: {what}: {words}", flush=True)
        except Exception as exc:
            failed = True
            traceback.print_exc()
            print(f"{case.name}: FAILED: {type(exc).__name__}: {str(exc).strip().splitlines()[-1]}", flush=True)
    sys.exit(failed)
