"""EVA: LoRA's A begins as the directions in which a layer's inputs vary most on rows of the task (arXiv:2410.07170).

Ranks stay as they are asked for (peft's `rho` of 1): what a configuration costs is known before any row is read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from autopeft.records import TrialSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

PEFT_ARGUMENTS: dict[str, Any] = {"init_lora_weights": "eva", "eva_config": {"rho": 1.0, "use_label_mask": False}}
"""As peft's own `initialize_lora_eva_weights` would be asked for the same. All that is read counts, not what is
written alone: of a short completion there is too little."""

_SETTLED = 0.99
"""Cosine between a direction and itself a batch earlier, from which on it counts as found; peft's `tau`."""
_TOKENS_A_DIRECTION = 8
"""In a batch: with few, the directions would be those of single tokens, and more decompositions would be needed."""


def count_tokens(spec: TrialSpec) -> int:
    """That a batch should have; 0 without EVA. It can do with an eighth, a token for each direction."""
    return _TOKENS_A_DIRECTION * int(spec.settings["rank"]) if spec.settings["init"] == "eva" else 0


def begin_with_activations(model: nn.Module, spec: TrialSpec, batches: Iterable[Mapping[str, torch.Tensor]]) -> None:
    """Sets A of every LoRA layer, batch after batch, until all directions have settled or the batches end.

    peft's `initialize_lora_eva_weights` comes to the same directions, but never ends where some do not settle.
    """
    import torch
    from peft.tuners.lora import LoraLayer

    wanted = [module for module in model.modules() if isinstance(module, LoraLayer)]
    shown = _Shown()
    found = [_Directions(int(spec.settings["rank"]), shown) for _ in wanted]
    handles = [module.register_forward_hook(own) for module, own in zip(wanted, found, strict=True)]
    adapted: Any = model
    try:
        # B is zero yet, so this changes no number; it spares the products with A.
        with torch.no_grad(), adapted.disable_adapter():
            for batch in batches:
                shown.mask_BT = batch["attention_mask"].bool()
                model(**batch)
                if all(own.leader.settled for own in found):
                    break
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for module, own in zip(wanted, found, strict=True):
            if own.leader.pca is not None:
                module.lora_A["default"].weight.copy_(own.leader.pca.components_)


class _Shown:
    """What the hooks of one model share."""

    mask_BT: Any = None
    states: Any = None
    """The last inputs that a hook was shown."""
    by: _Directions | None = None
    """The first hook that was shown them."""


class _Directions:
    """A forward hook that follows the directions of a layer's inputs (R, D) over batches."""

    def __init__(self, rank: int, shown: _Shown) -> None:
        self.rank = rank
        self.shown = shown
        self.leader = self
        """Another one where the layer before has the very same inputs, as query, key and value have."""
        self.settled = False
        self.pca: Any = None
        """None until a batch had tokens enough for the layer, which of an expert few may reach."""

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        import torch
        from peft.utils.incremental_pca import IncrementalPCA
        from torch.nn.functional import cosine_similarity

        states, shown = inputs[0], self.shown
        if states is shown.states and shown.by is not None:
            self.leader = shown.by
            return
        shown.states, shown.by = states, self
        if self.settled:
            return
        # Of what is not laid out by rows and tokens, such as an expert's share of them, all is taken.
        states_RD = states[shown.mask_BT] if states.shape[:-1] == shown.mask_BT.shape else states.flatten(0, -2)
        if len(states_RD) < self.rank:
            return
        before = None if self.pca is None else self.pca.components_
        if self.pca is None:
            # Subspace iterations with a seed of their own: the trial's random state stays as it is. Fewer of them and
            # on fewer directions than by default: each batch begins with what was found before.
            self.pca = IncrementalPCA(
                n_components=self.rank, lowrank=True, lowrank_q=self.rank + 16, lowrank_niter=2, lowrank_seed=42
            )
        # Autocast would hand bfloat16 to decompositions that CUDA has in float32 alone.
        with torch.autocast(states.device.type, enabled=False):
            self.pca.partial_fit(states_RD.float())
        if before is not None:
            self.settled = bool((cosine_similarity(before, self.pca.components_) >= _SETTLED).all())
