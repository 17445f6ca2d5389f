"""search_spaces/*.yaml -> SearchSpace, with `--methods`, `--fix`, the device and the kind of model applied."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import SpaceError, SpecError, suggest_nearest
from autopeft.methods import METHODS, find_method, refuse_spec
from autopeft.methods.base import Dimension, ModelKind
from autopeft.records import Scalar, TaskKind, TrialSpec
from autopeft.spaces.dimensions import check_method_value, check_value, default_dimensions, narrow, resolve_bits
from autopeft.spaces.space import SHARED, MethodSpace, SearchSpace, is_open, make_spec

_HERE = Path(__file__).parent
_TOP = ("title", "serves", "shared", "methods")
_ALL = re.compile(r"^methods:[ \t]*all[ \t]*(#.*)?$", re.MULTILINE)


def list_spaces() -> dict[str, Path]:
    """Shipped search spaces by name: inside an installed wheel, or at the top of a checkout."""
    shipped = _HERE / "shipped"
    folder = shipped if shipped.is_dir() else _HERE.parent.parent / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_space(name: str) -> tuple[str, str]:
    """(name, YAML text) of a shipped space or a file, `methods: all` written out.

    So a study that is resumed under a newer table of methods goes on with those it began with. Raises SpaceError with
    the nearest name.
    """
    shipped = list_spaces()
    if name in shipped:
        return name, _write_out_all(shipped[name].read_text(encoding="utf-8"))
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise SpaceError(f"--space names the file '{name}', which does not exist. {suggest_nearest(name, shipped)}")
        try:
            return path.stem, _write_out_all(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as exc:
            raise SpaceError(f"The search space '{name}' must be a readable text file, but: {exc}.") from exc
    raise SpaceError(
        f"There is no search space '{name}'. {suggest_nearest(name, shipped)} A space of your own is a YAML file."
    )


def _write_out_all(text: str) -> str:
    lines = [f"  {method.name}: {{}}" for method in METHODS.values() if method.searched]
    return _ALL.sub("\n".join(["methods:", *lines]), text)


def parse_space(
    text: str,
    *,
    name: str,
    device_kind: str,
    max_steps: int,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    fixed: Mapping[str, Scalar] | None = None,
    model_kind: ModelKind | None = None,
    task_kind: TaskKind = "classification",
    is_stored: bool = False,
) -> SearchSpace:
    """A space's YAML, resolved for a device, the kind of task and, where it is known, the kind of model.

    `methods` keeps only those named; `fixed` takes `bits` (for every method that has it) or `lora.rank` (for one).
    What cannot be trained here goes to `left_out`. Raises SpaceError for unknown keys, methods or dimensions, where
    nothing is left, and where a method cannot be trained that `methods` or `fixed` ask for by name; but not for that
    where a study `is_stored`, which began without it.
    """
    data = _parse_yaml(text, name)
    fixed = fixed or {}
    if task_kind == "generation":
        model_kind = "decoder"
    spaces = {
        method: _parse_method(method, entry or {}, data.get("shared") or {}, name, device_kind, task_kind)
        for method, entry in data["methods"].items()
    }
    if methods is not None:
        for method in methods:
            if not find_method(method).searched:
                raise SpaceError(
                    f"--methods asks for '{method}', which is the baseline that every study has in any case. Name "
                    "methods to race against it, such as lora."
                )
            if method not in spaces:
                raise SpaceError(
                    f"--methods asks for '{method}', which the space '{name}' does not have. "
                    f"{suggest_nearest(method, spaces)}"
                )
        spaces = {method: spaces[method] for method in spaces if method in methods}
    spaces, left_out = _apply_fixed(spaces, fixed, name, device_kind)
    recipes = {method: _fit_recipe(space, device_kind, max_steps, seed) for method, space in spaces.items()}
    for method, space in spaces.items():
        rule = _refuse_kind(method, model_kind)
        if rule is None and recipes[method] is None:
            rule = _refuse_all(space, device_kind, max_steps, seed)
        if rule is not None:
            left_out[method] = rule
    asked_for = {*(methods or ()), *(key.rpartition(".")[0] for key in fixed)}
    for method, rule in left_out.items():
        if (method in asked_for and not is_stored) or left_out.keys() >= spaces.keys():
            raise SpaceError(f"The space '{name}' leaves nothing of {method} that can be trained here. {rule}")
    return SearchSpace(
        name=name,
        device_kind=device_kind,
        methods={method: space for method, space in spaces.items() if method not in left_out},
        recipes=tuple(r for method, r in recipes.items() if r is not None and method not in left_out),
        task_kind=task_kind,
        left_out=left_out,
    )


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(_write_out_all(text))
    except yaml.YAMLError as exc:
        raise SpaceError(f"The search space '{name}' must be YAML, but is not: {exc}.") from exc
    if not isinstance(data, dict) or not isinstance(data.get("methods"), dict) or not data["methods"]:
        raise SpaceError(
            f"The search space '{name}' must name methods, such as methods: {{lora: {{}}}}, or be for all: "
            "methods: all."
        )
    for key in data:
        if key not in _TOP:
            raise SpaceError(
                f"The search space '{name}' has the unknown key '{key}'. {suggest_nearest(str(key), _TOP)}"
            )
    if not isinstance(data.get("shared") or {}, dict):
        raise SpaceError(f"In the search space '{name}', 'shared' must hold settings by name, but does not.")
    for method, entry in data["methods"].items():
        if method not in METHODS or not METHODS[method].searched:
            known = [m.name for m in METHODS.values() if m.searched]
            raise SpaceError(
                f"The search space '{name}' has the unknown method '{method}'. {suggest_nearest(str(method), known)}"
            )
        if not isinstance(entry or {}, dict):
            raise SpaceError(f"In the search space '{name}', '{method}' must hold settings by name, but is {entry!r}.")
    return data


def _parse_method(
    name: str, entry: Mapping[str, Any], shared: Mapping[str, Any], space: str, device_kind: str, task_kind: TaskKind
) -> MethodSpace:
    method = METHODS[name]
    dimensions = default_dimensions(method, device_kind, task_kind)
    for key in shared:
        if key not in SHARED:
            raise SpaceError(
                f"The search space '{space}' shares the unknown setting '{key}'. {suggest_nearest(str(key), SHARED)}"
            )
    for key, given in {**{k: v for k, v in shared.items() if k in dimensions}, **entry}.items():
        if key not in dimensions:
            raise SpaceError(
                f"In the search space '{space}', {name} has the unknown dimension '{key}'. "
                f"{suggest_nearest(str(key), dimensions)}"
            )
        where = f"{name}.{key} in the search space '{space}'"
        dimensions[key] = narrow(
            dimensions[key], given, where, method=method, device_kind=device_kind, shared=key not in entry
        )
    return _split(name, dimensions)


def _split(method: str, dimensions: Mapping[str, Dimension]) -> MethodSpace:
    """Choices of one are fixed; the others searched, conditional ones last so that what they depend on is known."""
    fixed = {d.name: d.choices[0] for d in dimensions.values() if d.kind == "choice" and len(d.choices) == 1}
    searched = [d for d in dimensions.values() if d.name not in fixed]
    closed = {d.name: d.default for d in searched if not _can_open(d, dimensions, fixed)}
    searched = sorted((d for d in searched if d.name not in closed), key=lambda d: bool(d.only_if))
    return MethodSpace(method=method, dimensions=tuple(searched), fixed={**fixed, **closed})


def _can_open(dimension: Dimension, dimensions: Mapping[str, Dimension], fixed: Mapping[str, Scalar]) -> bool:
    return all(
        any(value in allowed for value in ([fixed[name]] if name in fixed else dimensions[name].choices))
        for name, allowed in dimension.only_if.items()
    )


def _apply_fixed(
    spaces: dict[str, MethodSpace], fixed: Mapping[str, Scalar], name: str, device_kind: str
) -> tuple[dict[str, MethodSpace], dict[str, str]]:
    """The spaces, and of methods that cannot have what is fixed the rule. A method's own value goes before all's."""
    spaces, left_out = dict(spaces), dict[str, str]()
    for key, value in fixed.items():
        method, _, setting = key.rpartition(".")
        if method and method not in spaces:
            raise SpaceError(
                f"--fix {key}: the space '{name}' has no method '{method}'. {suggest_nearest(method, spaces)}"
            )
        having = [m for m in ([method] if method else spaces) if setting in _settings(spaces[m])]
        touched = [m for m in having if method or f"{m}.{setting}" not in fixed]
        if not having:
            known = sorted({s for m in spaces for s in _settings(spaces[m])})
            raise SpaceError(
                f"--fix {key}: no method here has a setting '{setting}'. {suggest_nearest(setting, known)}"
            )
        if setting == "bits":
            # A width that a method cannot have leaves the method out: the user asked for that width.
            width = resolve_bits([value], f"--fix {key}={value}", device_kind)[0]
            for m in touched:
                if width in METHODS[m].bits:
                    spaces[m] = _fix(spaces[m], setting, width, device_kind)
                else:
                    widths = ", ".join(map(str, METHODS[m].bits))
                    left_out[m] = f"{METHODS[m].title} trains on a base of {widths} bits, but --fix {key}={value}."
                    del spaces[m]
            continue
        for m in touched:
            where = f"--fix {key}={value}: {m}.{setting}"
            check_value(default_dimensions(METHODS[m], device_kind)[setting], value, where)
            check_method_value(METHODS[m], setting, value, where, device_kind)
            spaces[m] = _fix(spaces[m], setting, value, device_kind)
    if not spaces:
        raise SpaceError(f"Nothing is left to search: no method of the space '{name}' can have {dict(fixed)}.")
    return spaces, left_out


def _settings(space: MethodSpace) -> set[str]:
    return {*space.fixed, *(dimension.name for dimension in space.dimensions)}


def _fix(space: MethodSpace, setting: str, value: Scalar, device_kind: str) -> MethodSpace:
    defaults = default_dimensions(METHODS[space.method], device_kind)
    dimensions = {d.name: d for d in space.dimensions}
    dimensions |= {n: replace(defaults[n], kind="choice", choices=(v,), default=v) for n, v in space.fixed.items()}
    dimensions[setting] = replace(defaults[setting], kind="choice", choices=(value,), default=value)
    return _split(space.method, dimensions)


def _refuse_kind(method: str, model_kind: ModelKind | None) -> str | None:
    kinds = METHODS[method].models
    if model_kind is None or model_kind in kinds:
        return None
    return f"{METHODS[method].title} trains {' and '.join(kinds)} models, and this one is of the kind {model_kind}."


def _refuse_all(space: MethodSpace, device_kind: str, max_steps: int, seed: int) -> str | None:
    """The rule by which this machine refuses every combination of the choices left, or None."""
    choices = [[(d.name, value) for value in d.choices] for d in space.dimensions if d.kind == "choice"]
    defaults = {d.name: d.default for d in space.dimensions}
    rule = ""
    for combination in itertools.product(*choices):
        values = {**space.fixed, **defaults, **dict(combination)}
        values |= {d.name: d.default for d in space.dimensions if not is_open(d, values)}
        try:
            spec = make_spec(space.method, values, max_steps=max_steps, seed=seed)
            refused = refuse_spec(spec, device_kind)
        except SpecError as exc:
            refused = str(exc)
        if refused is None:
            return None
        rule = refused
    return rule


def _fit_recipe(space: MethodSpace, device_kind: str, max_steps: int, seed: int) -> TrialSpec | None:
    """The method's recipe with what the space fixes, moved into its ranges; None where the machine refuses it."""
    recipe = METHODS[space.method].recipe
    # Its learning rate is the dimension's default.
    wanted: dict[str, Scalar] = dict(recipe.settings)
    if recipe.target_modules is not None:
        wanted["target_modules"] = recipe.target_modules
    values = dict(space.fixed)
    for dimension in space.dimensions:
        value = wanted.get(dimension.name, dimension.default)
        values[dimension.name] = (
            dimension.default
            if not is_open(dimension, values)
            else value
            if dimension.contains(value)
            else dimension.default
        )
    try:
        spec = make_spec(space.method, values, max_steps=max_steps, seed=seed)
    except SpecError:
        return None
    return spec if refuse_spec(spec, device_kind) is None else None
