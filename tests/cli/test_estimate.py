"""`autopeft estimate` and `autopeft doctor`, as a user runs them."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest

from autopeft.backends.hf.health import TorchFacts
from autopeft.cli.doctor import Finding, examine
from autopeft.cli.main import main
from autopeft.executors.devices import Gpu

LLAMA = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 12,
    "num_attention_heads": 4,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA))
    return str(path)


def estimate(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict]:
    assert main(["estimate", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_alone_is_enough(config, capsys):
    (row,) = estimate(capsys, "--model", config, "--rank", "4", "--seq-len", "32")
    # 12 layers; rank 4 on four projections of 64 x 64 and three between 64 and 128.
    assert row["estimate"]["trainable_parameters"] == 12 * 4 * (4 * 128 + 3 * 192)
    assert row["estimate"]["layers_measured"] == [3, 4]
    parts = ("base", "adapter", "gradient", "optimizer", "activation", "library")
    assert row["peak_bytes"] == sum(row["estimate"][f"{part}_bytes"] for part in parts)


def test_the_text_names_every_part_and_what_was_modelled(config, capsys):
    assert main(["estimate", "--model", config, "--seq-len", "32", "--device", "a100", "--max-vram", "24GB"]) == 0
    printed = capsys.readouterr().out
    names = ("base weights", "gradients", "optimizer", "activations", "cuBLAS", "context", "A100", "within --max-vram")
    for words in names:
        assert words in printed


def test_a_gpu_without_bfloat16_is_told_beside_the_json(config, capsys):
    assert main(["estimate", "--model", config, "--seq-len", "32", "--device", "t4", "--json"]) == 0
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 1
    assert "a T4 has no units" in printed.err
    estimate(capsys, "--model", config, "--seq-len", "32", "--device", "a10")
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_several_configurations_are_a_table(config, capsys):
    assert (
        main(["estimate", "--model", config, "--method", "lora,ia3", "--bits", "4,unquantized", "--seq-len", "32"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum("LoRA" in line for line in lines) == 2
    assert sum("IA3" in line for line in lines) == 2


def test_a_method_with_a_schedule_is_estimated_like_others(config, capsys):
    (row,) = estimate(capsys, "--model", config, "--method", "adalora", "--seq-len", "32", "--device", "cpu")
    assert row["peak_bytes"] > 0


def test_what_cannot_be_trained_is_told_in_its_row(config, capsys):
    # A Llama has no biases.
    rows = estimate(capsys, "--model", config, "--method", "bitfit,lora", "--seq-len", "32")
    assert "bias terms" in rows[0]["refused"]
    assert rows[1]["peak_bytes"] > 0


def test_an_impossible_pair_of_several_is_told_in_its_row_and_the_others_are_estimated(config, capsys):
    arguments = ("--model", config, "--method", "lora,full", "--bits", "4,unquantized", "--seq-len", "16")
    rows = estimate(capsys, *arguments, "--rank", "4")
    refused = {(row["method"], row["bits"]): row["refused"] for row in rows if "refused" in row}
    assert refused.keys() == {("full", 4), ("full", 16)}
    assert all("no setting 'rank'" in reason for reason in refused.values())
    # A width that stands for all is in the row too.
    (row,) = (row for row in estimate(capsys, *arguments[:4], "--fix", "bits=4", *arguments[6:]) if "refused" in row)
    assert (row["method"], row["bits"]) == ("full", 4)
    assert main(["estimate", *arguments]) == 0
    (told,) = (line for line in capsys.readouterr().out.splitlines() if "Full fine-tuning, 4 bits: " in line)
    assert "trains on a base of 16, 32 bits, but bits is 4" in told


def test_one_impossible_pair_is_an_error_and_so_are_several_without_a_possible_one(config, capsys):
    assert main(["estimate", "--model", config, "--method", "full", "--bits", "4", "--json"]) == 2
    alone = capsys.readouterr()
    assert alone.out == ""
    assert main(["estimate", "--model", config, "--method", "full,head", "--bits", "4", "--rank", "4"]) == 2
    assert capsys.readouterr().err.count("no setting 'rank'") == 2


@pytest.mark.slow
def test_a_space_is_drawn_from_the_same_way_each_time(config, capsys):
    # Two recipes, then one that is drawn.
    arguments = ("--model", config, "--space", "default", "--method", "lora,ia3", "--count", "3", "--seq-len", "16",
                 "--device", "cpu")  # fmt: skip
    first, second = estimate(capsys, *arguments), estimate(capsys, *arguments)
    assert len(first) == 3
    assert first == second


def test_a_space_keeps_to_what_is_asked_of_it(config, capsys):
    arguments = ("--model", config, "--space", "default", "--count", "6", "--seq-len", "16", "--device", "cpu")
    rows = estimate(capsys, *arguments, "--method", "lora,ia3", "--fix", "batch_size=8", "--fix", "lora.rank=4")
    assert {row["spec"]["method"] for row in rows} == {"lora", "ia3"}
    assert {row["spec"]["batch_size"] for row in rows} == {8}
    assert {row["spec"]["settings"].get("rank", 4) for row in rows} == {4}
    (one,) = estimate(capsys, *arguments[:4], "--count", "1", *arguments[6:], "--batch-size", "2")
    assert one["spec"]["batch_size"] == 2


def test_a_method_for_another_kind_of_model_is_left_out_of_the_space_and_said(tmp_path, capsys):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "bert", "num_hidden_layers": 2, "hidden_size": 48, "vocab_size": 100}))
    arguments = ["estimate", "--model", str(path), "--space", "everything", "--count", "1", "--seq-len", "16"]
    assert main(arguments) == 0
    assert "adaption_prompt is left out" in capsys.readouterr().err


@pytest.mark.slow
def test_checkpointing_and_paging_show_in_the_figures(config, capsys):
    arguments = ("--model", config, "--method", "full", "--seq-len", "64")
    (plain,), (checkpointed,) = estimate(capsys, *arguments), estimate(capsys, *arguments, "--gradient-checkpointing")
    assert checkpointed["estimate"]["activation_bytes"] < plain["estimate"]["activation_bytes"]
    (paged,) = estimate(capsys, "--model", config, "--rank", "64", "--seq-len", "64", "--optimizer", "adamw_8bit")
    (whole,) = estimate(capsys, "--model", config, "--rank", "64", "--seq-len", "64")
    assert paged["estimate"]["optimizer_bytes"] < whole["estimate"]["optimizer_bytes"]


def test_a_language_model_has_no_head_and_its_logits_are_counted(config, capsys):
    arguments = ["estimate", "--model", config, "--seq-len", "32", "--device", "cpu"]
    peaks = {}
    for kind in ("classification", "generation"):
        assert main([*arguments, "--task-kind", kind, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)[0]
        peaks[kind] = found["estimate"]["activation_bytes"]
        assert (found["estimate"]["head_parameters"] == 0) == (kind == "generation")
    assert peaks["generation"] > peaks["classification"]
    assert main([*arguments, "--task-kind", "generation"]) == 0
    assert "head" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model"),
        (["--model", "nowhere/nothing/no"], "nowhere"),
        (["--model", "CONFIG", "--method", "lorra"], "Did you mean 'lora'"),
        (["--model", "CONFIG", "--fix", "rnak=4"], "Did you mean 'rank'"),
        (["--model", "CONFIG", "--fix", "batch_size=abc"], "lora.batch_size takes 1 to 4096"),
        (["--model", "CONFIG", "--bits", "five"], "--bits"),
        (["--model", "CONFIG", "--bits", "8", "--fix", "bits=4"], "both were given: 8 and 4"),
        (["--model", "CONFIG", "--rank", "8", "--fix", "rank=4"], "--rank is short for --fix rank="),
        (["--model", "CONFIG", "--space", "default", "--batch-size", "8", "--fix", "batch_size=4"], "both were given"),
        (["--model", "CONFIG", "--device", "h10"], "Did you mean 'h100'"),
        (["--model", "CONFIG", "--batch-size", "0"], "--batch-size"),
        (["--model", "CONFIG", "--num-labels", "0"], "--num-labels"),
        (["--model", "CONFIG", "--num-labels", "100000000000000"], "at most 100,000"),
        (["--model", "CONFIG", "--task-kind", "generation", "--num-labels", "3"], "has no head"),
        (["--model", "CONFIG", "--task-kind", "generation", "--method", "lora,head"], "nothing would be trained"),
        (["--study", "mine", "--task-kind", "generation"], "so --task-kind cannot go with it"),
        (["--study", "missing"], "missing"),
        (["--study", "missing", "--batch-size", "8"], "--batch-size cannot go with it"),
        (["--study", "missing", "--method", "ia3", "--fix", "rank=4"], "--method and --fix cannot go with it"),
        (["--model", "CONFIG", "--space", "default", "--rank", "4"], "--rank cannot go with it"),
        (["--model", "CONFIG", "--count", "4"], "Add --space"),
    ],
)
def test_what_was_asked_wrongly_is_told_in_a_sentence(config, capsys, arguments, words):
    assert main(["estimate", *(config if part == "CONFIG" else part for part in arguments)]) == 2
    assert words in capsys.readouterr().err


def test_the_doctor_finds_what_is_here_and_says_what_to_do_about_what_is_not(monkeypatch, capsys):
    findings = examine()
    names = {finding.name for finding in findings}
    assert {"autopeft", "memory", "torch", "transformers", "peft", "bitsandbytes", "hub", "cache", "disk"} <= names
    assert all(finding.remedy for finding in findings if finding.good is False)
    assert next(finding for finding in findings if finding.name == "torch").good


def test_the_doctor_survives_what_is_broken(monkeypatch, capsys):
    monkeypatch.setattr("autopeft.backends.hf.health.examine_bitsandbytes", lambda device: "OSError: no library")
    assert main(["doctor", "--json"]) == 1
    findings = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert "no library" in findings["bitsandbytes"]["detail"]
    assert "--fix bits=unquantized" in findings["bitsandbytes"]["remedy"]
    assert findings["disk"]["good"]


def finding(name: str) -> Finding:
    return next(found for found in examine() if found.name == name)


@pytest.mark.parametrize(
    ("built_for", "words"),
    [(None, "Install a CUDA build of torch"), ("13.0", "built for CUDA 13.0.*update the driver")],
)
def test_a_torch_that_cannot_use_the_gpu_says_why(monkeypatch, built_for, words):
    gpu = Gpu(number="0", name="H100", total_bytes=80 * 2**30, free_bytes=8 * 2**30)
    monkeypatch.setattr("autopeft.executors.devices.find_gpus", lambda: [gpu])
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/nvidia-smi")
    monkeypatch.setattr("subprocess.run", lambda *arguments, **options: CompletedProcess([], 0, stdout="580.65\n"))
    monkeypatch.setattr(
        "autopeft.backends.hf.health.examine_torch", lambda: TorchFacts(False, "2.13.0", built_for=built_for)
    )
    findings = {found.name: found for found in examine()}
    assert not findings["torch"].good
    assert re.search(words, findings["torch"].remedy)
    assert findings["driver"].detail == "580.65"
    # Nine tenths of its memory are taken.
    assert not findings["GPU 0"].good
    assert "72.0 GiB" in findings["GPU 0"].remedy


def test_a_gpu_that_only_torch_sees_is_told_with_the_way_to_use_it(monkeypatch):
    monkeypatch.setattr("autopeft.executors.devices.find_gpus", lambda: [])
    monkeypatch.setattr(
        "autopeft.backends.hf.health.examine_torch", lambda: TorchFacts(True, "2.13.0", built_for="13.0")
    )
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = finding("torch")
    assert not found.good
    assert "nvidia-smi" in found.remedy
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-0c757cd7-e942-5726-a0b8-0e8fb7067135")
    assert "names a part of one (MIG)" in finding("torch").remedy


def test_a_package_that_is_too_old_is_told_with_the_version_to_install(monkeypatch):
    monkeypatch.setattr("importlib.metadata.requires", lambda name: ["peft>=99", "torch>=2.11"])
    found = finding("peft")
    assert not found.good
    assert ">=99" in found.detail
    assert found.remedy == "Run: pip install 'peft>=99'"


def test_a_full_disk_is_told(monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=2**30))
    for name in ("disk", "cache"):
        assert not finding(name).good
        assert "make room" in finding(name).remedy


@pytest.mark.slow
def test_a_dry_run_for_a_gpu_that_is_not_here_goes_by_its_workspaces(tmp_path, monkeypatch, capsys):
    from autopeft.testing.tiny_models import tiny_folder

    monkeypatch.chdir(tmp_path)
    # One of another kind is here, and has nothing to do with the plan.
    script = Path("bin/nvidia-smi")
    script.parent.mkdir()
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *compute_cap*) echo "NVIDIA H200, 9.0";; *) echo "0, GPU-a, NVIDIA H200, 143771, 143000";; esac\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent.resolve()}:{os.environ['PATH']}")
    asked = ["search", "--task", "demo", "--model", str(tiny_folder("bert")), "--budget", "1gpu-h", "--methods", "ia3"]
    peaks = []
    for gpu in ("rtx4090", "h100"):
        assert main([*asked, "--dry-run", "--plan-for", gpu]) == 0
        peaks.append(float(re.findall(r"([0-9.]+) MiB", capsys.readouterr().out)[0]))
    # cuBLAS keeps 64 MiB on an H100, and 2 * (2 * 4096 + 8 * 16) KiB on what is no Hopper.
    assert peaks[1] - peaks[0] == pytest.approx(64 - 16.25, abs=0.2)


def test_a_dry_run_for_a_gpu_that_is_not_here_goes_by_its_memory(tmp_path, monkeypatch, capsys):
    from autopeft.testing.tiny_models import tiny_folder

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    shutil.copytree(tiny_folder("llama"), "model")
    path = Path("model/config.json")
    # 2 billion numbers in the embedding: 8 GiB in float32, and full fine-tuning holds four such copies.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"hidden_size": 8192, "vocab_size": 256_000}))
    asked = ["search", "--task", "demo", "--model", "model", "--budget", "1gpu-h", "--space", "everything", "--dry-run"]
    assert main([*asked, "--methods", "full,ia3", "--plan-for", "rtx4090"]) == 0
    printed = capsys.readouterr().out
    assert "the GPU has" in printed
    assert "1 of 2 fit" in printed
