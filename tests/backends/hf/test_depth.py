"""Estimates of deep models from two shallow ones, against the same estimates by running all layers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from recipe_specs import make_recipe_spec

from autopeft.backends.hf.base_model import load_base
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.cost import HfCostModel, count_peak_bytes
from autopeft.backends.hf.depth import Run, find_run
from autopeft.errors import SpecError
from autopeft.methods import METHODS
from autopeft.records import Bits, StepSettings, TrialSpec

DEPTH = 14
_SIZES: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SIZES, num_hidden_layers=DEPTH, num_key_value_heads=2),
    "bert": lambda: transformers.BertConfig(**_SIZES, num_hidden_layers=DEPTH),
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=DEPTH, n_head=4, vocab_size=100, pad_token_id=0),
    # Two stacks.
    "t5": lambda: transformers.T5Config(
        d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=DEPTH, vocab_size=100, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0,
    ),
    # Every third layer attends to everything, the others to a window; the first has no norm before attention.
    "modernbert": lambda: transformers.ModernBertConfig(**_SIZES, num_hidden_layers=22),
    # Every sixth.
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **_SIZES, num_hidden_layers=26, num_key_value_heads=1, head_dim=16, sliding_window=8
    ),
    "mixtral": lambda: transformers.MixtralConfig(
        **_SIZES, num_hidden_layers=DEPTH, num_key_value_heads=2, num_local_experts=4
    ),
}  # fmt: skip
_QUICK = {("t5", 16)}
PLAIN = StepSettings()


def spec_of(method: str, bits: Bits, *, target_modules: str | None = None, **changed: Any) -> TrialSpec:
    spec = make_recipe_spec(method, bits, batch_size=2, **changed)
    return dataclasses.replace(spec, target_modules=target_modules or spec.target_modules)


def make_costs(folder: Path, architecture: str, device_kind: Any = "cuda") -> HfCostModel:
    CONFIGS[architecture]().save_pretrained(folder)
    return HfCostModel(str(folder), num_labels=2, device_kind=device_kind, longest_tokens=16)


def check_extrapolation(costs: HfCostModel, spec: TrialSpec, settings: StepSettings = PLAIN) -> None:
    """Equal in every figure but what the allocator wastes, which does not grow with depth and is not extrapolated."""
    extrapolated = costs.estimate(spec, settings)
    measured = costs.estimate(spec, settings, every_layer=True)
    assert extrapolated.layers_measured is not None
    assert measured.layers_measured is None
    wasted = measured.allocator_bytes
    assert dataclasses.replace(extrapolated, layers_measured=None, allocator_bytes=wasted) == measured


@pytest.mark.parametrize(
    ("architecture", "bits"),
    [
        # All layers are run for comparison, which takes seconds.
        pytest.param(name, bits, marks=() if (name, bits) in _QUICK else pytest.mark.slow)
        for name in CONFIGS
        for bits in (16, 4)
    ],
)
def test_a_deep_model_is_estimated_as_if_all_its_layers_had_been_run(tmp_path, architecture, bits):
    check_extrapolation(make_costs(tmp_path, architecture), spec_of("lora", bits))


@pytest.mark.parametrize(
    ("spec", "settings"),
    [
        (spec_of("full", 16), PLAIN),
        pytest.param(spec_of("head", 16), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("lora", 8), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("lora", 16, dora=True), PLAIN, marks=pytest.mark.slow),
        (spec_of("lora", 16), StepSettings(checkpoint_activations=True)),
        pytest.param(spec_of("full", 16), StepSettings(micro_batches=4), marks=pytest.mark.slow),
        (spec_of("lora", 16, target_modules="all-linear:last-2"), PLAIN),
        pytest.param(spec_of("adalora", 16), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("prefix_tuning", 16), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("prompt_tuning", 16), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("ia3", 4), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("bottleneck", 16), PLAIN, marks=pytest.mark.slow),
        pytest.param(spec_of("vera", 16), PLAIN, marks=pytest.mark.slow),
    ],
    ids=lambda value: f"{value.method}-{value.bits}" if isinstance(value, TrialSpec) else "",
)
def test_so_is_whatever_repeats_with_the_layers(tmp_path, spec, settings):
    check_extrapolation(make_costs(tmp_path, "llama"), spec, settings)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "t5", "modernbert"])
@pytest.mark.parametrize("method", METHODS)
def test_no_method_is_extrapolated_to_other_figures(tmp_path, architecture, method):
    """On equal layers, on two stacks of them and on a pattern of layers. The other architectures repeat in one of these
    ways, and LoRA is tried on all of them."""
    costs = make_costs(tmp_path, architecture)
    bits = max(width for width in METHODS[method].bits if width <= 16)
    try:
        extrapolated = costs.estimate(spec_of(method, bits))
    except SpecError as exc:
        pytest.skip(f"refused: {exc}")
    if extrapolated.layers_measured is None:
        pytest.skip("its layers are not equal, so all of them were run")
    check_extrapolation(costs, spec_of(method, bits))


@pytest.mark.parametrize("layer", [1, 7, 12])
def test_a_layer_that_is_chosen_by_name_stays_where_it_is(tmp_path, layer):
    costs = make_costs(tmp_path, "llama")
    spec = spec_of("lora", 16, target_modules=f"names:layers.{layer}.self_attn.q_proj")
    measured = costs.estimate(spec, every_layer=True)
    assert costs.estimate(spec).peak_bytes == measured.peak_bytes
    assert costs.estimate(spec).trainable_parameters == measured.trainable_parameters == 8 * (64 + 64)


def test_experts_hold_what_they_hold_in_a_real_step(tmp_path):
    config = CONFIGS["mixtral"]()
    config.num_hidden_layers = 2
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    costs = HfCostModel(str(tmp_path), num_labels=2, device_kind="cpu", longest_tokens=16)
    base = load_base(str(tmp_path), num_labels=2, bits=32, device="cpu")
    mask_BT = torch.ones(2, 16, dtype=torch.int64)
    mask_BT[0, 8:] = 0
    batch = {
        "input_ids": torch.full((2, 16), 7),
        "attention_mask": mask_BT,
        "labels": torch.zeros(2, dtype=torch.int64),
    }
    for method in ("lora", "full"):
        spec = spec_of(method, 32)
        real_bytes = count_peak_bytes(build_trial_model(base, spec), spec, dict(batch), "cpu")
        assert costs.cost(spec).peak_vram_bytes == pytest.approx(real_bytes, rel=0.01)


# --- what repeats


@given(
    before=st.lists(st.integers(10, 12), max_size=3),
    pattern=st.lists(st.integers(0, 2), min_size=1, max_size=4),
    times=st.integers(6, 20),
    after=st.lists(st.integers(20, 22), max_size=2),
)
def test_a_run_is_made_of_equal_periods(before, pattern, times, after):
    layers = [*before, *(pattern * times), *after]
    run = find_run(layers)
    assert run is not None
    check_run(layers, run)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30))
def test_no_run_is_found_where_layers_differ(layers):
    run = find_run(layers)
    if run is not None:
        check_run(layers, run)


def check_run(layers: Sequence[int], run: Run) -> None:
    """Inside of it every layer is like the one a period before, and the ends of the stack are outside of it."""
    assert min(run.before, run.after, run.period) >= 1
    inside = layers[run.before : len(layers) - run.after]
    assert list(inside[run.period :]) == list(inside[: len(inside) - run.period])
