"""Writing an export: all of its files or none, and the ones that every target has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from autopeft.errors import ExportError
from autopeft.export.bundle import Bundle
from autopeft.production.files import LocalPlaces, write_local, write_recipe
from autopeft.production.recipe import find_task_files
from autopeft.records import to_record
from autopeft.report.files import new_folder

Files = dict[str, str]
"""Names relative to the export's folder -> text."""


def write_export(files: Files, bundle: Bundle, out: Path, *, model: str, data_dir: str | None) -> list[Path]:
    """Puts the files there, with the recipe beside them, so that a failure leaves nothing behind."""
    try:
        with new_folder(out) as part:
            for name, text in files.items():
                path = part / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
            write_recipe(bundle.recipe, part)
            write_local(LocalPlaces(model=model, data_dir=data_dir, files=find_task_files(bundle.task_text)), part)
    except OSError as exc:
        raise ExportError(f"--out must be writable, but '{out}' is not: {exc.strerror}.") from exc
    return sorted(path for path in out.rglob("*") if path.is_file())


def provenance(bundle: Bundle, files: Files, *, target: str, checked_with: str) -> str:
    """Where the configuration comes from. Digests of data and weights, and no local path."""
    recipe = bundle.recipe
    content = {
        "target": target,
        "checked_with": checked_with,
        "study": recipe.study,
        "study_uid": recipe.study_uid,
        "trial": recipe.trial,
        "pick": recipe.pick,
        "model": recipe.model,
        "model_digest": recipe.model_digest,
        "task": recipe.task_name,
        "task_digest": recipe.provenance.task_digest,
        "measured": to_record(recipe.prediction),
        "cost": to_record(recipe.cost),
        "made_by": to_record(recipe.provenance),
        "data_files": {
            name: hashlib.sha256(text.encode()).hexdigest() for name, text in files.items() if name.startswith("data/")
        },
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def to_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def to_yaml(content: Mapping[str, Any], head: str = "") -> str:
    """`head` becomes comment lines above it."""
    comment = "".join(f"# {line}\n" for line in head.splitlines())
    return comment + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=100)
