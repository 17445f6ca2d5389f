"""`autopeft train` as a user meets it: what it prints, where it goes on, what it refuses."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from autopeft.cli.main import main
from autopeft.cli.train import _Source
from autopeft.executors.devices import Gpu, describe_cpu
from autopeft.locks import lock_file
from autopeft.production.checkpoints import checkpoint_folder, find_newest
from autopeft.production.files import LocalPlaces, read_local, read_recipe, write_local, write_recipe
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe, lay_out, make_task_portable

Make = Callable[..., Recipe]


@pytest.fixture
def folder(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to train from, in an otherwise empty working directory."""
    monkeypatch.chdir(tmp_path)
    write_recipe(make_recipe_for("ia3"), tmp_path / "recipe")
    write_local(places, tmp_path / "recipe")
    return tmp_path / "recipe"


def test_it_prints_what_is_trained_and_the_score_beside_the_prediction(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "recipe", "--eval-every", "4"]) == 0
    output = capsys.readouterr().out
    recipe = read_recipe(folder)
    length = f"8 steps, {recipe.epochs:.3g} epochs of {recipe.num_train} rows (the trial: 8 steps)"
    assert f"length       {length}\n" in output
    assert "predicted    50.0% \u00b1 10.0 on the test split (2 seeds)" in output
    assert " 50% step      4  loss " in output
    assert "100% step      8  loss " in output
    result = json.loads((folder / "trained" / "result.json").read_text(encoding="utf-8"))
    assert f"test         {100 * result['test_quality']:.1f}%" in output
    # What serving costs: IA3 merges.
    assert re.search(r"\nadapter +\S+, [\d.]+ KiB, ", output)
    assert re.search(r"\nlatency +\S+ ms an example alone, .*; merged \S+ ms and \S+ ms, on ", output)
    assert result["inference"]["merged"]["single_seconds"] > 0
    assert result["device"] == result["inference"]["device"]
    assert result["device"].startswith(describe_cpu())
    # And once more: it is finished, but for the card, which a kill had kept it from.
    (folder / "trained" / "README.md").unlink()
    assert main(["train", "recipe"]) == 0
    assert "This training was finished on" in capsys.readouterr().out
    assert (folder / "trained" / "README.md").is_file()


