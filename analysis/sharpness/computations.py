"""How each measure of sharpness is computed: numbers of the curvature, of noise, and of boxes and volumes.

Functions here return a `Found`; `analysis.sharpness.measure` names them and puts them into one table. One convention of
size serves all measures that move the parameters: u has length rho (worst case), root mean square length rho (average),
or lies in the cube inside that ball (linf, |u_i| <= rho / n^(1/2)), so that linf <= l2 and averages compare with both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.layerwise.filters import filter_dims
from curvature.linalg import trace
from curvature.linop import LinearOperator, MatrixLike
from curvature.objective.objective import Objective
from curvature.objective.shift import gradient_at, loss_at, rows_at_once
from curvature.operators.fisher import FisherOperator
from curvature.operators.hessian import HessianOperator
from curvature.results.estimates import mean_and_stderr
from curvature.results.intervals import combined_error, skewness, spread_of

__all__ = [
    "Found",
    "average_rise",
    "box_rise",
    "diagonally_scaled",
    "fisher_rao",
    "logit_normalised",
    "masked_weights",
    "pieces",
    "relative_flatness",
    "tolerated",
    "tolerated_noise",
]

_WIDEST = 30  # values of sigma tried, up to 4^30 times the first, before the loss counts as flat
_SECANTS = 8  # values of sigma after which a bracket is bisected
_CLOSE = 1e-4  # relative width at which the search for sigma ends
_NEGLIGIBLE = 0.01  # of the standard error: so far off the rise need not be closer
_SLOPES = (0.5, 8.0)  # of log rise over log sigma that a secant is believed in
_STRIDE = math.log(4.0)  # of log sigma, at most


@dataclass(frozen=True, kw_only=True)
class Found:
    """A value, its error and its price."""

    value: float
    stderr: float
    dof: float = math.inf
    skewness: float = 0.0
    num_matvecs: int = 0
    num_gradients: int = 0
    num_losses: int = 0
    details: dict[str, float] = field(default_factory=dict)


class _DiagonallyScaled(LinearOperator):
    def __init__(self, A: MatrixLike, c: Tensor) -> None:
        super().__init__((A.shape[0], A.shape[1]), A.dtype, A.device)
        self.A, self.c = A, c.to(A.dtype)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.c[:, None] * (self.A @ (self.c[:, None] * X))


def diagonally_scaled(A: MatrixLike, c: Tensor) -> LinearOperator:
    """Return C A C with C = diag(c), (n,): the Hessian of L(theta + c * u) in u. Entries of c may be zero."""
    return _DiagonallyScaled(A, c)


# -- noise ------------------------------------------------------------------------------------------------------------


def _pair_rises(objective: Objective, c: Tensor, sigma: float, probes: Tensor, base: float) -> Tensor:
    """Return (L(theta + s) + L(theta - s)) / 2 - L with s = sigma c z for every column z; infinite on overflow."""
    theta, rises, at_once = objective.space.current(), [], rows_at_once(objective)
    for z in probes.T:
        step = sigma * c * z
        sides = [loss_at(objective, theta + sign * step, at_once=at_once).value for sign in (1, -1)]
        mean = sum(sides) / 2 - base
        rises.append(math.inf if math.isnan(mean) else mean)
    return torch.tensor(rises, dtype=torch.float64)


def _spread(rises: Tensor) -> tuple[float, float]:
    """Return degrees of freedom and skewness of a mean of rises (k,).

    Rises of losses beyond their quadratic part have heavy tails: by `spread_of` 93 to 94 % of intervals from 8 to 32
    pairs cover where k - 1 gives 91 to 92 %. Fewer than 8 hardly show their kurtosis, and have k - 1.
    """
    return spread_of(rises, rises) if len(rises) >= 8 else (len(rises) - 1.0, float(skewness(rises)))


def average_rise(objective: Objective, c: Tensor, *, rho: float, num_probes: int, generator: torch.Generator) -> Found:
    """Return E L(theta + c u) - L over normal u with E |u|^2 = rho^2, from pairs +-u; about rho^2 tr(C H C) / 2 n.

    Odd terms of the loss cancel in a pair, so that the standard error vanishes with rho as the value does. Cost: two
    losses a probe.
    """
    z = torch.randn(len(c), num_probes, generator=generator, dtype=c.dtype, device=c.device)
    base = loss_at(objective, objective.space.current()).value
    rises = _pair_rises(objective, c, rho / len(c) ** 0.5, z, base)
    value, stderr = mean_and_stderr(rises)
    dof, lopsided = _spread(rises)
    return Found(
        value=float(value),
        stderr=float(stderr),
        dof=dof,
        skewness=lopsided,
        num_losses=2 * num_probes + 1,
        details={"rho": rho},
    )


def tolerated_noise(
    objective: Objective, c: Tensor, *, rise: float, num_probes: int, generator: torch.Generator
) -> Found:
    """Return `tolerated` of noise sigma c z, z normal, from pairs +-z. Cost: two losses a probe for each sigma."""
    z = torch.randn(len(c), num_probes, generator=generator, dtype=c.dtype, device=c.device)
    theta = objective.space.current()
    base = loss_at(objective, theta).value
    length = float((c * theta).norm() / c.square().norm().clamp_min(torch.finfo(c.dtype).tiny))
    return tolerated(lambda sigma: _pair_rises(objective, c, sigma, z, base), rise=rise, start=0.1 * (length or 1.0))


def tolerated(rises: Callable[[float], Tensor], *, rise: float, start: float) -> Found:
    """Return 1 / sigma^2 for the sigma at which `rises(sigma)`, (num_probes,), is `rise` on average.

    The same probes serve every sigma, so that the mean rise is one function of it. Its root is bracketed and found by
    secants of log rise over log sigma, whose slope is 2 where the loss is quadratic. The search ends where the mean
    rise is off by a hundredth of its standard error, or the bracket is narrow, after some 5 values of sigma. Where the
    loss is flat the value is 0. The standard error is that of the mean rise over its slope.
    """
    sigma, low, high = start, 0.0, math.inf
    before: tuple[float, float] | None = None  # log sigma, log rise
    slope, tried = 2.0, 0
    while True:
        samples = rises(sigma)
        tried += 1
        mean, stderr = (float(x) for x in mean_and_stderr(samples))
        low, high = (low, sigma) if mean > rise else (sigma, high)
        known = 0 < mean < math.inf
        if known:
            here = math.log(sigma), math.log(mean)
            if before is not None and here[0] != before[0]:
                slope = min(max((here[1] - before[1]) / (here[0] - before[0]), _SLOPES[0]), _SLOPES[1])
            before = here
        close = known and abs(mean - rise) <= _NEGLIGIBLE * stderr
        bracketed = low > 0 and high < math.inf
        if close or tried == _WIDEST or (bracketed and high <= (1 + _CLOSE) * low):
            break
        step = math.log(rise / mean) / slope if known else math.copysign(_STRIDE, rise - mean)
        sigma *= math.exp(min(max(step, -_STRIDE), _STRIDE))
        if bracketed and (tried > _SECANTS or not low < sigma < high):
            sigma = (low * high) ** 0.5
    spent = 2 * len(samples) * tried + 1
    if not (close or bracketed):
        return Found(value=math.inf if low == 0 else 0.0, stderr=math.nan, num_losses=spent, details={"rise": rise})
    error = stderr * sigma / (slope * mean) if known else math.nan
    dof, lopsided = _spread(samples)
    return Found(
        value=sigma**-2,
        stderr=2 * error / sigma**3,
        dof=dof,
        skewness=lopsided,
        num_losses=spent,
        details={"sigma": sigma, "sigma_stderr": error, "rise": rise},
    )


# -- boxes ------------------------------------------------------------------------------------------------------------


def box_rise(
    objective: Objective, *, epsilon: float, max_iterations: int, num_restarts: int, generator: torch.Generator
) -> Found:
    """Return 100 (max L - L) / (1 + L) over the box |y_i| <= epsilon (|theta_i| + 1), by L-BFGS-B; a lower bound.

    The first start is the centre, others are random in the box, and so is the first where the gradient vanishes. The
    iteration is scipy's, on the host in float64, of the rise over the mean slope along the sides of the box: scipy's
    first step and its tolerances are absolute, and a small box would end it where it begins.

    Raises:
        InputError: if 1 + L is not positive.
    """
    theta = objective.space.current()
    at_once = rows_at_once(objective)
    base, at_centre = gradient_at(objective, theta, at_once=at_once)
    if not 1 + base > 0:
        raise InputError(f"the measure divides by 1 + L, which must be positive, got L = {base:.4g}.")
    reach = epsilon * (theta.abs() + 1)
    unit = reach.double().cpu().numpy()
    highest, gradients = base, 1

    def fall(t: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        nonlocal highest, gradients
        gradients += 1
        loss, g = gradient_at(objective, theta + reach * torch.as_tensor(t).to(theta), at_once=at_once)
        highest = max(highest, loss)
        return -loss, -unit * g.double().cpu().numpy()

    found = []
    for restart in range(num_restarts):
        centred = restart == 0 and bool(at_centre.any())
        drawn = torch.rand(len(theta), generator=generator, dtype=theta.dtype, device=theta.device)
        start = np.zeros_like(unit) if centred else (2 * drawn - 1).double().cpu().numpy()
        bounds = scipy.optimize.Bounds(-np.ones_like(unit), np.ones_like(unit))
        slope = unit * at_centre.double().cpu().numpy() if centred else fall(start)[1]
        scale = 1 / max(float(np.abs(slope).mean()), np.finfo(np.float64).tiny)
        end = scipy.optimize.minimize(
            lambda t, scale=scale: tuple(scale * part for part in fall(t)),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=bounds,
            options={"maxiter": max_iterations, "gtol": 0.0, "ftol": 0.0},
        )
        found.append(100 * (-float(end.fun) / scale - base) / (1 + base))
    return Found(
        value=100 * (highest - base) / (1 + base),
        stderr=math.nan,
        num_gradients=gradients,
        details={"epsilon": epsilon, **{f"start {i}": v for i, v in enumerate(found)}},
    )


def pieces(objective: Objective, size: int) -> list[Objective]:
    """Return the objective on each piece of at most `size` examples of its data, for m-sharpness.

    Raises:
        InputError: for data on several ranks, whose pieces would have to be of equal number.
    """
    if objective.process_group is not None:
        raise InputError("m-sharpness takes pieces of the data one by one, which ranks cannot share; measure on one.")
    return [
        objective.replace(data=[batch], seed=i, micro_batch=None)
        for i, batch in enumerate(objective.split(size).batches(), start=objective.settings["seed"])
    ]


# -- what the layers' own scales enter --------------------------------------------------------------------------------


class _RelativeFlatness(LinearOperator):
    """V -> S H_WW[S V] for a weight matrix W (d, m), S S' = W W': its trace is the layer's relative flatness."""

    def __init__(self, objective: Objective, name: str, dim: int) -> None:
        W = objective.space.tensors[name].detach().to(objective.dtype).movedim(dim, 0)
        self.shape_moved, self.dim, W = W.shape, dim, W.reshape(W.shape[0], -1)
        d, m = W.shape
        self.S = W  # (d, m): V is (m, m), unless a square root with fewer columns does
        if d < m:
            values, vectors = torch.linalg.eigh(W @ W.T)
            self.S = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
        n = self.S.shape[1] * m
        super().__init__((n, n), objective.dtype, objective.device)
        self.m = m
        self.H = HessianOperator(objective, objective.space.block({name: objective.space.tensors[name]}))

    def _matmat(self, X: Tensor) -> Tensor:
        k = X.shape[1]
        V = X.T.reshape(k, -1, self.m)
        weights = (self.S @ V).reshape(k, *self.shape_moved).movedim(1, self.dim + 1).reshape(k, -1)
        shape = [k, *self.shape_moved[1:]]
        shape.insert(self.dim + 1, self.shape_moved[0])
        products = (self.H @ weights.T).T.reshape(shape).movedim(self.dim + 1, 1).reshape(k, -1, self.m)
        return (self.S.T @ products).reshape(k, -1).T


