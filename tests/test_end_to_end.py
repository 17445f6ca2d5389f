"""The whole thing as a user runs it: real processes, real (tiny) models, real files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import make_tiny_bert

from autopeft.records import StudyRecord, to_record
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autopeft", *arguments],
        cwd=folder,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def search_arguments(model: str) -> list[str]:
    return [
        *("search", "--task", "demo", "--model", model, "--methods", "lora,ia3,bottleneck", "--budget", "5trials"),
        *("--max-steps", "80", "--workers", "1", "--seed", "7", "--name", "run", "--fix", "bits=unquantized"),
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which a search has run to its end."""
    folder = tmp_path_factory.mktemp("work")
    code, output = finish(start(folder, *search_arguments(model)))
    assert code == 0, output
    return folder


def read_study(folder: Path) -> StudyRecord:
    return build_record(StudyStore.open(folder / "studies", "run"))


def read_decisions(folder: Path) -> list[dict[str, Any]]:
    """Configurations, scores and ends, without what clocks measure."""
    trials = []
    for trial in read_study(folder).trials:
        record = to_record(trial)
        del record["device_seconds"]
        for score in [*record["rungs"], *record["confirmations"]]:
            for name in ("device_seconds", "train_seconds", "scores_digest", "inference"):
                score.pop(name, None)
        trials.append(record)
    return trials


def test_a_search_writes_report_leaderboard_and_picks(finished: Path) -> None:
    study = read_study(finished)
    assert [pick.name for pick in study.picks] == ["best", "knee", "smallest"]
    assert all(trial.state in ("complete", "stopped") for trial in study.trials)
    assert len(study.trials) == 5
    page = (finished / "reports" / "run.html").read_text()
    assert "estimated" in page
    assert len(page) < 6e6
    board = next((finished / "leaderboards" / "demo").glob("*.json"))
    assert json.loads(board.read_text())


def test_finalists_are_confirmed_with_two_more_seeds_and_scored_on_the_test(finished: Path) -> None:
    study = read_study(finished)
    best = next(t for t in study.trials if t.number == study.picks[0].number)
    assert {confirmation.seed for confirmation in best.confirmations} == {8, 9}
    assert all(confirmation.num_test_examples == 500 for confirmation in best.confirmations)


@pytest.mark.slow
def test_the_same_search_again_decides_and_scores_the_same(model: str, finished: Path, tmp_path: Path) -> None:
    code, output = finish(start(tmp_path, *search_arguments(model)))
    assert code == 0, output
    assert read_decisions(tmp_path) == read_decisions(finished)


def test_a_killed_and_an_interrupted_driver_lose_no_finished_trial_and_change_no_decision(
    model: str, finished: Path, tmp_path: Path
) -> None:
    killed = start(tmp_path, *search_arguments(model))
    assert killed.stdout is not None
    while "trial   0" not in (line := killed.stdout.readline()):
        assert line, "the search ended before its first trial"
    killed.kill()
    killed.communicate()
    interrupted = start(tmp_path, "resume", "run")
    assert interrupted.stdout is not None
    # Early, so that much is left to interrupt on a machine that is slow to deliver the signal.
    while "trial   1" not in (line := interrupted.stdout.readline()):
        assert line, "the search ended before its second trial"
    interrupted.send_signal(signal.SIGINT)
    code, output = finish(interrupted)
    assert code == 130, output
    assert (tmp_path / "reports" / "run.html").is_file()
    assert "autopeft resume run" in output
    code, output = finish(start(tmp_path, "resume", "run"))
    assert code == 0, output
    assert read_decisions(tmp_path) == read_decisions(finished)


def test_an_export_loads_with_plain_peft_and_says_the_rest(finished: Path, tmp_path: Path) -> None:
    import peft

    lora = next(t.number for t in read_study(finished).trials if t.spec.method == "lora")
    out = tmp_path / "exported"
    code, output = finish(start(finished, "export", "run", "--pick", str(lora), "--to", "peft", "--out", str(out)))
    assert code == 0, output
    assert f"trial        {lora} of run ({lora}): LoRA" in output
    assert f"run          cd {out}\n             autopeft train . --out trained" in output
    config = peft.PeftConfig.from_pretrained(str(out))
    assert config.peft_type == "LORA"
    training = yaml.safe_load((out / "training.yaml").read_text())
    assert training["trial_steps"] == 80
    assert (out / "data" / "train.jsonl").is_file()
    assert str(finished) not in (out / "training.yaml").read_text()


def test_what_peft_cannot_express_is_refused_with_the_reason(finished: Path, tmp_path: Path) -> None:
    number = next(t.number for t in read_study(finished).trials if t.spec.method == "bottleneck")
    out = tmp_path / "exported"
    code, output = finish(start(finished, "export", "run", "--pick", str(number), "--out", str(out)))
    assert code == 2
    assert "peft has no bottleneck adapter" in output
    assert not out.exists()


def test_records_and_reports_hold_no_local_path(finished: Path, model: str) -> None:
    for path in [*finished.glob("reports/*"), *finished.glob("leaderboards/*/*")]:
        text = path.read_text()
        assert str(finished) not in text
        assert model not in text
