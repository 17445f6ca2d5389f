"""The configurations that benchmarks train, and the rows they train on: both functions of a seed alone."""

from __future__ import annotations

import random
from pathlib import Path

from autopeft.methods import refuse_spec
from autopeft.records import TrialSpec
from autopeft.spaces.space import RandomSuggester, SearchSpace
from autopeft.tasks.data import VALIDATION_SHARE
from autopeft.tasks.spec import VALIDATION_MOST

PLAIN_PEFT = ("lora", "prefix_tuning", "prompt_tuning", "ia3", "full")
"""Methods that a user of transformers and peft has without writing an adapter."""


def draw_specs(space: SearchSpace, count: int, *, max_steps: int, seed: int) -> list[TrialSpec]:
    """The space's recipes, then random configurations of each method in turn; no two alike, none refused on CPU."""
    rng = random.Random(seed)
    specs = list(space.recipes[:count])
    known = {spec.key() for spec in specs}
    methods = list(space.methods)
    turn = 0
    while len(specs) < count:
        suggester = RandomSuggester(rng, method=methods[turn % len(methods)])
        spec = space.suggest(suggester, max_steps=max_steps, seed=seed)
        if refuse_spec(spec, space.device_kind) is None and spec.key() not in known:
            specs.append(spec)
            known.add(spec.key())
            turn += 1
    return specs


def describe(spec: TrialSpec) -> str:
    """One line a reader can tell configurations apart by."""
    settings = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                         for name, value in spec.settings.items() if value is not False)  # fmt: skip
    targets = f", {spec.target_modules}" if spec.target_modules else ""
    return f"{spec.method}: {settings}{targets}{', ' if settings else ''}{spec.bits} bits, lr {spec.learning_rate:.1e}"


def limit_rows(data_dir: Path, task: str, num_validation: int, folder: Path, *, seed: int) -> Path:
    """A data folder whose search-validation split has about `num_validation` rows.

    The split's size follows from the number of training rows, so those are drawn fewer; a number that the whole data
    would give anyway leaves the folder as it is.
    """
    if num_validation >= VALIDATION_MOST:
        return data_dir
    lines = (data_dir / task / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    count = min(len(lines), round(num_validation / VALIDATION_SHARE))
    (folder / task).mkdir(parents=True, exist_ok=True)
    rows = random.Random(seed).sample(lines, count)
    (folder / task / "train.jsonl").write_text("".join(rows), encoding="utf-8")
    for other in ("validation.jsonl", "test.jsonl"):
        if (data_dir / task / other).exists():
            (folder / task / other).write_bytes((data_dir / task / other).read_bytes())
    return folder
