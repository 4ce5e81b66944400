"""Measures of sharpness against quadratics solved by hand, dense matrices, and a network written in two ways."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from analysis.sharpness.ascent import perturbation_scale, worst_case
from analysis.sharpness.computations import (
    average_rise,
    logit_normalised,
    relative_flatness,
    tolerated,
    tolerated_noise,
)
from analysis.sharpness.figures import plot_sharpness
from analysis.sharpness.measure import SHARPNESS_MEASURES, SharpnessPlan, measure_sharpness, measures_for
from analysis.sharpness.study import _report
from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from curvature.objective.shift import PointLoss
from curvature.results.intervals import mean_interval
from tests.cases import BY_NAME
from tests.checks import assert_close, assert_untouched

QUICK = SharpnessPlan(num_steps=6, num_probes=3, num_matvecs=400, piece=20)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def quadratic(n: int = 5, offset: float = 0.0) -> tuple[Objective, Tensor]:
    """Return L = |X (w - w*)|^2 / N at w* + offset, and its Hessian."""
    g = generator(3)
    X, w = torch.randn(9, n, generator=g).double(), torch.randn(1, n, generator=g).double()
    model = nn.Linear(n, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w + offset)
    return Objective(model, nn.MSELoss(), (X, X @ w.T)), 2 * X.T @ X / 9


def network(factor: float | Tensor = 1.0) -> Objective:
    """Return a ReLU network whose first layer, or units, are multiplied by factors that the second is divided by."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)).double()
    with torch.no_grad():
        model[0].weight.mul_(factor[:, None] if isinstance(factor, Tensor) else factor)
        model[0].bias.mul_(factor)
        model[2].weight.div_(factor)
    g = generator(5)
    x, y = torch.randn(50, 5, generator=g).double(), torch.randint(4, (50,), generator=g)
    return Objective(model, nn.CrossEntropyLoss(), (x, y))


# -- a network written in two ways ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables():
    """Of the network, rescaled by layers, and by units, each with an a of its own."""
    factors = (1.0, 5.0, torch.logspace(-1, 1, 6, dtype=torch.float64))
    return [measure_sharpness(network(factor), QUICK, generator=generator()) for factor in factors]


@pytest.mark.parametrize("name", SHARPNESS_MEASURES)
def test_rescaling_moves_what_it_is_said_to_move(tables, name: str) -> None:
    before, by_layer, by_unit = (table[name] for table in tables)
    assert math.isfinite(before.value)
    for after, stays in ((by_layer, before.rescaling_invariant), (by_unit, before.unit_invariant)):
        ratio = after.value / before.value
        if stays:
            assert ratio == pytest.approx(1, abs=1e-6)
        else:
            assert abs(ratio - 1) > 0.01


def plain_loss(theta: Tensor, rows: slice = slice(None)) -> Tensor:
    """Return the loss of `network()` at flat parameters, written out."""
    x, y = next(iter(network().batches()))
    W1, b1, W2, b2 = (part for part in theta.split([30, 6, 24, 4]))
    hidden = torch.relu(x[rows] @ W1.reshape(6, 5).T + b1)
    return nn.functional.cross_entropy(hidden @ W2.reshape(4, 6).T + b2, y[rows])


def one_step(theta: Tensor, d: Tensor, rows: slice = slice(None)) -> float:
    """Return the rise of L(d * .) at SAM's point, rho = 0.05."""
    at = theta.clone().requires_grad_()
    base = plain_loss(at, rows)
    (g,) = torch.autograd.grad(base, at)
    h = d * g
    return float(plain_loss(theta + 0.05 * d * h / h.norm(), rows) - base.detach())


