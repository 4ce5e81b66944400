"""How the noise of stochastic gradients lies against curvature, and how heavy its tails are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from analysis.noise_results import CurvatureNoise
from analysis.results import Measured
from curvature.arguments import checked
from curvature.autocast import full_precision
from curvature.errors import InputError, NonFiniteError
from curvature.linalg import cg, rademacher
from curvature.objective import Objective
from curvature.operators import GGNOperator, GradientCovarianceOperator, HessianOperator
from curvature.per_example import gradient_norms
from curvature.results import mean_and_stderr

__all__ = ["curvature_noise", "tail_index"]


@full_precision
@checked
def curvature_noise(
    objective: Objective,
    *,
    num_probes: int = 16,
    damping: float | None = None,
    rtol: float = 1e-4,
    generator: torch.Generator,
) -> CurvatureNoise:
    """Estimate tr(H Sigma), the noise scale it gives, and how far noise and curvature share directions.

    With Rademacher probes z: z'H Sigma z, z'Hz, z'Sigma z, |Hz|^2 and |Sigma z|^2 are unbiased for tr(H Sigma), the
    traces and the squared Frobenius norms; z'(G + damping I)^-1 Sigma z for the Takeuchi criterion, solved by CG.
    Cost: `num_probes` products with H and as many with Sigma, one more with H; with `damping` also the steps of CG.

    Args:
        objective: with `loss=`.
        num_probes: at least 2. As many as parameters, or more: every unit vector once, and all is exact.
        damping: asks for the Takeuchi criterion with this much on G's diagonal, positive.
        rtol: relative residual of its solves.
        generator: source of the probes, on the objective's device.

    Raises:
        InputError: for fewer than 2 probes, a damping that is not positive, or a generator elsewhere.
        NonFiniteError: if a product is not finite.

    Reference: McCandlish et al. (2018), section 2; Zhu, Wu, Yu, Wu and Ma (2019), The anisotropic noise in stochastic
    gradient descent; Takeuchi (1976); Thomas et al. (2020), On the interplay between noise and curvature.
    """
    if num_probes < 2:
        raise InputError(f"num_probes must be at least 2, to know their spread, got {num_probes}.")
    if damping is not None and not damping > 0:
        raise InputError(f"damping must be positive, or None to leave out the Takeuchi criterion, got {damping}.")
    if generator.device.type != objective.device.type:
        raise InputError(
            f"generator lives on {generator.device} but the objective on {objective.device}; make it with "
            f"torch.Generator({str(objective.device)!r})."
        )
    H, S = HessianOperator(objective), GradientCovarianceOperator(objective)
    n = objective.num_params
    exact = num_probes >= n
    if exact:
        Z = math.sqrt(n) * torch.eye(n, dtype=H.dtype, device=H.device)  # means over columns are traces
    else:
        Z = rademacher(n, num_probes, generator=generator, dtype=H.dtype, device=H.device)
    g = objective.gradient()
    HZ, SZ, Hg = H @ Z, S @ Z, H @ g
    if not bool(torch.isfinite(HZ).all() & torch.isfinite(SZ).all() & torch.isfinite(Hg).all()):
        raise NonFiniteError("a product with H or Sigma is not finite; check the model for overflow.")
    pairs = [(HZ, SZ), (Z, HZ), (Z, SZ), (HZ, HZ), (SZ, SZ)]
    samples = torch.stack([(a.double() * b.double()).sum(0) for a, b in pairs])
    spent, takeuchi = 2 * Z.shape[1] + 1, None
    if damping is not None:
        solved = cg(GGNOperator(objective), SZ, damping=damping, rtol=rtol)
        solved.raise_if_failed()
        spent += solved.num_matvecs
        concentration = gradient_norms(objective).sum_squared_shares
        values = concentration * (Z.double() * solved.x.double()).sum(0)
        takeuchi = _measured(values[None], exact)[0]
    together, of_h, of_sigma, h_square, s_square = _measured(samples, exact)
    norms = math.sqrt(h_square.value * s_square.value)
    traces = of_h.value * of_sigma.value
    return CurvatureNoise(
        trace_h_sigma=together,
        curvature_along_gradient=float(g.double() @ Hg.double()),
        mean_squared_norm=float(g.double().square().sum()),
        trace_h=of_h,
        trace_sigma=of_sigma,
        cosine=together.value / norms if norms > 0 else math.nan,
        anisotropy=n * together.value / traces if traces != 0 else math.nan,
        takeuchi=takeuchi,
        damping=damping or 0.0,
        num_matvecs=spent,
    )


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
    return [Measured(value=m, stderr=0.0 if exact else s) for m, s in zip(mean.tolist(), stderr.tolist(), strict=True)]
