"""Condition numbers and ranks of matrices whose spectra are known, and what preconditioners make of them."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from analysis.conditioning.figures import plot_conditioning, plot_effective_dimension
from analysis.conditioning.measure import compare_conditioning, measure_conditioning
from analysis.conditioning.study import _cards, _conditions
from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from tests.cases import BY_NAME
from tests.checks import assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Pair(nn.Module):
    """Two layers whose parameters are the output."""

    def __init__(self, m: int, n: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(m, 1, bias=False), nn.Linear(n, 1, bias=False)
        self.double()

    def forward(self, _: Tensor) -> Tensor:
        return torch.cat([self.first.weight[0], self.second.weight[0]])


def form(A: Tensor, m: int = 1) -> Objective:
    """Return w'A w / 2, the first m entries of w being one layer."""
    data = [(torch.zeros(1), torch.zeros(1))]
    return Objective(
        Pair(m, len(A) - m), None, data, forward=lambda f, b: f(b[0]) @ A @ f(b[0]) / 2, weight=lambda _: 1.0
    )


def rotated(eigenvalues: Tensor, seed: int = 7) -> Tensor:
    Q = torch.linalg.qr(torch.randn(len(eigenvalues), len(eigenvalues), generator=generator(seed)).double()).Q
    return Q * eigenvalues.double() @ Q.T


@pytest.mark.parametrize("signs", ["positive", "mixed"])
def test_numbers_of_a_small_matrix_are_exact(signs: str) -> None:
    eigenvalues = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0, 1e-9]).double()
    if signs == "mixed":
        eigenvalues[:2] *= torch.tensor([-1.0, 1.0])
    found = measure_conditioning(form(rotated(eigenvalues)), layers=False, jacobi=False, generator=generator())
    size = eigenvalues.abs()
    p = size / size.sum()
    whole = found.whole
    assert whole.exact
    assert whole.condition.value == pytest.approx(16, rel=1e-12)
    assert whole.rank.value == pytest.approx(5)
    assert whole.effective_rank.value == pytest.approx(float(torch.special.entr(p).sum().exp()), rel=1e-10)
    assert whole.stable_rank.value == pytest.approx(float(size.square().sum() / 64), rel=1e-12)
    assert found.max_stable_lr == pytest.approx(2 / float(eigenvalues.max()), rel=1e-12)
    positive = eigenvalues.clamp_min(0)
    expected = (positive / (positive + found.damping[:, None])).sum(1)
    assert_close(found.effective_dimension, expected, 1e-9)
    assert not bool(found.effective_dimension_stderr.any())


@pytest.mark.parametrize(("eigenvalues", "rank"), [([3.0] * 6, 6.0), ([5.0, 0.0, 0.0], 1.0), ([2.0, 0.0], 1.0)])
def test_ranks_of_a_multiple_of_the_identity_and_of_rank_one(eigenvalues: list[float], rank: float) -> None:
    found = measure_conditioning(form(rotated(torch.tensor(eigenvalues))), layers=False, generator=generator()).whole
    assert found.condition.value == pytest.approx(1)
    for measured in (found.rank, found.effective_rank, found.stable_rank):
        assert measured.value == pytest.approx(rank, rel=1e-9)


def test_zero_matrix_has_no_condition() -> None:
    found = measure_conditioning(form(torch.zeros(4, 4).double()), generator=generator())
    assert math.isnan(found.whole.condition.value)
    assert found.max_stable_lr == math.inf
    assert found.preconditioned == ()
    assert not bool(found.effective_dimension.any())
    json.dumps(found.to_dict(), allow_nan=False)
    plot_conditioning(found)


@pytest.mark.parametrize("signs", ["positive", "mixed"])
def test_error_bars_of_a_large_matrix_hold(signs: str) -> None:
    eigenvalues = torch.arange(1, 501).double() ** -1.0
    p = eigenvalues / eigenvalues.sum()
    if signs == "mixed":
        eigenvalues[1::2] *= -1
    A = rotated(eigenvalues)
    exact_rank = float(torch.special.entr(p).sum().exp())
    scores = {"rank": [], "stable": [], "dimension": [], "condition": []}
    for seed in range(8):
        found = measure_conditioning(form(A), layers=False, jacobi=False, generator=generator(seed))
        whole = found.whole
        assert not whole.exact
        scores["rank"].append((whole.effective_rank.value - exact_rank) / whole.effective_rank.stderr)
        stable = float(eigenvalues.square().sum())
        scores["stable"].append((whole.stable_rank.value - stable) / whole.stable_rank.stderr)
        positive = eigenvalues.clamp_min(0)
        expected = (positive / (positive + found.damping[12])).sum()
        scores["dimension"].append(
            float((found.effective_dimension[12] - expected) / found.effective_dimension_stderr[12])
        )
        scores["condition"].append((whole.condition.value - 500) / whole.condition.stderr)
    for name, values in scores.items():
        root_mean_square = float(torch.tensor(values).square().mean().sqrt())
        assert root_mean_square < 2.5, (name, values)
        assert root_mean_square > 0.1 or name == "condition"  # a residual bounds an error from above


