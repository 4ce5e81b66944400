"""A closure as a function of the flat parameters, for the length of one step: values, gradients and matrices.

Every evaluation within a step sees the same random numbers (dropout, sampled collocation points), so that losses at two
points can be compared. Nothing runs under `no_grad`: a closure may differentiate itself.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.engine.repeated_evaluation import RepeatedEvaluation
from curvature.errors import InputError, NonFiniteError
from curvature.linop import LinearOperator
from curvature.losses.rules import LossRule
from optimizers.newton.flat import FlatParams
from optimizers.newton.line_search import Line
from optimizers.shared.closures import loss_of, own_gradients, residuals_of
from optimizers.shared.differentiation import ClosureRecorder, gradients, leaves, products
from optimizers.shared.gradients import UNREACHED, refuse_sparse

__all__ = ["CountedMatrix", "Evaluations", "GaussNewtonMatrix", "Kind", "Linearised", "Mean", "ResidualJacobian"]

Kind = Literal["hessian", "ggn", "residuals"]
Mean = Callable[[Tensor], Tensor]


class CountedMatrix(LinearOperator):
    """A matrix at one point, (m, n), given by its product with a vector; `num_matvecs` counts the vectors."""

    def __init__(self, num_rows: int, flat: FlatParams, product: Callable[[Tensor], Tensor]) -> None:
        super().__init__((num_rows, flat.n), flat.dtype, flat.device)
        self.product, self.num_matvecs = product, 0

    def _matmat(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        if X.shape[1] == 1:  # CG's case; a stack of one is a copy
            return self.product(X[:, 0])[:, None]
        return torch.stack([self.product(x) for x in X.T], dim=1)


@dataclass(frozen=True, kw_only=True)
class Linearised:
    """What is known at the start of a step."""

    loss: float  # the loss there
    gradient: Tensor  # (n,)
    matrix: CountedMatrix | None
    """Hessian, Gauss-Newton matrix or Jacobian; it holds the graph. None where it was not asked for."""
    residuals: Tensor | None = None  # (m,), where the closure returns residuals

    @property
    def operator(self) -> CountedMatrix:
        """The matrix, which must have been asked for."""
        assert self.matrix is not None
        return self.matrix

    @property
    def least_squares(self) -> tuple[ResidualJacobian, Tensor]:
        """J and r, where the closure returns residuals."""
        assert isinstance(self.matrix, ResidualJacobian)
        assert self.residuals is not None
        return self.matrix, self.residuals


class ResidualJacobian(CountedMatrix):
    """J, (m, n), of some outputs in the parameters; products with its transpose count, too."""

    def __init__(self, flat: FlatParams, outputs: Tensor) -> None:
        if not outputs.requires_grad:
            raise InputError(
                "the closure's outputs have no graph: compute them from the parameters with gradients enabled, and do "
                "not detach them."
            )
        self.flat, self.outputs = flat, outputs
        super().__init__(outputs.numel(), flat, lambda x: self.forward(x).reshape(-1).to(self.device, self.dtype))

    @cached_property
    def _transposed(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return u and J'u with its graph, made when the first product asks for it."""
        with torch.enable_grad():
            u = torch.zeros_like(self.outputs, requires_grad=True)
            weighted = (self.outputs * u).sum()
        return u, gradients(weighted, self.flat.params, create_graph=True, retain_graph=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return J x in the shape of the outputs: J'u is linear in u, and its derivative is J."""
        u, Jtu = self._transposed
        return products(Jtu, [u], self.flat.split(x), retain_graph=True)[0]

    def backward(self, w: Tensor) -> Tensor:
        """Return J'w, (n,), for w in the shape of the outputs."""
        w = w.to(self.outputs.dtype)
        return self.flat.flatten(products([self.outputs], self.flat.params, [w], retain_graph=True))

    def _rmatmat(self, X: Tensor) -> Tensor:
        self.num_matvecs += X.shape[1]
        return torch.stack([self.backward(x.view(self.outputs.shape)) for x in X.T], dim=1)


class GaussNewtonMatrix(CountedMatrix):
    """G = J' H J of some outputs, (n, n), averaged over ranks."""

    def __init__(self, J: ResidualJacobian, H: Callable[[Tensor], Tensor], mean: Mean) -> None:
        self.J, self.H, self.mean = J, H, mean
        super().__init__(J.flat.n, J.flat, lambda x: mean(J.backward(H(J.forward(x)))))

    def block(self, places: Sequence[int]) -> CountedMatrix:
        """Return the block of some parameters, by their places: its products leave the rest of the network out."""
        flat = FlatParams([self.J.flat.params[i] for i in places])

        def product(x: Tensor) -> Tensor:
            self.num_matvecs += 1
            u, Jtu = self.J._transposed
            moved = products([Jtu[i] for i in places], [u], flat.split(x), retain_graph=True)[0]
            w = self.H(moved).to(self.J.outputs.dtype)
            return self.mean(flat.flatten(products([self.J.outputs], flat.params, [w], retain_graph=True)))

        return CountedMatrix(flat.n, flat, product)


class Evaluations:
    """One step's view of a closure.

    Args:
        flat: the parameters.
        closure: returns the loss, (outputs, targets), or residuals.
        curvature_closure: takes the place of `closure` for the matrix.
        kind: which matrix.
        loss: of (outputs, targets).
        rule: of that loss.
        sign: -1 to climb.
        mean_of: (outputs, targets) of a batch -> the mean over ranks, by its share of the joined batch.
        recorder: runs the closures.
    """

    def __init__(
        self,
        flat: FlatParams,
        closure: Callable[[], Any],
        curvature_closure: Callable[[], Any] | None,
        *,
        kind: Kind,
        loss: Callable[..., Tensor] | None,
        rule: LossRule | None,
        sign: float = 1.0,
        mean_of: Callable[[Tensor | None, Any], Mean] | None = None,
        recorder: ClosureRecorder | None = None,
    ) -> None:
        self._recorder = ClosureRecorder() if recorder is None else recorder
        self.flat, self.closure, self.curvature_closure = flat, closure, curvature_closure
        self.kind, self.loss, self.rule, self.sign = kind, loss, rule, sign
        self._alone = mean_of is None  # a rank whose batch reaches no parameter counts zero
        self._mean_of = mean_of if mean_of is not None else (lambda *_: lambda t: t)
        self.start = flat.get()
        self.num_evaluations = self.num_gradients = 0
        self.unused = [False] * len(flat.params)
        self._repeated = RepeatedEvaluation(flat.params)
        self.watched: Callable[[], contextlib.AbstractContextManager[None]] = self._repeated.watched

    def linearise(self, *, with_matrix: bool = True) -> Linearised:
        """Return loss, gradient and, if asked for, matrix at the parameters as they are.

        Raises:
            InputError: if the loss does not depend on the parameters.
            NonFiniteError: if the loss or its gradient is not finite there: there is nothing to step from.
        """
        self.num_evaluations += 1
        self.num_gradients += 1
        flat, separate = self.flat, self.curvature_closure
        value, outputs, targets = self._called(self.closure)
        own = {id(p) for p in flat.params}
        if self._alone and value.requires_grad and not any(id(leaf) in own for leaf in leaves([value])):
            raise InputError(f"the loss gives none of the optimizer's parameters a gradient. {UNREACHED}")
        if self.kind == "residuals":
            assert outputs is not None
            J, r = ResidualJacobian(flat, outputs), outputs.detach().reshape(-1).to(flat.device, flat.dtype)
            loss, gradient = float(value.detach()), J.backward(outputs.detach())
            self._refuse_non_finite(loss, gradient)
            return Linearised(loss=loss, gradient=gradient, matrix=J, residuals=r)
        with_matrix_here = with_matrix and separate is None
        second_order = self.kind == "hessian" and with_matrix_here
        grads = gradients(value, flat.params, create_graph=second_order, retain_graph=with_matrix_here)
        refuse_sparse(grads, "this optimizer")
        if separate is None:
            self.unused = [g is None for g in grads]
        mean = self._mean_of(outputs, targets)
        gradient = mean(self.sign * flat.flatten(grads))
        loss = float(mean(self.sign * value.detach().reshape(1)))
        self._refuse_non_finite(loss, gradient)
        if not with_matrix:
            return Linearised(loss=loss, gradient=gradient, matrix=None)
        if separate is not None:
            value, outputs, targets = self._called(separate, moves=False)
            mean = self._mean_of(outputs, targets)
        if self.kind == "ggn":
            if outputs is None or self.rule is None:
                raise InputError(
                    'curvature="ggn" needs the split between model and loss: give loss= to the optimizer and a closure '
                    'that returns (outputs, targets), or use curvature="hessian".'
                )
            J, H = ResidualJacobian(flat, outputs), self.rule.output_hessian(outputs.detach(), targets)
            matrix: CountedMatrix = GaussNewtonMatrix(J, H, mean)
        else:
            if separate is not None:
                grads = gradients(value, flat.params, create_graph=True, retain_graph=True)

            def product(x: Tensor) -> Tensor:
                return mean(self.sign * flat.flatten(products(grads, flat.params, flat.split(x), retain_graph=True)))

            matrix = CountedMatrix(flat.n, flat, product)
        return Linearised(loss=loss, gradient=gradient, matrix=matrix)

    def value(self, x: Tensor) -> float:
        """Return the loss at x, infinity if it is not a number; the parameters are where they were afterwards."""
        self.num_evaluations += 1
        with self._moved_to(x):
            value, outputs, targets = self._called(self.closure)
        found = float(self._mean_of(outputs, targets)(self.sign * value.detach().reshape(1)))
        return found if math.isfinite(found) else math.inf

    def residuals(self, x: Tensor) -> Tensor:
        """Return the residuals at x, (m,); the parameters are where they were afterwards."""
        self.num_evaluations += 1
        with self._moved_to(x):
            r = self._called(self.closure)[1]
        assert r is not None
        return r.detach().reshape(-1).to(self.flat.device, self.flat.dtype)

    def value_and_gradient(self, x: Tensor) -> tuple[float, Tensor]:
        """Return loss and gradient at x; the parameters are where they were afterwards."""
        self.num_evaluations += 1
        self.num_gradients += 1
        with self._moved_to(x):
            value, outputs, targets = self._called(self.closure)
            grads = gradients(value, self.flat.params, create_graph=False, retain_graph=False)
        mean = self._mean_of(outputs, targets)
        found = float(mean(self.sign * value.detach().reshape(1)))
        return found if math.isfinite(found) else math.inf, mean(self.sign * self.flat.flatten(grads))

    def line(self, here: Linearised, d: Tensor, *, at_one: float = math.nan, curvature: float = 0.0) -> Line:
        """Return the loss along d from the start; `at_one` is its value at the end of d, where it is known."""

        def value_and_slope(t: float) -> tuple[float, float]:
            found, gradient = self.value_and_gradient(self.start + t * d)
            return found, float(gradient @ d)

        return Line(
            value=lambda t: at_one if t == 1.0 and not math.isnan(at_one) else self.value(self.start + t * d),
            value_and_slope=value_and_slope,
            start=here.loss,
            slope=float(here.gradient @ d),
            curvature=min(curvature, 0.0),
            noise=4 * torch.finfo(self.start.dtype).eps * abs(here.loss),
        )

    @contextlib.contextmanager
    def _moved_to(self, x: Tensor) -> Iterator[None]:
        """Put the parameters at x for a while: the graph of the start is needed again, and holds their memory."""
        self.flat.set(x, unseen=True)
        try:
            yield
        finally:
            self.flat.set(self.start, unseen=True)

    def _called(self, closure: Callable[[], Any], *, moves: bool = True) -> tuple[Tensor, Tensor | None, Any]:
        """Return (loss, outputs or residuals, targets)."""
        return self._recorder.run(lambda: self._called_once(closure, moves))

    def _called_once(self, closure: Callable[[], Any], moves: bool) -> tuple[Tensor, Tensor | None, Any]:
        with own_gradients(self.flat.params), self._repeated.evaluation(moves=moves):
            returned = closure()
            if self.kind == "residuals":
                r = residuals_of(returned)
                return (r * r).sum() / 2, r, None
            return loss_of(returned, self.loss)

    def _refuse_non_finite(self, loss: float, gradient: Tensor) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the loss is {loss} at the start of the step, and there is nothing to step back to: parameters are "
                "left as they are; start elsewhere, or look at the batch."
            )
        if not bool(gradient.isfinite().all()):
            raise NonFiniteError(
                f"the gradient is not finite at the start of the step, where the loss is {loss:.4g}: parameters are "
                "left as they are; look for sqrt or norm at 0, or use a wider dtype."
            )

    def finish(self, *, keep: bool = True) -> None:
        """Leave random streams and buffers as one evaluation of the closure would have, or as they were found."""
        self._repeated.finish(keep=keep)
