"""Peaks of a deep model from two shallow ones, exactly where its layers repeat.

In the forward pass of layer i, what is live is a linear function of i and of the number of layers: the weights of all
of them, the activations of those before. Backward likewise. Over a run of equal layers the fullest is therefore at one
of its ends, and each of those moments, counted from the nearer end of the stack, grows by the same bytes with every
further layer. So each moment is extrapolated on its own, and the peak is the largest of them.
"""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

from torch import nn

from autopeft.backends.hf.live_bytes import Held
from autopeft.backends.hf.memory import Moment, Peaks, find_stacks

_DEPTHS = ("num_hidden_layers", "num_layers", "num_decoder_layers", "encoder_layers", "decoder_layers")
_LONGEST_PERIOD = 12
_COUNTERS = frozenset({"layer_idx", "layer_id", "layer_index", "layer_number"})

Signature = Hashable


class Run(NamedTuple):
    """Equal layers, or a pattern of layers that repeats, between `before` and `after` layers that are unlike."""

    before: int
    period: int
    after: int


class Depths(NamedTuple):
    """Layers to leave out of every stack: `fewer` for the deeper of the two models, `more` for the shallower."""

    fewer: int
    more: int
    runs: tuple[Run, ...]


def read_signatures(model: nn.Module) -> list[list[Signature]]:
    """What tells layers apart, for each layer of each stack: everything but its number and its weights' values."""
    return [[_sign(layer) for layer in layers] for layers in find_stacks(model)]


def _sign(layer: nn.Module) -> Signature:
    facts: list[Hashable] = []
    for name, module in layer.named_modules():
        # Dropout and the like keep what they do in plain attributes.
        plain = (
            (key, repr(value))
            for key, value in vars(module).items()
            if key not in _COUNTERS and isinstance(value, bool | int | float | str | tuple)
        )
        facts.append((name, type(module).__name__, tuple(sorted(plain))))
    for name, parameter in layer.named_parameters():
        facts.append((name, tuple(parameter.shape), parameter.dtype, parameter.requires_grad))
    for name, buffer in layer.named_buffers():
        facts.append((name, tuple(buffer.shape), buffer.dtype))
    return hash(tuple(facts))


def find_run(signatures: Sequence[Signature]) -> Run | None:
    """The run whose two shallow models are the cheapest; None where no pattern repeats."""
    depth = len(signatures)
    found: list[tuple[int, Run]] = []
    for period in range(1, min(_LONGEST_PERIOD, depth // 2) + 1):
        # The longest stretch in which every layer is like the one a period earlier.
        start = 0
        while start + period < depth:
            end = start + period
            while end < depth and signatures[end] == signatures[end - period]:
                end += 1
            # The first and the last layer are never inside: no gradient leaves the one, the head follows the other.
            run = Run(max(start, 1), period, max(depth - end, 1))
            if end - start > period and run.before + run.period + run.after <= depth:
                found.append((run.before + run.after + period, run))
            start = max(end - period + 1, start + 1)
    return min(found)[1] if found else None


def plan_depths(model: nn.Module) -> Depths | None:
    """Which two shallower models tell the peaks of this one; None where measuring it as it is takes no longer."""
    stacks = find_stacks(model)
    if not stacks:
        return None
    signatures = read_signatures(model)
    runs = [find_run(stack) for stack in signatures]
    known = [run for run in runs if run is not None]
    if len(known) < len(runs) or len({run.period for run in known}) > 1:
        return None
    period = known[0].period
    # Stacks lose equally many layers, so the shortest decides.
    spare = min(len(s) - (r.before + r.period + r.after) for s, r in zip(stacks, known, strict=True))
    more = spare - spare % period
    fewer = more - period
    total = sum(len(stack) for stack in stacks)
    if fewer <= 0 or 2 * total - len(stacks) * (more + fewer) >= total:
        return None
    return Depths(fewer, more, tuple(known))


def leave_out_layers(config: Any, count: int) -> Any | None:
    """The configuration with `count` layers fewer in every stack; None where it does not say how many it has."""
    shallow = copy.deepcopy(config)
    attribute_map = getattr(type(config), "attribute_map", {})
    names = [name for name in _DEPTHS if name in vars(config) or name in attribute_map]
    # `num_hidden_layers` may be another name for one of the others.
    targets = {attribute_map.get(name, name) for name in names}
    depths = {name: getattr(config, name) for name in targets if isinstance(getattr(config, name, None), int)}
    if not depths or min(depths.values()) <= count:
        return None
    for name, depth in depths.items():
        setattr(shallow, name, depth - count)
    for name, value in vars(config).items():
        # Such as `layer_types`, one entry a layer.
        if isinstance(value, list) and len(value) in depths.values():
            setattr(shallow, name, value[: len(value) - count])
    return shallow


def is_shortened(full: Sequence[Sequence[Signature]], short: Sequence[Sequence[Signature]], depths: Depths) -> bool:
    """Whether each stack of `short` is that of `full` with layers of its run left out."""
    if len(full) != len(short):
        return False
    for whole, part, run in zip(full, short, depths.runs, strict=True):
        kept_before = len(part) - run.after
        if list(part) != [*whole[:kept_before], *whole[len(whole) - run.after :]]:
            return False
    return True


class Growth(NamedTuple):
    """From the figures of two shallow models to those of the full one."""

    depths: Depths
    sizes: tuple[tuple[int, ...], tuple[int, ...]]
    """Layers of each stack, of the shallower and of the deeper model."""

    @property
    def steps(self) -> int:
        """How often what the deeper has more than the shallower must be added to the deeper."""
        return self.depths.fewer // (self.depths.more - self.depths.fewer)

    def number(self, shallow: int, deeper: int) -> int:
        return deeper + (deeper - shallow) * self.steps

    def peaks(self, shallow: Peaks, deeper: Peaks) -> Peaks:
        first, second = (
            _by_nearer_end(peaks, sizes, self.depths)
            for peaks, sizes in zip((shallow, deeper), self.sizes, strict=True)
        )
        return {
            label: Held(*(self.number(a, b) for a, b in zip(first[label], second[label], strict=True)))
            for label in second
            if label in first
        }


def _by_nearer_end(peaks: Peaks, sizes: Sequence[int], depths: Depths) -> Peaks:
    """Moments named by their distance from the end of the stack that they are near to; those between are left out."""
    labelled: Peaks = {}
    for moment, held in peaks.items():
        if not isinstance(moment, Moment):
            labelled[moment] = held
            continue
        run, size = depths.runs[moment.stack], sizes[moment.stack]
        if moment.layer < run.before + run.period:
            labelled[moment] = held
        if size - moment.layer <= run.after + run.period:
            labelled[moment._replace(layer=moment.layer - size)] = held
    return labelled
