"""What all reports share: templates, and figures as inline SVG that take colours and fonts from the page.

Colours in the figures are CSS variables, so that they follow the reader's light or dark scheme; each figure is drawn
twice, for wide and for narrow windows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from analysis.show import wording
from analysis.show.drawing import Colors

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLORS", "NARROW", "STYLE", "WIDE", "svg", "templates", "two_sizes"]

# Colours no figure would use by itself, and the CSS variables that take their place.
INK, RULE = "#010203", "#010206"
COLORS = Colors(positive="#010207", negative="#010208", outlier="#010209", quiet="#01020a")
_VARIABLES = {
    INK: "--figure-ink",
    RULE: "--figure-rule",
    COLORS.positive: "--figure-positive",
    COLORS.negative: "--figure-negative",
    COLORS.outlier: "--figure-outlier",
    COLORS.quiet: "--figure-quiet",
}
STYLE: Any = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "grid.color": RULE,
    "hatch.linewidth": 0.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
WIDE, NARROW = 7.2, 3.5  # inches


def templates() -> Environment:
    """Return the environment that the templates of reports are rendered in."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("analysis"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "count": wording.count,
        "duration": wording.duration,
        "memory": wording.memory,
        "number": wording.number,
        "quantity": wording.quantity,
        "prose": wording.prose,
        "unbroken": _unbroken,
        "share": wording.share,
    }
    return environment


def _unbroken(text: str) -> Markup:
    """Return a sentence as HTML in which no line ends within a quantity or a formula."""
    from markupsafe import Markup, escape

    pattern = r"(\([^()\s]+ ± [^()\s]+\)\S*|\S+ ± [^\s,;)]+|\S*\d/λ|\|λ\|)"
    return Markup(re.sub(pattern, r'<span class="unbroken">\1</span>', str(escape(text))))


def two_sizes(name: str, label: str, draw: Callable[[Axes], object], *, height: float) -> Markup:
    """Return a figure of one pair of axes as HTML: a wide and a narrow rendering; the page shows one of them."""
    from markupsafe import Markup

    wide = svg(f"{name}-wide", label, lambda figure: draw(figure.subplots()), (WIDE, height))
    narrow = svg(f"{name}-narrow", label, lambda figure: draw(figure.subplots()), (NARROW, max(2.9, height)))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def svg(name: str, label: str, draw: Callable[[Figure], object], size: tuple[float, float]) -> str:
    """Draw a figure and return it as an SVG element that takes colours and fonts from the page."""
    import matplotlib as mpl
    from markupsafe import escape
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    for pattern in (
        r"<metadata>.*?</metadata>\s*",
        r"<style.*?</style>\s*",
        r"<!--.*?-->\s*",
        r" font-family: [^;\"]*;?",
    ):
        svg = re.sub(pattern, "", svg, flags=re.DOTALL)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)  # matplotlib before 3.10
    svg = re.sub(r"<[^>]*>", _shortened, svg)
    svg = re.sub(r'\b(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    for color, variable in _VARIABLES.items():
        svg = svg.replace(color, f"var({variable})")
    view_box = re.search(r'viewBox="[^"]*"', svg)
    assert view_box is not None
    opening = f'<svg class="{name.rpartition("-")[2]}" role="img" aria-label="{escape(label)}" {view_box[0]}'
    return re.sub(r"<svg[^>]*>", opening + ' xmlns:xlink="http://www.w3.org/1999/xlink">', svg, count=1)


def _shortened(tag: re.Match[str]) -> str:
    """Return a tag with its coordinates cut to hundredths of a point, finer than any screen; text is left alone."""
    return re.sub(r"(\d\.\d{2})\d+", r"\1", tag[0])
