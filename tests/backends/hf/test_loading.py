"""Loading a base is quiet but for what is wrong with it."""

from __future__ import annotations

import json
import logging
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import make_tiny_llama

from autopeft.backends.hf.base_model import (
    QuietLoading,
    count_unquantized_share,
    load_base,
    load_config,
    load_tokenizer,
)
from autopeft.errors import ModelError
from autopeft.testing.tiny_models import ArchitectureName, tiny_base, tiny_folder


def forget(folder: Path, ending: str) -> str:
    """A copy of the tiny BERT whose checkpoint lacks what ends so."""
    copy = Path(shutil.copytree(tiny_folder("bert"), folder / "bert"))
    weights = load_file(copy / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.endswith(ending)}
    assert len(kept) < len(weights)
    save_file(kept, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


@pytest.fixture
def heard() -> Iterator[list[str]]:
    """What transformers says while it loads; its logger writes to the terminal by a way of its own."""
    logger, said = transformers.utils.logging.get_logger("transformers.modeling_utils"), []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    # A training before, in the same process, silences all but errors.
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_warning()
    yield said
    transformers.utils.logging.set_verbosity(verbosity)
    logger.removeHandler(handler)


def test_a_missing_head_is_no_news(tmp_path: Path, heard: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    folder = forget(tmp_path, "classifier.weight")
    transformers.utils.logging.enable_progress_bar()
    # Making the model has shown a bar.
    capfd.readouterr()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_base(folder, num_labels=2, bits=32, device="cpu")
    captured = capfd.readouterr()
    assert (captured.out, captured.err, heard) == ("", "", [])
    assert transformers.utils.logging.is_progress_bar_enabled()


def test_a_missing_layer_is_said(tmp_path: Path) -> None:
    folder = forget(tmp_path, "layer.1.output.dense.weight")
    with pytest.warns(UserWarning, match=r"lacks bert\.encoder\.layer\.1\.output\.dense\.weight, outside of the head"):
        load_base(folder, num_labels=2, bits=32, device="cpu")


def test_other_words_of_transformers_are_heard(heard: list[str]) -> None:
    logger = transformers.utils.logging.get_logger("transformers.modeling_utils")
    with QuietLoading():
        with QuietLoading():
            pass
        logger.warning("BertModel LOAD REPORT from: x")
        logger.warning("something else")
    logger.warning("BertModel LOAD REPORT from: y")
    assert heard == ["something else", "BertModel LOAD REPORT from: y"]


def test_a_base_that_comes_quantized_is_refused(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_folder("llama"), tmp_path / "llama-bnb-4bit"))
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"llama-bnb-4bit' comes quantized already\. Name the model that"):
        load_base(str(copy), num_labels=2, bits=16, device="cpu")


@pytest.mark.parametrize("upstream", ["", "acme/code--"])
def test_a_model_that_needs_code_of_its_own_is_refused_without_advice_that_cannot_be_followed(
    tmp_path: Path, upstream: str
) -> None:
    config = {"model_type": "acme", "auto_map": {"AutoConfig": f"{upstream}configuration_acme.AcmeConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="needs code of its own") as info:
        load_config(str(tmp_path), 2)
    assert "trust_remote_code" not in str(info.value)


def test_code_that_comes_with_a_known_architecture_is_not_run(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(tiny_folder("bert"), tmp_path / "bert"))
    config = json.loads((copy / "config.json").read_text())
    config["auto_map"] = {name: "modeling_acme.Acme" for name in ("AutoConfig", "AutoModelForSequenceClassification")}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "modeling_acme.py").write_text("raise RuntimeError('was run')")
    base = load_base(str(copy), num_labels=2, bits=32, device="cpu")
    assert type(base.model).__name__ == "BertForSequenceClassification"
    assert load_tokenizer(str(copy)).pad_token is not None


@pytest.mark.parametrize("num_labels", [2, None])
def test_no_keys_and_values_are_kept_in_training(tmp_path: Path, num_labels: int | None) -> None:
    folder = tiny_folder("llama") if num_labels else make_tiny_llama(tmp_path)
    model: Any = load_base(folder, num_labels=num_labels, bits=32, device="cpu").model
    assert model(input_ids=torch.ones(1, 4, dtype=torch.int64)).past_key_values is None


def test_of_a_mixture_of_experts_the_share_that_is_not_quantized_is_told(tmp_path: Path) -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        moe_intermediate_size=64, num_experts=4, num_experts_per_tok=2, pad_token_id=0,
    )  # fmt: skip
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    told = count_unquantized_share(load_base(str(tmp_path), num_labels=2, bits=32, device="cpu").model)
    sizes = {"left": 0, "quantized": 0}
    for name, parameter in load_base(str(tmp_path), num_labels=2, bits=4, device="cpu").model.named_parameters():
        if ".layers." in name:
            state = getattr(parameter, "quant_state", None)
            sizes["left" if state is None else "quantized"] += (parameter if state is None else state.shape).numel()
    assert told == pytest.approx(sizes["left"] / sum(sizes.values()), rel=1e-9)
    assert told > 0.75


@pytest.mark.parametrize("architecture", ["bert", "llama", "t5"])
def test_without_experts_nearly_all_of_the_blocks_is_quantized(architecture: ArchitectureName) -> None:
    assert count_unquantized_share(tiny_base(architecture, 32).model) < 0.03
