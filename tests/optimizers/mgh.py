"""Problems of More, Garbow and Hillstrom (1981), Testing unconstrained optimization software, as residuals f(x).

The objective is sum_i f_i(x)^2. Starts and minima are those of the paper; some problems have several local minima.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PROBLEMS", "TestFunction"]


@dataclass(frozen=True, kw_only=True)
class TestFunction:
    """One problem. Not a test case, in spite of the name it has in the paper."""

    __test__ = False

    residuals: Callable[[Tensor], Tensor]
    start: list[float]
    minima: tuple[float, ...]


def _vector(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rosenbrock(x: Tensor) -> Tensor:
    return torch.stack([10 * (x[1] - x[0] ** 2), 1 - x[0]])


def freudenstein_and_roth(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([-13 + a + ((5 - b) * b - 2) * b, -29 + a + ((b + 1) * b - 14) * b])


def powell_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([1e4 * x[0] * x[1] - 1, torch.exp(-x[0]) + torch.exp(-x[1]) - 1.0001])


def brown_badly_scaled(x: Tensor) -> Tensor:
    return torch.stack([x[0] - 1e6, x[1] - 2e-6, x[0] * x[1] - 2])


def beale(x: Tensor) -> Tensor:
    return torch.stack([y - x[0] * (1 - x[1] ** (i + 1)) for i, y in enumerate((1.5, 2.25, 2.625))])


def helical_valley(x: Tensor) -> Tensor:
    theta = torch.atan(x[1] / x[0]) / (2 * math.pi) + (0.5 if float(x[0].detach()) < 0 else 0.0)
    return torch.stack([10 * (x[2] - 10 * theta), 10 * ((x[0] ** 2 + x[1] ** 2).sqrt() - 1), x[2]])


def bard(x: Tensor) -> Tensor:
    y = _vector([0.14, 0.18, 0.22, 0.25, 0.29, 0.32, 0.35, 0.39, 0.37, 0.58, 0.73, 0.96, 1.34, 2.10, 4.39])
    u = torch.arange(1.0, 16.0, dtype=torch.float64)
    v = 16 - u
    return y - (x[0] + u / (v * x[1] + torch.minimum(u, v) * x[2]))


def powell_singular(x: Tensor) -> Tensor:
    return torch.stack([x[0] + 10 * x[1], 5**0.5 * (x[2] - x[3]), (x[1] - 2 * x[2]) ** 2, 10**0.5 * (x[0] - x[3]) ** 2])


def wood(x: Tensor) -> Tensor:
    return torch.stack(
        [
            10 * (x[1] - x[0] ** 2),
            1 - x[0],
            90**0.5 * (x[3] - x[2] ** 2),
            1 - x[2],
            10**0.5 * (x[1] + x[3] - 2),
            (x[1] - x[3]) / 10**0.5,
        ]
    )


def kowalik_and_osborne(x: Tensor) -> Tensor:
    y = _vector([0.1957, 0.1947, 0.1735, 0.1600, 0.0844, 0.0627, 0.0456, 0.0342, 0.0323, 0.0235, 0.0246])
    u = _vector([4, 2, 1, 0.5, 0.25, 0.167, 0.125, 0.1, 0.0833, 0.0714, 0.0625])
    return y - x[0] * (u**2 + u * x[1]) / (u**2 + u * x[2] + x[3])


def brown_and_dennis(x: Tensor) -> Tensor:
    t = torch.arange(1.0, 21.0, dtype=torch.float64) / 5
    return (x[0] + t * x[1] - torch.exp(t)) ** 2 + (x[2] + x[3] * torch.sin(t) - torch.cos(t)) ** 2


def biggs_exp6(x: Tensor) -> Tensor:
    t = torch.arange(1.0, 14.0, dtype=torch.float64) / 10
    y = torch.exp(-t) - 5 * torch.exp(-10 * t) + 3 * torch.exp(-4 * t)
    return x[2] * torch.exp(-t * x[0]) - x[3] * torch.exp(-t * x[1]) + x[5] * torch.exp(-t * x[4]) - y


def trigonometric(x: Tensor) -> Tensor:
    n = len(x)
    i = torch.arange(1.0, n + 1, dtype=torch.float64)
    return n - torch.cos(x).sum() + i * (1 - torch.cos(x)) - torch.sin(x)


def variably_dimensioned(x: Tensor) -> Tensor:
    s = (torch.arange(1.0, len(x) + 1, dtype=torch.float64) * (x - 1)).sum()
    return torch.cat([x - 1, s[None], s[None] ** 2])


def broyden_tridiagonal(x: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=x.dtype)
    below, above = torch.cat([zero, x[:-1]]), torch.cat([x[1:], zero])
    return (3 - 2 * x) * x - below - 2 * above + 1


PROBLEMS: dict[str, TestFunction] = {
    "rosenbrock": TestFunction(residuals=rosenbrock, start=[-1.2, 1.0], minima=(0.0,)),
    "freudenstein-roth": TestFunction(residuals=freudenstein_and_roth, start=[0.5, -2.0], minima=(0.0, 48.98425367924)),
    "powell-badly-scaled": TestFunction(residuals=powell_badly_scaled, start=[0.0, 1.0], minima=(0.0,)),
    "brown-badly-scaled": TestFunction(residuals=brown_badly_scaled, start=[1.0, 1.0], minima=(0.0,)),
    "beale": TestFunction(residuals=beale, start=[1.0, 1.0], minima=(0.0,)),
    "helical-valley": TestFunction(residuals=helical_valley, start=[-1.0, 0.0, 0.0], minima=(0.0,)),
    "bard": TestFunction(residuals=bard, start=[1.0, 1.0, 1.0], minima=(8.21487730658e-3, 17.4286)),
    "powell-singular": TestFunction(residuals=powell_singular, start=[3.0, -1.0, 0.0, 1.0], minima=(0.0,)),
    "wood": TestFunction(residuals=wood, start=[-3.0, -1.0, -3.0, -1.0], minima=(0.0,)),
    "kowalik-osborne": TestFunction(
        residuals=kowalik_and_osborne, start=[0.25, 0.39, 0.415, 0.39], minima=(3.07505603849e-4, 1.02734e-3)
    ),
    "brown-dennis": TestFunction(residuals=brown_and_dennis, start=[25.0, 5.0, -5.0, -1.0], minima=(85822.2016264,)),
    "biggs-exp6": TestFunction(
        residuals=biggs_exp6, start=[1.0, 2.0, 1.0, 1.0, 1.0, 1.0], minima=(0.0, 5.65564992545e-3, 0.305876)
    ),
    "trigonometric": TestFunction(residuals=trigonometric, start=[0.1] * 10, minima=(0.0, 2.79505912218e-5)),
    "variably-dimensioned": TestFunction(
        residuals=variably_dimensioned, start=[1 - (i + 1) / 10 for i in range(10)], minima=(0.0,)
    ),
    "broyden-tridiagonal": TestFunction(residuals=broyden_tridiagonal, start=[-1.0] * 10, minima=(0.0,)),
}
