"""transformers 4 on merged models: what TGI and llama.cpp's converter are built on.

.venvs/llama-cpp/bin/python check_transformers.py CASES
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import comparing
import torch
import transformers


def ask(model: Any, ids: list[int]) -> comparing.Answer:
    given = torch.tensor([ids])
    with torch.no_grad():
        logprobs = model(input_ids=given).logits[0, -1].log_softmax(-1)
        new = model.generate(input_ids=given, do_sample=False, max_new_tokens=comparing.NUM_NEW)[0, len(ids) :]
    top = logprobs.topk(comparing.NUM_LOGPROBS)
    return comparing.Answer(new.tolist(), dict(zip(top.indices.tolist(), top.values.tolist(), strict=True)))


def classify(model: Any, ids: list[int]) -> comparing.Answer:
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
    return comparing.Answer([], dict(enumerate(logprobs.tolist())))


def check(case: comparing.Case) -> Iterator[tuple[str, str]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(case.folder / "merged")
    found = [tokenizer(prompt)["input_ids"] for prompt in case.prompts()]
    case.check_ids(found)
    if case.kind == "classification":
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(case.folder / "merged").eval()
        yield "merged", case.check("merged", [classify(classifier, ids) for ids in found])
        return
    model = transformers.AutoModelForCausalLM.from_pretrained(case.folder / "merged").eval()
    yield "merged", case.check("merged", [ask(model, ids) for ids in found])


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    comparing.run(check)
