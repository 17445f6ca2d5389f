"""The model card: README.md of a finished folder, with the metadata that the Hugging Face hub reads.

Everything in it is a fact from the recipe, the result or the study. What is not known, such as the licence of a base
whose own card is not on this machine, is left out of the metadata and named as unknown in the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from autopeft.errors import ModelError
from autopeft.methods import find_method
from autopeft.production.files import TrainingResult, read_local
from autopeft.production.recipe import Recipe
from autopeft.production.snippet import find_base_id, make_code
from autopeft.records import StudyRecord
from autopeft.report.scores import held_out_score, serving_seconds, validation_score
from autopeft.report.tables import escape_markdown
from autopeft.report.words import (
    NOTHING,
    describe_latency,
    describe_settings,
    format_bytes,
    format_count,
    format_latency,
    format_learning_rate,
    format_margin,
    format_quality,
    format_seconds,
    format_vram,
    title_method,
    title_scorer,
)
from autopeft.tasks.spec import TaskSpec, parse_task
from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.production.merge import Merged

CARD_FILE = "README.md"
_CHOSEN = "## How it was chosen"
_METRICS = {"f1_macro": "f1", "f1_binary": "f1"}
"""Scorers that the hub knows under another name."""


def write_card(folder: Path, recipe: Recipe, result: TrainingResult, study_record: StudyRecord | None) -> Path:
    """Writes README.md into a finished folder. Without the study's record there is no table of its front."""
    path = folder / CARD_FILE
    path.write_text(make_card(folder, recipe, result, study_record), encoding="utf-8")
    return path


def carry_card(folder: Path, recipe: Recipe, result: TrainingResult, merged: Merged) -> Path:
    """The merged model's card, into its folder. How it was chosen is as the finished folder's own card says it."""
    own = folder / CARD_FILE
    chosen = _cut_section(own.read_text(encoding="utf-8"), _CHOSEN) if own.is_file() else None
    path = merged.folder / CARD_FILE
    path.write_text(make_card(folder, recipe, result, None, merged=merged, chosen=chosen), encoding="utf-8")
    return path


def _cut_section(text: str, title: str) -> str | None:
    start = text.find(f"{title}\n")
    if start < 0:
        return None
    end = text.find("\n## ", start)
    return text[start : None if end < 0 else end].rstrip()


def make_card(
    folder: Path,
    recipe: Recipe,
    result: TrainingResult,
    study_record: StudyRecord | None,
    *,
    merged: Merged | None = None,
    chosen: str | None = None,
) -> str:
    """The card's text. `chosen` stands for what the study's record would say, where another card has said it."""
    task = parse_task(recipe.task, "the recipe's task")
    license_name = find_license(recipe, folder)
    data = _make_metadata(recipe, result, task, license_name, merged)
    sections = [
        _say_what(recipe, result, task, merged),
        _say_results(recipe, result, merged),
        _say_how_to_load(recipe, result, task, merged),
        chosen or _say_how_chosen(recipe, result, study_record),
        _say_configuration(recipe, result),
        _say_costs(result, study_record),
        _say_limits(recipe, result, task, license_name),
        _say_origin(recipe, result),
    ]
    text = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n"
    # Reading it back is the hub's own check of the metadata, as far as it goes without the hub.
    ModelCard(text)
    return text


def find_license(recipe: Recipe, folder: Path) -> str | None:
    """What the base's own card says, where it is on this machine; nobody is asked for it."""
    from autopeft.backends.hf.base_model import resolve_model

    model = read_local(folder).model or recipe.model
    try:
        place: Path | None = Path(resolve_model(model)) / CARD_FILE
    except ModelError:
        return None
    if place is not None and not place.is_file():
        found = None if Path(model).exists() or ":" in model else try_to_load_from_cache(model, CARD_FILE)
        place = Path(found) if isinstance(found, str) else None
    if place is None:
        return None
    parts = place.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    try:
        metadata = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0].strip() else None
    except yaml.YAMLError:
        return None
    license_name = metadata.get("license") if isinstance(metadata, dict) else None
    return license_name if isinstance(license_name, str) else None


# --- metadata


