"""The highest loss is that of all that were noted, however many and of whatever kind."""

from __future__ import annotations

import math

import torch

from analysis.training.highest import HighestLoss


def test_the_highest_of_all() -> None:
    highest = HighestLoss()
    assert math.isnan(highest.take())
    losses = torch.randn(700, generator=torch.Generator().manual_seed(0))
    for loss in losses:
        highest.note(loss)
    assert len(highest._tensors) < 256
    assert highest.take() == float(losses.max())
    highest.note(2.0)
    highest.note(torch.tensor([[3.0]], dtype=torch.float64))
    highest.note(1.0)
    assert highest.take() == 3.0
    assert math.isnan(highest.take())


def test_nan_stays() -> None:
    for order in ([math.nan, 1.0], [1.0, math.nan, 2.0]):
        for make in (float, torch.tensor):
            highest = HighestLoss()
            for loss in order:
                highest.note(make(loss))
            assert math.isnan(highest.take())
