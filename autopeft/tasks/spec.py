"""Tasks as data: a YAML file says where rows come from, what their columns mean and how answers are scored."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import RecordError, TaskError, suggest_nearest
from autopeft.records import TaskKind, from_record

VALIDATION_MOST = 1000
BUILTIN = Path(__file__).parent / "builtin"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A data set on the Hugging Face hub. Splits are named as `datasets` takes them: `train`, `train[:20000]`."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str | None = None
    """The labelled split kept for the end; many GLUE tests have no labels, so this is often `validation`. None: a part
    of the training rows is set aside."""
    validation: str | None = None
    """The split that trials are compared on; None: a part of the training rows is set aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """Files of one's own, relative to the task file: .jsonl, .json or .csv."""

    train: str
    test: str | None = None
    """None: 15% of the training rows are set aside, by class where there are classes."""
    validation: str | None = None
    """What trials are compared on. None: 10% of the training rows are set aside, in the same way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What rows mean and how answers are scored: a class for a text, or text after a prompt."""

    name: str
    title: str
    kind: TaskKind = "classification"
    text: str = ""
    """Column of the text to classify."""
    text_pair: str | None = None
    """Column of the second text, for pairs."""
    label: str = "label"
    labels: tuple[str, ...] = ()
    """Names in the order of their index. Rows may hold the index or the name."""
    prompt: str = ""
    """Generation: what the model reads, with columns in braces: `"{question}\\n"`. Empty for plain text."""
    prompt_without: dict[str, str] = field(default_factory=dict)
    """Prompts for rows in which the column named is empty or missing; the first that applies stands for `prompt`."""
    completion: str = ""
    """Generation: what the model must write, with columns in braces: `"{answer}"`. Its tokens alone are learned."""
    max_new_tokens: int = 128
    """Generation, scorer `exact_match`: tokens to write at most."""
    answer: str | None = None
    """Generation, scorer `exact_match`: a regular expression whose one group is the answer inside of what is written,
    such as `"#### *(.+)"`; None compares everything."""
    scorer: str = "accuracy"
    """By default `accuracy`, and `token_accuracy` for generation."""
    max_length: int = 128
    """Tokens; longer texts are cut off at their end, prompts before a completion at their beginning."""
    max_validation: int = VALIDATION_MOST
    """Rows of the search-validation split at most. Every trial is scored on all of them at every rung."""
    hub: HubSource | None = None
    """Where rows come from when neither `files` nor a data folder has them."""
    files: FileSource | None = None
    embedded: bool = False
    """Made by `autopeft.tasks.demo`."""

    @property
    def num_labels(self) -> int | None:
        """Classes of the head; None for generation, which has no head."""
        return len(self.labels) if self.kind == "classification" else None


def describe_scoring(text: str) -> str:
    """What of a task, beside its rows and its scorer, decides scores on them: `max_length 128`.

    `text` is what a study keeps of its task. It was checked when the study began, maybe by another version.
    """
    known = yaml.safe_load(text)
    known = known if isinstance(known, dict) else {}
    names = ["max_length"]
    if known.get("scorer") == "exact_match":
        names += ["max_new_tokens", "answer"]
    defaults = {each.name: each.default for each in fields(TaskSpec)}
    return ", ".join(f"{name} {known.get(name, defaults[name])}" for name in names)


def list_tasks() -> dict[str, Path]:
    """Shipped tasks by name."""
    return {path.stem: path for path in sorted(BUILTIN.glob("*.yaml"))}


def find_task_text(task: str) -> str:
    """The YAML text of a shipped task's name or of a file. Raises TaskError with the nearest name."""
    shipped = list_tasks()
    if task in shipped:
        return shipped[task].read_text(encoding="utf-8")
    path = Path(task)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise TaskError(f"--task names the file '{task}', which does not exist. {suggest_nearest(task, shipped)}")
        return _anchor_files(path)
    raise TaskError(
        f"There is no task '{task}'. {suggest_nearest(task, shipped)} "
        "A task of your own is a YAML file: --task mine.yaml."
    )


def _anchor_files(path: Path) -> str:
    """The task file's text with its data files made absolute, so that workers elsewhere find them."""
    try:
        text = path.read_text(encoding="utf-8")
        data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise TaskError(f"The task file '{path}' must be readable YAML, but is not: {exc}.") from exc
    if isinstance(data, dict) and isinstance(data.get("files"), dict):
        files = {k: str((path.parent / v).resolve()) if isinstance(v, str) else v for k, v in data["files"].items()}
        return yaml.safe_dump(data | {"files": files}, sort_keys=False, allow_unicode=True)
    return text


