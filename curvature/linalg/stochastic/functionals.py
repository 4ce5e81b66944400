"""What one run of stochastic Lanczos quadrature tells about functions of a matrix: tr f(A), n times the mean of f.

For functions whose even derivatives all have one sign, as log(x + z), the m-point rule errs on one side and falls to
its limit as m grows. Where rules of both sides are known they are bounds; else standard errors join the chance of the
probes with what half and two thirds of the steps change.

Reference: Ubaru, Chen and Saad (2017), Fast estimation of tr f(A) via stochastic Lanczos quadrature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.validate import numbers
from curvature.linalg.stochastic._mass_bounds import with_node
from curvature.linalg.stochastic.slq import error_of_noise, rule_error
from curvature.results.estimates import BoundedEstimate, Estimate, SpectralDensity, bounded_mean, mean_and_stderr
from curvature.results.intervals import skewness


@numerics
def spectral_sum(density: SpectralDensity, f: Callable[[Tensor], Tensor]) -> Estimate:
    """Estimate tr f(A) = sum_i f(lambda_i).

    Of nominal 95 % intervals 92 % and more cover (docs/benchmarks.md).

    Args:
        density: from `spectral_density`.
        f: acts entrywise on eigenvalues, float64. Kinks want many steps: the rule is exact for polynomials of degree
            2 num_steps - 1.

    Raises:
        InputError: if f is not finite on the nodes.
    """
    values = f(density.nodes)
    if not isinstance(values, Tensor) or values.shape != density.nodes.shape:
        raise InputError(
            f"f must act on each entry of a tensor, and returned a {type(values).__name__} of another shape."
        )
    values = values.where(density.weights > 0, 0)
    if not bool(torch.isfinite(values).all()):
        worst = density.nodes[~torch.isfinite(values)]
        raise InputError(
            f"f must be finite where the spectrum is, but is not at {float(worst[0]):.4g}; the nodes reach from "
            f"{_smallest(density):.4g} to {float(density.nodes.max()):.4g}."
        )
    return _estimate(density, lambda x, w: density.dimension * (w @ f(x).where(w > 0, 0)), f(density.deflated).sum())


@numerics
def moments(density: SpectralDensity, orders: Sequence[int]) -> Estimate:
    """Estimate (1/n) tr A^p for every order p, (len(orders),).

    The rule is exact for p < 2 num_steps; orders 1 and 2 give the mean curvature and the Frobenius norm, n^(1/2) times
    the root of the second.

    Raises:
        InputError: for negative orders.
    """
    if any(p < 0 for p in orders):
        raise InputError(f"orders must not be negative, got {list(orders)}.")
    powers = torch.tensor(orders, dtype=torch.float64)
    samples = (density.weights[..., None] * density.nodes[..., None] ** powers).sum(dim=1)
    mean, stderr = mean_and_stderr(samples)
    known = (density.deflated[:, None] ** powers).sum(dim=0) / density.dimension
    noise = _of_noise(density, lambda x, w: w @ x[:, None] ** powers)
    return Estimate(
        value=mean,
        stderr=torch.hypot(stderr, noise),
        dof=len(density.weights) - 1.0,
        skewness=skewness(samples, known),
        product_noise=density.product_noise,
    )


@numerics
def logdet(density: SpectralDensity, *, damping: float = 0.0) -> Estimate:
    """Estimate log det(A + damping I) = sum_i log(lambda_i + damping). The rule errs upwards.

    Raises:
        InputError: unless A + damping I is positive definite, as far as the nodes show.
    """
    _check_damping(density, damping)
    return spectral_sum(density, lambda x: torch.log(x + damping))


@numerics
def effective_dimension(density: SpectralDensity, damping: float | Sequence[float] | Tensor) -> BoundedEstimate:
    """Estimate d(z) = tr A (A + z I)^-1 = sum_i lambda_i / (lambda_i + z) for every z of a grid, of the grid's shape.

    How many directions the data determine beyond a prior of precision z (MacKay, 1992). The Gauss rule errs upwards,
    and for positive semi-definite A, such as a Gauss-Newton matrix, the Gauss-Radau rule with a node at 0 downwards:
    these are the bounds (Golub and Meurant, 2010). Of nodes below 0 the error of the rule is judged by fewer steps too,
    which is no bound.

    Raises:
        InputError: unless A + z I is positive definite for the smallest z, as far as the nodes show.
    """
    z = numbers("damping", damping)
    _check_damping(density, float(z.min()))

    def sample(nodes: Tensor, weights: Tensor) -> Tensor:
        used = weights > 0  # unused places hold no part
        x = nodes[used].reshape(-1, *[1] * z.ndim)
        return density.dimension * torch.tensordot(weights[used], x / (x + z), dims=1)

    upper = torch.stack([sample(x, w) for x, w in zip(density.nodes, density.weights, strict=True)])
    smallest = min(_smallest(density), 0.0)
    lower = []
    for x, w, of in zip(density.nodes, density.weights, density.is_known, strict=True):
        radau = with_node(x, w.where(~of, 0), smallest, num_steps=density.num_steps)
        lower.append(sample(*radau) + sample(x, w.where(of, 0)))
    known = density.deflated.reshape(-1, *[1] * z.ndim)
    sure = (known / (known + z)).sum(dim=0)
    found = bounded_mean(upper, torch.stack(lower), upper, (sure, density.dimension - len(known) + sure))
    if density.product_noise is not None:
        stderr = torch.hypot(found.stderr, _of_noise(density, sample))
        found = replace(found, stderr=stderr, product_noise=density.product_noise)
    if smallest == 0:
        return found
    return replace(found, stderr=torch.hypot(found.stderr, rule_error(density, found.value, sample)))


def _estimate(density: SpectralDensity, sample: Callable[[Tensor, Tensor], Tensor], sure: Tensor) -> Estimate:
    """Return the mean over the probes of a number from nodes and weights, its error that of the rule included.

    `sure` is the part of the number that is of eigenvalues which are known.
    """
    of_probes = torch.stack([sample(x, w) for x, w in zip(density.nodes, density.weights, strict=True)])
    value, stderr = mean_and_stderr(of_probes)
    stderr = torch.hypot(stderr, rule_error(density, value, sample))
    return Estimate(
        value=value,
        stderr=torch.hypot(stderr, _of_noise(density, sample)),
        dof=len(of_probes) - 1.0,
        skewness=skewness(of_probes, sure),
        product_noise=density.product_noise,
    )


def _of_noise(density: SpectralDensity, sample: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return how far rounding of products moves the mean over the probes of a number from nodes and weights."""
    weights = density.weights

    def mean(nodes: Tensor) -> Tensor:
        return torch.stack([sample(x, w) for x, w in zip(nodes, weights, strict=True)]).mean(dim=0)

    return error_of_noise(density.product_noise, density.nodes, weights, density.dimension, mean)


def _smallest(density: SpectralDensity) -> float:
    return float(density.nodes[density.weights > 0].min())


def _check_damping(density: SpectralDensity, damping: float) -> None:
    smallest = _smallest(density)
    if not damping + smallest > 0:
        raise InputError(
            f"A + damping I must be positive definite: damping must exceed {-smallest:.4g}, since A has eigenvalues "
            f"down to {smallest:.4g}; got {damping:.4g}. Raise it, or take a Gauss-Newton matrix."
        )
