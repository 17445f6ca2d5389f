"""What a benchmark found, told and written beside the others' results."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from machine import describe_machine

RESULTS = Path(__file__).parent / "results"


def tell_result(text: str, record: object, *, name: str | None) -> None:
    """Prints the text. With a name, results/NAME.md is the text, and results/NAME.json the record with its machine and
    time."""
    print(text)
    if not name:
        return
    RESULTS.mkdir(exist_ok=True)
    data = {"made_at": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), "result": record}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (RESULTS / f"{name}.md").write_text(text + "\n", encoding="utf-8")
