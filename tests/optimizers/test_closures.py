"""What closures may return and do, for every optimizer: it works as one evaluation would, or says what to write."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from analysis.training.gradient_penalty import GradientPenalty
from curvature.errors import CurvatureError, InputError, NonFiniteError
from optimizers import (
    ESGD,
    SASSHA,
    AdaHessian,
    CubicNewton,
    LevenbergMarquardt,
    NaturalGradient,
    NewtonCG,
    SaddleFreeNewton,
    SketchyNewton,
    Sophia,
    TrustRegionNewton,
    minimize,
)
from optimizers.newton.line_search import Grid, StrongWolfe
from optimizers.newton.minimize import METHODS
from tests.optimizers.test_ranks import flat

MAKERS: dict[str, Callable[..., Any]] = {
    "AdaHessian": lambda p: AdaHessian(p, lr=0.01),
    "Sophia": lambda p: Sophia(p, curvature="hessian-diagonal", update_every=1),
    "ESGD": lambda p: ESGD(p, lr=0.01, update_every=1),
    "SASSHA": lambda p: SASSHA(p, lr=0.01, update_every=1),
    "NewtonCG": lambda p: NewtonCG(p, max_iterations=8),
    "NewtonCG, Wolfe, Nystrom": lambda p: NewtonCG(
        p, max_iterations=8, line_search=StrongWolfe(), preconditioner="nystrom", rank=2
    ),
    "TrustRegionNewton": TrustRegionNewton,
    "TrustRegionNewton, too far": lambda p: TrustRegionNewton(p, radius=1e5),
    "TrustRegionNewton, escape": lambda p: TrustRegionNewton(p, subproblem="gltr", escape=True),
    "CubicNewton": lambda p: CubicNewton(p, sigma=1e-3),
    "SaddleFreeNewton": lambda p: SaddleFreeNewton(p, num_steps=4),
    "SketchyNewton": lambda p: SketchyNewton(p, rank=2, momentum=0.5),
    "LevenbergMarquardt": LevenbergMarquardt,
    "NaturalGradient": lambda p: NaturalGradient(p, momentum=0.5),
    "NaturalGradient, grid": lambda p: NaturalGradient(p, line_search=Grid()),
}
NAMES = list(MAKERS)


def takes_residuals(name: str) -> bool:
    return name.startswith(("LevenbergMarquardt", "NaturalGradient"))


def closure_of(name: str, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    if takes_residuals(name):
        return lambda: net(x) - F.one_hot(y, 3)
    return lambda: F.cross_entropy(net(x), y)


class Drawn(nn.Module):
    """Buffers that are written to, and one that is replaced at each call; random numbers."""

    average: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = spectral_norm(nn.Linear(4, 5))
        self.norm = nn.BatchNorm1d(5)
        self.last = nn.Linear(5, 3)
        self.register_buffer("average", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(F.dropout(self.norm(self.first(x)).tanh(), 0.3))
        self.average = 0.9 * self.average + 0.1 * z.detach().mean(0)
        return z + 0.01 * self.average


def count(norm: Any) -> int:
    return int(norm.num_batches_tracked)


def problem() -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    return Drawn().double(), torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,))


@pytest.mark.parametrize("name", NAMES)
def test_buffers_and_random_numbers_move_once_a_step(name: str) -> None:
    net, x, y = problem()
    closure = closure_of(name, net, x, y)
    optimizer = MAKERS[name](net.parameters())
    for _ in range(2):
        twin, before = copy.deepcopy(net), torch.get_rng_state()
        optimizer.step(closure)
        state = torch.get_rng_state()
        torch.set_rng_state(before)
        twin(x)  # what one forward pass does
        assert torch.equal(torch.get_rng_state(), state)
        for (buffer, moved), expected in zip(net.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(moved, expected), buffer


@pytest.mark.parametrize("method", METHODS)
def test_minimize_moves_buffers_once_a_step_that_it_takes(method: str) -> None:
    net, x, y = problem()
    closure = closure_of("LevenbergMarquardt" if "marquardt" in method else "", net, x, y)
    result = minimize(closure, params=list(net.parameters()), method=method, max_steps=2)
    assert count(net.norm) == result.nit == 2


def test_penalties_covariances_and_separate_curvature_leave_buffers_alone() -> None:
    net, x, y = problem()
    loss = closure_of("", net, x, y)
    norm = net.norm
    GradientPenalty(torch.optim.SGD(net.parameters(), lr=0.1), strength=0.1).step(loss)
    assert count(norm) == 1
    before = [b.clone() for b in net.buffers()]
    twin = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 1)).double()
    LevenbergMarquardt(twin.parameters()).covariance(lambda: twin(x) - 1)
    assert count(twin[0]) == 0
    AdaHessian(net.parameters()).accumulate(loss, part="curvature")
    assert all(map(torch.equal, net.buffers(), before))
    for optimizer in (AdaHessian(net.parameters()), NewtonCG(net.parameters())):
        before_step = count(norm)
        optimizer.step(loss, curvature_closure=loss)
        assert count(norm) == before_step + 1


def test_a_curvature_batch_that_is_drawn_differs_from_step_to_step() -> None:
    w, x = nn.Parameter(torch.ones(3)), torch.arange(60.0).view(20, 3)
    drawn = []

    def curvature_closure() -> Tensor:
        rows = torch.randint(20, (5,))
        drawn.append(rows)
        return (x[rows] * w).square().mean()

    optimizer = NewtonCG([w])
    for _ in range(2):
        optimizer.step(lambda: (x * w).square().mean(), curvature_closure)
    assert not torch.equal(drawn[0], drawn[-1])


@pytest.mark.parametrize("name", NAMES)
def test_shapes_frozen_and_unused_parameters_and_groups_added_later(name: str) -> None:
    """With parameters of no and of zero dimensions, frozen and unused ones, the steps are those of one flat vector."""
    a = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)

    def parts(v: Tensor) -> Tensor:
        return torch.cat([v - 1, (v[:1] * v[1:]).reshape(-1)])

    def closure(value: Callable[[], Tensor]) -> Callable[[], Tensor]:
        return value if takes_residuals(name) else lambda: value().square().sum() / 2

    one = nn.Parameter(a.clone())
    scalar, rest = nn.Parameter(a[0].clone()), nn.Parameter(a[1:].clone())
    empty, frozen, unused = nn.Parameter(a[:0]), nn.Parameter(a.clone(), requires_grad=False), nn.Parameter(a.clone())
    joined, apart = MAKERS[name]([one]), MAKERS[name]([scalar, empty, rest, frozen, unused])
    deterministic = name in ("NewtonCG", "TrustRegionNewton", "CubicNewton", *filter(takes_residuals, NAMES))
    for _ in range(3):
        joined.step(closure(lambda: parts(one)))
        apart.step(closure(lambda: parts(torch.cat([scalar[None], empty, rest]))))
        if deterministic:
            together = torch.cat([scalar.detach()[None], rest.detach()])
            torch.testing.assert_close(together, one.detach(), rtol=1e-6, atol=1e-9)
    assert torch.equal(frozen, a)
    assert torch.equal(unused, a)
    late = nn.Parameter(a.clone())
    apart.add_param_group({"params": [late]})
    for _ in range(2):
        apart.step(closure(lambda: torch.cat([parts(torch.cat([scalar[None], rest])), late * 2])))
    assert bool(late.isfinite().all())
    assert not torch.equal(late, a)
    rest.requires_grad_(False)
    apart.step(closure(lambda: torch.cat([parts(torch.cat([scalar[None], rest])), late * 2])))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_closure_returns_is_the_loss_or_refused(name: str) -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    optimizer = MAKERS[name]([w])

    def loss() -> Any:
        return w - 3 if takes_residuals(name) else (w - 3).square().sum()

    def calls_backward() -> Tensor:
        value = (w - 3).square()
        value.sum().backward(retain_graph=True)
        return value if takes_residuals(name) else value.sum()

    wrong: dict[str, Callable[[], Any]] = {
        "'loss'": lambda: {"loss": loss(), "logits": w},
        "'a'": lambda: {"a": loss(), "b": loss()},
        "list of 3": lambda: [loss(), w, None],
        "NoneType": lambda: None,
        "no backward": calls_backward,
        "graph": lambda: loss().detach(),
    }
    for words, closure in wrong.items():
        with pytest.raises(InputError, match=words):
            optimizer.step(closure)
        assert w.tolist() == [1.0, 2.0], words
    with pytest.raises((NonFiniteError, InputError)):
        optimizer.step(lambda: loss() * torch.nan)
    assert w.tolist() == [1.0, 2.0]
    optimizer.step(lambda: (optimizer.zero_grad(), loss())[1])
    assert w.tolist() != [1.0, 2.0]


@pytest.mark.parametrize("name", [name for name in NAMES if takes_residuals(name)])
def test_a_loss_and_outputs_with_targets_are_no_residuals(name: str) -> None:
    net, x, y = problem()
    optimizer = MAKERS[name](net.parameters())
    before = flat(net)
    for closure in (lambda: F.cross_entropy(net(x), y), lambda: [F.cross_entropy(net(x), y)]):
        with pytest.raises(InputError, match="returned one number, a loss"):
            optimizer.step(closure)
    for targets in (y, F.one_hot(y, 3).double()):
        with pytest.raises(InputError, match=r"tensor 2 of 2 .* it is no residual"):
            optimizer.step(lambda targets=targets: (net(x), targets))
    assert torch.equal(flat(net), before)
    optimizer.step(lambda: net(x) - F.one_hot(y, 3))  # the remedy
    assert not torch.equal(flat(net), before)


@pytest.mark.parametrize(
    "halve", [lambda z: z.mul_(0.5), lambda z: (0.5 * z, z.data.mul_(0.5))[0]], ids=["counted", "past autograd's count"]
)
def test_a_loss_that_writes_into_the_outputs_is_refused(halve: Callable[[Tensor], Tensor]) -> None:
    net, x, y = problem()
    before = flat(net)
    halved = Sophia(net.parameters(), curvature="hessian-diagonal", loss=lambda z, y: F.cross_entropy(halve(z), y))
    with pytest.raises(InputError, match="writes into the outputs"):
        halved.step(lambda: (net(x), y))
    assert torch.equal(flat(net), before)
    remedy = Sophia(net.parameters(), curvature="hessian-diagonal", loss=lambda z, y: F.cross_entropy(0.5 * z, y))
    remedy.step(lambda: (net(x), y))
    assert not torch.equal(flat(net), before)


def test_remedies_of_sampled_curvature_work() -> None:
    net, x, y = problem()
    with pytest.raises(InputError, match=r'give loss= .* pass curvature="hessian-diagonal"'):
        Sophia(net.parameters()).step(lambda: F.cross_entropy(net(x), y))
    before = flat(net)
    Sophia(net.parameters(), loss=F.cross_entropy).step(lambda: (net(x), y))
    after = flat(net)
    Sophia(net.parameters(), curvature="hessian-diagonal").step(lambda: F.cross_entropy(net(x), y))
    assert len({tuple(v.tolist()) for v in (before, after, flat(net))}) == 3
    F.cross_entropy(net(x), y).backward()
    with pytest.raises(CurvatureError, match="give loss= to the optimizer"):
        Sophia(net.parameters()).step()


def test_micro_batches_keep_their_curvature() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    optimizer = AdaHessian([w])
    optimizer.accumulate(lambda: w.square().sum(), weight=0.5)

    def clears() -> Tensor:
        optimizer.zero_grad()
        return w.square().sum()

    with pytest.raises(InputError, match=r"must not call zero_grad\(\)"):
        optimizer.accumulate(clears, weight=0.5)


@pytest.mark.parametrize("name", NAMES)
def test_parameters_that_the_model_no_longer_holds_are_refused(name: str) -> None:
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 2), torch.randn(6, 3), torch.randn(6, 2)

    def closure() -> Tensor:
        return model(x) - y if takes_residuals(name) else (model(x) - y).square().mean()

    optimizer = MAKERS[name](model.parameters())
    optimizer.step(closure)
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(InputError, match=r"assign=True.* build the optimizer anew"):
        optimizer.step(closure)


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_graphs_of_steps_come_and_go_without_page_faults() -> None:
    code = """
