"""`autopeft`: parse, call, print. Commands import what they need when they run, so that --help is quick."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from autopeft import __version__
from autopeft.cli import doctor, estimate, export, listings, merge, push, report, resume, search, train, verify
from autopeft.errors import AutopeftError
from autopeft.wording import first_line, in_one_line

COMMANDS = (search, resume, report, export, train, merge, verify, push, estimate, listings, doctor)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="autopeft",
        description="Search parameter-efficient fine-tuning configurations inside a budget of device time.",
        epilog="Start with: autopeft search --task demo --model minilm --budget 15trials",
    )
    parser.add_argument("--version", action="version", version=f"autopeft {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add_parser(subparsers)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done; 1 failed; 2 usage; 3 nothing feasible within the budget; 130 interrupted."""
    args = build_parser().parse_args(arguments)
    try:
        code: int = args.run(args)
        return code
    except AutopeftError as exc:
        if args.debug:
            raise
        # One paragraph, whatever a library's message within it looked like.
        print(f"autopeft: {in_one_line(exc)}", file=sys.stderr)
        return exc.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return 0
    except OSError as exc:
        # A disk that is full, a folder that may not be read: nothing that a traceback would explain.
        if args.debug:
            raise
        where = f": '{exc.filename}'" if exc.filename is not None else ""
        print(f"autopeft: This machine could not do what was needed: {exc.strerror or exc}{where}.", file=sys.stderr)
        return 1
    except Exception as exc:
        if args.debug:
            raise
        if type(exc).__name__ == "SafetensorError" and "I/O error" in str(exc):
            # What it meets while it writes weights, told as no OSError.
            print(f"autopeft: This machine could not do what was needed: {first_line(exc)}.", file=sys.stderr)
            return 1
        what = f"{type(exc).__name__}: {first_line(exc)}"
        again = "Run it again as autopeft --debug ... for the traceback, and report it with that."
        print(f"autopeft: This is a defect of autopeft: {what}. {again}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
