"""Language modelling: prompts and completions as tokens, their loss, and writing.

B = examples, T = tokens, V = vocabulary. Labels are token ids where they count and -100 elsewhere, as in transformers.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from torch import nn

from autopeft.errors import ModelError
from autopeft.tasks.data import Example
from autopeft.tasks.spec import TaskSpec

IGNORED = -100
"""Label of a position that does not count."""

Feature = dict[str, list[int]]


def tokenize_completions(tokenizer: Any, examples: Sequence[Example], *, max_length: int) -> list[Feature]:
    """`input_ids` and `labels` of each example: the prompt, the completion, the end. Only the last two count.

    Prompt and completion are tokenized apart, so that a model that is given the prompt alone meets the same tokens.
    What exceeds `max_length` is cut from the left of the prompt, and where that is not enough from the end of the
    completion. Raises ModelError where the tokenizer has no end-of-sequence token.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError(
            "A generation task needs a tokenizer with an end-of-sequence token, by which a model learns to stop, but "
            "this model's has none. Use another model."
        )
    begin = _begin_ids(tokenizer)
    prompts = _encode(tokenizer, [example.text for example in examples])
    completions = _encode(tokenizer, [example.completion or "" for example in examples])
    features = []
    for prompt, completion in zip(prompts, completions, strict=True):
        counted = [*completion, tokenizer.eos_token_id][: max_length - len(begin)]
        room = max_length - len(begin) - len(counted)
        read = [*begin, *prompt[max(0, len(prompt) - room) :]]
        features.append({"input_ids": [*read, *counted], "labels": [IGNORED] * len(read) + counted})
    return features


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    # `verbose=False`: that a text is longer than the model takes is no news, it is cut off.
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _begin_ids(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts in front, where it does: Llama's has one, GPT-2's has not."""
    ids = tokenizer("a")["input_ids"]
    begin = tokenizer.bos_token_id
    return [begin] if begin is not None and ids[:1] == [begin] else []


def pad_right(features: Sequence[Feature], pad_id: int, multiple: int | None) -> dict[str, torch.Tensor]:
    """A batch to train on or to score: `input_ids`, `attention_mask`, `labels`, all (B, T)."""
    longest = max(len(feature["input_ids"]) for feature in features)
    longest = -(-longest // multiple) * multiple if multiple else longest

    def fill(name: str, value: int) -> torch.Tensor:
        return torch.tensor([f[name] + [value] * (longest - len(f[name])) for f in features])

    lengths_B = torch.tensor([len(feature["input_ids"]) for feature in features])
    mask_BT = (torch.arange(longest) < lengths_B[:, None]).long()
    return {"input_ids": fill("input_ids", pad_id), "attention_mask": mask_BT, "labels": fill("labels", IGNORED)}


def count_counted(labels_BT: torch.Tensor) -> torch.Tensor:
    """How many tokens the loss is a mean over; the first one of a row is predicted from nothing."""
    return (labels_BT[:, 1:] != IGNORED).sum()


def score_completions(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each example the mean loss in nats a counted token, and the share of those that were the likeliest; both (B,).

    Soft prompts put positions of their own in front, whose logits are left out.
    """
    logits_BTV = logits_BTV[:, -labels_BT.shape[1] :][:, :-1]
    targets_BT = labels_BT[:, 1:]
    losses, shares = [], []
    # Row by row: in float32, the logits of a whole batch would be the largest tensor by far.
    for logits_TV, targets_T in zip(logits_BTV, targets_BT, strict=True):
        counted_T = targets_T != IGNORED
        count = counted_T.sum().clamp(min=1)
        loss = nn.functional.cross_entropy(logits_TV.float(), targets_T, ignore_index=IGNORED, reduction="sum")
        losses.append(loss / count)
        shares.append(((logits_TV.argmax(-1) == targets_T) & counted_T).sum() / count)
    return torch.stack(losses), torch.stack(shares)


@torch.no_grad()
def write_completions(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    *,
    batch_size: int,
    max_new_tokens: int,
    device: str,
    on_batch: Callable[[], None] = lambda: None,
) -> list[str]:
    """What the model writes after each prompt, always the likeliest token, until it ends or has written enough.

    The model is in evaluation mode; `on_batch` is called before each batch.
    """
    configuration = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        use_cache=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    texts = [""] * len(prompts)
    for indices in _writing_batches([len(prompt) for prompt in prompts], batch_size, padded=not _has_prompt(model)):
        on_batch()
        batch = _pad_left([prompts[i] for i in indices], tokenizer.pad_token_id)
        inputs = {name: tensor.to(device) for name, tensor in batch.items()}
        with warnings.catch_warnings():
            # peft leaves positions to the model wherever it puts soft prompts in front, and says so at each token.
            warnings.filterwarnings("ignore", message="Position ids are not supported")
            written_BT = model.generate(**inputs, generation_config=configuration)
        # Where ids are given they come back in front of what was written.
        written_BT = written_BT[:, inputs["input_ids"].shape[1] :]
        for index, text in zip(indices, tokenizer.batch_decode(written_BT, skip_special_tokens=True), strict=True):
            texts[index] = text
    return texts


def _has_prompt(model: Any) -> bool:
    """Whether peft puts trained positions in front, between which and the text padding would come to lie."""
    return bool(getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False))


def _writing_batches(lengths: Sequence[int], batch_size: int, *, padded: bool) -> list[list[int]]:
    """All prompts once, by length; unpadded, those of one length alone."""
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        fits = batches and len(batches[-1]) < batch_size and (padded or lengths[batches[-1][0]] == lengths[index])
        if fits:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def _pad_left(prompts: Sequence[list[int]], pad_id: int) -> dict[str, torch.Tensor]:
    """So that all go on at the same position."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BT = torch.tensor([[pad_id] * (longest - len(prompt)) + prompt for prompt in prompts])
    lengths_B = torch.tensor([len(prompt) for prompt in prompts])
    mask_BT = (torch.arange(longest) >= longest - lengths_B[:, None]).long()
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


def match_answer(task: TaskSpec, written: str, completion: str) -> bool:
    """Whether what was written is the completion or, where the task has a pattern for it, has its answer.

    Outer and repeated white space and commas between digits do not count. The first answer is taken: a model that
    does not stop must not get a second try.
    """
    answers = []
    for text in (written, completion):
        if task.answer is not None:
            found = re.search(task.answer, text)
            if found is None:
                return False
            text = found.group(1) or ""
        answers.append(re.sub(r"(?<=\d),(?=\d)", "", " ".join(text.split())))
    return answers[0] == answers[1]
