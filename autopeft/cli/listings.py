"""`autopeft methods`, `tasks`, `spaces`: what there is to choose from; `studies`: what there is in this folder."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from autopeft.wording import in_one_line, say_count

if TYPE_CHECKING:
    from autopeft.search.store import StudyStore

_METHOD_KEYS = """\
keys of a method with --json (all methods: {"methods": [...], "excluded": {peft type: reason}}):
  name, title, family, paper
  from            {distribution, version}
  baseline        whether every study trains it, and no space offers it
  peft_config     class of peft's configuration; null where the method is built without peft
  why_not_peft    why peft lacks it, else null
  models          some of encoder, decoder, encoder-decoder
  bits            widths of the base weights: 4, 8, 16 (unquantized on GPU), 32 (unquantized on CPU)
  optimizers      worth searching
  needs           what else it asks of a model, or null
  target_modules  groups worth searching; empty where it has none
  layer_choice    whether it can be kept to the last k layers
  merges          whether it can be folded into the base
  starts_as_base  whether the logits are the base's before the first step
  answers_alone   whether a row's answer depends on that row alone, not on others of its batch
  writes_base     {when: never, always or "by setting"; settings: those with which it does}
  learning_rate   {low, high}
  dimensions      [{name, meaning, kind, low, high, log, choices, default, only_if}]
  recipe          {settings, target_modules, learning_rate, source}
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    methods = subparsers.add_parser(
        "methods",
        help="list PEFT methods, or say everything of one",
        description="Lists PEFT methods by family, or says everything of one.",
        epilog=_METHOD_KEYS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    methods.add_argument("name", nargs="?", help="say everything of this one")
    methods.add_argument("--json", action="store_true", help="print it as JSON, with the keys below")
    methods.set_defaults(run=list_methods)
    for name, run, what in (
        ("tasks", list_tasks, "shipped tasks"),
        ("spaces", list_spaces, "shipped search spaces"),
        ("studies", list_studies, "the studies of the current folder"),
    ):
        parser = subparsers.add_parser(name, help=f"list {what}", description=f"Lists {what}.")
        parser.set_defaults(run=run)


def list_methods(args: argparse.Namespace) -> int:
    import json

    from autopeft.cli.method_table import render_method, render_table
    from autopeft.methods import METHODS, find_method
    from autopeft.methods.excluded import EXCLUDED_STARTS, LEFT_OUT
    from autopeft.methods.facts import describe_method

    if args.name is not None:
        method = find_method(args.name)
        origin = METHODS.origin(method.name)
        if args.json:
            text = json.dumps(describe_method(method, origin), indent=2)
        else:
            left_out = EXCLUDED_STARTS.items() if method.name == "lora" else ()
            text = render_method(method, origin, left_out)
    elif args.json:
        methods = [describe_method(method, METHODS.origin(name)) for name, method in METHODS.items()]
        text = json.dumps({"methods": methods, "excluded": dict(LEFT_OUT)}, indent=2)
    else:
        text = render_table(METHODS, LEFT_OUT.items())
    print(text)
    return 0


def list_tasks(args: argparse.Namespace) -> int:
    from autopeft.tasks.spec import list_tasks, parse_task

    for name, path in list_tasks().items():
        task = parse_task(path.read_text(encoding="utf-8"), name)
        kind = f"{task.num_labels} labels" if task.num_labels is not None else "generation"
        has_rows = task.embedded or task.files is not None or task.hub is not None
        needs = "" if has_rows else "; needs --data-dir"
        print(f"{name:<11} {task.title}: {kind}, scored by {task.scorer}{needs}")
    return 0


def list_spaces(args: argparse.Namespace) -> int:
    import yaml

    from autopeft.spaces.load import list_spaces

    for name, path in list_spaces().items():
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        methods = data["methods"] if isinstance(data["methods"], str) else ", ".join(data["methods"])
        print(f"{name:<12} for {data['serves']}: {methods}")
    return 0


def list_studies(args: argparse.Namespace) -> int:
    from autopeft.cli.session import STUDIES
    from autopeft.errors import AutopeftError
    from autopeft.search import store

    names = store.list_studies(STUDIES)
    if not names:
        print(f"There are no studies in '{STUDIES}' yet; autopeft search starts one.")
    width = max(map(len, names), default=0)
    for name in names:
        try:
            said = _describe_study(store.StudyStore.open(STUDIES, name))
        except AutopeftError as exc:
            # One that cannot be read hides none of the others.
            said = in_one_line(exc)
        print(f"{name:<{width}} {said}")
    return 0


def _describe_study(store: StudyStore) -> str:
    from autopeft.report.words import format_quality, title_scorer
    from autopeft.search.front import find_surest

    config = store.config
    complete = [trial.to_record() for trial in store.trials if trial.state == "complete"]
    # Of what was not confirmed in time it says nothing, unlike the report's picks: those take a bootstrap.
    qualities = [trial.quality for trial in find_surest(complete) if trial.quality is not None]
    best = f", best {title_scorer(config.scorer)} {format_quality(max(qualities), config.scorer)}" if qualities else ""
    return (
        f"{config.task_name} on {config.model}, {config.budget}: {say_count(len(store.trials), 'trial')}, "
        f"{'finished' if store.finished else 'unfinished'}{best}"
    )
