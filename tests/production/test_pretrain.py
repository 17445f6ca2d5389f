"""Continued pre-training of an adapter, and the task on the same adapter afterwards, on a random Llama."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from listeners import Silent
from safetensors.torch import load_file

from autopeft.backends.hf.base_model import load_base, load_tokenizer
from autopeft.backends.hf.build import build_trial_model
from autopeft.errors import DataError, ModelError, RecordError, SpecError
from autopeft.production.files import LocalPlaces
from autopeft.production.options import Options
from autopeft.production.pretrain import pack, pretrain, read_documents
from autopeft.production.recipe import Recipe, find_task_files
from autopeft.production.run import train
from autopeft.production.start import PretrainingResult, read_start
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import ArchitectureName, tiny_folder, tiny_task

Make = Callable[..., Recipe]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Words that follow each other by rule: word i is followed by word i + 1, mostly."""
    rng = random.Random(0)
    lines = []
    for _ in range(200):
        word = rng.randrange(92)
        words = []
        for _ in range(20):
            words.append(f"word{word}")
            word = (word + 1) % 92 if rng.random() < 0.9 else rng.randrange(92)
        lines.append(" ".join(words))
    path = tmp_path_factory.mktemp("text") / "rules.txt"
    path.write_text("\n\n".join(lines), encoding="utf-8")
    return path


def run(
    recipe: Recipe, text: Path, out: Path, *, architecture: ArchitectureName = "llama", steps: int = 60
) -> PretrainingResult:
    places = LocalPlaces(model=tiny_folder(architecture), files=find_task_files(tiny_task()))
    result = pretrain(
        recipe, parse_task(tiny_task() + "max_length: 32\n", "tiny"), places, model=tiny_folder(architecture),
        text=text, out=out, options=Options(patience=None), listener=Silent(), steps=steps,
    )  # fmt: skip
    assert result is not None
    return result


def train_task(recipe: Recipe, out: Path, start: Path | None) -> dict[str, torch.Tensor]:
    places = LocalPlaces(model=tiny_folder("llama"), files=find_task_files(tiny_task()))
    result = train(
        recipe, parse_task(tiny_task(), "tiny"), places, model=tiny_folder("llama"), out=out,
        options=Options(all_rows=True), listener=Silent(), pretrained=start,
    )  # fmt: skip
    assert result is not None
    (path,) = (out / "adapter").glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("method", ["lora", "vera", "bottleneck"])
def test_an_adapter_learns_the_text_and_is_taken_over_by_the_task(
    make_recipe_for: Make, text: Path, tmp_path: Path, method: str
) -> None:
    recipe = make_recipe_for(method, architecture="llama")
    result = run(recipe, text, tmp_path / "text")
    assert result.perplexity_after < result.perplexity_before
    # A step of no learning rate leaves the adapter as it was taken over, and trains no head.
    still = make_recipe_for(method, architecture="llama", learning_rate=1e-30, steps=1)
    trained = train_task(still, tmp_path / "task", tmp_path / "text")
    start = read_start(tmp_path / "text", still)
    # peft leaves the adapter's name out of its files.
    assert all(torch.equal(tensor, trained[name.replace(".default", "")]) for name, tensor in start.tensors.items())


def test_what_a_method_draws_is_the_same_in_both_stages(make_recipe_for: Make, text: Path, tmp_path: Path) -> None:
    """The classifier draws its head first, so the decoder alone would draw LoRA's A otherwise."""
    recipe = make_recipe_for("lora", architecture="llama", learning_rate=1e-30)
    run(recipe, text, tmp_path, steps=1)
    base = load_base(tiny_folder("llama"), num_labels=2, bits=32, device="cpu")
    expected = dict(build_trial_model(base, recipe.training_spec()).named_parameters())
    start = read_start(tmp_path, recipe)
    # The one step of hardly any learning rate moves what began at zero by 1e-30.
    assert all(torch.allclose(tensor, expected[n].detach(), rtol=0, atol=1e-29) for n, tensor in start.tensors.items())


def test_encoders_are_refused(make_recipe_for: Make, text: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="teaches a decoder"):
        run(make_recipe_for(), text, tmp_path, architecture="bert")


def test_a_method_with_a_schedule_of_its_own_is_refused(make_recipe_for: Make, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="schedule of its own"):
        run(make_recipe_for("adalora", architecture="llama"), text, tmp_path)


def test_a_start_from_the_tasks_rows_is_refused(make_recipe_for: Make, text: Path, tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="begins with the task's rows"):
        run(make_recipe_for(architecture="llama", spec={"settings": {"init": "eva"}}), text, tmp_path)


def test_another_seed_or_method_is_another_adapter(make_recipe_for: Make, text: Path, tmp_path: Path) -> None:
    run(make_recipe_for(architecture="llama"), text, tmp_path, steps=1)
    for other in (make_recipe_for(architecture="llama", seed=1), make_recipe_for("ia3", architecture="llama")):
        with pytest.raises(RecordError, match="another configuration"):
            read_start(tmp_path, other)
    # Another length is not.
    read_start(tmp_path, make_recipe_for(architecture="llama", steps=99))


def test_a_folder_without_pretraining_says_how_to_get_one(make_recipe_for: Make, tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="--stage pretrain"):
        read_start(tmp_path, make_recipe_for())


def test_packing_loses_nothing_but_the_last_part() -> None:
    tokenizer = load_tokenizer(tiny_folder("llama"))
    documents = ["word1 word2 word3", "word4", "word5 word6"]
    blocks = pack(tokenizer, documents, 4)
    end = tokenizer.eos_token_id
    ids = [tokenizer.convert_tokens_to_ids(f"word{i}") for i in range(1, 7)]
    assert blocks == [[*ids[:3], end], [ids[3], end, *ids[4:6]]]


def test_text_is_read_from_both_forms(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\nline\n\n\n  two  \n", encoding="utf-8")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n', encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one\nline", "two"]
    assert read_documents(tmp_path / "a.jsonl") == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.txt", " \n\n ", "is empty"),
        ("b.jsonl", '{"text": "x"}\n{"txt": 1}\n', r"b.jsonl:2: a row must have text"),
        ("b.jsonl", "{", r"b.jsonl:1: every line"),
    ],
)
def test_text_that_is_none_is_refused(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        read_documents(tmp_path / name)


def test_a_text_too_short_to_hold_out_a_block_is_refused(make_recipe_for: Make, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("word1 word2", encoding="utf-8")
    with pytest.raises(DataError, match="at least two blocks"):
        run(make_recipe_for(architecture="llama"), tmp_path / "short.txt", tmp_path / "out")
