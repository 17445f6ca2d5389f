"""TrialSpec -> a model ready to train: base lent, head drawn, adapter put on, exactly the right things trainable."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import peft
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from autopeft.backends.hf.base_model import (
    BaseModel,
    draw_head,
    find_kind,
    find_unread,
    is_language_model,
    lend_model,
)
from autopeft.backends.hf.peft_stand_ins import install_block_diagonal
from autopeft.errors import SpecError
from autopeft.methods import find_method
from autopeft.methods.base import BuildContext, PeftCall
from autopeft.methods.targets import choose_layers, find_roles, resolve_targets, shorten_targets
from autopeft.records import TrialSpec


class ParameterCount(NamedTuple):
    adapter: int
    """Trainable parameters without the head."""
    head: int


def build_context(base: BaseModel, spec: TrialSpec) -> BuildContext:
    """What the method may know of this base. Raises SpecError where its targets or layers fit nothing."""
    method = find_method(spec.method)
    modules = {n: m for n, m in base.model.named_modules() if n and n.split(".")[0] not in base.head}
    linears: Sequence[str] = base.linear_names
    if (spec.target_modules or "").startswith("names:"):
        # Groups and patterns mean layers of the decoder; its output layer has to be asked for.
        linears = (*linears, *base.output_names)
    sizes = {name: _read_size(modules[name]) for name in linears}
    unread = find_unread(base.model)
    norms = [name for name, module in modules.items() if _is_norm(module) and not name.startswith(unread)]
    targets: tuple[str, ...] = ()
    if method.target_modules and spec.target_modules is not None:
        chosen = resolve_targets(spec.target_modules, linears)
        targets = tuple(shorten_targets(chosen, list(modules)))
    elif spec.target_modules is not None:
        # `last-K`: a method without groups of targets is shown the modules of those layers alone.
        linears, norms = (choose_layers(spec.target_modules, names) for names in (linears, norms))
    return BuildContext(
        targets=targets,
        roles=find_roles(linears),
        head=base.head,
        kind=find_kind(base.model.config),
        sizes=sizes,
        norms=tuple(norms),
        transposed=any(isinstance(modules[name], Conv1D) for name in base.linear_names),
        unread=unread,
    )


def _is_norm(module: nn.Module) -> bool:
    """LayerNorm or RMSNorm, of which nearly every architecture in transformers has a class of its own."""
    weight = module._parameters.get("weight")
    return type(module).__name__.endswith("Norm") and weight is not None and weight.dim() == 1


def _read_size(module: Any) -> tuple[int, int]:
    if isinstance(module, Conv1D):
        num_inputs, num_outputs = module.weight.shape
        return num_inputs, num_outputs
    return module.in_features, module.out_features


def build_trial_model(base: BaseModel, spec: TrialSpec, *, device: str | None = None) -> Any:
    """The model to train, in training mode, everything random drawn from the trial's seed.

    Weights that are the trial's own are made on `device`, by default where the base is.
    """
    method = find_method(spec.method)
    context = build_context(base, spec)
    model = lend_model(base, own_weights=method.writes_base(spec), device=device)
    draw_head(model, base.head, seed=spec.seed)
    if method.peft is not None:
        model = put_on_peft(model, method.peft(spec, context))
        if context.kind == "decoder" and context.head and reads_embeddings(model):
            answer_from_last_token(model)
    else:
        assert method.build is not None
        model = method.build(model, spec, context)
        for name in base.head:
            model.get_submodule(name).requires_grad_(True)
    own_what_trains(model, base)
    return model.train()


def own_what_trains(model: nn.Module, base: BaseModel) -> None:
    """Trainable parameters become the trial's own, in float32; the resident base shares only frozen ones."""
    resident = {parameter.untyped_storage()._cdata for parameter in base.model.parameters()}
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if parameter.dtype != torch.float32:
            # Updates of a low-precision weight are rounded away.
            parameter.data = parameter.data.float()
        elif parameter.untyped_storage()._cdata in resident:
            parameter.data = parameter.data.clone()


def put_on_peft(model: Any, call: PeftCall) -> Any:
    install_block_diagonal()
    config = make_peft_config(call, language_model=is_language_model(model))
    with warnings.catch_warnings():
        # peft warns of settings that are ours on purpose (PiSSA's changed base weights, absent adapters).
        warnings.simplefilter("ignore")
        try:
            return peft.get_peft_model(model, config)
        except (ValueError, TypeError, NotImplementedError) as exc:
            raise SpecError(f"peft cannot put {call.class_name} on this model: {exc}") from exc


def reads_embeddings(model: Any) -> bool:
    """Whether the model is given embeddings instead of ids, with those of a prompt in front."""
    config = model.active_peft_config
    in_layers = (peft.PeftType.PREFIX_TUNING, peft.PeftType.CARTRIDGE)
    return bool(config.is_prompt_learning) and config.peft_type not in in_layers


def answer_from_last_token(model: Any) -> None:
    """Has a decoder that is given embeddings classify each row from its last token, as one that is given ids does.

    transformers finds that token by the ids. Without them it takes the last position of the batch, which of all rows
    but the longest is padding (`GenericForSequenceClassification`): a row's answer would depend on its neighbours.
    """
    classifier = model.base_model
    classifier.get_submodule(classifier.base_model_prefix).register_forward_hook(_keep_last_token, with_kwargs=True)


def _keep_last_token(decoder: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Leaves of the decoder's states (B, T, D) those of each row's last token (B, 1, D), which are then the last."""
    mask_BT = kwargs.get("attention_mask")
    if mask_BT is None:
        return output
    states_BTD = output[0]
    positions_T = torch.arange(states_BTD.shape[1], device=states_BTD.device)
    last_B = ((mask_BT > 0) * positions_T).argmax(-1)
    kept_B1D = states_BTD[torch.arange(len(last_B), device=last_B.device), last_B][:, None]
    if isinstance(output, tuple):
        return (kept_B1D, *output[1:])
    output.last_hidden_state = kept_B1D
    return output


def make_peft_config(call: PeftCall, *, language_model: bool = False) -> Any:
    task_type = peft.TaskType.CAUSAL_LM if language_model else peft.TaskType.SEQ_CLS
    return getattr(peft, call.class_name)(task_type=task_type, **call.arguments)


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
