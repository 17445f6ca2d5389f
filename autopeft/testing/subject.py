"""A method on one tiny model: built and trained once, looked at by every law."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

from autopeft import methods
from autopeft.backends.base import Ended, Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import BaseModel, digest_model, draw_head, lend_model
from autopeft.backends.hf.build import ParameterCount, build_trial_model, count_trainable
from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.data import Batch, Rows
from autopeft.backends.hf.row_start import start_from_rows
from autopeft.backends.hf.steps import bind_after_step, build_optimizer, train_step
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import SpecError
from autopeft.methods.base import Method
from autopeft.methods.faults import DEVICE_BITS, make_recipe_spec
from autopeft.records import Bits, Cost, Estimate, Scalar, StepSettings, TrialSpec
from autopeft.testing.memory import Agreement, compare_with_real_steps
from autopeft.testing.tiny_models import (
    NUM_LABELS,
    ArchitectureName,
    forget_tiny_base,
    tiny_base,
    tiny_batch,
    tiny_folder,
    tiny_task,
)

NUM_STEPS = 10
PAUSE_AT, MAX_STEPS = 6, 12
_ONE_STEP = StepSettings()


class Case(NamedTuple):
    """What one subject is made of."""

    method: Method
    architecture: ArchitectureName
    bits: Bits
    settings: tuple[tuple[str, Scalar], ...] = ()
    """Changes to the recipe's."""

    def name(self) -> str:
        changes = [f"{key}={value}" for key, value in self.settings]
        return "-".join([self.method.name, self.architecture, *changes])

    def spec(self) -> TrialSpec:
        spec = make_recipe_spec(self.method, device_kind="cpu", bits=self.bits)
        return dataclasses.replace(
            spec,
            settings={**spec.settings, **dict(self.settings)},
            batch_size=8,
            max_steps=MAX_STEPS,
            warmup_ratio=0.0,
            schedule="constant",
            seed=3,
        )


def width_for(method: Method) -> Bits:
    """Of the base for the laws that hold at any width: the widest that the method takes on a CPU."""
    return next((bits for bits in DEVICE_BITS["cpu"] if bits in method.bits), 32)


class Trained(NamedTuple):
    """A model after ten steps of its adapter alone and one of everything, and what was seen on the way."""

    model: Any
    loss_before: float
    loss_after: float
    """After ten steps in which the head stood still, so that only the adapter can have lowered it."""
    learning_rate: float
    trainable: frozenset[str]
    reached: frozenset[str]
    """Trainable parameters that ever had a gradient other than zero."""
    frozen_with_gradient: tuple[str, ...]
    logits_BC: torch.Tensor
    """In evaluation mode, at the end."""


class Resumed(NamedTuple):
    """The ends of two runs of one trial, the second of which was rebuilt from the checkpoint at its pause."""

    differing: tuple[str, ...]
    """What of the two checkpoints is not equal to the bit, such as `trainable.classifier.weight`."""
    same_scores: bool


