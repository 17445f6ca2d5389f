"""Estimates against the 63 peaks that peft published for Llama-3.2-3B (method_comparison/MetaMathQA).

Their peaks are what the caching allocator reserved over the whole run, evaluation by generation included, so they lie
above any peak of a training step; what can be asked is whether the order of the methods is right, and what is odd.
Runs without weights, a network or a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import signal
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import peft
import torch
import transformers
from torch import nn

from autopeft.backends.base import ModelledGpu
from autopeft.backends.hf.base_model import build_meta_model
from autopeft.backends.hf.cost import make_batch, running_on_fakes
from autopeft.backends.hf.cuda_rules import cublas_workspace_bytes
from autopeft.backends.hf.depth import Growth, is_shortened, leave_out_layers, plan_depths, read_signatures
from autopeft.backends.hf.fake_base import make_fake
from autopeft.backends.hf.memory import Rehearsal, find_peak, find_stacks
from autopeft.backends.hf.peft_stand_ins import shapes_without_values
from autopeft.backends.hf.traceable import building_without_values
from autopeft.methods import METHODS
from autopeft.records import TrialSpec

BATCH_SIZE, TOKENS = 4, 768
L40S = ModelledGpu(name="L40S", capability=(8, 9))
LONGEST_SECONDS = 90
"""A run; BOFT's block-diagonal matrices have thousands of parts."""
RESULTS = Path(__file__).parent / "results"

SETTINGS: dict[str, dict[str, Any]] = {
    # What runs.csv does not say follows from the number of trainable parameters, which is checked.
    "adalora/llama-3.2-3B-rank32": {"r": 8, "init_r": 64, "target_r": 32, "total_step": 5000},
    "adamss/": {"r": 100, "num_subspaces": 10},
    "adaptionprompt/": {"adapter_len": 100},
    "c3a/": {"block_size": 64},
    "deft/llama-3.2-3B-rank32-para": {"r": 32, "para": True},
    "fourierft/llama-3.2-3B-n_frequency-5000": {"n_frequency": 5000},
    "frod/llama-3.2-3B-sparse0.02": {"sparse_rate": 0.02},
    "glora/llama-3.2-3B-vector-paths": {
        "r": 8, "config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"
    },
    "ia3/llama-3.2-3B-all-attn": {"feedforward_modules": ["gate_proj", "up_proj", "down_proj"]},
    "ia3/": {"feedforward_modules": ["down_proj"]},
    "lily/llama-3.2-3B-rank140": {"r": 140, "stride_A": 14, "num_B": 2},
    "lily/llama-3.2-3B-rank896": {"r": 896, "stride_A": 14, "num_B": 2},
    "lokr/": {"r": 32, "alpha": 64, "decompose_factor": 4},
    "lora/llama-3.2-3B-rank32-dora": {"r": 32, "lora_alpha": 64, "use_dora": True},
    "lora/llama-3.2-3B-rank64-rslora": {"r": 64, "lora_alpha": 64, "use_rslora": True},
    "miss/llama-3.2-3B-bat": {"r": 64, "init_weights": "bat"},
    "miss/llama-3.2-3B-mini": {"r": 64, "init_weights": "mini", "mini_r": 64},
    "oft/": {"r": 32, "oft_block_size": 0},
    "peanut/llama-3.2-3B-rank1-": {"r": 1, "depth": 0, "act_fn": "relu"},
    "peanut/llama-3.2-3B-rank32-": {"r": 32, "depth": 0, "act_fn": "relu"},
    "prefixtuning/llama-3.2-3B-tokens50": {"num_virtual_tokens": 50},
    "prefixtuning/": {"num_virtual_tokens": 200},
    "prompt_tuning/": {"num_virtual_tokens": 200},
    "ptuning/": {"num_virtual_tokens": 20, "encoder_hidden_size": 3072},
    "road/": {"variant": "road_2"},
    "tinylora/llama-3.2-3B-weight-tying": {"r": 2, "weight_tying": 1.0},
    "trainable_tokens/": {"token_indices": [0, 1]},
    "waveft/": {"n_frequency": 5000},
}  # fmt: skip
FROZEN = {"lora/llama-3.2-3B-rank32-lorafa": "lora_A", "lora/llama-3.2-3B-rank32-mica": "lora_B"}
"""LoRA-FA trains B alone, MiCA A alone."""


