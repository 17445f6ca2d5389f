"""Target modules by meaning: which linear layers of a model are its queries, its feed-forward, its last four blocks.

Pure functions of module names, so that nothing here needs torch. `target_modules` is written

    GROUP            attention, attention-qv, mlp or all-linear, in every block
    GROUP:last-K     the same in the last K blocks; last-K alone is all-linear:last-K
    names:a,b        modules by name, or by the ending of their name
    re:PATTERN       modules whose whole name fits

Blocks are found by the first number in a dotted name: `encoder.layer.11.attention...` is block 11 of the stack
`encoder.layer`. An encoder-decoder has two stacks, and its last K blocks are the last K of each.

Routers of mixtures of experts are never targets: a low-rank change of which expert runs is no small change. The experts
themselves are one three-dimensional parameter a block in transformers 5, not linear layers, so no group reaches them:
`mlp` is then the dense and shared feed-forwards, and is refused where a model has none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from autopeft.errors import SpecError, suggest_nearest
from autopeft.wording import say_count

# Role -> endings of a linear module's dotted name. The longest fitting ending decides, so that BERT's
# `attention.output.dense` is not taken for the feed-forward's `output.dense`. Beside the architectures that
# tests/methods/test_targets.py resolves: ALBERT, MPNet, BLOOM, Falcon, GPT-J, GPT-Neo, GPT-NeoX, MPT, OPT, Whisper.
_ENDINGS: dict[str, tuple[str, ...]] = {
    "query": ("query", "q_proj", "q_lin", "query_proj", "SelfAttention.q", "EncDecAttention.q", "attn.q"),
    "key": ("key", "k_proj", "k_lin", "key_proj", "SelfAttention.k", "EncDecAttention.k", "attn.k"),
    "value": ("value", "v_proj", "v_lin", "value_proj", "SelfAttention.v", "EncDecAttention.v", "attn.v"),
    "qkv": ("c_attn", "Wqkv", "query_key_value", "qkv_proj"),
    "attention-out": (
        "attention.output.dense", "attention.dense", "self_attention.dense", "self_attn.dense", "o_proj", "out_lin",
        "self_attn.out_proj", "encoder_attn.out_proj", "attn.out_proj", "attention.out_proj", "attn.c_proj", "attn.Wo",
        "SelfAttention.o", "EncDecAttention.o", "attn.o",
    ),
    "mlp-in": (
        "intermediate.dense", "up_proj", "gate_proj", "gate_up_proj", "lin1", "fc1", "fc_in", "c_fc", "ffn",
        "DenseReluDense.wi", "DenseReluDense.wi_0", "DenseReluDense.wi_1", "mlp.Wi", "dense_h_to_4h",
    ),
    "mlp-out": (
        "output.dense", "down_proj", "lin2", "fc2", "fc_out", "mlp.c_proj", "ffn_output", "DenseReluDense.wo", "mlp.Wo",
        "dense_4h_to_h",
    ),
}  # fmt: skip

GROUPS: dict[str, tuple[str, ...]] = {
    "attention-qv": ("query", "value", "qkv"),
    "attention": ("query", "key", "value", "qkv", "attention-out"),
    "mlp": ("mlp-in", "mlp-out"),
    "all-linear": tuple(_ENDINGS),
}
"""Named groups of roles that a search space may offer. `all-linear` also has the layers whose role is not known."""

_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<number>\d+)\.")
_LAST = re.compile(r"last-([1-9]\d*)")
_ROUTER = re.compile(r"(^|\.)(router|gate|wg|router_gate|shared_expert_gate)(\.|$)")
_SHARED_EXPERT = re.compile(r"\.shared_experts?\.")


class Block(NamedTuple):
    stack: str
    """Dotted name of the list that holds it, such as `bert.encoder.layer`."""
    number: int


class _Group(NamedTuple):
    name: str
    last: int | None
    """How many blocks from the end of each stack; None for all."""


# --- blocks


def find_block(name: str) -> Block | None:
    """The repeated block that a module or parameter is inside; None outside the stacks.

    Of several numbers the first counts: T5 numbers the parts of a block, and older mixtures their experts.
    """
    fit = _BLOCK.match(name)
    return Block(fit["stack"] or "", int(fit["number"])) if fit else None


def find_blocks(names: Iterable[str]) -> dict[str, list[int]]:
    """Each stack of repeated blocks with its blocks' numbers in order. `names` are of modules."""
    stacks: dict[str, set[int]] = {}
    for name in names:
        block = find_block(name)
        if block is not None:
            stacks.setdefault(block.stack, set()).add(block.number)
    return {stack: sorted(numbers) for stack, numbers in stacks.items()}


