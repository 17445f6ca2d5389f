"""A finished or merged folder to the Hugging Face hub: what goes there, under which name, with whose token.

The token comes from HF_TOKEN or from the hub's own login, and is handed to huggingface_hub alone: it is in no message,
no file and no record of ours.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is its client's, which has changed
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils._validators import validate_repo_id

from autopeft.errors import ExportError, RecordError
from autopeft.production.card import CARD_FILE
from autopeft.production.files import RECIPE_FILE, RESULT_FILE, name_base
from autopeft.production.finished import Finished
from autopeft.production.snippet import HERE, find_base_id

_WEIGHTS = r"adapter_(config\.json|model\..*)|trained\.safetensors|(pytorch_)?model.*\.(safetensors|bin)"
_TOKEN_PAGE = "https://huggingface.co/settings/tokens"


class Upload(NamedTuple):
    """What would be or was uploaded."""

    repo: str
    private: bool
    files: dict[str, int]
    """Bytes by name in the repository."""
    url: str | None
    """Where it is now; None in a dry run."""


def push(
    folder: Path, repo: str, *, private: bool = False, dry_run: bool = False, finished: Finished | None = None
) -> Upload:
    """Uploads a finished training (`finished`), or a folder that `autopeft merge` has written.

    Raises ExportError for a name that the hub does not take, without a token, or where the hub refuses or cannot be
    reached; RecordError for a folder that is neither.
    """
    check_repo(repo)
    with _stage(folder, repo, finished) as stage:
        files = {str(p.relative_to(stage)): p.stat().st_size for p in sorted(stage.rglob("*")) if p.is_file()}
        if dry_run:
            return Upload(repo, private, files, None)
        return _upload(Upload(repo, private, files, None), stage)


def check_repo(repo: str) -> None:
    try:
        validate_repo_id(repo)
    except HFValidationError as exc:
        raise ExportError(f"--to takes a name on the hub such as owner/name, but '{repo}' is none: {exc}") from exc
    if repo.count("/") != 1:
        raise ExportError(f"--to takes owner and name, such as me/sst2-lora, but was given '{repo}'. Add the owner.")


# --- what goes there


@contextmanager
def _stage(folder: Path, repo: str, finished: Finished | None) -> Iterator[Path]:
    """A folder with what the repository will hold, laid out as the hub expects: weights and card at its root."""
    with tempfile.TemporaryDirectory(prefix="autopeft-push-") as name:
        stage = Path(name)
        if finished is None:
            _stage_merged(folder, repo, stage)
        else:
            _stage_finished(finished, repo, stage)
        yield stage


def _stage_finished(finished: Finished, repo: str, stage: Path) -> None:
    card = finished.folder / CARD_FILE
    if not card.is_file():
        raise RecordError(f"'{finished.folder}' must hold the card {CARD_FILE}, but does not. Train it again.")
    for path in sorted(finished.adapter.iterdir()):
        # peft writes a card of its own, which says less than ours.
        if path.is_file() and path.name != CARD_FILE:
            shutil.copyfile(path, stage / path.name)
    # Others need the base's name, and nobody needs where it lay on this machine.
    name_base(stage / "adapter_config.json", find_base_id(finished.recipe))
    (stage / RECIPE_FILE).write_bytes((finished.folder / RECIPE_FILE).read_bytes())
    (stage / RESULT_FILE).write_bytes((finished.folder / RESULT_FILE).read_bytes())
    text = card.read_text(encoding="utf-8")
    if finished.result.saved_as == "autopeft":
        there = f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}")'
        text = text.replace(f"folder = {HERE}", there)
    (stage / CARD_FILE).write_text(text.replace(HERE, f'"{repo}"'), encoding="utf-8")


def _stage_merged(folder: Path, repo: str, stage: Path) -> None:
    if not (folder / "config.json").is_file() or not (folder / CARD_FILE).is_file():
        raise RecordError(
            f"'{folder}' must be a training that autopeft train has finished or a model that autopeft merge has "
            f"written, but holds neither {RESULT_FILE} nor config.json with {CARD_FILE}."
        )
    for path in sorted(folder.iterdir()):
        if path.is_file() and not path.name.startswith("."):
            shutil.copyfile(path, stage / path.name)
    text = (folder / CARD_FILE).read_text(encoding="utf-8")
    (stage / CARD_FILE).write_text(text.replace('"."  # this folder', f'"{repo}"'), encoding="utf-8")


# --- to the hub


def check_token(repo: str) -> None:
    if get_token() is None:
        raise ExportError(
            f"Uploading to '{repo}' needs a token of the Hugging Face hub that may write there, but none is set. Make "
            f"one at {_TOKEN_PAGE} and set HF_TOKEN, or log in once with: hf auth login. --dry-run needs none."
        )


def _upload(upload: Upload, stage: Path) -> Upload:
    repo = upload.repo
    check_token(repo)
    api = HfApi(library_name="autopeft")
    with _explain(repo):
        api.create_repo(repo, private=upload.private, exist_ok=True)
        # One that was there already stays as it was.
        info = api.model_info(repo)
        private = bool(info.private)
        if upload.private and not private:
            raise ExportError(
                f"--private keeps what is uploaded from the public, but '{repo}' exists and is public. Nothing was "
                "uploaded. Make it private in its settings on the hub, or push to another name."
            )
        _check_others(repo, {file.rfilename for file in info.siblings or ()}, {path.name for path in stage.iterdir()})
        api.upload_folder(repo_id=repo, folder_path=stage, commit_message="Upload by autopeft push")
    return upload._replace(private=private, url=f"{api.endpoint}/{repo}")


def _check_others(repo: str, there: set[str], ours: set[str]) -> None:
    """Raises ExportError where weights of another form lie in the repository: transformers loads an adapter that it
    finds beside a whole model, and its base instead of that model."""
    others = sorted(name for name in there - ours if re.fullmatch(_WEIGHTS, name))
    if others:
        raise ExportError(
            f"One repository holds one model, but '{repo}' has {others[0]} of another upload, beside which this one "
            "would not be loaded as it is. Nothing was uploaded. Delete that file there, or push to another name."
        )


@contextmanager
def _explain(repo: str) -> Iterator[None]:
    try:
        yield
    except LocalTokenNotFoundError as exc:
        raise ExportError(f"Uploading to '{repo}' needs a token, but none is set. Set HF_TOKEN.") from exc
    except OfflineModeIsEnabled as exc:
        raise ExportError(
            f"Uploading to '{repo}' needs the hub, but HF_HUB_OFFLINE is set. Unset it, or see what would be uploaded "
            "with --dry-run."
        ) from exc
    except HfHubHTTPError as exc:
        raise ExportError(f"The hub refuses to take '{repo}': {_read_refusal(exc, repo)}") from exc
    except (HTTPError, OSError) as exc:
        raise ExportError(
            f"Uploading to '{repo}' needs the hub, which cannot be reached ({type(exc).__name__}). Nothing was lost: "
            "connect and push again, or see what would be uploaded with --dry-run."
        ) from exc


def _read_refusal(exc: HfHubHTTPError, repo: str) -> str:
    """The hub's answer in words, which hold no header and so no token."""
    response: Any = exc.response
    status = None if response is None else response.status_code
    if status == 401:
        return f"the token is not valid. Make one at {_TOKEN_PAGE} and set HF_TOKEN."
    if status == 403:
        return (
            f"the token may not write to '{repo.split('/')[0]}'. Give it that right at {_TOKEN_PAGE}, or push to an "
            "owner that it may write to."
        )
    message = exc.server_message or (f"it answered with status {status}" if status else "it did not say why")
    return f"{message.rstrip('.')}."
