"""Full training on a random model: the trial to the bit, going on after a kill, and what is left at the end."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from listeners import Silent
from safetensors.torch import load_file

from autopeft.backends.base import Finished, Stretch, WorkerSetup
from autopeft.backends.hf.build import trainable_parameters
from autopeft.backends.hf.trial import HfBackend
from autopeft.errors import DeviceError, ModelError, RecordError, SpecError, TrainingError
from autopeft.production import checkpoints
from autopeft.production.files import LocalPlaces, TrainingResult, read_recipe, read_result, write_recipe
from autopeft.production.finish import Built, make_result
from autopeft.production.finished import load_data, make_job, open_finished
from autopeft.production.job import Progress
from autopeft.production.options import Options
from autopeft.production.recipe import Recipe
from autopeft.production.run import EVALUATION_SHARE, Listener, explaining_memory, plan_rhythm, train
from autopeft.production.session import open_session, split_effective_batch
from autopeft.production.verify import verify
from autopeft.records import TrialSpec
from autopeft.tasks.spec import parse_task
from autopeft.testing.tiny_models import tiny_folder, tiny_task

Make = Callable[..., Recipe]
WHOLE = Options(patience=None, evaluate_every=8)
"""Scored once, at the end, whose weights are the ones kept."""


class Killed(BaseException):
    """In the place of a kill: nothing catches it."""


class KillAt(Silent):
    """Kills when a step is reported that was saved, or was not, as asked."""

    def __init__(self, step: int, *, saved: bool) -> None:
        self.step, self.saved = step, saved

    def progress(self, progress: Progress) -> None:
        if progress.step >= self.step and progress.saved == self.saved:
            raise Killed


class Watch(Silent):
    def __init__(self) -> None:
        self.seen: list[Progress] = []
        self.notes: list[str] = []
        self.from_step = -1

    def begin(self, recipe: Recipe, *, from_step: int, notes: Sequence[str]) -> None:
        self.from_step, self.notes = from_step, list(notes)

    def progress(self, progress: Progress) -> None:
        self.seen.append(progress)


def run(
    recipe: Recipe,
    places: LocalPlaces,
    out: Path,
    options: Options = WHOLE,
    listener: Listener | None = None,
    *,
    architecture: Any = "bert",
) -> TrainingResult:
    task = parse_task(tiny_task(), "tiny")
    result = train(
        recipe, task, places, model=tiny_folder(architecture), out=out, options=options, listener=listener or Silent()
    )
    assert result is not None
    return result


def weights(out: Path) -> dict[str, torch.Tensor]:
    (path,) = sorted((out / "adapter").glob("*.safetensors"))
    return load_file(path)


def same(first: Path, second: Path) -> bool:
    one, two = weights(first), weights(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def train_trial(spec: TrialSpec, folder: Path) -> tuple[HfBackend, Finished]:
    setup = WorkerSetup(
        backend="hf", model=tiny_folder("bert"), task=tiny_task(), data_dir=None, split_seed=0,
        study_dir=str(folder), device="cpu", threads=torch.get_num_threads(),
    )  # fmt: skip
    backend = HfBackend(setup)
    stretch = Stretch(
        job=0, trial=0, spec=spec, purpose="confirm", from_step=0, to_step=spec.max_steps, score_test=True
    )
    finished = backend.run(stretch, lambda event: None)
    assert isinstance(finished, Finished)
    return backend, finished


# LoRA+ has parameter groups, EVA begins with rows, AdaLoRA acts after steps, the bottleneck is ours, full trains the
# base itself.
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("lora", {"dropout": 0.1, "lr_ratio_b": 4.0}),
        ("lora", {"dropout": 0.1, "init": "eva"}),
        ("adalora", {"dropout": 0.1}),
        ("bottleneck", {}),
        ("full", {}),
    ],
)
def test_a_recipe_of_the_trials_length_is_the_trial_to_the_bit(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, method: str, settings: dict[str, Any]
) -> None:
    recipe = make_recipe_for(method, spec={"settings": settings})
    result = run(recipe, places, tmp_path / "out")
    backend, finished = train_trial(recipe.spec, tmp_path / "trial")
    assert backend._live is not None
    assert finished.test is not None
    assert result.steps == result.best_step == recipe.spec.max_steps
    assert (result.test_quality, result.test_loss) == (finished.test.quality, finished.test.loss)
    trained = checkpoints.read_trained(tmp_path / "out", result.best_step)["trainable"]
    expected = trainable_parameters(backend._live.model)
    assert trained.keys() == expected.keys()
    assert all(torch.equal(trained[name], expected[name].detach()) for name in expected)


@pytest.mark.parametrize(("step", "saved"), [(2, True), (3, False), (7, True), (8, True)])
def test_a_killed_training_ends_with_the_weights_of_an_unbroken_one(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, step: int, saved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autopeft.production.trainer._PROGRESS_SECONDS", 0.0)
    recipe = make_recipe_for(spec={"settings": {"dropout": 0.2}}, micro_batch=4, gradient_accumulation=2)
    options = Options(patience=None, evaluate_every=3, save_every=2)
    unbroken = run(recipe, places, tmp_path / "unbroken", options)
    with pytest.raises(Killed):
        run(recipe, places, tmp_path / "killed", options, KillAt(step, saved=saved))
    watch = Watch()
    again = run(recipe, places, tmp_path / "killed", options, watch)
    assert watch.from_step > 0
    assert same(tmp_path / "unbroken", tmp_path / "killed")
    assert (again.best_step, again.test_loss) == (unbroken.best_step, unbroken.test_loss)


def test_micro_batches_lead_to_the_same_weights_but_for_rounding(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    # Llama has no dropout, which would be drawn for other shapes.
    run(make_recipe_for(), places, tmp_path / "whole", architecture="llama")
    parts = make_recipe_for(micro_batch=2, gradient_accumulation=4)
    run(parts, places, tmp_path / "parts", architecture="llama")
    one, two = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-4


def test_what_trains_is_counted_before_it_is_divided_among_processes(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(make_recipe_for("ia3"), places, tmp_path / "whole")

    def make_divided(*args: Any, built: Built, **given: Any) -> TrainingResult:
        for parameter in trainable_parameters(built.model).values():
            parameter.data = parameter.data[:1]
        return make_result(*args, built=built, **given)

    # As a process is left by FSDP 1, which needs GPUs.
    monkeypatch.setattr("autopeft.production.run.make_result", make_divided)
    monkeypatch.setattr("autopeft.production.run.measure_inference", lambda *args, **given: None)
    part = run(make_recipe_for("ia3"), places, tmp_path / "part")
    assert (part.trainable_parameters, part.head_parameters) == (whole.trainable_parameters, whole.head_parameters)


def test_activation_checkpointing_changes_no_weight(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> None:
    run(make_recipe_for(), places, tmp_path / "plain")
    run(make_recipe_for(checkpoint_activations=True), places, tmp_path / "checkpointed")
    assert same(tmp_path / "plain", tmp_path / "checkpointed")


def test_early_stopping_keeps_the_best_and_says_so(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> None:
    recipe = make_recipe_for(steps=200, learning_rate=0.05)
    watch = Watch()
    result = run(recipe, places, tmp_path, Options(patience=2, evaluate_every=5), watch)
    evaluations = [progress.evaluation for progress in watch.seen if progress.evaluation]
    best = max(evaluations, key=lambda e: (e.quality, -e.loss))
    assert result.stopped_early
    assert result.best_step == best.step
    assert result.steps == best.step + 10
    assert (result.validation_quality, result.validation_loss) == (best.quality, best.loss)
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == sorted({f"step-{best.step:08d}", f"step-{result.steps:08d}"})


def test_the_finished_folder_holds_what_others_read(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> None:
    recipe = make_recipe_for()
    result = run(recipe, places, tmp_path)
    assert read_recipe(tmp_path) == recipe
    assert read_result(tmp_path) == result
    with np.load(tmp_path / result.scores_file) as scores:
        assert len(scores["test_losses"]) == result.num_test
        assert float(scores["test_losses"].mean()) == pytest.approx(result.test_loss)
    assert result.saved_as == "peft"
    assert result.weights_digests.keys() == {"adapter_model.safetensors"}
    assert result.adapter_bytes == (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    assert result.prediction == recipe.prediction
    assert result.agreement is not None
    assert result.agreement.difference == pytest.approx(result.test_quality - 0.5)


def test_no_path_of_the_machine_is_in_what_gets_published(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    run(make_recipe_for(task=tiny_task().replace(str(Path(tiny_folder("bert")).parent), "")), places, tmp_path)
    for path in tmp_path.rglob("*"):
        if path.suffix in (".json", ".yaml", ".md") and path.name != "local.json" and "checkpoints" not in path.parts:
            text = path.read_text(encoding="utf-8")
            assert str(Path(tiny_folder("bert")).parent) not in text, path
    adapter = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "local:bert"


def test_methods_of_ours_train_on_a_quantized_base(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> None:
    result = run(make_recipe_for("bottleneck", spec={"bits": 4}), places, tmp_path)
    assert result.steps == 8


@pytest.mark.parametrize(
    ("method", "saved_as"), [("bottleneck", "autopeft"), ("full", "transformers"), ("ia3", "peft")]
)
def test_the_plainest_library_can_load_it(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, method: str, saved_as: str
) -> None:
    assert run(make_recipe_for(method), places, tmp_path).saved_as == saved_as


def test_all_rows_are_trained_on_and_the_last_weights_kept(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    recipe = make_recipe_for()
    result = run(recipe, places, tmp_path, Options(all_rows=True))
    assert result.num_train == recipe.num_train + result.num_validation
    assert result.validation_quality is None
    assert result.best_step == result.steps == recipe.steps


def test_a_method_that_changes_over_its_length_keeps_its_last_weights(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    watch = Watch()
    result = run(make_recipe_for("adalora"), places, tmp_path, Options(patience=1, evaluate_every=1), watch)
    assert result.best_step == result.steps == 8
    assert any("AdaLoRA" in note for note in watch.notes)


def test_checkpoints_of_other_settings_are_refused_and_left(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    recipe = make_recipe_for()
    run(recipe, places, tmp_path)
    with pytest.raises(RecordError, match="--all-rows"):
        run(recipe, places, tmp_path, Options(all_rows=True))
    assert checkpoints.find_newest(tmp_path) is not None


def test_a_training_that_diverges_is_no_result(make_recipe_for: Make, places: LocalPlaces, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="diverged"):
        run(make_recipe_for("full", learning_rate=1e30, warmup_steps=0), places, tmp_path)
    assert not (tmp_path / "result.json").exists()


def test_no_checkpoint_is_left_that_cannot_be_gone_on_from(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    recipe = make_recipe_for("full", learning_rate=3e38, warmup_steps=0, steps=16, schedule="constant")
    with pytest.raises(TrainingError, match="no longer finite after step 1"):
        run(recipe, places, tmp_path / "out", Options(patience=None, evaluate_every=16, save_every=1))
    assert checkpoints.find_newest(tmp_path / "out") is None


def test_running_out_of_memory_is_told_with_what_needs_less() -> None:
    full = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB"
    with pytest.raises(TrainingError, match=r"allocate 2\.00 GiB\. Make room.*--micro-batch"), explaining_memory():
        raise torch.OutOfMemoryError(full)
    with pytest.raises(TrainingError, match="ran out of it"), explaining_memory():
        raise MemoryError
    with pytest.raises(RuntimeError, match="illegal memory access"), explaining_memory():
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def test_other_base_weights_than_the_studys_are_refused(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=r"digest 0123456789abcdef.*with --model\. .*says model_digest: ''"):
        run(make_recipe_for(model_digest="0123456789abcdef"), places, tmp_path)


def test_a_recipe_without_a_digest_is_trained_on_any_weights(make_recipe_for: Make, tmp_path: Path) -> None:
    write_recipe(make_recipe_for(model_digest="0123456789abcdef"), tmp_path)
    path = tmp_path / "training.yaml"
    path.write_text(path.read_text().replace("model_digest: 0123456789abcdef", "model_digest: ''"))
    assert read_recipe(tmp_path).model_digest == ""


def test_what_was_measured_before_its_full_length_is_not_compared(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    recipe = make_recipe_for("ia3")
    whole = dataclasses.replace(recipe.prediction, test_quality=None, test_sd=None, num_confirmed=0)
    assert run(dataclasses.replace(recipe, prediction=whole), places, tmp_path / "whole").agreement is not None
    part = dataclasses.replace(whole, steps=recipe.trial_steps // 2)
    assert run(dataclasses.replace(recipe, prediction=part), places, tmp_path / "part").agreement is None


def test_other_rows_than_the_studys_are_trained_on_but_not_compared(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path
) -> None:
    watch = Watch()
    result = run(make_recipe_for(split_seed=1), places, tmp_path, listener=watch)
    assert result.agreement is None
    assert any("not those of the study" in note for note in watch.notes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (Options(report_to=("tensorbord",)), "knows tensorboard"),
        (Options(report_to=("mlflow",)), "pip install mlflow"),
        (Options(all_rows=True, evaluate_every=3), "nothing left to score"),
        (Options(save_every=0), "--save-every must be at least 1"),
        (Options(evaluate_every=0), "--eval-every must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(
    make_recipe_for: Make,
    places: LocalPlaces,
    tmp_path: Path,
    options: Options,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("autopeft.production.options.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=message):
        run(make_recipe_for(), places, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_deepspeed_is_refused_before_anything_is_written(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(SpecError, match=r"told to use DeepSpeed.*--multi_gpu"):
        run(make_recipe_for(), places, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("processes", "micro", "expected"), [(1, 8, (8, 1)), (2, 8, (4, 1)), (2, 2, (2, 2)), (4, 8, (2, 1)), (8, 3, (1, 1))]
)
def test_the_effective_batch_is_divided_among_processes(
    make_recipe_for: Make, processes: int, micro: int, expected: tuple[int, int]
) -> None:
    recipe = make_recipe_for(micro_batch=micro)
    assert split_effective_batch(recipe, processes) == expected


def test_a_batch_that_cannot_be_divided_is_refused(make_recipe_for: Make) -> None:
    with pytest.raises(SpecError, match="no multiple of 3 processes"):
        split_effective_batch(make_recipe_for(), 3)


def test_a_recipe_of_a_cpu_trains_there_beside_a_gpu(
    make_recipe_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert open_session(make_recipe_for(), tmp_path, Options()).device == "cpu"
    with pytest.raises(DeviceError, match="precision: float32"):
        open_session(make_recipe_for(precision="bfloat16"), tmp_path, Options())


@pytest.mark.parametrize("method", ["lora", "bottleneck"])
def test_a_gpus_recipe_in_float32_trains_and_is_verified_on_a_cpu(
    make_recipe_for: Make, places: LocalPlaces, tmp_path: Path, method: str
) -> None:
    recipe = make_recipe_for(method, device_kind="cuda", spec={"bits": 16})
    with pytest.raises(DeviceError, match=r"this machine has none.*set precision: float32"):
        run(dataclasses.replace(recipe, precision="bfloat16"), places, tmp_path / "out")
    run(recipe, places, tmp_path / "out")
    run(make_recipe_for(method), places, tmp_path / "cpu")
    assert same(tmp_path / "out", tmp_path / "cpu")
    done = open_finished(tmp_path / "out")
    # Not rounded to bfloat16, which a GPU would have done.
    assert make_job(done, load_data(done), [0], device="cpu", batch_size=1)["dtype"] == "float32"
    found = verify(done)
    assert found.tolerance.why == "float32 on the same kind of device"
    assert found.loss == pytest.approx(found.recorded_loss, abs=1e-5)


def test_float32_is_refused_on_a_gpu(make_recipe_for: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(DeviceError, match="precision: bfloat16"):
        open_session(make_recipe_for(device_kind="cuda", spec={"bits": 4}), tmp_path, Options())


# --- how often it is scored


@pytest.mark.parametrize(
    ("steps", "num_scored", "evaluate", "save"),
    [
        (8000, 999, 400, 400),  # a twentieth: 3 x 400 x 8 passes of training to 999 of scoring
        (624, 999, 167, 31),  # 999 / (3 x 8 x 0.25) = 166.5 steps
        (60, 999, 60, 3),  # once, at the end
        (60, 16, 3, 3),
    ],
)
def test_scoring_takes_a_quarter_of_the_passes_at_most(
    make_recipe_for: Make, steps: int, num_scored: int, evaluate: int, save: int
) -> None:
    rhythm = plan_rhythm(make_recipe_for(steps=steps), Options(), num_scored=num_scored)
    assert (rhythm.evaluate, rhythm.save) == (evaluate, save)
    assert num_scored <= EVALUATION_SHARE * 3 * 8 * evaluate or evaluate == steps


def test_what_is_asked_for_is_done(make_recipe_for: Make) -> None:
    rhythm = plan_rhythm(make_recipe_for(steps=60), Options(evaluate_every=2), num_scored=999)
    assert (rhythm.evaluate, rhythm.save) == (2, 2)
    rhythm = plan_rhythm(make_recipe_for(steps=60), Options(save_every=5, all_rows=True), num_scored=999)
    assert (rhythm.evaluate, rhythm.save, rhythm.patience) == (None, 5, None)