def keep_last_blocks(names: Sequence[str], last: int) -> list[str]:
    """Those of `names` that are inside the last blocks of each stack; what is in no block is left out.

    Raises SpecError where no stack is that deep: the choice would leave nothing out.
    """
    stacks = find_blocks(names)
    deepest = max(map(len, stacks.values()), default=0)
    if last > deepest:
        raise SpecError(
            f"target_modules asks for the last {last} blocks, but this model has {deepest}. "
            f"Use last-{max(deepest, 1)} or fewer, or leave last-K away for all of them."
        )
    kept = {Block(stack, number) for stack, numbers in stacks.items() for number in numbers[-last:]}
    return [name for name in names if find_block(name) in kept]


def choose_layers(target_modules: str | None, names: Sequence[str]) -> list[str]:
    """For methods without groups that place themselves by layer: all `names` for None, for `last-K` those inside.

    `names` are all modules that the method could be put on, so that the depth of each stack can be read from them.
    """
    if target_modules is None:
        return list(names)
    fit = _LAST.fullmatch(target_modules)
    if fit is None:
        raise SpecError(f"A method without groups of target modules takes last-4 or the like, not '{target_modules}'.")
    return keep_last_blocks(names, int(fit[1]))


# --- roles


def find_roles(linear_names: Sequence[str]) -> dict[str, list[str]]:
    """Each role with the modules that play it, among linear modules inside the repeated blocks."""
    roles: dict[str, list[str]] = {role: [] for role in _ENDINGS}
    for name in linear_names:
        role = _find_role(name)
        if role is not None and _is_candidate(name):
            roles[role].append(name)
    return roles


def _find_role(name: str) -> str | None:
    fits = [(len(ending), role) for role, endings in _ENDINGS.items() for ending in endings if ends_with(name, ending)]
    return max(fits)[1] if fits else None


def _is_candidate(name: str) -> bool:
    return find_block(name) is not None and not _ROUTER.search(name)


def ends_with(name: str, ending: str) -> bool:
    """peft's rule for a list of target modules: equal, or ends with a dot and the name."""
    return name == ending or name.endswith("." + ending)


# --- from the written form to modules


def takes_last(target_modules: str) -> bool:
    """Whether it is kept to the last k blocks: `last-K`, or a group with `:last-K`."""
    group = _parse_group(target_modules)
    return group is not None and group.last is not None


def check_target_modules(target_modules: str) -> None:
    """Raises SpecError for an unknown group, a misspelt last-K or a regular expression that does not compile."""
    if target_modules.startswith("re:"):
        try:
            re.compile(target_modules[3:])
        except re.error as exc:
            raise SpecError(f"target_modules '{target_modules}' is no regular expression: {exc}.") from exc
    elif not target_modules.startswith("names:") and _parse_group(target_modules) is None:
        name, colon, suffix = target_modules.partition(":")
        if colon and name in GROUPS:
            raise SpecError(
                f"target_modules '{target_modules}' may end in :last-K for the last K blocks, with K from 1, such as "
                f"{name}:last-4, but not in ':{suffix}'."
            )
        raise SpecError(
            f"There is no group of target modules '{target_modules}'. {suggest_nearest(name, GROUPS)} "
            "A group may be kept to the last blocks, as in attention:last-4. "
            "Names of your own are written names:q_proj,v_proj and patterns re:.*q_proj."
        )


def _parse_group(target_modules: str) -> _Group | None:
    name, _, suffix = target_modules.rpartition(":")
    last = _LAST.fullmatch(suffix)
    if last is None:
        return _Group(target_modules, None) if target_modules in GROUPS else None
    # Bare last-K: every linear layer there.
    name = name if ":" in target_modules else "all-linear"
    return _Group(name, int(last[1])) if name in GROUPS else None


