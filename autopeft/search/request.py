"""What the user asked for, and the small languages it is written in: sizes, fixed settings, own configurations."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from autopeft.errors import SpaceError, SpecError
from autopeft.methods import Method, find_method
from autopeft.records import Scalar, TaskKind, TrialSpec
from autopeft.spaces.dimensions import default_dimensions, widest_bits
from autopeft.spaces.recipes import settle_fixed, vary_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line's values, unread."""

    task: str
    budget: str
    model: str = "auto"
    space: str = "default"
    methods: str | None = None
    fix: Sequence[str] = ()
    objectives: str = "quality,vram,params"
    max_vram: str | None = None
    max_params: str | None = None
    max_steps: int | None = None
    seed: int = 0
    workers: int | None = None
    name: str | None = None
    data_dir: str | None = None
    include: Sequence[str] = ()
    stop_when_gain_below: str | None = None
    until: str | None = None
    price: str | None = None
    plan_for: str | None = None


def parse_bytes(text: str) -> int:
    """`24GB` -> bytes. GB and GiB alike mean 2**30, as GPU makers and drivers use it."""
    units = {"gib": 2**30, "gb": 2**30, "g": 2**30, "mib": 2**20, "mb": 2**20, "m": 2**20}
    cleaned = text.strip().lower()
    number = cleaned.rstrip("gmib")
    try:
        size = float(number) * units[cleaned[len(number) :].strip()]
    except (ValueError, KeyError):
        raise SpecError(f"--max-vram takes a size such as 24GB or 800MB, but was given '{text}'.") from None
    if not 0 < size < math.inf:
        raise SpecError(f"--max-vram must be a number above zero, but is '{text}'.")
    return int(size)


def parse_count(text: str) -> int:
    """`1.5M` -> 1500000. Raises SpecError where it is no number above zero."""
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    cleaned = text.strip().lower()
    unit = units.get(cleaned[-1:], 1.0)
    try:
        count = float(cleaned.rstrip("kmb")) * unit
    except ValueError:
        raise SpecError(f"--max-params takes a number such as 500k or 10M, but was given '{text}'.") from None
    if not 1 <= count < math.inf:
        raise SpecError(f"--max-params must be at least 1, but is '{text}'.")
    return round(count)


def parse_share(text: str, option: str) -> float:
    """`0.5%` and `0.005` -> 0.005. Raises SpecError where it is no share above 0 and below 1."""
    cleaned = text.strip()
    try:
        share = float(cleaned.removesuffix("%")) / (100 if cleaned.endswith("%") else 1)
    except ValueError:
        raise SpecError(f"{option} takes a share such as 0.5%, but was given '{text}'.") from None
    if not 0 < share < 1:
        raise SpecError(f"{option} must be above 0% and below 100%, but is '{text}'.")
    return share


def parse_fixed(items: Sequence[str]) -> dict[str, Scalar]:
    """`bits=4` and `lora.rank=8` -> values by name. Raises SpecError where one has no value."""
    fixed: dict[str, Scalar] = {}
    for item in items:
        key, separator, value = item.partition("=")
        if not separator or not key or not value:
            raise SpecError(f"--fix takes NAME=VALUE such as bits=4 or lora.rank=8, but was given '{item}'.")
        name, scalar = key.strip(), _parse_scalar(value)
        if fixed.setdefault(name, scalar) != scalar:
            raise SpecError(f"--fix gives a setting one value, but {name} both {fixed[name]} and {scalar}. Keep one.")
    return fixed


def _parse_scalar(text: str) -> Scalar:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        # `[1` and the 13th month: text, which the setting refuses by what it takes.
        return text
    if isinstance(value, str):
        # YAML 1.1 reads 1e-3 as text.
        try:
            return float(value)
        except ValueError:
            return value
    return value if isinstance(value, bool | int | float) else text


def read_included(
    path: Path,
    *,
    device_kind: str,
    max_steps: int,
    seed: int,
    task_kind: TaskKind = "classification",
    fixed: Mapping[str, Scalar] | None = None,
) -> TrialSpec:
    """A configuration of the user's own: `method:` and any of its settings; the rest as in the method's recipe, but for
    what `fixed` holds all trials to, by name as `--fix` has it.

    Raises SpecError or SpaceError where it cannot be trained, or sets otherwise what is fixed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise SpecError(
            f"--include takes a YAML file with a configuration, but '{path}' cannot be read: {exc}."
        ) from exc
    if not isinstance(data, dict) or "method" not in data:
        raise SpecError(f"The configuration '{path}' must name its method, such as method: lora, but does not.")
    method = find_method(str(data.pop("method")))
    if not method.searched:
        raise SpecError(f"{path}: '{method.name}' is the baseline, which every study trains. Name a method to race.")
    given = {str(key): _parse_scalar(value) if isinstance(value, str) else value for key, value in data.items()}
    given = _apply_fixed(given, fixed or {}, method, device_kind, path)
    try:
        return vary_recipe(method, given, device_kind=device_kind, max_steps=max_steps, seed=seed, task_kind=task_kind)
    except (SpecError, SpaceError) as exc:
        raise type(exc)(f"{path}: {exc}") from exc


def _apply_fixed(
    given: Mapping[str, Scalar], fixed: Mapping[str, Scalar], method: Method, device_kind: str, path: Path
) -> dict[str, Scalar]:
    """The settings given and those fixed: `lora.rank` for one method, `bits` for every one that has none of its own."""
    joined = dict(given)
    known = default_dimensions(method, device_kind)
    for name, value in settle_fixed(method, fixed).items():
        if name not in known:
            continue
        key = own_key if (own_key := f"{method.name}.{name}") in fixed else name
        own, wanted = (widest_bits(device_kind) if v == "unquantized" else v for v in (given.get(name, value), value))
        if own != wanted:
            raise SpecError(
                f"{path} sets {name} to {given[name]}, but --fix {key}={value} holds every trial to {value}. Leave one "
                "of them away, or make them agree."
            )
        joined[name] = value
    return joined
