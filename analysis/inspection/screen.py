"""What `curvature inspect` shows on a terminal."""

from __future__ import annotations

from rich.table import Table

from analysis.inspection.results import Inspection
from analysis.records.measured import Measured
from analysis.show import wording
from analysis.show.screen import Screen, new_table

__all__ = ["show_inspection"]


def show_inspection(screen: Screen, inspection: Inspection) -> None:
    """Print all numbers with their uncertainties, the whole first and then layer by layer."""
    screen.say(_key_numbers(inspection))
    screen.say(_extreme_eigenvalues(inspection))
    if inspection.layers:
        screen.say(_layers(inspection))
    cost = inspection.cost
    layers = f" and {wording.count(cost.num_layer_matvecs)} with single layers" if cost.num_layer_matvecs else ""
    screen.say(
        f"spent: {wording.count(cost.num_matvecs)} Hessian products{layers}, {wording.duration(cost.seconds)}, "
        f"{wording.memory(cost.peak_bytes)}"
    )


def _key_numbers(inspection: Inspection) -> Table:
    table = new_table("\nCurvature", "", "value ± uncertainty", "other data", "")
    table.columns[3].justify = "left"
    rows = (
        ("loss", wording.number(inspection.loss), "", f"mean over {wording.count(inspection.total_weight)} terms"),
        ("gradient norm", wording.number(inspection.gradient_norm), "", "zero at a stationary point"),
        ("largest eigenvalue", *_both(inspection.sharpness), "sharpness λ"),
        ("smallest eigenvalue", *_both(inspection.lowest), "negative: no minimum"),
        ("trace", *_both(inspection.total_curvature), "sum of all eigenvalues"),
        *_exact_trace(inspection),
        ("effective condition number", *_both(inspection.effective_condition), "λ / mean of |λ|"),
        (
            "negative-curvature share",
            wording.share(inspection.negative_share),
            wording.over_data(inspection.negative_share, percent=True),
            "of the sum of |λ|",
        ),
        ("largest stable step", *_both(inspection.max_stable_lr), "2 / λ, plain gradient descent"),
    )
    for row in rows:
        table.add_row(*row)
    if inspection.data is not None:
        table.caption = (
            f"other data: one standard error over data of the same size, from {inspection.data.num_groups} groups"
        )
        table.caption_justify = "left"
    return table


def _exact_trace(inspection: Inspection) -> list[tuple[str, str, str, str]]:
    if inspection.diagonal is None or not inspection.diagonal.exact or inspection.exact:
        return []
    return [("trace, exactly", wording.number(inspection.diagonal.trace, 5), "", "from every entry of the diagonal")]


def _both(measured: Measured) -> tuple[str, str]:
    return wording.quantity(measured), wording.over_data(measured)


def _extreme_eigenvalues(inspection: Inspection) -> Table:
    table = new_table("\nEigenvalues", "rank", "eigenvalue", "residual", "")
    for rank, value, residual, converged in inspection.extreme_eigenvalues():
        row = (wording.count(rank), wording.number(value, 5), wording.number(residual, 2))
        table.add_row(*row, "" if converged else "not converged")
    return table


def _layers(inspection: Inspection) -> Table:
    columns = ("layer", "parameters", "gradient", "largest λ", "smallest λ", "trace", "condition", "negative")
    table = new_table("\nLayers", *columns)
    for layer in inspection.layers:
        table.add_row(
            layer.name + ("" if layer.converged else " (not converged)"),
            wording.count(layer.num_params),
            wording.number(layer.gradient_norm, 3),
            wording.quantity(Measured(value=layer.top, stderr=layer.top_residual)),
            wording.quantity(Measured(value=layer.bottom, stderr=layer.bottom_residual)),
            wording.quantity(layer.trace),
            wording.quantity(layer.effective_condition),
            wording.share(layer.negative_share),
        )
    return table
