"""The eigenvalue density of a symmetric matrix by stochastic Lanczos quadrature.

For a random unit vector q, the m-step Lanczos decomposition gives nodes theta_k and weights tau_k^2 with
q'f(A)q ~ sum_k tau_k^2 f(theta_k), exact for polynomials of degree 2m - 1; its mean over q is (1/n) tr f(A). With f a
narrow Gaussian around t this is the density at t.

Eigenpairs that are known are taken out of the start vectors and put back as exact nodes, each of weight 1/n. Outliers
carry most of the variance and most of the steps, so this is by far the cheapest way to a sharp density.

Reference: Ubaru, Chen and Saad (2017), Fast estimation of tr f(A) via stochastic Lanczos quadrature; Lin, Saad and Yang
(2016), Approximating spectral densities of large matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from curvature.environment.cost import check_fits
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.base.places import normal_rows
from curvature.linalg.base.validate import check_count, check_square, product_noise, working_dtype
from curvature.linalg.krylov.lanczos import lanczos_runs, ritz
from curvature.linalg.stochastic._mass_bounds import shortened
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, Projected, as_matrix
from curvature.results.estimates import EigenPairs, SpectralDensity, mean_and_stderr, mixtures

COARSE_SHARES = (1 / 2, 2 / 3)  # of the steps, by which the error of the quadrature is judged

_MARGIN = 5.0  # the grid reaches this many sigmas beyond the outermost nodes


@numerics
def spectral_density(
    A: AnyMatrix,
    *,
    matrix: MatrixName = "hessian",
    num_probes: int,
    num_steps: int,
    generator: AnyGenerator,
    num_points: int = 1024,
    sigma: float | None = None,
    deflate: EigenPairs | None = None,
    probes: Tensor | None = None,
    block_size: int = 1,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> SpectralDensity:
    """Estimate the eigenvalue density of A, smoothed by a Gaussian, with its standard error over the probes.

    Cost: num_probes x num_steps products. Memory: block_size x num_steps vectors. Of nominal 95 % intervals 95 to 99 %
    cover the smoothed density.

    Args:
        num_probes: independent start vectors; the error falls as their square root, and 2 at least give an error.
        num_steps: Lanczos steps a probe, in [1, n]: features narrower than the spectrum over num_steps are not
            resolved.
        num_points: points of the grid.
        sigma: standard deviation of the smoothing Gaussian, units of A. Default: 1/100 of the range of the nodes.
        deflate: eigenpairs that are known; only converged ones are used.
        probes: (n, num_probes) start vectors to use instead of drawing them.
        block_size: probes run side by side, which is faster wherever a product with a block is.
    """
    saved = open_run("spectral_density", locals())
    A = as_matrix(A, matrix)
    n = check_square(A)
    generator = as_generator(generator, A.device)
    check_count("num_probes", num_probes, 1)
    check_count("num_points", num_points, 2)
    check_count("block_size", block_size, 1)
    if sigma is not None and not sigma > 0:
        raise InputError(f"sigma must be positive, got {sigma}.")
    values, U = _known(A, deflate)
    bulk = n - len(values)
    check_count("num_steps", num_steps, 1, n)
    if probes is None:
        probes = normal_rows(A, num_probes, generator).T
    if tuple(probes.shape) != (n, num_probes):
        raise InputError(f"probes must have shape ({n}, {num_probes}), got {tuple(probes.shape)}.")
    steps = min(num_steps, bulk)
    nodes = torch.zeros(num_probes, steps + len(values), dtype=torch.float64)
    weights = torch.zeros_like(nodes)
    nodes[:, steps:], weights[:, steps:] = values, 1.0 / n
    operator = Projected(A, U) if len(values) else A
    spent = 0
    for first in range(0, num_probes if bulk else 0, block_size):
        here = slice(first, min(first + block_size, num_probes))
        X = probes[:, here].to(A.device, working_dtype(A))
        theta, shares, more = saved.piece(partial(_rule, operator, X - U.to(X) @ (U.to(X).T @ X), steps))
        nodes[here, :steps], weights[here, :steps] = theta, (bulk / n) * shares
        spent += more
        if callback is not None:
            callback(spent, f"probe {here.stop} of {num_probes}")
    nodes = nodes.where(weights > 0, 0)
    order = nodes.where(weights > 0, torch.inf).argsort(dim=1)  # unused places last
    nodes, weights = nodes.gather(1, order), weights.gather(1, order)
    found = smoothed(
        nodes,
        weights,
        n=n,
        num_steps=steps if steps < bulk else None,
        known=values,
        num_matvecs=spent,
        num_points=num_points,
        sigma=sigma,
    )
    rule = rule_error(found, found.density, lambda x, w: mixtures(found.grid, x[None], w[None], found.sigma)[0])
    if found.num_steps is not None:
        rule = envelope(rule, found.grid, nodes[(weights > 0) & ~found.is_known], steps)
    noise = product_noise(A)
    return replace(found, rule=rule + blur(found, noise) if noise else rule, product_noise=noise or None)


def _rule(A: MatrixLike, X: Tensor, steps: int) -> tuple[Tensor, Tensor, int]:
    """Return nodes and weights (p, m) of the columns of X (n, p), and the products that they took."""
    runs = lanczos_runs(A, X, num_steps=steps)
    theta, S = ritz(runs)
    return theta, S[:, 0].square(), runs.num_matvecs


def smoothed(
    nodes: Tensor,
    weights: Tensor,
    *,
    n: int,
    num_steps: int | None,
    known: Tensor,
    num_matvecs: int,
    num_points: int = 1024,
    sigma: float | None = None,
    grid: Tensor | None = None,
) -> SpectralDensity:
    """Return the density of a rule for each probe: nodes and weights (num_probes, m), smoothed by a Gaussian.

    `grid` overrides `num_points`; the other arguments are those of `spectral_density` and `SpectralDensity`.
    """
    used = nodes[weights > 0]
    low, high = float(used.min()), float(used.max())
    span = max(high - low, 1e-3 * max(abs(low), abs(high)), torch.finfo(torch.float32).tiny)
    sigma = span / 100 if sigma is None else sigma
    if grid is None:
        check_fits(8 * num_points * len(nodes), nodes.device, f"a grid of {num_points} points", "take fewer num_points")
        grid = torch.linspace(low - _MARGIN * sigma, high + _MARGIN * sigma, num_points, dtype=torch.float64)
    samples = mixtures(grid, nodes, weights, sigma)
    density, stderr = mean_and_stderr(samples)
    return SpectralDensity(
        grid=grid,
        density=density,
        stderr=stderr,
        nodes=nodes,
        weights=weights,
        sigma=sigma,
        dimension=n,
        num_steps=num_steps,
        num_matvecs=num_matvecs,
        deflated=known,
    )


def blur(density: SpectralDensity, noise: float) -> Tensor:
    """Return how far a smoothed density is off, to first order, if |E|_F is this share of |A|_F for products A + E.

    Eigenvalues move by no more than |E|_F, root of the sum of squares (Hoffman and Wielandt, 1953).
    """
    x, w = density.nodes, density.weights
    size = (w * x.square()).sum(dim=1).mean().sqrt()  # |A|_F / n^(1/2)
    slopes = []
    for nodes, weights in zip(x, w, strict=True):
        z = (density.grid[:, None] - nodes) / density.sigma
        slope = z * torch.exp(-0.5 * z.square()) / (density.sigma**2 * (2 * torch.pi) ** 0.5)
        slopes.append((weights * slope.square()).sum(dim=1))
    return noise * size * torch.stack(slopes).mean(dim=0).sqrt()


def error_of_noise(
    noise: float | None, nodes: Tensor, weights: Tensor, n: int, f: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return how far f(nodes) moves with a matrix whose products err by this share: all alike, or each by chance.

    The larger of two changes: nodes times 1 +- noise / 2, as a trace errs; and nodes +- noise |A|_F / n, as the sum of
    n eigenvalues moves that err by noise |A|_F / n^(1/2) each. Infinite where f is not finite there.
    """
    value = f(nodes)
    if not noise:
        return torch.zeros_like(value)
    step = noise * (weights * nodes.square()).sum(dim=-1).mean().sqrt() / n**0.5
    moved = [f(nodes * (1 + sign * noise / 2)) for sign in (-1, 1)] + [f(nodes + sign * step) for sign in (-1, 1)]
    return torch.stack([(x - value).abs() for x in moved]).nan_to_num(nan=torch.inf).amax(dim=0)


