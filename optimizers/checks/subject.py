"""What the checks of optimizers are tried on: an optimizer with its way to step, and a least-squares problem."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "NotApplicable",
    "Outputs",
    "StepForm",
    "Subject",
    "copies",
    "least_squares",
    "require",
    "residuals_of",
    "same",
    "value_of",
]

StepForm = Literal["backward", "graph", "closure", "loss", "outputs"]
Outputs = Callable[[], Tensor]


class NotApplicable(Exception):
    """A check that an optimizer's kind has nothing to say to."""


@dataclass
class Subject:
    """An optimizer class, how it steps, and a small least-squares problem to step on."""

    make: Callable[..., torch.optim.Optimizer]
    form: StepForm
    settings: dict[str, Any] = field(default_factory=dict)

    def new(self, params: Iterable[Any], **more: Any) -> Any:
        settings = {**self.settings, **more}
        if self.form == "outputs":
            settings.setdefault("loss", nn.MSELoss(reduction="sum"))
        return self.make(params, **settings)

    def step(self, optimizer: Any, outputs: Outputs) -> Any:
        """Take a step on the sum of squares of `outputs()`."""

        def loss() -> Tensor:
            return outputs().square().sum()

        if self.form == "loss":
            return optimizer.step(loss)
        if self.form == "outputs":
            return optimizer.step(lambda: (z := outputs(), torch.zeros_like(z)))

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward(create_graph=self.form == "graph")
            return value

        if self.form == "closure":
            return optimizer.step(closure)
        closure()
        return optimizer.step()

    def run(self, optimizer: Any, outputs: Outputs, steps: int) -> None:
        for _ in range(steps):
            self.step(optimizer, outputs)

    def trained(self, steps: int, **settings: Any) -> tuple[list[nn.Parameter], Outputs, Any]:
        """Return parameters, residuals and optimizer after some steps from the start."""
        params, outputs = least_squares()
        optimizer = self.new(params, **settings)
        self.run(optimizer, outputs, steps)
        return params, outputs, optimizer

    def needs(self, name: str) -> None:
        """Leave a check out where the optimizer does not have some setting."""
        if name not in self.new(least_squares()[0]).defaults:
            raise NotApplicable(f"there is no {name}")


def require(condition: bool, message: str) -> None:
    """Fail a check with a message unless a condition holds."""
    if not condition:
        raise AssertionError(message)


def least_squares(contiguous: bool = True, dtype: torch.dtype = torch.float64) -> tuple[list[nn.Parameter], Outputs]:
    """Return weight, bias and the residuals of a linear least-squares problem."""
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    weight = A if contiguous else torch.stack([A, A], dim=2)[..., 0]
    params = [nn.Parameter(weight.to(dtype)), nn.Parameter(torch.randn(10, generator=generator).to(dtype))]
    return params, residuals_of(params)


def residuals_of(params: Sequence[Tensor]) -> Outputs:
    """Return the residuals of the problem as a function of no argument, (10,)."""
    x = torch.linspace(-1.5, 1.2, 5, dtype=torch.float64).to(params[0].dtype)
    return lambda: nn.functional.linear(x, params[0], params[1])  # where methods that look for layers find one


def value_of(outputs: Outputs) -> float:
    """Return the sum of squares."""
    return float(outputs().detach().double().square().sum())


def copies(params: Sequence[Tensor]) -> list[Tensor]:
    """Return what parameters hold."""
    return [p.detach().clone() for p in params]


def same(a: Iterable[Tensor], b: Iterable[Tensor], what: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    """Fail a check with a message unless tensors are equal, by default to the bit."""
    for x, y in zip(a, b, strict=True):
        require(torch.allclose(x.detach(), y.detach(), rtol=rtol, atol=atol, equal_nan=True), what)
