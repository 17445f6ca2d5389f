"""Language modelling: what counts, what is cut, what a loss is, and that every method that suits decoders learns."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import make_tiny_bert, make_tiny_llama

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.base_model import BaseModel, describe_base, digest_model, load_base
from autopeft.backends.hf.build import build_context, build_trial_model, count_trainable, trainable_parameters
from autopeft.backends.hf.cost import HfCostModel
from autopeft.backends.hf.data import TaskData
from autopeft.backends.hf.language import IGNORED, match_answer, write_completions
from autopeft.backends.hf.scoring import score_split, summarize
from autopeft.backends.hf.steps import build_optimizer, score_batch, train_step
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import ModelError, SpecError, TaskError
from autopeft.methods import METHODS
from autopeft.records import TrialSpec
from autopeft.tasks.spec import TaskSpec, parse_task

MakeSpec = Callable[..., TrialSpec]
PAD, BEGIN, END = 0, 1, 2
DECODER_METHODS = [m.name for m in METHODS.values() if "decoder" in m.models and m.searched and m.name != "bitfit"]
"""All but BitFit: a Llama has no biases."""
HANDFUL = ("lora", "full", "bottleneck", "prefix_tuning", "prompt_tuning", "ia3", "adaption_prompt")


def write_text(folder: Path, **keys: Any) -> str:
    """A task file's text, and its rows in the folder."""
    letters = "abcdefghijklmnop"
    rows = [
        {"meaning": f"name : {n} | area : {letters[i % 7]}", "text": f"{n} is in the {letters[i % 7]} ."}
        for i, n in enumerate(a for a in letters for _ in range(4))
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"name": "places", "title": "Places", "kind": "generation", "prompt": "{meaning}\n"}
    values |= {"completion": "{text}", "scorer": "token_accuracy", "files": {"train": str(folder / "rows.jsonl")}}
    return json.dumps(values | keys)


def write_task(folder: Path, **keys: Any) -> TaskSpec:
    return parse_task(write_text(folder, **keys), "places")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="module")
def base(llama: str) -> BaseModel:
    return load_base(llama, num_labels=None, bits=32, device="cpu")


@pytest.fixture(scope="module")
def data(llama: str, tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return TaskData(write_task(tmp_path_factory.mktemp("places")), model=llama, data_dir=None, split_seed=0)


# --- tokens


def test_prompt_and_completion_become_one_sequence_of_which_the_completion_counts(data: TaskData) -> None:
    example = data.splits.train[0]
    feature = data.train.features[0]
    read, written = (
        data.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (example.text, example.completion)
    )
    assert feature["input_ids"] == [BEGIN, *read, *written, END]
    assert feature["labels"] == [IGNORED] * (1 + len(read)) + [*written, END]
    assert data.train.prompt_ids(0) == [BEGIN, *read]


def test_a_tokenizer_that_puts_nothing_in_front_is_left_so(tmp_path: Path) -> None:
    model = make_tiny_llama(tmp_path, begins=False)
    ids = TaskData(write_task(tmp_path), model=model, data_dir=None, split_seed=0).train.features[0]["input_ids"]
    assert BEGIN not in ids
    assert ids[-1] == END


def test_a_long_example_loses_the_left_of_its_prompt_first(llama: str, tmp_path: Path, data: TaskData) -> None:
    whole = data.train.features[0]
    completion = [label for label in whole["labels"] if label != IGNORED]
    for room in (0, 1, 3):
        task = write_task(tmp_path, max_length=1 + room + len(completion))
        cut = TaskData(task, model=llama, data_dir=None, split_seed=0).train.features[0]
        kept = whole["input_ids"][len(whole["input_ids"]) - room - len(completion) :]
        assert cut["input_ids"] == [BEGIN, *kept]
        assert cut["labels"] == [IGNORED] * (1 + room) + completion


def test_a_completion_longer_than_everything_loses_its_end(llama: str, tmp_path: Path, data: TaskData) -> None:
    completion = [label for label in data.train.features[0]["labels"] if label != IGNORED]
    cut = TaskData(write_task(tmp_path, max_length=4), model=llama, data_dir=None, split_seed=0).train.features[0]
    assert cut["input_ids"] == [BEGIN, *completion[:3]]
    assert END not in cut["labels"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        (
            {"prompt": "a " * 150 + "{meaning}", "max_length": 200},
            r"takes 128 tokens, .*has up to 165\. .*max_length\.",
        ),
        ({"scorer": "exact_match", "max_new_tokens": 125}, r"takes 128 tokens, .*has up to 13\d\..*or max_new_tokens"),
    ],
)
def test_what_does_not_fit_into_the_model_is_refused(
    keys: dict[str, Any], words: str, llama: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=words):
        TaskData(write_task(tmp_path, **keys), model=llama, data_dir=None, split_seed=0)


