"""Whatever surrounds a product makes no difference to it, and it leaves its surroundings as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, Objective
from tests.cases import BY_NAME
from tests.checks import BATCHING_TOLERANCE, assert_close, assert_untouched

CASE = BY_NAME["MLP GELU"]
X, Y = CASE.data()


def vector(size: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", enabled=False)])
@pytest.mark.parametrize("keep_graphs", [True, False])
def test_grad_modes_around_make_no_difference(mode: Callable[[], Any], keep_graphs: bool) -> None:
    model = CASE.model()
    expected = Objective(model, CASE.loss, (X, Y))
    v = vector(expected.num_params)
    objective = Objective(model, CASE.loss, (X, Y), keep_graphs=keep_graphs)
    with mode(), assert_untouched(model):
        results = [objective.loss(), objective.gradient(), HessianOperator(objective) @ v, GGNOperator(objective) @ v]
    for result, reference in zip(
        results,
        [expected.loss(), expected.gradient(), HessianOperator(expected) @ v, GGNOperator(expected) @ v],
        strict=True,
    ):
        assert_close(result, reference, BATCHING_TOLERANCE)


@pytest.mark.parametrize("name", ["BatchNorm train", "TransformerEncoderLayer dropout", "frozen and unused", "LSTM"])
def test_nothing_is_touched(name: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    torch.rand(3)
    with assert_untouched(model):
        objective = Objective(model, case.loss, case.ragged())
        v = vector(objective.num_params)
        objective.loss_and_gradient()
        for operator in (HessianOperator, GGNOperator):
            operator(objective) @ v
            operator(objective.restrict(objective.space.blocks[0])) @ objective.space.blocks[0].take(v)
        objective.check()


class Raises(nn.Module):
    """Draws, updates its statistics, then raises, from a given call on."""

    def __init__(self, good_calls: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3))
        self.calls_left = good_calls

    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        self.calls_left -= 1
        if self.calls_left < 0:
            raise KeyError("broken model")
        return y


@pytest.mark.parametrize("good_calls", [0, 1, 3])
@pytest.mark.parametrize("fastpath", [True, False])
def test_nothing_is_touched_when_the_model_raises(good_calls: int, fastpath: bool) -> None:
    model = Raises(good_calls).double().train()
    model.body[0].weight.requires_grad_(False)
    torch.backends.mha.set_fastpath_enabled(fastpath)
    try:
        objective = Objective(model, CASE.loss, CASE.ragged()[:2], params=["body.0", "body.1"], keep_graphs=False)
        v = vector(objective.num_params)
        with assert_untouched(model), pytest.raises(KeyError, match="broken model"):
            (HessianOperator(objective) @ v, GGNOperator(objective) @ v)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


def test_seed_fixes_the_masks() -> None:
    case = BY_NAME["dropout"]
    values = [float(Objective(case.model(), case.loss, case.ragged(), seed=s).loss()) for s in (0, 0, 5)]
    assert values[0] == values[1] != values[2]
    objective = Objective(case.model(), case.loss, case.ragged())
    HessianOperator(objective).to_dense()
    assert any("random numbers" in note for note in objective.notes)


# -- dtypes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float32, 2e-4), (torch.float16, 2e-2), (torch.bfloat16, 0.1)],  # some hundred rounding errors; 2^-8 in bf16
)
@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_narrow_models(dtype: torch.dtype, rtol: float, matrix: type[HessianOperator | GGNOperator]) -> None:
    narrow = CASE.model().to(dtype)
    wide = CASE.model().to(dtype).double()  # at the same, rounded point
    x = X.to(dtype)
    objective = Objective(narrow, CASE.loss, [(x[:4], Y[:4]), (x[4:], Y[4:])])
    assert objective.dtype == torch.float32
    product = matrix(objective) @ vector(objective.num_params).float()
    exact = matrix(Objective(wide, CASE.loss, (x.double(), Y))) @ vector(objective.num_params)
    assert product.dtype == torch.float32
    assert_close(product.double(), exact, rtol)


@pytest.mark.parametrize("matrix", [HessianOperator, GGNOperator])
def test_autocast(matrix: type[HessianOperator | GGNOperator]) -> None:
    model = CASE.model().float()

    def forward(m: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return m(batch[0]), batch[1]

    objective = Objective(model, CASE.loss, (X.float(), Y), forward=forward)
    v = vector(objective.num_params)
    exact = matrix(Objective(model.double(), CASE.loss, (X, Y))) @ v
    model.float()
    inside = matrix(objective) @ v.float()
    with torch.autocast("cpu", torch.bfloat16):
        around = matrix(objective) @ v.float()
    assert_close(inside.double(), exact, 0.1)  # 2^-8 a rounding
    assert_close(around, inside, 0.1)


def test_compiled_model_is_unwrapped() -> None:
    model = CASE.model()
    compiled = torch.compile(model, backend="eager")
    objective = Objective(compiled, CASE.loss, (X, Y))  # type: ignore[arg-type]
    assert objective.model is model
    assert objective.space.names[0] == "0.weight"
