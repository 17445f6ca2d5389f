"""What of the contract is run every day."""

from __future__ import annotations

import pytest

from autopeft.methods import METHODS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves to the slow run bases of 8 bits, and for memory of 32, where a method takes 4 as well: those show what it
    does to layers that are not plain linear ones."""
    for item in items:
        function, _, case = item.name.partition("[")
        method = case.partition("-")[0]
        width = case.rpartition("-")[2].rstrip("]")
        if width in _BY_WIDTH.get(function, ()) and method in METHODS and 4 in METHODS[method].bits:
            item.add_marker(pytest.mark.slow)


_BY_WIDTH = {
    "test_a_quantized_base_trains_and_stays_as_it_was": ("8",),
    "test_its_memory_is_estimated_without_weights": ("8", "32"),
}
