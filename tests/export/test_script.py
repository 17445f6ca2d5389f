"""The stand-alone script trains what the trial trained: same rows, same drawing, same steps."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.trial import HfBackend
from autopeft.export import refuse_export
from autopeft.export.bundle import Bundle
from autopeft.export.trainer import render_script, write
from autopeft.methods import METHODS
from autopeft.methods.faults import make_recipe_spec
from autopeft.records import TrialSpec

STEPS = 6


def run_script(bundle: Bundle, folder: Path, *arguments: str) -> dict[str, np.ndarray]:
    for name, text in write(bundle).files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    command = [sys.executable, "train.py", *arguments]
    # Nothing of ours must be within its reach.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    with np.load(folder / "output" / "scores.npz") as scores:
        return dict(scores)


def run_trial(bundle: Bundle, folder: Path) -> dict[str, np.ndarray]:
    setup = WorkerSetup(
        backend="hf", model=bundle.model, task=bundle.task_text, data_dir=None, split_seed=0, study_dir=str(folder),
        device="cpu", threads=1,
    )  # fmt: skip
    spec = bundle.recipe.spec
    stretch = Stretch(
        job=0, trial=0, spec=spec, purpose="confirm", from_step=0, to_step=spec.max_steps, score_test=True
    )
    ended = HfBackend(setup).run(stretch, lambda event: None)
    assert isinstance(ended, Finished), ended
    with np.load(folder / ended.scores_file) as scores:
        return dict(scores)


def make_spec(method: str, bits: int | None = None, **settings: object) -> TrialSpec:
    spec = make_recipe_spec(METHODS[method], device_kind="cpu", bits=bits)  # type: ignore[arg-type]
    return dataclasses.replace(
        spec, max_steps=STEPS, batch_size=8, optimizer="adamw", seed=5, weight_decay=0.01,
        settings={**spec.settings, **settings},
    )  # fmt: skip


def check_same(bundle: Bundle, tmp_path: Path) -> None:
    # Losses are kept as float16, of three digits.
    mine, theirs = run_script(bundle, tmp_path / "export"), run_trial(bundle, tmp_path / "study")
    for split in ("validation", "test"):
        np.testing.assert_allclose(mine[f"{split}_losses"], theirs[f"{split}_losses"], rtol=2e-3, atol=2e-4)
    assert (tmp_path / "export" / "output" / "results.json").is_file()


def test_the_script_ends_where_the_trial_ended(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    check_same(bundle_of(make_spec("lora")), tmp_path)


@pytest.mark.slow
def test_the_script_classifies_from_each_rows_last_token_as_the_trial_did(
    bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    # A prompt's embeddings hide from transformers where a decoder's row ends.
    check_same(bundle_of(make_spec("prompt_tuning"), classifier="llama"), tmp_path)


def test_the_script_ends_where_a_trial_on_text_ended(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    check_same(bundle_of(make_spec("lora", lr_ratio_b=4.0, dropout=0.1), "generation"), tmp_path)


@pytest.mark.slow
def test_the_script_scores_what_the_model_writes(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = bundle_of(make_spec("lora"), "generation")
    bundle = dataclasses.replace(bundle, task=dataclasses.replace(bundle.task, scorer="exact_match", max_new_tokens=4))
    scores = run_script(bundle, tmp_path)
    assert set(np.unique(scores["test_predictions"])) <= {0, 1}
    assert (tmp_path / "output/adapter/adapter_config.json").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["classification", "generation"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_that_the_script_takes_ends_where_the_trial_ended(
    method: str, kind: str, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    from autopeft.errors import AutopeftError

    if kind == "generation" and method in ("bitfit", "head"):
        pytest.skip("it trains nothing of a Llama that writes text")
    bits = 4 if method == "qlora" else None
    try:
        bundle = bundle_of(make_spec(method, bits), kind)
    except AutopeftError as exc:
        pytest.skip(f"not on this model: {exc}")
    if refuse_export("trainer", bundle.recipe, bundle.task) is not None:
        pytest.skip("refused")
    check_same(bundle, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_the_script_quantizes_as_the_trial_did(
    bits: int, kind: str, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    check_same(bundle_of(make_spec("lora", bits), kind), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_an_adapter_that_began_in_the_weights_is_saved_for_the_untouched_base(
    init: str, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    check_same(bundle_of(make_spec("lora", init=init)), tmp_path)
    config = json.loads((tmp_path / "export/output/adapter/adapter_config.json").read_text())
    assert (config["r"], config["init_lora_weights"]) == (16, True)


@pytest.mark.slow
def test_a_step_divided_into_micro_batches_is_the_same_step(bundle_of: Callable[..., Bundle], tmp_path: Path) -> None:
    bundle = bundle_of(make_spec("lora"), "generation")
    whole = run_script(bundle, tmp_path / "whole")
    parts = run_script(bundle, tmp_path / "parts", "--micro-batch", "2")
    np.testing.assert_allclose(whole["test_losses"], parts["test_losses"], rtol=1e-3)


@pytest.mark.parametrize("kind", ["classification", "generation"])
def test_the_script_is_python_without_long_lines(kind: str, bundle_of: Callable[..., Bundle]) -> None:
    script = render_script(bundle_of(make_spec("lora"), kind))
    compile(script, "train.py", "exec")
    imported = {
        alias.name for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Import) for alias in node.names
    }
    assert "autopeft" not in imported
    assert max(map(len, script.splitlines())) <= 120


def test_the_script_trains_no_part_that_texts_do_not_pass_through(bundle_of: Callable[..., Bundle]) -> None:
    bundle = bundle_of(make_spec("full"))
    assert "not name.startswith" not in render_script(bundle)
    other = bundle.context._replace(unread=("model.vision_tower.", "model.multi_modal_projector."))
    script = render_script(dataclasses.replace(bundle, context=other))
    assert ast.parse(script)
    assert 'not name.startswith(tuple(["model.vision_tower.", "model.multi_modal_projector."]))' in script
