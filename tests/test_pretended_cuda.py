"""What is written for GPUs, run where there is none: on pretended ones (`pretended_cuda/pretended_gpus.py`)."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import make_tiny_bert

from autopeft.records import Failed, Refused, StudyRecord
from autopeft.report.words import format_bytes
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore

TESTS = Path(__file__).parent
PRETENCE = TESTS / "pretended_cuda"


def make_environment(gpus: str = "24576,24576", **more: str) -> dict[str, str]:
    path = os.pathsep.join(map(str, (PRETENCE, TESTS, TESTS / "production", TESTS.parent)))
    return {
        **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": path,
        "PATH": f"{PRETENCE / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "PRETENDED_GPUS": gpus,
        **more,
    }


def start(folder: Path, *arguments: str, gpus: str = "24576,24576") -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "autopeft", *arguments],
        cwd=folder, env=make_environment(gpus), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def autopeft(folder: Path, *arguments: str, gpus: str = "24576,24576", code: int = 0) -> str:
    process = start(folder, *arguments, gpus=gpus)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == code, output
    return output


def run_inside(*arguments: str) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", *arguments]
    done = subprocess.run(
        [*command, str(PRETENCE / "inside.py")],
        cwd=TESTS.parent,
        env=make_environment(),
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


def test_a_worker_lives_on_a_pretended_gpu() -> None:
    run_inside("-m", "not slow")


@pytest.mark.slow
def test_every_method_trains_on_a_pretended_gpu() -> None:
    run_inside("-m", "slow")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


CROWDED = "24576:0:24544,24576:0:24544"
"""32 MiB are left by the time that workers load the model, of which nvidia-smi knew nothing."""


def search_arguments(folder: Path, model: str) -> list[str]:
    (folder / "full.yaml").write_text("method: full\n")
    return [
        *("search", "--task", "demo", "--model", model, "--methods", "lora,ia3,full", "--include", "full.yaml"),
        *("--budget", "4trials", "--max-steps", "8", "--seed", "7", "--name", "run", "--fix", "bits=unquantized"),
    ]


def read_study(folder: Path) -> StudyRecord:
    return build_record(StudyStore.open(folder / "studies", "run"))


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, StudyRecord]:
    """A study on two GPUs, on which full fine-tuning does not fit."""
    folder = tmp_path_factory.mktemp("work")
    autopeft(folder, *search_arguments(folder, model), gpus=CROWDED)
    return folder, read_study(folder)


def test_a_trial_that_does_not_fit_ends_out_of_memory_and_the_study_goes_on(
    finished: tuple[Path, StudyRecord],
) -> None:
    _, study = finished
    full, *others = study.trials
    assert isinstance(full.outcome, Failed)
    assert full.outcome.reason == "out_of_memory"
    assert full.cost is not None
    # What it had allocated by then is kept, and is not taken for its peak.
    assert 10 * 2**20 < full.cost.peak_vram_bytes < 32 * 2**20
    assert {trial.state for trial in others if trial.spec.method != "full"} == {"complete"}
    refused = [trial.outcome.rule for trial in others if isinstance(trial.outcome, Refused)]
    assert all("trial 0 ran out of memory" in rule for rule in refused)


def test_a_study_on_gpus_measures_memory_and_corrects_its_estimates_by_it(
    finished: tuple[Path, StudyRecord],
) -> None:
    _, study = finished
    complete = [trial for trial in study.trials if trial.state == "complete"]
    assert complete
    for trial in complete:
        assert trial.cost is not None
        assert trial.cost.vram_source == "measured"
        # Both count bytes: of the steps that the probe took, and of one on fake tensors.
        assert trial.cost.peak_vram_bytes == pytest.approx(trial.cost.estimated_vram_bytes, rel=0.02)
        assert trial.cost.reserved_vram_bytes
    assert study.trials[-1].cost is not None
    assert study.trials[-1].cost.corrected_vram_bytes
    assert study.baseline is not None
    assert study.baseline.spec.bits == 16
    assert study.provenance.device == "Pretended GPU"
    assert study.provenance.device_count == 2


def test_reports_of_gpus_say_measured_and_how_well_estimates_agreed(finished: tuple[Path, StudyRecord]) -> None:
    folder, _ = finished
    page = (folder / "reports" / "run.html").read_text()
    assert "2 \u00d7 Pretended GPU" in page
    assert "peaks measured" in page
    assert "Peak VRAM, estimated" not in page
    board = next((folder / "leaderboards" / "demo").glob("*.json")).read_text()
    assert "Pretended GPU" in board
    assert '"measured"' in board


@pytest.mark.slow
def test_a_study_on_gpus_outlives_a_killed_worker_and_an_interrupt(model: str, tmp_path: Path) -> None:
    search = start(tmp_path, *search_arguments(tmp_path, model), gpus=CROWDED)
    assert search.stdout is not None
    while "trial   1" not in (line := search.stdout.readline()):
        assert line, "the search ended before its second trial"
    search.send_signal(signal.SIGINT)
    output, _ = search.communicate(timeout=300)
    assert search.returncode == 130, output
    assert "autopeft resume run" in output
    resumed = start(tmp_path, "resume", "run", gpus=CROWDED)
    assert resumed.stdout is not None
    while "trial   2" not in (line := resumed.stdout.readline()):
        assert line, "the search ended before its third trial"
    listed = subprocess.run(["pgrep", "-P", str(resumed.pid)], capture_output=True, text=True, check=True)
    os.kill(int(listed.stdout.split()[0]), signal.SIGKILL)
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    study = read_study(tmp_path)
    assert study.ledger.lost_seconds > 0
    complete = [trial for trial in study.trials if trial.state == "complete"]
    assert complete
    assert all(trial.cost is not None and trial.cost.vram_source == "measured" for trial in complete)


@pytest.mark.slow
def test_estimates_of_a_study_stand_beside_what_it_measured(finished: tuple[Path, StudyRecord]) -> None:
    folder, study = finished
    lines = autopeft(folder, "estimate", "--study", "run").splitlines()
    assert any(re.match(r" *trainable +training +measured +evaluation +GPU, free", line) for line in lines)
    complete = next(trial for trial in study.trials if trial.state == "complete")
    assert complete.cost is not None
    assert any(format_bytes(complete.cost.peak_vram_bytes) in line for line in lines)


@pytest.mark.slow
def test_a_pick_is_trained_verified_merged_and_exported_on_gpus(
    finished: tuple[Path, StudyRecord], model: str, tmp_path: Path
) -> None:
    folder, study = finished
    pick = next(str(t.number) for t in study.trials if t.state == "complete" and t.spec.method in ("lora", "ia3"))
    out = str(tmp_path / "trained")
    how = ("--steps", "40", "--eval-every", "10", "--micro-batch", "8", "--gradient-checkpointing")
    training = start(folder, "train", "run", "--pick", pick, "--out", out, *how)
    assert training.stdout is not None
    while "step     20" not in (line := training.stdout.readline()):
        assert line, "the training ended before its second evaluation"
    training.kill()
    training.communicate()
    told = autopeft(folder, "train", "run", "--pick", pick, "--out", out, *how)
    assert "going on from step" in told
    assert "on Pretended GPU" in told
    assert re.search(r"memory +at most .* allocated on a GPU", told)
    assert "on cuda:0" in autopeft(folder, "verify", out)
    autopeft(folder, "merge", out, "--out", str(tmp_path / "merged"))
    script = tmp_path / "script"
    autopeft(folder, "export", "run", "--pick", pick, "--to", "trainer", "--out", str(script))
    # Both GPUs are seen, and one is used, as in the study.
    done = subprocess.run(
        [sys.executable, "train.py", "--model", model, "--max-steps", "20"],
        cwd=script, env=make_environment(), capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "test: accuracy" in done.stdout


@pytest.mark.slow
def test_a_training_that_runs_out_of_memory_says_what_needs_less(
    finished: tuple[Path, StudyRecord], tmp_path: Path
) -> None:
    folder, study = finished
    pick = next(str(t.number) for t in study.trials if t.state == "complete")
    told = autopeft(
        folder, "train", "run", "--pick", pick, "--out", str(tmp_path / "trained"), "--steps", "10",
        gpus="24576:0:24564", code=1,
    )  # fmt: skip
    assert "--micro-batch" in told
    assert "Traceback" not in told
