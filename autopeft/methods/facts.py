"""What listings and the documentation say of a method: as plain data, and in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple

from autopeft.methods.base import EVERY_KIND, BuildContext, Dimension, Method, ModelKind
from autopeft.methods.faults import make_recipe_spec
from autopeft.methods.table import Origin
from autopeft.methods.targets import find_roles, resolve_targets
from autopeft.records import Scalar


class BaseWrites(NamedTuple):
    """Whether a trial needs base weights of its own, because the method writes into them."""

    when: Literal["never", "always", "by setting"]
    settings: tuple[tuple[str, Scalar], ...] = ()
    """The choices with which it does, where it depends on them."""


def find_base_writes(method: Method) -> BaseWrites:
    """Asked of the recipe, and of the recipe with each choice in turn."""
    spec = make_recipe_spec(method, device_kind="cpu")
    if method.writes_base(spec):
        return BaseWrites("always")
    writing = tuple(
        (dimension.name, value)
        for dimension in method.dimensions
        for value in dimension.choices
        if method.writes_base(replace(spec, settings={**spec.settings, dimension.name: value}))
    )
    return BaseWrites("by setting", writing) if writing else BaseWrites("never")


def find_peft_class(method: Method) -> str | None:
    """The class of peft's configuration; None where autopeft builds the method itself."""
    if method.peft is None:
        return None
    spec = make_recipe_spec(method, device_kind="cpu")
    return method.peft(spec, make_example_context(method.models[0], spec.target_modules)).class_name


class _Example(NamedTuple):
    """One architecture of a kind, as transformers names its modules."""

    block: str
    linears: tuple[str, ...]
    norms: tuple[str, ...]


_EXAMPLES: dict[ModelKind, _Example] = {
    "encoder": _Example(
        "bert.encoder.layer.{}.",
        ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
         "intermediate.dense", "output.dense"),
        ("attention.output.LayerNorm", "output.LayerNorm"),
    ),
    "decoder": _Example(
        "model.layers.{}.",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
        ("input_layernorm", "post_attention_layernorm"),
    ),
    "encoder-decoder": _Example(
        "transformer.encoder.block.{}.",
        ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v", "layer.0.SelfAttention.o",
         "layer.1.DenseReluDense.wi", "layer.1.DenseReluDense.wo"),
        ("layer.0.layer_norm", "layer.1.layer_norm"),
    ),
}  # fmt: skip
_TO_INNER = {"intermediate.dense", "mlp.gate_proj", "mlp.up_proj", "layer.1.DenseReluDense.wi"}
_FROM_INNER = {"output.dense", "mlp.down_proj", "layer.1.DenseReluDense.wo"}
_NUM_BLOCKS, _HIDDEN, _INNER = 12, 768, 3072
"""BERT-base's."""


def make_example_context(kind: ModelKind, target_modules: str | None) -> BuildContext:
    """A model that exists in name only, to see what a method asks of peft."""
    example = _EXAMPLES[kind]
    blocks = [example.block.format(number) for number in range(_NUM_BLOCKS)]
    sizes = {
        block + linear: (_INNER if linear in _FROM_INNER else _HIDDEN, _INNER if linear in _TO_INNER else _HIDDEN)
        for block in blocks
        for linear in example.linears
    }
    names = list(sizes)
    return BuildContext(
        targets=() if target_modules is None else tuple(resolve_targets(target_modules, names)),
        roles=find_roles(names),
        head=("classifier",),
        kind=kind,
        sizes=sizes,
        norms=tuple(block + norm for block in blocks for norm in example.norms),
    )


# --- as plain data


def describe_method(method: Method, origin: Origin) -> dict[str, Any]:
    """Everything of one method as JSON. The keys are an interface: `autopeft methods --help` explains them."""
    writes = find_base_writes(method)
    low, high = method.learning_rate
    return {
        "name": method.name,
        "title": method.title,
        "family": method.family,
        "paper": method.paper,
        "from": {"distribution": origin.distribution, "version": origin.version},
        "baseline": not method.searched,
        "peft_config": find_peft_class(method),
        "why_not_peft": method.why_not_peft or None,
        "models": list(method.models),
        "bits": list(method.bits),
        "optimizers": list(method.optimizers),
        "needs": method.needs or None,
        "target_modules": list(method.target_modules),
        "layer_choice": method.layer_choice,
        "merges": method.merges,
        "starts_as_base": method.starts_as_base,
        "answers_alone": method.answers_alone,
        "writes_base": {"when": writes.when, "settings": [{name: value} for name, value in writes.settings]},
        "learning_rate": {"low": low, "high": high},
        "dimensions": [_describe_dimension(dimension) for dimension in method.dimensions],
        "recipe": {
            "settings": dict(method.recipe.settings),
            "target_modules": method.recipe.target_modules,
            "learning_rate": method.recipe.learning_rate,
            "source": method.recipe.source,
        },
    }


def _describe_dimension(dimension: Dimension) -> dict[str, Any]:
    is_choice = dimension.kind == "choice"
    return {
        "name": dimension.name,
        "meaning": dimension.meaning,
        "kind": dimension.kind,
        "low": None if is_choice else dimension.low,
        "high": None if is_choice else dimension.high,
        "log": dimension.log,
        "choices": list(dimension.choices) if is_choice else None,
        "default": dimension.default,
        "only_if": {name: list(values) for name, values in dimension.only_if.items()},
    }


# --- in words


def format_value(value: Scalar) -> str:
    """As a search space file writes it: `true`, `0.25`, `gelu`."""
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def format_rate(value: float) -> str:
    """`1e-4`, `3e-2`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_rates(method: Method) -> str:
    low, high = method.learning_rate
    return f"{format_rate(low)} to {format_rate(high)}"


def format_range(dimension: Dimension) -> str:
    """`1 to 256, log`; `relu, gelu`."""
    if dimension.kind == "choice":
        return ", ".join(map(format_value, dimension.choices))
    assert dimension.low is not None
    assert dimension.high is not None
    return f"{dimension.low:g} to {dimension.high:g}{', log' if dimension.log else ''}"


def format_condition(dimension: Dimension) -> str:
    """`if bits is 16 or 32`; empty where it is always searched."""
    return " and ".join(
        f"if {name} is {' or '.join(map(format_value, values))}" for name, values in dimension.only_if.items()
    )


def format_settings(method: Method) -> str:
    """The recipe's: `rank 8, dora false`; empty where the method has none."""
    return ", ".join(f"{name} {format_value(value)}" for name, value in method.recipe.settings.items())


def format_bits(method: Method) -> str:
    """`4 8 16`, where 16 stands for the unquantized base: a method that has 16 has 32 as well."""
    return " ".join(str(width) for width in method.bits if width != 32)


def format_models(method: Method) -> str:
    """`all`, `encoder, decoder`."""
    return "all" if method.models == EVERY_KIND else ", ".join(method.models)


def format_base_writes(method: Method) -> str:
    """`never`, `always`, `with init pissa or init olora`."""
    writes = find_base_writes(method)
    if not writes.settings:
        return writes.when
    return "with " + " or ".join(f"{name} {format_value(value)}" for name, value in writes.settings)
