"""The solvers that are measured for eigenpairs of the Hessian, each the way its library offers it.

A method takes (problem, k, meter) and returns a solver; every product with the Hessian goes through the meter. All are
asked for residuals of 1e-3 |lambda|, or for what comes nearest to it among what the library lets one ask for.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from benchmarks.common.peers import flatten
from benchmarks.common.problems import Problem

__all__ = ["EIGEN_METHODS", "RTOL", "EigenMethod", "Found", "Meter", "OutOfTime"]

RTOL = 1e-3
SEED = 0


class OutOfTime(Exception):
    """More seconds than allowed were spent."""


@dataclass
class Meter:
    """Counts columns multiplied and the time they take; stops whoever takes too long."""

    limit: float = float("inf")
    """Seconds of CPU time of the process."""
    products: int = 0
    calls: list[tuple[int, float]] = field(default_factory=list)
    """(columns, seconds) of every call."""

    def watch(self, product: Callable[..., Any]) -> Callable[..., Any]:
        """Return `product` with its calls counted; of a matrix, the columns."""

        def watched(*args: Any) -> Any:
            if time.process_time() > self.limit:
                raise OutOfTime
            start = time.process_time()
            result = product(*args)
            columns = _columns(result)
            self.calls.append((columns, time.process_time() - start))
            self.products += columns
            return result

        return watched

    def product_seconds(self) -> float:
        """Return the median cost of a column, the first call, which builds the graph, left out."""
        later = self.calls[1:] or self.calls
        return float(np.median([seconds / columns for columns, seconds in later]))


def _columns(result: Any) -> int:
    if isinstance(result, Tensor):
        return result.shape[1] if result.ndim == 2 else 1
    return 1


@dataclass(frozen=True)
class Found:
    """What a solver returned."""

    values: Tensor
    """(k,), in any order."""
    vectors: Tensor
    """(n, k)."""
    converged: bool | None
    """Whether the library says that it converged; None where it says nothing about it."""
    said: str = ""
    """Its words where it did not."""


Solver = Callable[[], Found]


@dataclass(frozen=True, kw_only=True)
class EigenMethod:
    """How eigenpairs are asked for."""

    name: str
    label: str
    make: Callable[[Problem, int, Meter, Tensor], Solver]
    """(problem, k, meter, reference eigenvalues) -> solver."""
    load: Callable[[], Any]
    which: Literal["LA", "LM"] = "LA"
    """LM where the library knows only the largest in magnitude."""
    ours: bool = False


# -- this toolkit -----------------------------------------------------------------------------------------------------


def _load_ours() -> Any:
    import curvature.linalg

    return curvature


def _our_hessian(problem: Problem, meter: Meter) -> Any:
    curvature = _load_ours()
    data = (problem.inputs, problem.targets)
    A = curvature.HessianOperator(curvature.Objective(problem.model, problem.loss, data))
    A._matmat = meter.watch(A._matmat)
    return A


def _ours(solver: str, **options: Any) -> Callable[[Problem, int, Meter, Tensor], Solver]:
    def make(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
        A = _our_hessian(problem, meter)

        def solve() -> Found:
            generator = torch.Generator().manual_seed(SEED)
            pairs = getattr(_load_ours().linalg, solver)(A, k, rtol=RTOL, generator=generator, **options)
            return Found(pairs.eigenvalues, pairs.eigenvectors, pairs.status.ok, pairs.status.value)

        return solve

    return make


# -- scipy ------------------------------------------------------------------------------------------------------------


def _load_scipy() -> Any:
    import scipy.sparse.linalg

    return scipy.sparse.linalg


def _arpack(A: Any, k: int) -> Found:
    library = _load_scipy()
    start = np.random.default_rng(SEED).standard_normal(A.shape[0])
    try:
        values, vectors = library.eigsh(A, k, which="LA", tol=RTOL, ncv=max(2 * k + 1, 20), v0=start.astype(A.dtype))
    except library.ArpackNoConvergence as error:
        return Found(torch.tensor(error.eigenvalues), torch.tensor(error.eigenvectors), False, str(error))
    return Found(torch.tensor(values), torch.tensor(vectors), True)


def _ours_arpack(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
    A = _our_hessian(problem, meter).to_scipy()
    return lambda: _arpack(A, k)


def _ours_scipy_lobpcg(problem: Problem, k: int, meter: Meter, reference: Tensor) -> Solver:
    """SciPy's LOBPCG, whose tolerance is absolute: it is told the smallest eigenvalue that is wanted."""
    A = _our_hessian(problem, meter).to_scipy()
    tolerance = RTOL * float(reference[:k].abs().min())

    def solve() -> Found:
        start = np.random.default_rng(SEED).standard_normal((A.shape[0], k)).astype(A.dtype)
        with _heard() as words:
            values, vectors = _load_scipy().lobpcg(A, start, largest=True, tol=tolerance, maxiter=2000)
        return Found(torch.tensor(values), torch.tensor(vectors), not words, "; ".join(words))

    return solve


@contextmanager
def _heard() -> Iterator[list[str]]:
    """Collect the first line of every warning of the block."""
    words: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield words
    words += dict.fromkeys(str(w.message).split("\n")[0] for w in caught if issubclass(w.category, UserWarning))


# -- other libraries --------------------------------------------------------------------------------------------------


def _load_curvlinops() -> Any:
    import curvlinops

    return curvlinops


