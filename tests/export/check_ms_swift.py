"""ms-swift reads its files: parsed as `swift sft` parses them, rows encoded by its own template."""

from __future__ import annotations

import json
import os
from pathlib import Path

os.environ["USE_HF"] = "1"

import yaml
from checking import Expected, compare, compare_rows, run
from swift.arguments import SftArguments
from swift.cli.main import parse_yaml_args
from swift.utils import parse_args


def check(case: Path, expected: Expected) -> str:
    given = yaml.safe_load(Path("train.yaml").read_text())
    Path("cpu.yaml").write_text(yaml.safe_dump({**given, "bf16": False, "use_cpu": True}))
    argv = ["cpu.yaml"]
    parse_yaml_args(argv)
    arguments, rest = parse_args(SftArguments, argv)
    compare("unknown", [], rest)
    for key, value in given.items():
        theirs = getattr(arguments, key)
        if key in ("bf16", "report_to", "torch_dtype", "output_dir", "dataset", "val_dataset", "init_weights"):
            continue
        theirs = json.loads(theirs) if isinstance(value, dict) and isinstance(theirs, str) else theirs
        compare(key, value, getattr(theirs, "value", theirs))
    _, processor = arguments.get_model_processor(load_model=False)
    template = arguments.get_template(processor)
    template.set_mode("train")
    lines = Path(given["dataset"]).read_text().splitlines()[:20]
    rows = [template.encode(json.loads(line)) for line in lines]
    if expected["kind"] == "classification":
        compare("labels", [json.loads(line)["label"] for line in lines], [row["labels"] for row in rows])
    compare_rows(expected, rows)
    if case.name not in ("classification-lora-32bit", "generation-lora-32bit"):
        return "parsed by SftArguments, every value as given, rows made into the study's tokens and labels"
    from swift.pipelines import sft_main

    sft_main(arguments)
    return "the same, and trained to the last step"


if __name__ == "__main__":
    run("ms-swift", "ms-swift", check)