def test_all_that_rescaling_moves_moves_as_the_change_of_variables_says(tables) -> None:
    """With theta' = theta / d the rescaled loss is L(d * theta'), here by plain formulas of the unscaled network."""
    moved, objective, five = tables[1], network(), network(5.0)
    n, theta = objective.num_params, objective.space.current()
    d = torch.cat([torch.full((36,), 1 / 5, dtype=torch.float64), torch.full((24,), 5.0), torch.ones(4)])
    base = float(plain_loss(theta))
    assert float(plain_loss(d * five.space.current())) == pytest.approx(base, rel=1e-14)
    H, G = (d[:, None] * A(objective).to_dense() * d for A in (HessianOperator, GGNOperator))
    parts = [slice(0, 20), slice(20, 40), slice(40, 50)]
    exact = {
        "trace": H.trace(),
        "frobenius_norm": H.norm(),
        "log_volume": torch.linalg.slogdet(torch.eye(n) + G / QUICK.damping).logabsdet / 2,
        "sam": one_step(theta, d),
        "m_sharpness": sum(w * one_step(theta, d, rows) for w, rows in zip((0.4, 0.4, 0.2), parts, strict=True)),
    }
    close = {"top_eigenvalue": torch.linalg.eigvalsh(H)[-1]}
    for name, value in {**exact, **close}.items():
        assert moved[name].value == pytest.approx(float(value), rel=1e-9 if name in exact else 1e-5), name

    z = torch.randn(n, 3, generator=generator(), dtype=torch.float64)
    ones = torch.ones(n, dtype=torch.float64)

    def mean_rise(sigma: float) -> float:
        return sum(float(plain_loss(theta + s * sigma * d * column)) - base for column in z.T for s in (1, -1)) / 6

    found = average_rise(five, ones, rho=0.05, num_probes=3, generator=generator())
    assert found.value == pytest.approx(mean_rise(0.05 / n**0.5), rel=1e-8)
    noise = tolerated_noise(five, ones, rise=0.1, num_probes=3, generator=generator())
    assert mean_rise(noise.details["sigma"]) == pytest.approx(0.1, rel=0.02)

    for ball, rho in (("l2", 0.05), ("linf", 0.05 / n**0.5)):
        there = worst_case(five, rho=rho, ball=ball, generator=generator())  # type: ignore[arg-type]
        here = worst_case(objective, rho=rho, ball=ball, scale=d, generator=generator())  # type: ignore[arg-type]
        assert there.rises == pytest.approx(here.rises, rel=1e-6)
        assert float(plain_loss(theta + d * there.perturbation)) - base == pytest.approx(there.rise, rel=1e-9)

    at = theta.clone().requires_grad_()
    (g,) = torch.autograd.grad(plain_loss(at), at)
    corner = 1e-3 * ((theta / d).abs() + 1) * d * g.sign()  # so small a box is left at the corner that g points to
    rise = 100 * (float(plain_loss(theta + corner)) - base) / (1 + base)
    assert 0.98 * rise < moved["keskar"].value < 1.001 * rise
    tested = {*exact, *close, "average", "pac_bayes", "worst_l2", "worst_linf", "keskar"}
    assert tested == {row.name for row in moved.rows if not row.rescaling_invariant}


def test_the_search_for_noise_is_cheap_and_finds_the_root() -> None:
    objective, H = quadratic()
    z = torch.randn(5, 16, generator=generator(), dtype=torch.float64)
    expected = float(((H @ z) * z).sum(0).mean()) / 2 / 0.1  # L = u'Hu / 2, so that 1 / sigma^2 is known
    found = tolerated_noise(objective, torch.ones(5).double(), rise=0.1, num_probes=16, generator=generator())
    error = found.details["sigma_stderr"] / found.details["sigma"]
    assert found.value == pytest.approx(expected, rel=0.03 * error)
    assert found.num_losses <= 32 * 6 + 1
    steep = tolerated_noise(objective, 1e8 * torch.ones(5).double(), rise=0.1, num_probes=16, generator=generator())
    assert steep.value == pytest.approx(1e16 * expected, rel=0.03 * error)


