"""Deep linear networks: singular values are learnt one after the other, the large ones first, each along a sigmoid.

With W = W_N ... W_1 and L = |W - S|^2 / 2 the gradient flow from a balanced start, W_j+1' W_j+1 = W_j W_j', whose
singular vectors are those of S, moves each singular value u towards s by itself:

    du/dt = N u^(2 - 2/N) (s - u);    N = 2:  u(t) = s e^(2st) / (e^(2st) - 1 + s / u_0).

From a small start the rank of W grows in steps: the bias is to low rank, and stronger with depth.

References: Saxe, McClelland and Ganguli (2014), Exact solutions to the nonlinear dynamics of learning in deep linear
neural networks; Arora, Cohen, Hu and Luo (2019), Implicit regularization in deep matrix factorization, theorem 3.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from analysis.generalization.implicit_bias.results import DeepLinearRun
from curvature.arguments import checked
from curvature.errors import InputError, NotConvergedError
from curvature.generators import AnyGenerator, as_generator

__all__ = ["deep_linear_singular_values", "learning_time", "singular_value_rates", "steps_for", "train_deep_linear"]

_STEP = 0.01  # of a step, times the curvature at the minimum


@checked
def deep_linear_singular_values(target: Tensor, start: Tensor, times: Tensor, *, depth: int = 2) -> Tensor:
    """Return the singular values (T, r) of the balanced gradient flow at `times`, towards those of the target.

    Depth 1 and 2 in closed form, deeper ones by integration of the logarithm to 1e-10.

    Args:
        target: (r,), singular values s of the target, not negative.
        start: (r,), those of the product at time 0, positive.
        times: (T,), ascending from 0 or later.
        depth: N, the number of factors.

    Raises:
        InputError: for arguments out of range.
        NotConvergedError: if the integration fails.

    Examples:
        >>> s, u = torch.tensor([2.0]), torch.tensor([0.01])
        >>> deep_linear_singular_values(s, u, torch.tensor([0.0, 1.3, 5.0])).T
        tensor([[0.0100, 0.9534, 2.0000]], dtype=torch.float64)
    """
    s, u, t = (x.detach().double().cpu() for x in (target, start, times))
    if depth < 1 or s.shape != u.shape or s.ndim != 1 or t.ndim != 1:
        raise InputError(
            f"depth must be at least 1, target and start of one shape (r,), times (T,); got depth {depth} and shapes "
            f"{tuple(s.shape)}, {tuple(u.shape)}, {tuple(t.shape)}."
        )
    if not all(bool(torch.isfinite(x).all()) for x in (s, u, t)):
        raise InputError("target, start and times must be finite; there are NaN or infinite numbers among them.")
    if bool((u <= 0).any()) or bool((s < 0).any()) or bool((t < 0).any()) or bool((t.diff() < 0).any()):
        raise InputError("start must be positive, target and times not negative, and times ascending.")
    if depth == 1:
        return s + (u - s) * (-t[:, None]).exp()
    if depth == 2:
        risen, of_zero = -torch.expm1(-2 * s * t[:, None]), u / (1 + 2 * u * t[:, None])  # the limit s -> 0
        return torch.where(s > 0, s / (risen + (s.log() - u.log() - 2 * s * t[:, None]).exp()), of_zero)
    return _integrated(s, u, t, depth)


def _integrated(s: Tensor, u: Tensor, t: Tensor, depth: int) -> Tensor:
    """Return the singular values (T, r) at times by integration, in units of the largest value and the last time."""
    if not len(t) or not len(s) or float(t[-1]) == 0:
        return u.expand(len(t), -1).clone()
    from scipy.integrate import solve_ivp

    unit, power = max(float(s.max()), float(u.max())), 1 - 2 / depth
    end = float(t[-1] * unit ** (1 + power))
    if not math.isfinite(end):
        raise InputError(f"times up to {float(t[-1]):g} are too long for values of {unit:g}; give shorter ones.")
    goal = s / unit

    def rate(_: float, log_u: Tensor) -> Tensor:
        value = torch.as_tensor(log_u).exp()
        return end * depth * value**power * (goal - value)

    shares, where = (t / t[-1]).unique(return_inverse=True)  # equal times are one
    settings = {"method": "LSODA", "t_eval": shares.numpy(), "rtol": 1e-10, "atol": 1e-10}
    found = solve_ivp(rate, (0.0, 1.0), (u.log() - math.log(unit)).numpy(), **settings)
    if not found.success:
        raise NotConvergedError(f"the flow could not be followed to time {float(t[-1]):g}: {found.message}", found)
    return unit * torch.as_tensor(found.y.T)[where].exp()


@checked
def singular_value_rates(factors: list[Tensor], gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return the singular values u (r,) of W = W_N ... W_1 and how fast the gradient flow of any loss moves them, (r,).

    For a balanced start du_r/dt = -N u_r^(2 - 2/N) p_r' (dL/dW) q_r, with p_r and q_r the singular vectors (Arora et
    al. 2019, theorem 3): small ones hardly move, the less so the deeper the network.

    Args:
        factors: W_1, ..., W_N.
        gradient: dL/dW, (m, n).

    Raises:
        InputError: for factors that do not fit to each other.
    """
    W = _product(factors)
    if gradient.shape != W.shape:
        raise InputError(f"gradient must have the shape of the product, {tuple(W.shape)}; got {tuple(gradient.shape)}.")
    U, u, Vt = torch.linalg.svd(W, full_matrices=False)
    depth = len(factors)
    return u, -depth * u ** (2 - 2 / depth) * torch.einsum("ir,ij,rj->r", U, gradient, Vt)


