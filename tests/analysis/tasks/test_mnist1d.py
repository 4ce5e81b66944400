"""Sequences in the manner of MNIST-1D: made by a seed, balanced, and harder for a linear model than for a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from analysis.generalization.ensemble import Ensemble, Recipe
from analysis.tasks import load_task
from analysis.tasks.mnist1d import make_sequences


def test_the_same_seed_gives_the_same_balanced_sequences() -> None:
    x, y = make_sequences(200, torch.Generator().manual_seed(3))
    again, _ = make_sequences(200, torch.Generator().manual_seed(3))
    assert torch.equal(x, again)
    assert x.shape == (200, 40)
    assert y.bincount().tolist() == [20] * 10
    assert bool(x.isfinite().all())


def test_a_network_learns_what_a_linear_model_does_not() -> None:
    task = load_task("mnist1d-mlp")
    (x, y), (test_x, test_y) = task.train_data, task.test_data
    ones = torch.ones(len(x), 1)
    w = torch.linalg.lstsq(torch.cat([x, ones], 1), F.one_hot(y, 10).float()).solution
    linear = (torch.cat([test_x, ones], 1) @ w).argmax(1)
    ensemble = Ensemble(task.model, [0, 1])
    ensemble.train(F.cross_entropy, x, y.expand(2, -1), Recipe(steps=300, lr=0.01))
    network = float(ensemble.fit(F.cross_entropy, test_x, test_y).error.mean())
    assert float((linear != test_y).double().mean()) > 0.5
    assert network < float((linear != test_y).double().mean()) - 0.1
