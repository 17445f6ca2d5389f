"""Three ways to train a list of configurations; each is run as a process of its own by throughput.py.

python benchmarks/systems.py SYSTEM JOB.json RESULT.json
"""

from __future__ import annotations

import contextlib
import copy
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from autopeft.records import TrialSpec, from_record, to_record

SYSTEMS = ("autopeft", "plain", "careful")


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every system is given."""

    task: str
    data_dir: str
    seed: int
    steps: int
    workers: int | None
    specs: tuple[TrialSpec, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a system did, by its own clock."""

    qualities: tuple[float | None, ...]
    """On the search-validation split, in the order of the job's configurations; None for a trial that failed."""
    trials_seconds: float
    """From the start of the first trial to the end of the last."""
    phase_seconds: dict[str, float] = field(default_factory=dict)
    """Where the time went, summed over trials."""


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started


# --- (a) this system


def run_autopeft(job: Job) -> Result:
    """The real search: driver, cost process, workers, store. One rung, so that nobody scores more often than others."""
    from listed_search import Asked, NeverStop, count_spent, create_study, plan_listed

    from autopeft.executors.local import LocalExecutor
    from autopeft.search.plan import make_provenance
    from autopeft.search.study import Search

    plan = plan_listed(Asked(job.task, job.data_dir, job.steps, job.seed, workers=job.workers))
    with tempfile.TemporaryDirectory() as folder:
        store = create_study(
            plan.config, make_provenance(plan), plan.validation_labels(), job.specs, Path(folder), rungs=(job.steps,)
        )
        executor = LocalExecutor(plan.setup(Path(folder)), list(plan.devices))
        with store.lock():
            record = Search(store, executor, plan.space, racing=NeverStop()).run()
    quality = {trial.spec.key(): trial.quality for trial in record.trials}
    spent = count_spent(record)
    train = sum(rung.train_seconds for trial in record.trials for rung in trial.rungs)
    return Result(
        qualities=tuple(quality[spec.key()] for spec in job.specs),
        trials_seconds=spent.wall_seconds,
        phase_seconds={"train": train, "build, score, write": spent.device_seconds / plan.threads - train},
    )


# --- (b), (c) what a user would write instead


class _Trainings:
    """Optuna over transformers' Trainer and peft, as far as the plain and the careful script share it."""

    def __init__(self, job: Job) -> None:
        from autopeft.backends.hf.base_model import describe_base, resolve_model
        from autopeft.tasks.data import load_splits
        from autopeft.tasks.spec import find_task_text, parse_task

        self.job = job
        self.task = parse_task(find_task_text(job.task), job.task)
        self.splits = load_splits(self.task, job.data_dir, seed=job.seed)
        self.model_path = resolve_model("minilm")
        # Only to write the configurations as peft wants them, which a user has done by hand.
        self.described = describe_base("minilm", num_labels=len(self.task.labels), bits=32)
        self.clock = _Clock()

    def optimize(self, train_trial: Callable[[TrialSpec], float]) -> Result:
        import optuna

        specs = self.job.specs
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction="maximize")
        for index in range(len(specs)):
            study.enqueue_trial({"configuration": index})

        def objective(trial: optuna.Trial) -> float:
            return train_trial(specs[trial.suggest_categorical("configuration", range(len(specs)))])

        started = time.monotonic()
        study.optimize(objective, n_trials=len(specs))
        seconds = time.monotonic() - started
        return Result(
            qualities=tuple(trial.value for trial in study.trials),
            trials_seconds=seconds,
            phase_seconds=self.clock.seconds,
        )

    def load_model(self) -> Any:
        import torch
        import transformers

        return transformers.AutoModelForSequenceClassification.from_pretrained(
            self.model_path, num_labels=len(self.task.labels), dtype=torch.float32
        )

    def put_on(self, model: Any, spec: TrialSpec) -> Any:
        import peft

        from autopeft.backends.hf.build import build_context, make_peft_config
        from autopeft.methods import find_method

        call = find_method(spec.method).peft
        if call is None:
            assert spec.method == "full"
            return model
        return peft.get_peft_model(model, make_peft_config(call(spec, build_context(self.described, spec))))

    def tokenize(self, tokenizer: Any) -> dict[str, Any]:
        """The splits by name as tokenized `datasets`, unpadded."""
        import datasets

        def encode(rows: dict[str, list[str]]) -> Any:
            return tokenizer(rows["text"], truncation=True, max_length=self.task.max_length)

        tokenized = {}
        for name, examples in (("train", self.splits.train), ("validation", self.splits.validation)):
            columns = {"text": [e.text for e in examples], "label": [e.label for e in examples]}
            tokenized[name] = datasets.Dataset.from_dict(columns).map(encode, batched=True, remove_columns=["text"])
        return tokenized

    def make_trainer(self, model: Any, spec: TrialSpec, tokenizer: Any, data: dict[str, Any], **options: Any) -> Any:
        import transformers

        arguments = transformers.TrainingArguments(
            max_steps=spec.max_steps,
            per_device_train_batch_size=spec.batch_size,
            # As many as our own scoring takes; the default of 8 would only be slower.
            per_device_eval_batch_size=2 * spec.batch_size,
            learning_rate=spec.learning_rate,
            lr_scheduler_type=spec.schedule,
            warmup_steps=spec.warmup_ratio,
            weight_decay=spec.weight_decay,
            seed=spec.seed,
            # Trainer cannot see through peft's wrapper which column holds the labels.
            label_names=["labels"],
            report_to="none",
            use_cpu=True,
            dataloader_pin_memory=False,
            **options,
        )
        return transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            data_collator=transformers.DataCollatorWithPadding(tokenizer),
            processing_class=tokenizer,
            compute_metrics=_accuracy,
        )

    def train_and_score(self, trainer: Any) -> float:
        with self.clock.phase("train"):
            trainer.train()
        with self.clock.phase("score"):
            return float(trainer.evaluate()["eval_accuracy"])


