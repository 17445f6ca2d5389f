"""As much of the Hugging Face hub as downloads need, from a folder on this machine.

`ROOT/models/owner/name/`, `ROOT/datasets/owner/name/` and `ROOT/spaces/owner/name/` are repositories of one commit.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qs, unquote, urlparse

COMMIT = "a" * 40


class Hub(NamedTuple):
    url: str
    requests: list[str]
    """Method and path, in the order of arrival."""
    gated: set[str]
    """Models that nobody here may download."""


class _Answer(NamedTuple):
    code: int
    body: bytes = b""
    headers: tuple[tuple[str, str], ...] = ()


@contextmanager
def serve_hub(root: Path) -> Iterator[Hub]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.root = root
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", [], set())
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_GET(self) -> None:
        self._send(self._answer(b""))

    def do_HEAD(self) -> None:
        self._send(self._answer(b""), with_body=False)

    def do_POST(self) -> None:
        self._send(self._answer(self.rfile.read(int(self.headers.get("Content-Length", 0)))))

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def _send(self, answer: _Answer, *, with_body: bool = True) -> None:
        code, body, headers = answer
        asked = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if code == 200 and asked:
            first, last = int(asked[1]), min(int(asked[2] or len(body)), len(body) - 1)
            headers = (*headers, ("Content-Range", f"bytes {first}-{last}/{len(body)}"))
            code, body = 206, body[first : last + 1]
        self.send_response(code)
        for name, value in (*headers, ("Content-Length", str(len(body)))):
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def _answer(self, sent: bytes) -> _Answer:
        path = unquote(urlparse(self.path).path)
        self.server.hub.requests.append(f"{self.command} {path}")
        about = re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/?(.*)", path)
        if about:
            return self._describe(self.server.root / about[1] / about[2], about[2], about[3], sent)
        file = re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)
        if file:
            return self._give(self.server.root / (file[1] or "models") / file[2], file[2], file[3])
        return _refuse(404, "nothing here")

    def _describe(self, folder: Path, name: str, rest: str, sent: bytes) -> _Answer:
        if name.endswith("/busy"):
            return _refuse(503, "too many requests")
        if not folder.is_dir():
            # The hub does not say whether a repository is private or does not exist.
            return _refuse(401, "Repository not found", "RepoNotFound")
        kind, *parts = rest.split("/") if rest else ["revision"]
        if kind == "revision":
            files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
            siblings = [{"rfilename": str(p.relative_to(folder)), "size": p.stat().st_size} for p in files]
            return _tell({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": siblings})
        if kind == "tree":
            place = folder.joinpath(*parts[1:])
            if not place.is_dir():
                return _refuse(404, "no such entry", "EntryNotFound")
            within = place.rglob("*") if "recursive=true" in self.path.lower() else place.iterdir()
            return _tell([_enter(folder, path) for path in sorted(within)])
        if kind == "paths-info":
            wanted = json.loads(sent)["paths"] if sent[:1] == b"{" else parse_qs(sent.decode())["paths"]
            return _tell([_enter(folder, folder / path) for path in wanted if (folder / path).exists()])
        return _refuse(404, "nothing here")

    def _give(self, folder: Path, name: str, path: str) -> _Answer:
        if name in self.server.hub.gated:
            return _refuse(403, "Access to this model is restricted", "GatedRepo")
        if not folder.is_dir():
            return _refuse(401, "Repository not found", "RepoNotFound")
        if not (folder / path).is_file():
            return _refuse(404, "no such entry", "EntryNotFound", ("X-Repo-Commit", COMMIT))
        body = (folder / path).read_bytes()
        tag = f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"'
        return _Answer(200, body, (("ETag", tag), ("X-Repo-Commit", COMMIT), ("Accept-Ranges", "bytes")))


def _enter(folder: Path, path: Path) -> dict[str, Any]:
    is_file = path.is_file()
    kind, size = ("file", path.stat().st_size) if is_file else ("directory", 0)
    oid = hashlib.sha1(path.read_bytes() if is_file else b"", usedforsecurity=False).hexdigest()
    return {"type": kind, "path": str(path.relative_to(folder)), "size": size, "oid": oid}


def _tell(what: Any) -> _Answer:
    return _Answer(200, json.dumps(what).encode(), (("Content-Type", "application/json"),))


def _refuse(code: int, why: str, name: str = "", *headers: tuple[str, str]) -> _Answer:
    return _Answer(code, why.encode(), (*headers, *((("X-Error-Code", name),) if name else ())))
