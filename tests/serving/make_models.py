"""Models that `autopeft merge` wrote, and what plain transformers answers by them, for the checks by servers.

    python tests/serving/make_models.py FOLDER

Everything is made here: random bases laid out as on the hub (configuration and tokenizer under the names of
transformers 4, which is what most bases have), tokenizers trained on this repository's documents, rows of made-up
places. Each case is searched, trained and merged by the commands that a user would type. Writes FOLDER/CASE/ with
`base`, `trained` and `merged`, and FOLDER/cases.json with the prompts and the answers.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import peft
import tokenizers
import torch
import transformers
import yaml

ROOT = Path(__file__).resolve().parents[2]
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
NUM_STEPS = 120
NUM_NEW = 16
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class Case(NamedTuple):
    name: str
    base: str
    """A folder that is made here, or `minilm`, the packaged encoder, for a classifier."""
    bits: int
    kind: str = "generation"


CASES = (
    Case("llama", "llama", 32),
    Case("llama-4bit", "llama", 4),
    Case("qwen2", "qwen2", 32),
    Case("qwen2-4bit", "qwen2", 4),
    Case("minilm", "minilm", 32, "classification"),
)
LEARNING_RATES = {"generation": 2e-2, "classification": 1e-3}
"""At which random weights learn within so few steps, and MiniLM does."""

WORDS = ("search", "memory", "batch", "model", "report", "study", "trial", "table", "reader", "budget")
SIZES: dict[str, Any] = {
    "hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 256, "max_position_embeddings": 512,
    # With the usual 0.02 a random model answers alike whatever it reads, and no mistake would show.
    "initializer_range": 0.09,
}  # fmt: skip


# --- bases


def read_text() -> list[str]:
    files = (*sorted(ROOT.glob("docs/*.md")), ROOT / "README.md", ROOT / "ARCHITECTURE.md")
    return [file.read_text(encoding="utf-8") for file in files]


def train_llama_tokenizer() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """As Llama 2's: pieces of whole words, bytes for what is unknown, `<s>` in front."""
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="always")
    trained.train_from_iterator(
        read_text(), tokenizers.trainers.BpeTrainer(vocab_size=800, special_tokens=["<unk>", "<s>", "</s>"])
    )
    model = json.loads(trained.to_str())["model"]
    pieces = [piece for piece in sorted(model["vocab"], key=model["vocab"].__getitem__) if piece not in byte_tokens]
    words = [*pieces[:3], *byte_tokens, *pieces[3:]]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {word: index for index, word in enumerate(words)}, [tuple(merge) for merge in model["merges"]],
            unk_token="<unk>", fuse_unk=True, byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", words.index("<s>"))]
    )
    tokenizer.decoder = tokenizers.decoders.Sequence(
        [
            tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    settings = {
        "add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "model_max_length": 512, "legacy": False, "tokenizer_class": "LlamaTokenizer",
    }  # fmt: skip
    return tokenizer, settings


def train_qwen_tokenizer() -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """As Qwen's: bytes, and special tokens beyond those that have a role."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    words = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    spaces = r"\s*[\r\n]+|\s+(?!\S)|\s+"
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(f"{words}|{spaces}"), "isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        read_text(), tokenizers.trainers.BpeTrainer(vocab_size=1000, initial_alphabet=alphabet)
    )
    tokenizer.add_special_tokens(list(SPECIAL))
    settings = {
        "add_prefix_space": False, "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None,
        "chat_template": TEMPLATE, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": None,
        "model_max_length": 512, "split_special_tokens": False, "tokenizer_class": "Qwen2Tokenizer",
    }  # fmt: skip
    return tokenizer, settings


def make_base(kind: str, folder: Path) -> None:
    """Weights by transformers; configuration and tokenizer as the bases on the hub have them."""
    tokenizer, settings = train_llama_tokenizer() if kind == "llama" else train_qwen_tokenizer()
    size = tokenizer.get_vocab_size()
    ends = tokenizer.token_to_id(settings["eos_token"])
    torch.manual_seed(0)
    if kind == "llama":
        config = transformers.LlamaConfig(vocab_size=size, bos_token_id=1, eos_token_id=ends, **SIZES)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        model = transformers.LlamaForCausalLM(config)
    else:
        config = transformers.Qwen2Config(vocab_size=size, eos_token_id=ends, tie_word_embeddings=True, **SIZES)
        config.rope_parameters = {"rope_type": "default", "rope_theta": 1e6}
        model = transformers.Qwen2ForCausalLM(config)
    model.save_pretrained(folder)
    path = folder / "config.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    content["rope_theta"] = content.pop("rope_parameters")["rope_theta"]
    content["torch_dtype"] = content.pop("dtype")
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    generation = {"do_sample": True, "temperature": 0.7, "eos_token_id": ends, "transformers_version": "4.57.6"}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")


# --- rows, training


def make_rows(folder: Path) -> list[str]:
    """Rows of two tasks, one of each kind; returns the prompts of some test rows."""
    rng = random.Random(0)
    prompts = []
    for split, number in (("train", 600), ("test", 80)):
        lines = []
        for _ in range(number):
            name, area, food = rng.sample(WORDS, 3)
            prompt = f"the {name} in the {area} has {food}\n"
            row = {"q": prompt, "a": f"{food}: {name}, {area}.", "label": int(WORDS.index(name) < WORDS.index(food))}
            lines.append(json.dumps(row))
            prompts.append(prompt)
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    common = {"title": "Made-up places", "max_length": 64, "files": {"train": "train.jsonl", "test": "test.jsonl"}}
    tasks = {
        "generation": {"kind": "generation", "prompt": "{q}", "completion": "{a}", "scorer": "token_accuracy"},
        "classification": {"text": "q", "labels": ["later", "sooner"]},
    }
    for kind, task in tasks.items():
        (folder / f"{kind}.yaml").write_text(yaml.safe_dump({"name": kind, **common, **task}), encoding="utf-8")
    return prompts[-8:]


def run(*arguments: str | Path, folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    print("$ autopeft", *arguments, flush=True)
    subprocess.run([sys.executable, "-m", "autopeft", *arguments], cwd=folder, env=environment, check=True)


def find_base(case: Case, folder: Path) -> str:
    return case.base if case.kind == "classification" else str(folder / case.base)


def train(case: Case, folder: Path) -> None:
    """By the commands that a user would type."""
    spec = {"method": "lora", "rank": 8, "bits": case.bits, "learning_rate": LEARNING_RATES[case.kind]}
    (folder / f"{case.name}.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    run(
        "search", "--task", f"{case.kind}.yaml", "--model", find_base(case, folder), "--methods", "lora",
        "--name", case.name, "--fix", f"bits={case.bits}", "--include", f"{case.name}.yaml", "--budget", "1trials",
        "--workers", "1", "--max-steps", str(NUM_STEPS), folder=folder,
    )  # fmt: skip
    run("train", case.name, "--pick", "best", "--steps", str(NUM_STEPS), "--out", f"{case.name}/trained", folder=folder)
    run("merge", f"{case.name}/trained", "--out", f"{case.name}/merged", folder=folder)


# --- what is to be reproduced


def answer(model: Any, tokenizer: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """Of each prompt: its tokens, the logarithms of the next token's probabilities, and the likeliest continuation."""
    found = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -1]
            new = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NUM_NEW)[0, ids.shape[1] :]
        found.append(
            {
                "prompt": prompt, "ids": ids[0].tolist(), "logprobs": logits.log_softmax(-1).tolist(),
                "new": new.tolist(),
            }
        )  # fmt: skip
    return found


