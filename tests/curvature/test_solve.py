"""Solving with the curvature of a model: the right answer, by the method that suits, and the reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import EmpiricalFisherOperator, GGNOperator, HessianOperator, Objective, solve
from curvature.errors import InputError
from curvature.linalg import nystrom
from curvature.linop import Counting
from curvature.results.estimates import Status
from tests.matrices import F64, generator, spectra, with_spectrum
from tests.references import CROSS_ENTROPY, dense_ggn, dense_hessian, total_loss

DAMPING = 0.02


def problem(loss: nn.Module | None = None) -> tuple[nn.Module, list[tuple[Tensor, Tensor]], Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(20, 4, dtype=F64), torch.randint(3, (20,))
    batches = list(zip(x.split(8), y.split(8), strict=True))
    return model, batches, Objective(model, loss or nn.CrossEntropyLoss(), batches)


def right_hand_side(n: int, k: int = 3) -> Tensor:
    return torch.randn(n, k, generator=generator(2), dtype=F64)


def test_gauss_newton_matrices_are_solved_by_conjugate_gradients() -> None:
    model, batches, objective = problem()
    G = dense_ggn(model, batches, CROSS_ENTROPY, list(model.parameters()))
    B = right_hand_side(len(G))
    result = solve(objective, B, damping=DAMPING, rtol=1e-10, matrix="ggn").raise_if_failed()
    assert result.method == "conjugate gradients: the matrix is positive semi-definite"
    torch.testing.assert_close(result.x, torch.linalg.solve(G + DAMPING * torch.eye(len(G), dtype=F64), B))
    single = solve(objective, B[:, 0], damping=DAMPING, rtol=1e-10, matrix="ggn")
    torch.testing.assert_close(single.x, result.x[:, 0])
    assert single.named is None


def test_hessians_are_solved_by_minres() -> None:
    model, batches, objective = problem()
    H = dense_hessian(lambda: total_loss(model, batches, CROSS_ENTROPY), list(model.parameters()))
    assert float(torch.linalg.eigvalsh(H)[0]) < -1e-3
    b = right_hand_side(len(H), 1)[:, 0]
    result = solve(objective, b, damping=DAMPING, matrix="hessian", rtol=1e-10).raise_if_failed()
    assert result.method == "MINRES: a Hessian may be indefinite"
    exact = torch.linalg.solve(H + DAMPING * torch.eye(len(H), dtype=F64), b)
    torch.testing.assert_close(result.x, exact, rtol=1e-6, atol=1e-7 * float(exact.abs().max()))


def test_right_hand_sides_by_name_come_back_by_name() -> None:
    model, _, objective = problem()
    named = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    result = solve(objective, named, damping=DAMPING, rtol=1e-9, matrix="ggn")
    flat = solve(objective, objective.space.to_flat(named), damping=DAMPING, rtol=1e-9, matrix="ggn")
    assert result.named is not None
    assert {name: t.shape for name, t in result.named.items()} == {name: p.shape for name, p in named.items()}
    torch.testing.assert_close(objective.space.to_flat(result.named), flat.x)
    fisher = solve(EmpiricalFisherOperator(objective), named, damping=DAMPING)
    assert fisher.named is not None
    assert fisher.method.startswith("conjugate gradients: the matrix is positive semi-definite")


def test_influence_is_the_change_by_retraining_in_a_linear_model() -> None:
    torch.manual_seed(1)
    x, y = torch.randn(30, 4, dtype=F64), torch.randn(30, 1, dtype=F64)
    model = nn.Linear(4, 1, bias=False).double()
    weight = torch.linalg.lstsq(x, y).solution.T
    model.weight.data = weight.clone()
    objective = Objective(model, nn.MSELoss(), (x, y))
    removed = Objective(model, nn.MSELoss(), (x[:1], y[:1])).gradient()  # its share of the gradient, times 30
    step = solve(objective, removed / 30, rtol=1e-12, matrix="ggn").x
    retrained = torch.linalg.lstsq(x[1:], y[1:]).solution.T - weight
    leverage = float(x[0] @ torch.linalg.solve(x.T @ x, x[0]))
    torch.testing.assert_close(step, retrained[0] * (1 - leverage))  # exact by Sherman and Morrison


def test_indefinite_matrices_go_on_to_minres_and_both_are_paid() -> None:
    A = Counting(with_spectrum(spectra(40)["indefinite"]))
    b = right_hand_side(40)
    result = solve(A, b, rtol=1e-9)
    assert result.status is Status.CONVERGED
    assert result.method == "MINRES: conjugate gradients met a direction of negative curvature"
    assert result.num_matvecs == A.num_matvecs
    torch.testing.assert_close(A @ result.x, b, rtol=0, atol=1e-7)
    definite = solve(with_spectrum(spectra(40)["flat"]), b)
    assert definite.method == "conjugate gradients: no direction of negative curvature was met"
    stubborn = solve(A, b, method="cg")
    assert Status.NEGATIVE_CURVATURE in stubborn.statuses
    assert stubborn.method == "conjugate gradients: as asked for"
    assert solve(A, b, method="minres").method == "MINRES: as asked for"
    assert solve(A, b, damping=-0.3).method == "MINRES: the damping is negative"


def test_an_undamped_gauss_newton_matrix_gives_the_shortest_least_squares_solution() -> None:
    model, batches, objective = problem()
    G = dense_ggn(model, batches, CROSS_ENTROPY, list(model.parameters()))
    values, U = torch.linalg.eigh(G)
    null, top = U[:, values < 1e-14 * values[-1]], U[:, values > 1e-2 * values[-1]]  # others would decide by rounding
    assert null.shape[1] >= 2
    coefficients = torch.arange(1.0, top.shape[1] + 1, dtype=F64)
    b = top @ coefficients + null.sum(dim=1)
    exact = top @ (coefficients / values[-top.shape[1] :])
    result = solve(objective, b, rtol=1e-9, matrix="ggn")
    assert result.status is Status.LEAST_SQUARES
    assert result.method == "MINRES: without damping the matrix may be singular"
    torch.testing.assert_close(result.x, exact, rtol=0, atol=1e-6 * float(exact.abs().max()))


@pytest.mark.parametrize(("damping", "why"), [(0.0, "without damping"), (1e-12, "conjugate gradients ")])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_no_residual_is_larger_than_that_of_zero(damping: float, why: str, dtype: torch.dtype) -> None:
    """Of an ill-conditioned Gauss-Newton matrix conjugate gradients leave 60 to 2000 times |b|."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)).to(dtype)
    x = torch.randn(40, 12, dtype=dtype) * torch.logspace(0, -7, 12, dtype=dtype)
    objective = Objective(model, nn.CrossEntropyLoss(), (x, torch.randint(3, (40,))))
    b = torch.randn(objective.num_params, dtype=dtype)
    result = solve(objective, b, damping=damping, rtol=1e-4, max_iterations=400, matrix="ggn")
    assert result.method.startswith(f"MINRES: {why}")
    G = GGNOperator(objective)
    residual = float((b - G @ result.x - damping * result.x).norm())
    assert residual <= float(b.norm()) * (1 + 1e-4)
    torch.testing.assert_close(float(result.residual_norms), residual, rtol=1e-3, atol=0.0)


