"""Every documented form of a budget, what is refused, and the ledger's arithmetic."""

from __future__ import annotations

import math
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autopeft.budget import Budget, DeviceKind, Ledger, parse_budget, parse_price, parse_until
from autopeft.errors import BudgetError

PURPOSES = ("search", "confirm", "baseline", "lost")
SECONDS = st.floats(0, 1e6)


@pytest.mark.parametrize(
    ("text", "device_seconds", "device_kind", "wall_seconds", "trials"),
    [
        ("8gpu-h", 28_800, "cuda", None, None),
        ("30gpu-min", 1_800, "cuda", None, None),
        ("2cpu-h", 7_200, "cpu", None, None),
        ("20cpu-min", 1_200, "cpu", None, None),
        ("2h", None, None, 7_200, None),
        ("90min", None, None, 5_400, None),
        ("50trials", None, None, None, 50),
        ("8gpu-h,50trials", 28_800, "cuda", None, 50),
        ("2h, 50trials", None, None, 7_200, 50),
        ("40cpu-min,1h", 2_400, "cpu", 3_600, None),
        ("1.5 h", None, None, 5_400, None),
        ("8GPU-H", 28_800, "cuda", None, None),
    ],
)
def test_every_documented_form_is_read(
    text: str, device_seconds: float | None, device_kind: str | None, wall_seconds: float | None, trials: int | None
) -> None:
    budget = parse_budget(text)
    assert (budget.device_seconds, budget.device_kind) == (device_seconds, device_kind)
    assert (budget.wall_seconds, budget.trials) == (wall_seconds, trials)


@pytest.mark.parametrize(
    "text", ["", " ", "8", "gpu-h", "8gpu", "8 gpu h", "-1h", "1e3h", "h2", "2h;3trials", "2h,", "∞h"]
)
def test_what_is_no_budget_is_refused_with_the_forms(text: str) -> None:
    with pytest.raises(BudgetError, match="8gpu-h"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["0h", "0trials", "0.0gpu-h", "2h,0trials"])
def test_a_budget_of_zero_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="above zero"):
        parse_budget(text)


@pytest.mark.parametrize("text", ["1h,2h", "1h,30min", "1gpu-h,30gpu-min", "3trials,4trials"])
def test_bounding_the_same_thing_twice_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="twice"):
        parse_budget(text)


def test_gpu_and_cpu_time_together_are_refused() -> None:
    with pytest.raises(BudgetError, match="one of them"):
        parse_budget("1gpu-h,1cpu-h")


def test_three_parts_are_refused() -> None:
    with pytest.raises(BudgetError, match="at most two"):
        parse_budget("1gpu-h,1h,3trials")


def test_half_a_trial_is_refused() -> None:
    with pytest.raises(BudgetError, match="whole"):
        parse_budget("2.5trials")


@given(st.integers(1, 10_000), st.sampled_from(["gpu-", "cpu-", ""]))
def test_sixty_minutes_are_an_hour(hours: int, kind: str) -> None:
    one, other = parse_budget(f"{hours}{kind}h"), parse_budget(f"{60 * hours}{kind}min")
    assert (one.device_seconds, one.wall_seconds) == (other.device_seconds, other.wall_seconds)


@given(st.sampled_from(["8gpu-h", "20cpu-min", "2h", "50trials"]), st.sampled_from(["3h", "7trials", "5gpu-min"]))
def test_the_order_of_two_parts_does_not_matter(one: str, other: str) -> None:
    def read(text: str) -> object:
        try:
            budget = parse_budget(text)
        except BudgetError:
            return "refused"
        return (budget.device_seconds, budget.device_kind, budget.wall_seconds, budget.trials)

    assert read(f"{one},{other}") == read(f"{other},{one}")


@given(st.text(max_size=20))
def test_any_text_is_a_budget_or_a_budget_error(text: str) -> None:
    try:
        budget = parse_budget(text)
    except BudgetError:
        return
    assert budget.is_clocked or budget.trials


def test_only_trials_leave_the_clock_unread() -> None:
    assert [parse_budget(text).is_clocked for text in ("3trials", "3trials,2h", "2h", "1cpu-h")] == [
        False, True, True, True
    ]  # fmt: skip


def test_eight_gpu_hours_are_one_hour_of_eight_gpus() -> None:
    assert parse_budget("8gpu-h").wall_bound_seconds(8.0) == 3600


def test_trials_do_not_bound_the_wall_time() -> None:
    assert parse_budget("3trials").wall_bound_seconds(1.0) == math.inf


# --- --until and --price


