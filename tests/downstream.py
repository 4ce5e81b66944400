"""A user's own typed code: mypy reads it with every check, `tests/test_install.py` runs it from the wheel."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import analysis
from curvature import HessianOperator, Objective, SpectrumPlan, Status, eigsh, solve, spectrum
from curvature.linalg import trace
from optimizers import AdaHessian


def sharpness(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the largest eigenvalue of the Hessian."""
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    pairs = eigsh(objective, 1, generator=0)
    pairs.raise_if_failed()
    status: Status = pairs.status
    assert status is Status.CONVERGED
    return float(pairs.eigenvalues[0])


def main() -> None:
    """Use a little of everything."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(32, 4), torch.randint(3, (32,))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    H = HessianOperator(objective)
    product: Tensor = H @ objective.gradient()
    step: Tensor = solve(objective, objective.gradient(), matrix="ggn", damping=0.1).x
    mean, error = trace(H, num_matvecs=8, generator=0).value, spectrum(H, SpectrumPlan(k=1), generator=0).trace().stderr
    noise: float = analysis.gradient_noise(objective).noise_scale.value
    optimizer = AdaHessian(model.parameters(), lr=0.1)
    loss = optimizer.step(lambda: nn.functional.cross_entropy(model(x), y))
    print(product.shape == step.shape, float(mean), float(error), noise, loss, sharpness(model, x, y))


if __name__ == "__main__":
    main()