@checked
def train_deep_linear(
    target: Tensor,
    *,
    depth: int = 2,
    scale: float = 1e-3,
    time: float | None = None,
    aligned: bool = True,
    observed: Tensor | None = None,
    num_points: int = 200,
    generator: AnyGenerator = 0,
) -> DeepLinearRun:
    """Train W_N ... W_1 towards a matrix by gradient descent from a balanced start, in small steps, and watch its rank.

    All singular values of the product begin at `scale`. Steps are 0.01 over the largest curvature at the minimum, so
    that descent follows its flow to within 1 %.

    Cost: time x curvature x 100 steps of 3 N products of matrices.

    Args:
        target: S, (m, n).
        depth: N, at least 1. All inner sizes are min(m, n).
        scale: singular values of the product at the start; positive.
        time: steps times learning rate. Default: until the smallest singular value of S is learnt that is above a
            hundredth of the largest.
        aligned: begin along the singular vectors of S, as the closed form has it; otherwise along random ones.
        observed: (m, n), boolean: entries that the loss sees, for matrix completion. Default: all.
        num_points: how many times are kept.
        generator: of random singular vectors.

    Raises:
        InputError: for arguments out of range.
    """
    if target.ndim != 2 or not bool(torch.isfinite(target).all()) or not bool(target.any()):
        raise InputError("target must be a finite matrix other than zero.")
    if (
        depth < 1
        or not (scale > 0 and math.isfinite(scale))
        or num_points < 2
        or not (time is None or 0 < time < math.inf)
    ):
        raise InputError(
            f"depth must be at least 1, scale and time positive, num_points at least 2; got {depth}, {scale}, {time} "
            f"and {num_points}."
        )
    if observed is not None and (observed.dtype != torch.bool or observed.shape != target.shape or not observed.any()):
        raise InputError(f"observed must be boolean, of shape {tuple(target.shape)}, with some entries True.")
    S = target.detach().double().cpu()
    U, s, Vt = torch.linalg.svd(S, full_matrices=False)
    r, seen = len(s), torch.ones_like(S) if observed is None else observed.double().cpu()
    drawn, ends = as_generator(generator), (U, Vt.T)
    if not aligned:
        ends = (_orthonormal(len(U), r, drawn), _orthonormal(Vt.shape[1], r, drawn))
    factors = _balanced(*ends, depth, scale, drawn)
    time = learning_time(s, scale, depth) if time is None else time
    steps = max(num_points, steps_for(float(s[0]), scale, depth, time))
    lr = time / steps
    kept = {round(k * steps / (num_points - 1)) for k in range(num_points)}
    hidden, rows = (1 - seen).bool(), []
    for step in range(steps + 1):
        W = _product(factors)
        gap = (W - S) * seen
        after = _stepped(factors, gap, lr)
        if step in kept:
            u, rates = singular_value_rates(factors, gap)
            unbalanced = max((float((b.T @ b - a @ a.T).abs().max()) for a, b in pairwise(factors)), default=0.0)
            moved = (torch.linalg.svdvals(_product(after)) - u) / lr
            off = float((W - S)[hidden].norm() / S[hidden].norm()) if bool(S[hidden].any()) else math.nan
            rows.append((step * lr, u, float(gap.square().sum() / 2), unbalanced, moved, rates, off))
        if step < steps:
            factors = after
    times = torch.tensor([row[0] for row in rows], dtype=torch.float64)
    singular_values = torch.stack([row[1] for row in rows])
    if observed is None and aligned:
        begin = torch.full((r,), scale, dtype=torch.float64)
        expected = deep_linear_singular_values(s, begin, times, depth=depth).sort(dim=1, descending=True).values
    else:
        expected = torch.full_like(singular_values, torch.nan)
    shares = singular_values / singular_values.sum(1, keepdim=True)
    return DeepLinearRun(
        times=times,
        singular_values=singular_values,
        expected=expected,
        effective_rank=torch.special.entr(shares).sum(1).exp(),
        loss=torch.tensor([row[2] for row in rows], dtype=torch.float64),
        balance=torch.tensor([row[3] for row in rows], dtype=torch.float64),
        rates=torch.stack([row[4] for row in rows]),
        expected_rates=torch.stack([row[5] for row in rows]),
        hidden_error=torch.tensor([row[6] for row in rows], dtype=torch.float64),
        product=_product(factors),
        depth=depth,
    )


