"""Where the budget went: the ledger as a small table."""

from __future__ import annotations

from typing import NamedTuple

from autopeft.budget import Budget, parse_budget
from autopeft.errors import BudgetError
from autopeft.records import StudyRecord
from autopeft.report.words import format_seconds


class Expense(NamedTuple):
    purpose: str
    """Key into `figures.PURPOSES`."""
    meaning: str
    seconds: str
    share: str
    price: str | None


class Spending(NamedTuple):
    expenses: list[Expense]
    total: Expense
    wall: str
    bound: str | None
    """How what was spent compares with what was allowed; None where the budget bounds no time."""


_MEANINGS = {
    "search": "training and scoring trials",
    "confirm": "retraining finalists with more seeds",
    "baseline": "the trained head",
    "lost": "cut off by a crash or an interrupt",
}


def list_spending(study: StudyRecord) -> Spending:
    ledger = study.ledger
    seconds = {
        "search": ledger.search_seconds,
        "confirm": ledger.confirm_seconds,
        "baseline": ledger.baseline_seconds,
        "lost": ledger.lost_seconds,
    }
    total = sum(seconds.values())
    price = study.config.price_per_device_hour
    meanings = dict(_MEANINGS)
    if study.config.task_kind == "generation":
        meanings["baseline"] = "scoring the untrained base"
    return Spending(
        [_expense(name, meanings[name], spent, total, price) for name, spent in seconds.items()],
        _expense("total", "", total, total, price),
        format_seconds(ledger.wall_seconds),
        _compare(study, total),
    )


def _expense(purpose: str, meaning: str, seconds: float, total: float, price: float | None) -> Expense:
    share = f"{seconds / total:.0%}" if total else "0%"
    cost = None if price is None else f"{seconds / 3600 * price:,.2f}"
    return Expense(purpose, meaning, format_seconds(seconds), share, cost)


def _compare(study: StudyRecord, device_seconds: float) -> str | None:
    budget = _parse(study.config.budget)
    if budget is None:
        return None
    spent, allowed, of = device_seconds, budget.device_seconds, "device time"
    if allowed is None:
        spent, allowed, of = study.ledger.wall_seconds, budget.wall_seconds, "wall time"
    if allowed is None:
        return None
    share = f"{format_seconds(spent)} of {format_seconds(allowed)} {of} ({spent / allowed:.0%})"
    return f"{share}: {format_seconds(spent - allowed)} over" if spent > allowed else share


def _parse(text: str) -> Budget | None:
    try:
        return parse_budget(text)
    except BudgetError:  # a record of an older or newer autopeft may hold units that this one does not know
        return None
