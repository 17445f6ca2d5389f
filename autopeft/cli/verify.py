"""`autopeft verify`: whether a finished training is what it says."""

from __future__ import annotations

import argparse


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from autopeft.cli.merge import add_places

    parser = subparsers.add_parser(
        "verify",
        help="load a finished training in a fresh process and reproduce its score",
        description="Loads a finished training in a fresh process, with plain peft or transformers where they can, and "
        "scores the test split again. Ends with 0 where score and digests are the recorded ones, and with 1 where they "
        "are not.",
    )
    parser.add_argument("dir", metavar="DIR", help="a folder that autopeft train has finished")
    add_places(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from pathlib import Path

    from autopeft.production.finished import open_finished
    from autopeft.production.verify import verify
    from autopeft.report.words import title_scorer

    finished = open_finished(Path(args.dir), model=args.model, data_dir=args.data_dir)
    found = verify(finished)
    scorer = title_scorer(finished.result.scorer)
    changed = "" if found.num_changed is None else f"; {found.num_changed} of the answers changed"
    print(f"loaded       by a fresh process with {found.loader}, on {found.device}")
    print("digests      of the trained weights, the rows and the base are the recorded ones")
    print(f"recorded     test {scorer} {found.recorded_quality:.4f}, mean loss {found.recorded_loss:.4f}")
    print(f"reproduced   test {scorer} {found.quality:.4f}, mean loss {found.loss:.4f}{changed}")
    tolerance = found.tolerance
    print(f"tolerance    {tolerance.quality:.4f} and {tolerance.loss:.4f} ({tolerance.why})")
    return 0
