"""What a configuration costs, known before anything is trained: no weights are loaded and no GPU is needed.

The trial's own code builds its model, without data, and takes one optimizer step on fake tensors. Parameters are then
exact, and memory is counted storage by storage. Not counted: what CUDA libraries keep for themselves (cuBLAS
workspaces) and what the allocator wastes between blocks.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._pytree import tree_leaves

from autopeft.backends.hf.base_model import BaseModel, load_config
from autopeft.backends.hf.build import build_trial_model, count_trainable
from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.fake_base import OneEndOfSequence, OnGpu, build_meta_base, fake_state_codes, make_fake
from autopeft.backends.hf.live_bytes import LiveBytes, list_tensors
from autopeft.backends.hf.peft_stand_ins import shapes_without_values
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, train_step
from autopeft.backends.hf.traceable import building_without_values, stepping_without_values
from autopeft.errors import SpecError
from autopeft.methods import check_spec, find_method, refuse_spec
from autopeft.records import Bits, Cost, TrialSpec

# bitsandbytes' Optimizer8bit.get_state_buffer pages no smaller states.
_FEWEST_PAGED_NUMBERS = 100_000
_NOT_FOR_FAKES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


class HfCostModel:
    """Costs of configurations of one model on one kind of device; remembers what it has computed."""

    def __init__(
        self, model: str, *, num_labels: int, device_kind: Literal["cpu", "cuda"], longest_tokens: int
    ) -> None:
        """`longest_tokens` is the longest sequence of the task. Raises ModelError where the model cannot be had."""
        self.device_kind = device_kind
        # Batches are padded to multiples of 8 on GPUs (TaskData.collate).
        self.longest_tokens = -(-longest_tokens // 8) * 8 if device_kind == "cuda" else longest_tokens
        self._model = model
        self._config = load_config(model, num_labels)
        self._bases: dict[Bits, BaseModel] = {}
        self._costs: dict[str, Cost] = {}

    def cost(self, spec: TrialSpec) -> Cost:
        """Raises SpecError where the model, the method or the device cannot take the configuration."""
        key = spec.cost_key()
        if key not in self._costs:
            check_spec(spec)
            rule = refuse_spec(spec, self.device_kind)
            if rule is not None:
                raise SpecError(rule)
            self._costs[key] = self._compute(spec)
        return self._costs[key]

    def _compute(self, spec: TrialSpec) -> Cost:
        base = self._base(spec.bits)
        # Building seeds the generator, which may belong to a training in this process.
        with (
            shapes_without_values(),
            building_without_values(),
            torch.device("meta"),
            torch.random.fork_rng(devices=[]),
        ):
            model = build_trial_model(base, _without_decomposition(spec))
        parameters = count_trainable(model, base.head)
        with shapes_without_values(), FakeTensorMode(), OneEndOfSequence(), fake_state_codes(), _quiet_fakes():
            make_fake(model)
            try:
                with stepping_without_values(model):
                    peak_bytes = count_peak_bytes(model, spec, self._longest_batch(spec.batch_size), self.device_kind)
            except _NOT_FOR_FAKES:
                # Nothing is wrong with the configuration: this estimator does not know one of its operators.
                raise
            except (ValueError, RuntimeError) as exc:
                raise SpecError(
                    f"{spec.method} must be able to train the model '{self._model}' on {self.longest_tokens} tokens, "
                    f"but its step fails: {exc}. Use another method, shorter sequences (max_length) or another model."
                ) from exc
        return Cost(
            trainable_parameters=parameters.adapter,
            head_parameters=parameters.head,
            peak_vram_bytes=peak_bytes,
            vram_source="estimated",
        )

    def _base(self, bits: Bits) -> BaseModel:
        if bits not in self._bases:
            self._bases[bits] = build_meta_base(self._config, bits=bits, device_kind=self.device_kind)
        return self._bases[bits]

    def _longest_batch(self, batch_size: int) -> Batch:
        names = ["input_ids", "attention_mask"]
        # Where there is a choice of segments, the tokenizer says which one each token is in.
        if (getattr(self._config, "type_vocab_size", None) or 0) > 1:
            names.append("token_type_ids")
        batch = {name: torch.ones(batch_size, self.longest_tokens, dtype=torch.int64) for name in names}
        batch["labels"] = torch.zeros(batch_size, dtype=torch.int64)
        return batch


def _without_decomposition(spec: TrialSpec) -> TrialSpec:
    """Singular values and QR would be slow to fake; after them, shapes and types are those of any LoRA."""
    if spec.settings.get("init") not in ("pissa", "olora"):
        return spec
    return dataclasses.replace(spec, settings={**spec.settings, "init": "default"})


def count_peak_bytes(model: nn.Module, spec: TrialSpec, batch: Batch, device_kind: str) -> int:
    """Peak of live bytes over one training step whose optimizer state exists already, on fake or real CPU tensors.

    The learning rate is zero, so that real weights stay as they are. For `cuda` the tensors must be fake.
    """
    on_gpu = device_kind == "cuda"
    optimizer = build_optimizer(model, spec)
    after_step = bind_after_step(model, spec, 1)
    _allocate_state(optimizer, after_step)
    live = LiveBytes()
    for tensor in [*list_tensors(model), *_state_tensors(model, spec, optimizer), *batch.values()]:
        live.add(tensor)
    with live:
        train_step(
            OnGpu(model) if on_gpu else model,
            optimizer,
            batch,
            learning_rate=0.0,
            device="cpu",
            after_step=after_step,
        )
    return live.peak_bytes


@contextlib.contextmanager
def _quiet_fakes() -> Iterator[None]:
    """Silences what no user could act on: PyTorch prints the traceback of every error that it also raises, bitsandbytes
    a line for every cast, and that fake GPU tensors are on a CPU, where nothing is paged."""
    loggers = [
        logging.getLogger(name) for name in ("torch._subclasses.fake_tensor", "bitsandbytes.autograd._functions")
    ]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _allocate_state(optimizer: torch.optim.Optimizer, after_step: Callable[[], None] | None) -> None:
    """As after a first step: AdamW makes its moments when it first sees gradients."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    if after_step is not None:
        after_step()
    optimizer.zero_grad(set_to_none=True)


def _state_tensors(model: nn.Module, spec: TrialSpec, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """What the optimizer keeps of each parameter, and what the method itself keeps between steps."""
    stepping = find_method(spec.method).stepping
    kept = [*optimizer.state.values(), stepping.state(model) if stepping else None]
    tensors = [leaf for leaf in tree_leaves(kept) if isinstance(leaf, torch.Tensor)]
    if spec.optimizer == "paged_adamw_8bit":
        # Unified memory, which the allocator does not see and a GPU short of memory pages out.
        return [t for t in tensors if t.dtype != torch.uint8 or t.numel() < _FEWEST_PAGED_NUMBERS]
    return tensors
