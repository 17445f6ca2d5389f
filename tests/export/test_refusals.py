"""Every method, width and kind of task either exports to a target or is refused with the reason and the nearest."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from chosen_trials import draw_recipe, make_study, make_trial

from autopeft.export import (
    TARGETS,
    axolotl,
    find_nearest,
    find_way,
    llama_factory,
    ms_swift,
    refuse_export,
    trl,
    unsloth,
)
from autopeft.export.settings import TRAINING, Unsaid, list_values, say_all
from autopeft.methods import METHODS
from autopeft.methods.base import Dimension
from autopeft.methods.facts import make_example_context
from autopeft.methods.faults import make_recipe_spec
from autopeft.records import Bits, TrialSpec

KINDS = ("classification", "generation")
TABLED = {"trl": trl, "llama-factory": llama_factory, "axolotl": axolotl, "unsloth": unsloth, "ms-swift": ms_swift}
LORA = {"lora", "qlora"}
SAYS = {
    "trl": {*LORA, "full"},
    "llama-factory": {*LORA, "full", "oft"},
    "axolotl": {*LORA, "full"},
    "unsloth": {*LORA, "full"},
    "ms-swift": {*LORA, "full", "adalora", "vera", "boft"},
}
"""What a trainer has at all; a configuration of it can still be refused."""
NOT_IN_PEFT = {"full", "head", "bitfit", "bottleneck", "lora_bottleneck", "adaption_prompt"}
NOT_IN_SCRIPT = {"bottleneck", "lora_bottleneck", "adaption_prompt"}


def make_spec(method: str, bits: Bits | None = None) -> TrialSpec:
    device = "cuda" if bits == 16 else "cpu"
    return dataclasses.replace(make_recipe_spec(METHODS[method], device_kind=device, bits=bits), optimizer="adamw")


def every_case() -> Iterator[tuple[str, Bits, str, str]]:
    for method in METHODS.shipped:
        for bits, kind, target in itertools.product(METHODS[method].bits, KINDS, TARGETS):
            yield method, bits, kind, target


def expect(method: str, bits: Bits, kind: str, target: str) -> bool:
    """Whether the method's recipe is expected to export."""
    if target == "peft":
        return method not in NOT_IN_PEFT
    if target == "trainer":
        return method not in NOT_IN_SCRIPT and not (method == "head" and bits < 16)
    if kind == "classification" and target != "ms-swift":
        return False
    # Unsloth trains on GPUs, and the study is made on a CPU unless its base has 16 bits.
    return method in SAYS[target] and not (target == "unsloth" and bits != 16)


def test_every_method_width_kind_and_target_exports_or_is_refused_with_a_sentence() -> None:
    wrong = []
    for method, bits, kind, target in every_case():
        recipe, task = draw_recipe(make_spec(method, bits), kind)
        reason = refuse_export(target, recipe, task)
        if (reason is None) != expect(method, bits, kind, target):
            wrong.append((method, bits, kind, target, reason))
        if reason is not None and not reason.endswith("."):
            wrong.append((method, bits, kind, target, reason))
    assert not wrong


def test_the_nearest_target_can_say_what_another_refuses() -> None:
    for method, bits, kind, target in every_case():
        recipe, task = draw_recipe(make_spec(method, bits), kind)
        nearest = find_nearest(recipe, task, but=target)
        assert nearest != target
        assert nearest is None or refuse_export(nearest, recipe, task) is None


def test_a_classifier_goes_to_three_targets_alone() -> None:
    recipe, task = draw_recipe(make_spec("lora"))
    assert {name for name in TARGETS if refuse_export(name, recipe, task) is None} == {"peft", "trainer", "ms-swift"}


@pytest.mark.parametrize("target", sorted(TABLED))
def test_a_table_says_every_dimension_of_its_methods_and_every_training_setting(target: str) -> None:
    module = TABLED[target]
    assert set(module.METHODS) == SAYS[target]
    for method, table in module.METHODS.items():
        assert set(table) == {dimension.name for dimension in METHODS[method].dimensions}
    assert set(module.TRAINING) == set(TRAINING)


