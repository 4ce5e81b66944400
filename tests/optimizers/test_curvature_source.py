"""Curvature sources and their random numbers against dense matrices: expectations, error bars, independence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvature.errors import InputError, NonFiniteError
from curvature.losses.recognised import loss_rule
from optimizers import AdaHessian
from optimizers.diagonal.curvature_source import EmpiricalFisher, GaussNewtonBartlett, HessianDiagonal, RowNorm
from optimizers.shared.probes import mixed_seed, random_signs
from tests.optimizers.problems import Problem, mlp


def z_scores(samples: Tensor, exact: Tensor) -> Tensor:
    """Return (mean - exact) / stderr over the first dimension; entries without spread must be exact."""
    spread = samples.std(0) / samples.shape[0] ** 0.5
    still = spread <= 1e-12 * exact.abs().max()
    torch.testing.assert_close(samples.mean(0)[still], exact[still], rtol=1e-9, atol=1e-12)
    return ((samples.mean(0) - exact) / spread)[~still]


# -- signs ------------------------------------------------------------------------------------------------------------


def test_signs_are_signs_and_independent() -> None:
    params = [torch.zeros(3, 4), torch.zeros(()), torch.zeros(0, 2), torch.zeros(5)]
    draws = torch.stack([torch.cat([s.reshape(-1) for s in random_signs(params, 0, step, 0)]) for step in range(2000)])
    assert draws.shape == (2000, 18)
    assert set(draws.unique().tolist()) == {-1.0, 1.0}
    assert (draws.mean(0) * 2000**0.5).abs().max() < 4
    products = (draws.T @ draws / 2000).fill_diagonal_(0) * 2000**0.5
    assert products.abs().max() < 4.5
    off = products[~torch.eye(18, dtype=torch.bool)]
    assert 0.8 < off.std() < 1.2
    assert ((draws[1:] * draws[:-1]).mean(0) * 2000**0.5).abs().max() < 4  # neighbouring steps


def test_signs_are_functions_of_their_counters() -> None:
    params = [torch.zeros(40), torch.zeros(7, 5, dtype=torch.float64), torch.zeros(4, dtype=torch.bfloat16)]
    first = random_signs(params, 1, 2, 3)
    torch.manual_seed(9)
    torch.randn(5)
    state = torch.get_rng_state()
    for a, b, p in zip(first, random_signs(params, 1, 2, 3), params, strict=True):
        assert torch.equal(a, b)
        assert (a.shape, a.dtype) == (p.shape, p.dtype)
    assert torch.equal(state, torch.get_rng_state())
    for other in [(2, 1, 3), (1, 3, 2), (1, 2, 4), (0, 2, 3)]:
        assert not torch.equal(first[0], random_signs(params, *other)[0])


def test_longer_parameter_lists_keep_the_first_signs() -> None:
    params = [torch.zeros(11), torch.zeros(30)]
    more = [*params, torch.zeros(100)]
    for a, b in zip(random_signs(params, 0, 0, 0), random_signs(more, 0, 0, 0), strict=False):
        assert torch.equal(a, b)


def test_mixed_seeds_spread() -> None:
    seeds = [mixed_seed(1, a, b, c) for a in range(8) for b in range(8) for c in range(8)]
    assert len(set(seeds)) == 512
    flips = [bin(mixed_seed(1, 0, n) ^ mixed_seed(1, 0, n + 1)).count("1") for n in range(400)]
    assert abs(sum(flips) / 400 - 32) < 4 * 4 / 400**0.5


# -- sampled targets --------------------------------------------------------------------------------------------------

g = torch.Generator().manual_seed(0)
CLASSES = torch.tensor([0, 2, 1, -100])
LOSSES: dict[str, tuple[nn.Module, Tensor, Any]] = {
    "cross-entropy": (nn.CrossEntropyLoss(), torch.randn(4, 3, generator=g), torch.tensor([0, 2, 1, 1])),
    "summed": (nn.CrossEntropyLoss(reduction="sum"), torch.randn(2, 3, generator=g), torch.tensor([0, 2])),
    "ignored": (nn.CrossEntropyLoss(), torch.randn(4, 3, generator=g), CLASSES),
    "class weights": (
        nn.CrossEntropyLoss(weight=torch.tensor([0.2, 1.0, 3.0])),
        torch.randn(4, 3, generator=g),
        CLASSES,
    ),
    "smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), torch.randn(2, 3, generator=g), torch.tensor([0, 2])),
    "images": (nn.CrossEntropyLoss(), torch.randn(1, 3, 2, 1, generator=g), torch.tensor([[[0], [2]]])),
    "squared error": (nn.MSELoss(), torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g)),
    "summed squares": (nn.MSELoss(reduction="sum"), torch.randn(2, 3, generator=g), torch.randn(2, 3, generator=g)),
    "binary": (nn.BCEWithLogitsLoss(), torch.randn(5, generator=g), torch.tensor([0.0, 1, 1, 0, 0.3])),
    "positive weights": (
        nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0)),
        torch.randn(3, generator=g),
        torch.ones(3),
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_sampled_gradients_have_the_loss_hessian_as_covariance(name: str) -> None:
    loss, outputs, targets = LOSSES[name]
    outputs = outputs.double()
    loss = loss.double()
    targets = targets.double() if targets.is_floating_point() else targets
    H = torch.autograd.functional.hessian(lambda z: loss(z, targets), outputs).reshape(outputs.numel(), -1)
    generator = torch.Generator().manual_seed(1)
    rule = loss_rule(loss)
    draws = torch.stack([rule.sampled_gradient(outputs, targets, generator).reshape(-1) for _ in range(3000)])
    upper = torch.triu_indices(*H.shape)
    squares = torch.einsum("si,sj->sij", draws, draws)[:, upper[0], upper[1]]
    scores = z_scores(squares, H[upper[0], upper[1]])
    assert scores.abs().max() < 4.5
    assert z_scores(draws, torch.zeros(outputs.numel(), dtype=torch.float64)).abs().max() < 4.5


def test_unknown_losses_are_refused() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, curvature="gauss-newton-bartlett", loss=nn.NLLLoss())
    with pytest.raises(InputError, match="targets can be sampled for cross-entropy"):
        optimizer.step(problem.pair)


def test_nothing_is_drawn_from_outputs_that_are_not_finite() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, curvature="fisher", loss=F.cross_entropy)
    with pytest.raises(NonFiniteError, match="the loss is nan: parameters are left as they are"):
        optimizer.step(lambda: (problem.model(problem.x) * torch.inf, problem.y))
    optimizer = AdaHessian(problem.params, curvature="fisher", loss=F.cross_entropy, check_finite=False)
    with pytest.raises(NonFiniteError, match="the run has diverged"):
        optimizer.step(lambda: (problem.model(problem.x) * torch.inf, problem.y))


# -- sources ----------------------------------------------------------------------------------------------------------


def gauss_newton_diagonal(problem: Problem) -> Tensor:
    """Return diag J' H J, by functional Jacobians."""
    names = [n for n, _ in problem.model.named_parameters()]

    def outputs(theta: Tensor) -> Tensor:
        return functional_call(problem.model, dict(zip(names, problem.split(theta), strict=True)), (problem.x,))

    J = jacrev(outputs)(problem.flat()).reshape(-1, problem.flat().numel())
    z = problem.model(problem.x).detach()
    H = torch.autograd.functional.hessian(lambda z: F.cross_entropy(z, problem.y), z).reshape(z.numel(), -1)
    return torch.einsum("oi,op,pi->i", J, H, J)


