"""What the figures share: plain plotly dictionaries, so that nothing heavy is imported and the page stays small.

Colours that differ between the light and the dark page are written as `@ink`, `@muted`, `@line`, `@paper` and resolved
by `page.js` from the style sheet.
"""

from __future__ import annotations

import math
from typing import Any

from autopeft.report.hover import escape
from autopeft.report.words import is_fraction, title_scorer

Figure = dict[str, Any]
"""{"data": traces, "layout": layout} as plotly.js takes it."""

CLEAR = "rgba(0,0,0,0)"


def compact(value: float) -> float | None:
    """Five significant digits, more than a screen shows; None, which leaves a gap, for what is not finite."""
    return float(f"{value:.5g}") if math.isfinite(value) else None


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {
        "title": {"text": escape(title), "font": {"size": 13, "color": "@muted"}, "standoff": 12},
        "tickfont": {"size": 12, "color": "@muted"},
        "gridcolor": "@line",
        "zeroline": False,
        "automargin": True,
        **more,
    }


def quality_axis(scorer: str, **more: Any) -> dict[str, Any]:
    ticks = ",.3~%" if is_fraction(scorer) else ".3~f"
    return axis(f"Search-validation {title_scorer(scorer)}", tickformat=ticks, **more)


def layout(x: dict[str, Any], y: dict[str, Any], height: int, **more: Any) -> dict[str, Any]:
    return {
        "xaxis": x,
        "yaxis": y,
        "height": height,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 44},
        "paper_bgcolor": CLEAR,
        "plot_bgcolor": CLEAR,
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": "@ink"},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "@paper",
            "bordercolor": "@muted",
            "align": "left",
            "font": {"color": "@ink", "size": 12},
        },
        "showlegend": False,
        **more,
    }


def reference_line(y: float, text: str, *, above: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """A shape across the figure at `y`, and its label at the right edge."""
    shape = {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "layer": "below",
        "line": {"color": "@muted", "width": 1.2, "dash": "dot"},
    }
    label = {
        "xref": "paper",
        "x": 1,
        "y": y,
        "text": escape(text),
        "showarrow": False,
        "xanchor": "right",
        "yanchor": "bottom" if above else "top",
        "font": {"size": 12, "color": "@muted"},
        "bgcolor": "@paper",
        "borderpad": 1,
    }
    return shape, label
