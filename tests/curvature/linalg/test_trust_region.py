"""Trust-region and cubic subproblems against dense minimisers found by another route, and against each other."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

from curvature.errors import InputError, NonFiniteError, NotConvergedError
from curvature.linalg import DiagonalPreconditioner, cg, cubic_subproblem, gltr, trust_region
from curvature.linop import Counting
from curvature.results.estimates import Status
from curvature.results.solves import SubproblemResult
from tests.matrices import F64, generator, spectra, with_spectrum

N = 40
RADII = [1e-3, 0.5, 30.0, 1e6]
SIGMAS = [1e-4, 1.0, 1e3]
GLOBAL = ["flat", "polynomial", "indefinite", "mostly negative", "outliers over a bulk", "step", "clustered"]
Solver = Callable[..., SubproblemResult]


def gradient(n: int = N, seed: int = 3) -> Tensor:
    return torch.randn(n, generator=generator(seed), dtype=F64)


def model(A: Tensor, g: Tensor, s: Tensor, sigma: float = 0.0) -> float:
    return float(g @ s + s @ A @ s / 2 + sigma / 3 * s.norm() ** 3)


def dense_minimum(
    A: Tensor, g: Tensor, length: Callable[[float], float], *, may_be_inside: bool
) -> tuple[float, Tensor]:
    """The multiplier and the step with (A + lambda I) s = -g, |s| = length(lambda), by a root finder; easy case."""
    values, U = torch.linalg.eigh(A)
    c = U.T @ g

    def step(multiplier: float) -> Tensor:
        return -U @ (c / (values + multiplier))

    if may_be_inside and values[0] > 0 and float(step(0.0).norm()) <= length(0.0):
        return 0.0, step(0.0)
    low = max(0.0, -float(values[0]))
    gap = 1e-14 * max(1.0, float(values.abs().max()))
    high = low + 1.0
    while float(step(high).norm()) > length(high):
        high *= 2
    root = brentq(lambda x: math.log(float(step(x).norm()) / length(x)), low + gap, high, xtol=1e-16, rtol=1e-15)
    return root, step(root)


@pytest.mark.parametrize("radius", RADII)
@pytest.mark.parametrize("name", GLOBAL)
def test_gltr_is_the_dense_minimiser(name: str, radius: float) -> None:
    A, g = with_spectrum(spectra(N)[name]), gradient()
    counted = Counting(A)
    result = gltr(counted, g, radius, rtol=1e-11)
    multiplier, s = dense_minimum(A, g, lambda _: radius, may_be_inside=True)
    exact = model(A, g, s)
    assert result.status is (Status.BOUNDARY if multiplier > 0 else Status.CONVERGED)
    assert result.on_boundary == (multiplier > 0)
    assert float(result.step.norm()) <= radius * (1 + 1e-12)
    assert abs(model(A, g, result.step) - exact) <= 1e-9 * abs(exact)
    assert abs(result.model_decrease + exact) <= 1e-9 * abs(exact)
    assert abs(result.multiplier - multiplier) <= 1e-7 * max(float(A.norm()), multiplier)
    residual = (g + A @ result.step + result.multiplier * result.step).norm()
    assert float(residual) <= 1e-10 * float(g.norm()) + 1e-13 * radius * (float(A.norm()) + multiplier)
    assert result.num_matvecs == counted.num_matvecs <= N


@pytest.mark.parametrize("sigma", SIGMAS)
@pytest.mark.parametrize("name", GLOBAL)
def test_the_cubic_step_is_the_dense_minimiser(name: str, sigma: float) -> None:
    A, g = with_spectrum(spectra(N)[name]), gradient()
    result = cubic_subproblem(A, g, sigma, rtol=1e-11)
    multiplier, s = dense_minimum(A, g, lambda x: x / sigma, may_be_inside=False)
    exact = model(A, g, s, sigma)
    assert result.status is Status.CONVERGED
    assert not result.on_boundary
    assert abs(model(A, g, result.step, sigma) - exact) <= 1e-9 * abs(exact)
    assert abs(result.model_decrease + exact) <= 1e-9 * abs(exact)
    assert abs(result.multiplier - multiplier) <= 1e-7 * max(float(A.norm()), multiplier)
    assert abs(result.multiplier - sigma * float(result.step.norm())) <= 1e-9 * result.multiplier


def random_competitors(radius: float) -> Tensor:
    S = torch.randn(N, 4000, generator=generator(8), dtype=F64)
    return S / S.norm(dim=0) * radius * torch.rand(4000, generator=generator(9), dtype=F64)


@pytest.mark.parametrize("solver", [trust_region, gltr])
def test_no_random_step_in_the_region_is_better_than_gltrs_and_none_of_steihaugs_leaves_it(solver: Solver) -> None:
    A, g = with_spectrum(spectra(N)["indefinite"]), gradient()
    for radius in RADII:
        result = solver(A, g, radius)
        assert float(result.step.norm()) <= radius * (1 + 1e-10)
        assert abs(result.model_decrease + model(A, g, result.step)) <= 1e-9 * result.model_decrease
        S = random_competitors(radius)
        values = g @ S + (S * (A @ S)).sum(dim=0) / 2
        if solver is gltr:
            assert result.model_decrease >= -float(values.min())


def test_steihaug_inside_is_cg_and_on_the_boundary_gltr_is_better() -> None:
    A, g = with_spectrum(spectra(N)["polynomial"]), gradient()
    inside = trust_region(A, g, 1e6, rtol=1e-9)
    solved = cg(A, -g, rtol=1e-9)
    assert inside.status is Status.CONVERGED
    assert inside.num_matvecs == solved.num_iterations[0]
    torch.testing.assert_close(inside.step, solved.x, rtol=1e-6, atol=1e-8)
    assert inside.multiplier == 0
    better = 0
    for name in ("polynomial", "indefinite", "outliers over a bulk", "slow exponential"):
        A = with_spectrum(spectra(N)[name])
        for radius in (0.3, 3.0, 30.0):
            truncated, exact = trust_region(A, g, radius, rtol=1e-10), gltr(A, g, radius, rtol=1e-10)
            assert truncated.status is exact.status is Status.BOUNDARY, (name, radius)
            assert exact.model_decrease >= truncated.model_decrease * (1 - 1e-12)
            if float(torch.linalg.eigvalsh(A)[0]) > 0:
                assert truncated.model_decrease >= 0.5 * exact.model_decrease  # Yuan (2000)
            better += exact.model_decrease > 1.001 * truncated.model_decrease
    assert better >= 6


def test_steihaug_gains_at_least_the_cauchy_decrease() -> None:
    for name in spectra(N):
        A, g = with_spectrum(spectra(N)[name]), gradient()
        for radius in (0.1, 10.0):
            c, length = float(g @ A @ g), float(g.norm())
            t = radius / length if c <= 0 else min(length**2 / c, radius / length)
            cauchy = t * length**2 - t**2 * c / 2
            assert trust_region(A, g, radius).model_decrease >= cauchy * (1 - 1e-9), (name, radius)


def test_directions_of_negative_curvature_are_met_and_told() -> None:
    A, g = with_spectrum(spectra(N)["mostly negative"]), gradient()
    result = trust_region(A, g, 5.0)
    lowest = float(torch.linalg.eigvalsh(A)[0])
    assert result.status is Status.BOUNDARY
    assert lowest <= result.curvature < 0
    assert abs(gltr(A, g, 5.0, rtol=1e-10).curvature - lowest) < 1e-3


# -- the hard case ----------------------------------------------------------------------------------------------------


def hard(gap: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """A with one negative eigenvalue, its eigenvector, and a gradient orthogonal to it."""
    values = torch.cat([torch.tensor([-gap], dtype=F64), torch.linspace(0.5, 3, N - 1, dtype=F64)])
    A = with_spectrum(values)
    u = torch.linalg.eigh(A)[1][:, 0]
    g = gradient()
    return A, u, g - u * (u @ g)


def hard_minimum(A: Tensor, g: Tensor, u: Tensor, radius: float) -> float:
    lowest = torch.linalg.eigvalsh(A)[0]
    s = -torch.linalg.pinv(A - lowest * torch.eye(N, dtype=F64), hermitian=True, rtol=1e-10) @ g
    assert float(s.norm()) < radius
    return model(A, g, s + u * (radius**2 - s.square().sum()).sqrt())


def test_the_hard_case_is_found_with_a_generator() -> None:
    A, u, g = hard()
    radius = 50.0
    exact = hard_minimum(A, g, u, radius)
    result = gltr(A, g, radius, rtol=1e-8, generator=generator(1))
    assert result.status is Status.BOUNDARY
    assert result.hard_case
    assert abs(result.multiplier - 1.0) < 1e-8
    assert abs(result.model_decrease + exact) <= 1e-8 * abs(exact)
    assert abs(model(A, g, result.step) - exact) <= 1e-8 * abs(exact)


def test_the_hard_case_in_few_dimensions_by_hand() -> None:
    A, g = torch.diag(torch.tensor([-1.0, 1.0, 1.0], dtype=F64)), torch.tensor([0.0, 2.0, 0.0], dtype=F64)
    blind = gltr(A, g, 3.0)
    assert blind.status is Status.CONVERGED  # the best of g's own Krylov space, which the docstring says
    assert blind.step.tolist() == [0.0, -2.0, 0.0]
    seeing = gltr(A, g, 3.0, generator=generator(1))
    torch.testing.assert_close(seeing.step.abs(), torch.tensor([8**0.5, 1.0, 0.0], dtype=F64))
    assert seeing.hard_case
    cubic = cubic_subproblem(A, g, 0.5, generator=generator(1))  # lambda = 1, |s| = 2, s_2 = -1
    torch.testing.assert_close(cubic.step.abs(), torch.tensor([3**0.5, 1.0, 0.0], dtype=F64))
    assert cubic.hard_case
    torch.testing.assert_close(cubic.multiplier, 1.0)
    assert not cubic_subproblem(A, 10 * g, 0.5, generator=generator(1)).hard_case


def test_a_saddle_point_is_left_along_its_lowest_eigenvector() -> None:
    A, u, _ = hard()
    result = gltr(A, torch.zeros(N, dtype=F64), 2.0, rtol=1e-8, generator=generator(1))
    assert result.status is Status.BOUNDARY
    assert abs(result.model_decrease - 2.0) < 1e-9  # |lambda| radius^2 / 2
    assert abs(abs(float(u @ result.step)) - 2.0) < 1e-6
    nothing = gltr(A, torch.zeros(N, dtype=F64), 2.0)
    assert nothing.num_matvecs == 0
    assert not bool(nothing.step.any())
    assert nothing.status.ok
    assert not bool(trust_region(A, torch.zeros(N, dtype=F64), 2.0).step.any())
    minimum = gltr(with_spectrum(spectra(N)["flat"]), torch.zeros(N, dtype=F64), 2.0, generator=generator(1))
    assert not bool(minimum.step.any())
    assert minimum.status is Status.CONVERGED


@pytest.mark.parametrize("share", [1e-4, 1e-9, 1e-14])
def test_near_the_hard_case(share: float) -> None:
    A, u, g = hard()
    g = g + share * u
    result = gltr(A, g, 50.0, rtol=1e-9, generator=generator(1))
    assert result.status is Status.BOUNDARY
    exact = hard_minimum(A, g - share * u, u, 50.0) - 50 * share
    assert abs(model(A, g, result.step) - exact) <= 1e-6 * abs(exact)


# -- preconditioners --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [trust_region, gltr, cubic_subproblem])
@pytest.mark.parametrize("name", ["polynomial", "indefinite"])
def test_preconditioned_is_plain_in_other_variables(solver: Solver, name: str) -> None:
    A, g = with_spectrum(spectra(N)[name]), gradient()
    p = torch.linspace(0.5, 4, N, dtype=F64)
    inner = solver(A / p.sqrt() / p.sqrt()[:, None], g / p.sqrt(), 2.0, rtol=1e-9)
    result = solver(A, g, 2.0, preconditioner=DiagonalPreconditioner(p), rtol=1e-9)
    torch.testing.assert_close(result.step, inner.step / p.sqrt(), rtol=1e-6, atol=1e-8)
    for field in ("step_norm", "model_decrease", "multiplier", "curvature"):
        torch.testing.assert_close(getattr(result, field), getattr(inner, field), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(result.residual_norm, inner.residual_norm, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(result.step_norm, float((p.sqrt() * result.step).norm()), rtol=1e-8, atol=0)
    assert result.status is inner.status


# -- the edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", [trust_region, gltr])
def test_matrices_without_structure_of_their_own(solver: Solver) -> None:
    g = gradient()
    flat = solver(torch.zeros(N, N, dtype=F64), g, 2.0)
    assert flat.status is Status.BOUNDARY
    torch.testing.assert_close(flat.step, -2 * g / g.norm())
    torch.testing.assert_close(flat.multiplier, float(g.norm()) / 2)
    multiple = solver(4 * torch.eye(N, dtype=F64), g, 1e3)
    assert multiple.status is Status.CONVERGED
    assert multiple.num_matvecs == 1
    torch.testing.assert_close(multiple.step, -g / 4)
    single = solver(torch.tensor([[-2.0]]), torch.tensor([3.0]), 5.0)
    assert single.step.tolist() == [-5.0]
    assert single.multiplier == pytest.approx(2.6)
    rank_one = solver(with_spectrum(spectra(N)["rank one"]), g, 0.1)
    assert rank_one.status is Status.BOUNDARY
    assert rank_one.num_matvecs <= 2


@pytest.mark.parametrize("scale", [1.0, 1e-25])
@pytest.mark.parametrize("solver", [trust_region, gltr])
def test_float32_and_small_gradients(solver: Solver, scale: float) -> None:
    A, g = with_spectrum(spectra(N)["indefinite"]), gradient()
    result = solver(A.float(), scale * g.float(), 3.0 * scale, rtol=1e-4)
    exact = solver(A, g, 3.0, rtol=1e-4)
    assert result.step.dtype == torch.float32
    assert float((result.step.double() / scale - exact.step).norm()) < 1e-2
    assert result.model_decrease / scale**2 == pytest.approx(exact.model_decrease, rel=1e-3)


def test_limits() -> None:
    A, g = with_spectrum(spectra(N)["slow exponential"]), gradient()
    for solver in (trust_region, gltr):
        short = solver(A, g, 1e6, rtol=1e-10, max_iterations=3)
        assert short.status is Status.MAX_ITERATIONS
        assert short.num_matvecs == 3
        with pytest.raises(NotConvergedError, match="after 3 products"):
            short.raise_if_failed()
    torch.testing.assert_close(
        gltr(A, g, 1e6, rtol=1e-10, max_iterations=3).step, trust_region(A, g, 1e6, max_iterations=3).step
    )


@pytest.mark.parametrize("solver", [trust_region, gltr, cubic_subproblem])
def test_bad_input(solver: Solver) -> None:
    A, g = torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)
    calls: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((A, g, 0.0), {}, "must be positive and finite, got 0.0"),
        ((A, g, math.inf), {}, "must be positive and finite, got inf"),
        ((A, g[:, None], 1.0), {}, r"g must be a vector \(4,\), got \(4, 1\)"),
        ((A, g[:3], 1.0), {}, r"must be a vector \(4,\)"),
        ((A, g, 1.0), {"rtol": -1.0}, "rtol must be positive"),
        ((A, g, 1.0), {"max_iterations": -1}, "max_iterations must"),
        ((A, g, 1.0), {"preconditioner": -A}, "preconditioner must be symmetric positive definite"),
    ]
    for arguments, settings, message in calls:
        with pytest.raises(InputError, match=message):
            solver(*arguments, **settings)
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        solver(A * math.nan, g, 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_the_hidden_direction_is_found_before_the_space_is_exhausted(seed: int) -> None:
    n = 400
    A = torch.diag(torch.cat([torch.tensor([-0.5], dtype=F64), torch.linspace(0.2, 3, n - 1, dtype=F64)]))
    g = gradient(n)
    g[0] = 0
    for solver, bound in ((gltr, 100.0), (cubic_subproblem, 1e-3)):
        blind = solver(A, g, bound, rtol=1e-6)
        seeing = solver(A, g, bound, rtol=1e-6, generator=generator(seed))
        assert blind.curvature > 0 > seeing.curvature
        assert seeing.hard_case
        assert seeing.status.ok
        assert seeing.num_matvecs < 150
        assert seeing.multiplier == pytest.approx(0.5, abs=1e-5)
        sigma = 0.0 if solver is gltr else bound
        assert -model(A, g, seeing.step, sigma) == pytest.approx(seeing.model_decrease, rel=1e-9)
        assert seeing.model_decrease > 2 * blind.model_decrease
        residual = (g + A @ seeing.step + seeing.multiplier * seeing.step).norm()
        assert float(residual) <= seeing.residual_norm + 1e-9 * float(g.norm())


@pytest.mark.parametrize("curvature", [1.0, -1.0])
def test_tiny_gradient_in_a_huge_ball(curvature: float) -> None:
    A = curvature * torch.eye(3, dtype=torch.float64)
    g = torch.tensor([1e-200, 0.0, 0.0], dtype=torch.float64)
    found = trust_region(A, g, 1e100)
    expected = 1e-200 if curvature > 0 else 1e100
    assert found.step_norm == pytest.approx(expected, rel=1e-12)
    assert float(found.step.abs().max() / expected) == pytest.approx(1.0, rel=1e-12)  # no square underflows


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("low", [[-3.0, -1.0], [-3.0]])
def test_the_search_goes_on_until_a_direction_that_g_does_not_see_would_have_been_found(
    low: list[float], cubic: bool
) -> None:
    n = 60
    values = torch.cat([torch.tensor(low, dtype=F64), torch.linspace(1, 2, n - len(low), dtype=F64)])
    A, g = torch.diag(values), torch.ones(n, dtype=F64)
    g[0] = 0.0
    for seed in range(20):
        random = torch.Generator().manual_seed(seed)
        found = cubic_subproblem(A, g, 0.1, generator=random) if cubic else gltr(A, g, 20.0, generator=random)
        assert found.status.ok
        assert found.curvature == pytest.approx(-3.0, abs=1e-2)
        assert found.multiplier >= 3.0 - 1e-3
