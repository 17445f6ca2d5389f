"""Target modules by meaning, on the names that real architectures use."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpecError
from autopeft.methods.targets import (
    GROUPS,
    Block,
    check_target_modules,
    choose_layers,
    explain_targets,
    find_block,
    find_blocks,
    find_roles,
    keep_last_blocks,
    resolve_targets,
    shorten_targets,
    takes_last,
)

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


# --- blocks and last-K


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("bert.encoder.layer.11.output.dense", Block("bert.encoder.layer", 11)),
        ("decoder.block.2.layer.1.EncDecAttention.q", Block("decoder.block", 2)),
        ("model.layers.3.mlp.experts.7.w1", Block("model.layers", 3)),
        ("7.dense", Block("", 7)),
        ("model.layers2.dense", None),
        ("projector.0", None),
        ("pooler.dense", None),
    ],
)
def test_the_first_number_in_a_name_is_the_blocks(name: str, block: Block | None) -> None:
    assert find_block(name) == block


def test_each_stack_counts_its_own_last_blocks() -> None:
    names = [f"encoder.{i}.q_proj" for i in range(6)] + [f"decoder.{i}.q_proj" for i in range(3)]
    assert find_blocks(names) == {"encoder": [0, 1, 2, 3, 4, 5], "decoder": [0, 1, 2]}
    assert keep_last_blocks(names, 2) == [
        "encoder.4.q_proj",
        "encoder.5.q_proj",
        "decoder.1.q_proj",
        "decoder.2.q_proj",
    ]
    # The decoder is not that deep and takes part with all it has.
    assert len(keep_last_blocks(names, 4)) == 4 + 3


def test_the_last_blocks_are_counted_and_not_computed_from_their_numbers() -> None:
    assert keep_last_blocks(["h.2.a", "h.5.a", "h.10.a"], 2) == ["h.5.a", "h.10.a"]


def test_what_is_in_no_block_is_not_in_the_last_ones() -> None:
    assert keep_last_blocks(["embeddings.norm", "h.0.norm", "h.1.norm", "final.norm"], 1) == ["h.1.norm"]


@given(
    st.lists(st.tuples(st.sampled_from(["encoder", "decoder", "a.b"]), st.integers(0, 9)), min_size=1, unique=True),
    st.data(),
)
def test_the_last_blocks_are_among_one_more(blocks: list[tuple[str, int]], data: st.DataObject) -> None:
    names = [f"{stack}.{number}.dense" for stack, number in blocks]
    deepest = max(map(len, find_blocks(names).values()))
    last = data.draw(st.integers(1, deepest))
    kept = keep_last_blocks(names, last)
    assert {len(numbers) for numbers in find_blocks(kept).values()} <= set(range(1, last + 1))
    if last == deepest:
        assert kept == names
    else:
        assert set(kept) < set(keep_last_blocks(names, last + 1))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("group", sorted(GROUPS))
@pytest.mark.parametrize("last", [1, 5, 12])
def test_a_group_of_the_last_blocks_is_the_group_there(architecture: str, group: str, last: int) -> None:
    names = linear_names(architecture, num_layers=12)
    prefix = BLOCKS[architecture][0]
    there = tuple(prefix.format(i) for i in range(12 - last, 12))
    expected = [name for name in resolve_targets(group, names) if name.startswith(there)]
    assert resolve_targets(f"{group}:last-{last}", names) == expected


def test_the_last_blocks_alone_are_all_linear_layers_there() -> None:
    names = linear_names("bert")
    assert resolve_targets("last-3", names) == resolve_targets("all-linear:last-3", names)


def test_blocks_without_the_group_count_too() -> None:
    # A model whose last block has no attention, as hybrids have.
    names = ["h.0.q_proj", "h.0.up_proj", "h.1.q_proj", "h.1.up_proj", "h.2.up_proj"]
    assert resolve_targets("attention:last-2", names) == ["h.1.q_proj"]
    with pytest.raises(SpecError, match="'attention' fits no linear layer of this model in its last block"):
        resolve_targets("attention:last-1", names)


def test_more_blocks_than_the_model_has_are_refused() -> None:
    with pytest.raises(SpecError, match="last 13 blocks, but this model has 12"):
        resolve_targets("attention:last-13", linear_names("bert"))


@pytest.mark.parametrize("group", sorted(GROUPS))
@pytest.mark.parametrize("suffix", ["", ":last-1", ":last-24"])
def test_a_group_may_end_in_the_last_blocks(group: str, suffix: str) -> None:
    check_target_modules(group + suffix)
    assert takes_last(group + suffix) == bool(suffix)


@pytest.mark.parametrize("target_modules", ["names:query", "re:.*last-4", "names:last-4", "attention"])
def test_names_and_patterns_are_not_kept_to_the_last_blocks(target_modules: str) -> None:
    check_target_modules(target_modules)
    assert not takes_last(target_modules)


@pytest.mark.parametrize(
    ("target_modules", "words"),
    [
        ("attention:last-0", "with K from 1, such as attention:last-4, but not in ':last-0'"),
        ("attention:lst-4", "not in ':lst-4'"),
        ("attention:", "not in ':'"),
        ("attention:last-2:last-1", "not in ':last-2:last-1'"),
        ("atention:last-4", "Did you mean 'attention'"),
        (":last-4", "no group of target modules ':last-4'"),
        ("last-0", "no group of target modules 'last-0'"),
        ("last-04", "no group of target modules 'last-04'"),
        ("", "no group of target modules ''"),
    ],
)
def test_a_misspelt_group_is_refused(target_modules: str, words: str) -> None:
    with pytest.raises(SpecError, match=words):
        check_target_modules(target_modules)


def test_a_method_without_groups_takes_all_layers_or_the_last_ones() -> None:
    names = ["embeddings.norm", "h.0.norm", "h.1.norm"]
    assert choose_layers(None, names) == names
    assert choose_layers("last-1", names) == ["h.1.norm"]
    with pytest.raises(SpecError, match="without groups of target modules takes last-4"):
        choose_layers("attention:last-1", names)


# --- what a group could not mean


def test_an_unknown_architecture_is_told() -> None:
    names = [f"trunk.{i}.{part}" for i in range(2) for part in ("alpha", "beta")] + ["top"]
    assert resolve_targets("attention:last-1", names) == ["trunk.1.alpha", "trunk.1.beta"]
    for target_modules in ("attention", "mlp:last-1"):
        explanation = explain_targets(target_modules, names) or ""
        assert "architecture is not known" in explanation
        assert "all 4 linear layers inside its repeated blocks, such as trunk.0.alpha" in explanation


@pytest.mark.parametrize("target_modules", ["all-linear", "last-1", "names:alpha", "re:.*alpha"])
def test_what_means_what_it_says_needs_no_explaining_on_any_architecture(target_modules: str) -> None:
    assert explain_targets(target_modules, ["trunk.0.alpha", "trunk.1.alpha"]) is None


def test_blocks_without_linear_experts_are_counted() -> None:
    # The first block is dense, as in DeepSeek; the others have a shared expert beside the fused ones.
    names = [f"layers.{i}.self_attn.q_proj" for i in range(3)]
    names += ["layers.0.mlp.up_proj", "layers.1.mlp.shared_experts.up_proj", "layers.2.mlp.shared_experts.up_proj"]
    assert "In 2 blocks" in (explain_targets("mlp", names) or "")
    assert resolve_targets("mlp", names) == names[3:]


def test_a_model_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(SpecError, match="fits none of this model's 1 linear layers: none is inside repeated blocks"):
        resolve_targets("all-linear", ["projection"])


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