def test_what_the_quadrature_does_not_resolve_stands_between_bounds() -> None:
    """Curvatures over twelve decades without a gap: 120 of 240 beyond the floor, of which 30 steps see few."""
    A = rotated(torch.logspace(0, -12, 240))
    for seed in range(3):
        found = measure_conditioning(form(A), layers=False, jacobi=False, generator=generator(seed))
        whole = found.whole
        assert not whole.exact
        assert whole.rank.lower <= 120 <= whole.rank.upper
        assert abs(whole.rank.value - 120) <= 2 * whole.rank.stderr
        assert whole.condition.lower <= 1e6 * (1 - 1e-3)
        assert whole.condition.upper >= 1e6 * (1 - 1e-3)
        words = {card.label: f"{card.value} {card.error}" for card in _cards(found)}
        assert words["Condition number"].startswith("at least ")
        assert " to " in words["Numerical rank"]
        assert not any("exact" in text for text in words.values())


def test_gains_carry_the_bounds_of_both_condition_numbers() -> None:
    scales = torch.logspace(0, -2, 200).double()
    A = scales[:, None] * rotated(torch.logspace(0, -1, 200)) * scales
    found = measure_conditioning(form(A), layers=False, floor=1e-9, diagonal_matvecs=200, generator=generator())
    sizes, scaled = (torch.linalg.eigvalsh(M) for M in (A, A / (A.diagonal()[:, None] * A.diagonal()).sqrt()))
    exact = float(sizes[-1] / sizes[0] / (scaled[-1] / scaled[0]))
    gain = found.gains["jacobi"]
    assert gain.lower <= exact <= gain.upper
    assert gain.value == pytest.approx(exact, abs=3 * gain.stderr)


# -- preconditioners --------------------------------------------------------------------------------------------------


def test_the_right_preconditioner_makes_all_curvatures_equal() -> None:
    diagonal = torch.tensor([100.0, 1.0, 0.01, 5.0]).double()
    found = measure_conditioning(form(torch.diag(diagonal)), generator=generator())
    assert found.gains["jacobi"].value == pytest.approx(1e4, rel=1e-6)
    blocks = torch.block_diag(rotated(torch.tensor([1000.0, 1.0])), rotated(torch.tensor([-5.0, 0.5, 50.0])))
    found = measure_conditioning(form(blocks, 2), block_diagonal=True, generator=generator())
    by_name = {c.name: c for c in found.preconditioned}
    assert by_name["block diagonal"].condition.value == pytest.approx(1, rel=1e-9)
    assert found.gains["block diagonal"].value == pytest.approx(2000, rel=1e-9)
    assert [c.condition.value for c in found.layers] == pytest.approx([1000, 100])
    assert found.layer_spread == pytest.approx(20)


def test_optimizers_are_judged_by_their_state() -> None:
    case = BY_NAME["MLP tanh"]
    model = case.model()
    objective = Objective(model, case.loss, case.data())
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.0, 0.9), eps=1e-3)
    objective.model.zero_grad()
    x, y = case.data()
    case.loss(model(x), y).backward()
    g = torch.cat([p.grad.flatten() for p in model.parameters()])
    adam.step()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    settings = {"jacobi": False, "layers": False, "floor": 1e-9}
    found = measure_conditioning(objective, optimizers={"adam": adam, "sgd": sgd}, generator=generator(), **settings)
    H = HessianOperator(objective).to_dense()
    scale = (g.abs() + 1e-3).rsqrt()  # after one step v / (1 - beta2) is g^2
    sizes = torch.linalg.eigvalsh(scale[:, None] * H * scale).abs()
    sizes = sizes[sizes > 1e-9 * sizes.max()]
    assert {c.name: c.condition.value for c in found.preconditioned}["adam"] == pytest.approx(
        float(sizes.max() / sizes.min()), rel=1e-6
    )
    assert found.gains["sgd"].value == pytest.approx(1, rel=1e-9)
    with pytest.raises(InputError, match="Rprop"):
        measure_conditioning(objective, optimizers={"x": torch.optim.Rprop(model.parameters())}, generator=generator())


def test_steps_of_gradient_descent_suffice_and_are_needed() -> None:
    eigenvalues = torch.tensor([10.0, 3.0, 0.2]).double()
    whole = measure_conditioning(form(torch.diag(eigenvalues)), generator=generator()).whole
    steps = math.ceil(whole.steps(1e-3))
    error = (1 - eigenvalues / 10) ** steps
    assert float(error.max()) <= 1e-3
    assert float(((1 - eigenvalues / 10) ** (0.9 * steps)).max()) > 1e-3
    assert whole.steps_with_momentum(1e-3) == pytest.approx(50**0.5 * math.log(1e3) / 2)


