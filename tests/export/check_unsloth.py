"""Unsloth needs a GPU to be imported, so its sources are read: every argument of the script must be one of theirs."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path

from checking import Expected, compare, run

PACKAGE = Path(importlib.util.find_spec("unsloth").submodule_search_locations[0])  # type: ignore[union-attr,index,arg-type]


def find_parameters(file: str, owner: str, name: str) -> set[str]:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.name == owner]
    function = next(f for f in classes[0].body if isinstance(f, ast.FunctionDef) and f.name == name)
    return {argument.arg for argument in [*function.args.args, *function.args.kwonlyargs]}


LOADING = find_parameters("models/loader.py", "FastLanguageModel", "from_pretrained")
# What it does not name it hands on to peft's LoraConfig.
ADAPTER = find_parameters("models/llama.py", "FastLlamaModel", "get_peft_model") | {"use_dora"}


def find_calls(script: str) -> dict[str, set[str]]:
    calls = [node for node in ast.walk(ast.parse(script)) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func): {k.arg for k in call.keywords if k.arg} for call in calls}


def check(case: Path, expected: Expected) -> str:
    calls = find_calls(Path("train.py").read_text())
    compare("from_pretrained", set(), calls["FastLanguageModel.from_pretrained"] - LOADING)
    if expected["peft"] is not None:
        compare("get_peft_model", set(), calls["FastLanguageModel.get_peft_model"] - ADAPTER)
    return "every argument of the script is a parameter in the sources of its release"


def check_cli() -> None:
    """That `unsloth train -c` still cannot say what a trial is: the reason why the export is a script."""
    spec = importlib.util.spec_from_file_location("unsloth_config", PACKAGE.parent / "unsloth_cli" / "config.py")
    module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    sys.modules["unsloth_config"] = module
    spec.loader.exec_module(module)  # type: ignore[union-attr]
    fields = {name for section in ("TrainingConfig", "DataConfig") for name in getattr(module, section).model_fields}
    lacking = {"optim", "optimizer", "lr_scheduler_type", "max_grad_norm"} & fields
    compare("fields that unsloth train has after all", set(), lacking)
    print("Unsloth: its command line's pydantic model has no optimizer, schedule or clipping to be set")


if __name__ == "__main__":
    check_cli()
    run("Unsloth", "unsloth", check)
