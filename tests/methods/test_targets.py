"""Target modules by meaning, on the names that real architectures use."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpecError
from autopeft.methods.targets import GROUPS, check_target_modules, find_roles, resolve_targets, shorten_targets

_T5_LAYER = ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.0.SelfAttention.o")
_T5_CROSS = tuple(f"layer.1.EncDecAttention.{name}" for name in "qkvo")

# architecture -> (prefix of its blocks, linear layers of a block, linear layers outside the blocks)
BLOCKS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "bert": (
        "bert.encoder.layer.{}.",
        (
            "attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
            "intermediate.dense", "output.dense",
        ),
        ("bert.pooler.dense",),
    ),
    "gpt2": ("transformer.h.{}.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), ()),
    "llama": (
        "model.layers.{}.",
        (
            "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
            "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
        ),
        (),
    ),
    "t5": (
        "decoder.block.{}.",
        (*_T5_LAYER, *_T5_CROSS, "layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1",
         "layer.2.DenseReluDense.wo"),
        ("lm_head",),
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}.",
        ("attention.q_lin", "attention.k_lin", "attention.v_lin", "attention.out_lin", "ffn.lin1", "ffn.lin2"),
        ("pre_classifier",),
    ),
    "modernbert": ("model.layers.{}.", ("attn.Wqkv", "attn.Wo", "mlp.Wi", "mlp.Wo"), ("head.dense",)),
}  # fmt: skip

ROLES: dict[str, dict[str, list[str]]] = {
    "bert": {
        "query": ["attention.self.query"], "key": ["attention.self.key"], "value": ["attention.self.value"], "qkv": [],
        "attention-out": ["attention.output.dense"], "mlp-in": ["intermediate.dense"], "mlp-out": ["output.dense"],
    },
    "gpt2": {
        "query": [], "key": [], "value": [], "qkv": ["attn.c_attn"], "attention-out": ["attn.c_proj"],
        "mlp-in": ["mlp.c_fc"], "mlp-out": ["mlp.c_proj"],
    },
    "llama": {
        "query": ["self_attn.q_proj"], "key": ["self_attn.k_proj"], "value": ["self_attn.v_proj"], "qkv": [],
        "attention-out": ["self_attn.o_proj"], "mlp-in": ["mlp.gate_proj", "mlp.up_proj"], "mlp-out": ["mlp.down_proj"],
    },
    "t5": {
        "query": ["layer.0.SelfAttention.q", "layer.1.EncDecAttention.q"],
        "key": ["layer.0.SelfAttention.k", "layer.1.EncDecAttention.k"],
        "value": ["layer.0.SelfAttention.v", "layer.1.EncDecAttention.v"],
        "qkv": [],
        "attention-out": ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"],
        "mlp-in": ["layer.2.DenseReluDense.wi_0", "layer.2.DenseReluDense.wi_1"],
        "mlp-out": ["layer.2.DenseReluDense.wo"],
    },
    "distilbert": {
        "query": ["attention.q_lin"], "key": ["attention.k_lin"], "value": ["attention.v_lin"], "qkv": [],
        "attention-out": ["attention.out_lin"], "mlp-in": ["ffn.lin1"], "mlp-out": ["ffn.lin2"],
    },
    "modernbert": {
        "query": [], "key": [], "value": [], "qkv": ["attn.Wqkv"], "attention-out": ["attn.Wo"], "mlp-in": ["mlp.Wi"],
        "mlp-out": ["mlp.Wo"],
    },
}  # fmt: skip

ARCHITECTURES = sorted(BLOCKS)


def linear_names(architecture: str, num_layers: int = 12) -> list[str]:
    prefix, block, outside = BLOCKS[architecture]
    return [prefix.format(i) + name for i in range(num_layers) for name in block] + list(outside)


def means(endings: Sequence[str], names: Sequence[str]) -> list[str]:
    """peft's rule for a list of target modules."""
    return [n for n in names if any(n == ending or n.endswith("." + ending) for ending in endings)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_role_is_found_in_every_block(architecture: str) -> None:
    prefix = BLOCKS[architecture][0]
    roles = find_roles(linear_names(architecture, num_layers=2))
    expected = {
        role: [prefix.format(i) + name for i in range(2) for name in names]
        for role, names in ROLES[architecture].items()
    }
    assert {role: sorted(names) for role, names in roles.items()} == {
        role: sorted(names) for role, names in expected.items()
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_group_is_its_roles_and_nothing_outside_the_blocks(architecture: str, group: str) -> None:
    names = linear_names(architecture)
    roles = find_roles(names)
    expected = {name for role in GROUPS[group] for name in roles[role]}
    chosen = resolve_targets(group, names)
    assert set(chosen) == expected
    assert set(chosen).isdisjoint(BLOCKS[architecture][2])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_attention_and_mlp_together_are_all_linear_layers(architecture: str) -> None:
    names = linear_names(architecture)
    both = set(resolve_targets("attention", names)) | set(resolve_targets("mlp", names))
    assert both == set(resolve_targets("all-linear", names))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_chosen_modules_come_in_the_models_order(architecture: str, group: str) -> None:
    names = linear_names(architecture)
    chosen = resolve_targets(group, names)
    assert chosen == sorted(chosen, key=names.index)


def test_an_unknown_architecture_means_all_linear_layers_in_its_blocks() -> None:
    names = [f"trunk.{i}.{part}" for i in range(2) for part in ("alpha", "beta")] + ["top"]
    for group in GROUPS:
        assert resolve_targets(group, names) == names[:-1]


def test_names_of_ones_own_are_endings() -> None:
    names = linear_names("llama", 2)
    assert resolve_targets("names:q_proj, v_proj", names) == means(["q_proj", "v_proj"], names)


def test_a_name_means_whole_parts_only() -> None:
    assert resolve_targets("names:proj", ["h.0.proj", "h.0.q_proj"]) == ["h.0.proj"]


def test_a_pattern_must_fit_the_whole_name() -> None:
    names = linear_names("llama", 12)
    assert resolve_targets(r"re:model\.layers\.1\..*q_proj", names) == ["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("targets", ["names:nothing", "re:nothing", "names:"])
def test_targets_that_fit_nothing_are_refused_with_examples(targets: str) -> None:
    with pytest.raises(SpecError, match=r"fits none of this model's 84 linear layers, such as model\.layers\.0"):
        resolve_targets(targets, linear_names("llama"))


def test_an_unknown_group_gets_the_nearest_one() -> None:
    with pytest.raises(SpecError, match=r"'atention'.*Did you mean 'attention'"):
        check_target_modules("atention")


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(SpecError, match="no regular expression"):
        check_target_modules("re:(")


# --- short names for configuration files


@st.composite
def chosen_and_names(draw: st.DrawFn) -> tuple[list[str], list[str]]:
    names = linear_names(draw(st.sampled_from(ARCHITECTURES)), draw(st.integers(1, 3)))
    chosen = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    return sorted(chosen, key=names.index), names


@given(chosen_and_names())
def test_shortened_targets_mean_exactly_the_chosen_modules(pair: tuple[list[str], list[str]]) -> None:
    chosen, names = pair
    assert means(shorten_targets(chosen, names), names) == chosen


@given(st.lists(st.lists(st.sampled_from(["a", "b", "0", "1"]), min_size=1, max_size=4).map(".".join), min_size=2,
                unique=True), st.data())  # fmt: skip
def test_shortening_is_exact_on_any_names(names: list[str], data: st.DataObject) -> None:
    chosen = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    endings = shorten_targets(chosen, names)
    # A full name that is another's ending means both by peft's own rule: nothing could tell them apart.
    if all(means([name], names) == [name] for name in chosen):
        assert set(means(endings, names)) == set(chosen)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_group_is_written_with_a_few_names_however_deep_the_model(architecture: str, group: str) -> None:
    if (architecture, group) == ("bert", "mlp"):
        pytest.skip("BERT's `output.dense` is also an ending of its `attention.output.dense`")
    names = linear_names(architecture, 12)
    assert len(shorten_targets(resolve_targets(group, names), names)) <= len(BLOCKS[architecture][1])
