"""Studies that live in memory: the real driver, sampler and store on recorded curves, without files."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import optuna

from autopeft.backends.replay import ReplayBackend
from autopeft.records import SCHEMA_VERSION, StudyConfig, to_record
from autopeft.search.distributions import optuna_directions
from autopeft.search.store import StudyStore, Trial


class MemoryStore(StudyStore):
    """A study in memory whose scores are read from a recording."""

    def __init__(self, backend: ReplayBackend, config: StudyConfig) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = optuna.storages.InMemoryStorage()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study = optuna.create_study(
                study_name="autopeft", storage=storage, directions=optuna_directions(config.objectives),
                sampler=optuna.samplers.RandomSampler(seed=0),
            )  # fmt: skip
        recording = backend.recording
        for key, value in {
            "schema_version": SCHEMA_VERSION,
            "uid": "replay",
            "config": to_record(config),
            "provenance": to_record(recording.curves.provenance),
            "reference": recording.curves.reference,
        }.items():
            study.set_user_attr(key, value)
        # No file is ever written there: recorded trials have no checkpoints.
        super().__init__(Path(tempfile.gettempdir()) / "autopeft-no-such-study", study, storage)
        self._backend = backend

    def read_scores(self, scores_file: str, key: str) -> npt.NDArray[Any]:
        scores = self._backend.read_scores(scores_file, key)
        assert scores is not None, "this recording holds means alone"
        return scores

    def read_losses(self, scores_file: str) -> npt.NDArray[np.float64] | None:
        losses = self._backend.read_scores(scores_file, "validation_losses")
        return None if losses is None else losses.astype(np.float64)

    def read_labels(self) -> npt.NDArray[np.int64]:
        return self._backend.recording.labels

    def drop_checkpoints(self, trial: Trial, *, keep: str | None = None) -> None:
        """There are none."""

    def has_checkpoint(self, trial: Trial) -> bool:
        return trial.checkpoint is not None