def _make_metadata(
    recipe: Recipe, result: TrainingResult, task: TaskSpec, license_name: str | None, merged: Merged | None
) -> ModelCardData:
    plain = merged is not None or result.saved_as == "transformers"
    base_id = find_base_id(recipe)
    metric = _METRICS.get(result.scorer, result.scorer.removeprefix("hub:"))
    kind = "text-classification" if task.labels else "text-generation"
    optional: dict[str, Any] = {} if base_id is None else {"base_model_relation": "finetune" if plain else "adapter"}
    dataset: dict[str, Any] = {
        "task_type": kind,
        "dataset_type": task.hub.path if task.hub else task.name,
        "dataset_name": task.title,
        "dataset_config": task.hub.config if task.hub else None,
        "dataset_split": task.hub.test if task.hub else "test",
    }
    return ModelCardData(
        base_model=base_id,
        datasets=[task.hub.path] if task.hub else None,
        eval_results=[
            EvalResult(
                **dataset, metric_type=metric, metric_value=round(result.test_quality, 6), metric_name=result.scorer
            ),
            EvalResult(
                **dataset, metric_type="loss", metric_value=round(result.test_loss, 6), metric_name="mean loss, nats"
            ),
        ],
        library_name="transformers" if plain else result.saved_as,
        license=license_name,
        metrics=[metric],
        model_name=f"{recipe.task_name}-{_short_name(recipe)}-{recipe.spec.method}",
        pipeline_tag=kind,
        tags=["autopeft", recipe.spec.method, *(["merged"] if merged else [])],
        **optional,
    )


def _short_name(recipe: Recipe) -> str:
    return (find_base_id(recipe) or recipe.model.removeprefix("local:")).split("/")[-1]


# --- the text, section by section


def _say_what(recipe: Recipe, result: TrainingResult, task: TaskSpec, merged: Merged | None) -> str:
    base_id = find_base_id(recipe)
    base = (
        f"[{base_id}](https://huggingface.co/{base_id})" if base_id else f"a local model named `{_short_name(recipe)}`"
    )
    method = title_method(recipe.spec.method)
    what = f"{method}, trained on {base}"
    if merged:
        what = f"{base}, fine-tuned with {method} and merged into one plain model"
    what = f"{what[0].upper()}{what[1:]}"
    score = _score(result.test_quality, result.test_standard_error, result.scorer)
    return (
        f"# {escape_markdown(task.title)}: {method} on {escape_markdown(_short_name(recipe))}\n\n"
        f"{what}, for the task {escape_markdown(task.title)}: **{score} {title_scorer(result.scorer)}** on "
        f"{result.num_test:,} test examples. The configuration was searched, trained and scored by autopeft "
        f"{result.autopeft}."
    )


def _score(value: float, error: float | None, scorer: str) -> str:
    return format_quality(value, scorer) + (f" ± {format_margin(error, scorer)}" if error is not None else "")


def _say_results(recipe: Recipe, result: TrainingResult, merged: Merged | None) -> str:
    scorer, prediction = result.scorer, result.prediction
    rows = [["Split", title_scorer(scorer), "Loss, nats", "Examples"]]
    test = _score(result.test_quality, result.test_standard_error, scorer)
    rows.append(["test", test, f"{result.test_loss:.4f}", f"{result.num_test:,}"])
    if result.validation_quality is not None and result.validation_loss is not None:
        quality = format_quality(result.validation_quality, scorer)
        rows.append(["search-validation", quality, f"{result.validation_loss:.4f}", f"{result.num_validation:,}"])
    lines = ["## Results", "", *_table(rows, numbers=3), "", "± is the standard error over the test examples."]
    if prediction.test_quality is not None:
        seeds = say_count(prediction.num_confirmed, "seed")
        if prediction.test_sd is not None:
            seeds += ", ± is the standard deviation between them"
        lines[-1] += (
            f" The study had measured {_score(prediction.test_quality, prediction.test_sd, scorer)} on the test split "
            f"for this configuration after {recipe.say_measured_steps()} ({seeds})."
        )
    if result.agreement is not None:
        agrees = "agree" if result.agreement.agrees else "DISAGREE beyond noise"
        lines[-1] += (
            f" On the {result.agreement.split} split the study and this training {agrees} (z = "
            f"{result.agreement.z:+.2f}; 1.96 is the limit)."
        )
    if merged:
        lines += ["", *_say_merge(merged)]
    return "\n".join(lines)


