"""What all reports share: templates, and figures as inline SVG that take colours and fonts from the page.

Colours in the figures are CSS variables, so that they follow the reader's light or dark scheme; each figure is drawn
twice, for wide and for narrow windows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from analysis.show import wording
from analysis.show.drawing import Colors

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup
    from matplotlib.figure import Figure as Canvas

    from analysis.show.report import Figure, Surface

__all__ = ["COLORS", "NARROW", "WIDE", "figure_html", "panels", "surface_html", "surface_panel", "templates"]

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
    environment.filters |= {"count": wording.count, "duration": wording.duration, "prose": wording.prose}
    environment.filters["unbroken"] = _unbroken
    return environment


def _unbroken(text: str) -> Markup:
    """Return a sentence as HTML in which no line ends within a quantity or a formula."""
    from markupsafe import Markup, escape

    pattern = r"(\([^()\s]+ ± [^()\s]+\)\S*|\S+ ± [^\s,;)]+|\S*\d/λ|\|λ\|)"
    return Markup(re.sub(pattern, r'<span class="unbroken">\1</span>', str(escape(text))))


def figure_html(figure: Figure, colors: Colors) -> Markup:
    """Return a figure as HTML: a wide and a narrow rendering; the page shows one of them."""
    from markupsafe import Markup

    def drawn(kind: str, height: float) -> str:
        wide = kind == "wide"
        size = (WIDE if wide else NARROW, height)
        return svg(f"{figure.name}-{kind}", figure.label, lambda f: panels(f, figure, colors, wide=wide), size)

    tall = max(2.9 * figure.panels, figure.height) if figure.narrow_height is None else figure.narrow_height
    return Markup(drawn("wide", figure.height) + drawn("narrow", tall))  # made here, of numbers and escaped names


def panels(canvas: Canvas, figure: Figure, colors: Colors, *, wide: bool) -> None:
    """Draw a figure: its panels side by side if there is room, else one below the other."""
    if figure.panels == 1:
        figure.draw(canvas.subplots(), colors)
    else:
        shape = (1, figure.panels) if wide else (figure.panels, 1)
        figure.draw(list(canvas.subplots(*shape, sharey=wide and figure.share_y).flat), colors)


def surface_panel(surface: Surface, canvas: Canvas) -> None:
    """Draw a surface as it lies on paper."""
    surface.draw(canvas.add_subplot(projection="3d"))


def surface_html(surface: Surface) -> Markup:
    """Return a picture of a surface, for where there are no scripts."""
    from markupsafe import Markup

    still = svg("surface-wide", surface.label, partial(surface_panel, surface), (WIDE, 5.0))
    return Markup(still.replace('class="wide"', 'class="still"', 1))


def svg(name: str, label: str, draw: Callable[[Any], object], size: tuple[float, float]) -> str:
    """Draw a figure and return it as an SVG element that takes colours and fonts from the page."""
    import matplotlib as mpl
    from markupsafe import escape
    from matplotlib.figure import Figure as Canvas

    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Canvas(figsize=size, layout="constrained")
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
