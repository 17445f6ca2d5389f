"""What of the contract is run every day."""

from __future__ import annotations

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leaves bases of 8 bits to the slow run: 4, by the same library, shows what a method does to layers that are not
    plain linear ones."""
    for item in items:
        function, _, case = item.name.partition("[")
        if function in _BY_WIDTH and case.endswith("-8]"):
            item.add_marker(pytest.mark.slow)


_BY_WIDTH = ("test_a_quantized_base_trains_and_stays_as_it_was", "test_its_memory_is_estimated_without_weights")
