"""search_spaces/*.yaml -> SearchSpace, with `--methods`, `--fix` and the device applied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import SpaceError, SpecError, suggest_nearest
from autopeft.methods import METHODS, find_method, refuse_spec
from autopeft.methods.base import Dimension, Method, choice, floats
from autopeft.records import Scalar, TrialSpec
from autopeft.spaces.space import SHARED, MethodSpace, SearchSpace, is_open, make_spec

_HERE = Path(__file__).parent
_SCHEDULES = ("linear", "cosine", "constant")
_TOP = ("title", "serves", "shared", "methods")


def list_spaces() -> dict[str, Path]:
    """Shipped search spaces by name: inside an installed wheel, or at the top of a checkout."""
    shipped = _HERE / "shipped"
    folder = shipped if shipped.is_dir() else _HERE.parent.parent / "search_spaces"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_space(name: str) -> tuple[str, str]:
    """(name, YAML text) of a shipped space or a file. Raises SpaceError with the nearest name."""
    shipped = list_spaces()
    if name in shipped:
        return name, shipped[name].read_text(encoding="utf-8")
    path = Path(name)
    if path.suffix in (".yaml", ".yml") and path.is_file():
        try:
            return path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as exc:
            raise SpaceError(f"The search space '{name}' must be a readable text file, but: {exc}.") from exc
    raise SpaceError(
        f"There is no search space '{name}'. {suggest_nearest(name, shipped)} A space of your own is a YAML file."
    )


def parse_space(
    text: str,
    *,
    name: str,
    device_kind: str,
    max_steps: int,
    seed: int = 0,
    methods: Sequence[str] | None = None,
    fixed: Mapping[str, Scalar] | None = None,
) -> SearchSpace:
    """A space's YAML, resolved for a device.

    `methods` keeps only those named; `fixed` takes `bits` (for every method that has it) or `lora.rank` (for one).
    Raises SpaceError for unknown keys, methods or dimensions, and where nothing is left.
    """
    data = _parse_yaml(text, name)
    spaces = {
        method: _parse_method(method, entry or {}, data.get("shared") or {}, name, device_kind)
        for method, entry in data["methods"].items()
    }
    if methods is not None:
        for method in methods:
            if find_method(method).name not in spaces:
                raise SpaceError(
                    f"--methods asks for '{method}', which the space '{name}' does not have. "
                    f"{suggest_nearest(method, spaces)}"
                )
        spaces = {method: spaces[method] for method in spaces if method in methods}
    spaces = _apply_fixed(spaces, fixed or {}, name, device_kind)
    recipes = [_fit_recipe(space, device_kind, max_steps, seed) for space in spaces.values()]
    for space, recipe in zip(spaces.values(), recipes, strict=True):
        if recipe is None:
            _check_trainable(space, name, device_kind, max_steps, seed)
    return SearchSpace(
        name=name,
        device_kind=device_kind,
        methods=spaces,
        recipes=tuple(recipe for recipe in recipes if recipe is not None),
    )


def _parse_yaml(text: str, name: str) -> dict[str, Any]:
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise SpaceError(f"The search space '{name}' must be YAML, but is not: {exc}.") from exc
    if not isinstance(data, dict) or not isinstance(data.get("methods"), dict) or not data["methods"]:
        raise SpaceError(f"The search space '{name}' must name methods, such as methods: {{lora: {{}}}}, but does not.")
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


def default_dimensions(method: Method, device_kind: str) -> dict[str, Dimension]:
    """Every setting of a method with its default range; those that one value suits are choices of one."""
    low, high = method.learning_rate
    widest = 16 if device_kind == "cuda" else 32
    shared = [
        floats("learning_rate", low, high, method.recipe.learning_rate, "peak learning rate", log=True),
        choice("bits", tuple(b for b in (4, 8, widest) if b in method.bits), widest, "width of the base weights"),
        choice("batch_size", (16,), 16, "examples a step"),
        choice("warmup_ratio", (0.06,), 0.06, "share of the steps over which the learning rate rises"),
        choice("schedule", ("linear",), "linear", "how the learning rate falls"),
        choice("weight_decay", (0.0,), 0.0, "AdamW's decoupled weight decay"),
    ]
    if method.target_modules:
        default = method.recipe.target_modules or method.target_modules[0]
        shared.append(choice("target_modules", method.target_modules, default, "which linear layers"))
    return {dimension.name: dimension for dimension in [*shared, *method.dimensions]}


def _parse_method(
    name: str, entry: Mapping[str, Any], shared: Mapping[str, Any], space: str, device_kind: str
) -> MethodSpace:
    method = METHODS[name]
    dimensions = default_dimensions(method, device_kind)
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
        dimensions[key] = _narrow(dimensions[key], given, where, device_kind, shared=key not in entry)
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


def _narrow(dimension: Dimension, given: Any, where: str, device_kind: str, *, shared: bool) -> Dimension:
    """A dimension as a space file writes it: {low, high, log}, a list of choices, or one value."""
    if isinstance(given, dict):
        return _narrow_range(dimension, given, where)
    values = given if isinstance(given, list) else [given]
    if not values:
        raise SpaceError(f"{where} must offer at least one value, but offers none.")
    if dimension.name == "bits":
        values = _resolve_bits(values, dimension, where, device_kind, shared=shared)
    if dimension.kind == "float":
        values = [_number(value, where) if isinstance(value, str) else value for value in values]
    for value in values:
        check_value(dimension, value, where)
    default = dimension.default if dimension.default in values else values[0]
    return replace(dimension, kind="choice", low=None, high=None, log=False, choices=tuple(values), default=default)


def _resolve_bits(values: list[Any], dimension: Dimension, where: str, device_kind: str, *, shared: bool) -> list[Any]:
    """`unquantized` is 16 on GPU and 32 on CPU; methods that cannot be quantized leave out shared widths they lack."""
    widest = 16 if device_kind == "cuda" else 32
    widths = [widest if value == "unquantized" else value for value in values]
    for width in widths:
        if width not in (4, 8, widest):
            other = "GPU" if device_kind == "cpu" else "CPU"
            hint = f" {width} bits need a {other}." if width in (16, 32) else ""
            raise SpaceError(
                f"{where} must be 4, 8 or unquantized ({widest} here), but is {width!r}.{hint} Write unquantized."
            )
    if shared:
        widths = [width for width in widths if width in dimension.choices] or [widest]
    return widths


def check_value(dimension: Dimension, value: Any, where: str) -> None:
    """Raises SpaceError where a setting cannot have the value at all; what a space narrows does not count."""
    if dimension.name == "target_modules":
        from autopeft.methods.targets import check_target_modules

        check_target_modules(str(value))
        return
    if dimension.name == "schedule":
        fits = value in _SCHEDULES
        range_text = ", ".join(_SCHEDULES)
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


def _narrow_range(dimension: Dimension, given: dict[str, Any], where: str) -> Dimension:
    for key in given:
        if key not in ("low", "high", "log"):
            raise SpaceError(
                f"{where} has the unknown key '{key}'. {suggest_nearest(str(key), ('low', 'high', 'log'))}"
            )
    if dimension.kind == "choice":
        raise SpaceError(f"{where} is a choice and takes a list such as {list(dimension.choices)}, not a range.")
    low, high = (_number(given.get(key, getattr(dimension, key)), where) for key in ("low", "high"))
    for value in (low, high):
        check_value(dimension, int(value) if dimension.kind == "int" and value.is_integer() else value, where)
    if low >= high:
        raise SpaceError(f"{where} must go from low to high, but goes from {low} to {high}.")
    log = bool(given.get("log", dimension.log))
    if log and low <= 0:
        raise SpaceError(f"{where} is searched on a logarithmic scale, so low must be above 0, but is {low}.")
    default = min(max(float(dimension.default), low), high)
    return replace(dimension, low=low, high=high, log=log, default=int(default) if dimension.kind == "int" else default)


def _number(value: Any, where: str) -> float:
    # YAML 1.1 reads 1e-3 as text: it wants 1.0e-3. People write the former.
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SpaceError(f"{where} takes numbers, but is given {value!r}.") from None


def _apply_fixed(
    spaces: dict[str, MethodSpace], fixed: Mapping[str, Scalar], name: str, device_kind: str
) -> dict[str, MethodSpace]:
    for key, value in fixed.items():
        method, _, setting = key.rpartition(".")
        if method and method not in spaces:
            raise SpaceError(
                f"--fix {key}: the space '{name}' has no method '{method}'. {suggest_nearest(method, spaces)}"
            )
        touched = [m for m in ([method] if method else spaces) if setting in _settings(spaces[m])]
        if not touched:
            known = sorted({s for m in spaces for s in _settings(spaces[m])})
            raise SpaceError(
                f"--fix {key}: no method here has a setting '{setting}'. {suggest_nearest(setting, known)}"
            )
        if setting == "bits":
            # A width that a method cannot have leaves the method out: the user asked for that width.
            where = f"--fix {key}={value}"
            widest = _resolve_bits([value], default_dimensions(METHODS[touched[0]], device_kind)["bits"], where,
                                   device_kind, shared=False)[0]  # fmt: skip
            for m in touched:
                if widest in METHODS[m].bits:
                    spaces[m] = _fix(spaces[m], setting, widest, device_kind)
                else:
                    del spaces[m]
            continue
        for m in touched:
            check_value(default_dimensions(METHODS[m], device_kind)[setting], value, f"--fix {key}={value}")
            spaces[m] = _fix(spaces[m], setting, value, device_kind)
    if not spaces:
        raise SpaceError(f"Nothing is left to search: no method of the space '{name}' can have {dict(fixed)}.")
    return spaces


def _settings(space: MethodSpace) -> set[str]:
    return {*space.fixed, *(dimension.name for dimension in space.dimensions)}


def _fix(space: MethodSpace, setting: str, value: Scalar, device_kind: str) -> MethodSpace:
    defaults = default_dimensions(METHODS[space.method], device_kind)
    dimensions = {d.name: d for d in space.dimensions}
    dimensions |= {n: replace(defaults[n], kind="choice", choices=(v,), default=v) for n, v in space.fixed.items()}
    dimensions[setting] = replace(defaults[setting], kind="choice", choices=(value,), default=value)
    return _split(space.method, dimensions)


def _check_trainable(space: MethodSpace, name: str, device_kind: str, max_steps: int, seed: int) -> None:
    """Raises SpaceError where this machine refuses every combination of the choices left."""
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
            return
        rule = refused
    raise SpaceError(f"The space '{name}' leaves nothing of {space.method} that this machine can train. {rule}")


def _fit_recipe(space: MethodSpace, device_kind: str, max_steps: int, seed: int) -> TrialSpec | None:
    """The method's recipe with what the space fixes, moved into its ranges; None where the machine refuses it."""
    recipe = METHODS[space.method].recipe
    wanted: dict[str, Scalar] = dict(recipe.settings) | {"learning_rate": recipe.learning_rate}
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
