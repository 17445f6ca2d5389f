"""Python runs this at its start where this folder is on PYTHONPATH; see `pretended_gpus`.

PyTorch itself is imported no earlier than by the program: what the driver imports is tested elsewhere.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any


class _Around(importlib.abc.Loader):
    """A module's own loader, with something to do before and after it runs."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__name__ == "torch":
            self._loader.exec_module(module)
            import pretended_gpus

            pretended_gpus.install()
            return
        import pretended_gpus

        # Its kernels for CUDA need CUDA's own libraries, which it would look for as soon as there is a GPU.
        with pretended_gpus.hidden():
            self._loader.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name not in ("torch", "bitsandbytes"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            spec.loader = _Around(spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
