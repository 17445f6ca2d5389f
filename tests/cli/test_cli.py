"""The commands and their options are an interface: adding one is a decision, and this list says so."""

from __future__ import annotations

import argparse

import pytest

from autopeft.cli.main import build_parser, main

OPTIONS = {
    "search": [
        "--budget", "--data-dir", "--dry-run", "--fix", "--include", "--max-params", "--max-steps", "--max-vram",
        "--methods", "--model", "--name", "--objectives", "--plan-for", "--price", "--seed", "--space",
        "--stop-when-gain-below", "--task", "--until", "--warm-start", "--workers",
    ],
    "resume": ["--budget", "--data-dir", "--model", "STUDY"],
    "report": ["--json", "STUDY"],
    "export": ["--data-dir", "--epochs", "--model", "--out", "--pick", "--steps", "--to", "STUDY"],
    "train": [
        "--all-rows", "--batch-size", "--cycles", "--data-dir", "--epochs", "--eval-every", "--from",
        "--gradient-checkpointing", "--micro-batch", "--model", "--out", "--patience", "--pick", "--report-to",
        "--save-every", "--schedule", "--seed", "--stage", "--steps", "--text", "SOURCE",
    ],
    "merge": ["--data-dir", "--dtype", "--model", "--out", "DIR"],
    "push": ["--data-dir", "--dry-run", "--dtype", "--merged", "--model", "--private", "--to", "DIR"],
    "verify": ["--data-dir", "--model", "DIR"],
    "estimate": [
        "--accumulate", "--batch-size", "--bits", "--count", "--device", "--fix", "--gradient-checkpointing", "--json",
        "--max-vram", "--method", "--model", "--num-labels", "--optimizer", "--rank", "--seq-len", "--space", "--study",
        "--target-modules", "--task-kind",
    ],
    "doctor": ["--json"],
    "methods": ["--json", "NAME"],
    "tasks": [],
    "spaces": [],
    "studies": [],
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
