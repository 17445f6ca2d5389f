"""Recipes: what is kept of a trial, what is stretched, and a file that people may edit."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autopeft.backends.hf import steps as trial_steps
from autopeft.cli.training_display import _describe_prediction
from autopeft.errors import RecordError, SpecError
from autopeft.export.readme import _expectation
from autopeft.methods import fill_settings
from autopeft.production.files import LocalPlaces, read_local, read_recipe, write_local, write_recipe
from autopeft.production.recipe import (
    MAX_GRAD_NORM,
    Recipe,
    find_task_files,
    lay_out,
    learning_rate_at,
    make_recipe,
    make_task_portable,
    name_model,
    with_batch,
    with_own_values,
)
from autopeft.records import StudyRecord, TrialSpec, from_record, to_record

GOLDEN = Path(__file__).parent.parent / "golden" / "study-schema-1.json"


@pytest.fixture(scope="module")
def study() -> StudyRecord:
    return from_record(StudyRecord, json.loads(GOLDEN.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def recipe(study: StudyRecord) -> Recipe:
    """Of a confirmed trial."""
    trial = next(trial for trial in study.trials if trial.confirmations)
    return make_recipe(study, trial, pick="best", num_train=100_000)


def test_the_batch_stays_and_three_epochs_are_the_length(recipe: Recipe) -> None:
    batch = recipe.spec.batch_size
    assert (recipe.effective_batch, recipe.micro_batch, recipe.gradient_accumulation) == (batch, batch, 1)
    assert recipe.learning_rate == recipe.spec.learning_rate
    assert recipe.steps == math.ceil(300_000 / batch)
    assert recipe.epochs == pytest.approx(3, abs=1e-3)


def test_warm_up_keeps_its_share(recipe: Recipe) -> None:
    assert recipe.warmup_steps == math.ceil(recipe.spec.warmup_ratio * recipe.steps)


def test_little_data_is_trained_on_no_shorter_than_the_trial_was(study: StudyRecord) -> None:
    trial = study.trials[0]
    recipe = make_recipe(study, trial, pick="0", num_train=trial.spec.batch_size)
    assert recipe.steps == trial.spec.max_steps


def test_the_trials_own_steps_give_the_trial(study: StudyRecord) -> None:
    trial = study.trials[0]
    recipe = make_recipe(study, trial, pick="0", num_train=5000, steps=trial.spec.max_steps)
    assert recipe.training_spec() == fill_settings(trial.spec)


def test_a_warm_up_that_was_edited_keeps_its_share(recipe: Recipe) -> None:
    edited = dataclasses.replace(recipe, warmup_steps=recipe.steps // 2)
    longer = lay_out(edited, num_train=recipe.num_train, steps=3 * recipe.steps)
    assert longer.warmup_steps == 3 * (recipe.steps // 2)
    assert lay_out(longer, num_train=recipe.num_train, steps=3 * recipe.steps) == longer
    assert lay_out(longer, num_train=recipe.num_train, steps=recipe.steps).warmup_steps == recipe.steps // 2
    assert lay_out(recipe, num_train=recipe.num_train, steps=3 * recipe.steps).warmup_steps == math.ceil(
        recipe.spec.warmup_ratio * 3 * recipe.steps
    )


def test_a_length_that_is_given_is_taken_as_it_is(recipe: Recipe) -> None:
    # One epoch of 320 rows is fewer steps than the trial took; who asks for it gets it.
    assert lay_out(recipe, num_train=320, epochs=1).steps == math.ceil(320 / recipe.effective_batch)
    assert lay_out(recipe, num_train=320, steps=7).steps == 7


@pytest.mark.parametrize("length", [{"epochs": 0.0}, {"epochs": math.inf}, {"steps": 0}, {"steps": 3, "epochs": 1.0}])
def test_a_length_that_cannot_be_is_refused(recipe: Recipe, length: dict[str, float]) -> None:
    with pytest.raises(SpecError):
        lay_out(recipe, num_train=100, **length)  # type: ignore[arg-type]


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.integers(1, 300),
    st.floats(0, 1),
    st.integers(0, 299),
)
def test_rates_are_those_of_a_trial(schedule: str, max_steps: int, warmup: float, step: int) -> None:
    study = from_record(StudyRecord, json.loads(GOLDEN.read_text(encoding="utf-8")))
    spec: TrialSpec = dataclasses.replace(
        study.trials[0].spec, schedule=schedule, max_steps=max_steps, warmup_ratio=warmup  # type: ignore[arg-type]
    )  # fmt: skip
    trial = dataclasses.replace(study.trials[0], spec=spec)
    recipe = make_recipe(study, trial, pick="0", num_train=1000, steps=max_steps)
    step = min(step, max_steps - 1)
    assert learning_rate_at(step, recipe) == trial_steps.learning_rate_at(step, spec)


def test_restarts_begin_each_period_at_the_highest_rate(recipe: Recipe) -> None:
    restarting = dataclasses.replace(
        recipe, schedule="cosine_with_restarts", num_cycles=4, steps=110, warmup_steps=10, learning_rate=1.0
    )
    rates = [learning_rate_at(step, restarting) for step in range(110)]
    # Four periods of 25 steps after 10 of warm-up.
    assert [step for step, rate in enumerate(rates) if rate == 1.0] == [9, 10, 35, 60, 85]
    assert rates[34] == pytest.approx(0.5 * (1 + math.cos(math.pi * 24 / 25)))


def test_gradients_are_clipped_as_in_trials() -> None:
    assert MAX_GRAD_NORM == trial_steps.MAX_GRAD_NORM


def test_a_larger_batch_raises_the_rate_by_its_square_root(recipe: Recipe) -> None:
    larger = with_batch(recipe, effective=4 * recipe.effective_batch)
    assert larger.learning_rate == pytest.approx(2 * recipe.learning_rate)
    assert larger.micro_batch == recipe.micro_batch
    assert larger.gradient_accumulation == 4


def test_micro_batches_alone_change_nothing_of_the_step(recipe: Recipe) -> None:
    small = with_batch(recipe, micro=1)
    assert small.gradient_accumulation == recipe.effective_batch
    assert (small.effective_batch, small.learning_rate) == (recipe.effective_batch, recipe.learning_rate)


def test_micro_batches_must_divide_the_batch(recipe: Recipe) -> None:
    with pytest.raises(SpecError, match="divisor"):
        with_batch(recipe, effective=32, micro=5)


def test_a_batch_that_the_trials_does_not_divide_gets_micro_batches_that_do(recipe: Recipe) -> None:
    twelve = with_batch(dataclasses.replace(recipe, effective_batch=8, micro_batch=8), effective=12)
    assert (twelve.micro_batch, twelve.gradient_accumulation) == (6, 2)


def test_the_prediction_is_the_studys(study: StudyRecord, recipe: Recipe) -> None:
    trial = study.trials[recipe.trial]
    prediction = recipe.prediction
    assert prediction.test_quality == trial.test_quality
    assert prediction.validation_quality == trial.quality
    assert prediction.num_seeds == 1 + len(trial.confirmations)
    assert prediction.num_confirmed == len(trial.confirmations)
    assert (prediction.test_sd is None) == (len(trial.confirmations) < 2)


def test_a_trial_that_was_stopped_early_is_described_so(study: StudyRecord) -> None:
    trial = next(trial for trial in study.trials if len(trial.rungs) > 1)
    stopped = dataclasses.replace(trial, rungs=trial.rungs[:1], confirmations=())
    recipe = make_recipe(study, stopped, pick="0", num_train=1000)
    assert recipe.measured_steps == trial.rungs[0].step < recipe.trial_steps
    assert recipe.say_measured_steps() == f"{trial.rungs[0].step} of {recipe.trial_steps} steps"
    assert f"search-validation after {recipe.say_measured_steps()}; it was never" in _describe_prediction(recipe)
    assert f"After {recipe.say_measured_steps()} the study measured" in _expectation(recipe)
    whole = make_recipe(study, trial, pick="0", num_train=1000)
    assert whole.say_measured_steps() == f"{recipe.trial_steps} steps"


def test_a_recipe_survives_its_file(recipe: Recipe, tmp_path: Path) -> None:
    write_recipe(recipe, tmp_path)
    assert read_recipe(tmp_path) == recipe


@given(st.text(), st.floats(1e-9, 1.0), st.text(min_size=1))
def test_any_text_and_rate_survive_the_file(task: str, rate: float, name: str) -> None:
    study = from_record(StudyRecord, json.loads(GOLDEN.read_text(encoding="utf-8")))
    made = make_recipe(study, study.trials[0], pick="0", num_train=1000)
    made = with_own_values(dataclasses.replace(made, task=task, learning_rate=rate, study=name))
    with tempfile.TemporaryDirectory() as folder:
        write_recipe(made, Path(folder))
        assert read_recipe(Path(folder)) == made


def test_the_task_is_readable_in_the_file(recipe: Recipe, tmp_path: Path) -> None:
    recipe = dataclasses.replace(recipe, task="name: own\nlabels: [no, yes]\n")
    text = write_recipe(recipe, tmp_path).read_text(encoding="utf-8")
    assert "\ntask: |\n  name: own\n  labels: [no, yes]\n" in text


def test_a_misspelt_key_gets_the_nearest_name(recipe: Recipe, tmp_path: Path) -> None:
    path = write_recipe(recipe, tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace("learning_rate:", "learning_rte:", 1), encoding="utf-8")
    with pytest.raises(RecordError, match=r"unknown .*'learning_rte'.*'learning_rate'"):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"micro_batch": 3}, "times gradient_accumulation"),
        ({"steps": 0}, "steps must be above zero"),
        ({"warmup_steps": 10**9}, "Shorten it"),
        ({"num_cycles": 3}, "has no cycles"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"epochs": 99.0}, r"Set epochs to [\d.]+, or steps to \d+"),
    ],
)
def test_an_edit_that_contradicts_the_rest_is_refused(
    recipe: Recipe, tmp_path: Path, change: dict[str, float], message: str
) -> None:
    write_recipe(dataclasses.replace(recipe, **change), tmp_path)  # type: ignore[arg-type]
    with pytest.raises(RecordError, match=message):
        read_recipe(tmp_path)


@pytest.mark.parametrize(
    ("name", "instead"), [("learning_rate", "learning_rate"), ("batch_size", "effective_batch"), ("max_steps", "steps")]
)
def test_a_setting_is_said_once_and_refused_where_nobody_would_read_it(
    recipe: Recipe, tmp_path: Path, name: str, instead: str
) -> None:
    path = write_recipe(recipe, tmp_path)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(data["spec"]) == {"method", "settings", "target_modules", "bits"}
    data["spec"][name] = 7
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    with pytest.raises(RecordError, match=f"has {name}, too.* set {instead} below instead"):
        read_recipe(tmp_path)


def test_an_edited_setting_is_named_as_the_file_has_it(recipe: Recipe, tmp_path: Path) -> None:
    path = write_recipe(recipe, tmp_path)
    # To YAML 1.1, which needs a point, it is a text.
    text = path.read_text(encoding="utf-8").replace(f"\nlearning_rate: {recipe.learning_rate}", "\nlearning_rate: 1e-3")
    path.write_text(text, encoding="utf-8")
    with pytest.raises(RecordError, match=r"yaml'\.learning_rate must be float, but is '1e-3'"):
        read_recipe(tmp_path)


def test_a_changed_batch_and_rate_are_one_recipe_before_and_after_the_file(recipe: Recipe, tmp_path: Path) -> None:
    changed = dataclasses.replace(
        with_batch(recipe, effective=4 * recipe.effective_batch), seed=5, schedule="cosine_with_restarts", num_cycles=2
    )
    changed = lay_out(changed, num_train=recipe.num_train, steps=recipe.steps)
    write_recipe(changed, tmp_path)
    assert read_recipe(tmp_path).key() == changed.key()
    assert read_recipe(tmp_path) == with_own_values(changed)


def test_a_folder_without_a_recipe_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="autopeft export"):
        read_recipe(tmp_path)


def test_no_path_of_the_machine_is_in_a_recipe(tmp_path: Path) -> None:
    task = f"name: own\nfiles:\n  train: {tmp_path}/a/rows.jsonl\n  test: {tmp_path}/b/rows.jsonl\n"
    portable = make_task_portable(task)
    assert str(tmp_path) not in portable
    assert find_task_files(task) == {
        "train-rows.jsonl": f"{tmp_path}/a/rows.jsonl",
        "test-rows.jsonl": f"{tmp_path}/b/rows.jsonl",
    }
    assert set(find_task_files(portable)) == {"train-rows.jsonl", "test-rows.jsonl"}
    assert name_model(str(tmp_path)) == f"local:{tmp_path.name}"
    assert name_model("minilm") == "minilm"
    assert name_model("org/model") == "org/model"


def test_a_task_without_files_is_kept_to_the_letter() -> None:
    text = "# a comment\nname: demo\nembedded: true\n"
    assert make_task_portable(text) == text


def test_what_does_not_decide_weights_is_not_in_the_key(recipe: Recipe) -> None:
    assert dataclasses.replace(recipe, pick="knee", cost=None).key() == recipe.key()
    assert dataclasses.replace(recipe, steps=recipe.steps + 1).key() != recipe.key()
    assert dataclasses.replace(recipe, seed=recipe.seed + 1).key() != recipe.key()


def test_places_of_this_machine_survive_their_file(tmp_path: Path) -> None:
    assert read_local(tmp_path) == LocalPlaces()
    places = LocalPlaces(model="/models/x", data_dir=None, files={"rows.jsonl": "/data/rows.jsonl"})
    write_local(places, tmp_path)
    assert read_local(tmp_path) == places


def test_old_recipes_are_read(make_spec: Callable[..., TrialSpec], recipe: Recipe, tmp_path: Path) -> None:
    """A setting that its method got later means the default, as in studies."""
    settings = dict(make_spec("lora").settings)
    del settings["dropout"]
    write_recipe(dataclasses.replace(recipe, spec=make_spec("lora")), tmp_path)
    path = tmp_path / "training.yaml"
    text = path.read_text(encoding="utf-8")
    assert "    dropout: 0.0\n" in text
    path.write_text(text.replace("    dropout: 0.0\n", ""), encoding="utf-8")
    assert read_recipe(tmp_path).spec.settings == make_spec("lora").settings


def test_a_file_that_says_settings_twice_is_read_by_those_that_count(recipe: Recipe, tmp_path: Path) -> None:
    """As files were written before: whole specs, and the length in them alone."""
    path = write_recipe(recipe, tmp_path)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    del data["trial_steps"], data["trial_warmup_ratio"]
    data["spec"] = to_record(recipe.spec)
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert read_recipe(tmp_path) == recipe
    data["learning_rate"] = 0.5
    path.write_text(yaml.safe_dump(data), encoding="utf-8")
    assert read_recipe(tmp_path).learning_rate == 0.5