# -- networks ---------------------------------------------------------------------------------------------------------


def test_gauss_newton_and_layers_against_dense() -> None:
    case = BY_NAME["MLP SiLU"]
    objective = Objective(case.model(), case.loss, case.data())
    found = measure_conditioning(objective, matrix="ggn", jacobi=False, floor=1e-7, generator=generator())
    G = GGNOperator(objective).to_dense()
    blocks = [block.take(block.take(G).T) for block in objective.space.blocks]
    for condition, dense in zip((found.whole, *found.layers), (G, *blocks), strict=True):
        sizes = torch.linalg.eigvalsh(dense).abs()
        sizes = sizes[sizes > 1e-7 * sizes.max()]
        assert condition.condition.value == pytest.approx(float(sizes.max() / sizes.min()), rel=1e-6)
        assert condition.rank.value == pytest.approx(len(sizes))


def test_normalisation_mends_inputs_of_unequal_scale() -> None:
    """Inputs on scales 1 to 30: without normalisation kappa is their square and more, with it they are alike."""
    torch.manual_seed(0)
    x = torch.randn(80, 4).double() * torch.tensor([1.0, 3.0, 10.0, 30.0])
    y = torch.randn(80, 1).double()
    plain = nn.Linear(4, 1).double()
    normalised = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)).double()
    found = compare_conditioning(
        Objective(plain, nn.MSELoss(), (x, y)),
        Objective(normalised, nn.MSELoss(), (x, y)),
        generator=generator(),
        jacobi=False,
    )
    ones = torch.ones(80, 1).double()
    expected = []
    for inputs in (x, (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()):
        z = torch.cat([inputs, ones], 1)
        sizes = torch.linalg.eigvalsh(z.T @ z)
        expected.append(float(sizes[-1] / sizes[0]))
    assert found.first.whole.condition.value == pytest.approx(expected[0], rel=1e-9)
    assert found.ratios["condition"].value == pytest.approx(expected[1] / expected[0], rel=1e-9)
    assert found.ratios["condition"].upper < 0.01
    json.dumps(found.to_dict(), allow_nan=False)


def test_arguments_and_figures() -> None:
    case = BY_NAME["MLP tanh"]
    objective = Objective(case.model(), case.loss, case.data())
    with pytest.raises(InputError, match="floor must be above 0"):
        measure_conditioning(objective, floor=0.0, generator=generator())
    with pytest.raises(InputError, match="matrix must be"):
        measure_conditioning(objective, matrix="fisher", generator=generator())  # type: ignore[arg-type]
    found = measure_conditioning(objective, block_diagonal=True, generator=generator())
    ax = plot_conditioning(found)
    assert len(ax.get_yticks()) == 1 + len(found.preconditioned) + len(found.layers)
    assert plot_effective_dimension(found).get_xscale() == "log"


def test_kfac_undoes_correlated_inputs_where_a_diagonal_cannot() -> None:
    """A linear map under squared error has Kronecker factors exactly; what is left is the noise of the draws."""
    torch.manual_seed(0)
    mixed = torch.randn(600, 3) @ torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.05, 0.0], [0.0, 0.0, 0.02]])
    objective = Objective(
        nn.Linear(3, 2, bias=False).double(), nn.MSELoss(), (mixed.double(), torch.zeros(600, 2).double())
    )
    found = measure_conditioning(objective, kfac=True, generator=torch.Generator().manual_seed(0))
    under = {c.name: c.condition for c in found.preconditioned}
    assert found.whole.condition.lower > 1000
    assert under["jacobi"].lower > 500
    assert under["kfac"].upper < 1.2
    assert [c.condition.upper < 1.2 for c in found.layers_under["kfac"]] == [True]
    assert found.layers_under["jacobi"][0].condition.lower > 500


def test_kfac_leaves_other_parameters_to_the_diagonal_and_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(40, 3).double(), torch.randint(0, 2, (40,))))
    found = measure_conditioning(objective, kfac=True, matrix="ggn", generator=torch.Generator().manual_seed(0))
    assert "K-FAC: 1.weight, 1.bias have no factors and their diagonal instead." in found.notes
    ggn = GGNOperator(objective).to_dense()
    at = objective.space.blocks[1].slices[0]
    d = ggn.diagonal()[at]
    expected = torch.linalg.eigvalsh(ggn[at, at] / (d[:, None] * d).sqrt())
    norm = found.layers_under["kfac"][1]
    torch.testing.assert_close(norm.largest.value, float(expected[-1]), rtol=1e-6, atol=0)
    captions = [table.caption for table in _conditions(found).tables]
    assert captions[1:] == [
        f"{what} of each layer's block, without and under each preconditioner."
        for what in ("Condition number", "Effective rank")
    ]
