"""What becomes of a trained model: merged into a plain one, or saved where peft has no file for its method.

Saved are two files: `trained.safetensors` with the trainable parameters under their names, head included, and
`configuration.json` with the TrialSpec. Everything else follows from the base and the spec: whatever a builder draws,
it draws from the trial's seed.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME, ModulesToSaveWrapper, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from autopeft.backends.hf.base_model import BaseModel
from autopeft.backends.hf.build import build_trial_model, trainable_parameters
from autopeft.errors import RecordError
from autopeft.methods import check_spec, find_method
from autopeft.records import TrialSpec, from_record, to_record

FORMAT = 1
"""Raised when older code would misread the files."""
_WEIGHTS = "trained.safetensors"
_CONFIGURATION = "configuration.json"


def save_trained(model: Any, spec: TrialSpec, folder: Path) -> None:
    """Writes what `load_trained` needs beside the base itself."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: p.detach().cpu().contiguous() for name, p in trainable_parameters(model).items()}
    save_file(tensors, folder / _WEIGHTS)
    configuration = {"format": FORMAT, "spec": to_record(spec)}
    (folder / _CONFIGURATION).write_text(json.dumps(configuration, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def telling_the_disk() -> Iterator[None]:
    """Raises the OSError that `torch.save` met, given an open file, in place of what PyTorch makes of it: while it
    handles what the disk said, it finds its archive's positions wrong."""
    try:
        yield
    except RuntimeError as exc:
        if isinstance(exc.__context__, OSError):
            raise exc.__context__ from None
        raise


def copy_adapter(model: Any) -> dict[str, torch.Tensor]:
    """A peft model's adapter as it is now, on the CPU, under the names that peft saves it by."""
    # Embeddings are never resized here; left to itself, peft would ask the hub whether they were.
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def save_adapter(
    model: Any, spec: TrialSpec, folder: Path, *, initial: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Writes a peft model's adapter so that plain peft loads it onto the untouched base.

    PiSSA and OLoRA move a part of the base's weights into the adapter when they are built. What they learned is then
    the difference to the adapter that they began with, which peft writes as a LoRA of twice the rank. That is
    `initial`, copied when the model was built: built again on another device, PiSSA would draw other numbers.
    """
    if not find_method(spec.method).writes_base(spec):
        model.save_pretrained(folder)
        return
    assert initial is not None
    with tempfile.TemporaryDirectory(prefix="autopeft-initial-") as begun:
        save_file(dict(initial), Path(begun) / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        model.save_pretrained(folder, path_initial_model_for_weight_conversion=begun)
    # peft 0.21.2 converts the factors alone and leaves out the head, without which its own loading fails.
    path = folder / SAFETENSORS_WEIGHTS_NAME
    save_file(get_peft_model_state_dict(model) | load_file(path), path, metadata={"format": "pt"})


def count_saved_bytes(model: Any, spec: TrialSpec) -> int:
    """Bytes of the tensors that are saved of a trained model, counted without saving, on the meta device too.

    With peft's own file they are what `save_adapter` writes, else what `save_trained` does; of full fine-tuning the
    whole model.
    """
    writes_base = find_method(spec.method).writes_base(spec)
    if isinstance(model, PeftModel):
        # Embeddings are never resized here; left to itself, peft would ask the hub whether they were.
        with _StayingOnMeta():
            tensors = get_peft_model_state_dict(model, _name_tensors(model), save_embedding_layers=False)
        # `save_adapter` writes a LoRA of twice the rank where the base was changed.
        counts = [_count_bytes(t) * (2 if writes_base and ".lora_" in name else 1) for name, t in tensors.items()]
        return sum(counts) + _count_positions(tensors)
    if spec.method == "full":
        whole = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
        return sum(map(_count_bytes, whole.values()))
    return sum(map(_count_bytes, trainable_parameters(model).values()))


def _name_tensors(model: Any) -> dict[str, torch.Tensor]:
    """As in `state_dict`, but without quantization states, which that cannot write without their values."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                tensors[f"{prefix}.{name}" if prefix else name] = buffer
    return tensors


def _count_positions(tensors: dict[str, torch.Tensor]) -> int:
    """SHiRA saves row and column of each weight, as int32; without values it has no mask to take them from."""
    if any(".shira_indices" in name for name in tensors):
        return 0
    return sum(2 * 4 * tensor.numel() for name, tensor in tensors.items() if ".shira_weight" in name)


class _StayingOnMeta(TorchFunctionMode):
    """peft moves soft prompts to the CPU before it saves them, for which there would have to be values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.cpu and args[0].is_meta:
            return args[0]
        return func(*args, **(kwargs or {}))


def _count_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def load_trained(base: BaseModel, folder: Path) -> Any:
    """The trained model in evaluation mode, on a base loaded as it was for training (same model, labels and bits).

    Raises RecordError where the files are not ours or do not fit this base.
    """
    spec = _read_spec(folder)
    if spec.bits != base.bits:
        raise RecordError(f"'{folder}' was trained on a base of {spec.bits} bits, but the base given has {base.bits}.")
    model = build_trial_model(base, spec)
    parameters = trainable_parameters(model)
    try:
        tensors = load_file(folder / _WEIGHTS)
    except (OSError, SafetensorError) as exc:
        raise RecordError(f"'{folder}' must hold a readable {_WEIGHTS}, but does not: {exc}.") from exc
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    wrong = sorted(set(shapes.items()) ^ {(name, tuple(tensor.shape)) for name, tensor in tensors.items()})
    if wrong:
        name, shape = wrong[0]
        raise RecordError(
            f"What {spec.method} trains on this base must be what '{folder / _WEIGHTS}' holds, but {name} {shape} is "
            "only in one of them. Load the base that it was trained on, with as many labels."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])
    return model.eval()


def merge_adapter(model: Any) -> Any:
    """The model with its adapter folded into the base weights, in place: a plain transformers model.

    A model that is plain already comes back as it is. Merging writes into weights, which a trial shares with the
    resident base: give it a copy.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    for name, module in list(model.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            # peft 0.21.2 takes every wrapped head for one linear layer, and fails on T5's and ModernBERT's.
            model.set_submodule(name, module.modules_to_save[module.active_adapters[0]])
    return model.merge_and_unload()


def _read_spec(folder: Path) -> TrialSpec:
    path = folder / _CONFIGURATION
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as exc:
        raise RecordError(f"'{folder}' must hold a readable {_CONFIGURATION}, but does not: {exc}.") from exc
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise RecordError(f"'{path}' must be of format {FORMAT}. Read it with the version of autopeft that wrote it.")
    spec = from_record(TrialSpec, data.get("spec"), str(path))
    check_spec(spec)
    return spec
