"""Saving what a method trained, and loading it where nothing of the training is left."""

from __future__ import annotations

import atexit
import functools
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Literal, NamedTuple

import peft
import torch
from torch import nn

from autopeft.backends.hf.base_model import BaseModel
from autopeft.backends.hf.build import build_trial_model
from autopeft.backends.hf.saved import copy_adapter, save_adapter, save_trained
from autopeft.methods import find_method
from autopeft.methods.base import Method
from autopeft.records import TrialSpec
from autopeft.testing.tiny_models import NUM_LABELS

Loader = Literal["peft", "transformers", "autopeft"]


class CannotLoad(Exception):
    """The fresh process failed; the message ends with its traceback."""


class Saved(NamedTuple):
    folder: Path
    loader: Loader
    """What can load it: plain peft, plain transformers, or autopeft."""


def save_for_use(model: Any, base: BaseModel, spec: TrialSpec, folder: Path) -> Saved:
    """Writes the model with the plainest library that can load it again."""
    if isinstance(model, peft.PeftModel):
        writes_base = find_method(spec.method).writes_base(spec)
        initial = copy_adapter(build_trial_model(base, spec)) if writes_base else None
        save_adapter(model, spec, folder, initial=initial)
        return Saved(folder, "peft")
    if is_plain(model, base):
        model.save_pretrained(folder)
        return Saved(folder, "transformers")
    save_trained(model, spec, folder)
    return Saved(folder, "autopeft")


def is_plain(model: nn.Module, base: BaseModel) -> bool:
    """Whether the modules and parameters are those of the base as transformers made it, and no hook is left."""
    return describe_modules(model) == describe_modules(base.model)


def describe_modules(model: nn.Module) -> dict[str, str]:
    """Every module's type and hooks, and every parameter's shape, by name."""
    described = {}
    for name, module in model.named_modules():
        kind = type(module)
        hooks = len(module._forward_hooks) + len(module._forward_pre_hooks) + len(module._backward_hooks)
        described[name] = f"{kind.__module__}.{kind.__qualname__}" + (f" with {hooks} hooks" if hooks else "")
    return described | {name: str(tuple(parameter.shape)) for name, parameter in model.named_parameters()}


class FreshProcess:
    """One process for all loads of a kind: starting it takes seconds, a load takes milliseconds."""

    def __init__(self, role: Literal["plain", "autopeft"]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long-lived as the process)
        script = Path(__file__).with_name("reader.py")
        self._process = subprocess.Popen(
            # -P keeps this folder off sys.path, whose names could hide a library's.
            [sys.executable, "-P", str(script), role],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )
        atexit.register(self._process.kill)

    def ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            _fresh_process.cache_clear()
            raise CannotLoad(f"The process ended: {self._errors.read().decode(errors='replace')[-2000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


@functools.cache
def _fresh_process(role: Literal["plain", "autopeft"]) -> FreshProcess:
    return FreshProcess(role)


def load_logits(
    saved: Saved, method: Method, base: BaseModel, base_folder: str, batch: dict[str, torch.Tensor]
) -> torch.Tensor:
    """Logits (B, C) of the saved model, computed by a process that has nothing but the files.

    Raises CannotLoad where it fails.
    """
    job = {
        "with": saved.loader,
        "base": base_folder,
        "saved": str(saved.folder),
        "bits": base.bits,
        "head": list(base.head),
        "num_labels": NUM_LABELS,
        "batch": {name: tensor.tolist() for name, tensor in batch.items() if name != "labels"},
        "method": find_import(method) if saved.loader == "autopeft" else None,
        "sys_path": sys.path,
    }
    reply = _fresh_process("autopeft" if saved.loader == "autopeft" else "plain").ask(job)
    if "error" in reply:
        raise CannotLoad(reply["error"])
    return torch.tensor(reply["logits"])


def find_import(method: Method) -> tuple[str, str] | None:
    """The module and the name under which another process finds the method; None where METHODS must know it."""
    for module_name, module in list(sys.modules.items()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is method:
                return module_name, name
    return None