def rule_error(density: SpectralDensity, value: Tensor, sample: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the error of the quadrature in a mean over the probes of `sample`, a number from nodes and weights.

    `value` is the mean that all steps give; the error is `extrapolated`, zero where the rules are exact.
    """
    if density.num_steps is None:
        return torch.zeros_like(value)
    from_fewer = []
    for share in COARSE_SHARES:
        steps = max(int(share * density.num_steps), 1)
        coarse = []
        for x, w, of in zip(density.nodes, density.weights, density.is_known, strict=True):
            nodes, weights = shortened(x, w.where(~of, 0), steps)
            coarse.append(sample(torch.cat([nodes, x[of]]), torch.cat([weights, w[of]])))
        from_fewer.append(torch.stack(coarse).mean(dim=0))
    return extrapolated(value, from_fewer)


def extrapolated(value: Tensor, from_fewer: Sequence[Tensor]) -> Tensor:
    """Return the error of a value from what each of `COARSE_SHARES` of the steps gives instead.

    It is the larger of the two that errors of order steps^-2 would have to have.
    """
    changes = [(other - value).abs() / (share**-2 - 1) for other, share in zip(from_fewer, COARSE_SHARES, strict=True)]
    return torch.stack(changes).amax(dim=0)


def envelope(error: Tensor, grid: Tensor, nodes: Tensor, steps: int) -> Tensor:
    """Return the largest error of a smoothed density within a quarter of the mean distance of nodes of each grid point.

    Densities of too few nodes waver about the right one, and what fewer nodes change passes through zero between. The
    grid is evenly spaced; nodes are those of all rules, one-dimensional, `steps` a rule.
    """
    reach = float(nodes.max() - nodes.min()) / (4 * steps) / float(grid[1] - grid[0])
    width = min(round(reach), len(grid) // 2)
    return torch.nn.functional.max_pool1d(error[None, None], 2 * width + 1, 1, width)[0, 0]


def _known(A: MatrixLike, deflate: EigenPairs | None) -> tuple[Tensor, Tensor]:
    """Return the converged eigenvalues, ascending, and their vectors."""
    n = A.shape[0]
    if deflate is None:
        return torch.zeros(0, dtype=torch.float64), torch.zeros(n, 0, dtype=A.dtype, device=A.device)
    if deflate.eigenvectors.shape[0] != n:
        raise InputError(f"deflate holds eigenvectors of length {deflate.eigenvectors.shape[0]}, A has size {n}.")
    values = deflate.eigenvalues[deflate.converged].double().cpu().flip(0)
    return values, deflate.eigenvectors[:, deflate.converged].flip(1).to(A.dtype)