def test_noise_under_a_step_is_bracketed() -> None:
    """A loss that jumps has no sigma of just this rise; the search ends at the jump."""
    model = nn.Linear(1, 1, bias=False).double()
    with torch.no_grad():
        model.weight.fill_(1.0)
    loss = lambda z, y: (z.sum() * 0 + 1.0 * ((z - y).abs() > 0.5).double()).mean()  # noqa: E731
    objective = Objective(model, loss, (torch.ones(1, 1).double(), torch.ones(1, 1).double()), weight=lambda _: 1.0)
    found = tolerated_noise(objective, torch.ones(1).double(), rise=0.6, num_probes=2, generator=generator())
    z = torch.randn(1, 2, generator=generator(), dtype=torch.float64).abs()
    assert found.details["sigma"] == pytest.approx(0.5 / float(z.min()), rel=1e-4)  # both pairs beyond 1/2


def test_idle_ascents_end_early() -> None:
    objective = network()
    settings = {"rho": 0.5, "num_steps": 60, "num_restarts": 1}
    full = worst_case(objective, **settings, generator=generator())
    short = worst_case(objective, **settings, rtol=1e-3, generator=generator())
    assert short.num_gradients < full.num_gradients
    assert 0.98 * full.rise < short.rise <= full.rise
    with pytest.raises(InputError, match="rtol must be in"):
        worst_case(objective, rho=1.0, rtol=1.0, generator=generator())


# -- dense references -------------------------------------------------------------------------------------------------


def test_curvature_measures_are_those_of_dense_matrices(tables) -> None:
    table, objective = tables[0], network()
    theta = objective.space.current()
    H, G = HessianOperator(objective).to_dense(), GGNOperator(objective).to_dense()
    scaled = theta.abs()[:, None] * H * theta.abs()
    expected = {
        "top_eigenvalue": torch.linalg.eigvalsh(H)[-1],
        "trace": H.trace(),
        "frobenius_norm": H.norm(),
        "adaptive_top_eigenvalue": torch.linalg.eigvalsh(scaled)[-1],
        "adaptive_trace": (theta.square() * H.diagonal()).sum(),
        "fisher_rao": theta @ G @ theta,
        "log_volume": torch.linalg.slogdet(torch.eye(len(G)) + G / QUICK.damping).logabsdet / 2,
    }
    for name, value in expected.items():
        loose = "top" in name  # Lanczos stops at a residual, whose square is in the value
        assert table[name].value == pytest.approx(float(value), rel=1e-6 if loose else 1e-9), name
        assert table[name].kind in ("exact", "residual"), name


def test_fisher_rao_norm_of_a_homogeneous_network_follows_from_its_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(3, (20,))
    row = measure_sharpness(
        Objective(model, nn.CrossEntropyLoss(), (x, y)), measures=["fisher_rao"], generator=generator()
    )
    f = model(x).detach()
    p = f.softmax(1)
    expected = 4 * ((p * f.square()).sum(1) - (p * f).sum(1).square()).mean()  # layers^2 E f'(diag p - pp') f
    assert row["fisher_rao"].value == pytest.approx(float(expected), rel=1e-12)


@pytest.mark.parametrize("name", ["MLP SiLU", "GroupNorm", "attention by hand"])
def test_relative_flatness_is_the_double_sum_over_units(name: str) -> None:
    case = BY_NAME[name]
    objective = Objective(case.model(), case.loss, case.data())
    H = HessianOperator(objective).to_dense()
    found = relative_flatness(objective, num_matvecs=200, generator=generator())
    for layer, W in objective.space.tensors.items():
        if W.ndim < 2:
            assert layer not in found.details
            continue
        block = objective.space.block({layer: W})
        W = W.detach().reshape(len(W), -1)
        d, m = W.shape
        inside = block.take(block.take(H).T).reshape(d, m, d, m)
        expected = torch.einsum("ij,kj,iaka->", W, W, inside)
        assert found.details[layer] == pytest.approx(float(expected), rel=1e-9, abs=1e-12), layer
    assert found.stderr == 0


# -- worst case -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["raw", "elementwise", "layer"])
def test_worst_case_in_a_ball_at_a_quadratic_minimum_is_the_top_eigenvalue(kind) -> None:
    objective, H = quadratic()
    c = perturbation_scale(objective, kind)
    found = worst_case(objective, rho=0.3, scale=c, num_steps=200, generator=generator())
    expected = 0.045 * torch.linalg.eigvalsh(c[:, None] * H * c)[-1]
    assert found.rise == pytest.approx(float(expected), rel=1e-8)
    assert float((found.perturbation / c).norm()) == pytest.approx(0.3)


