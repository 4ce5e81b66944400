"""The curvature of a trained model at its parameters: the spectrum of the Hessian, as a whole and layer by layer.

One plan of products serves all numbers. The largest eigenpairs come first; they are taken out of the random probes of
the density, which leaves little variance; and the Lanczos run of each probe then yields, with no further product, the
density, the trace, the mean absolute eigenvalue and the share of negative curvature.

Reference: Ghorbani, Krishnan and Xiao (2019), An investigation into neural net optimization via Hessian eigenvalue
density.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from analysis.meter import Meter, Progress
from analysis.plan import ALL_ENTRIES, BOTTOM, DENSITY, PATIENCE, TOP, InspectionPlan, num_basis
from analysis.results import Inspection, LayerCurvature, Measured
from curvature.linalg import eigsh, lanczos, ritz, spectral_density
from curvature.linop import LinearOperator, to_dense
from curvature.objective import Objective
from curvature.operators import HessianOperator
from curvature.parameters import Block
from curvature.results import EigenPairs, SpectralDensity, Status, TraceEstimate, mean_and_stderr

__all__ = ["inspect_model"]

SMALL = 1e-4
"""Smallest eigenvalues need not be known better than this, relative to the largest."""


def inspect_model(
    objective: Objective,
    *,
    k: int = 10,
    num_bottom: int = 3,
    rtol: float = 1e-3,
    num_probes: int = 4,
    num_steps: int = 30,
    layers: bool = True,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Inspection:
    """Measure loss, gradient and the spectrum of the Hessian of an objective, each with its uncertainty and its price.

    Cost: one gradient; about 30 + 2 k + 10 num_bottom + num_probes x num_steps Hessian products; and with `layers`
    about as many products with each layer's block, which cost less. A matrix with fewer columns than that is built
    entry by entry. Memory: the kept graphs and about a hundred vectors. `analysis.plan.estimate_cost` says what it
    comes to in seconds and bytes.

    Args:
        objective: what to inspect; its `check()` is the caller's choice.
        k: how many of the largest eigenvalues.
        num_bottom: how many of the smallest.
        rtol: residual of the largest eigenpairs relative to the eigenvalue; those of layers have ten times that, the
            smallest thirty times.
        num_probes: probes of the density, at least 2; uncertainties fall as their square root.
        num_steps: Lanczos steps a probe, at least 4.
        layers: whether to inspect each module's own block, too.
        generator: source of all probes, on the objective's device.
        progress: called after each product with what is being computed and the products done and planned.

    Raises:
        InputError: for settings out of range.
        NonFiniteError: if the loss, the gradient or a product is not finite.
    """
    plan = InspectionPlan(
        k=k, num_bottom=num_bottom, rtol=rtol, num_probes=num_probes, num_steps=num_steps, layers=layers
    )
    meter = Meter(objective.device, sum(plan.total_matvecs(objective)), progress)
    loss, gradient = objective.loss_and_gradient()
    H = HessianOperator(objective)
    whole = _whole(H, plan, meter, generator)
    blocks = [_layer(H, block, gradient, plan, meter, generator) for block in plan.layer_blocks(objective)]
    density, n = whole.density, objective.num_params
    samples = n * (density.weights * density.nodes).sum(dim=1)
    value, stderr = mean_and_stderr(samples)
    return Inspection(
        loss=float(loss),
        gradient_norm=float(gradient.norm()),
        num_params=n,
        total_weight=objective.total_weight,
        dtype=str(objective.dtype).removeprefix("torch."),
        device=str(objective.device),
        top=whole.top,
        bottom=whole.bottom,
        trace=TraceEstimate(
            value=value,
            stderr=torch.zeros_like(value) if whole.exact else stderr,
            num_matvecs=density.num_matvecs,
            samples=samples,
            status=Status.CONVERGED if whole.exact else Status.BUDGET,
        ),
        density=density,
        mean_absolute_eigenvalue=whole.mean_absolute,
        effective_condition=whole.effective_condition,
        negative_share=whole.negative_share,
        layers=tuple(blocks),
        exact=whole.exact,
        cost=meter.cost(),
        notes=objective.notes,
    )


def _whole(H: LinearOperator, plan: InspectionPlan, meter: Meter, generator: torch.Generator) -> _Spectrum:
    planned = plan.matvecs(H.shape[0])
    k, low = min(plan.k, H.shape[0]), min(plan.num_bottom, H.shape[0])

    def stage(name: str) -> AbstractContextManager[None]:
        return meter.stage(name, planned[name], whole=True)

    return _measure(meter.watch(H), planned, k, low, plan.rtol, plan.bottom_rtol, plan.num_probes, generator, stage)


def _layer(
    H: HessianOperator, block: Block, gradient: Tensor, plan: InspectionPlan, meter: Meter, generator: torch.Generator
) -> LayerCurvature:
    planned = plan.layer_matvecs(block.num_params)
    A, k = meter.watch(H.restrict(block)), min(plan.k, block.num_params)
    with meter.stage(f"layer {block.name}", sum(planned.values()), whole=False):
        found = _measure(
            A, planned, k, 1, plan.layer_rtol, plan.bottom_rtol, plan.num_probes, generator, lambda _: nullcontext()
        )
    trace = found.trace
    return LayerCurvature(
        name=block.name,
        num_params=block.num_params,
        gradient_norm=float(block.take(gradient).norm()),
        top=float(found.top.eigenvalues[0]),
        top_residual=float(found.top.residual_norms[0]),
        bottom=float(found.bottom.eigenvalues[-1]),
        bottom_residual=float(found.bottom.residual_norms[-1]),
        trace=trace,
        effective_condition=found.effective_condition,
        negative_share=found.negative_share,
        converged=bool(found.top.converged[0]) and bool(found.bottom.converged.all()),
        exact=found.exact,
        num_matvecs=meter.stages[-1].num_matvecs,
    )


# -- one matrix -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Spectrum:
    """What is known of one symmetric matrix, and the numbers that follow."""

    top: EigenPairs
    bottom: EigenPairs
    density: SpectralDensity
    exact: bool

    @property
    def trace(self) -> Measured:
        return self._over_probes(lambda nodes, weights: self.density.dimension * (weights * nodes).sum(dim=1))

    @property
    def mean_absolute(self) -> Measured:
        return self._over_probes(lambda nodes, weights: (weights * nodes.abs()).sum(dim=1))

    @property
    def effective_condition(self) -> Measured:
        top, residual = float(self.top.eigenvalues[0]), float(self.top.residual_norms[0])
        mean = self.mean_absolute
        if mean.value == 0:
            return Measured(value=math.nan, stderr=math.nan)
        value = top / mean.value
        return Measured(value=value, stderr=math.hypot(residual / mean.value, value * mean.stderr / mean.value))

    @property
    def negative_share(self) -> Measured:
        """A ratio of means over the same probes, so its error is that of the linearised ratio.

        The quadrature may miss eigenvalues next to zero; the smallest, which is known, is allowed for as one more.
        """
        if self.mean_absolute.value == 0:
            return Measured(value=math.nan, stderr=math.nan)

        def ratio(nodes: Tensor, weights: Tensor) -> Tensor:
            negative, all_of_it = (weights * (-nodes).clamp_min(0)).sum(dim=1), (weights * nodes.abs()).sum(dim=1)
            mean = all_of_it.mean()
            share = negative.mean() / mean
            return share + (negative - share * all_of_it) / mean

        share = self._over_probes(ratio)
        lowest = max(0.0, -float(self.bottom.eigenvalues[-1])) / (self.density.dimension * self.mean_absolute.value)
        return share if self.exact else Measured(value=share.value, stderr=math.hypot(share.stderr, lowest))

    def _over_probes(self, samples: Callable[[Tensor, Tensor], Tensor]) -> Measured:
        """Return the mean of one sample a probe with the spread over the probes and the error of the quadrature.

        For |t| that falls as 1 / steps^2, so it is a third of what halving the steps changes.
        """
        nodes, weights = self.density.nodes, self.density.weights
        value, stderr = mean_and_stderr(samples(nodes, weights))
        if self.exact:
            return Measured(value=float(value), stderr=0.0)
        halved = samples(*_halved(self.density, known=int(self.top.converged.sum()))).mean()
        return Measured(value=float(value), stderr=math.hypot(float(stderr), float(halved - value) / 3))


def _measure(
    A: LinearOperator,
    planned: dict[str, int],
    k: int,
    num_bottom: int,
    rtol: float,
    bottom_rtol: float,
    num_probes: int,
    generator: torch.Generator,
    stage: Callable[[str], AbstractContextManager[None]],
) -> _Spectrum:
    """Spend the planned products on one matrix: eigenpairs at both ends, then the density without the largest."""
    if ALL_ENTRIES in planned:
        with stage(ALL_ENTRIES):
            return _all_entries(A, k, num_bottom)
    n, itemsize = A.shape[0], torch.empty(0, dtype=A.dtype).element_size()
    basis = num_basis(n, max(k, num_bottom), itemsize, A.device)
    with stage(TOP):
        limit = PATIENCE * planned[TOP]
        top = eigsh(A, k, rtol=rtol, generator=generator, num_basis=basis, max_matvecs=limit)
    with stage(BOTTOM):
        floor = SMALL * float(top.eigenvalues[0].abs())  # zero would never be reached relative to itself
        limit = PATIENCE * planned[BOTTOM]
        bottom = eigsh(
            A,
            num_bottom,
            which="SA",
            rtol=bottom_rtol,
            atol=floor,
            generator=generator,
            num_basis=basis,
            max_matvecs=limit,
        )
    with stage(DENSITY):
        steps = planned[DENSITY] // num_probes
        density = spectral_density(A, num_probes=num_probes, num_steps=steps, generator=generator, deflate=top)
    return _Spectrum(top=top, bottom=bottom, density=density, exact=False)


def _all_entries(A: LinearOperator, k: int, num_bottom: int) -> _Spectrum:
    """Build the matrix and take all its eigenvalues; the residuals show its rounding, as products are not symmetric."""
    n = A.shape[0]
    dense = to_dense(A, columns_at_a_time=8).double()
    eigenvalues, U = torch.linalg.eigh((dense + dense.T) / 2)
    eigenvalues, U = eigenvalues.flip(0), U.flip(1)

    def pairs(chosen: slice) -> EigenPairs:
        residuals = (dense @ U[:, chosen] - eigenvalues[chosen] * U[:, chosen]).norm(dim=0)
        return EigenPairs(
            eigenvalues=eigenvalues[chosen],
            eigenvectors=U[:, chosen],
            residual_norms=residuals,
            converged=torch.ones_like(residuals, dtype=torch.bool),
            num_matvecs=n,
            status=Status.CONVERGED,
            rtol=torch.finfo(A.dtype).eps,
        )

    diagonal = torch.diag(eigenvalues.cpu())
    density = spectral_density(  # with every eigenpair known, only the smoothing is left to do
        diagonal, num_probes=1, num_steps=1, generator=torch.Generator(), deflate=_diagonal_pairs(eigenvalues.cpu())
    )
    density = replace(density, stderr=torch.zeros_like(density.density), num_matvecs=n)
    return _Spectrum(top=pairs(slice(0, k)), bottom=pairs(slice(n - num_bottom, n)), density=density, exact=True)


def _diagonal_pairs(eigenvalues: Tensor) -> EigenPairs:
    """Return the eigenpairs of diag(eigenvalues)."""
    return EigenPairs(
        eigenvalues=eigenvalues,
        eigenvectors=torch.eye(len(eigenvalues), dtype=eigenvalues.dtype),
        residual_norms=torch.zeros_like(eigenvalues),
        converged=torch.ones_like(eigenvalues, dtype=torch.bool),
        num_matvecs=0,
        status=Status.CONVERGED,
        rtol=0.0,
    )


def _halved(density: SpectralDensity, known: int) -> tuple[Tensor, Tensor]:
    """Return nodes and weights as half the Lanczos steps would have given them, without a further product.

    Lanczos on the diagonal matrix of the nodes, from the roots of the weights, retraces the first steps of each run.
    The `known` eigenpairs that were taken out of the runs cost it a step each, as they are nodes, too.
    """
    num_probes, num_nodes = density.nodes.shape
    steps = (num_nodes - known) // 2 + known
    nodes, weights = density.nodes.new_zeros(num_probes, steps), density.weights.new_zeros(num_probes, steps)
    for i, (theta, w) in enumerate(zip(density.nodes.double(), density.weights.double(), strict=True)):
        values, S = ritz(lanczos(torch.diag(theta[w > 0]), w[w > 0].sqrt(), num_steps=min(steps, int((w > 0).sum()))))
        nodes[i, : len(values)], weights[i, : len(values)] = values, S[0].square()
    return nodes, weights
