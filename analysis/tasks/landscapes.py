"""Losses whose shape is known: a quadratic, a curved valley, a saddle without curvature, a deep linear network.

Each is a task like any other, at the point where a training starts: what an optimizer does there can be held against
theory. The lowest value of each loss stands in its metadata.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from analysis.tasks.digits import half_squared_error
from analysis.tasks.task import Task

__all__ = ["LANDSCAPES", "MonkeySaddle", "Rosenbrock", "mean_of_outputs"]

DIMENSION, CONDITION = 10, 100.0
SINGULAR_VALUES = (4.0, 2.0, 1.0, 0.5, 0.0, 0.0)


class Rosenbrock(nn.Module):
    """Two residuals whose squares sum up to 100 (y - x^2)^2 + (1 - x)^2, each 2^(1/2) times its own under a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([-1.2, 1.0]))

    def forward(self, rows: Tensor) -> Tensor:
        x, y = self.point
        return math.sqrt(2) * torch.stack([10 * (y - x * x), 1 - x])[rows, None]


class MonkeySaddle(nn.Module):
    """x^3 - 3 x y^2 + (x^2 + y^2)^2 / 4: all second derivatives vanish at the origin, three minima lie at radius 3.

    The start lies on a ridge: along it the gradient leads into the saddle.
    """

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Parameter(torch.tensor([1.0, 1e-3]))

    def forward(self, rows: Tensor) -> Tensor:
        x, y = self.point
        return (x**3 - 3 * x * y * y + (x * x + y * y) ** 2 / 4).expand(len(rows), 1)


def mean_of_outputs(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of a model's outputs, for models that return the loss; targets are not looked at."""
    del targets
    return outputs.mean()


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def _linear(weight: Tensor) -> nn.Linear:
    """Return a layer that starts there, and cannot be drawn anew: its start is part of the task."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    with torch.no_grad():
        layer.weight.copy_(weight)
    setattr(layer, "reset_parameters", None)  # noqa: B010  # what draws models anew looks for it
    return layer


def _quadratic() -> Task:
    Q = _orthogonal(DIMENSION, torch.Generator().manual_seed(0))
    eigenvalues = torch.logspace(0, math.log10(CONDITION), DIMENSION, dtype=torch.float64)
    inputs = (DIMENSION * eigenvalues).sqrt()[:, None] * Q.T
    return Task(
        name="quadratic",
        description="A quadratic in 10 dimensions with eigenvalues from 1 to 100, its axes turned.",
        model=_linear(Q.sum(1)[None]),  # one unit along every eigenvector
        loss=half_squared_error,
        train_data=(inputs.float(), torch.zeros(DIMENSION, 1)),
        metadata={"lowest_loss": 0.0},
    )


def _rosenbrock() -> Task:
    return Task(
        name="rosenbrock",
        description="Rosenbrock's valley, 100 (y - x^2)^2 + (1 - x)^2, from (-1.2, 1).",
        model=Rosenbrock(),
        loss=nn.MSELoss(),
        train_data=(torch.arange(2), torch.zeros(2, 1)),
        metadata={"lowest_loss": 0.0},
    )


def _monkey_saddle() -> Task:
    return Task(
        name="monkey-saddle",
        description="A monkey saddle with three minima around it, from a point whose gradient leads into the saddle.",
        model=MonkeySaddle(),
        loss=mean_of_outputs,
        train_data=(torch.zeros(1), torch.zeros(1)),
        metadata={"lowest_loss": -6.75},
    )


def _deep_linear() -> Task:
    size, generator = len(SINGULAR_VALUES), torch.Generator().manual_seed(0)
    U, V = _orthogonal(size, generator), _orthogonal(size, generator)
    target = U @ torch.diag(torch.tensor(SINGULAR_VALUES, dtype=torch.float64)) @ V.T
    model = nn.Sequential(*[_linear(0.1 * _orthogonal(size, generator)) for _ in range(3)])
    inputs = math.sqrt(size) * torch.eye(size, dtype=torch.float64)
    return Task(
        name="deep-linear",
        description="Three linear layers that learn a 6 x 6 matrix of rank 4, from a start near zero.",
        model=model,
        loss=half_squared_error,
        train_data=(inputs.float(), (inputs @ target.T).float()),
        metadata={"lowest_loss": 0.0},
    )


LANDSCAPES: dict[str, Callable[[], Task]] = {
    "quadratic": _quadratic,
    "rosenbrock": _rosenbrock,
    "monkey-saddle": _monkey_saddle,
    "deep-linear": _deep_linear,
}
"""Functions that return each task anew, by name."""
