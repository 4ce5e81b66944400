"""The inspection against closed forms, and its uncertainties against what they claim."""

from __future__ import annotations

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from analysis.inspection.measure import inspect_model
from analysis.inspection.parts import parts_of
from analysis.inspection.plan import InspectionPlan
from analysis.inspection.results import Inspection
from analysis.run import preparation
from analysis.run.preparation import in_groups
from curvature import HessianOperator, Objective
from curvature.errors import InputError, NonFiniteError
from curvature.layerwise import blocks

SPECTRUM = [9.0, 4.0, 1.0, 0.25, 0.0]


def quadratic(eigenvalues: Tensor, num_layers: int = 1) -> Objective:
    """Return an objective whose Hessian in each of `num_layers` layers is Q diag(eigenvalues) Q', and zero across them.

    With the rows of x as data, |x w|^2 / N has the Hessian 2 x'x / N; negative eigenvalues come from a sign per row.
    """
    n = len(eigenvalues)
    Q, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    x = (eigenvalues.abs() * n / 2).sqrt()[:, None] * Q.T
    signs = eigenvalues.sign()[:, None]

    class Layers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for i in range(num_layers):
                self.add_module(f"layer{i}", nn.Linear(n, 1, bias=False).double())

        def forward(self, inputs: Tensor) -> Tensor:
            return torch.cat([layer(inputs) for layer in self.children()], dim=1)

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (targets * outputs.square()).sum(dim=1).mean()

    return Objective(Layers(), loss, (x, signs))


def inspect(objective: Objective, seed: int = 0, **settings: int | float | bool) -> Inspection:
    return inspect_model(objective, generator=torch.Generator().manual_seed(seed), **settings)  # type: ignore[arg-type]


def wide_spectrum() -> Tensor:
    """Return 600 eigenvalues as a trained network has them: outliers, a bulk next to zero, some negative."""
    bulk = torch.linspace(-1, 3, 594, dtype=torch.float64)
    return torch.cat([torch.tensor([60.0, 50.0, 40.0, 30.0, 25.0, 20.0], dtype=torch.float64), 0.1 * bulk**3])


def test_linear_regression_in_closed_form() -> None:
    """L = mean |x w - y|^2: everything is known from x'x."""
    x = torch.randn(40, 5, dtype=torch.float64)
    y = torch.randn(40, 1, dtype=torch.float64)
    model = nn.Linear(5, 1, bias=False).double()
    found = inspect(Objective(model, nn.MSELoss(), [(x[:30], y[:30]), (x[30:], y[30:])]), k=2, num_bottom=2)
    w = model.weight.detach().T
    eigenvalues = torch.linalg.eigvalsh(2 * x.T @ x / 40).flip(0)
    assert found.exact
    assert found.loss == pytest.approx(float((x @ w - y).square().mean()), rel=1e-12)
    assert found.gradient_norm == pytest.approx(float((2 * x.T @ (x @ w - y) / 40).norm()), rel=1e-12)
    assert (found.num_params, found.total_weight) == (5, 40)
    torch.testing.assert_close(found.top.eigenvalues, eigenvalues[:2], rtol=1e-12, atol=0)
    torch.testing.assert_close(found.bottom.eigenvalues, eigenvalues[-2:], rtol=1e-12, atol=0)
    assert float(found.trace.value) == pytest.approx(float(eigenvalues.sum()), rel=1e-12)
    assert float(found.trace.stderr) == 0
    assert found.mean_absolute_eigenvalue.value == pytest.approx(float(eigenvalues.mean()), rel=1e-12)
    assert found.effective_condition.value == pytest.approx(float(eigenvalues[0] / eigenvalues.mean()), rel=1e-12)
    assert found.negative_share.value == 0
    assert found.max_stable_lr.value == pytest.approx(2 / float(eigenvalues[0]), rel=1e-12)
    assert found.cost.num_matvecs == 5
    assert found.layers == ()  # one module owns all parameters


