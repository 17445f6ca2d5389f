"""One setting of one method: what is searched of it by default, and what a space file may say of it instead."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

from autopeft.errors import SpaceError, suggest_nearest
from autopeft.methods.base import Dimension, Method, choice, floats, optimizers_on
from autopeft.methods.targets import check_target_modules, takes_last
from autopeft.records import Bits, Optimizer, TaskKind
from autopeft.spaces.space import EVERY_LAYER

_SCHEDULES = ("linear", "cosine", "constant")
_OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)


def widest_bits(device_kind: str) -> Bits:
    """What `unquantized` is: 16 on GPU, 32 on CPU."""
    return 16 if device_kind == "cuda" else 32


GENERATION_RATE = 0.2
"""Recipes were measured on small encoders with a new head; models that write are larger, have none, and are trained at
lower rates. A fifth is what authors ran themselves: 2e-4 instead of 1e-3 for LoRA on GPT-2 (microsoft/LoRA,
examples/NLG) and for QLoRA to 13B (artidoro/qlora, which halves it above), 2e-5 instead of 1e-4 for full fine-tuning
of LLaMA 7B (tatsu-lab/stanford_alpaca). For the other methods it is carried over from these, not measured."""


def recipe_rate(method: Method, task_kind: TaskKind) -> float:
    """The learning rate that a method's recipe has for a kind of task."""
    return method.recipe.learning_rate * (GENERATION_RATE if task_kind == "generation" else 1.0)


def default_dimensions(
    method: Method, device_kind: str, task_kind: TaskKind = "classification"
) -> dict[str, Dimension]:
    """Every setting of a method with its default range; those that one value suits are choices of one."""
    (low, high), rate = method.learning_rate, recipe_rate(method, task_kind)
    if task_kind == "generation":
        # The range keeps its upper end: how much lower is right depends on the model's size.
        low = GENERATION_RATE * low
    widths = tuple(bits for bits in (widest_bits(device_kind), 8, 4) if bits in method.bits)
    optimizers = optimizers_on(method, device_kind)
    shared = [
        floats("learning_rate", low, high, rate, "peak learning rate", log=True),
        choice("bits", widths[::-1], widths[0], "width of the base weights"),
        choice("batch_size", (16,), 16, "examples a step"),
        choice("warmup_ratio", (0.06,), 0.06, "share of the steps over which the learning rate rises"),
        choice("schedule", ("linear",), "linear", "how the learning rate falls"),
        choice("weight_decay", (0.0,), 0.0, "AdamW's decoupled weight decay"),
        choice("optimizer", optimizers, optimizers[0], "AdamW, with its states in 32 or 8 bits"),
    ]
    if method.target_modules:
        default = method.recipe.target_modules or method.target_modules[0]
        shared.append(choice("target_modules", method.target_modules, default, "which linear layers"))
    elif method.layer_choice:
        shared.append(choice("target_modules", (EVERY_LAYER,), EVERY_LAYER, "all layers, or the last k"))
    return {dimension.name: dimension for dimension in [*shared, *method.dimensions]}


def narrow(
    dimension: Dimension, given: Any, where: str, *, method: Method, device_kind: str, shared: bool
) -> Dimension:
    """A dimension as a space file writes it: {low, high, log}, a list of choices, or one value.

    Of values that are shared by all methods, those that this one cannot have, or this device, are left out.
    """
    if isinstance(given, dict):
        return _narrow_range(dimension, given, where)
    values = given if isinstance(given, list) else [given]
    if not values:
        raise SpaceError(f"{where} must offer at least one value, but offers none.")
    if dimension.name == "bits":
        values = resolve_bits(values, where, device_kind)
    if dimension.kind == "float":
        values = [number(value, where) if isinstance(value, str) else value for value in values]
    for value in values:
        check_value(dimension, value, where)
    if shared:
        values = [value for value in values if _why_not(method, dimension.name, value, device_kind) is None]
        values = values or [dimension.default]
    for value in values:
        check_method_value(method, dimension.name, value, where, device_kind)
    default = dimension.default if dimension.default in values else values[0]
    return replace(dimension, kind="choice", low=None, high=None, log=False, choices=tuple(values), default=default)


