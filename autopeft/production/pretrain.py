"""Continued pre-training: the recipe's adapter learns the language of a text first, and the task after that.

The decoder keeps its output layer and predicts the next tokens of packed blocks; the adapter alone is trained, also
where the task is a classification, whose head waits. What a method draws and never trains (VeRA's matrices, say) is
drawn from the recipe's seed while the *task's* model is built and taken over from there: both stages hold one adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from autopeft.backends.hf.base_model import (
    BaseModel,
    digest_file,
    find_kind,
    load_base,
    load_config,
    load_tokenizer,
)
from autopeft.backends.hf.data import Batch, plan_batches
from autopeft.backends.hf.steps import Diverged, checkpoint_activations, score_batches
from autopeft.backends.hf.trial import release_memory
from autopeft.errors import DataError, ModelError, SpecError, TrainingError
from autopeft.methods import find_method
from autopeft.production import checkpoints
from autopeft.production.checkpoints import Evaluation
from autopeft.production.files import LocalPlaces, write_local, write_recipe
from autopeft.production.job import Job
from autopeft.production.options import Options, check_options
from autopeft.production.recipe import Recipe, lay_out
from autopeft.production.run import (
    Listener,
    build_beside,
    check_parts,
    explaining_memory,
    find_resume,
    plan_rhythm,
    run_trainer,
)
from autopeft.production.scores import own_forward
from autopeft.production.session import Session, is_sharded, open_session
from autopeft.production.start import PRETRAINED, WEIGHTS, PretrainingResult, adapter_key
from autopeft.production.trainer import RecipeTrainer
from autopeft.records import digest_json, to_record
from autopeft.tasks.spec import TaskSpec
from autopeft.wording import say_count

_HELD_OUT_SHARE = 0.05
_HELD_OUT_MOST = 200
_EPOCHS = 1.0


# --- text


def read_documents(path: Path) -> list[str]:
    """A .jsonl file's column `text`, or a text file's parts between empty lines. Raises DataError."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as exc:
        raise DataError(f"--text names the file '{path}', which does not exist.") from exc
    except (OSError, UnicodeDecodeError) as exc:
        raise DataError(f"--text must be a readable UTF-8 file, but '{path}' is not: {exc}.") from exc
    if path.suffix != ".jsonl":
        documents = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n")]
    else:
        documents = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                documents.append(_read_line(line, f"{path}:{number}"))
    documents = [document for document in documents if document]
    if not documents:
        raise DataError(f"--text must hold text to learn from, but '{path}' is empty.")
    return documents


