"""The worst loss near a point: ascent inside a ball whose axes may be stretched with the parameters.

    max { L(theta + c * u) - L(theta) : |u|_p <= rho },   p = 2 or infinity

With c = 1 the ball is that of SAM. With c proportional to |theta|, entrywise or by filters or tensors, the same
functions lie in it whatever scale a ReLU network gives its layers, and rho is a relative size. In all of these |c|_2 is
|theta|_2 or, for c = 1, n^(1/2). What an ascent finds is a lower bound on the maximum.

Reference: Foret, Kleiner, Mobahi and Neyshabur (2021), Sharpness-aware minimization; Kwon, Kim, Park and Choi (2021),
ASAM; Andriushchenko, Croce, Mueller, Hein and Flammarion (2023), A modern look at the relationship between sharpness
and generalization.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.layerwise.filters import filter_dims, kept_filters
from curvature.objective.objective import Objective
from curvature.objective.shift import gradient_at, rows_at_once

__all__ = ["Ascent", "Ball", "ScaleKind", "perturbation_scale", "worst_case"]

Ball = Literal["l2", "linf"]
ScaleKind = Literal["raw", "elementwise", "filter", "layer"]
_SHORTEST = 1e-3  # of rho: a step that has to be shorter to rise is the end


@dataclass(frozen=True, kw_only=True)
class Ascent:
    """The highest loss that was found in a ball."""

    rise: float
    """L(theta + c * u) - L(theta), at least 0; units of the loss."""
    perturbation: Tensor
    """(n,), c * u; units of the parameters."""
    rises: tuple[float, ...]
    """What each start came to; how far they agree says how much to trust the maximum."""
    num_gradients: int
    """Gradients over the data."""


@checked
def perturbation_scale(objective: Objective, kind: ScaleKind) -> Tensor:
    """Return c, (n,): how far each parameter moves for a unit of u.

    - "raw": 1.
    - "elementwise": |theta_i|.
    - "filter": the root mean square of the filter that the parameter belongs to (a row of a linear layer, the kernels
      of one output channel); tensors of fewer than two dimensions entrywise. Kwon et al. take the norm instead, which
      is a factor (filter size)^(1/2) on rho where all filters are alike.
    - "layer": the root mean square of its tensor.

    Raises:
        InputError: for another kind.
    """
    if kind not in get_args(ScaleKind):
        raise InputError(f"kind must be one of {', '.join(get_args(ScaleKind))}, got {kind!r}.")
    space = objective.space
    theta = space.current()
    if kind == "raw":
        return torch.ones_like(theta)
    if kind == "elementwise":
        return theta.abs()
    dims, kept = filter_dims(objective.model), kept_filters(objective.model)
    parts = {}
    for name, w in space.to_dict(theta).items():
        if kind == "layer":
            parts[name] = w.square().mean().sqrt().expand_as(w)
        elif name in kept and len(w):
            squares, counts = (
                w.new_zeros(int(kept[name].max()) + 1).index_add(0, kept[name], t)
                for t in (w.square(), torch.ones_like(w))
            )
            parts[name] = (squares / counts.clamp_min(1)).sqrt()[kept[name]]
        elif w.ndim < 2:
            parts[name] = w.abs()
        else:
            others = [i for i in range(w.ndim) if i != dims.get(name, 0)]
            parts[name] = w.square().mean(dim=others, keepdim=True).sqrt().expand_as(w)
    return space.to_flat(parts)


@full_precision
@checked
def worst_case(
    objective: Objective,
    *,
    rho: float,
    ball: Ball = "l2",
    scale: Tensor | None = None,
    num_steps: int = 20,
    num_restarts: int = 2,
    rtol: float = 0.0,
    generator: torch.Generator,
) -> Ascent:
    """Return the largest rise of the loss that an ascent finds in |u|_p <= rho; a lower bound on the largest there is.

    Each step goes to the point of the ball that the gradient points to, where a convex loss is sure to be higher; where
    that is lower instead, projected gradient steps follow, halved until they rise. No step is accepted that falls. The
    first start is the centre (its first step is that of SAM), others are random points on the rim, and so is the first
    where the gradient vanishes. Cost: at most num_restarts x num_steps + num_restarts gradients.

    Args:
        objective: the loss; it stays at its own point.
        rho: radius; with the linf ball every |u_i| <= rho.
        ball: "l2" or "linf".
        scale: c, (n,), not negative. Default: 1.
        num_steps: gradients a start, at most.
        num_restarts: starts.
        rtol: a start ends with two steps in succession that add less than this share of the rise.
        generator: source of the random starts, on the objective's device.

    Raises:
        InputError: for arguments out of range.
        NonFiniteError: if the loss overflows inside the ball; take a smaller rho.
    """
    n = objective.num_params
    if not (rho > 0 and math.isfinite(rho)):
        raise InputError(f"rho must be positive and finite, got {rho}.")
    if ball not in get_args(Ball):
        raise InputError(f"ball must be one of {', '.join(get_args(Ball))}, got {ball!r}.")
    for name, count in (("num_steps", num_steps), ("num_restarts", num_restarts)):
        if count < 1:
            raise InputError(f"{name} must be at least 1, got {count}.")
    if not 0 <= rtol < 1:
        raise InputError(f"rtol must be in [0, 1), got {rtol}.")
    theta = objective.space.current()
    c = torch.ones_like(theta) if scale is None else scale.to(theta)
    if c.shape != (n,) or not bool((c >= 0).all()):
        raise InputError(f"scale must hold {n} numbers that are not negative, got shape {tuple(c.shape)}.")
    climb = _Climb(objective, theta, c, rho, ball, rtol)
    base, at_centre = climb.look(torch.zeros_like(theta))
    climb.base = base
    rises: list[float] = []
    best = torch.zeros_like(theta)
    for restart in range(num_restarts):
        if restart == 0 and bool(at_centre.any()):
            found, u = climb.run(torch.zeros_like(theta), base, at_centre, num_steps)
        else:
            u = climb.on_rim(torch.randn(n, generator=generator, dtype=theta.dtype, device=theta.device))
            found, u = climb.run(u, *climb.look(u), num_steps - 1)
        if found - base > max(rises, default=0.0):
            best = u
        rises.append(found - base)
    return Ascent(
        rise=max(0.0, *rises),
        perturbation=c * best,
        rises=tuple(rises),
        num_gradients=climb.num_gradients,
    )


class _Climb:
    def __init__(self, objective: Objective, theta: Tensor, c: Tensor, rho: float, ball: Ball, rtol: float) -> None:
        self.objective, self.theta, self.c, self.rho, self.ball, self.rtol = objective, theta, c, rho, ball, rtol
        self.at_once = rows_at_once(objective)
        self.base = 0.0
        self.num_gradients = 0

    def look(self, u: Tensor) -> tuple[float, Tensor]:
        """Return the loss at u and its gradient in u, both of one pass."""
        self.num_gradients += 1
        loss, gradient = gradient_at(self.objective, self.theta + self.c * u, at_once=self.at_once)
        return loss, self.c * gradient

    def on_rim(self, h: Tensor) -> Tensor:
        """Return the point of the ball farthest along h."""
        return self.rho * (h.sign() if self.ball == "linf" else h / h.norm().clamp_min(torch.finfo(h.dtype).tiny))

    def project(self, u: Tensor) -> Tensor:
        if self.ball == "linf":
            return u.clamp(-self.rho, self.rho)
        return u * (self.rho / u.norm().clamp_min(self.rho))

    def run(self, u: Tensor, loss: float, h: Tensor, num_steps: int) -> tuple[float, Tensor]:
        """Return the highest loss met and where."""
        length = math.inf  # in units of the rim's distance; infinite: to the rim itself
        idle = 0  # steps in succession that added next to nothing
        for _ in range(num_steps):
            if not bool(h.any()) or idle == 2:
                break
            towards = self.on_rim(h)
            trial = towards if length == math.inf else self.project(u + length * towards)
            there, slope = self.look(trial)
            if there > loss:
                idle = idle + 1 if there - loss < self.rtol * (there - self.base) else 0
                u, loss, h = trial, there, slope
                continue
            length = 1.0 if length == math.inf else length / 2
            if length < _SHORTEST:
                break
        return loss, u
