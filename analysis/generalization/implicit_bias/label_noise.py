"""Noise on the labels: SGD wanders along the solutions to where the loss is flattest, which here is sparse.

A linear model with weights b = v^2 (entrywise) and L = |X b - y|^2 / (2 n) has many solutions. Among them, with m_j the
mean of X_ij^2 over i,

    tr H(v) = 4 sum_j m_j v_j^2 = 4 sum_j m_j b_j,

a weighted l1 norm of b: flat is sparse. SGD on batches of B drawn examples whose labels get noise of variance sigma^2
at each step has gradient noise of covariance c H on the solutions, c = sigma^2 / B. For small learning rates eta its
mean follows, in the time t = eta^2 x steps, the flow

    dv/dt = -(c / 4) P(v) grad tr H(v),

P the projection onto the directions in which the loss stays zero. Without noise nothing moves.

References: Blanc, Gupta, Valiant and Valiant (2020), Implicit regularization for deep neural networks driven by an
Ornstein-Uhlenbeck like process; HaoChen, Wei, Lee and Ma (2021), Shape matters: understanding the implicit bias of the
noise covariance, for the model; Li, Wang and Arora (2022), What happens after SGD reaches zero loss, corollary 5.2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.generalization.implicit_bias.diagonal_linear import check_system, least_weighted, solve_dual
from analysis.generalization.implicit_bias.results import LabelNoiseRun
from curvature.arguments import checked
from curvature.errors import InputError, NotConvergedError
from curvature.generators import AnyGenerator, as_generator

__all__ = ["label_noise_descent", "settled"]

_POINTS = 100


@checked
def label_noise_descent(
    X: Tensor,
    y: Tensor,
    *,
    noise: float = 1.0,
    lr: float = 0.01,
    steps: int = 40_000,
    batch_size: int = 1,
    start: float = 1.0,
    generator: AnyGenerator,
) -> LabelNoiseRun:
    """Train b = v^2 by SGD with noise of +-`noise` on the labels, beside the flow that theory names.

    It begins at the solution where the gradient flow without noise ends from v = `start`, so that all that moves is the
    noise's doing. Weights are averaged over the steps between two readings, a hundredth of all.

    Cost: `steps` products with `batch_size` rows of X; the flow is cheap.

    Args:
        X: (n, d), n < d, independent rows.
        y: (n,), for which X b = y has solutions with all b positive.
        noise: sigma, of labels; 0 for SGD without it.
        lr: eta. The flow is the limit of small ones; fluctuations around it are of size eta^(1/2) sigma.
        steps: of SGD.
        batch_size: B, drawn with replacement.
        start: initial v, positive.
        generator: of batches and noise.

    Raises:
        InputError: for arguments out of range, without a solution of positive b, or if the descent diverged.
    """
    X, y = check_system(X, y)
    n, d = X.shape
    if n == d:
        raise InputError(f"with as many rows as columns, {n}, there is one solution; nothing can move.")
    if (
        not (0 <= noise < math.inf and 0 < lr < math.inf and 1e-100 <= start <= 1e100)
        or steps < _POINTS
        or batch_size < 1
    ):
        raise InputError(
            f"noise must be at least 0, lr positive, start from 1e-100 to 1e100, batch_size at least 1 and steps at "
            f"least {_POINTS}; got {noise}, {lr}, {start}, {batch_size} and {steps}."
        )
    moments = X.square().mean(0)
    flattest = least_weighted(X, y, moments)
    v0 = settled(X, y, float(start))
    means = _descended(X, y, v0, noise, lr, steps, batch_size, as_generator(generator))
    bounds = torch.linspace(0, steps, _POINTS + 1, dtype=torch.float64)
    times = lr**2 * (bounds[1:] + bounds[:-1]) / 2
    flow, v = [], v0
    for before, after in zip([0.0, *times.tolist()], times.tolist(), strict=False):
        v = _flowed(X, y, v, (noise**2 / batch_size / 4) * (after - before), moments)
        flow.append(v)
    last = means[-_POINTS // 10 :].mean(0)
    return LabelNoiseRun(
        times=times,
        trace=4 * means.square() @ moments,
        expected_trace=4 * torch.stack(flow).square() @ moments,
        losses=(means.square() @ X.T - y).square().sum(1) / (2 * n),
        solution=last.square(),
        start=v0.square(),
        flow=flow[-1].square(),
        expected=flattest,
        start_trace=4 * float(moments @ v0.square()),
        least_trace=4 * float(moments @ flattest),
    )


def _descended(
    X: Tensor, y: Tensor, v: Tensor, noise: float, lr: float, steps: int, batch_size: int, g: torch.Generator
) -> Tensor:
    """Return the mean weights (100, d) of each hundredth of the steps."""
    means, total, done = [], torch.zeros_like(v), 0
    ends = [round((k + 1) * steps / _POINTS) for k in range(_POINTS)]
    for end in ends:
        count = end - done
        rows = torch.randint(len(X), (count, batch_size), generator=g)
        signs = noise * (2.0 * torch.randint(2, (count, batch_size), generator=g) - 1)
        total.zero_()
        for chosen, sign in zip(X[rows], y[rows] + signs, strict=True):
            gap = torch.mv(chosen, v * v) - sign
            v = v - v * torch.mv(chosen.T, gap).mul_(2 * lr / batch_size)
            total += v
        means.append(total / count)
        done = end
        if not bool(torch.isfinite(v).all()):
            raise InputError(f"SGD diverged within {end} steps; lower lr, {lr:g} now.")
    return torch.stack(means)


@dataclass(frozen=True)
class _Exponential:
    """b = v^2 along gradient flow from v = start: start^2 exp(X'z)."""

    start: float

    def integral(self, at: Tensor) -> Tensor:
        return self.start**2 * torch.expm1(at)

    def __call__(self, at: Tensor) -> Tensor:
        return self.start**2 * at.exp()

    slope = __call__


def settled(X: Tensor, y: Tensor, start: float) -> Tensor:
    """Return the v at which the gradient flow without noise ends, from v = start.

    Raises:
        InputError: if X b = y has no solution with all b positive.
    """
    weights = _Exponential(start)
    try:
        return weights(X.T @ solve_dual(X, y, weights, torch.zeros_like(y), 1e-12)).sqrt()
    except NotConvergedError:
        raise InputError(
            "X b = y has no solution with all b positive, or none that is well within, at which noise could begin to "
            f"move; take fewer rows, or a start nearer to the root of such b than {start:g}."
        ) from None


def _flowed(X: Tensor, y: Tensor, v: Tensor, time: float, moments: Tensor) -> Tensor:
    """Return v after the flow dv/dt = -P grad tr H for a time, by steps of Heun's method, each put back on X b = y."""

    def rate(v: Tensor) -> Tensor:
        J = 2 * X * v
        gradient = 8 * moments * v
        return -(gradient - J.T @ torch.linalg.solve(J @ J.T, J @ gradient))

    count = max(1, math.ceil(time * 8 * float(moments.max()) / 0.02))
    for _ in range(count):
        first = rate(v)
        v = v + time / count * (first + rate(v + time / count * first)) / 2
        for _ in range(3):  # Newton's steps of least length back to the solutions
            J = 2 * X * v
            v = v - J.T @ torch.linalg.solve(J @ J.T, X @ v.square() - y)
    return v
