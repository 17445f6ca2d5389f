"""What the checks in the trainers' own environments share. Standard library only: autopeft is not installed there."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

Expected = dict[str, Any]
"""`peft`: the adapter's configuration; `rows`: the first rows' tokens; `kind`; `bits`."""


def run(title: str, target: str, check: Callable[[Path, Expected], str]) -> None:
    """Checks every case of a target, prints what failed and one line of sum; exits with 1 where one failed."""
    root = Path(sys.argv[1]).resolve() / target
    failed, said = 0, {}
    cases = sorted(path.with_suffix("") for path in root.glob("*.json"))
    if not cases:
        sys.exit(f"{title}: no cases in {root}")
    for case in cases:
        os.chdir(case)
        try:
            words = check(case, json.loads(case.with_suffix(".json").read_text()))
            said[words] = said.get(words, 0) + 1
        except BaseException:
            failed += 1
            print(f"FAILED {case.name}")
            traceback.print_exc()
    for words, count in said.items():
        print(f"{title}: {count} files: {words}")
    print(f"{title}: {len(cases) - failed} of {len(cases)} files passed")
    sys.exit(bool(failed))


def compare(name: str, mine: Any, theirs: Any) -> None:
    assert mine == theirs, f"{name}: expected {mine!r}, got {theirs!r}"


COMPARED = ("r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "init_lora_weights", "oft_block_size")


def compare_adapter(expected: Expected, config: Any) -> None:
    """That a trainer's peft configuration is the one that the trial had."""
    mine = expected["peft"]
    if mine is None:
        assert config is None, config
        return
    compare("peft_type", mine["peft_type"], getattr(config.peft_type, "value", config.peft_type))
    compare("target_modules", sorted(mine["target_modules"]), sorted(config.target_modules))
    for name in COMPARED:
        if name in mine and not (name == "r" and mine["peft_type"] == "OFT"):
            compare(name, mine[name], getattr(config, name))


def compare_rows(expected: Expected, rows: list[Any]) -> None:
    """That a trainer makes the tokens that a trial trains on, and learns the same of them."""
    for mine, theirs in zip(expected["rows"], rows, strict=True):
        compare("input_ids", mine["input_ids"], list(theirs["input_ids"]))
        if "labels" in mine:
            # The first token of a row is predicted from nothing.
            compare("labels", mine["labels"][1:], list(theirs["labels"])[1:])