def test_layers_in_closed_form() -> None:
    eigenvalues = torch.tensor([*SPECTRUM, -2.0], dtype=torch.float64)
    found = inspect(quadratic(eigenvalues, num_layers=3))
    assert [layer.name for layer in found.layers] == ["layer0", "layer1", "layer2"]
    for layer in found.layers:
        assert layer.exact
        assert layer.converged
        assert (layer.num_params, layer.num_matvecs) == (6, 6)
        assert layer.top == pytest.approx(9.0, rel=1e-10)
        assert layer.bottom == pytest.approx(-2.0, rel=1e-10)
        assert layer.top_residual < 1e-10
        assert layer.trace.value == pytest.approx(12.25, rel=1e-10)
        assert layer.trace.stderr == 0
        assert layer.effective_condition.value == pytest.approx(9 / (16.25 / 6), rel=1e-10)
        assert layer.negative_share.value == pytest.approx(2 / 16.25, rel=1e-10)
    assert sum(layer.gradient_norm**2 for layer in found.layers) == pytest.approx(found.gradient_norm**2, rel=1e-10)
    assert float(found.trace.value) == pytest.approx(sum(layer.trace.value for layer in found.layers), rel=1e-10)


def test_estimates_hold_their_uncertainties() -> None:
    """The estimated route, in a size where it is taken: residuals bound the errors of eigenvalues, stderr the rest."""
    eigenvalues = wide_spectrum()
    found = inspect(quadratic(eigenvalues), k=6)
    exact = eigenvalues.sort(descending=True).values
    assert not found.exact
    assert found.top.status.ok
    assert ((found.top.eigenvalues - exact[:6]).abs() <= found.top.residual_norms).all()
    assert (found.top.residual_norms <= 1e-3 * found.top.eigenvalues).all()
    # an eigenvalue lies within the residual, not necessarily the one of this rank
    gaps = (found.bottom.eigenvalues[:, None] - exact).abs().min(dim=1).values
    assert (gaps <= found.bottom.residual_norms + 1e-12).all()
    assert found.lowest.value < 0
    for measured, truth in (
        (found.mean_absolute_eigenvalue, exact.abs().mean()),
        (found.effective_condition, exact[0] / exact.abs().mean()),
        (found.negative_share, -exact.clamp_max(0).sum() / exact.abs().sum()),
    ):
        assert abs(measured.value - float(truth)) < 5 * measured.stderr
        assert measured.stderr < 0.25 * measured.value


def test_error_bars_have_the_right_size() -> None:
    """z-scores of 30 independent runs; with 8 probes they follow Student's t with 7 degrees of freedom, rms 1.18."""
    eigenvalues = wide_spectrum()
    objective, exact = quadratic(eigenvalues), float(eigenvalues.sum())
    z = []
    for seed in range(30):
        found = inspect(objective, seed, k=6, num_bottom=1, num_probes=8, num_steps=6)
        z.append((float(found.trace.value) - exact) / float(found.trace.stderr))
    scores = torch.tensor(z)
    assert abs(float(scores.mean())) < 4 * 1.18 / 30**0.5
    assert 0.7 < float(scores.square().mean().sqrt()) < 1.9


def test_the_outliers_take_the_variance_with_them() -> None:
    """The trace is better known than from the same probes without deflation, whose error is sqrt(2 / 4) |A|_F."""
    eigenvalues = wide_spectrum()
    found = inspect(quadratic(eigenvalues), k=6)
    assert float(found.trace.stderr) < 0.25 * (2 / 4) ** 0.5 * float(eigenvalues.norm())


