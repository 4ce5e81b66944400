"""Is a stationary point a saddle? A look at the lowest curvature there, and a step along it where it is negative."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch

from curvature.environment.autocast import full_precision
from curvature.linalg.systems.gltr import lowest_pair
from optimizers.newton.full_batch import Evaluated, FullBatchOptimizer
from optimizers.shared.closures import residuals_of
from optimizers.shared.differentiation import curvature_session
from optimizers.shared.ranks import on_all_ranks

__all__ = ["Look", "SecondOrder", "look_for_saddle"]

SecondOrder = Literal["minimum", "not certified", "saddle", "not looked at"]
_STREAM = 16  # of the seed, apart from the other uses of it


@dataclass(frozen=True, kw_only=True)
class Look:
    """What was seen around a point."""

    curvature: float  # the smallest u'H u over unit vectors u that was met
    rounding: float  # how far rounding may move it
    negative: bool  # whether it is below zero beyond rounding
    complete: bool  # whether a curvature lower by 1e-3 |H| was missed with a probability of 1 % at most
    left: bool  # whether the parameters were moved along it, to a lower loss
    num_products: int
    num_evaluations: int
    num_gradients: int

    @property
    def second_order(self) -> SecondOrder:
        """What it says of the point."""
        return "saddle" if self.negative else "minimum" if self.complete else "not certified"

    def verdict(self, message: str) -> tuple[int, str]:
        """Return the status of `minimize` after the look, and how a run ended with `message` and this look."""
        if self.negative:
            return 2, f"{message}; a saddle of curvature {self.curvature:.2g}, along which rounding hides any decrease"
        rest = "" if self.complete else f" in {self.num_products} products, too few to exclude a lower one"
        lowest = f"{self.curvature:.2g}" if self.curvature > 0 else f"zero to within {self.rounding:.2g}"
        return 0, f"{message}; the lowest curvature met is {lowest}{rest}"


@torch.no_grad()
@full_precision
@on_all_ranks
def look_for_saddle(optimizer: FullBatchOptimizer, closure: Evaluated, most: int) -> Look:
    """Spend up to `most` products on the lowest eigenpair of the loss's Hessian; leave a saddle along it.

    Steps of 4^-k max(|x|, 1), k = 0, 1, ..., are tried in both directions until the loss falls by a hundredth of what
    the curvature promises.
    """
    flat = optimizer._flat()

    def half_square() -> Any:
        return residuals_of(cast("Callable[[], Any]", closure)()).square().sum() / 2

    loss = half_square if optimizer.kind == "residuals" else closure
    evaluations = optimizer._evaluations(flat, loss, None, "hessian")
    left, eps = False, torch.finfo(flat.dtype).eps
    try:
        with curvature_session(), evaluations.watched(), optimizer._no_wrapper_alone():
            here = evaluations.linearise()
            curvature, v, size, complete = lowest_pair(here.operator, optimizer._generator(flat, _STREAM), most)
            rounding = eps**0.5 * size
            negative = curvature < -rounding
            length = max(float(torch.linalg.vector_norm(evaluations.start)), 1.0)
            while negative and not left and length**2 * -curvature > eps * abs(here.loss):
                values = {t: evaluations.value(evaluations.start + t * v) for t in (length, -length)}
                t = min(values, key=lambda t: values[t])
                if values[t] < here.loss + 0.01 * length**2 * curvature / 2:
                    left = True
                    flat.set(evaluations.start + t * v)
                length /= 4
    finally:
        evaluations.finish(keep=False)
    return Look(
        curvature=curvature,
        rounding=rounding,
        negative=negative,
        complete=complete,
        left=left,
        num_products=here.operator.num_matvecs,
        num_evaluations=evaluations.num_evaluations,
        num_gradients=evaluations.num_gradients,
    )
