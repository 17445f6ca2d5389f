"""Axolotl reads its files: validated by its schema, every key a field of it, rows tokenized by its own strategy."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from axolotl.prompt_strategies.input_output import load
from axolotl.utils.dict import DictDefault
from axolotl.utils.schemas.config import AxolotlInputConfig
from checking import Expected, compare, compare_rows, run
from transformers import AutoTokenizer

KNOWN = {name for name in AxolotlInputConfig.model_fields} | {
    str(alias)
    for field in AxolotlInputConfig.model_fields.values()
    for alias in (field.alias, field.validation_alias)
    if alias
}
"""Axolotl takes unknown keys without a word."""


def check(case: Path, expected: Expected) -> str:
    given = yaml.safe_load(Path("axolotl.yaml").read_text())
    compare("unknown keys", set(), set(given) - KNOWN)
    config = AxolotlInputConfig(**DictDefault(given))
    for key, value in given.items():
        theirs = getattr(config, key)
        if key not in ("datasets", "test_datasets", "special_tokens"):
            compare(key, value, getattr(theirs, "value", theirs))
    peft = expected["peft"]
    if peft is not None:
        compare("rank", (peft["r"], peft["lora_alpha"]), (config.lora_r, config.lora_alpha))
        compare("targets", sorted(peft["target_modules"]), sorted(config.lora_target_modules))
    tokenizer = AutoTokenizer.from_pretrained(given["base_model"])
    strategy = load(tokenizer, DictDefault(given))
    lines = Path(given["datasets"][0]["path"]).read_text().splitlines()[:20]
    compare_rows(expected, [strategy.tokenize_prompt(json.loads(line)) for line in lines])
    return "validated by AxolotlInputConfig, no key unknown to it, rows made into the study's tokens and labels"


if __name__ == "__main__":
    run("Axolotl", "axolotl", check)
