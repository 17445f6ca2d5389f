"""What a free worker does next: start a trial, promote a paused one, or nothing. Pure functions of the study's state.

Whatever promises most per second goes first, a stretch of a paused trial or the first of a new one; `worth.py` has the
prices. Only what can reach its full length within the budget is begun or promoted. When nothing new can be started,
everything that racing left alive goes on in the same order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from autopeft.records import Bits
from autopeft.search.speed import Kind, Speed, kind_of
from autopeft.search.store import Trial
from autopeft.search.worth import Appraiser, Newcomer


class StartNew(NamedTuple):
    newcomers: tuple[Newcomer, ...]
    """The most promising first."""


class StartWaiting(NamedTuple):
    """What waits comes before whatever promises more."""

    number: int


class Promote(NamedTuple):
    number: int


class _Promotion(NamedTuple):
    trial: Trial
    price: float


class _Beginning(NamedTuple):
    newcomer: Newcomer
    price: float


class Wait(NamedTuple):
    """Nothing to do; `reason` says why."""

    reason: Literal["trials", "time", "none_left"]


class Situation(NamedTuple):
    """What a decision may depend on."""

    trials: Sequence[Trial]
    rungs: tuple[int, ...]
    seconds_left: float
    """Wall seconds until the search must end; inf where no clock bounds it."""
    trials_left: float
    can_suggest: bool
    """Whether the space may still hold something new."""
    waiting: Sequence[Trial]
    """What is begun next whatever it promises, the first that fits."""
    revivable: Sequence[Trial] = ()
    """Stopped trials whose verdict may still fall."""
    held: Bits | None = None
    """Width of the one base that the worker in question holds; None where it keeps all that it loaded."""


def choose_next(
    situation: Situation, speed: Speed, appraiser: Appraiser, find_newcomers: Callable[[], Sequence[Newcomer]]
) -> StartNew | StartWaiting | Promote | Wait:
    """`find_newcomers` is asked only where something new may be started."""
    may_start = situation.trials_left > 0
    waiting = next((trial for trial in situation.waiting if _fits_rest(trial, situation, speed)), None)
    if may_start and waiting is not None:
        return StartWaiting(waiting.number)
    paused = [trial for trial in situation.trials if trial.state == "paused" and trial.cost is not None]
    affordable = [trial for trial in paused if _fits_rest(trial, situation, speed)]
    newcomers: list[Newcomer] = []
    if may_start and situation.can_suggest:
        newcomers = [new for new in find_newcomers() if _fits(new.kind, 0, situation, speed)]
    promotions, beginnings = _price(affordable, newcomers, appraiser)
    # Of equals the new one goes first: where nothing promises anything, something else has to be tried.
    if beginnings and (not promotions or beginnings[0].price >= promotions[0].price):
        if _is_turn_of_recipe(situation.trials):
            beginnings.sort(key=lambda priced: priced.newcomer.source != "recipe")
        return StartNew(tuple(priced.newcomer for priced in beginnings))
    if promotions:
        return Promote(promotions[0].trial.number)
    revived = _choose_revival(situation, speed, appraiser)
    if revived is not None:
        return Promote(revived.number)
    if paused:
        return Wait("time")
    if situation.trials_left <= 0:
        return Wait("trials")
    return Wait("time" if situation.can_suggest else "none_left")


def _is_turn_of_recipe(trials: Sequence[Trial]) -> bool:
    """Whether a known-good configuration is begun in the place of one that promises more, as every third new one is
    while there are recipes left: promises are made from few scores at first."""
    recipes = sum(trial.source == "recipe" for trial in trials)
    return 2 * recipes <= sum(trial.source == "sampler" for trial in trials)


def _price(
    trials: Sequence[Trial], newcomers: Sequence[Newcomer], appraiser: Appraiser
) -> tuple[list[_Promotion], list[_Beginning]]:
    """Scored trials and new ones, the most promising first. Where quality has its turn, and nothing is expected to
    reach a better one, the turn passes to what the front gains otherwise."""
    for by_quality in (True, False) if appraiser.is_turn_of_quality else (False,):
        promotions = order_by_price(trials, appraiser, by_quality=by_quality)
        prices = appraiser.price_new(newcomers, by_quality=by_quality)
        beginnings = [
            _Beginning(newcomers[place], float(prices[place])) for place in np.argsort(-prices, kind="stable")
        ]
        if any(priced[0].price > 0 for priced in (promotions, beginnings) if priced):
            break
    return promotions, beginnings


def order_by_price(trials: Sequence[Trial], appraiser: Appraiser, *, by_quality: bool) -> list[_Promotion]:
    """The most promising first; of those that promise the same, the farther and then the better one."""
    prices = appraiser.price_paused(trials, by_quality=by_quality)
    priced = [_Promotion(trial, float(price)) for trial, price in zip(trials, prices, strict=True)]
    return sorted(priced, key=lambda each: (-each.price, -each.trial.step, each.trial.rungs[-1].loss))


def _choose_revival(situation: Situation, speed: Speed, appraiser: Appraiser) -> Trial | None:
    """A stopped trial to go on with in time that nothing else can use, the most promising first.

    Verdicts can be wrong, and time that is left cannot be saved. Without a clock in the budget there is no end of it.
    """
    if math.isinf(situation.seconds_left):
        return None
    within = [trial for trial in situation.revivable if _fits_rest(trial, situation, speed)]
    promotions, _ = _price([trial for trial in within if trial.cost is not None], [], appraiser)
    return promotions[0].trial if promotions else None


def _fits_rest(trial: Trial, situation: Situation, speed: Speed) -> bool:
    return _fits(kind_of(trial.spec), trial.step, situation, speed)


def _fits(kind: Kind, step: int, situation: Situation, speed: Speed) -> bool:
    """Whether the full length is within reach; a trial that ends between rungs would have cost time for nothing."""
    if math.isinf(situation.seconds_left):
        return True
    needed = speed.predict_load(kind.bits, situation.held) + speed.predict_to_end(kind, step, situation.rungs)
    return needed <= situation.seconds_left