def test_until_is_the_next_time_the_clock_shows_it() -> None:
    now = datetime(2026, 3, 1, 17, 30)
    assert parse_until("18:00", now) == 1800
    assert parse_until("17:00", now) == 23.5 * 3600


def test_until_now_means_tomorrow() -> None:
    assert parse_until("17:30", datetime(2026, 3, 1, 17, 30)) == 24 * 3600


@given(st.datetimes(datetime(2020, 1, 1), datetime(2030, 1, 1)), st.integers(0, 23), st.integers(0, 59))
def test_until_is_within_a_day_and_ends_at_that_time(now: datetime, hour: int, minute: int) -> None:
    seconds = parse_until(f"{hour}:{minute:02}", now)
    end = now + timedelta(seconds=seconds)
    assert 0 < seconds <= 24 * 3600
    assert abs((end - end.replace(hour=hour, minute=minute, second=0, microsecond=0)).total_seconds()) < 0.01


@pytest.mark.parametrize("text", ["24:00", "18", "18:60", "6pm", "", "-1:00"])
def test_what_is_no_time_of_day_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match="18:00"):
        parse_until(text, datetime(2026, 3, 1))


@pytest.mark.parametrize(("text", "price"), [("2.5/gpu-h", 2.5), ("0.04/cpu-h", 0.04), (" 3/GPU-h ", 3.0)])
def test_a_price_is_read(text: str, price: float) -> None:
    assert parse_price(text, "cpu" if "cpu" in text else "cuda") == price


@pytest.mark.parametrize("text", ["", "2.5", "cheap", "-1/gpu-h", "2.5/h", "$2/gpu-h"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(BudgetError, match=r"2\.5/gpu-h"):
        parse_price(text, "cuda")


@pytest.mark.parametrize(
    ("text", "device_kind", "wanted"), [("2.5/gpu-h", "cpu", "cpu-h"), ("1/cpu-h", "cuda", "gpu-h")]
)
def test_a_price_of_what_is_not_spent_is_refused(text: str, device_kind: DeviceKind, wanted: str) -> None:
    with pytest.raises(BudgetError, match=f"AMOUNT/{wanted}"):
        parse_price(text, device_kind)


# --- the ledger


@given(st.lists(st.tuples(st.sampled_from(PURPOSES), SECONDS)))
def test_charges_add_up(charges: list[tuple[str, float]]) -> None:
    ledger = Ledger(parse_budget("1gpu-h"))
    for purpose, seconds in charges:
        ledger.charge(purpose, seconds)  # type: ignore[arg-type]
    assert ledger.spent_device_seconds == pytest.approx(sum(seconds for _, seconds in charges))
    record = ledger.to_record()
    for purpose in PURPOSES:
        spent = sum(seconds for name, seconds in charges if name == purpose)
        assert getattr(record, f"{purpose}_seconds") == pytest.approx(spent)


@given(SECONDS, SECONDS, st.sampled_from([1.0, 2.0, 8.0]))
def test_a_charge_lowers_what_remains_by_its_wall_time(before: float, charge: float, rate: float) -> None:
    ledger = Ledger(parse_budget("1000gpu-h"))
    ledger.charge("search", before)
    left = ledger.remaining_wall_seconds(rate)
    ledger.charge("search", charge)
    assert ledger.remaining_wall_seconds(rate) == pytest.approx(left - charge / rate)


@given(SECONDS, st.sampled_from([1.0, 4.0]))
def test_running_stretches_count_as_if_they_had_been_charged(seconds: float, rate: float) -> None:
    one, other = Ledger(parse_budget("1000cpu-h")), Ledger(parse_budget("1000cpu-h"))
    one.charge("search", seconds)
    assert one.remaining_wall_seconds(rate) == pytest.approx(other.remaining_wall_seconds(rate, seconds))


@given(SECONDS, SECONDS)
def test_the_nearer_of_two_bounds_counts(spent: float, wall: float) -> None:
    ledger = Ledger(Budget(text="", device_seconds=1e6, device_kind="cuda", wall_seconds=1e6))
    ledger.charge("search", spent)
    ledger.wall_seconds = wall
    assert ledger.remaining_wall_seconds(1.0) == pytest.approx(min(1e6 - spent, 1e6 - wall))


@pytest.mark.parametrize("seconds", [-1.0, math.nan])
def test_time_never_runs_backwards(seconds: float) -> None:
    with pytest.raises(ValueError, match="at least 0"):
        Ledger(parse_budget("1h")).charge("search", seconds)


def test_trials_are_counted_down() -> None:
    ledger = Ledger(parse_budget("3trials"))
    ledger.trials_started = 2
    assert ledger.trials_left() == 1
    assert Ledger(parse_budget("3h")).trials_left() == math.inf
