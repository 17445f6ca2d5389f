"""Uploads against a hub of our own on this machine: what arrives, what is said, and that the token stays secret."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from finished_folders import make_finished

import autopeft
from autopeft.errors import ExportError, RecordError
from autopeft.production.card import write_card
from autopeft.production.files import read_recipe, read_result
from autopeft.production.finished import open_finished
from autopeft.production.push import check_repo, push
from autopeft.testing.tiny_models import tiny_folder

pytestmark = pytest.mark.filterwarnings("ignore")

TOKEN = "hf_secretSecretSECRETsecretSecretSECRET"


def asks_for_private(request: dict[str, Any]) -> bool:
    """In the words of today's hub client, or of earlier ones."""
    return request.get("visibility") == "private" or request.get("private") is True


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as an upload of small files needs; keeps what it is sent."""

    server: Any

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.append(self.headers.get("Authorization"))
        if self.server.refuse_with:
            self.answer({"error": "no, for a reason"}, self.server.refuse_with)
        elif self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            if self.server.is_private is None:
                self.server.is_private = asks_for_private(self.server.created[-1])
            self.answer({"url": f"{self.server.url}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                item = json.loads(line)
                if item["key"] == "file":
                    self.server.files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            self.answer({"commitUrl": f"{self.server.url}/me/model/commit/1", "commitOid": "1" * 40, "hookOutput": ""})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        else:
            self.answer({"error": f"no such place: {self.path}"}, 404)

    def do_GET(self) -> None:
        self.server.tokens.append(self.headers.get("Authorization"))
        private = self.server.is_private if self.server.created else None
        self.answer({"sha": "1" * 40, "id": "me/model", "siblings": self.server.siblings, "private": private})

    def answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.files, server.created, server.tokens, server.refuse_with = {}, [], [], None
    server.is_private, server.siblings = None, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_finished(tmp_path_factory.mktemp("push") / "done", "lora", "bert")
    write_card(made, read_recipe(made), read_result(made), None)
    return made


def run_push(
    tmp_path: Path, *arguments: str, endpoint: str | None = None, token: str | None = TOKEN, **env: str
) -> Any:
    """The command in a process of its own, as a user runs it, with a home that holds no login."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))} | env
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(autopeft.__file__).parents[1])}
    environment |= {"HF_ENDPOINT": endpoint or "http://127.0.0.1:9", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_TOKEN": token} if token else {}
    return subprocess.run(
        [sys.executable, "-m", "autopeft", "push", *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=300,
    )


def check_secret(done: Any, hub: Any, *folders: Path) -> None:
    """The token went to the hub in its header, and nowhere else."""
    assert set(hub.tokens) == {f"Bearer {TOKEN}"}
    secrets = [TOKEN, base64.b64encode(TOKEN.encode()).decode()]
    for secret in secrets:
        assert secret not in done.stdout + done.stderr
        assert not any(secret.encode() in content for content in hub.files.values())
        for folder in folders:
            assert not any(secret.encode() in p.read_bytes() for p in folder.rglob("*") if p.is_file())


def test_the_adapter_arrives_as_the_hub_wants_it(folder: Path, hub: Any, tmp_path: Path) -> None:
    done = run_push(tmp_path, str(folder), "--to", "me/model", "--private", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "model"
    assert asks_for_private(hub.created[0])
    adapter = (folder / "adapter/adapter_model.safetensors").read_bytes()
    assert hub.files["adapter_model.safetensors"] == adapter
    expected = {"README.md", "adapter_config.json", "tokenizer.json", "training.yaml", "result.json"}
    assert expected <= set(hub.files)
    # Where things lay on this machine is nobody's business.
    assert not {"local.json", "scores.npz"} & set(hub.files)
    assert not any(str(Path(tiny_folder("bert")).parent).encode() in content for content in hub.files.values())
    assert not any(str(folder.parent).encode() in content for content in hub.files.values())
    card = hub.files["README.md"].decode()
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"
    assert 'folder = "me/model"' in card
    assert f"uploaded: {hub.url}/me/model (private)" in done.stdout
    check_secret(done, hub, folder, tmp_path)


@pytest.mark.slow
def test_merged_it_is_a_plain_model(folder: Path, hub: Any, tmp_path: Path) -> None:
    done = run_push(tmp_path, str(folder), "--to", "me/model", "--merged", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(hub.files)
    assert not any("adapter" in name for name in hub.files)
    assert json.loads(hub.files["config.json"])["architectures"] == ["BertForSequenceClassification"]
    assert 'folder = "me/model"' in hub.files["README.md"].decode()
    assert "100% same answers" in done.stdout
    check_secret(done, hub, tmp_path)


def test_a_dry_run_asks_nobody(folder: Path, hub: Any, tmp_path: Path) -> None:
    done = run_push(tmp_path, str(folder), "--to", "me/model", "--dry-run", endpoint=hub.url, token=None)
    assert done.returncode == 0, done.stderr
    assert "adapter_model.safetensors" in done.stdout
    assert "would go to me/model, public. Nothing was uploaded." in done.stdout
    assert (hub.files, hub.created, hub.tokens) == ({}, [], [])


# --- refusals: one paragraph, exit code 2


def refusal(done: Any) -> str:
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    error: str = done.stderr
    return error


def test_without_a_token(folder: Path, hub: Any, tmp_path: Path) -> None:
    done = run_push(tmp_path, str(folder), "--to", "me/model", "--merged", endpoint=hub.url, token=None)
    assert "needs a token" in refusal(done)
    # Nothing was merged for nothing.
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "the token is not valid"), (403, "may not write to 'me'"), (400, "no, for a reason")],
)
def test_what_the_hub_refuses(folder: Path, hub: Any, tmp_path: Path, status: int, words: str) -> None:
    hub.refuse_with = status
    done = run_push(tmp_path, str(folder), "--to", "me/model", endpoint=hub.url)
    assert words in refusal(done)


def test_a_public_repository_takes_nothing_private(folder: Path, hub: Any, tmp_path: Path) -> None:
    hub.is_private = False
    done = run_push(tmp_path, str(folder), "--to", "me/model", "--private", endpoint=hub.url)
    assert "exists and is public. Nothing was uploaded" in refusal(done)
    assert hub.files == {}


def test_a_private_one_stays_private_and_is_said_to_be(folder: Path, hub: Any, tmp_path: Path) -> None:
    hub.is_private = True
    done = run_push(tmp_path, str(folder), "--to", "me/model", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("(private)")


def test_weights_of_another_upload_are_not_mixed_with(folder: Path, hub: Any, tmp_path: Path) -> None:
    hub.siblings = [{"rfilename": name} for name in ("README.md", "model-00001-of-00002.safetensors")]
    done = run_push(tmp_path, str(folder), "--to", "me/model", endpoint=hub.url)
    assert "'me/model' has model-00001-of-00002.safetensors of another upload" in refusal(done)
    assert hub.files == {}


def test_when_the_hub_cannot_be_reached(folder: Path, tmp_path: Path) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
    done = run_push(tmp_path, str(folder), "--to", "me/model", endpoint=nobody)
    assert "cannot be reached" in refusal(done)


def test_offline(folder: Path, tmp_path: Path) -> None:
    done = run_push(tmp_path, str(folder), "--to", "me/model", HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in refusal(done)


@pytest.mark.parametrize("name", ["model", "me/mo del", "me/model/x", "me/..", "me/a--b", "", "https://hub/me/model"])
def test_a_bad_name(name: str) -> None:
    with pytest.raises(ExportError, match="--to takes"):
        check_repo(name)


def test_a_folder_that_holds_nothing_to_push(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="autopeft train has finished or a model that autopeft merge has written"):
        push(tmp_path, "me/model", dry_run=True)


def test_our_own_methods_card_fetches_the_whole_repository(tmp_path: Path, hub: Any) -> None:
    folder = make_finished(tmp_path / "done", "bottleneck", "bert")
    write_card(folder, read_recipe(folder), read_result(folder), None)
    done = run_push(tmp_path, str(folder), "--to", "me/model", endpoint=hub.url)
    assert done.returncode == 0, done.stderr
    assert 'folder = snapshot_download("me/model")' in hub.files["README.md"].decode()
    assert "trained.safetensors" in hub.files


def test_a_dry_run_in_the_process_lists_bytes(folder: Path) -> None:
    upload = push(folder, "me/model", dry_run=True, finished=open_finished(folder))
    size = (folder / "adapter/adapter_model.safetensors").stat().st_size
    assert upload.files["adapter_model.safetensors"] == size
    assert upload.url is None
