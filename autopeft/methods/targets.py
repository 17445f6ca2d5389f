"""Target modules by meaning: which linear layers of a model are its queries, its feed-forward, and so on.

Pure functions of module names, so that nothing here needs torch.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from autopeft.errors import SpecError, suggest_nearest

# Role -> endings of a linear module's dotted name, over BERT, RoBERTa, DeBERTa, DistilBERT, ModernBERT, GPT-2, Llama,
# Qwen, Mistral, Gemma, Phi, T5, BART, ViT. The longest fitting ending decides, so that BERT's
# `attention.output.dense` is not taken for the feed-forward's `output.dense`.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "SelfAttention.q", "EncDecAttention.q"),
    "key": ("key", "k_proj", "k_lin", "key_proj", "SelfAttention.k", "EncDecAttention.k"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "SelfAttention.v", "EncDecAttention.v"),
    "qkv": ("c_attn", "Wqkv", "query_key_value", "qkv_proj"),
    "attention-out": (
        "attention.output.dense", "self_attn.o_proj", "o_proj", "out_lin", "self_attn.out_proj", "out_proj",
        "attn.c_proj",
        "encoder_attn.out_proj", "attn.Wo", "self_attn.dense", "self_attention.dense", "SelfAttention.o",
        "EncDecAttention.o",
    ),
    "mlp-in": (
        "intermediate.dense", "up_proj", "gate_proj", "gate_up_proj", "lin1", "fc1", "c_fc", "DenseReluDense.wi",
        "DenseReluDense.wi_0", "DenseReluDense.wi_1", "mlp.Wi", "dense_h_to_4h",
    ),
    "mlp-out": (
        "output.dense", "down_proj", "lin2", "fc2", "mlp.c_proj", "DenseReluDense.wo", "mlp.Wo", "dense_4h_to_h",
    ),
}  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {
    "attention-qv": ("query", "value", "qkv"),
    "attention": ("query", "key", "value", "qkv", "attention-out"),
    "mlp": ("mlp-in", "mlp-out"),
    "all-linear": tuple(_ENDINGS),
}
"""Named groups of roles that a search space may offer."""

_BLOCK = re.compile(r"(^|\.)\d+\.")


def find_roles(linear_names: Sequence[str]) -> dict[str, list[str]]:
    """Each role with the modules that play it, among linear modules inside the repeated blocks."""
    roles: dict[str, list[str]] = {role: [] for role in _ENDINGS}
    for name in linear_names:
        if _BLOCK.search(name):
            role = _find_role(name)
            if role is not None:
                roles[role].append(name)
    return roles


def _find_role(name: str) -> str | None:
    fits = [
        (len(ending), role)
        for role, endings in _ENDINGS.items()
        for ending in endings
        if name == ending or name.endswith("." + ending)
    ]
    return max(fits)[1] if fits else None


def check_target_modules(target_modules: str) -> None:
    """Raises SpecError for an unknown group or a regular expression that does not compile."""
    if target_modules.startswith("re:"):
        try:
            re.compile(target_modules[3:])
        except re.error as exc:
            raise SpecError(f"target_modules '{target_modules}' is no regular expression: {exc}.") from exc
    elif not target_modules.startswith("names:") and target_modules not in GROUPS:
        raise SpecError(
            f"There is no group of target modules '{target_modules}'. {suggest_nearest(target_modules, GROUPS)} "
            "Names of your own are written names:q_proj,v_proj and patterns re:.*q_proj."
        )


def resolve_targets(target_modules: str, linear_names: Sequence[str]) -> list[str]:
    """Full names of the modules meant, in the model's order.

    `linear_names` are the model's linear layers outside the task head. On an architecture whose names play no known
    role, groups mean all linear layers inside the repeated blocks. Raises SpecError where nothing is left.
    """
    check_target_modules(target_modules)
    if target_modules.startswith("re:"):
        chosen = [name for name in linear_names if re.fullmatch(target_modules[3:], name)]
    elif target_modules.startswith("names:"):
        wanted = [part.strip() for part in target_modules[6:].split(",")]
        chosen = [name for name in linear_names if any(name == w or name.endswith("." + w) for w in wanted)]
    else:
        chosen = _resolve_group(target_modules, linear_names)
    if not chosen:
        raise SpecError(
            f"target_modules '{target_modules}' fits none of this model's {len(linear_names)} linear layers, such as "
            f"{', '.join(linear_names[:3])}. Use all-linear, or name modules of this model."
        )
    return chosen


def _resolve_group(group: str, linear_names: Sequence[str]) -> list[str]:
    roles = find_roles(linear_names)
    in_blocks = [name for name in linear_names if _BLOCK.search(name)]
    if group == "all-linear" or not any(roles.values()):
        return in_blocks
    wanted = {name for role in GROUPS[group] for name in roles[role]}
    return [name for name in in_blocks if name in wanted]


def shorten_targets(chosen: Sequence[str], linear_names: Sequence[str]) -> list[str]:
    """The fewest endings that mean exactly `chosen` by peft's rule (equal, or ends with a dot and the name).

    A configuration file then says `query`, not twelve full names, and still means the same modules.
    """
    rest = set(linear_names) - set(chosen)
    endings: list[str] = []
    for name in chosen:
        if any(name == ending or name.endswith("." + ending) for ending in endings):
            continue
        endings.append(_shortest_ending(name, rest))
    return endings


def _shortest_ending(name: str, rest: set[str]) -> str:
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if parts[start].isdigit():
            break
        if not any(other == ending or other.endswith("." + ending) for other in rest):
            return ending
    return name
