"""Per-example quantities through BackPACK against a loop of backward passes over single examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import InputError, NonFiniteError
from curvature.layerwise import backpack_per_example
from tests.checks import assert_close, assert_untouched
from tests.curvature.layerwise.exact_cases import (
    BY_LAYER,
    BY_LOSS,
    LAYERS,
    LOSSES,
    Layer,
    Loss,
    cut,
    dense_jacobian,
    targets,
)
from tests.curvature.layerwise.test_exact_diagonal import REFUSED


def check(model: nn.Module, loss: Any, x: Tensor, y: Tensor, weights: Tensor, **settings: Any) -> None:
    """Compare with gradients of losses of single examples; they are nan where all targets are ignored."""
    params = list(model.parameters())
    rows = []
    for i in range(len(x)):
        value = loss(model(x[i : i + 1]), y[i : i + 1])
        rows.append(dense_jacobian(value, params)[0] if weights[i] > 0 else torch.zeros(sum(p.numel() for p in params)))
    g = torch.stack([row.double() for row in rows])
    objective = Objective(model, loss, cut(x, y))
    with assert_untouched(model):
        found = backpack_per_example(objective, **settings)
    p = weights / weights.sum()
    if objective.sums:
        g = g * len(x)
    mean = p @ g
    assert_close(found.weights, p)
    assert_close(found.gradient, mean)
    assert_close(found.gradient, objective.gradient())
    for name, expected in {
        "grad": g,
        "second_moment": p @ g.square(),
        "variance": p @ (g - mean).square(),
        "norms": g.norm(dim=1),
    }.items():
        value = getattr(found, name)
        assert value is not None, name
        assert_close(value, expected)


@pytest.mark.parametrize(
    "layer", [layer for layer in LAYERS if layer.name not in REFUSED], ids=lambda layer: layer.name
)
def test_layers(layer: Layer) -> None:
    check(
        layer.model(), nn.CrossEntropyLoss(), layer.inputs(), targets(BY_LOSS["cross-entropy"]), torch.ones(5).double()
    )


NO_RULE = [layer for layer in LAYERS if layer.name in REFUSED and "Adaptive" not in layer.name]  # gradients need none


@pytest.mark.parametrize("layer", NO_RULE, ids=lambda layer: layer.name)
def test_layers_backpack_has_no_rule_for(layer: Layer) -> None:
    objective = Objective(layer.model(), nn.CrossEntropyLoss(), (layer.inputs(), targets(BY_LOSS["cross-entropy"])))
    with pytest.raises(InputError, match=f"(?s){REFUSED[layer.name]}.*curvature.per_example") as caught:
        backpack_per_example(objective)
    assert "BackPACK is not to be used" in str(caught.value)


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_losses(loss: Loss) -> None:
    layer, y = BY_LAYER["Tanh"], targets(loss)
    weights = torch.ones(5).double()
    if "ignored" in loss.name:
        weights = (y != -100).double()
    elif "ignore_index" in loss.name:
        weights = (y != 1).double()
    elif "weights" in loss.name:
        weights = torch.tensor([0.5, 2.0, 1.5]).double()[y]
    check(layer.model(loss.outputs), loss.build(), layer.inputs(), y, weights)


def test_backpack_norms_on_grouped_convolutions_are_wrong() -> None:
    """Why norms take another way there. If this fails, BackPACK has been mended."""
    import backpack
    from backpack.extensions import BatchGrad, BatchL2Grad

    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=2, bias=False), nn.Flatten(), nn.Linear(16, 3)).double()
    x, y = BY_LAYER["Conv2d, groups"].inputs(), targets(BY_LOSS["cross-entropy"])
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(BatchGrad(), BatchL2Grad()):
        loss(backpack.extend(model)(x.requires_grad_()), y).backward()
    weight: Any = model[0].weight
    assert not torch.allclose(weight.batch_l2, weight.grad_batch.flatten(1).square().sum(1), rtol=1e-3)


@pytest.mark.parametrize("budget", [1, 3000])
def test_small_memory_and_few_quantities(budget: int) -> None:
    layer, loss = BY_LAYER["Conv2d"], BY_LOSS["cross-entropy"]
    model, x, y = layer.model(), layer.inputs(), targets(loss)
    check(model, nn.CrossEntropyLoss(), x, y, torch.ones(5).double(), memory_budget=budget)
    found = backpack_per_example(Objective(model, nn.CrossEntropyLoss(), (x, y)), ["norms"])
    assert (found.grad, found.variance, found.second_moment) == (None, None, None)


def test_refusals() -> None:
    layer, loss = BY_LAYER["Tanh"], nn.CrossEntropyLoss()
    x, y = layer.inputs(), targets(BY_LOSS["cross-entropy"])
    objective = Objective(layer.model(), loss, (x, y))
    for bad in (["gradients"], [], "grad"):
        with pytest.raises(InputError, match="quantities must be"):
            backpack_per_example(objective, bad)
    with pytest.raises(InputError, match="memory_budget"):
        backpack_per_example(objective, memory_budget=0)
    with pytest.raises(InputError, match="split"):
        backpack_per_example(Objective(layer.model(), None, (x, y), forward=lambda m, b: loss(m(b[0]), b[1])))
    shared = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)).double()
    shared[2].weight = shared[0].weight
    with pytest.raises(InputError, match="used twice"):
        backpack_per_example(Objective(shared, loss, (x, y)))
    train = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    with pytest.raises(InputError, match="couples the examples"), assert_untouched(train):
        backpack_per_example(Objective(train, loss, (x, y)))
    model = layer.model()
    with torch.no_grad():
        model[0].weight.zero_()
    with pytest.raises(NonFiniteError, match="wider dtype"):
        backpack_per_example(Objective(model, loss, (1e200 * x, y)), ["variance"])
