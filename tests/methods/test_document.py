"""docs/methods.md says what the table of methods says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import autopeft
from autopeft.methods import METHODS
from autopeft.methods.document import COMMAND, render_document, to_markdown
from autopeft.methods.excluded import LEFT_OUT

PAGE = Path(autopeft.__file__).parent.parent / "docs" / "methods.md"


@pytest.fixture(scope="module")
def page() -> str:
    return render_document(METHODS.shipped.values(), LEFT_OUT)


def test_the_page_is_up_to_date(page: str) -> None:
    assert PAGE.read_text(encoding="utf-8") == page, f"Write it again: {COMMAND}"


def test_every_method_and_every_dimension_is_on_the_page(page: str) -> None:
    for method in METHODS.shipped.values():
        section = page.partition(f'<a id="{method.name}"></a>')[2].partition("<a id=")[0]
        assert f"`{method.name}`" in section
        assert [d.name for d in method.dimensions if f"| `{d.name}` |" not in section] == []


def test_every_link_inside_the_page_leads_somewhere(page: str) -> None:
    anchors = set(re.findall(r'<a id="([^"]+)">', page))
    anchors |= {title.lower().replace(" ", "-") for title in re.findall(r"^##? (.+)$", page, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors


def test_every_table_has_rows_of_one_width(page: str) -> None:
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


def test_papers_and_addresses_are_links_and_other_marks_are_shown_as_they_are() -> None:
    assert to_markdown("see arXiv:2106.09685 (DoRA 2402.09353)") == (
        "see [arXiv:2106.09685](https://arxiv.org/abs/2106.09685) "
        "(DoRA [arXiv:2402.09353](https://arxiv.org/abs/2402.09353))"
    )
    assert to_markdown("at doi.org/10.1/a_b.") == r"at [doi.org/10.1/a\_b](https://doi.org/10.1/a_b)."
    assert to_markdown("a|b *c* `d|e` f_g <h>") == r"a\|b \*c\* `d|e` f\_g &lt;h>"
