"""The study on disk. Optuna's storage is the only state; checkpoints and per-example scores lie beside it."""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import sqlite3
import uuid
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import optuna
import sqlalchemy

from autopeft.budget import Ledger
from autopeft.errors import RecordError, StudyError, suggest_nearest
from autopeft.locks import lock_file
from autopeft.methods import fill_settings
from autopeft.records import (
    SCHEMA_VERSION,
    Confirmation,
    Cost,
    Failed,
    FailedConfirmation,
    Outcome,
    Provenance,
    RungScore,
    Segment,
    StudyConfig,
    TrialRecord,
    TrialSource,
    TrialSpec,
    TrialState,
    from_record,
    to_record,
)
from autopeft.search.distributions import distributions, keep_known, optuna_directions
from autopeft.search.front import cost_vector
from autopeft.spaces.space import SearchSpace
from autopeft.wording import in_one_line

_LOCKED_SECONDS = 60.0
"""To wait for another program that writes to the database."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_STUDY = "autopeft"

Predictions = npt.NDArray[np.int64]


@dataclass(slots=True)
class Trial:
    """A trial while the study runs; every change is written through `StudyStore.save`."""

    number: int
    spec: TrialSpec
    source: TrialSource
    state: TrialState = "waiting"
    cost: Cost | None = None
    rungs: list[RungScore] = field(default_factory=list)
    outcome: Outcome | None = None
    device_seconds: float = 0.0
    confirmations: list[Confirmation] = field(default_factory=list)
    failed_confirmations: list[FailedConfirmation] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    checkpoint: str | None = None
    checkpoint_digest: str | None = None
    deaths: int = 0
    """Workers that died under it; a few are an accident, more are its fault."""

    @property
    def step(self) -> int:
        """Steps trained and scored so far."""
        return self.rungs[-1].step if self.rungs else 0

    def to_record(self) -> TrialRecord:
        return TrialRecord(
            number=self.number,
            spec=self.spec,
            source=self.source,
            state=self.state,
            cost=self.cost,
            rungs=tuple(self.rungs),
            outcome=self.outcome,
            device_seconds=self.device_seconds,
            confirmations=tuple(self.confirmations),
            failed_confirmations=tuple(self.failed_confirmations),
        )


_SAVED: dict[str, Any] = {
    "spec": TrialSpec,
    "source": TrialSource,
    "state": TrialState,
    "cost": Cost | None,
    "rungs": tuple[RungScore, ...],
    "outcome": Outcome | None,
    "device_seconds": float,
    "confirmations": tuple[Confirmation, ...],
    "failed_confirmations": tuple[FailedConfirmation, ...],
    "segments": tuple[Segment, ...],
    "checkpoint": str | None,
    "checkpoint_digest": str | None,
    "deaths": int,
}
"""What is kept of a trial, and its types."""

_LATE = ("confirmations", "failed_confirmations", "segments")
_REMEDIES = {
    sqlite3.SQLITE_FULL: "Make room on its disk",
    sqlite3.SQLITE_BUSY: "End whatever else writes to it",
    sqlite3.SQLITE_LOCKED: "End whatever else writes to it",
    sqlite3.SQLITE_IOERR: "See that its disk works and has room",
    sqlite3.SQLITE_READONLY: "See that the file and its folder can be written to",
    sqlite3.SQLITE_CANTOPEN: "See that the file and its folder can be written to",
    sqlite3.SQLITE_CORRUPT: "Restore it from a copy",
    sqlite3.SQLITE_NOTADB: "Restore it from a copy",
}
"""By what befell the file: https://www.sqlite.org/rescode.html. Whatever else SQLite reports is for Optuna to see."""

_TRIAL = "trial"
"""The user attribute that holds all of it: one, because each is a write of its own, and a driver may be killed between
two of them."""


def list_studies(root: Path) -> list[str]:
    """Names, sorted."""
    return sorted(path.parent.name for path in root.glob("*/study.db"))


def check_study_name(name: str) -> None:
    """Raises StudyError for a name that is no plain file name, so that no study escapes its folder."""
    if not _NAME.fullmatch(name):
        raise StudyError(
            f"A study's name is letters, digits, '.', '_' and '-', at most 100, and starts with a letter or digit, but "
            f"'{name}' is not. Choose another with --name."
        )


def check_new_study(root: Path, name: str) -> None:
    """Raises StudyError where the name cannot be given to a new study."""
    check_study_name(name)
    if (root / name / "study.db").exists():
        raise StudyError(
            f"There is already a study '{name}'. Go on with it: autopeft resume {name}. Or start another under a new "
            "--name."
        )


