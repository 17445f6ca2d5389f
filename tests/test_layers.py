"""Imports flow down: a module imports only from layers above its own, and heavy libraries only where they are used."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import autopeft

PACKAGE = Path(autopeft.__file__).parent
LAYERS = (
    "errors", "wording", "locks", "records", "budget", "hub", "methods", "tasks", "spaces", "backends", "executors",
    "search", "report", "production", "export", "cli",
)  # fmt: skip
"""Lowest first, as ARCHITECTURE.md lists them."""
HEAVY = {"torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate", "safetensors"}


class Import(NamedTuple):
    file: str
    module: str
    line: int
    at_module_level: bool


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def walk_imports(node: ast.AST, file: str, *, at_module_level: bool) -> Iterator[Import]:
    """All imports below a node that happen at run time."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(file, alias.name, child.lineno, at_module_level)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{file}:{child.lineno} imports relatively"
            assert child.module is not None
            # `from autopeft.cli import export` imports the module autopeft.cli.export.
            for alias in child.names:
                name = f"{child.module}.{alias.name}" if child.module in ("autopeft", "autopeft.cli") else child.module
                yield Import(file, name, child.lineno, at_module_level)
        else:
            inner = at_module_level and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from walk_imports(child, file, at_module_level=inner)


def package_files() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


def imports_of(file: str) -> list[Import]:
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    return list(walk_imports(tree, file, at_module_level=True))


def layer_of_file(file: str) -> str:
    return Path(file).parts[0].removesuffix(".py")


def layer_of_module(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "autopeft" and len(parts) > 1 else None


@pytest.mark.parametrize("file", [f for f in package_files() if layer_of_file(f) in LAYERS])
def test_a_module_imports_only_from_layers_above_it(file: str) -> None:
    own = LAYERS.index(layer_of_file(file))
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for found in imports_of(file)
        if (layer := layer_of_module(found.module)) in LAYERS and LAYERS.index(layer) > own
    ]
    assert not wrong


def test_every_package_file_belongs_to_a_layer() -> None:
    # The package itself holds its version and its entry point; `testing` holds contracts that tests inherit.
    outside = {layer_of_file(file) for file in package_files()} - {*LAYERS, "__init__", "__main__", "testing"}
    assert not outside


def test_only_search_imports_optuna() -> None:
    importers = {
        layer_of_file(found.file)
        for file in package_files()
        for found in imports_of(file)
        if found.module.split(".")[0] == "optuna"
    }
    assert importers == {"search"}


def test_only_training_code_imports_heavy_libraries_at_module_level() -> None:
    wrong = [
        f"{found.file}:{found.line} imports {found.module}"
        for file in package_files()
        if not file.startswith(("backends/hf/", "production/", "testing/"))
        for found in imports_of(file)
        if found.at_module_level and found.module.split(".")[0] in HEAVY
    ]
    assert not wrong


def test_outside_training_code_heavy_libraries_are_imported_only_by_methods_tasks_and_exports() -> None:
    importers = {
        layer_of_file(found.file)
        for file in package_files()
        if not file.startswith(("backends/hf/", "production/", "testing/"))
        for found in imports_of(file)
        if found.module.split(".")[0] in HEAVY
    }
    assert importers <= {"methods", "tasks", "export"}


def test_records_import_only_the_standard_library_and_errors() -> None:
    wrong = [
        found.module
        for found in imports_of("records.py")
        if found.module.split(".")[0] not in sys.stdlib_module_names and found.module != "autopeft.errors"
    ]
    assert not wrong


def test_errors_import_only_the_standard_library() -> None:
    assert all(found.module.split(".")[0] in sys.stdlib_module_names for found in imports_of("errors.py"))


def run_python(code: str, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


PRINT_HEAVY = """
heavy = {"torch", "transformers", "peft", "optuna", "pandas", "sklearn", "datasets", "evaluate", "plotly", "numpy"}
print("LOADED", *sorted(heavy & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["search", "--help"], ["methods"], ["tasks"], ["estimate", "--help"]]
)
def test_light_commands_load_no_heavy_library(arguments: list[str]) -> None:
    code = f"""
import sys
from autopeft.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
{PRINT_HEAVY}
"""
    loaded = set(run_python(code).splitlines()[-1].split()[1:])
    # The tasks command checks each task's scorer, which takes label arrays.
    assert loaded <= ({"numpy"} if arguments == ["tasks"] else set())


def test_a_whole_search_never_holds_torch_in_the_drivers_process(tmp_path: Path) -> None:
    code = """
import sys
from pathlib import Path
import numpy as np
from autopeft.backends.base import WorkerSetup
from autopeft.executors.local import LocalExecutor
from autopeft.records import Provenance
from autopeft.report.leaderboard import update_leaderboard
from autopeft.report.page import write_page
from autopeft.search.plan import make_plan, make_provenance
from autopeft.search.request import Request
from autopeft.search.store import StudyStore
from autopeft.search.study import Search
import dataclasses

root = Path(sys.argv[1])
plan = make_plan(
    Request(task="demo", budget="2trials,5min", model=sys.argv[2], max_steps=80, workers=1, methods="ia3"), studies=root
)
plan = dataclasses.replace(plan, config=dataclasses.replace(plan.config, backend="fake"))
labels = np.array([i % 2 for i in range(300)])
store = StudyStore.create(root, plan.config, make_provenance(plan), labels)
record = Search(store, LocalExecutor(plan.setup(root), ["cpu"]), plan.space).run()
assert [trial.state for trial in record.trials] == ["complete"] * 2, record.trials
write_page(record, root / "page.html")
update_leaderboard(record, root / "boards")
heavy = {"torch", "transformers", "peft", "bitsandbytes", "accelerate", "datasets", "evaluate"}
print("LOADED", *sorted(heavy & set(sys.modules)))
"""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    assert run_python(code, str(tmp_path), str(model)).splitlines()[-1] == "LOADED"