def parse_task(text: str, where: str) -> TaskSpec:
    """YAML -> TaskSpec. Raises TaskError for an unknown key, a missing one or a value of the wrong type."""
    from autopeft.tasks.scorers import DEFAULT_SCORERS, check_scorer

    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise TaskError(f"The task file '{where}' must be YAML, but is not: {exc}.") from exc
    if not isinstance(data, Mapping):
        raise TaskError(f"The task file '{where}' must hold keys and values such as name: and labels:, but does not.")
    _check_label_names(data.get("labels"), where)
    default = DEFAULT_SCORERS["generation" if data.get("kind") == "generation" else "classification"]
    try:
        task = from_record(TaskSpec, {"scorer": default, **data}, f"task file '{where}'")
    except RecordError as exc:
        raise TaskError(str(exc)) from exc
    _refuse_ignored(task, data, where)
    if task.kind == "classification":
        _check_classification(task, where)
    else:
        _check_generation(task, where)
    for name in ("max_length", "max_new_tokens", "max_validation"):
        if getattr(task, name) < 1:
            raise TaskError(f"The task file '{where}' must have a {name} of at least 1, but has {getattr(task, name)}.")
    check_scorer(task.scorer, task.kind)
    return task


def _check_label_names(labels: Any, where: str) -> None:
    for label in labels if isinstance(labels, list) else ():
        if not isinstance(label, str):
            raise TaskError(
                f"Labels are names, which YAML needs in quotes where it would read a number, yes or no in them, as in "
                f'labels: ["0", "1"], but one in \'{where}\' is {label!r}.'
            )


def check_new_task(task: TaskSpec, where: str) -> None:
    """Raises TaskError for what earlier versions took and studies may still have."""
    if task.scorer == "f1_binary" and len(task.labels) > 2:
        raise TaskError(
            f"The scorer f1_binary is of two labels, of which the second is the positive one, but '{where}' names "
            f"{len(task.labels)}. Take scorer: f1_macro."
        )


_OF_CLASSIFICATION = ("text", "text_pair", "label", "labels", "embedded")
_OF_GENERATION = ("prompt", "prompt_without", "completion", "max_new_tokens", "answer")


def _refuse_ignored(task: TaskSpec, data: Mapping[str, Any], where: str) -> None:
    """Keys that the task's kind would not look at."""
    own, other = _OF_CLASSIFICATION, _OF_GENERATION
    hint = "Write kind: generation for a task whose answers are text."
    if task.kind == "generation":
        own, other = other, own
        hint = "Say what is read in prompt: and what is to be written in completion:, or leave kind: generation away."
    ignored = [key for key in other if key in data]
    if ignored:
        raise TaskError(
            f"The task file '{where}' describes a {task.kind} task, in which {' and '.join(ignored)} would be ignored. "
            f"{hint}"
        )
    if task.scorer != "exact_match":
        unread = [key for key in ("max_new_tokens", "answer") if key in data]
        if unread:
            raise TaskError(
                f"The task file '{where}' sets {' and '.join(unread)}, which only the scorer exact_match reads, but is "
                f"scored by {task.scorer}. Add scorer: exact_match, or leave them away."
            )


def _check_classification(task: TaskSpec, where: str) -> None:
    if not task.text:
        raise TaskError(
            f"The task file '{where}' lacks the field 'text' of a classification task: the column to classify, as in "
            "text: sentence. A task whose answers are text is written kind: generation."
        )
    if len(task.labels) < 2:
        raise TaskError(f"A classification task has at least two labels, but '{where}' names {len(task.labels)}.")
    if len(set(task.labels)) < len(task.labels):
        raise TaskError(f"The labels of task '{where}' must differ, but some are named twice.")


def _check_generation(task: TaskSpec, where: str) -> None:
    if not list_fields(task.completion, f"completion in '{where}'"):
        raise TaskError(
            f'A generation task must say which columns the model is to write, as in completion: "{{answer}}", but the '
            f"completion of '{where}' is {task.completion!r}."
        )
    in_prompt = list_fields(task.prompt, f"prompt in '{where}'")
    for column, prompt in task.prompt_without.items():
        if column not in in_prompt:
            raise TaskError(
                f"prompt_without in '{where}' is for rows that lack a column of the prompt, but prompt: has no "
                f"'{column}'. {suggest_nearest(column, in_prompt)}"
            )
        if column in list_fields(prompt, f"prompt_without in '{where}'"):
            raise TaskError(
                f"prompt_without.{column} in '{where}' is for rows in which '{column}' is empty, but has it in braces."
            )
    if task.answer is not None:
        try:
            groups = re.compile(task.answer).groups
        except re.error as exc:
            raise TaskError(f"answer in '{where}' must be a regular expression, but is not: {exc}.") from exc
        if groups != 1:
            raise TaskError(
                f"answer in '{where}' must have one group, which is the answer, but has {groups}. Write (?:...) for "
                "brackets that only group."
            )


def list_fields(template: str, where: str) -> tuple[str, ...]:
    """The columns that a prompt or completion names in braces, each once. Raises TaskError for anything else there."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as exc:
        raise TaskError(
            f"{where} must have columns in braces, as in {{question}}, and braces of the text itself twice, but: {exc}."
        ) from exc
    names = []
    for _, name, layout, conversion in parts:
        if name is None:
            continue
        if not name or layout or conversion or not all(part.isidentifier() for part in name.split("-")):
            raise TaskError(
                f"{where} must have plain column names in braces, as in {{question}}, but has "
                f"'{{{name}{'!' + conversion if conversion else ''}{':' + layout if layout else ''}}}'. "
                "Write braces of the text itself twice: {{ and }}."
            )
        names.append(name)
    return tuple(dict.fromkeys(names))
