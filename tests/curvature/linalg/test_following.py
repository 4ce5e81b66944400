"""The largest eigenvalue of a matrix that moves, against a dense one."""

from __future__ import annotations

import pytest
import torch

from curvature.errors import NonFiniteError
from curvature.linalg.krylov.following import Followed, follow_largest


def moving(t: float) -> torch.Tensor:
    """A spectrum like a network's, turning, whose second eigenvalue overtakes the first at t = 1/2."""
    n = 80
    g = torch.Generator().manual_seed(0)
    S = torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5
    Q = torch.linalg.matrix_exp(0.05 * t * (S - S.T))
    values = torch.linspace(-0.2, 1.0, n, dtype=torch.float64)
    values[-1], values[-2], values[-3] = 10.0, 5.0 + 10 * t, 4.0
    return (Q * values) @ Q.T


def test_it_is_the_largest_at_nearly_every_step_for_few_products() -> None:
    generator = torch.Generator().manual_seed(1)
    before: Followed | None = None
    errors, products, n = [], 0, 60
    for i in range(n):
        A = moving(i / n)
        before = follow_largest(A, before, generator=generator)
        exact = float(torch.linalg.eigvalsh(A)[-1])
        assert before.value <= exact * (1 + 1e-12)
        residual = float((A @ before.vector - before.value * before.vector).norm())
        assert before.residual == pytest.approx(residual, rel=1e-6, abs=1e-9)
        assert float(before.vector.norm()) == pytest.approx(1)
        errors.append(1 - before.value / exact)
        products += before.num_matvecs if i else 0
    assert sum(e < 0.01 for e in errors) >= 0.9 * n  # the overtaking takes some steps to show
    assert errors[-1] < 0.01
    assert products <= 3.5 * (n - 1)


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_scales_whose_squares_a_dtype_does_not_hold(scale: float) -> None:
    before: Followed | None = None
    for i in range(3):
        A = (moving(0.01 * i) * scale).float()
        before = follow_largest(A, before, generator=torch.Generator().manual_seed(1))
        exact = float(torch.linalg.eigvalsh(A.double())[-1])
        assert 0.99 * exact < before.value <= exact * (1 + 1e-5)
        residual = float((A.double() @ before.vector.double() - before.value * before.vector.double()).norm())
        assert before.residual == pytest.approx(residual, rel=0.01, abs=1e-5 * exact)


def turning(i: int) -> torch.Tensor:
    """Four eigenvalues close to each other, whose eigenvectors turn back and forth as at the edge of stability."""
    n, g = 80, torch.Generator().manual_seed(3)
    S, R = (torch.randn(n, n, generator=g, dtype=torch.float64) / n**0.5 for _ in range(2))
    Q = torch.linalg.matrix_exp(0.1 * i * (S - S.T)) @ torch.linalg.matrix_exp(0.5 * (i % 2) * (R - R.T))
    values = torch.linspace(-0.2, 6.0, n, dtype=torch.float64)
    values[-4:] = torch.tensor([8.5, 9.0, 9.5, 10.0])
    return (Q * values) @ Q.T


def test_eigenvectors_that_turn_back_and_forth_are_not_expected_to_go_on() -> None:
    generator, n = torch.Generator().manual_seed(0), 60
    before: Followed | None = None
    products = 0
    for i in range(n):
        before = follow_largest(turning(i), before, generator=generator)
        assert 0.99 * 10 < before.value <= 10 + 1e-9
        assert before.residual <= 0.03 * before.value
        products += before.num_matvecs if i else 0
    assert products <= 4 * (n - 1)  # 5.4 each from where the last two would lead


def test_signs_go_on_and_the_first_run_ends_at_its_residual() -> None:
    generator = torch.Generator().manual_seed(0)
    first = follow_largest(moving(0), None, generator=generator)
    assert first.residual <= 0.01 * first.value
    assert first.earlier is None
    second = follow_largest(moving(0.01), first, generator=generator)
    assert float(first.vector @ second.vector) > 0.9
    assert second.earlier is first.vector


@pytest.mark.parametrize("A", [torch.zeros(3, 3), torch.full((1, 1), 2.0), -torch.eye(2)])
def test_degenerate_matrices(A: torch.Tensor) -> None:
    found = follow_largest(A, None, generator=torch.Generator().manual_seed(0))
    found = follow_largest(A, found, generator=torch.Generator().manual_seed(0))
    assert found.value == pytest.approx(float(torch.linalg.eigvalsh(A)[-1]), abs=1e-6)


def test_a_product_that_is_not_finite_is_refused() -> None:
    with pytest.raises(NonFiniteError, match="product 1"):
        follow_largest(torch.full((3, 3), torch.nan), None, generator=torch.Generator().manual_seed(0))