class Row(NamedTuple):
    name: str
    published_bytes: int
    """Reserved, at the most."""
    estimated_bytes: int | None
    """Allocated, in a training step."""
    reserved_bytes: int | None
    """By the simulated allocator for that step."""
    remark: str


def llama_3b() -> Any:
    return transformers.LlamaConfig(
        vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, pad_token_id=0, use_cache=False,
    )  # fmt: skip


def find_settings(name: str) -> dict[str, Any]:
    prefixes = [prefix for prefix in SETTINGS if name.startswith(prefix)]
    return dict(SETTINGS[max(prefixes, key=len)]) if prefixes else {}


def make_config(run: Mapping[str, str], num_layers: int) -> Any:
    """peft's configuration of a run, by what the table says and `SETTINGS`."""
    peft_type = peft.PeftType(run["peft_type"])
    settings = find_settings(run["experiment_name"])
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft_type]
    if not settings and run["r"]:
        settings = {"r": int(run["r"])}
        if run["alpha"]:
            settings["lora_alpha" if peft_type == "LORA" else "alpha"] = int(run["alpha"])
    known = {field for field in config_class.__dataclass_fields__}
    targets = run["target_modules"].split("|")
    if "target_modules" in known and run["target_modules"]:
        settings["target_modules"] = (
            targets if len(targets) > 1 or "." not in targets[0] else [targets[0].split(".")[-1]]
        )
    if run["peft_type"] == "ADAPTION_PROMPT":
        settings |= {"target_modules": "self_attn", "adapter_layers": num_layers}
    return config_class(task_type="CAUSAL_LM", **{name: v for name, v in settings.items() if name in known})


def build(run: Mapping[str, str], config: Any) -> nn.Module:
    """The run's model on the meta device: base in bfloat16, adapters in float32; full fine-tuning in bfloat16."""
    with shapes_without_values(), building_without_values(), torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = build_meta_model(config, torch.bfloat16)
        if run["peft_type"] == "full-finetuning":
            return model.train()  # type: ignore[no-any-return]
        model.requires_grad_(False)
        model = peft.get_peft_model(model, make_config(run, config.num_hidden_layers))
    frozen = FROZEN.get(run["experiment_name"])
    for name, parameter in model.named_parameters():
        if frozen is not None and frozen in name:
            parameter.requires_grad_(False)
    return model.train()  # type: ignore[no-any-return]


def vehicle() -> TrialSpec:
    """Says AdamW and nothing else."""
    return TrialSpec(
        method="head", settings=dict(METHODS["head"].recipe.settings), target_modules=None, bits=16, learning_rate=1e-4,
        batch_size=BATCH_SIZE, max_steps=1, warmup_ratio=0.0, schedule="linear", weight_decay=0.1, seed=0,
    )  # fmt: skip


class Estimated(NamedTuple):
    peak_bytes: int
    reserved_bytes: int
    trainable_parameters: int


