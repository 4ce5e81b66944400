"""LSMR: dense least-squares solutions, damped and not, of tall, wide and rank-deficient matrices."""

from __future__ import annotations

import math

import pytest
import scipy.sparse.linalg
import torch
from torch import Tensor

from curvature.errors import InputError, NonFiniteError
from curvature.linalg import cg, lsmr
from curvature.linop import LinearOperator
from curvature.results.estimates import Status
from tests.matrices import F64, generator, orthogonal


def with_singular_values(m: int, n: int, values: Tensor) -> Tensor:
    return orthogonal(m, 1)[:, : len(values)] * values.to(F64) @ orthogonal(n, 2)[:, : len(values)].T


def columns(m: int, k: int = 3) -> Tensor:
    return torch.randn(m, k, generator=generator(3), dtype=F64)


def exact(J: Tensor, B: Tensor, damping: float) -> Tensor:
    """By the singular value decomposition."""
    U, s, Vt = torch.linalg.svd(J, full_matrices=False)
    filters = torch.where(s > 1e-12 * s[0], s / (s**2 + damping), 0)
    return Vt.T @ (filters[:, None] * (U.T @ B))


class CountedPair(LinearOperator):
    """A matrix and its transpose, each told apart, with products counted together."""

    def __init__(self, J: Tensor, counter: list[int]) -> None:
        super().__init__(tuple(J.shape), J.dtype, J.device)  # type: ignore[arg-type]
        self.J, self.counter = J, counter

    @property
    def T(self) -> CountedPair:
        return CountedPair(self.J.T, self.counter)

    def _matmat(self, X: Tensor) -> Tensor:
        self.counter[0] += X.shape[1]
        return self.J @ X


SHAPES = {
    "tall": with_singular_values(50, 30, torch.linspace(1, 5, 30)),
    "wide": with_singular_values(30, 50, torch.linspace(1, 5, 30)),
    "square": with_singular_values(40, 40, torch.logspace(0, -3, 40)),
    "rank deficient": with_singular_values(50, 30, torch.linspace(1, 5, 8)),
    "rank one": with_singular_values(20, 30, torch.ones(1)),
}


