"""Published problems of unconstrained optimization beside those of `mgh`, with starts and minima, n <= 50.

Sources: More, Garbow and Hillstrom (1981), Testing unconstrained optimization software; Luksan and Vlcek (1998, 2003),
Sparse and partially separable test problems; Toint (1978, 1983); Schnabel, Dennis, Gay; Himmelblau (1972); Hatfield
Polytechnic; Gould, Orban and Toint (2015), CUTEst, whose names are used. Where a sum of squares is minimised, the
residuals are given.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tests.optimizers.mgh import PROBLEMS

__all__ = ["PUBLISHED", "Unconstrained"]


@dataclass(frozen=True, kw_only=True)
class Unconstrained:
    """One problem."""

    start: list[float]
    minima: tuple[float, ...]
    """Of all local minima that are known."""
    value: Callable[[Tensor], Tensor]
    residuals: Callable[[Tensor], Tensor] | None = None
    """Whose squares sum to the value."""


def _vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _count(n: int, first: float = 1.0) -> Tensor:
    return torch.arange(n, dtype=torch.float64) + first


def _padded(x: Tensor) -> Tensor:
    zero = torch.zeros(1, dtype=x.dtype)
    return torch.cat([zero, x, zero])


def jensmp(x: Tensor) -> Tensor:
    i = _count(10)
    return 2 + 2 * i - torch.exp(i * x[0]) - torch.exp(i * x[1])


def gaussian(x: Tensor) -> Tensor:
    half = [0.0009, 0.0044, 0.0175, 0.0540, 0.1295, 0.2420, 0.3521]
    t = (8 - _count(15)) / 2
    return x[0] * torch.exp(-x[1] * (t - x[2]) ** 2 / 2) - _vector(*half, 0.3989, *half[::-1])


def meyer(x: Tensor) -> Tensor:
    y = [34780, 28610, 23650, 19630, 16370, 13720, 11540, 9744, 8261, 7030, 6005, 5147, 4427, 3820, 3307, 2872]
    return x[0] * torch.exp(x[1] / (45 + 5 * _count(16) + x[2])) - _vector(*y)


def gulf(x: Tensor) -> Tensor:
    t = _count(99) / 100
    y = 25 + (-50 * torch.log(t)) ** (2 / 3)
    return torch.exp(-((y - x[1]).abs() ** x[2]) / x[0]) - t


def box(x: Tensor) -> Tensor:
    t = _count(10) / 10
    return torch.exp(-t * x[0]) - torch.exp(-t * x[1]) - x[2] * (torch.exp(-t) - torch.exp(-10 * t))


def osborne1(x: Tensor) -> Tensor:
    y = [0.844, 0.908, 0.932, 0.936, 0.925, 0.908, 0.881, 0.850, 0.818, 0.784, 0.751, 0.718, 0.685, 0.658, 0.628, 0.603,
         0.580, 0.558, 0.538, 0.522, 0.506, 0.490, 0.478, 0.467, 0.457, 0.448, 0.438, 0.431, 0.424, 0.420, 0.414, 0.411,
         0.406]  # fmt: skip
    t = 10 * _count(33, 0)
    return _vector(*y) - (x[0] + x[1] * torch.exp(-t * x[3]) + x[2] * torch.exp(-t * x[4]))


def osborne2(x: Tensor) -> Tensor:
    y = [1.366, 1.191, 1.112, 1.013, 0.991, 0.885, 0.831, 0.847, 0.786, 0.725, 0.746, 0.679, 0.608, 0.655, 0.616, 0.606,
         0.602, 0.626, 0.651, 0.724, 0.649, 0.649, 0.694, 0.644, 0.624, 0.661, 0.612, 0.558, 0.533, 0.495, 0.500, 0.423,
         0.395, 0.375, 0.372, 0.391, 0.396, 0.405, 0.428, 0.429, 0.523, 0.562, 0.607, 0.653, 0.672, 0.708, 0.633, 0.668,
         0.645, 0.632, 0.591, 0.559, 0.597, 0.625, 0.739, 0.710, 0.729, 0.720, 0.636, 0.581, 0.428, 0.292, 0.162, 0.098,
         0.054]  # fmt: skip
    t = _count(65, 0) / 10
    found = x[0] * torch.exp(-t * x[4])
    for i in range(3):
        found = found + x[1 + i] * torch.exp(-((t - x[8 + i]) ** 2) * x[5 + i])
    return _vector(*y) - found


def watson(x: Tensor) -> Tensor:
    n, t = len(x), (_count(29) / 29)[:, None]
    powers = t ** _count(n, 0)
    slope = (powers[:, :-1] * _count(n - 1)) @ x[1:]
    return torch.cat([slope - (powers @ x) ** 2 - 1, x[:1], x[1:2] - x[:1] ** 2 - 1])


def penalty1(x: Tensor) -> Tensor:
    return torch.cat([1e-5**0.5 * (x - 1), (x.square().sum() - 0.25)[None]])


def penalty2(x: Tensor) -> Tensor:
    n, a = len(x), 1e-5**0.5
    i = _count(n - 1, 2)
    ends = torch.exp(x / 10)
    y = torch.exp(i / 10) + torch.exp((i - 1) / 10)
    weights = n + 1 - _count(n)
    return torch.cat(
        [
            x[:1] - 0.2,
            a * (ends[1:] + ends[:-1] - y),
            a * (ends[1:] - math.exp(-0.1)),
            ((weights * x.square()).sum() - 1)[None],
        ]
    )


def brown_almost_linear(x: Tensor) -> Tensor:
    return torch.cat([x[:-1] + x.sum() - (len(x) + 1), (x.prod() - 1)[None]])


def boundary_value(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    p = _padded(x)
    return 2 * x - p[:-2] - p[2:] + h**2 * (x + h * _count(len(x)) + 1) ** 3 / 2


def integral_equation(x: Tensor) -> Tensor:
    n = len(x)
    t = _count(n) / (n + 1)
    c = (x + t + 1) ** 3
    lower = torch.tril(torch.ones(n, n, dtype=torch.float64))
    return x + ((1 - t) * (lower @ (t * c)) + t * ((1 - lower) @ ((1 - t) * c))) / (2 * (n + 1))


def broyden_banded(x: Tensor) -> Tensor:
    n, terms = len(x), x * (1 + x)
    rows = [x[i] * (2 + 5 * x[i] ** 2) + 1 - terms[max(0, i - 5) : min(n, i + 2)].sum() + terms[i] for i in range(n)]
    return torch.stack(rows)


def chebyquad(x: Tensor) -> Tensor:
    n, y = len(x), 2 * x - 1
    before, here, rows = torch.ones_like(x), y, []
    for k in range(1, n + 1):
        rows.append(here.mean() + (1 / (k**2 - 1) if k % 2 == 0 else 0.0))
        before, here = here, 2 * y * here - before
    return torch.stack(rows)


def denschnd(x: Tensor) -> Tensor:
    a, b, c = x
    return torch.stack([a**2 + b**3 - c**4, 2 * a * b * c, 2 * a * b - 3 * b * c + a * c])


def denschne(x: Tensor) -> Tensor:
    return torch.stack([x[0], x[1] + x[1] ** 2, torch.exp(x[2]) - 1])


def denschnf(x: Tensor) -> Tensor:
    a, b = x
    return torch.stack([2 * (a + b) ** 2 + (a - b) ** 2 - 8, 5 * a**2 + (b - 3) ** 2 - 9])


def hatfldd(x: Tensor) -> Tensor:
    t = _vector(0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9)
    y = _vector(1.751, 1.561, 1.391, 1.239, 1.103, 0.981, 0.925, 0.8721, 0.8221, 0.7748)
    return torch.exp(t * x[2]) - x[0] * torch.exp(t * x[1]) + y


def himmelbf(x: Tensor) -> Tensor:
    a = _vector(0.0, 0.000428, 0.001, 0.00161, 0.00209, 0.00348, 0.00525)
    b = _vector(7.391, 11.18, 16.44, 16.20, 22.20, 24.02, 31.32)
    return 1e2 * ((x[0] ** 2 + a * x[1] ** 2 + a**2 * x[2] ** 2) / (b * (1 + a * x[3] ** 2)) - 1)


def engval2(x: Tensor) -> Tensor:
    a, b, c = x
    return torch.stack(
        [
            a**2 + b**2 + c**2 - 1,
            a**2 + b**2 + (c - 2) ** 2 - 1,
            a + b + c - 1,
            a + b - c + 1,
            3 * b**2 + a**3 + (5 * c - a + 1) ** 2 - 36,
        ]
    )


def circle(points: list[tuple[float, float]]) -> Callable[[Tensor], Tensor]:
    p = torch.tensor(points, dtype=torch.float64)
    return lambda v: torch.linalg.vector_norm(v[:2] - p, dim=1) - v[2]


CHNROSNB = [1.25, 1.40, 2.40, 1.40, 1.75, 1.20, 2.25, 1.20, 1.00, 1.10, 1.50, 1.60, 1.25, 1.25, 1.20, 1.20, 1.40, 0.50,
            0.50, 1.25, 1.80, 0.75, 1.25, 1.40, 1.60, 2.00, 1.00, 1.60, 1.25, 2.75, 1.25, 1.25, 1.25, 3.00, 1.50, 2.00,
            1.25, 1.40, 1.80, 1.50, 2.20, 1.40, 1.50, 1.25, 2.00, 1.50, 1.25, 1.40, 0.60, 1.50]  # fmt: skip


def chained_rosenbrock(x: Tensor) -> Tensor:
    a = torch.tensor(CHNROSNB[1 : len(x)], dtype=torch.float64)
    return torch.cat([4 * a * (x[:-1] - x[1:] ** 2), x[1:] - 1])


def luksan11(x: Tensor) -> Tensor:
    a, b = x[:-1], x[1:]
    return torch.cat([20 * a / (1 + a**2) - 10 * b, a - 1])


def luksan21(x: Tensor) -> Tensor:
    h = 1 / (len(x) + 1)
    p = _padded(x)
    return 2 * x + h**2 * (x + h * _count(len(x)) + 1) ** 3 / 2 - p[:-2] - p[2:] - 1


def engval1(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[1:] ** 2) ** 2 - 4 * x[:-1] + 3).sum()


def arwhead(x: Tensor) -> Tensor:
    return ((x[:-1] ** 2 + x[-1] ** 2) ** 2 - 4 * x[:-1] + 3).sum()


def schmvett(x: Tensor) -> Tensor:
    a, b, c = x[:-2], x[1:-1], x[2:]
    bent = -1 / (1 + (a - b) ** 2) - torch.sin((math.pi * b + c) / 2)
    return (bent - torch.exp(-(((a + c) / b - 2) ** 2))).sum()


def hairy(x: Tensor) -> Tensor:
    furs = 30 * torch.sin(7 * x[0]) ** 2 * torch.cos(7 * x[1]) ** 2
    return furs + 100 * (0.01 + (x[0] - x[1]) ** 2).sqrt() + 100 * (0.01 + x[0] ** 2).sqrt()


def humps(x: Tensor) -> Tensor:
    return 0.05 * x.square().sum() + (torch.sin(20 * x[0]) * torch.sin(20 * x[1])) ** 2


def snail(x: Tensor) -> Tensor:
    r, theta = x.square().sum().sqrt(), torch.atan2(x[1], x[0])
    return r**2 / (1 + r**2) * (1 + 1.5 * r - 0.5 * r * torch.cos(r - theta))


def genrose(x: Tensor) -> Tensor:
    return 1 + (100 * (x[1:] - x[:-1] ** 2) ** 2 + (x[1:] - 1) ** 2).sum()


def _squares(residuals: Callable[[Tensor], Tensor], start: list[float], *minima: float) -> Unconstrained:
    return Unconstrained(start=start, minima=minima, value=lambda x: residuals(x).square().sum(), residuals=residuals)


def _plain(value: Callable[[Tensor], Tensor], start: list[float], *minima: float) -> Unconstrained:
    return Unconstrained(start=start, minima=minima, value=value)


PUBLISHED: dict[str, Unconstrained] = {
    **{name: _squares(p.residuals, p.start, *p.minima) for name, p in PROBLEMS.items()},
    "JENSMP": _squares(jensmp, [0.3, 0.4], 124.3621823556, 259.5801907664),
    "GAUSSIAN": _squares(gaussian, [0.4, 1.0, 0.0], 1.12793276963e-8),
    "MEYER3": _squares(meyer, [0.02, 4000.0, 250.0], 87.9458551709),
    "MGH10": _squares(meyer, [2.0, 400000.0, 25000.0], 87.9458551709),
    "GULF": _squares(gulf, [5.0, 2.5, 0.15], 0.0),
    "BOX3": _squares(box, [0.0, 10.0, 20.0], 0.0),
    "OSBORNEA": _squares(osborne1, [0.5, 1.5, -1.0, 0.01, 0.02], 5.46489469748e-5),
    "OSBORNEB": _squares(
        osborne2, [1.3, 0.65, 0.65, 0.7, 0.6, 3.0, 5.0, 7.0, 2.0, 4.5, 5.5], 4.01377362935e-2, 1.78981358688
    ),
    "WATSON": _squares(watson, [0.0] * 6, 2.28767005355e-3),
    "PENALTY1": _squares(penalty1, [1.0, 2.0, 3.0, 4.0], 2.24997750050e-5),
    "PENALTY2": _squares(penalty2, [0.5] * 4, 9.37629300736e-6),
    "BROWNAL": _squares(brown_almost_linear, [0.5] * 10, 0.0, 1.0),
    "MOREBV": _squares(boundary_value, [i / 11 * (i / 11 - 1) for i in range(1, 11)], 0.0),
    "INTEQNELS": _squares(integral_equation, [i / 11 * (i / 11 - 1) for i in range(1, 11)], 0.0),
    "BROYDNBDLS": _squares(broyden_banded, [-1.0] * 10, 0.0),
    "CHEBYQAD": _squares(chebyquad, [i / 9 for i in range(1, 9)], 3.51687372568e-3),
    "CUBE": _squares(lambda x: torch.stack([x[0] - 1, 10 * (x[1] - x[0] ** 3)]), [-1.2, 1.0], 0.0),
    "DENSCHND": _squares(denschnd, [10.0] * 3, 0.0),
    "DENSCHNE": _squares(denschne, [2.0, 3.0, -8.0], 0.0),
    "DENSCHNF": _squares(denschnf, [2.0, 0.0], 0.0),
    "HATFLDD": _squares(hatfldd, [1.0, -1.0, 0.0], 6.61511391864e-8),
    "HIMMELBF": _squares(himmelbf, [2.7, 90.0, 1500.0, 10.0], 318.571748791),
    "SINEVAL": _squares(lambda x: torch.stack([1e3**0.5 * (x[1] - torch.sin(x[0])), x[0] / 2]), [4.712389, -1.0], 0.0),
    "ENGVAL2": _squares(engval2, [1.0, 2.0, 0.0], 0.0),
    "LSC1LS": _squares(
        circle([(9, 34), (35, 10), (-13, 6), (10, -14), (23, 27), (0, -10)]), [105.0, 96.0, 230.0], 7.71185223882
    ),
    "CHNROSNB": _squares(chained_rosenbrock, [-1.0] * 25, 0.0),
    "LUKSAN11LS": _squares(luksan11, [-0.8] * 20, 0.0),
    "LUKSAN21LS": _squares(luksan21, [i / 21 * (i / 21 - 1) for i in range(1, 21)], 0.0),
    "CLIFF": _plain(
        lambda x: ((x[0] - 3) / 100) ** 2 - (x[0] - x[1]) + torch.exp(20 * (x[0] - x[1])), [0.0, -1.0], 0.1997866137
    ),
    "HIMMELBG": _plain(lambda x: torch.exp(-x.sum()) * (2 * x[0] ** 2 + 3 * x[1] ** 2), [0.5, 0.5], 0.0),
    "BRKMCC": _plain(
        lambda x: (
            (x[0] - 2) ** 2
            + (x[1] - 1) ** 2
            + 1 / (1 - 0.25 * x[0] ** 2 - x[1] ** 2) / 25
            + 5 * (x[0] - 2 * x[1] + 1) ** 2
        ),
        [2.0, 2.0],
        0.16904268,
    ),
    "DENSCHNB": _plain(lambda x: (x[0] - 2) ** 2 + ((x[0] - 2) * x[1]) ** 2 + (x[1] + 1) ** 2, [1.0, 1.0], 0.0),
    "S308": _plain(
        lambda x: (x[0] ** 2 + x[0] * x[1] + x[1] ** 2) ** 2 + torch.sin(x[0]) ** 2 + torch.cos(x[1]) ** 2,
        [3.0, 0.1],
        0.7731990565,
    ),
    "SISSER2": _plain(lambda x: 3 * x[0] ** 4 - 2 * (x[0] * x[1]) ** 2 + 3 * x[1] ** 4, [1.0, 0.1], 0.0),
    "ENGVAL1": _plain(engval1, [2.0] * 10, 9.17746995718),
    "ARWHEAD": _plain(arwhead, [1.0] * 20, 0.0),
    "SCHMVETT": _plain(schmvett, [0.5] * 10, -24.0),
    "HAIRY": _plain(hairy, [-5.0, -7.0], 20.0),
    "LOGHAIRY": _plain(lambda x: torch.log1p(hairy(x) / 100), [-500.0, -700.0], 0.1823215568),
    "HUMPS": _plain(humps, [-506.0, -506.2], 0.0),
    "SNAIL": _plain(snail, [10.0, 10.0], 0.0),
    "GENROSE": _plain(genrose, [i / 11 for i in range(1, 11)], 1.0),
}
