"""One optimizer step, one scoring pass: the code that trials, the probe and the cost model share."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from peft import PeftType
from torch import nn
from torch.utils.checkpoint import noop_context_fn

from autopeft.backends.hf.build import trainable_parameters
from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.language import count_counted, score_completions
from autopeft.backends.hf.paged import build_paged_adamw
from autopeft.errors import SpecError
from autopeft.methods import find_method
from autopeft.records import TrialSpec

MAX_GRAD_NORM = 1.0
_PAGED_STATES = frozenset({"state1", "state2"})
"""Names of the moments in bitsandbytes' optimizer states (Optimizer2State.init_state); the rest is never paged."""
Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


class Diverged(Exception):
    """The loss is not finite; raised inside a worker, where it becomes an outcome."""


class SplitScores(NamedTuple):
    """Per example, in the split's order."""

    losses: npt.NDArray[np.float32]
    """Cross-entropy in nats; of a completion the mean over its tokens."""
    predictions: npt.NDArray[Any]
    """Class indices; for generation the examples' scores, in [0, 1]."""


def build_optimizer(model: nn.Module, spec: TrialSpec) -> torch.optim.Optimizer:
    """Its groups carry `lr_scale`, the factor that `train_step` puts on the learning rate."""
    method = find_method(spec.method)
    groups: list[dict[str, Any]] = [{"params": list(trainable_parameters(model).values()), "lr_scale": 1.0}]
    if method.parameter_groups is not None:
        groups = method.parameter_groups(model, spec)
    arguments: dict[str, Any] = {"lr": spec.learning_rate, "weight_decay": spec.weight_decay}
    if spec.optimizer == "adamw":
        # Fused, as in transformers' Trainer: no temporaries on GPUs, and a third of a full fine-tuning step on CPUs.
        return torch.optim.AdamW(groups, **arguments, fused=True)
    if spec.optimizer == "paged_adamw_8bit":
        return build_paged_adamw(groups, **arguments)
    # Only here: without it everything but 4 and 8 bits works.
    import bitsandbytes

    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(groups, **arguments)
    return optimizer


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`load_state_dict`, after which paged states are paged again.

    bitsandbytes loads them into the GPU's own memory (0.50.2, Optimizer8bit.load_state_dict), where a full GPU could no
    longer page them out and an estimate that leaves them out would be wrong.
    """
    optimizer.load_state_dict(state)
    if not getattr(optimizer, "is_paged", False):
        return
    paged: Any = optimizer
    for parameter in (p for group in paged.param_groups for p in group["params"]):
        kept = paged.state.get(parameter, {})
        for name in _PAGED_STATES & kept.keys():
            # Of small parameters it is no paged one here either.
            buffer = paged.get_state_buffer(parameter, dtype=kept[name].dtype)
            kept[name] = buffer.copy_(kept[name])


def bind_after_step(model: nn.Module, spec: TrialSpec, step: int) -> Callable[[], None] | None:
    """What the method does once `step` steps are done, for `train_step`; None where it does nothing."""
    stepping = find_method(spec.method).stepping
    return None if stepping is None else functools.partial(stepping.after_step, model, spec, step)


def learning_rate_at(step: int, spec: TrialSpec) -> float:
    """Of the step that leads from `step` to `step + 1`: linear warm-up, then the schedule down to zero."""
    warmup = math.ceil(spec.warmup_ratio * spec.max_steps)
    if step < warmup:
        return spec.learning_rate * (step + 1) / warmup
    if spec.schedule == "constant":
        return spec.learning_rate
    progress = (step - warmup) / max(spec.max_steps - warmup, 1)
    if spec.schedule == "cosine":
        return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
    return spec.learning_rate * (1 - progress)


def autocast(device: str) -> AbstractContextManager[Any]:
    """bfloat16 on GPUs; CPUs compute in float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.startswith("cuda") else nullcontext()


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    learning_rate: float,
    device: str,
    after_step: Callable[[], None] | None = None,
    micro_batches: int = 1,
) -> torch.Tensor:
    """Forward, backward, clip, update. Returns the loss (detached, scalar), not yet read from the device.

    `after_step` is called while the gradients of the step are still there. With `micro_batches` above 1 the batch is
    taken in as many equal parts, whose gradients are accumulated. The loss of a language model is the mean over all
    tokens of the batch that count, however it is divided: long completions weigh more than short ones.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["lr_scale"]
    losses = []
    parts = split_batch(batch, micro_batches)
    for part, weight in zip(parts, _weigh(parts), strict=True):
        with autocast(device):
            loss: torch.Tensor = model(**part).loss
        if micro_batches > 1:
            loss = loss * weight
        loss.backward()
        losses.append(loss.detach())
    nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], MAX_GRAD_NORM)
    optimizer.step()
    if after_step is not None:
        after_step()
    optimizer.zero_grad(set_to_none=True)
    return losses[0] if micro_batches == 1 else torch.stack(losses).sum()


def split_batch(batch: Batch, count: int) -> list[Batch]:
    """Equal parts along the rows, as views."""
    if count == 1:
        return [batch]
    chunks = {name: tensor.chunk(count) for name, tensor in batch.items()}
    return [{name: parts[i] for name, parts in chunks.items()} for i in range(count)]


def _weigh(parts: Sequence[Batch]) -> list[torch.Tensor | float]:
    """Each part's share of what the loss is a mean over: examples, or tokens."""
    if len(parts) == 1 or parts[0]["labels"].dim() == 1:
        return [1 / len(parts)] * len(parts)
    counts = torch.stack([count_counted(part["labels"]) for part in parts])
    return list(counts / counts.sum())


