"""The noise of stochastic gradients: what one pass over single examples says about every batch size.

All measures here are functions of few sums over examples: of g_i, of their squares entry by entry, of |g_i|^2 and of
g_i'g. All come from one pass (`curvature.per_example`) where the data are one batch. The mean gradient of several is
known only after it: what single gradients are made of is held until then or, if the objective keeps no graphs, the
last come from one product J g of the outputs' Jacobian, since g_i'g is the derivative of example i's loss along g.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from analysis.noise.results import GradientNoise, NoiseScale
from analysis.records.measured import Measured
from curvature.arguments import checked
from curvature.engine.output_metrics import example_shares
from curvature.environment.autocast import full_precision
from curvature.errors import CheckFailedError, DataError, InputError
from curvature.objective.objective import Objective
from curvature.objective.ranks import together
from curvature.per_example import GradientMoments, GradientNorms, gradient_moments
from curvature.per_example.moments import refuse_shuffling
from curvature.results.estimates import mean_and_stderr
from curvature.results.intervals import LIGHT_TAILS, ratio_interval, spread_of, student_quantile, tail_exponent

__all__ = [
    "gradient_noise",
    "inner_products",
    "noise_scale_from_two_sizes",
    "notes_on_errors",
    "projections",
    "takes_one_pass",
]

_HEAVY_TAILS = (
    "Heavy tails: the largest squared distances of single gradients from their mean fall off like a power of exponent "
    "{:.2g}. Few examples decide, and errors and intervals may be too short."
)
_FEW_EXAMPLES = (
    "Errors and intervals over the data rest on {} examples and may be too short: of nominal 95 %, intervals from 10 "
    "covered 90 %, from 5 83 %."
)
_FEW = 30


def notes_on_errors(num_examples: int, tail: float) -> tuple[str, ...]:
    """Say what may make errors over the data too short: few examples, or `tail_exponent` of their squared distances."""
    few = (_FEW_EXAMPLES.format(num_examples),) if num_examples < _FEW else ()
    return (*few, _HEAVY_TAILS.format(tail)) if tail < LIGHT_TAILS else few


@together
@full_precision
@checked
def gradient_noise(
    objective: Objective, *, confidence: float = 0.95, moments: GradientMoments | None = None
) -> GradientNoise:
    """Measure the covariance of single examples' gradients and all that batch sizes are judged by.

    With t_i = |g_i - g|^2 and u_i = 2 (g_i'g - |g|^2), the spread over examples of t_i gives the error of tr S. The
    variance of |G|^2 is 4 G'S G / N + 2 tr S^2 / N^2, with Var(t_i) for 2 tr S^2, as for normal noise, and no less than
    2 (tr S)^2 over the dimension. Fieller's interval of their ratio R takes it at the |G|^2 that R stands for. Nominal
    95 % cover 93 % and more for light tails, whatever the spectrum of S and also where the mean is below its noise;
    where the largest t_i fall off as a power below 4 (`tail`) standard errors have no variance; they cover down to 78 %
    where it is near 2 or less, and `notes` say so.

    Cost: one pass of `gradient_moments`; for several batches and `keep_graphs=False` also one product with the Jacobian
    of the outputs, at the memory of one batch. Else inputs and gradients of the layers are held for all batches, while
    they fit.

    Over ranks the result is that of all data, on every rank.

    Args:
        objective: with `loss=`, examples along the first dimension, in an order that is the same at every pass.
        confidence: of the interval of the noise scale.
        moments: `gradient_moments(objective)` of this very point, if it was taken before.

    Raises:
        DataError: for fewer than two examples that count, for a loader that shuffles where two passes are made, and as
            `gradient_moments`.
        InputError: for a confidence outside (0, 1), and as `gradient_moments`.
        CheckFailedError: if the examples' inner products with g do not average to |g|^2.

    Reference: McCandlish, Kaplan, Amodei et al. (2018), An empirical model of large-batch training; Fieller (1954).

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.eye(2), torch.tensor([[1.0], [3.0]])  # gradients (-2, 0) and (0, -6)
        >>> noise = gradient_noise(Objective(model, nn.MSELoss(), (x, y)))
        >>> noise.trace.value, noise.mean_squared_norm
        (20.0, 10.0)
    """
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}.")
    clock = time.perf_counter()
    if moments is None:
        moments = gradient_moments(objective, along_mean=takes_one_pass(objective))
    factor, share2 = moments.unbiased_factor, moments.sum_squared_shares
    if not math.isfinite(factor):
        raise DataError("the covariance of gradients needs at least two examples that count; pass more data.")
    along = inner_products(objective, moments)
    if moments.squared_norms is None:
        raise InputError("moments hold no norms of single examples' gradients; take them with norms=True.")
    square = float(moments.mean.double().square().sum())
    p, norms, along = of_all_ranks(objective, moments.weights, moments.squared_norms.double(), along)
    p = p / p.sum()
    spread = (norms - 2 * along + square).clamp_min(0)  # t_i = |g_i - g|^2
    biased = float(moments.trace.double())
    gap, rounding = abs(float(p @ along) - square), float(p @ norms) + square
    if not gap <= 100 * torch.finfo(moments.mean.dtype).eps * rounding:
        raise CheckFailedError(
            f"inner products of the examples' gradients with the mean average to {float(p @ along):.6g}, not |g|^2 = "
            f"{square:.6g}: two passes over the data met different examples; pass a list of batches."
        )
    trace = factor * biased
    of_trace = factor * (spread - biased)
    of_square = 2 * (along - square) - share2 * of_trace
    weights = factor * p.square()
    va, covariance = (float((weights * of_trace) @ other) for other in (of_trace, of_square))
    signal, dof = square - share2 * trace, 1 / share2 - 1
    parallel = factor * float(p @ (along - square).square())
    linear = 4 * share2 * parallel  # of |g|^2, at its own length
    floor = share2 * max(va, 2 * share2 * trace**2 / min(objective.num_params, dof))
    slope = trace * linear / square if square > 0 else 0.0
    quantile = student_quantile(dof, confidence)
    lower, upper = ratio_interval(trace, signal, (va, slope - 2 * covariance, floor), quantile)
    tail, (of_spread, lopsided) = tail_exponent(spread[p > 0]), spread_of(spread[p > 0], of_trace[p > 0])
    orthogonal = factor * max(0.0, float(p @ norms) - float(p @ along.square()) / square) if square > 0 else trace
    variance, noisy = moments.variance.double() * factor, moments.variance > 0
    ratios = (moments.mean.double().square() / variance)[noisy]
    layer_traces = moments.layer_traces * factor
    return GradientNoise(
        num_examples=len(p),
        effective_examples=1 / share2,
        loss=moments.loss,
        mean_squared_norm=square,
        trace=Measured(
            value=trace,
            stderr=va**0.5 if of_spread > 0 else math.nan,  # the parts of two examples are always alike
            dof=min(dof, of_spread),
            skewness=lopsided,
        ),
        squared_norm=Measured(value=signal, stderr=max(linear - floor, floor) ** 0.5, dof=dof),
        noise_scale=NoiseScale(
            value=trace / signal if signal != 0 else math.inf, lower=lower, upper=upper, confidence=confidence
        ),
        tail=tail,
        notes=notes_on_errors(len(p), tail),
        parallel_variance=parallel,
        orthogonal_variance=orthogonal,
        mean_example_squared_norm=float(p @ norms),
        layers=moments.layers,
        layer_traces=layer_traces,
        layer_squared_norms=moments.layer_mean_squared_norms - share2 * layer_traces,
        layer_gsnr=moments.layer_gsnr / factor,
        gsnr=float(ratios.mean()) if len(ratios) else math.nan,
        evidence=1 - float(ratios.mean()) / share2 if len(ratios) else math.nan,
        seconds=time.perf_counter() - clock,
    )


def of_all_ranks(objective: Objective, *values: Tensor) -> Sequence[Tensor]:
    """Return what the ranks with different data have, one after the other, for what this one has of its examples."""
    return values if objective.ranks is None else objective.ranks.joined(torch.stack(values)).unbind()


@checked
def takes_one_pass(objective: Objective) -> bool:
    """Return whether g_i'g comes with the norms: of one batch, or of several whose gradients' factors may be held.

    Behind a head in blocks it does, too: a product with the outputs' Jacobian would hold all logits. So it does over
    ranks, which may have different numbers of batches.
    """
    if objective.ranks is not None:
        return True
    return objective.num_batches == 1 or objective.may_keep_graphs or objective.evaluator.head_in_use


@full_precision
@checked
def inner_products(objective: Objective, norms: GradientNorms) -> Tensor:
    """Return g_i'g for every example (N,), float64: those that came with the norms, or by `projections`."""
    if norms.along_mean is not None:
        return norms.along_mean.double()
    along = projections(objective, norms.mean)[1]
    refuse_shuffling(objective)
    return along


@full_precision
@checked
def projections(objective: Objective, v: Tensor) -> tuple[float, Tensor]:
    """Return the loss, and g_i'v for every example (N,), float64, g_i as `GradientNorms` defines it; v is (n,).

    Over ranks the loss is that of all data, and the examples are this rank's.

    Cost: one product with the outputs' Jacobian, 0.7 gradients with graphs kept and 2 without.

    Raises:
        InputError: for v of another shape, or an objective that does not tell examples apart.
        CheckFailedError: if a batch's outputs do not carry its examples along the first dimension.
    """
    if tuple(v.shape) != (objective.num_params,):
        raise InputError(f"v must be of shape ({objective.num_params},), got {tuple(v.shape)}.")
    found, weights, losses, terms = [], 0.0, 0.0, 0.0
    for lin in objective.linearizations():
        batch = lin.batch_outputs()
        shares = example_shares(batch, "example")
        weights += lin.weight
        tangent = lin.jvp(v[None]).reshape(batch.outputs.shape)
        with torch.enable_grad():
            leaf = batch.outputs.detach().requires_grad_()
            (slope,) = torch.autograd.grad(batch.rule.value(leaf, batch.targets), leaf)
        rates = (slope.double() * tangent.double()).flatten(1).sum(1)
        if len(rates) != len(shares):
            raise CheckFailedError(
                f"{len(shares)} examples but {len(rates)} outputs in a batch: examples must lie along the first "
                "dimension of the outputs; reshape them in forward=."
            )
        if lin.weight == 0:
            rates = torch.zeros_like(rates)
        else:
            losses += float(lin.loss) * (1.0 if objective.is_sum else lin.weight)
        found.append(torch.where(shares > 0, rates / shares, 0.0))
        terms += float(shares.sum())
    along = torch.cat(found or [torch.zeros(0, dtype=torch.float64, device=objective.device)])
    if objective.ranks is not None:
        packed, weights = objective.ranks.sum(along.new_tensor([losses, terms]), weights)
        losses, terms = packed.tolist()
    return (losses, along * terms) if objective.is_sum else (losses / weights, along)


@checked
def noise_scale_from_two_sizes(
    small: Sequence[float] | Tensor,
    big: Sequence[float] | Tensor,
    *,
    small_size: float,
    big_size: float,
    confidence: float = 0.95,
) -> tuple[NoiseScale, Measured, Measured]:
    """Return the noise scale, tr S and |G|^2 from squared gradient norms at two batch sizes, k measurements of each.

        |G|^2 = (B |g_B|^2 - b |g_b|^2) / (B - b),    tr S = (|g_b|^2 - |g_B|^2) / (1 / b - 1 / B)

    without bias for batches drawn independently; numerator and denominator are averaged before they are divided. Pairs
    may depend on each other (the small batch a part of the big one), measurements must not.

    Args:
        small: (k,), |g_b|^2.
        big: (k,), |g_B|^2.
        small_size: b, in examples.
        big_size: B > b.
        confidence: of the interval (Fieller), by Student's t with k - 1 degrees of freedom.

    Raises:
        InputError: for sizes that do not satisfy 0 < b < B, unequal or fewer than two measurements.

    Reference: McCandlish et al. (2018), appendix A.1.
    """
    a, b = (torch.as_tensor(values, dtype=torch.float64) for values in (small, big))
    if not 0 < small_size < big_size:
        raise InputError(f"sizes must satisfy 0 < small_size < big_size, got {small_size} and {big_size}.")
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise InputError(
            f"small and big must be two lists of one length, at least 2, got {tuple(a.shape)}, {tuple(b.shape)}."
        )
    squares = (big_size * b - small_size * a) / (big_size - small_size)
    traces = (a - b) / (1 / small_size - 1 / big_size)
    means, errors = mean_and_stderr(torch.stack([traces, squares]), dim=1)
    (va, vab), (_, vb) = (torch.cov(torch.stack([traces, squares])) / len(a)).tolist()
    (trace, square), dof = means.tolist(), len(a) - 1.0
    lower, upper = ratio_interval(trace, square, (va, -2 * vab, vb), student_quantile(dof, confidence))
    value = trace / square if square != 0 else math.inf
    scale = NoiseScale(value=value, lower=lower, upper=upper, confidence=confidence)
    of_trace, of_square = errors.tolist()
    return scale, Measured(value=trace, stderr=of_trace, dof=dof), Measured(value=square, stderr=of_square, dof=dof)
