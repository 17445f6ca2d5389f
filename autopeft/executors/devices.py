"""What this machine can train on, found without torch."""

from __future__ import annotations

import math
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from autopeft.backends.base import ModelledGpu
from autopeft.errors import DeviceError


class Gpu(NamedTuple):
    number: str
    """As CUDA_VISIBLE_DEVICES names it."""
    name: str
    total_bytes: int
    free_bytes: int


class KnownGpu(NamedTuple):
    """A GPU that one may plan for without having it."""

    title: str
    total_bytes: int
    bf16_flops: float
    """Dense peak, from the maker's data sheet; of float32 where bfloat16 is emulated."""
    capability: tuple[int, int]
    """CUDA's compute capability, on which library workspaces depend."""

    @property
    def modelled(self) -> ModelledGpu:
        return ModelledGpu(name=self.title, capability=self.capability)

    @property
    def emulates_bfloat16(self) -> bool:
        """Before Ampere there are no units for it, and PyTorch computes in float32 instead."""
        return self.capability < (8, 0)


KNOWN_GPUS = {
    "t4": KnownGpu("T4", 15 * 2**30, 8.1e12, (7, 5)),
    "v100": KnownGpu("V100", 16 * 2**30, 15.7e12, (7, 0)),
    "rtx3090": KnownGpu("GeForce RTX 3090", 24 * 2**30, 71e12, (8, 6)),
    "rtx4090": KnownGpu("GeForce RTX 4090", 24 * 2**30, 165e12, (8, 9)),
    "rtx5090": KnownGpu("GeForce RTX 5090", 32 * 2**30, 209e12, (12, 0)),
    "a6000": KnownGpu("RTX A6000", 48 * 2**30, 155e12, (8, 6)),
    "rtx6000-ada": KnownGpu("RTX 6000 Ada", 48 * 2**30, 364e12, (8, 9)),
    "rtx-pro-6000": KnownGpu("RTX PRO 6000", 96 * 2**30, 503e12, (12, 0)),
    "l4": KnownGpu("L4", 24 * 2**30, 121e12, (8, 9)),
    "a10": KnownGpu("A10", 24 * 2**30, 125e12, (8, 6)),
    "a10g": KnownGpu("A10G", 24 * 2**30, 70e12, (8, 6)),
    "l40": KnownGpu("L40", 48 * 2**30, 181e12, (8, 9)),
    "l40s": KnownGpu("L40S", 48 * 2**30, 362e12, (8, 9)),
    "a100": KnownGpu("A100 80GB", 80 * 2**30, 312e12, (8, 0)),
    "h100": KnownGpu("H100 80GB", 80 * 2**30, 989e12, (9, 0)),
    "h200": KnownGpu("H200 141GB", 141 * 2**30, 989e12, (9, 0)),
    "gh200": KnownGpu("GH200 96GB", 96 * 2**30, 989e12, (9, 0)),
    "b200": KnownGpu("B200 180GB", 180 * 2**30, 2250e12, (10, 0)),
}


def find_known(name: str) -> KnownGpu:
    """Of a GPU by the name that its driver gives it, such as `NVIDIA GeForce RTX 4090`; an A100 where it is none of
    them, for rough plans."""
    words = set(name.replace("-", " ").split())
    # Drivers say how much memory some have, and not always as much as here.
    return next((gpu for gpu in KNOWN_GPUS.values() if words.issuperset(_name_words(gpu))), KNOWN_GPUS["a100"])


def note_emulated(gpus: Sequence[KnownGpu]) -> list[str]:
    """A sentence on the first of them that has no bfloat16, if any."""
    title = next((gpu.title for gpu in gpus if gpu.emulates_bfloat16), None)
    if title is None:
        return []
    return [
        f"Trials compute in bfloat16, which a {title} has no units for: PyTorch emulates it, slowly, and attention to "
        "long texts may take more memory than is estimated."
    ]


def _name_words(gpu: KnownGpu) -> list[str]:
    return [word for word in gpu.title.split() if not word.endswith("GB")]


def find_gpus() -> list[Gpu]:
    """Visible NVIDIA GPUs, those that CUDA_VISIBLE_DEVICES hides left out; empty where there are none."""
    wanted = _list_visible()
    gpus = []
    for index, uuid, name, *memory in _ask_driver():
        sizes = _read_memory(memory)
        if sizes is None:
            continue
        if wanted is None or index in wanted or any(uuid.startswith(part) for part in wanted if "-" in part):
            gpus.append(Gpu(index, name, *sizes))
    return gpus


