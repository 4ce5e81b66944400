"""The report of a run: one HTML file that needs nothing beside it, made from a run folder alone.

Figures are inline SVG whose colours are CSS variables, so that they follow the reader's light or dark scheme; each is
drawn twice, for wide and for narrow windows.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis import wording
from analysis.drawing import Colors
from analysis.figures import plot_eigenvalues, plot_layers, plot_spectral_density
from analysis.figures_layers import plot_layer_coupling
from analysis.figures_low_rank import plot_low_rank_error
from analysis.results import Inspection, LayerCoupling, LayerCurvature, Measured
from analysis.store import Run, load_run

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["build_report", "write_report"]

# Colours no figure would use by itself, and the CSS variables that take their place.
_INK, _RULE = "#010203", "#010206"
_COLORS = Colors(positive="#010207", negative="#010208", outlier="#010209", quiet="#01020a")
_VARIABLES = {
    _INK: "--figure-ink",
    _RULE: "--figure-rule",
    _COLORS.positive: "--figure-positive",
    _COLORS.negative: "--figure-negative",
    _COLORS.outlier: "--figure-outlier",
    _COLORS.quiet: "--figure-quiet",
}
_STYLE: Any = {
    "axes.edgecolor": _INK,
    "axes.facecolor": "none",
    "axes.labelcolor": _INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.linewidth": 0.6,
    "axes.unicode_minus": True,
    "figure.facecolor": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "grid.color": _RULE,
    "hatch.linewidth": 0.5,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
}
_WIDE, _NARROW = 7.2, 3.5  # inches


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder and return its path. Nothing but the folder is needed."""
    path = folder / "report.html"
    path.write_text(build_report(load_run(folder)), encoding="utf-8")
    return path


def build_report(run: Run) -> str:
    """Return the report of a run as one self-contained HTML page."""
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
    inspection = run.inspection
    return environment.get_template("report.html").render(
        run=run,
        inspection=inspection,
        cards=_cards(inspection),
        findings=wording.findings(inspection),
        eigenvalues=_eigenvalue_rows(inspection),
        figures=_figures(inspection),
        total_trace=sum(layer.trace.value for layer in inspection.layers),
        Measured=Measured,
    )


# -- what stands in it ------------------------------------------------------------------------------------------------


def _unbroken(text: str) -> Markup:
    """Return a sentence as HTML in which no line ends within a quantity or a formula."""
    from markupsafe import Markup, escape

    pattern = r"(\([^()\s]+ ± [^()\s]+\)\S*|\S+ ± [^\s,;)]+|\S*\d/λ|\|λ\|)"
    return Markup(re.sub(pattern, r'<span class="unbroken">\1</span>', str(escape(text))))


def _cards(inspection: Inspection) -> list[dict[str, str]]:
    """Return the key numbers: label, value, uncertainty and what the number is, in a phrase."""
    i = inspection
    entries: list[tuple[str, tuple[str, str], str]] = [
        (
            "Loss",
            (wording.number(inspection.loss), "exact"),
            f"mean over {wording.count(inspection.total_weight)} terms",
        ),
        ("Gradient norm", (wording.number(inspection.gradient_norm), "exact"), "zero at a stationary point"),
        ("Sharpness", wording.value_and_error(inspection.sharpness), "largest eigenvalue λ of the Hessian"),
        ("Smallest eigenvalue", wording.value_and_error(inspection.lowest), "below zero: no strict minimum"),
        ("Trace", wording.value_and_error(inspection.total_curvature), "sum of all eigenvalues"),
        ("Effective condition", wording.value_and_error(inspection.effective_condition), "λ over the mean of |λ|"),
        (
            "Negative curvature",
            wording.value_and_error(inspection.negative_share, percent=True),
            "share of the sum of |λ|",
        ),
        ("Largest stable step", wording.value_and_error(inspection.max_stable_lr), "2/λ, plain gradient descent"),
    ]
    moves = {
        "Sharpness": wording.over_data(i.sharpness),
        "Smallest eigenvalue": wording.over_data(i.lowest),
        "Trace": wording.over_data(i.total_curvature),
        "Effective condition": wording.over_data(i.effective_condition),
        "Negative curvature": wording.over_data(i.negative_share, percent=True),
        "Largest stable step": wording.over_data(i.max_stable_lr),
    }
    return [
        {"label": label, "value": value, "error": error, "hint": hint, "data": moves.get(label, "")}
        for label, (value, error), hint in entries
    ]