@pytest.mark.parametrize("offset", [0.0, 0.2])
def test_worst_case_in_a_cube_is_at_a_corner(offset: float) -> None:
    objective, H = quadratic(offset=offset)
    g = objective.gradient()
    corners = 0.1 * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5))).double()
    expected = float((corners @ g + ((corners @ H) * corners).sum(1) / 2).max())
    found = worst_case(objective, rho=0.1, ball="linf", num_restarts=6, generator=generator())
    assert found.rise == pytest.approx(expected, rel=1e-10)


def test_worst_case_of_a_concave_loss_is_found_inside_the_ball() -> None:
    """-|x - a|^2: the maximum is a itself, which no step to the rim finds."""
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.zero_()
    a = torch.tensor([[0.1, -0.2, 0.05]]).double()
    loss = lambda z, y: -(z - y).square().sum()  # noqa: E731
    objective = Objective(model, loss, (torch.eye(3).double(), a.T), weight=lambda _: 1.0)
    found = worst_case(objective, rho=1.0, num_steps=60, generator=generator())
    assert found.rise == pytest.approx(float(a.square().sum()), rel=1e-2)
    assert found.rise <= float(a.square().sum())


def test_sam_and_its_pieces_are_rises_at_one_step() -> None:
    objective, H = quadratic(offset=0.3)
    g = objective.gradient()
    d = 0.05 * g / g.norm()
    table = measure_sharpness(objective, replace(QUICK, measures=["sam", "m_sharpness"]), generator=generator())
    assert table["sam"].value == pytest.approx(float(d @ g + d @ H @ d / 2), rel=1e-9)
    assert table["m_sharpness"].value == pytest.approx(table["sam"].value, rel=1e-12)  # one piece holds all
    x, y = next(iter(objective.batches()))
    small = measure_sharpness(objective, measures=["m_sharpness"], piece=4, generator=generator())
    rises = []
    for rows, targets in zip(x.split(4), y.split(4), strict=True):
        r = rows @ objective.model.weight.detach().T - targets
        g, A = 2 * (rows.T @ r).flatten() / len(rows), 2 * rows.T @ rows / len(rows)
        d = 0.05 * g / g.norm()
        rises.append(float(d @ g + d @ A @ d / 2))
    assert small["m_sharpness"].value == pytest.approx((4 * rises[0] + 4 * rises[1] + rises[2]) / 9, rel=1e-9)
    assert small["m_sharpness"].stderr > 0


def test_a_box_of_any_size_is_searched() -> None:
    """So small a rise that scipy's absolute tolerances would end the search at its start."""
    objective, _ = quadratic(offset=0.2)
    settings = SharpnessPlan(epsilon=1e-7, num_restarts=1)
    row = measure_sharpness(objective, replace(settings, measures=["keskar"]), generator=generator())["keskar"]
    slope = 1e-7 * ((objective.space.current().abs() + 1) * objective.gradient().abs()).sum()
    assert row.value == pytest.approx(100 * float(slope / (1 + objective.loss())), rel=1e-5)


def test_keskars_box_is_maximised() -> None:
    objective, H = quadratic(offset=0.2)
    reach = 0.05 * (objective.space.current().abs() + 1)
    g = objective.gradient()
    corners = reach * torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5))).double()
    rise = float((corners @ g + ((corners @ H) * corners).sum(1) / 2).max())
    settings = SharpnessPlan(epsilon=0.05, num_restarts=6)
    row = measure_sharpness(objective, replace(settings, measures=["keskar"]), generator=generator())["keskar"]
    assert row.value == pytest.approx(100 * rise / (1 + float(objective.loss())), rel=1e-6)
    assert row.kind == "lower bound"


# -- noise ------------------------------------------------------------------------------------------------------------