import resource, torch, optimizers
from torch import nn
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(4, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 1))
x = torch.randn(2000, 4)
optimizer = optimizers.AdaHessian(model.parameters(), lr=1e-6)
faults = []
for _ in range(6):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    optimizer.step(lambda: model(x).square().mean())
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(*faults)
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    faults = [*map(int, done.stdout.split())]
    assert sum(faults[-3:]) < 3000 < faults[0]  # pages of 4 KiB; the graph of one step takes some 8000


@pytest.mark.parametrize("what", ["hook", "embedding"])
def test_what_acts_on_gradients_in_training_acts_in_closures(what: str) -> None:
    """A hook that turns gradients (domain adversarial training), and rows of a table scaled by frequency."""
    torch.manual_seed(0)
    table = nn.Embedding(4, 3, scale_grad_by_freq=what == "embedding").double()
    head = nn.Linear(3, 2).double()
    tokens, y = torch.tensor([[0, 1], [1, 1], [2, 1]]), torch.tensor([0, 1, 1])

    def loss() -> Tensor:
        h = table(tokens).mean(1).tanh()
        if what == "hook":
            h.register_hook(lambda g: -g)
        return F.cross_entropy(head(h), y)

    params = [*table.parameters(), *head.parameters()]
    expected = torch.autograd.grad(loss(), params)
    AdaHessian(params, lr=0.0).step(loss)
    for p, g in zip(params, expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=1e-14)
