"""Python scripts from templates."""

from __future__ import annotations

import json
import pprint
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def render(template: str, facts: Mapping[str, Any]) -> str:
    """A template of this folder; its filter `py` writes a value as Python source."""
    # Only where a script is written: the command line's help must not wait for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,
    )
    environment.filters["py"] = to_source
    return environment.get_template(template).render(facts)


def to_source(value: Any) -> str:
    """Python source as formatters like it, with long lists over several lines of an argument's depth."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, list | tuple):
        items = [to_source(item) for item in value]
        line = f"[{', '.join(items)}]"
        return line if len(line) < 90 else "[\n" + "".join(f"            {item},\n" for item in items) + "        ]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{to_source(k)}: {to_source(v)}" for k, v in value.items()) + "}"
    return pprint.pformat(value)
