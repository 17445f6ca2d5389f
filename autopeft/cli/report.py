"""`autopeft report`: write a study's page and leaderboard again, or print its record."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report", help="write a study's report again", description="Writes a study's HTML report and leaderboard again."
    )
    parser.add_argument("study", help="the study's name")
    parser.add_argument("--json", action="store_true", help="print the study's record as JSON, and write nothing")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    import json

    from autopeft.cli.session import check_outputs, open_study, write_outputs
    from autopeft.records import to_record
    from autopeft.search.results import build_record

    if not args.json:
        check_outputs()
    record = build_record(open_study(args.study))
    if args.json:
        print(json.dumps(to_record(record), indent=2))
    else:
        write_outputs(record)
    return 0
