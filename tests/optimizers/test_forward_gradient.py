"""Forward gradients are unbiased with the variance that they state, by weights and by activities."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers import ForwardGradient
from optimizers.shared.probes import random_normals, random_signs
from tests.optimizers.problems import Problem, convolutional, mlp
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

Made = partial(ForwardGradient, base=torch.optim.SGD, lr=0.0)


def flat_grad(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in params])


def errors_of(problem: Problem, closure: Any, draws: int = 400, **settings: Any) -> tuple[Tensor, Any]:
    """Return the errors of so many estimates, (draws, P), in units of |g|."""
    gradient = problem.dense()[0]
    optimizer, found = Made(problem.params, loss=F.cross_entropy, **settings), []
    for _ in range(draws):
        optimizer.step(closure)
        found.append((flat_grad(problem.params) - gradient) / gradient.norm())
    return torch.stack(found), optimizer


def z_scores(samples: Tensor, expected: Tensor | float) -> Tensor:
    return (samples.mean(0) - expected) / (samples.std(0) / len(samples) ** 0.5)


@pytest.mark.parametrize(("directions", "m"), [("normal", 1), ("signs", 1), ("normal", 3)])
def test_unbiased_with_the_stated_variance(directions: Any, m: int) -> None:
    problem = mlp()
    errors, optimizer = errors_of(problem, problem.closure, directions=directions, num_directions=m)
    P = problem.flat().numel()
    assert optimizer.relative_variance == (P + (1 if directions == "normal" else -1)) / m
    assert float(z_scores(errors, 0.0).square().mean()) < 2  # 1 on average over P scores
    assert float(z_scores(errors, 0.0).abs().max()) < 4.5
    assert abs(float(z_scores(errors.square().sum(1), optimizer.relative_variance))) < 3.5


@pytest.mark.parametrize(("make", "kind"), [(mlp, "pair"), (mlp, "loss"), (convolutional, "pair")])
def test_activities_are_unbiased_too(make: Any, kind: str) -> None:
    problem = make()
    closure = problem.pair if kind == "pair" else problem.closure
    errors, optimizer = errors_of(problem, closure, activities_of=problem.model)
    assert optimizer.relative_variance is None
    assert float(z_scores(errors, 0.0).square().mean()) < 2
    assert float(z_scores(errors, 0.0).abs().max()) < 4.5


def test_activities_have_the_variance_of_a_layers_outputs() -> None:
    """One linear layer with one example: the error of dL/dz is (K + 1) |dL/dz|^2, that of the weights times |x|^2."""
    torch.manual_seed(0)
    model = nn.Linear(50, 3, bias=False).double()
    problem = Problem(model, torch.randn(1, 50), torch.tensor([1]))
    errors, _ = errors_of(problem, problem.pair, activities_of=model)
    assert abs(float(z_scores(errors.square().sum(1), 4.0))) < 3.5
    weights, optimizer = errors_of(problem, problem.pair)
    assert optimizer.relative_variance == 151
    assert float(weights.square().sum(1).mean()) > 100


def test_it_is_the_sum_over_its_directions() -> None:
    for name, draw in (("normal", random_normals), ("signs", random_signs)):
        problem = mlp()
        optimizer = Made(problem.params, num_directions=3, directions=name, seed=4)
        optimizer.step(problem.closure)
        first = flat_grad(problem.params)
        gradient, expected = problem.dense()[0], torch.zeros_like(first)
        for j in range(3):
            v = torch.cat([t.reshape(-1) for t in draw(problem.params, 4, 0, j)])
            expected += (gradient @ v) * v / 3
        torch.testing.assert_close(first, expected, rtol=1e-10, atol=1e-12)
        before = problem.flat()
        optimizer.step(problem.closure)
        assert torch.equal(problem.flat(), before), "parameters are put back to the bit"
        assert not torch.equal(flat_grad(problem.params), first), "every step draws anew"


def test_random_numbers_and_running_statistics_are_those_of_one_evaluation() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 4)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, 1))
    for more in ({}, {"activities_of": model}):
        moved, states = int(model[1].num_batches_tracked), []  # type: ignore[arg-type, union-attr]
        optimizer = Made(model.parameters(), num_directions=3, **more)

        def closure(states: list[Tensor] = states) -> Tensor:
            states.append(torch.get_rng_state())
            return model(x).square().mean()

        loss = optimizer.step(closure)
        assert int(model[1].num_batches_tracked) == moved + 1  # type: ignore[arg-type, union-attr]
        assert len(states) == (6 if more else 3)  # a look at the layers takes three
        assert all(torch.equal(s, states[0]) for s in states)
        assert all(p.requires_grad for p in model.parameters())
        assert not loss.requires_grad
        assert torch.autograd.forward_ad.unpack_dual(model[1].running_mean).tangent is None  # type: ignore[arg-type, union-attr]


def test_attention_and_shared_weights() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    params = list(layer.parameters())
    optimizer = Made(params, num_directions=1)
    optimizer.step(lambda: layer(x).square().mean())
    found = flat_grad(params)
    v = torch.cat([t.reshape(-1) for t in random_normals(params, 0, 0, 0)])
    layer(x).square().mean().backward()
    true = torch.cat([p.grad.reshape(-1) for p in params if p.grad is not None]) - found  # backward adds
    torch.testing.assert_close(found, (true @ v) * v)


class WithPositions(nn.Module):
    """Positions are looked up once for all texts: (length, width), which is (N, width) for N texts of that length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.words, self.places, self.head = nn.Embedding(7, 5), nn.Embedding(length, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.words(x) + self.places(torch.arange(x.shape[1]))
        return self.head(h.tanh()).mean(1)  # type: ignore[no-any-return]


class Swaps(nn.Module):
    """Two examples change places inside."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x)[[1, 0, 2, 3, 4, 5]])  # type: ignore[no-any-return]


def weight_norm() -> nn.Module:
    first = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, 3))


@pytest.mark.parametrize("kind", ["positions", "weight norm", "swap"])
def test_rows_that_are_not_the_examples_are_refused_where_their_number_is_the_batchs(kind: str) -> None:
    torch.manual_seed(0)
    model: nn.Module = {"positions": WithPositions(4), "weight norm": weight_norm(), "swap": Swaps()}[kind]
    x = torch.randint(0, 7, (4, 4)) if kind == "positions" else torch.randn(6, 4)
    y = torch.randint(0, 3, (len(x),))
    optimizer = Made(model.parameters(), activities_of=model, loss=F.cross_entropy)
    with pytest.raises(InputError, match=rf"has the size of the batch, {len(x)}, and is not the examples"):
        optimizer.step(lambda: (model(x), y))
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    optimizer.step(lambda: F.cross_entropy(model(x), y))  # directions for all activities need no rows
    if kind != "swap":
        with pytest.raises(InputError, match="so that its rows are none"):
            optimizer.step(lambda: (model(x[:3]), y[:3]))


class Tied(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.table, self.hidden = how, nn.Embedding(7, 5), nn.Linear(5, 5)
        if how == "module":
            self.head = nn.Linear(5, 7, bias=False)
            self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.hidden(self.table(x)).tanh()
        return self.head(h) if self.how == "module" else F.linear(h, self.table.weight)  # type: ignore[no-any-return]


def test_parameters_that_act_outside_of_their_layers_are_refused() -> None:
    torch.manual_seed(0)
    x, y = torch.randint(0, 7, (6,)), torch.randint(0, 7, (6,))
    model = Tied("function")
    optimizer = Made(model.parameters(), activities_of=model, loss=F.cross_entropy)
    for pair in (True, False):
        with pytest.raises(InputError, match=r"table\.weight is also used outside of the forward pass of the layer"):
            optimizer.step(lambda pair=pair: (model(x), y) if pair else F.cross_entropy(model(x), y))  # type: ignore[misc]
    plain = mlp()
    optimizer = Made(plain.params, activities_of=plain.model)
    with pytest.raises(InputError, match=r"0\.bias is also used outside"):
        optimizer.step(lambda: plain.closure() + 1e-3 * plain.params[1].square().sum())
    model = Tied("module").double()
    given = Problem(model, torch.zeros(1), y)
    given.x = x  # type: ignore[assignment]
    errors, _ = errors_of(given, given.pair, activities_of=model)
    assert float(z_scores(errors, 0.0).square().mean()) < 2


class KeepsAPenalty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.penalty = nn.Parameter(torch.randn(3, 4)), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        self.penalty = self.weight.square().sum()
        return x @ self.weight.T


def test_what_a_layer_hands_on_beside_its_output_and_what_is_overwritten_are_refused() -> None:
    torch.manual_seed(0)
    layer, x = KeepsAPenalty(), torch.randn(6, 4)
    with pytest.raises(InputError, match="beside the tensor that it returns"):
        Made(layer.parameters(), activities_of=layer).step(lambda: layer(x).sum() + layer.penalty)
    linear = nn.Linear(4, 4)

    def overwrites() -> Tensor:
        h = x.clone()
        h += linear(h)
        return h.square().sum()

    with pytest.raises(InputError, match="was overwritten after its pass"):
        Made(linear.parameters(), activities_of=linear).step(overwrites)


@pytest.mark.parametrize("pair", [True, False])
def test_autocast_inside_of_the_closure_is_that_of_the_layers(pair: bool) -> None:
    problem = mlp()
    problem.model.float()
    x = problem.x.float()

    def closure() -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            outputs = problem.model(x)
        return (outputs, problem.y) if pair else F.cross_entropy(outputs, problem.y)

    optimizer = Made(problem.params, num_directions=800, activities_of=problem.model, loss=F.cross_entropy)
    optimizer.step(closure)
    found = flat_grad(problem.params).double()
    problem.model.double()
    gradient = problem.dense()[0]
    assert float(F.cosine_similarity(found, gradient, dim=0)) > 0.9


class Noisy(nn.Module):
    """A layer with random numbers of its own."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x @ self.weight.T, 0.5)


@pytest.mark.parametrize("graphs", [True, False])
def test_gradients_of_layers_are_those_of_the_random_numbers_of_their_pass(graphs: bool) -> None:
    """What both layers dropped shows in the gradient's zeros."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Dropout(0.5), Noisy(20, 30))
    x = torch.randn(1, 20, dtype=torch.float64)

    def closure() -> Tensor:
        torch.manual_seed(1)
        with torch.set_grad_enabled(graphs):
            return model(x).square().sum()  # type: ignore[no-any-return]

    Made(model.parameters(), activities_of=model).step(closure)
    found = flat_grad(list(model.parameters()))
    torch.manual_seed(1)
    (true,) = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    assert torch.equal(found != 0, true.reshape(-1) != 0)


def test_it_learns() -> None:
    problem = mlp()
    optimizer = ForwardGradient(problem.params, torch.optim.SGD, num_directions=4, lr=0.05, momentum=0.9)
    losses = [float(optimizer.step(problem.closure)) for _ in range(300)]
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])


def test_what_it_refuses() -> None:
    problem = mlp()
    optimizer = Made(problem.params)
    with pytest.raises(InputError, match="call no backward"):
        optimizer.step(lambda: problem.closure().backward())
    with pytest.raises(InputError, match="does not depend"):
        optimizer.step(lambda: torch.ones(()))
    with pytest.raises(InputError, match="without a forward mode"):
        optimizer.step(lambda: without_forward_mode(problem.params[0]))
    with pytest.raises(InputError, match="directions must be one of normal, signs"):
        Made(problem.params, directions="sphere")
    assert all(p.requires_grad for p in problem.params)
    with pytest.raises(InputError, match="num_directions must be the same in all groups"):
        Made([{"params": problem.params[:1]}, {"params": problem.params[1:], "num_directions": 2}])
    other = nn.Linear(2, 2)
    with pytest.raises(InputError, match=r"belong to no layer of activities_of"):
        Made(problem.params, activities_of=other).step(problem.closure)
    sizes = iter([12, *range(11, 0, -1)])
    with pytest.raises(InputError, match="must take its batch from outside"):
        Made(problem.params, activities_of=problem.model, loss=F.cross_entropy).step(
            lambda: problem.pair_of(slice(next(sizes)))()
        )
    batch_norm = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double()
    coupled = Problem(batch_norm, problem.x, problem.y)
    with pytest.raises(InputError, match="examples see each other in 1, a BatchNorm1d in training mode"):
        Made(coupled.params, activities_of=batch_norm, loss=F.cross_entropy).step(coupled.pair)


def without_forward_mode(p: Tensor) -> Tensor:
    x = p.sum() * torch.ones(1, 1, 4, 4, dtype=p.dtype)
    found: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, x, x)[0]
    return found.sum()


def _work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        joined, half = mlp(), mlp()
        Made(joined.params).step(joined.closure)
        Made(half.params, process_group=dist.group.WORLD).step(half.part(slice(6 * rank, 6 * rank + 6)))
        torch.testing.assert_close(flat_grad(half.params), flat_grad(joined.params))
        learner = Made(half.params, process_group=dist.group.WORLD, activities_of=half.model, loss=F.cross_entropy)
        learner.step(half.pair_of(slice(6 * rank, 6 * rank + 6)))
        found = [torch.zeros_like(half.flat()) for _ in range(2)]
        dist.all_gather(found, flat_grad(half.params))
        assert torch.equal(found[0], found[1])


@IN_TWO_PROCESSES
def test_two_ranks_estimate_the_gradient_of_the_joined_batch(tmp_path: Path) -> None:
    in_two_processes(_work, str(tmp_path))
