"""Estimated against measured memory on a CUDA GPU: 36 configurations from MiniLM's size to an 8B Llama.

Models are drawn at random on the GPU, so nothing is downloaded; torch, transformers and peft are enough, and without
bitsandbytes its configurations are left out. Measured is what the trial's own step allocates at its peak
(torch.cuda.max_memory_allocated) over three steps on a batch of longest rows, as a trial's probe does.

    python benchmarks/vram.py                     # make gpu
    python benchmarks/vram.py --device cpu        # the same on a CPU, small models alone, by counted bytes
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from autopeft.backends.base import ModelledGpu
from autopeft.backends.hf.base_model import (
    BaseModel,
    compute_dtype,
    find_head,
    find_linear_names,
    load_config,
    quantization_config,
)
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.cuda_rules import MODELLED_GPU
from autopeft.backends.hf.memory import Rehearsal, find_peak
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, checkpoint_activations, score_batch, train_step
from autopeft.errors import SpecError
from autopeft.methods import METHODS, find_method
from autopeft.records import Bits, Estimate, Optimizer, Scalar, StepSettings, TrialSpec

RESULTS = Path(__file__).parent / "results"
STEPS = 3
TARGET_MEDIAN, TARGET_WORST = 0.03, 0.08
NUM_LABELS = 2


def bert(**sizes: Any) -> Any:
    return transformers.BertConfig(pad_token_id=0, **sizes)


def llama(**sizes: Any) -> Any:
    return transformers.LlamaConfig(pad_token_id=0, **sizes)


MODELS: dict[str, Callable[[], Any]] = {
    "MiniLM": lambda: bert(
        vocab_size=30_522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    ),
    "BERT-base": lambda: bert(vocab_size=30_522),
    "ModernBERT-base": lambda: transformers.ModernBertConfig(),
    "T5-base": lambda: transformers.T5Config(
        vocab_size=32_128, d_model=768, d_ff=3072, num_layers=12, num_heads=12, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    ),
    "Llama-1B": lambda: llama(
        vocab_size=128_256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64,
    ),
    "Llama-3B": lambda: llama(
        vocab_size=128_256, hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24,
        num_key_value_heads=8, head_dim=128,
    ),
    "Llama-8B": lambda: llama(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
}  # fmt: skip
SMALL = ("MiniLM",)
"""Trained on a CPU too, to see that this script works."""


class Case(NamedTuple):
    model: str
    method: str
    bits: Bits = 16
    batch_size: int = 8
    tokens: int = 256
    changed: tuple[tuple[str, Scalar], ...] = ()
    optimizer: Optimizer = "adamw"
    settings: StepSettings = StepSettings()

    def spec(self, bits: Bits) -> TrialSpec:
        recipe = METHODS[self.method].recipe
        return TrialSpec(
            method=self.method,
            settings={**recipe.settings, **dict(self.changed)},
            target_modules=recipe.target_modules,
            bits=bits,
            learning_rate=recipe.learning_rate,
            batch_size=self.batch_size,
            max_steps=10,
            warmup_ratio=0.0,
            schedule="linear",
            weight_decay=0.0,
            seed=0,
            optimizer=self.optimizer,
        )

    def describe(self) -> str:
        words = [self.method, *(f"{name} {value}" for name, value in self.changed), f"{self.bits} bits"]
        words.append(f"{self.batch_size} x {self.tokens}")
        if self.optimizer != "adamw":
            words.append(self.optimizer)
        if self.settings.checkpoint_activations:
            words.append("checkpointed")
        if self.settings.micro_batches > 1:
            words.append(f"{self.settings.micro_batches} batches summed")
        return f"{self.model}: {', '.join(words)}"


CHECKPOINTED = StepSettings(checkpoint_activations=True)
ACCUMULATED = StepSettings(micro_batches=2)
CASES: tuple[Case, ...] = (
    Case("MiniLM", "lora", batch_size=32, tokens=128),
    Case("MiniLM", "lora", batch_size=32, tokens=128, bits=8),
    Case("MiniLM", "lora", batch_size=32, tokens=128, bits=4),
    Case("MiniLM", "full", batch_size=32, tokens=128),
    Case("MiniLM", "ia3", batch_size=64, tokens=128),
    Case("MiniLM", "prompt_tuning", batch_size=32, tokens=128),
    Case("MiniLM", "bottleneck", batch_size=32, tokens=128, settings=ACCUMULATED),
    Case("BERT-base", "lora", batch_size=32),
    Case("BERT-base", "lora", batch_size=32, changed=(("dropout", 0.1),)),
    Case("BERT-base", "full", batch_size=16),
    Case("BERT-base", "full", batch_size=16, settings=CHECKPOINTED),
    Case("BERT-base", "prefix_tuning", batch_size=16),
    Case("BERT-base", "bitfit", batch_size=16),
    Case("ModernBERT-base", "lora", batch_size=16),
    Case("ModernBERT-base", "full", batch_size=8),
    Case("ModernBERT-base", "lora", batch_size=16, bits=4),
    Case("T5-base", "lora", batch_size=8),
    Case("T5-base", "ia3", batch_size=8),
    Case("Llama-1B", "lora"),
    Case("Llama-1B", "lora", bits=4),
    Case("Llama-1B", "lora", bits=8),
    Case("Llama-1B", "lora", changed=(("dora", True),)),
    Case("Llama-1B", "full", batch_size=2),
    Case("Llama-1B", "full", batch_size=2, optimizer="adamw_8bit"),
    Case("Llama-1B", "lora", settings=CHECKPOINTED),
    Case("Llama-1B", "prompt_tuning"),
    Case("Llama-3B", "lora", batch_size=4),
    Case("Llama-3B", "lora", batch_size=4, tokens=512),
    Case("Llama-3B", "lora", batch_size=4, bits=4),
    Case("Llama-3B", "ia3", batch_size=4),
    Case("Llama-3B", "lora", batch_size=4, tokens=1024, settings=CHECKPOINTED),
    Case("Llama-8B", "lora", batch_size=2, tokens=512),
    Case("Llama-8B", "lora", batch_size=2, tokens=512, bits=4, optimizer="paged_adamw_8bit"),
    Case("Llama-8B", "lora", batch_size=2, tokens=512, bits=8),
    Case("Llama-8B", "lora", batch_size=4, tokens=1024, bits=4, settings=CHECKPOINTED),
    Case("Llama-8B", "ln_tuning", batch_size=2, tokens=512),
)


class Measured(NamedTuple):
    peak_bytes: int
    scoring_bytes: int
    reserved_bytes: int | None
    """None on a CPU."""


class Row(NamedTuple):
    case: str
    estimated_bytes: int
    measured_bytes: int
    estimated_scoring_bytes: int
    measured_scoring_bytes: int
    reserved_bytes: int | None
    estimate_seconds: float

    @property
    def error(self) -> float:
        return self.estimated_bytes / self.measured_bytes - 1


# --- a model of random weights, as `load_base` would have loaded it


def draw_base(config: Any, bits: Bits, device: str) -> BaseModel:
    dtype = compute_dtype(device)
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = transformers.AutoModelForSequenceClassification.from_config(config, dtype=dtype)
    head = find_head(model)
    if bits < 16:
        _quantize(model, head, bits, dtype, device)
    model.requires_grad_(False)
    return BaseModel(model=model, bits=bits, head=head, linear_names=find_linear_names(model, head))


def _quantize(model: Any, head: Sequence[str], bits: Bits, dtype: torch.dtype, device: str) -> None:
    """In place, a layer at a time, by the layers and settings that loading would use."""
    import bitsandbytes
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    weights = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    kept = [*head, *(model._keep_in_fp32_modules or [])]
    replace_with_bnb_linear(model, kept, quantization_config(bits, head, dtype))
    for name in list(weights):
        old, module = weights.pop(name), model.get_submodule(name)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            module.weight = bitsandbytes.nn.Params4bit(
                old.weight.data.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True, module=module
            )
            module.support_avx512bf16_for_cpu = False
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            module.weight = bitsandbytes.nn.Int8Params(old.weight.data.cpu(), requires_grad=False)
        else:
            continue
        module.bias = old.bias
        # Moving is what quantizes.
        module.to(device)
    model.is_quantized = True
    setattr(model, f"is_loaded_in_{bits}bit", True)


def make_batch(config: Any, rows: int, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """Longest rows; every fourth is padded, or transformers would drop the mask. Each ends with its end of sequence."""
    ids_BT = torch.full((rows, tokens), 7)
    ids_BT[:, -1] = 1
    mask_BT = torch.ones(rows, tokens, dtype=torch.int64)
    mask_BT[::4, : tokens // 2] = 0
    batch = {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.zeros(rows, dtype=torch.int64)}
    if (getattr(config, "type_vocab_size", None) or 0) > 1:
        batch["token_type_ids"] = torch.zeros(rows, tokens, dtype=torch.int64)
    return {name: tensor.to(device) for name, tensor in batch.items()}


# --- measurement


def measure(case: Case, base: BaseModel, config: Any, estimate: Estimate, bits: Bits, device: str) -> Measured:
    spec = case.spec(bits)
    if device != "cpu" and find_method(case.method).writes_base(spec):
        # As a trial does: production would not keep a second copy of the weights.
        base.model.to("cpu")
        free_memory()
    model = build_trial_model(base, spec, device=device)
    if case.settings.checkpoint_activations:
        checkpoint_activations(model)
    batch = make_batch(config, case.batch_size * case.settings.micro_batches, case.tokens, device)
    if device == "cpu":
        rehearsal = Rehearsal(model, spec, on_gpu=False)
        peak = find_peak(rehearsal.train(batch, micro_batches=case.settings.micro_batches)).total
        batch = make_batch(config, estimate.scoring_batch_size, case.tokens, device)
        return Measured(peak, find_peak(rehearsal.score(batch)).total, None)
    optimizer = build_optimizer(model, spec)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    for step in range(1, STEPS + 1):
        train_step(
            model,
            optimizer,
            batch,
            learning_rate=0.0,
            device=device,
            after_step=bind_after_step(model, spec, step),
            micro_batches=case.settings.micro_batches,
        )
    torch.cuda.synchronize()
    peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    batch = make_batch(config, estimate.scoring_batch_size, case.tokens, device)
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    model.eval()
    score_batch(model, batch, device=device)
    torch.cuda.synchronize()
    return Measured(peak, torch.cuda.max_memory_allocated(), reserved)


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def read_context_bytes() -> int | None:
    """What the driver counts for this process beyond what PyTorch reserved; None where it does not tell."""
    query = ["nvidia-smi", "--query-compute-apps=pid,used_memory", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout.splitlines()
        used = next(int(line.split(",")[1]) for line in lines if int(line.split(",")[0]) == os.getpid())
    except (OSError, subprocess.SubprocessError, ValueError, StopIteration):
        return None
    return used * 2**20 - torch.cuda.memory_reserved()


# --- the table


def run_cases(cases: Sequence[Case], device: str, gpu: ModelledGpu) -> tuple[list[Row], list[str]]:
    """(rows, what was left out and why)."""
    rows: list[Row] = []
    left_out: list[str] = []
    bases: dict[tuple[str, Bits], BaseModel] = {}
    on_gpu = device != "cpu"
    for case in cases:
        bits: Bits = 32 if case.bits == 16 and not on_gpu else case.bits
        needs_bitsandbytes = bits < 16 or case.optimizer != "adamw"
        if needs_bitsandbytes and find_spec("bitsandbytes") is None:
            left_out.append(f"{case.describe()}: bitsandbytes is not installed")
            continue
        with tempfile.TemporaryDirectory() as folder:
            MODELS[case.model]().save_pretrained(folder)
            config = load_config(folder, NUM_LABELS)
            started = time.perf_counter()
            costs = HfCostModel(
                folder,
                num_labels=NUM_LABELS,
                device_kind="cuda" if on_gpu else "cpu",
                longest_tokens=case.tokens,
                gpu=gpu,
            )
            try:
                estimate = costs.estimate(case.spec(bits), case.settings)
            except SpecError as exc:
                left_out.append(f"{case.describe()}: {exc}")
                continue
            seconds = time.perf_counter() - started
        key = (case.model, bits)
        if key not in bases:
            bases.clear()
            free_memory()
        try:
            if key not in bases:
                bases[key] = draw_base(copy.deepcopy(config), bits, device)
            bases[key].model.to(device)
            measured = measure(case, bases[key], config, estimate, bits, device)
        except torch.OutOfMemoryError as exc:
            free = torch.cuda.mem_get_info()[0] / 2**30
            left_out.append(
                f"{case.describe()}: out of memory, estimated {estimate.peak_bytes / 2**30:.1f} GiB, {free:.1f} free. "
                f"{str(exc).split('.')[0]}"
            )
            bases.clear()
            continue
        finally:
            free_memory()
        row = Row(
            case.describe(), estimate.peak_bytes, measured.peak_bytes, estimate.scoring_bytes, measured.scoring_bytes,
            measured.reserved_bytes, seconds,
        )  # fmt: skip
        rows.append(row)
        print(f"{row.error:+7.2%}  {row.measured_bytes / 2**20:10,.0f} MiB  {row.case}", flush=True)
    return rows, left_out


def render(rows: Sequence[Row], left_out: Sequence[str], facts: Sequence[str]) -> str:
    errors = [abs(row.error) for row in rows]
    scoring = [abs(row.estimated_scoring_bytes / row.measured_scoring_bytes - 1) for row in rows]
    lines = ["# Memory, estimated and measured", "", *(f"- {fact}" for fact in facts), ""]
    if rows:
        lines += [
            f"{len(rows)} configurations: error of the peak {statistics.median(errors):.2%} in the median "
            f"(target {TARGET_MEDIAN:.0%}), {max(errors):.2%} at worst (target {TARGET_WORST:.0%}); of the evaluation "
            f"pass {statistics.median(scoring):.2%} and {max(scoring):.2%}.",
            "",
            "| configuration | measured, MiB | estimated, MiB | error | evaluation | estimated | reserved | seconds |",
            "|---|--:|--:|--:|--:|--:|--:|--:|",
        ]
    for row in rows:
        reserved = "" if row.reserved_bytes is None else f"{row.reserved_bytes / 2**20:,.0f}"
        lines.append(
            f"| {row.case} | {row.measured_bytes / 2**20:,.0f} | {row.estimated_bytes / 2**20:,.0f} | {row.error:+.2%} "
            f"| {row.measured_scoring_bytes / 2**20:,.0f} | {row.estimated_scoring_bytes / 2**20:,.0f} | {reserved} "
            f"| {row.estimate_seconds:.1f} |"
        )
    if left_out:
        lines += ["", "Left out:", "", *(f"- {why}" for why in left_out)]
    return "\n".join(lines) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--only", default="", help="configurations whose description holds this")
    parser.add_argument("--out", help="name under results/ (default: vram- and the device's name)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/vram.py needs a CUDA GPU, and torch sees none. Try it with --device cpu.", file=sys.stderr)
        return 2
    warnings.simplefilter("ignore")
    transformers.utils.logging.set_verbosity_error()
    gpu = MODELLED_GPU
    if args.device == "cuda":
        gpu = ModelledGpu(name=torch.cuda.get_device_name(), capability=torch.cuda.get_device_capability())
    cases = [case for case in CASES if args.only in case.describe() and (args.device == "cuda" or case.model in SMALL)]
    rows, left_out = run_cases(cases, args.device, gpu)
    packages = ", ".join(f"{name} {_version(name)}" for name in ("torch", "transformers", "peft", "bitsandbytes"))
    facts = [gpu.name if args.device == "cuda" else "CPU: bytes of live storages, counted in a real step", packages]
    if args.device == "cuda":
        context = read_context_bytes()
        free, total = torch.cuda.mem_get_info()
        told = "not told by the driver" if context is None else f"{context / 2**20:,.0f} MiB"
        facts += [f"{total / 2**30:.1f} GiB, {free / 2**30:.1f} free at the end", f"CUDA context: {told}"]
    text = render(rows, left_out, facts)
    print(f"\n{text}")
    name = args.out or "vram-" + (gpu.name if args.device == "cuda" else "cpu").lower().replace(" ", "-")
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    records = {"facts": facts, "rows": [row._asdict() for row in rows], "left_out": left_out}
    (RESULTS / f"{name}.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
