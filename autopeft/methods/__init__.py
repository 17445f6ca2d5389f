"""The table of methods. One file a family; a new method is its file and a row here."""

from __future__ import annotations

from autopeft.errors import SpecError, suggest_nearest
from autopeft.methods.base import Method
from autopeft.methods.bottleneck import BOTTLENECK
from autopeft.methods.full import FULL, HEAD
from autopeft.methods.ia3 import IA3
from autopeft.methods.lora import LORA
from autopeft.methods.prefix_tuning import PREFIX_TUNING
from autopeft.methods.prompt_tuning import PROMPT_TUNING
from autopeft.methods.targets import check_target_modules
from autopeft.records import TrialSpec

METHODS: dict[str, Method] = {
    method.name: method for method in (LORA, BOTTLENECK, PREFIX_TUNING, PROMPT_TUNING, IA3, FULL, HEAD)
}


def find_method(name: str) -> Method:
    """The method of that name, or SpecError with the nearest known one."""
    if name not in METHODS:
        known = [method.name for method in METHODS.values() if method.searched]
        raise SpecError(f"There is no method '{name}'. {suggest_nearest(name, known)}")
    return METHODS[name]


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
    if bool(method.target_modules) != (spec.target_modules is not None):
        verb = "needs" if method.target_modules else "has no"
        raise SpecError(f"{method.title} {verb} target_modules, but they are {spec.target_modules!r}.")
    if spec.target_modules is not None:
        check_target_modules(spec.target_modules)
    for name in ("learning_rate", "batch_size", "max_steps"):
        if not getattr(spec, name) > 0:
            raise SpecError(f"{name} must be above zero, but is {getattr(spec, name)}.")


def refuse_spec(spec: TrialSpec, device_kind: str) -> str | None:
    """The rule by which this machine cannot train the configuration, or None."""
    if spec.bits == 16 and device_kind == "cpu":
        return "On CPU the unquantized base is kept in 32 bits, but bits is 16. Use bits 32, 8 or 4."
    if spec.bits == 32 and device_kind == "cuda":
        return "On GPU the unquantized base is kept in 16 bits, but bits is 32. Use bits 16, 8 or 4."
    return find_method(spec.method).refuse(spec, device_kind)


__all__ = ["METHODS", "Method", "check_spec", "find_method", "refuse_spec"]
