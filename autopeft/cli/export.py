"""`autopeft export`: a chosen configuration in the form that a trainer reads."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "export",
        help="write a chosen configuration for a trainer",
        description="Writes a chosen configuration in the form that a trainer reads.",
    )
    parser.add_argument("study", help="the study's name")
    parser.add_argument("--pick", required=True, help="best, knee, smallest, or a trial's number")
    parser.add_argument("--to", default="peft", help="the target: peft")
    parser.add_argument("--out", required=True, help="a folder that does not exist yet, or is empty")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from autopeft.cli.session import STUDIES, read_local
    from autopeft.export import export_trial, find_trial
    from autopeft.search.results import build_record
    from autopeft.search.store import StudyStore

    store = StudyStore.open(STUDIES, args.study)
    record = build_record(store)
    model = read_local(store)["model"]
    assert model is not None
    for path in export_trial(record, find_trial(record, args.pick), model=model, target=args.to, out=Path(args.out)):
        print(path)
    return 0
