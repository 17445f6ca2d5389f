"""Python that loads a trained model and answers one text, as a model card shows it."""

from __future__ import annotations

from autopeft.production.files import TrainingResult
from autopeft.production.recipe import Recipe
from autopeft.tasks.spec import TaskSpec

HERE = '"adapter"  # beside this file'
"""What a card's code loads until it is pushed; then the repository's name stands there."""

_NEW_TOKENS = 64
"""Where the task does not say how long an answer is."""
_MINILM_ID = "sentence-transformers/all-MiniLM-L6-v2"
"""Whose weights the packaged `minilm` are."""


def find_base_id(recipe: Recipe) -> str | None:
    """The base's name on the hub; None for a folder of somebody's own."""
    if recipe.model.startswith("local:"):
        return None
    return _MINILM_ID if recipe.model == "minilm" else recipe.model


def make_code(recipe: Recipe, result: TrainingResult, task: TaskSpec, *, merged: bool) -> list[str]:
    """Lines of Python that load the model and answer one text."""
    auto = "AutoModelForSequenceClassification" if task.labels else "AutoModelForCausalLM"
    base = find_base_id(recipe) or "FOLDER"
    where = '"."  # this folder' if merged else HERE
    if not merged and result.saved_as == "autopeft":
        return [
            "from pathlib import Path",
            "",
            "from autopeft.backends.hf.base_model import load_base, load_tokenizer",
            "from autopeft.backends.hf.saved import load_trained",
            "",
            f"folder = {where}",
            f'base = load_base("{"minilm" if recipe.model == "minilm" else base}", '
            f'num_labels={len(task.labels) or None}, bits={recipe.bits}, device="cpu")',
            "tokenizer = load_tokenizer(folder)",
            "model = load_trained(base, Path(folder))",
            *_answer(task),
        ]
    lines = [f"from transformers import {auto}, AutoTokenizer{_quantizer(recipe, merged)}"]
    if merged or result.saved_as == "transformers":
        lines += ["", f"folder = {where}", f"model = {auto}.from_pretrained(folder)"]
    else:
        arguments = [f'"{base}"']
        arguments += [f"num_labels={len(task.labels)}"] if task.labels else []
        quantized = recipe.bits < 16
        arguments += ["quantization_config=quantization"] if quantized else []
        lines += ["from peft import PeftModel", "", f"folder = {where}"]
        if quantized:
            width = 'load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True'
            width = width if recipe.bits == 4 else "load_in_8bit=True"
            skip = ', llm_int8_skip_modules=["classifier", "score"]' if task.labels else ""
            lines.append(f"quantization = BitsAndBytesConfig({width}{skip})")
        lines += [
            f"base = {auto}.from_pretrained({', '.join(arguments)})",
            "model = PeftModel.from_pretrained(base, folder)",
        ]
    lines += ["tokenizer = AutoTokenizer.from_pretrained(folder)"]
    if task.labels:
        lines.append("model.config.get_text_config().pad_token_id = tokenizer.pad_token_id")
    return [*lines, "model.eval()", *_answer(task)]


def _quantizer(recipe: Recipe, merged: bool) -> str:
    return ", BitsAndBytesConfig" if recipe.bits < 16 and not merged else ""


def _answer(task: TaskSpec) -> list[str]:
    if not task.labels:
        length = task.max_new_tokens if task.scorer == "exact_match" else _NEW_TOKENS
        note = "  # as rows had it, with their columns for what is in braces" if task.prompt else ""
        return [
            f"prompt = {task.prompt or 'How a text begins'!r}{note}",
            'inputs = tokenizer(prompt, return_tensors="pt").to(model.device)',
            f"written = model.generate(**inputs, max_new_tokens={length}, do_sample=False)",
            'print(tokenizer.decode(written[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
        ]
    texts = '"A text"' if task.text_pair is None else '"A text", "and the other"'
    return [
        f"labels = {list(task.labels)!r}",
        f'inputs = tokenizer({texts}, truncation=True, max_length={task.max_length}, return_tensors="pt")'
        ".to(model.device)",
        "print(labels[model(**inputs).logits.argmax().item()])",
    ]
