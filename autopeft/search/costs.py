"""What configurations cost: asked once for each, and what workers measured of memory and latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from autopeft.backends.base import CostReply
from autopeft.methods import METHODS
from autopeft.records import Cost, Inference, TrialSpec
from autopeft.search.store import Trial

WORST_LATENCY = 2.0
"""Times the base's: the worst that counts."""


class Costs:
    """Costs by configuration. Latency is known of them only where it is an objective, see `begin_latency`."""

    def __init__(self, ask: Callable[[TrialSpec], CostReply]) -> None:
        self._ask = ask
        self._replies: dict[str, CostReply] = {}
        self._latencies: dict[str, float] = {}
        """Seconds, by what they depend on."""
        self._base_latency: float | None = None

    def find(self, spec: TrialSpec) -> CostReply:
        """Latency left out; the same for all that differ in nothing that memory depends on."""
        key = spec.cost_key()
        if key not in self._replies:
            self._replies[key] = self._ask(spec)
        return self._replies[key]

    # --- latency

    def begin_latency(self, base_seconds: float, trials: Sequence[Trial]) -> None:
        """From here on latencies count. `trials` are those of an earlier run, whose measurements stand."""
        self._base_latency = base_seconds
        for trial in trials:
            if trial.cost is not None and trial.cost.latency_seconds is not None:
                self._latencies[trial.spec.modules_key()] = trial.cost.latency_seconds

    @property
    def worst_latency(self) -> float:
        """Seconds; the hypervolume's reference."""
        assert self._base_latency is not None
        return WORST_LATENCY * self._base_latency

    def lacks_latency(self, trial: Trial) -> bool:
        """Whether the trial's first stretch has to measure it."""
        return (
            self._base_latency is not None
            and trial.step == 0
            and trial.cost is not None
            and trial.cost.latency_seconds is None
        )

    def with_latency(self, cost: Cost, spec: TrialSpec) -> Cost:
        """With the latency at which the configuration would be served, where that is an objective and known.

        What merges is served as the base is. Anything else is timed by the worker that builds it first, before its
        first rung; whatever has the same modules shares the value, so that noise never ranks equals.
        """
        if self._base_latency is None:
            return cost
        merges = METHODS[spec.method].merges
        return replace(cost, latency_seconds=self._base_latency if merges else self._latencies.get(spec.modules_key()))

    def learn_latency(self, spec: TrialSpec, inference: Inference) -> None:
        """Relative to the base, as the worker timed both at once: workers and hours differ, the ratio hardly."""
        assert self._base_latency is not None
        assert inference.base is not None
        ratio = inference.unmerged.single_seconds / inference.base.single_seconds
        self._latencies.setdefault(spec.modules_key(), ratio * self._base_latency)


def measured_cost(cost: Cost, peak_bytes: int, reserved_bytes: int | None) -> Cost:
    """The cost with its VRAM replaced by what the probe measured; the estimate is kept beside it."""
    return replace(
        cost,
        peak_vram_bytes=peak_bytes,
        vram_source="measured",
        reserved_vram_bytes=reserved_bytes,
        estimated_vram_bytes=cost.estimated_vram_bytes or cost.peak_vram_bytes,
    )
