"""Whether a finished training scores as its study predicted."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from autopeft.production.files import Agreement
from autopeft.production.recipe import Prediction
from autopeft.tasks.scorers import score_predictions

CRITICAL_Z = 1.96
"""Two-sided 5%."""
_RESAMPLES = 500


def estimate_standard_error(
    scorer: str, labels: npt.NDArray[np.int64], predictions: npt.NDArray[Any], *, seed: int = 0
) -> float:
    """Of a score, from its examples: they are drawn with replacement 500 times (a bootstrap), for any scorer."""
    rng = np.random.default_rng(seed)
    scores = []
    for _ in range(_RESAMPLES):
        rows = rng.integers(0, len(labels), len(labels))
        scores.append(score_predictions(scorer, labels[rows], predictions[rows]))
    return float(np.std(scores, ddof=1))


def compare(
    prediction: Prediction,
    *,
    test_quality: float,
    test_error: float,
    validation_quality: float | None,
    validation_error: float | None,
) -> Agreement | None:
    """The finished training against the study, on the test split, or on search-validation where the study never saw
    the test; None where there is nothing to compare.

    A two-sided z test for two independent estimates: |difference| / sqrt(SE1^2 + SE2^2), as arXiv:2411.00640,
    section 4.1, has it for evaluations. Each squared standard error is the examples' plus the seeds' variance. Both
    were scored on the same examples, which makes them agree more than independent ones would: the test errs on the
    quiet side.
    """
    if prediction.test_quality is not None:
        split, mine, error = "test", test_quality, test_error
        theirs, spread, runs = prediction.test_quality, prediction.test_sd, prediction.num_confirmed
    elif prediction.validation_quality is not None and validation_quality is not None and validation_error is not None:
        split, mine, error = "validation", validation_quality, validation_error
        theirs, spread, runs = prediction.validation_quality, prediction.validation_sd, prediction.num_seeds
    else:
        return None
    between = (spread or 0.0) ** 2
    standard_error = math.sqrt(error**2 + between + error**2 + between / runs)
    difference = mine - theirs
    z = (
        difference / standard_error
        if standard_error > 0
        else math.copysign(math.inf, difference)
        if difference
        else 0.0
    )
    # An infinite z is no JSON number.
    z = max(min(z, 1e6), -1e6)
    return Agreement(
        split="test" if split == "test" else "validation",
        difference=difference,
        standard_error=standard_error,
        z=z,
        agrees=abs(z) <= CRITICAL_Z,
    )