def _say_merge(merged: Merged) -> list[str]:
    lines = [
        f"The scores are those of the model before merging. On {merged.num_rows} rows of the test split the merged "
        f"logits differ from the unmerged by at most {merged.difference:.1g} in float32 (the largest logit is "
        f"{merged.largest_logit:.3g}), and as written in {merged.dtype} by {merged.written_difference:.1g}; "
        f"{merged.same_answers:.0%} of the rows have the same answer, and their mean loss goes from "
        f"{merged.loss:.4f} to {merged.written_loss:.4f} nats."
    ]
    if merged.quantization_difference is not None:
        lines.append(
            "It was trained on a quantized base, and merged into that base's dequantized weights: against the "
            f"quantized model the logits differ by at most {merged.quantization_difference:.2g}."
        )
    return lines


def _say_how_to_load(recipe: Recipe, result: TrainingResult, task: TaskSpec, merged: Merged | None) -> str:
    return "\n".join(
        ["## Load it", "", "```python", *make_code(recipe, result, task, merged=merged is not None), "```"]
    )


def _say_how_chosen(recipe: Recipe, result: TrainingResult, study: StudyRecord | None) -> str:
    lines = [_CHOSEN, ""]
    prediction = recipe.prediction
    origin = f"Trial {recipe.trial} of the study `{recipe.study}`, picked as `{recipe.pick}`"
    if study is None:
        measured = ""
        if prediction.validation_quality is not None:
            quality = format_quality(prediction.validation_quality, prediction.scorer)
            measured = (
                f" There it had {quality} on {prediction.num_validation:,} search-validation examples after "
                f"{recipe.say_measured_steps()}."
            )
        return "\n".join([*lines, f"{origin}.{measured} The study's record, and with it its front, was not at hand."])
    why = next((pick.why.rstrip(".") for pick in study.picks if pick.name == recipe.pick), "")
    methods = {trial.spec.method for trial in study.trials if trial.rungs}
    tried = sum(bool(trial.rungs) for trial in study.trials)
    objectives = ", ".join(study.config.objectives)
    lines.append(
        f"{origin}{f' ({why})' if why else ''}. The study trained {say_count(tried, 'configuration')} of "
        f"{say_count(len(methods), 'method')} within the budget {study.config.budget}, compared them on "
        f"{study.provenance.num_validation:,} search-validation examples, and retrained finalists with other seeds. "
        f"Test scores chose nothing. The trade-off front ({objectives}):"
    )
    return "\n".join([*lines, "", *_front_table(recipe, study)])


def _front_table(recipe: Recipe, study: StudyRecord) -> list[str]:
    scorer = study.config.scorer
    members = {member.number: member.confidence for member in study.front}
    picked: dict[int, list[str]] = {}
    for pick in study.picks:
        picked.setdefault(pick.number, []).append(pick.name)
    shown = [t for t in study.trials if t.number in members or t.number == recipe.trial or t.number in picked]
    shown.sort(key=lambda trial: (-(trial.quality or 0.0), trial.number))
    with_latency = any(serving_seconds(trial) for trial in shown)
    header = ["Trial", "Pick", "Method", "Configuration", "Bits", "Search-validation", "Test", "Params", "Peak VRAM"]
    rows = [[*header, *(["Latency"] if with_latency else []), "On front"]]
    for trial in shown:
        validation, test = validation_score(trial, scorer), held_out_score(trial, scorer)
        number = f"**{trial.number}, this one**" if trial.number == recipe.trial else str(trial.number)
        share = members.get(trial.number)
        latency = serving_seconds(trial)
        rows.append(
            [
                number,
                ", ".join(picked.get(trial.number, [])),
                title_method(trial.spec.method),
                escape_markdown(describe_settings(trial.spec)) or NOTHING,
                str(trial.spec.bits),
                validation.text(scorer) if validation else NOTHING,
                test.text(scorer) if test else NOTHING,
                format_count(trial.cost.trainable_parameters) if trial.cost else NOTHING,
                format_vram(trial.cost) if trial.cost else NOTHING,
                *([format_latency(latency) if latency else NOTHING] if with_latency else []),
                "no" if share is None else f"yes, in {share:.0%} of resamples",
            ]
        )
    return _table(rows, numbers=0)