def checkpoint_activations(model: Any, context_fn: Callable[[], Contexts] = noop_context_fn) -> None:
    """From now on each layer keeps its input alone and runs forward again in its backward pass (arXiv:1604.06174).

    `context_fn` gives what a layer runs in the first time and again, as for `torch.utils.checkpoint.checkpoint`. Raises
    SpecError where the adapter is in cached keys, which transformers leaves out of checkpointed layers.
    """
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind in (PeftType.PREFIX_TUNING, PeftType.CARTRIDGE):
        raise SpecError(
            "Activation checkpointing runs layers without cached keys, which is where prefix_tuning, p_tuning_v2 and "
            "cartridge keep what they train. Leave checkpointing away, or use prompt_tuning."
        )
    # peft hands unknown attributes on to the model inside; without re-entrance frozen inputs need no gradient.
    # Newer transformers' name; where there is it, the old one warns.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "context_fn": context_fn})


@torch.no_grad()
def score_batch(model: nn.Module, batch: Batch, *, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch's rows, still on the device: losses in nats, and predicted classes or shares of tokens."""
    labels = batch.pop("labels")
    with autocast(device):
        logits = model(**batch).logits
    if labels.dim() > 1:
        return score_completions(logits, labels)
    logits_BC = logits.float()
    return nn.functional.cross_entropy(logits_BC, labels, reduction="none"), logits_BC.argmax(-1)


def score_batches(
    model: nn.Module, batches: Sequence[list[int]], collate: Callable[[list[int]], Batch], *, device: str
) -> SplitScores:
    """Loss and prediction of every example, see `score_batch`. Leaves the model in training mode."""
    model.eval()
    found = [score_batch(model, collate(indices), device=device) for indices in batches]
    model.train()
    order = np.concatenate([np.asarray(indices) for indices in batches])
    losses, predictions = (_put_back(order, tensors) for tensors in zip(*found, strict=True))
    if not np.isfinite(losses).all():
        raise Diverged("the loss on the validation split is not finite")
    return SplitScores(losses, predictions)


def _put_back(order: npt.NDArray[np.int64], by_batch: Sequence[torch.Tensor]) -> npt.NDArray[Any]:
    """One value an example, in the split's order."""
    scattered = torch.cat(list(by_batch)).cpu().numpy()
    values = np.empty_like(scattered)
    values[order] = scattered
    return values
