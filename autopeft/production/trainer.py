"""transformers' Trainer, made to take the steps that a trial takes.

Its loop, devices, processes, trackers and loggers are used as they are. Replaced is what decides weights: the order of
batches, the optimizer with its parameter groups, the learning rate, what a method does after a step, how micro-batches
are weighed, how search-validation is scored, and checkpoints. So that, on one CPU process, a recipe of a trial's own
length ends with the trial's own weights to the bit, which a test holds it to.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from autopeft.backends.hf.build import trainable_parameters
from autopeft.backends.hf.data import Batch
from autopeft.backends.hf.steps import Diverged, bind_after_step, build_optimizer, restore_optimizer
from autopeft.methods import find_method
from autopeft.production import checkpoints
from autopeft.production.checkpoints import CheckpointMeta, Evaluation
from autopeft.production.job import Job, Progress
from autopeft.production.parts import AllRows, Part, Parts
from autopeft.production.recipe import Recipe, learning_rate_at
from autopeft.production.session import is_sharded
from autopeft.records import TrialSpec

_PROGRESS_SECONDS = 1.0
_STATE_FILE = "trainer_state.json"


class Rates(torch.optim.lr_scheduler.LRScheduler):
    """The recipe's learning rates, to the bit those of `train_step`."""

    def __init__(self, optimizer: torch.optim.Optimizer, recipe: Recipe) -> None:
        self.recipe = recipe
        super().__init__(optimizer)

    def get_lr(self) -> list[float | torch.Tensor]:
        rate = learning_rate_at(self.last_epoch, self.recipe)
        return [rate * group["lr_scale"] for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.last_epoch = state_dict["last_epoch"]
        for group, rate in zip(self.optimizer.param_groups, self.get_lr(), strict=True):
            group["lr"] = rate


class RecipeTrainer(transformers.Trainer):
    """Trains `model` by a `Job`. `train(resume_from_checkpoint=...)` takes a folder of `checkpoints`."""

    def __init__(self, model: nn.Module, args: transformers.TrainingArguments, job: Job) -> None:
        # What training draws follows on what building the model drew, as in a trial; Trainer would seed anew.
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        self.job = job
        self.spec: TrialSpec = job.recipe.training_spec()
        self.stepping = find_method(self.spec.method).stepping
        self.trained = model
        """The model without what processes wrap around it."""
        self.evaluations: tuple[Evaluation, ...] = ()
        self.seconds_before = 0.0
        self._started = self._told = time.monotonic()
        self._told_step = 0
        self._told_loss: torch.Tensor | float = 0.0
        self._last_loss: torch.Tensor | None = None
        self._saved_at: int | None = None
        # Trainer makes these; declared for the type checker, which cannot read it.
        self.optimizer: Any
        self.lr_scheduler: Any
        self.control: Any
        # Trainer takes a quantized model without peft for one that trains quantized weights, and refuses it.
        is_own_on_quantized = getattr(model, "is_quantized", False) and not isinstance(model, peft.PeftModel)
        if is_own_on_quantized:
            model._hf_peft_config_loaded = True  # type: ignore[assignment]  # of a module, mypy expects tensors
        super().__init__(model=model, args=args, train_dataset=AllRows(sum(map(len, job.batches))))
        if is_own_on_quantized:
            model._hf_peft_config_loaded = False  # type: ignore[assignment]
        # Ours says more, and says it once for all processes.
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        self.add_callback(_Hooks(self))
        # The loss is weighed here, by rows or tokens: nothing has to be counted beforehand.
        self.model_accepts_loss_kwargs = False

    @property
    def seconds(self) -> float:
        """Wall seconds of all sessions."""
        return self.seconds_before + time.monotonic() - self._started

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if is_sharded() and state.distributed_type == DistributedType.MULTI_CPU:
            # accelerate 1.15 shards on accelerators alone; on CPUs it would train unsharded without a word.
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.is_fsdp_enabled = True

    # --- batches and loss

    def get_train_dataloader(self) -> Any:
        args = self.args
        parts = Parts(
            self.job.batches, self.job.count_items, count=args.gradient_accumulation_steps * args.world_size,
            process=args.process_index, processes=args.world_size,
        )  # fmt: skip
        # Not given to accelerate, which would deal the parts out to the processes once more. The loader draws a seed
        # for its workers, of which there are none: from a generator of its own, or a resumed run would draw one more.
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_sampler=parts, collate_fn=self._collate, generator=torch.Generator()
        )

    def _collate(self, parts: list[Part]) -> Batch:
        (part,) = parts
        return {**self.job.collate(part.rows), "share": torch.tensor(part.share)}

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        share = inputs.pop("share")
        loss: torch.Tensor = model(**inputs).loss
        # A batch of one part has a share of exactly one, and so a trial's gradient to the bit.
        return loss * share.to(loss.dtype)

    def training_step(self, model: nn.Module, inputs: Batch, num_items_in_batch: Any = None) -> torch.Tensor:
        # Trainer's own divides the loss by the number of parts; when it does depends on its version.
        model.train()
        with self.compute_loss_context_manager():
            loss: torch.Tensor = self.compute_loss(model, self._prepare_inputs(inputs))
        self.accelerator.backward(loss)
        loss = loss.detach()
        # Reading the loss waits for the GPU, so only every eighth step there.
        step = self.state.global_step
        if (loss.device.type == "cpu" or step % 8 == 7) and not torch.isfinite(loss):
            raise Diverged(f"the training loss is {loss.item()} at step {step + 1}")
        self._told_loss, self._last_loss = self._told_loss + loss, loss
        return loss

    def floating_point_ops(self, inputs: Batch) -> int:
        # Counts all parameters anew at every step, for a figure that nobody here reads.
        return 0

    # --- optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> Any:
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model if model is None else model, self.spec)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = Rates(_inner(self.optimizer), self.job.recipe)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if self.accelerator.distributed_type == DistributedType.FSDP:
            return super()._clip_grad_norm(model)
        # In the order of a trial's step: the norm is a sum, and sums of floats have an order.
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        return nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)

    # --- scores

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> dict[str, float]:
        assert self.job.evaluate is not None
        evaluation = self.job.evaluate(self.model, self.state.global_step)
        self.evaluations = (*self.evaluations, evaluation)
        metrics = {"eval_quality": evaluation.quality, "eval_loss": evaluation.loss}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if checkpoints.find_best(self.evaluations) == evaluation:
            self.control.should_save = True
        if self.job.rhythm.patience is not None:
            stalled = checkpoints.count_since_best(self.evaluations) >= self.job.rhythm.patience
            if stalled:
                self.control.should_training_stop = self.control.should_save = True
        self.report(evaluation)
        return metrics

    def report(self, evaluation: Evaluation | None = None, *, saved: bool = False) -> None:
        """Tells the main process's listener where training is."""
        step = self.state.global_step
        taken = step - self._told_step
        loss = float(self._told_loss) / max(taken, 1)
        self._told_step, self._told_loss = step, 0.0
        self._told = time.monotonic()
        if self.args.process_index == 0:
            rate = learning_rate_at(min(step, self.job.recipe.steps - 1), self.job.recipe)
            is_best = evaluation is not None and checkpoints.find_best(self.evaluations) == evaluation
            self.job.tell(
                Progress(
                    step=step,
                    num_steps=taken,
                    loss=loss,
                    learning_rate=rate,
                    evaluation=evaluation,
                    is_best=is_best,
                    saved=saved,
                )
            )

    def report_if_due(self) -> None:
        if time.monotonic() - self._told > _PROGRESS_SECONDS:
            self.report()

    # --- checkpoints

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        if self._saved_at == step:
            return
        self._check_finite(step)
        is_main = self.args.process_index == 0
        part = checkpoints.checkpoint_folder(self.job.folder, step).with_suffix(".part")
        if is_main:
            part = checkpoints.begin_checkpoint(self.job.folder, step)
        self.accelerator.wait_for_everyone()
        state = self._collect_state()
        checkpoints.write_random(part, self.args.process_index)
        self.accelerator.wait_for_everyone()
        if is_main:
            checkpoints.write_trained(part, state)
            self.state.save_to_json(str(part / _STATE_FILE))
            best = checkpoints.find_best(self.evaluations)
            meta = CheckpointMeta(
                key=self.job.key, step=step, processes=self.args.world_size, seconds=self.seconds,
                evaluations=self.evaluations, options=self.job.options,
            )  # fmt: skip
            checkpoints.finish_checkpoint(self.job.folder, meta, keep=() if best is None else (best.step,))
        self._saved_at = step
        self.accelerator.wait_for_everyone()
        self.report(saved=True)

    def _check_finite(self, step: int) -> None:
        """Raises Diverged: a checkpoint that cannot be gone on from would take the place of one that can."""
        if self._last_loss is not None and not torch.isfinite(self._last_loss):
            raise Diverged(f"the training loss is {self._last_loss.item()} at step {step}")
        if is_sharded():
            return
        # The loss is of before the step, which may have been the one too many.
        if not torch.stack([torch.isfinite(p).all() for p in trainable_parameters(self.trained).values()]).all():
            raise Diverged(f"the weights are no longer finite after step {step}")

    def _collect_state(self) -> dict[str, Any]:
        """All that training goes on from, on every process; whole also where processes hold parts of it."""
        if self.accelerator.distributed_type == DistributedType.FSDP:
            from autopeft.production.sharded import collect_sharded

            trainable, optimizer = collect_sharded(self.model, _inner(self.optimizer))
        else:
            trainable = {name: p.detach() for name, p in trainable_parameters(self.trained).items()}
            optimizer = _inner(self.optimizer).state_dict()
        return {
            "trainable": trainable,
            "optimizer": optimizer,
            "stepping": self.stepping.state(self.trained) if self.stepping else None,
            "schedule": self.lr_scheduler.state_dict(),
        }

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Called by `train`, with the weights that training goes on from."""
        meta = checkpoints.find_newest(self.job.folder)
        assert meta is not None
        self.evaluations, self.seconds_before = meta.evaluations, meta.seconds
        self._told_step = meta.step
        self.load_trained(meta.step)

    def load_trained(self, step: int) -> None:
        """The weights of a kept checkpoint, into the model as it is."""
        state = checkpoints.read_trained(self.job.folder, step)
        if self.is_fsdp_enabled:
            from autopeft.production.sharded import load_sharded

            load_sharded(self.model, state["trainable"])
            return
        parameters = trainable_parameters(self.trained)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state["trainable"][name])
        if self.stepping:
            self.stepping.restore(self.trained, state["stepping"])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        meta = checkpoints.find_newest(self.job.folder)
        assert meta is not None
        state = checkpoints.read_trained(self.job.folder, meta.step)
        if self.is_fsdp_enabled:
            from autopeft.production.sharded import load_sharded_optimizer

            load_sharded_optimizer(self.model, _inner(self.optimizer), state["optimizer"])
        else:
            restore_optimizer(_inner(self.optimizer), state["optimizer"])
        self.lr_scheduler.load_state_dict(state["schedule"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and not checkpoints.restore_random(Path(checkpoint), self.args.process_index):
            # There were fewer processes: this one's dropout begins a stream of its own.
            torch.manual_seed(self.job.recipe.seed + 1000003 * self.args.process_index + self.state.global_step)

    def restore_random(self) -> None:
        """To where building the model left it; on other processes than the first a stream of their own."""
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random)
        if self.args.process_index > 0:
            torch.manual_seed(self.job.recipe.seed + 1000003 * self.args.process_index)


class _Hooks(transformers.TrainerCallback):
    """What is done at each step, in the place of the settings of TrainingArguments."""

    def __init__(self, trainer: RecipeTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.restore_random()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = bind_after_step(self.trainer.trained, self.trainer.spec, state.global_step + 1)
        if after is not None:
            after()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        rhythm, step, last = self.trainer.job.rhythm, state.global_step, self.trainer.job.recipe.steps
        control.should_evaluate = rhythm.evaluate is not None and (step % rhythm.evaluate == 0 or step == last)
        if not control.should_evaluate:
            self.trainer.report_if_due()
        control.should_save = step % rhythm.save == 0 or step == last
        control.should_log = step % rhythm.log == 0 or step == last
        if step >= last:
            control.should_training_stop = True


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """Without accelerate's wrapper."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner
