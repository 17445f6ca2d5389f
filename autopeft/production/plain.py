"""Loads a trained folder with plain transformers and peft, as anybody would, and answers with losses and predictions.

Run as a file in a process of its own it never imports autopeft, except to load what only autopeft can: so what it
reproduces is what a user of the folder gets. `job.json` says what to load; `answers.npz` is what it gives back.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

IGNORED = -100
"""The label of tokens that do not count."""


def load_base(job: dict[str, Any], name: str) -> Any:
    """The model at `name` as it was for training; on CPU its weights pass through `dtype` and end in float32, unless
    they are wanted `as_written`."""
    import torch
    import transformers

    dtype = getattr(torch, job["dtype"])
    # Said for a CPU too: where there is a GPU, transformers would quantize on that.
    arguments: dict[str, Any] = {"dtype": dtype, "device_map": {"": job["device"]}}
    if job["bits"] < 16:
        arguments["quantization_config"] = transformers.BitsAndBytesConfig(
            load_in_4bit=job["bits"] == 4,
            load_in_8bit=job["bits"] == 8,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype if job["device"] != "cpu" else torch.float32,
            llm_int8_skip_modules=job["head"],
        )
    if job["num_labels"] is None:
        model = transformers.AutoModelForCausalLM.from_pretrained(name, **arguments)
    else:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            name, num_labels=job["num_labels"], **arguments
        )
        # A decoder's classifier finds the last token of each row by it; where there are other parts, by the text's.
        for config in (model.config, model.config.get_text_config()):
            config.pad_token_id = job["pad_token_id"]
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes would compute in bfloat16: another rounding, not another model.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if job["device"] == "cpu" and not job.get("as_written"):
        # Quantized weights are integers; everything else computes in float32.
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.float()
            elif getattr(parameter, "quant_state", None) is not None:
                parameter.quant_state.dtype = torch.float32
    return model


def load_trained(job: dict[str, Any]) -> Any:
    """The trained model in evaluation mode, its adapter apart."""
    if job["saved_as"] == "transformers":
        model = load_base(job, job["saved"])
    elif job["saved_as"] == "peft":
        import peft

        model = peft.PeftModel.from_pretrained(load_base(job, job["base"]), job["saved"])
    else:
        from autopeft.backends.hf import base_model, saved

        base = base_model.load_base(job["base"], num_labels=job["num_labels"], bits=job["bits"], device=job["device"])
        model = saved.load_trained(base, Path(job["saved"]))
    return model.eval()


def make_batch(job: dict[str, Any], indices: Sequence[int]) -> dict[str, Any]:
    """Rows padded at their ends, on the device."""
    import torch

    rows = [job["features"][i] for i in indices]
    longest = max(len(row["input_ids"]) for row in rows)
    padding = {"input_ids": job["pad_token_id"], "labels": IGNORED}
    batch = {
        name: torch.tensor(
            [row[name] + [padding.get(name, 0)] * (longest - len(row[name])) for row in rows], device=job["device"]
        )
        for name in rows[0]
    }
    if "attention_mask" not in batch:
        lengths_B = torch.tensor([len(row["input_ids"]) for row in rows], device=job["device"])
        batch["attention_mask"] = (torch.arange(longest, device=job["device"]) < lengths_B[:, None]).long()
    return batch


def plan_batches(job: dict[str, Any], *, padded: bool = True) -> list[list[int]]:
    """All rows once, sorted by length; unless `padded`, only rows of one length together."""
    lengths = [len(feature["input_ids"]) for feature in job["features"]]
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    groups = [order] if padded else [list(alike) for _, alike in itertools.groupby(order, lambda i: lengths[i])]
    return [group[i : i + job["batch_size"]] for group in groups for i in range(0, len(group), job["batch_size"])]


def takes_padding(model: Any) -> bool:
    """False of classifiers that are given a prompt's embeddings: a decoder's then answers from the last position of
    the batch, where other rows than the longest have padding."""
    config = getattr(model, "active_peft_config", None)
    return config is None or config.peft_type not in ("PROMPT_TUNING", "P_TUNING") or config.task_type != "SEQ_CLS"


def computing(job: dict[str, Any]) -> contextlib.AbstractContextManager[Any]:
    """bfloat16 on GPUs, as in training; float32, or what the weights are in, on CPU."""
    import torch

    return contextlib.nullcontext() if job["device"] == "cpu" else torch.autocast("cuda", dtype=torch.bfloat16)


def compute_logits(model: Any, job: dict[str, Any]) -> Iterator[tuple[list[int], Any, Any]]:
    """(rows, logits (B, C) or (B, T, V) as they were computed, the batch) of every batch."""
    import torch

    model.eval()
    for indices in plan_batches(job, padded=takes_padding(model)):
        batch = make_batch(job, indices)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        with torch.no_grad(), computing(job):
            logits = model(**inputs).logits
        yield indices, logits, batch


def score_classes(logits_BC: Any, classes: Sequence[int]) -> tuple[Any, Any]:
    """Cross-entropy in nats and predicted class of each row."""
    import torch

    logits_BC, labels_B = logits_BC.float(), torch.tensor(classes, device=logits_BC.device)
    return torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none"), logits_BC.argmax(-1)


def score_completions(logits_BTV: Any, labels_BT: Any) -> tuple[Any, Any]:
    """Mean cross-entropy in nats, and share of tokens that are the likeliest, over each row's tokens that count."""
    import torch

    # Soft prompts put positions of their own in front.
    logits_BTV, labels_BT = logits_BTV[:, -labels_BT.shape[1] :][:, :-1], labels_BT[:, 1:]
    losses, shares = [], []
    # Row by row: in float32, the logits of a whole batch would be the largest tensor by far.
    for logits_TV, labels_T in zip(logits_BTV, labels_BT, strict=True):
        counted_T = labels_T != IGNORED
        count = counted_T.sum().clamp(min=1)
        loss = torch.nn.functional.cross_entropy(logits_TV.float(), labels_T, reduction="sum", ignore_index=IGNORED)
        losses.append(loss / count)
        shares.append(((logits_TV.argmax(-1) == labels_T) & counted_T).sum() / count)
    return torch.stack(losses), torch.stack(shares)