def _list_visible() -> list[str] | None:
    """What CUDA_VISIBLE_DEVICES names; None where it is not set."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if visible is None else [part.strip() for part in visible.split(",") if part.strip()]


def _ask_driver() -> list[list[str]]:
    """(index, UUID, name, total and free MiB) of every GPU; empty where nvidia-smi tells none."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[part.strip() for part in line.split(",")] for line in output.splitlines()]
    return [row for row in rows if len(row) == 5]


def check_visible() -> None:
    """Raises DeviceError where CUDA_VISIBLE_DEVICES names GPUs by numbers that need not be nvidia-smi's.

    Those follow the PCI bus. CUDA's own begin with the fastest GPU, which is the same where all are alike or all are
    wanted.
    """
    wanted = _list_visible() or []
    numbers = {part for part in wanted if part.isdigit()}
    if not numbers or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
        return
    names = {row[0]: row[2] for row in _ask_driver()}
    if len(set(names.values())) <= 1 or numbers >= names.keys():
        return
    raise DeviceError(
        f"CUDA_VISIBLE_DEVICES names GPUs by number ({','.join(wanted)}), but on this machine they differ "
        f"({', '.join(sorted(set(names.values())))}), and CUDA counts them by speed, nvidia-smi by PCI bus. "
        "Set CUDA_DEVICE_ORDER=PCI_BUS_ID for nvidia-smi's numbers, or name GPUs by UUID, as nvidia-smi -L lists them."
    )


def names_part_of_gpu() -> bool:
    """Whether CUDA_VISIBLE_DEVICES names an instance that a GPU was divided into, which `find_gpus` does not find."""
    return any(part.strip().startswith("MIG-") for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(","))


def _read_memory(cells: Sequence[str]) -> tuple[int, int] | None:
    """(total, free) bytes from nvidia-smi's cells in MiB; None of a GPU that it cannot read, which has fallen off."""
    try:
        total, free = (int(float(cell) * 2**20) for cell in cells)
    except ValueError:
        # A GPU without memory of its own shares the machine's (Jetson, GB10), and nvidia-smi knows nothing of that.
        return find_memory() if set(cells) <= {"[N/A]", "N/A", "[Not Supported]"} else None
    return total, free


def find_free_bytes(workers: int) -> int | None:
    """What the fullest of the GPUs that `plan_gpu_workers` would choose has free; None where there are too few."""
    free = sorted((gpu.free_bytes for gpu in find_gpus()), reverse=True)
    return free[workers - 1] if len(free) >= workers else None


def find_memory() -> tuple[int, int] | None:
    """(total, available) bytes of the machine itself, what files are cached in counted as available; None where the
    system does not tell."""
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total, available = os.sysconf("SC_PHYS_PAGES") * page, os.sysconf("SC_AVPHYS_PAGES") * page
    except (ValueError, OSError):
        return None
    try:
        with open("/proc/meminfo", encoding="utf-8") as file:
            # In kB.
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    return total, available


def count_cores() -> int:
    """Cores this process may use; within a container's limit, of which affinity knows nothing, a part of one counts."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = _find_core_limit()
    return cores if limit is None else min(cores, math.ceil(limit))


_CGROUP = Path("/sys/fs/cgroup")
_LIMITS = (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us"))
"""Where cgroups of version 2 and 1 keep what `docker --cpus` and Kubernetes set: a quota, then its period."""


def _find_core_limit() -> float | None:
    for names in _LIMITS:
        try:
            quota, period = " ".join((_CGROUP / name).read_text(encoding="utf-8") for name in names).split()
            # Without a limit it is `max`, or -1.
            if int(quota) > 0:
                return int(quota) / int(period)
        except (OSError, ValueError):
            continue
    return None


def describe_cpu() -> str:
    """The processor's name, as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def plan_cpu_workers(workers: int | None) -> tuple[int, int]:
    """(workers, threads each). One thread a worker does the most steps: two do 1.4 times those of one with two."""
    cores = count_cores()
    if workers is None:
        workers = min(cores, 4)
    if not 1 <= workers <= cores:
        raise DeviceError(f"--workers takes 1 to {cores}, one a core of this machine, but was given {workers}.")
    return workers, cores // workers


def plan_gpu_workers(workers: int | None, gpus: Sequence[Gpu]) -> list[str]:
    """One worker a GPU, the emptiest GPUs first."""
    if workers is not None and not 1 <= workers <= len(gpus):
        raise DeviceError(f"--workers takes 1 to {len(gpus)}, one a GPU, but was given {workers}.")
    chosen = sorted(gpus, key=lambda gpu: -gpu.free_bytes)[: workers or len(gpus)]
    return [f"cuda:{gpu.number}" for gpu in chosen]
