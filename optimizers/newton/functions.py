"""A loss given by its value, gradient and products instead of by a closure: an `Objective`, functions of NumPy."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.objective.objective import Objective
from curvature.operators.ggn import GGNOperator
from curvature.operators.hessian import HessianOperator
from optimizers.newton.evaluations import CountedMatrix, Evaluations, Kind, Linearised
from optimizers.newton.flat import FlatParams

__all__ = ["Function", "FunctionEvaluations", "function_of"]


@dataclass(frozen=True, kw_only=True)
class Function:
    """A loss at the parameters as they are, in place of a closure."""

    value: Callable[[], float]
    value_and_gradient: Callable[[], tuple[float, Tensor]]  # the gradient as (n,)
    product: Callable[[Kind, Tensor], Tensor]
    """("hessian" or "ggn", v) -> A v."""


def function_of(objective: Objective, params: list[Any]) -> Function:
    """Return an objective as what an optimizer of these parameters takes.

    Raises:
        InputError: if they are not the parameters of the objective, in its order.
    """
    own = list(objective.space.tensors.values())
    if len(own) != len(params) or any(p is not q for p, q in zip(own, params, strict=True)):
        raise InputError(
            f"the optimizer must have the objective's {len(own)} parameters in its order; build it with "
            "list(objective.space.tensors.values())."
        )
    operator = functools.cache(lambda kind: (GGNOperator if kind == "ggn" else HessianOperator)(objective))

    def value_and_gradient() -> tuple[float, Tensor]:
        loss, gradient = objective.loss_and_gradient()
        return float(loss), gradient

    return Function(
        value=lambda: float(objective.loss()),
        value_and_gradient=value_and_gradient,
        product=lambda kind, v: operator(kind) @ v,
    )


class FunctionEvaluations(Evaluations):
    """One step's view of a `Function`."""

    def __init__(self, flat: FlatParams, function: Function, kind: Kind, sign: float) -> None:
        if kind == "residuals":
            raise InputError("this method takes a closure that returns residuals, and no objective, which has a loss.")
        self.flat, self.function, self.kind, self.sign = flat, function, kind, sign
        self.start, self.unused = flat.get(), [False] * len(flat.params)
        self.num_evaluations = self.num_gradients = 0
        self.watched = contextlib.nullcontext

    def linearise(self, *, with_matrix: bool = True) -> Linearised:
        loss, gradient = self._here()
        self._refuse_non_finite(loss, gradient)

        def product(v: Tensor) -> Tensor:
            return self.sign * self.function.product(self.kind, v)

        matrix = CountedMatrix(self.flat.n, self.flat, product) if with_matrix else None
        return Linearised(loss=loss, gradient=gradient, matrix=matrix)

    def value(self, x: Tensor) -> float:
        self.num_evaluations += 1
        with self._moved_to(x), contextlib.suppress(NonFiniteError):
            found = self.sign * self.function.value()
            return found if math.isfinite(found) else math.inf
        return math.inf

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        with self._moved_to(x), contextlib.suppress(NonFiniteError):
            found, gradient = self._here()
            return found if math.isfinite(found) else math.inf, gradient
        return math.inf, torch.full_like(self.start, math.nan)

    def _here(self) -> tuple[float, Tensor]:
        self.num_evaluations += 1
        self.num_gradients += 1
        loss, gradient = self.function.value_and_gradient()
        return self.sign * loss, self.sign * gradient

    @contextlib.contextmanager
    def _moved_to(self, x: Tensor) -> Iterator[None]:
        self.flat.set(x)  # seen by autograd: an objective must notice that its graphs are of another point
        try:
            yield
        finally:
            self.flat.set(self.start)

    def finish(self, *, keep: bool = True) -> None:
        """Do nothing: a function leaves no trace."""