def test_losses_that_are_not_known_to_be_convex() -> None:
    class Wavy(nn.Module):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (z - nn.functional.one_hot(y, 3)).square().cos().mean()

    _, _, objective = problem(Wavy())
    result = solve(objective, right_hand_side(objective.num_params), damping=1e-3, rtol=1e-7, matrix="ggn")
    assert result.method == "MINRES: conjugate gradients met a direction of negative curvature"
    assert result.status is Status.CONVERGED


def test_preconditioners_and_starts_are_passed_on() -> None:
    A, b = with_spectrum(torch.logspace(4, 0, 60, dtype=F64)), right_hand_side(60)
    plain = solve(A, b, damping=1e-2, rtol=1e-8)
    preconditioner = nystrom(A, 30, generator=generator(1)).preconditioner(1.0)
    quick = solve(A, b, damping=1e-2, rtol=1e-8, preconditioner=preconditioner)
    assert max(quick.num_iterations) < 0.7 * max(plain.num_iterations)
    torch.testing.assert_close(quick.x, plain.x, rtol=1e-5, atol=1e-6)
    assert solve(A, b, damping=1e-2, rtol=1e-6, x0=plain.x).num_iterations == (0, 0, 0)


def test_bad_input() -> None:
    _, _, objective = problem()
    b = right_hand_side(objective.num_params)
    with pytest.raises(InputError, match=r"matrix must be one of hessian, ggn, .*got 'fischer'"):
        solve(objective, b, matrix="fischer")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="method must be one of auto, cg, minres, got 'lu'"):
        solve(objective, b, method="lu")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="needs a matrix of an objective, got Tensor"):
        solve(torch.eye(3), {"weight": torch.ones(3)})
    with pytest.raises(InputError, match="restrict the objective instead"):
        solve(GGNOperator(objective).restrict("0"), {"0.weight": torch.ones(5, 4)})
    with pytest.raises(InputError, match=r"'0.bias' is missing"):
        solve(HessianOperator(objective), {"0.weight": torch.ones(5, 4)})
    with pytest.raises(InputError, match=r"right-hand sides must be a vector \(43,\)"):
        solve(objective, b[:5], matrix="ggn")
