"""Norms, moments and inner products of per-example gradients, against one backward pass for each example."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import CheckFailedError, DataError, InputError
from curvature.per_example import (
    GradientMoments,
    gradient_dots,
    gradient_moments,
    gradient_norms,
    per_example_gradients,
)
from tests.cases import BY_NAME, CASES, Case, Pair
from tests.checks import assert_close, assert_untouched
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group
from tests.references import flat_gradient, twice_differentiable_attention

EXACT = 1e-10  # float64
SEPARABLE = [case for case in CASES if case.name != "BatchNorm train"]


def loop(case: Case, model: nn.Module, batches: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Return the gradient of every example's mean loss, (N, n), and its number of loss terms, by the book."""
    params = [p for p in model.parameters() if p.requires_grad]
    gradients, counts = [], []
    with torch.random.fork_rng(devices=[]), twice_differentiable_attention():
        for i, (x, y) in enumerate(batches):
            torch.manual_seed(i)
            outputs = case.forward(model)(x)
            for k in range(len(x)):
                zs, ys = case.criterion.sites(outputs[k : k + 1], y[k : k + 1])
                count = sum(case.criterion.terms_per_site(z) for z in zs)
                losses = [case.criterion.value(z, t) for z, t in zip(zs, ys, strict=True)]
                value = torch.stack(losses).sum() / count if count else outputs.sum() * 0
                gradients.append(flat_gradient(value, params))
                counts.append(count)
    return torch.stack(gradients), torch.tensor(counts, dtype=torch.float64)


def check(moments: GradientMoments, gradients: Tensor, weights: Tensor, rtol: float = EXACT) -> None:
    """Compare everything that moments say with the gradients themselves."""
    shares = (weights / weights.sum()).to(gradients.dtype)
    mean = shares @ gradients
    centred = gradients - mean
    assert_close(moments.weights, weights, rtol)
    assert_close(moments.mean, mean, rtol)
    assert_close(moments.second_moment, shares @ gradients.square(), rtol)
    assert_close(moments.variance, shares @ centred.square(), rtol)
    assert moments.squared_norms is not None
    assert moments.layer_squared_norms is not None
    assert_close(moments.squared_norms, gradients.square().sum(1), rtol)
    assert_close(moments.trace, shares @ centred.square().sum(1), rtol)
    assert_close(moments.mean_squared_norm, mean.square().sum(), rtol)
    assert moments.sum_squared_shares == pytest.approx(float(shares.square().sum()))
    for i, block in enumerate(moments.blocks):
        part, noise = block.take(gradients.T), block.take(centred.T)
        assert_close(moments.layer_squared_norms[i], part.square().sum(0), rtol)
        assert_close(moments.layer_traces[i], (noise.square() @ shares).sum(), rtol)
        assert_close(moments.layer_mean_squared_norms[i], (part @ shares).square().sum(), rtol)
    if moments.dots is not None:
        assert_close(moments.dots, gradients @ gradients.T, rtol)
    if moments.along_mean is not None:
        assert_close(moments.along_mean, (gradients @ mean).double(), rtol)


# -- every kind of layer ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ragged", [False, True], ids=["one batch", "ragged"])
@pytest.mark.parametrize("case", SEPARABLE, ids=str)
def test_moments(case: Case, ragged: bool) -> None:
    model = case.model()
    batches = case.ragged() if ragged else [case.data()]
    objective = Objective(model, case.loss, batches)
    with assert_untouched(model):
        moments = gradient_moments(objective, pairwise=True, along_mean=True)
    assert moments.along_mean is not None
    check(moments, *loop(case, model, batches))
    assert_close(moments.mean, objective.gradient(), EXACT)
    assert moments.loss == pytest.approx(float(objective.loss()), rel=EXACT)
    assert set(moments.routes) == set(objective.space.names)


