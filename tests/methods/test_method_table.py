"""Every row of the table of methods keeps the same promises, and what is no sound row is told from one."""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest

from autopeft.errors import SpecError
from autopeft.methods import METHODS, Method, check_spec, fill_settings, find_method, refuse_spec
from autopeft.methods.base import BuildContext, Family, Recipe, choice, floats, integers
from autopeft.methods.excluded import EXCLUDED
from autopeft.methods.facts import find_base_writes, make_example_context
from autopeft.methods.faults import FAMILIES, find_faults, make_recipe_spec
from autopeft.methods.table import MethodTable
from autopeft.methods.targets import find_roles
from autopeft.records import Bits, Scalar, TrialSpec

MakeSpec = Callable[..., TrialSpec]
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
MEASURED_RECIPES = Path(__file__).parents[2] / "leaderboards/sst2/minilm-recipes.csv"
"""Made by benchmarks/breadth.py."""
WITH_PEFT = [method for method in METHODS.values() if method.peft]
BERT = [
    f"bert.encoder.layer.{i}.{part}"
    for i in range(2)
    for part in ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense",
                 "intermediate.dense", "output.dense")
]  # fmt: skip


# --- every row


@EVERY
def test_a_row_has_no_faults(method: Method) -> None:
    assert find_faults(method) == []


@EVERY
@pytest.mark.parametrize("device_kind", ["cpu", "cuda"])
def test_a_recipe_is_a_valid_configuration_and_can_be_trained(method: Method, device_kind: str) -> None:
    spec = make_recipe_spec(method, device_kind=device_kind)
    check_spec(spec)
    assert refuse_spec(spec, device_kind) is None


@EVERY
def test_the_end_of_every_range_is_a_valid_configuration(method: Method) -> None:
    settings: dict[str, Scalar] = {
        d.name: d.choices[-1] if d.kind == "choice" else int(d.high or 0) if d.kind == "int" else d.high or 0.0
        for d in method.dimensions
    }
    check_spec(dataclasses.replace(make_recipe_spec(method, device_kind="cpu"), settings=settings))


@EVERY
def test_the_last_layers_can_be_chosen_exactly_where_the_row_says_so(method: Method) -> None:
    spec = make_recipe_spec(method, device_kind="cpu")
    spec = dataclasses.replace(spec, target_modules="all-linear:last-2" if method.target_modules else "last-2")
    if method.layer_choice:
        check_spec(spec)
    else:
        with pytest.raises(SpecError, match=method.title):
            check_spec(spec)


def test_every_recipe_for_encoders_was_measured_as_it_is_and_learned_something() -> None:
    with MEASURED_RECIPES.open(encoding="utf-8", newline="") as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert set(rows) == {method.name for method in METHODS.values() if "encoder" in method.models}
    for name, row in rows.items():
        recipe = METHODS[name].recipe
        measured = (float(row["learning_rate"]), row["target_modules"] or None)
        assert measured == (recipe.learning_rate, recipe.target_modules), name
        assert row["learned"] == "True", name


def test_a_recipe_that_names_the_measurements_is_among_them() -> None:
    naming = {method.name for method in METHODS.values() if MEASURED_RECIPES.stem in method.recipe.source}
    assert naming <= {method.name for method in METHODS.values() if "encoder" in method.models}


@EVERY
def test_a_row_that_writes_the_base_only_does_so_where_the_base_can_be_written(method: Method) -> None:
    # Quantized weights are blocks of codes: nothing can be trained or moved out of them in place.
    quantized: set[Bits] = {4, 8}
    for bits in quantized & set(method.bits):
        spec = make_recipe_spec(method, device_kind="cuda", bits=bits)
        for name, value in find_base_writes(method).settings:
            changed = dataclasses.replace(spec, settings={**spec.settings, name: value})
            assert method.refuse(changed, "cuda") is not None
        assert not method.writes_base(spec)


