"""vLLM on merged models, and on adapters beside their base.

.venvs/vllm/bin/python check_vllm.py CASES
"""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}  # fmt: skip

import comparing
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

GREEDY = SamplingParams(temperature=0.0, max_tokens=comparing.NUM_NEW, logprobs=comparing.NUM_LOGPROBS)


def load(model: Path, **settings: Any) -> LLM:
    return LLM(model=str(model), dtype="float32", max_model_len=256, enforce_eager=True, **settings)


def ask(llm: LLM, case: comparing.Case, adapter: Path | None = None) -> list[comparing.Answer]:
    request = None if adapter is None else LoRARequest(case.name, 1, str(adapter))
    outputs = llm.generate(case.prompts(), GREEDY, lora_request=request, use_tqdm=False)
    case.check_ids([list(output.prompt_token_ids) for output in outputs])
    return [
        comparing.Answer(list(first.token_ids), {token: found.logprob for token, found in first.logprobs[0].items()})
        for first in (output.outputs[0] for output in outputs)
    ]


def classify(llm: LLM, case: comparing.Case) -> list[comparing.Answer]:
    outputs = llm.classify(case.prompts(), use_tqdm=False)
    case.check_ids([list(output.prompt_token_ids) for output in outputs])
    return [
        comparing.Answer([], {index: math.log(value) for index, value in enumerate(output.outputs.probs)})
        for output in outputs
    ]


def check(case: comparing.Case) -> Iterator[tuple[str, str]]:
    if case.kind == "classification":
        yield "merged", case.check("merged", classify(load(case.folder / "merged", runner="pooling"), case))
        return
    yield "merged", case.check("merged", ask(load(case.folder / "merged"), case))
    gc.collect()
    if "adapter" in case.content:
        llm = load(case.base, enable_lora=True, max_lora_rank=8)
        yield "adapter", case.check("adapter", ask(llm, case, case.folder / "trained" / "adapter"))
        yield "base", case.check("base", ask(llm, case))


if __name__ == "__main__":
    comparing.run(check)
