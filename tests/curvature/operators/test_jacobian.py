"""Jacobians of the outputs and the tangent kernel against derivatives of one output at a time."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import GGNOperator, JacobianOperator, NTKOperator, Objective
from curvature.errors import CheckFailedError, DataError, InputError, ParameterSelectionError
from curvature.linalg import eigsh
from tests.cases import BY_NAME, CASES, Case
from tests.checks import assert_close, assert_untouched, check_operator
from tests.references import dense_jacobian

EXACT = 1e-10  # relative: the same sums in float64, in another order


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def reference(name: str) -> Tensor:
    case = BY_NAME[name]
    model = case.model()
    return dense_jacobian(case.forward(model), case.ragged(), trainable(model))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_products_agree_with_derivatives_of_single_outputs(case: Case, generator: torch.Generator) -> None:
    dense = reference(case.name)
    M, n = dense.shape
    X, U = (torch.randn(size, 2, generator=generator, dtype=torch.float64) for size in (n, M))
    for keep_graphs in (True, False):
        model = case.model()
        objective = Objective(model, case.loss, case.ragged(), keep_graphs=keep_graphs)
        with assert_untouched(model):
            J, K = JacobianOperator(objective), NTKOperator(objective)
            assert J.shape == (M, n)
            assert J.T.shape == (n, M)
            assert K.shape == (M, M)
            assert_close(J @ X, dense @ X, EXACT)
            assert_close(J.T @ U, dense.T @ U, EXACT)
            assert_close(K @ U, dense @ (dense.T @ U), EXACT)


def test_laws_of_matrices(generator: torch.Generator) -> None:
    case = BY_NAME["attention by hand"]
    objective = Objective(case.model(), case.loss, case.ragged())
    J, dense = JacobianOperator(objective), reference(case.name)
    assert J.T.T is J  # type: ignore[attr-defined]
    check_operator(NTKOperator(objective), dense @ dense.T, generator, EXACT)
    check_operator(J.T @ J, dense.T @ dense, generator, EXACT)
    x = torch.randn(J.shape[1], generator=generator, dtype=torch.float64)
    u = torch.randn(J.shape[0], generator=generator, dtype=torch.float64)
    assert_close(u @ (J @ x), (J.T @ u) @ x, EXACT)
    torch.testing.assert_close(J @ x, J @ x, rtol=0, atol=0)


@pytest.mark.parametrize("num_examples", [2, 20])
def test_dense_takes_the_shorter_side(num_examples: int) -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()  # 13 parameters
    x = torch.randn(num_examples, 2, dtype=torch.float64)
    J = JacobianOperator(Objective(model, nn.MSELoss(), (x, x.new_zeros(num_examples, 1))))
    calls: list[int] = []
    multiply = J._matmat
    J._matmat = lambda X: calls.append(1) or multiply(X)  # type: ignore[method-assign, func-returns-value]
    assert_close(J.to_dense(), dense_jacobian(model, [(x, x)], trainable(model)), EXACT)
    assert bool(calls) == (num_examples == 20)


def test_order_of_rows_is_that_of_the_data_whatever_counts() -> None:
    case = BY_NAME["attention by hand"]
    x, _ = case.data()
    model = case.model()
    nothing = torch.full((7, 4), -100)
    nothing[0, 0] = 1  # all other targets are ignored, in two of three batches all
    objective = Objective(model, case.loss, list(zip(x.split((4, 2, 1)), nothing.split((4, 2, 1)), strict=True)))
    assert_close(JacobianOperator(objective).to_dense(), reference(case.name), EXACT)


def test_kernel_has_the_eigenvalues_of_the_gauss_newton_matrix(generator: torch.Generator) -> None:
    case = BY_NAME["MLP tanh"]
    objective = Objective(case.model(), case.loss, case.ragged())
    K, G = NTKOperator(objective), GGNOperator(objective)
    M = K.shape[0]
    of_kernel = eigsh(K, 5, rtol=1e-10, generator=generator).eigenvalues
    of_ggn = torch.linalg.eigvalsh(G.to_dense()).flip(0)[:5] * M / 2  # the loss is the mean of (z - y)^2
    assert_close(of_kernel, of_ggn.to(of_kernel), 1e-8)
    assert float(torch.linalg.eigvalsh(K.to_dense())[0]) >= -1e-12 * float(of_kernel[0])


def test_gradient_is_the_jacobian_applied_to_residuals() -> None:
    case = BY_NAME["MLP tanh"]
    model = case.model()
    x, y = case.data()
    objective = Objective(model, case.loss, case.ragged())
    residuals = (model(x) - y).detach().reshape(-1)
    assert_close(JacobianOperator(objective).T @ (residuals * 2 / y.numel()), objective.gradient(), EXACT)


def test_restrictions(generator: torch.Generator) -> None:
    case = BY_NAME["tied weights"]
    objective = Objective(case.model(), case.loss, case.ragged(), keep_graphs=False)
    J, K, dense = JacobianOperator(objective), NTKOperator(objective), reference(case.name)
    block = objective.space.block(["mix.bias", "embedding"])
    columns = block.take(dense.T).T
    of_block = J.restrict(["mix.bias", "embedding"])
    assert_close(of_block.to_dense(), columns, EXACT)
    u = torch.randn(J.shape[0], generator=generator, dtype=torch.float64)
    assert_close(of_block.T @ u, columns.T @ u, EXACT)
    check_operator(K.restrict(block), columns @ columns.T, generator, EXACT)
    parts = [K.restrict(b) @ u for b in objective.space.blocks]
    assert_close(torch.stack(parts).sum(0), K @ u, EXACT)
    assert of_block.restrict("mix").shape == (J.shape[0], 4)
    for A in (J, GGNOperator(objective)):
        with pytest.raises(ParameterSelectionError, match=r"'mix.weight' lie outside this diagonal block, which holds"):
            A.restrict("mix.bias").restrict("mix.weight")


def test_parameters_that_outputs_do_not_depend_on_have_zero_columns() -> None:
    case = BY_NAME["frozen and unused"]
    objective = Objective(case.model(), case.loss, case.ragged())
    J = JacobianOperator(objective)
    unused = J.restrict("unused")
    assert float(unused.to_dense().abs().max()) == 0
    assert float((unused.T @ torch.ones(J.shape[0], dtype=torch.float64)).abs().max()) == 0
    constant = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(1, 2), torch.ones(1, 1)), forward=_constant)
    for operator in (JacobianOperator, NTKOperator):
        with pytest.raises(CheckFailedError, match="the loss of no batch depends on any of the chosen parameters"):
            operator(constant)


def _constant(_: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 1), batch[1]


def test_narrow_outputs_and_present_point() -> None:
    model = nn.Linear(3, 2, bias=False).bfloat16()
    x = torch.tensor([[1.0, 2.0, -0.5]], dtype=torch.bfloat16)
    J = JacobianOperator(Objective(model, nn.MSELoss(), (x, x.new_zeros(1, 2))))
    assert J.dtype == torch.float32
    expected = torch.block_diag(x.float(), x.float())
    assert_close(J.to_dense(), expected, 1e-6)
    case = BY_NAME["MLP tanh"]
    moved = case.model()
    J = JacobianOperator(Objective(moved, case.loss, case.ragged()))
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1.1)
    assert_close(J.to_dense(), dense_jacobian(moved, case.ragged(), trainable(moved)), EXACT)


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("batch_size", [2, 7])
def test_loaders_in_fixed_order_only(keep_graphs: bool, batch_size: int) -> None:
    case = BY_NAME["MLP tanh"]
    data = TensorDataset(*case.data())
    fixed = Objective(case.model(), case.loss, DataLoader(data, batch_size=batch_size), keep_graphs=keep_graphs)
    assert_close(JacobianOperator(fixed).to_dense(), reference(case.name), EXACT)
    shuffled = Objective(
        case.model(), case.loss, DataLoader(data, batch_size=batch_size, shuffle=True), keep_graphs=keep_graphs
    )
    with pytest.raises(DataError, match="the loader shuffles and rows of the Jacobian belong to places"):
        NTKOperator(shuffled)


class Rotating:
    """Batches whose rows change places at each pass after the first two, within the batch."""

    def __init__(self, x: Tensor, y: Tensor, passes_in_order: int) -> None:
        self.x, self.y, self.left = x, y, passes_in_order

    def __iter__(self):  # type: ignore[no-untyped-def]
        self.left -= 1
        shift = 1 if self.left < 0 and self.left % 2 else 0
        yield self.x.roll(shift, 0), self.y.roll(shift, 0)


def test_order_within_a_batch_counts() -> None:
    case = BY_NAME["MLP tanh"]
    moving = Objective(case.model(), case.loss, Rotating(*case.data(), passes_in_order=1))
    with pytest.raises(DataError, match="the loader shuffles"):
        JacobianOperator(moving)


def test_what_has_no_jacobian_is_refused() -> None:
    case = BY_NAME["MLP tanh"]
    whole = Objective(case.model(), None, case.data(), forward=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    with pytest.raises(InputError, match="needs the split between model and loss"):
        JacobianOperator(whole)
    pair = Objective(
        case.model(), lambda z, y: F.mse_loss(z[0], y), case.data(), forward=lambda m, b: ((m(b[0]),), b[1])
    )
    with pytest.raises(InputError, match="the Jacobian needs outputs that are one tensor, got tuple"):
        NTKOperator(pair)
    J = JacobianOperator(Objective(case.model(), case.loss, case.data()))
    with pytest.raises(InputError, match=r"needs X of shape \(14,\) or \(14, k\)"):
        J.T @ torch.ones(J.shape[1], dtype=torch.float64)