def _eigenvalue_rows(inspection: Inspection) -> list[dict[str, Any]]:
    """Return the extreme eigenpairs by rank, with a row without entries where ranks are left out."""
    rows: list[dict[str, Any]] = []
    before = 0
    moves = _moves_by_rank(inspection)
    for rank, value, residual, converged in inspection.extreme_eigenvalues():
        if rank > before + 1:
            rows.append({"gap": rank - before - 1})
        rows.append({"gap": 0, "rank": rank, "value": value, "residual": residual, "converged": converged})
        rows[-1]["data"] = moves.get(rank)
        before = rank
    return rows


def _moves_by_rank(inspection: Inspection) -> dict[int, float]:
    """Return how far other data would move each of the extreme eigenvalues, by its rank."""
    if inspection.data is None:
        return {}
    last = inspection.num_params - len(inspection.data.bottom)
    moves = {last + i: move for i, move in enumerate(inspection.data.bottom.tolist(), start=1)}
    return moves | dict(enumerate(inspection.data.top.tolist(), start=1))


# -- figures ----------------------------------------------------------------------------------------------------------


def _figures(inspection: Inspection) -> dict[str, Markup]:
    """Return every figure as HTML: a wide and a narrow rendering, of which the page's style shows one."""
    i = inspection
    top, low, n = wording.quantity(i.sharpness), wording.quantity(i.lowest), wording.count(i.num_params)
    figures = {
        "density": _two_sizes(
            "density",
            f"Spectral density: a smoothed count of the {n} eigenvalues on a logarithmic scale, from {low} to {top}; "
            f"{wording.share(i.negative_share)} of the absolute curvature is negative.",
            lambda ax: plot_spectral_density(i.density, top=i.top, bottom=i.bottom, data=i.data, ax=ax, colors=_COLORS),
            height=3.3,
        ),
        "eigenvalues": _two_sizes(
            "eigenvalues",
            "The largest and the smallest eigenvalues by rank, with residuals; the table below has the numbers.",
            lambda ax: plot_eigenvalues(i.top, i.bottom, num_params=i.num_params, data=i.data, ax=ax, colors=_COLORS),
            height=2.6,
        ),
    }
    figures["low_rank"] = _two_sizes(
        "low-rank",
        f"Relative error of the best low-rank approximations by rank, from 1 to {n}.",
        lambda ax: plot_low_rank_error(i.low_rank, ax=ax, colors=_COLORS),
        height=2.6,
    )
    if i.layers:
        figures["layers"] = _layers_figure(i.layers)
    if i.coupling is not None:
        figures["coupling"] = _coupling_figure(i.coupling)
    return figures


def _layers_figure(layers: tuple[LayerCurvature, ...]) -> Markup:
    """Return the two panels side by side for wide windows, one below the other for narrow ones."""
    from markupsafe import Markup

    total = sum(layer.trace.value for layer in layers) or 1.0
    shares = ", ".join(f"{layer.name} {100 * layer.trace.value / total:.0f} %" for layer in layers)
    label = f"Share of the trace by layer ({shares}), and the extreme eigenvalues of each layer's own block."

    def draw(figure: Figure, rows: int, columns: int) -> object:
        return plot_layers(layers, axes=list(figure.subplots(rows, columns, sharey=columns == 2).flat), colors=_COLORS)

    panel = 1.0 + 0.24 * len(layers)
    wide = _svg("layers-wide", label, lambda figure: draw(figure, 1, 2), (_WIDE, panel))
    narrow = _svg("layers-narrow", label, lambda figure: draw(figure, 2, 1), (_NARROW, 2 * panel - 0.2))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def _coupling_figure(coupling: LayerCoupling) -> Markup:
    from markupsafe import Markup

    strongest = float(coupling.relative.fill_diagonal_(0).nan_to_num(posinf=0).max())
    label = f"Coupling of layers as a table of shaded cells; the strongest between two layers is {strongest:.2f}."

    def draw(figure: Figure) -> object:
        return plot_layer_coupling(coupling, ax=figure.subplots(), colors=_COLORS)

    side = 1.2 + 0.45 * len(coupling.names)
    wide = _svg("coupling-wide", label, draw, (_WIDE, min(side, 0.8 * _WIDE)))
    narrow = _svg("coupling-narrow", label, draw, (_NARROW, _NARROW))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def _two_sizes(name: str, label: str, draw: Callable[[Axes], object], *, height: float) -> Markup:
    from markupsafe import Markup

    wide = _svg(f"{name}-wide", label, lambda figure: draw(figure.subplots()), (_WIDE, height))
    narrow = _svg(f"{name}-narrow", label, lambda figure: draw(figure.subplots()), (_NARROW, max(2.9, height)))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def _svg(name: str, label: str, draw: Callable[[Figure], object], size: tuple[float, float]) -> str:
    """Draw a figure and return it as an SVG element that takes colours and fonts from the page."""
    import matplotlib as mpl
    from markupsafe import escape
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
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
