"""Bottleneck adapters in Houlsby's placement: after attention and after the feed-forward, in every layer.

Ours, because peft has none and the package that has pins an old transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from autopeft.methods.base import BuildContext, Method, Recipe, choice, integers
from autopeft.records import TrialSpec

if TYPE_CHECKING:
    from torch import nn


def _build(model: nn.Module, spec: TrialSpec, context: BuildContext) -> nn.Module:
    import torch
    from torch import nn

    activations: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU}

    class BottleneckAdapter(nn.Module):
        """h -> h + up(activation(down(h))), with h the wrapped projection's output (arXiv:1902.00751, section 2.1)."""

        def __init__(self, base_layer: nn.Module, width: int, size: int, activation: str) -> None:
            super().__init__()
            self.base_layer = base_layer
            device = next(base_layer.parameters()).device
            self.down = nn.Linear(width, size, device=device)
            self.activation = activations[activation]()
            self.up = nn.Linear(size, width, device=device)
            # Zero output makes the adapted model equal the base before the first step.
            nn.init.zeros_(self.up.weight)
            nn.init.zeros_(self.up.bias)

        def forward(self, input_BTD: torch.Tensor) -> torch.Tensor:
            hidden_BTD: torch.Tensor = self.base_layer(input_BTD)
            adapter_dtype = hidden_BTD if torch.is_autocast_enabled(hidden_BTD.device.type) else hidden_BTD.float()
            update_BTD = self.up(self.activation(self.down(adapter_dtype)))
            output_BTD: torch.Tensor = hidden_BTD + update_BTD.to(hidden_BTD.dtype)
            return output_BTD

    size = int(spec.settings["bottleneck_size"])
    for name in [*context.roles["attention-out"], *context.roles["mlp-out"]]:
        base_layer = model.get_submodule(name)
        # Linear names it out_features; GPT-2's Conv1D keeps (in, out) weights and names it nf.
        width = int(getattr(base_layer, "out_features", getattr(base_layer, "nf", 0)))
        adapter = BottleneckAdapter(base_layer, width, size, str(spec.settings["activation"]))
        model.set_submodule(name, adapter)
    return model


BOTTLENECK = Method(
    name="bottleneck",
    title="Bottleneck adapter",
    paper="arXiv:1902.00751",
    dimensions=(
        integers("bottleneck_size", 2, 256, 32, "width of the bottleneck"),
        choice("activation", ("relu", "gelu"), "gelu", "nonlinearity inside the bottleneck"),
    ),
    learning_rate=(1e-4, 1e-2),
    recipe=Recipe(
        settings={"bottleneck_size": 32, "activation": "gelu"},
        target_modules=None,
        learning_rate=3e-3,
        source="sizes of arXiv:1902.00751; learning rate measured on short MiniLM runs",
    ),
    build=_build,
    why_not_peft=(
        "peft has no bottleneck adapter, so an adapter_config.json cannot express it. Export another pick: LoRA on "
        "all linear layers is the nearest method that peft has."
    ),
)
