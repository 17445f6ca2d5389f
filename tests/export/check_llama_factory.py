"""LLaMA-Factory reads its files: `get_train_args`, then its own data set, tokens and training."""

from __future__ import annotations

import importlib.machinery
import os
import sys
import types
from pathlib import Path

os.environ["DISABLE_VERSION_CHECK"] = "1"
# Its data module imports torchaudio, whose wheels need CUDA libraries; only rows with sound would use it.
sys.modules["torchaudio"] = types.ModuleType("torchaudio")
sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)

import yaml  # noqa: E402
from checking import Expected, compare, compare_rows, run  # noqa: E402
from llamafactory.hparams import get_train_args  # noqa: E402


def check(case: Path, expected: Expected) -> str:
    given = yaml.safe_load(Path("train.yaml").read_text())
    parts = get_train_args({**given, "use_cpu": True, "bf16": False})
    model, data, training, finetuning, _ = parts
    for key, value in given.items():
        if key in ("bf16", "report_to", "dataset", "eval_dataset", "lora_target", "oft_target"):
            continue
        theirs = [getattr(part, key) for part in parts if hasattr(part, key)]
        assert theirs, key
        assert any(getattr(value_, "value", value_) == value for value_ in theirs), (key, value, theirs)
    peft = expected["peft"]
    if peft is not None:
        targets = finetuning.lora_target if peft["peft_type"] == "LORA" else finetuning.oft_target
        compare("targets", sorted(peft["target_modules"]), sorted(targets))
    if case.name not in ("generation-lora-32bit", "generation-oft-32bit", "generation-full-32bit"):
        return "parsed by get_train_args, every value as given"
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.model import load_tokenizer
    from llamafactory.train.tuner import run_exp

    tokenizer = load_tokenizer(model)
    template = get_template_and_fix_tokenizer(tokenizer["tokenizer"], data)
    rows = get_dataset(template, model, data, training, stage="sft", **tokenizer)["train_dataset"]
    compare_rows(expected, [rows[i] for i in range(20)])
    run_exp({**given, "use_cpu": True, "bf16": False, "optim": "adamw_torch"})
    return "parsed, rows made into the study's tokens and labels by its own data set, and trained to the last step"


if __name__ == "__main__":
    run("LLaMA-Factory", "llama-factory", check)
