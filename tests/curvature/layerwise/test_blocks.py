"""Diagonal blocks that the columns of the diagonal give, against dense matrices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import InputError
from curvature.layerwise import blocks as module
from curvature.layerwise import exact_diagonal
from curvature.layerwise.blocks import DiagonalBlocks
from curvature.layerwise.diagonal import diagonal_with_blocks
from tests.checks import assert_close
from tests.curvature.layerwise.exact_cases import BY_LAYER, BY_LOSS, LAYERS, LOSSES, Layer, Loss, cut, ggn, hessian
from tests.curvature.layerwise.exact_cases import targets as targets_of

DENSE = {"ggn": ggn, "hessian": hessian}


def filled(objective: Objective, kind: Any = "hessian") -> DiagonalBlocks:
    found = DiagonalBlocks(objective, objective.space.blocks)
    diagonal = diagonal_with_blocks(found, kind, max_columns=None)
    assert torch.equal(diagonal.value, exact_diagonal(objective, kind, route="rules").value)
    return found


def check(model: nn.Module, loss: Any, x: Tensor, y: Tensor, kind: str = "hessian") -> list[str]:
    objective = Objective(model, loss, cut(x, y))
    dense, found = DENSE[kind](model, loss, x, y), filled(objective, kind)
    for block in found.blocks:
        expected = block.take(block.take(dense).T)
        assert_close(found.total(block), expected)
        parts = [(weight, parts[block.parameters]) for weight, parts in found.batches.values()]
        assert len(parts) == len(cut(x, y))
    return [block.name for block in found.blocks]


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_blocks_of_layers(layer: Layer, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2**16)
    loss = BY_LOSS["cross-entropy"]
    model, x, y = layer.model(loss.outputs), layer.inputs(), targets_of(loss)
    if kind == "hessian" and layer.name in ("LayerNorm", "GroupNorm"):
        with pytest.raises(InputError, match="rules"):
            check(model, loss.build(), x, y, kind)
        return
    objective = Objective(model, loss.build(), cut(x, y))
    assert check(model, loss.build(), x, y, kind) == [block.name for block in objective.space.blocks]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_blocks_by_loss(loss: Loss) -> None:
    names = check(BY_LAYER["Tanh"].model(loss.outputs), loss.build(), BY_LAYER["Tanh"].inputs(), targets_of(loss))
    assert names == ["0", "2", "5"]


class Scaled(nn.Module):
    """A module of two factors of one product: its block has entries that no column holds."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.weight = nn.Parameter(torch.ones(4)), nn.Parameter(torch.eye(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * nn.functional.linear(x, self.weight)


def test_a_block_of_two_factors_is_left_out() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4).eval(), nn.ReLU(), Scaled(), nn.Linear(4, 3)).double()
    x, y = torch.randn(7, 3).double(), torch.randint(3, (7,))
    assert check(model, nn.CrossEntropyLoss(), x, y) == ["0", "1", "4"]
    assert check(model, nn.CrossEntropyLoss(), x, y, "ggn") == ["0", "1", "3", "4"]


def test_large_blocks_of_many_columns_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_MOST", 2 * 30)  # columns of a cross-entropy of three classes
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 3)).double()
    assert check(model, nn.CrossEntropyLoss(), torch.randn(7, 3).double(), torch.randint(3, (7,))) == ["2"]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_batches_of_other_weight_and_of_none(reduction: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    loss = nn.CrossEntropyLoss(reduction=reduction, ignore_index=0)
    x, y = torch.randn(9, 3).double(), torch.tensor([1, 0, 2, 1, 1, 0, 0, 2, 1])
    data = [(x[:4], y[:4]), (x[5:7], y[5:7]), (x[7:], y[7:]), (x[4:5], y[4:5])]
    objective = Objective(model, loss, data)
    found, dense = filled(objective), hessian(model, loss, x, y)
    assert len(found.batches) == (4 if reduction == "sum" else 3)  # a sum counts each, and adds zeros
    for block in found.blocks:
        assert_close(found.total(block), block.take(block.take(dense).T))
