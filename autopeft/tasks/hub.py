"""Whether the hub of models and data sets is within reach, so that nobody without a network waits for it."""

from __future__ import annotations

import os
import socket
import sys
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

_PATIENCE_SECONDS = 5.0
"""A first packet that is lost is sent again after 1 and after 3 seconds, so that a slow network answers by then."""


@cache
def look_for_hub() -> None:
    """Sets the hub's client to its offline mode (HF_HUB_OFFLINE) where no connection can be made; asked once a process.

    The client tries every file six times, which takes 23 seconds where there is no network, although all that it then
    finds is what its cache holds. Whoever goes through a proxy is left to the client: only the proxy knows.
    """
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if is_set_offline() or address.hostname is None or address.scheme in getproxies():
        return
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=_PATIENCE_SECONDS).close()
    except (OSError, ValueError):
        # For processes started from here, and for clients loaded from here on.
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):
            if module in sys.modules:
                sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def is_set_offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE")
