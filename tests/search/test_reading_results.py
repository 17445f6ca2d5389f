"""`autopeft studies` and `report --json`: what studies have found, for people and for programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from autopeft.cli.main import main
from autopeft.records import StudyRecord, from_record


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which `studies` lies."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def list_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_a_studys_record_is_printed_as_json_and_nothing_is_written(
    studies: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = studies.run(studies.create())
    before = list_files(here)
    assert main(["report", "study", "--json"]) == 0
    assert from_record(StudyRecord, json.loads(capsys.readouterr().out)) == record
    assert list_files(here) == before


def test_studies_are_listed_with_what_they_have_come_to(
    studies: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = studies.run(studies.create())
    (best,) = (pick.number for pick in record.picks if pick.name == "best")
    (quality,) = (trial.quality for trial in record.trials if trial.number == best)
    studies.create(name="later", budget="2h", scorer="matthews_correlation")
    assert main(["studies"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "later demo on minilm, 2h: 0 trials, unfinished",
        f"study demo on minilm, 6trials: 6 trials, finished, best accuracy {100 * quality:.1f}%",
    ]


def test_a_study_that_cannot_be_read_hides_no_other(
    studies: Any, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("damaged", "whole"):
        studies.create(name=name)
    (here / "studies/damaged/study.db").write_text("no database")
    assert main(["studies"]) == 0
    damaged, whole = capsys.readouterr().out.splitlines()
    assert "cannot be read" in damaged
    assert whole == "whole   demo on minilm, 6trials: 0 trials, unfinished"


def test_without_studies_it_says_how_to_start_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["studies"]) == 0
    assert capsys.readouterr().out == "There are no studies in 'studies' yet; autopeft search starts one.\n"
    assert list_files(here) == []


def test_the_database_holds_an_optuna_study_by_the_documented_name(studies: Any, here: Path) -> None:
    studies.create()
    assert optuna.get_all_study_names("sqlite:///studies/study/study.db") == ["autopeft"]
