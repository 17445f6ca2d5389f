"""What of the contract is run every day."""

from __future__ import annotations

import pytest

from autopeft.methods import METHODS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves bases of 8 bits to the slow run where a method takes 4, which by the same library show what it does to
    layers that are not plain linear ones."""
    for item in items:
        function, _, case = item.name.partition("[")
        method = case.partition("-")[0]
        if function in _BY_WIDTH and case.endswith("-8]") and method in METHODS and 4 in METHODS[method].bits:
            item.add_marker(pytest.mark.slow)


_BY_WIDTH = ("test_a_quantized_base_trains_and_stays_as_it_was", "test_its_memory_is_estimated_without_weights")
