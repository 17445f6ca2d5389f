"""A language model that was trained, merged and verified: no head, the base's own names, and text to write."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from finished_folders import make_recipe
from fresh_process import one_process  # noqa: F401 (a fixture)
from test_merge import keys_of

from autopeft.backends.hf.base_model import digest_file, load_base
from autopeft.backends.hf.build import build_trial_model, count_trainable
from autopeft.backends.hf.data import TaskData
from autopeft.backends.hf.saved import save_adapter
from autopeft.backends.hf.scoring import score_split, summarize
from autopeft.backends.hf.steps import build_optimizer, train_step
from autopeft.backends.hf.trial import digest_weights
from autopeft.cli.main import main
from autopeft.methods import METHODS
from autopeft.production.card import make_card, write_card
from autopeft.production.files import (
    LocalPlaces,
    TrainingResult,
    read_recipe,
    read_result,
    write_local,
    write_recipe,
    write_result,
)
from autopeft.production.finish import _make_generation_config
from autopeft.production.finished import open_finished
from autopeft.production.merge import merge
from autopeft.production.recipe import find_task_files
from autopeft.production.verify import verify
from autopeft.records import Bits
from autopeft.tasks.spec import parse_task
from autopeft.testing.subject import Case
from autopeft.testing.tiny_models import tiny_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]

NUM_STEPS = 60


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers that writes, with tied embeddings, in bfloat16 as most are published."""
    folder = tmp_path_factory.mktemp("llama") / "base"
    config = transformers.AutoConfig.from_pretrained(tiny_folder("llama"))
    config.tie_word_embeddings = True
    config.architectures = ["LlamaForCausalLM"]
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    # A penalty, as some chat models have: a word of the prompt would not be written again.
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=1, bos_token_id=3, temperature=None, repetition_penalty=1.9
    )
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_folder("llama")).save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(b"a sentencepiece model")
    return folder