def masked_weights(objective: Objective) -> list[str]:
    """Return parameters that are vectors from which their modules build tensors, as those of `sparse_model`."""
    tensors = objective.space.tensors.items()
    return [name for name, tensor in tensors if "parametrizations." in name and tensor.ndim < 2]


def relative_flatness(objective: Objective, *, num_matvecs: int, generator: torch.Generator) -> Found:
    """Return sum_l sum_{s,s'} <w_s, w_s'> tr H_{s,s'} over weight tensors l, with w_s the weights into unit s of l.

    The inner sum is the trace of an operator on (m, m) or (d, m) matrices, estimated with `num_matvecs` products a
    layer, and exact where the layer has no more. Each layer's is in the details.
    """
    dims = filter_dims(objective.model)
    layers = [name for name, tensor in objective.space.tensors.items() if tensor.ndim >= 2]
    if not layers:
        raise InputError("relative flatness is that of weight matrices, but all chosen parameters are vectors.")
    if masked := masked_weights(objective):
        raise InputError(
            f"relative flatness is that of weight matrices, but {masked[0]!r} holds one as a vector (a mask?)."
        )
    terms, errors, spent = {}, [], 0
    for name in layers:
        A = _RelativeFlatness(objective, name, dims.get(name, 0))
        found = trace(A, num_matvecs=num_matvecs, generator=generator)
        terms[name] = float(found.value)
        errors.append((float(found.stderr), found.dof))
        spent += found.num_matvecs
    stderr, dof = combined_error(errors)
    return Found(value=sum(terms.values()), stderr=stderr, dof=dof, num_matvecs=spent, details=terms)


