"""A study offers what its kind of model can have, and a resumed one the same."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from autopeft.errors import SpaceError
from autopeft.records import StudyConfig, from_record, to_record
from autopeft.search.plan import Plan, make_plan, restore_space
from autopeft.search.request import Request


def plan(folder: Path, model_type: str, **changed: str) -> Plan:
    model = folder / model_type
    model.mkdir(exist_ok=True)
    (model / "config.json").write_text(json.dumps({"model_type": model_type}))
    request = Request(task="demo", budget="3trials", model=str(model), space="everything", **changed)
    return make_plan(request, studies=folder / "studies")


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")


def test_a_method_for_decoders_is_left_out_on_an_encoder_and_the_plan_says_so(tmp_path: Path) -> None:
    encoder, decoder = (plan(tmp_path, name) for name in ("bert", "llama"))
    assert "adaption_prompt" in decoder.space.methods
    assert "adaption_prompt" not in encoder.space.methods
    (note,) = (note for note in encoder.notes if "adaption_prompt" in note)
    assert "trains decoder models, and this one is of the kind encoder" in note


def test_asking_for_it_by_name_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"leaves nothing of adaption_prompt.*decoder"):
        plan(tmp_path, "bert", methods="lora,adaption_prompt")


def test_a_resumed_study_has_the_space_that_it_began_with(tmp_path: Path) -> None:
    begun = plan(tmp_path, "bert")
    config = from_record(StudyConfig, to_record(begun.config))
    assert restore_space(config) == begun.space
    # As a study from before kinds were recorded: it goes on with all that it offered.
    older = dataclasses.replace(config, model_kind=None)
    assert "model_kind" not in to_record(older)
    assert "adaption_prompt" in restore_space(older).methods


def test_a_kind_that_cannot_be_told_leaves_nothing_out(tmp_path: Path) -> None:
    unknown = plan(tmp_path, "of_next_year")
    assert unknown.config.model_kind is None
    assert "adaption_prompt" in unknown.space.methods
