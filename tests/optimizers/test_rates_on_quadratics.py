"""Gradient descent, heavy ball and Nesterov's method lose the factor a step that theory says, to 1 %.

On eigenvalues in [mu, L] with k = L / mu (Polyak 1964; Lessard, Recht and Packard 2016, table 1).
"""

from __future__ import annotations

import cmath
import math

import pytest
import torch
from torch import nn

MU, L = 1.0, 100.0
ROOT = math.sqrt(L / MU)
EIGENVALUES = torch.logspace(0, 2, 12, dtype=torch.float64)


def measured(lr: float, momentum: float, nesterov: bool, steps: int) -> float:
    """Return the mean factor of the distance over the second half of the steps."""
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64)).Q
    H = Q @ torch.diag(EIGENVALUES) @ Q.T
    w = nn.Parameter(Q.sum(1))
    optimizer = torch.optim.SGD([w], lr=lr, momentum=momentum, nesterov=nesterov)
    sizes = []
    for _ in range(steps):
        optimizer.zero_grad()
        w.grad = H @ w.detach()
        optimizer.step()
        sizes.append(float(w.detach().norm()))
    return float((sizes[-1] / sizes[steps // 2 - 1]) ** (2 / steps))


@pytest.mark.parametrize(
    ("lr", "momentum", "nesterov", "rate"),
    [
        (2 / (L + MU), 0.0, False, (L - MU) / (L + MU)),
        (1 / L, 0.0, False, 1 - MU / L),
        (4 / (math.sqrt(L) + math.sqrt(MU)) ** 2, ((ROOT - 1) / (ROOT + 1)) ** 2, False, (ROOT - 1) / (ROOT + 1)),
        (1 / L, 0.9, False, math.sqrt(0.9)),  # all eigenvalues oscillate: the root of the momentum
        (1 / L, (ROOT - 1) / (ROOT + 1), True, 1 - 1 / ROOT),
        (4 / (3 * L + MU), (math.sqrt(3 * L / MU + 1) - 2) / (math.sqrt(3 * L / MU + 1) + 2), True,
         1 - 2 / math.sqrt(3 * L / MU + 1)),
    ],
    ids=["descent", "descent 1/L", "heavy ball", "heavy ball .9", "Nesterov", "Nesterov, best"],
)  # fmt: skip
def test_rates_are_those_of_theory(lr: float, momentum: float, nesterov: bool, rate: float) -> None:
    found = measured(lr, momentum, nesterov, 1500)
    assert found == pytest.approx(rate, rel=0.01)
    assert math.log(found) == pytest.approx(math.log(rate), rel=0.01)
    assert max(spectral_radius(float(h), lr, momentum, nesterov) for h in EIGENVALUES) == pytest.approx(rate, rel=1e-6)


def spectral_radius(h: float, lr: float, momentum: float, nesterov: bool) -> float:
    """Return the larger root of the method's recurrence along an eigenvector."""
    if nesterov:
        a, b = (1 + momentum) * (1 - lr * h), momentum * (1 - lr * h)
    else:
        a, b = 1 + momentum - lr * h, momentum
    root = cmath.sqrt(a * a - 4 * b)
    return max(abs(a + root), abs(a - root)) / 2


def test_beyond_two_over_the_largest_eigenvalue_it_diverges() -> None:
    assert measured(1.98 / L, 0.0, False, 200) < 1
    assert measured(2.02 / L, 0.0, False, 200) > 1.01
    beta = 0.9
    assert measured(0.99 * (2 + 2 * beta) / L, beta, False, 400) < 1
    assert measured(1.01 * (2 + 2 * beta) / L, beta, False, 400) > 1