def test_padding_counts_for_nothing(data: TaskData) -> None:
    lengths = data.train.lengths()
    shortest, longest = lengths.index(min(lengths)), lengths.index(max(lengths))
    batch = data.collate(data.train, [shortest, longest], "cpu")
    padded = batch["attention_mask"][0] == 0
    if min(lengths) < max(lengths):
        assert padded.sum() == max(lengths) - min(lengths)
    assert (batch["labels"][0][padded] == IGNORED).all()
    assert {name: tuple(t.shape) for name, t in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), (2, max(lengths))
    )


# --- losses and scores


def reference(base: BaseModel, feature: dict[str, list[int]]) -> tuple[float, float]:
    """(mean loss, share predicted) of one row alone, token by token."""
    ids = torch.tensor([feature["input_ids"]])
    with torch.no_grad():
        log_probabilities_TV = base.model.eval()(input_ids=ids).logits[0].log_softmax(-1)
    losses, hits = [], []
    for position, label in enumerate(feature["labels"]):
        if label != IGNORED and position > 0:
            losses.append(-float(log_probabilities_TV[position - 1, label]))
            hits.append(int(log_probabilities_TV[position - 1].argmax()) == label)
    return sum(losses) / len(losses), sum(hits) / len(hits)


def test_losses_and_scores_are_means_over_the_tokens_of_each_completion(base: BaseModel, data: TaskData) -> None:
    # In a padded batch, in any order, they are what each row has alone.
    scores = score_split(base.model, data, data.validation, batch_size=3, device="cpu")
    for index, feature in enumerate(data.validation.features):
        loss, share = reference(base, feature)
        assert scores.losses[index] == pytest.approx(loss, abs=1e-5)
        assert scores.predictions[index] == pytest.approx(share, abs=1e-6)
    summary = summarize(data.task, data.validation, scores)
    assert summary.quality == pytest.approx(float(scores.predictions.mean()))
    assert summary.loss == pytest.approx(float(scores.losses.mean()))
    assert summary.quality_sd == pytest.approx(float(np.std(scores.predictions, ddof=1)))


@pytest.mark.parametrize("method", ["prompt_tuning", "p_tuning"])
def test_soft_prompts_in_front_shift_no_score(
    method: str, base: BaseModel, data: TaskData, make_spec: MakeSpec
) -> None:
    model = build_trial_model(base, make_spec(method)).eval()
    batch = data.collate(data.train, [0, 1, 2], "cpu")
    with torch.no_grad():
        wanted = float(model(**{name: tensor[:1] for name, tensor in batch.items()}).loss)
        losses_B, _ = score_batch(model, dict(batch), device="cpu")
    assert float(losses_B[0]) == pytest.approx(wanted, abs=1e-5)


def test_micro_batches_add_up_to_the_mean_over_all_tokens(base: BaseModel, data: TaskData, make_spec: MakeSpec) -> None:
    batch = data.collate(data.train, [0, 1, 2, 3], "cpu")
    # One row counts for less, so that a mean of means would be another number.
    batch["labels"][0, :-2] = IGNORED
    batch["labels"][1, :-2] = IGNORED
    gradients, losses = [], []
    for micro_batches in (1, 2):
        spec = make_spec("lora")
        model = build_trial_model(base, spec)
        kept: list[torch.Tensor] = []
        keep = lambda model=model, kept=kept: kept.extend(p.grad.clone() for p in trainable_parameters(model).values())  # noqa: E731
        loss = train_step(
            model, build_optimizer(model, spec), dict(batch), learning_rate=0.0, device="cpu", after_step=keep,
            micro_batches=micro_batches,
        )  # fmt: skip
        gradients.append(torch.cat([tensor.flatten() for tensor in kept]))
        losses.append(float(loss))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-5, rtol=1e-4)


# --- writing


def write_slowly(model: Any, prompt: list[int], most: int) -> list[int]:
    """Token by token, without a cache and without padding."""
    ids = list(prompt)
    for _ in range(most):
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == END:
            break
    return ids[len(prompt) :]


