"""Where a recipe's model, rows and folder are on this machine, and whether they are what it means. No torch."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from autopeft.errors import DataError, ModelError, RecordError
from autopeft.production.files import LOCAL_FILE, RECIPE_FILE, RESULT_FILE, LocalPlaces, read_recipe
from autopeft.production.recipe import DECISIVE, Recipe, find_task_files, to_plain


def find_model(recipe: Recipe, places: LocalPlaces, given: str | None = None) -> str:
    """What transformers loads. Raises ModelError where a folder is meant and none is known."""
    model = given or places.model or recipe.model
    if not model.startswith("local:"):
        if "/" in model and not Path(model).is_dir() and (model.startswith((".", "/", "~")) or model.count("/") > 1):
            raise ModelError(f"The base model's folder '{model}' does not exist. Say where it is with --model DIR.")
        return model
    raise ModelError(
        f"The recipe's base model was the folder '{model.removeprefix('local:')}' of another machine. Say where it is "
        "here with --model DIR."
    )


def find_task(
    text: str, name: str, files: Mapping[str, str], folders: Sequence[Path], *, asked: Sequence[Path] = ()
) -> str:
    """A portable task file's text with its own data files where they are here.

    They are looked for by name in the folders that were `asked` for, then where `files` says they were, then by name in
    `folders`. Raises DataError where one is nowhere.
    """
    found = {}
    for file in find_task_files(text):
        known = [Path(files[file])] if file in files else []
        candidates = [*(folder / file for folder in asked), *known, *(folder / file for folder in folders)]
        path = next((path for path in candidates if path.is_file()), None)
        if path is None:
            looked = ", ".join(dict.fromkeys(f"'{path.parent}'" for path in candidates)) or "no folder"
            raise DataError(
                f"Task '{name}' reads the file '{file}', which is not there; looked in {looked}. Put it "
                "there, or name its folder with --data-dir."
            )
        found[file] = str(path.resolve())
    if not found:
        return text
    data = yaml.safe_load(text)
    here = {key: found.get(value, value) for key, value in data["files"].items()}
    return yaml.safe_dump(data | {"files": here}, sort_keys=False, allow_unicode=True)


def keep_folder(known: str | None) -> str | None:
    """A folder that rows came from before, where it is still there; the hub may have them, too."""
    return known if known and Path(known).is_dir() else None


def list_data_folders(data_dir: str | None, task_name: str) -> list[Path]:
    """Where a task's own files may lie."""
    return [Path(data_dir), Path(data_dir) / task_name] if data_dir else []


def list_asked_folders(data_dir: str | None, text: str, task_name: str) -> list[Path]:
    """Those whose files take the place of a task's own wherever these are: where `data_dir` names them, or in
    AUTOPEFT_DATA_DIR one that has all of them. That stands for many tasks, and rows of two origins do not go together.
    """
    if data_dir is not None:
        return list_data_folders(data_dir, task_name)
    files = find_task_files(text)
    offered = list_data_folders(os.environ.get("AUTOPEFT_DATA_DIR"), task_name)
    return [folder for folder in offered if all((folder / file).is_file() for file in files)]


def is_training_folder(folder: Path) -> bool:
    """Whether a training was begun in it, so that it is to be gone on with."""
    return (folder / "checkpoints").is_dir() or (folder / RESULT_FILE).is_file()


def check_folder(recipe: Recipe, out: Path) -> None:
    """Raises RecordError where the folder holds anything but a training of this recipe."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not out.is_dir():
        raise RecordError(f"--out must be a folder, but '{out}' is a file.")
    if not (out / RECIPE_FILE).is_file():
        raise RecordError(
            f"--out must be new, empty, or a training of the same recipe, but '{out}' holds other files. Nothing was "
            "overwritten."
        )
    if not is_training_folder(out):
        # Before its first checkpoint a training has written no more than these two, and nothing is lost with them.
        if {path.name for path in out.iterdir()} - {RECIPE_FILE, LOCAL_FILE}:
            raise RecordError(
                f"--out must be new, empty, or a training of the same recipe, but '{out}' holds an export. Choose "
                "another."
            )
        return
    before = read_recipe(out)
    if before.key() == recipe.key():
        return
    old, new = to_plain(before), to_plain(recipe)
    name = next(name for name in DECISIVE if old.get(name) != new.get(name))
    raise RecordError(
        f"'{out}' holds a training of another recipe: its {name} is {_short(old.get(name))}, and yours is "
        f"{_short(new.get(name))}. Its checkpoints were left as they are. Give the same settings to go on with it, or "
        "another --out."
    )


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 80 else text[:77] + "..."
