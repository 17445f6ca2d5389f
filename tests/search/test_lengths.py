"""Rough speeds for plans: what can be known of a model without loading it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from autopeft.search.lengths import guess_parameters, guess_seconds_per_step, next_rung


@pytest.mark.parametrize(
    ("config", "count"), [({"dtype": "bfloat16"}, 2000), ({"torch_dtype": "float16"}, 2000), ({}, 1000)]
)
def test_a_folders_parameters_are_guessed_from_its_weight_files(
    config: dict[str, str], count: int, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(bytes(3000))
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(bytes(1000))
    # The same weights in another form, and what transformers does not load.
    for name in ("pytorch_model.bin", "consolidated.safetensors", "training.bin"):
        (tmp_path / name).write_bytes(bytes(5000))
    assert guess_parameters(str(tmp_path)) == count


@pytest.mark.parametrize("text", [None, "[]", "{"])
def test_what_cannot_be_guessed_is_taken_for_a_common_size(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    assert guess_parameters(str(tmp_path)) == guess_parameters("some/model") == 100_000_000


def test_no_step_is_free() -> None:
    assert guess_seconds_per_step(100, None, 1, None) == 0.02


def test_the_next_rung_is_the_first_not_reached() -> None:
    assert [next_rung(step, (40, 80, 160)) for step in (0, 40, 41, 80)] == [40, 80, 80, 160]
