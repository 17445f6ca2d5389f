"""What all tests share: fast databases, quiet Hypothesis, and builders of configurations."""

from __future__ import annotations

import contextlib
import os
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, settings
from sqlalchemy.engine import Engine

from autopeft.methods import METHODS
from autopeft.records import TrialSpec

# The hub's client reads it once, on import; set later, every look-up would wait for a network that is not there.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # Read by torch on import, too. Each worker has a core of its own; more threads wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "autopeft", deadline=None, max_examples=50, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("autopeft")


_FIRST = {"test_end_to_end.py", "test_generation_end_to_end.py", "test_pretended_cuda.py"}
"""Where a test takes a minute: begun last, one worker would wait for the other."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in _FIRST)


@sqlalchemy.event.listens_for(Engine, "connect")
def _do_not_wait_for_the_disk(connection: object, record: object) -> None:
    # Tests pull no plugs; waiting for the disk at every commit took nine tenths of their time.
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")


def _make_spec(method: str = "lora", **changes: Any) -> TrialSpec:
    recipe = METHODS[method].recipe
    values: dict[str, Any] = {
        "method": method,
        "settings": dict(recipe.settings) | changes.pop("settings", {}),
        "target_modules": recipe.target_modules,
        "bits": 32,
        "learning_rate": recipe.learning_rate,
        "batch_size": 16,
        "max_steps": 160,
        "warmup_ratio": 0.06,
        "schedule": "linear",
        "weight_decay": 0.0,
        "seed": 0,
    }
    return TrialSpec(**(values | changes))


@pytest.fixture(scope="session")
def make_spec() -> Callable[..., TrialSpec]:
    """A method's recipe on CPU, with changes."""
    return _make_spec


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test asks the network for anything, or finds this machine's data."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("AUTOPEFT_DATA_DIR", raising=False)


@contextlib.contextmanager
def _limit_files(num_bytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def limit_files() -> Callable[[int], AbstractContextManager[None]]:
    """While it lasts, the rest of a file that grows beyond so many bytes is refused, as by a full disk."""
    return _limit_files