def score_rows(job: dict[str, Any], indices: Sequence[int], logits: Any, batch: dict[str, Any]) -> tuple[Any, Any]:
    """Loss in nats and prediction of each of these rows."""
    if job["num_labels"] is None:
        return score_completions(logits, batch["labels"])
    return score_classes(logits, [job["classes"][i] for i in indices])


def score(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Losses and predictions of all rows, in their order."""
    import numpy as np

    losses = np.zeros(len(job["features"]), dtype=np.float64)
    predictions = np.zeros(len(job["features"]), dtype=np.float64)
    for indices, logits, batch in compute_logits(model, job):
        row_losses, row_predictions = score_rows(job, indices, logits, batch)
        losses[indices] = row_losses.cpu().numpy()
        predictions[indices] = row_predictions.cpu().numpy()
    answers = {"losses": losses, "predictions": predictions}
    if job.get("max_new_tokens"):
        answers["written"] = write(model, job)
    return answers


def write(model: Any, job: dict[str, Any]) -> Any:
    """(N, W) ids that the model writes after each prompt, always the likeliest, filled up with padding.

    Prompts of one length go together, so that nothing is padded in front.
    """
    import numpy as np
    import torch
    import transformers

    # As in training: what the base's authors set for chatting, such as penalties, would fill in what is not given.
    own = model.get_base_model() if hasattr(model, "get_base_model") else model
    own.generation_config = transformers.GenerationConfig()
    prompts = job["prompts"]
    written = np.full((len(prompts), job["max_new_tokens"]), job["pad_token_id"], dtype=np.int64)
    for length in sorted({len(prompt) for prompt in prompts}):
        alike = [i for i, prompt in enumerate(prompts) if len(prompt) == length]
        for start in range(0, len(alike), job["batch_size"]):
            indices = alike[start : start + job["batch_size"]]
            ids = torch.tensor([prompts[i] for i in indices], device=job["device"])
            with torch.no_grad(), computing(job):
                found = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
                    max_new_tokens=job["max_new_tokens"], eos_token_id=job["eos_token_id"],
                    pad_token_id=job["pad_token_id"],
                )  # fmt: skip
            new = found[:, length:].cpu().numpy()
            written[indices, : new.shape[1]] = new
    return written


def read_logits(model: Any, job: dict[str, Any]) -> dict[str, Any]:
    """`logits` (N, C) of a classifier; (N, V) of a language model at each row's last token; and `losses` (N,) in nats.
    In the rows' order."""
    import numpy as np
    import torch

    found: dict[int, Any] = {}
    losses = np.zeros(len(job["features"]), dtype=np.float64)
    for indices, logits, batch in compute_logits(model, job):
        losses[indices] = score_rows(job, indices, logits, batch)[0].cpu().numpy()
        if logits.dim() == 3:
            logits = logits[:, -batch["input_ids"].shape[1] :]
            last_B = batch["attention_mask"].sum(-1) - 1
            logits = logits[torch.arange(len(indices), device=logits.device), last_B]
        found.update(zip(indices, logits.float().cpu(), strict=True))
    return {"logits": torch.stack([found[index] for index in range(len(found))]).numpy(), "losses": losses}


def answer(what: str, folder: Path) -> bool:
    """Reads job.json in the folder and writes answers.npz, or error.txt where it fails."""
    import numpy as np
    import torch

    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if job["threads"]:
        torch.set_num_threads(job["threads"])
    try:
        model = load_trained(job)
        answers = score(model, job) if what == "score" else read_logits(model, job)
        assert job["saved_as"] == "autopeft" or "autopeft" not in sys.modules
    except Exception:
        (folder / "error.txt").write_text(traceback.format_exc(), encoding="utf-8")
        return False
    np.savez(folder / "answers.npz", **answers)
    return True


def end_with_parent() -> None:
    """The end of standard input, however it comes about, ends this process at once."""

    def wait() -> None:
        # Not by sys.stdin, whose lock this would hold when the interpreter ends.
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main() -> None:
    """`plain.py score|logits FOLDER` answers once, as long as its standard input is open; without arguments, every line
    of that which says the same, as a list in JSON."""
    if len(sys.argv) > 1:
        end_with_parent()
    import transformers

    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    if len(sys.argv) > 1:
        sys.exit(0 if answer(sys.argv[1], Path(sys.argv[2])) else 1)
    # Libraries print what they like; the answers must be alone on their pipe.
    answers, sys.stdout = sys.stdout, sys.stderr
    for line in sys.stdin:
        what, folder = json.loads(line)
        print(json.dumps(answer(what, Path(folder))), file=answers, flush=True)


if __name__ == "__main__":
    main()
