"""What a configuration says, setting by setting, and how a trainer's file says it: tables of rules.

A table has a row for every setting. A setting without a row, or a value that its rule cannot say, is a reason to refuse
the export; nothing is left out in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from autopeft.methods import find_method
from autopeft.production.recipe import Recipe

Values = Mapping[str, Any]
Entries = dict[str, Any]
Rule = Callable[[Any, Values], Entries]
"""(the setting's value, all values) -> entries of the target's file. Raises `Unsaid`."""
Table = Mapping[str, Rule]

TRAINING = (
    "bits", "learning_rate", "schedule", "num_cycles", "warmup_steps", "steps", "micro_batch", "gradient_accumulation",
    "weight_decay", "max_grad_norm", "optimizer", "precision", "checkpoint_activations", "seed",
)  # fmt: skip
"""Settings that every method has; `list_values` takes all but `bits` from the recipe's fields of these names."""


class Unsaid(Exception):
    """A setting that a target's file has no way to say; the text is the reason, as a sentence."""


def list_values(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the training but targets and data: the method's own settings, and `TRAINING`."""
    values: dict[str, Any] = {name: getattr(recipe, name) for name in TRAINING if name != "bits"}
    return {**values, "bits": recipe.spec.bits, **recipe.spec.settings}


def say_all(recipe: Recipe, methods: Mapping[str, Table], training: Table, *, title: str) -> Entries:
    """The entries for method and training. Raises Unsaid with every reason why they do not say it all."""
    method = find_method(recipe.spec.method)
    if method.name not in methods:
        raise Unsaid(f"{title} has no {method.title}.")
    values = list_values(recipe)
    entries: Entries = {}
    reasons = []
    for name, table in [*((name, methods[method.name]) for name in recipe.spec.settings), *_rows(training)]:
        try:
            if name not in table:
                raise Unsaid(f"{title} has no field for {method.title}'s {name}.")
            entries |= table[name](values[name], values)
        except Unsaid as exc:
            reasons.append(str(exc))
    if reasons:
        raise Unsaid(" ".join(dict.fromkeys(reasons)))
    return entries


def _rows(training: Table) -> list[tuple[str, Table]]:
    assert set(training) == set(TRAINING), "a table of training settings says all of them"
    return [(name, training) for name in TRAINING]


# --- rules


def to(key: str, **also: Any) -> Rule:
    """The value as it is, under the target's name; `also` are entries that go with it."""
    return lambda value, values: {key: value, **also}


def whole(key: str, title: str) -> Rule:
    """A number for a field that holds whole ones."""

    def rule(value: Any, values: Values) -> Entries:
        if not _is_whole(value):
            raise Unsaid(f"{title}'s {key} is a whole number, but it would be {value:g}.")
        return {key: round(value)}

    return rule


def product(key: str, other: str, convert: Callable[[str], Rule] = to) -> Rule:
    """The value times that of another setting, such as alpha over rank times rank; an int where it is whole."""

    def rule(value: Any, values: Values) -> Entries:
        result = value * values[other]
        return convert(key)(round(result) if _is_whole(result) else result, values)

    return rule


def _is_whole(value: float) -> bool:
    """But for the rounding of products."""
    return round(value, 9) == round(value)


def choose(answers: Mapping[Any, Entries], why: str) -> Rule:
    """Entries by value; `why` is the reason where a value has none, with the value in braces."""

    def rule(value: Any, values: Values) -> Entries:
        if value not in answers:
            raise Unsaid(why.format(value))
        return dict(answers[value])

    return rule


def only(value: Any, why: str, **entries: Any) -> Rule:
    """One value alone, which the target takes without being told, or by `entries`."""
    return choose({value: entries}, why)


def unless(default: Any, rule: Rule) -> Rule:
    """Nothing where the value is the target's own default, else by the rule."""
    return lambda value, values: {} if value == default else rule(value, values)


def said_elsewhere(value: Any, values: Values) -> Entries:
    """For a setting that the rule of another one says too."""
    return {}