def make_finished(folder: Path, llama: Path, method: str, scorer: str, bits: Bits = 32) -> Path:
    """Learns to say the first of two words."""
    rows = folder.parent / "rows"
    rows.mkdir(parents=True)
    for split, count in (("train", 96), ("test", 24)):
        lines = [json.dumps({"q": f"word{i % 8} word{(i * 5) % 90}", "a": f"word{i % 8}"}) for i in range(count)]
        (rows / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = (
        'name: tiny\ntitle: First words\nkind: generation\nprompt: "{q} "\ncompletion: "{a}"\n'
        f"scorer: {scorer}\n"
        + ("max_new_tokens: 4\n" if scorer == "exact_match" else "")
        + f"files: {{train: {rows}/train.jsonl, test: {rows}/test.jsonl}}\n"
    )
    task = parse_task(text, "tiny")
    spec = dataclasses.replace(Case(METHODS[method], "llama", bits).spec(), max_steps=NUM_STEPS, learning_rate=1e-2)
    data = TaskData(task, model=str(llama), data_dir=None, split_seed=0)
    base = load_base(str(llama), num_labels=None, bits=bits, device="cpu")
    model = build_trial_model(base, spec)
    optimizer = build_optimizer(model, spec)
    for step in range(NUM_STEPS):
        batch = data.collate(data.train, range(8 * (step % 8), 8 * (step % 8) + 8), "cpu")
        train_step(model, optimizer, batch, learning_rate=spec.learning_rate, device="cpu")
    scores = score_split(model, data, data.test, batch_size=8, device="cpu")
    score = summarize(task, data.test, scores)
    model.eval()
    save_adapter(model, spec, folder / "adapter")
    data.tokenizer.save_pretrained(folder / "adapter")
    np.savez(folder / "scores.npz", test_losses=scores.losses, test_predictions=scores.predictions)
    recipe = make_recipe(spec, text, model="local:llama", num_test=score.num_examples)
    prediction = dataclasses.replace(recipe.prediction, scorer=scorer)
    recipe = dataclasses.replace(recipe, prediction=prediction)
    write_recipe(recipe, folder)
    write_local(LocalPlaces(model=str(llama), files=find_task_files(text)), folder)
    files = sorted((folder / "adapter").glob("*.safetensors"))
    counts = count_trainable(model, base.head)
    write_result(
        TrainingResult(
            task_name="tiny", model=recipe.model, scorer=scorer, steps=NUM_STEPS, best_step=NUM_STEPS,
            stopped_early=False, num_train=80, num_validation=9, num_test=score.num_examples, validation_quality=None,
            validation_loss=None, test_quality=score.quality, test_standard_error=0.05, test_loss=score.loss,
            prediction=prediction, agreement=None, train_seconds=1.0, peak_bytes=None,
            trainable_parameters=counts.adapter, head_parameters=0, saved_as="peft",
            adapter_bytes=sum(path.stat().st_size for path in files), processes=1, device="a CPU",
            scores_file="scores.npz", scores_digest=digest_file(folder / "scores.npz"),
            data_digest=data.splits.digest, model_digest=digest_weights(str(llama)),
            weights_digests={path.name: digest_file(path) for path in files}, autopeft="0.1.0", packages={},
            finished_at="2026-01-01T00:00:00+00:00",
        ),
        folder,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("method", "scorer"),
    [("lora", "exact_match"), ("lora", "token_accuracy"), ("prompt_tuning", "exact_match")],
)
def test_a_language_models_score_is_reproduced(method: str, scorer: str, llama: Path, tmp_path: Path) -> None:
    folder = make_finished(tmp_path / "done", llama, method, scorer)
    found = verify(open_finished(folder))
    assert found.quality == pytest.approx(found.recorded_quality, abs=1e-6)
    assert found.loss == pytest.approx(found.recorded_loss, abs=1e-4)
    assert found.num_changed == 0
    if method == "lora":
        # Else a model that writes nothing would be reproduced as well.
        assert found.quality > 0.2


def test_a_whole_model_says_where_it_ends(llama: Path, tmp_path: Path) -> None:
    base = load_base(str(llama), num_labels=None, bits=32, device="cpu")
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    config = _make_generation_config(base.model, tokenizer, str(llama))
    assert (config.eos_token_id, config.bos_token_id, config.repetition_penalty) == (1, 3, 1.9)
    assert config.pad_token_id == tokenizer.pad_token_id
    for name, text in (("silent", None), ("refused", '{"do_sample": false, "temperature": 0.5, "eos_token_id": 7}')):
        folder = shutil.copytree(llama, tmp_path / name)
        (folder / "generation_config.json").unlink()
        if text is not None:
            (folder / "generation_config.json").write_text(text)
        config = _make_generation_config(base.model, tokenizer, str(folder))
        assert config.eos_token_id is not None
        config.save_pretrained(folder)


def test_merged_it_has_the_bases_own_layout(llama: Path, tmp_path: Path) -> None:
    finished = open_finished(make_finished(tmp_path / "done", llama, "lora", "token_accuracy"))
    merged = merge(finished, tmp_path / "model")
    assert merged.dtype == "bfloat16"
    assert merged.difference <= 1e-4 * max(1.0, merged.largest_logit)
    assert merged.written_difference > 0
    # What vLLM, TGI and llama.cpp's converter go by: names, types, architecture, tied weights, files.
    assert keys_of(tmp_path / "model") == keys_of(llama)
    assert "lm_head.weight" not in keys_of(llama)
    config, of_base = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "model", llama))
    for name in ("architectures", "tie_word_embeddings", "vocab_size", "dtype", "model_type", "use_cache"):
        assert config.get(name) == of_base.get(name), name
    assert (tmp_path / "model/tokenizer.model").read_bytes() == b"a sentencepiece model"
    generation = [json.loads((f / "generation_config.json").read_text()) for f in (tmp_path / "model", llama)]
    assert generation[0]["eos_token_id"] == generation[1]["eos_token_id"]


@pytest.mark.parametrize("bits", [4, 8])
def test_trained_on_a_rounded_base_it_is_verified_and_merged(
    bits: Bits, llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_finished(tmp_path / "done", llama, "lora", "exact_match", bits)
    found = verify(open_finished(folder))
    assert found.quality > 0.2
    assert found.num_changed == 0
    assert found.loss == pytest.approx(found.recorded_loss, abs=2e-3)
    write_card(folder, read_recipe(folder), read_result(folder), None)
    assert main(["merge", str(folder), "--out", str(tmp_path / "model")]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    (loss,) = [line for line in captured.out.splitlines() if line.startswith("dequantizing")]
    moved = float(loss.split("at most ")[1].split(":")[0])
    # NF4 weights are multiplied in float32 as they are; int8 multiplies rounded activations too (LLM.int8).
    assert 0 <= moved <= (1e-3 if bits == 4 else 1.0)
    assert keys_of(tmp_path / "model") == keys_of(llama)
    assert "It was trained on a quantized base" in (tmp_path / "model/README.md").read_text()


def test_its_card_is_that_of_a_language_model(llama: Path, tmp_path: Path) -> None:
    folder = make_finished(tmp_path / "done", llama, "lora", "token_accuracy")
    text = make_card(folder, read_recipe(folder), read_result(folder), None)
    assert "pipeline_tag: text-generation" in text
    assert "AutoModelForCausalLM" in text
    assert "num_labels" not in text
    code: Any = text.split("```python\n")[1].split("```")[0]
    compile(code, "README.md", "exec")