@pytest.mark.parametrize("case", SEPARABLE, ids=str)
def test_gradients_norms_and_dots(case: Case) -> None:
    model, batches = case.model(), case.ragged()
    gradients, weights = loop(case, model, batches)
    objective = Objective(model, case.loss, batches)
    rows = torch.full_like(gradients, torch.nan)
    for numbers, chunk in per_example_gradients(objective, chunk_size=3):
        assert len(chunk) <= 3
        rows[numbers] = chunk
    assert_close(rows, gradients, EXACT)
    norms, dots = gradient_norms(objective, along_mean=True), gradient_dots(objective)
    assert norms.squared_norms is not None
    assert norms.along_mean is not None
    assert dots.along_mean is None
    assert_close(norms.along_mean, gradients @ (weights / weights.sum() @ gradients), EXACT)
    assert_close(norms.squared_norms, gradients.square().sum(1), EXACT)
    assert dots.dots is not None
    assert_close(dots.dots, gradients @ gradients.T, EXACT)
    assert torch.equal(norms.weights, weights)
    shares = weights / weights.sum()
    assert_close(norms.trace, shares @ (gradients - shares @ gradients).square().sum(1), EXACT)


@pytest.mark.parametrize("route", ["vmap", "loop"])
@pytest.mark.parametrize("name", ["MLP tanh", "attention by hand", "tied weights", "BatchNorm eval"])
def test_without_rules(name: str, route: str) -> None:
    case = BY_NAME[name]
    model = case.model()
    moments = gradient_moments(Objective(model, case.loss, case.ragged()), pairwise=True, along_mean=True, route=route)
    check(moments, *loop(case, model, case.ragged()))
    assert set(moments.routes.values()) <= {route, "unused"}


@pytest.mark.parametrize("name", ["MLP tanh", "LayerNorm", "attention by hand", "BatchNorm eval"])
def test_float32(name: str) -> None:
    case = BY_NAME[name]
    reference = loop(case, case.model(), case.ragged())
    data = [
        (x.float() if x.is_floating_point() else x, y.float() if y.is_floating_point() else y) for x, y in case.ragged()
    ]
    moments = gradient_moments(Objective(case.model().float(), case.loss, data), pairwise=True)
    assert moments.mean.dtype == torch.float32
    check(moments, reference[0].float(), reference[1], rtol=1e-4)


@pytest.mark.parametrize("budget", [2_000, 20_000])
@pytest.mark.parametrize("name", ["BatchNorm eval", "LSTM", "attention by hand", "embedding", "tied weights"])
def test_little_memory_changes_nothing(name: str, budget: int) -> None:
    case = BY_NAME[name]
    model = case.model()
    for data in ([case.data()], case.ragged()):
        moments = gradient_moments(Objective(model, case.loss, data), memory_budget=budget, along_mean=True)
        check(moments, *loop(case, model, data))


