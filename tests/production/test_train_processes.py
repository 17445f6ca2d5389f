"""`accelerate launch -m autopeft train` with two processes on this machine's cores."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from autopeft.production.files import LocalPlaces, read_result, write_local, write_recipe
from autopeft.production.recipe import Recipe
from autopeft.testing.tiny_models import tiny_folder

pytestmark = pytest.mark.slow

Make = Callable[..., Recipe]


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def start(source: Path, out: Path, *arguments: str, processes: int = 2, sharded: bool = False) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    kind: tuple[str, ...] = ("--multi_gpu",)
    if sharded:
        kind = ("--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "NO_WRAP")
    launcher = [
        # With --cpu accelerate 1.15 starts one process, or mpirun; told of GPUs it starts as many as it should.
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(processes), *kind),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(free_port()), "-m", "autopeft"),
    ]
    if processes == 1:
        launcher = [sys.executable, "-m", "autopeft"]
    return subprocess.Popen(
        [*launcher, "train", str(source), "--out", str(out), *arguments],
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launch(source: Path, out: Path, *arguments: str, processes: int = 2, sharded: bool = False) -> str:
    process = start(source, out, *arguments, processes=processes, sharded=sharded)
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    return output


def kill_after_checkpoint(process: subprocess.Popen[str], out: Path) -> None:
    """With all the processes that it started, as soon as there is a whole checkpoint."""
    deadline = time.monotonic() + 300
    while not list(out.glob("checkpoints/step-*/checkpoint.json")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)
    kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The launcher's workers have sessions of their own."""
    for other in [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            other.kill()
    process.communicate()


@pytest.fixture
def source(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> Path:
    """A folder with a recipe of eight steps for a Llama, which has no dropout: each process draws its own."""
    folder = tmp_path / "recipe"
    recipe = make_recipe_for(architecture="llama")
    assert recipe.spec.settings["dropout"] == 0
    write_recipe(recipe, folder)
    write_local(dataclasses.replace(places, model=tiny_folder("llama")), folder)
    return folder


def distance(first: Path, second: Path) -> float:
    one, two = (load_file(out / "adapter" / "adapter_model.safetensors") for out in (first, second))
    assert one.keys() == two.keys()
    return max(float((one[name] - two[name]).abs().max()) for name in one)


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_train_as_one_does(source: Path, tmp_path: Path, sharded: bool) -> None:
    alone = launch(source, tmp_path / "one", processes=1)
    together = launch(source, tmp_path / "two", sharded=sharded)
    one, two = read_result(tmp_path / "one"), read_result(tmp_path / "two")
    assert (one.processes, two.processes) == (1, 2)
    # The same rows in every step, gradients summed in another order.
    assert distance(tmp_path / "one", tmp_path / "two") < 1e-4
    assert two.test_quality == one.test_quality
    assert two.test_loss == pytest.approx(one.test_loss, abs=1e-5)
    # One process speaks: no line of the plan or the result comes twice.
    assert alone.count("\ntest ") == together.count("\ntest ") == 1


@pytest.mark.parametrize("sharded", [False, True], ids=["DDP", "FSDP"])
def test_two_processes_go_on_from_a_checkpoint(source: Path, tmp_path: Path, sharded: bool) -> None:
    rhythm = ("--steps", "60", "--save-every", "10", "--eval-every", "30")
    launch(source, tmp_path / "unbroken", *rhythm, sharded=sharded)
    kill_after_checkpoint(start(source, tmp_path / "killed", *rhythm, sharded=sharded), tmp_path / "killed")
    assert not (tmp_path / "killed" / "result.json").exists()
    assert "going on from step" in launch(source, tmp_path / "killed", *rhythm, sharded=sharded)
    assert distance(tmp_path / "unbroken", tmp_path / "killed") == 0


def test_one_process_killed_at_any_moment_goes_on(source: Path, tmp_path: Path) -> None:
    rhythm = ("--steps", "120", "--save-every", "7", "--eval-every", "40")
    launch(source, tmp_path / "unbroken", *rhythm, processes=1)
    killed = tmp_path / "killed"
    kill_after_checkpoint(start(source, killed, *rhythm, processes=1), killed)
    # And again, at moments that nobody chose.
    for seconds in (4.0, 7.0):
        process = start(source, killed, *rhythm, processes=1)
        time.sleep(seconds)
        kill(process)
    launch(source, killed, *rhythm, processes=1)
    assert distance(tmp_path / "unbroken", killed) == 0


def test_what_is_wrong_is_said_once(source: Path, tmp_path: Path) -> None:
    process = start(source, tmp_path / "out", "--report-to", "nothing")
    output, _ = process.communicate(timeout=500)
    assert process.returncode != 0
    assert output.count("--report-to knows") == 1
