"""A recipe's life, top to bottom: load, build, train, keep the best, score, save."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from autopeft.backends.hf.base_model import BaseModel, load_base
from autopeft.backends.hf.build import build_trial_model, count_trainable
from autopeft.backends.hf.data import TaskData, TokenizedSplit, plan_batches
from autopeft.backends.hf.row_start import start_from_rows
from autopeft.backends.hf.saved import copy_adapter
from autopeft.backends.hf.steps import Diverged, SplitScores, checkpoint_activations
from autopeft.backends.hf.trial import digest_weights, is_out_of_memory, release_memory
from autopeft.errors import ModelError, RecordError, SpecError, TrainingError
from autopeft.methods import find_method
from autopeft.methods.full import check_trains
from autopeft.production import checkpoints
from autopeft.production.checkpoints import CheckpointMeta, Evaluation
from autopeft.production.files import LocalPlaces, TrainingResult, write_local, write_recipe, write_result
from autopeft.production.finish import ADAPTER, Built, make_result, save_weights
from autopeft.production.job import Job, Progress, Rhythm
from autopeft.production.latency import measure_inference
from autopeft.production.options import Options, check_options
from autopeft.production.recipe import Recipe
from autopeft.production.scores import join_splits, own_forward, score_everywhere
from autopeft.production.session import Session, find_peak, is_sharded, open_session
from autopeft.production.start import read_start
from autopeft.production.trainer import RecipeTrainer
from autopeft.records import TrialSpec, digest_json
from autopeft.tasks.scorers import score_predictions
from autopeft.tasks.spec import TaskSpec

EVALUATION_SHARE = 0.25
"""Scoring search-validation takes at most so much of what the steps take, in passes over a row."""


class Listener(Protocol):
    """What the main process tells of a training."""

    def begin(self, recipe: Recipe, *, from_step: int, notes: Sequence[str]) -> None: ...

    def progress(self, progress: Progress) -> None: ...

    def scoring(self) -> None: ...


@contextlib.contextmanager
def explaining_memory() -> Iterator[None]:
    """Raises TrainingError in place of PyTorch's own where there is too little memory."""
    try:
        yield
    except (MemoryError, RuntimeError) as exc:
        if not is_out_of_memory(exc):
            raise
        said = str(exc).split(". GPU")[0] or type(exc).__name__
        raise TrainingError(
            f"Training must fit into the device's memory, but ran out of it: {said:.200}. Make "
            "room (nvidia-smi lists who uses a GPU) and give the same command again, which goes on from the last "
            "checkpoint; or begin anew under another --out with a smaller --micro-batch or --gradient-checkpointing."
        ) from exc