@pytest.mark.parametrize("damping", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_dense_solutions(name: str, damping: float) -> None:
    J = SHAPES[name]
    B, counter = columns(J.shape[0]), [0]
    result = lsmr(CountedPair(J, counter), B, damping=damping, rtol=1e-12)
    assert result.status is Status.CONVERGED
    assert bool(result.converged.all())
    torch.testing.assert_close(result.x, exact(J, B, damping), rtol=1e-8, atol=1e-8 * float(result.x.abs().max()))
    R = B - J @ result.x
    torch.testing.assert_close(result.residual_norms, R.norm(dim=0), rtol=1e-6, atol=1e-10)
    assert result.gradient_norms is not None
    floor = 1e-14 * J.norm() * B.norm(dim=0)
    assert bool((result.gradient_norms <= 1e-12 * (J.T @ B).norm(dim=0) + floor).all())
    assert result.num_matvecs == counter[0] == 3 + 2 * sum(result.num_iterations) + 6


def test_a_block_is_its_columns_and_they_leave_when_done() -> None:
    J = SHAPES["tall"]
    B = columns(50)
    B[:, 1] = J @ torch.linalg.svd(J)[2][0]  # one singular vector: one step
    B[:, 2] = 0
    together = lsmr(J, B, rtol=1e-10)
    assert together.num_iterations[1:] == (1, 0)
    for i in range(3):
        alone = lsmr(J, B[:, i], rtol=1e-10)
        assert alone.x.shape == (30,)
        assert abs(alone.num_iterations[0] - together.num_iterations[i]) <= 1  # sums round otherwise
        torch.testing.assert_close(alone.x, together.x[:, i], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("damping", [0.0, 0.5])
@pytest.mark.parametrize("name", ["tall", "wide", "square"])
def test_step_by_step_it_is_scipys(name: str, damping: float) -> None:
    J = SHAPES[name]
    b = columns(J.shape[0], 1)[:, 0]
    for steps in (1, 2, 5, 12):
        ours = lsmr(J, b, damping=damping, rtol=1e-14, max_iterations=steps)
        theirs = scipy.sparse.linalg.lsmr(J.numpy(), b.numpy(), damp=damping**0.5, atol=0, btol=0, maxiter=steps)
        torch.testing.assert_close(ours.x, torch.tensor(theirs[0]), rtol=1e-9, atol=1e-7 * float(ours.x.abs().max()))
        assert ours.status is Status.MAX_ITERATIONS
        gradient = (J.T @ (b - J @ ours.x) - damping * ours.x).norm()
        torch.testing.assert_close(ours.residual_history[steps], gradient, rtol=1e-6, atol=1e-13)


def test_it_solves_what_cg_solves_on_the_normal_equations() -> None:
    J, B = SHAPES["wide"], columns(30)
    normal = cg(J.T @ J, J.T @ B, damping=0.1, rtol=1e-10)
    torch.testing.assert_close(lsmr(J, B, damping=0.1, rtol=1e-10).x, normal.x, rtol=1e-8, atol=1e-10)


def test_condition_numbers_are_not_squared() -> None:
    J = with_singular_values(50, 30, torch.logspace(0, -7, 30))
    x = columns(30, 1)[:, 0]
    result = lsmr(J, J @ x, rtol=1e-15, max_iterations=3000)
    assert float((J @ (result.x - x)).norm() / (J @ x).norm()) < 1e-9


@pytest.mark.parametrize("scale", [1.0, 1e-30])
def test_float32_and_small_right_hand_sides(scale: float) -> None:
    J, b = SHAPES["tall"].float(), scale * columns(50, 1)[:, 0].float()
    result = lsmr(J, b, rtol=1e-5)
    assert result.status is Status.CONVERGED
    assert result.x.dtype == torch.float32
    reference = exact(J.double(), b.double()[:, None], 0.0)[:, 0]
    assert float((result.x.double() - reference).norm() / reference.norm()) < 1e-4


def test_edges() -> None:
    assert lsmr(torch.full((1, 1), 4.0), torch.tensor([2.0])).x.tolist() == [0.5]
    for J, b in [(torch.zeros(3, 2), torch.ones(3)), (torch.ones(3, 2), torch.zeros(3))]:
        result = lsmr(J, b)
        assert result.x.tolist() == [0.0, 0.0]
        assert result.status is Status.CONVERGED
    orthogonal_to_range = lsmr(torch.eye(3, 2), torch.tensor([0.0, 0.0, 1.0]))
    assert orthogonal_to_range.x.tolist() == [0.0, 0.0]
    assert orthogonal_to_range.num_iterations == (0,)
    assert lsmr(SHAPES["tall"], columns(50), max_iterations=0).status is Status.MAX_ITERATIONS


class NoTranspose:
    shape, dtype, device = (3, 2), F64, torch.device("cpu")

    def __matmul__(self, X: Tensor) -> Tensor:
        return torch.zeros(3, X.shape[1], dtype=F64)


def test_bad_input() -> None:
    J, b = torch.ones(3, 2, dtype=F64), torch.ones(3, dtype=F64)
    with pytest.raises(InputError, match="must have an attribute T, its transpose, but NoTranspose has none"):
        lsmr(NoTranspose(), b)
    with pytest.raises(InputError, match=r"vector \(3,\) or a block \(3, k\), k >= 1, got \(2,\)"):
        lsmr(J, torch.ones(2, dtype=F64))
    with pytest.raises(InputError, match=r"damping must not be negative, got -1.0"):
        lsmr(J, b, damping=-1.0)
    with pytest.raises(InputError, match="max_iterations must not be negative"):
        lsmr(J, b, max_iterations=-1)
    J[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match="product 1 with the operator"):
        lsmr(J, b)
