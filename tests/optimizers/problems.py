"""Small problems for optimizers, with gradients and Hessians that share no code with what they test."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev


class Problem:
    """A model, a batch and cross-entropy, in float64."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model = model.to(torch.float64)
        self.x, self.y = x.to(torch.float64), y

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def closure(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    def pair(self) -> tuple[Tensor, Tensor]:
        return self.model(self.x), self.y

    def part(self, rows: slice) -> Callable[[], Tensor]:
        return lambda: F.cross_entropy(self.model(self.x[rows]), self.y[rows])

    def pair_of(self, rows: slice) -> Callable[[], tuple[Tensor, Tensor]]:
        return lambda: (self.model(self.x[rows]), self.y[rows])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Return gradient (n,) and Hessian (n, n) at the present parameters, by functional differentiation."""
        names = [name for name, _ in self.model.named_parameters()]

        def value(theta: Tensor) -> Tensor:
            values = dict(zip(names, self.split(theta), strict=True))
            return F.cross_entropy(functional_call(self.model, values, (self.x,)), self.y)

        return grad(value)(self.flat()), jacrev(grad(value))(self.flat())

    def flat(self) -> Tensor:
        return torch.cat([p.detach().reshape(-1) for p in self.params])

    def split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([p.numel() for p in self.params])
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


def mlp(seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    return Problem(model, torch.randn(12, 3), torch.randint(0, 3, (12,)))


def convolutional(seed: int = 0) -> Problem:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.Linear(8, 3))
    return Problem(model, torch.randn(6, 1, 3, 3), torch.randint(0, 3, (6,)))


def train(optimizer: torch.optim.Optimizer, closure: Callable[[], object], steps: int) -> list[float]:
    return [float(optimizer.step(closure)) for _ in range(steps)]