def _say_configuration(recipe: Recipe, result: TrainingResult) -> str:
    spec = recipe.spec
    method = find_method(spec.method)
    accumulated = (
        f" ({recipe.gradient_accumulation} x {recipe.micro_batch})" if recipe.gradient_accumulation > 1 else ""
    )
    cycles = f", {recipe.num_cycles} cycles" if recipe.num_cycles > 1 else ""
    rows = [
        ["Setting", "Value"],
        ["Method", f"{method.title}, {method.paper}"],
        ["Settings", escape_markdown(describe_settings(spec)) or NOTHING],
        ["Base weights", f"{recipe.bits} bits" + (", NF4 twice quantized" if recipe.bits == 4 else "")],
        ["Trainable parameters", f"{result.trainable_parameters:,}, and {result.head_parameters:,} of the task head"],
        [
            "Optimizer",
            f"{recipe.optimizer}, weight decay {recipe.weight_decay:.3g}, clipped at {recipe.max_grad_norm:g}",
        ],
        ["Learning rate", f"{format_learning_rate(recipe.learning_rate)}, {recipe.schedule}{cycles}"],
        ["Warm-up", f"{recipe.warmup_steps:,} steps"],
        ["Batch", f"{recipe.effective_batch}{accumulated}"],
        ["Steps", f"{result.steps:,} of {recipe.steps:,}; the weights are those of step {result.best_step:,}"],
        ["Precision", recipe.precision],
        *([["Adapter begun by", f"continued pre-training, digest `{recipe.pretrained}`"]] if recipe.pretrained else []),
        ["Seed", str(recipe.seed)],
    ]
    return "\n".join(["## Configuration", "", *_table(rows, numbers=0)])


def _say_costs(result: TrainingResult, study: StudyRecord | None) -> str:
    memory = f", at most {format_bytes(result.peak_bytes)} allocated on a GPU" if result.peak_bytes else ""
    lines = [
        "## Costs",
        "",
        f"- Training: {format_seconds(result.train_seconds)} on {escape_markdown(result.device)}"
        f"{f' by {result.processes} processes' if result.processes > 1 else ''}{memory}.",
        f"- Weights on disk: {format_bytes(result.adapter_bytes)}.",
    ]
    if result.inference is not None:
        device = escape_markdown(result.inference.device)
        lines.append(f"- Latency on {device}: {describe_latency(result.inference)}.")
    if study is not None:
        ledger = study.ledger
        seconds = ledger.search_seconds + ledger.confirm_seconds + ledger.baseline_seconds + ledger.lost_seconds
        unit = "GPU" if study.config.device_kind == "cuda" else "core"
        lines.append(
            f"- The search that chose it: {format_seconds(seconds)} of {unit} time on "
            f"{escape_markdown(study.provenance.device)}, {format_seconds(ledger.wall_seconds)} by the clock."
        )
    return "\n".join(lines)


def _say_limits(recipe: Recipe, result: TrainingResult, task: TaskSpec, license_name: str | None) -> str:
    if task.labels:
        does = (
            f"It answers with one of {len(task.labels)} labels: {', '.join(task.labels)}. It always answers with one."
        )
    else:
        does = "It continues prompts as the task's rows have them."
    where = f"`{task.hub.path}`" if task.hub else "files of their own"
    lines = [
        "## Use and limits",
        "",
        f"- {escape_markdown(does) if task.labels else does}",
        f"- It has learned from {result.num_train:,} rows of the task {escape_markdown(task.title)} ({where}). Its "
        "score on texts of another kind was not measured, nor was any bias that rows or base may hold.",
        f"- Texts are cut after {task.max_length} tokens.",
        f"- The base's own card says: licence `{license_name}`, which its derivatives have to respect."
        if license_name
        else "- The licence of the base was not known where this card was written, so none is declared here. Look it "
        "up before you use or publish the model.",
    ]
    return "\n".join(lines)


def _say_origin(recipe: Recipe, result: TrainingResult) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in sorted(result.packages.items()))
    rows = [
        ["What", "Value"],
        ["Study, trial", f"`{recipe.study}` ({recipe.study_uid}), {recipe.trial}"],
        ["Digest of the rows and their splits", f"`{result.data_digest}`"],
        ["Digest of the base's weights", f"`{result.model_digest}`" if result.model_digest else NOTHING],
        *([f"SHA-256 of {name}", f"`{digest}`"] for name, digest in sorted(result.weights_digests.items())),
        ["Software", f"autopeft {result.autopeft}, {packages}"],
        ["Finished, UTC", result.finished_at],
    ]
    again = "`autopeft verify` loads the folder in a fresh process and scores it again."
    return "\n".join(["## Provenance", "", *_table(rows, numbers=0), "", again])


def _table(rows: list[list[str]], *, numbers: int) -> list[str]:
    """Markdown; the last `numbers` columns are aligned right."""
    width = len(rows[0])
    rule = ["---"] * (width - numbers) + ["--:"] * numbers
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], rule, *rows[1:])]
