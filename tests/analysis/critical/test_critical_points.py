"""Points whose kind is known: quadratics, deep linear networks at zero, networks with symmetries."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import f as f_law
from torch import Tensor, nn

from analysis.critical.figures import plot_escape
from analysis.critical.measure import critical_points, gradient_p_value, noise_law
from analysis.critical.symmetries import rescaling_symmetries, try_rescaling
from curvature import HessianOperator, Objective
from curvature.errors import InputError
from curvature.per_example import GradientNorms
from tests.cases import BY_NAME
from tests.checks import assert_close, assert_untouched


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Point(nn.Module):
    """The parameters are the output."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(n, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.w + 0 * x


def form(eigenvalues: list[float]) -> Objective:
    """Return w'A w / 2 + 3 at 0, with A of these eigenvalues."""
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator(7)).double()).Q
    A = Q * torch.tensor(eigenvalues).double() @ Q.T
    data = [(torch.zeros(n).double(), torch.zeros(1))]
    return Objective(Point(n), None, data, forward=lambda m, b: 3 + m(b[0]) @ A @ m(b[0]) / 2, weight=lambda _: 1.0)


def judge(objective: Objective, **settings):
    settings = {"gradient_tolerance": 1e-8, "symmetries": False, **settings}
    return critical_points(objective, generator=generator(), **settings)


@pytest.mark.parametrize(
    ("eigenvalues", "kind", "index", "nullity"),
    [
        ([3.0, 2.0, 1.0], "minimum", 0, 0),
        ([3.0, 0.0, 0.0, 1.0], "minimum to second order", 0, 2),
        ([3.0, 1.0, 2**-9], "minimum to second order", 0, 1),
        ([3.0, -2.0, 0.0, 1.0, -1.0], "saddle", 2, 1),
        ([-3.0, -2.0, 0.0], "maximum to second order", 2, 1),
        ([-3.0, -2.0, -1.0], "maximum", 3, 0),
        ([0.0, 0.0], "plateau", 0, 2),
        ([4.0], "minimum", 0, 0),
        ([2.0] * 4, "minimum", 0, 0),
    ],
)
def test_quadratic_forms_are_what_their_eigenvalues_say(eigenvalues, kind, index, nullity) -> None:
    point = judge(form(eigenvalues))
    assert point.kind == kind, point.why
    assert point.exact
    assert (point.index_at_least, point.index.value, point.nullity.value) == pytest.approx((index, index, nullity))
    assert point.lowest.value == pytest.approx(min(eigenvalues), abs=1e-12)
    assert_close(point.escape.losses, point.escape.model, 1e-12)
    assert point.escape.drop == pytest.approx(max(0.0, -min(eigenvalues) / 2))


def test_index_of_a_large_form_is_bounded_and_estimated() -> None:
    """600 eigenvalues, 40 of them negative: the bound is certain, the estimate within its error."""
    values = [-1.0 - i / 40 for i in range(40)] + [1 + i / 100 for i in range(560)]
    point = judge(form(values), num_bottom=6, num_probes=6, num_steps=25)
    assert not point.exact
    assert point.kind == "saddle"
    assert point.index_at_least == 6
    assert 6 <= point.index.lower <= 40 <= point.index.upper <= 90


