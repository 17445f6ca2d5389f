"""Activation checkpointing in estimates: what layers keep between the passes, and under which rules they run again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.utils.checkpoint
import transformers
from recipe_specs import make_recipe_spec

from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.fake_base import keep_function_modes
from autopeft.records import Bits, StepSettings, TrialSpec

WIDTH, BATCH_SIZE, TOKENS = 64, 8, 128
HIDDEN_NUMBERS = BATCH_SIZE * TOKENS * WIDTH
"""Of a layer's input."""
CHECKPOINTED = StepSettings(checkpoint_activations=True)

_SIZES: dict[str, Any] = {
    "hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4, "vocab_size": 100, "pad_token_id": 0
}  # fmt: skip
CONFIGS: dict[str, Callable[[int], Any]] = {
    "llama": lambda depth: transformers.LlamaConfig(**_SIZES, num_hidden_layers=depth, num_key_value_heads=2),
    "bert": lambda depth: transformers.BertConfig(**_SIZES, num_hidden_layers=depth),
    "t5": lambda depth: transformers.T5Config(
        d_model=WIDTH, d_kv=16, d_ff=128, num_heads=4, num_layers=depth, vocab_size=100, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    ),
}  # fmt: skip
VARIANTS: tuple[tuple[str, Bits, dict[str, Any]], ...] = (
    ("lora", 16, {}),
    ("lora", 16, {"dropout": 0.1}),
    ("qlora", 4, {"rank": 8}),
    ("lora", 16, {"dora": True, "dropout": 0.1}),
    ("full", 16, {}),
    ("ia3", 16, {}),
)
"""QLoRA's recipe has dropout. At its rank a layer's gradients are larger than its input, so that the peak would be at
the other end of the backward pass."""


def spec_of(method: str, bits: Bits = 32, **changed: Any) -> TrialSpec:
    return make_recipe_spec(method, bits, batch_size=BATCH_SIZE, **changed)


@pytest.fixture(scope="module")
def costs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], HfCostModel]:
    """By architecture and depth, as on a GPU."""
    made: dict[tuple[str, int], HfCostModel] = {}

    def make(architecture: str, depth: int) -> HfCostModel:
        if (architecture, depth) not in made:
            folder = tmp_path_factory.mktemp(architecture)
            CONFIGS[architecture](depth).save_pretrained(folder)
            made[architecture, depth] = HfCostModel(
                str(folder), num_labels=2, device_kind="cuda", longest_tokens=TOKENS
            )
        return made[architecture, depth]

    return make


@pytest.mark.parametrize("architecture", ["llama", *(pytest.param(n, marks=pytest.mark.slow) for n in ("bert", "t5"))])
@pytest.mark.parametrize(
    ("method", "bits", "changed"),
    # Those that differ most: on a quantized base with dropout, and in every weight.
    [pytest.param(*v, marks=() if v[0] in ("qlora", "full") else pytest.mark.slow) for v in VARIANTS],
)
def test_on_a_gpu_checkpointed_layers_keep_their_inputs_alone(costs, architecture, method, bits, changed):
    spec = spec_of(method, bits, **changed)
    plain, shallow, deep = (
        costs(architecture, depth).estimate(spec, settings, every_layer=True).activation_bytes
        for depth, settings in ((3, StepSettings()), (3, CHECKPOINTED), (4, CHECKPOINTED))
    )
    # In bfloat16, or in float32 where a norm leaves them so. Without checkpointing a layer keeps 20 times as much.
    num_stacks = 2 if architecture == "t5" else 1
    assert 2 <= (deep - shallow) / (num_stacks * HIDDEN_NUMBERS) < 4.1
    assert shallow < plain


def test_a_layer_runs_again_under_the_modes_that_it_ran_under():
    seen: list[str] = []

    class Noting(torch.overrides.TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            seen.append(getattr(func, "__name__", ""))
            return func(*args, **(kwargs or {}))

    input_B = torch.ones(3, requires_grad=True)
    for context_fn, expected in ((None, 1), (keep_function_modes, 2)):
        seen.clear()
        chosen = {} if context_fn is None else {"context_fn": context_fn}
        with Noting(), Noting():
            torch.utils.checkpoint.checkpoint(torch.exp, input_B, use_reentrant=False, **chosen).sum().backward()
        # Each call is seen by both.
        assert seen.count("exp") == 2 * expected
    assert torch.overrides._get_current_function_mode_stack() == []