def other_values(dimension: Dimension) -> list[Any]:
    """Values that a study could have drawn, and that are not the default."""
    if dimension.kind == "choice":
        return [value for value in dimension.choices if value != dimension.default]
    assert dimension.low is not None
    assert dimension.high is not None
    middle = dimension.low + 0.37 * (dimension.high - dimension.low)
    values = [dimension.low, dimension.high, int(middle) if dimension.kind == "int" else middle]
    return [int(v) if dimension.kind == "int" else float(v) for v in values if v != dimension.default]


@pytest.mark.parametrize("target", sorted(TABLED))
def test_a_setting_of_the_method_that_changes_changes_the_file_or_is_refused(target: str) -> None:
    module, silent = TABLED[target], []
    for method in module.METHODS:
        spec = make_spec(method, 16 if 16 in METHODS[method].bits else 4)
        recipe, _ = draw_recipe(spec, "generation", device_kind="cuda", precision="bfloat16")
        said = say(module, recipe)
        for dimension in METHODS[method].dimensions:
            if said is None or dimension.default != spec.settings[dimension.name]:
                spec = dataclasses.replace(spec, settings={**spec.settings, dimension.name: dimension.default})
                recipe = dataclasses.replace(recipe, spec=spec)
                said = say(module, recipe)
            for value in other_values(dimension):
                changed = dataclasses.replace(spec, settings={**spec.settings, dimension.name: value})
                if say(module, dataclasses.replace(recipe, spec=changed)) == said:
                    silent.append((method, dimension.name, value))
        assert said is not None, f"{target} refuses the defaults of {method}"
    assert not silent


def say(module: Any, recipe: Any) -> dict[str, Any] | None:
    """The entries, or None where they are refused; what differs from a refusal is a difference."""
    try:
        if hasattr(module, "_say"):
            return dict(module._say(recipe))
        return say_all(recipe, module.METHODS, module.TRAINING, title="x")
    except Unsaid:
        return None


CHANGES: dict[str, Any] = {
    "learning_rate": 0.123, "schedule": "cosine", "warmup_steps": 7, "steps": 77, "micro_batch": 2,
    "gradient_accumulation": 8, "weight_decay": 0.07, "max_grad_norm": 0.3, "optimizer": "paged_adamw_8bit",
    "checkpoint_activations": True, "seed": 99,
}  # fmt: skip


@pytest.mark.parametrize("target", sorted(TABLED))
@pytest.mark.parametrize("setting", sorted(CHANGES))
def test_a_training_setting_that_changes_changes_the_file(target: str, setting: str, bundle_of: Any) -> None:
    spec = make_spec("lora", 16)
    text = [
        "\n".join(
            content
            for name, content in TARGETS[target].write(bundle_of(spec, "generation", **changes)).files.items()
            if not name.startswith("data/")
        )
        for changes in ({}, {setting: CHANGES[setting]})
    ]
    assert text[0] != text[1]


@pytest.mark.parametrize("target", sorted(TABLED))
def test_restarts_keep_their_number(target: str) -> None:
    recipe, _ = draw_recipe(make_spec("lora", 16), "generation", schedule="cosine_with_restarts", num_cycles=4)
    entries = say(TABLED[target], recipe)
    assert entries is not None
    assert entries["lr_scheduler_kwargs"] == {"num_cycles": 4}


@pytest.mark.parametrize("target", sorted(TABLED))
def test_adams_constants_are_the_trials_whatever_a_trainers_own_are(target: str) -> None:
    import torch

    recipe, _ = draw_recipe(make_spec("lora", 16), "generation")
    entries = say(TABLED[target], recipe)
    assert entries is not None
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults
    assert (entries["adam_beta1"], entries["adam_beta2"]) == defaults["betas"]
    assert entries["adam_epsilon"] == defaults["eps"]


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_a_constant_rate_keeps_its_warm_up(schedule: str) -> None:
    recipe, _ = draw_recipe(make_spec("lora", 16), "generation", schedule=schedule)
    entries = say(trl, recipe)
    assert entries is not None
    assert entries["lr_scheduler_type"] == {"constant": "constant_with_warmup"}.get(schedule, schedule)