def test_a_loader_may_fill_one_tensor_again_and_again() -> None:
    """What is held of a batch until the mean is known does not change with the next."""
    x, y = torch.randn(6, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    model, buffer = nn.Linear(3, 2).double(), x[:2].clone()

    class Refilled:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for start in (0, 2, 4):
                yield buffer.copy_(x[start : start + 2]), y[start : start + 2]

    found = gradient_norms(Objective(model, nn.MSELoss(), Refilled()), along_mean=True).along_mean
    torch.testing.assert_close(
        found, gradient_norms(Objective(model, nn.MSELoss(), (x, y)), along_mean=True).along_mean
    )


def test_inner_products_that_do_not_fit_are_refused_with_numbers() -> None:
    case = BY_NAME["MLP tanh"]
    with pytest.raises(InputError, match=r"GiB for the first 7 examples and the budget is .* memory_budget="):
        gradient_dots(Objective(case.model(), case.loss, case.data()), memory_budget=1000)


# -- what examples count ----------------------------------------------------------------------------------------------

WEIGHTED = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64), label_smoothing=0.1)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(ignore_index=1),
        nn.CrossEntropyLoss(label_smoothing=0.2),
        WEIGHTED,
        lambda z, y: F.nll_loss(z.log_softmax(1), y),
    ],
    ids=["ignore_index", "smoothing", "class weights", "custom"],
)
def test_mean_is_the_objectives_gradient(loss: nn.Module, reduction: str) -> None:
    if isinstance(loss, nn.Module):
        loss.reduction = reduction
    elif reduction == "sum":
        pytest.skip("its reduction is its own")
    case = BY_NAME["attention fused"]
    objective = Objective(case.model(), loss, case.ragged())
    for per in ("example", "target"):
        if per == "target" and not isinstance(loss, nn.Module):
            with pytest.raises(InputError, match="per='example'"):
                gradient_moments(objective, per=per)
            continue
        moments = gradient_moments(objective, per=per, pairwise=True, along_mean=True)
        assert_close(moments.mean, objective.gradient(), EXACT)
        assert moments.loss == pytest.approx(float(objective.loss()), rel=EXACT)
        shares = moments.weights / moments.weights.sum()
        G = torch.zeros(moments.num_examples, objective.num_params, dtype=torch.float64)
        for numbers, rows in per_example_gradients(objective, per=per):
            G[numbers] = rows
        assert_close(shares @ G, objective.gradient(), EXACT)
        check(moments, G, moments.weights)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_weighted_and_summed_losses(reduction: str) -> None:
    """Against the definition: the loss of an example alone, which for one example is a mean over its own terms."""
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 2, 2, 1, 0])
    model = nn.Linear(4, 3).double()
    class_weights = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
    objective = Objective(
        model, nn.CrossEntropyLoss(weight=class_weights, reduction=reduction), [(x[:4], y[:4]), (x[4:], y[4:])]
    )
    weights = class_weights[y]
    unit = float(weights.sum()) if reduction == "sum" else 1.0
    rows = [
        flat_gradient(F.cross_entropy(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters())) for i in range(6)
    ]
    check(gradient_moments(objective, pairwise=True, along_mean=True), unit * torch.stack(rows), weights)
    loss = nn.CrossEntropyLoss(weight=class_weights, reduction=reduction)
    whole = gradient_moments(Objective(model, loss, (x, y)), along_mean=True)
    check(whole, unit * torch.stack(rows), weights)
    assert whole.loss == pytest.approx(loss(model(x), y).item(), rel=EXACT)


def test_a_batch_weight_is_shared_by_its_examples() -> None:
    case = BY_NAME["attention by hand"]
    model, batches = case.model(), case.ragged()
    objective = Objective(model, case.loss, batches, weight=lambda batch: float(len(batch[0]) ** 2))
    gradients, counts = loop(case, model, batches)
    sizes = torch.tensor([len(x) for x, _ in batches])
    of_batch = torch.arange(3).repeat_interleave(sizes)
    totals = torch.zeros(3, dtype=torch.float64).index_add_(0, of_batch, counts)
    moments = gradient_moments(objective)
    check(moments, gradients, counts * (sizes.double() ** 2 / totals)[of_batch])
    assert_close(moments.mean, objective.gradient(), EXACT)


@pytest.mark.parametrize("name", ["attention by hand", "tied weights", "MLP sigmoid, binary", "MLP ReLU"])
def test_targets(name: str) -> None:
    """Every loss term is an example of its own: token targets, entries of a regression."""
    case = BY_NAME[name]
    model, batches = case.model(), case.ragged()
    params = list(model.parameters())
    gradients, weights = [], []
    for x, y in batches:
        z = model(x)
        if case.criterion is BY_NAME["MLP ReLU"].criterion:
            losses = F.cross_entropy(z, y, reduction="none")
            counts = (y != -100).double()
        else:
            losses = F.binary_cross_entropy_with_logits(z, y, reduction="none")
            counts = torch.ones_like(y)
        gradients += [flat_gradient(loss, params) for loss in losses.flatten()]
        weights.append(counts.flatten())
    objective = Objective(model, case.loss, batches)
    moments = gradient_moments(objective, per="target", pairwise=True)
    check(moments, torch.stack(gradients), torch.cat(weights))
    assert_close(moments.mean, objective.gradient(), EXACT)
    norms = gradient_norms(objective, per="target", route="vmap").squared_norms
    assert norms is not None
    assert_close(norms, torch.stack(gradients).square().sum(1), EXACT)


