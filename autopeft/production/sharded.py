"""States of models whose parameters lie in pieces on several processes (FSDP), as if they were whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)


def collect_sharded(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what trains by name, the optimizer's state by name), whole on the main process, empty elsewhere.

    All processes must call it at once.
    """
    trainable = get_model_state_dict(model, options=_WHOLE)
    return trainable, get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_sharded(model: nn.Module, trainable: dict[str, Any]) -> None:
    """The inverse; every process gives all of it."""
    options = StateDictOptions(full_state_dict=True, strict=False)
    set_model_state_dict(model, trainable, options=options)


def load_sharded_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