def test_products_are_counted_and_announced() -> None:
    objective = quadratic(wide_spectrum(), num_layers=2)
    told: list[tuple[str, int, int]] = []
    found = inspect_model(
        objective,
        num_probes=3,
        num_steps=10,
        generator=torch.Generator().manual_seed(0),
        progress=lambda *news: told.append(news),
    )
    cost = found.cost
    assert sum(stage.num_matvecs for stage in cost.stages) == cost.num_matvecs + cost.num_layer_matvecs
    assert [stage.name for stage in cost.stages] == ["the whole Hessian", "layer by layer", "the diagonal"]
    assert cost.num_matvecs == found.density.num_matvecs + cost.stages[2].num_matvecs
    assert cost.num_layer_matvecs == sum(layer.num_matvecs for layer in found.layers)
    assert told[-1][1:] == (cost.num_matvecs + cost.num_layer_matvecs,) * 2
    assert all(before[1] < after[1] or before[2] > after[2] for before, after in pairwise(told))
    assert all(done <= planned for _, done, planned in told)


def test_estimate_is_what_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = quadratic(wide_spectrum(), num_layers=2)
    plan = InspectionPlan()
    (whole, of_layers), price = plan.total_matvecs(objective), plan.price(objective)
    cost = inspect(objective).cost
    assert 0.5 < whole / cost.num_matvecs < 2
    assert 0.5 < of_layers / cost.num_layer_matvecs < 2
    assert price.text.startswith(f"about {whole} Hessian products at ")  # blocks come with the diagonal
    monkeypatch.setattr(blocks, "_MOST", 1000)
    text = plan.price(objective).text
    assert text.startswith(f"about {whole} Hessian products and {of_layers} with single layers at ")
    assert (price.total, price.unit) == (whole + of_layers, "products")
    assert price.seconds > 0
    assert float(price.text.rpartition("up to ")[2].split(" ")[0]) > 8 * 1200 * 100 / 2**20  # MiB: the vectors alone


def test_same_seed_same_numbers() -> None:
    first, second, other = (inspect(quadratic(wide_spectrum()), seed) for seed in (3, 3, 4))
    assert torch.equal(first.density.nodes, second.density.nodes)
    assert first.negative_share == second.negative_share
    assert not torch.equal(first.density.nodes, other.density.nodes)


def test_no_curvature_at_all() -> None:
    found = inspect(quadratic(torch.zeros(4, dtype=torch.float64)))
    assert found.sharpness.value == 0
    assert math.isnan(found.effective_condition.value)
    assert math.isnan(found.negative_share.value)
    assert math.isinf(found.max_stable_lr.value)
    assert found.to_dict()["negative_share"].items() >= {"value": None, "stderr": None, "data_stderr": None}.items()


def test_extreme_eigenvalues_are_listed_once() -> None:
    found = inspect(quadratic(torch.tensor(SPECTRUM, dtype=torch.float64)), k=4, num_bottom=3)
    ranks, values, *_ = zip(*found.extreme_eigenvalues(), strict=True)
    assert ranks == (1, 2, 3, 4, 5)
    assert values == pytest.approx(SPECTRUM, abs=1e-12)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("k", 0), ("num_bottom", 0), ("num_probes", 1), ("num_steps", 3), ("rtol", 0.0), ("rtol", 2.0)],
)
def test_settings_out_of_range(setting: str, value: float) -> None:
    with pytest.raises(InputError, match=f"{setting} must .*got {value}"):
        inspect(quadratic(torch.ones(3, dtype=torch.float64)), **{setting: value})


def test_a_loss_that_is_not_finite() -> None:
    objective = quadratic(torch.ones(3, dtype=torch.float64))
    with torch.no_grad():
        objective.model.layer0.weight[0, 1] = torch.inf  # type: ignore[union-attr, index]
    with pytest.raises(NonFiniteError, match="weight"):
        inspect(objective)