class Recorder(AdaHessian):
    """Moves nothing and keeps what curvature it is handed, flat."""

    def __init__(self, *args: Any, loss: Any = F.cross_entropy, **settings: Any) -> None:
        super().__init__(*args, loss=loss, **settings)
        self.seen: list[Tensor] = []

    def _update(self, *args: Any) -> None:
        self.seen.append(torch.cat([c.reshape(-1) for c in args[3]]))


def estimates(problem: Problem, curvature: Any, draws: int, loss: Any = F.cross_entropy) -> Tensor:
    """Return what an optimizer that moves nothing hands to its update, flat, for many steps."""
    optimizer = Recorder(problem.params, curvature=curvature, loss=loss)
    for _ in range(draws):
        optimizer.step(problem.pair)
    return torch.stack(optimizer.seen)


@pytest.mark.parametrize("probes", [1, 3])
def test_hessian_diagonal_is_unbiased_with_the_variance_of_its_formula(probes: int) -> None:
    problem = mlp()
    _, H = problem.dense()
    drawn = estimates(problem, HessianDiagonal(probes), 400)
    assert z_scores(drawn, H.diagonal()).abs().max() < 4.5
    expected = ((H**2).sum(1) - H.diagonal() ** 2) / probes
    ratio = drawn.var(0) / expected
    assert 0.9 < ratio.mean() < 1.1


def test_row_norms() -> None:
    problem = mlp()
    _, H = problem.dense()
    for probes in (1, 3):
        drawn = estimates(problem, RowNorm(probes), 400)
        assert z_scores(drawn**2, (H**2).sum(1)).abs().max() < 4.5


def test_gauss_newton_bartlett_is_unbiased() -> None:
    problem = mlp()
    exact = gauss_newton_diagonal(problem)
    for samples in (1, 4):
        drawn = estimates(problem, GaussNewtonBartlett(samples), 400)
        scores = z_scores(drawn, exact)
        assert scores.abs().max() < 4.5
        assert bool((drawn >= 0).all())


def test_fisher_is_the_information_of_the_model() -> None:
    """All classes of every example, weighted by their probability: no sampling, no Hessian of the loss."""
    problem = mlp()
    fisher = torch.zeros_like(problem.flat())
    for x in problem.x:
        p = problem.model(x).softmax(0).detach()
        for c in range(3):
            s = torch.autograd.grad(F.cross_entropy(problem.model(x), torch.tensor(c)), problem.params)
            fisher += p[c] * torch.cat([t.reshape(-1) for t in s]) ** 2 / len(problem.x)
    torch.testing.assert_close(fisher, gauss_newton_diagonal(problem), rtol=1e-9, atol=1e-12)
    assert z_scores(estimates(problem, "fisher", 400), fisher).abs().max() < 4.5