@pytest.mark.parametrize(
    ("target", "settings", "words"),
    [
        ("trl", {"init": "pissa"}, "starts LoRA from zero"),
        ("trl", {"lr_ratio_b": 4.0}, "no LoRA+"),
        ("llama-factory", {"init": "olora"}, "by PiSSA, but init is olora"),
        ("llama-factory", {"init": "eva"}, "by PiSSA, but init is eva"),
        ("trl", {"init": "eva"}, "but init is eva"),
        ("axolotl", {"init": "eva"}, "no start of LoRA by eva"),
        ("ms-swift", {"init": "eva"}, "no start of LoRA by eva"),
        ("unsloth", {"init": "eva"}, "no start of LoRA by eva"),
        ("trainer", {"init": "eva"}, "reads no rows before its first step"),
        ("axolotl", {"alpha_over_rank": 1.37}, "lora_alpha is a whole number, but it would be 10.96"),
        ("ms-swift", {"alpha_over_rank": 1.37}, "lora_alpha is a whole number"),
        ("unsloth", {"lr_ratio_b": 4.0}, "no LoRA+"),
    ],
)
def test_a_setting_that_a_target_lacks_is_named(target: str, settings: dict[str, Any], words: str) -> None:
    spec = make_spec("lora", 16)
    recipe, task = draw_recipe(dataclasses.replace(spec, settings={**spec.settings, **settings}), "generation")
    reason = refuse_export(target, recipe, task)
    assert reason is not None
    assert words in reason


def test_pefts_file_says_that_eva_begins_with_rows(bundle_of: Any) -> None:
    spec = make_spec("lora", 16)
    spec = dataclasses.replace(spec, settings={**spec.settings, "init": "eva"})
    written = TARGETS["peft"].write(bundle_of(spec, "generation"))
    config = json.loads(written.files["adapter_config.json"])
    assert config["init_lora_weights"] == "eva"
    assert config["eva_config"]["rho"] == 1.0
    assert any("initialize_lora_eva_weights" in note for note in written.notes)


def test_values_are_those_of_recipe_and_configuration() -> None:
    recipe, _ = draw_recipe(make_spec("lora", 16))
    values = list_values(recipe)
    assert set(values) == {*TRAINING, *recipe.spec.settings}


def test_adalora_is_said_in_the_terms_that_peft_has_for_it() -> None:
    spec = make_spec("adalora")
    recipe, _ = draw_recipe(spec)
    method = METHODS["adalora"]
    assert method.peft is not None
    arguments = method.peft(recipe.training_spec(), make_example_context("encoder", "all-linear")).arguments
    assert set(arguments) - {"target_modules", "modules_to_save"} == set(ms_swift._ADALORA)


@pytest.mark.parametrize(
    ("method", "target"), [("lora", "peft"), ("full", "trainer"), ("bitfit", "trainer"), ("bottleneck", None)]
)
def test_the_report_is_told_a_target_that_can_say_the_pick(method: str, target: str | None) -> None:
    spec = make_recipe_spec(METHODS[method], device_kind="cpu")
    trial = make_trial(spec=spec)
    way = find_way(make_study([trial]), trial)
    assert way.target == target
    assert (way.why_not_peft is None) == (target == "peft")


def test_a_method_that_is_not_installed_is_left_to_the_export_to_refuse() -> None:
    spec = dataclasses.replace(make_recipe_spec(METHODS["lora"], device_kind="cpu"), method="gone")
    trial = make_trial(spec=spec)
    assert find_way(make_study([trial]), trial).target == "peft"
