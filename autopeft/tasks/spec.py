"""Tasks as data: a YAML file says where rows come from, what their columns mean and how answers are scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import RecordError, TaskError, suggest_nearest
from autopeft.records import from_record

BUILTIN = Path(__file__).parent / "builtin"


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A data set on the Hugging Face hub."""

    path: str
    config: str | None = None
    train: str = "train"
    test: str
    """The labelled split kept for the end; many GLUE tests have no labels, so this is often `validation`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileSource:
    """Files of one's own, relative to the task file: .jsonl, .json or .csv."""

    train: str
    test: str | None = None
    """None: a stratified 15% of the training rows is set aside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """A sequence classification task."""

    name: str
    title: str
    text: str
    """Column of the text."""
    text_pair: str | None = None
    """Column of the second text, for pairs."""
    label: str = "label"
    labels: tuple[str, ...]
    """Names in the order of their index. Rows may hold the index or the name."""
    scorer: str = "accuracy"
    max_length: int = 128
    """Tokens; longer inputs are cut off."""
    hub: HubSource | None = None
    """Where rows come from when neither `files` nor a data folder has them."""
    files: FileSource | None = None
    embedded: bool = False
    """Made by `autopeft.tasks.demo`."""


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
    from autopeft.tasks.scorers import check_scorer

    try:
        data: Any = yaml.safe_load(text)
    except yaml.YAMLError as exc:
        raise TaskError(f"The task file '{where}' must be YAML, but is not: {exc}.") from exc
    if not isinstance(data, Mapping):
        raise TaskError(f"The task file '{where}' must hold keys and values such as name: and labels:, but does not.")
    try:
        task = from_record(TaskSpec, dict(data), f"task file '{where}'")
    except RecordError as exc:
        raise TaskError(str(exc)) from exc
    if len(task.labels) < 2:
        raise TaskError(f"A classification task has at least two labels, but '{where}' names {len(task.labels)}.")
    if len(set(task.labels)) < len(task.labels):
        raise TaskError(f"The labels of task '{where}' must differ, but some are named twice.")
    check_scorer(task.scorer)
    return task
