"""The page docs/methods.md, from the table of methods. Written by

python -m autopeft.methods.document > docs/methods.md
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from autopeft.methods.base import Dimension, Family, Method
from autopeft.methods.facts import (
    find_peft_class,
    format_base_writes,
    format_bits,
    format_condition,
    format_models,
    format_range,
    format_rate,
    format_rates,
    format_value,
)
from autopeft.methods.table import ENTRY_POINT_GROUP

COMMAND = "python -m autopeft.methods.document > docs/methods.md"

_OPENING = """\
# Methods

<!-- Written by `{command}`; change the rows in autopeft/methods/ instead. -->

The {number} methods that `autopeft` trains. Which of them is best on a task is what `autopeft search` finds out; this
page is for deciding what it should try. `autopeft methods` prints the same in a terminal, `autopeft methods NAME` all
of one, and `--json` either for programs.

## How to choose

Every method but full fine-tuning keeps optimizer states for little more than what it adds, so on a large base the
memory left to save is that of the base itself (4 or 8 bits) and of activations, which all methods share. So
choose by what you need, and let the search choose within it:

{advice}

The tuning matters more than the method: the learning rate worth searching differs by a factor of a hundred from one
family to the next, and a method at a neighbour's rate looks broken. The ranges below are where to look.

## How to read the tables

- **Bits** are the widths of the base that a method trains on. 16 is the unquantized base, which is 32 on a CPU.
- **Models** are those whose sequence classifiers it can be put on.
- **Merges** says whether the trained adapter can be folded into the base, which then costs nothing extra to serve.
- **Layers** says whether it can be kept to the last layers: `all-linear:last-4`, or `last-4` where it has no groups.
- **Learning rate** is the range worth searching, logarithmic.
- **Writes base** says when a trial needs a copy of all base weights instead of sharing those that stay resident.
"""

_CLOSING = """\
## Methods of your own

A method is one `Method` (autopeft/methods/base.py says what its fields mean). In a distribution of your own, an entry
point makes it a row of the table, for the command line, search spaces and workers alike; a tuple adds several at once:

    [project.entry-points."{group}"]
    toy = "peft_toys.methods:TOY"

