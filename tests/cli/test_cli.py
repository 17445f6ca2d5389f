"""The commands and their options are an interface: adding one is a decision, and this list says so."""

from __future__ import annotations

import argparse

import pytest

from autopeft.cli.main import build_parser, main

OPTIONS = {
    "search": [
        "--budget", "--data-dir", "--dry-run", "--fix", "--include", "--max-steps", "--max-vram", "--methods",
        "--model", "--name", "--objectives", "--plan-for", "--price", "--seed", "--space", "--task", "--until",
        "--workers",
    ],
    "resume": ["--budget", "STUDY"],
    "report": ["STUDY"],
    "export": ["--out", "--pick", "--to", "STUDY"],
    "methods": [],
    "tasks": [],
    "spaces": [],
}  # fmt: skip


def commands() -> dict[str, argparse.ArgumentParser]:
    actions = [action for action in build_parser()._actions if isinstance(action, argparse._SubParsersAction)]
    return dict(actions[0].choices)


def options(parser: argparse.ArgumentParser) -> list[str]:
    found = [action.option_strings[-1] if action.option_strings else action.dest.upper() for action in parser._actions]
    return sorted(set(found) - {"--help"})


def test_the_commands_are_those_listed() -> None:
    assert sorted(commands()) == sorted(OPTIONS)


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_the_options_are_those_listed(command: str) -> None:
    assert options(commands()[command]) == sorted(OPTIONS[command])


@pytest.mark.parametrize("command", sorted(OPTIONS))
def test_every_option_is_explained(command: str) -> None:
    unexplained = [action.dest for action in commands()[command]._actions if not action.help]
    assert set(unexplained) <= {"seed"}


@pytest.mark.parametrize("arguments", [[], ["serch"], ["search"], ["search", "--task", "demo"], ["export", "x"]])
def test_a_command_line_that_does_not_parse_exits_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2


@pytest.mark.parametrize("command", ["methods", "tasks", "spaces"])
def test_a_listing_prints_a_line_for_each(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    from autopeft.methods import METHODS
    from autopeft.spaces.load import list_spaces
    from autopeft.tasks.spec import list_tasks

    known = {
        "methods": [method.name for method in METHODS.values() if method.searched],
        "tasks": list(list_tasks()),
        "spaces": list(list_spaces()),
    }
    assert main([command]) == 0
    printed = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert sorted(printed) == sorted(known[command])
