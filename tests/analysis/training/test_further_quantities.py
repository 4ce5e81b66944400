"""The spectrum's nodes and the sharpest layer of a reading, and their figures, against dense matrices."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from analysis import CurvatureTracker, plot_depth, plot_smoothness, plot_waterfall
from analysis.training.results import TrainingReading, TrainingRecord
from analysis.training.study import TrackRun
from curvature import HessianOperator, Objective


def record(steps: int = 3) -> tuple[TrainingRecord, torch.Tensor, Objective]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    data = (torch.randn(20, 3, dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64))
    objective = Objective(model, nn.MSELoss(), data)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    quantities = ("sharpness", "preconditioned", "spectrum", "smoothness", "depth")
    tracker = CurvatureTracker(objective, optimizer, quantities=quantities, budget=None, generator=0)
    H = HessianOperator(objective).to_dense()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(data[0]), data[1]).backward()
        optimizer.step()
        tracker.step()
    return tracker.record, H, objective


def test_nodes_integrate_and_the_layer_is_that_of_the_eigenvector() -> None:
    found, H, objective = record()
    first = found.readings[0]
    values, vectors = torch.linalg.eigh(H)
    assert sum(first.ritz_weights) == pytest.approx(1)
    assert max(first.ritz_values) == pytest.approx(float(values[-1]), rel=1e-3)
    assert min(first.ritz_values) == pytest.approx(float(values[0]), rel=1e-2, abs=1e-3)
    mean = sum(w * x for w, x in zip(first.ritz_weights, first.ritz_values, strict=True))
    exact = float(H.trace()) / len(H)
    assert abs(mean - exact) < 4 * float((H - torch.diag(H.diagonal())).norm()) * 2**0.5 / len(H)
    shares = {b.name: float(b.take(vectors[:, -1]).square().sum()) for b in objective.space.blocks}
    assert first.sharpest_layer == max(shares, key=lambda name: shares[name])
    assert first.sharpest_layer_share == pytest.approx(shares[first.sharpest_layer], rel=0.05)
    assert TrainingReading.from_row(json.loads(json.dumps(first.row()))) == first


def test_they_are_drawn() -> None:
    found, _, _ = record()
    run = TrackRun.__new__(TrackRun)
    object.__setattr__(run, "training", found)
    object.__setattr__(run, "num_params", 26)
    names = [figure.name for section in run.report().sections for figure in section.figures]
    assert names == ["stability", "loss", "waterfall", "smoothness", "depth"]
    canvas = Figure(figsize=(8, 9))
    axes = canvas.subplots(3)
    for ax, plot in zip(axes, (plot_waterfall, plot_smoothness, plot_depth), strict=True):
        plot(found, ax=ax)
    canvas.draw_without_rendering()
    mesh = axes[0].collections[0]
    counts = 10 ** np.ma.filled(mesh.get_array(), np.nan)
    assert np.nansum(counts, axis=0) == pytest.approx([26] * 3, rel=0.1)  # rows with less than 0.1 are left out
    shown = {line.get_label(): line for line in axes[1].lines}
    assert list(shown["smoothness"].get_ydata()) == [r.effective_smoothness for r in found.readings]
    depth = {line.get_label(): list(line.get_ydata()) for line in axes[2].lines}
    assert depth["Jacobian, end"] == list(found.readings[-1].layer_jacobians.values())
    assert depth["gradient, start"] == list(found.readings[0].layer_gradients.values())