Its module should import torch inside functions only. `autopeft.testing.MethodContract` holds it to what every method
here is held to, and `autopeft methods` says which distribution a method comes from.
"""

_ADVICE: tuple[tuple[str, str], ...] = (
    (
        "No reason to do otherwise",
        "[LoRA](#lora) on all linear layers: nearly every tool loads it, it merges, and the others have to beat it.",
    ),
    ("The base hardly fits the GPU", "a method that has 4 among its bits; [QLoRA](#qlora) is the recipe for it."),
    (
        "Many adapters to store or to swap",
        "[scaling](#scaling), [sparse and spectral](#sparse-and-spectral), or the low-rank methods that train vectors "
        "beside frozen random matrices ([VeRA](#vera), [Uni-LoRA](#unilora)): a small share of LoRA's parameters.",
    ),
    (
        "No extra latency",
        "whatever merges. Adapters and soft prompts do not; a soft prompt also takes room in the context.",
    ),
    (
        "Many tasks on one served base",
        "a [soft prompt](#soft-prompt): it changes what the model reads and not the model, so one batch may mix tasks.",
    ),
    (
        "What the base knows has to be kept",
        "[orthogonal](#orthogonal) methods, which turn weights instead of adding to them.",
    ),
    (
        "Quality at any price",
        "[full fine-tuning](#full), which also tells how much the others leave behind.",
    ),
)

_FAMILIES: dict[Family, str] = {
    "low-rank": (
        "The update of a weight matrix is a product of small ones, so it has a fraction of the matrix's parameters and "
        "can be added to the matrix in the end. The rank sets the capacity. LoRA's relatives change how the product is "
        "made (elementwise, by Kronecker factors, in blocks), what is trained of it (vectors beside frozen matrices), "
        "or how its scale is learnt."
    ),
    "full and selective": (
        "Weights of the base are trained themselves: all of them, or only the biases or the normalisations. Nothing is "
        "added, so the result is a model like the base."
    ),
    "adapter": (
        "Small networks between or beside the layers of the base. They are nonlinear, so they cannot be folded into "
        "it, and those in series cost some latency."
    ),
    "soft prompt": (
        "Vectors that are read before the text: as embeddings in front of the input, or as keys and values in front of "
        "those of every layer. The base is untouched. They need high learning rates and more steps than other methods, "
        "and what they add to the input is paid for in every answer."
    ),
    "scaling": (
        "Activations are rescaled or rotated by trained vectors: very few parameters, almost no memory beside the "
        "base, for tasks close to what the base can do."
    ),
    "orthogonal": (
        "Weights are multiplied by trained orthogonal matrices, or updated in directions orthogonal to the base's own. "
        "This is meant to keep what the base has learnt, and usually takes more computing a step than an added update."
    ),
    "sparse and spectral": (
        "Few numbers are trained, and each reaches far: entries of the matrix itself, or coefficients of a transform "
        "from which the whole update is computed. The update is not confined to a low rank."
    ),
}

_SPECIAL = re.compile(
    r"`[^`]*`"
    r"|(?:arXiv:)?\b(?P<number>\d{4}\.\d{4,5})\b"
    r"|(?:https?://)?\b(?P<address>(?:[a-z0-9-]+\.)+[a-z]{2,}/[^\s,;()]*[^\s,;().])"
)
_COLUMNS = ("Method", "Bits", "Models", "Merges", "Layers", "Learning rate", "Writes base")


def render_document(methods: Iterable[Method], excluded: Mapping[str, str]) -> str:
    methods = list(methods)
    advice = "\n".join(f"- **{need}:** {answer}" for need, answer in _ADVICE)
    parts = [_OPENING.format(command=COMMAND, number=sum(method.searched for method in methods), advice=advice)]
    for family, words in _FAMILIES.items():
        members = [method for method in methods if method.family == family]
        parts.append(f"## {family.capitalize()}\n\n{words}\n\n{_table(_COLUMNS, map(_row, members))}")
        parts += [_section(method) for method in members]
    if excluded:
        rows = [(f"`{name}`", to_markdown(reason)) for name, reason in sorted(excluded.items())]
        parts.append(f"## What peft has besides\n\n{_table(('Type', 'Why it is no method here'), rows)}")
    return "\n".join([*parts, _CLOSING.format(group=ENTRY_POINT_GROUP)])


def _row(method: Method) -> tuple[str, ...]:
    return (
        f"[{_escape(method.title)}](#{method.name})",
        format_bits(method),
        format_models(method),
        "yes" if method.merges else "no",
        "last-k" if method.layer_choice else "all",
        format_rates(method),
        _escape(format_base_writes(method)),
    )


def _section(method: Method) -> str:
    recipe = method.recipe
    where = f"on `{recipe.target_modules}`, " if recipe.target_modules else ""
    settings = ", ".join(f"`{name}` {_escape(format_value(value))}" for name, value in recipe.settings.items())
    blocks = [
        # An anchor of its own, so that links do not depend on how a site makes them of titles.
        f'<a id="{method.name}"></a>',
        f"### {_escape(method.title)}",
        f"`{method.name}`, {to_markdown(method.paper)}. {_tell_builder(method)}",
        _tell_use(method),
        *([_table(("Dimension", "Range", "Default", "Meaning"), map(_dimension, method.dimensions))]
          if method.dimensions else []),
        f"Recipe: {settings + ', ' if settings else ''}{where}learning rate {format_rate(recipe.learning_rate)}. "
        f"Source: {to_markdown(recipe.source)}.\n",
    ]  # fmt: skip
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"


def _tell_builder(method: Method) -> str:
    if method.peft is None:
        return f"Built by autopeft. {to_markdown(method.why_not_peft)}"
    return f"Built by peft from a `{find_peft_class(method)}`."


def _tell_use(method: Method) -> str:
    sentences = []
    if not method.searched:
        sentences.append("The baseline: every study trains it, and no search space offers it.")
    if method.target_modules:
        sentences.append(f"Goes on {_join([f'`{group}`' for group in method.target_modules], 'or')}.")
    if not method.starts_as_base:
        sentences.append("Before the first step the model's answers already differ from the base's.")
    if method.optimizers != ("adamw",):
        sentences.append(f"Optimizers: {_join([f'`{name}`' for name in method.optimizers], 'or')}.")
    if method.needs:
        sentences.append(f"Needs: {to_markdown(method.needs).rstrip('.')}.")
    return " ".join(sentences)


def _dimension(dimension: Dimension) -> tuple[str, ...]:
    meaning = ", ".join(filter(None, [dimension.meaning, format_condition(dimension)]))
    return (
        f"`{dimension.name}`",
        _escape(format_range(dimension)),
        _escape(format_value(dimension.default)),
        to_markdown(meaning),
    )


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells) + "\n"


def _join(words: Sequence[str], last: str) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} {last} {words[-1]}"


def to_markdown(text: str) -> str:
    """Escaped, with papers and addresses as links. `code` stays code."""
    parts = []
    end = 0
    for found in _SPECIAL.finditer(text):
        parts.append(_escape(text[end : found.start()]))
        parts.append(_link(found))
        end = found.end()
    return "".join([*parts, _escape(text[end:])])


def _link(found: re.Match[str]) -> str:
    if found["number"]:
        return f"[arXiv:{found['number']}](https://arxiv.org/abs/{found['number']})"
    if found["address"]:
        return f"[{_escape(found['address'])}](https://{found['address']})"
    return found[0]


def _escape(text: str) -> str:
    """As Markdown shows it literally, inside a table too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\*|\[\]_])", r"\\\1", text)


if __name__ == "__main__":
    from autopeft.methods import METHODS
    from autopeft.methods.excluded import LEFT_OUT

    print(render_document(METHODS.shipped.values(), LEFT_OUT), end="")