@explaining_memory()
def train(
    recipe: Recipe,
    task: TaskSpec,
    places: LocalPlaces,
    *,
    model: str,
    out: Path,
    options: Options,
    listener: Listener,
    pretrained: Path | None = None,
) -> TrainingResult | None:
    """Trains and scores; goes on where an earlier call with the same recipe and folder ended.

    `task` has its data files where they are, `model` is what transformers loads, `pretrained` is the folder of a
    finished `pretrain` to start the adapter from, as `recipe.pretrained` says. Called once in every process;
    returns None in all but the main one. Raises a UsageError for what cannot be, before anything is written, and
    TrainingError where training diverges.
    """
    check_options(options)
    check_trains(find_method(recipe.spec.method), task.kind)
    session = open_session(recipe, out, options)
    data = TaskData(task, model=model, data_dir=places.data_dir, split_seed=recipe.split_seed)
    notes = _check_identity(recipe, data, model, session)
    train_split = join_splits(data.train, data.validation) if options.all_rows else data.train
    rows = data.rows(train_split, session.device)
    start = None if pretrained is None else read_start(pretrained, recipe)
    key = digest_json([recipe.key(), data.splits.digest, options.all_rows])
    resume = find_resume(out, key)
    if recipe.pretrained is not None and start is None and resume is None:
        raise RecordError(
            "The recipe begins with a pre-trained adapter, and there is no checkpoint yet that holds it. Name its "
            "pre-training's folder with --from DIR."
        )
    if session.is_main:
        write_recipe(recipe, out)
        write_local(places, out)
    built = _build(recipe, task, model, session)
    if start is not None:
        start.load_into(built.model, built.head)
    elif resume is None:
        start_from_rows(
            built.model, recipe.training_spec(), rows, micro_batch=session.arguments.per_device_train_batch_size
        )
    rhythm = plan_rhythm(recipe, options, num_scored=len(data.validation.labels))
    if rhythm.evaluate is not None and find_method(recipe.spec.method).stepping is not None:
        notes.append(
            f"{find_method(recipe.spec.method).title} changes what it trains over the whole length, so the weights of "
            "the last step are kept."
        )
        rhythm = dataclasses.replace(rhythm, evaluate=None, patience=None)

    def score(trained: Any, split: TokenizedSplit) -> SplitScores:
        with own_forward(trained):
            return score_everywhere(trained, data, split, batch_size=recipe.scoring_batch, device=session.device)

    def evaluate(trained: nn.Module, step: int) -> Evaluation:
        scores = score(trained, data.validation)
        quality = score_predictions(task.scorer, data.validation.labels, scores.predictions)
        return Evaluation(step=step, quality=quality, loss=float(scores.losses.mean()))

    job = Job(
        recipe=recipe,
        key=key,
        folder=out,
        options=options,
        rhythm=rhythm,
        batches=plan_batches(rows.lengths, batch_size=recipe.effective_batch, num_steps=recipe.steps, seed=recipe.seed),
        collate=rows.collate,
        count_items=lambda indices: _count_items(task, train_split, indices),
        evaluate=None if rhythm.evaluate is None else evaluate,
        tell=listener.progress,
    )
    check_parts(job, session)
    if session.is_main:
        listener.begin(recipe, from_step=resume.step if resume else 0, notes=notes)
    trainer = RecipeTrainer(built.model, session.arguments, job)
    run_trainer(trainer, resume)
    best = checkpoints.find_best(trainer.evaluations)
    steps_done = trainer.state.global_step
    if best is not None and best.step != steps_done:
        trainer.load_trained(best.step)
    if session.is_main:
        listener.scoring()
    try:
        test = score(trainer.model, data.test)
        validation = None if options.all_rows else score(trainer.model, data.validation)
    except Diverged as exc:
        raise TrainingError(
            "Training diverged: what it ended with has losses on the test or the search-validation split that are not "
            "finite. Lower learning_rate in training.yaml, or choose another trial."
        ) from exc
    peak = find_peak(session)
    seconds = trainer.seconds
    if not session.is_main:
        session.close()
        return None
    saved_as = save_weights(built, recipe, task, data.tokenizer, out, model, best.step if best else steps_done)
    result = make_result(
        recipe, task, data, out, model=model, test=test, validation=validation, saved_as=saved_as,
        steps=steps_done, best=best, num_train=len(train_split.features), seconds=seconds, peak=peak, built=built,
        processes=session.arguments.world_size, device=session.device,
    )  # fmt: skip
    if not is_sharded():
        with own_forward(built.model):
            inference = measure_inference(
                built.model, built.base, recipe.training_spec(), data, name=model, adapter=out / ADAPTER,
                batch_size=recipe.scoring_batch,
            )  # fmt: skip
        result = dataclasses.replace(result, inference=inference)
    write_result(result, out)
    session.close()
    return result


# --- checks


def _check_identity(recipe: Recipe, data: TaskData, model: str, session: Session) -> list[str]:
    """Notes on rows that differ. Raises ModelError where the base's weights are not the study's."""
    notes = []
    if session.is_main and recipe.model_digest:
        digest = digest_weights(model)
        if digest and digest != recipe.model_digest:
            raise ModelError(
                f"The base's weights must be those that the study chose for, with digest {recipe.model_digest}, but "
                f"'{recipe.model}' has {digest} here. Name a folder that has the study's with --model. To train on "
                "other weights knowingly, train from an export whose training.yaml says model_digest: ''."
            )
    if data.splits.digest != recipe.provenance.task_digest:
        notes.append(
            "The rows are not those of the study (digests "
            f"{data.splits.digest} and {recipe.provenance.task_digest}), so its prediction is not compared with."
        )
    return notes


def check_parts(job: Job, session: Session) -> None:
    parts = session.arguments.gradient_accumulation_steps * session.arguments.world_size
    smallest = min(len(batch) for batch in job.batches)
    if smallest < parts:
        raise SpecError(
            f"Each of {parts} parts of a batch needs a row, but the {job.recipe.num_train} training rows give batches "
            f"of {smallest}. Use fewer processes or larger micro-batches."
        )


def find_resume(out: Path, key: str) -> CheckpointMeta | None:
    """The newest checkpoint. Raises RecordError where it is of other data or settings."""
    meta = checkpoints.find_newest(out)
    if meta is not None and meta.key != key:
        raise RecordError(
            f"The checkpoints in '{out}' were trained on other rows, by an earlier autopeft, or with --all-rows given "
            "where it is not now (or the reverse). They were left as they are. Train as before, or with another --out."
        )
    return meta


