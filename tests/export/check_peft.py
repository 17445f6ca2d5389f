"""Plain peft reads adapter_config.json, and the stand-alone script trains, where autopeft is not installed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import peft
import transformers
from checking import Expected, compare, run

assert importlib.util.find_spec("autopeft") is None, "autopeft must not be within reach of this check"


def check(case: Path, expected: Expected) -> str:
    import json

    config = peft.PeftConfig.from_pretrained(".")
    compare("peft_type", expected["peft"]["peft_type"], config.peft_type.value)
    model = json.loads(Path("local.json").read_text())["model"]
    auto = (
        transformers.AutoModelForCausalLM
        if expected["kind"] == "generation"
        else transformers.AutoModelForSequenceClassification
    )
    trainable = peft.get_peft_model(auto.from_pretrained(model), config).get_nb_trainable_parameters()[0]
    assert trainable > 0
    return "read by PeftConfig.from_pretrained and put on the model by get_peft_model"


def check_script(case: Path, expected: Expected) -> str:
    compile(Path("train.py").read_text(), "train.py", "exec")
    if case.name not in ("classification-lora-32bit", "generation-lora-32bit", "generation-full-32bit"):
        return "compiled"
    subprocess.run([sys.executable, "train.py"], check=True, capture_output=True)
    assert Path("output/results.json").is_file()
    return "run to the end where autopeft is not installed"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    target = sys.argv[2]
    run(target, target, {"peft": check, "trainer": check_script}[target])