def test_deep_linear_network_at_zero_is_a_saddle_of_known_index() -> None:
    """H couples W1 (h, d) and W2 (c, h) by E[y x'] only: eigenvalues +-s, h copies for each of its singular values."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Linear(3, 2, bias=False)).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.randn(30, 4).double(), torch.randn(30, 2).double()
    objective = Objective(model, nn.MSELoss(), (x, y))
    with assert_untouched(model):
        point = critical_points(objective, generator=generator(), num_bottom=18)
    assert point.kind == "saddle"
    assert point.index.value == pytest.approx(3 * 2)
    assert point.nullity.value == pytest.approx(18 - 2 * 3 * 2)
    cross = y.T @ x / 30  # L = mean over 2 outputs: the factor 2 of the square and the 1/2 of the mean cancel
    assert point.lowest.value == pytest.approx(-float(torch.linalg.svdvals(cross)[0]), rel=1e-10)
    assert point.escape.drop > 0
    assert point.gradient_norm == 0


# -- the gradient and its noise ---------------------------------------------------------------------------------------


def test_noise_is_the_standard_error_of_the_gradient() -> None:
    x, y = torch.ones(50, 1).double(), torch.randn(50, 1, generator=generator()).double()
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    point = critical_points(Objective(model, nn.MSELoss(), (x, y)), symmetries=False, generator=generator())
    gradients = -2 * y.flatten()
    assert point.gradient_noise == pytest.approx(float(gradients.std() / 50**0.5), rel=1e-10)
    ratio = float(gradients.mean().square() / gradients.var() * 50)
    assert point.p_value == pytest.approx(float(f_law.sf(ratio, 1, 49)), rel=1e-9)  # Student's t-test, squared
    assert point.noise_dimension == pytest.approx(1.0)


@pytest.mark.parametrize("weights", [[1.0], [0.7, 0.3], [0.25] * 4, [0.9] + [0.01] * 10])
def test_p_value_is_a_bound_for_any_covariance_and_sharp_for_rank_one(weights: list[float]) -> None:
    w = torch.tensor(weights)
    forms = (torch.randn(200_000, len(w), generator=generator()).square() * w).sum(1)
    for level in (0.05, 0.01):
        share = float((torch.tensor([gradient_p_value(r) for r in forms[:20_000].tolist()]) < level).double().mean())
        slack = 4 * (level / 20_000) ** 0.5
        assert share < level + slack
        if len(w) == 1:
            assert share > level - slack


def test_a_gradient_beyond_its_noise_is_no_critical_point() -> None:
    x = torch.randn(60, 3, generator=generator()).double()
    model = nn.Linear(3, 1).double()
    objective = Objective(model, nn.MSELoss(), (x, x.sum(1, keepdim=True) + 5))
    point = critical_points(objective, symmetries=False, generator=generator())
    assert point.kind == "not critical"
    assert "p = " in point.why
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(60, 1)], 1), x.sum(1) + 5).solution
    with torch.no_grad():
        model.weight.copy_(solution[None, :3])
        model.bias.copy_(solution[3:])
    fitted = critical_points(objective, symmetries=False, generator=generator())  # no noise either: rounding decides
    assert fitted.kind == "minimum"


def regression(rows: Tensor) -> Objective:
    """Return an objective whose examples have the gradients -2 rows / d at zero."""
    model = nn.Linear(1, rows.shape[1], bias=False).double()
    nn.init.zeros_(model.weight)
    return Objective(model, nn.MSELoss(), (torch.ones(len(rows), 1).double(), rows))


@pytest.mark.parametrize("spread", [[1.0] * 20, [5.0] + [1.0] * 19, [2.0, 2.0, 0.1]])
def test_false_alarms_keep_their_rate_and_small_gradients_are_seen(spread: list[float]) -> None:
    """40 examples: of null gradients 1 % have p < .01; of ones of 4 times the noise in the bulk most have."""
    draws, root = generator(3), torch.tensor(spread).double()
    levels = torch.zeros(400, 2).double()
    for i in range(400):
        rows = root * torch.randn(40, len(root), generator=draws).double()
        for j, shift in enumerate((0.0, 1.0)):
            moved = rows + shift * 4 * (root.square().sum() / 40 / len(root)).sqrt()
            centred = moved - moved.mean(0)
            dots = GradientNorms(
                mean=moved.mean(0),
                loss=0.0,
                weights=torch.ones(40).double(),
                squared_norms=None,
                layers=(),
                layer_squared_norms=None,
                layer_mean_squared_norms=moved.mean(0).square().sum()[None],
                layer_traces=centred.square().sum()[None] / 40,
                sum_squared_shares=1 / 40,
                routes={},
                dots=moved @ moved.T,
                num_examples=40,
                num_backwards=1.0,
                seconds=0.0,
            )
            ratio = float(moved.mean(0).square().sum() * 40 / (centred.square().sum() / 39))
            levels[i, j] = gradient_p_value(ratio, noise_law(dots))
    null, seen = levels.T
    assert 0.025 < float((null < 0.05).double().mean()) < 0.08
    assert float((null < 0.01).double().mean()) < 0.03
    assert float((seen < 0.01).double().mean()) > 0.9


def test_p_values_come_from_inner_products() -> None:
    rows = torch.randn(30, 6, generator=generator()).double() + 0.4
    point = critical_points(regression(rows), symmetries=False, generator=generator())
    S = torch.cov(rows.T)
    ratio = float(rows.mean(0).square().sum() * 30 / S.trace())
    assert (point.gradient_norm / point.gradient_noise) ** 2 == pytest.approx(ratio, rel=1e-9)
    assert point.noise_dimension == pytest.approx(float(S.trace() ** 2 / (S @ S).trace()), rel=0.3)
    assert point.p_value < 1e-3 < gradient_p_value(ratio)
    assert point.kind == "not critical"


@pytest.mark.parametrize(
    ("higher", "kind", "falls"),
    [
        (lambda p: p[0] ** 4, "minimum to second order", False),
        (lambda p: -(p[0] ** 4), "saddle", True),
        (lambda p: p[0] ** 3, "saddle", True),
        (lambda p: 0 * p[0], "minimum to second order", False),
        (lambda p: -1e-4 * p[0] ** 2, "minimum to second order", False),  # within the tolerance
    ],
)
def test_terms_of_higher_order_decide_where_curvature_is_zero(higher, kind: str, falls: bool) -> None:
    data = [(torch.zeros(3).double(), torch.zeros(1))]

    def forward(model: nn.Module, batch) -> Tensor:
        p = model(batch[0])
        return 1 + p[1] ** 2 + p[2] ** 2 + higher(p)

    point = judge(Objective(Point(3), None, data, forward=forward, weight=lambda _: 1.0))
    assert point.kind == kind, point.why
    assert point.escape.falls(point.tolerance, 1e-16) == falls
    assert ("the loss falls" in point.why) == falls


def test_without_examples_a_tolerance_is_needed() -> None:
    objective = form([1.0, 2.0])
    with pytest.raises(InputError, match="gradient_tolerance="):
        critical_points(objective, generator=generator())
    assert judge(objective).gradient_noise is None
    with torch.no_grad():
        objective.model.w.fill_(1.0)
    assert judge(objective).kind == "not critical"
    assert judge(objective, gradient_tolerance=10.0).kind == "minimum"


@pytest.mark.parametrize(
    "wrong",
    [{"significance": 0.0}, {"flatness": 1.0}, {"reach": -1.0}, {"num_points": 2}, {"gradient_tolerance": -1.0}],
)
def test_arguments_out_of_range_are_refused(wrong) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        judge(form([1.0]), **wrong)


# -- symmetries -------------------------------------------------------------------------------------------------------


def relu_network(activation: nn.Module) -> Objective:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 6), activation, nn.Linear(6, 3)).double()
    return Objective(model, nn.CrossEntropyLoss(), (torch.randn(25, 4).double(), torch.randint(3, (25,))))


def test_rescaling_is_found_where_activations_are_homogeneous() -> None:
    trials, flat = rescaling_symmetries(relu_network(nn.ReLU()))
    assert {t.name for t in trials if t.holds} == {"scale of 0 against 2", "scale of 2 against 4"}
    assert flat.shape[1] == 2
    trials, flat = rescaling_symmetries(relu_network(nn.Tanh()))
    assert not any(t.holds for t in trials)
    assert flat.shape[1] == 0


def test_scales_in_front_of_a_normalisation_are_free() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6, eps=0.0), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(model, nn.CrossEntropyLoss(), (torch.randn(25, 4).double(), torch.randint(3, (25,))))
    trials, flat = rescaling_symmetries(objective)
    assert [t.name for t in trials if t.holds] == ["scale of 0"]
    g, H = objective.gradient(), HessianOperator(objective)
    v = flat[:, 0]
    assert abs(float(g @ v)) < 1e-12
    assert float(v @ (H @ v)) == pytest.approx(0, abs=1e-10)


def test_symmetry_identities_hold_for_units_and_fail_for_others() -> None:
    objective = relu_network(nn.ReLU())
    space = objective.space
    parts = {name: torch.zeros(shape) for name, shape in zip(space.names, space.shapes, strict=True)}
    parts["0.weight"][1], parts["0.bias"][1], parts["2.weight"][:, 1] = 1.0, 1.0, -1.0
    unit = try_rescaling(objective, space.to_flat(parts), name="unit")
    assert unit.holds
    assert max(unit.loss_change, unit.gradient_residual, unit.hessian_residual) < 1e-12
    parts["2.weight"][:, 1] = 1.0
    assert not try_rescaling(objective, space.to_flat(parts), name="wrong").holds


def test_symmetries_are_seen_in_float32() -> None:
    objective = relu_network(nn.ReLU())
    objective.model.float()
    x, y = next(iter(objective.batches()))
    narrow = Objective(objective.model, nn.CrossEntropyLoss(), (x.float(), y))
    trials, _ = rescaling_symmetries(narrow)
    assert {t.name for t in trials if t.holds} == {"scale of 0 against 2", "scale of 2 against 4"}


def test_records_and_figure() -> None:
    case = BY_NAME["MLP tanh"]
    point = critical_points(Objective(case.model(), case.loss, case.data()), generator=generator())
    plain = json.loads(json.dumps(point.to_dict(), allow_nan=False))
    assert "direction" not in plain
    assert plain["kind"] == point.kind
    assert point.escape.slope <= 0
    assert not math.isnan(point.index.value)
    ax = plot_escape(point)
    ax.figure.draw_without_rendering()  # type: ignore[union-attr]
    assert point.kind in [text.get_text() for text in ax.get_legend().get_texts()]
