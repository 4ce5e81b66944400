"""The diagonal of the Hessian layer by layer, against dense Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analysis.inspection import diagonal
from analysis.inspection.diagonal import layer_diagonals
from analysis.inspection.figures_layers import plot_layer_diagonals
from analysis.inspection.measure import inspect_model
from analysis.inspection.plan import InspectionPlan
from curvature import EigenPairs, HessianOperator, Objective, eigsh
from curvature.linalg.base import places
from curvature.linop import to_dense
from curvature.spectra import spectrum_plan


class Softmax(nn.Softmax):
    """Curved, and no function of single entries."""

    def __init__(self) -> None:
        super().__init__(-1)


def objective(activation: type[nn.Module], width: int = 6) -> Objective:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, width), activation(), nn.Linear(width, 3)).double()
    data = torch.randn(30, 5, dtype=torch.float64), torch.randint(0, 3, (30,))
    return Objective(model, nn.CrossEntropyLoss(), data)


def exact_rows(o: Objective) -> list[Tensor]:
    diagonal = to_dense(HessianOperator(o)).diagonal()
    return [block.take(diagonal) for block in o.space.blocks]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_exact_where_columns_give_it() -> None:
    o = objective(nn.Tanh)
    found = layer_diagonals(o, generator=generator())
    assert found.exact
    assert "columns propagated" in found.how
    for row, entries in zip(found.rows, exact_rows(o), strict=True):
        assert row.mean == pytest.approx(float(entries.mean()), rel=1e-10)
        assert row.quantiles == pytest.approx(entries.quantile(torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95]).double()))
        assert row.share_negative == pytest.approx(float((entries < 0).double().mean()))
    assert found.trace == pytest.approx(float(sum(entries.sum() for entries in exact_rows(o))), rel=1e-10)


def test_estimated_elsewhere_with_the_reason() -> None:
    o, told = objective(Softmax), []
    found = layer_diagonals(o, num_matvecs=20, generator=generator(), progress=lambda *news: told.append(news))
    assert not found.exact
    assert "Softmax" in found.how
    assert told[-1] == ("the diagonal", 20, 20)


def test_estimated_layer_traces_are_as_sure_as_they_say() -> None:
    o = objective(Softmax)
    exact = torch.stack([entries.sum() for entries in exact_rows(o)])
    scores = []
    for seed in range(60):
        traces = layer_diagonals(o, num_matvecs=12, generator=generator(seed)).traces.values()
        scores.append([(t.value - float(e)) / t.stderr for t, e in zip(traces, exact, strict=True)])
    spread = torch.tensor(scores).square().mean().sqrt()
    assert 0.6 < float(spread) < 1.5


def test_what_does_not_fit_into_memory_is_held_on_disk_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, found, files = InspectionPlan(k=1, num_bottom=1, num_probes=2, num_steps=4), [], []
    file = places.tempfile.TemporaryFile
    monkeypatch.setattr(places.tempfile, "TemporaryFile", lambda: (files.append(file()), files[-1])[1])
    for free in (1 << 40, 0):
        monkeypatch.setattr(spectrum_plan, "available_memory", lambda _, free=free: free)
        monkeypatch.setattr(diagonal, "available_memory", lambda _, free=free: free)
        o = objective(Softmax, width=30)
        assert ("on disk" in plan.price(o).text) is (free == 0)
        found.append(inspect_model(o, plan, generator=generator()))
        assert (len(files) > 0) is (free == 0)
    here, there = found
    assert torch.equal(here.top.eigenvalues, there.top.eigenvalues)
    assert [layer.trace.value for layer in here.layers] == [layer.trace.value for layer in there.layers]
    assert here.diagonal is not None
    assert there.diagonal is not None
    assert "hutchinson" in there.diagonal.how
    traces = [torch.tensor([t.value for t in d.diagonal.traces.values()]) for d in found]  # type: ignore[union-attr]
    errors = torch.tensor([t.stderr for t in there.diagonal.traces.values()])
    assert bool(((traces[0] - traces[1]).abs() < 5 * errors).all())


@pytest.mark.parametrize("deflated", [False, True])
def test_known_eigenpairs_cost_nothing(deflated: bool) -> None:
    o = objective(Softmax)
    top: EigenPairs | None = eigsh(o, 3, rtol=1e-8, generator=generator()) if deflated else None
    found = layer_diagonals(o, top=top, num_matvecs=10_000, generator=generator())
    assert found.exact  # as many products as parameters
    assert found.trace == pytest.approx(float(sum(entries.sum() for entries in exact_rows(o))), rel=1e-8)


@pytest.mark.parametrize(("activation", "exact"), [(nn.Tanh, True), (Softmax, False)])
def test_inspection_plans_what_the_diagonal_takes(activation: type[nn.Module], exact: bool) -> None:
    found = inspect_model(objective(activation), k=2, num_probes=2, num_steps=4, generator=generator())
    assert found.diagonal is not None
    assert found.diagonal.exact is exact
    stage = next(stage for stage in found.cost.stages if stage.name == "the diagonal")
    assert stage.planned == stage.num_matvecs == (0 if exact else 24)


def test_figure_says_where_entries_are_noisy() -> None:
    for activation, words in ((nn.Tanh, "diagonal entries of the Hessian"), (Softmax, "widened by their noise")):
        ax = plot_layer_diagonals(layer_diagonals(objective(activation), generator=generator()))
        assert ax.get_xlabel().endswith(words)
        assert [label.get_text() for label in ax.get_yticklabels()] == ["0", "2"]
        assert [text.get_text() for text in ax.get_legend().get_texts()] == [
            "5 to 95 %",
            "middle half",
            "median",
            "mean",
        ]


def test_figure_of_no_curvature_can_be_drawn() -> None:
    model = nn.Linear(2, 1)
    flat = Objective(model, None, (torch.ones(1, 2), torch.ones(1)), forward=lambda m, b: m(b[0]).mean())
    found = layer_diagonals(flat, generator=generator())
    assert found.trace == 0
    plot_layer_diagonals(found).figure.draw_without_rendering()  # type: ignore[union-attr]