def test_pairs_of_many_layers_are_left_as_they_come_and_said_to_be() -> None:
    """The price holds what continuing them takes; without it, what is spent on layers is what was planned."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer for _ in range(3) for layer in (nn.Linear(12, 12), nn.Tanh())), nn.Linear(12, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(40, 12), torch.randint(3, (40,))))
    settings = InspectionPlan(num_probes=2, num_steps=10, k=2, num_bottom=1)
    sizes = [block.num_params for block in objective.space.blocks]
    layer = settings.layer(objective)
    assert "not continued" not in settings.price(objective).text
    assert settings.total_matvecs(objective)[1] == sum(layer.num_matvecs(n) + layer.num_search(n) for n in sizes)
    settings = dataclasses.replace(settings, most_layers=3)
    assert "the eigenvalues of 4 layers are not continued (--most-layers 4 does it)" in settings.price(objective).text
    found = inspect_model(objective, settings, generator=0)
    assert found.cost.num_layer_matvecs == settings.total_matvecs(objective)[1]
    assert sum("The 4 layers, more than 3, are inspected, and" in note for note in found.notes) == 1
    exact = torch.linalg.eigvalsh(HessianOperator(objective.restrict("0.*")).to_dense())
    assert abs(found.layers[0].top - float(exact[-1])) <= 1.1 * found.layers[0].top_residual + 1e-6


class _Blocks(nn.Module):
    """A table, two blocks of two layers each, and a head: six layers, four parts."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)])
        self.head = nn.Linear(4, 3)

    def forward(self, words: Tensor) -> Tensor:
        x = self.table(words)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)  # type: ignore[no-any-return]


def test_many_layers_are_taken_in_the_modules_that_hold_them() -> None:
    """Each part is the diagonal block of its parameters, and the parts are all parameters, in order."""
    torch.manual_seed(0)
    objective = Objective(_Blocks().double(), nn.CrossEntropyLoss(), (torch.arange(40) % 5, torch.arange(40) % 3))
    layers = [block.name for block in objective.space.blocks]
    assert len(layers) == 6
    assert [part.name for part in parts_of(objective, 6)] == layers
    parts = parts_of(objective, 5)
    assert [part.name for part in parts] == ["table", "blocks.0", "blocks.1", "head"]
    assert [i for part in parts for i in part.positions] == list(range(len(objective.space.names)))
    assert [part.name for part in parts_of(objective, 3)] == ["table", "blocks", "head"]
    assert [part.name for part in parts_of(objective, 2)] == layers  # no cut makes two
    settings = InspectionPlan(most_layers=5)
    assert "the eigenvalues of 6 layers, taken in 4 parts, are not continued" in settings.price(objective).text
    found = inspect_model(objective, settings, generator=0)
    assert [layer.name for layer in found.layers] == [part.name for part in parts]
    assert found.diagonal is not None
    assert [row.name for row in found.diagonal.rows] == layers
    exact = HessianOperator(objective.restrict("blocks.0.*")).to_dense()
    of_block = found.layers[1]
    assert of_block.num_params == len(exact) == 40
    assert of_block.top == pytest.approx(float(torch.linalg.eigvalsh(exact)[-1]), rel=1e-8)
    assert of_block.trace.value == pytest.approx(float(exact.trace()), rel=1e-8)
    assert any("in 4 parts, the modules that hold them" in note for note in found.notes)


@pytest.mark.parametrize(("num_batches", "vectors", "groups"), [(1, 100, 16), (1, 5, 5), (1, 1, 4), (3, 1, 6)])
def test_long_vectors_come_in_fewer_groups_of_the_data(
    num_batches: int, vectors: int, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A product writes a vector for each, so there are as many as hold so many numbers together, but 4 at least."""
    x, y = torch.randn(64 * num_batches, 3), torch.randn(64 * num_batches, 2)
    data = list(zip(x.split(64), y.split(64), strict=True))
    objective = Objective(nn.Linear(3, 2), nn.MSELoss(), data)
    monkeypatch.setattr(preparation, "_GROUPED", vectors * objective.num_params)
    cut = in_groups(objective)
    torch.testing.assert_close(cut.gradient(), objective.gradient())
    assert cut.num_batches == groups
