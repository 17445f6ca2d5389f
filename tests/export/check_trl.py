"""TRL reads its files: parsed by `trl sft`'s own parser, with rows prepared by its own trainer."""

from __future__ import annotations

from pathlib import Path

import transformers
import yaml
from checking import Expected, compare, compare_adapter, compare_rows, run
from datasets import load_dataset
from trl import SFTTrainer, get_peft_config, get_quantization_config
from trl.scripts.sft import make_parser


def check(case: Path, expected: Expected) -> str:
    given = yaml.safe_load(Path("sft.yaml").read_text())
    # This machine has no GPU; everything else is as it was exported.
    Path("cpu.yaml").write_text(yaml.safe_dump({**given, "bf16": False, "use_cpu": True}))
    script, training, model, _ = make_parser().parse_args_and_config(["--config", "cpu.yaml"])
    for key, value in given.items():
        holder = next(part for part in (training, model, script) if hasattr(part, key))
        theirs = getattr(holder, key)
        if key not in ("bf16", "report_to"):
            compare(key, value, getattr(theirs, "value", theirs))
    compare_adapter(expected, get_peft_config(model))
    quantization = get_quantization_config(model)
    compare("4 bit", expected["bits"] == 4, bool(quantization and quantization.load_in_4bit))
    compare("8 bit", expected["bits"] == 8, bool(quantization and quantization.load_in_8bit))
    if expected["bits"] == 4:
        compare("nf4", ("nf4", True), (quantization.bnb_4bit_quant_type, quantization.bnb_4bit_use_double_quant))
    if "generation-lora-32bit" not in case.name and "generation-full-32bit" not in case.name:
        return "parsed by trl sft's own parser, every value and peft's configuration as given"
    rows = load_dataset(script.dataset_name)
    training.optim = "adamw_torch"
    trainer = SFTTrainer(
        model=model.model_name_or_path,
        args=training,
        train_dataset=rows[script.dataset_train_split],
        eval_dataset=rows[script.dataset_test_split],
        peft_config=get_peft_config(model),
    )
    # Not by `trainer.train_dataset`, which may be shuffled.
    prepared = trainer._prepare_dataset(
        rows["train"].select(range(20)), trainer.processing_class, training, False, None, "check"
    )
    compare_rows(expected, list(prepared))
    trainer.train()
    return "parsed, rows prepared by SFTTrainer to the study's tokens and labels, and trained to the last step"


if __name__ == "__main__":
    transformers.utils.logging.set_verbosity_error()
    run("TRL", "trl", check)
