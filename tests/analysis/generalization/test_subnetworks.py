"""Analyses and trainings of sub-networks: masked weights are parameters like others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analysis
from analysis.generalization.contrast.layers import with_batch_norm
from analysis.sharpness.ascent import perturbation_scale
from analysis.training.loop import initialise
from curvature import Objective
from curvature.errors import InputError
from curvature.layerwise.filters import kept_filters


def dense() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(1)
    return {"0.weight": torch.rand(5, 6, generator=g) < 0.6, "2.weight": torch.rand(3, 5, generator=g) < 0.6}


def objective() -> Objective:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(30, 6, generator=g)
    return Objective(analysis.sparse_model(dense(), masks()), nn.CrossEntropyLoss(), (x, x[:, :3].argmax(1)))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("inspect", {"k": 2}),
        ("sharpness", {"measures": ("sam", "trace", "adaptive_top_eigenvalue")}),
        ("conditioning", {}),
        ("critical", {}),
        ("noise", {}),
        ("landscape", {"points": 5}),
        ("dimension", {}),
        ("implicit", {"lr": 0.1, "batch_size": 10, "k": 1}),
        ("track", {"lr": 0.1, "steps": 3}),
        ("lr", {"steps": 8, "seeds": 1, "warmup": False, "fresh": True}),
        ("labels", {"steps": 20, "repeats": 2, "processes": 1}),
    ],
)
def test_studies_run_on_a_sub_network(kind: str, settings: dict[str, Any]) -> None:
    asked = objective()
    found = analysis.measure(kind, asked, generator=0, check=False, **settings)
    assert found.num_params == sum(int(m.sum()) for m in masks().values()) + 8
    assert found.report().cards
    kept = analysis.masks_of(asked.model)
    assert all(torch.equal(kept[name], mask) for name, mask in masks().items())


def rows_of(vector: Tensor, asked: Objective, name: str) -> list[Tensor]:
    (stored,) = (t for key, t in asked.space.to_dict(vector).items() if key.startswith(name) and "bias" not in key)
    whole = torch.zeros(masks()[f"{name}.weight"].shape).masked_scatter(masks()[f"{name}.weight"], stored)
    return list(whole)


def test_filters_of_a_masked_layer_are_the_kept_entries_of_its_rows() -> None:
    asked = objective()
    d = analysis.random_direction(asked, generator=0).vector
    scale = perturbation_scale(asked, "filter")
    w = asked.space.current()
    for name in ("0", "2"):
        mask = masks()[f"{name}.weight"]
        rows = zip(*(rows_of(v, asked, name) for v in (d, w, scale)), mask, strict=True)
        for direction, weights, scales, kept in rows:
            torch.testing.assert_close(direction.norm(), weights.norm())
            expected = (weights.square().sum() / kept.sum().clamp_min(1)).sqrt()
            torch.testing.assert_close(scales[kept], expected.expand(int(kept.sum())))
    transposed = nn.ConvTranspose1d(2, 3, 2)
    mask = torch.ones(2, 3, 2, dtype=torch.bool)
    filters = kept_filters(analysis.sparse_model(transposed, {"weight": mask}))
    assert filters["parametrizations.weight.original"].view(2, 3, 2)[0, :, 0].tolist() == [0, 1, 2]
    empty = analysis.sparse_model(dense(), {"0.weight": torch.zeros(5, 6, dtype=torch.bool)})
    rest = Objective(empty, nn.CrossEntropyLoss(), asked.settings["data"])
    assert bool(analysis.random_direction(rest, generator=0).vector.isfinite().all())


def test_kept_weights_are_drawn_as_those_of_the_whole_tensor() -> None:
    whole, sparse = dense(), analysis.sparse_model(dense(), masks())
    for model in (whole, sparse):
        torch.manual_seed(3)
        initialise(model)
    again = analysis.dense_model(sparse)
    for name, p in whole.named_parameters():
        expected = p * masks()[name] if name in masks() else p
        assert torch.equal(dict(again.named_parameters())[name], expected)
    assert all(p.requires_grad for p in sparse.parameters())


def test_what_cannot_be_inserted_is_no_condition() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=g)
    linear = Objective(nn.Sequential(nn.Linear(4, 3)), nn.CrossEntropyLoss(), (x, x[:, :3].argmax(1)))
    found = analysis.regularization_by_curvature(linear, steps=20, repeats=2, processes=1, generator=0)
    assert "dropout" not in found.conditions
    assert "batch norm" not in found.conditions
    assert sum("There is no condition" in note for note in found.notes) == 2
    with pytest.raises(InputError, match="no hidden layer"):
        with_batch_norm(nn.Sequential(nn.Linear(4, 3)))
    inserted = with_batch_norm(analysis.sparse_model(dense(), masks()))
    assert [type(m).__name__ for m in inserted].count("BatchNorm1d") == 1
