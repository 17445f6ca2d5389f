"""A typed search space: conditional dimensions, suggested by any sampler, decoded into a TrialSpec and back."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from autopeft.errors import SpecError
from autopeft.methods import METHODS, check_spec, refuse_spec, type_settings
from autopeft.methods.base import Dimension
from autopeft.records import Scalar, TaskKind, TrialSpec

SHARED = (
    "learning_rate", "target_modules", "bits", "batch_size", "warmup_ratio", "schedule", "weight_decay", "optimizer"
)  # fmt: skip
"""Settings of every method, searched per method because their best values are."""

EVERY_LAYER = "all"
"""What a space calls `target_modules` None, beside `last-4`, for methods that have a choice of layers but no groups."""


class Suggester(Protocol):
    """The part of an Optuna trial that a space needs."""

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int: ...

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


class RandomSuggester:
    """Answers a space's questions at random, but for the method where it is given."""

    def __init__(self, rng: random.Random, *, method: str | None = None) -> None:
        self._rng = rng
        self._method = method

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        if not log:
            return self._rng.randint(low, high)
        return min(high, max(low, round(self.suggest_float(name, low, high, log=True))))

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        return float(low * (high / low) ** self._rng.random()) if log else self._rng.uniform(low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        if name == "method" and self._method is not None:
            return self._method
        return self._rng.choice(list(choices))


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpace:
    """What is searched of one method. Settings not among `dimensions` stand fixed."""

    method: str
    dimensions: tuple[Dimension, ...]
    """Names without the method's prefix; shared settings among them."""
    fixed: Mapping[str, Scalar]

    def list_values(self, name: str) -> tuple[Scalar, ...]:
        """Those that a setting of a few values may have."""
        if name in self.fixed:
            return (self.fixed[name],)
        return next(dimension.choices for dimension in self.dimensions if dimension.name == name)

    def settle(self, answer: Callable[[Dimension], Scalar]) -> dict[str, Scalar]:
        """All settings by name, as `make_spec` takes them. Asks for those that the settings before them leave open."""
        values = dict(self.fixed)
        for dimension in self.dimensions:
            values[dimension.name] = answer(dimension) if is_open(dimension, values) else dimension.default
        return values

    def answer(self, wanted: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The answers, by full name, to those questions that the settings wanted leave open."""
        answers: dict[str, Scalar] = {"method": self.method}

        def note(dimension: Dimension) -> Scalar:
            answers[f"{self.method}.{dimension.name}"] = wanted[dimension.name]
            return wanted[dimension.name]

        self.settle(note)
        return answers

    def read_answers(self, answers: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """All settings by name, as `make_spec` takes them, from such answers."""
        return self.settle(lambda dimension: answers[f"{self.method}.{dimension.name}"])


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpace:
    """What a study may try, resolved for the device it runs on."""

    name: str
    device_kind: str
    methods: Mapping[str, MethodSpace]
    recipes: tuple[TrialSpec, ...]
    """Known-good starting points inside the space, one a method where one fits."""
    task_kind: TaskKind = "classification"
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Methods that the file offers and this machine or model cannot train, with the rule."""

    def suggest(self, suggester: Suggester, *, max_steps: int, seed: int) -> TrialSpec:
        """Asks for every dimension that the earlier answers leave open."""
        method = suggester.suggest_categorical("method", list(self.methods))
        values = self.methods[method].settle(lambda d: _suggest(suggester, f"{method}.{d.name}", d))
        return make_spec(method, values, max_steps=max_steps, seed=seed)

    def params(self, spec: TrialSpec) -> dict[str, Scalar] | None:
        """The answers that lead to `spec`, by full name; None where the space cannot express it."""
        space = self.methods.get(spec.method)
        if space is None:
            return None
        values = spec_values(spec)
        answers: dict[str, Scalar] = {"method": spec.method}
        for name, value in space.fixed.items():
            if values.get(name) != value:
                return None
        for dimension in space.dimensions:
            value = values[dimension.name]
            if not is_open(dimension, values):
                if value != dimension.default:
                    return None
            elif not dimension.contains(value):
                return None
            else:
                answers[f"{spec.method}.{dimension.name}"] = value
        return answers

    @property
    def quantizes(self) -> bool:
        """Whether a trial may have a base of 4 or 8 bits."""
        widths = [width for space in self.methods.values() for width in space.list_values("bits")]
        return 4 in widths or 8 in widths

    def count_dimensions(self) -> int:
        return 1 + sum(len(space.dimensions) for space in self.methods.values())


def is_open(dimension: Dimension, values: Mapping[str, Scalar]) -> bool:
    """Whether the settings chosen so far leave this one to be searched."""
    return all(values.get(name) in allowed for name, allowed in dimension.only_if.items())


def _suggest(suggester: Suggester, name: str, dimension: Dimension) -> Scalar:
    if dimension.kind == "choice":
        answer: Scalar = suggester.suggest_categorical(name, list(dimension.choices))
        return answer
    assert dimension.low is not None
    assert dimension.high is not None
    if dimension.kind == "int":
        return suggester.suggest_int(name, int(dimension.low), int(dimension.high), log=dimension.log)
    return suggester.suggest_float(name, dimension.low, dimension.high, log=dimension.log)


def spec_values(spec: TrialSpec) -> dict[str, Scalar]:
    """All settings of a configuration by name, shared ones among them: what `make_spec` makes it from."""
    values: dict[str, Scalar] = dict(spec.settings)
    for name in SHARED:
        value = getattr(spec, name)
        if value is not None:
            values[name] = value
        elif METHODS[spec.method].layer_choice:
            values[name] = EVERY_LAYER
    return values


def make_spec(method: str, values: Mapping[str, Scalar], *, max_steps: int, seed: int) -> TrialSpec:
    """All settings of a method by name -> TrialSpec, checked."""
    own = [dimension.name for dimension in METHODS[method].dimensions]
    target_modules = values.get("target_modules", EVERY_LAYER)
    spec = TrialSpec(
        method=method,
        settings=type_settings(method, {name: values[name] for name in own}),
        target_modules=None if target_modules == EVERY_LAYER else str(target_modules),
        bits=values["bits"],  # type: ignore[arg-type]
        learning_rate=float(values["learning_rate"]),
        batch_size=int(values["batch_size"]),
        max_steps=max_steps,
        warmup_ratio=float(values["warmup_ratio"]),
        schedule=values["schedule"],  # type: ignore[arg-type]
        weight_decay=float(values["weight_decay"]),
        seed=seed,
        optimizer=values["optimizer"],  # type: ignore[arg-type]
    )
    check_spec(spec)
    return spec


def check_feasible(spec: TrialSpec, device_kind: str) -> None:
    """Raises SpecError with the rule by which this machine cannot train the configuration."""
    rule = refuse_spec(spec, device_kind)
    if rule is not None:
        raise SpecError(rule)
