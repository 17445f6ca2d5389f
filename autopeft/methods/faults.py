"""What is wrong with a row of the table, as far as can be told without building it.

What a method does to a model is for `autopeft.testing.MethodContract` to judge.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields
from typing import get_args

from autopeft.errors import SpecError
from autopeft.methods.base import ALL_BITS, EVERY_KIND, Dimension, Family, Method, optimizers_on
from autopeft.methods.targets import check_target_modules, takes_last
from autopeft.records import Bits, TrialSpec

FAMILIES: tuple[str, ...] = get_args(Family)
DEVICE_BITS: dict[str, tuple[Bits, ...]] = {"cpu": (32, 8, 4), "cuda": (16, 8, 4)}
"""Widths of the base on each kind of device, the unquantized first."""

_NAME = re.compile(r"[a-z][a-z0-9]*(_[a-z0-9]+)*")
_SOURCE = re.compile(r"arXiv:\d{4}\.\d{4,5}|\b([a-z0-9-]+\.)+[a-z]{2,}/\S")
_SHARED = frozenset(field.name for field in fields(TrialSpec))


def make_recipe_spec(method: Method, *, device_kind: str, bits: Bits | None = None) -> TrialSpec:
    """The recipe as a configuration, on the widest base that method and device have unless `bits` is given.

    What is not the method's own stands at common values.
    """
    recipe = method.recipe
    widest = next(width for width in DEVICE_BITS[device_kind] if width in method.bits)
    return TrialSpec(
        method=method.name,
        settings=dict(recipe.settings),
        target_modules=recipe.target_modules,
        bits=widest if bits is None else bits,
        learning_rate=recipe.learning_rate,
        batch_size=16,
        max_steps=1000,
        warmup_ratio=0.06,
        schedule="linear",
        weight_decay=0.0,
        seed=0,
        optimizer=optimizers_on(method, device_kind)[0],
    )


def find_faults(method: Method) -> list[str]:
    """Each fault as a clause that names the field; empty where the row is sound."""
    faults = [*_of_row(method), *_of_targets(method), *_of_dimensions(method), *_of_recipe(method)]
    # A spec of a recipe that does not fit would only repeat what was said.
    return faults or list(_of_refusals(method))


def _of_row(method: Method) -> Iterator[str]:
    if not _NAME.fullmatch(method.name):
        yield f"name '{method.name}' must be lower-case words joined by underscores"
    if not method.title.strip():
        yield "title must not be empty"
    if not _SOURCE.search(method.paper):
        yield f"paper '{method.paper}' must hold an arXiv number or an address"
    if method.family not in FAMILIES:
        yield f"family '{method.family}' must be one of {', '.join(FAMILIES)}"
    if not method.bits or list(method.bits) != [width for width in ALL_BITS if width in method.bits]:
        yield f"bits {method.bits} must be some of {ALL_BITS}, in that order"
    if (16 in method.bits) != (32 in method.bits):
        yield "bits must hold 16 and 32 or neither: they are the unquantized base, on a GPU and on a CPU"
    if not method.models or list(method.models) != [kind for kind in EVERY_KIND if kind in method.models]:
        yield f"models {method.models} must be some of {EVERY_KIND}, in that order"
    low, high = method.learning_rate
    if not 0 < low < high:
        yield f"learning_rate must go from above zero to something higher, but goes from {low:g} to {high:g}"
    if not all(optimizers_on(method, device) for device in DEVICE_BITS):
        yield f"optimizers {method.optimizers} must hold one for every kind of device"
    if method.peft is None and method.build is None:
        yield "peft or build must say how it is put on a model"
    if method.peft is not None and method.build is not None:
        yield "build would be ignored beside peft"
    if (method.peft is None) != bool(method.why_not_peft.strip()):
        yield "why_not_peft must be given where peft lacks the method, and only there"


def _of_targets(method: Method) -> Iterator[str]:
    for target_modules in method.target_modules:
        yield from _misspelt(target_modules, "target_modules")
    if len(set(method.target_modules)) < len(method.target_modules):
        yield "target_modules must not name a group twice"
    wanted = method.recipe.target_modules
    if method.target_modules and wanted is None:
        yield "recipe.target_modules must be given, because the method has groups"
    if wanted is not None:
        if not method.target_modules:
            yield f"recipe.target_modules must be None for a method without groups, but is '{wanted}'"
        yield from _misspelt(wanted, "recipe.target_modules")
    for given in (*method.target_modules, wanted or ""):
        if not method.layer_choice and takes_last(given):
            yield f"'{given}' needs layer_choice"


def _misspelt(target_modules: str, field: str) -> Iterator[str]:
    try:
        check_target_modules(target_modules)
    except SpecError as exc:
        yield f"{field}: {str(exc).rstrip('.')}"


def _of_dimensions(method: Method) -> Iterator[str]:
    names = [dimension.name for dimension in method.dimensions]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield f"dimension '{name}' is there twice"
    for dimension in method.dimensions:
        name = dimension.name
        if not _NAME.fullmatch(name):
            yield f"dimension '{name}' must be lower-case words joined by underscores, without the method's prefix"
        if name in _SHARED:
            yield f"dimension '{name}' is a setting of every method"
        if not dimension.meaning.strip():
            yield f"dimension '{name}' must have a meaning"
        yield from (f"dimension '{name}' {fault}" for fault in _of_range(dimension))
        for other, values in dimension.only_if.items():
            yield from (f"dimension '{name}' {fault}" for fault in _of_condition(method, other, values))


def _of_range(dimension: Dimension) -> Iterator[str]:
    if dimension.kind == "choice":
        if len(dimension.choices) < 2 or len(set(map(repr, dimension.choices))) < len(dimension.choices):
            yield f"must offer two values or more, each once, but offers {dimension.choices}"
    elif dimension.low is None or dimension.high is None or not dimension.low < dimension.high:
        yield f"must go from low to high, but goes from {dimension.low} to {dimension.high}"
        return
    elif dimension.log and dimension.low <= 0:
        yield f"is searched on a logarithmic scale, so low must be above 0, but is {dimension.low:g}"
    if not dimension.contains(dimension.default):
        yield f"has the default {dimension.default!r}, which lies outside it"


def _of_condition(method: Method, other: str, values: tuple[object, ...]) -> Iterator[str]:
    if other == "bits":
        known: tuple[object, ...] = method.bits
    else:
        known = next((d.choices for d in method.dimensions if d.name == other), ())
    if not values or any(value not in known for value in values):
        yield f"is searched only if {other} is one of {values}, which it cannot be"


def _of_recipe(method: Method) -> Iterator[str]:
    recipe = method.recipe
    if not recipe.source.strip():
        yield "recipe.source must not be empty"
    low, high = method.learning_rate
    if not low <= recipe.learning_rate <= high:
        yield f"recipe.learning_rate {recipe.learning_rate:g} must lie within learning_rate"
    known = {dimension.name: dimension for dimension in method.dimensions}
    if set(recipe.settings) != set(known):
        yield f"recipe.settings must name exactly its dimensions, but names {', '.join(recipe.settings) or 'none'}"
        return
    for name, value in recipe.settings.items():
        if not known[name].contains(value):
            yield f"recipe.settings has {name} {value!r}, which lies outside the dimension"


def _of_refusals(method: Method) -> Iterator[str]:
    """A device that trains the recipe at no width is something that the table must say."""
    refused = [
        device
        for device, widths in DEVICE_BITS.items()
        if not any(
            method.refuse(make_recipe_spec(method, device_kind=device, bits=width), device) is None
            for width in widths
            if width in method.bits
        )
    ]
    if len(refused) == len(DEVICE_BITS):
        yield "its recipe is refused on every device"
    elif refused and not method.needs:
        yield f"its recipe is refused on {refused[0]}, which needs must say"