@pytest.mark.parametrize("method", WITH_PEFT, ids=[method.name for method in WITH_PEFT])
def test_a_call_of_peft_is_plain_data_that_shares_no_list(method: Method) -> None:
    assert method.peft is not None
    spec = make_recipe_spec(method, device_kind="cpu")
    for kind in method.models:
        context = make_example_context(kind, spec.target_modules)
        call = method.peft(spec, context)
        assert call.class_name.endswith("Config")
        assert json.loads(json.dumps(call.arguments)) == call.arguments
        # peft mutates the lists that it is given.
        before = copy.deepcopy(call)
        for value in call.arguments.values():
            if isinstance(value, list):
                value.append("changed")
        assert method.peft(spec, context) == before


def test_the_shipped_rows_stand_by_family() -> None:
    order = [FAMILIES.index(method.family) for method in METHODS.shipped.values()]
    assert order == sorted(order)
    assert {method.family for method in METHODS.shipped.values()} == set(get_args(Family))


def test_one_name_has_one_row() -> None:
    with pytest.raises(AssertionError, match="one name"):
        MethodTable([METHODS["lora"], METHODS["lora"]])


def test_only_the_baseline_is_not_searched() -> None:
    assert [method.name for method in METHODS.shipped.values() if not method.searched] == ["head"]


def test_full_fine_tuning_always_writes_the_base_lora_with_two_starts_and_ia3_never() -> None:
    assert find_base_writes(METHODS["full"]).when == "always"
    assert find_base_writes(METHODS["lora"]).settings == (("init", "pissa"), ("init", "olora"))
    assert find_base_writes(METHODS["ia3"]).when == "never"


# --- what is wrong with a row


def break_lora(**changes: Any) -> Method:
    return dataclasses.replace(METHODS["lora"], **changes)


def break_recipe(**changes: Any) -> Method:
    return break_lora(recipe=dataclasses.replace(METHODS["lora"].recipe, **changes))


def with_dimension(dimension: Any) -> Method:
    """A method of that dimension alone, with its default for a recipe."""
    recipe = Recipe(
        settings={dimension.name: dimension.default}, target_modules="attention", learning_rate=1e-3, source="here"
    )
    return dataclasses.replace(METHODS["hira"], dimensions=(dimension,), recipe=recipe)