class StudyStore:
    """One study: its settings, its trials, and the files beside them."""

    def __init__(self, folder: Path, study: optuna.Study, storage: optuna.storages.BaseStorage) -> None:
        self.folder = folder
        self._study = study
        self._storage = storage
        self._study_id = storage.get_study_id_from_name(_STUDY)
        self.reread()

    def reread(self) -> None:
        """All of it, from the disk. Raises RecordError for a study of a newer autopeft."""
        attributes = self._study.user_attrs
        version = attributes.get("schema_version", 0)
        if version > SCHEMA_VERSION:
            raise RecordError(
                f"The study in '{self.folder}' was written with schema {version}, and this autopeft reads schemas up "
                f"to {SCHEMA_VERSION}. Nothing was changed. Install a newer autopeft to go on."
            )
        where = f"study '{self.folder.name}'"
        config = from_record(StudyConfig, attributes["config"], where)
        self.config: StudyConfig = replace(config, included=tuple(map(fill_settings, config.included)))
        self.provenance: Provenance = from_record(Provenance, attributes["provenance"], where)
        self.uid: str = attributes["uid"]
        self.reference: dict[str, float] = dict(attributes.get("reference", {}))
        self.notes: list[str] = list(attributes.get("notes", []))
        self.finished: bool = attributes.get("finished", False)
        self.trials: list[Trial] = []
        self.baseline: Trial | None = None
        self._written: dict[int, dict[str, Any]] = {}
        self._told: set[int] = set()
        self._known: dict[str, optuna.distributions.BaseDistribution] = {}
        """By name, as Optuna saw them first."""
        for frozen in self._study.get_trials(deepcopy=False):
            self.trials.append(self._read_trial(frozen, attributes))
            self._known = frozen.distributions | self._known
            if frozen.state.is_finished():
                self._told.add(frozen.number)
        if "baseline" in attributes:
            self.baseline = _decode_trial(-1, attributes["baseline"], where)

    # --- open, create

    @classmethod
    def create(
        cls,
        root: Path,
        config: StudyConfig,
        provenance: Provenance,
        labels: npt.NDArray[np.int64],
    ) -> StudyStore:
        """A new study in `root/<name>/`. Raises StudyError where there is one already, or it cannot be written."""
        check_new_study(root, config.name)
        folder = root / config.name
        try:
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "labels.npy", labels)
        except OSError as exc:
            raise StudyError(f"The study's folder '{folder}' must be writable, but: {exc.strerror}.") from exc
        directions = optuna_directions(config.objectives)
        # Written under another name first: a study.db that exists is whole.
        part = folder / "study.part"
        part.unlink(missing_ok=True)
        storage = _open_storage(part)
        study = optuna.create_study(study_name=_STUDY, storage=storage, directions=directions)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names(list(config.objectives))
        for key, value in {
            "schema_version": SCHEMA_VERSION,
            "uid": uuid.uuid4().hex[:16],
            "config": to_record(config),
            "provenance": to_record(provenance),
        }.items():
            study.set_user_attr(key, value)
        storage.remove_session()
        storage.engine.dispose()
        part.replace(folder / "study.db")
        return cls.open(root, config.name)

    @classmethod
    def open(cls, root: Path, name: str) -> StudyStore:
        """Raises StudyError with the nearest name where there is no such study."""
        folder = root / name
        if not _NAME.fullmatch(name) or not (folder / "study.db").is_file():
            known = list_studies(root)
            hint = suggest_nearest(name, known) if known else "There are none yet; autopeft search starts one."
            raise StudyError(f"There is no study '{name}' in '{root}'. {hint}")
        try:
            storage = _open_storage(folder / "study.db")
            study = optuna.load_study(
                study_name=_STUDY,
                storage=storage,
                # It is never asked; worth.py says what is tried.
                sampler=optuna.samplers.RandomSampler(seed=0),
            )
        except StudyError:
            raise
        except Exception as exc:  # sqlalchemy's and optuna's many types, none of which a user can tell apart
            raise StudyError(f"The study in '{folder}' cannot be read: {exc}. Restore study.db from a copy.") from exc
        return cls(folder, study, storage)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held by the study's driver. Raises StudyError where another driver holds it."""
        with (self.folder / "driver.lock").open("a+") as file:
            try:
                lock_file(file.fileno())
            except BlockingIOError:
                raise StudyError(
                    f"The study '{self.config.name}' is being run by another process. Wait for it, or stop it."
                ) from None
            except OSError as exc:
                raise StudyError(
                    f"A study lies on a file system with file locks, so that no two processes run it at once, but "
                    f"'{self.folder}' cannot be locked: {exc.strerror}. Run this in a folder on a local disk."
                ) from exc
            yield

    # --- trials

    def add(self, spec: TrialSpec, source: TrialSource, space: SearchSpace) -> Trial:
        """A new trial. It is stored with its configuration at once, so that a crash loses no question asked."""
        trial = Trial(number=len(self.trials), spec=spec, source=source)
        params = space.params(spec) or {}
        asked = keep_known(distributions(space, params), self._known, params) if params else {}
        encoded = _encode_trial(trial)
        # One write. What is asked of the study itself reads all trials that have not ended, of which there are many.
        running = optuna.trial.create_trial(
            state=optuna.trial.TrialState.RUNNING, params={name: params[name] for name in asked}, distributions=asked,
            user_attrs={_TRIAL: encoded},
        )  # fmt: skip
        self._storage.create_new_trial(self._study_id, template_trial=running)
        self._known = asked | self._known
        self._written[trial.number] = encoded
        self.trials.append(trial)
        return trial

    def repair(self) -> None:
        """Brings Optuna's trials up to ours, where a driver was killed between writing the one and the other."""
        for frozen in self._study.get_trials(deepcopy=False):
            trial = self.trials[frozen.number]
            if frozen.state == optuna.trial.TrialState.WAITING:
                # Earlier versions had it wait in Optuna's queue first.
                self._storage.set_trial_state_values(frozen._trial_id, optuna.trial.TrialState.RUNNING)
            if is_ended(trial) and not self.may_revive(trial) and not frozen.state.is_finished():
                self._tell(trial)

    def save(self, trial: Trial) -> None:
        """Writes what has changed of a trial; tells Optuna when it has ended for good."""
        if trial is self.baseline:
            self._study.set_user_attr("baseline", _encode_trial(trial))
            return
        encoded = _encode_trial(trial)
        if trial.number not in self._told:
            if encoded != self._written.get(trial.number):
                self._storage.set_trial_user_attr(self._trial_id(trial.number), _TRIAL, encoded)
                self._written[trial.number] = encoded
            if is_ended(trial) and not self.may_revive(trial):
                self._tell(trial)
        else:
            # Optuna freezes the attributes of a trial that was told; confirmations come later.
            self._study.set_user_attr(f"late:{trial.number}", {key: encoded[key] for key in _LATE})

    def may_revive(self, trial: Trial) -> bool:
        """Whether it is stopped, but not for good: a verdict may fall while the search that gave it goes on."""
        return trial.state == "stopped" and trial.number not in self._told

    def tell_stopped(self) -> None:
        """Stops for good what is stopped, now that the search is over."""
        for trial in self.trials:
            if self.may_revive(trial):
                self._tell(trial)
                self.drop_checkpoints(trial)

    def _tell(self, trial: Trial) -> None:
        self._told.add(trial.number)
        study = self._study
        if trial.state == "complete":
            assert trial.cost is not None
            study.tell(trial.number, [trial.rungs[-1].quality, *cost_vector(trial.cost, self.config.objectives)])
        elif isinstance(trial.outcome, Failed) and trial.outcome.reason in ("worker_died", "error"):
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        else:
            missing = 1 - trial.step / trial.spec.max_steps
            self._storage.set_trial_system_attr(self._trial_id(trial.number), "constraints:missing", missing)
            study.tell(trial.number, state=optuna.trial.TrialState.PRUNED)

    def _trial_id(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, number)

    def _read_trial(self, frozen: optuna.trial.FrozenTrial, of_study: Mapping[str, Any]) -> Trial:
        self._written[frozen.number] = frozen.user_attrs[_TRIAL]
        attributes = self._written[frozen.number] | of_study.get(f"late:{frozen.number}", {})
        return _decode_trial(frozen.number, attributes, f"study '{self.folder.name}', trial {frozen.number}")

    # --- the study itself

    def save_baseline(self, trial: Trial) -> None:
        self.baseline = trial
        self.save(trial)

    def save_study(self, **attributes: Any) -> None:
        """Writes study-wide attributes: `ledger`, `reference`, `notes`, `finished`, `running`."""
        for key, value in attributes.items():
            if key in ("reference", "notes", "finished"):
                setattr(self, key, value)
            self._study.set_user_attr(key, to_record(value))

    def read_ledger(self, ledger: Ledger) -> list[dict[str, Any]]:
        """Fills a ledger with what earlier drivers spent; returns the stretches that were running at the last sign."""
        saved = self._study.user_attrs.get("ledger", {})
        for purpose in ledger.device_seconds:
            ledger.device_seconds[purpose] = saved.get(f"{purpose}_seconds", 0.0)
        ledger.wall_seconds = saved.get("wall_seconds", 0.0)
        ledger.trials_started = sum(
            1 for trial in self.trials if trial.rungs or trial.state not in ("waiting", "refused")
        )
        running: list[dict[str, Any]] = self._study.user_attrs.get("running", [])
        return running

    def save_config(self, config: StudyConfig) -> None:
        self.config = config
        self._study.set_user_attr("config", to_record(config))

    def save_provenance(self, provenance: Provenance) -> None:
        self.provenance = provenance
        self._study.set_user_attr("provenance", to_record(provenance))

    # --- files

    def read_scores(self, scores_file: str, key: str) -> npt.NDArray[Any]:
        """`validation_losses`, `validation_predictions`, or the same of `test`, (N,)."""
        with self._reading(scores_file) as file, np.load(file) as arrays:
            return np.asarray(arrays[key])

    def read_losses(self, scores_file: str) -> npt.NDArray[np.float64] | None:
        """Per-example losses on the search-validation split, (N,); None where a backend kept none."""
        return self.read_scores(scores_file, "validation_losses").astype(np.float64)

    def read_labels(self) -> npt.NDArray[np.int64]:
        """Labels of the search-validation split, (N,)."""
        with self._reading("labels.npy") as file:
            return np.asarray(np.load(file))

    @contextlib.contextmanager
    def _reading(self, name: str) -> Iterator[IO[bytes]]:
        """Raises StudyError where the file is gone, cut short or damaged."""
        path = self.folder / name
        try:
            with path.open("rb") as file:
                yield file
        except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as exc:
            raise StudyError(
                f"A study's scores are read from the files beside its database, but '{path}' cannot be read: "
                f"{in_one_line(exc)}. Restore it from a copy."
            ) from exc

    def has_checkpoint(self, trial: Trial) -> bool:
        """Whether the trial can go on from where it paused: the file is there, and whole."""
        if trial.checkpoint is None:
            return False
        path = self.folder / trial.checkpoint
        if not path.is_file():
            return False
        if trial.checkpoint_digest is None:
            return True
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == trial.checkpoint_digest

    def drop_checkpoints(self, trial: Trial, *, keep: str | None = None) -> None:
        for path in (self.folder / "checkpoints").glob(f"trial-{trial.number:05d}-*"):
            if keep is None or path.name != Path(keep).name:
                path.unlink(missing_ok=True)


