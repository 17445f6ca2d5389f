"""Bottleneck adapters: small networks after the parts of a layer (serial) or beside its feed-forward (parallel).

Ours, because peft has none and the package that has pins an old transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autopeft.errors import SpecError
from autopeft.methods.base import BuildContext, Method, Recipe, choice, floats, integers
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    import torch
    from torch import nn

PARALLEL_SCALE = 4.0
"""On the update beside the feed-forward; the authors' (github.com/jxhe/unify-parameter-efficient-tuning)."""


def put_after(model: nn.Module, names: list[str], context: BuildContext, *, size: int, activation: str) -> None:
    """Each projection's output h becomes h + up(activation(down(h))) (arXiv:1902.00751)."""
    from torch import nn

    class BottleneckAdapter(nn.Module):
        def __init__(self, base_layer: nn.Module, width: int) -> None:
            super().__init__()
            self.base_layer = base_layer
            _add_bottleneck(self, width, size, width, activation)

        @property
        def weight(self) -> nn.Parameter:
            return _weight_of(self.base_layer)

        def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
            hidden_BTD: torch.Tensor = self.base_layer(input_BTD)
            return hidden_BTD + _update(self, hidden_BTD).to(hidden_BTD.dtype)

    for name in names:
        adapter = BottleneckAdapter(model.get_submodule(name), context.sizes[name][1])
        model.set_submodule(name, adapter)


def put_beside_feed_forward(
    model: nn.Module, context: BuildContext, *, size: int, activation: str, scale: float
) -> None:
    """Each feed-forward's output becomes ffn(x) + scale * up(activation(down(x))) (arXiv:2110.04366)."""
    from torch import nn

    class ParallelAdapter(nn.Module):
        def __init__(self, base_layer: nn.Module, num_inputs: int, num_outputs: int) -> None:
            super().__init__()
            self.base_layer = base_layer
            _add_bottleneck(self, num_inputs, size, num_outputs, activation)
            self.entered_BTD: torch.Tensor | None = None

        @property
        def weight(self) -> nn.Parameter:
            return _weight_of(self.base_layer)

        def remember(self, entry: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            self.entered_BTD = inputs[0]

        def forward(self, inner_BTF: torch.Tensor) -> torch.Tensor:
            output_BTD: torch.Tensor = self.base_layer(inner_BTF)
            entered_BTD, self.entered_BTD = self.entered_BTD, None
            assert entered_BTD is not None
            return output_BTD + scale * _update(self, entered_BTD).to(output_BTD.dtype)

    for entry, exit in _pair_feed_forwards(context):
        adapter = ParallelAdapter(model.get_submodule(exit), context.sizes[entry][0], context.sizes[exit][1])
        model.get_submodule(entry).register_forward_pre_hook(adapter.remember)
        model.set_submodule(exit, adapter)


def _pair_feed_forwards(context: BuildContext) -> list[tuple[str, str]]:
    """Of each feed-forward the projection that x enters first, and the one that leads out."""
    entries, exits = context.roles["mlp-in"], context.roles["mlp-out"]
    each = len(entries) // max(len(exits), 1)
    if not exits or len(entries) != each * len(exits):
        raise SpecError(
            "An adapter beside the feed-forward needs one whose projections are known, but this model has "
            f"{len(entries)} that lead into feed-forwards and {len(exits)} that lead out. Use bottleneck with "
            "placement houlsby, or LoRA."
        )
    # A gated feed-forward has two that x enters.
    return list(zip(entries[::each], exits, strict=True))


def _add_bottleneck(adapter: Any, num_inputs: int, size: int, num_outputs: int, activation: str) -> None:
    from torch import nn

    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}
    device = next(adapter.base_layer.parameters()).device
    adapter.down = nn.Linear(num_inputs, size, device=device)
    adapter.activation = activations[activation]()
    adapter.up = nn.Linear(size, num_outputs, device=device)
    # Zero output makes the adapted model equal the base before the first step.
    nn.init.zeros_(adapter.up.weight)
    nn.init.zeros_(adapter.up.bias)


def _weight_of(base_layer: Any) -> nn.Parameter:
    """T5 asks the projection out of its feed-forward for the type of its weight."""
    weight: nn.Parameter = base_layer.weight
    return weight


def _update(adapter: Any, hidden_BTD: torch.Tensor) -> torch.Tensor:
    import torch

    adapter_dtype = hidden_BTD if torch.is_autocast_enabled(hidden_BTD.device.type) else hidden_BTD.float()
    update_BTD: torch.Tensor = adapter.up(adapter.activation(adapter.down(adapter_dtype)))
    return update_BTD


def _build(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    size, activation = int(spec.settings["bottleneck_size"]), str(spec.settings["activation"])
    placement = spec.settings["placement"]
    if placement == "parallel":
        scale = float(spec.settings["scale"])
        put_beside_feed_forward(model, context, size=size, activation=activation, scale=scale)
        return model
    after_attention = context.roles["attention-out"] if placement == "houlsby" else []
    names = [*after_attention, *context.roles["mlp-out"]]
    if not names:
        raise SpecError(
            f"A bottleneck adapter of placement {placement} is put after projections that lead out of attention or "
            "feed-forward, of which this model has none that are known. Use LoRA, which needs no known names."
        )
    put_after(model, names, context, size=size, activation=activation)
    return model


def _refuse(spec: TrialSpec, device_kind: str) -> str | None:
    if spec.settings["placement"] != "parallel" and spec.settings["scale"] != PARALLEL_SCALE:
        return (
            f"Only a parallel adapter is scaled, but placement is {spec.settings['placement']} and scale is "
            f"{spec.settings['scale']}. Use placement parallel, or leave scale at {PARALLEL_SCALE}."
        )
    return None


BOTTLENECK = Method(
    name="bottleneck",
    title="Bottleneck adapter",
    paper="arXiv:1902.00751 (Pfeiffer 2005.00247, parallel 2110.04366)",
    family="adapter",
    dimensions=(
        integers("bottleneck_size", 2, 256, 32, "width of the bottleneck"),
        choice("activation", ("relu", "gelu"), "gelu", "nonlinearity inside the bottleneck"),
        choice(
            "placement",
            ("houlsby", "pfeiffer", "parallel"),
            "houlsby",
            "after attention and feed-forward (Houlsby), after the feed-forward (Pfeiffer), or beside it (parallel)",
        ),
        floats(
            "scale", 0.5, 8.0, PARALLEL_SCALE, "factor on the update", log=True, only_if={"placement": ("parallel",)}
        ),
    ),
    learning_rate=(1e-4, 1e-2),
    layer_choice=True,
    needs="projections out of attention and feed-forward that are known by name; parallel: a dense feed-forward",
    recipe=Recipe(
        settings={"bottleneck_size": 32, "activation": "gelu", "placement": "houlsby", "scale": PARALLEL_SCALE},
        target_modules=None,
        learning_rate=3e-3,
        source="sizes of arXiv:1902.00751; learning rate measured on short MiniLM runs",
    ),
    refuse=_refuse,
    build=_build,
    why_not_peft=(
        "peft has no bottleneck adapter, so an adapter_config.json cannot express it. Export another pick: LoRA on "
        "all linear layers is the nearest method that peft has."
    ),
)
