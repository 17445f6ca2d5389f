"""Leaderboards: every configuration that was trained at full length, over all studies of a task and model.

`<root>/<task>/<model>.json` is what is kept; the Markdown and CSV beside it are derived from it each time. It holds
runs, not means: a run is known by (study, trial, seed), so writing a study twice changes nothing, studies may come in
any order, and two that trained the same configuration share a row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from autopeft.errors import RecordError
from autopeft.records import StudyRecord, from_record, to_record
from autopeft.report.entries import Entry, drop_study, list_entries, merge_entries
from autopeft.report.files import hold_lock, safe_file_name, write_atomically
from autopeft.report.standings import rank_entries
from autopeft.report.tables import render_csv, render_markdown

LEADERBOARD_VERSION = 2
"""Raised when the JSON changes in a way that older code would misread."""


class Leaderboard(NamedTuple):
    """What is kept of one task and model."""

    task_name: str
    model: str
    entries: list[Entry]


def update_leaderboard(study: StudyRecord, root: Path) -> Path:
    """Merges a study into its leaderboard and returns the Markdown file's path.

    Several processes may do so at once: they wait for each other. Raises RecordError where the JSON there is not a
    leaderboard of this task and model, is of a newer schema, or is held by another process for a minute; then nothing
    is written.
    """
    config = study.config
    path = root / safe_file_name(config.task_name) / f"{safe_file_name(config.model)}.json"
    markdown = path.with_suffix(".md")
    # From reading to writing, or of two studies that end together one would be lost.
    with hold_lock(path.with_name(f".{path.stem}.lock")):
        known = drop_study(_read_entries(path, config.task_name, config.model), study.uid)
        entries = merge_entries([*known, *list_entries(study)])
        ranked = rank_entries(entries)
        write_atomically(path, _encode(config.task_name, config.model, entries))
        write_atomically(path.with_suffix(".csv"), render_csv(ranked))
        write_atomically(markdown, render_markdown(config.task_name, config.model, ranked))
    return markdown


def _encode(task_name: str, model: str, entries: list[Entry]) -> str:
    content = {
        "schema_version": LEADERBOARD_VERSION,
        "task_name": task_name,
        "model": model,
        "entries": to_record(entries),
    }
    return json.dumps(content, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False) + "\n"


def read_leaderboard(path: Path) -> Leaderboard:
    """Raises RecordError where the file cannot be read, is no leaderboard, or is of a newer schema."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise RecordError(f"A leaderboard is a readable JSON file, but {path} is not: {exc.strerror}.") from exc
    except ValueError as exc:
        raise RecordError(f"A leaderboard must be JSON, but {path} is not: {exc}.") from exc
    version = content.get("schema_version") if isinstance(content, dict) else None
    if not isinstance(version, int) or not isinstance(content.get("entries"), list):
        raise RecordError(f"A leaderboard holds a schema_version and a list of entries, but {path} does not.")
    if version > LEADERBOARD_VERSION:
        raise RecordError(
            f"{path} was written with leaderboard schema {version}, and this autopeft reads schemas up to "
            f"{LEADERBOARD_VERSION}. Nothing was changed. Install a newer autopeft to read it."
        )
    entries = [from_record(Entry, item, f"{path}, entry {i}") for i, item in enumerate(content["entries"])]
    return Leaderboard(str(content.get("task_name")), str(content.get("model")), entries)


def _read_entries(path: Path, task_name: str, model: str) -> list[Entry]:
    if not path.exists():
        return []
    keep = "Nothing was changed. Move the file away to begin a new leaderboard."
    try:
        board = read_leaderboard(path)
    except RecordError as exc:
        raise RecordError(f"{exc} {keep}") from exc
    if (board.task_name, board.model) != (task_name, model):
        raise RecordError(
            f"A leaderboard belongs to one task and model, but {path} is that of {board.task_name!r} on "
            f"{board.model!r}, and this study is of {task_name!r} on {model!r}. {keep}"
        )
    return board.entries
