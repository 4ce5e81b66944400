"""The benchmark of published relations measures what it names; relations that are exact hold, and so do its rows."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.relations import bench as bench_relations
from benchmarks.relations import networks
from benchmarks.relations.bench import RELATIONS, RESULTS
from benchmarks.sharpness import bench as bench_sharpness
from curvature import GGNOperator, HessianOperator, Objective


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))
    return found


def small(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 10))


def test_the_three_level_identity_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "classifier", small)
    (row,) = bench_relations.identity(0, 15)
    assert row["relative_error"] < 1e-12


def test_normalised_directions_are_blind_to_scales_and_raw_ones_are_not() -> None:
    change = {row["scaling"]: row["change"] for row in RELATIONS["directions"](0)}
    assert max(change["filter"], change["layer"]) < 1e-12
    assert min(change["raw"], change["unit"]) > 0.05


def test_rescaled_networks_are_one_function() -> None:
    images = networks.digits(20)[0].double()
    model = networks.relu(0)
    before = model(images).detach()
    networks.rescale(model, 5.0)
    assert float((model(images).detach() - before).abs().max()) < 1e-14
    assert float(model[1].weight.detach().norm()) == pytest.approx(
        5 * float(networks.relu(0)[1].weight.detach().norm())
    )


def test_the_residual_is_that_of_dense_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 60 images and a net of 199 parameters; the gap closes while it trains."""
    data = networks.digits(60)
    monkeypatch.setattr(networks, "classifier", small)
    monkeypatch.setattr(networks, "digits", lambda _=None: data)
    found = list(bench_relations.training(0, (0, 400)))
    model, dense = small(0), {}

    def measure(step: int) -> None:
        H, G = (A(Objective(model, nn.CrossEntropyLoss(), data)).to_dense() for A in (HessianOperator, GGNOperator))
        dense[step] = float((H - G).norm() / H.norm())

    networks.train(model, data, steps=400, rate=0.1, batch=32, seed=0, marks=(0, 400), at_mark=measure)
    by_step = {row["step"]: row for row in found}
    for step, value in dense.items():
        assert abs(by_step[step]["residual"] - value) < 4 * by_step[step]["residual_stderr"] + 1e-5
    assert found[-1]["residual"] < 0.35 < found[0]["residual"]


def test_concave_share_of_known_planes() -> None:
    x = torch.linspace(-1, 1, 11, dtype=torch.float64)
    X, Y = torch.meshgrid(x, x, indexing="xy")
    for plane, share in ((X**2 + Y**2, 0.0), (X**2 - Y**2, 1.0), (X**2 - 0.5 * Y**2, 0.5), (X * Y, 1.0), (0 * X, 0.0)):
        assert bench_relations._concave_share(plane) == pytest.approx(share, abs=1e-9)


def test_skips_cost_no_parameters_and_training_is_repeatable() -> None:
    sizes = {skip: sum(p.numel() for p in networks.residual(skip, 0).parameters()) for skip in (True, False)}
    assert sizes[True] == sizes[False]
    models = [networks.deep(True, 1) for _ in range(2)]
    for model in models:
        networks.train(model, networks.digits(100), steps=3, rate=0.1, batch=30, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))
    assert not torch.equal(next(models[0].parameters()), next(networks.deep(True, 1).parameters()))


def test_stored_rows_show_the_robust_relations(rows: list[dict[str, Any]]) -> None:
    assert {row["relation"] for row in rows} == set(RELATIONS)
    for seed in range(3):
        path = [row for row in rows if row["relation"] == "training" and row["seed"] == seed]
        assert path[0]["residual"] - 4 * path[0]["residual_stderr"] > 0.75
        trained = [row for row in path if row["loss"] < 0.1]
        assert trained
        assert all(row["residual"] + 4 * row["residual_stderr"] < 0.35 for row in trained)
        late = [row["overlap_with_next"] for row in path[-4:-1]]
        assert min(late) > 0.55 > 20 * path[0]["chance"]
    for row in rows:
        if row["relation"] == "rescaling" and row["said_invariant"]:
            assert row["ratio"] == pytest.approx(1, abs=1e-3), row["measure"]
        if row["relation"] == "rescaling" and not row["said_invariant"]:
            assert abs(row["ratio"] - 1) > 0.02, row["measure"]


def test_marks_have_been_met() -> None:
    stored = json.loads(bench_sharpness.RESULTS.read_text(encoding="utf-8"))
    totals = {row["what"]: row for row in stored if "cpu_seconds" in row and row["threads"] == 1}
    assert totals["sharpness table"]["count"] == 27
    assert totals["landscape"]["count"] == 51 * 51