def resolve_targets(target_modules: str, linear_names: Sequence[str]) -> list[str]:
    """Full names of the modules meant, in the model's order.

    `linear_names` are the model's linear layers outside the task head. On an architecture whose names play no known
    role, groups mean all linear layers inside the repeated blocks, and `explain_targets` says so. Raises SpecError
    where nothing is left.
    """
    check_target_modules(target_modules)
    group = _parse_group(target_modules)
    if group is not None:
        return _resolve_group(group, linear_names)
    if target_modules.startswith("re:"):
        chosen = [name for name in linear_names if re.fullmatch(target_modules[3:], name)]
    else:
        wanted = [part.strip() for part in target_modules.removeprefix("names:").split(",")]
        chosen = [name for name in linear_names if any(ends_with(name, ending) for ending in wanted)]
    routers = [name for name in chosen if _ROUTER.search(name)]
    if routers:
        raise SpecError(
            f"target_modules '{target_modules}' fits the router {routers[0]}, which decides what experts run and is "
            "never a target. Name the other modules alone."
        )
    if not chosen:
        raise SpecError(
            f"target_modules '{target_modules}' fits none of this model's {len(linear_names)} linear layers, such as "
            f"{', '.join(linear_names[:3])}. Use all-linear, or name modules of this model."
        )
    return chosen


def _resolve_group(group: _Group, linear_names: Sequence[str]) -> list[str]:
    roles = find_roles(linear_names)
    in_blocks = [name for name in linear_names if _is_candidate(name)]
    if group.name == "all-linear" or not any(roles.values()):
        chosen = in_blocks
    else:
        wanted = {name for role in GROUPS[group.name] for name in roles[role]}
        chosen = [name for name in in_blocks if name in wanted]
    if group.last is not None and in_blocks:
        # Counted over all blocks, of which some may have none of the group.
        kept = set(keep_last_blocks(in_blocks, group.last))
        chosen = [name for name in chosen if name in kept]
    if not chosen:
        raise SpecError(_why_nothing(group, linear_names, in_blocks))
    return chosen


def _why_nothing(group: _Group, linear_names: Sequence[str], in_blocks: Sequence[str]) -> str:
    if not in_blocks:
        return (
            f"target_modules '{group.name}' fits none of this model's {len(linear_names)} linear layers: none is "
            "inside repeated blocks. Use names: and modules of this model, or a method without target modules."
        )
    where = {None: "", 1: " in its last block"}.get(group.last, f" in its last {group.last} blocks")
    experts = " Experts fused into one parameter are no linear layers." if group.name == "mlp" else ""
    return (
        f"target_modules '{group.name}' fits no linear layer of this model{where}.{experts} Use all-linear, which here "
        f"means such layers as {', '.join(in_blocks[:3])}."
    )


def explain_targets(target_modules: str, linear_names: Sequence[str]) -> str | None:
    """A sentence for the study's notes where a group means less, or more, on this model than its name says; else None.

    It does not depend on last-K, so that a study needs it once a group.
    """
    group = _parse_group(target_modules)
    if group is None:
        return None
    roles = find_roles(linear_names)
    in_blocks = [name for name in linear_names if _is_candidate(name)]
    if not any(roles.values()):
        if group.name == "all-linear" or not in_blocks:
            return None
        return (
            f"This model's architecture is not known, so target_modules '{group.name}' means all {len(in_blocks)} "
            f"linear layers inside its repeated blocks, such as {in_blocks[0]}. Choose among them with names: or re:."
        )
    if group.name not in ("mlp", "all-linear"):
        return None
    mlp = [name for role in GROUPS["mlp"] for name in roles[role] if not _SHARED_EXPERT.search(name)]
    without = {find_block(name) for name in in_blocks} - {find_block(name) for name in mlp}
    if not without:
        return None
    return (
        f"In {say_count(len(without), 'block')} of this model the experts are one fused parameter and no linear "
        f"layers, so target_modules '{group.name}' leaves them as they are."
    )


# --- short names for configuration files


def shorten_targets(chosen: Sequence[str], module_names: Sequence[str]) -> list[str]:
    """The fewest endings that mean exactly `chosen` by peft's rule, among the modules named.

    A configuration file then says `query`, not twelve full names, and still means the same modules. The task head need
    not be among the names: peft leaves out what `modules_to_save` holds.
    """
    rest = set(module_names) - set(chosen)
    endings: list[str] = []
    for name in chosen:
        if not any(ends_with(name, ending) for ending in endings):
            endings.append(_shortest_ending(name, rest))
    return endings


def _shortest_ending(name: str, rest: set[str]) -> str:
    parts = name.split(".")
    for start in range(len(parts) - 1, 0, -1):
        ending = ".".join(parts[start:])
        if parts[start].isdigit():
            break
        if not any(ends_with(other, ending) for other in rest):
            return ending
    return name