def test_error_bars_of_noise_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, H = quadratic()
    here = objective.space.current()

    def by_hand(_: Objective, point: Tensor, **_settings: object) -> PointLoss:  # a thousand times as fast
        return PointLoss(value=float((point - here) @ H @ (point - here) / 2), stderr=0.0)

    monkeypatch.setattr("analysis.sharpness.computations.loss_at", by_hand)
    c = perturbation_scale(objective, "elementwise")
    trace = float((c.square() * H.diagonal()).sum())
    average, tolerance = [], []
    for seed in range(300):
        found = average_rise(objective, c, rho=0.3, num_probes=16, generator=generator(seed))
        average.append((found.value - 0.09 / 10 * trace) / found.stderr)
    for seed in range(60):
        found = tolerated_noise(objective, c, rise=0.1, num_probes=24, generator=generator(seed))
        tolerance.append((found.value - trace / 0.2) / found.stderr)
    for scores, bound in ((torch.tensor(average), 0.25), (torch.tensor(tolerance), 0.6)):
        assert abs(float(scores.mean())) < 2 * bound  # few skewed samples: the bar follows the value
        assert 0.8 < float(scores.std()) < 1.5


def test_average_is_the_trace_in_the_limit() -> None:
    objective = network()
    c = torch.ones(objective.num_params, dtype=torch.float64)
    g = torch.randn(64, 200, generator=generator(), dtype=torch.float64)
    H = HessianOperator(objective).to_dense()
    expected = 1e-6 / 128 * ((H @ g) * g).sum(0).mean()
    found = average_rise(objective, c, rho=1e-3, num_probes=200, generator=generator())
    assert found.value == pytest.approx(float(expected), rel=1e-3)


def test_a_flat_loss_tolerates_all_noise() -> None:
    model = nn.Linear(3, 1).double()
    objective = Objective(model, nn.MSELoss(), (torch.zeros(4, 3).double(), torch.zeros(4, 1).double()))
    flat = objective.restrict("weight")
    table = measure_sharpness(flat, QUICK, generator=generator())
    for row in table.rows:
        if "normalised" not in row.name:
            assert row.value == 0, row.name


# -- the rest ---------------------------------------------------------------------------------------------------------


def test_normalised_logits_do_not_tell_confidence() -> None:
    objective = network()
    x, y = next(iter(objective.batches()))
    as_list = Objective(objective.model, nn.CrossEntropyLoss(), [x, y])
    values = []
    for scale in (1.0, 3.0):
        with torch.no_grad():
            for p in objective.model[2].parameters():
                p.mul_(scale)
        values += [float(logit_normalised(o).loss()) for o in (objective, as_list)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-12)
    z = objective.model(x).detach()
    z = z - z.mean(1, keepdim=True)
    assert values[0] == pytest.approx(float(nn.functional.cross_entropy(z / z.norm(dim=1, keepdim=True), y)), rel=1e-12)


def test_scales_have_the_length_of_the_parameters() -> None:
    case = BY_NAME["GroupNorm"]
    objective = Objective(case.model(), case.loss, case.data())
    theta = objective.space.current()
    for kind in ("elementwise", "filter", "layer"):
        c = perturbation_scale(objective, kind)  # type: ignore[arg-type]
        assert_close(c.norm(), theta.norm(), 1e-12)
    filters = objective.space.to_dict(perturbation_scale(objective, "filter"))["0.weight"]
    assert_close(filters[2, 0, 1, 1], objective.space.tensors["0.weight"][2].detach().square().mean().sqrt(), 1e-12)


def test_numbers_do_not_depend_on_company_and_the_model_is_left_alone() -> None:
    objective = network()
    with assert_untouched(objective.model):
        alone = measure_sharpness(objective, replace(QUICK, measures=["average"]), generator=generator())
        names = ["worst_linf", "average", "keskar", "pac_bayes"]
        many = measure_sharpness(objective, replace(QUICK, measures=names), generator=generator())
    assert alone["average"].value == many["average"].value
    assert [row.name for row in many.rows] == names
    assert all(row.num_losses + row.num_gradients > 0 for row in many.rows)


