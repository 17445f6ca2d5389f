"""`autopeft methods`, `tasks` and `spaces` say what there is, to people and to programs."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from autopeft.cli.main import build_parser, main
from autopeft.cli.method_table import WIDTH, render_method, render_table
from autopeft.methods import METHODS
from autopeft.methods.excluded import EXCLUDED_STARTS, LEFT_OUT
from autopeft.methods.faults import FAMILIES
from autopeft.methods.table import OURS, MethodTable

Say = Callable[..., str]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Runs a command that must succeed; its output."""

    def run(*arguments: str) -> str:
        assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("command", ["tasks", "spaces"])
def test_a_listing_prints_a_line_for_each(command: str, say: Say) -> None:
    from autopeft.spaces.load import list_spaces
    from autopeft.tasks.spec import list_tasks

    known = {"tasks": list(list_tasks()), "spaces": list(list_spaces())}
    printed = [line.split()[0] for line in say(command).splitlines()]
    assert sorted(printed) == sorted(known[command])


def test_tasks_without_rows_of_their_own_say_what_they_need(say: Say) -> None:
    needing = [line.split()[0] for line in say("tasks").splitlines() if line.endswith("; needs --data-dir")]
    assert needing == ["e2e_nlg", "trec"]


# --- all methods


def find_rows(printed: str) -> dict[str, str]:
    """Lines of the table by method."""
    lines = [line for line in printed.splitlines() if line.split() and line not in FAMILIES]
    return {line.split()[0]: line for line in lines if line.split()[0] in METHODS}


def test_every_method_has_a_line_under_its_family(say: Say) -> None:
    family = ""
    found: dict[str, str] = {}
    for line in say("methods").splitlines():
        if line in FAMILIES:
            family = line
        found |= dict.fromkeys(find_rows(line), family)
    assert found == {method.name: method.family for method in METHODS.values()}


def test_families_stand_in_their_order(say: Say) -> None:
    assert [line for line in say("methods").splitlines() if line in FAMILIES] == list(FAMILIES)


def test_the_table_fits_120_columns_and_is_plain_text(say: Say) -> None:
    printed = say("methods")
    assert max(map(len, printed.splitlines())) <= WIDTH == 120
    assert "\x1b" not in printed


def test_columns_are_aligned(say: Say) -> None:
    printed = say("methods")
    starts = [match.start() for match in re.finditer(r"\S+(?: \S+)*", printed.splitlines()[0])]
    for row in find_rows(printed).values():
        assert all(row[start - 2 : start] == "  " and row[start] != " " for start in starts[1:])


def test_a_line_says_bits_models_merging_layers_rates_and_writes(say: Say) -> None:
    rows = {name: re.split(r"\s{2,}", row) for name, row in find_rows(say("methods")).items()}
    assert rows["lora"] == ["lora", "LoRA", "4 8 16", "all", "yes", "last-k", "1e-4 to 1e-2", "some"]
    assert rows["full"] == ["full", "Full fine-tuning", "16", "all", "yes", "all", "1e-5 to 1e-3", "yes"]


def test_what_peft_has_besides_is_there_with_its_reason(say: Say) -> None:
    printed = " ".join(say("methods").split())
    assert LEFT_OUT
    for name, reason in LEFT_OUT.items():
        assert f"{name} {reason}" in printed


def test_a_table_without_excluded_types_says_nothing_of_them() -> None:
    assert "peft has these" not in render_table(MethodTable([METHODS["ia3"]]), [])


def test_all_methods_come_from_autopeft_unless_one_does_not(say: Say) -> None:
    assert f"All come from {OURS}." in say("methods")


# --- one method


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_page_says_everything_and_fits(name: str, say: Say) -> None:
    method = METHODS[name]
    printed = say("methods", name)
    # Addresses are kept whole, to be copied.
    assert [line for line in printed.splitlines() if len(line) > WIDTH and "/" not in line.split()[-1]] == []
    words = " ".join(printed.split())
    for text in [
        method.title, method.family, method.paper, method.needs, method.why_not_peft, method.recipe.source, str(OURS),
        *(dimension.meaning for dimension in method.dimensions), *method.target_modules,
    ]:  # fmt: skip
        assert " ".join(text.split()) in words


