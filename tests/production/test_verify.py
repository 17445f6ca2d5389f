"""A finished folder reproduces its score in a fresh process, and whatever was changed is named."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finished_folders import make_finished, write_rows
from fresh_process import REALLY_FRESH, one_process  # noqa: F401 (a fixture)
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from autopeft.backends.hf.base_model import digest_file
from autopeft.backends.hf.language import score_completions
from autopeft.cli.main import main
from autopeft.errors import RecordError, VerificationError
from autopeft.production import finished, plain
from autopeft.production.files import read_local, read_recipe, read_result, write_local, write_result
from autopeft.production.finished import open_finished
from autopeft.production.verify import Verification, check_scores, choose_tolerance, verify
from autopeft.records import Cost
from autopeft.testing.tiny_models import ArchitectureName, tiny_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished(tmp_path_factory.mktemp("lora") / "done", "lora", "bert")


@pytest.fixture
def folder(lora: Path, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(lora, tmp_path / "done"))


@pytest.mark.parametrize(
    ("method", "architecture", "loader"),
    [
        ("lora", "llama", "peft"),
        ("prompt_tuning", "bert", "peft"),
        ("prompt_tuning", "llama", "peft"),
        pytest.param("ia3", "t5", "peft", marks=pytest.mark.slow),
        ("full", "modernbert", "transformers"),
        ("bottleneck", "bert", "autopeft"),
    ],
)
def test_every_way_of_saving_reproduces_its_score(
    method: str, architecture: ArchitectureName, loader: str, tmp_path: Path
) -> None:
    folder = make_finished(tmp_path / "done", method, architecture)
    found = verify(open_finished(folder))
    assert found.loader == loader
    assert found.quality == found.recorded_quality
    assert found.loss == pytest.approx(found.recorded_loss, abs=1e-5)
    assert found.num_examples == 96
    assert found.num_changed == 0
    # Recorded losses are float16.
    assert found.largest_loss_difference is not None
    with np.load(folder / "scores.npz") as scores:
        largest = float(scores["test_losses"].max())
    # They are kept as float16, of 11 bits.
    assert found.largest_loss_difference < 1e-3 + largest * 2**-11


def test_rows_are_those_that_were_asked_for_though_those_of_before_are_there(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Path(read_local(folder).files["train.jsonl"])
    assert before.is_file()
    # With half of its files, and with all of them under the task's name.
    write_rows(tmp_path / "half", seed=1)
    (tmp_path / "half" / "test.jsonl").unlink()
    write_rows(tmp_path / "all" / "tiny", seed=1)

    def find(**given: str) -> list[str | None]:
        files = open_finished(folder, **given).task.files
        assert files is not None
        return [files.train, files.test]

    assert find(data_dir=str(tmp_path / "half")) == [
        str(tmp_path / "half" / "train.jsonl"), str(before.parent / "test.jsonl")
    ]  # fmt: skip
    # What stands for many tasks has to have all of one's.
    monkeypatch.setenv("AUTOPEFT_DATA_DIR", str(tmp_path / "half"))
    assert find() == [str(before.parent / f"{split}.jsonl") for split in ("train", "test")]
    monkeypatch.setenv("AUTOPEFT_DATA_DIR", str(tmp_path / "all"))
    assert find() == [str(tmp_path / "all" / "tiny" / f"{split}.jsonl") for split in ("train", "test")]
    assert find(data_dir=str(tmp_path / "half"))[0] == str(tmp_path / "half" / "train.jsonl")


@pytest.mark.parametrize(("micro_batch", "known", "expected"), [(8, None, 16), (64, None, 32), (8, 4, 4)])
def test_no_more_rows_are_scored_at_a_time_than_training_had_the_memory_for(
    folder: Path, micro_batch: int, known: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost = Cost(
        trainable_parameters=1, head_parameters=1, peak_vram_bytes=1, vram_source="estimated", scoring_batch_size=known
    )
    done = open_finished(folder)
    done = done._replace(recipe=dataclasses.replace(done.recipe, micro_batch=micro_batch, cost=cost))
    asked: list[int] = []

    def ask(what: Any, job: dict[str, Any]) -> Any:
        asked.append(job["batch_size"])
        return finished.ask_fresh_process(what, job)

    monkeypatch.setattr("autopeft.production.verify.ask_fresh_process", ask)
    assert verify(done).num_changed == 0
    assert asked == [expected]


class Float32(TorchDispatchMode):
    """The largest tensor of 32 bits that is made."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor) and made.dtype == torch.float32:
            self.largest = max(self.largest, made.numel())
        return made


def test_logits_of_a_batch_are_turned_into_float32_row_by_row() -> None:
    torch.manual_seed(0)
    logits_BTV, labels_BT = torch.randn(4, 8, 50).bfloat16(), torch.randint(0, 50, (4, 8))
    labels_BT[:, :3] = plain.IGNORED
    with Float32() as made:
        losses_B, shares_B = plain.score_completions(logits_BTV, labels_BT)
    assert made.largest <= 8 * 50
    expected = score_completions(logits_BTV, labels_BT)
    torch.testing.assert_close((losses_B, shares_B), expected)


@pytest.mark.parametrize("init", ["pissa"])
def test_an_adapter_that_moved_a_part_of_its_base_reproduces_too(init: str, tmp_path: Path) -> None:
    folder = make_finished(tmp_path / "done", "lora", "bert", settings=(("init", init),))
    assert verify(open_finished(folder)).num_changed == 0


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_reproduces_its_score(bits: Any, tmp_path: Path) -> None:
    found = verify(open_finished(make_finished(tmp_path / "done", "lora", "bert", bits=bits)))
    assert found.loss == pytest.approx(found.recorded_loss, abs=2e-3)
    assert found.tolerance.why == "rounded weights or bfloat16"


