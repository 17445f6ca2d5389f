"""Rows of a task as trainers read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from autopeft.export.bundle import Bundle
from autopeft.export.files import Files, to_lines
from autopeft.tasks.data import Example

SPLITS = ("train", "validation", "test")
Row = dict[str, Any]


def write_rows(bundle: Bundle, to_row: Callable[[Example], Row], folder: str = "data") -> Files:
    """`data/train.jsonl`, `validation.jsonl` and `test.jsonl`: the study's own splits in its own order."""
    return {f"{folder}/{name}.jsonl": to_lines(map(to_row, getattr(bundle.splits, name))) for name in SPLITS}


def neutral_rows(bundle: Bundle) -> Files:
    """`text`, `text_pair` and `label` for a classifier; `prompt` and `completion` for a language model."""
    return write_rows(bundle, to_neutral)


def to_neutral(example: Example) -> Row:
    if example.completion is not None:
        return {"prompt": example.text, "completion": example.completion}
    pair = {} if example.text_pair is None else {"text_pair": example.text_pair}
    return {"text": example.text, **pair, "label": example.label}


def to_tokens(bundle: Bundle) -> Callable[[Example], Row]:
    """Rows of a generation task as `input_ids` and `labels`, which are -100 where nothing is learned."""
    from autopeft.backends.hf.base_model import load_tokenizer
    from autopeft.backends.hf.language import tokenize_completions

    tokenizer = load_tokenizer(bundle.model)

    def to_row(example: Example) -> Row:
        (feature,) = tokenize_completions(tokenizer, [example], max_length=bundle.task.max_length)
        return dict(feature)

    return to_row