def _read_line(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as exc:
        raise DataError(f"{where}: every line must hold one JSON object, but: {exc.msg}.") from exc
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise DataError(f"{where}: a row must have text in the column 'text', but is {row!r:.80}.")
    return str(row["text"]).strip()


def pack(tokenizer: Any, documents: Sequence[str], block_tokens: int) -> list[list[int]]:
    """Blocks of equal length: all documents in their order, each followed by the end of sequence, cut where a block is
    full. What is left at the end, less than a block, is dropped."""
    stream: list[int] = []
    for ids in tokenizer(list(documents), add_special_tokens=False, verbose=False)["input_ids"]:
        stream += [*ids, tokenizer.eos_token_id]
    return [stream[i : i + block_tokens] for i in range(0, len(stream) - block_tokens + 1, block_tokens)]


# --- pre-training


@explaining_memory()
def pretrain(
    recipe: Recipe,
    task: TaskSpec,
    places: LocalPlaces,
    *,
    model: str,
    text: Path,
    out: Path,
    options: Options,
    listener: Listener,
    epochs: float | None = None,
    steps: int | None = None,
) -> PretrainingResult | None:
    """Trains the recipe's adapter on the text, one epoch unless said otherwise; goes on where it was interrupted.

    Called once in every process; None in all but the main one. Raises ModelError for what is no decoder.
    """
    check_options(options)
    if options.all_rows:
        raise SpecError("--all-rows is about the task's rows, and --stage pretrain reads a text. Leave it away.")
    _check_decoder(model)
    documents = read_documents(text)
    tokenizer = load_tokenizer(model)
    blocks = pack(tokenizer, documents, task.max_length)
    held_out = min(_HELD_OUT_MOST, math.ceil(len(blocks) * _HELD_OUT_SHARE))
    training, held = blocks[: len(blocks) - held_out], blocks[len(blocks) - held_out :]
    if not training:
        raise DataError(
            f"'{text}' must hold at least two blocks of {task.max_length} tokens, one to learn from and one to be "
            f"scored on, but has {len(blocks)}."
        )
    task_recipe = recipe
    epochs = _EPOCHS if epochs is None and steps is None else epochs
    recipe = lay_out(recipe, num_train=len(training), epochs=epochs, steps=steps)
    session = open_session(recipe, out, options)
    text_digest = hashlib.sha256("\n\n".join(documents).encode()).hexdigest()[:16]
    key = digest_json([recipe.key(), text_digest, "pretrain"])
    resume = find_resume(out, key)
    if session.is_main:
        # The task's, for the stage after this one.
        write_recipe(task_recipe, out)
        write_local(places, out)
    trained = _build(recipe, task, model, session)

    def collate(rows: Sequence[int]) -> Batch:
        return _make_batch([training[i] for i in rows], session.device)

    def measure(model: nn.Module) -> float:
        batches = [
            list(range(i, min(i + recipe.micro_batch, len(held)))) for i in range(0, len(held), recipe.micro_batch)
        ]
        with own_forward(model):
            scores = score_batches(
                model, batches, lambda rows: _make_batch([held[i] for i in rows], session.device), device=session.device
            )
        return float(scores.losses.mean())

    def evaluate(model: nn.Module, step: int) -> Evaluation:
        loss = measure(model)
        # The probability of a token, in the geometric mean: larger is better, and between 0 and 1.
        return Evaluation(step=step, quality=math.exp(-loss), loss=loss)

    try:
        before = measure(trained)
    except Diverged as exc:
        raise TrainingError(
            f"Pre-training begins with a model whose losses are finite, but those of '{recipe.model}' on the text held "
            "out are not. Choose another base model."
        ) from exc
    job = Job(
        recipe=recipe,
        key=key,
        folder=out,
        options=options,
        rhythm=plan_rhythm(recipe, options, num_scored=len(held)),
        batches=plan_batches(
            [task.max_length] * len(training),
            batch_size=recipe.effective_batch,
            num_steps=recipe.steps,
            seed=recipe.seed,
        ),
        collate=collate,
        count_items=len,
        evaluate=evaluate,
        tell=listener.progress,
    )
    check_parts(job, session)
    if session.is_main:
        note = f"{say_count(len(training), 'block')} of {task.max_length} tokens to learn from, {len(held)} held out"
        listener.begin(recipe, from_step=resume.step if resume else 0, notes=[note])
    trainer = RecipeTrainer(trained, session.arguments, job)
    run_trainer(trainer, resume)
    best = checkpoints.find_best(trainer.evaluations)
    assert best is not None
    if best.step != trainer.state.global_step:
        trainer.load_trained(best.step)
    if not session.is_main:
        session.close()
        return None
    digest = _save(checkpoints.read_trained(out, best.step)["trainable"], out)
    result = PretrainingResult(
        recipe_key=adapter_key(task_recipe),
        text_digest=text_digest,
        num_tokens=len(blocks) * task.max_length,
        block_tokens=task.max_length,
        num_blocks=len(training),
        num_held_out=len(held),
        steps=trainer.state.global_step,
        best_step=best.step,
        loss_before=before,
        loss_after=best.loss,
        perplexity_before=math.exp(before),
        perplexity_after=math.exp(best.loss),
        weights_digest=digest,
        seconds=trainer.seconds,
    )
    (out / PRETRAINED).write_text(json.dumps(to_record(result), indent=2) + "\n", encoding="utf-8")
    session.close()
    return result


def _check_decoder(model: str) -> None:
    config = load_config(model, 2)
    kind = find_kind(config)
    if kind != "decoder":
        raise ModelError(
            "--stage pretrain teaches a decoder to go on with a text, as Llama, Qwen or GPT-2 do, but this model is an "
            f"{kind} ({config.model_type}). Train the task at once, without --stage, or choose a decoder in the search."
        )


def _build(recipe: Recipe, task: TaskSpec, model: str, session: Session) -> Any:
    """The decoder with its output layer and the adapter that the task's model would get."""
    spec = recipe.training_spec()
    method = find_method(spec.method)
    if method.stepping is not None:
        raise SpecError(
            f"{method.title} lays a schedule of its own out over one training, so it cannot be split into pre-training "
            "and a task. Choose another trial."
        )
    if method.start is not None and method.start.count_tokens(spec):
        raise SpecError(
            f"{method.title} with these settings begins with the task's rows, and --stage pretrain reads a text first. "
            "Choose another trial."
        )
    if is_sharded():
        raise SpecError("--stage pretrain runs on one process or with DDP, but accelerate was told to shard (FSDP).")
    adapter = None
    if task.num_labels is not None:
        # First and gone again: a GPU need not have room for two bases.
        classifier = load_base(model, num_labels=task.num_labels, bits=spec.bits, device=session.device)
        found = _find_adapter(build_beside(classifier, spec, device=session.device), classifier)
        adapter = {name: tensor.detach().to("cpu", copy=True) for name, tensor in found.items()}
        del classifier, found
        if session.device != "cpu":
            release_memory()
    language = load_base(model, num_labels=None, bits=spec.bits, device=session.device)
    trained = build_beside(language, spec, device=session.device)
    if adapter is not None:
        _take_over(trained, language, adapter)
    if recipe.checkpoint_activations:
        checkpoint_activations(trained)
    return trained


def _take_over(model: nn.Module, base: BaseModel, adapter: Mapping[str, torch.Tensor]) -> None:
    """Everything that came with the classifier's adapter, drawn or trainable, into `model`."""
    own = _find_adapter(model, base)
    if own.keys() != adapter.keys():
        different = sorted(own.keys() ^ adapter.keys())[0]
        raise SpecError(
            f"The same adapter must fit the decoder and the classifier, but {different} is in only one of them. Choose "
            "a trial with other target modules."
        )
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(adapter[name])


def _find_adapter(model: nn.Module, base: BaseModel) -> dict[str, torch.Tensor]:
    """Parameters and buffers that are not the base's own, its head left out, by name."""
    known = {name for name, _ in [*base.model.named_parameters(), *base.model.named_buffers()]}
    found = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        plain = name.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if set(name.split(".")) & set(base.head):
            continue
        if plain not in known or (isinstance(tensor, nn.Parameter) and tensor.requires_grad):
            found[name] = tensor
    return found


def _make_batch(blocks: Sequence[list[int]], device: str) -> Batch:
    ids_BT = torch.tensor(list(blocks), device=device)
    return {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT), "labels": ids_BT.clone()}


def _save(trainable: dict[str, torch.Tensor], out: Path) -> str:
    path = out / WEIGHTS
    save_file({name: tensor.contiguous() for name, tensor in trainable.items()}, path)
    return digest_file(path)
