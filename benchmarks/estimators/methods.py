"""The estimators that are measured: this toolkit's and other libraries', each the way its library offers it.

A method takes a library's own Hessian or Gauss-Newton matrix, a number of products and a seed. skerch has no operators
of its own and needs `X @ A` beside `A @ X`: it is given ours, wrapped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common.peers import Operator
from benchmarks.common.problems import Problem
from benchmarks.eigen.methods import Meter

__all__ = ["ESTIMATORS", "PAIRS", "Answer", "Estimator", "Quantity"]

Quantity = Literal["trace", "diagonal", "pairs", "ggn-pairs"]
BLOCK = 16  # columns at a time of ours; others multiply all at once, or one by one
PAIRS = 5
"""Eigenvalues that are compared, the largest in magnitude."""


@dataclass(frozen=True)
class Answer:
    """What an estimator returned."""

    values: Tensor
    """(), (n,) or eigenvalues (k,) in any order."""
    stated: float | None = None
    """The error it states, in the units of `distance`: a standard error, in norm for diagonals; for eigenvalues whether
    it calls them right, 1 or 0. None where it says nothing."""


Estimate = Callable[[Any, int, int], Answer]
"""(matrix, number of products, seed) -> answer."""


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """How a quantity is asked for."""

    name: str
    quantity: Quantity
    label: str
    make: Callable[[Problem, Operator, Meter], Any]
    """(problem, which matrix, meter) -> matrix whose products the meter sees."""
    estimate: Estimate
    ours: bool = False


# -- the matrices -----------------------------------------------------------------------------------------------------


def _ours(problem: Problem, operator: Operator, meter: Meter) -> Any:
    import curvature

    objective = curvature.Objective(problem.model, problem.loss, (problem.inputs, problem.targets))
    A: Any = {"hessian": curvature.HessianOperator, "ggn": curvature.GGNOperator}[operator](objective)
    A._matmat = meter.watch(A._matmat)
    return A


def _curvlinops(problem: Problem, operator: Operator, meter: Meter) -> Any:
    import curvlinops

    kind = {"hessian": curvlinops.HessianLinearOperator, "ggn": curvlinops.GGNLinearOperator}[operator]
    data = [(problem.inputs, problem.targets)]
    A = kind(problem.model, problem.loss, problem.params, data, check_deterministic=False)
    return _Both(
        problem.num_params, meter.watch(A.__matmul__)
    )  # its xdiag asks for the adjoint, as its matrices have it


def _hessian_eigenthings(problem: Problem, operator: Operator, meter: Meter) -> Any:
    import hessian_eigenthings.operators

    assert operator == "hessian"

    def loss(model: Any, batch: Any) -> Tensor:
        result: Tensor = problem.loss(model(batch[0]), batch[1])
        return result

    A: Any = hessian_eigenthings.operators.HessianOperator(problem.model, [(problem.inputs, problem.targets)], loss)
    A.matvec = meter.watch(A.matvec)
    return A


class _Both:
    """A symmetric float32 matrix with products from both sides."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, n: int, product: Callable[[Tensor], Tensor]) -> None:
        self.shape, self.product = (n, n), product

    def __matmul__(self, X: Tensor) -> Tensor:
        return self.product(X)

    def __rmatmul__(self, X: Tensor) -> Tensor:
        return self.product(X.T).T

    def adjoint(self) -> _Both:
        return self


def _wrapped(problem: Problem, operator: Operator, meter: Meter) -> _Both:
    A = _ours(problem, operator, meter)
    return _Both(problem.num_params, lambda X: A @ X)


# -- this toolkit -----------------------------------------------------------------------------------------------------


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _our_trace(method: Any) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        from curvature.linalg import trace

        found = trace(A, method=method, num_matvecs=num_matvecs, generator=_generator(seed), block_size=BLOCK)
        return Answer(found.value, float(found.stderr))

    return estimate


def _our_diagonal(method: Any) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        from curvature.linalg import diagonal

        found = diagonal(A, method=method, num_matvecs=num_matvecs, generator=_generator(seed), block_size=BLOCK)
        return Answer(found.value, float(found.stderr.norm()))

    return estimate


def _our_randomized_eigh(A: Any, num_matvecs: int, seed: int) -> Answer:
    """Two power iterations, no tests: a quarter of the products is the width of the block."""
    from curvature.linalg import randomized_eigh

    width = num_matvecs // 4
    found = randomized_eigh(
        A, PAIRS, oversampling=width - PAIRS, power_iterations=2, num_tests=0, generator=_generator(seed)
    )
    return Answer(found.eigenvalues, float(found.status.ok))


def _our_eigsh(A: Any, num_matvecs: int, seed: int) -> Answer:
    from curvature.linalg import eigsh

    found = eigsh(A, PAIRS, which="LM", rtol=1e-3, max_matvecs=num_matvecs, generator=_generator(seed))
    return Answer(found.eigenvalues, float(found.status.ok))


