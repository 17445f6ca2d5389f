"""What a search may spend, and the ledger of what it has spent."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from autopeft.errors import BudgetError
from autopeft.records import LedgerRecord

DeviceKind = Literal["cpu", "cuda"]
Purpose = Literal["search", "confirm", "baseline", "lost"]

# unit -> (what it bounds, seconds or trials in one of it)
_UNITS: dict[str, tuple[Literal["cuda", "cpu", "wall", "trials"], float]] = {
    "gpu-h": ("cuda", 3600.0),
    "gpu-min": ("cuda", 60.0),
    "cpu-h": ("cpu", 3600.0),
    "cpu-min": ("cpu", 60.0),
    "h": ("wall", 3600.0),
    "min": ("wall", 60.0),
    "trials": ("trials", 1.0),
}
_PART = re.compile(r"(?P<amount>\d+(?:\.\d+)?)\s*(?P<unit>[a-z-]+)")
_FORMS = "8gpu-h, 30gpu-min, 20cpu-min, 2h, 90min, 50trials, or two of them joined by a comma"


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Bounds on a study; None where a kind is not bounded. Whichever is reached first ends the search."""

    text: str
    device_seconds: float | None = None
    """GPU seconds, or core seconds on CPU: a worker is charged its threads."""
    device_kind: DeviceKind | None = None
    """Which device the device-seconds are of."""
    wall_seconds: float | None = None
    trials: int | None = None
    """Distinct configurations started; refused ones and confirmations do not count."""

    @property
    def is_clocked(self) -> bool:
        """Whether the clock bounds it; if not, decisions must not read the clock."""
        return self.device_seconds is not None or self.wall_seconds is not None

    def wall_bound_seconds(self, device_rate: float) -> float:
        """Wall seconds it buys when `device_rate` device-seconds are charged each second; inf where unbounded."""
        by_device = math.inf if self.device_seconds is None else self.device_seconds / device_rate
        by_wall = math.inf if self.wall_seconds is None else self.wall_seconds
        return min(by_device, by_wall)


def parse_budget(text: str) -> Budget:
    """`8gpu-h` -> Budget. Raises BudgetError for what does not parse, is zero, or bounds the same thing twice."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        match = _PART.fullmatch(part.strip().lower())
        if match is None or match["unit"] not in _UNITS:
            raise BudgetError(f"A budget is a number and a unit, but '{part.strip()}' is not. Write {_FORMS}.")
        kind, size = _UNITS[match["unit"]]
        amount = float(match["amount"]) * size
        if amount <= 0:
            raise BudgetError(f"A budget must be above zero, but '{text}' buys nothing. Write {_FORMS}.")
        if kind == "trials" and not amount.is_integer():
            raise BudgetError(f"Trials are whole, but the budget asks for '{part.strip()}'. Write 50trials.")
        if kind in bounds:
            raise BudgetError(
                f"The two parts of a budget must bound different things, but '{text}' bounds {kind} twice."
            )
        bounds[kind] = amount
    if len(bounds) > 2:
        raise BudgetError(f"A budget has at most two parts, but '{text}' has {len(bounds)}. Write {_FORMS}.")
    if "cuda" in bounds and "cpu" in bounds:
        raise BudgetError(f"A study runs on GPUs or on CPU cores, but '{text}' bounds both. Give one of them.")
    device_kind: DeviceKind | None = "cuda" if "cuda" in bounds else "cpu" if "cpu" in bounds else None
    return Budget(
        text=text.strip(),
        device_seconds=bounds.get("cuda", bounds.get("cpu")),
        device_kind=device_kind,
        wall_seconds=bounds.get("wall"),
        trials=int(bounds["trials"]) if "trials" in bounds else None,
    )


def parse_until(text: str, now: datetime) -> float:
    """Wall seconds from `now` to the next time the clock shows `text` (HH:MM)."""
    match = re.fullmatch(r"(\d{1,2}):(\d{2})", text.strip())
    if match is None or int(match[1]) > 23 or int(match[2]) > 59:
        raise BudgetError(f"--until takes a time of day such as 18:00, but was given '{text}'.")
    end = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
    if end <= now:
        end += timedelta(days=1)
    return (end - now).total_seconds()


_PRICE = re.compile(r"(\d+(?:\.\d+)?)/(gpu|cpu)-h")


def parse_price(text: str, device_kind: DeviceKind) -> float:
    """`2.5/gpu-h` -> 2.5, in whatever currency the user thinks in. Raises BudgetError for a price of something else
    than what the study spends: GPU-hours, or core-hours on CPU."""
    match = _PRICE.fullmatch(text.strip().lower())
    if match is None:
        raise BudgetError(f"--price takes an amount for a device-hour such as 2.5/gpu-h, but was given '{text}'.")
    spent = "gpu" if device_kind == "cuda" else "cpu"
    if match[2] != spent:
        kinds = {"gpu": "GPUs", "cpu": "CPU cores"}
        raise BudgetError(
            f"--price must be of what the study spends, which on this machine is time of {kinds[spent]}, but was given "
            f"'{text}'. Give the price of a core or GPU as AMOUNT/{spent}-h, or leave it away."
        )
    return float(match[1])


@dataclass(slots=True)
class Ledger:
    """Counts what was spent. Device-seconds run from a worker's assignment to its release."""

    budget: Budget
    device_seconds: dict[Purpose, float] = field(
        default_factory=lambda: {"search": 0.0, "confirm": 0.0, "baseline": 0.0, "lost": 0.0}
    )
    wall_seconds: float = 0.0
    trials_started: int = 0

    def charge(self, purpose: Purpose, device_seconds: float) -> None:
        if not device_seconds >= 0:
            raise ValueError(f"device-seconds must be at least 0, got {device_seconds}")
        self.device_seconds[purpose] += device_seconds

    @property
    def spent_device_seconds(self) -> float:
        return sum(self.device_seconds.values())

    def remaining_wall_seconds(self, device_rate: float, running_device_seconds: float = 0.0) -> float:
        """Wall seconds left when every worker is busy; inf when no clock bounds the study.

        `device_rate` is the device-seconds charged each second, `running_device_seconds` what running stretches have
        used and not yet been charged.
        """
        left = math.inf
        if self.budget.device_seconds is not None:
            spent = self.spent_device_seconds + running_device_seconds
            left = min(left, (self.budget.device_seconds - spent) / device_rate)
        if self.budget.wall_seconds is not None:
            left = min(left, self.budget.wall_seconds - self.wall_seconds)
        return left

    def trials_left(self) -> float:
        return math.inf if self.budget.trials is None else self.budget.trials - self.trials_started

    def find_exceeded(self) -> str | None:
        """What was spent, in words, of the first bound that leaves nothing; of trials, that is less than was begun."""
        bound = self.budget
        if bound.device_seconds is not None and self.spent_device_seconds >= bound.device_seconds:
            unit = "gpu" if bound.device_kind == "cuda" else "cpu"
            return f"{self.spent_device_seconds / 60:.1f}{unit}-min"
        if bound.wall_seconds is not None and self.wall_seconds >= bound.wall_seconds:
            return f"{self.wall_seconds / 60:.1f}min"
        return f"{self.trials_started}trials" if self.trials_left() < 0 else None

    def to_record(self) -> LedgerRecord:
        return LedgerRecord(
            search_seconds=self.device_seconds["search"],
            confirm_seconds=self.device_seconds["confirm"],
            baseline_seconds=self.device_seconds["baseline"],
            lost_seconds=self.device_seconds["lost"],
            wall_seconds=self.wall_seconds,
        )
