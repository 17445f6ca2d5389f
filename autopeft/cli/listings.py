"""`autopeft methods`, `tasks`, `spaces`: what there is to choose from."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    for name, run, what in (
        ("methods", list_methods, "PEFT methods"),
        ("tasks", list_tasks, "shipped tasks"),
        ("spaces", list_spaces, "shipped search spaces"),
    ):
        parser = subparsers.add_parser(name, help=f"list {what}", description=f"Lists {what}.")
        parser.set_defaults(run=run)


def list_methods(args: argparse.Namespace) -> int:
    from autopeft.methods import METHODS

    for method in METHODS.values():
        if method.searched:
            low, high = method.learning_rate
            dimensions = ", ".join(dimension.name for dimension in method.dimensions) or "none of its own"
            print(f"{method.name:<15} {method.title}: {dimensions}; learning rate {low:g} to {high:g}; {method.paper}")
    return 0


def list_tasks(args: argparse.Namespace) -> int:
    from autopeft.tasks.spec import list_tasks, parse_task

    for name, path in list_tasks().items():
        task = parse_task(path.read_text(encoding="utf-8"), name)
        print(f"{name:<10} {task.title}: {len(task.labels)} labels, scored by {task.scorer}")
    return 0


def list_spaces(args: argparse.Namespace) -> int:
    import yaml

    from autopeft.spaces.load import list_spaces

    for name, path in list_spaces().items():
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        print(f"{name:<10} for {data['serves']}: {', '.join(data['methods'])}")
    return 0
