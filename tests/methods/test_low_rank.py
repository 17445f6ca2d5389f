"""LoRA's relatives: sizes that must divide, layers that must stay together, randomness that must come back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.errors import SpecError
from autopeft.methods.base import BuildContext, Method, PeftCall
from autopeft.methods.decomposed import DECOMPOSED
from autopeft.methods.low_rank import GLORA, GRALORA, LOW_RANK, MISS, target_sizes
from autopeft.methods.shared_random import LILY, SHARED_RANDOM, VBLORA, choose_vector_length
from autopeft.methods.targets import find_roles, shorten_targets
from autopeft.records import Scalar, TrialSpec

ROWS = (*LOW_RANK, *SHARED_RANDOM, *DECOMPOSED)
EVERY = pytest.mark.parametrize("method", ROWS, ids=[method.name for method in ROWS])
SEEDED = {
    "vera": "projection_prng_key", "pvera": "projection_prng_key", "randlora": "projection_prng_key",
    "unilora": "proj_seed", "tinylora": "projection_seed", "adamss": "random_seed",
}  # fmt: skip
ON_LINEARS = ("loha", "lokr", "delora", "glora", "miss", "peanut", "lily", "adamss")


def make_spec(method: Method, *, seed: int = 3, **settings: Scalar) -> TrialSpec:
    recipe = method.recipe
    return TrialSpec(
        method=method.name,
        settings={**recipe.settings, **settings},
        target_modules=recipe.target_modules,
        bits=32,
        learning_rate=recipe.learning_rate,
        batch_size=8,
        max_steps=12,
        warmup_ratio=0.0,
        schedule="constant",
        weight_decay=0.0,
        seed=seed,
    )


def bert_sizes(hidden: int = 64, inner: int = 128, num_layers: int = 4) -> dict[str, tuple[int, int]]:
    layer = {
        "attention.self.query": (hidden, hidden),
        "attention.self.key": (hidden, hidden),
        "attention.self.value": (hidden, hidden),
        "attention.output.dense": (hidden, hidden),
        "intermediate.dense": (hidden, inner),
        "output.dense": (inner, hidden),
    }
    blocks = {f"bert.encoder.layer.{i}.{name}": size for i in range(num_layers) for name, size in layer.items()}
    return {**blocks, "bert.pooler.dense": (hidden, hidden)}


def make_context(
    chosen: Callable[[str], bool] = lambda name: ".layer." in name, *, transposed: bool = False, **sizes: int
) -> BuildContext:
    """What a method is told of a BERT whose linear modules that are `chosen` are its targets."""
    known = bert_sizes(**sizes)
    names = [name for name in known if chosen(name)]
    return BuildContext(
        targets=tuple(shorten_targets(names, list(known))),
        roles=find_roles(list(known)),
        head=("classifier",),
        sizes=known,
        transposed=transposed,
    )


def ask_peft(method: Method, context: BuildContext, **settings: Scalar) -> PeftCall:
    assert method.peft is not None
    return method.peft(make_spec(method, **settings), context)


@EVERY
def test_a_call_trains_the_head_and_gives_lists_of_its_own(method: Method) -> None:
    context = make_context()
    first, second = ask_peft(method, context), ask_peft(method, context)
    assert first == second
    # peft changes the lists that it is given.
    for name in ("target_modules", "modules_to_save"):
        assert first.arguments[name] is not second.arguments[name]
    assert first.arguments["modules_to_save"] == ["classifier"]


@pytest.mark.parametrize("name", SEEDED)
def test_what_is_frozen_and_random_is_drawn_from_the_trials_seed(name: str) -> None:
    (method,) = (row for row in ROWS if row.name == name)
    assert method.peft is not None
    calls = [method.peft(make_spec(method, seed=seed), make_context()).arguments for seed in (7, 8)]
    assert [call.pop(SEEDED[name]) for call in calls] == [7, 8]
    assert calls[0] == calls[1]


@EVERY
def test_gpt2s_transposed_layers_are_refused_by_those_that_lack_them(method: Method) -> None:
    if method.name in ON_LINEARS:
        assert "Conv1D" in method.needs
        with pytest.raises(SpecError, match=r"put on nn\.Linear layers.*Conv1D.*Use LoRA"):
            ask_peft(method, make_context(transposed=True))
    else:
        assert ask_peft(method, make_context(transposed=True)) == ask_peft(method, make_context())


def test_sizes_are_those_of_the_targets_alone() -> None:
    context = make_context(lambda name: name.endswith("intermediate.dense"), num_layers=2)
    assert target_sizes(context) == {
        "bert.encoder.layer.0.intermediate.dense": (64, 128),
        "bert.encoder.layer.1.intermediate.dense": (64, 128),
    }


# --- GraLoRA


def test_gralora_counts_its_rank_over_all_blocks() -> None:
    arguments = ask_peft(GRALORA, make_context(), block_rank=3, blocks=4, alpha_over_rank=0.5).arguments
    assert (arguments["r"], arguments["gralora_k"], arguments["alpha"]) == (12, 4, 6.0)


def test_gralora_refuses_blocks_that_do_not_divide_a_target() -> None:
    with pytest.raises(SpecError, match=r"blocks is 8 and .*query maps 60 features to 60.*fewer blocks"):
        ask_peft(GRALORA, make_context(hidden=60), blocks=8)
    # 60 = 4 x 15, and nobody asks about the pooler or about layers that are not targets.
    assert ask_peft(GRALORA, make_context(hidden=60), blocks=4)
    assert ask_peft(GRALORA, make_context(lambda name: name.endswith("key"), inner=99), blocks=8)


# --- GLoRA, MiSS


def test_gloras_rank_is_searched_only_where_it_has_low_rank_paths() -> None:
    (rank,) = (dimension for dimension in GLORA.dimensions if dimension.name == "rank")
    assert rank.only_if == {"paths": ("lora",)}
    low_rank, vector = (ask_peft(GLORA, make_context(), paths=paths).arguments for paths in ("lora", "vector"))
    assert (low_rank["config_A_B"], low_rank["config_C"]) == ("lora", "lora")
    assert (vector["config_A_B"], vector["config_C"], vector["config_D_E"]) == ("vector", "vector", "vector")


def test_miss_refuses_more_rows_than_a_target_has_inputs() -> None:
    with pytest.raises(SpecError, match=r"rank is 65 and .*query has 64 input features.*smaller rank"):
        ask_peft(MISS, make_context(), rank=65)
    assert ask_peft(MISS, make_context(lambda name: name.endswith("layer.0.output.dense")), rank=65)


# --- VB-LoRA


@pytest.mark.parametrize(
    ("widths", "length"),
    [
        ((64, 128), 64),
        ((384, 1536), 192),  # MiniLM: 384 = 2 x 192, and 256 does not divide it
        ((768, 3072), 256),
        ((2048, 512, 8192), 256),
        ((), 256),
    ],
)
def test_vblora_takes_the_longest_vectors_that_fit_every_target(widths: tuple[int, ...], length: int) -> None:
    assert choose_vector_length(widths) == length


@given(st.lists(st.integers(1, 4096), min_size=1, max_size=6))
def test_vbloras_vectors_divide_every_width_or_are_refused(widths: list[int]) -> None:
    try:
        length = choose_vector_length(widths)
    except SpecError:
        assert all(any(width % length for width in widths) for length in range(16, 257))
    else:
        assert 16 <= length <= 256
        assert math.gcd(*widths) % length == 0


def test_vblora_looks_at_its_targets_alone() -> None:
    keys = make_context(lambda name: name.endswith("key"), hidden=128, inner=77)
    assert ask_peft(VBLORA, keys).arguments["vector_length"] == 128
    with pytest.raises(SpecError, match="largest common divisor is 1"):
        ask_peft(VBLORA, make_context(hidden=128, inner=77))


def test_vbloras_bank_learns_at_a_tenth_of_the_rate() -> None:
    def parameter(*, trains: bool = True) -> Any:
        return SimpleNamespace(requires_grad=trains)

    bank, logits, head = parameter(), parameter(), parameter()
    named = {
        "base_model.vblora_vector_bank.default": bank,
        "layer.0.query.vblora_logits_A.default": logits,
        "classifier.weight": head,
        "layer.0.query.base_layer.weight": parameter(trains=False),
    }
    assert VBLORA.parameter_groups is not None
    groups = VBLORA.parameter_groups(SimpleNamespace(named_parameters=named.items), make_spec(VBLORA))  # type: ignore[arg-type]
    assert groups == [{"params": [logits, head], "lr_scale": 1.0}, {"params": [bank], "lr_scale": 0.1}]


# --- Lily


def is_targeted(name: str, arguments: dict[str, Any]) -> bool:
    """peft's rule for lists of target modules and exclusions."""

    def fits(endings: list[str]) -> bool:
        return any(name == ending or name.endswith("." + ending) for ending in endings)

    return fits(arguments["target_modules"]) and not fits(arguments["exclude_modules"])


