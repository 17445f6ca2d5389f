"""`autopeft report`: write a study's page and leaderboard again."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "report", help="write a study's report again", description="Writes a study's HTML report and leaderboard again."
    )
    parser.add_argument("study", help="the study's name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from autopeft.cli.session import check_outputs, open_study, write_outputs
    from autopeft.search.results import build_record

    check_outputs()
    write_outputs(build_record(open_study(args.study)))
    return 0
