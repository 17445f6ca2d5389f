"""What trials are held against: the baseline that adapters must beat, and the worst that counts in the hypervolume."""

from __future__ import annotations

from dataclasses import replace

from autopeft.methods import METHODS
from autopeft.methods.faults import DEVICE_BITS
from autopeft.records import Cost, StudyConfig, TrialSpec
from autopeft.search.front import cost_value
from autopeft.spaces.dimensions import default_dimensions, widest_bits
from autopeft.spaces.space import SearchSpace, make_spec

_BEST_REFERENCE = 0.999
"""Nothing can be above 1; a base that is there already would leave no room to scale qualities to."""


def make_baselines(config: StudyConfig, space: SearchSpace) -> list[TrialSpec]:
    """A trained head on the frozen base, at each width that the device has, the unquantized first. A language model has
    no head, so for a generation task it is the base as it is, which is scored and not trained."""
    spec = replace(_make_unquantized("head", config, space), learning_rate=METHODS["head"].recipe.learning_rate)
    return [replace(spec, bits=bits) for bits in DEVICE_BITS[config.device_kind]]


def make_dearest(config: StudyConfig, space: SearchSpace) -> TrialSpec:
    """Full fine-tuning, at whose cost the hypervolume ends."""
    return _make_unquantized("full", config, space)


def make_reference(config: StudyConfig, dearest: Cost | None, worst_latency: float | None) -> dict[str, float]:
    """The worst that counts, by objective: the majority class, or for a generation task the untrained base, at the cost
    of full fine-tuning and at `worst_latency` seconds (None where latency is no objective).

    Where the cost of full fine-tuning is not known (None), quality alone.
    """
    reference = {"quality": min(config.majority_quality, _BEST_REFERENCE)}
    if dearest is None:
        return reference
    for name in config.objectives:
        if name == "latency":
            assert worst_latency is not None
            reference[name] = worst_latency
        elif name != "quality":
            reference[name] = cost_value(dearest, name)
    return reference


def _make_unquantized(method: str, config: StudyConfig, space: SearchSpace) -> TrialSpec:
    """The method as its recipe has it, trained as the study's first configuration is."""
    return replace(
        _find_template(config, space),
        method=method,
        settings=dict(METHODS[method].recipe.settings),
        target_modules=None,
        bits=widest_bits(config.device_kind),
    )


def _find_template(config: StudyConfig, space: SearchSpace) -> TrialSpec:
    """Where batch size, schedule and the like are taken from."""
    for spec in (*space.recipes, *config.included):
        return spec
    dimensions = default_dimensions(METHODS["head"], config.device_kind)
    values = {name: dimension.default for name, dimension in dimensions.items()}
    return make_spec("head", values, max_steps=config.rungs[-1], seed=config.seed)