CHOICES = {
    "all": lambda name: ".layer." in name,
    "last-2": lambda name: ".layer.2." in name or ".layer.3." in name,
    "mlp of the last": lambda name: ".layer.3." in name and ("intermediate" in name or "3.output" in name),
    "mlp": lambda name: ".layer." in name and ".attention." not in name,
    "one query": lambda name: name.endswith("layer.1.attention.self.query"),
}


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_lily_is_put_on_the_targets_and_nothing_else(chosen: Callable[[str], bool]) -> None:
    arguments = ask_peft(LILY, make_context(chosen)).arguments
    assert [name for name in bert_sizes() if is_targeted(name, arguments)] == list(filter(chosen, bert_sizes()))


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
def test_lilys_layers_of_one_role_are_meant_by_one_entry(chosen: Callable[[str], bool]) -> None:
    arguments = ask_peft(LILY, make_context(chosen)).arguments
    for name in filter(chosen, bert_sizes()):
        meant_by = [target for target in arguments["target_modules"] if name.endswith(target)]
        assert len(meant_by) == 1
        assert not any(character.isdigit() for character in meant_by[0])


@pytest.mark.filterwarnings("default")
def test_lilys_last_layers_share_their_factors(tmp_path: Path) -> None:
    from tiny_models import make_tiny_bert

    from autopeft.backends.hf.base_model import describe_base
    from autopeft.backends.hf.build import count_trainable, put_on_peft

    base = describe_base(make_tiny_bert(tmp_path), num_labels=2, bits=32)
    queries = [name for name in base.linear_names if name.endswith("query")]
    context = BuildContext(
        targets=tuple(queries),
        roles=find_roles(base.linear_names),
        head=base.head,
        sizes={name: (64, 64) for name in base.linear_names},
    )
    model = put_on_peft(base.model.requires_grad_(False), ask_peft(LILY, context, rank=8, layers_per_a=2))
    # A and the two B of 64 x 8 once for both layers, a router of 8 x 2 for each.
    assert count_trainable(model, base.head).adapter == 3 * 64 * 8 + 2 * (8 * 2)
