"""A disk that is full where the driver, a training or a merge writes: it is told, and what was there stays."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from autopeft.cli import doctor, session
from autopeft.cli.main import main
from autopeft.errors import StudyError

LimitFiles = Callable[[int], AbstractContextManager[None]]


def test_where_model_and_data_lie_is_not_forgotten(tmp_path: Path, limit_files: LimitFiles) -> None:
    store: Any = SimpleNamespace(folder=tmp_path, config=SimpleNamespace(model="minilm"))
    session.keep_places(store, "before", None)
    with limit_files(4), pytest.raises(OSError, match="too large"):
        session.keep_places(store, "after", None)
    assert session.read_local(store)["model"] == "before"


def test_a_recipe_stays_what_it_was(tmp_path: Path, limit_files: LimitFiles) -> None:
    from export.chosen_trials import draw_recipe

    from autopeft.methods import METHODS
    from autopeft.methods.faults import make_recipe_spec
    from autopeft.production.files import read_recipe, write_recipe

    recipe, _ = draw_recipe(make_recipe_spec(METHODS["lora"], device_kind="cpu"))
    write_recipe(recipe, tmp_path)
    with limit_files(100), pytest.raises(OSError, match="too large"):
        write_recipe(recipe, tmp_path)
    assert read_recipe(tmp_path) == recipe


def test_a_checkpoint_tells_what_the_disk_said(tmp_path: Path, limit_files: LimitFiles) -> None:
    import torch

    from autopeft.production.checkpoints import write_trained

    with limit_files(1000), pytest.raises(OSError, match="too large") as info:
        write_trained(tmp_path, {"trainable": torch.zeros(10_000)})
    assert info.value.errno == errno.EFBIG


def test_weights_that_do_not_fit_are_no_defect_of_autopeft(
    tmp_path: Path, limit_files: LimitFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch
    from safetensors.torch import save_file

    def save(args: object) -> int:
        save_file({"weight": torch.zeros(10_000)}, tmp_path / "model.safetensors")
        return 0

    monkeypatch.setattr(doctor, "add_parser", lambda parsers: parsers.add_parser("doctor").set_defaults(run=save))
    with limit_files(1000):
        assert main(["doctor"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("autopeft: This machine could not do what was needed: ")
    assert "File too large" in told


def test_a_report_that_does_not_fit_hides_no_result(
    tmp_path: Path, limit_files: LimitFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from export.chosen_trials import make_study, make_trial

    monkeypatch.chdir(tmp_path)
    session.check_outputs()
    study = make_study([make_trial(0), make_trial(1, quality=0.9)])
    with (
        limit_files(1000),
        pytest.raises(StudyError, match=r"'evening' is kept, .* too large.* autopeft report evening"),
    ):
        session.write_outputs(study)
    assert "majority class" in capsys.readouterr().out
    assert not [path for path in (tmp_path / "reports").iterdir() if path.stat().st_size]
    session.write_outputs(study)
    assert json.loads(next((tmp_path / "leaderboards").rglob("*.json")).read_text())
