"""The table of methods. One file a family; a new method is its file and a row here.

Distributions of other people add rows by entry points, see `autopeft.methods.table`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import get_args

from autopeft.errors import SpecError, suggest_nearest
from autopeft.methods.adalora import ADALORA
from autopeft.methods.base import Method, refuse_optimizer
from autopeft.methods.bottleneck import BOTTLENECK
from autopeft.methods.combined import LORA_BOTTLENECK
from autopeft.methods.decomposed import DECOMPOSED
from autopeft.methods.excluded import LEFT_OUT
from autopeft.methods.full import FULL, HEAD
from autopeft.methods.ia3 import IA3
from autopeft.methods.lora import LORA
from autopeft.methods.low_rank import LOW_RANK
from autopeft.methods.orthogonal import ORTHOGONAL
from autopeft.methods.prompts import PROMPTS
from autopeft.methods.qlora import QLORA
from autopeft.methods.selective import BITFIT, LN_TUNING
from autopeft.methods.shared_random import SHARED_RANDOM
from autopeft.methods.sparse_spectral import SPARSE_SPECTRAL
from autopeft.methods.table import MethodTable
from autopeft.methods.targets import check_target_modules, takes_last
from autopeft.records import Optimizer, Scalar, TrialSpec

METHODS = MethodTable(
    (
        LORA,
        QLORA,
        ADALORA,
        *LOW_RANK,
        *SHARED_RANDOM,
        *DECOMPOSED,
        FULL,
        HEAD,
        BITFIT,
        LN_TUNING,
        BOTTLENECK,
        LORA_BOTTLENECK,
        *PROMPTS,
        IA3,
        *ORTHOGONAL,
        *SPARSE_SPECTRAL,
    )
)
"""Every method by name: the rows above by family, then those of other distributions."""


def find_method(name: str) -> Method:
    """The method of that name, or SpecError with the nearest known one."""
    if name in METHODS:
        return METHODS[name]
    left_out = METHODS.why_left_out(name)
    if left_out is not None:
        raise SpecError(left_out)
    if name.upper() in LEFT_OUT:
        raise SpecError(f"The method '{name}' is in peft, but is no method of autopeft: {LEFT_OUT[name.upper()]}.")
    known = [method.name for method in METHODS.values() if method.searched]
    raise SpecError(f"There is no method '{name}'. {suggest_nearest(name, known)}")


def fill_settings(spec: TrialSpec) -> TrialSpec:
    """For stored configurations: one from before its method had a dimension means that dimension's default."""
    if spec.method not in METHODS:
        return spec
    defaults = {dimension.name: dimension.default for dimension in METHODS[spec.method].dimensions}
    return replace(spec, settings=type_settings(spec.method, {**defaults, **spec.settings}))


def type_settings(method: str, settings: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Whole numbers as fractions where a dimension has those: 2 and 2.0 are one configuration, with one key."""
    fractions = {d.name for d in METHODS[method].dimensions if type(d.default) is float}
    return {name: float(v) if name in fractions and type(v) is int else v for name, v in settings.items()}


def check_spec(spec: TrialSpec) -> None:
    """Raises SpecError where a configuration names settings that its method lacks, or values it cannot have."""
    method = find_method(spec.method)
    known = {dimension.name: dimension for dimension in method.dimensions}
    for name, value in spec.settings.items():
        if name not in known:
            raise SpecError(f"{method.title} has no setting '{name}'. {suggest_nearest(name, known)}")
        if not known[name].contains(value):
            bounds = known[name].choices or f"{known[name].low} to {known[name].high}"
            raise SpecError(f"{spec.method}.{name} takes {bounds}, but is {value!r}.")
    missing = sorted(set(known) - set(spec.settings))
    if missing:
        raise SpecError(f"A {method.title} configuration must set {', '.join(missing)}.")
    if spec.bits not in method.bits:
        widths = ", ".join(map(str, method.bits))
        raise SpecError(f"{method.title} trains on a base of {widths} bits, but bits is {spec.bits}.")
    optimizers = get_args(Optimizer)
    if spec.optimizer not in optimizers:
        raise SpecError(f"There is no optimizer '{spec.optimizer}'. {suggest_nearest(spec.optimizer, optimizers)}")
    _check_targets(method, spec.target_modules)
    for name in ("learning_rate", "batch_size", "max_steps"):
        if not getattr(spec, name) > 0:
            raise SpecError(f"{name} must be above zero, but is {getattr(spec, name)}.")


def _check_targets(method: Method, target_modules: str | None) -> None:
    if method.target_modules:
        if target_modules is None:
            raise SpecError(f"{method.title} needs target_modules, such as {method.target_modules[0]}, but has none.")
        check_target_modules(target_modules)
        if takes_last(target_modules) and not method.layer_choice:
            raise SpecError(
                f"{method.title} is put on all layers or none, but target_modules is '{target_modules}'. "
                "Leave last-K away."
            )
    elif target_modules is not None:
        if not method.layer_choice:
            raise SpecError(f"{method.title} has no target_modules, but they are '{target_modules}'.")
        if not re.fullmatch(r"last-[1-9]\d*", target_modules):
            raise SpecError(
                f"{method.title} has no groups of target modules: target_modules is last-4 or the like for the last "
                f"layers alone, or left away for all of them, but is '{target_modules}'."
            )


def refuse_spec(spec: TrialSpec, device_kind: str) -> str | None:
    """The rule by which this machine cannot train the configuration, or None."""
    if spec.bits == 16 and device_kind == "cpu":
        return "On CPU the unquantized base is kept in 32 bits, but bits is 16. Use bits 32, 8 or 4."
    if spec.bits == 32 and device_kind == "cuda":
        return "On GPU the unquantized base is kept in 16 bits, but bits is 32. Use bits 16, 8 or 4."
    return refuse_optimizer(spec, device_kind) or find_method(spec.method).refuse(spec, device_kind)


__all__ = ["METHODS", "Method", "check_spec", "fill_settings", "find_method", "refuse_spec"]
