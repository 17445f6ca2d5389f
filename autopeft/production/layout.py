"""What a folder needs beside its weights so that other programs load it, older ones too.

transformers 5 writes a few things under names of its own: the base of rotary positions, further special tokens, the
class of a tokenizer. transformers 4 (4.57.6) then fails, or takes its default base and answers otherwise without a
word; llama.cpp's converter and TGI are built on it. So these things are said under the older names as well, which
transformers 5 reads too, and a tokenizer's files are the base's own wherever the base has them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from autopeft.backends.hf.base_model import resolve_model
from autopeft.hub import find_cached

_TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = (
    _TOKENIZER_CONFIG, "tokenizer.model", "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "spiece.model",
    "added_tokens.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_OF_LOADING = ("is_local", "local_files_only", "name_or_path", "tokenizer_file", "special_tokens_map_file")
"""What transformers notes of where a tokenizer came from."""
_ROPE = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
"""What transformers 4 calls what is in `rope_parameters`."""


def complete_folder(folder: Path, tokenizer: Any, model: str) -> None:
    """Adds the tokenizer to a folder with saved weights, and makes both readable for others. `model` is the base as
    transformers loads it, and `tokenizer` was loaded from there."""
    tokenizer.save_pretrained(folder)
    saved = _read(folder / _TOKENIZER_CONFIG)
    # These have what older readers want and transformers no longer writes, and no trace of how rows were cut.
    base = _find_base(model)
    for name in _TOKENIZER_FILES:
        if base is not None and (base / name).is_file():
            shutil.copyfile(base / name, folder / name)
    settings = _read(folder / _TOKENIZER_CONFIG)
    _write(folder / _TOKENIZER_CONFIG, _name_tokenizer(settings, tokenizer, saved))
    config = folder / "config.json"
    if config.is_file():
        _write(config, _name_config(_read(config), {} if base is None else _read(base / "config.json")))
    for path in folder.glob("*.safetensors"):
        # safetensors (0.8) leaves them readable for their owner alone, and servers often run as somebody else.
        shutil.copymode(folder / _TOKENIZER_CONFIG, path)


def _name_tokenizer(settings: dict[str, Any], tokenizer: Any, saved: dict[str, Any]) -> dict[str, Any]:
    settings = {name: value for name, value in settings.items() if name not in _OF_LOADING}
    if not settings.get("pad_token"):
        settings["pad_token"] = tokenizer.pad_token
    # The class that rows were read with. The base's settings may name none (BERT, GPT-2) or another (OLMo 2): there
    # transformers goes by its config.json, which an adapter does not have beside it.
    settings["tokenizer_class"] = saved["tokenizer_class"]
    if settings["tokenizer_class"] == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Of this class transformers 4 would make token types, which decoders refuse.
        settings.setdefault("model_input_names", tokenizer.model_input_names)
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _name_config(config: dict[str, Any], of_base: dict[str, Any]) -> dict[str, Any]:
    config = dict(config)
    if config.get("dtype"):
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters")
    if not isinstance(rope, dict):
        return config
    of_rope = {name: of_base[name] for name in _ROPE if name in of_base}
    # Otherwise there is one of each kind of attention, which the older names have no common scheme for.
    if not of_rope and "rope_theta" in rope:
        of_rope = {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
        if rope.get("rope_type", "default") != "default":
            of_rope["rope_scaling"] = {name: value for name, value in rope.items() if name not in of_rope}
    return {**of_rope, **config}


def _find_base(model: str) -> Path | None:
    """The base's folder, or that of the hub's cache; None where it is in neither."""
    folder = Path(resolve_model(model))
    return folder if folder.is_dir() else find_cached(model)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
