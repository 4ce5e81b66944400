"""Fisher matrices and the covariance of gradients against loops over single examples and over all targets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from curvature import (
    BlockDiagonalOperator,
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    MCFisherOperator,
    Objective,
)
from curvature.autograd import lean_functions
from curvature.engine.output_metrics import Per
from curvature.errors import DataError, InputError
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.per_example import gradient_moments
from tests.cases import BY_NAME, CASES, Case
from tests.checks import assert_close, assert_untouched, check_operator
from tests.references import dense_fisher, example_gradients, flat_gradient

EXACT = 1e-10  # relative: the same sums in float64, in another order
PER: tuple[Per, ...] = ("example", "target")


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@functools.cache
def gradients(name: str, per: str) -> tuple[Tensor, Tensor]:
    case = BY_NAME[name]
    model = case.model()
    return example_gradients(case.forward(model), case.ragged(), case.criterion, trainable(model), per)


def moments(p: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Return the second moment and the covariance, the latter from centred gradients."""
    mean = (p[:, None] * g).sum(0)
    second = sum(weight * row[:, None] * row for weight, row in zip(p, g, strict=True))
    centred = sum(weight * row[:, None] * row for weight, row in zip(p, g - mean, strict=True))
    assert isinstance(second, Tensor)
    assert isinstance(centred, Tensor)
    return second, centred


# -- against loops over examples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("case", [case for case in CASES if case.name != "BatchNorm train"], ids=str)
def test_empirical_fisher_and_covariance_agree_with_loops_over_examples(
    case: Case, per: Per, generator: torch.Generator
) -> None:
    p, g = gradients(case.name, per)
    second, covariance = moments(p, g)
    X = torch.randn(len(second), 2, generator=generator, dtype=torch.float64)
    model = case.model()
    objective = Objective(model, case.loss, case.ragged(), keep_graphs=per == "target")
    with assert_untouched(model):
        assert_close(EmpiricalFisherOperator(objective, per=per) @ X, second @ X, EXACT)
        assert_close(GradientCovarianceOperator(objective, per=per) @ X, covariance @ X, EXACT)
        assert_close(objective.gradient(), (p[:, None] * g).sum(0), EXACT)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fisher_agrees_with_expectation_over_all_targets(case: Case, generator: torch.Generator) -> None:
    model = case.model()
    dense = dense_fisher(case.forward(model), case.ragged(), case.criterion, trainable(model))
    objective = Objective(model, case.loss, case.ragged())
    X = torch.randn(len(dense), 2, generator=generator, dtype=torch.float64)
    assert_close(FisherOperator(objective) @ X, dense @ X, EXACT)
    assert_close(GGNOperator(objective) @ X, dense @ X, EXACT)


# -- losses with weights, ignored targets, sums -----------------------------------------------------------------------

WEIGHT = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
POSITIVE = torch.tensor([3.0, 0.5, 1.0], dtype=torch.float64)
CE_SETTINGS: list[dict[str, Any]] = [
    {},
    {"weight": WEIGHT},
    {"ignore_index": 1},
    {"label_smoothing": 0.2},
    {"weight": WEIGHT, "label_smoothing": 0.2},
]


def token_model() -> nn.Module:
    return BY_NAME["attention by hand"].model()


def token_batches() -> list[tuple[Tensor, Tensor]]:
    batches = BY_NAME["attention by hand"].ragged()  # with padding
    return [*batches, (batches[0][0][:1], torch.full((1, 4), -100))]  # and a batch in which nothing counts


