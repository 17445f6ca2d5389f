"""No answer depends on how far a row's batch is padded, whatever tokenizer and configuration say of padding."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from autopeft.backends.hf.base_model import load_base, load_config, load_tokenizer, make_base
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.data import TaskData
from autopeft.errors import ModelError
from autopeft.production.plain import plan_batches, takes_padding
from autopeft.records import TrialSpec
from autopeft.tasks.spec import parse_task
from autopeft.testing.subject import compute_logits
from autopeft.testing.tiny_models import NUM_LABELS, pad_further, tiny_base, tiny_batch, tiny_folder, tiny_task

pytestmark = pytest.mark.filterwarnings("ignore")

SAME = {"rtol": 0.0, "atol": 1e-5}
SIZES = {"vocab_size": 96, "pad_token_id": 0, "eos_token_id": 1, "num_labels": NUM_LABELS}
DECODERS: dict[str, Callable[[], Any]] = {
    # Positions that are counted from the row's first, rotated and added as a slope.
    "gpt2": lambda: transformers.GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=4),
    "qwen2": lambda: transformers.Qwen2Config(
        **SIZES,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=128,
    ),
    "bloom": lambda: transformers.BloomConfig(**SIZES, hidden_size=64, n_layer=2, n_head=4),
}


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning", "prefix_tuning", "lora"])
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_classifies_from_each_rows_last_token(
    make_spec: Callable[..., TrialSpec], name: str, method: str
) -> None:
    torch.manual_seed(0)
    classifier = transformers.AutoModelForSequenceClassification.from_config(DECODERS[name]())
    model = build_trial_model(make_base(classifier, 32), make_spec(method))
    batch = tiny_batch()
    logits = compute_logits(model, batch)
    torch.testing.assert_close(compute_logits(model, pad_further(batch)), logits, **SAME)
    alone = {key: tensor[-1:] if key == "labels" else tensor[-1:, :7] for key, tensor in batch.items()}
    assert int(batch["attention_mask"][-1].sum()) == 7
    torch.testing.assert_close(compute_logits(model, alone), logits[-1:], **SAME)


def test_a_prompts_row_without_padding_is_answered_as_by_plain_peft(make_spec: Callable[..., TrialSpec]) -> None:
    model = build_trial_model(tiny_base("llama", 32), make_spec("prompt_tuning"))
    full = {key: tensor[:7] for key, tensor in tiny_batch().items()}
    ours = compute_logits(model, full)
    model.base_model.model._forward_hooks.clear()
    torch.testing.assert_close(compute_logits(model, full), ours, **SAME)
    assert not torch.allclose(compute_logits(model, pad_further(full)), ours, **SAME)


@pytest.mark.parametrize(("method", "takes"), [("prompt_tuning", False), ("prefix_tuning", True), ("lora", True)])
def test_plain_peft_is_given_rows_of_one_length_where_it_cannot_tell_padding(
    make_spec: Callable[..., TrialSpec], method: str, takes: bool
) -> None:
    assert takes_padding(build_trial_model(tiny_base("llama", 32), make_spec(method))) is takes


def test_batches_without_padding_hold_rows_of_one_length() -> None:
    job = {"features": [{"input_ids": [1] * length} for length in (3, 2, 3, 4, 3)], "batch_size": 2}
    assert plan_batches(job, padded=False) == [[1], [0, 2], [4], [3]]
    assert plan_batches(job) == [[1, 0], [2, 4], [3]]


def copy_llama(folder: Path, **changes: Any) -> str:
    """The tiny Llama, its configuration changed."""
    copy = Path(shutil.copytree(tiny_folder("llama"), folder / "llama"))
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | changes))
    return str(copy)


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"pad_token_id": None}, id="none"),
        pytest.param({"pad_token_id": None, "eos_token_id": [1, 5]}, id="none, and several ends"),
        pytest.param({"pad_token_id": 7}, id="another"),
    ],
)
def test_a_decoders_padding_is_what_its_tokenizer_says(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder = copy_llama(tmp_path, **changes)
    model = load_base(folder, num_labels=NUM_LABELS, bits=32, device="cpu").model
    assert model.config.pad_token_id == load_tokenizer(folder).pad_token_id == 0
    torch.testing.assert_close(compute_logits(model, pad_further(tiny_batch())), compute_logits(model), **SAME)


def test_without_a_tokenizer_an_end_of_sequence_stands_for_padding(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path, pad_token_id=None, eos_token_id=[5, 1])
    for path in Path(folder).glob("tokenizer*"):
        path.unlink()
    assert load_base(folder, num_labels=NUM_LABELS, bits=32, device="cpu").model.config.pad_token_id == 5


@pytest.mark.parametrize("alone", [False, True])
def test_for_a_configuration_file_no_hub_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: bool) -> None:
    folder = Path(copy_llama(tmp_path, pad_token_id=None, eos_token_id=5))
    if alone:
        for path in folder.glob("tokenizer*"):
            path.unlink()
    asked = []
    load = transformers.AutoTokenizer.from_pretrained

    def ask(name: str, **arguments: Any) -> Any:
        asked.append(name)
        return load(name, **arguments)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", ask)
    assert load_config(str(folder / "config.json"), NUM_LABELS).pad_token_id == (5 if alone else 0)
    assert asked == [str(folder)]


def test_rows_are_padded_behind_though_the_tokenizer_pads_in_front(tmp_path: Path) -> None:
    folder = copy_llama(tmp_path)
    path = Path(folder) / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    assert load_tokenizer(folder).padding_side == "left"
    data = TaskData(parse_task(tiny_task(), "tiny"), model=folder, data_dir=None, split_seed=0)
    mask_BT = data.collate(data.train, range(8), "cpu")["attention_mask"]
    assert bool((mask_BT[:, 0] == 1).all())
    assert bool((mask_BT[:, -1] == 0).any())


@pytest.mark.parametrize(("config", "where"), [
    (transformers.XLNetConfig(d_model=64, n_layer=2, n_head=4, d_inner=64), "last position"),
    (transformers.XLMConfig(summary_type="mean"), "mean over all positions"),
])  # fmt: skip
def test_a_classifier_that_reads_padding_is_refused(tmp_path: Path, config: Any, where: str) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=where):
        load_config(str(tmp_path), 2)


def test_one_that_reads_the_first_token_is_not(tmp_path: Path) -> None:
    transformers.XLMConfig().save_pretrained(tmp_path)
    assert load_config(str(tmp_path), 2).summary_type == "first"
