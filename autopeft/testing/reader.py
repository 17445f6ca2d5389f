"""Runs in a process of its own: loads what was saved and answers with logits, one JSON object a line each way.

With `plain` it refuses to know autopeft, so that what it can load is what anybody can. It is run as a file, not as a
module, because importing `autopeft.testing` would import autopeft.
"""

from __future__ import annotations

import importlib
import json
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any


def load_base(job: dict[str, Any], folder: str) -> Any:
    import torch
    from transformers import AutoModelForSequenceClassification, BitsAndBytesConfig

    quantization = None
    if job["bits"] < 16:
        quantization = BitsAndBytesConfig(
            load_in_4bit=job["bits"] == 4,
            load_in_8bit=job["bits"] == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
            llm_int8_skip_modules=job["head"],
        )
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=job["num_labels"], quantization_config=quantization
    )
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would compute in bfloat16: another rounding, not another model.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def load_with_peft(job: dict[str, Any]) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_base(job, job["base"]), job["saved"])


def load_with_transformers(job: dict[str, Any]) -> Any:
    return load_base(job, job["saved"])


def load_with_autopeft(job: dict[str, Any]) -> Any:
    from autopeft.backends.hf.base_model import load_base
    from autopeft.backends.hf.saved import load_trained
    from autopeft.methods import METHODS

    if job["method"] is not None:
        sys.path[:] = job["sys_path"]
        module, name = job["method"]
        method = getattr(importlib.import_module(module), name)
        METHODS[method.name] = method
    base = load_base(job["base"], num_labels=job["num_labels"], bits=job["bits"], device="cpu")
    return load_trained(base, Path(job["saved"]))


LOADERS = {"peft": load_with_peft, "transformers": load_with_transformers, "autopeft": load_with_autopeft}


def answer(job: dict[str, Any]) -> dict[str, Any]:
    import torch

    try:
        model = LOADERS[job["with"]](job).eval()
        with torch.no_grad():
            return {"logits": model(**{name: torch.tensor(ids) for name, ids in job["batch"].items()}).logits.tolist()}
    except Exception:
        return {"error": traceback.format_exc()}


def main() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    # Libraries print what they like; the answers must be alone on their pipe.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        reply = answer(json.loads(line))
        if sys.argv[1] == "plain":
            assert "autopeft" not in sys.modules
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
