"""`curvature inspect`: the spectrum of the Hessian, as a whole and layer by layer, and what it tells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from analysis.inspection.figures import plot_eigenvalues, plot_layers, plot_spectral_density
from analysis.inspection.figures_layers import plot_layer_coupling, plot_layer_diagonals
from analysis.inspection.figures_low_rank import plot_low_rank_error
from analysis.inspection.findings import findings
from analysis.inspection.measure import inspect_model
from analysis.inspection.plan import InspectionPlan
from analysis.inspection.results import Inspection, LayerCoupling, LayerDiagonals
from analysis.records.measured import Measured
from analysis.run.study import Study, StudyRun
from analysis.show import wording
from analysis.show.page import NARROW, WIDE
from analysis.show.report import Card, Figure, Report, Section, Table

__all__ = ["STUDY", "InspectionRun"]


@dataclass(frozen=True, kw_only=True, repr=False)
class InspectionRun(StudyRun):
    """One inspection, with what produced it."""

    kind: ClassVar[str] = "inspect"
    result: ClassVar[str] = "inspection"

    inspection: Inspection
    """The results."""

    def report(self) -> Report:
        """Return the report of it."""
        found = self.inspection
        return Report(
            title="Curvature",
            facts=(f"{wording.count(found.cost.num_matvecs)} Hessian products",),
            cards=_cards(found),
            findings=findings(found),
            sections=_sections(found, self.settings),
            terms=_terms(found),
            method=_method(found),
            costs=(_costs(found),),
            notes=found.notes,
        )


# -- what it tells ----------------------------------------------------------------------------------------------------


def _cards(i: Inspection) -> tuple[Card, ...]:
    number, sum_ = wording.number, "sum of all eigenvalues"
    if i.diagonal is not None and i.diagonal.exact and not i.exact:
        sum_ += f"; {number(i.diagonal.trace, 5)} exactly"
    over = f"mean over {wording.count(i.total_weight)} terms"
    return (
        Card(label="Loss", value=number(i.loss), error="exact", hint=over),
        Card(label="Gradient norm", value=number(i.gradient_norm), error="exact", hint="zero at a stationary point"),
        Card.of("Sharpness", i.sharpness, "largest eigenvalue λ of the Hessian"),
        Card.of("Smallest eigenvalue", i.lowest, "below zero: no strict minimum"),
        Card.of("Trace", i.total_curvature, sum_),
        Card.of("Effective condition", i.effective_condition, "λ over the mean of |λ|"),
        Card.of("Negative curvature", i.negative_share, "share of the sum of |λ|", percent=True),
        Card.of("Largest stable step", i.max_stable_lr, "2/λ, plain gradient descent"),
    )


def _sections(i: Inspection, settings: dict[str, Any]) -> tuple[Section, ...]:
    low_rank = Figure(
        name="low-rank",
        label=f"Relative error of the best low-rank approximations by rank, from 1 to {wording.count(i.num_params)}.",
        caption="|H − Hᵣ| / |H| in the Frobenius norm, Hᵣ the r eigenpairs that are largest in magnitude. No matrix of "
        "rank r comes closer. It follows from the spectrum, with no further product.",
        draw=lambda ax, colors: plot_low_rank_error(i.low_rank, ax=ax, colors=colors),
        height=2.6,
    )
    sections = [
        _spectrum(i, settings),
        Section(title="Low-rank error", figures=(low_rank,)),
    ]
    if i.layers:
        sections.append(_layers(i))
    if i.diagonal is not None:
        sections.append(_diagonal(i.diagonal, {layer.name: layer.trace for layer in i.layers}))
    if i.coupling is not None:
        sections.append(_coupling(i.coupling))
    return tuple(sections)


def _spectrum(i: Inspection, settings: dict[str, Any]) -> Section:
    top, low, n = wording.quantity(i.sharpness), wording.quantity(i.lowest), wording.count(i.num_params)
    over_data = " Dashed: one standard error over data of the same size." if i.data is not None else ""
    how = (
        "From all eigenvalues of the matrix."
        if i.exact
        else f"From block Lanczos quadrature with {settings['num_probes']} probes, "
        f"{wording.count(i.density.num_matvecs)} products in all; the grey band is one standard error over the probes."
        f"{over_data} Features finer than the smoothing are not resolved; the triangles are."
    )
    density = Figure(
        name="density",
        label=f"Spectral density: a smoothed count of the {n} eigenvalues on a logarithmic scale, from {low} to {top}; "
        f"{wording.share(i.negative_share)} of the absolute curvature is negative.",
        caption=f"How the {n} eigenvalues are distributed: a smoothed count, in which an eigenvalue on its own is a "
        f"bump of height 1. {how} Triangles mark eigenvalues that were computed one by one.",
        draw=lambda ax, colors: plot_spectral_density(
            i.density, top=i.top, bottom=i.bottom, data=i.data, ax=ax, colors=colors
        ),
        height=3.3,
    )
    pale = " The pale bars are one standard error over data of the same size." if i.data is not None else ""
    eigenvalues = Figure(
        name="eigenvalues",
        label="The largest and the smallest eigenvalues by rank, with residuals; the table below has the numbers.",
        caption="The extreme eigenvalues by rank. Bars are residuals (most are smaller than the marks): an eigenvalue "
        f"of the Hessian lies within the bar. Hollow marks did not reach the tolerance.{pale}",
        draw=lambda ax, colors: plot_eigenvalues(
            i.top, i.bottom, num_params=i.num_params, data=i.data, ax=ax, colors=colors
        ),
        height=2.6,
    )
    table = Table(
        caption="Eigenvalues λ with the residual |Hu − λu| of their unit eigenvectors: one of H lies within it.",
        columns=("rank", "eigenvalue", "residual", "relative", *(["other data"] if i.data else []), "converged"),
        rows=tuple(_eigenvalue_rows(i)),
        signed=(1,),
    )
    return Section(title="The spectrum of the Hessian", figures=(density, eigenvalues), tables=(table,))


def _eigenvalue_rows(i: Inspection) -> list[tuple[str, ...]]:
    """Return the extreme eigenpairs by rank, with a row of one cell where ranks are left out."""
    moves: dict[int, float] = {}
    if i.data is not None:
        moves = dict(enumerate(i.data.bottom.tolist(), start=i.num_params - len(i.data.bottom) + 1))
        moves |= dict(enumerate(i.data.top.tolist(), start=1))
    rows: list[tuple[str, ...]] = []
    before, number = 0, wording.number
    for rank, value, residual, converged in i.extreme_eigenvalues():
        if rank > before + 1:
            rows.append((f"⋯ {wording.count(rank - before - 1)} in between",))
        relative = number(abs(residual / value), 2) if value else "none"
        data = [f"± {number(moves[rank], 2)}"] if i.data else []
        sure = "yes" if converged else "no"
        rows.append((wording.count(rank), number(value, 5), number(residual, 2), relative, *data, sure))
        before = rank
    return rows


def _layers(i: Inspection) -> Section:
    total = sum(layer.trace.value for layer in i.layers) or 1.0
    shares = ", ".join(f"{layer.name} {100 * layer.trace.value / total:.0f} %" for layer in i.layers)
    panel = 1.0 + 0.24 * len(i.layers)
    rows = tuple(
        (
            layer.name + ("*" if layer.exact else "") + ("" if layer.converged else " (not converged)"),
            wording.count(layer.num_params),
            wording.number(layer.gradient_norm, 3),
            wording.quantity(Measured(value=layer.top, stderr=layer.top_residual)),
            wording.quantity(Measured(value=layer.bottom, stderr=layer.bottom_residual)),
            wording.quantity(layer.trace),
            wording.quantity(layer.effective_condition),
            wording.share(layer.negative_share),
        )
        for layer in i.layers
    )
    return Section(
        title="Layer by layer",
        text="Each layer's own block of the Hessian, with all other parameters held fixed. The traces add up to the "
        "trace of the whole; the largest eigenvalue of a block never exceeds that of the whole.",
        figures=(
            Figure(
                name="layers",
                label=f"Share of the trace by layer ({shares}), and the extreme eigenvalues of each layer's own block.",
                caption="Left, or above: share of the trace, with one standard error. Right, or below: largest "
                "eigenvalue of each block and, where it is negative, the magnitude of the smallest.",
                draw=lambda axes, colors: plot_layers(i.layers, axes=axes, colors=colors),
                height=panel,
                narrow_height=2 * panel - 0.2,
                panels=2,
                share_y=True,
            ),
        ),
        tables=(
            Table(
                caption="Curvature by layer. ± is the residual for eigenvalues and one standard error elsewhere; a "
                "star marks blocks that were built entry by entry, which leaves rounding as the only error.",
                columns=(
                    "layer",
                    "parameters",
                    "gradient norm",
                    "largest λ",
                    "smallest λ",
                    "trace",
                    "effective condition",
                    "negative share",
                ),
                rows=rows,
                signed=(3, 4),
            ),
        ),
    )


def _diagonal(diagonal: LayerDiagonals, estimated: dict[str, Measured]) -> Section:
    medians = ", ".join(f"{row.name} {row.quantiles[2]:.2g}" for row in diagonal.rows)
    number, quantity = wording.number, wording.quantity
    rows = []
    for row in diagonal.rows:
        last = number(row.relative_noise, 2)
        if diagonal.exact:
            last = quantity(estimated[row.name]) if row.name in estimated else "none"
        rows.append(
            (
                row.name,
                *(number(row.quantiles[q], 3) for q in (0, 2, 4)),
                quantity(Measured(value=row.mean, stderr=row.mean_stderr or 0.0)),
                wording.share(Measured(value=row.share_negative, stderr=0.0)),
                quantity(diagonal.traces[row.name]),
                last,
            )
        )
    told = (
        "Their sums are the traces of the blocks, exactly; the last column is the estimate from the random probes."
        if diagonal.exact
        else "Single entries are noisy: the last column is their relative noise; at 1 they carry no information. "
        "Means are far more accurate."
    )
    last = "trace, estimated" if diagonal.exact else "noise of entries"
    return Section(
        title="The diagonal",
        figures=(
            Figure(
                name="diagonal",
                label=f"How the diagonal entries of each layer are spread; medians: {medians}.",
                caption="The diagonal of the Hessian, parameter by parameter: what diagonal methods divide by and "
                f"pruning criteria use. {diagonal.how}",
                draw=lambda ax, colors: plot_layer_diagonals(diagonal, ax=ax, colors=colors),
                height=1.1 + 0.24 * len(diagonal.rows),
            ),
        ),
        tables=(
            Table(
                caption=f"Diagonal entries by layer. {told}",
                columns=("layer", "5 %", "median", "95 %", "mean", "below zero", "trace", last),
                rows=tuple(rows),
                on_screen=False,
            ),
        ),
    )


def _coupling(coupling: LayerCoupling) -> Section:
    strongest = float(coupling.relative.fill_diagonal_(0).nan_to_num(posinf=0).max())
    figure = Figure(
        name="coupling",
        label=f"Coupling of layers as a table of shaded cells; the strongest between two layers is {strongest:.2f}.",
        caption="The Frobenius norm of the block between two layers over the root of the product of their own. Near 0 "
        "the layers can be treated one by one, as block-diagonal methods do; near 1 they share their sharp directions.",
        draw=lambda ax, colors: plot_layer_coupling(coupling, ax=ax, colors=colors),
        height=min(1.2 + 0.45 * len(coupling.names), 0.8 * WIDE),
        narrow_height=NARROW,
    )
    return Section(title="Coupling between layers", figures=(figure,))


def _terms(i: Inspection) -> tuple[tuple[str, str], ...]:
    other = (
        ()
        if i.data is None
        else (
            (
                "Other data",
                "How far a number would move with another sample of data of the same size: one standard error, from "
                f"leaving out each of {i.data.num_groups} groups of batches in turn (jackknife). It is usually far "
                "larger than the solver's error and limits how many digits are worth comparing.",
            ),
        )
    )
    return (
        (
            "Hessian H",
            f"The matrix of second derivatives of the loss in the {wording.count(i.num_params)} parameters. Its "
            "eigenvalues λ are the curvatures along orthogonal directions; near a minimum "
            "L(θ + d) − L(θ) ≈ g·d + ½ d·Hd.",
        ),
        (
            "Sharpness",
            "The largest eigenvalue. Gradient descent with step η multiplies the error along its direction by 1 − ηλ, "
            "so it is stable only for η < 2/λ.",
        ),
        (
            "Residual",
            "|Hu − λu| for a unit vector u. Some eigenvalue of H lies within it: it holds the rounding error of "
            "products, which is measured against a wider precision. That the extreme ones were found, and "
            "none was missed, is very likely but not proven.",
        ),
        (
            "Trace",
            "The sum of all eigenvalues. Divided by the number of parameters it is the mean curvature along a random "
            "direction.",
        ),
        (
            "Effective condition",
            "The largest λ over the mean of |λ|. The usual ratio of the largest to the smallest says nothing here, "
            "since many eigenvalues are close to zero.",
        ),
        (
            "Negative curvature",
            "Σ|λ| over the negative eigenvalues, as a share of Σ|λ|. It is zero at a strict minimum, ½ for a random "
            "symmetric matrix.",
        ),
        *other,
        (
            "± (uncertainty)",
            "One standard error: the spread over the probes, together with the change when the quadrature is cut to "
            "half its steps. For eigenvalues the residual. Loss and gradient are exact up to rounding.",
        ),
    )


def _method(i: Inspection) -> str:
    text = (
        f"Exact products of the Hessian with vectors (double backward, over all {wording.count(i.total_weight)} loss "
        "terms at once), no finite differences and no subsampling. "
    )
    if i.exact:
        return text + (
            "The matrix is small enough to be built column by column, so that everything follows from its eigenvalues."
        )
    return text + (
        "All numbers of the whole Hessian come from one block Krylov space, grown from the random probes with full "
        f"reorthogonalisation. Extreme eigenpairs are its Ritz pairs, to a residual of {wording.number(i.top.rtol, 2)} "
        f"of the eigenvalue at the upper end, and of {wording.number(i.bottom.rtol, 2)} of it or 10⁻⁴ of the largest "
        "at the lower. Density, trace, condition and negative share: Gauss quadrature in the same space, with the "
        "largest eigenpairs taken out of the sampling and put back exactly."
    )


def _costs(i: Inspection) -> Table:
    count, duration, stages = wording.count, wording.duration, i.cost.stages
    rows = [
        (
            stage.name,
            count(stage.planned),
            count(stage.num_matvecs),
            duration(stage.seconds),
            duration(stage.seconds / stage.num_matvecs) if stage.num_matvecs else "none",
        )
        for stage in stages
    ]
    planned, spent = sum(stage.planned for stage in stages), sum(stage.num_matvecs for stage in stages)
    rows.append(("all", count(planned), count(spent), duration(i.cost.seconds), ""))
    return Table(
        caption=f"Cost by stage, with a peak of {wording.memory(i.cost.peak_bytes)}.",
        columns=("stage", "products planned", "products spent", "time", "time / product"),
        rows=tuple(rows),
    )


STUDY = Study(
    record=InspectionRun,
    plan=InspectionPlan,
    measure=inspect_model,
    price=lambda objective, plan: plan.price(objective),
    groups=True,
    num_vectors=lambda plan: plan.k + plan.num_bottom,
)