def _our_nystrom(A: Any, num_matvecs: int, seed: int) -> Answer:
    from curvature.linalg import nystrom

    found = nystrom(A, num_matvecs - 10, num_tests=10, generator=_generator(seed))
    return Answer(found.eigenvalues, float(found.error_bound <= 1e-2 * found.eigenvalues[0]))


# -- other libraries --------------------------------------------------------------------------------------------------


def _from_curvlinops(name: str) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        import curvlinops

        torch.manual_seed(seed)
        return Answer(getattr(curvlinops, name)(A, num_matvecs))

    return estimate


def _from_hessian_eigenthings(method: str) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        import hessian_eigenthings

        found = hessian_eigenthings.trace(A, num_matvecs=num_matvecs, method=method, seed=seed)
        return Answer(torch.tensor(found.estimate), found.stderr)

    return estimate


def _from_skerch(name: str, part: str) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        import skerch.algorithms

        seed = 10_000 * (seed + 1)  # columns take the numbers after it
        if name == "hutch":
            found = skerch.algorithms.hutch(A, A.device, A.dtype, num_matvecs, seed=seed)
        else:
            found = skerch.algorithms.xhutchpp(A, A.device, A.dtype, num_matvecs // 2, seed=seed)
        return Answer(found[part])

    return estimate


def _seigh(recovery: str) -> Estimate:
    def estimate(A: Any, num_matvecs: int, seed: int) -> Answer:
        import skerch.algorithms

        width = num_matvecs // 2 if recovery == "hmt" else num_matvecs
        values, _ = skerch.algorithms.seigh(
            A, A.device, A.dtype, width, seed=10_000 * (seed + 1), recovery_type=recovery
        )
        return Answer(values)

    return estimate


def _all() -> list[Estimator]:
    het, clo, skr = "hessian-eigenthings 1.0.0a5", "curvlinops 3.0.1", "skerch 1.2.0 on our products"
    of_trace = (("Hutchinson", "hutchinson_trace"), ("Hutch++", "hutchpp_trace"), ("XTrace", "xtrace"))
    of_diagonal = (("Hutchinson", "hutchinson_diag"), ("XDiag", "xdiag"))
    entries: list[tuple[Quantity, str, str, Any, Estimate]] = []
    for m in ("auto", "hutchinson", "hutch++", "xtrace"):
        entries.append(("trace", f"ours-{m}", f"`trace`, {m}", _ours, _our_trace(m)))
    for label, name in of_trace:
        entries.append(("trace", f"curvlinops-{name}", f"{clo}, {label}", _curvlinops, _from_curvlinops(name)))
    for label, name in (("Hutchinson", "hutchinson"), ("Hutch++ (default)", "hutch++")):
        estimate = _from_hessian_eigenthings(name)
        entries.append(("trace", f"het-{name}", f"{het}, {label}", _hessian_eigenthings, estimate))
    for name in ("hutch", "xhutchpp"):
        entries.append(("trace", f"skerch-{name}", f"{skr}, `{name}`", _wrapped, _from_skerch(name, "tr")))
    for m in ("auto", "hutchinson", "xdiag"):
        entries.append(("diagonal", f"ours-{m}", f"`diagonal`, {m}", _ours, _our_diagonal(m)))
    for label, name in of_diagonal:
        entries.append(("diagonal", f"curvlinops-{name}", f"{clo}, {label}", _curvlinops, _from_curvlinops(name)))
    for name in ("hutch", "xhutchpp"):
        entries.append(("diagonal", f"skerch-{name}", f"{skr}, `{name}`", _wrapped, _from_skerch(name, "diag")))
    randomized = ("randomized_eigh", "`randomized_eigh`", _our_randomized_eigh)
    nystrom = ("nystrom", "`nystrom`, 10 products of them tests", _our_nystrom)
    kinds: tuple[tuple[Quantity, tuple[str, str, Estimate]], ...] = (("pairs", randomized), ("ggn-pairs", nystrom))
    for quantity, other in kinds:
        for name, label, estimate in (("eigsh", "`eigsh`", _our_eigsh), other):
            entries.append((quantity, f"ours-{name}", label, _ours, estimate))
        for recovery in ("hmt", "nystrom", "singlepass"):
            label = f"{skr}, `seigh`, {recovery}"
            entries.append((quantity, f"skerch-{recovery}", label, _wrapped, _seigh(recovery)))
    return [
        Estimator(name=name, quantity=quantity, label=label, make=make, estimate=estimate, ours=make is _ours)
        for quantity, name, label, make, estimate in entries
    ]


ESTIMATORS: dict[tuple[Quantity, str], Estimator] = {(e.quantity, e.name): e for e in _all()}
