"""Models called with other tensors in place of their parameters are left as found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.layerwise import exact_diagonal
from curvature.per_example import gradient_moments
from tests.checks import assert_close
from tests.references import SQUARED_ERROR, dense_ggn, flat_gradient


class _Flat(nn.Module):
    def forward(self, x: Any) -> Tensor:
        return x[0].flatten(1)


@pytest.mark.parametrize("cell", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_keep_their_lists_of_weights(cell: type[nn.RNNBase]) -> None:
    torch.manual_seed(0)
    layer = cell(3, 2, batch_first=True)
    model = nn.Sequential(layer, _Flat()).double()
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 10).double()
    objective = Objective(model, nn.MSELoss(), (x, y))
    objective.loss()
    params, lists = list(model.parameters()), (layer._flat_weights, layer._flat_weight_refs)
    G = dense_ggn(model, [(x, y)], SQUARED_ERROR, params)
    for _ in range(2):  # torch makes the lists anew in functional calls: no change of the model
        assert_close(exact_diagonal(objective, "ggn").value, G.diagonal(), 1e-10)
        assert_close(gradient_moments(objective).mean, flat_gradient((model(x) - y).square().mean(), params), 1e-10)
        assert layer._flat_weights is lists[0]
        assert layer._flat_weight_refs is lists[1]
        assert all(a is b for a, b in zip(layer._flat_weights, params, strict=True))
