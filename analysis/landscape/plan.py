"""Where a landscape looks and how closely, and what that will cost before it is paid."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from analysis.landscape.directions import Scaling
from analysis.records.plan import Plan, setting
from analysis.run.cores import one_core_each
from analysis.run.study import Price
from analysis.show.wording import count, duration
from curvature.arguments import checked_fields
from curvature.environment.cost import median_seconds
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.objective.shift import loss_at
from curvature.operators.hessian import HessianOperator

__all__ = ["LandscapePlan"]

Directions = Literal["auto", "random", "eigenvectors", "gradient", "pca", "path"]
_EIGEN_MATVECS = 14  # that two eigenvectors of a trained network take, about


@checked_fields
@dataclass(frozen=True, kw_only=True)
class LandscapePlan(Plan):
    """Where to look, and how closely.

    "auto" is "pca" with a trajectory and "random" without; "path" is the plane of both ends and the bend of a curve.

    Raises:
        InputError: for values out of range, or that do not go with the checkpoints that are there.
    """

    directions: Directions = setting(
        "auto",
        "Random directions, the two sharpest eigenvectors, gradient and sharpest eigenvector, pca (of --trajectory) "
        "or path (of --to with --curve).",
    )
    scaling: Scaling = setting("filter", "Normalisation of random directions.")
    scale_biases: bool = setting(False, "With filter and layer scaling, also move biases and normalisation parameters.")
    to: Path | None = setting(None, "Also evaluate the path to this checkpoint.", flag="--to CHECKPOINT")
    curve: int = setting(
        0, "Spend N gradients on a curved path to --to that avoids high loss.", least=0, flag="--curve N"
    )
    trajectory: tuple[Path, ...] = setting(
        (), "A checkpoint of the training; give several, in order of time.", flag="--trajectory CHECKPOINT"
    )
    points: int = setting(31, "Points along each axis; the plane takes the square.", least=5)
    radius: float | None = setting(
        None, "Steps run from -R to R. Default: chosen so that the loss rises visibly.", above=0, flag="--radius R"
    )
    plane: bool = setting(True, "Evaluate a plane, or lines only.", flag="--plane/--line")
    checkpoint_key: str | None = None
    """Which state dict of the checkpoints, where they hold several."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.directions == "auto":
            object.__setattr__(self, "directions", "pca" if self.trajectory else "random")
        if self.directions == "pca" and not self.trajectory:
            raise InputError(
                "directions pca take the checkpoints of a trajectory; give --trajectory FILE for each of them."
            )
        if self.trajectory and self.directions != "pca":
            raise InputError(
                f"a trajectory is shown in its own plane, got directions {self.directions}; leave --directions."
            )
        if self.curve and self.to is None:
            raise InputError("a curve leads to another checkpoint; give it with --to FILE.")
        if self.directions == "path" and not self.curve:
            raise InputError("directions path take both ends of a curve and its bend; give --to FILE and --curve N.")

    @property
    def num_losses(self) -> int:
        """Looks at the loss: lines, plane, checkpoints and paths."""
        paths = 0 if self.to is None else 1 + (self.curve > 0)
        return self.points * (2 + self.points * self.plane + paths) + len(self.trajectory)

    def price(self, objective: Objective) -> Price:
        """Return what it will cost, from a few looks and products that are timed; the first builds the graphs.

        Raises:
            NonFiniteError: if the gradient is not finite, so that there is nothing to plan.
        """
        here, device = objective.space.current(), objective.device
        with one_core_each(objective) as workers:
            loss_at(objective, here)
            of_loss = median_seconds(lambda: loss_at(objective, here), device, objective.ranks)
        H, v = HessianOperator(objective), torch.ones_like(here)
        _ = H @ v
        of_product = median_seconds(lambda: H @ v, device, objective.ranks)
        products = 6 + _EIGEN_MATVECS * (self.directions in ("eigenvectors", "gradient"))
        gradients = 3 + self.curve
        shared = f" in {workers} processes" if workers > 1 else ""
        text = f"{count(self.num_losses)} losses{shared}, {duration(of_loss)} each, about {count(products)} Hessian "
        return Price(
            f"{text}products and {count(gradients)} gradients",
            self.num_losses * of_loss / workers + (products + gradients) * of_product,
            self.num_losses + self.curve,
            "points",
        )