def squared_gradients(problem: Problem, loss: Any) -> Tensor:
    """Return the sum over examples, one at a time."""
    total = torch.zeros_like(problem.flat())
    for n in range(len(problem.x)):
        g = torch.autograd.grad(loss(problem.model(problem.x[n : n + 1]), problem.y[n : n + 1]), problem.params)
        total += torch.cat([t.reshape(-1) for t in g]) ** 2
    return total


@pytest.mark.parametrize(
    ("loss", "factor", "samples"),
    [
        (nn.CrossEntropyLoss(), 1 / 12, 1),
        (nn.CrossEntropyLoss(reduction="sum"), 1.0, 1),
        (nn.MultiMarginLoss(), 1 / 12, 4),
    ],
)
def test_empirical_fisher_is_unbiased(loss: nn.Module, factor: float, samples: int) -> None:
    problem = mlp()
    drawn = estimates(problem, EmpiricalFisher(samples), 400, loss=loss)
    assert z_scores(drawn, factor * squared_gradients(problem, loss)).abs().max() < 4.5
    assert bool((drawn >= 0).all())


def test_empirical_fisher_of_one_example_is_its_squared_gradient() -> None:
    problem = mlp()
    problem.x, problem.y = problem.x[:1], problem.y[:1]
    (drawn,) = estimates(problem, "empirical-fisher", 1)
    torch.testing.assert_close(drawn, squared_gradients(problem, F.cross_entropy), rtol=1e-12, atol=1e-15)
    x, y = problem.x[0], problem.y[0]
    problem.x, problem.y = x, y  # without a dimension of examples
    (unbatched,) = estimates(problem, "empirical-fisher", 1)
    torch.testing.assert_close(unbatched, drawn, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    ("targets", "weight"), [([-100, 2, -100, -100], None), ([1, 2, 0, 1], [0.0, 0.0, 3.0])], ids=["ignored", "weights"]
)
def test_empirical_fisher_of_rows_that_do_not_count(targets: list[int], weight: list[float] | None) -> None:
    """One row counts: the estimate is its squared gradient, without error."""
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    loss = nn.CrossEntropyLoss(weight=None if weight is None else torch.tensor(weight, dtype=torch.float64))
    y = torch.tensor(targets)
    drawn = EmpiricalFisher(1)._draw(loss_rule(loss), z.detach(), y, torch.Generator().manual_seed(0))
    (exact,) = torch.autograd.grad(F.cross_entropy(z[1:2], y[1:2]), z)
    torch.testing.assert_close(drawn.square(), exact.square())


def test_empirical_fisher_over_micro_batches() -> None:
    problem = mlp()
    optimizer = Recorder(problem.params, curvature="empirical-fisher")
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.accumulate(problem.pair_of(slice(0, 4)), weight=4 / 12)
        optimizer.accumulate(problem.pair_of(slice(4, 12)), weight=8 / 12)
        optimizer.step()
    exact = squared_gradients(problem, F.cross_entropy) / 12
    assert z_scores(torch.stack(optimizer.seen), exact).abs().max() < 4.5


def test_gauss_newton_bartlett_over_micro_batches() -> None:
    """Parts draw independently; weighted by their share they have the expectation of the joined batch."""
    problem = mlp()
    optimizer = Recorder(problem.params, curvature="gauss-newton-bartlett")
    for _ in range(400):
        optimizer.zero_grad()
        optimizer.accumulate(problem.pair_of(slice(0, 6)), weight=0.5)
        optimizer.accumulate(problem.pair_of(slice(6, 12)), weight=0.5)
        optimizer.step()
    scores = z_scores(torch.stack(optimizer.seen), gauss_newton_diagonal(problem))
    assert scores.abs().max() < 4.5


def test_micro_batches_draw_apart() -> None:
    problem = mlp()
    optimizer = Recorder(problem.params, curvature="gauss-newton-bartlett")
    for weights in [(1.0,), (0.5, 0.5)]:
        optimizer.param_groups[0]["num_steps"] = 0  # the same counters, but for the place within the step
        optimizer.zero_grad()
        for weight in weights:
            optimizer.accumulate(problem.pair, weight=weight)
        optimizer.step()
    once, twice = optimizer.seen
    second = 2 * twice - once
    assert bool((second >= -1e-12).all())
    assert not torch.allclose(second, once, rtol=0.1)


def test_a_source_of_ones_own() -> None:
    """Identity curvature makes AdaHessian an average of gradients."""

    class Ones(HessianDiagonal):
        second_order = False

        def measure(self, batch: Any) -> list[list[Tensor]]:
            return [[torch.ones_like(p) for p in batch.params]]

    problem, twin = mlp(), mlp()
    optimizer = AdaHessian(problem.params, lr=0.1, eps=0.0, curvature=Ones())
    adam = torch.optim.SGD(twin.params, lr=0.1)
    optimizer.step(problem.closure)
    twin.closure().backward()
    adam.step()
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-12, atol=1e-14)