@pytest.mark.parametrize("method", ["lora", "bottleneck", "prefix_tuning", "prompt_tuning", "adaption_prompt", "ia3"])
def test_writing_in_batches_with_a_cache_is_writing_token_by_token(
    method: str, base: BaseModel, data: TaskData, make_spec: MakeSpec
) -> None:
    model = build_trial_model(base, make_spec(method))
    with torch.no_grad():
        for parameter in trainable_parameters(model).values():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    model.eval()
    whole = data.validation.prompt_ids(0)
    prompts = [whole, data.validation.prompt_ids(1)[-4:], [BEGIN, 7], whole[-4:]]
    written = write_completions(model, data.tokenizer, prompts, batch_size=2, max_new_tokens=8, device="cpu")
    alone = [write_slowly(model, prompt, 8) for prompt in prompts]
    assert written == data.tokenizer.batch_decode(alone, skip_special_tokens=True)
    assert any(written)


@pytest.mark.parametrize(
    ("answer", "written", "completion", "same"),
    [
        (None, "it is  7\n", "it is 7", True),
        (None, "it is 7 .", "it is 7", False),
        ("#### *(.+)", "so\n#### 1,080", "2 * 540\n#### 1080", True),
        ("#### *(.+)", "#### 7\n#### 8", "#### 8", False),
        ("#### *(.+)", "the answer is 8", "#### 8", False),
    ],
)
def test_answers_match_but_for_space_and_commas_in_numbers(
    answer: str | None, written: str, completion: str, same: bool, tmp_path: Path
) -> None:
    task = write_task(tmp_path, scorer="exact_match", **({"answer": answer} if answer else {}))
    assert match_answer(task, written, completion) is same


def test_exact_match_is_one_for_what_the_model_writes_itself(
    base: BaseModel, data: TaskData, llama: str, tmp_path: Path
) -> None:
    task = write_task(tmp_path, scorer="exact_match", max_new_tokens=6)
    own = TaskData(task, model=llama, data_dir=None, split_seed=0)
    prompts = [own.validation.prompt_ids(0)]
    limits: dict[str, Any] = {"batch_size": 2, "max_new_tokens": 6, "device": "cpu"}
    texts = write_completions(base.model.eval(), own.tokenizer, prompts, **limits)
    own.validation.completions[0] = texts[0]
    scores = score_split(base.model, own, own.validation, batch_size=2, device="cpu")
    assert scores.predictions[0] == 1
    assert set(scores.predictions.tolist()) <= {0.0, 1.0}
    assert summarize(task, own.validation, scores).quality_sd is None


