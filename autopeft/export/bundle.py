"""What every target writes from: the recipe, the rows, what peft would be asked for, facts of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from autopeft.errors import ExportError
from autopeft.methods import find_method
from autopeft.methods.base import BuildContext, PeftCall
from autopeft.methods.selective import find_biases
from autopeft.methods.targets import choose_layers
from autopeft.production.recipe import Recipe, make_recipe
from autopeft.records import StudyRecord, TrialRecord, TrialSpec
from autopeft.tasks.data import Example, Splits, load_splits
from autopeft.tasks.spec import TaskSpec, parse_task


class Words(NamedTuple):
    """How the tokenizer frames a row of a generation task."""

    begin: str | None
    """The token that it puts in front by itself, as text; None where it puts none."""
    end: str
    pad: str
    joins: bool
    """Whether every row, tokenized as one text, comes to the tokens that its parts come to apart."""
    num_cut: int
    """Rows whose prompts were cut to fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """One configuration, ready to be written for any trainer."""

    recipe: Recipe
    task: TaskSpec
    task_text: str
    """As on this machine, with its paths."""
    model: str
    """What transformers loads here: a hub id or a folder."""
    architecture: str
    """As transformers calls it: `bert`, `llama`."""
    splits: Splits
    """Prompts are cut already, from the left, where a row of a generation task is longer than the study's rows were."""
    context: BuildContext
    call: PeftCall | None
    """At the recipe's length; None where autopeft builds the method itself."""
    words: Words | None
    """Of a generation task."""
    biases: tuple[str, ...] = ()
    """What BitFit trains, by name; for that method alone."""

    @property
    def targets(self) -> list[str]:
        """Endings of module names by peft's rule."""
        assert self.call is not None
        return list(self.call.arguments["target_modules"])


def make_bundle(
    record: StudyRecord,
    trial: TrialRecord,
    *,
    pick: str,
    model: str,
    data_dir: str | None,
    epochs: float | None = None,
    steps: int | None = None,
) -> Bundle:
    """Reads rows, tokenizer and the model's configuration, not its weights. Raises ExportError for changed rows."""
    task = parse_task(record.config.task, record.config.task_name)
    splits = load_splits(task, data_dir, seed=record.config.seed)
    if splits.digest != record.provenance.task_digest:
        raise ExportError(
            f"The rows of task '{task.name}' must be those that the study '{record.config.name}' was made with, but "
            f"their digest is {splits.digest} and was {record.provenance.task_digest}. Give the folder that has them "
            "with --data-dir, or search again on the new rows."
        )
    recipe = make_recipe(record, trial, pick=pick, num_train=len(splits.train), epochs=epochs, steps=steps, model=model)
    return complete_bundle(recipe, task, record.config.task, splits, model)


def complete_bundle(recipe: Recipe, task: TaskSpec, task_text: str, splits: Splits, model: str) -> Bundle:
    """With what model and tokenizer say."""
    from autopeft.backends.hf.base_model import describe_base, load_tokenizer, resolve_model
    from autopeft.backends.hf.build import build_context

    spec = recipe.training_spec()
    method = find_method(spec.method)
    base = describe_base(model, num_labels=task.num_labels, bits=spec.bits)
    context = build_context(base, spec)
    config: Any = base.model.config
    words = None
    if task.kind == "generation":
        tokenizer = load_tokenizer(model)
        splits, words = _fit_rows(tokenizer, splits, task.max_length)
    return Bundle(
        recipe=recipe,
        task=task,
        task_text=task_text,
        model=resolve_model(model),
        architecture=str(config.model_type),
        splits=splits,
        context=context,
        call=method.peft(spec, context) if method.peft is not None else None,
        words=words,
        biases=_list_biases(base.model, spec, context) if spec.method == "bitfit" else (),
    )


def _list_biases(model: Any, spec: TrialSpec, context: BuildContext) -> tuple[str, ...]:
    return tuple(choose_layers(spec.target_modules, list(find_biases(model, context))))


def adapter_config(bundle: Bundle) -> dict[str, Any]:
    """The content of peft's adapter_config.json."""
    from autopeft.backends.hf.build import make_peft_config

    assert bundle.call is not None
    config = make_peft_config(bundle.call, language_model=bundle.task.kind == "generation")
    config.base_model_name_or_path = bundle.recipe.model
    return {key: _plain(value) for key, value in config.to_dict().items()}


def _plain(value: Any) -> Any:
    """As JSON has it. peft keeps module names in sets; the same configuration should give the same file."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return getattr(value, "value", value)


# --- rows of generation tasks


def _fit_rows(tokenizer: Any, splits: Splits, max_length: int) -> tuple[Splits, Words]:
    """Cuts prompts as the study's tokenization does, so that trainers which cut elsewhere have nothing to cut there.

    A completion that is too long by itself is left: the study and the trainers cut it at its end.
    """
    framed = tokenizer("a")["input_ids"]
    begins = tokenizer.bos_token_id is not None and framed[:1] == [tokenizer.bos_token_id]
    before = (splits.train, splits.validation, splits.test)
    after = [[_fit_row(tokenizer, example, max_length - begins) for example in examples] for examples in before]
    rows = [example for examples in after for example in examples]
    num_cut = sum(old.text != new.text for old, new in zip((e for es in before for e in es), rows, strict=True))
    words = Words(
        begin=tokenizer.bos_token if begins else None,
        end=tokenizer.eos_token,
        pad=tokenizer.pad_token,
        joins=_joins(tokenizer, framed[:begins], rows),
        num_cut=num_cut,
    )
    train, validation, test = after
    return splits._replace(train=train, validation=validation, test=test), words


def _fit_row(tokenizer: Any, example: Example, most: int) -> Example:
    completion = _count(tokenizer, example.completion or "") + 1
    prompt = example.text
    # A suffix may come to more tokens by itself than within its text.
    while prompt and (excess := _count(tokenizer, prompt) + min(completion, most) - most) > 0:
        offsets = tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        prompt = prompt[max(offsets[excess][0], 1) :] if excess < len(offsets) else ""
    return example._replace(text=prompt)


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _joins(tokenizer: Any, begin: list[int], examples: Sequence[Example]) -> bool:
    """Whether a row as one text comes to the tokens that the study made of its parts."""
    prompts = [example.text for example in examples]
    completions = [example.completion or "" for example in examples]
    texts = [p + c + tokenizer.eos_token for p, c in zip(prompts, completions, strict=True)]
    whole = tokenizer(texts, verbose=False)["input_ids"]
    parts = [tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in (prompts, completions)]
    return all(
        ids == [*begin, *prompt, *completion, tokenizer.eos_token_id]
        for ids, prompt, completion in zip(whole, *parts, strict=True)
    )
