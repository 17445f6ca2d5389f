"""A finished training folder: what it says of itself, and everything it takes to have its model answer again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from autopeft.errors import RecordError
from autopeft.production import plain
from autopeft.production.files import TrainingResult, read_local, read_recipe, read_result
from autopeft.production.places import find_model, find_task, keep_folder, list_asked_folders, list_data_folders
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec, parse_task

ADAPTER = "adapter"
"""The folder's part that holds the weights and the tokenizer."""


class Finished(NamedTuple):
    """A folder that `autopeft train` has finished."""

    folder: Path
    recipe: Recipe
    result: TrainingResult
    task: TaskSpec
    """Its own data files as this machine names them."""
    model: str
    """The base, as transformers can load it or `minilm`."""
    data_dir: str | None

    @property
    def adapter(self) -> Path:
        return self.folder / ADAPTER

    @property
    def num_labels(self) -> int | None:
        """None for a language model."""
        return self.task.num_labels


def open_finished(folder: Path, *, model: str | None = None, data_dir: str | None = None) -> Finished:
    """Reads the folder. `model` and `data_dir` say where base and rows lie on this machine, where it has moved.

    Raises RecordError where it is no finished training, ModelError where nobody knows the base's folder, DataError
    where the task's own files are nowhere.
    """
    if not folder.is_dir():
        raise RecordError(f"'{folder}' must be a folder that autopeft train has finished, but there is none.")
    recipe, result, places = read_recipe(folder), read_result(folder), read_local(folder)
    if not (folder / ADAPTER).is_dir():
        raise RecordError(f"'{folder}' must hold the trained weights in {ADAPTER}/, but does not. Train it again.")
    name, asked = recipe.task_name, list_asked_folders(data_dir, recipe.task, recipe.task_name)
    data_dir = data_dir or os.environ.get("AUTOPEFT_DATA_DIR") or keep_folder(places.data_dir)
    base = find_model(recipe, places, model)
    task = find_task(recipe.task, name, places.files, [folder, *list_data_folders(data_dir, name)], asked=asked)
    return Finished(
        folder=folder,
        recipe=recipe,
        result=result,
        task=parse_task(task, name),
        model=base,
        data_dir=data_dir,
    )


# --- jobs for `plain`


def make_job(finished: Finished, data: Any, rows: Sequence[int], *, device: str, batch_size: int) -> dict[str, Any]:
    """What `plain` has to know to have the trained model answer these rows of the test split.

    `data` is the task's `TaskData`, made with the folder's own tokenizer.
    """
    from autopeft.backends.hf.base_model import describe_base, find_head, resolve_model

    recipe, is_whole = finished.recipe, finished.result.saved_as == "transformers"
    base = describe_base(finished.model, num_labels=finished.num_labels, bits=recipe.bits)
    return {
        "saved_as": finished.result.saved_as,
        "saved": str(finished.adapter.resolve()),
        "base": finished.model if finished.result.saved_as == "autopeft" else resolve_model(finished.model),
        "bits": recipe.bits,
        # On GPUs the base's weights went through bfloat16 before they were quantized or trained on. What was trained
        # itself is float32.
        "dtype": "bfloat16" if recipe.trains_on == "cuda" and not is_whole else "float32",
        "device": device,
        "head": list(find_head(base.model)),
        "num_labels": finished.num_labels,
        "pad_token_id": data.tokenizer.pad_token_id,
        "batch_size": batch_size,
        "threads": None,
        "features": [data.test.features[i] for i in rows],
        "classes": [data.test.labels[i] for i in rows],
    }


def load_data(finished: Finished) -> Any:
    """The task's rows as `TaskData`, tokenized as the folder's own tokenizer does. Raises DataError as tasks do."""
    from autopeft.backends.hf.data import TaskData

    return TaskData(
        finished.task,
        model=finished.model,
        data_dir=finished.data_dir,
        split_seed=finished.recipe.split_seed,
        tokenizer=str(finished.adapter),
    )


def ask_fresh_process(what: Literal["score", "logits"], job: dict[str, Any]) -> dict[str, npt.NDArray[np.float64]]:
    """What `plain` answers in a process of its own. Raises RecordError with its last words where it fails."""
    import torch

    # Another number of threads adds in another order.
    job = {**job, "threads": torch.get_num_threads()}
    with tempfile.TemporaryDirectory(prefix="autopeft-plain-") as name:
        folder = Path(name)
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        words = run_plain(what, folder, with_autopeft=job["saved_as"] == "autopeft")
        if not (folder / "answers.npz").is_file():
            error = folder / "error.txt"
            words = error.read_text(encoding="utf-8") if error.is_file() else words
            last = words.strip().splitlines()[-1:] or ["it ended without a word"]
            raise RecordError(
                f"'{job['saved']}' must load in a fresh process with {job['saved_as']}, but fails: {last[0]}"
            )
        with np.load(folder / "answers.npz") as answers:
            return {name: answers[name] for name in answers.files}


def run_plain(what: str, folder: Path, *, with_autopeft: bool) -> str:
    """Runs `plain` as a file in a process of its own, which ends with this one; what it printed to standard error."""
    environment = dict(os.environ)
    if with_autopeft:
        import autopeft

        root = str(Path(autopeft.__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
    # -P keeps this folder off sys.path, whose names could hide a library's.
    command = [sys.executable, "-P", plain.__file__, what, str(folder)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        # `communicate` would close its standard input, by whose end it knows that nobody waits for it any more.
        assert process.stderr is not None
        return process.stderr.read()