# --- methods


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[] if m in HANDFUL else pytest.mark.slow) for m in DECODER_METHODS]
)
def test_a_method_for_decoders_learns_to_write(
    method: str, base: BaseModel, data: TaskData, make_spec: MakeSpec
) -> None:
    spec = make_spec(method, max_steps=12)
    before = digest_model(base.model)
    model = build_trial_model(base, spec)
    assert count_trainable(model, base.head).head == 0
    assert count_trainable(model, base.head).adapter > 0
    optimizer = build_optimizer(model, spec)
    batch = data.collate(data.train, list(range(8)), "cpu")
    losses = [
        float(train_step(model, optimizer, dict(batch), learning_rate=spec.learning_rate, device="cpu"))
        for _ in range(12)
    ]
    assert all(map(math.isfinite, losses))
    assert losses[-1] < losses[0]
    assert digest_model(base.model) == before


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_language_model_keeps_its_output_layer_and_trains(
    bits: Any, llama: str, data: TaskData, make_spec: MakeSpec
) -> None:
    quantized = load_base(llama, num_labels=None, bits=bits, device="cpu")
    assert type(quantized.model.lm_head) is torch.nn.Linear
    assert type(quantized.model.model.layers[0].mlp.up_proj) is not torch.nn.Linear
    spec = make_spec("lora", bits=bits)
    model = build_trial_model(quantized, spec)
    optimizer = build_optimizer(model, spec)
    batch = data.collate(data.train, list(range(8)), "cpu")
    losses = [float(train_step(model, optimizer, dict(batch), learning_rate=5e-3, device="cpu")) for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_output_layer_is_a_target_only_by_name(llama: str, make_spec: MakeSpec) -> None:
    described = describe_base(llama, num_labels=None, bits=32)
    assert described.head == ()
    everywhere = build_context(described, make_spec("lora", target_modules="all-linear")).targets
    named = build_context(described, make_spec("lora", target_modules="names:lm_head,q_proj")).targets
    assert "lm_head" not in everywhere
    assert sorted(named) == ["lm_head", "q_proj"]
    with pytest.raises(SpecError):
        build_context(described, make_spec("lora", target_modules="re:lm_head"))


def test_an_encoder_is_refused_for_generation(tmp_path: Path) -> None:
    model = make_tiny_bert(tmp_path)
    with pytest.raises(ModelError, match=r"needs a decoder.*bert\) reads text and cannot write"):
        load_base(model, num_labels=None, bits=32, device="cpu")


# --- a trial, and its cost


def make_backend(folder: Path, llama: str) -> HfBackend:
    setup = WorkerSetup(
        backend="hf", model=llama, task=write_text(folder), data_dir=None, split_seed=0, study_dir=str(folder),
        device="cpu", threads=1,
    )  # fmt: skip
    return HfBackend(setup)


def test_the_untrained_base_is_scored_as_it_is_and_training_beats_it(
    llama: str, tmp_path: Path, make_spec: MakeSpec
) -> None:
    backend = make_backend(tmp_path, llama)
    spec = make_spec("full", max_steps=40, learning_rate=3e-3)
    head = dataclasses.replace(spec, method="head")
    common: dict[str, Any] = {"trial": 0, "from_step": 0}
    untrained = backend.run(Stretch(job=1, spec=head, purpose="baseline", to_step=0, score_test=True, **common), print)
    trained = backend.run(Stretch(job=2, spec=spec, purpose="search", to_step=40, save=True, **common), print)
    assert isinstance(untrained, Finished)
    assert isinstance(trained, Finished)
    assert untrained.test is not None
    assert untrained.checkpoint is None
    assert trained.validation.loss < 0.7 * untrained.validation.loss
    assert trained.validation.quality > untrained.validation.quality
    with np.load(tmp_path / trained.scores_file) as arrays:
        shares = arrays["validation_predictions"]
    assert shares.dtype == np.float32
    assert float(shares.mean()) == pytest.approx(trained.validation.quality)


def test_the_memory_of_logits_is_in_the_estimate(tmp_path: Path, llama: str, make_spec: MakeSpec) -> None:
    import transformers

    # 16 x 32 positions of 8,192 words in float32 are 16 MiB; the step holds logits, their gradient and more.
    config = transformers.AutoConfig.from_pretrained(llama, vocab_size=8192)
    config.save_pretrained(tmp_path)
    estimates = {
        labels: HfCostModel(str(tmp_path), num_labels=labels, device_kind="cpu", longest_tokens=32).estimate(
            make_spec("lora")
        )
        for labels in (None, 2)
    }
    logits_bytes = 16 * 32 * 8192 * 4
    assert estimates[None].activation_bytes > estimates[2].activation_bytes + 2 * logits_bytes
    assert estimates[None].head_parameters == 0
    assert estimates[2].head_parameters == 2 * 64


def test_the_estimate_is_what_a_real_step_counts(llama: str, base: BaseModel, make_spec: MakeSpec) -> None:
    from autopeft.backends.hf.memory import Rehearsal, find_peak

    costs = HfCostModel(llama, num_labels=None, device_kind="cpu", longest_tokens=24)
    spec = make_spec("lora")
    batch = {name: torch.ones(16, 24, dtype=torch.int64) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.ones(16, 24, dtype=torch.int64)
    # Without padding, which an estimate cannot count on, attention needs no mask.
    batch["attention_mask"][-1, -1] = 0
    real = Rehearsal(build_trial_model(base, spec), spec, on_gpu=False)
    assert costs.estimate(spec).peak_bytes == find_peak(real.train(dict(batch))).total
    assert costs.estimate(spec).trainable_parameters == count_trainable(build_trial_model(base, spec), ()).adapter


def test_the_untrained_base_costs_what_scoring_it_does(llama: str, make_spec: MakeSpec) -> None:
    cost = HfCostModel(llama, num_labels=None, device_kind="cpu", longest_tokens=24).cost(make_spec("head"))
    assert (cost.trainable_parameters, cost.head_parameters) == (0, 0)
    assert cost.peak_vram_bytes == cost.scoring_vram_bytes
