"""Every type that the installed peft has is a row of the table, or is left out for a reason."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args, get_type_hints

import peft
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from autopeft.methods import METHODS
from autopeft.methods.base import BuildContext, Method
from autopeft.methods.excluded import EXCLUDED, EXCLUDED_STARTS
from autopeft.methods.faults import make_recipe_spec
from autopeft.methods.targets import find_roles

LLAMA = [f"model.layers.0.{part}" for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]


def type_of(method: Method) -> str | None:
    """The peft type that a row is: by the configuration that it asks for, or by name where the row builds it itself."""
    if method.peft is None:
        return method.name.upper()
    context = BuildContext(
        targets=tuple(LLAMA),
        roles=find_roles(LLAMA),
        head=("score",),
        kind="decoder",
        norms=("model.layers.0.input_layernorm",),
    )
    class_name = method.peft(make_recipe_spec(method, device_kind="cpu"), context).class_name
    types: list[Any] = [t for t, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if config.__name__ == class_name]
    return str(types[0].value) if types else None


REACHED = {type_of(method) for method in METHODS.values()}


@pytest.mark.parametrize("name", [member.value for member in peft.PeftType])
def test_every_type_of_peft_is_a_row_or_left_out_for_a_reason(name: str) -> None:
    assert (name in REACHED) != (name in EXCLUDED), (
        f"peft {peft.__version__} has the type {name}, which must be a row of METHODS or stand in EXCLUDED "
        "(autopeft/methods/excluded.py), and not both"
    )


def test_what_is_left_out_is_a_type_of_peft_and_has_a_reason() -> None:
    assert set(EXCLUDED) <= {member.value for member in peft.PeftType}
    assert all(reason and not reason.endswith(".") for reason in EXCLUDED.values())


def test_peft_still_asks_for_the_tokens_of_cpts_prompt() -> None:
    assert {"cpt_token_ids", "cpt_mask", "cpt_tokens_type_mask"} <= {f.name for f in dataclasses.fields(peft.CPTConfig)}


def test_every_start_that_peft_has_for_lora_is_a_choice_or_left_out_for_a_reason() -> None:
    hint = get_type_hints(peft.LoraConfig)["init_lora_weights"]
    in_peft = {value for choice in get_args(hint) for value in get_args(choice)}
    (init,) = (dimension for dimension in METHODS["lora"].dimensions if dimension.name == "init")
    # peft's word for the fast form is a pattern.
    offered = {*init.choices, "pissa_niter_[number of iters]"} - {"default"}
    assert in_peft - offered == {name.lower() for name in EXCLUDED_STARTS}
    assert all(reason and not reason.endswith(".") for reason in EXCLUDED_STARTS.values())
