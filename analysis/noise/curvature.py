"""How the noise of stochastic gradients lies against curvature, and how heavy its tails are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analysis.noise.measure import of_all_ranks, projections
from analysis.noise.results import CurvatureNoise, NoiseScale
from analysis.records.measured import Measured
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError, NonFiniteError
from curvature.generators import AnyGenerator
from curvature.linalg import cg, rademacher
from curvature.objective.objective import Objective
from curvature.objective.ranks import together
from curvature.operators.ggn import GGNOperator
from curvature.operators.gradient_covariance import GradientCovarianceOperator
from curvature.operators.hessian import HessianOperator
from curvature.per_example import GradientNorms, gradient_norms
from curvature.results.estimates import mean_and_stderr
from curvature.results.intervals import ratio_interval, skewness, student_quantile
from curvature.sharding.tensors import whole

__all__ = ["curvature_noise", "tail_index"]


@together
@full_precision
@checked
def curvature_noise(
    objective: Objective,
    *,
    num_probes: int = 16,
    confidence: float = 0.95,
    damping: float | None = None,
    rtol: float = 1e-4,
    generator: AnyGenerator,
) -> CurvatureNoise:
    """Estimate tr(H Sigma), the noise scale it gives, and how far noise and curvature share directions.

    With Rademacher probes z: z'H Sigma z, z'Hz, z'Sigma z, |Hz|^2 and |Sigma z|^2 are unbiased for tr(H Sigma), the
    traces and the squared Frobenius norms; z'(G + damping I)^-1 Sigma z for the Takeuchi criterion, solved by CG.

    The variance of g'H g over data is 4 g'H S H g / N + 2 tr (H S)^2 / N^2, the first from the examples' g_i'H g and
    scaled with the G'H G that a ratio stands for, the second from pairs of probes. Fieller's interval of the noise
    scale adds the error of tr(H S) over the probes.

    Cost: `num_probes` products with H and as many with Sigma, one more with H, two passes over single examples; with
    `damping` also the steps of CG.

    Args:
        objective: with `loss=`.
        num_probes: at least 2. As many as parameters, or more: every unit vector once, and all is exact.
        confidence: of the interval of the noise scale.
        damping: asks for the Takeuchi criterion with this much on G's diagonal, positive.
        rtol: relative residual of its solves.
        generator: source of the probes, on the objective's device, or a seed.

    Raises:
        InputError: for fewer than 2 probes, a damping that is not positive, a confidence outside (0, 1), or a
            generator elsewhere.
        NonFiniteError: if a product is not finite.

    Reference: McCandlish et al. (2018), section 2; Zhu, Wu, Yu, Wu and Ma (2019), The anisotropic noise in stochastic
    gradient descent; Takeuchi (1976); Thomas et al. (2020), On the interplay between noise and curvature.
    """
    if num_probes < 2:
        raise InputError(f"num_probes must be at least 2, to know their spread, got {num_probes}.")
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}.")
    if damping is not None and not damping > 0:
        raise InputError(f"damping must be positive, or None to leave out the Takeuchi criterion, got {damping}.")
    H, S = HessianOperator(objective), GradientCovarianceOperator(objective)
    n = objective.num_params
    exact = num_probes >= n
    if exact:
        Z = math.sqrt(n) * torch.eye(n, dtype=H.dtype, device=H.device)  # means over columns are traces
    else:
        Z = rademacher(n, num_probes, generator=generator, dtype=H.dtype, device=H.device)
    g = whole(objective.gradient())
    HZ, SZ, Hg = H @ Z, S @ Z, H @ g
    if not bool(torch.isfinite(HZ).all() & torch.isfinite(SZ).all() & torch.isfinite(Hg).all()):
        raise NonFiniteError("a product with H or Sigma is not finite; check the model for overflow.")
    norms = gradient_norms(objective)
    pairs = [(HZ, SZ), (Z, HZ), (Z, SZ), (HZ, HZ), (SZ, SZ)]
    samples = torch.stack([(a.double() * b.double()).sum(0) for a, b in pairs])
    spent, takeuchi = 2 * Z.shape[1] + 1, None
    if damping is not None:
        solved = cg(GGNOperator(objective), SZ, damping=damping, rtol=rtol)
        solved.raise_if_failed()
        spent += solved.num_matvecs
        values = norms.sum_squared_shares * (Z.double() * solved.x.double()).sum(0)
        takeuchi = _measured(values[None], exact)[0]
    together, of_h, of_sigma, h_square, s_square = _measured(samples, exact)
    lengths = math.sqrt(h_square.value * s_square.value)
    traces = of_h.value * of_sigma.value
    return CurvatureNoise(
        trace_h_sigma=together,
        curvature_along_gradient=float(g.double() @ Hg.double()),
        mean_squared_norm=float(g.double().square().sum()),
        trace_h=of_h,
        trace_sigma=of_sigma,
        noise_scale=_noise_scale(objective, norms, together, g, Hg, (HZ.T @ SZ).double(), exact, confidence),
        cosine=together.value / lengths if lengths > 0 else math.nan,
        anisotropy=n * together.value / traces if traces != 0 else math.nan,
        takeuchi=takeuchi,
        damping=damping or 0.0,
        num_matvecs=spent,
    )


def _noise_scale(
    objective: Objective,
    norms: GradientNorms,
    together: Measured,
    g: Tensor,
    Hg: Tensor,
    products: Tensor,
    exact: bool,
    confidence: float,
) -> NoiseScale:
    """Return tr(H S) / G'H G; `products` are z_i'H Sigma z_j over probes, (k, k)."""
    share2, factor = norms.sum_squared_shares, norms.unbiased_factor
    noise, along = factor * together.value, float(g.double() @ Hg.double())
    bend = along - share2 * noise
    if not (0 < noise < math.inf):
        return NoiseScale(value=math.nan, lower=0.0, upper=math.inf, confidence=confidence)
    k = len(products)
    crossed = products * products.T
    square = float(crossed.sum() / k**2) if exact else float((crossed.sum() - crossed.trace()) / (k * (k - 1)))
    p, moved = of_all_ranks(objective, norms.weights, projections(objective, Hg)[1])
    spread = factor * float((p / p.sum()) @ (moved - along).square())  # g'H S H g
    floor = 2 * (share2 * factor) ** 2 * max(square, 0.0)
    slope = noise * 4 * share2 * spread / along if along > 0 else 0.0
    quantile = student_quantile(min(together.dof, 1 / share2 - 1), confidence)
    variances = ((factor * together.stderr) ** 2, slope, max(floor, 1e-24 * along**2))
    lower, upper = ratio_interval(noise, bend, variances, quantile)
    return NoiseScale(value=noise / bend if bend else math.inf, lower=lower, upper=upper, confidence=confidence)


@checked
def tail_index(samples: Tensor, *, block: int | None = None) -> float:
    """Estimate the tail index alpha of symmetric alpha-stable samples: 2 for normal ones, below 2 for heavy tails.

    With K = K1 K2 samples X_j and Y_i the sum of the i-th block of K1,

        1 / alpha = (mean_i log |Y_i| - mean_j log |X_j|) / log K1,

    along the first dimension, averaged over the others. Samples along the first dimension must be independent: pass the
    deviations of batch gradients from their mean, (K, n), not the entries of one gradient. Entries that are 0 or not
    finite in any sample are left out. The estimate may exceed 2 by chance.

    Args:
        samples: (K,) or (K, n).
        block: K1, at least 2. Default: the divisor of K nearest to its root.

    Raises:
        InputError: for K without a divisor between 2 and K / 2, a block that does not divide K, or no usable entry.

    Reference: Mohammadi, Mohammadpour and Ogata (2015), On estimating the tail index and the spectral measure of
    multivariate alpha-stable distributions, corollary 2.4; for gradient noise Simsekli, Sagun and Gurbuzbalaban (2019).
    """
    count = samples.shape[0] if samples.ndim else 0
    divisors = [d for d in range(2, count // 2 + 1) if count % d == 0]
    if block is None:
        if not divisors:
            raise InputError(f"{count} samples do not split into equal blocks; pass a number that is not prime.")
        block = min(divisors, key=lambda d: abs(d - math.sqrt(count)))
    elif block not in divisors:
        raise InputError(f"block must divide the number of samples, {count}, into at least two, got {block}.")
    X = samples.detach().double().reshape(count, -1)
    X = X[:, (torch.isfinite(X) & (X != 0)).all(0)]
    if X.shape[1] == 0:
        raise InputError("no entry is finite and different from zero in all samples; there is no noise to judge.")
    Y = X.reshape(count // block, block, -1).sum(1)
    inverse = (Y.abs().log().mean() - X.abs().log().mean()) / math.log(block)
    return float(1 / inverse)


def _measured(samples: Tensor, exact: bool) -> list[Measured]:
    mean, stderr = mean_and_stderr(samples, dim=1)
    if exact:
        return [Measured(value=value, stderr=0.0) for value in mean.tolist()]
    return [
        Measured(value=value, stderr=error, dof=len(row) - 1.0, skewness=float(skewness(row)))
        for value, error, row in zip(mean.tolist(), stderr.tolist(), samples, strict=True)
    ]
