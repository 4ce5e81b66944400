"""Data in pieces: as many examples as are fastest, and all in one piece where pieces are another function."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from curvature.objective import shift
from curvature.objective.objective import Objective
from curvature.objective.pieces import in_fast_pieces, in_pieces


def objective(*layers: nn.Module, rows: int = 60) -> Objective:
    model = nn.Sequential(nn.Linear(6, 8), *layers, nn.Tanh(), nn.Linear(8, 3)).double()
    return Objective(model, nn.CrossEntropyLoss(), (torch.randn(rows, 6).double(), torch.randint(3, (rows,))))


def sizes(o: Objective) -> list[int]:
    return [len(batch[0]) for batch in o.batches()]


def test_pieces_are_the_same_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shift, "_CACHE", 1)  # so that the parameters say how large an output may be: 83 numbers of 480
    o = objective()
    cut = in_fast_pieces(o)
    assert sizes(cut) == [10] * 6
    torch.testing.assert_close(cut.loss(), o.loss(), rtol=1e-13, atol=0)
    torch.testing.assert_close(cut.gradient(), o.gradient(), rtol=1e-12, atol=1e-15)
    assert in_fast_pieces(cut) is cut
    assert sizes(in_fast_pieces(o.split(30))) == [30, 30]  # cut by somebody who had a reason


def test_what_fits_stays_in_one_piece() -> None:
    o = objective()
    assert in_fast_pieces(o) is o


def test_coupled_examples_stay_together() -> None:
    o = objective(nn.BatchNorm1d(8))
    assert in_pieces(o, 10) is o
    assert sizes(in_pieces(objective(), 25)) == [25, 25, 10]
