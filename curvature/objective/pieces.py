"""Data cut into pieces, where that leaves the function as it is.

Graphs of data in one piece are larger than the caches of a core: on digits-cnn in three pieces products with the
Hessian take 0.7 of the time, with the Gauss-Newton matrix 0.65 (one core). Gradients away from the point do not gain.
"""

from __future__ import annotations

import torch

from curvature.errors import CurvatureError
from curvature.objective.objective import Objective
from curvature.objective.shift import rows_at_once

__all__ = ["in_fast_pieces", "in_pieces"]

_SAME = 1e-4  # of the gradient's norm


def in_pieces(objective: Objective, size: int) -> Objective:
    """Return the objective with batches in pieces of at most `size` examples, or itself if that is another function.

    It is another where examples are coupled, by normalisation, by masks or by the loss. Cost: two gradients.
    """
    _, gradient = objective.loss_and_gradient()
    pieces = objective.split(size)
    try:
        _, of_pieces = pieces.loss_and_gradient()
    except CurvatureError:
        return objective
    same = (of_pieces - gradient).norm() <= _SAME * gradient.norm() + torch.finfo(gradient.dtype).eps ** 0.5
    return pieces if bool(same) else objective


def in_fast_pieces(objective: Objective) -> Objective:
    """Return the objective with batches in pieces of as many examples as are fastest, if nobody has cut them before.

    These are `rows_at_once`, from the outputs of layers; where it knows none, all stays in one piece. Cost: five
    losses and two gradients.
    """
    rows = rows_at_once(objective) if objective.source.whole else None
    return objective if rows is None else in_pieces(objective, rows)