def resolve_bits(values: list[Any], where: str, device_kind: str) -> list[Any]:
    """`unquantized` is 16 on GPU and 32 on CPU; the other device's width is refused."""
    widest = widest_bits(device_kind)
    widths = [widest if value == "unquantized" else value for value in values]
    for width in widths:
        if width not in (4, 8, widest):
            other = "GPU" if device_kind == "cpu" else "CPU"
            hint = f" {width} bits need a {other}." if width in (16, 32) else ""
            raise SpaceError(
                f"{where} must be 4, 8 or unquantized ({widest} here), but is {width!r}.{hint} Write unquantized."
            )
    return widths


def check_value(dimension: Dimension, value: Any, where: str) -> None:
    """Raises SpaceError where a setting cannot have the value at all; what a space narrows does not count."""
    if dimension.name == "target_modules":
        if value != EVERY_LAYER:
            check_target_modules(str(value))
        return
    if dimension.name == "bits":
        # Whether a width exists depends on the device, and whether the method has it on the method.
        return
    if dimension.name in ("schedule", "optimizer"):
        known = _SCHEDULES if dimension.name == "schedule" else _OPTIMIZERS
        fits, range_text = value in known, ", ".join(known)
    elif dimension.name == "batch_size":
        fits, range_text = isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 4096, "1 to 4096"
    elif dimension.name in ("warmup_ratio", "weight_decay"):
        fits, range_text = isinstance(value, int | float) and 0 <= value <= 1, "0 to 1"
    elif dimension.name == "learning_rate":
        fits, range_text = isinstance(value, int | float) and 0 < value <= 10, "above 0, at most 10"
    else:
        fits = dimension.contains(value)
        choices = ", ".join(map(str, dimension.choices))
        range_text = choices if dimension.kind == "choice" else f"{dimension.low} to {dimension.high}"
    if not fits:
        raise SpaceError(f"{where} takes {range_text}, but offers {value!r}.")


def check_method_value(method: Method, name: str, value: Any, where: str, device_kind: str) -> None:
    """Raises SpaceError where the setting could have the value, but not with this method or on this device."""
    why_not = _why_not(method, name, value, device_kind)
    if why_not is not None:
        raise SpaceError(f"{where} {why_not}, but offers {value!r}.")


def _why_not(method: Method, name: str, value: Any, device_kind: str) -> str | None:
    if name == "bits" and value not in method.bits:
        return f"takes {', '.join(map(str, method.bits))}, because that is what {method.title} trains on"
    if name == "optimizer" and value.startswith("paged") and device_kind == "cpu":
        return "takes no paged states on CPU"
    if name != "target_modules":
        return None
    if not method.target_modules and value != EVERY_LAYER and (":" in value or not takes_last(value)):
        return f"takes all or the last blocks, such as last-4, because {method.title} has no groups of target modules"
    if method.target_modules and value == EVERY_LAYER:
        return f"takes a group, such as {method.target_modules[-1]}"
    if takes_last(value) and not method.layer_choice:
        return f"takes no last-K, because {method.title} cannot be kept to the last blocks"
    return None


def _narrow_range(dimension: Dimension, given: dict[str, Any], where: str) -> Dimension:
    for key in given:
        if key not in ("low", "high", "log"):
            raise SpaceError(
                f"{where} has the unknown key '{key}'. {suggest_nearest(str(key), ('low', 'high', 'log'))}"
            )
    if dimension.kind == "choice":
        raise SpaceError(f"{where} is a choice and takes a list such as {list(dimension.choices)}, not a range.")
    low, high = (number(given.get(key, getattr(dimension, key)), where) for key in ("low", "high"))
    for value in (low, high):
        check_value(dimension, int(value) if dimension.kind == "int" and value.is_integer() else value, where)
    if low >= high:
        raise SpaceError(f"{where} must go from low to high, but goes from {low} to {high}.")
    log = bool(given.get("log", dimension.log))
    if log and low <= 0:
        raise SpaceError(f"{where} is searched on a logarithmic scale, so low must be above 0, but is {low}.")
    default = min(max(float(dimension.default), low), high)
    return replace(dimension, low=low, high=high, log=log, default=int(default) if dimension.kind == "int" else default)


def number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3 as text: it wants 1.0e-3. People write the former.
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SpaceError(f"{where} takes numbers, but is given {value!r}.") from None