def classify(model: Any, tokenizer: Any, prompts: list[str]) -> list[dict[str, Any]]:
    """Of each prompt: its tokens, and the logarithms of the classes' probabilities."""
    found = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            logprobs = model(**inputs).logits[0].log_softmax(-1).tolist()
        found.append({"prompt": prompt, "ids": inputs["input_ids"][0].tolist(), "logprobs": logprobs, "new": []})
    return found


def describe(case: Case, folder: Path, prompts: list[str]) -> dict[str, Any]:
    merged = folder / case.name / "merged"
    tokenizer = transformers.AutoTokenizer.from_pretrained(merged)
    content: dict[str, Any] = {"model": find_base(case, folder), "kind": case.kind}
    if case.kind == "classification":
        classifier = transformers.AutoModelForSequenceClassification.from_pretrained(merged).eval()
        return content | {"merged": classify(classifier, tokenizer, prompts)}
    model = transformers.AutoModelForCausalLM.from_pretrained(merged).eval()
    content["merged"] = answer(model, tokenizer, prompts)
    if case.bits == 32:
        base = transformers.AutoModelForCausalLM.from_pretrained(folder / case.base)
        content["base"] = answer(base.eval(), tokenizer, prompts)
        adapted = peft.PeftModel.from_pretrained(base, folder / case.name / "trained" / "adapter").eval()
        content["adapter"] = answer(adapted, tokenizer, prompts)
    return content


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for kind in ("llama", "qwen2"):
        make_base(kind, folder / kind)
    prompts = make_rows(folder)
    cases = {}
    for case in CASES:
        train(case, folder)
        cases[case.name] = describe(case, folder, prompts)
    (folder / "cases.json").write_text(json.dumps(cases) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