# --- build


def _build(recipe: Recipe, task: TaskSpec, model: str, session: Session) -> Built:
    spec = recipe.training_spec()
    method = find_method(spec.method)
    if is_sharded() and (method.stepping is not None or spec.bits < 16 or spec.optimizer != "adamw"):
        what = f"{method.title}, {spec.bits} bits and {spec.optimizer}"
        raise SpecError(
            "FSDP divides plain weights and AdamW's states among processes, which cannot be done with "
            f"{what}. Use accelerate launch with DDP (--multi_gpu), or one process."
        )
    if is_sharded() and task.scorer == "exact_match":
        raise SpecError(
            "exact_match has every process write texts of its own length, which a sharded model (FSDP) cannot. Use "
            "accelerate launch with DDP (--multi_gpu), or one process."
        )
    base = load_base(model, num_labels=task.num_labels, bits=spec.bits, device=session.device)
    trained = build_beside(base, spec, device=session.device)
    if recipe.checkpoint_activations:
        checkpoint_activations(trained)
    count = count_trainable(trained, base.head)
    if not method.writes_base(spec):
        return Built(trained, base, base.head, None, count)
    # Only peft's PiSSA and the like are saved relative to what they began with. A resumed training builds the same
    # again, from the seed and on the same kind of device.
    return Built(trained, None, base.head, None if method.peft is None else copy_adapter(trained), count)


def build_beside(base: BaseModel, spec: TrialSpec, *, device: str) -> Any:
    """The model to train on `device`, the base moved aside where the model gets weights of its own: as in a trial, a
    GPU need not have room for both, not even to build it."""
    if find_method(spec.method).writes_base(spec) and device != "cpu":
        base.model.to("cpu")
        release_memory()
    return build_trial_model(base, spec, device=device)


def _count_items(task: TaskSpec, split: TokenizedSplit, rows: Sequence[int]) -> int:
    """Of a classifier's loss the rows; of a language model's the tokens that count."""
    if task.kind == "classification":
        return len(rows)
    # The first token of a text is predicted from nothing.
    return sum(label != -100 for i in rows for label in split.features[i]["labels"][1:])


def plan_rhythm(recipe: Recipe, options: Options, *, num_scored: int) -> Rhythm:
    """Scores `num_scored` rows twenty times, or less often where that would take too much of the time; checkpoints come
    twenty times in any case.

    Training takes three passes over a row, forward and twice as much backward (arXiv:2001.08361, section 2.1), and
    scoring one. Counted, not timed: a resumed training must go on in the rhythm of the unbroken one.
    """
    twentieth = max(1, recipe.steps // 20)
    cheap = math.ceil(num_scored / (3 * recipe.effective_batch * EVALUATION_SHARE))
    evaluate = options.evaluate_every or min(max(twentieth, cheap), recipe.steps)
    return Rhythm(
        evaluate=None if options.all_rows else evaluate,
        save=options.save_every or options.evaluate_every or twentieth,
        log=max(1, min(evaluate, recipe.steps // 100)),
        patience=None if options.all_rows else options.patience,
    )


# --- train


def run_trainer(trainer: RecipeTrainer, resume: CheckpointMeta | None) -> None:
    job = trainer.job
    folder = None if resume is None else str(checkpoints.checkpoint_folder(job.folder, resume.step))
    if resume is not None and _is_over(resume, job):
        trainer.evaluations, trainer.seconds_before = resume.evaluations, resume.seconds
        trainer.state.global_step = resume.step
        trainer.load_trained(resume.step)
        return
    try:
        with warnings.catch_warnings():
            # Of peft and Trainer, on things that are so on purpose.
            warnings.simplefilter("ignore")
            trainer.train(resume_from_checkpoint=folder)
    except Diverged as exc:
        raise TrainingError(
            f"Training diverged: {exc}. Checkpoints of before are in '{job.folder / checkpoints.CHECKPOINTS}'. Lower "
            "learning_rate in training.yaml, or choose another trial."
        ) from exc


def _is_over(resume: CheckpointMeta, job: Job) -> bool:
    """Killed after its last step, or after it was decided to stop early."""
    if resume.step >= job.recipe.steps:
        return True
    patience = job.rhythm.patience
    return patience is not None and checkpoints.count_since_best(resume.evaluations) >= patience