def test_examples_without_targets() -> None:
    case = BY_NAME["attention by hand"]
    x, y = case.data()
    y[2] = -100
    y[4:6] = -100
    batches = list(zip(x.split((4, 2, 1)), y.split((4, 2, 1)), strict=True))  # the second batch counts nothing
    model = case.model()
    moments = gradient_moments(Objective(model, case.loss, batches), pairwise=True, along_mean=True)
    check(moments, *loop(case, model, batches))
    assert moments.weights[[2, 4, 5]].tolist() == [0, 0, 0]
    per_target = gradient_moments(Objective(model, case.loss, batches), per="target")
    assert per_target.num_examples == 28
    assert_close(per_target.mean, moments.mean, EXACT)
    with pytest.raises(DataError, match="weights of all"):
        gradient_norms(Objective(model, case.loss, (x, torch.full_like(y, -100))))


def test_weightless_examples_with_a_gradient_are_refused() -> None:
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.0, 1.0, 1.0]), label_smoothing=0.1)
    with pytest.raises(DataError, match="weight zero"):
        gradient_norms(Objective(nn.Linear(4, 3), loss, (torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1]))))


def test_one_example() -> None:
    case = BY_NAME["BatchNorm eval"]
    x, y = case.data()
    model = case.model()
    moments = gradient_moments(Objective(model, case.loss, (x[:1], y[:1])), pairwise=True)
    gradients, weights = loop(case, model, [(x[:1], y[:1])])
    assert_close(moments.dots, gradients @ gradients.T, EXACT)  # type: ignore[arg-type]
    assert float(moments.trace) == pytest.approx(0, abs=1e-14)
    assert torch.isnan(moments.unbiased_trace)
    assert weights.tolist() == [1]
    assert set(moments.routes.values()) == {"single"}


# -- derived quantities -----------------------------------------------------------------------------------------------


def linear_regression(generator: torch.Generator, N: int) -> Objective:
    model = nn.Linear(3, 1, bias=False).double()
    x = torch.randn(N, 3, generator=generator, dtype=torch.float64)
    y = x @ torch.ones(3, 1, dtype=torch.float64) + torch.randn(N, 1, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        model.weight.fill_(0.5)
    return Objective(model, nn.MSELoss(), (x, y))


def test_unbiased_estimates(generator: torch.Generator) -> None:
    """Population: g_i = 2 x (x'd - e), d = w - w*: E g = 2 d, E|g|^2 = 4 (5 |d|^2 + 3), for x, e standard normal."""
    d = torch.full((3,), -0.5, dtype=torch.float64)
    exact = {"mean": float(4 * d @ d), "trace": float(4 * (5 * d @ d + 3) - 4 * d @ d)}
    runs = [gradient_moments(linear_regression(generator, 5)) for _ in range(400)]
    for found, value in (
        (torch.stack([r.unbiased_trace for r in runs]), exact["trace"]),
        (torch.stack([r.unbiased_mean_squared_norm for r in runs]), exact["mean"]),
        (torch.stack([r.variance.sum() * r.unbiased_factor for r in runs]), exact["trace"]),
    ):
        z = float((found.mean() - value) / (found.std() / 400**0.5))
        assert abs(z) < 4, f"{z:+.1f} standard errors off"
    biased = torch.stack([r.trace for r in runs])
    assert float((biased.mean() - exact["trace"]) / (biased.std() / 400**0.5)) < -4  # the test can tell


def test_ratios_and_their_limits() -> None:
    x = torch.eye(2, dtype=torch.float64)
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    moments = gradient_moments(Objective(model, nn.MSELoss(), (x, torch.tensor([[1.0], [0.0]]).double())))
    assert moments.gsnr.tolist() == [1.0, 0.0]  # entry 1: mean -1, variance 1; entry 2: no gradient at all
    assert moments.layer_gsnr.tolist() == [1.0]
    assert float(moments.noise_scale) == 1.0
    alike = gradient_moments(Objective(model, nn.MSELoss(), (x[:1].expand(3, 2), torch.ones(3, 1).double())))
    assert alike.gsnr.tolist() == [torch.inf, 0.0]
    assert float(alike.trace) == 0.0
    assert torch.isnan(alike.layer_gsnr).all()


def test_results_are_plain_values(generator: torch.Generator) -> None:
    moments = gradient_moments(linear_regression(generator, 5), pairwise=True)
    small, large = moments.to_dict(), moments.to_dict(arrays=True)
    assert small["num_examples"] == 5
    assert not {"mean", "blocks"} & set(small)
    assert large["second_moment"] == moments.second_moment.tolist()
    assert gradient_moments(linear_regression(generator, 5), norms=False).squared_norms is None


# -- what is refused --------------------------------------------------------------------------------------------------


def test_refusals() -> None:
    case = BY_NAME["BatchNorm train"]
    model = case.model()
    with assert_untouched(model), pytest.raises(DataError, match="the model couples the examples"):
        gradient_norms(Objective(model, case.loss, case.data()))
    linear, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(3, (6,))
    with pytest.raises(InputError, match="loss=None"):
        gradient_norms(Objective(linear, None, (x, y), forward=lambda m, b: m(b[0]).sum()))
    objective = Objective(linear, nn.CrossEntropyLoss(), (x, y))
    with pytest.raises(InputError, match="per must be"):
        gradient_norms(objective, per="batch")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="route must be"):
        gradient_norms(objective, route="fast")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="memory_budget must be"):
        gradient_norms(objective, memory_budget=0)
    with pytest.raises(InputError, match="chunk_size must be"):
        per_example_gradients(objective, chunk_size=0)


