"""What a training is asked for beside its recipe. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec

from autopeft.errors import SpecError

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_TRACKER_PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX")}
PATIENCE = 10
"""Half of the usual twenty evaluations: scores often stand still until the rate falls, and the best weights are kept
anyway."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is asked of a training beside its recipe. None of it but `all_rows` decides where the weights go."""

    all_rows: bool = False
    """Trains on the search-validation rows too: then nothing is left to choose the best checkpoint by."""
    patience: int | None = PATIENCE
    """Evaluations without a better one before stopping; None goes on to the end."""
    evaluate_every: int | None = None
    """Optimizer steps; None is a twentieth of them all, or more where scoring would take over a quarter of the steps'
    time (`run.plan_rhythm`)."""
    save_every: int | None = None
    """Optimizer steps; None is as often as evaluations were asked for, else a twentieth. Every best score is saved."""
    report_to: tuple[str, ...] = ()


def check_options(options: Options) -> None:
    for name in options.report_to:
        if name not in TRACKERS:
            raise SpecError(f"--report-to knows {', '.join(TRACKERS)} and none, but was given '{name}'.")
        packages = _TRACKER_PACKAGES.get(name, (name,))
        if not any(find_spec(package) for package in packages):
            raise SpecError(
                f"--report-to {name} needs the package '{packages[0]}', which is not installed. Run: pip install "
                f"{packages[0]}, or give --report-to none."
            )
    if options.all_rows and options.evaluate_every is not None:
        raise SpecError(
            "--all-rows trains on the search-validation rows too, so there is nothing left to score for --eval-every."
        )
    for name in ("evaluate_every", "save_every"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise SpecError(
                f"--{name.replace('evaluate', 'eval').replace('_', '-')} must be at least 1, but is {value}."
            )