def _curvlinops(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
    data = [(problem.inputs, problem.targets)]
    A = _load_curvlinops().HessianLinearOperator(
        problem.model, problem.loss, problem.params, data, check_deterministic=False
    )
    A._matmat = meter.watch(A._matmat)
    B = A.to_scipy(dtype=np.float32)
    return lambda: _arpack(B, k)


def _load_hessian_eigenthings() -> Any:
    import hessian_eigenthings.algorithms
    import hessian_eigenthings.operators

    return hessian_eigenthings


def _their_hessian(problem: Problem, meter: Meter) -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        result: Tensor = problem.loss(model(batch[0]), batch[1])
        return result

    A = _load_hessian_eigenthings().operators.HessianOperator(problem.model, [(problem.inputs, problem.targets)], loss)
    A.matvec = meter.watch(A.matvec)
    return A


def _found(result: Any) -> Found:
    done = int(result.converged.sum())
    said = f"{done} of {len(result.converged)} flagged as converged"
    return Found(result.eigenvalues, result.eigenvectors.T, done == len(result.converged), said)


def _lanczos_once(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
    """As many steps as it takes by default: 2 k."""
    A = _their_hessian(problem, meter)
    lanczos = _load_hessian_eigenthings().algorithms.lanczos
    return lambda: _found(lanczos(A, k=k, tol=RTOL, which="LA", seed=SEED))


def _lanczos_until_converged(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
    """Anew with twice the steps until all pairs are flagged as converged; reorthogonalised, which one must ask for."""
    A = _their_hessian(problem, meter)
    lanczos = _load_hessian_eigenthings().algorithms.lanczos

    def solve() -> Found:
        steps = 2 * k
        while True:
            result = lanczos(A, k=k, max_iter=steps, tol=RTOL, which="LA", seed=SEED, reorthogonalize=True)
            if bool(result.converged.all()) or steps == A.size:
                return _found(result)
            steps = min(2 * steps, A.size)

    return solve


def _power(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
    A = _their_hessian(problem, meter)
    power = _load_hessian_eigenthings().algorithms.deflated_power_iteration
    return lambda: _found(power(A, k=k, max_iter=100_000, tol=RTOL, seed=SEED))


def _load_pyhessian() -> Any:
    import pyhessian

    return pyhessian


def _pyhessian(tolerance: float, iterations: int) -> Callable[[Problem, int, Meter, Tensor], Solver]:
    """Return the power iteration that stops when an eigenvalue changes by less than `tolerance`."""

    def make(problem: Problem, k: int, meter: Meter, _: Tensor) -> Solver:
        library = _load_pyhessian()
        with _heard():  # of reference cycles
            A = library.hessian(problem.model, problem.loss, data=(problem.inputs, problem.targets), cuda=False)
        module = sys.modules["pyhessian.hessian"]

        def solve() -> Found:
            plain = library.utils.hessian_vector_product
            module.hessian_vector_product = meter.watch(plain)  # type: ignore[attr-defined]
            try:
                torch.manual_seed(SEED)
                values, vectors = A.eigenvalues(maxIter=iterations, tol=tolerance, top_n=k)
            finally:
                module.hessian_vector_product = plain  # type: ignore[attr-defined]
            return Found(torch.tensor(values), torch.stack([flatten(v) for v in vectors], dim=1), None)

        return solve

    return make


EIGEN_METHODS: dict[str, EigenMethod] = {
    method.name: method
    for method in (
        EigenMethod(name="eigsh", label="`eigsh`", make=_ours("eigsh"), load=_load_ours, ours=True),
        EigenMethod(
            name="eigsh-uncertified",
            label="`eigsh(confidence=None)`",
            make=_ours("eigsh", confidence=None),
            load=_load_ours,
            ours=True,
        ),
        EigenMethod(name="lobpcg", label="`lobpcg`", make=_ours("lobpcg"), load=_load_ours, ours=True),
        EigenMethod(name="ours-arpack", label="our Hessian, SciPy's ARPACK", make=_ours_arpack, load=_load_ours),
        EigenMethod(
            name="ours-scipy-lobpcg", label="our Hessian, SciPy's LOBPCG", make=_ours_scipy_lobpcg, load=_load_ours
        ),
        EigenMethod(
            name="curvlinops", label="curvlinops 3.0.1, SciPy's ARPACK", make=_curvlinops, load=_load_curvlinops
        ),
        EigenMethod(
            name="het-lanczos",
            label="hessian-eigenthings 1.0.0a5, Lanczos, 2 k steps (default)",
            make=_lanczos_once,
            load=_load_hessian_eigenthings,
        ),
        EigenMethod(
            name="het-lanczos-doubled",
            label="hessian-eigenthings 1.0.0a5, Lanczos, steps doubled until converged",
            make=_lanczos_until_converged,
            load=_load_hessian_eigenthings,
        ),
        EigenMethod(
            name="het-power",
            label="hessian-eigenthings 1.0.0a5, power iteration",
            make=_power,
            load=_load_hessian_eigenthings,
            which="LM",
        ),
        EigenMethod(
            name="pyhessian",
            label="PyHessian 0.1, power iteration (defaults)",
            make=_pyhessian(RTOL, 100),
            load=_load_pyhessian,
            which="LM",
        ),
        EigenMethod(
            name="pyhessian-tight",
            label="PyHessian 0.1, power iteration, tol 1e-6",
            make=_pyhessian(1e-6, 100_000),
            load=_load_pyhessian,
            which="LM",
        ),
    )
}
