"""Every row of the table of methods keeps the same promises."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.errors import SpecError
from autopeft.methods import METHODS, Method, check_spec, find_method, refuse_spec
from autopeft.methods.base import BuildContext
from autopeft.methods.targets import find_roles, resolve_targets
from autopeft.records import TrialSpec

MakeSpec = Callable[..., TrialSpec]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
BERT = [
    f"bert.encoder.layer.{i}.{part}"
    for i in range(2)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")
]  # fmt: skip


@EVERY
def test_a_recipe_is_a_valid_configuration(method: Method, make_spec: MakeSpec) -> None:
    check_spec(make_spec(method.name))


@EVERY
@pytest.mark.parametrize(("device_kind", "bits"), [("cpu", 32), ("cuda", 16)])
def test_a_recipe_can_be_trained_on_every_device(
    method: Method, make_spec: MakeSpec, device_kind: str, bits: int
) -> None:
    assert refuse_spec(make_spec(method.name, bits=bits), device_kind) is None


@EVERY
def test_a_recipes_learning_rate_is_worth_searching(method: Method) -> None:
    low, high = method.learning_rate
    assert low <= method.recipe.learning_rate <= high


@EVERY
def test_every_dimensions_default_lies_inside_it(method: Method) -> None:
    assert [d.name for d in method.dimensions if not d.contains(d.default)] == []


@EVERY
def test_a_recipe_names_its_source(method: Method) -> None:
    assert method.recipe.source
    assert method.paper


@EVERY
def test_every_method_can_be_built_by_peft_or_says_why_not(method: Method) -> None:
    assert (method.peft is None) == bool(method.why_not_peft)
    assert method.peft is not None or method.build is not None


@EVERY
def test_a_dimension_has_no_method_prefix(method: Method) -> None:
    assert all("." not in d.name and d.meaning for d in method.dimensions)


@pytest.mark.parametrize(
    "method", [m for m in METHODS.values() if m.peft], ids=[m.name for m in METHODS.values() if m.peft]
)
def test_a_call_of_peft_is_plain_data(method: Method, make_spec: MakeSpec) -> None:
    spec = make_spec(method.name)
    targets = tuple(resolve_targets(spec.target_modules, BERT)) if spec.target_modules else ()
    assert method.peft is not None
    call = method.peft(spec, BuildContext(targets, find_roles(BERT), ("classifier",)))
    assert call.class_name.endswith("Config")
    assert all(isinstance(v, bool | int | float | str | list) for v in call.arguments.values())


def test_alpha_is_searched_as_a_ratio_and_given_to_peft_as_a_product(make_spec: MakeSpec) -> None:
    spec = make_spec(settings={"rank": 16, "alpha_over_rank": 0.5})
    assert METHODS["lora"].peft is not None
    call = METHODS["lora"].peft(spec, BuildContext((), find_roles(BERT), ()))
    assert (call.arguments["r"], call.arguments["lora_alpha"]) == (16, 8.0)


def test_ia3_rescales_the_feed_forward_only_where_asked(make_spec: MakeSpec) -> None:
    assert METHODS["ia3"].peft is not None
    calls = [
        METHODS["ia3"].peft(make_spec("ia3", settings={"feedforward": on}), BuildContext((), find_roles(BERT), ()))
        for on in (True, False)
    ]
    assert len(calls[0].arguments["feedforward_modules"]) == 2
    assert calls[1].arguments["feedforward_modules"] == []


# --- check_spec


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        ("lora", {"settings": {"rnk": 8}}, "no setting 'rnk'.*Did you mean 'rank'"),
        ("lora", {"settings": {"rank": 0}}, "lora.rank takes 1"),
        ("lora", {"settings": {"rank": 8.0}}, "lora.rank takes 1"),
        ("lora", {"settings": {"rank": True}}, "lora.rank takes 1"),
        ("lora", {"settings": {"dora": 1}}, "lora.dora takes"),
        ("lora", {"settings": {"init": "random"}}, "lora.init takes"),
        ("lora", {"bits": 5}, "bits is 5"),
        ("full", {"bits": 4}, "16, 32 bits, but bits is 4"),
        ("lora", {"target_modules": None}, "needs target_modules"),
        ("ia3", {"target_modules": "attention"}, "has no target_modules"),
        ("lora", {"target_modules": "atention"}, "Did you mean 'attention'"),
        ("lora", {"learning_rate": 0.0}, "learning_rate must be above zero"),
        ("lora", {"learning_rate": float("nan")}, "learning_rate must be above zero"),
        ("lora", {"batch_size": 0}, "batch_size must be above zero"),
        ("lora", {"max_steps": 0}, "max_steps must be above zero"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(
    make_spec: MakeSpec, method: str, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(SpecError, match=words):
        check_spec(make_spec(method, **changes))


def test_a_missing_setting_is_named(make_spec: MakeSpec) -> None:
    spec = make_spec()
    without = dataclasses.replace(spec, settings={k: v for k, v in spec.settings.items() if k != "rank"})
    with pytest.raises(SpecError, match="must set rank"):
        check_spec(without)


def test_an_unknown_method_gets_the_nearest_searched_one() -> None:
    with pytest.raises(SpecError, match="Did you mean 'lora'"):
        find_method("loar")
    with pytest.raises(SpecError, match="Known: bottleneck, full, ia3, lora, prefix_tuning, prompt_tuning"):
        find_method("zzz")


# --- what a machine refuses


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_pissa_needs_an_unquantized_base(make_spec: MakeSpec, bits: int, device_kind: str) -> None:
    rule = refuse_spec(make_spec(settings={"init": "pissa"}, bits=bits), device_kind)
    assert rule is not None
    assert "PiSSA" in rule


def test_pissa_is_fine_on_an_unquantized_base(make_spec: MakeSpec) -> None:
    assert refuse_spec(make_spec(settings={"init": "pissa"}), "cpu") is None


@pytest.mark.parametrize(
    ("bits", "device_kind", "refused"),
    [(8, "cpu", True), (4, "cpu", False), (32, "cpu", False), (8, "cuda", False), (4, "cuda", False)],
)
def test_dora_is_refused_on_int8_on_cpu_alone(make_spec: MakeSpec, bits: int, device_kind: str, refused: bool) -> None:
    assert (refuse_spec(make_spec(settings={"dora": True}, bits=bits), device_kind) is not None) == refused


@pytest.mark.parametrize(("bits", "device_kind", "instead"), [(16, "cpu", "32"), (32, "cuda", "16")])
def test_the_other_devices_unquantized_width_is_refused(
    make_spec: MakeSpec, bits: int, device_kind: str, instead: str
) -> None:
    rule = refuse_spec(make_spec("ia3", bits=bits), device_kind)
    assert rule is not None
    assert f"Use bits {instead}" in rule
