"""One colour and one shape a method, the same in every figure, card and table of a page."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

# Okabe and Ito's colour-blind safe palette (jfly.uni-koeln.de/color), its yellow and black left out because neither
# is legible on both a white and a black page, an olive and a grey in their place, its blue lightened likewise.
COLOURS = ("#1f7fc1", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9", "#8f8b21", "#8a8f98")

# Plotly's symbol names, with the same shape as an SVG path in a box from -6 to 6 for legends outside the figures.
SHAPES = {
    "circle": "M-5,0A5,5 0 1,1 5,0A5,5 0 1,1 -5,0Z",
    "square": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "diamond": "M0,-6L6,0L0,6L-6,0Z",
    "triangle-up": "M0,-5.5L5.5,4.5H-5.5Z",
    "triangle-down": "M0,5.5L5.5,-4.5H-5.5Z",
    "pentagon": "M0,-5.5L5.5,-1.5L3.4,5H-3.4L-5.5,-1.5Z",
    "hexagon": "M-3,-5.2H3L6,0L3,5.2H-3L-6,0Z",
    "star": "M0,-6L1.6,-2.1L5.7,-1.9L2.5,0.9L3.5,4.9L0,2.6L-3.5,4.9L-2.5,0.9L-5.7,-1.9L-1.6,-2.1Z",
}


class Mark(NamedTuple):
    """How a method is drawn."""

    place: int
    """Counts the page's methods from 0."""
    colour: str
    symbol: str

    @property
    def path(self) -> str:
        return SHAPES[self.symbol]


def mark_methods(methods: Iterable[str]) -> dict[str, Mark]:
    """A mark for each method, in alphabetical order; 64 methods before one repeats."""
    symbols = list(SHAPES)
    marks = {}
    for index, method in enumerate(sorted(set(methods))):
        turn, place = divmod(index, len(COLOURS))
        marks[method] = Mark(index, COLOURS[place], symbols[(place + turn) % len(symbols)])
    return marks
