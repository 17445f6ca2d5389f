"""Exports of chosen trials on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chosen_trials import draw_recipe, write_rows
from tiny_models import make_tiny_llama

from autopeft.export.bundle import Bundle, complete_bundle
from autopeft.records import TrialSpec
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import ArchitectureName, tiny_folder


@pytest.fixture
def bundle_of(tmp_path: Path) -> Callable[..., Bundle]:
    """A bundle on a tiny BERT, or another classifier, or, for generation, a tiny Llama, with rows of its own."""

    def make(
        spec: TrialSpec, kind: str = "classification", classifier: ArchitectureName = "bert", **changes: Any
    ) -> Bundle:
        text = write_rows(tmp_path, kind)
        task = parse_task(text, "tiny")
        recipe, _ = draw_recipe(spec, kind, **changes)
        splits = load_splits(task, None, seed=0)
        model = tiny_folder(classifier) if kind == "classification" else make_tiny_llama(tmp_path / "llama")
        return complete_bundle(recipe, task, text, splits, model)

    return make