def test_a_training_folder_goes_on_in_itself(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe", "--out", "here", "--save-every", "4"]) == 0
    (folder.parent / "here" / "result.json").unlink()
    capsys.readouterr()
    assert main(["train", "here"]) == 0
    assert "going on from step 8" in capsys.readouterr().out
    assert (folder.parent / "here" / "result.json").is_file()


def test_a_training_goes_on_as_it_was_asked_to(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ["--patience", "0", "--eval-every", "3", "--save-every", "4", "--report-to", "none"]
    assert main(["train", "recipe", "--out", "here", *asked]) == 0
    (folder.parent / "here" / "result.json").unlink()
    seen: list[Options] = []
    monkeypatch.setattr("autopeft.production.run.train", lambda *args, **given: seen.append(given["options"]))
    assert main(["train", "here"]) == 0
    assert main(["train", "here", "--patience", "5", "--report-to", "wandb, mlflow"]) == 0
    before = Options(patience=None, evaluate_every=3, save_every=4)
    assert seen == [before, dataclasses.replace(before, patience=5, report_to=("wandb", "mlflow"))]


def test_checkpoints_of_before_options_were_kept_are_read(folder: Path) -> None:
    assert main(["train", "recipe", "--out", "here"]) == 0
    meta = find_newest(folder.parent / "here")
    assert meta is not None
    path = checkpoint_folder(folder.parent / "here", meta.step) / "checkpoint.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    del data["options"]
    path.write_text(json.dumps(data), encoding="utf-8")
    (folder.parent / "here" / "result.json").unlink()
    assert main(["train", "here"]) == 0


def test_a_folder_that_another_process_trains_into_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (folder.parent / ".here.lock").open("ab") as file:
        lock_file(file.fileno())
        assert main(["train", "recipe", "--out", "here"]) == 1
    assert "another one trains into 'here'" in capsys.readouterr().err
    assert not (folder.parent / "here").exists()


def test_what_befalls_a_process_but_the_first_is_told(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr("autopeft.cli.train._SECONDS_TO_SPEAK", 0.0)
    assert main(["train", "nowhere", "--pick", "best"]) == 2
    assert capsys.readouterr().err.startswith("autopeft: process 3: ")


def test_a_changed_batch_says_what_becomes_of_the_rate(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe", "--batch-size", "32", "--steps", "2", "--out", "big"]) == 0
    output = capsys.readouterr().out
    assert "note: The effective batch goes from 8 to 32, so the learning rate goes from 3e-2 to 6e-2" in output
    assert "batch 32 (4 x 8), lr 6e-2" in output
    assert read_recipe(folder.parent / "big").gradient_accumulation == 4


@pytest.mark.parametrize(("asked", "batch"), [([], 8), (["--batch-size", "32"], 32)])
def test_a_studys_trial_takes_three_epochs_of_the_rows_there_are_or_its_own_steps(
    folder: Path, places: LocalPlaces, monkeypatch: pytest.MonkeyPatch, asked: list[str], batch: int
) -> None:
    recipe = read_recipe(folder)
    rows, seen = recipe.num_train, list[Recipe]()
    monkeypatch.setattr("autopeft.production.run.train", lambda recipe, *args, **given: seen.append(recipe))
    for trial_steps, known in ((5, 4 * rows), (1000, rows // 2)):
        # As the study knows it, of another number of rows.
        chosen = lay_out(dataclasses.replace(recipe, trial_steps=trial_steps), num_train=known)
        source = _Source(chosen, places, None, f"{trial_steps}-{batch}")
        monkeypatch.setattr("autopeft.cli.train._read_source", lambda args, source=source: source)
        assert main(["train", "study", "--pick", "knee", *asked]) == 0
        assert seen[-1].steps == max(trial_steps, math.ceil(3 * rows / batch))


def test_a_recipe_of_a_cpu_says_that_the_gpu_is_not_for_it(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.executors.devices.find_gpus", lambda: [Gpu("0", "NVIDIA L4", 2**34, 2**34)])
    assert main(["train", "recipe", "--steps", "1"]) == 0
    assert "note: The study was made on CPUs, so training takes the CPU too." in capsys.readouterr().out


def test_restarts_can_be_asked_for(folder: Path) -> None:
    assert main(["train", "recipe", "--schedule", "cosine_with_restarts", "--cycles", "2", "--out", "waves"]) == 0
    recipe = read_recipe(folder.parent / "waves")
    assert (recipe.schedule, recipe.num_cycles) == ("cosine_with_restarts", 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["recipe", "--pick", "knee"], "is a recipe already"),
        (["recipe", "--steps", "3", "--epochs", "2"], "by --epochs or by --steps"),
        (["recipe", "--cycles", "3"], "has no cycles"),
        (["recipe", "--patience", "-1"], "--patience counts evaluations"),
        (["recipe", "--patience", "10", "--all-rows"], "no evaluations for --patience to count"),
        (["recipe", "--micro-batch", "3"], "Choose a divisor"),
        (["recipe", "--report-to", "wandbb"], "--report-to knows"),
        (["recipe", "--out", "full"], "holds other files"),
        (["recipe", "--model", "/nowhere/model"], "does not exist"),
        (["nothing", "--pick", "knee"], "nothing"),
        (["nothing"], "must be said"),
    ],
)
def test_what_cannot_be_is_one_paragraph_and_writes_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (folder.parent / "full").mkdir()
    (folder.parent / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    before = sorted(path for path in folder.parent.rglob("*"))
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert sorted(path for path in folder.parent.rglob("*")) == before


def test_checkpoints_of_another_recipe_are_refused_and_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "recipe", "--out", "here"]) == 0
    (folder.parent / "here" / "result.json").unlink()
    assert main(["train", "recipe", "--out", "here", "--seed", "5"]) == 2
    assert "its seed is 0, and yours is 5" in capsys.readouterr().err
    assert main(["train", "recipe", "--out", "there", "--seed", "5"]) == 0
    (folder.parent / "there" / "result.json").unlink()
    assert main(["train", "recipe", "--out", "there"]) == 2
    assert "its seed is 5, and yours is 0" in capsys.readouterr().err


def test_rows_that_are_named_are_trained_on_though_those_of_before_are_there(
    folder: Path, places: LocalPlaces, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = read_recipe(folder)
    write_recipe(dataclasses.replace(recipe, task=make_task_portable(recipe.task)), folder)
    ((name, before),) = places.files.items()
    (folder.parent / "other").mkdir()
    lines = Path(before).read_text(encoding="utf-8").splitlines(keepends=True)
    (folder.parent / "other" / name).write_text("".join(lines[:-32]), encoding="utf-8")
    assert main(["train", "recipe", "--steps", "1", "--data-dir", "other"]) == 0
    assert read_recipe(folder / "trained").num_train < recipe.num_train
    assert read_local(folder / "trained").files == {name: str(folder.parent / "other" / name)}
    assert "The rows are not those of the study" in capsys.readouterr().out


def test_a_folder_of_another_machine_asks_for_the_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local(LocalPlaces(files={}), folder)
    assert main(["train", "recipe"]) == 2
    assert "rows.jsonl" in capsys.readouterr().err
