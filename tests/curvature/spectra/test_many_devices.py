"""Plans for many devices: what sizes say, monotone in ranks, and refused where nothing fits."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from curvature import Cluster, ModelSize, plan
from curvature.errors import InputError

BILLION = 10**9


def size(num_params: int) -> ModelSize:
    """Return about the size of a transformer with so many parameters, in bfloat16, on a million tokens."""
    return ModelSize(
        num_params=num_params,
        largest_module=num_params // 60,
        num_modules=300,
        tokens=1 << 20,
        batch_tokens=4096,
        token_bytes=2_000_000,
        param_dtype=torch.bfloat16,
    )


def test_a_model_without_memory_has_the_size_of_one_with() -> None:
    def made(device: str) -> nn.Module:
        table, layer = (
            nn.Embedding(50, 8, device=device),
            nn.TransformerEncoderLayer(8, 2, 32, batch_first=True, device=device),
        )
        head = nn.Linear(8, 50, bias=False, device=device)
        head.weight = table.weight  # counts once
        return nn.Sequential(table, layer, head)

    found = [ModelSize.of(made(device), tokens=10, batch_tokens=5) for device in ("meta", "cpu")]
    assert found[0] == found[1]
    assert found[0].num_params == sum(p.numel() for p in made("cpu").parameters())
    assert found[0].largest_module == 400  # of the table; the feed-forward layers have 288 and 264


@pytest.mark.parametrize("billions", [1, 7, 70])
def test_more_ranks_hold_less_each_and_are_faster(billions: int) -> None:
    costs = [
        plan(size(billions * BILLION), "eigenpairs", k=1, world_size=ranks, cluster=Cluster(memory=1e15))
        for ranks in (8, 64, 512)
    ]
    every = [{c.route: c for c in (cost, cost.other) if c is not None} for cost in costs]
    for route in ("whole parameters", "module by module"):
        held = [found[route].rank_bytes for found in every]
        assert held == sorted(held, reverse=True)
        assert held[0] > held[-1]
        assert all(found[route].seconds > other[route].seconds for found, other in pairwise(every))
    n = billions * BILLION
    whole = every[0]["whole parameters"]
    assert whole.bytes_per_matvec == 2 * n * 4 * 7 // 8
    assert whole.parts["basis"] == 21 * 4 * (n // 8)
    assert whole.rank_bytes == sum(whole.parts.values())


def test_seventy_billion_fit_module_by_module_only() -> None:
    cost = plan(size(70 * BILLION), "eigenpairs", k=1, world_size=512)
    assert cost.route == "module by module"
    assert cost.fits
    assert cost.other is not None
    assert not cost.other.fits
    with pytest.raises(InputError, match=r"no route fits into 74\.5 GiB on each of 8 ranks"):
        plan(size(70 * BILLION), "eigenpairs", k=1, world_size=8)


def test_one_rank_moves_nothing_and_spectra_take_their_basis() -> None:
    cost = plan(size(BILLION), "product", world_size=1)
    assert (cost.num_matvecs, cost.bytes_per_matvec, cost.link_seconds) == (1, 0, 0.0)
    spectrum = plan(size(BILLION), ["top", "density"], k=2, num_probes=2, num_steps=10, world_size=64)
    assert spectrum.num_matvecs > 20
    assert spectrum.parts["basis"] >= 20 * 4 * (BILLION // 64)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan(size(BILLION), "product"), "world_size= goes with"),
        (lambda: plan(torch.eye(3), "product", world_size=2), "world_size= goes with"),
        (lambda: plan(size(BILLION), "layers", world_size=2), "planned for an objective"),
        (lambda: plan(size(BILLION), "product", world_size=0), "at least 1"),
        (lambda: Cluster(link=0.0), "must be positive"),
        (lambda: size(0), "num_params must be at least 1"),
        (lambda: replace(size(BILLION), largest_module=2 * BILLION), "largest_module must be at most num_params"),
        (lambda: replace(size(BILLION), num_modules=2 * BILLION), "num_modules must be at most num_params"),
        (lambda: replace(size(BILLION), token_bytes=-1), "token_bytes must be at least 0"),
        (lambda: replace(size(BILLION), param_dtype=torch.int8), "floating-point dtype"),
    ],
)
def test_refusals(call, words) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError, match=words):
        call()
