"""Tracking follows the parameters it is given; densities are compared at equal distance."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from benchmarks.density.bench import envelope, products_at, rows_of
from benchmarks.tracking.bench import STARTS, WAYS, track, trajectory
from curvature import HessianOperator, Objective


def test_trajectory_is_repeatable_and_moves() -> None:
    first, again = (list(trajectory(STARTS["scratch"], steps=2)) for _ in range(2))
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert not torch.equal(first[0]["classifier.weight"], first[1]["classifier.weight"])


@pytest.mark.parametrize("name", WAYS)
def test_every_way_tracks_the_largest_eigenvalue(name: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    A = HessianOperator(Objective(model, nn.CrossEntropyLoss(), (torch.randn(20, 3), torch.randint(2, (20,)))))
    states = [{key: (1 + 0.05 * i) * t for key, t in model.state_dict().items()} for i in range(3)]
    found = track(WAYS[name], model, A, states)
    for state, pairs in zip(states, found, strict=True):
        model.load_state_dict(state)
        exact = torch.linalg.eigvalsh(A.to_dense())[-1]
        torch.testing.assert_close(pairs.eigenvalues[0], exact, rtol=2e-2, atol=0)


def test_density_rows_count_all_products() -> None:
    A = torch.diag(torch.cat([torch.linspace(0, 0.1, 60), torch.tensor([2.0, 3.0])])).double()
    exact = A.diagonal().sort().values
    (plain,) = rows_of(A, exact, known=0, probes=2, steps=[5], seeds=3)
    (known,) = rows_of(A, exact, known=2, probes=2, steps=[5], seeds=3)
    assert plain["products"] == 10
    assert known["products"] > 12
    assert known["distance"] < plain["distance"]


def test_products_at_equal_distance() -> None:
    rows = [{"products": p, "distance": d} for p, d in [(10.0, 1.0), (100.0, 0.1), (50.0, 0.5), (200.0, 0.2)]]
    assert [r["products"] for r in envelope(rows)] == [10.0, 50.0, 100.0]
    assert products_at(1.0, rows) == 10
    assert products_at(0.1, rows) == pytest.approx(100)
    assert 50 < products_at(0.2, rows) < 100
    assert math.isinf(products_at(0.01, rows))
    assert math.isnan(products_at(2.0, rows))
