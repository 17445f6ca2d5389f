"""Line charts as small SVG files, written by hand: nothing to install, and a diff that can be read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 800, 400, 60, 230, 36, 48
_COLOURS = ("#000000", "#0072b2", "#56b4e9", "#d55e00", "#cc79a7", "#009e73", "#e69f00", "#999999", "#8c564b")
"""Okabe and Ito's, told apart by colour-blind readers too, and one more."""


def draw_lines(
    title: str,
    x_label: str,
    y_label: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
) -> str:
    """x is logarithmic. Points below `y_range` are drawn on its lower edge; the first line is drawn thicker."""

    def x_of(x: float) -> float:
        low, high = (math.log(value) for value in x_range)
        return _LEFT + (math.log(x) - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT)

    def y_of(y: float) -> float:
        share = (min(max(y, y_range[0]), y_range[1]) - y_range[0]) / (y_range[1] - y_range[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="14">{escape(title)}</text>',
        f'<text x="{(_LEFT + right) / 2:.0f}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text transform="translate(16 {(_TOP + bottom) / 2:.0f}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>",
    ]
    for x in x_ticks:
        parts.append(f'<line x1="{x_of(x):.1f}" y1="{_TOP}" x2="{x_of(x):.1f}" y2="{bottom}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{x_of(x):.1f}" y="{bottom + 16}" text-anchor="middle">{_share(x)}</text>')
    for y in y_ticks:
        parts.append(f'<line x1="{_LEFT}" y1="{y_of(y):.1f}" x2="{right}" y2="{y_of(y):.1f}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for number, (name, points) in enumerate(lines.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        width = 2.8 if number == 0 else 1.6
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        y = _TOP + 14 + 18 * number
        parts.append(f'<line x1="{right + 12}" y1="{y - 4}" x2="{right + 32}" y2="{y - 4}" stroke="{colour}" '
                     f'stroke-width="{width}"/>')  # fmt: skip
        parts.append(f'<text x="{right + 38}" y="{y}">{escape(name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def _share(x: float) -> str:
    return "1" if x == 1 else f"1/{round(1 / x)}"