def test_what_cannot_be_measured_is_refused() -> None:
    objective, _ = quadratic()
    with pytest.raises(InputError, match="distinct names"):
        measure_sharpness(objective, measures=["flatness"], generator=generator())
    with pytest.raises(InputError, match="rho must be above 0"):
        SharpnessPlan(rho=0)
    with pytest.raises(InputError, match="num_probes must be at least 2"):
        SharpnessPlan(num_probes=1)
    with pytest.raises(InputError, match="scale must hold 5"):
        worst_case(objective, rho=1.0, scale=-torch.ones(5), generator=generator())
    with pytest.raises(InputError, match="ball must be"):
        worst_case(objective, rho=1.0, ball="l1", generator=generator())  # type: ignore[arg-type]
    scalar = Objective(
        objective.model,
        None,
        next(iter(objective.batches())),
        forward=lambda m, b: m(b[0]).square().mean(),
        weight=lambda b: float(len(b[0])),
    )
    with pytest.raises(InputError, match="loss="):
        logit_normalised(scalar)
    rows = measure_sharpness(scalar, QUICK, generator=generator()).rows
    assert "fisher_rao" not in [row.name for row in rows]


def test_a_penalty_in_the_loss_leaves_out_what_is_of_outputs_alone() -> None:
    model = nn.Linear(3, 2).double()
    data = (torch.randn(9, 3).double(), torch.randn(9, 2).double())

    def penalised(z: Tensor, t: Tensor) -> Tensor:
        return nn.functional.mse_loss(z, t) + model.weight.square().sum()

    objective = Objective(model, penalised, data)
    names = measures_for(objective)
    assert "log_volume" not in names
    assert "top_eigenvalue" in names
    assert {"log_volume", "fisher_rao"} <= set(measures_for(Objective(model, nn.MSELoss(), data)))
    with pytest.raises(InputError, match="beside the outputs"):
        measure_sharpness(objective, measures=("log_volume",), generator=torch.Generator().manual_seed(0))


def test_what_is_left_out_is_told_in_the_table_and_the_report() -> None:
    model = nn.Linear(3, 2).double()
    data = (torch.randn(9, 3).double(), torch.randn(9, 2).double())
    objective = Objective(model, lambda z, t: nn.functional.mse_loss(z, t) + model.weight.square().sum(), data)
    found = measure_sharpness(objective, QUICK, generator=torch.Generator().manual_seed(0))
    assert found.left_out == ("fisher_rao", "log_volume")
    assert "do not allow it: fisher rao, log volume." in _report(found).notes[0]
    asked = measure_sharpness(objective, measures=("sam",), generator=torch.Generator().manual_seed(0))
    assert asked.left_out == ()
    assert not any("do not allow" in note for note in _report(asked).notes)


def test_figures_and_records(tables) -> None:
    before, after, _ = tables
    json.dumps(before.to_dict(), allow_nan=False)
    ax = plot_sharpness(before)
    assert len(ax.get_yticks()) == len(SHARPNESS_MEASURES)
    ratio = plot_sharpness(after, reference=before)
    texts = [text.get_text() for text in ratio.texts]
    assert texts.count("1.00") >= 14
    with pytest.raises(InputError, match="was not measured"):
        before["nothing"]


def test_tolerated_noise_of_rises_with_heavy_tails_covers() -> None:
    """Of (sigma z)^4: 1 / sigma^2 is (E z^4 / rise)^(1/2), which 92.4 % of intervals of 15 degrees of freedom cover."""
    g, truth = torch.Generator().manual_seed(0), (3 / 0.1) ** 0.5
    covered = 0
    for _ in range(1000):
        w = torch.randn(16, generator=g, dtype=torch.float64) ** 4
        found = tolerated(lambda sigma, w=w: sigma**4 * w, rise=0.1, start=0.3)
        assert found.value == pytest.approx((float(w.mean()) / 0.1) ** 0.5, rel=1e-2)
        low, high = mean_interval(found.value, found.stderr, dof=found.dof, skewness=found.skewness)
        covered += low <= truth <= high
    assert 935 <= covered <= 990