def rows_of_tokens(model: nn.Module, settings: dict[str, Any]) -> list[list[tuple[Tensor, Tensor, float]]]:
    """Return for each text and each token that counts its logits, its loss and its weight, one token at a time."""
    weight, ignored = settings.get("weight"), settings.get("ignore_index", -100)
    texts = []
    for x, y in token_batches():
        for z, targets in zip(model(x), y, strict=True):
            tokens = []
            for t, target in enumerate(targets.tolist()):
                if target in (ignored, -100):
                    continue
                w = 1.0 if weight is None else float(weight[target])
                loss = F.cross_entropy(z[None, :, t], torch.tensor([target]), reduction="sum", **settings)
                tokens.append((z[:, t], loss, w))
            texts.append(tokens)
    return texts


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("settings", CE_SETTINGS, ids=lambda s: ", ".join(s) or "plain")
def test_weights_of_cross_entropy(settings: dict[str, Any], per: Per, generator: torch.Generator) -> None:
    model = token_model()
    params = trainable(model)
    batches = token_batches()
    if "ignore_index" in settings:
        batches = [(x, y.where(y >= 0, settings["ignore_index"])) for x, y in batches]
    w, g = [], []
    for text in rows_of_tokens(model, settings):
        for group in [text] if per == "example" else [[token] for token in text]:
            if group:
                w.append(sum(weight for *_, weight in group))
                g.append(flat_gradient(torch.stack([loss for _, loss, _ in group]).sum() / w[-1], params))
    p = torch.tensor(w, dtype=torch.float64)
    whole, p = float(p.sum()), p / p.sum()
    second, covariance = moments(p, torch.stack(g))
    factor = 1 / (1 - float((p * p).sum()))
    X = torch.randn(len(second), 2, generator=generator, dtype=torch.float64)
    for reduction, total in (("mean", 1.0), ("sum", whole**2)):  # of a sum g_i is the gradient of W l_i
        objective = Objective(model, nn.CrossEntropyLoss(**settings, reduction=reduction), batches)
        assert_close(objective.gradient(), total**0.5 * (p[:, None] * torch.stack(g)).sum(0), EXACT)
        assert_close(EmpiricalFisherOperator(objective, per=per) @ X, total * second @ X, EXACT)
        assert_close(GradientCovarianceOperator(objective, per=per) @ X, total * covariance @ X, EXACT)
        unbiased = GradientCovarianceOperator(objective, per=per, unbiased=True)
        assert_close(unbiased @ X, factor * total * covariance @ X, EXACT)