def _product(factors: list[Tensor]) -> Tensor:
    W = factors[0]
    for factor in factors[1:]:
        if factor.shape[1] != W.shape[0]:
            raise InputError(f"factors must fit: one of {tuple(factor.shape)} follows a product of {tuple(W.shape)}.")
        W = factor @ W
    return W


def _stepped(factors: list[Tensor], gap: Tensor, lr: float) -> list[Tensor]:
    """Return the factors after a step: dL/dW_j = (W_N ... W_j+1)' gap (W_j-1 ... W_1)'."""
    right = [torch.eye(factors[0].shape[1], dtype=gap.dtype)]  # products of what comes before
    for factor in factors[:-1]:
        right.append(factor @ right[-1])
    left, found = gap, []
    for factor, before in zip(reversed(factors), reversed(right), strict=True):
        found.append(factor - lr * left @ before.T)
        left = factor.T @ left
    return found[::-1]


def _balanced(U: Tensor, V: Tensor, depth: int, scale: float, generator: torch.Generator) -> list[Tensor]:
    """Return factors W_j = scale^(1/N) R_j R_j-1' with R_0 = V, R_N = U, others drawn: their product is scale U V'."""
    turns = [V, *(_orthonormal(U.shape[1], U.shape[1], generator) for _ in range(depth - 1)), U]
    return [scale ** (1 / depth) * after @ before.T for before, after in pairwise(turns)]


def _orthonormal(m: int, r: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(m, r, generator=generator, dtype=torch.float64)).Q


def steps_for(largest: float, scale: float, depth: int, time: float) -> int:
    """Return how many steps a time takes, of a target with this largest singular value."""
    return math.ceil(time * depth * max(largest, scale) ** (2 - 2 / depth) / _STEP)


def learning_time(s: Tensor, scale: float, depth: int) -> float:
    """Return the time in which the smallest singular value above 1 % of the largest comes to its end."""
    slow = float(s[s > 0.01 * s[0]].min())
    if depth == 1:
        return 5.0 + max(0.0, math.log(scale / slow))
    end = 1 / (depth * slow ** (2 - 2 / depth))  # of the last part, in which the gap falls by e
    if slow <= 2 * scale:
        return 8 * end  # down from any height to 2 s it takes less than 1
    from scipy.integrate import quad

    whole, _ = quad(
        lambda log_v: math.exp(log_v * (2 / depth - 1)) / (depth * (slow - math.exp(log_v))),
        math.log(scale),
        math.log(slow / 2),
        limit=200,
    )
    return 1.2 * whole + 6 * end
