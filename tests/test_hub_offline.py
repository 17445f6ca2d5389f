"""Who has no network does not wait for it; who has a slow one, or a proxy, is left alone."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import autopeft
from autopeft.hub import is_set_offline, look_for_hub


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Addresses that were tried; nothing answers."""
    addresses: list[Any] = []

    def refuse(address: Any, timeout: float) -> socket.socket:
        addresses.append(address)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "create_connection", refuse)
    proxies = [f"{kind}_proxy" for kind in ("http", "https", "all")]
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_ENDPOINT", *proxies, *map(str.upper, proxies)):
        # Set first, so that whatever the code does to it is undone.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    look_for_hub.cache_clear()
    yield addresses
    look_for_hub.cache_clear()


def test_without_a_network_the_client_is_told_once(asked: list[Any]) -> None:
    look_for_hub()
    look_for_hub()
    assert asked == [("huggingface.co", 443)]
    assert is_set_offline()


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [("https://mirror.local", ("mirror.local", 443)), ("http://mirror.local:8080/hf", ("mirror.local", 8080))],
)
def test_a_mirror_is_looked_for_where_it_is(
    endpoint: str, address: tuple[str, int], asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    look_for_hub()
    assert asked == [address]


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "all_proxy"])
def test_a_proxy_is_left_to_the_client(name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "http://proxy.local:3128")
    look_for_hub()
    assert asked == []
    assert not is_set_offline()


@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_who_is_set_offline_is_not_looked_for(name: str, asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    assert name in look_for_hub()
    assert asked == []


def test_a_hub_that_answers_is_asked(asked: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.undo()
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        for proxy in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
            monkeypatch.delenv(proxy, raising=False)
        look_for_hub()
        assert not is_set_offline()


ASK = """
import huggingface_hub, datasets, sys
from autopeft.errors import DataError
from autopeft.tasks.data import load_splits
from autopeft.tasks.spec import find_task_text, parse_task
try:
    load_splits(parse_task(find_task_text("sst2"), "sst2"), None, seed=0)
except DataError as exc:
    print(exc)
"""


def test_a_client_that_was_loaded_before_is_told_too() -> None:
    pytest.importorskip("datasets")
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    with socket.create_server(("127.0.0.1", 0)) as server:
        # Closed again, so that connections to it are refused at once, whether or not there is a network here.
        port = server.getsockname()[1]
    environment |= {"PYTHONPATH": str(Path(autopeft.__file__).parent.parent), "HF_ENDPOINT": f"http://127.0.0.1:{port}"}
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, env=environment, timeout=120)
    assert "cannot be loaded" in done.stdout, done.stderr
    # The client's own tries would take 23 seconds.
    assert time.monotonic() - started < 20
