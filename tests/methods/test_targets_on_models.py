"""Target modules by meaning, on the models that transformers builds, and as peft finds them there."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.lora import LoraLayer

from autopeft.backends.hf.base_model import BaseModel, find_head, find_linear_names
from autopeft.backends.hf.build import put_on_peft
from autopeft.errors import SpecError
from autopeft.methods.base import PeftCall
from autopeft.methods.targets import GROUPS, explain_targets, find_blocks, find_roles, resolve_targets, shorten_targets

_DEPTH = 4
_DECODER_DEPTH = 3
_SIZES = {
    "hidden_size": 32, "num_hidden_layers": _DEPTH, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_T5_SIZES = {
    "d_model": 32, "d_ff": 64, "d_kv": 8, "num_heads": 4, "vocab_size": 64, "num_layers": _DEPTH,
    "num_decoder_layers": _DECODER_DEPTH,
}  # fmt: skip

CONFIGS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertConfig(**_SIZES),
    "roberta": lambda: transformers.RobertaConfig(**_SIZES),
    "deberta-v3": lambda: transformers.DebertaV2Config(
        **_SIZES, relative_attention=True, pos_att_type=["p2c", "c2p"], share_att_key=True, position_buckets=8
    ),
    "distilbert": lambda: transformers.DistilBertConfig(
        dim=32, n_layers=_DEPTH, n_heads=4, hidden_dim=64, vocab_size=64
    ),
    "modernbert": lambda: transformers.ModernBertConfig(**_SIZES, cls_token_id=1, sep_token_id=2),
    "electra": lambda: transformers.ElectraConfig(**_SIZES, embedding_size=16),
    "gpt2": lambda: transformers.GPT2Config(
        n_embd=32, n_layer=_DEPTH, n_head=4, vocab_size=64, bos_token_id=1, eos_token_id=2
    ),
    "llama": lambda: transformers.LlamaConfig(**_SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**_SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**_SIZES),
    "mistral": lambda: transformers.MistralConfig(**_SIZES),
    "gemma": lambda: transformers.GemmaConfig(**_SIZES, head_dim=8),
    "phi3": lambda: transformers.Phi3Config(**_SIZES),
    "phi": lambda: transformers.PhiConfig(**_SIZES),
    "mixtral": lambda: transformers.MixtralConfig(**_SIZES, num_local_experts=4),
    "phimoe": lambda: transformers.PhimoeConfig(**_SIZES, num_local_experts=4),
    "qwen2-moe": lambda: transformers.Qwen2MoeConfig(
        **_SIZES, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts_per_tok=2
    ),
    "t5": lambda: transformers.T5Config(**_T5_SIZES),
    "t5-gated": lambda: transformers.T5Config(**_T5_SIZES, feed_forward_proj="gated-gelu"),
    "bart": lambda: transformers.BartConfig(
        d_model=32, encoder_layers=_DEPTH, decoder_layers=_DECODER_DEPTH, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64, pad_token_id=0, bos_token_id=1,
        eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    ),
    "vit": lambda: transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=_DEPTH, num_attention_heads=4, intermediate_size=64, image_size=16,
        patch_size=8,
    ),
}  # fmt: skip

# architecture -> linear layers a block: queries and values, attention, feed-forward. Decoders of encoder-decoders
# attend twice.
_PLAIN = (2, 4, 2)
_GATED = (2, 4, 3)
_FUSED = (1, 2, 2)
A_BLOCK: dict[str, tuple[int, int, int]] = {
    "bert": _PLAIN, "roberta": _PLAIN, "deberta-v3": _PLAIN, "distilbert": _PLAIN, "electra": _PLAIN, "phi": _PLAIN,
    "vit": _PLAIN, "t5": _PLAIN, "bart": _PLAIN,
    "llama": _GATED, "qwen2": _GATED, "qwen3": _GATED, "mistral": _GATED, "gemma": _GATED, "t5-gated": _GATED,
    # The shared expert's; the others are one parameter.
    "qwen2-moe": _GATED,
    "modernbert": _FUSED, "gpt2": _FUSED, "phi3": _FUSED,
    "mixtral": (2, 4, 0), "phimoe": (2, 4, 0),
}  # fmt: skip
ENCODER_DECODERS = ("t5", "t5-gated", "bart")
MIXTURES = ("mixtral", "phimoe", "qwen2-moe")

ARCHITECTURE = pytest.mark.parametrize("architecture", sorted(CONFIGS))
GROUP = pytest.mark.parametrize("group", sorted(GROUPS))


@functools.cache
def build_base(architecture: str) -> BaseModel:
    auto = (
        transformers.AutoModelForImageClassification
        if architecture == "vit"
        else transformers.AutoModelForSequenceClassification
    )
    with torch.device("meta"):
        model = auto.from_config(CONFIGS[architecture]())
    head = find_head(model)
    return BaseModel(model=model, bits=32, head=head, linear_names=find_linear_names(model, head))


def count(architecture: str, group: str, encoder_blocks: int, decoder_blocks: int) -> int:
    query_value, attention, mlp = A_BLOCK[architecture]
    a_block = {"attention-qv": query_value, "attention": attention, "mlp": mlp, "all-linear": attention + mlp}[group]
    crossing = {"attention-qv": query_value, "attention": attention, "mlp": 0, "all-linear": attention}[group]
    if architecture not in ENCODER_DECODERS:
        decoder_blocks = 0
    return encoder_blocks * a_block + decoder_blocks * (a_block + crossing)


@ARCHITECTURE
def test_each_stack_has_its_blocks(architecture: str) -> None:
    stacks = find_blocks(name for name, _ in build_base(architecture).model.named_modules())
    decoder = [list(range(_DECODER_DEPTH))] if architecture in ENCODER_DECODERS else []
    assert sorted(stacks.values(), key=len, reverse=True) == [list(range(_DEPTH)), *decoder]


@ARCHITECTURE
@GROUP
@pytest.mark.parametrize(
    ("suffix", "encoder_blocks", "decoder_blocks"),
    [("", 4, 3), (":last-1", 1, 1), (":last-2", 2, 2), (":last-4", 4, 3)],
)
def test_a_group_has_the_expected_layers_and_peft_finds_exactly_them(
    architecture: str, group: str, suffix: str, encoder_blocks: int, decoder_blocks: int
) -> None:
    base = build_base(architecture)
    expected = count(architecture, group, encoder_blocks, decoder_blocks)
    if expected == 0:
        with pytest.raises(SpecError, match="Experts fused into one parameter"):
            resolve_targets(group + suffix, base.linear_names)
        return
    chosen = resolve_targets(group + suffix, base.linear_names)
    assert len(chosen) == expected
    assert find_by_peft(base, shorten_targets(chosen, base.linear_names)) == chosen


def find_by_peft(base: BaseModel, targets: list[str]) -> list[str]:
    arguments = {"r": 1, "target_modules": list(targets), "modules_to_save": list(base.head)}
    adapted = put_on_peft(copy.deepcopy(base.model), PeftCall("LoraConfig", arguments))
    prefix = "base_model.model."
    return [name.removeprefix(prefix) for name, module in adapted.named_modules() if isinstance(module, LoraLayer)]


@ARCHITECTURE
def test_a_whole_group_needs_no_more_names_than_a_block_has_layers(architecture: str) -> None:
    base = build_base(architecture)
    chosen = resolve_targets("all-linear", base.linear_names)
    # A decoder's blocks have what the encoder's have, and the crossing attention.
    largest = count(architecture, "all-linear", 0, 1) or count(architecture, "all-linear", 1, 0)
    assert len(shorten_targets(chosen, base.linear_names)) <= largest


@ARCHITECTURE
def test_every_linear_layer_in_a_block_but_a_router_plays_a_role(architecture: str) -> None:
    base = build_base(architecture)
    with_role = {name for names in find_roles(base.linear_names).values() for name in names}
    assert with_role == set(resolve_targets("all-linear", base.linear_names))


@pytest.mark.parametrize(("architecture", "router"), [("phimoe", "router"), ("qwen2-moe", "shared_expert_gate")])
def test_a_linear_router_is_no_target_however_it_is_named(architecture: str, router: str) -> None:
    names = build_base(architecture).linear_names
    assert any(name.endswith(router) for name in names)
    assert not [name for name in resolve_targets("all-linear", names) if name.endswith(router)]
    for target_modules in (f"names:q_proj,{router}", f"re:.*{router}"):
        with pytest.raises(SpecError, match=f"fits the router .*{router}"):
            resolve_targets(target_modules, names)


@pytest.mark.parametrize("architecture", sorted(set(CONFIGS) - set(MIXTURES)))
@GROUP
def test_nothing_needs_explaining_where_a_group_means_what_it_says(architecture: str, group: str) -> None:
    assert explain_targets(group, build_base(architecture).linear_names) is None


@pytest.mark.parametrize("architecture", MIXTURES)
def test_a_mixture_says_that_its_experts_are_left_as_they_are(architecture: str) -> None:
    names = build_base(architecture).linear_names
    assert "In 4 blocks of this model the experts are one fused parameter" in (
        explain_targets("all-linear", names) or ""
    )
    assert explain_targets("attention", names) is None


@given(st.sampled_from(sorted(CONFIGS)), st.sampled_from(sorted(GROUPS)), st.integers(1, _DEPTH - 1))
def test_the_last_blocks_are_among_one_more(architecture: str, group: str, last: int) -> None:
    names = build_base(architecture).linear_names
    if count(architecture, group, 1, 1) == 0:
        return
    fewer = resolve_targets(f"{group}:last-{last}", names)
    more = resolve_targets(f"{group}:last-{last + 1}", names)
    assert set(fewer) < set(more) <= set(resolve_targets(group, names))
