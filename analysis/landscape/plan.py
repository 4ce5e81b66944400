"""Where a landscape looks and how closely, and what that will cost before it is paid."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch

from analysis.landscape.directions import Scaling
from analysis.landscape.paths import Place
from analysis.landscape.store import LandscapeEstimate
from curvature.arguments import checked_fields
from curvature.environment.cost import median_seconds
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.objective.shift import loss_at
from curvature.operators import HessianOperator

__all__ = ["LandscapePlan", "estimate_landscape", "resolved"]

Directions = Literal["auto", "random", "eigenvectors", "gradient", "pca", "path"]
_EIGEN_MATVECS = 14  # that two eigenvectors of a trained network take, about


@checked_fields
@dataclass(frozen=True, kw_only=True)
class LandscapePlan:
    """Where to look, and how closely.

    Raises:
        InputError: for values out of range.
    """

    directions: Directions = "auto"
    """"random", "eigenvectors" (the two sharpest), "gradient" (and the sharpest), "pca" (of a trajectory), "path" (the
    plane of both ends and the bend of a curve); "auto" is "pca" with a trajectory and "random" without."""
    scaling: Scaling = "filter"
    """Of random directions."""
    scale_vectors: bool = False
    """Whether biases and parameters of normalisation layers move with filter and layer scaling."""
    points: int = 31
    """Along each axis: lines take so many, the plane its square."""
    radius: float | None = None
    """Steps run from -radius to radius; None: 1 for scaled random directions, else by curvature or trajectory."""
    plane: bool = True
    """Whether to look at the plane of both directions, too."""
    curve: int = 0
    """Gradients to spend on a curved path to the other checkpoint; 0: the straight path only."""

    def __post_init__(self) -> None:
        for name, kind in (("directions", Directions), ("scaling", Scaling)):
            if getattr(self, name) not in get_args(kind):
                raise InputError(f"{name} must be one of {', '.join(get_args(kind))}, got {getattr(self, name)!r}.")
        if self.points < 5:
            raise InputError(f"points must be at least 5, got {self.points}.")
        if self.radius is not None and not (self.radius > 0 and math.isfinite(self.radius)):
            raise InputError(f"radius must be positive and finite, got {self.radius}.")
        if self.curve < 0:
            raise InputError(f"curve must be a number of gradients >= 0, got {self.curve}.")


def resolved(plan: LandscapePlan, to: Path | None, trajectory: Sequence[Path]) -> LandscapePlan:
    """Return the plan with "auto" decided.

    Raises:
        InputError: if it does not go with the checkpoints that are there.
    """
    if plan.directions == "auto":
        plan = replace(plan, directions="pca" if trajectory else "random")
    if plan.directions == "pca" and not trajectory:
        raise InputError(
            "directions pca take the checkpoints of a trajectory; give --trajectory FILE for each of them."
        )
    if trajectory and plan.directions != "pca":
        raise InputError(
            f"a trajectory is shown in its own plane, got directions {plan.directions}; leave --directions."
        )
    if plan.curve and to is None:
        raise InputError("a curve leads to another checkpoint; give it with --to FILE.")
    if plan.directions == "path" and not plan.curve:
        raise InputError("directions path take both ends of a curve and its bend; give --to FILE and --curve N.")
    return plan


def estimate_landscape(
    objective: Objective, plan: LandscapePlan, end: Place | None, num_checkpoints: int
) -> LandscapeEstimate:
    """Predict looks, products and seconds. Cost: a few looks and products, the first of which builds the graphs.

    Raises:
        NonFiniteError: if the gradient is not finite, so that there is nothing to plan.
    """
    here, device = objective.space.current(), objective.device
    loss_at(objective, here)
    of_loss = median_seconds(lambda: loss_at(objective, here), device)
    H, v = HessianOperator(objective), torch.ones_like(here)
    _ = H @ v
    of_product = median_seconds(lambda: H @ v, device)
    curved = end is not None and plan.curve > 0
    num_losses = 2 * plan.points + plan.points**2 * plan.plane + num_checkpoints
    num_losses += 0 if end is None else plan.points * (2 if curved else 1)
    num_matvecs = 6 + _EIGEN_MATVECS * (plan.directions in ("eigenvectors", "gradient"))
    num_gradients = 3 + (plan.curve if curved else 0)
    return LandscapeEstimate(
        num_losses=num_losses,
        num_gradients=num_gradients,
        num_matvecs=num_matvecs,
        seconds_per_loss=of_loss,
        seconds=num_losses * of_loss + (num_matvecs + num_gradients) * of_product,
    )
