"""Hessian and Gauss-Newton products against dense references, for every kind of model."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, nn

from curvature import (
    BlockDiagonalOperator,
    GGNOperator,
    HessianOperator,
    LinearOperator,
    Objective,
    SubmatrixOperator,
)
from curvature.errors import InputError, ParameterSelectionError
from tests.cases import BY_NAME, CASES, Case
from tests.checks import BATCHING_TOLERANCE, assert_close, assert_untouched, check_operator
from tests.references import Batches, dense_ggn, dense_hessian, derivative_along, flat_gradient, total_loss

OPERATORS: dict[str, Callable[[Objective], LinearOperator]] = {"Hessian": HessianOperator, "GGN": GGNOperator}


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def reference(name: str, matrix: str, ragged: bool) -> Tensor:
    """Return the dense matrix of a case; cut into batches only where that makes a difference."""
    case = BY_NAME[name]
    model = case.model()
    params, forward = trainable(model), case.forward(model)
    batches: Batches = case.ragged() if ragged and case.depends_on_batches else [case.data()]
    if matrix == "GGN":
        return dense_ggn(forward, batches, case.criterion, params)
    return dense_hessian(lambda: total_loss(forward, batches, case.criterion), params)


@pytest.mark.parametrize(
    ("keep_graphs", "ragged"), [(True, False), (False, True)], ids=["one batch, kept", "ragged, rebuilt"]
)
@pytest.mark.parametrize("matrix", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_agrees_with_dense_matrix(
    case: Case, matrix: str, keep_graphs: bool, ragged: bool, generator: torch.Generator
) -> None:
    model = case.model()
    objective = Objective(model, case.loss, case.ragged() if ragged else case.data(), keep_graphs=keep_graphs)
    assert objective.num_params <= 250
    with assert_untouched(model):
        check_operator(OPERATORS[matrix](objective), reference(case.name, matrix, ragged), generator)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_agree_with_definition(case: Case) -> None:
    model, batches = case.model(), case.ragged()
    objective = Objective(model, case.loss, batches)
    loss, gradient = objective.loss_and_gradient()
    twin = copy.deepcopy(model)
    expected = total_loss(case.forward(twin), batches, case.criterion)
    assert_close(loss, expected.detach())
    assert_close(gradient, flat_gradient(expected, trainable(twin)))
    assert_close(objective.loss(), loss, BATCHING_TOLERANCE)
    assert_close(objective.gradient(), gradient, BATCHING_TOLERANCE)


@pytest.mark.parametrize("matrix", OPERATORS)
@pytest.mark.parametrize("case", [c for c in CASES if not c.depends_on_batches], ids=str)
def test_cutting_the_data_changes_nothing(case: Case, matrix: str, generator: torch.Generator) -> None:
    model = case.model()
    whole, ragged = (OPERATORS[matrix](Objective(model, case.loss, d)) for d in (case.data(), case.ragged()))
    v = torch.randn(whole.shape[1], generator=generator, dtype=torch.float64)
    assert_close(ragged @ v, whole @ v, BATCHING_TOLERANCE)


@pytest.mark.parametrize("name", ["dropout", "TransformerEncoderLayer dropout", "BatchNorm train", "weight norm"])
def test_hessian_is_derivative_of_gradient(name: str, generator: torch.Generator) -> None:
    case = BY_NAME[name]
    model = case.model()
    objective = Objective(model, case.loss, case.ragged())
    v = torch.randn(objective.num_params, generator=generator, dtype=torch.float64)
    by_differences = derivative_along(objective.gradient, trainable(model), v)
    assert_close(HessianOperator(objective) @ v, by_differences, 1e-7)  # truncation and rounding of differences


@pytest.mark.parametrize("matrix", OPERATORS)
def test_linear_regression_has_closed_form(matrix: str) -> None:
    case = BY_NAME["linear regression"]
    x, _ = case.data()
    ones = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    moments = ones.T @ ones / len(x)  # of weights and bias, alike for both outputs; the loss averages over 2 outputs
    dense = OPERATORS[matrix](Objective(case.model(), case.loss, case.ragged())).to_dense()
    order = [0, 1, 2, 3, 8], [4, 5, 6, 7, 9]
    for mine, other in (order, order[::-1]):
        assert_close(dense[mine][:, mine], moments)
        assert float(dense[mine][:, other].abs().max()) == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ggn_is_positive_semidefinite(case: Case, generator: torch.Generator) -> None:
    G = GGNOperator(Objective(case.model(), case.loss, case.ragged()))
    X = torch.randn(G.shape[0], 8, generator=generator, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(X.T @ (G @ X))
    assert float(eigenvalues[0]) >= -1e-12 * float(eigenvalues[-1])


def test_double_backward_of_torch_weight_norm_is_still_wrong(generator: torch.Generator) -> None:
    """As long as this holds, the function must be recorded anew; when torch is right again, that may go."""
    case = BY_NAME["weight norm"]
    model = case.model()
    params = trainable(model)
    v = torch.randn(sum(p.numel() for p in params), generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        return total_loss(model, [case.data()], case.criterion)

    by_differences = derivative_along(lambda: flat_gradient(loss(), params), params, v)
    assert_close(reference(case.name, "Hessian", False) @ v, by_differences, 1e-7)  # written out by hand
    by_torch = dense_hessian(loss, params)
    assert float((by_torch @ v - by_differences).norm()) > 1e-3 * float(by_differences.norm())
    assert float((by_torch - by_torch.T).norm()) > 1e-3 * float(by_torch.norm())


def test_frozen_and_unused_parameters() -> None:
    case = BY_NAME["frozen and unused"]
    objective = Objective(case.model(), case.loss, case.ragged())
    assert not any(name.startswith("frozen") for name in objective.space.names)
    unused = objective.space.block("unused")
    for operator in OPERATORS.values():
        dense = operator(objective).to_dense()
        assert float(unused.take(dense).abs().max()) == float(unused.take(dense.T).abs().max()) == 0
    (note,) = [note for note in objective.notes if "does not depend" in note]
    assert "unused.weight" in note
    assert "unused.bias" in note
    assert "head" not in note


# -- blocks -----------------------------------------------------------------------------------------------------------

SELECTIONS: list[str | Sequence[str]] = ["embedding", "mix.*", ["*.bias", "embedding.weight"], "head"]


@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
@pytest.mark.parametrize("matrix", OPERATORS)
def test_restriction_is_principal_submatrix(
    matrix: str, selection: str | Sequence[str], generator: torch.Generator
) -> None:
    case = BY_NAME["tied weights"]
    objective = Objective(case.model(), case.loss, case.ragged())
    dense = reference(case.name, matrix, False)
    block = objective.space.block(selection)
    expected = block.take(block.take(dense).T)
    whole = OPERATORS[matrix](objective)
    check_operator(SubmatrixOperator(whole, block, block), expected, generator)
    check_operator(whole.restrict(selection), expected, generator)  # type: ignore[attr-defined]
    check_operator(OPERATORS[matrix](objective.restrict(selection)), expected, generator)


def test_scattered_block_and_block_of_block(generator: torch.Generator) -> None:
    case = BY_NAME["MLP GELU"]
    objective = Objective(case.model(), case.loss, case.ragged())
    dense = reference(case.name, "Hessian", False)
    biases = [*range(20, 25), *range(45, 49), *range(61, 64)]  # of 5 x 4 + 5, 4 x 5 + 4, 3 x 4 + 3 parameters
    operator = HessianOperator(objective).restrict("*.bias")
    check_operator(operator, dense[biases][:, biases], generator)
    check_operator(operator.restrict(["2", "0.weight"]), dense[45:49, 45:49], generator)


def test_off_diagonal_submatrix() -> None:
    case = BY_NAME["MLP GELU"]
    objective = Objective(case.model(), case.loss, case.ragged())
    rows, cols = objective.space.block("0"), objective.space.block("4")
    block = SubmatrixOperator(HessianOperator(objective), rows, cols)
    assert_close(block.to_dense(), reference(case.name, "Hessian", False)[:25, 49:])


# -- the diagonal blocks of a matrix ------------------------------------------------------------------------------


@pytest.mark.parametrize("matrix", OPERATORS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_block_diagonal_has_the_blocks_of_the_dense_matrix_and_nothing_between(
    case: Case, matrix: str, generator: torch.Generator
) -> None:
    model = case.model()
    objective = Objective(model, case.loss, case.ragged(), keep_graphs=True)
    A = OPERATORS[matrix](objective)
    dense = torch.zeros(A.shape, dtype=A.dtype)
    whole = reference(case.name, matrix, True)
    for block in objective.space.blocks:
        inside = block.embed(torch.ones(block.num_params, dtype=torch.bool), objective.num_params)
        dense[inside[:, None] & inside] = whole[inside[:, None] & inside]
    with assert_untouched(model):
        check_operator(BlockDiagonalOperator(A), dense, generator)  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
def test_block_diagonal_equals_its_restrictions_and_walks_the_data_once(
    operator: type[HessianOperator] | type[GGNOperator], generator: torch.Generator
) -> None:
    case = BY_NAME["tied weights"]
    model = case.model()
    objective = Objective(model, case.loss, case.ragged(), keep_graphs=False)
    A = operator(objective)
    blocks = [*objective.space.blocks[:-2], objective.space.block(objective.space.blocks[-1])]  # one is left out
    X = torch.randn(objective.num_params, 3, generator=generator, dtype=objective.dtype)
    expected = torch.zeros_like(X)
    for block in blocks:
        block.put(A.restrict(block) @ block.take(X), expected)
    forwards: list[int] = []
    model.register_forward_hook(lambda *_: forwards.append(1))
    B = BlockDiagonalOperator(A, blocks)
    torch.testing.assert_close(B @ X, expected, rtol=0, atol=0)
    assert len(forwards) == len(case.ragged())
    torch.testing.assert_close(B @ X[:, 0], expected[:, 0], rtol=0, atol=0)


def test_a_block_without_columns_has_a_product_without_columns() -> None:
    operator = HessianOperator(Objective(nn.Linear(3, 1), nn.MSELoss(), (torch.ones(4, 3), torch.ones(4, 1))))
    assert (operator @ torch.ones(4, 0)).shape == (4, 0)


def test_bad_blocks_are_refused() -> None:
    case = BY_NAME["MLP tanh"]
    model = case.model()
    H = HessianOperator(Objective(model, case.loss, case.data()))
    blocks = H.objective.space.blocks
    with pytest.raises(InputError, match="A must be an ObjectiveOperator, got a Scaled"):
        BlockDiagonalOperator(2 * H)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="A is a diagonal block itself, '0'"):
        BlockDiagonalOperator(H.restrict(blocks[0]))
    with pytest.raises(InputError, match="at least one block"):
        BlockDiagonalOperator(H, [])
    with pytest.raises(InputError, match=r"disjoint, but '0.weight' is in more than one"):
        BlockDiagonalOperator(H, [blocks[0], blocks[1], blocks[0]])
    other = Objective(nn.Linear(4, 2).double(), case.loss, case.data())
    with pytest.raises(ParameterSelectionError, match="not among the chosen parameters"):
        BlockDiagonalOperator(H, other.space.blocks)
