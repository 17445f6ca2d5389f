"""What a language model holds while it writes, as exact_match has it do: the estimate beside a real `generate`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from recipe_specs import make_recipe_spec
from test_language import write_text
from tiny_models import make_tiny_llama

from autopeft.backends import load_cost_model
from autopeft.backends.base import WorkerSetup
from autopeft.backends.hf.base_model import load_base
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.cost import HfCostModel, Writing
from autopeft.backends.hf.live_bytes import LiveBytes, list_tensors
from autopeft.errors import SpecError
from autopeft.records import Bits, TrialSpec

PROMPT, NEW = 40, 60
_SIZES: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "vocab_size": 100,
                          "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}  # fmt: skip
CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda depth: transformers.LlamaConfig(**_SIZES, num_hidden_layers=depth, num_key_value_heads=2),
    "gpt2": lambda depth: transformers.GPT2Config(
        n_embd=64, n_layer=depth, n_head=4, vocab_size=100, n_positions=256, eos_token_id=1, pad_token_id=0
    ),
    # Windows of 16 in five of six layers.
    "gemma3": lambda depth: transformers.Gemma3TextConfig(
        **_SIZES, num_hidden_layers=depth, num_key_value_heads=1, head_dim=16, sliding_window=16
    ),
}
"""By depth."""


def spec_of(method: str, bits: Bits = 32, *, batch_size: int = 8, **changed: Any) -> TrialSpec:
    return make_recipe_spec(method, bits, batch_size=batch_size, **changed)


def make_costs(
    folder: Path, architecture: str, depth: int, writing: Writing | None, device_kind: Any = "cpu"
) -> HfCostModel:
    transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture](depth)).save_pretrained(folder)
    # Losses of single tokens, so that whatever is held is held to write.
    return HfCostModel(
        str(folder), num_labels=None, device_kind=device_kind, longest_tokens=128, scoring_tokens=2, writing=writing
    )


def count_real_writing(folder: Path, spec: TrialSpec, rows: int) -> int:
    """Peak of bytes while the model really writes."""
    model = build_trial_model(load_base(str(folder), num_labels=None, bits=32, device="cpu"), spec).eval()
    batch = {name: torch.ones(rows, PROMPT, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    # Two lengths, or the mask would be dropped.
    batch["attention_mask"][0, :5] = 0
    settings = transformers.GenerationConfig(min_new_tokens=NEW, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    live = LiveBytes()
    for tensor in [*list_tensors(model), *batch.values()]:
        live.add(tensor)
    with torch.no_grad(), live:
        written_BT = model.generate(**batch, generation_config=settings)
    assert written_BT.shape == (rows, PROMPT + NEW)
    return live.peak_bytes


@pytest.mark.parametrize("architecture", CONFIGS)
@pytest.mark.parametrize("method", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_what_writing_needs_is_estimated_within_1_percent(tmp_path, architecture, method):
    costs = make_costs(tmp_path, architecture, 6, Writing(PROMPT, NEW))
    spec = spec_of(method)
    estimate = costs.estimate(spec)
    optimizer_bytes = estimate.optimizer_bytes
    real = count_real_writing(tmp_path, spec, estimate.scoring_batch_size)
    assert estimate.scoring_bytes - optimizer_bytes == pytest.approx(real, rel=0.01)


@pytest.mark.parametrize(("device_kind", "num_bytes"), [("cpu", 4), ("cuda", 2)])
def test_keys_and_values_of_every_position_are_counted(tmp_path, device_kind, num_bytes):
    by_tokens = {}
    for new_tokens in (100, 200):
        costs = make_costs(tmp_path, "llama", 6, Writing(PROMPT, new_tokens), device_kind=device_kind)
        by_tokens[new_tokens] = costs.estimate(spec_of("lora", 16 if device_kind == "cuda" else 32))
    sizes = {estimate.scoring_batch_size for estimate in by_tokens.values()}
    assert len(sizes) == 1
    # Keys and values x 6 layers x 2 heads of 16 numbers, and one of both again where a token is added.
    grown = by_tokens[200].scoring_bytes - by_tokens[100].scoring_bytes
    assert grown == pytest.approx(sizes.pop() * 100 * (2 * 6 + 1) * 2 * 16 * num_bytes, rel=0.02)


def test_windows_keep_their_last_positions_alone(tmp_path):
    costs = {new: make_costs(tmp_path, "gemma3", 6, Writing(1, new)) for new in (500, 1000)}
    short, long = (costs[new].estimate(spec_of("lora")) for new in (500, 1000))
    assert short.scoring_batch_size == long.scoring_batch_size
    # Keys and values of the one layer of six that attends to everything, and one of both again.
    grown = long.scoring_batch_size * 500 * 3 * 16 * 4
    assert long.scoring_bytes - short.scoring_bytes == pytest.approx(grown, rel=0.1)


def test_a_soft_prompt_is_kept_like_text(tmp_path):
    plain, long = (
        make_costs(tmp_path, "llama", 6, Writing(PROMPT, NEW)).estimate(
            spec_of("prompt_tuning", num_virtual_tokens=tokens)
        )
        for tokens in (2, 64)
    )
    assert long.scoring_bytes - plain.scoring_bytes > long.scoring_batch_size * 62 * 2 * 6 * 2 * 16 * 4


def test_what_is_written_needs_positions_beside_a_soft_prompt(tmp_path):
    # A GPT-2 of 256 positions.
    costs = make_costs(tmp_path, "gpt2", 2, Writing(PROMPT, 200))
    assert costs.cost(spec_of("prompt_tuning", num_virtual_tokens=16)).peak_vram_bytes > 0
    with pytest.raises(SpecError, match=r"17 in front of 240 tokens.* at most 239 tokens \(max_length or max_new_tok"):
        costs.cost(spec_of("prompt_tuning", num_virtual_tokens=17))


def test_fewer_are_written_at_a_time_where_more_would_not_fit(tmp_path):
    spec = spec_of("ia3", batch_size=16)
    alone = make_costs(tmp_path, "llama", 4, None).estimate(spec)
    written = make_costs(tmp_path, "llama", 4, Writing(200, 4000)).estimate(spec)
    assert written.peak_bytes == alone.peak_bytes
    assert written.scoring_batch_size < alone.scoring_batch_size
    assert written.scoring_bytes <= written.peak_bytes or written.scoring_batch_size == 1


@pytest.mark.parametrize("architecture", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_a_deep_model_writes_as_if_all_its_layers_had_been_run(tmp_path, architecture):
    costs = make_costs(tmp_path, architecture, 26, Writing(PROMPT, NEW))
    spec = spec_of("lora")
    extrapolated, measured = costs.estimate(spec), costs.estimate(spec, every_layer=True)
    assert extrapolated.layers_measured is not None
    assert extrapolated.scoring_bytes == measured.scoring_bytes
    assert extrapolated.scoring_bytes > make_costs(tmp_path, architecture, 26, None).estimate(spec).scoring_bytes


def costs_of_task(folder: Path, **keys: Any) -> HfCostModel:
    setup = WorkerSetup(
        backend="hf", model=make_tiny_llama(folder), task=write_text(folder, **keys), data_dir=None, split_seed=0,
        study_dir=str(folder), device="cpu", threads=1,
    )  # fmt: skip
    return load_cost_model(setup)  # type: ignore[return-value]


def test_a_task_says_what_is_written(tmp_path):
    costs = costs_of_task(tmp_path, scorer="exact_match", max_new_tokens=7)
    assert costs.writing is not None
    assert costs.writing.new_tokens == 7
    assert 5 < costs.writing.prompt_tokens < 20
    assert costs_of_task(tmp_path).writing is None


def test_rows_of_the_test_are_scored_and_written_after_too(tmp_path):
    test = tmp_path / "test.jsonl"
    rows = [{"meaning": "name : a", "text": "a ."}, {"meaning": "name " * 50, "text": "a is in the b ."}]
    test.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"train": str(tmp_path / "rows.jsonl"), "test": str(test)}
    costs = costs_of_task(tmp_path, scorer="exact_match", max_new_tokens=7, files=files)
    # What begins a text and what ends it.
    assert costs.scoring_tokens == 1 + 50 + 6 + 1
    assert costs.writing == Writing(1 + 50, 7)
    assert costs.longest_tokens < 20
