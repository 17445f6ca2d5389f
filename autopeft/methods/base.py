"""What a PEFT method says of itself: one `Method` is one row of `METHODS`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from autopeft.records import Bits, Optimizer, Scalar, TrialSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

ALL_BITS: tuple[Bits, ...] = (4, 8, 16, 32)
UNQUANTIZED: tuple[Bits, ...] = (16, 32)

ModelKind = Literal["encoder", "decoder", "encoder-decoder"]
EVERY_KIND: tuple[ModelKind, ...] = ("encoder", "decoder", "encoder-decoder")

Family = Literal[
    "low-rank", "full and selective", "adapter", "soft prompt", "scaling", "orthogonal", "sparse and spectral"
]
"""What a method changes in the model; the table of methods is grouped by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dimension:
    """One searched setting: a range (`low`, `high`) or `choices`. `default` stands wherever it is not searched."""

    name: str
    meaning: str
    default: Scalar
    kind: Literal["int", "float", "choice"]
    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: tuple[Scalar, ...] = ()
    only_if: Mapping[str, tuple[Scalar, ...]] = field(default_factory=dict)
    """Searched only where the settings named have one of these values; else `default` is used."""

    def contains(self, value: Scalar) -> bool:
        if self.kind == "choice":
            return any(
                value == choice and isinstance(value, bool) == isinstance(choice, bool) for choice in self.choices
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if self.kind == "int" and not isinstance(value, int):
            return False
        assert self.low is not None
        assert self.high is not None
        return self.low <= value <= self.high


def integers(name: str, low: int, high: int, default: int, meaning: str, *, log: bool = True) -> Dimension:
    return Dimension(name=name, meaning=meaning, default=default, kind="int", low=low, high=high, log=log)


def floats(
    name: str,
    low: float,
    high: float,
    default: float,
    meaning: str,
    *,
    log: bool = False,
    only_if: Mapping[str, tuple[Scalar, ...]] | None = None,
) -> Dimension:
    return Dimension(
        name=name, meaning=meaning, default=default, kind="float", low=low, high=high, log=log, only_if=only_if or {}
    )


def choice(
    name: str,
    choices: tuple[Scalar, ...],
    default: Scalar,
    meaning: str,
    *,
    only_if: Mapping[str, tuple[Scalar, ...]] | None = None,
) -> Dimension:
    return Dimension(name=name, meaning=meaning, default=default, kind="choice", choices=choices, only_if=only_if or {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A known-good starting point; the first trials of a study are recipes."""

    settings: Mapping[str, Scalar]
    target_modules: str | None
    learning_rate: float
    source: str


class PeftCall(NamedTuple):
    """A `peft` configuration by class name and arguments, not yet made: reading it needs no torch."""

    class_name: str
    arguments: dict[str, Any]


class BuildContext(NamedTuple):
    """What a method may know of the model it is put on."""

    targets: tuple[str, ...]
    """Names of the linear modules that `TrialSpec.target_modules` means on this model."""
    roles: dict[str, list[str]]
    """Every role (`query`, `value`, `mlp-out`, ...) with the modules that play it."""
    head: tuple[str, ...]
    """Top-level modules of the task head; trained by every method."""
    kind: ModelKind = "encoder"
    sizes: Mapping[str, tuple[int, int]] = MappingProxyType({})
    """Linear modules by full name, with their (input, output) features; for methods whose blocks must divide them."""
    norms: tuple[str, ...] = ()
    """Full names of the LayerNorm and RMSNorm modules outside the head that texts pass through."""
    transposed: bool = False
    """Whether linear layers keep their weights as (input, output), as GPT-2's Conv1D does."""
    unread: tuple[str, ...] = ()
    """How names begin of what no text passes through, such as a vision tower: never to be trained."""


class Stepping(NamedTuple):
    """For methods that do more in training than gradients do, such as AdaLoRA's rank schedule."""

    after_step: Callable[[nn.Module, TrialSpec, int], None]
    """(model, spec, steps done), called after each optimizer step while the gradients are still there."""
    state: Callable[[nn.Module], dict[str, Any]]
    """Tensors and plain values that a checkpoint must hold beside the trainable parameters."""
    restore: Callable[[nn.Module, dict[str, Any]], None]


class RowStart(NamedTuple):
    """For methods that begin with what rows of the task show them, such as EVA's directions of activations.

    What it sets are values of trainable parameters alone: shapes, and so costs, are known without rows.
    """

    count_tokens: Callable[[TrialSpec], int]
    """That a batch of rows should have; 0 where the configuration begins without rows. Where so many would need more
    memory than training there are more batches instead, each with an eighth of that or more."""
    begin: Callable[[nn.Module, TrialSpec, Iterable[Mapping[str, torch.Tensor]]], None]
    """(model, spec, batches), called once before the first step, in evaluation mode and without gradients. Batches are
    inputs of the model without labels, finitely many."""


def write_nothing(spec: TrialSpec) -> bool:
    return False


def allow_everything(spec: TrialSpec, device_kind: str) -> str | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of fine-tuning. A row of `METHODS`; a new method is a file with one of these, and the row."""

    name: str
    title: str
    paper: str
    """Where it comes from, as an arXiv number or address."""
    family: Family
    dimensions: tuple[Dimension, ...]
    """The method's own, named in the field's terms without the method's prefix."""
    learning_rate: tuple[float, float]
    """Range worth searching, on a logarithmic scale."""
    target_modules: tuple[str, ...] = ()
    """Groups worth searching; empty where the method has no targets."""
    layer_choice: bool = False
    """Whether it can be kept to the last k layers (`all-linear:last-4`, or `last-4` where it has no targets)."""
    models: tuple[ModelKind, ...] = EVERY_KIND
    needs: str = ""
    """What it asks of a model beyond `models` and `bits`, in words for the table."""
    merges: bool = False
    """Whether the trained adapter can be folded into the base, which is then a plain transformers model."""
    starts_as_base: bool = True
    """Whether at initialisation, with its recipe, the logits equal the base's."""
    answers_alone: bool = True
    """Whether a row's answer depends on that row alone, whatever is in its batch beside it."""
    bits: tuple[Bits, ...] = ALL_BITS
    optimizers: tuple[Optimizer, ...] = ("adamw",)
    """Worth searching; the first that the device has (`optimizers_on`) is the default."""
    recipe: Recipe
    writes_base: Callable[[TrialSpec], bool] = write_nothing
    """Whether building or training changes base weights themselves, so that the trial needs all weights of its own.
    Single weights that train, such as biases, are the trial's own without it."""
    searched: bool = True
    """False for a baseline, which every study trains and no space offers."""
    refuse: Callable[[TrialSpec, str], str | None] = allow_everything
    """(spec, device kind) -> the rule that forbids it, or None."""
    peft: Callable[[TrialSpec, BuildContext], PeftCall] | None = None
    """How `peft` is asked for it; None where peft lacks it."""
    build: Callable[[nn.Module, TrialSpec, BuildContext], nn.Module] | None = None
    """Our own builder, where peft lacks it. Freezes and unfreezes; the head is the caller's."""
    parameter_groups: Callable[[nn.Module, TrialSpec], list[dict[str, Any]]] | None = None
    """Trainable parameters in groups as `torch.optim` takes them, each with `lr_scale`, a factor on the learning rate;
    None where one rate serves all."""
    stepping: Stepping | None = None
    start: RowStart | None = None
    why_not_peft: str = ""
    """Where `peft` is None: why the `peft` export refuses it, and what to do."""

    def setting(self, spec: TrialSpec, name: str) -> Scalar:
        """The value of one of its own dimensions."""
        return spec.settings[name]


def optimizers_on(method: Method, device_kind: str) -> tuple[Optimizer, ...]:
    """The method's optimizers that the device has, its default first."""
    return tuple(name for name in method.optimizers if device_kind == "cuda" or not name.startswith("paged"))


def refuse_optimizer(spec: TrialSpec, device_kind: str) -> str | None:
    """The rule by which the device lacks the optimizer, or None."""
    # bitsandbytes 0.50.2 would warn once and keep unpaged states; its 8-bit AdamW itself does run on CPUs.
    if spec.optimizer.startswith("paged") and device_kind == "cpu":
        return (
            f"Paged optimizer states need a GPU, but the optimizer is {spec.optimizer}. Use adamw or adamw_8bit on CPU."
        )
    return None
