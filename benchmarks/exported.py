"""What the benchmarks of exports share: the study that they are given, and the two files that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from machine import describe_machine

from autopeft.records import StudyRecord
from autopeft.search.results import build_record
from autopeft.search.store import StudyStore


def make_parser(doc: str | None) -> argparse.ArgumentParser:
    """With the study and where results go; `doc` is the benchmark's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study")
    parser.add_argument("--studies", type=Path, default=Path("studies"))
    parser.add_argument("--out", type=Path, required=True, help="written as .md and .json")
    return parser


def open_study(args: argparse.Namespace) -> tuple[StudyStore, StudyRecord]:
    store = StudyStore.open(args.studies, args.study)
    return store, build_record(store)


def write_results(
    out: Path, content: Mapping[str, Any], *, title: str, command: str, text: str, table: Sequence[str], also: str = ""
) -> None:
    """`content` as JSON beside the machine, and a page that begins with the title, the command, the machine, its
    libraries (and what is `also` to be named) and the text."""
    machine = describe_machine()
    out.parent.mkdir(parents=True, exist_ok=True)
    record = {"machine": machine, **content}
    out.with_suffix(".json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    libraries = ", ".join(
        [*([also] if also else []), *(f"{n} {machine[n]}" for n in ("torch", "transformers", "peft"))]
    )
    place = f"`{command}`, on {machine['cores']} cores of {machine['processor']}; {libraries}."
    page = [f"# {title}", "", f"{place} {text}", "", *table]
    out.with_suffix(".md").write_text("\n".join(page) + "\n", encoding="utf-8")