def test_what_is_broken_below_was_sound() -> None:
    assert find_faults(with_dimension(integers("width", 1, 8, 2, "width"))) == []


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (break_lora(name="LoRA"), "name 'LoRA' must be lower-case"),
        (break_lora(name="lora.plus"), "name 'lora.plus'"),
        (break_lora(title=" "), "title must not be empty"),
        (break_lora(paper="a good one"), "paper 'a good one' must hold an arXiv number"),
        (break_lora(family="best"), "family 'best' must be one of low-rank"),
        (break_lora(bits=()), r"bits \(\) must be some of"),
        (break_lora(bits=(16,)), "bits must hold 16 and 32 or neither"),
        (break_lora(bits=(16, 4, 32)), "in that order"),
        (break_lora(models=()), "models"),
        (break_lora(optimizers=("paged_adamw_8bit",)), "optimizers .* every kind of device"),
        (break_lora(learning_rate=(1e-2, 1e-4)), "learning_rate must go from above zero"),
        (break_lora(learning_rate=(0.0, 1e-2)), "learning_rate must go from above zero"),
        (break_lora(learning_rate=(1e-2, 1e-1)), "recipe.learning_rate 0.001 must lie within"),
        (break_lora(peft=None, why_not_peft="because"), "peft or build must say"),
        (break_lora(build=METHODS["full"].build), "build would be ignored"),
        (break_lora(why_not_peft="because"), "why_not_peft must be given where peft lacks"),
        (break_lora(target_modules=("atention",)), "target_modules: .*Did you mean 'attention'"),
        (break_lora(target_modules=("mlp", "mlp")), "twice"),
        (break_lora(target_modules=()), "recipe.target_modules must be None"),
        (break_lora(layer_choice=False, target_modules=("mlp:last-2",)), "'mlp:last-2' needs layer_choice"),
        (break_recipe(target_modules=None), "recipe.target_modules must be given"),
        (break_recipe(source=""), "recipe.source must not be empty"),
        (break_recipe(settings={"rank": 8}), "must name exactly its dimensions, but names rank"),
        (break_recipe(settings={**METHODS["lora"].recipe.settings, "rank": 999}), "rank 999, which lies outside"),
        (break_lora(refuse=lambda spec, device: "never"), "refused on every device"),
        (
            break_lora(needs="", refuse=lambda spec, device: "no" if device == "cpu" else None),
            "refused on cpu, which needs must say",
        ),
        (with_dimension(integers("Width", 1, 8, 2, "width")), "dimension 'Width' must be lower-case"),
        (with_dimension(integers("batch_size", 1, 8, 2, "width")), "'batch_size' is a setting of every method"),
        (with_dimension(integers("width", 1, 8, 2, "")), "'width' must have a meaning"),
        (with_dimension(integers("width", 8, 1, 2, "width")), "must go from low to high"),
        (with_dimension(integers("width", 0, 8, 2, "width")), "logarithmic scale"),
        (with_dimension(integers("width", 1, 8, 9, "width")), "has the default 9, which lies outside"),
        (with_dimension(floats("width", 0.0, 1.0, 2.0, "width")), "has the default 2.0"),
        (with_dimension(choice("kind", ("a",), "a", "kind")), "two values or more"),
        (with_dimension(choice("kind", ("a", "a"), "a", "kind")), "each once"),
        (
            with_dimension(choice("kind", ("a", "b"), "a", "kind", only_if={"bits": (5,)})),
            r"only if bits is one of \(5,\)",
        ),
        (with_dimension(choice("kind", ("a", "b"), "a", "kind", only_if={"other": (True,)})), "only if other"),
    ],
)
def test_a_fault_is_named(method: Method, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        assert not find_faults(method), "; ".join(find_faults(method))


# --- single rows


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
        ("lora", {"optimizer": "adam"}, "no optimizer 'adam'.*Did you mean 'adamw'"),
        ("lora", {"target_modules": None}, "needs target_modules"),
        ("lora", {"target_modules": "attention:last-0"}, "last-K"),
        ("full", {"target_modules": "attention"}, "has no target_modules"),
        ("full", {"target_modules": "last-2"}, "has no target_modules"),
        ("bitfit", {"target_modules": "attention"}, "no groups of target modules.*last-4"),
        ("bitfit", {"target_modules": "last-0"}, "no groups of target modules"),
        ("bitfit", {"target_modules": "all-linear:last-2"}, "no groups of target modules"),
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
    with pytest.raises(SpecError, match=r"Known: adalora, .*, lora, .*, qlora") as caught:
        find_method("zzz")
    assert "head" not in str(caught.value)


def test_a_type_that_peft_has_and_autopeft_leaves_out_gets_the_reason() -> None:
    with pytest.raises(SpecError, match="'xlora' is in peft") as caught:
        find_method("xlora")
    assert EXCLUDED["XLORA"] in str(caught.value)


def test_paged_states_are_refused_on_cpu_for_every_method(make_spec: MakeSpec) -> None:
    spec = make_spec("ia3", optimizer="paged_adamw_8bit")
    assert "paged_adamw_8bit" in (refuse_spec(spec, "cpu") or "")
    assert refuse_spec(dataclasses.replace(spec, bits=16), "cuda") is None


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


def test_a_stored_configuration_from_before_a_dimension_existed_means_its_default(make_spec: MakeSpec) -> None:
    spec = make_spec("lora")
    older = dataclasses.replace(spec, settings={k: v for k, v in spec.settings.items() if k != "lr_ratio_b"})
    with pytest.raises(SpecError, match="lr_ratio_b"):
        check_spec(older)
    assert fill_settings(older) == dataclasses.replace(spec, settings={**spec.settings, "lr_ratio_b": 1.0})
