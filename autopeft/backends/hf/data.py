"""Token ids of a task's splits, and the order in which a trial sees them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from autopeft.backends.hf.base_model import load_config, load_tokenizer
from autopeft.backends.hf.language import IGNORED, pad_right, tokenize_completions
from autopeft.errors import TaskError
from autopeft.tasks.data import Example, Splits, load_splits
from autopeft.tasks.spec import TaskSpec

# Sorting within 50 batches keeps the epoch nearly random and pads 1.1 times instead of 2.6 (sst2, batch 16).
_BUCKET_BATCHES = 50

Batch = dict[str, torch.Tensor]


class TokenizedSplit(NamedTuple):
    """Ids stay lists until a batch is padded: rows differ in length."""

    features: list[dict[str, list[int]]]
    """Of a generation task with `labels`, one for each token; see `language`."""
    labels: list[int]
    """Class indices; zeros for a generation task."""
    completions: list[str]
    """Of a generation task, as text; else empty."""

    def prompt_ids(self, index: int) -> list[int]:
        """Of a generation task: the tokens before the first that counts."""
        feature = self.features[index]
        num_read = next((i for i, label in enumerate(feature["labels"]) if label != IGNORED), 0)
        return feature["input_ids"][:num_read]

    def lengths(self) -> list[int]:
        return [len(feature["input_ids"]) for feature in self.features]


class Rows(NamedTuple):
    """A split's rows as a model is given them."""

    lengths: Sequence[int]
    """In tokens."""
    collate: Callable[[Sequence[int]], Batch]
    """A padded batch of the rows with these numbers, on `device`."""
    device: str


class TaskData:
    """Tokenized once per worker and shared by all its trials."""

    def __init__(
        self, task: TaskSpec, *, model: str, data_dir: str | None, split_seed: int, tokenizer: str | None = None
    ) -> None:
        """`tokenizer` is where that is loaded from, if not from the model."""
        self.task = task
        self.tokenizer = load_tokenizer(tokenizer or model)
        self._most_positions: int | None = None
        if task.kind == "generation":
            config = load_config(model, None).get_text_config()
            self._most_positions = getattr(config, "max_position_embeddings", None)
        self.splits: Splits = load_splits(task, data_dir, seed=split_seed)
        self.train = self._tokenize(self.splits.train)
        self.validation = self._tokenize(self.splits.validation)
        self._test: TokenizedSplit | None = None

    @property
    def test(self) -> TokenizedSplit:
        """Tokenized when first asked for, which of workers only confirmations do."""
        if self._test is None:
            self._test = self._tokenize(self.splits.test)
        return self._test

    @property
    def longest_tokens(self) -> int:
        """Length of the longest training sequence, after cutting."""
        return max(self.train.lengths())

    def _tokenize(self, examples: Sequence[Example]) -> TokenizedSplit:
        labels = [example.label for example in examples]
        if self.task.kind == "generation":
            features = tokenize_completions(self.tokenizer, examples, max_length=self.task.max_length)
            self._check_positions(features)
            return TokenizedSplit(features, labels, [example.completion or "" for example in examples])
        texts = [example.text for example in examples]
        pairs = [example.text_pair or "" for example in examples] if self.task.text_pair else None
        encoded = self.tokenizer(texts, pairs, truncation=True, max_length=self.task.max_length)
        features = [dict(zip(encoded.keys(), values, strict=True)) for values in zip(*encoded.values(), strict=True)]
        return TokenizedSplit(features, labels, [])

    def _check_positions(self, features: Sequence[dict[str, list[int]]]) -> None:
        """Raises TaskError where a text, or what may be written after a prompt, is longer than the model can be."""
        longest = max(len(feature["input_ids"]) for feature in features)
        new_tokens = self.task.max_new_tokens if self.task.scorer == "exact_match" else 0
        read = max(feature["labels"].count(IGNORED) for feature in features)
        needed = max(longest, read + new_tokens)
        if self._most_positions is not None and needed > self._most_positions:
            raise TaskError(
                f"A text and what is written after it must fit into the model, which takes {self._most_positions:,} "
                f"tokens, but the task '{self.task.name}' has up to {needed:,}. Lower its max_length"
                f"{' or max_new_tokens' if new_tokens else ''}."
            )

    def rows(self, split: TokenizedSplit, device: str) -> Rows:
        return Rows(split.lengths(), lambda indices: self.collate(split, indices, device), device)

    def collate(self, split: TokenizedSplit, indices: Sequence[int], device: str) -> Batch:
        """One padded batch: `input_ids`, `attention_mask` and so on (B, T), `labels` (B,), or (B, T) for generation."""
        # Multiples of 8 feed tensor cores; on CPU the padding would only cost time.
        multiple = 8 if device.startswith("cuda") else None
        if self.task.kind == "generation":
            rows = [split.features[i] for i in indices]
            batch = pad_right(rows, self.tokenizer.pad_token_id, multiple)
            return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}
        features: dict[str, Any] = {key: [split.features[i][key] for i in indices] for key in split.features[0]}
        # Many decoders' tokenizers pad in front, as writing needs it. There it would put a row's text further from what
        # a soft prompt has in front of it, the longer its neighbours are.
        batch = self.tokenizer.pad(
            features, padding=True, padding_side="right", pad_to_multiple_of=multiple, return_tensors="pt"
        )
        batch["labels"] = torch.tensor([split.labels[i] for i in indices])
        return {key: tensor.to(device, non_blocking=True) for key, tensor in batch.items()}


def plan_batches(lengths: Sequence[int], *, batch_size: int, num_steps: int, seed: int) -> list[list[int]]:
    """Row indices of each training step, bucketed by length; a pure function, so a trial resumes by its step alone.

    Every epoch shuffles all rows, sorts by length within groups of 50 batches, and shuffles the batches.
    """
    rng = random.Random(seed)
    size = min(batch_size, len(lengths))
    batches: list[list[int]] = []
    while len(batches) < num_steps:
        order = list(range(len(lengths)))
        rng.shuffle(order)
        epoch: list[list[int]] = []
        for start in range(0, len(order), size * _BUCKET_BATCHES):
            group = sorted(order[start : start + size * _BUCKET_BATCHES], key=lambda i: lengths[i])
            # The last, shorter batch of an epoch is dropped: every step then weighs its rows alike.
            epoch += [group[i : i + size] for i in range(0, len(group) - size + 1, size)]
        rng.shuffle(epoch)
        batches += epoch
    return batches[:num_steps]


def scoring_batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """All rows once, sorted by length so that little is padded."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def longest_batch(rows: Rows, batch_size: int) -> Batch:
    """The worst case for memory: the longest rows together, of which at least one is padded, as in nearly every batch.

    Without any padding, as where all are cut to one length, transformers drops the mask, and attention needs neither
    that nor, where several queries share a key, copies of the keys and values (5.23, `use_gqa_in_sdpa`).
    """
    longest = sorted(range(len(rows.lengths)), key=lambda i: -rows.lengths[i])[:batch_size]
    batch = rows.collate(longest)
    # FNet's tokenizer gives none.
    mask_BT = batch.get("attention_mask")
    if mask_BT is not None and mask_BT.all():
        mask_BT[-1, -1] = 0
        if batch["labels"].dim() > 1:
            batch["labels"][-1, -1] = IGNORED
    return batch