def test_the_command_prints_both_figures(
    lora: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finished, "run_plain", REALLY_FRESH)
    assert main(["verify", str(lora)]) == 0
    printed = capsys.readouterr().out
    result = read_result(lora)
    assert f"recorded     test accuracy {result.test_quality:.4f}, mean loss {result.test_loss:.4f}" in printed
    assert f"reproduced   test accuracy {result.test_quality:.4f}, mean loss {result.test_loss:.4f}; 0 of" in printed
    assert "with peft, on cpu" in printed


# --- what was changed is named, and ends with 1


def fails(folder: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["verify", str(folder), *arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def change_weights(path: Path) -> None:
    changed = {name: t + 1.0 if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(changed, path, metadata={"format": "pt"})


def test_changed_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_weights(folder / "adapter/adapter_model.safetensors")
    assert "adapter_model.safetensors' must have the SHA-256" in fails(folder, capsys)


def test_missing_weights(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "adapter/adapter_model.safetensors").unlink()
    assert "but have nothing" in fails(folder, capsys)


def test_a_score_that_the_weights_do_not_have(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights and their digest changed together: only scoring again can tell."""
    path = folder / "adapter/adapter_model.safetensors"
    change_weights(path)
    result = read_result(folder)
    write_result(dataclasses.replace(result, weights_digests={path.name: digest_file(path)}), folder)
    error = fails(folder, capsys)
    assert "must reproduce its test score within 0.0208" in error
    assert f"where {result.test_quality:.4f} is recorded" in error


def test_other_rows(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(tmp_path / "others", seed=1)
    files = {f"{split}.jsonl": str(tmp_path / f"others/{split}.jsonl") for split in ("train", "test")}
    write_local(dataclasses.replace(read_local(folder), files=files), folder)
    assert "rows, their order or their split differ" in fails(folder, capsys)


def test_another_base(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(iter(weights))
    weights[name] = weights[name] + 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    assert "an adapter is right on its own base only" in fails(folder, capsys, "--model", str(other))


def test_a_folder_that_does_not_load_says_why(folder: Path) -> None:
    path = folder / "adapter/adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"r": 3}))
    with pytest.raises(RecordError, match=r"must load in a fresh process with peft, but fails.*size mismatch"):
        verify(open_finished(folder))


def test_files_of_the_task_that_are_gone_are_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_local(dataclasses.replace(read_local(folder), files={}), folder)
    assert main(["verify", str(folder)]) == 2
    assert "reads the file 'train.jsonl', which is not there" in capsys.readouterr().err


# --- the tolerance


def make_found(lora: Path, **changes: Any) -> Verification:
    folder = open_finished(lora)
    found = Verification(
        recorded_quality=0.8, quality=0.8, recorded_loss=0.5, loss=0.5, num_examples=96, num_changed=0,
        largest_loss_difference=0.0, tolerance=choose_tolerance(folder, "cpu"), loader="peft", device="cpu",
    )  # fmt: skip
    return found._replace(**changes)


def test_two_examples_may_fall_to_the_other_side_and_three_not(lora: Path) -> None:
    done = open_finished(lora)
    check_scores(done, make_found(lora, quality=0.8 - 2 / 96))
    with pytest.raises(VerificationError):
        check_scores(done, make_found(lora, quality=0.8 - 3 / 96))


def test_a_thousandth_of_a_nat_may_differ_and_more_not(lora: Path) -> None:
    done = open_finished(lora)
    check_scores(done, make_found(lora, loss=0.5009))
    with pytest.raises(VerificationError, match=r"with a loss of 0\.5011 where 0\.5000 is"):
        check_scores(done, make_found(lora, loss=0.5011))


def test_another_kind_of_device_is_given_more_room(lora: Path) -> None:
    done = open_finished(lora)
    on_gpu = done._replace(recipe=dataclasses.replace(read_recipe(lora), device_kind="cuda", precision="bfloat16"))
    assert choose_tolerance(on_gpu, "cpu").loss > choose_tolerance(on_gpu, "cuda:0").loss
    assert choose_tolerance(on_gpu, "cuda:0").loss > choose_tolerance(done, "cpu").loss
    assert choose_tolerance(on_gpu, "cpu").why == "it was trained on a GPU"


def test_the_fresh_process_ends_with_the_one_that_asks_it(tmp_path: Path) -> None:
    # It waits for the rest of its job until somebody closes this.
    os.mkfifo(tmp_path / "job.json")
    code = "import sys, pathlib; from autopeft.production.finished import run_plain as run; "
    code += "run('score', pathlib.Path(sys.argv[1]), with_autopeft=False)"
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)])
    try:
        pipe = wait_for(lambda: os.open(tmp_path / "job.json", os.O_WRONLY | os.O_NONBLOCK), OSError)
    finally:
        parent.kill()
        parent.wait()

    def write() -> None:
        assert os.write(pipe, b" ") == 0

    try:
        with pytest.raises(BrokenPipeError):
            wait_for(write, AssertionError)
    finally:
        os.close(pipe)


def wait_for(act: Callable[[], Any], *errors: type[Exception]) -> Any:
    """What it gives once it raises none of these."""
    end = time.monotonic() + 120
    while True:
        try:
            return act()
        except errors:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


def test_answers_that_were_not_kept_are_not_compared(folder: Path) -> None:
    (folder / "scores.npz").unlink()
    found = verify(open_finished(folder))
    assert (found.num_changed, found.largest_loss_difference) == (None, None)
    assert np.isfinite(found.loss)
