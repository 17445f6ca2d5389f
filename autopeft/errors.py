"""Every exception that autopeft raises on purpose.

    AutopeftError                   exit code 1
    ├── UsageError                  exit code 2: the user can mend it, and nothing was lost
    │   ├── BudgetError             a budget that does not parse, is zero, or names devices that are not here
    │   ├── DataError               a row, a label, a file of a task
    │   ├── DeviceError             something this machine cannot do
    │   ├── ExportError             a target that cannot express a configuration
    │   ├── ModelError              a base model that cannot be had
    │   ├── RecordError             a record that does not fit its schema
    │   ├── SpaceError              a search space or one of its dimensions
    │   ├── SpecError               a configuration that no trainer could honour
    │   ├── StudyError              a study's name, folder or state
    │   └── TaskError               an unknown or malformed task
    ├── VerificationError           a trained model that is not what its folder says
    ├── NothingFeasibleError        exit code 3: the budget ended before anything was feasible
    ├── TrainingError               a full training that cannot go on, such as one that diverged
    └── WorkerError                 a worker process that cannot be kept alive

A message is one paragraph: the rule, what was given, where, and what to do. All are picklable.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AutopeftError(Exception):
    """Base of all errors raised on purpose; `str()` of it is a paragraph meant for the user."""

    exit_code = 1


class UsageError(AutopeftError, ValueError):
    exit_code = 2


class BudgetError(UsageError):
    pass


class DataError(UsageError):
    pass


class DeviceError(UsageError):
    pass


class ExportError(UsageError):
    pass


class ModelError(UsageError):
    pass


class RecordError(UsageError):
    pass


class SpaceError(UsageError):
    pass


class SpecError(UsageError):
    pass


class StudyError(UsageError):
    pass


class TaskError(UsageError):
    pass


class VerificationError(AutopeftError, RuntimeError):
    pass


class NothingFeasibleError(AutopeftError, RuntimeError):
    exit_code = 3


class TrainingError(AutopeftError, RuntimeError):
    pass


class WorkerError(AutopeftError, RuntimeError):
    pass


def suggest_nearest(name: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name: `Did you mean 'lora'?` where one is near, else the known names."""
    names = sorted(known)
    near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.55)
    if near:
        return f"Did you mean '{near[0]}'? Known: {', '.join(names)}."
    return f"Known: {', '.join(names)}."
