"""`autopeft export`: a chosen configuration in the form that a trainer reads."""

from __future__ import annotations

import argparse

_TARGETS = "peft, trainer, trl, llama-factory, axolotl, unsloth, ms-swift"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a chosen configuration for a trainer",
        description="Writes a chosen configuration with its rows in the form that a trainer reads, ready to run.",
    )
    parser.add_argument("study", help="the study's name")
    parser.add_argument(
        "--pick",
        required=True,
        help="best, knee, smallest, a trial's number, or the best with 'vram<24GB', 'params<1M' or both with a comma",
    )
    parser.add_argument("--to", default="peft", help=f"the target: {_TARGETS}")
    parser.add_argument("--out", required=True, help="a folder that does not exist yet, or is empty")
    parser.add_argument("--model", help="where the base model is, if it has moved since the search")
    parser.add_argument("--data-dir", help="folder with the task's rows, if they have moved since the search")
    length = parser.add_mutually_exclusive_group()
    length.add_argument(
        "--epochs", type=float, help="length over the training rows; 3, but no less than the trial, unless given"
    )
    length.add_argument("--steps", help="length in optimizer steps, or 'trial' for the trial's own")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import shlex
    from dataclasses import replace
    from pathlib import Path

    from autopeft.cli.session import find_places, open_study
    from autopeft.cli.training_display import describe_length
    from autopeft.errors import ExportError
    from autopeft.export import export_trial, find_trial
    from autopeft.production.files import read_recipe
    from autopeft.report.words import describe_spec
    from autopeft.search.results import build_record

    store = open_study(args.study)
    record = build_record(store)
    trial = find_trial(record, args.pick)
    steps = None
    if args.steps is not None:
        if args.steps != "trial" and not args.steps.isdecimal():
            raise ExportError(f"--steps takes a number of steps, or 'trial', but was given '{args.steps}'.")
        steps = trial.spec.max_steps if args.steps == "trial" else int(args.steps)
    places = find_places(store, model=args.model, data_dir=args.data_dir)
    out = Path(args.out)
    exported = export_trial(
        replace(record, config=replace(record.config, task=places.task)),
        trial,
        pick=args.pick,
        model=places.model,
        target=args.to,
        out=out,
        data_dir=places.data_dir,
        epochs=args.epochs,
        steps=steps,
    )
    recipe = read_recipe(out)
    print(f"{'trial':12} {trial.number} of {record.config.name} ({args.pick}): {describe_spec(trial.spec)}")
    print(f"{'length':12} {describe_length(recipe)['length']}")
    for title, lines in (("written", exported.files), ("run", (f"cd {shlex.quote(args.out)}", *exported.commands))):
        for number, line in enumerate(lines):
            print(f"{'' if number else title:12} {line}")
    return 0
