"""How configurations and numbers are put into words, the same on the page, in tables and on the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping

from autopeft.methods import METHODS
from autopeft.records import Cost, Inference, Scalar, TaskKind, TrialSpec

NOTHING = "\u2013"
"""An en dash: what stands for a measurement that was not made."""
MINUS = "\u2212"

_COUNTS = ((1e9, "B"), (1e6, "M"), (1e3, "k"))
_BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"))
_SECONDS = ((5400.0, 3600.0, "h"), (90.0, 60.0, "min"), (0.0, 1.0, "s"))  # from, divisor, unit

_FRACTIONS = frozenset({"accuracy", "f1", "precision", "recall", "match"})
_SCORER_TITLES = {"f1": "F1", "macro_f1": "macro F1", "matthews_correlation": "Matthews correlation"}

# Names as their papers write them; every other name is shown with spaces for underscores.
_SPELLINGS = {"dora": "DoRA", "rslora": "rsLoRA", "pissa": "PiSSA", "olora": "OLoRA", "eva": "EVA"}


def title_method(name: str, titles: Mapping[str, str] | None = None) -> str:
    """A method's name as people write it; unknown names are shown as they are, spaces for underscores."""
    if titles is not None and name in titles:
        return titles[name]
    return METHODS[name].title if name in METHODS else name.replace("_", " ")


def title_objective(name: str) -> str:
    titles = {"vram": "peak VRAM", "params": "trainable parameters", "size": "saved size"}
    return titles.get(name, name.replace("_", " "))


def describe_floor(kind: TaskKind) -> str:
    """What stands beside the quality that no learning gives: what trials have to beat."""
    return "the untrained base" if kind == "generation" else "always the most frequent label"


def title_scorer(scorer: str) -> str:
    return _SCORER_TITLES.get(scorer, scorer.replace("_", " "))


def describe_spec(spec: TrialSpec, titles: Mapping[str, str] | None = None) -> str:
    """`LoRA, rank 8, alpha/rank 2, all-linear, 32 bits, lr 2.1e-3`."""
    parts = [title_method(spec.method, titles), *list_settings(spec)]
    return ", ".join([*parts, f"{spec.bits} bits", f"lr {format_learning_rate(spec.learning_rate)}"])


def describe_settings(spec: TrialSpec) -> str:
    """`rank 8, alpha/rank 2, all-linear`: what is the method's own; empty where it has nothing to set."""
    return ", ".join(list_settings(spec))


def describe_training(spec: TrialSpec) -> str:
    """`batch 16, 400 steps, linear schedule, warm-up 6%, weight decay 0.01, seed 3`."""
    return (
        f"batch {spec.batch_size}, {spec.max_steps:,} steps, {spec.schedule} schedule, "
        f"warm-up {spec.warmup_ratio:.3g}, weight decay {spec.weight_decay:.3g}, seed {spec.seed}"
    )


def list_settings(spec: TrialSpec) -> list[str]:
    """Each of the method's own settings in words, then its targets; what is switched off by default is left out."""
    defaults = {d.name: d.default for d in METHODS[spec.method].dimensions} if spec.method in METHODS else {}
    parts = [
        _describe_setting(name, value)
        for name, value in spec.settings.items()
        if not (_is_off(value) and defaults.get(name) == value)
    ]
    return [*parts, spec.target_modules] if spec.target_modules is not None else parts


def _is_off(value: Scalar) -> bool:
    return value in (0, "default")  # False equals 0


def _describe_setting(name: str, value: Scalar) -> str:
    words = _SPELLINGS.get(name, name.removeprefix("num_").replace("_over_", "/").replace("_", " "))
    if isinstance(value, bool):
        return words if value else f"no {words}"
    text = f"{value:.3g}" if isinstance(value, float) else _SPELLINGS.get(str(value), str(value))
    return f"{words} {text}"


def format_learning_rate(value: float) -> str:
    """`2.1e-3`."""
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def format_bytes(value: float) -> str:
    """`13.9 GiB`, `412 MiB`."""
    return _scale(value, _BYTES, " ", "B")


def format_count(value: float) -> str:
    """`22.6M`, `147k`, `512`."""
    return _scale(value, _COUNTS, "", "")


def format_seconds(value: float) -> str:
    """`8.2 s`, `45 s`, `12 min`, `3.4 h`."""
    for start, divisor, unit in _SECONDS:
        if value >= start:
            return f"{_two_digits(value / divisor)} {unit}"
    return f"{value:g} s"


def format_latency(seconds: float) -> str:
    """`4.21 ms`, and seconds from one on."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 0.9995 else format_seconds(seconds)


def describe_latency(inference: Inference) -> str:
    """`12 ms an example alone, 3.1 ms in batches of 32; merged 9.8 ms and 2.7 ms`."""
    alone = inference.unmerged
    text = (
        f"{format_latency(alone.single_seconds)} an example alone, {format_latency(alone.batch_seconds)} in batches of "
        f"{alone.batch_size}"
    )
    if inference.merged is not None:
        merged = inference.merged
        text += f"; merged {format_latency(merged.single_seconds)} and {format_latency(merged.batch_seconds)}"
    return text


def format_vram(cost: Cost) -> str:
    """`412 MiB (estimated)`: VRAM never goes without its source."""
    return f"{format_bytes(cost.peak_vram_bytes)} ({cost.vram_source})"


def is_fraction(scorer: str) -> bool:
    """Whether a scorer's values are shares, shown as percentages; correlations and the like are plain numbers."""
    return not _FRACTIONS.isdisjoint(scorer.lower().split("_"))


def format_quality(value: float, scorer: str) -> str:
    """`84.2%` for accuracy and F1, `0.512` for a correlation."""
    if not math.isfinite(value):
        return NOTHING
    text = f"{100 * value:.1f}%" if is_fraction(scorer) else f"{value:.3f}"
    return text.replace("-", MINUS)


def format_margin(value: float, scorer: str) -> str:
    """`0.6` for 0.6 percentage points, `0.012` for a correlation: what stands after a plus-minus sign."""
    return f"{100 * value:.1f}" if is_fraction(scorer) else f"{value:.3f}"


def _scale(value: float, units: tuple[tuple[float, str], ...], space: str, plain: str) -> str:
    for size, unit in units:
        if value >= 0.9995 * size:  # else 999,960 would read 1000k
            return f"{_two_digits(value / size)}{space}{unit}"
    return f"{value:.0f}{space}{plain}"


def _two_digits(value: float) -> str:
    """One decimal below 100 where it says something, none above."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}".removesuffix(".0")
