"""Methods of other distributions: found by their entry points, told apart from ours, and harmless when broken."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import autopeft
import autopeft.methods
from autopeft.errors import SpecError
from autopeft.methods import METHODS, find_method
from autopeft.methods.table import OURS, MethodTable, Origin

TOY = """
from dataclasses import replace

from autopeft.methods.ia3 import IA3

TOY = replace(IA3, name="toy", title="Toy")
"""

_numbers = itertools.count()


def install(folder: Path, entries: str, code: str = TOY, *, name: str = "peft-toys", version: str = "1.2") -> str:
    """A distribution as an installer leaves it: a module, and a folder that describes it. Returns the module's name.

    `{module}` in the entries stands for that name, which is never used twice in a process.
    """
    module = f"toys_{next(_numbers)}"
    (folder / f"{module}.py").write_text(code)
    described = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    described.mkdir()
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = "[autopeft.methods]\n" + entries.format(module=module) + "\n"
    (described / "entry_points.txt").write_text(lines)
    return module


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that distributions are found in, by tables that are first looked at from now on."""
    assert len(METHODS) > 0
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.fixture
def table() -> MethodTable:
    """One that has not read its entry points."""
    return MethodTable(METHODS.shipped.values())


@pytest.fixture
def find(table: MethodTable, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], object]:
    """`find_method` on that table."""
    monkeypatch.setattr(autopeft.methods, "METHODS", table)
    return find_method


def test_a_method_is_found_and_said_to_be_its_distributions(site: Path, table: MethodTable) -> None:
    install(site, "toy = {module}:TOY")
    assert table["toy"].title == "Toy"
    assert list(table) == [*METHODS.shipped, "toy"]
    assert table.origin("toy") == Origin("peft-toys", "1.2")
    assert str(table.origin("toy")) == "peft-toys 1.2"
    assert table.origin("lora") == OURS


def test_an_entry_point_may_hold_several_methods(site: Path, table: MethodTable) -> None:
    install(site, "toys = {module}:BOTH", TOY + 'BOTH = (TOY, replace(TOY, name="tin"))\n')
    assert {"toy", "tin"} <= set(table)


def test_entry_points_are_read_at_the_first_look_and_once(site: Path, table: MethodTable) -> None:
    module = install(site, "toy = {module}:TOY")
    assert module not in sys.modules
    assert "toy" in table
    install(site, "late = {module}:TOY", name="late")
    assert "late" not in table


def test_a_distributions_module_may_be_imported_first(site: Path) -> None:
    code = """
        from autopeft.methods import METHODS
        from autopeft.methods.base import Method
        from dataclasses import replace
        TOY = replace(METHODS.shipped["ia3"], name="toy")
    """
    module = install(site, "toy = {module}:TOY", "\n".join(line.strip() for line in code.splitlines()))
    done = run(site, "-c", f"import {module}; from autopeft.methods import METHODS; print(METHODS['toy'].name)")
    assert (done.stdout, done.stderr) == ("toy\n", "")


def test_a_module_may_look_at_the_shipped_methods_while_it_is_loaded(site: Path) -> None:
    # In a process of its own: the module looks at the table that is loading it.
    code = 'from autopeft.methods import METHODS\nassert "toy" not in METHODS\n' + TOY
    install(site, "toy = {module}:TOY", code)
    done = run(site, "-c", "from autopeft.methods import METHODS; print(METHODS['toy'].title)")
    assert (done.stdout, done.stderr) == ("Toy\n", "")


BROKEN = [
    ("toy = nowhere_at_all:TOY", TOY, ["ModuleNotFoundError", "nowhere_at_all"]),
    ("toy = {module}:MISSING", TOY, ["AttributeError", "MISSING"]),
    ("toy = {module}:TOY", "raise RuntimeError('not\\ntoday')", ["RuntimeError: not today"]),
    ("toy = {module}:TOY", "TOY = 3", ["TypeError", "holds a int"]),
    ("toy = {module}:TOY", "TOY = ('lora',)", ["TypeError", "holds a str"]),
    ("toy = {module}:TOY", TOY + 'TOY = replace(TOY, paper="")', ["paper ''", "arXiv number"]),
    ("toy = {module}:TOY", TOY + "TOY = replace(TOY, refuse=lambda spec, device: 1 / 0)", ["ZeroDivisionError"]),
]


@pytest.mark.parametrize(("entries", "code", "words"), BROKEN)
def test_asking_for_a_broken_method_is_one_paragraph_that_names_its_distribution(
    site: Path,
    find: Callable[[str], object],
    caplog: pytest.LogCaptureFixture,
    entries: str,
    code: str,
    words: list[str],
) -> None:
    install(site, entries, code)
    with pytest.raises(SpecError) as caught:
        find("toy")
    said = str(caught.value)
    for word in ["peft-toys 1.2", "'toy", "left out", "uninstall peft-toys", *words]:
        assert word in said
    assert "\n" not in said
    assert caplog.messages == [], "what is the answer is no warning too"