class Subject:
    """One method on one architecture and bit width. Everything is computed when first asked for."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.method = case.method
        self.spec = case.spec()
        self.folder = tiny_folder(case.architecture)
        self.base_digest = digest_model(self.base.model)

    def __str__(self) -> str:
        kind = {"bert": "BERT", "llama": "Llama", "t5": "T5", "modernbert": "ModernBERT"}[self.case.architecture]
        settings = "".join(f", {key}={value}" for key, value in self.case.settings)
        return f"'{self.method.name}' on a tiny {kind} of {self.case.bits} bits{settings}"

    @property
    def base(self) -> BaseModel:
        return tiny_base(self.case.architecture, self.case.bits)

    # --- before training

    def refusal(self) -> str | None:
        """Why this configuration is not for this model or machine, as a search would be told; None where it is."""
        try:
            self.cost()
        except SpecError as exc:
            return str(exc)
        except Exception:
            # Whatever else is wrong belongs to the law about costs.
            return None
        return None

    def is_refused_by_rule(self) -> bool:
        """Whether the method's own rules, or those about devices, forbid it on CPU."""
        return methods.refuse_spec(self.spec, "cpu") is not None

    def cost(self) -> Cost:
        return self._costs.cost(self.spec)

    def estimate(self, settings: StepSettings = _ONE_STEP) -> Estimate:
        return self._costs.estimate(self.spec, settings)

    def batch(self) -> Batch:
        """The fixed batch with all that the model's own tokenizer would give."""
        batch = tiny_batch()
        if (getattr(self.base.model.config, "type_vocab_size", None) or 0) > 1:
            batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
        return batch

    def compare_memory(self, settings: StepSettings = _ONE_STEP) -> Agreement:
        """The estimate beside real steps on a model of its own."""
        return compare_with_real_steps(self.estimate(settings), self.build(), self.spec, settings, self.batch())

    @functools.cached_property
    def _costs(self) -> HfCostModel:
        # Not shared with other subjects: it remembers costs by the method's name, which two of them may have.
        return HfCostModel(self.folder, num_labels=NUM_LABELS, device_kind="cpu", longest_tokens=12)

    def parameters(self) -> ParameterCount:
        return count_trainable(self.build(), self.base.head)

    def count_by_peft(self) -> int | None:
        """Trainable parameters as peft itself tells them, the head included; None where the model is not peft's."""
        model = self.build()
        return int(model.get_nb_trainable_parameters()[0]) if isinstance(model, peft.PeftModel) else None

    def build(self) -> Any:
        """As a trial begins: with what rows show the method, here those of the fixed batch."""
        model = build_trial_model(self.base, self.spec)
        batch = tiny_batch()
        lengths = batch["attention_mask"].sum(1).tolist()
        rows = Rows(lengths, lambda indices: {name: tensor[indices] for name, tensor in batch.items()}, "cpu")
        start_from_rows(model, self.spec, rows)
        return model

    def base_logits(self) -> torch.Tensor:
        """(B, C), of the base with the head that the trial draws."""
        model = lend_model(self.base, own_weights=False)
        draw_head(model, self.base.head, seed=self.spec.seed)
        return compute_logits(model)

    # --- training

    @functools.cached_property
    def trained(self) -> Trained:
        """At the recipe's learning rate, or where that does not lower the loss, in the middle of the range.

        Recipes are for pretrained models: a random one may need smaller steps than those to show that a method learns.
        """
        low, high = self.method.learning_rate
        trained = self._train_at(self.spec.learning_rate)
        return trained if trained.loss_after < trained.loss_before else self._train_at(math.sqrt(low * high))

    def _train_at(self, learning_rate: float) -> Trained:
        model = self.build()
        reached: set[str] = set()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_note_gradient(name, reached))
        trainable = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        loss_before = compute_loss(model)
        self._train_adapter(model, learning_rate)
        loss_after = compute_loss(model)
        self._train(model, range(NUM_STEPS, NUM_STEPS + 1), learning_rate)
        frozen = [name for name, p in model.named_parameters() if name not in trainable and p.grad is not None]
        frozen += [
            f"the resident base's {name}" for name, p in self.base.model.named_parameters() if p.grad is not None
        ]
        return Trained(
            model=model,
            loss_before=loss_before,
            loss_after=loss_after,
            learning_rate=learning_rate,
            trainable=trainable,
            reached=frozenset(reached),
            frozen_with_gradient=tuple(frozen),
            logits_BC=compute_logits(model),
        )

    def _train_adapter(self, model: nn.Module, learning_rate: float) -> None:
        """Ten steps with the head held still, unless nothing else trains."""
        if count_trainable(model, self.base.head).adapter == 0:
            self._train(model, range(NUM_STEPS), learning_rate)
            return
        in_head = [
            p for name, p in model.named_parameters() if p.requires_grad and set(name.split(".")) & set(self.base.head)
        ]
        for parameter in in_head:
            parameter.requires_grad_(False)
        self._train(model, range(NUM_STEPS), learning_rate)
        for parameter in in_head:
            parameter.requires_grad_(True)

    def _train(self, model: nn.Module, steps: range, learning_rate: float) -> None:
        optimizer = build_optimizer(model, self.spec)
        model.train()
        for step in steps:
            train_step(
                model,
                optimizer,
                tiny_batch(),
                learning_rate=learning_rate,
                device="cpu",
                after_step=bind_after_step(model, self.spec, step + 1),
            )

    def base_is_untouched(self) -> bool:
        return digest_model(self.base.model) == self.base_digest

    def remove(self) -> None:
        """Drops the trained model, as a worker does with a trial that has ended."""
        self.__dict__.pop("trained", None)

    def close(self) -> None:
        """Removes it and makes sure that the next subject gets a base as it should be."""
        self.remove()
        if not self.base_is_untouched():
            forget_tiny_base(self.case.architecture, self.case.bits)

    # --- pause and resume

    def resume(self) -> Resumed:
        """Trains to a rung and on to the end, then again to the end from the checkpoint, as two workers would."""
        backend, study = _backend(self.case.architecture)
        self._run(backend, trial=0, start=0, end=PAUSE_AT)
        # Under another number the backend cannot go on with the model that it still has.
        went_on, resumed = (self._run(backend, trial=trial, start=PAUSE_AT, end=MAX_STEPS) for trial in (0, 1))
        states = [torch.load(study / str(end.checkpoint), weights_only=True) for end in (went_on, resumed)]
        return Resumed(
            differing=tuple(find_differences(*states)),
            same_scores=went_on.scores_digest == resumed.scores_digest and went_on.validation == resumed.validation,
        )

    def _run(self, backend: HfBackend, *, trial: int, start: int, end: int) -> Finished:
        answer = backend.run(
            Stretch(
                job=1,
                trial=trial,
                spec=self.spec,
                purpose="search",
                from_step=start,
                to_step=end,
                checkpoint=f"checkpoints/trial-00000-step{start}.pt" if start else None,
                save=True,
            ),
            lambda event: None,
        )
        if isinstance(answer, Ended):
            raise RuntimeError(f"The trial ended at step {start} to {end} ({answer.reason}): {answer.detail}")
        return answer


