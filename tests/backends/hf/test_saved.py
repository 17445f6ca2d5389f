"""A trained model on disk and back, and every way in which the files may not fit."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from autopeft.backends.hf.base_model import digest_model
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.saved import copy_adapter, load_trained, merge_adapter, save_adapter, save_trained
from autopeft.errors import RecordError
from autopeft.methods import METHODS
from autopeft.records import TrialSpec
from autopeft.testing.subject import Case, compute_logits
from autopeft.testing.tiny_models import ArchitectureName, tiny_base, tiny_folder

SPEC = Case(METHODS["bottleneck"], "bert", 32).spec()


def train_by_hand(spec: TrialSpec, architecture: ArchitectureName = "bert") -> Any:
    """A model whose trainable parameters are no longer those that it was built with."""
    model = build_trial_model(tiny_base(architecture, 32), spec)
    change_what_trains(model)
    return model


def change_what_trains(model: Any) -> None:
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.1 * torch.randn_like(parameter))


@pytest.fixture(scope="module")
def model() -> Any:
    return train_by_hand(SPEC)


@pytest.fixture(scope="module")
def saved_once(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "adapter"
    save_trained(model, SPEC, folder)
    return folder


@pytest.fixture
def saved(saved_once: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved_once, tmp_path / "adapter"))


def test_a_loaded_model_is_the_trained_one(model: Any, saved: Path) -> None:
    loaded = load_trained(tiny_base("bert", 32), saved)
    assert not loaded.training
    assert torch.equal(compute_logits(loaded), compute_logits(model))


def test_the_files_are_the_trainable_parameters_and_the_configuration(model: Any, saved: Path) -> None:
    assert sorted(path.name for path in saved.iterdir()) == ["configuration.json", "trained.safetensors"]
    num_bytes = sum(4 * parameter.numel() for parameter in trainable_parameters(model).values())
    assert num_bytes < (saved / "trained.safetensors").stat().st_size < num_bytes + 4096
    assert json.loads((saved / "configuration.json").read_text())["spec"]["settings"] == dict(SPEC.settings)


def test_loading_leaves_the_base_untouched(saved: Path) -> None:
    base = tiny_base("bert", 32)
    before = digest_model(base.model)
    load_trained(base, saved)
    assert digest_model(base.model) == before


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "configuration.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_files_for_another_width_are_refused(saved: Path) -> None:
    with pytest.raises(RecordError, match="trained on a base of 32 bits, but the base given has 4"):
        load_trained(tiny_base("bert", 4), saved)


def test_files_for_another_model_are_refused(saved: Path) -> None:
    with pytest.raises(RecordError, match=r"trained\.safetensors' holds, but .* is only in one of them"):
        load_trained(tiny_base("modernbert", 32), saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    edit(saved, format=2)
    with pytest.raises(RecordError, match="must be of format 1"):
        load_trained(tiny_base("bert", 32), saved)


@pytest.mark.parametrize("name", ["configuration.json", "trained.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(RecordError, match=f"must hold a readable {name}"):
        load_trained(tiny_base("bert", 32), saved)


@pytest.mark.parametrize("name", ["configuration.json", "trained.safetensors"])
def test_a_damaged_file_is_named(saved: Path, name: str) -> None:
    (saved / name).write_bytes(b"\xff" * 10)
    with pytest.raises(RecordError, match=f"must hold a readable {name}"):
        load_trained(tiny_base("bert", 32), saved)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("init", ["default", "pissa", "olora"])
def test_plain_peft_loads_an_adapter_onto_the_untouched_base(init: str, tmp_path: Path) -> None:
    spec = Case(METHODS["lora"], "bert", 32, (("init", init),)).spec()
    model = build_trial_model(tiny_base("bert", 32), spec)
    initial = copy_adapter(model)
    change_what_trains(model)
    expected = compute_logits(model)
    save_adapter(model, spec, tmp_path, initial=initial)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_folder("bert"), num_labels=2)
    loaded = peft.PeftModel.from_pretrained(plain, str(tmp_path))
    torch.testing.assert_close(compute_logits(loaded), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(compute_logits(model), expected)


@pytest.mark.parametrize("architecture", ["bert", "t5", "modernbert"])
def test_merging_keeps_a_head_of_several_layers(architecture: ArchitectureName) -> None:
    model = train_by_hand(Case(METHODS["lora"], architecture, 32).spec(), architecture)
    merged = merge_adapter(copy.deepcopy(model))
    assert not any("lora" in name or "modules_to_save" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(compute_logits(merged), compute_logits(model), rtol=1e-4, atol=1e-4)


def test_a_plain_model_is_merged_already() -> None:
    model = build_trial_model(tiny_base("bert", 32), Case(METHODS["full"], "bert", 32).spec())
    assert merge_adapter(model) is model
