"""The text that `autopeft methods` prints: all in one table, or everything of one."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from autopeft.methods.base import Method
from autopeft.methods.facts import (
    find_base_writes,
    find_peft_class,
    format_base_writes,
    format_bits,
    format_condition,
    format_models,
    format_range,
    format_rate,
    format_rates,
    format_settings,
    format_value,
)
from autopeft.methods.faults import FAMILIES
from autopeft.methods.table import OURS, MethodTable, Origin

WIDTH = 120
_TITLES = ("name", "title", "bits", "models", "merges", "layers", "learning rate", "writes base")
_KINDS = {"encoder": "enc", "decoder": "dec", "encoder-decoder": "enc-dec"}
_LEGEND = (
    ("bits", "widths of the base weights that it trains on; 16 is the unquantized base, which is 32 on a CPU"),
    ("models", "enc, dec and enc-dec are encoders, decoders and encoder-decoders"),
    ("merges", "whether the trained adapter can be folded into the base"),
    ("layers", "last-k: it can be kept to the last k layers"),
    ("writes base", "whether a trial needs a copy of the base weights; some: with some settings"),
)


def render_table(methods: MethodTable, excluded: Iterable[tuple[str, str]]) -> str:
    """A line a method under its family, then what the columns mean, where methods come from, and what is left out."""
    rows = {method.name: _cells(method) for method in methods.values()}
    widths = [max(map(len, column)) for column in zip(_TITLES, *rows.values(), strict=True)]
    lines = [_align(_TITLES, widths)]
    for family in FAMILIES:
        members = [method.name for method in methods.values() if method.family == family]
        lines += ["", family, *(_align(rows[name], widths) for name in members)] if members else []
    lines += ["", *_pairs(_LEGEND), "", _tell_origins(methods)]
    left_out = sorted(excluded)
    if left_out:
        lines += ["", "peft has these as well, but they are no methods here:", *_pairs(left_out)]
    lines += ["", "autopeft methods NAME says everything of one; --json is for machines."]
    return "\n".join(lines)


def _cells(method: Method) -> tuple[str, ...]:
    writes = {"never": "no", "always": "yes", "by setting": "some"}
    models = format_models(method)
    return (
        method.name,
        method.title if method.searched else f"{method.title} (the baseline)",
        format_bits(method),
        models if models == "all" else ", ".join(_KINDS[kind] for kind in method.models),
        "yes" if method.merges else "no",
        "last-k" if method.layer_choice else "all",
        format_rates(method),
        writes[find_base_writes(method).when],
    )


def _align(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()


def _pairs(pairs: Iterable[tuple[str, str]], indent: str = "  ") -> list[str]:
    """Terms and what they mean, in two columns, the second wrapped."""
    pairs = list(pairs)
    width = max(len(term) for term, _ in pairs)
    lines = []
    for term, meaning in pairs:
        first = f"{indent}{term.ljust(width)}  "
        lines += textwrap.wrap(
            meaning,
            WIDTH,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_on_hyphens=False,
            break_long_words=False,
        ) or [first.rstrip()]
    return lines


def _tell_origins(methods: MethodTable) -> str:
    foreign = [f"{name} from {methods.origin(name)}" for name in methods if methods.origin(name) != OURS]
    return f"All come from {OURS}" + (f", but {', '.join(foreign)}." if foreign else ".")


def render_method(method: Method, origin: Origin, left_out: Iterable[tuple[str, str]] = ()) -> str:
    """Everything that is known of one method; `left_out` is what peft has of it besides, with the reason."""
    recipe = method.recipe
    blocks = [
        [f"{method.title} ({method.name})"],
        _pairs(_facts(method, origin)),
        ["Dimensions", *_dimension_lines(method)] if method.dimensions else ["It has no dimensions of its own."],
        [
            "Recipe",
            *_pairs(
                [
                    ("settings", format_settings(method) or "none"),
                    *([("target modules", recipe.target_modules)] if recipe.target_modules else []),
                    ("learning rate", format_rate(recipe.learning_rate)),
                    ("source", recipe.source),
                ]
            ),
        ],
    ]
    left_out = sorted(left_out)
    if left_out:
        blocks.append(["Other starts that peft has for it, left out", *_pairs(left_out)])
    return "\n\n".join("\n".join(block) for block in blocks)


def _facts(method: Method, origin: Origin) -> list[tuple[str, str]]:
    peft_class = find_peft_class(method)
    facts = [
        ("family", method.family),
        ("paper", method.paper),
        ("from", str(origin)),
        ("built by", f"peft, {peft_class}" if peft_class else f"{origin.distribution} itself. {method.why_not_peft}"),
        ("models", format_models(method)),
        ("bits", _tell_bits(method)),
        ("optimizers", ", ".join(method.optimizers)),
        ("needs", method.needs or "nothing more"),
        ("target modules", _tell_targets(method)),
        ("merges", "yes, into the base" if method.merges else "no"),
        ("at the start", "the logits are the base's" if method.starts_as_base else "the logits differ from the base's"),
        ("writes base", format_base_writes(method)),
        ("learning rate", f"{format_rates(method)}, log"),
    ]
    if not method.searched:
        facts.append(("searched", "no: it is the baseline that every study trains"))
    return facts


def _tell_bits(method: Method) -> str:
    text = format_bits(method)
    return f"{text} (unquantized; 32 on a CPU)" if 16 in method.bits else text


def _tell_targets(method: Method) -> str:
    if not method.target_modules:
        return "none, but last-K keeps it to the last K layers" if method.layer_choice else "none"
    last = "; GROUP:last-K keeps it to the last K layers" if method.layer_choice else ""
    return f"{', '.join(method.target_modules)}; or names:a,b or re:PATTERN{last}"


def _dimension_lines(method: Method) -> list[str]:
    rows = [
        (
            dimension.name,
            format_range(dimension),
            format_value(dimension.default),
            ", ".join(filter(None, [dimension.meaning, format_condition(dimension)])),
        )
        for dimension in method.dimensions
    ]
    titles = ("", "range", "default", "")
    widths = [max(map(len, column)) for column in zip(titles, *(row for row in rows), strict=True)][:3]
    head = _align(("", *titles[1:3]), widths)
    return [f"  {head}", *_pairs((_pad(row[:3], widths), row[3]) for row in rows)]


def _pad(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
