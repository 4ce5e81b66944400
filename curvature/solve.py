"""(curvature + damping I) x = b in one call: influence functions, natural gradients, Newton steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, TypeAlias, get_args

from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.base.checkpoint import AnyCheckpoint, open_run
from curvature.linalg.base.entry import numerics
from curvature.linalg.systems.cg import cg
from curvature.linalg.systems.minres import minres
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.objective.objective import Objective
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.operators.empirical_fisher import EmpiricalFisherOperator
from curvature.operators.fisher import FisherOperator
from curvature.operators.ggn import GGNOperator
from curvature.operators.gradient_covariance import GradientCovarianceOperator
from curvature.operators.hessian import HessianOperator
from curvature.operators.mc_fisher import MCFisherOperator
from curvature.operators.ntk import NTKOperator
from curvature.parameters import ParameterSpace
from curvature.results.estimates import Status
from curvature.results.solves import SolveResult

__all__ = ["SolveMethod", "solve"]

SolveMethod: TypeAlias = Literal["auto", "cg", "minres"]

_SEMI_DEFINITE = (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    MCFisherOperator,
    NTKOperator,
)


@numerics
def solve(
    A: AnyMatrix,
    rhs: Tensor | Mapping[str, Tensor],
    *,
    damping: float = 0.0,
    matrix: MatrixName | None = None,
    method: SolveMethod = "auto",
    preconditioner: Any = None,
    x0: Tensor | None = None,
    rtol: float = 1e-5,
    atol: float = 0.0,
    max_iterations: int | None = None,
    callback: Callable[[int, str], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> SolveResult:
    """Solve (A + damping I) x = b to residuals of max(rtol |b|, atol), by the method that suits A.

    Conjugate gradients for matrices that are positive semi-definite (Gauss-Newton matrices of squared error and
    cross-entropies, Fisher matrices, gradient covariances) with damping; MINRES without, as they may be singular, for
    Hessians and for negative damping. A matrix that is not known is taken by conjugate gradients too. Where these meet
    a direction of no positive curvature, or end with a larger residual than they began with, MINRES starts over, for
    all right-hand sides, and the products of both count.

    With H the Hessian or Gauss-Newton matrix, g_test the gradient of a loss on test data and g_i that of a training
    example, -g_test' (H + damping I)^-1 g_i / n is the influence of example i (Koh and Liang, 2017): one solution for
    all i.

    Args:
        A: symmetric, (n, n), or an objective.
        rhs: (n,), (n, k), or a tensor for every parameter by name, for the matrices of an objective.
        damping: added to A's diagonal; units of A.
        matrix: which one of an objective, "ggn" or "hessian" as a rule. There is no default, as steps and influences
            mostly want the Gauss-Newton matrix, where other functions take the Hessian.
        method: "cg" or "minres" fixes the choice.
        preconditioner: symmetric positive definite P near A + damping I, as an object whose `@` applies P^-1 to (n, k).
        x0: starts, flat, of the shape of the right-hand sides.
        rtol: tolerance of the residuals relative to |b|; positive.
        atol: tolerance of the residuals in units of b, where that is larger.
        max_iterations: most steps a column. Default: 10 n, at least 1000.
        callback: called after each step with the products so far and a word on progress.
        checkpoint: a folder for what has come out; after an interruption the same call goes on from there, to the same
            numbers. On ranks all of them reach it.

    Returns:
        Solutions with recomputed residuals; `method` says what was chosen, and why, and `named` holds the solution by
        parameter name where the right-hand side came so. With a status other than CONVERGED, what was reached.

    Raises:
        InputError: for arguments out of range or at odds.
        NonFiniteError: if a product is not finite.

    Examples:
        >>> import torch
        >>> result = solve(torch.diag(torch.tensor([1.0, -2.0])), torch.ones(2))
        >>> result.x.round(decimals=3), result.method
        (tensor([ 1.0000, -0.5000]), 'MINRES: conjugate gradients met a direction of negative curvature')
    """
    if method not in get_args(SolveMethod):
        raise InputError(f"method must be one of {', '.join(get_args(SolveMethod))}, got {method!r}.")
    if isinstance(A, Objective) and matrix is None:
        raise InputError('say which matrix of the objective to solve with, such as matrix="ggn" or matrix="hessian".')
    saved = open_run("solve", locals())
    A = as_matrix(A, matrix or "hessian")
    space = None
    if isinstance(rhs, Mapping):
        space = _space(A)
        rhs = space.to_flat(rhs)
    settings: dict[str, Any] = {
        "damping": damping,
        "preconditioner": preconditioner,
        "x0": x0,
        "rtol": rtol,
        "atol": atol,
        "max_iterations": max_iterations,
        "callback": callback,
    }
    chosen, why = _choose(A, damping, method)
    solver = cg if chosen == "cg" else minres
    result = solver(A, rhs, **settings, checkpoint=saved.part(chosen))
    name = "conjugate gradients" if chosen == "cg" else "MINRES"
    failure = _failure(result) if chosen == "cg" and method == "auto" else None
    if failure is not None:
        spent = result.num_matvecs
        result = minres(A, rhs, **settings, checkpoint=saved.part("minres"))
        result = replace(result, num_matvecs=result.num_matvecs + spent)
        name, why = "MINRES", f"conjugate gradients {failure}"
    return replace(result, method=f"{name}: {why}", named=None if space is None else space.to_dict(result.x))


def _choose(A: MatrixLike, damping: float, method: SolveMethod) -> tuple[str, str]:
    if method != "auto":
        return method, "as asked for"
    if damping < 0:
        return "minres", "the damping is negative"
    if isinstance(A, HessianOperator):
        return "minres", "a Hessian may be indefinite"
    if isinstance(A, _SEMI_DEFINITE) and damping == 0:
        return "minres", "without damping the matrix may be singular"
    if isinstance(A, _SEMI_DEFINITE):
        if isinstance(A, GGNOperator) and not A.objective.closed_form_loss:
            return "cg", "a Gauss-Newton matrix is positive semi-definite if the loss is convex in the outputs"
        return "cg", "the matrix is positive semi-definite"
    return "cg", "no direction of negative curvature was met"


def _failure(result: SolveResult) -> str | None:
    """Say what conjugate gradients met that MINRES does better, and whether curvature is below zero beyond rounding."""
    if Status.NEGATIVE_CURVATURE in result.statuses:
        assert result.curvature is not None
        kind = "negative" if float(result.curvature.nan_to_num(nan=0.0).min()) < 0 else "zero"
        return f"met a direction of {kind} curvature"
    if bool((~result.converged & (result.residual_norms > result.residual_history[..., 0])).any()):
        return "left a larger residual than they began with"
    return None


def _space(A: MatrixLike) -> ParameterSpace:
    """Return the parameters that rows of A stand for."""
    if not isinstance(A, ObjectiveOperator):
        raise InputError(
            f"a right-hand side by parameter name needs a matrix of an objective, got {type(A).__name__}; pass it flat."
        )
    if A.block is not None:
        raise InputError(
            "a right-hand side by parameter name needs the matrix of all parameters of its objective; restrict the "
            "objective instead, or pass it flat."
        )
    return A.objective.space
