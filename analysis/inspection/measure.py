"""The curvature of a trained model at its parameters: the spectrum of the Hessian, as a whole and layer by layer.

One block Krylov space serves all numbers of the whole Hessian, and one for each layer those of its block: eigenpairs at
both ends, density, trace, mean absolute eigenvalue, share of negative curvature; and, since the products of every batch
are seen on their way into the sum, how far each would move with other data.

Reference: Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
density.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from analysis.inspection.coupling import layer_coupling
from analysis.inspection.diagonal import diagonals_of, exactly
from analysis.inspection.known_blocks import with_known_blocks
from analysis.inspection.low_rank import low_rank_error
from analysis.inspection.plan import (
    COUPLING,
    COUPLING_PROBES,
    DIAGONAL,
    DIAGONAL_MATVECS,
    LAYERS,
    WHOLE,
    InspectionPlan,
)
from analysis.inspection.results import DataErrors, Inspection, LayerCurvature
from analysis.records.measured import Measured
from analysis.records.plan import from_plan
from analysis.run.meter import Meter
from analysis.run.shared_products import SharedHessian, shared_hessian
from analysis.show.listener import Progress
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.layerwise import ExactDiagonal
from curvature.objective.objective import Objective
from curvature.operators.hessian import HessianOperator
from curvature.parameters import Block
from curvature.results.intervals import combined_error
from curvature.spectra.results import Samples, Spectrum
from curvature.spectra.spectrum import layer_spectra, spectrum

__all__ = ["inspect_model"]


@from_plan(InspectionPlan)
@full_precision
@checked
def inspect_model(
    objective: Objective, plan: InspectionPlan, *, generator: torch.Generator, progress: Progress | None = None
) -> Inspection:
    """Measure loss, gradient and the spectrum of the Hessian of an objective, each with its uncertainty and its price.

    Cost: one gradient; about num_probes x num_steps Hessian products; with `layers` two thirds as many products with
    each layer's block, which cost less, and for the diagonal a gradient for each output of an example and each unit
    of a curved activation, else `DIAGONAL_MATVECS` products. A matrix with fewer columns than that is built entry by
    entry. Small blocks of layers come with the diagonal, and products with them cost next to nothing. Memory: the kept
    graphs and as many vectors. `InspectionPlan.price` says what it comes to in seconds and bytes.

    Args:
        objective: what to inspect; its `check()` is the caller's choice. Data in four batches or more (`micro_batch=`
            cuts them) yield errors over the data.
        plan: settings; or pass them one by one.
        generator: source of all probes, on the objective's device.
        progress: called after each product with what is being computed and the products done and planned.

    Raises:
        InputError: for settings out of range, or vectors that do not fit into memory.
        NonFiniteError: if the loss, the gradient or a product is not finite.
    """
    blocks = plan.layer_blocks(objective)
    planned_whole, planned_layers = plan.total_matvecs(objective)
    planned_coupling, planned_diagonal = plan.coupling_matvecs(objective), plan.diagonal_matvecs(objective)
    meter = Meter(objective.device, planned_whole + planned_layers, progress)
    loss, gradient = objective.loss_and_gradient()
    found: dict[str, Spectrum] = {}
    exact: ExactDiagonal | str | None = None
    known: tuple[str, ...] = ()
    with shared_hessian(objective) as shared:
        H: HessianOperator = shared
        with meter.stage(WHOLE, planned_whole - planned_coupling - planned_diagonal, whole=True):
            place = plan.whole.place(H, [objective.num_params])
            whole = spectrum(H, plan.whole, generator=generator, basis_device=place, progress=meter.tick)
        if blocks:
            with meter.stage(LAYERS, planned_layers, whole=False):
                H, exact, known = with_known_blocks(H, blocks)
                layer = plan.layer(objective)
                place = layer.place(H, [block.num_params for block in blocks])
                own: dict[str, Any] = {"generator": generator, "basis_device": place, "progress": meter.tick}
                found = layer_spectra(H, layer, blocks=blocks, **own)
        processes = len(shared.workers) if isinstance(shared, SharedHessian) else 0
        diagonal = None
        if plan.layers:
            with meter.stage(DIAGONAL, planned_diagonal, whole=True):
                exact = exactly(objective) if exact is None else exact
                diagonal = diagonals_of(exact, objective, whole.top, DIAGONAL_MATVECS, generator, meter.told)
    layers = tuple(_layer(block, found[block.name], gradient) for block in blocks)
    left_out: tuple[str, ...] = ()
    if (of_many := len(objective.space.blocks)) > plan.most_layers and layers:
        left = sum(not layer.converged for layer in layers)
        parts = f" in {len(layers)} parts, the modules that hold them" if len(layers) < of_many else ""
        left_out = (
            f"The {of_many} layers, more than {plan.most_layers}, are inspected{parts}, and eigenvalues are those of "
            f"the planned products, neither continued nor searched for: {left} of {len(layers)} hold one that has not "
            "converged (--most-layers).",
        )
    shared_out = (f"Products were shared out among {processes} processes, each with some of the graphs.",)[:processes]
    coupled = None
    if planned_coupling:
        with meter.stage(COUPLING, planned_coupling, whole=True):
            coupled = layer_coupling(objective, num_probes=COUPLING_PROBES, generator=generator, progress=meter.told)
    return Inspection(
        loss=float(loss),
        gradient_norm=float(gradient.norm()),
        num_params=objective.num_params,
        total_weight=objective.total_weight,
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        top=whole.top,
        bottom=whole.bottom,
        trace=whole.trace(),
        density=whole.density,
        mean_absolute_eigenvalue=_mean_absolute(whole),
        effective_condition=_effective_condition(whole),
        negative_share=_negative_share(whole),
        layers=layers,
        coupling=coupled,
        diagonal=diagonal,
        low_rank=low_rank_error(whole),
        exact=whole.exact,
        data=_data_errors(whole),
        cost=meter.cost(),
        notes=(*objective.notes, *whole.notes, *left_out, *known, *shared_out),
    )


def _layer(block: Block, found: Spectrum, gradient: Tensor) -> LayerCurvature:
    return LayerCurvature(
        name=block.name,
        num_params=block.num_params,
        gradient_norm=float(block.take(gradient).norm()),
        top=float(found.top.eigenvalues[0]),
        top_residual=float(found.top.residual_norms[0]),
        bottom=float(found.bottom.eigenvalues[-1]),
        bottom_residual=float(found.bottom.residual_norms[-1]),
        trace=Measured.of(replace(found.spectral_sum(lambda x: x), rule=torch.zeros(()))),  # exact for powers
        effective_condition=_effective_condition(found),
        negative_share=_negative_share(found),
        converged=bool(found.top.converged[0]) and bool(found.bottom.converged.all()),
        exact=found.exact,
        num_matvecs=found.num_matvecs,
    )


def _data_errors(found: Spectrum) -> DataErrors | None:
    top, bottom, density = found.top_data_stderr(), found.bottom_data_stderr(), found.density_data_stderr()
    if found.spread is None or top is None or bottom is None or density is None:
        return None
    return DataErrors(
        num_groups=len(found.spread.shares),
        top=top,
        bottom=bottom,
        trace=Measured.of(found.spectral_sum(lambda x: x)).data_stderr,
        density=density,
        shares=found.spread.shares,
        nodes=torch.stack([rule.nodes for rule in found.spread.rules]),
        weights=torch.stack([rule.weights.mean(dim=0) for rule in found.spread.rules]),
    )


# -- numbers that follow from a spectrum ------------------------------------------------------------------------------


def _absolute(nodes: Tensor, weights: Tensor) -> Tensor:
    return (weights * nodes.abs()).sum(dim=1)


def _mean_absolute(found: Spectrum) -> Measured:
    return Measured.of(found.estimate(_absolute))


def _effective_condition(found: Spectrum) -> Measured:
    """lambda_max over the mean of |lambda|."""
    mean = _mean_absolute(found)
    if mean.value == 0:
        return Measured(value=math.nan, stderr=math.nan)
    top, residual = float(found.top.eigenvalues[0]), float(found.top.residual_norms[0])
    value, data = top / mean.value, math.nan
    if found.spread is not None:
        means = [_absolute(rule.nodes, rule.weights).mean() for rule in found.spread.rules]
        without = [t / m for t, m in zip(found.spread.top[:, 0], means, strict=True)]
        data = float(found.spread.stderr(torch.tensor(value), without))
    stderr, dof = combined_error([(residual / mean.value, math.inf), (value * mean.stderr / mean.value, mean.dof)])
    return replace(mean, value=value, stderr=stderr, data_stderr=data, dof=dof, skewness=-mean.skewness)


def _negative_share(found: Spectrum) -> Measured:
    """The sum of |lambda| over negative lambda, as a share of the sum of all |lambda|.

    A ratio of means over the same probes, so its error is that of the linearised ratio. The quadrature may miss
    eigenvalues next to zero; the smallest, which is known, is allowed for as one more.
    """
    mean = _mean_absolute(found)
    if mean.value == 0:
        return Measured(value=math.nan, stderr=math.nan)
    share = Measured.of(found.estimate(_ratio(lambda nodes, weights: (weights * (-nodes).clamp_min(0)).sum(dim=1))))
    if found.exact:
        return share
    lowest = max(0.0, -float(found.bottom.eigenvalues[-1])) / (found.density.dimension * mean.value)
    stderr, dof = combined_error([(share.stderr, share.dof), (lowest, math.inf)])
    return replace(share, stderr=stderr, dof=dof)


def _ratio(part: Samples) -> Samples:
    """Return the ratio of a part to the absolute whole, linearised about its mean over the probes."""

    def samples(nodes: Tensor, weights: Tensor) -> Tensor:
        parts, whole = part(nodes, weights), _absolute(nodes, weights)
        share = parts.mean() / whole.mean()
        return share + (parts - share * whole) / whole.mean()

    return samples
