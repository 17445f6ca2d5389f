"""Whether a result agrees with its prediction: a two-sided z test with both standard errors."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from autopeft.production.agreement import compare, estimate_standard_error
from autopeft.production.recipe import Prediction

PREDICTION = Prediction(
    scorer="accuracy",
    validation_quality=0.82,
    validation_sd=None,
    num_seeds=1,
    num_validation=1000,
    test_quality=0.80,
    test_sd=0.0,
    num_confirmed=2,
    num_test=1000,
)


def agrees(prediction: Prediction, quality: float, error: float = 0.0126) -> bool:
    agreement = compare(
        prediction, test_quality=quality, test_error=error, validation_quality=None, validation_error=None
    )
    assert agreement is not None
    return agreement.agrees


def test_a_shares_error_is_the_binomials() -> None:
    labels = np.array([1] * 300 + [0] * 700)
    error = estimate_standard_error("accuracy", labels, np.ones(1000, dtype=np.int64))
    # sqrt(p (1 - p) / n); 500 resamples know it to about 3%.
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 1000), rel=0.1)


def test_a_scorer_that_is_no_mean_has_an_error_too() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400)
    predictions = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    # Correlation 0.6 of n pairs: (1 - r^2) / sqrt(n) = 0.032, for two normal variables; binary ones are near it.
    assert estimate_standard_error("matthews_correlation", labels, predictions) == pytest.approx(0.04, abs=0.012)


def test_the_limit_is_196_standard_errors_of_the_difference() -> None:
    # Both errors are 0.0126, so the difference's is 0.0178 and the limit 0.0349, on either side.
    assert agrees(PREDICTION, 0.80 + 0.0345)
    assert not agrees(PREDICTION, 0.80 + 0.0355)
    assert agrees(PREDICTION, 0.80 - 0.0345)
    assert not agrees(PREDICTION, 0.80 - 0.0355)


def test_seeds_that_scatter_widen_the_limit() -> None:
    scattered = dataclasses.replace(PREDICTION, test_sd=0.03)
    # One run's variance and that of the mean of two: 0.03^2 + 0.03^2 / 2 more.
    assert agrees(scattered, 0.80 + 0.075)
    assert not agrees(scattered, 0.80 + 0.085)


def test_what_was_never_confirmed_is_compared_on_validation() -> None:
    unconfirmed = dataclasses.replace(PREDICTION, test_quality=None, test_sd=None, num_confirmed=0)
    agreement = compare(
        unconfirmed, test_quality=0.5, test_error=0.01, validation_quality=0.81, validation_error=0.0126
    )
    assert agreement is not None
    assert (agreement.split, agreement.agrees) == ("validation", True)
    assert agreement.difference == pytest.approx(-0.01)


def test_without_a_measurement_there_is_no_verdict() -> None:
    nothing = dataclasses.replace(
        PREDICTION, test_quality=None, test_sd=None, num_confirmed=0, validation_quality=None, num_seeds=0
    )
    assert compare(nothing, test_quality=0.5, test_error=0.01, validation_quality=0.5, validation_error=0.01) is None


def test_errors_of_zero_are_numbers_still() -> None:
    perfect = compare(PREDICTION, test_quality=1.0, test_error=0.0, validation_quality=None, validation_error=None)
    assert perfect is not None
    assert math.isfinite(perfect.z)
    assert not perfect.agrees
