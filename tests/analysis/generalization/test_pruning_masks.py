"""Masks that hold: a sub-network against the rows and columns that are kept."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import analysis
from analysis.sharpness.measure import measures_for
from curvature import GGNOperator, HessianOperator
from curvature.errors import InputError, ParameterSelectionError
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.linop import to_dense
from tests.analysis.generalization.prunable import make_objective, masked, objective_of

F64 = torch.float64


def test_everything_about_a_sub_network_is_that_of_the_rows_and_columns_that_are_kept() -> None:
    objective = make_objective()
    small, masks, places = masked(objective)
    zeroed = copy.deepcopy(objective.model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    dense = objective_of(objective, zeroed)
    assert small.num_params == len(places) < objective.num_params
    for kind in (HessianOperator, GGNOperator):
        expected = to_dense(kind(dense))[places][:, places]
        torch.testing.assert_close(to_dense(kind(small)), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(small.gradient(), dense.gradient()[places])
    for of in ("ggn", "hessian"):
        found = exact_diagonal(small, of)
        torch.testing.assert_close(found.value, exact_diagonal(dense, of).value[places], rtol=1e-9, atol=1e-12)
    assert analysis.measure("inspect", small, generator=0).inspection.num_params == len(places)
    partly = analysis.sparse_model(objective.model, {"0.weight": masks["0.weight"]})
    assert set(kronecker_factors(objective_of(objective, partly)).layers) == {"2"}
    layers = kronecker_factors(dense).uncovered
    assert layers == {}
    with pytest.raises(InputError, match="no layer"):
        kronecker_factors(small)  # refused, not those of the dense layer
    assert "relative_flatness" not in measures_for(small)
    with pytest.raises(InputError, match="a mask"):
        analysis.measure_sharpness(objective_of(objective, partly), measures=("relative_flatness",), generator=0)
    back = analysis.dense_model(small.model)
    for name, p in back.named_parameters():
        assert torch.equal(p, zeroed.get_parameter(name))
    assert all(torch.equal(analysis.masks_of(small.model)[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_masks_hold_through_training(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    masks = {"0.weight": torch.rand(4, 1, 3, 3) > 0.5, "4.weight": torch.rand(3, 64) > 0.8}
    sparse = analysis.sparse_model(model, masks)
    params = list(sparse.parameters())
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    optimizer: Any = torch.optim.AdamW(params, **settings)
    if kind == "sgd":
        optimizer = torch.optim.SGD(params, momentum=0.9, **settings)
    x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
    before = copy.deepcopy(sparse.state_dict())
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
    dense = analysis.dense_model(sparse)
    for name, mask in masks.items():
        weight = dense.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight[mask], model.get_parameter(name)[mask])
    assert not torch.equal(sparse.state_dict()["1.running_mean"], before["1.running_mean"])
    again = analysis.sparse_model(model, masks)
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again(x), sparse(x))


def test_loaded_masks_bring_their_places() -> None:
    model = nn.Linear(4, 1, bias=False)
    first, second, more = (
        analysis.sparse_model(model, {"weight": torch.tensor([keep], dtype=torch.bool)})
        for keep in ([1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0])
    )
    for assign in (False, True):
        taken = copy.deepcopy(first)
        taken.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(taken.weight, second.weight)
        assert torch.equal(analysis.dense_model(taken).weight, second.weight)
    with pytest.raises(RuntimeError, match="keeps 3 weights"):
        taken.load_state_dict(more.state_dict())


def test_masks_on_a_parametrised_model_leave_it_as_it_is() -> None:
    x, bias = torch.randn(2, 3), {"0.bias": torch.tensor([True, False])}
    sparse = analysis.sparse_model(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.rand(2, 3) > 0.5})
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    for model in (sparse, normed):
        before = model(x)
        twice = analysis.sparse_model(model, bias)
        assert torch.equal(model(x), before)
        assert torch.equal(twice(x)[:, 0], before[:, 0])
        assert torch.equal(analysis.dense_model(twice)(x), twice(x))
    assert set(analysis.masks_of(analysis.sparse_model(sparse, bias))) == {"0.weight", "0.bias"}


def test_a_whole_layer_can_go() -> None:
    objective = make_objective()
    masks = {"2.weight": torch.zeros(3, 5, dtype=torch.bool)}
    small = objective_of(objective, analysis.sparse_model(objective.model, masks))
    assert small.num_params == objective.num_params - 15
    H = to_dense(HessianOperator(small))
    assert int((H.abs().sum(0) > 1e-12).sum()) == 3  # the biases of the outputs


def test_masks_that_would_not_hold_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    whole = torch.ones(3, 3, dtype=torch.bool)
    for masks, error, said in (
        ({"0.wieght": whole}, ParameterSelectionError, "no parameter"),
        ({"0.weight": whole.float()}, InputError, "boolean"),
        ({"0.weight": whole[:2]}, InputError, "shape"),
    ):
        with pytest.raises(error, match=said):
            analysis.sparse_model(model, masks)
    with pytest.raises(ParameterSelectionError, match="dense_model"):
        analysis.sparse_model(analysis.sparse_model(model, {"0.weight": whole}), {"0.weight": whole})
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="tied"):
        analysis.sparse_model(model, {"0.weight": whole})
    with pytest.raises(InputError, match="LSTM"):
        analysis.sparse_model(nn.LSTM(2, 2), {"weight_hh_l0": torch.ones(8, 2, dtype=torch.bool)})
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(InputError, match="parametrised"):
        analysis.sparse_model(normed, {"parametrizations.weight.original1": whole})
