"""A search on a generation task as a user runs it: real processes, a tiny decoder with a tokenizer of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_bert, make_tiny_llama

from autopeft.cli.main import main
from autopeft.records import StudyRecord
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore

LETTERS = "abcdefghijklmnop"


def run(folder: Path, *arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "autopeft", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def write_task(folder: Path, **keys: object) -> None:
    """Places described: what follows `is in the` and `serves` has to be copied from the prompt."""
    rng = random.Random(0)
    rows = []
    for name in LETTERS:
        for area in LETTERS[:8]:
            food = rng.choice(LETTERS)
            meaning = f"name : {name} | area : {area} | food : {food}"
            rows.append({"meaning": meaning, "text": f"{name} is in the {area} and serves {food} ."})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"name": "places", "title": "Places", "kind": "generation", "prompt": "{meaning}\n"}
    values |= {"completion": "{text}", "files": {"train": "rows.jsonl"}, "max_length": 40}
    (folder / "places.yaml").write_text(json.dumps(values | keys))


def search(folder: Path, model: str, *more: str) -> tuple[int, str]:
    # Random weights of this size want far higher rates than any model of use.
    common = ["--methods", "lora,full,bottleneck", "--workers", "1", "--fix", "bits=unquantized"]
    rate = ["--fix", "learning_rate=5e-3"]
    return run(folder, "search", "--task", "places.yaml", "--model", model, "--name", "run", *common, *rate, *more)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def finished(llama: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder in which a search has run to its end, and what it printed."""
    folder = tmp_path_factory.mktemp("work")
    write_task(folder)
    code, output = search(folder, llama, "--budget", "4trials", "--max-steps", "120", "--seed", "7")
    assert code == 0, output
    return folder, output


def read_study(folder: Path) -> StudyRecord:
    return build_record(StudyStore.open(folder / "studies", "run"))


def test_fine_tuning_beats_the_untrained_base(finished: tuple[Path, str]) -> None:
    study = read_study(finished[0])
    assert study.baseline is not None
    base = study.baseline.rungs[0]
    best = next(t for t in study.trials if t.number == study.picks[0].number)
    assert best.rungs[-1].loss < 0.7 * base.loss
    assert best.test_quality is not None
    assert best.test_quality > study.config.majority_test_quality
    assert study.config.majority_quality == base.quality


def test_the_terminal_tells_of_text_and_of_the_base(finished: tuple[Path, str]) -> None:
    output = finished[1]
    assert "Places (text after a prompt), scored by token_accuracy" in output
    assert "untrained base " in output
    assert not [words for words in ("majority", "most frequent", "frozen base") if words in output]
    assert "Warning" not in output


def test_the_report_and_the_leaderboard_are_written(finished: tuple[Path, str]) -> None:
    folder = finished[0]
    assert "The untrained base gives" in (folder / "reports" / "run.html").read_text()
    board = next((folder / "leaderboards" / "places").glob("*.md")).read_text()
    assert "baseline: untrained base" in board


@pytest.mark.slow
def test_what_the_model_writes_itself_can_be_scored(llama: str, tmp_path: Path) -> None:
    write_task(tmp_path, scorer="exact_match", max_new_tokens=12, answer="serves (.+)")
    code, output = search(tmp_path, llama, "--budget", "1trials", "--max-steps", "40", "--methods", "full")
    assert code == 0, output
    study = read_study(tmp_path)
    assert "scored by exact_match" in output
    assert all(0 <= score.quality <= 1 for trial in study.trials for score in trial.rungs)
    assert study.trials[0].rungs[-1].quality_sd is None


def test_an_encoder_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    monkeypatch.chdir(tmp_path)
    for model, words in (
        (make_tiny_bert(tmp_path / "bert"), "A generation task needs a decoder"),
        ("minilm", "'minilm' is an encoder"),
    ):
        assert main(["search", "--task", "places.yaml", "--model", model, "--budget", "2trials", "--name", "run"]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "studies" / "run").exists()
