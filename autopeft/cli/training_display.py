"""What a training shows: a bar on a terminal, plain lines when piped; at the end, score beside prediction."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from autopeft.report.words import (
    describe_latency,
    describe_spec,
    format_bytes,
    format_count,
    format_learning_rate,
    format_margin,
    format_quality,
    format_seconds,
    is_fraction,
)
from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.production.files import TrainingResult
    from autopeft.production.job import Progress
    from autopeft.production.recipe import Recipe
    from autopeft.production.start import PretrainingResult

_LINE_SECONDS = 30.0
"""Between lines without news when piped."""


class Display:
    """A listener of `production.run.train`; a context while it runs."""

    def __init__(self, out: Path, *, stage: str, quiet: bool) -> None:
        self._out = out
        self._is_pretraining = stage == "pretrain"
        self._quiet = quiet
        self._bar: Any = None
        self._task: Any = None
        self._recipe: Recipe | None = None
        self._last_line = time.monotonic()
        self._loss_sum = 0.0
        self._loss_steps = 0

    def __enter__(self) -> Display:
        if not self._quiet and sys.stdout.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("[bold]{task.description}"),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[words]}"),
                refresh_per_second=4,
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
        if kind is KeyboardInterrupt and not self._quiet:
            self._print("\nInterrupted. The same command goes on from the last checkpoint.")

    def _print(self, text: str) -> None:
        if self._quiet:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, flush=True)

    # --- before

    def plan(self, recipe: Recipe, notes: Sequence[str]) -> None:
        """What will be trained, in a few lines."""
        for note in notes:
            self._print(f"note: {note}")
        lines = {
            "recipe": f"trial {recipe.trial} of {recipe.study} ({recipe.pick})",
            "task": recipe.task_name,
            "base model": recipe.model,
            "method": describe_spec(recipe.spec),
        }
        if not self._is_pretraining:
            lines |= describe_length(recipe) | {"predicted": _describe_prediction(recipe)}
        for key, value in (lines | {"folder": str(self._out)}).items():
            self._print(f"{key:<12} {value}")

    def begin(self, recipe: Recipe, *, from_step: int, notes: Sequence[str]) -> None:
        self._recipe = recipe
        if self._is_pretraining:
            # Laid out for the text, which is known only now.
            for key, value in describe_length(recipe).items():
                self._print(f"{key:<12} {value}")
        for note in notes:
            self._print(f"note: {note}")
        if from_step:
            self._print(f"going on from step {from_step:,}")
        if self._bar is not None:
            self._task = self._bar.add_task("train", total=recipe.steps, completed=from_step, words="")

    # --- during

    def progress(self, progress: Progress) -> None:
        assert self._recipe is not None
        scorer = self._recipe.prediction.scorer
        self._loss_sum += progress.num_steps * progress.loss
        self._loss_steps += progress.num_steps
        if self._bar is not None:
            self._bar.update(self._task, completed=progress.step)
            if progress.num_steps:
                self._bar.update(self._task, words=f"loss {progress.loss:.4f}")
        share = f"{progress.step / self._recipe.steps:4.0%} step {progress.step:>6,}"
        rate = f"lr {format_learning_rate(progress.learning_rate)}" if progress.learning_rate > 0 else "lr 0"
        if progress.evaluation is not None:
            if self._is_pretraining:
                words = f"held out perplexity {math.exp(progress.evaluation.loss):.2f}"
            else:
                quality = format_quality(progress.evaluation.quality, scorer)
                words = f"validation {quality}, loss {progress.evaluation.loss:.4f}"
            self._print(f"{share}  {self._take_loss()}  {words}{'  best so far' if progress.is_best else ''}")
            self._last_line = time.monotonic()
        elif self._bar is None and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print(f"{share}  {self._take_loss()}  {rate}")
            self._last_line = time.monotonic()

    def _take_loss(self) -> str:
        """Its mean since the last line."""
        mean = self._loss_sum / max(self._loss_steps, 1)
        self._loss_sum, self._loss_steps = 0.0, 0
        return f"loss {mean:.4f}"

    def scoring(self) -> None:
        if self._bar is not None:
            self._bar.update(self._task, description="score", words="")
        else:
            self._print("scoring the test split")

    # --- after

    def finish(self, recipe: Recipe, result: TrainingResult, *, already: bool = False) -> None:
        """The score beside the prediction, and whether they agree."""
        scorer = result.scorer
        if already:
            self._print(f"This training was finished on {result.finished_at[:10]}; its result:")
        self._print(
            f"\ntrained      {result.steps:,} steps in {format_seconds(result.train_seconds)} on {result.device}"
            + (f" ({result.processes} processes)" if result.processes > 1 else "")
        )
        if result.stopped_early:
            self._print(f"             stopped early: no better score after step {result.best_step:,}")
        elif result.best_step != result.steps:
            self._print(f"             the weights of step {result.best_step:,} were kept, the best on validation")
        error = format_margin(result.test_standard_error, scorer)
        self._print(
            f"test         {format_quality(result.test_quality, scorer)} \u00b1 {error} "
            f"({say_count(result.num_test, 'row')})"
        )
        self._print(f"predicted    {_describe_prediction(recipe)}")
        agreement = result.agreement
        if agreement is not None:
            side = "above" if agreement.difference > 0 else "below"
            size = (
                f"{format_margin(abs(agreement.difference), scorer)}{' points' if is_fraction(scorer) else ''} {side}"
            )
            noise = f"{format_margin(agreement.standard_error, scorer)} standard error, z {agreement.z:.1f}"
            where = "" if agreement.split == "test" else " on search-validation"
            if agreement.agrees:
                self._print(f"             agrees{where}: {size}, within noise ({noise})")
            elif result.steps < recipe.trial_steps:
                self._print(
                    f"warning: the result is {size} the prediction{where}, beyond noise ({noise}; two-sided z test, "
                    f"arXiv:2411.00640). It took {result.steps:,} steps, and the trial {recipe.trial_steps:,}."
                )
            else:
                self._print(
                    f"warning: the result is {size} the prediction{where}, beyond noise ({noise}; two-sided z test, "
                    "arXiv:2411.00640). More steps and rows than the trial's can do that; if it is below, look at the "
                    "rows, the precision and the learning rate."
                )
        head = f" and {format_count(result.head_parameters)} in the head" if result.head_parameters else ""
        self._print(
            f"adapter      {self._out / 'adapter'}, {format_bytes(result.adapter_bytes)}, "
            f"{format_count(result.trainable_parameters)} parameters{head}"
        )
        if result.peak_bytes is not None:
            self._print(f"memory       at most {format_bytes(result.peak_bytes)} allocated on a GPU")
        if result.inference is not None:
            self._print(f"latency      {describe_latency(result.inference)}, on {result.inference.device}")
        self._print(f"result       {self._out / 'result.json'}")

    def finish_pretraining(self, source: str, pick: str | None, result: PretrainingResult) -> None:
        """What the text was worth, and how to go on."""
        chosen = f" --pick {pick}" if pick else ""
        self._print(
            f"\npre-trained  {result.steps:,} steps on {result.num_tokens:,} tokens in "
            f"{format_seconds(result.seconds)}\n"
            f"held out     perplexity {result.perplexity_before:.2f} before, {result.perplexity_after:.2f} after "
            f"({result.num_held_out} blocks of {result.block_tokens} tokens)\n"
            f"adapter      {self._out}\n"
            f"\ngo on with: autopeft train {source}{chosen} --from {self._out} --out NEW"
        )


def describe_length(recipe: Recipe) -> dict[str, str]:
    batch = f"batch {recipe.effective_batch}"
    if recipe.gradient_accumulation > 1:
        batch += f" ({recipe.gradient_accumulation} x {recipe.micro_batch})"
    cycles = f", {recipe.num_cycles} cycles" if recipe.num_cycles > 1 else ""
    return {
        "length": f"{recipe.steps:,} steps, {recipe.epochs:.3g} epochs of {recipe.num_train:,} rows "
        f"(the trial: {recipe.trial_steps:,} steps)",
        "steps": f"{batch}, lr {format_learning_rate(recipe.learning_rate)}, {recipe.warmup_steps:,} of warm-up, "
        f"{recipe.schedule.replace('_', ' ')}{cycles}, weight decay {recipe.weight_decay:.3g}, {recipe.optimizer}, "
        f"{recipe.precision}, seed {recipe.seed}",
    }


def _describe_prediction(recipe: Recipe) -> str:
    prediction = recipe.prediction
    scorer = prediction.scorer
    if prediction.test_quality is not None:
        spread = f" \u00b1 {format_margin(prediction.test_sd, scorer)}" if prediction.test_sd is not None else ""
        seeds = say_count(prediction.num_confirmed, "seed")
        return f"{format_quality(prediction.test_quality, scorer)}{spread} on the test split ({seeds})"
    if prediction.validation_quality is not None:
        quality = format_quality(prediction.validation_quality, scorer)
        after = recipe.say_measured_steps()
        return f"{quality} on search-validation after {after}; it was never confirmed on the test split"
    return "nothing: the trial reached no rung"
