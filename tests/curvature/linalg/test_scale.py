"""Matrices in units that are far from 1: results in these units, or an error; float32, whose squares reach 1e-45."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature import HessianOperator, Objective, eigsh, linalg, spectrum
from curvature.errors import InputError, NonFiniteError
from curvature.results.estimates import Status

N = 40
BASE = torch.linalg.qr(torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
EIGENVALUES = torch.linspace(1, N, N, dtype=torch.float64)


def matrix(unit: float) -> Tensor:
    A = (BASE * EIGENVALUES) @ BASE.T * unit
    return ((A + A.T) / 2).float()


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def top(found: Any, unit: float, rtol: float = 1.1e-3) -> None:
    values = found.eigenvalues.double() / unit
    assert found.status.ok or unit == 1e30
    torch.testing.assert_close(values, torch.tensor([40.0, 39.0], dtype=torch.float64), rtol=rtol, atol=0)
    X = found.eigenvectors.double()
    residuals = torch.linalg.vector_norm(matrix(unit).double() @ X - X * found.eigenvalues.double(), dim=0)
    assert bool((residuals <= rtol * found.eigenvalues.double()).all())


def estimate(true: float) -> Callable[[Any, float], None]:
    def check(found: Any, unit: float) -> None:
        error = abs(float(found.value) / unit - true)
        assert error <= max(4 * float(found.stderr) / unit, 1e-4 * true)

    return check


def norm_bounds(found: Any, unit: float) -> None:
    assert float(found.lower) / unit <= 40.001
    assert float(found.upper) / unit >= 39.999
    assert found.status.ok


def diagonals(found: Any, unit: float) -> None:
    errors, stderr = (found.value - matrix(unit).diagonal()).double() / unit, found.stderr.double() / unit
    assert bool((errors.abs() <= 5 * stderr + 1e-3).all())


def low_rank(found: Any, unit: float) -> None:
    U, values = found.eigenvectors.double(), found.eigenvalues.double() / unit
    error = torch.linalg.matrix_norm(matrix(unit).double() / unit - (U * values) @ U.T, 2)
    assert float(error) <= 1.01 * float(found.error_bound) / unit


def density(found: Any, unit: float) -> None:
    mean = float((found.nodes * found.weights).sum(1).mean()) / unit
    assert abs(mean - 20.5) < 4


def vector(found: Any, unit: float) -> None:
    expected = BASE @ (EIGENVALUES.sqrt() * (BASE.T @ torch.ones(N, dtype=torch.float64)))
    torch.testing.assert_close(found.value.double() / unit**0.5, expected, rtol=1e-3, atol=1e-3)


def minimiser(found: Any, unit: float) -> None:
    s = found.step.double() * unit
    gradient = 1 + (matrix(unit).double() / unit + found.multiplier / unit * torch.eye(N)) @ s
    assert float(gradient.norm()) <= 1e-3 * N**0.5
    assert found.status.ok


def solution(found: Any, unit: float) -> None:
    residual = (1 - matrix(unit).double() @ found.x.double()).norm()
    assert bool(found.converged) is (float(residual) <= 1.1e-5 * N**0.5)
    assert bool(found.converged) or (unit < 1e-12 and found.statuses[0] is Status.STAGNATED)


TRACE, FROBENIUS = float(EIGENVALUES.sum()), float(EIGENVALUES.square().sum().sqrt())
ONES = torch.ones(N)
CASES: dict[str, tuple[Callable[[Tensor], Any], Callable[[Any, float], None]]] = {
    "eigsh": (lambda A: linalg.eigsh(A, 2, method="lanczos", generator=generator()), top),
    "eigsh bfloat16 basis": (
        lambda A: linalg.eigsh(A, 2, method="lanczos", generator=generator(), basis_dtype=torch.bfloat16, rtol=1e-2),
        lambda found, unit: top(found, unit, rtol=1.1e-2),
    ),
    "lobpcg": (lambda A: linalg.lobpcg(A, 2, generator=generator()), top),
    "randomized_eigh": (
        lambda A: linalg.randomized_eigh(A, 5, generator=generator(), power_iterations=3),
        low_rank,
    ),
    "nystrom": (lambda A: linalg.nystrom(A, rank=10, generator=generator()), low_rank),
    **{
        f"trace {method}": (
            lambda A, m=method: linalg.trace(A, rtol=0.05, method=m, generator=generator()),  # type: ignore[misc]
            estimate(TRACE),
        )
        for method in ("auto", "hutchinson", "hutch++", "xtrace", "xnystrace")
    },
    "trace budget": (lambda A: linalg.trace(A, num_matvecs=20, generator=generator()), estimate(TRACE)),
    "trace hutchinson, budget": (
        lambda A: linalg.trace(A, method="hutchinson", num_matvecs=30, generator=generator()),
        estimate(TRACE),
    ),
    "diagonal": (lambda A: linalg.diagonal(A, num_matvecs=20, generator=generator()), diagonals),
    "diagonal hutchinson": (
        lambda A: linalg.diagonal(A, method="hutchinson", num_matvecs=30, generator=generator()),
        diagonals,
    ),
    "frobenius_norm": (
        lambda A: linalg.frobenius_norm(A, num_matvecs=20, generator=generator()),
        estimate(FROBENIUS),
    ),
    "frobenius_norm exact": (
        lambda A: linalg.frobenius_norm(A, num_matvecs=N, generator=generator()),
        estimate(FROBENIUS),
    ),
    "spectral_norm": (lambda A: linalg.spectral_norm(A, generator=generator()), norm_bounds),
    "spectral_density": (
        lambda A: linalg.spectral_density(A, num_steps=10, num_probes=8, generator=generator()),
        density,
    ),
    "matrix_function": (lambda A: linalg.matrix_function(A, ONES, "sqrt", rtol=1e-4), vector),
    "gltr": (lambda A: linalg.gltr(A, ONES, 0.1 / float(A.double().norm())), minimiser),
    "trust_region": (lambda A: linalg.trust_region(A, ONES, 1e5 / float(A.double().norm())), minimiser),
    "cg": (lambda A: linalg.cg(A, ONES), solution),
    "minres": (lambda A: linalg.minres(A, ONES), solution),
    "lsmr": (lambda A: linalg.lsmr(A, ONES, rtol=1e-5), solution),
}


@pytest.mark.parametrize("unit", [1e-12, 1e12])
@pytest.mark.parametrize("name", CASES)
def test_results_are_right_where_squares_are_in_range(name: str, unit: float) -> None:
    run, check = CASES[name]
    check(run(matrix(unit)), unit)


REFUSED = {"lobpcg", "randomized_eigh", "nystrom", "lsmr", "diagonal", "frobenius_norm", "frobenius_norm exact"}
REFUSED |= {name for name in CASES if "trace " in name and "hutchinson" not in name}


@pytest.mark.parametrize("unit", [1e-36, 1e-30, 1e-24, 1e-18, 1e18, 1e30])
@pytest.mark.parametrize("name", CASES)
def test_results_are_right_or_refused_where_squares_vanish_or_overflow(name: str, unit: float) -> None:
    run, check = CASES[name]
    with contextlib.ExitStack() as stack:
        if name in REFUSED or (unit == 1e-36 and name not in MEANS) or (unit > 1e12 and name == "minres"):
            stack.enter_context(pytest.raises(NonFiniteError, match="float64"))
        check(run(matrix(unit)), unit)


MEANS = {"trace hutchinson", "trace hutchinson, budget", "diagonal hutchinson", "cg", "minres", "trust_region"}


@pytest.mark.parametrize("solve", [linalg.cg, linalg.minres, linalg.lsmr])
def test_solutions_outside_the_range_of_the_dtype_are_refused(solve: Callable[..., Any]) -> None:
    for a, b in ((1e-14, 1e25), (1e14, 1e-25)):
        with pytest.raises(NonFiniteError, match="a solution has entries"):
            solve(torch.tensor([[a]]), torch.tensor([b]))


@pytest.mark.parametrize("solve", [linalg.cg, linalg.minres])
def test_a_start_far_larger_than_the_solution_is_no_fault_of_the_operator(solve: Callable[..., Any]) -> None:
    A = matrix(1.0)
    with pytest.raises(InputError, match="x0 must be nearer"):
        solve(A, 1e-20 * ONES, x0=ONES)
    for b in (1e-20, 1e-6):
        found = solve(A, b * ONES, x0=b * ONES)
        residual = float((b - A.double() @ found.x.double()).norm())
        assert bool(found.converged)
        assert residual <= 1.1e-5 * b * N**0.5


def test_a_zero_matrix_and_small_parts_of_a_large_one_are_no_matter_of_range() -> None:
    zero, uneven = torch.zeros(N, N), torch.diag(torch.tensor([1.0, 2.0, *[1e-30] * (N - 2)]))
    assert linalg.eigsh(zero, 2, generator=generator()).eigenvalues.tolist() == [0.0, 0.0]
    assert float(linalg.trace(zero, num_matvecs=20, generator=generator()).value) == 0.0
    for find in (linalg.eigsh, linalg.lobpcg):
        found = find(uneven, 3, generator=generator())
        torch.testing.assert_close(found.eigenvalues, torch.tensor([2.0, 1.0, 0.0]), rtol=1e-5, atol=1e-5)
    assert float(linalg.trace(uneven, num_matvecs=N, generator=generator()).value) == pytest.approx(3.0)


@pytest.mark.parametrize("unit", [1e-12, 1e-6])
def test_objectives_with_inputs_in_small_units(unit: float) -> None:
    X = torch.randn(300, 80, generator=generator())
    model = torch.nn.Linear(80, 1, bias=False)
    objective = Objective(model, torch.nn.MSELoss(), (X * unit, torch.zeros(300, 1)))
    H = 2 * X.double().T @ X.double() / 300
    values = torch.linalg.eigvalsh(H).flip(0)
    found = eigsh(HessianOperator(objective), 2, generator=generator())
    torch.testing.assert_close(found.eigenvalues.double() / unit**2, values[:2], rtol=1e-3, atol=0)
    whole = spectrum(HessianOperator(objective), generator=generator())
    assert float(whole.trace().value) / unit**2 == pytest.approx(float(values.sum()), rel=0.1)
