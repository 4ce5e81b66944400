"""The report of a run: one HTML file that needs nothing beside it, made from a run folder alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.inspection.figures import plot_eigenvalues, plot_layers, plot_spectral_density
from analysis.inspection.figures_layers import plot_layer_coupling, plot_layer_diagonals
from analysis.inspection.figures_low_rank import plot_low_rank_error
from analysis.inspection.findings import findings
from analysis.inspection.record import Run, load_run
from analysis.inspection.results import Inspection, LayerCoupling, LayerCurvature, LayerDiagonals
from analysis.records.measured import Measured
from analysis.run.saving import write_text
from analysis.show import wording
from analysis.show.page import COLORS, NARROW, WIDE, svg, templates, two_sizes

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.figure import Figure

__all__ = ["build_report", "write_report"]


def write_report(folder: Path) -> Path:
    """Write report.html into a run folder and return its path. Nothing but the folder is needed."""
    path = folder / "report.html"
    write_text(path, build_report(load_run(folder)))
    return path


def build_report(run: Run) -> str:
    """Return the report of a run as one self-contained HTML page."""
    inspection = run.inspection
    return (
        templates()
        .get_template("report.html")
        .render(
            run=run,
            inspection=inspection,
            cards=_cards(inspection),
            findings=findings(inspection),
            eigenvalues=_eigenvalue_rows(inspection),
            figures=_figures(inspection),
            estimated_traces={layer.name: layer.trace for layer in inspection.layers},
            total_trace=sum(layer.trace.value for layer in inspection.layers),
            Measured=Measured,
        )
    )


# -- what stands in it ------------------------------------------------------------------------------------------------


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
        ("Trace", wording.value_and_error(inspection.total_curvature), _hint_of_trace(inspection)),
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


def _hint_of_trace(inspection: Inspection) -> str:
    if inspection.diagonal is None or not inspection.diagonal.exact or inspection.exact:
        return "sum of all eigenvalues"
    return f"sum of all eigenvalues; {wording.number(inspection.diagonal.trace, 5)} exactly"


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
        "density": two_sizes(
            "density",
            f"Spectral density: a smoothed count of the {n} eigenvalues on a logarithmic scale, from {low} to {top}; "
            f"{wording.share(i.negative_share)} of the absolute curvature is negative.",
            lambda ax: plot_spectral_density(i.density, top=i.top, bottom=i.bottom, data=i.data, ax=ax, colors=COLORS),
            height=3.3,
        ),
        "eigenvalues": two_sizes(
            "eigenvalues",
            "The largest and the smallest eigenvalues by rank, with residuals; the table below has the numbers.",
            lambda ax: plot_eigenvalues(i.top, i.bottom, num_params=i.num_params, data=i.data, ax=ax, colors=COLORS),
            height=2.6,
        ),
    }
    figures["low_rank"] = two_sizes(
        "low-rank",
        f"Relative error of the best low-rank approximations by rank, from 1 to {n}.",
        lambda ax: plot_low_rank_error(i.low_rank, ax=ax, colors=COLORS),
        height=2.6,
    )
    if i.layers:
        figures["layers"] = _layers_figure(i.layers)
    if i.diagonal is not None:
        figures["diagonal"] = _diagonal_figure(i.diagonal)
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
        return plot_layers(layers, axes=list(figure.subplots(rows, columns, sharey=columns == 2).flat), colors=COLORS)

    panel = 1.0 + 0.24 * len(layers)
    wide = svg("layers-wide", label, lambda figure: draw(figure, 1, 2), (WIDE, panel))
    narrow = svg("layers-narrow", label, lambda figure: draw(figure, 2, 1), (NARROW, 2 * panel - 0.2))
    return Markup(wide + narrow)  # made here, of numbers and escaped names


def _diagonal_figure(diagonal: LayerDiagonals) -> Markup:
    medians = ", ".join(f"{row.name} {row.quantiles[2]:.2g}" for row in diagonal.rows)
    label = f"How the diagonal entries of each layer are spread; medians: {medians}."
    height = 1.1 + 0.24 * len(diagonal.rows)
    return two_sizes("diagonal", label, lambda ax: plot_layer_diagonals(diagonal, ax=ax, colors=COLORS), height=height)


def _coupling_figure(coupling: LayerCoupling) -> Markup:
    from markupsafe import Markup

    strongest = float(coupling.relative.fill_diagonal_(0).nan_to_num(posinf=0).max())
    label = f"Coupling of layers as a table of shaded cells; the strongest between two layers is {strongest:.2f}."

    def draw(figure: Figure) -> object:
        return plot_layer_coupling(coupling, ax=figure.subplots(), colors=COLORS)

    side = 1.2 + 0.45 * len(coupling.names)
    wide = svg("coupling-wide", label, draw, (WIDE, min(side, 0.8 * WIDE)))
    narrow = svg("coupling-narrow", label, draw, (NARROW, NARROW))
    return Markup(wide + narrow)  # made here, of numbers and escaped names
