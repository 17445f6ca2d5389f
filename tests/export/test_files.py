"""What lies in an exported folder, on a tiny Llama and a tiny BERT."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from chosen_trials import make_study, make_trial, write_rows

from autopeft.errors import ExportError
from autopeft.export import TARGETS, Exported, export_trial, write_bundle
from autopeft.export.bundle import Bundle
from autopeft.methods import METHODS
from autopeft.methods.faults import make_recipe_spec
from autopeft.production.files import read_local, read_recipe
from autopeft.records import TrialSpec
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import parse_task

CONFIGURATION = {
    "peft": "adapter_config.json", "trainer": "train.py", "trl": "sft.yaml", "llama-factory": "train.yaml",
    "axolotl": "axolotl.yaml", "unsloth": "train.py", "ms-swift": "train.yaml",
}  # fmt: skip


@pytest.fixture
def spec() -> TrialSpec:
    return make_recipe_spec(METHODS["lora"], device_kind="cuda")


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_an_export_holds_all_that_it_takes(
    target: str, spec: TrialSpec, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle, out = bundle_of(spec, "generation"), tmp_path / "deep" / "out"
    paths, commands = write_bundle(bundle, target, out, model=bundle.model, data_dir=None)
    assert {path.relative_to(out).as_posix() for path in paths} >= {
        CONFIGURATION[target], "README.md", "provenance.json", "training.yaml", "local.json",
        "data/train.jsonl", "data/validation.jsonl", "data/test.jsonl",
    }  # fmt: skip
    for split in ("train", "validation", "test"):
        lines = (out / "data" / f"{split}.jsonl").read_text().splitlines()
        assert len(lines) == len(getattr(bundle.splits, split))
    readme = (out / "README.md").read_text()
    assert commands
    assert all(f"    {command}\n" in readme for command in commands)
    assert read_recipe(out) == dataclasses.replace(bundle.recipe)
    assert read_local(out).model == bundle.model
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_no_local_path_is_in_what_may_be_published(
    target: str, spec: TrialSpec, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle, out = bundle_of(spec, "generation"), tmp_path / "out"
    write_bundle(bundle, target, out, model=bundle.model, data_dir="/some/data")
    for name in ("provenance.json", "training.yaml"):
        text = (out / name).read_text()
        assert bundle.model not in text
        assert str(tmp_path) not in text
        assert "/some/data" not in text


def test_the_readme_says_how_to_run_it_and_what_to_expect(
    spec: TrialSpec, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    write_bundle(bundle_of(spec, "generation"), "trl", tmp_path / "out", model="x", data_dir=None)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "    trl sft --config sft.yaml" in text
    assert "80.0% ± 0.0 on 10 search-validation rows (2 seeds)" in text
    assert "75.0% on 10 test rows (1 seed)" in text


def test_what_a_trainer_does_otherwise_is_said_where_it_matters(
    spec: TrialSpec, bundle_of: Callable[..., Bundle]
) -> None:
    for target in ("trl", "llama-factory", "axolotl", "unsloth", "ms-swift"):
        said = " ".join(TARGETS[target].write(bundle_of(spec, "generation", warmup_steps=0)).notes)
        assert "batches are not put together by length" in said
        assert "Warm-up" not in said
        assert "Weight decay" not in said
        said = " ".join(TARGETS[target].write(bundle_of(spec, "generation", warmup_steps=1, weight_decay=0.1)).notes)
        assert "Warm-up starts at zero" in said
        assert "Weight decay leaves out norms and biases" in said


def test_all_weights_are_trained_in_float32_or_it_is_said(bundle_of: Callable[..., Bundle]) -> None:
    whole = bundle_of(make_recipe_spec(METHODS["full"], device_kind="cuda"), "generation")
    trl, swift = (
        yaml.safe_load(TARGETS[target].write(whole).files[CONFIGURATION[target]]) for target in ("trl", "ms-swift")
    )
    assert (trl["dtype"], trl["bf16"]) == ("float32", True)
    # Left open, ms-swift would turn fp16 on for weights in float32, and transformers refuse both.
    assert (swift["torch_dtype"], swift["bf16"], swift["fp16"]) == ("float32", True, False)
    for target in ("axolotl", "unsloth"):
        assert "small updates are rounded away" in " ".join(TARGETS[target].write(whole).notes)


def test_axolotl_evaluates_once_an_epoch(spec: TrialSpec, bundle_of: Callable[..., Bundle]) -> None:
    content = yaml.safe_load(TARGETS["axolotl"].write(bundle_of(spec, "generation")).files["axolotl.yaml"])
    # `evals_per_epoch` becomes a share of all steps, of which Axolotl takes 1 for none.
    assert content["eval_strategy"] == "epoch"
    assert "evals_per_epoch" not in content


def test_llama_factory_finds_the_rows_by_their_registration(
    spec: TrialSpec, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    bundle = bundle_of(spec, "generation")
    files = TARGETS["llama-factory"].write(bundle).files
    config, info = yaml.safe_load(files["train.yaml"]), json.loads(files["data/dataset_info.json"])
    for key in ("dataset", "eval_dataset"):
        entry = info[config[key]]
        row = json.loads(files[f"{config['dataset_dir']}/{entry['file_name']}"].splitlines()[0])
        assert set(entry["columns"].values()) == set(row)


def test_the_peft_target_writes_what_plain_peft_reads(
    spec: TrialSpec, bundle_of: Callable[..., Bundle], tmp_path: Path
) -> None:
    import peft

    write_bundle(bundle_of(spec, "generation"), "peft", tmp_path / "out", model="x", data_dir=None)
    config = peft.PeftConfig.from_pretrained(str(tmp_path / "out"))
    assert (config.peft_type, config.task_type, config.r) == ("LORA", "CAUSAL_LM", 8)


def test_a_prompt_that_is_too_long_is_cut_where_the_study_cut_it(bundle_of: Callable[..., Bundle]) -> None:
    from autopeft.backends.hf.base_model import load_tokenizer
    from autopeft.backends.hf.language import tokenize_completions
    from autopeft.export.bundle import _fit_row

    bundle = bundle_of(make_recipe_spec(METHODS["lora"], device_kind="cpu"), "generation")
    tokenizer = load_tokenizer(bundle.model)
    long = bundle.splits.train[0]._replace(text=" ".join(f"word{i}" for i in range(40)))
    (study,) = tokenize_completions(tokenizer, [long], max_length=16)
    (cut,) = tokenize_completions(tokenizer, [_fit_row(tokenizer, long, 15)], max_length=10_000)
    assert cut == study


def export(tmp_path: Path, target: str, kind: str = "classification", **changes: object) -> Exported:
    from autopeft.testing.tiny_models import tiny_folder

    text = write_rows(tmp_path, kind)
    digest = changes.pop("digest", load_splits(parse_task(text, "tiny"), None, seed=0).digest)
    trial = make_trial(spec=make_recipe_spec(METHODS[str(changes.pop("method", "lora"))], device_kind="cpu"))
    study = make_study([trial], task=text)
    provenance = dataclasses.replace(study.provenance, task_digest=str(digest), num_train=90)
    study = dataclasses.replace(study, provenance=provenance)
    model = tiny_folder("bert")
    return export_trial(study, trial, model=model, target=target, out=tmp_path / "out", **changes)  # type: ignore[arg-type]


def test_the_length_is_scaled_to_all_rows_or_taken_as_given(tmp_path: Path) -> None:
    export(tmp_path, "peft", epochs=50.0)
    recipe = read_recipe(tmp_path / "out")
    rows = len(load_splits(parse_task((write_rows(tmp_path, "classification")), "tiny"), None, seed=0).train)
    assert recipe.steps == -(-50 * rows // 16)
    assert recipe.spec.max_steps == 1000


def test_changed_rows_are_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="digest"):
        export(tmp_path, "peft", digest="0000")
    assert not (tmp_path / "out").exists()


def test_a_refusal_names_the_nearest_target_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ExportError) as info:
        export(tmp_path, "trl")
    assert "Trial 3 (LoRA, 32 bits, classification) cannot be exported to trl: trl sft trains language" in str(
        info.value
    )
    assert "--to ms-swift" in str(info.value)
    assert not (tmp_path / "out").exists()


def test_where_peft_has_no_adapter_the_script_on_plain_peft_and_transformers_is_nearest(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"The nearest target that can: --to trainer\.$"):
        export(tmp_path, "peft", method="full")


def test_the_readme_names_what_has_no_settings_and_rounds_its_epochs(tmp_path: Path) -> None:
    commands = export(tmp_path, "trainer", method="full", epochs=7.0).commands
    assert commands == ("pip install torch transformers==5.23.0 accelerate", "python train.py")
    text = (tmp_path / "out" / "README.md").read_text()
    recipe = read_recipe(tmp_path / "out")
    assert f"picked as `3`: Full fine-tuning, 32 bits, lr 1e-4, on `{recipe.model}`." in text
    assert len(f"{recipe.epochs:g}") > len(f"{recipe.epochs:.3g}")
    assert f"rows {recipe.epochs:.3g} times" in text


@pytest.mark.parametrize(
    ("scorer", "packages"),
    [
        ("accuracy", ""),
        ("f1_macro", " scikit-learn"),
        ("matthews_correlation", " scikit-learn"),
        ("hub:precision", " evaluate scikit-learn"),
    ],
)
def test_the_script_is_installed_with_what_its_score_is_computed_with(
    scorer: str, packages: str, spec: TrialSpec, bundle_of: Callable[..., Bundle]
) -> None:
    bundle = bundle_of(spec)
    bundle = dataclasses.replace(bundle, task=dataclasses.replace(bundle.task, scorer=scorer))
    install, _ = TARGETS["trainer"].write(bundle).commands
    assert install == f"pip install torch transformers==5.23.0 accelerate peft==0.21.2{packages}"


def test_what_no_target_has_is_left_to_autopeft(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"peft has no bottleneck adapter.*autopeft train evening --pick 3"):
        export(tmp_path, "peft", method="bottleneck")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ExportError, match="new or empty folder"):
        export(tmp_path, "peft")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_an_unknown_target_gets_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="Did you mean 'axolotl'"):
        export(tmp_path, "axolotol")
