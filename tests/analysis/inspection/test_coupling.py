"""Norms of the blocks of the Hessian against those of dense matrices."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from analysis.inspection.coupling import layer_coupling
from analysis.inspection.results import LayerCoupling
from curvature import Block, HessianOperator, Objective
from curvature.errors import InputError, NonFiniteError
from tests.cases import BY_NAME

NUM_SEEDS = 300


def objective_of(name: str) -> Objective:
    case = BY_NAME[name]
    return Objective(case.model(), case.loss, case.ragged())


def dense_norms(objective: Objective) -> Tensor:
    H, blocks = HessianOperator(objective).to_dense(), objective.space.blocks
    return torch.stack([torch.stack([torch.linalg.matrix_norm(a.take(b.take(H).T)) for a in blocks]) for b in blocks])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "name", ["linear regression", "MLP tanh", "tied weights", "module used twice", "weight norm", "frozen and unused"]
)
def test_layers_of_few_parameters_are_exact(name: str) -> None:
    objective = objective_of(name)
    result = layer_coupling(objective, num_probes=objective.num_params, generator=generator())
    torch.testing.assert_close(result.norms, dense_norms(objective), rtol=1e-10, atol=1e-14)
    assert not bool(result.stderr.any())
    assert result.num_matvecs == objective.num_params
    assert result.names == tuple(block.name for block in objective.space.blocks)
    assert sum(result.num_params) == objective.num_params


def test_blocks_beside_a_small_layer_are_exact_and_others_are_estimated() -> None:
    objective = objective_of("BatchNorm eval")
    exact = dense_norms(objective)
    sizes = torch.tensor([block.num_params for block in objective.space.blocks])
    probes = int(sizes.min())
    result = layer_coupling(objective, num_probes=probes, generator=generator())
    known = (sizes <= probes)[:, None] | (sizes <= probes)
    assert 0 < int(known.sum()) < known.numel()
    torch.testing.assert_close(result.norms[known], exact[known], rtol=1e-10, atol=0)
    assert bool((result.stderr[known] == 0).all())
    assert bool((result.stderr[~known] > 0).all())
    assert torch.equal(result.norms, result.norms.T)
    assert torch.equal(result.stderr, result.stderr.T)


def three_layers() -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randint(0, 3, (40,))
    return Objective(model, nn.CrossEntropyLoss(), (x, y))


def coverage_by_definition(H: Tensor, a: Block, b: Block, num_probes: int, num_trials: int = 4000) -> float:
    """How often |H_ab|_F lies within two standard errors of the root of the mean of |H_ab z|^2, with a dense matrix."""
    block = a.take(b.take(H).T)

    def means(M: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        signs = torch.randint(0, 2, (M.shape[1], num_trials * num_probes), generator=generator(seed)) * 2.0 - 1
        squares = (M @ signs.double()).square().sum(dim=0).view(num_trials, num_probes)
        return squares.mean(dim=1), squares.std(dim=1) / num_probes**0.5

    mean, stderr = means(block, 0)
    if a != b:
        other, other_stderr = means(block.T, 1)
        mean, stderr = (mean + other) / 2, torch.hypot(stderr, other_stderr) / 2
    covered = (mean.sqrt() - torch.linalg.matrix_norm(block)).abs() <= 2 * stderr / (2 * mean.sqrt())
    return float(covered.double().mean())


def test_error_bars_cover_the_truth_as_often_as_they_should() -> None:
    objective, probes = three_layers(), 16
    blocks, exact, H = objective.space.blocks, dense_norms(objective), HessianOperator(objective).to_dense()
    assert all(block.num_params > probes for block in blocks)
    results = [layer_coupling(objective, num_probes=probes, generator=generator(s)) for s in range(NUM_SEEDS)]
    norms, stderr = (torch.stack([getattr(r, name) for r in results]) for name in ("norms", "stderr"))
    hits = ((norms - exact).abs() <= 2 * stderr).double().mean(dim=0)
    for a in range(len(blocks)):
        for b in range(a + 1):
            rate = coverage_by_definition(H, blocks[a], blocks[b], probes)
            assert rate > 0.88  # 0.94 by Student's t, less what the squares are skewed
            assert abs(float(hits[a, b]) - rate) <= 3 * math.sqrt(rate * (1 - rate) / NUM_SEEDS)
    error = norms.square().std(dim=0) / NUM_SEEDS**0.5
    assert bool(((norms.square().mean(dim=0) - exact.square()).abs() <= 4 * error).all())  # squares have no bias


def test_the_products_are_counted_and_told_of() -> None:
    objective = objective_of("MLP tanh")
    told: list[tuple[str, int, int]] = []
    result = layer_coupling(objective, num_probes=4, generator=generator(), progress=lambda *news: told.append(news))
    total = 4 * len(result.names)
    assert told == [("coupling of layers", 4 * (i + 1), total) for i in range(len(result.names))]
    assert result.num_matvecs == total
    again = layer_coupling(objective, num_probes=4, generator=generator())
    assert torch.equal(result.norms, again.norms)


def test_relative_coupling_and_plain_values() -> None:
    objective = objective_of("frozen and unused")
    result = layer_coupling(objective, num_probes=200, generator=generator())
    norms = dense_norms(objective)
    dead = norms.diagonal() == 0
    assert bool(dead.any())  # a layer the loss does not depend on
    relative = result.relative
    assert bool(relative[dead].isnan().all())
    alive = ~dead
    torch.testing.assert_close(relative.diagonal()[alive], torch.ones(int(alive.sum()), dtype=torch.float64))
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["names"] == list(result.names)
    assert plain["norms"] == result.norms.tolist()
    assert plain["num_matvecs"] == result.num_matvecs
    assert plain["relative"][int(dead.nonzero()[0])][0] is None


def test_a_model_of_one_layer() -> None:
    objective = objective_of("linear regression")
    result = layer_coupling(objective, generator=generator())
    assert result.norms.shape == (1, 1)
    assert isinstance(result, LayerCoupling)


def test_bad_input() -> None:
    objective = objective_of("linear regression")
    with pytest.raises(InputError, match=r"num_probes must be at least 2, .* got 1"):
        layer_coupling(objective, num_probes=1, generator=generator())

    class Elsewhere(torch.Generator):
        device = torch.device("cuda")

    with pytest.raises(InputError, match=r"generator lives on cuda but the matrix on cpu"):
        layer_coupling(objective, generator=Elsewhere())


def test_products_that_are_not_finite_are_named() -> None:
    model = nn.Linear(1, 1, bias=False)
    objective = Objective(model, lambda y, _: (1e20 * y).square().mean(), (torch.ones(1, 1), torch.zeros(1, 1)))
    with torch.no_grad():
        model.weight.fill_(0)
    with pytest.raises(NonFiniteError, match=r"product is not finite on batch 0 in the rows of 'weight'"):
        layer_coupling(objective, generator=generator())