@pytest.mark.parametrize(("entries", "code", "words"), BROKEN)
def test_a_broken_method_that_nobody_asked_for_is_a_warning(
    site: Path,
    table: MethodTable,
    caplog: pytest.LogCaptureFixture,
    entries: str,
    code: str,
    words: list[str],
) -> None:
    install(site, entries, code)
    assert table["lora"] is METHODS["lora"]
    assert list(table) == list(METHODS.shipped)
    (said,) = caplog.messages
    assert said.startswith("autopeft: ")
    for word in ["peft-toys 1.2", *words]:
        assert word in said


def test_the_other_methods_of_a_tuple_survive_a_broken_one(site: Path, table: MethodTable) -> None:
    install(site, "toys = {module}:BOTH", TOY + 'BOTH = (TOY, replace(TOY, name="Tin"))\n')
    assert "toy" in table
    assert "Tin" not in table


def test_a_shipped_method_keeps_its_name(site: Path, table: MethodTable, caplog: pytest.LogCaptureFixture) -> None:
    install(site, "lora = {module}:TOY", TOY + 'TOY = replace(TOY, name="lora")\n')
    assert table["lora"] is METHODS["lora"]
    assert table.origin("lora") == OURS
    (said,) = caplog.messages
    assert "'lora' of the distribution peft-toys 1.2 is left out" in said


def test_a_name_that_two_distributions_offer_is_neithers(
    site: Path, find: Callable[[str], object], table: MethodTable
) -> None:
    install(site, "toy = {module}:TOY")
    install(site, "mine = {module}:TOY", name="more-toys", version="0.1")
    both = r"more-toys 0\.1 \(entry point 'mine'\) and peft-toys 1\.2 \(entry point 'toy'\)"
    with pytest.raises(SpecError, match=both):
        find("toy")
    assert list(table) == list(METHODS.shipped)


def test_a_module_that_imports_torch_is_used_but_warned_of(
    site: Path, table: MethodTable, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    # Stands for the import, which takes seconds.
    install(site, "toy = {module}:TOY", TOY + 'import sys\nsys.modules["torch"] = sys\n')
    assert "toy" in table
    (said,) = caplog.messages
    assert "peft-toys 1.2 imports torch while it is loaded" in said


# --- whole processes


def run(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(site), str(Path(autopeft.__file__).parent.parent)])
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": path},
        cwd=site,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_every_listing_says_where_a_method_comes_from_and_torch_is_not_loaded(site: Path) -> None:
    install(site, "toy = {module}:TOY\nbad = nowhere_at_all:BAD")
    code = """
import sys
from autopeft.cli.main import main
for arguments in (["methods"], ["methods", "toy"], ["methods", "toy", "--json"]):
    assert main(arguments) == 0
    print("----")
assert "torch" not in sys.modules
"""
    done = run(site, "-c", code)
    table, page, data, _ = done.stdout.split("----\n")
    assert "toy from peft-toys 1.2" in table
    assert "peft-toys 1.2" in page
    assert json.loads(data)["from"] == {"distribution": "peft-toys", "version": "1.2"}
    assert done.stderr.count("\n") == 1, "one warning in one paragraph"
    assert "nowhere_at_all" in done.stderr


def test_the_cost_process_and_workers_know_the_method_as_well(site: Path) -> None:
    install(site, "toy = {module}:TOY")
    code = """
import sys
from autopeft.backends.base import Finished, Pack, Stretch, WorkerSetup
from autopeft.executors.local import LocalExecutor
from autopeft.methods import find_method
from autopeft.methods.faults import make_recipe_spec

setup = WorkerSetup(
    backend="fake", model="", task="name: demo\\ntitle: Demo\\ntext: text\\nlabels: [a, b]\\nembedded: true\\n",
    data_dir=None, split_seed=0, study_dir=sys.argv[1], device="cpu", threads=1,
)
spec = make_recipe_spec(find_method("toy"), device_kind="cpu")
executor = LocalExecutor(setup, ["cpu"])
executor.start()
assert executor.cost(spec).cost is not None
stretch = Stretch(job=1, trial=0, spec=spec, purpose="search", from_step=0, to_step=spec.max_steps)
executor.assign(0, Pack(stretches=(stretch,)))
events = []
while not events:
    events = [event for event in executor.wait(30.0) if event.event is None or isinstance(event.event, Finished)]
assert isinstance(events[0].event, Finished), events
executor.close()
"""
    run(site, "-c", code, str(site))
