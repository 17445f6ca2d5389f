"""What other programs find beside the weights: names that transformers 4 knows too, the base's own tokenizer files.

That they then load and answer is for `make serving-check`, in environments of their own.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny_models import make_tiny_bert, make_tiny_llama

from autopeft.backends.hf.base_model import load_tokenizer
from autopeft.production.layout import complete_folder

SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip


def change(path: Path, **values: Any) -> None:
    """Sets values of a JSON file; None takes one out."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def complete(base: str, folder: Path) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(folder)
    complete_folder(folder, load_tokenizer(base), base)
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return Path(make_tiny_llama(tmp_path / "base"))


@pytest.mark.parametrize("scaling", [None, SCALED])
def test_positions_are_said_by_the_names_that_a_base_of_transformers_4_has(
    base: Path, tmp_path: Path, scaling: dict[str, Any] | None
) -> None:
    change(base / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling)
    config = read(complete(str(base), tmp_path / "model") / "config.json")
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling") == scaling


@pytest.mark.parametrize("scaling", [{"rope_type": "default"}, SCALED])
def test_positions_of_a_base_of_transformers_5_are_said_by_the_older_names_too(
    base: Path, tmp_path: Path, scaling: dict[str, Any]
) -> None:
    change(base / "config.json", rope_parameters={"rope_theta": 5e5, **scaling})
    folder = complete(str(base), tmp_path / "model")
    config = read(folder / "config.json")
    assert config["rope_theta"] == 5e5
    assert config.get("rope_scaling") == (None if scaling["rope_type"] == "default" else scaling)
    # And transformers 5, which reads both, takes the same from them.
    before, after = (transformers.AutoConfig.from_pretrained(place) for place in (base, folder))
    assert after.rope_parameters == before.rope_parameters


def test_positions_that_differ_by_layer_are_left_as_the_base_says_them(base: Path, tmp_path: Path) -> None:
    folder = complete(str(base), tmp_path / "model")
    nested = {"full_attention": {"rope_theta": 1e6, "rope_type": "default"}, "sliding_attention": {"rope_theta": 1e4}}
    for given in (base, folder):
        change(given / "config.json", rope_parameters=nested, rope_theta=None)
    complete_folder(folder, load_tokenizer(str(base)), str(base))
    assert "rope_theta" not in read(folder / "config.json")
    change(base / "config.json", rope_theta=1e6, rope_local_base_freq=1e4)
    complete_folder(folder, load_tokenizer(str(base)), str(base))
    config = read(folder / "config.json")
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)


def test_the_width_is_said_by_both_names(base: Path, tmp_path: Path) -> None:
    change(base / "config.json", dtype=None, torch_dtype="bfloat16")
    config = read(complete(str(base), tmp_path / "model") / "config.json")
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"


def test_files_of_the_tokenizer_are_the_bases_own(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    change(base / "tokenizer_config.json", added_tokens_decoder={}, add_bos_token=True)
    tokenizer = load_tokenizer(str(base))
    tokenizer("a b c d", truncation=True, max_length=2)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "model")
    complete_folder(tmp_path / "model", tokenizer, str(base))
    for name in ("tokenizer.json", "tokenizer.model"):
        assert (tmp_path / "model" / name).read_bytes() == (base / name).read_bytes()
    assert read(tmp_path / "model/tokenizer.json")["truncation"] is None
    assert read(tmp_path / "model/tokenizer_config.json")["add_bos_token"] is True


def test_the_base_may_lie_in_the_hubs_cache(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(base / "config.json", rope_parameters=None, rope_theta=5e5)
    (base / "tokenizer.model").write_bytes(b"sentencepiece")
    model, tokenizer = transformers.AutoModelForCausalLM.from_pretrained(base), load_tokenizer(str(base))
    snapshot = tmp_path / "hub/models--me--mine/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    base.rename(snapshot)
    (tmp_path / "hub/models--me--mine/refs").mkdir()
    (tmp_path / "hub/models--me--mine/refs/main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    model.save_pretrained(tmp_path / "model")
    complete_folder(tmp_path / "model", tokenizer, "me/mine")
    assert read(tmp_path / "model/config.json")["rope_theta"] == 5e5
    assert (tmp_path / "model/tokenizer.model").read_bytes() == b"sentencepiece"


def test_a_tokenizer_of_transformers_5_gets_names_that_4_knows(base: Path, tmp_path: Path) -> None:
    change(
        base / "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["serves", "area"],
        pad_token=None, is_local=True, name_or_path=str(base),
    )  # fmt: skip
    folder = complete(str(base), tmp_path / "model")
    settings = read(folder / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["additional_special_tokens"] == ["serves", "area"]
    assert "extra_special_tokens" not in settings
    # What rows were padded with, where the base does not say.
    assert settings["pad_token"] == "</s>"
    assert str(tmp_path) not in (folder / "tokenizer_config.json").read_text()
    assert "is_local" not in settings
    before, after = load_tokenizer(str(base)), transformers.AutoTokenizer.from_pretrained(folder)
    assert after.extra_special_tokens == before.extra_special_tokens == ["serves", "area"]
    assert after.all_special_tokens == before.all_special_tokens
    assert after("name : a | area")["input_ids"] == before("name : a | area")["input_ids"]


def complete_adapter(base: Path, folder: Path) -> Path:
    """A folder without a config.json, as adapters are."""
    folder.mkdir()
    complete_folder(folder, load_tokenizer(str(base)), str(base))
    return folder


def test_a_tokenizer_whose_class_only_the_bases_configuration_says_stays_of_that_class(tmp_path: Path) -> None:
    base = Path(make_tiny_bert(tmp_path / "base"))
    # As bert-base-uncased has it.
    (base / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 512}))
    folder = complete_adapter(base, tmp_path / "adapter")
    before, after = load_tokenizer(str(base)), transformers.AutoTokenizer.from_pretrained(folder)
    assert type(after) is type(before)
    assert dict(after("a b", "c d")) == dict(before("a b", "c d"))


def test_a_tokenizer_that_is_read_otherwise_than_the_base_declares_is_read_so_again(base: Path, tmp_path: Path) -> None:
    # OLMo 2 declares GPT-2's class, which would divide texts by GPT-2's rule instead of the file's.
    (base / "config.json").write_text(json.dumps({"model_type": "olmo2"}))
    change(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    folder = complete_adapter(base, tmp_path / "adapter")
    before, after = load_tokenizer(str(base)), transformers.AutoTokenizer.from_pretrained(folder)
    assert after("name : a | area")["input_ids"] == before("name : a | area")["input_ids"]
    settings = read(folder / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "token_type_ids" not in settings["model_input_names"]


def test_others_than_the_owner_can_read_the_weights(base: Path, tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        folder = complete(str(base), tmp_path / "model")
    finally:
        os.umask(umask)
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o644}