def estimate(run: Mapping[str, str]) -> Estimated:
    """Of one training step."""
    config = llama_3b()
    full = build(run, config)
    trainable = sum(p.numel() for p in full.parameters() if p.requires_grad)
    models, growth = [full], None
    depths = plan_depths(full)
    if depths is not None:
        two = [build(run, leave_out_layers(config, count)) for count in (depths.more, depths.fewer)]
        if is_shortened(read_signatures(full), read_signatures(two[0]), depths):
            sizes = [tuple(len(stack) for stack in find_stacks(model)) for model in two]
            models, growth = two, Growth(depths, (sizes[0], sizes[1]))
    with running_on_fakes(models):
        peaks = []
        for model in models:
            make_fake(model)
            batch = make_batch(config, BATCH_SIZE, TOKENS, for_language_model=True)
            rehearsal = Rehearsal(model, vehicle(), on_gpu=True)
            peaks.append(rehearsal.train(batch))
        held = find_peak(peaks[0] if growth is None else growth.peaks(*peaks))
    libraries = cublas_workspace_bytes(L40S)
    return Estimated(held.total + libraries, held.total + rehearsal.wasted_bytes + libraries, trainable)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise TimeoutError(f"longer than {seconds} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)


def compare(run: Mapping[str, str]) -> Row:
    name, published = run["experiment_name"], int(float(run["accelerator_memory_max"]))
    try:
        with time_limit(LONGEST_SECONDS):
            estimated = estimate(run)
    except Exception as exc:
        # Whatever a method's code raises: the table says so, and the other runs are compared.
        return Row(
            name, published, None, None, f"not modelled: {type(exc).__name__}: {' '.join(str(exc).split())[:90]}"
        )
    wanted = int(run["num_trainable_params"])
    if estimated.trainable_parameters != wanted:
        remark = f"not modelled: {estimated.trainable_parameters:,} parameters, published {wanted:,}"
        return Row(name, published, None, None, remark)
    return Row(name, published, estimated.peak_bytes, estimated.reserved_bytes, "")


def rank(values: Sequence[float]) -> list[float]:
    """Ranks from 1, ties shared."""
    ordered = sorted(values)
    first = {value: ordered.index(value) for value in ordered}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's."""
    return statistics.correlation(rank(first), rank(second))


def render(rows: Sequence[Row]) -> str:
    known = [row for row in rows if row.estimated_bytes is not None]
    estimates = [row.estimated_bytes or 0 for row in known]
    reserved = [row.reserved_bytes or 0 for row in known]
    published = [row.published_bytes for row in known]
    reserved_ratios = [p / r for p, r in zip(published, reserved, strict=True)]
    ratios = [p / e for p, e in zip(published, estimates, strict=True)]
    usual = statistics.median(ratios)
    # Runs of one method differ in rank and learning rate alone; its median stands for it.
    methods: dict[str, list[int]] = {}
    for index, row in enumerate(known):
        methods.setdefault(row.name.split("/")[0], []).append(index)
    by_method = [
        (statistics.median(estimates[i] for i in places), statistics.median(published[i] for i in places))
        for places in methods.values()
    ]
    lines = [
        "# Published peaks of Llama-3.2-3B, and estimates",
        "",
        f"`python benchmarks/vram_published.py DATA`: batch {BATCH_SIZE} x {TOKENS} tokens, modelled for {L40S.name}. "
        f"{len(known)} of {len(rows)} runs modelled.",
        "",
        f"- Rank correlation (Spearman) over runs: {rank_correlation(estimates, published):.3f}; of what the simulated "
        f"allocator reserves: {rank_correlation(reserved, published):.3f}",
        f"- over methods, by their medians ({len(by_method)}): "
        f"{rank_correlation([e for e, _ in by_method], [p for _, p in by_method]):.3f}",
        f"- published / estimated: median {usual:.3f}, from {min(ratios):.3f} to {max(ratios):.3f}",
        f"- published / reserved by the simulated allocator: median {statistics.median(reserved_ratios):.3f}, from "
        f"{min(reserved_ratios):.3f} to {max(reserved_ratios):.3f}",
        "",
        "| run | published reserved, GiB | estimated, GiB | ratio | off the median ratio | reserved, simulated |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in sorted(rows, key=lambda row: row.published_bytes):
        if row.estimated_bytes is None:
            lines.append(f"| {row.name} | {row.published_bytes / 2**30:.2f} | | | {row.remark} | |")
            continue
        ratio = row.published_bytes / row.estimated_bytes
        lines.append(
            f"| {row.name} | {row.published_bytes / 2**30:.2f} | {row.estimated_bytes / 2**30:.2f} | {ratio:.3f} "
            f"| {ratio / usual - 1:+.1%} | {(row.reserved_bytes or 0) / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, help="runs.csv of the published comparison")
    parser.add_argument("--only", default="", help="runs whose name holds this; the results of others are kept")
    parser.add_argument("--out", default="vram-published", help="name under results/; empty to print alone")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    with args.runs.open(encoding="utf-8") as file:
        runs = [run for run in csv.DictReader(file) if args.only in run["experiment_name"]]
    rows = []
    for run in runs:
        rows.append(compare(run))
        row = rows[-1]
        shown = row.remark or f"{row.published_bytes / 2**30:.2f} published, {(row.estimated_bytes or 0) / 2**30:.2f}"
        print(f"{row.name}: {shown}", flush=True)
    stored = RESULTS / f"{args.out}.json"
    if args.only and args.out and stored.is_file():
        # The other runs stay as they were.
        known = {row.name: row for row in (Row(**record) for record in json.loads(stored.read_text(encoding="utf-8")))}
        rows = list((known | {row.name: row for row in rows}).values())
    text = render(rows)
    print(text)
    if args.out:
        (RESULTS / f"{args.out}.md").write_text(text, encoding="utf-8")
        records = [row._asdict() for row in rows]
        (RESULTS / f"{args.out}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