def _accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def run_plain(job: Job) -> Result:
    """The first script one writes: everything inside the objective, Trainer's defaults."""
    import transformers

    trainings = _Trainings(job)

    def train_trial(spec: TrialSpec) -> float:
        with trainings.clock.phase("tokenize"):
            tokenizer = transformers.AutoTokenizer.from_pretrained(trainings.model_path)
            data = trainings.tokenize(tokenizer)
        with trainings.clock.phase("load"):
            # As Trainer itself asks for: so that the new head is drawn from the trial's seed.
            transformers.set_seed(spec.seed)
            model = trainings.put_on(trainings.load_model(), spec)
        with tempfile.TemporaryDirectory() as folder:
            return trainings.train_and_score(trainings.make_trainer(model, spec, tokenizer, data, output_dir=folder))

    return trainings.optimize(train_trial)


def run_careful(job: Job) -> Result:
    """The script after a day of tuning it: tokenized once, model kept, rows grouped by length, nothing written."""
    import transformers

    trainings = _Trainings(job)
    with trainings.clock.phase("tokenize"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(trainings.model_path)
        # Plain lists: transformers 5.23 drops a data set's length column before it groups by it, and then counts all
        # rows' tokens anew in every trial, through the data set's slow reading of single rows.
        data = {name: list(split) for name, split in trainings.tokenize(tokenizer).items()}
    with trainings.clock.phase("load"):
        transformers.set_seed(job.seed)
        base = trainings.load_model()

    def train_trial(spec: TrialSpec) -> float:
        with trainings.clock.phase("load"):
            model = trainings.put_on(copy.deepcopy(base), spec)
        with tempfile.TemporaryDirectory() as folder:
            trainer = trainings.make_trainer(
                model, spec, tokenizer, data, output_dir=folder, train_sampling_strategy="group_by_length",
                save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            return trainings.train_and_score(trainer)

    return trainings.optimize(train_trial)


def main(arguments: Sequence[str]) -> None:
    system, job_file, result_file = arguments
    runs = {"autopeft": run_autopeft, "plain": run_plain, "careful": run_careful}
    job = from_record(Job, json.loads(Path(job_file).read_text(encoding="utf-8")), "job")
    if system != "autopeft":
        import datasets
        import transformers

        datasets.disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    result = runs[system](job)
    Path(result_file).write_text(json.dumps(to_record(result)), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