def test_a_page_has_ranges_defaults_and_conditions(say: Say) -> None:
    lines = {line.split()[0]: " ".join(line.split()) for line in say("methods", "lora").splitlines() if line.split()}
    assert lines["rank"] == "rank 1 to 256, log 8 rank of the update"
    assert lines["dropout"] == "dropout 0 to 0.3 0 dropout on the adapter's input"
    assert lines["dora"].startswith("dora false, true false DoRA")
    printed = " ".join(say("methods", "lora").split())
    assert "if bits is 16 or 32" in printed
    assert "built by peft, LoraConfig" in printed
    assert "writes base with init pissa or init olora" in printed


def test_loras_page_says_why_some_of_pefts_starts_are_left_out(say: Say) -> None:
    printed = " ".join(say("methods", "lora").split())
    for name, reason in EXCLUDED_STARTS.items():
        assert f"{name} {reason}" in printed
    assert "default, pissa, olora, eva" in printed


def test_the_page_of_the_baseline_says_that_it_is_one(say: Say) -> None:
    assert "it is the baseline that every study trains" in say("methods", "head")


def test_a_method_that_starts_elsewhere_says_so() -> None:
    method = dataclasses.replace(METHODS["ia3"], starts_as_base=False)
    assert "the logits differ from the base's" in render_method(method, OURS)


def test_an_unknown_method_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "loar"]) == 2
    said = capsys.readouterr().err
    assert "Did you mean 'lora'?" in said
    assert said.count("\n") == 1


def test_an_excluded_type_gets_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "xlora"]) == 2
    assert LEFT_OUT["XLORA"] in capsys.readouterr().err


# --- for programs


def documented_keys() -> set[str]:
    """The names at the start of a line of the help's last part."""
    parser = next(a for a in build_parser()._actions if a.dest == "command").choices["methods"]  # type: ignore[index]
    lines = parser.epilog.splitlines()[1:]
    return {word.strip(",") for line in lines for word in re.match(r"  ((?:\w+, )*\w+)", line).group(1).split()}  # type: ignore[union-attr]


def test_the_keys_are_those_that_the_help_explains(say: Say) -> None:
    for entry in json.loads(say("methods", "--json"))["methods"]:
        assert set(entry) == documented_keys()


def test_all_and_one_are_told_alike(say: Say) -> None:
    data = json.loads(say("methods", "--json"))
    assert set(data) == {"methods", "excluded"}
    assert data["excluded"] == LEFT_OUT
    assert [entry["name"] for entry in data["methods"]] == list(METHODS)
    assert json.loads(say("methods", "qlora", "--json")) == data["methods"][list(METHODS).index("qlora")]


@pytest.mark.parametrize("name", METHODS)
def test_json_holds_what_the_row_holds(name: str, say: Say) -> None:
    method = METHODS[name]
    entry = json.loads(say("methods", name, "--json"))
    same: dict[str, Any] = {
        field: getattr(method, field)
        for field in ("name", "title", "family", "paper", "layer_choice", "merges", "starts_as_base")
    }
    assert {key: entry[key] for key in same} == same
    for key in ("models", "bits", "optimizers", "target_modules"):
        assert tuple(entry[key]) == getattr(method, key)
    assert (entry["learning_rate"]["low"], entry["learning_rate"]["high"]) == method.learning_rate
    assert entry["recipe"]["settings"] == dict(method.recipe.settings)
    assert entry["from"] == {"distribution": "autopeft", "version": OURS.version}
    assert (entry["peft_config"] is None) == (method.peft is None)
    for dimension, row in zip(entry["dimensions"], method.dimensions, strict=True):
        assert (dimension["name"], dimension["default"], dimension["kind"]) == (row.name, row.default, row.kind)
        assert dimension["low"] == (None if row.kind == "choice" else row.low)
        assert tuple(dimension["choices"] or ()) == row.choices
        assert dimension["only_if"] == {other: list(values) for other, values in row.only_if.items()}


def test_settings_that_write_the_base_are_named(say: Say) -> None:
    assert json.loads(say("methods", "lora", "--json"))["writes_base"] == {
        "when": "by setting",
        "settings": [{"init": "pissa"}, {"init": "olora"}],
    }
    assert json.loads(say("methods", "full", "--json"))["writes_base"] == {"when": "always", "settings": []}
