"""The layout of convolutions: values stay, storage comes back, and models that cannot take it are left alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from curvature import HessianOperator, Objective
from curvature.objective.memory_format import fast_layout
from curvature.objective.shift import loss_at, shifted
from tests.checks import assert_close, assert_untouched

LAST = torch.channels_last


class Viewing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 4, 3), nn.Linear(4 * 16, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return self.out(torch.tanh(h).view(len(h), -1))


def objective(model: nn.Module) -> Objective:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 3, 6, 6, generator=g).double(), torch.randint(5, (7,), generator=g)
    return Objective(model.double(), nn.CrossEntropyLoss(), (x, y))


def flattening() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 5)).eval()


def test_products_inside_are_those_outside() -> None:
    o = objective(flattening())
    weight = o.space.tensors["0.weight"]
    v = torch.randn(o.num_params, generator=torch.Generator().manual_seed(1)).double()
    point = o.space.current() + 0.1 * v
    outside = [o.loss(), o.gradient(), HessianOperator(o) @ v, torch.tensor(loss_at(o, point).value)]
    storage, value = weight.data_ptr(), weight.detach().clone()
    with assert_untouched(o.model):
        with fast_layout(o):
            assert weight.is_contiguous(memory_format=LAST)
            assert torch.equal(weight, value)
            inside = [o.loss(), o.gradient(), HessianOperator(o) @ v, torch.tensor(loss_at(o, point).value)]
            with shifted(o, point):
                assert weight.is_contiguous(memory_format=LAST)
        assert weight.data_ptr() == storage
    for a, b in zip(inside, outside, strict=True):
        assert_close(a, b, 1e-11)


def test_models_that_view_their_feature_maps_are_left_alone() -> None:
    o = objective(Viewing())
    with fast_layout(o):
        assert o.space.tensors["conv.weight"].is_contiguous()
        assert o.loss() == pytest.approx(loss_at(o, o.space.current()).value)


def test_storage_comes_back_after_an_error() -> None:
    o = objective(flattening())
    storage = o.space.tensors["0.weight"].data_ptr()
    with pytest.raises(KeyboardInterrupt), fast_layout(o):
        raise KeyboardInterrupt
    assert o.space.tensors["0.weight"].data_ptr() == storage