def fisher_rao(objective: Objective) -> Found:
    """Return theta' F theta, the square of the Fisher-Rao norm. Cost: one product."""
    theta = objective.space.current()
    value = float(theta @ (FisherOperator(objective) @ theta))
    return Found(value=value, stderr=0.0, num_matvecs=1, details={"norm": max(value, 0.0) ** 0.5})


def logit_normalised(objective: Objective) -> Objective:
    """Return the objective with each output vector centred and divided by its Euclidean norm before the loss.

    Scaling all logits then leaves the loss as it is, so that sharpness measures the function rather than how
    confident it is. Classes lie along dimension 1 of the outputs.

    Raises:
        InputError: for an objective with loss=None, or outputs that are no batch of vectors.
    """
    if not objective.has_split:
        raise InputError("logits can be normalised where model and loss are known apart: pass loss= to the objective.")
    given, data = objective.settings["forward"], objective.settings["data"]
    if given is None and isinstance(data, list) and data and isinstance(data[0], Tensor):
        data = tuple(data)  # one pair, not two batches
    forward: Callable[..., Any] = given or (lambda model, batch: (model(batch[0]), batch[1]))

    def normalised(model: Any, batch: Any) -> tuple[Tensor, Any]:
        outputs, targets = forward(model, batch)
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            raise InputError("logits must be one tensor (N, C, ...); pass a forward= that picks it.")
        centred = outputs - outputs.mean(dim=1, keepdim=True)
        floor = torch.finfo(outputs.dtype).tiny ** 0.5
        return centred / centred.norm(dim=1, keepdim=True).clamp_min(floor), targets

    return objective.replace(forward=normalised, data=data)
