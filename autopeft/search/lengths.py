"""How long trials should be: rungs, the full length that a budget suits, and rough speeds for plans."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from autopeft.executors.devices import KnownGpu
from autopeft.hub import find_cached, find_weights, is_hub_id
from autopeft.tasks.data import Splits

AUTO_GPU_MODEL = "answerdotai/ModernBERT-base"
"""What `--model auto` trains where there is a GPU; on CPU it is the packaged MiniLM."""

AUTO_GPU_DECODER = "Qwen/Qwen2.5-0.5B"
"""What `--model auto` trains there for a generation task."""

_FIRST_RUNG = 40
_MOST_RUNGS = 4
_EPOCHS_AT_MOST = 3
_LENGTHS_TO_BUY = 15
"""Full lengths that a time budget should buy; fewer, longer trials would leave nothing to compare."""
_LONGEST_SHARE = 1 / 8
"""Of the wall time for one full length. Workers do not shorten it: it must fit into what is kept for confirmation,
where steps are slower than was guessed too, and leave the search several rounds to learn from."""
_SHORTEST, _UNCLOCKED = 160, 400
FEWEST_STEPS, MOST_STEPS = 4, 1_000_000
"""Of a full length. A worker lays out all batches of a trial beforehand, at 200 bytes and more each."""

# Rough figures for plans alone; searches measure. One core trains MiniLM (22.7M parameters, LoRA) at 6.7 steps a second
# on 16 sst2 sentences, which is 190e9 of the nominal 6 x parameters x tokens operations a second.
_CPU_CORE_FLOPS = 190e9
_GPU_UTILIZATION = 0.3
_STEP_FLOOR_SECONDS = 0.02
"""What a step of the smallest model takes, on either device."""
SCORING_SHARE = 0.2
"""Scoring passes beside training, rough."""
_PARAMETERS = {"minilm": 22_713_216, AUTO_GPU_MODEL: 149_000_000, AUTO_GPU_DECODER: 494_000_000}
_UNKNOWN_PARAMETERS = 100_000_000


def plan_rungs(max_steps: int) -> tuple[int, ...]:
    """Halving down from the full length, as long as a rung keeps 40 steps: below, most methods sit at chance."""
    rungs = [max_steps]
    while len(rungs) < _MOST_RUNGS and rungs[0] // 2 >= _FIRST_RUNG:
        rungs.insert(0, rungs[0] // 2)
    return tuple(rungs)


def next_rung(step: int, rungs: Sequence[int]) -> int:
    """Steps of the first rung that lies beyond `step`."""
    return next(rung for rung in rungs if rung > step)


def guess_seconds_per_step(num_parameters: int, splits: Splits | None, threads: int, gpu: KnownGpu | None) -> float:
    tokens = 30.0
    if splits is not None:
        sample = splits.train[:1000]
        texts = [text for example in sample for text in (example.text, example.text_pair, example.completion)]
        words = sum(len(text.split()) for text in texts if text) / len(sample)
        tokens = 1.3 * words + 2
    operations = 6 * num_parameters * 16 * tokens
    rate = _GPU_UTILIZATION * gpu.bf16_flops if gpu is not None else _CPU_CORE_FLOPS * threads
    return max(_STEP_FLOOR_SECONDS, operations / rate)


def guess_parameters(model: str, weight_bytes: int = 0) -> int:
    """By the size of its weight files, which of a hub model the hub tells (`weight_bytes`); else a common size."""
    if model in _PARAMETERS:
        return _PARAMETERS[model]
    folder = find_cached(model) if is_hub_id(model) else Path(model)
    if folder is None:
        return _UNKNOWN_PARAMETERS
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kept = str(config.get("dtype") or config.get("torch_dtype") or "float32")
        num_bytes = weight_bytes or sum(path.stat().st_size for path in find_weights(folder))
    except (OSError, ValueError, AttributeError):
        return _UNKNOWN_PARAMETERS
    return num_bytes // (2 if kept.endswith("16") else 4) or _UNKNOWN_PARAMETERS


def choose_max_steps(wall_seconds: float, num_workers: int, per_step: float, splits: Splits | None) -> int:
    """Steps such that the budget buys enough full lengths to compare, none of which takes much of its wall time, and no
    more than a few epochs."""
    epochs = math.ceil((len(splits.train) if splits else 50_000) / 16 * _EPOCHS_AT_MOST)
    if math.isinf(wall_seconds):
        return max(_SHORTEST, min(_UNCLOCKED, epochs))
    share = min(0.75 * num_workers / _LENGTHS_TO_BUY, _LONGEST_SHARE)
    bought = share * wall_seconds / (per_step * (1 + SCORING_SHARE))
    steps = max(_SHORTEST, min(int(bought), epochs))
    return steps - steps % 8
