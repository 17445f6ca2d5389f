"""Random models small enough for tests, made on the spot: four architectures with one vocabulary of made-up words.

A model is made in 50 ms, and a training step takes 5.
"""

from __future__ import annotations

import atexit
import functools
import json
import random
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import tokenizers
import torch
import transformers

from autopeft.backends.hf.base_model import BaseModel, load_base
from autopeft.backends.hf.data import Batch
from autopeft.methods.base import ModelKind
from autopeft.records import Bits

ArchitectureName = Literal["bert", "llama", "t5", "modernbert"]

_PAD, _END, _UNKNOWN, _START = range(4)
_SPECIAL = ("<pad>", "</s>", "<unk>", "<s>")
_WORDS = tuple(f"word{index}" for index in range(92))
_VOCABULARY = (*_SPECIAL, *_WORDS)
NUM_LABELS = 2


class Architecture(NamedTuple):
    kind: ModelKind
    make_config: Callable[[], Any]


def _sizes(**names: str) -> dict[str, int]:
    """Sizes under the names that a configuration class has for them."""
    sizes = {"hidden": 64, "layers": 2, "heads": 4, "inner": 128}
    return {name: sizes[meaning] for meaning, name in names.items()}


_COMMON = {"vocab_size": len(_VOCABULARY), "pad_token_id": _PAD, "eos_token_id": _END, "bos_token_id": _START}
_NAMES = {
    "hidden": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads", "inner": "intermediate_size"
}  # fmt: skip
# 1 / sqrt(64): with the usual 0.02 a random model is so nearly linear that the logits hide most mistakes.
_SPREAD = {"initializer_range": 0.125}

ARCHITECTURES: dict[ArchitectureName, Architecture] = {
    "bert": Architecture("encoder", lambda: transformers.BertConfig(**_COMMON, **_sizes(**_NAMES), **_SPREAD)),
    "llama": Architecture(
        "decoder",
        # Fewer keys than queries, as in every Llama since the third.
        lambda: transformers.LlamaConfig(**_COMMON, **_sizes(**_NAMES), **_SPREAD, num_key_value_heads=2),
    ),
    "t5": Architecture(
        "encoder-decoder",
        lambda: transformers.T5Config(
            **_COMMON,
            **_sizes(hidden="d_model", layers="num_layers", heads="num_heads", inner="d_ff"),
            d_kv=16,
            feed_forward_proj="gated-gelu",
            decoder_start_token_id=_PAD,
        ),
    ),
    "modernbert": Architecture(
        "encoder",
        lambda: transformers.ModernBertConfig(
            **_COMMON, **_sizes(**_NAMES), **_SPREAD, cls_token_id=_START, sep_token_id=_END
        ),
    ),
}
"""Two encoders, because BERT and ModernBERT name and fuse their layers differently."""


@functools.cache
def _root() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="autopeft-tiny-")
    atexit.register(folder.cleanup)
    return Path(folder.name)


@functools.cache
def tiny_folder(architecture: ArchitectureName) -> str:
    """A folder with a random classifier of two layers and its tokenizer; made once a process."""
    folder = _root() / architecture
    config = ARCHITECTURES[architecture].make_config()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.AutoModelForSequenceClassification.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                # Norms and biases are drawn as ones and zeros: a method that loses them would not be seen.
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    _tokenizer().save_pretrained(folder)
    return str(folder)


def _tokenizer() -> Any:
    vocabulary = {word: index for index, word in enumerate(_VOCABULARY)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    # T5 classifies by the one end-of-sequence token of each row.
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", _START), ("</s>", _END)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        bos_token="<s>",
        model_input_names=["input_ids", "attention_mask"],
    )


@functools.cache
def _loaded() -> dict[tuple[ArchitectureName, Bits], BaseModel]:
    return {}


def tiny_base(architecture: ArchitectureName, bits: Bits) -> BaseModel:
    """The resident base, as a worker loads it; kept for all tests of the process."""
    bases = _loaded()
    if (architecture, bits) not in bases:
        bases[architecture, bits] = load_base(tiny_folder(architecture), num_labels=NUM_LABELS, bits=bits, device="cpu")
    return bases[architecture, bits]


def forget_tiny_base(architecture: ArchitectureName, bits: Bits) -> None:
    """After a method has damaged a base, so that the next one is not blamed for it."""
    _loaded().pop((architecture, bits), None)


NUM_FULL_ROWS = 7
"""Of `tiny_batch`; the last of its eight is padded."""


def tiny_batch() -> Batch:
    """Eight rows of twelve tokens, the last row padded, as `TaskData.collate` would give them."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(len(_SPECIAL), len(_VOCABULARY), (8, 12), generator=generator)
    ids_BT[:, 0] = _START
    ids_BT[:, -1] = _END
    mask_BT = torch.ones_like(ids_BT)
    ids_BT[-1, 7:] = _PAD
    ids_BT[-1, 6] = _END
    mask_BT[-1, 7:] = 0
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": torch.tensor([0, 1, 1, 0, 1, 0, 0, 1])}


def pad_further(batch: Batch, count: int = 5) -> Batch:
    """The same rows as they would be beside one that is longer by `count` tokens."""
    added = {"input_ids": _PAD, "attention_mask": 0}
    return {
        name: torch.nn.functional.pad(tensor, (0, count), value=added[name]) if name in added else tensor
        for name, tensor in batch.items()
    }


@functools.cache
def tiny_task() -> str:
    """A task file's text: 64 rows of words; which one comes first decides the label."""
    rng = random.Random(0)
    path = _root() / "rows.jsonl"
    rows = []
    for index in range(64):
        words = [_WORDS[2 * rng.randrange(len(_WORDS) // 2) + index % 2], *rng.choices(_WORDS, k=rng.randint(3, 8))]
        rows.append(json.dumps({"text": " ".join(words), "label": index % 2}))
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return f"name: tiny\ntitle: Made-up words\ntext: text\nlabels: [even, odd]\nfiles: {{train: {path}}}\n"
