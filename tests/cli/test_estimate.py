"""`autopeft estimate` and `autopeft doctor`, as a user runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.cli.doctor import examine
from autopeft.cli.main import main

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
    for words in ("base weights", "gradients", "optimizer", "activations", "cuBLAS", "context", "A100", "within 24"):
        assert words in printed


def test_several_configurations_are_a_table(config, capsys):
    assert (
        main(["estimate", "--model", config, "--method", "lora,ia3", "--bits", "4,unquantized", "--seq-len", "32"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum("LoRA" in line for line in lines) == 2
    assert sum("IA3" in line for line in lines) == 2


def test_what_cannot_be_trained_is_told_in_its_row(config, capsys):
    # A Llama has no biases.
    rows = estimate(capsys, "--model", config, "--method", "bitfit,lora", "--seq-len", "32")
    assert "bias terms" in rows[0]["refused"]
    assert rows[1]["peak_bytes"] > 0


def test_a_space_is_drawn_from_the_same_way_each_time(config, capsys):
    arguments = ("--model", config, "--space", "default", "--count", "8", "--seq-len", "16", "--device", "cpu")
    first, second = estimate(capsys, *arguments), estimate(capsys, *arguments)
    assert len(first) == 8
    assert first == second


def test_checkpointing_and_paging_show_in_the_figures(config, capsys):
    arguments = ("--model", config, "--method", "full", "--seq-len", "64")
    (plain,), (checkpointed,) = estimate(capsys, *arguments), estimate(capsys, *arguments, "--gradient-checkpointing")
    assert checkpointed["estimate"]["activation_bytes"] < plain["estimate"]["activation_bytes"]
    (paged,) = estimate(capsys, "--model", config, "--rank", "64", "--seq-len", "64", "--optimizer", "adamw_8bit")
    (whole,) = estimate(capsys, "--model", config, "--rank", "64", "--seq-len", "64")
    assert paged["estimate"]["optimizer_bytes"] < whole["estimate"]["optimizer_bytes"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--model"),
        (["--model", "nowhere/nothing/no"], "nowhere"),
        (["--model", "CONFIG", "--method", "lorra"], "Did you mean 'lora'"),
        (["--model", "CONFIG", "--fix", "rnak=4"], "Did you mean 'rank'"),
        (["--model", "CONFIG", "--bits", "five"], "--bits"),
        (["--model", "CONFIG", "--device", "h10"], "Did you mean 'h100'"),
        (["--model", "CONFIG", "--batch-size", "0"], "--batch-size"),
        (["--study", "missing"], "missing"),
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
