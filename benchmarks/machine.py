"""What a benchmark ran on, and how much memory a tree of processes held."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

from autopeft.executors.devices import count_cores, describe_cpu

_SAMPLE_SECONDS = 1.0
"""Reading a process's proportional set size walks its page table, some milliseconds: not more often."""


def describe_machine() -> dict[str, str]:
    memory = Path("/proc/meminfo").read_text().split("\n", 1)[0].split()
    packages = ("torch", "transformers", "peft", "optuna", "datasets", "accelerate", "bitsandbytes")
    return {
        "processor": describe_cpu(),
        "cores": str(count_cores()),
        "memory": f"{int(memory[1]) / 2**20:.1f} GiB",
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
    } | {name: version(name) for name in packages}


class MemoryWatch:
    """Samples a process and all its descendants until stopped."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._done = threading.Event()
        self._high_water: dict[int, int] = {}
        self.peak_pss_bytes = 0
        """Largest sum, over the samples, of proportional set sizes: a page shared by n processes counts 1/n in each."""
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @property
    def high_water_bytes(self) -> int:
        """Sum of each process's own peak resident set (VmHWM): exact, but counts shared pages once a process, and
        peaks that did not coincide."""
        return sum(self._high_water.values())

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(_SAMPLE_SECONDS):
            pss = 0
            for pid in find_tree(self._pid):
                pss += _read_kib(pid, "smaps_rollup", "Pss:")
                self._high_water[pid] = max(self._high_water.get(pid, 0), _read_kib(pid, "status", "VmHWM:"))
            self.peak_pss_bytes = max(self.peak_pss_bytes, pss)


def find_tree(root: int) -> Iterable[int]:
    """The process and its descendants, as /proc shows them now."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The command in brackets may hold anything, so the fields are counted from its end.
            parent = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    tree = [root]
    for pid in tree:
        tree += children.get(pid, [])
    return tree


def _read_kib(pid: int, file: str, field: str) -> int:
    """Bytes; 0 for a process that has ended."""
    try:
        for line in Path(f"/proc/{pid}/{file}").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
