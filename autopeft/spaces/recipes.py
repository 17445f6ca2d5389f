"""A method's recipe with some of its settings otherwise."""

from __future__ import annotations

from collections.abc import Mapping

from autopeft.errors import SpecError, suggest_nearest
from autopeft.methods import Method
from autopeft.records import Scalar, TaskKind, TrialSpec
from autopeft.spaces.dimensions import check_value, default_dimensions
from autopeft.spaces.space import check_feasible, make_spec


def settle_fixed(method: Method, fixed: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """What `--fix` holds a method to, by the settings' names: its own (`lora.rank`) goes before all's (`rank`)."""
    prefix = f"{method.name}."
    shared = {key: value for key, value in fixed.items() if "." not in key}
    return shared | {key.removeprefix(prefix): value for key, value in fixed.items() if key.startswith(prefix)}


def vary_recipe(
    method: Method,
    given: Mapping[str, Scalar],
    *,
    device_kind: str,
    max_steps: int,
    seed: int,
    task_kind: TaskKind = "classification",
) -> TrialSpec:
    """What `given` leaves open is as in the recipe. `bits` may be `unquantized`.

    Raises SpecError or SpaceError for a setting that the method lacks, a value that it cannot have, and what this
    device cannot train.
    """
    dimensions = default_dimensions(method, device_kind, task_kind)
    values: dict[str, Scalar] = {name: dimension.default for name, dimension in dimensions.items()}
    values |= method.recipe.settings
    for name, value in given.items():
        if name not in dimensions:
            raise SpecError(f"{method.title} has no setting '{name}'. {suggest_nearest(name, dimensions)}")
        check_value(dimensions[name], value, f"{method.name}.{name}")
        values[name] = value
    if values["bits"] == "unquantized":
        values["bits"] = dimensions["bits"].default
    spec = make_spec(method.name, values, max_steps=max_steps, seed=seed)
    check_feasible(spec, device_kind)
    return spec