def delete_study(root: Path, name: str) -> None:
    """Removes a study with all its files: one whose start failed before anything was asked of it."""
    check_study_name(name)
    shutil.rmtree(root / name, ignore_errors=True)


def _open_storage(path: Path) -> optuna.storages.RDBStorage:
    """Raises StudyError, here and whenever it is used, where the file cannot be read or written."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    url = f"sqlite:///{path.resolve()}"
    try:
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": _LOCKED_SECONDS}})
    except (sqlalchemy.exc.SQLAlchemyError, optuna.exceptions.StorageInternalError) as exc:
        _refuse_unusable(path, exc)
        raise
    # Where they arise, before they are Optuna's: it has no type of its own for them.
    sqlalchemy.event.listen(
        storage.engine, "handle_error", lambda context: _refuse_unusable(path, context.original_exception)
    )
    return storage


def _refuse_unusable(path: Path, error: BaseException | None) -> None:
    """Raises StudyError where what SQLite reports, by whatever it is wrapped, befell the file."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__
    # The lowest byte; the others only say more of it.
    remedy = _REMEDIES.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    if remedy is not None:
        raise StudyError(
            f"The database '{path}' cannot be read or written: {error}. {remedy}. A search that was under way goes on "
            f"with: autopeft resume {path.parent.name}."
        ) from error


def _encode_trial(trial: Trial) -> dict[str, Any]:
    return {key: to_record(getattr(trial, key)) for key in _SAVED}


def _decode_trial(number: int, attributes: dict[str, Any], where: str) -> Trial:
    values = {key: from_record(hint, attributes[key], where) for key, hint in _SAVED.items() if key in attributes}
    values |= {key: list(value) for key, value in values.items() if isinstance(value, tuple)}
    trial = Trial(number=number, **values)
    trial.spec = fill_settings(trial.spec)
    return trial


def is_ended(trial: Trial) -> bool:
    return trial.state in ("complete", "stopped", "failed", "refused")


def scored_runs(trials: Sequence[Trial]) -> Iterator[tuple[int, str]]:
    """(number, scores file) of every full-length training: the trial's own and its confirmations."""
    for trial in trials:
        if trial.state == "complete":
            yield trial.number, trial.rungs[-1].scores_file
            for confirmation in trial.confirmations:
                yield trial.number, confirmation.scores_file
