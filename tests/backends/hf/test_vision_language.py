"""Decoders that also take images: texts pass through a part of them, which alone is trained."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from recipe_specs import make_recipe_spec
from transformers import AutoModelForImageTextToText

from autopeft.backends.hf.base_model import BaseModel, load_base, load_config, load_tokenizer
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.backends.hf.cost import HfCostModel, count_peak_bytes
from autopeft.errors import ModelError, SpecError
from autopeft.testing.subject import compute_logits
from autopeft.testing.tiny_models import NUM_LABELS, pad_further, tiny_batch, tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")

_TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "intermediate_size": 128, "eos_token_id": 1, "bos_token_id": 3, "pad_token_id": None,
    "initializer_range": 0.125,
}  # fmt: skip
_LINEAR_ATTENTION: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2, "linear_num_key_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "gemma3": lambda: transformers.Gemma3Config(
        text_config=_TEXT,
        vision_config={
            "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40,
            "image_size": 28, "patch_size": 14,
        },
    ),
    "qwen3_5": lambda: transformers.Qwen3_5Config(
        text_config=_TEXT | _LINEAR_ATTENTION,
        vision_config={
            "depth": 2, "hidden_size": 48, "num_heads": 2, "intermediate_size": 40, "out_hidden_size": 64,
        },
    ),
}  # fmt: skip
KINDS = {"classifier": NUM_LABELS, "writer": None}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], str]:
    """Of a checkpoint as it is published, images included, or of a classifier."""

    @functools.cache
    def make(name: str, kind: str) -> str:
        folder = tmp_path_factory.mktemp(f"{name}-{kind}")
        auto: Any = transformers.AutoModelForSequenceClassification if KINDS[kind] else AutoModelForImageTextToText
        torch.manual_seed(0)
        auto.from_config(CONFIGS[name]()).save_pretrained(folder)
        load_tokenizer(tiny_folder("llama")).save_pretrained(folder)
        return str(folder)

    return make


@pytest.fixture(scope="module")
def bases(folders: Callable[[str, str], str]) -> Callable[[str, str], BaseModel]:
    def load(name: str, kind: str) -> BaseModel:
        return load_base(folders(name, kind), num_labels=KINDS[kind], bits=32, device="cpu")

    return functools.cache(load)


def make_batch(kind: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch()
    return batch if KINDS[kind] else batch | {"labels": batch["input_ids"]}


@pytest.mark.parametrize("method", ["lora", "ia3", "ln_tuning", "full", "prompt_tuning", "bottleneck"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_trains_is_what_texts_pass_through(
    bases: Callable[[str, str], BaseModel], name: str, kind: str, method: str
) -> None:
    model = build_trial_model(bases(name, kind), make_recipe_spec(method, batch_size=8))
    output = model(**make_batch(kind))
    assert output.past_key_values is None
    output.loss.backward()
    trained = trainable_parameters(model)
    assert [name for name, parameter in trained.items() if parameter.grad is None] == []
    if method == "full":
        left = [name for name, _ in model.named_parameters() if name not in trained]
        assert [
            name for name in left if not name.startswith(("model.vision_tower.", "model.multi_modal", "model.visual."))
        ] == []


def test_a_prefix_is_kept_in_front_of_what_texts_pass_through(bases: Callable[[str, str], BaseModel]) -> None:
    model = build_trial_model(bases("gemma3", "classifier"), make_recipe_spec("prefix_tuning", batch_size=8))
    batch = tiny_batch()
    torch.testing.assert_close(compute_logits(model, pad_further(batch)), compute_logits(model, batch))


def test_biases_beside_a_decoder_without_any_are_none_to_train(bases: Callable[[str, str], BaseModel]) -> None:
    base = bases("gemma3", "classifier")
    assert any(name.endswith(".bias") for name, _ in base.model.named_parameters())
    with pytest.raises(SpecError, match="this model has none"):
        build_trial_model(base, make_recipe_spec("bitfit", batch_size=8))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_row_is_classified_from_its_last_token(bases: Callable[[str, str], BaseModel], name: str) -> None:
    model: Any = bases(name, "classifier").model
    assert model.config.get_text_config().pad_token_id == 0
    torch.testing.assert_close(compute_logits(model, pad_further(tiny_batch())), compute_logits(model))


def test_without_a_tokenizer_the_texts_end_of_sequence_stands_for_padding(
    folders: Callable[[str, str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def find_none(name: str) -> None:
        raise ModelError("There is none.")

    monkeypatch.setattr("autopeft.backends.hf.base_model.load_tokenizer", find_none)
    assert load_config(folders("qwen3_5", "classifier"), NUM_LABELS).text_config.pad_token_id == 1


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_takes_images_is_estimated_as_what_is_held_and_never_trained(
    folders: Callable[[str, str], str], bases: Callable[[str, str], BaseModel], kind: str, method: str
) -> None:
    spec = make_recipe_spec(method, batch_size=8)
    costs = HfCostModel(folders("gemma3", kind), num_labels=KINDS[kind], device_kind="cpu", longest_tokens=12)
    real_bytes = count_peak_bytes(build_trial_model(bases("gemma3", kind), spec), spec, make_batch(kind), "cpu")
    assert costs.cost(spec).peak_vram_bytes == pytest.approx(real_bytes, rel=0.01)