def test_losses_and_models_that_couple_examples() -> None:
    x, y = torch.randn(6, 4), torch.randint(3, (6,))

    class Centred(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:  # noqa: A002
            z = super().forward(input)
            return z - z.mean(0)

    with pytest.raises(DataError, match="the model couples the examples"):
        gradient_norms(Objective(Centred(4, 3), nn.CrossEntropyLoss(), (x, y)))

    model = nn.Linear(4, 3)

    def decayed(z: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(z, t) + model.weight.square().sum()

    with pytest.raises(CheckFailedError, match="otherwise than through the outputs"):
        gradient_norms(Objective(model, decayed, (x, y)))


# -- several processes ------------------------------------------------------------------------------------------------


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        case = BY_NAME["attention by hand"]
        x, y = case.data()
        part = slice(0, 5) if rank == 0 else slice(5, 7)
        found = {}
        for reduction in ("mean", "sum"):
            loss = nn.CrossEntropyLoss(reduction=reduction)
            objective = Objective(case.model(), loss, (x[part], y[part]), process_group=dist.group.WORLD)
            moments = gradient_moments(objective, along_mean=True)
            rows = torch.cat([rows for _, rows in per_example_gradients(objective)])
            found[reduction] = (moments.mean, moments.variance, moments.trace, moments.squared_norms, rows)
            found[f"{reduction}, along"] = (moments.along_mean, moments.loss)
            with pytest.raises(InputError, match="ranks"):
                gradient_dots(objective)
        torch.save(found, f"{folder}/rank{rank}.pt")


@IN_TWO_PROCESSES
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    ranks = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    case = BY_NAME["attention by hand"]
    for reduction in ("mean", "sum"):
        objective = Objective(case.model(), nn.CrossEntropyLoss(reduction=reduction), case.data())
        alone = gradient_moments(objective)
        for found in ranks:
            for mine, expected in zip(found[reduction][:3], (alone.mean, alone.variance, alone.trace), strict=True):
                assert_close(mine, expected, EXACT)
        assert alone.squared_norms is not None
        assert_close(torch.cat([found[reduction][3] for found in ranks]), alone.squared_norms, EXACT)
        rows = torch.cat([rows for _, rows in per_example_gradients(objective)])
        assert_close(torch.cat([found[reduction][4] for found in ranks]), rows, EXACT)
        along = torch.cat([found[f"{reduction}, along"][0] for found in ranks])
        assert_close(along, (rows @ alone.mean).double(), EXACT)
        for found in ranks:
            assert found[f"{reduction}, along"][1] == pytest.approx(float(objective.loss()), rel=EXACT)
