"""f(A) v against eigendecompositions; estimates and bounds of its error against the error."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import scipy.linalg
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import cg, matrix_function
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, with_spectrum

N = 80
DAMPING = 0.05
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "inv": lambda x: 1 / x,
    "sqrt": lambda x: x**0.5,
    "invsqrt": lambda x: x**-0.5,
    "log": torch.log,
    "exp": torch.exp,
}
BOUNDED = ["inv", "sqrt", "invsqrt", "log"]
SEMI_DEFINITE = ["flat", "polynomial", "slow exponential", "exponential", "clustered", "repeated", "step", "many null"]


def columns(k: int = 3, n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, k, generator=generator(seed), dtype=F64)


def exact(A: Tensor, V: Tensor, f: Callable[[Tensor], Tensor], damping: float = 0.0) -> Tensor:
    values, U = torch.linalg.eigh(A)
    return U @ (f(values.clamp_min(-1e30) + damping)[:, None] * (U.T @ V))


@pytest.mark.parametrize("name", SEMI_DEFINITE)
@pytest.mark.parametrize("f", FUNCTIONS)
def test_dense_values_and_honest_errors(f: str, name: str) -> None:
    A = with_spectrum(spectra(N)[name])
    V = columns()
    V[:, 1] *= 1e-25
    counted = Counting(A)
    result = matrix_function(counted, V, f, rtol=1e-8, damping=DAMPING)  # type: ignore[arg-type]
    reference = exact(A, V, FUNCTIONS[f], DAMPING)
    errors = (result.value - reference).norm(dim=0)
    assert result.status is Status.CONVERGED
    assert bool((errors <= 1e-8 * reference.norm(dim=0)).all())
    assert bool((errors <= result.errors).all())
    assert result.num_matvecs == counted.num_matvecs == sum(result.num_steps)


def test_the_matrix_exponential_is_scipys() -> None:
    A = with_spectrum(spectra(N)["indefinite"])
    result = matrix_function(A, columns(), "exp", rtol=1e-11)
    torch.testing.assert_close(result.value, torch.tensor(scipy.linalg.expm(A.numpy())) @ columns())


@pytest.mark.parametrize("name", ["flat", "polynomial", "exponential", "clustered", "many null"])
@pytest.mark.parametrize("f", BOUNDED)
def test_bounds_hold_at_every_step_and_are_not_idle(f: str, name: str) -> None:
    A, v = with_spectrum(spectra(N)[name]), columns(1)[:, 0]
    lower = float(torch.linalg.eigvalsh(A)[0].clamp_min(0)) + DAMPING
    reference = exact(A, v[:, None], FUNCTIONS[f], DAMPING)[:, 0]
    ratios = []
    for num_steps in range(2, 26, 2):
        result = matrix_function(A, v, f, rtol=None, num_steps=num_steps, damping=DAMPING, lower=lower)  # type: ignore[arg-type]
        assert result.status is Status.BUDGET
        error = float((result.value - reference).norm())
        assert error <= float(result.bounds) * (1 + 1e-9), num_steps
        if error > 1e-9:
            ratios.append(float(result.bounds) / error)
    assert min(ratios) < 100
    assert matrix_function(A, v, f, damping=DAMPING).bounds == math.inf or name == "many null"  # type: ignore[arg-type]


def twenty_problems(n: int) -> list[tuple[Tensor, Tensor]]:
    """Twenty spectra, and twenty vectors for each."""
    seeds = range(20)
    spectra_ = [torch.rand(n, generator=generator(seed), dtype=F64).square() * 4 for seed in seeds]
    return [(values, columns(20, n, seed + 1000)) for values, seed in zip(spectra_, seeds, strict=True)]


def test_estimates_cover_the_error_in_400_runs_as_a_rule() -> None:
    for f in ("invsqrt", "log", "exp"):
        covered = 0
        for values, V in twenty_problems(30):
            result = matrix_function(torch.diag(values), V, f, rtol=None, num_steps=9, damping=DAMPING)  # type: ignore[arg-type]
            errors = (result.value - FUNCTIONS[f](values + DAMPING)[:, None] * V).norm(dim=0)
            covered += int((errors <= result.errors).sum())
        assert covered > 0.95 * 400, f


def test_what_converges_is_what_was_promised_in_400_runs() -> None:
    late = 0
    for values, V in twenty_problems(40):
        result = matrix_function(torch.diag(values), V, "invsqrt", rtol=1e-3, damping=DAMPING)
        reference = ((values + DAMPING) ** -0.5)[:, None] * V
        late += int(((result.value - reference).norm(dim=0) > 1e-3 * reference.norm(dim=0)).sum())
        assert result.status is Status.CONVERGED
    assert late <= 4


def test_functions_of_ones_own() -> None:
    A, V = with_spectrum(spectra(N)["indefinite"]), columns()
    result = matrix_function(A, V, lambda x: x**3 - x, rtol=1e-10)
    torch.testing.assert_close(result.value, A @ (A @ (A @ V)) - A @ V, rtol=1e-9, atol=1e-11)
    inverse = matrix_function(A, V, "inv", damping=2.0, rtol=1e-10)
    torch.testing.assert_close(inverse.value, cg(A, V, damping=2.0, rtol=1e-10).x, rtol=1e-7, atol=1e-9)
    assert result.num_steps[0] <= 10  # a polynomial of degree 3


def test_columns_rest_when_they_are_done() -> None:
    A = with_spectrum(spectra(N)["flat"])
    U, V = torch.linalg.eigh(A)[1], columns()
    V[:, 0] = U[:, 0] + U[:, 7]
    V[:, 2] = 0
    counted = Counting(A)
    result = matrix_function(counted, V, "log", rtol=1e-9)
    assert result.num_steps[0] <= 4
    assert result.num_steps[2] == 0
    assert not bool(result.value[:, 2].any())
    assert result.num_matvecs == counted.num_matvecs == sum(result.num_steps)
    for i in range(3):
        alone = matrix_function(A, V[:, i], "log", rtol=1e-9)
        assert alone.value.shape == (N,)
        assert alone.errors.shape == alone.bounds.shape == ()
        torch.testing.assert_close(alone.value, result.value[:, i], rtol=1e-9, atol=1e-12)


def test_a_bound_lets_it_stop_with_certainty() -> None:
    A, v = with_spectrum(spectra(N)["slow exponential"]), columns(1)[:, 0]
    result = matrix_function(A, v, "invsqrt", damping=0.1, lower=0.1, rtol=1e-6)
    assert result.status is Status.CONVERGED
    reference = exact(A, v[:, None], FUNCTIONS["invsqrt"], 0.1)[:, 0]
    assert float((result.value - reference).norm()) <= float(result.bounds) < 2e-6 * float(reference.norm())


# -- the edges --------------------------------------------------------------------------------------------------------


def test_what_is_not_defined_is_refused_with_the_eigenvalue() -> None:
    A, v = with_spectrum(spectra(N)["indefinite"]), columns(1)[:, 0]
    for f, need in [("log", "definite"), ("invsqrt", "definite"), ("sqrt", "semi-definite")]:
        with pytest.raises(InputError, match=rf"f = '{f}' needs A \+ damping I to be positive {need}.*raise damping"):
            matrix_function(A, v, f, rtol=1e-8)  # type: ignore[arg-type]
    for f in ("log", "invsqrt", "inv"):
        with pytest.raises(InputError, match=r"needs A \+ damping I to be (positive definite|invertible)"):
            matrix_function(with_spectrum(spectra(N)["many null"]), v, f)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="f must return a finite value for every eigenvalue"):
        matrix_function(A, v, torch.log)


def test_roots_of_singular_matrices() -> None:
    A, V = with_spectrum(spectra(N)["many null"]), columns()
    result = matrix_function(A, V, "sqrt", rtol=1e-7)
    again = matrix_function(A, result.value, "sqrt", rtol=1e-7)
    torch.testing.assert_close(again.value, A @ V, rtol=0, atol=1e-4)
    zero = matrix_function(torch.zeros(5, 5), torch.ones(5), "sqrt")
    assert zero.value.tolist() == [0.0] * 5
    assert matrix_function(torch.zeros(5, 5), torch.ones(5), "exp").value.tolist() == [1.0] * 5
    multiple = matrix_function(4 * torch.eye(5), torch.ones(5), "invsqrt")
    assert multiple.num_matvecs == 1
    assert multiple.value.tolist() == [0.5] * 5
    single = matrix_function(torch.tensor([[4.0]]), torch.tensor([3.0]), "sqrt")
    assert single.value.tolist() == [6.0]
    assert single.status is Status.CONVERGED


def test_budgets_limits_and_float32() -> None:
    A, v = with_spectrum(spectra(N)["slow exponential"]), columns(1)[:, 0]
    short = matrix_function(A, v, "log", damping=1e-3, num_steps=5)
    assert short.status is Status.MAX_STEPS
    with pytest.raises(NotConvergedError, match=r"after 5 products: step limit reached"):
        short.raise_if_failed()
    single = matrix_function(A.float(), v.float(), "log", damping=1e-2, rtol=1e-3)
    assert single.value.dtype == torch.float32
    reference = exact(A, v[:, None], torch.log, 1e-2)[:, 0]
    assert float((single.value.double() - reference).norm() / reference.norm()) < 1e-3


def test_bad_input() -> None:
    A, v = torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)
    for arguments, settings, message in [
        ((A, v, "cos"), {}, "one of inv, sqrt, invsqrt, log, exp, got 'cos'"),
        ((A, v, "log"), {"lower": 0.0}, "lower must be positive"),
        ((A, v, "log"), {"num_steps": 0}, "num_steps must be at least 1"),
        ((A, v, "log"), {"rtol": 0.0}, "rtol must be positive"),
        ((A, v[:3], "log"), {}, r"vector \(4,\) or a block"),
        ((A, v, lambda x: x[:0]), {}, "must return a finite value for every eigenvalue"),
    ]:
        with pytest.raises(InputError, match=message):
            matrix_function(*arguments, **settings)  # type: ignore[arg-type]
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        matrix_function(A * math.nan, v, "exp")