@contextlib.contextmanager
def registered(method: Method) -> Iterator[None]:
    """Makes the method a row of METHODS for a while, where it is not one already."""
    before = methods.METHODS.get(method.name)
    methods.METHODS[method.name] = method
    try:
        yield
    finally:
        if before is None:
            del methods.METHODS[method.name]
        else:
            methods.METHODS[method.name] = before


def find_differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Paths in two checkpoints at which they are not equal to the bit."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [path]
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        pairs = [(str(key), one[key], other[key]) for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        pairs = [(str(index), a, b) for index, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        return [] if one == other else [path]
    return [found for key, a, b in pairs for found in find_differences(a, b, f"{path}.{key}" if path else key)]


def _note_gradient(name: str, reached: set[str]) -> Any:
    def note(parameter: torch.Tensor) -> None:
        if parameter.grad is not None and bool(parameter.grad.ne(0).any()):
            reached.add(name)

    return note


def compute_loss(model: nn.Module) -> float:
    """On the fixed batch, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return float(model(**tiny_batch()).loss)


def compute_logits(model: nn.Module, batch: Batch | None = None) -> torch.Tensor:
    """(B, C) on the batch, or the fixed one, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        logits_BC: torch.Tensor = model(**(batch or tiny_batch())).logits
    return logits_BC


@functools.cache
def _backend(architecture: ArchitectureName) -> tuple[HfBackend, Path]:
    study = Path(tempfile.mkdtemp(prefix="study-", dir=Path(tiny_folder(architecture)).parent))
    setup = WorkerSetup(
        backend="hf",
        model=tiny_folder(architecture),
        task=tiny_task(),
        data_dir=None,
        split_seed=0,
        study_dir=str(study),
        device="cpu",
        threads=1,
    )
    return HfBackend(setup), study
