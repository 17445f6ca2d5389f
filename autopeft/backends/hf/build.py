"""TrialSpec -> a model ready to train: base lent, head drawn, adapter put on, exactly the right things trainable."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

from autopeft.backends.hf.base_model import BaseModel, draw_head, lend_model
from autopeft.errors import SpecError
from autopeft.methods import find_method
from autopeft.methods.base import BuildContext, PeftCall
from autopeft.methods.targets import find_roles, resolve_targets, shorten_targets
from autopeft.records import TrialSpec


class ParameterCount(NamedTuple):
    adapter: int
    """Trainable parameters without the head."""
    head: int


def build_context(base: BaseModel, spec: TrialSpec) -> BuildContext:
    """What the method may know of this base. Raises SpecError where its targets fit nothing."""
    targets: tuple[str, ...] = ()
    if spec.target_modules is not None:
        chosen = resolve_targets(spec.target_modules, base.linear_names)
        targets = tuple(shorten_targets(chosen, base.linear_names))
    return BuildContext(targets=targets, roles=find_roles(base.linear_names), head=base.head)


def build_trial_model(base: BaseModel, spec: TrialSpec) -> Any:
    """The model to train, in training mode, everything random drawn from the trial's seed."""
    method = find_method(spec.method)
    context = build_context(base, spec)
    model = lend_model(base, own_weights=method.writes_base(spec))
    draw_head(model, base.head, seed=spec.seed)
    if method.peft is not None:
        model = put_on_peft(model, method.peft(spec, context))
    else:
        assert method.build is not None
        model = method.build(model, spec, context)
        for name in base.head:
            model.get_submodule(name).requires_grad_(True)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            # Updates of a low-precision weight are rounded away; whatever trains is kept in float32.
            parameter.data = parameter.data.float()
    return model.train()


def put_on_peft(model: Any, call: PeftCall) -> Any:
    config = make_peft_config(call)
    with warnings.catch_warnings():
        # peft warns of settings that are ours on purpose (PiSSA's changed base weights, absent adapters).
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(model, config)
        except ValueError as exc:
            raise SpecError(f"peft cannot put {call.class_name} on this model: {exc}") from exc


def make_peft_config(call: PeftCall) -> Any:
    return getattr(peft, call.class_name)(task_type=peft.TaskType.SEQ_CLS, **call.arguments)


def count_trainable(model: nn.Module, head: Sequence[str]) -> ParameterCount:
    """Exact counts of what trains, the head apart."""
    adapter = in_head = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            if set(name.split(".")) & set(head):
                in_head += parameter.numel()
            else:
                adapter += parameter.numel()
    return ParameterCount(adapter=adapter, head=in_head)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