@pytest.mark.parametrize("settings", CE_SETTINGS, ids=lambda s: ", ".join(s) or "plain")
def test_fisher_weighs_targets_as_the_loss_weighs_log_likelihoods(
    settings: dict[str, Any], generator: torch.Generator
) -> None:
    model = token_model()
    params = trainable(model)
    batches = token_batches()
    if "ignore_index" in settings:
        batches = [(x, y.where(y >= 0, settings["ignore_index"])) for x, y in batches]
    smoothing, weight = settings.get("label_smoothing", 0.0), settings.get("weight", torch.ones_like(WEIGHT))
    n = sum(p.numel() for p in params)
    expected, whole = torch.zeros(n, n, dtype=torch.float64), 0.0
    for text in rows_of_tokens(model, settings):
        for z, _, w in text:
            a = (1 - smoothing) * w + smoothing * float(weight.mean())  # of all the loss's -log p of this token
            for c, p in enumerate(z.detach().softmax(0)):
                s = flat_gradient(-z.log_softmax(0)[c], params)
                expected += a * p * s[:, None] * s
            whole += w
    X = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    for reduction, total in (("mean", whole), ("sum", 1.0)):
        objective = Objective(model, nn.CrossEntropyLoss(**settings, reduction=reduction), batches)
        assert_close(FisherOperator(objective) @ X, expected @ X / total, EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weights_of_binary_cross_entropy(reduction: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    params = trainable(model)
    x, y = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, 3, dtype=torch.float64)
    loss = nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=POSITIVE, reduction=reduction)
    objective = Objective(model, loss, [(x[:3], y[:3]), (x[3:], y[3:])])
    expected, second = (torch.zeros(objective.num_params, objective.num_params, dtype=torch.float64) for _ in range(2))
    for z, targets in zip(model(x), y, strict=True):
        for i in range(3):
            s = float(z[i].detach().sigmoid())
            a = float(WEIGHT[i] * (POSITIVE[i] * targets[i] + 1 - targets[i]))
            for p, log_p in ((s, F.logsigmoid(z[i])), (1 - s, F.logsigmoid(-z[i]))):
                g = flat_gradient(-log_p, params)
                expected += a * p * g[:, None] * g
            own = -WEIGHT[i] * (POSITIVE[i] * targets[i] * F.logsigmoid(z[i]) + (1 - targets[i]) * F.logsigmoid(-z[i]))
            g = flat_gradient(own, params)
            second += g[:, None] * g
    terms = 15.0
    assert_close(FisherOperator(objective).to_dense(), expected / (terms if reduction == "mean" else 1.0), EXACT)
    empirical = EmpiricalFisherOperator(objective, per="target").to_dense()
    assert_close(empirical, second / terms if reduction == "mean" else second * terms, EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per", PER)
def test_diagonals_are_the_moments_of_single_gradients(per: Per, reduction: str) -> None:
    case = BY_NAME["attention by hand"]
    objective = Objective(case.model(), nn.CrossEntropyLoss(reduction=reduction), case.ragged())
    expected = gradient_moments(objective, per=per)
    second = EmpiricalFisherOperator(objective, per=per).to_dense().diagonal()
    variance = GradientCovarianceOperator(objective, per=per).to_dense().diagonal()
    assert_close(second, expected.second_moment, EXACT)
    assert_close(variance, expected.variance, EXACT)


def test_weights_of_batches_scale_their_examples() -> None:
    case = BY_NAME["MLP tanh"]
    model, batches = case.model(), case.ragged()
    objective = Objective(model, case.loss, batches, weight=lambda batch: float(batch[0][0, 0].abs()))
    p, g = gradients(case.name, "example")
    factors = torch.cat([x.new_full((len(x),), float(x[0, 0].abs()) / len(x)) for x, _ in batches])
    p = factors / factors.sum()
    second, covariance = moments(p, g)
    assert_close(EmpiricalFisherOperator(objective).to_dense(), second, EXACT)
    assert_close(GradientCovarianceOperator(objective).to_dense(), covariance, EXACT)
    unbiased = GradientCovarianceOperator(objective, unbiased=True)
    assert_close(unbiased.to_dense(), covariance / (1 - float((p * p).sum())), EXACT)


def test_sums_under_weights_of_batches() -> None:
    case = BY_NAME["MLP tanh"]
    model, batches = case.model(), case.ragged()
    objective = Objective(model, nn.MSELoss(reduction="sum"), batches, weight=lambda batch: float(len(batch[0])) ** 2)
    _, g = gradients(case.name, "example")
    w = torch.cat([x.new_full((len(x),), 2.0 * len(x) ** 2) for x, _ in batches])  # 2 loss terms an example
    w = w / sum(len(x) ** 2 for x, _ in batches)
    p = w / w.sum()
    second, covariance = moments(p, g)
    assert_close(objective.gradient(), (w[:, None] * g).sum(0), EXACT)
    assert_close(EmpiricalFisherOperator(objective).to_dense(), w.sum() ** 2 * second, EXACT)
    unbiased = GradientCovarianceOperator(objective, unbiased=True)
    assert_close(unbiased.to_dense(), w.sum() ** 2 * covariance / (1 - float((p * p).sum())), EXACT)


def test_unbiased_covariance_is_that_of_the_population_on_average_over_all_samples() -> None:
    population = torch.tensor([[1.0, 2.0], [0.5, -1.0], [-2.0, 3.0]], dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    loss = nn.MSELoss()

    def covariance(rows: list[int], unbiased: bool) -> Tensor:
        objective = Objective(model, loss, (population[rows], torch.ones(len(rows), 1, dtype=torch.float64)))
        return GradientCovarianceOperator(objective, unbiased=unbiased).to_dense()

    samples = [covariance([i, j], True) for i in range(3) for j in range(3)]
    assert_close(torch.stack(samples).mean(0), covariance([0, 1, 2], False), EXACT)


# -- drawn targets ----------------------------------------------------------------------------------------------------

SEEDS = 400


@pytest.mark.parametrize(("name", "num_samples"), [("MLP tanh", 1), ("MLP sigmoid, binary", 1), ("dropout", 3)])
def test_mc_fisher_is_unbiased(name: str, num_samples: int, generator: torch.Generator) -> None:
    """Along directions that see diagonal and other entries alike."""
    case = BY_NAME[name]
    model, batches = case.model(), [case.data()]
    dense = dense_fisher(case.forward(model), batches, case.criterion, trainable(model))
    objective = Objective(model, case.loss, batches)
    u, v = torch.randn(2, objective.num_params, generator=generator, dtype=torch.float64)
    products = [MCFisherOperator(objective, num_samples=num_samples, generator=generator) @ v for _ in range(SEEDS)]
    for left in (u, v):
        samples = torch.stack([left @ product for product in products])
        z = float((samples.mean() - left @ dense @ v) / (samples.std() / SEEDS**0.5))
        assert abs(z) < 4, f"the mean is {z:+.1f} standard errors from the exact value"
        assert float(samples.std()) > 1e-3 * float(samples.mean().abs())  # they do differ


@pytest.mark.parametrize("num_samples", [1, 5])
@pytest.mark.parametrize(("loss", "targets"), [(nn.MSELoss(), 1.0), (nn.BCEWithLogitsLoss(), 1.0)], ids=["mse", "bce"])
def test_variance_of_mc_fisher_is_that_of_its_distribution(loss: nn.Module, targets: float, num_samples: int) -> None:
    """One example, one output: (2 / S) chi^2_S for a squared error, (y - s)^2 averaged over S coins for the other."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, 0.7)
    objective = Objective(model, loss, (torch.ones(1, 1).double(), torch.full((1, 1), targets).double()))
    generator = torch.Generator().manual_seed(0)
    one = torch.ones(1, dtype=torch.float64)
    draws = [MCFisherOperator(objective, num_samples=num_samples, generator=generator) @ one for _ in range(SEEDS)]
    s = torch.tensor(0.7, dtype=torch.float64).sigmoid()
    exact = 8.0 if isinstance(loss, nn.MSELoss) else float(s * (1 - s) * (1 - 2 * s) ** 2)
    ratio = float(torch.stack(draws).var()) * num_samples / exact
    kurtosis = 15.0 if isinstance(loss, nn.MSELoss) else 3.0  # at most, of chi^2 with one degree of freedom
    assert abs(ratio - 1) < 4 * ((kurtosis - 1) / SEEDS) ** 0.5


@pytest.mark.parametrize("name", ["MLP tanh", "MLP sigmoid, binary", "attention by hand", "tied weights"])
def test_mc_fisher_is_one_symmetric_matrix(name: str, generator: torch.Generator) -> None:
    case = BY_NAME[name]
    model = case.model()
    matrices = []
    for keep_graphs in (True, False):
        objective = Objective(model, case.loss, case.ragged(), keep_graphs=keep_graphs)
        A = MCFisherOperator(objective, num_samples=2, generator=torch.Generator().manual_seed(3))
        dense = A.to_dense()
        with assert_untouched(model):
            check_operator(A, dense, generator, EXACT)
        eigenvalues = torch.linalg.eigvalsh(dense)
        assert float(eigenvalues[0]) >= -1e-12 * float(eigenvalues[-1])
        matrices.append(dense)
    torch.testing.assert_close(matrices[0], matrices[1], rtol=0, atol=0)
    other = MCFisherOperator(objective, num_samples=2, generator=generator).to_dense()
    assert float((other - dense).norm()) > 1e-3 * float(dense.norm())


def test_many_draws_come_near_the_exact_matrix_and_batches_draw_apart() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    pair = (torch.ones(1, 1).double(), torch.ones(1, 1).double())
    one = torch.ones(1, dtype=torch.float64)

    def value(num_batches: int, num_samples: int) -> float:
        objective = Objective(model, nn.MSELoss(), [pair] * num_batches)
        generator = torch.Generator().manual_seed(0)
        return float(MCFisherOperator(objective, num_samples=num_samples, generator=generator) @ one)

    assert value(1, 5_000) == pytest.approx(2.0, rel=4 * (2 / 5_000) ** 0.5)
    assert value(100, 1) == pytest.approx(2.0, rel=4 * (2 / 100) ** 0.5)
    assert value(100, 1) != pytest.approx(value(1, 1), rel=1e-6)  # the value that alike draws would give


def test_new_draws_leave_nothing_behind() -> None:
    case = BY_NAME["MLP tanh"]
    objective = Objective(case.model(), case.loss, case.ragged(), keep_graphs=True)
    v, generator = torch.ones(objective.num_params, dtype=torch.float64), torch.Generator().manual_seed(0)
    for _ in range(5):
        MCFisherOperator(objective, generator=generator) @ v
    assert all(len(lin._output_maps) == 0 for lin in objective.linearizations())


@pytest.mark.parametrize("keep_graphs", [True, False])
def test_shuffled_loader_is_refused_where_draws_belong_to_places(keep_graphs: bool) -> None:
    case = BY_NAME["MLP tanh"]
    for batch_size in (2, 7):
        loader = DataLoader(TensorDataset(*case.data()), batch_size=batch_size, shuffle=True)
        objective = Objective(case.model(), case.loss, loader, keep_graphs=keep_graphs)
        with pytest.raises(DataError, match="the loader shuffles and drawn targets belong to places"):
            MCFisherOperator(objective, generator=torch.Generator().manual_seed(0))
    fixed = DataLoader(TensorDataset(*case.data()), batch_size=2)
    A = MCFisherOperator(Objective(case.model(), case.loss, fixed), generator=torch.Generator().manual_seed(0))
    v = torch.ones(A.shape[0], dtype=torch.float64)
    torch.testing.assert_close(A @ v, A @ v, rtol=0, atol=0)


# -- parts, points, other losses --------------------------------------------------------------------------------------

KINDS: dict[str, Callable[[Objective], ObjectiveOperator]] = {
    "Fisher": FisherOperator,
    "MC Fisher": lambda o: MCFisherOperator(o, num_samples=2, generator=torch.Generator().manual_seed(0)),
    "empirical Fisher": EmpiricalFisherOperator,
    "empirical Fisher, targets": lambda o: EmpiricalFisherOperator(o, per="target"),
    "covariance": GradientCovarianceOperator,
    "unbiased covariance": lambda o: GradientCovarianceOperator(o, per="target", unbiased=True),
}


@pytest.mark.parametrize("keep_graphs", [True, False], ids=["kept", "rebuilt"])
@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_matrix(kind: str, keep_graphs: bool, generator: torch.Generator) -> None:
    case = BY_NAME["tied weights"]
    objective = Objective(case.model(), case.loss, case.ragged(), keep_graphs=keep_graphs)
    A = KINDS[kind](objective)
    dense = A.to_dense()
    block = objective.space.block(["*.bias", "embedding.weight"])
    expected = block.take(block.take(dense).T)
    check_operator(A.restrict(["*.bias", "embedding.weight"]), expected, generator, EXACT)
    whole = torch.zeros_like(dense)
    for b in objective.space.blocks:
        inside = b.embed(torch.ones(b.num_params, dtype=torch.bool), objective.num_params)
        whole[inside[:, None] & inside] = dense[inside[:, None] & inside]
    check_operator(BlockDiagonalOperator(A), whole, generator, EXACT)
    v = torch.randn(A.shape[0], generator=generator, dtype=torch.float64)
    assert A.overhead == float(not keep_graphs)
    parts: list[tuple[float, Tensor]] = []
    (total,) = A.products([v[:, None]], [None], observe=lambda _, w, p: parts.append((w, p[0])))
    by_hand = sum(w * part for w, part in parts) / sum(w for w, _ in parts)  # type: ignore[operator]
    assert_close(by_hand, total, EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_matrix_is_that_of_the_present_point(kind: str) -> None:
    case = BY_NAME["MLP SiLU"]
    model = case.model()
    A = KINDS[kind](Objective(model, case.loss, case.ragged()))
    before = A.to_dense()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    after = A.to_dense()
    assert float((after - before).norm()) > 1e-3 * float(before.norm())
    assert_close(after, KINDS[kind](Objective(model, case.loss, case.ragged())).to_dense(), EXACT)


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.L1Loss(), torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)),
        (nn.L1Loss(reduction="sum"), torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)),
        (nn.NLLLoss(weight=WEIGHT[:2]), torch.tensor([0, 1, 1, 0, -100, 1, 0])),
        (lambda z, y: (z - y).pow(4).sum(1).mean(), torch.linspace(-1, 1, 14, dtype=torch.float64).view(7, 2)),
    ],
    ids=["l1", "l1 sum", "nll", "own"],
)
def test_empirical_fisher_of_any_loss_that_is_a_sum_over_examples(
    loss: Callable[..., Tensor], targets: Tensor, per: Per
) -> None:
    case = BY_NAME["MLP GELU"]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).double()
    params = trainable(model)
    x, _ = case.data()
    objective = Objective(model, loss, [(x[:4], targets[:4]), (x[4:], targets[4:])])
    entries = isinstance(loss, nn.L1Loss) and per == "target"
    g, w = [], []
    for z, y in zip(model(x), targets, strict=True):
        if not y.is_floating_point() and int(y) == -100:
            continue
        for i in range(2) if entries else [slice(None)]:
            value = (z[i] - y[i]).abs().mean() if isinstance(loss, nn.L1Loss) else loss(z[None], y[None])
            g.append(flat_gradient(value, params))
            w.append(float(WEIGHT[int(y)]) if isinstance(loss, nn.NLLLoss) else 1.0)
    p = torch.tensor(w, dtype=torch.float64)
    second, _ = moments(p / p.sum(), torch.stack(g))
    terms = 14.0 if isinstance(loss, nn.L1Loss) and loss.reduction == "sum" else 1.0
    assert_close(EmpiricalFisherOperator(objective, per=per).to_dense(), terms**2 * second, EXACT)


def test_lean_layers_are_checked_although_the_loss_has_no_second_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    right = lean_functions.ActivationBackward.backward
    monkeypatch.setattr(
        lean_functions.ActivationBackward,
        "backward",
        staticmethod(lambda ctx, u: tuple(1.01 * g if isinstance(g, Tensor) else g for g in right(ctx, u))),
    )
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)).double()
    x, y = torch.randn(2, 5, 4, dtype=torch.float64)
    objective = Objective(model, nn.L1Loss(), (x, y[:, :2]))
    g = [flat_gradient((model(x[i]) - y[i, :2]).abs().mean(), trainable(model)) for i in range(5)]
    assert_close(
        EmpiricalFisherOperator(objective).to_dense(),
        moments(torch.full((5,), 0.2, dtype=torch.float64), torch.stack(g))[0],
        EXACT,
    )
    assert objective.trust.revoked


def test_class_last_outputs_and_single_numbers() -> None:
    model = nn.Linear(3, 4).double()
    x, y = torch.randn(2, 3, 3, dtype=torch.float64), torch.tensor([[0, 3, -100], [2, 1, 1]])

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.movedim(-1, 1), y)

    first = Objective(model, loss, (x, y))
    second = Objective(model, nn.CrossEntropyLoss(), (x, y), forward=lambda m, b: (m(b[0]).movedim(-1, 1), b[1]))
    for per in PER:
        matrices = [EmpiricalFisherOperator(o, per=per).to_dense() for o in (first, second)]
        assert_close(*matrices, EXACT)
    flat = nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)).double()
    objective = Objective(flat, nn.MSELoss(), (x[0], y[0].double()))
    matrices = [EmpiricalFisherOperator(objective, per=per).to_dense() for per in PER]
    assert_close(*matrices, EXACT)


def test_zero_gradients_one_example_and_one_parameter() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    x = torch.ones(1, 1, dtype=torch.float64)
    fitted = Objective(model, nn.MSELoss(), (x, model(x).detach()))
    one = torch.ones(1, dtype=torch.float64)
    assert float(EmpiricalFisherOperator(fitted) @ one) == 0
    assert float(GradientCovarianceOperator(fitted) @ one) == 0
    assert float(FisherOperator(fitted) @ one) == pytest.approx(2.0)
    missed = Objective(model, nn.MSELoss(), (x, model(x).detach() + 3))
    assert float(EmpiricalFisherOperator(missed) @ one) == pytest.approx(36.0)
    assert float(GradientCovarianceOperator(missed) @ one) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_models(dtype: torch.dtype) -> None:
    case = BY_NAME["MLP SiLU"]
    x, y = case.data()
    exact = case.model().to(dtype).double()
    objectives = [Objective(m, case.loss, (x.to(t), y)) for m, t in ((case.model().to(dtype), dtype), (exact, None))]
    for kind in ("Fisher", "empirical Fisher", "covariance"):
        narrow, wide = (KINDS[kind](o).to_dense() for o in objectives)
        assert narrow.dtype == torch.float32
        error = float((narrow.double() - wide).norm() / wide.norm())
        assert error < 30 * torch.finfo(dtype).eps


# -- refusals ---------------------------------------------------------------------------------------------------------


def test_what_has_no_meaning_is_refused() -> None:
    case = BY_NAME["MLP tanh"]
    model, generator = case.model(), torch.Generator().manual_seed(0)
    whole = Objective(model, None, case.data(), forward=lambda m, b: F.mse_loss(m(b[0]), b[1]))
    for build in KINDS.values():
        with pytest.raises(InputError, match="needs the split between model and loss"):
            build(whole)
    other = Objective(model, nn.L1Loss(), case.data())
    for kind in ("Fisher", "MC Fisher"):
        with pytest.raises(InputError, match=r"drawn from the model's own distribution.*got L1Loss"):
            KINDS[kind](other)
    objective = Objective(model, case.loss, case.data())
    with pytest.raises(InputError, match="num_samples must be at least 1, got 0"):
        MCFisherOperator(objective, num_samples=0, generator=generator)
    with pytest.raises(InputError, match=r"per must be 'example'.*got 'batch'"):
        EmpiricalFisherOperator(objective, per="batch")  # type: ignore[arg-type]
    v = torch.ones(objective.num_params, dtype=torch.float64)
    x, y = case.data()
    single = Objective(model, case.loss, (x[:1], y[:1]))
    alone = GradientCovarianceOperator(single, unbiased=True)
    for _ in range(2):
        with pytest.raises(InputError, match="at least two examples"):
            alone @ v


@pytest.mark.parametrize("per", PER)
def test_loss_that_couples_examples_is_refused(per: Per) -> None:
    case = BY_NAME["MLP tanh"]
    objective = Objective(case.model(), lambda z, y: (z - y).mean().square(), case.data())
    with pytest.raises(InputError, match="couples its examples"):
        EmpiricalFisherOperator(objective, per=per) @ torch.ones(objective.num_params, dtype=torch.float64)


REFUSED: dict[str, tuple[Callable[..., Tensor], Any, str]] = {
    "a dict": (lambda z, y: (z - y["value"]).square().mean(), {"value": torch.zeros(3, 2)}, "one tensor, got dict"),
    "broadcast": (
        lambda z, y: F.mse_loss(*torch.broadcast_tensors(z[:, None], y)),
        torch.zeros(3, 5, 2, dtype=torch.long),
        r"terms of shape \(3, 5, 2\), which do not lie on outputs of shape \(3, 2\)",
    ),
    "weight 0": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0]).double(), label_smoothing=0.1),
        torch.tensor([0, 1, 1]),
        "a target of weight 0 adds to the loss",
    ),
}


@pytest.mark.parametrize("why", REFUSED)
def test_terms_that_cannot_be_told_apart_are_refused(why: str) -> None:
    loss, targets, message = REFUSED[why]
    model = nn.Linear(2, 2).double()
    objective = Objective(model, loss, (torch.ones(3, 2).double(), targets), weight=lambda _: 1.0)
    with pytest.raises(InputError, match=message):
        EmpiricalFisherOperator(objective, per="target") @ torch.ones(6, dtype=torch.float64)
