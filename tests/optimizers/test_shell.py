"""What every curvature-driven optimizer promises about steps: forms that agree, no graph left, edge cases of models."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature.errors import CheckFailedError, CurvatureError, InputError, NonFiniteError
from optimizers import ESGD, SASSHA, AdaHessian, Sophia
from optimizers.diagonal.shell import CurvatureOptimizer
from tests.optimizers.problems import Problem, convolutional, mlp, train

SAME = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-10, "atol": 1e-13}


def classic(problem: Problem, optimizer: AdaHessian) -> None:
    optimizer.zero_grad()
    problem.closure().backward(create_graph=optimizer.curvature_due)
    optimizer.step()


def accumulated(problem: Problem, optimizer: AdaHessian) -> None:
    optimizer.zero_grad()
    optimizer.accumulate(problem.closure)
    optimizer.step()


def of_loss(problem: Problem, optimizer: AdaHessian) -> None:
    optimizer.zero_grad()
    optimizer.accumulate(problem.closure())
    optimizer.step()


def separately(problem: Problem, optimizer: AdaHessian) -> None:
    optimizer.zero_grad()
    problem.closure().backward()
    if optimizer.curvature_due:
        optimizer.accumulate(problem.closure, part="curvature")
    optimizer.step()


def with_curvature_closure(problem: Problem, optimizer: AdaHessian) -> None:
    optimizer.step(problem.closure, curvature_closure=problem.closure)


FORMS: list[Callable[[Problem, AdaHessian], None]] = [
    classic,
    accumulated,
    of_loss,
    separately,
    with_curvature_closure,
]


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_a_step_agree(form: Callable[[Problem, AdaHessian], None], every: int) -> None:
    problem, twin = mlp(), mlp()
    ours = AdaHessian(problem.params, lr=0.05, update_every=every)
    theirs = AdaHessian(twin.params, lr=0.05, update_every=every)
    for _ in range(5):
        ours.step(problem.closure)
        form(twin, theirs)
        torch.testing.assert_close(problem.flat(), twin.flat(), **SAME)
        assert all(p.grad is not None and not p.grad.requires_grad for p in twin.params)


@pytest.mark.parametrize("curvature", ["hessian-diagonal", "row-norm"])
def test_micro_batches_give_the_step_of_the_joined_batch(curvature: str) -> None:
    problem, twin = mlp(), mlp()
    joined = AdaHessian(problem.params, lr=0.05, curvature=curvature, num_probes=2)
    cut = AdaHessian(twin.params, lr=0.05, curvature=curvature, num_probes=2)
    for _ in range(3):
        joined.step(problem.closure)
        cut.zero_grad()
        for rows, weight in [(slice(0, 7), 7 / 12), (slice(7, 12), 5 / 12)]:
            cut.accumulate(twin.part(rows), weight=weight)
        cut.step()
        torch.testing.assert_close(problem.flat(), twin.flat(), **CLOSE)
        for p, q in zip(problem.params, twin.params, strict=True):
            torch.testing.assert_close(p.grad, q.grad, **CLOSE)


def test_gradient_of_a_step_does_not_add_up() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=0.0)
    optimizer.step(problem.closure)
    first = [p.grad.clone() for p in problem.params]
    optimizer.step(problem.closure)
    for p, g in zip(problem.params, first, strict=True):
        torch.testing.assert_close(p.grad, g, **SAME)


def test_clipping_touches_gradients_only() -> None:
    problem, twin = mlp(), mlp()
    clipped, free = AdaHessian(problem.params, lr=0.05), AdaHessian(twin.params, lr=0.05)
    norms = []
    clipped.step(problem.closure, before_update=lambda: norms.append(nn.utils.clip_grad_norm_(problem.params, 1e-3)))
    free.step(twin.closure)
    assert float(norms[0]) > 1e-2
    torch.testing.assert_close(torch.cat([p.grad.reshape(-1) for p in problem.params]).norm().item(), 1e-3)
    for p, q in zip(problem.params, twin.params, strict=True):
        a, b = clipped.state[p], free.state[q]
        torch.testing.assert_close(a["exp_hessian_diag_sq"], b["exp_hessian_diag_sq"], **SAME)
        assert not torch.allclose(a["exp_avg"], b["exp_avg"])


def test_smaller_batch_for_curvature() -> None:
    """The gradient is the whole batch's, the curvature that of the part."""
    problem, twin, third = mlp(), mlp(), mlp()
    ours = AdaHessian(problem.params, lr=0.0)
    ours.step(problem.closure, curvature_closure=problem.part(slice(0, 4)))
    whole, part = AdaHessian(twin.params, lr=0.0), AdaHessian(third.params, lr=0.0)
    whole.step(twin.closure)
    part.step(third.part(slice(0, 4)))
    for p, q, r in zip(problem.params, twin.params, third.params, strict=True):
        torch.testing.assert_close(ours.state[p]["exp_avg"], whole.state[q]["exp_avg"], **SAME)
        torch.testing.assert_close(ours.state[p]["exp_hessian_diag_sq"], part.state[r]["exp_hessian_diag_sq"], **SAME)


def test_foreach_agrees_with_the_reference_on_all_shapes() -> None:
    shapes = [(), (3,), (2, 3), (2, 3, 4), (2, 3, 2, 2), (2, 1, 2, 2, 2), (0, 4)]

    def run(foreach: bool | None) -> list[Tensor]:
        torch.manual_seed(0)
        params = [torch.randn(s, dtype=torch.float64) for s in shapes]
        params += [torch.randn(4, 3, dtype=torch.float64).t(), torch.randn(2, 3, 4, 4, dtype=torch.float64)]
        params[-1] = params[-1].to(memory_format=torch.channels_last)
        params = [p.requires_grad_() for p in params]
        optimizer = AdaHessian(params, lr=0.05, foreach=foreach, weight_decay=0.1, update_every=2)
        train(optimizer, lambda: sum((p.sin() ** 2 * (1 + p.sum())).sum() for p in params), 5)
        assert all(optimizer.state[p]["exp_avg"].stride() == p.stride() for p in params)
        return [p.detach() for p in params]

    for a, b in zip(run(False), run(None), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


def test_capturable_agrees() -> None:
    problem, twin = mlp(), mlp()
    train(AdaHessian(problem.params, lr=0.05, weight_decay=0.1, update_every=2), problem.closure, 5)
    lr = torch.tensor(0.05, dtype=torch.float64)
    train(AdaHessian(twin.params, lr=lr, weight_decay=0.1, update_every=2, capturable=True), twin.closure, 5)
    torch.testing.assert_close(problem.flat(), twin.flat(), rtol=1e-6, atol=1e-8)


def test_maximize_is_minimising_the_negative() -> None:
    problem, twin = mlp(), mlp()
    train(AdaHessian(problem.params, lr=0.05, maximize=True), problem.closure, 3)
    train(AdaHessian(twin.params, lr=0.05), lambda: -twin.closure(), 3)
    torch.testing.assert_close(problem.flat(), twin.flat(), **CLOSE)


def test_groups_have_settings_of_their_own() -> None:
    problem = mlp()
    first, rest = problem.params[:2], problem.params[2:]
    before = problem.flat()
    groups = [{"params": first, "lr": 0.0}, {"params": rest, "update_every": 2, "hessian_power": 0.5}]
    optimizer = AdaHessian(groups, lr=0.05)
    train(optimizer, problem.closure, 4)
    n = sum(p.numel() for p in first)
    torch.testing.assert_close(problem.flat()[:n], before[:n], **SAME)
    assert not torch.allclose(problem.flat()[n:], before[n:])
    assert [float(optimizer.state[p]["hessian_step"]) for p in problem.params] == [4, 4, 2, 2]
    optimizer.add_param_group({"params": [torch.zeros(2, dtype=torch.float64, requires_grad=True)], "lr": 0.3})
    assert (optimizer.param_groups[2]["lr"], optimizer.param_groups[2]["num_steps"]) == (0.3, 0)
    train(optimizer, problem.closure, 1)


def test_frozen_unused_and_late_parameters() -> None:
    problem = mlp()
    unused = torch.ones(3, dtype=torch.float64, requires_grad=True)
    frozen = problem.params[1].requires_grad_(False)
    before = frozen.detach().clone()
    optimizer = AdaHessian([*problem.params, unused], lr=0.05, update_every=5, weight_decay=0.1)
    train(optimizer, problem.closure, 3)
    torch.testing.assert_close(frozen, before, **SAME)
    torch.testing.assert_close(unused, torch.ones_like(unused), **SAME)
    assert frozen not in optimizer.state
    assert unused not in optimizer.state
    frozen.requires_grad_()
    train(optimizer, problem.closure, 2)  # no curvature of it yet: it waits, but for the decay
    torch.testing.assert_close(frozen.detach(), before * (1 - 0.05 * 0.1) ** 2, **CLOSE)
    train(optimizer, problem.closure, 1)
    assert float(optimizer.state[frozen]["hessian_step"]) == 1
    assert bool(torch.isfinite(frozen).all())


def test_linear_and_constant_curvature() -> None:
    """Exactly zero curvature divides by eps alone; a loss that is linear in everything takes steps as well."""
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    AdaHessian([w], lr=1e-4, eps=1e-2).step(lambda: w.sum())
    torch.testing.assert_close(w.detach(), torch.full((2,), 1 - 1e-2, dtype=torch.float64))
    v, b = (
        torch.ones(2, dtype=torch.float64, requires_grad=True),
        torch.ones((), dtype=torch.float64, requires_grad=True),
    )
    optimizer = AdaHessian([v, b], lr=0.01)
    optimizer.step(lambda: (v**2).sum() + b)
    assert float(optimizer.state[b]["exp_hessian_diag_sq"]) == 0


def test_tied_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(3, 3)
            self.b = nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    torch.manual_seed(0)
    problem = Problem(Tied(), torch.randn(8, 3), torch.randint(0, 3, (8,)))
    assert len(problem.params) == 3
    optimizer = AdaHessian(problem.params, lr=0.02)
    losses = train(optimizer, problem.closure, 20)
    assert losses[-1] < losses[0]
    assert len(optimizer.state) == 3


def test_gradients_never_share_memory() -> None:
    """(a + b)^2 has one gradient tensor for both, a.sum() an expanded one; in-place clipping must be safe."""
    a, b = (torch.ones(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    c = torch.ones(3, dtype=torch.float64, requires_grad=True)
    optimizer = AdaHessian([a, b, c], lr=0.0)
    optimizer.step(lambda: ((a + b) ** 2).sum() + c.sum())
    assert len({p.grad.data_ptr() for p in (a, b, c)}) == 3
    c.grad.mul_(2)
    torch.testing.assert_close(c.grad, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_parameters_have_wide_averages(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    x, y = torch.randn(16, 3, dtype=dtype), torch.randint(0, 3, (16,))
    for foreach in (True, False):
        optimizer = AdaHessian(model.parameters(), lr=0.02, foreach=foreach)
        losses = train(optimizer, lambda: F.cross_entropy(model(x).float(), y), 15)
        assert losses[-1] < losses[0]
        assert {state["exp_avg"].dtype for state in optimizer.state.values()} == {torch.float32}
        assert {p.dtype for p in model.parameters()} == {dtype}


def test_autocast_in_the_closure_and_around_the_step() -> None:
    def run(around: bool) -> tuple[float, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(16, 3), torch.randint(0, 3, (16,))

        def closure() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return F.cross_entropy(model(x), y)

        optimizer = AdaHessian(model.parameters(), lr=0.02)
        losses = []
        for _ in range(10):  # one region a step: autocast keeps its casts of the weights until its region ends
            with torch.autocast("cpu", torch.bfloat16, enabled=around):
                losses.append(float(optimizer.step(closure)))
        assert losses[-1] < losses[0]
        return losses[-1], next(model.parameters()).detach()

    assert run(False)[0] == run(True)[0]
    torch.testing.assert_close(run(False)[1], run(True)[1], **SAME)


def test_fused_attention_runs_under_the_math_kernel() -> None:
    torch.manual_seed(0)
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    optimizer = AdaHessian([q], lr=0.01)

    def closure() -> Tensor:
        return F.scaled_dot_product_attention(q, q, q).square().mean()

    before = torch.backends.cuda.flash_sdp_enabled()
    losses = train(optimizer, closure, 3)
    assert losses[-1] < losses[0]
    assert torch.backends.cuda.flash_sdp_enabled() == before
    with pytest.raises(CheckFailedError, match=r"hand step\(\) or accumulate\(\) a closure"):
        optimizer.accumulate(closure())


def test_schedulers_and_tensor_learning_rates() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=torch.tensor(0.1, dtype=torch.float64))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for _ in range(2):
        optimizer.step(problem.closure)
        schedule.step()
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    cycle = torch.optim.lr_scheduler.OneCycleLR(AdaHessian(problem.params, lr=0.1), max_lr=0.1, total_steps=5)
    cycle.optimizer.step(problem.closure)
    cycle.step()
    assert cycle.optimizer.param_groups[0]["betas"][0] != 0.9


# -- no graph is left -------------------------------------------------------------------------------------------------


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(o), Tensor) for o in gc.get_objects())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("form", [None, classic, of_loss])
def test_memory_is_flat(form: Callable[[Problem, AdaHessian], None] | None, every: int) -> None:
    """A physics-informed loss, whose derivatives in the inputs make the graph that public versions leak."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    t = torch.linspace(0, 1, 16, dtype=torch.float64)[:, None]

    class Physics(Problem):
        def closure(self) -> Tensor:
            x = self.x.clone().requires_grad_()
            u = self.model(x)
            (du,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            (ddu,) = torch.autograd.grad(du.sum(), x, create_graph=True)
            return (ddu + torch.sin(x)).square().mean() + u[0].square().sum()

    problem = Physics(model, t, t)
    optimizer = AdaHessian(problem.params, lr=0.01, update_every=every)

    def step() -> None:
        if form is None:
            optimizer.step(problem.closure)
        else:
            form(problem, optimizer)

    for _ in range(2 * every):
        step()
    gc.disable()  # a cycle must not even wait for the collector
    try:
        before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
        for _ in range(120):
            step()
        after = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    finally:
        gc.enable()
    assert after - before <= 4, f"{after - before} tensors more after 120 steps"
    assert live_tensors() <= before + 4


@pytest.mark.parametrize("make", [AdaHessian, Sophia, ESGD, SASSHA])
def test_a_thousand_steps_leave_nothing(make: type[CurvatureOptimizer]) -> None:
    w = torch.tensor([1.0, -0.5], dtype=torch.float64, requires_grad=True)
    settings = {"curvature": "hessian-diagonal"} if make is Sophia else {}
    optimizer = make([w], lr=1e-3, update_every=2, **settings)  # type: ignore[call-arg]

    def steps(count: int) -> int:
        for _ in range(count):
            optimizer.step(lambda: torch.cosh(w * w.flip(0)).sum())
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = steps(4)
        assert steps(1000) <= before
    finally:
        gc.enable()


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_the_memory_test_sees_the_leak() -> None:
    problem = mlp()
    before = live_tensors()
    for _ in range(20):
        for p in problem.params:
            p.grad = None
        problem.closure().backward(create_graph=True)
        kept = [p.grad for p in problem.params]
        problem.model.leak = [*getattr(problem.model, "leak", []), kept]  # type: ignore[assignment]
    assert live_tensors() > before + 20


def test_the_returned_loss_holds_no_graph() -> None:
    problem = mlp()
    loss = AdaHessian(problem.params, lr=0.01).step(problem.closure)
    assert isinstance(loss, Tensor)
    assert loss.grad_fn is None


# -- refusals ---------------------------------------------------------------------------------------------------------


def misuse(kind: str) -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=0.01)

    def calls_backward() -> Tensor:
        loss = problem.closure()
        loss.backward()
        return loss

    if kind == "backward in the closure":
        optimizer.step(calls_backward)
    elif kind == "no graph in the closure":
        optimizer.step(lambda: problem.closure().detach())
    elif kind == "no graph when due":
        problem.closure().backward()
        optimizer.step()
    elif kind == "not a scalar":
        optimizer.step(lambda: problem.model(problem.x))
    elif kind == "not a tensor":
        optimizer.step(lambda: None)
    elif kind == "outputs without loss":
        optimizer.step(problem.pair)
    elif kind == "loss without outputs":
        AdaHessian(problem.params, curvature="gauss-newton-bartlett", loss=F.cross_entropy).step(problem.closure)
    elif kind == "gradients without outputs":
        problem.closure().backward(create_graph=True)
        AdaHessian(problem.params, curvature="gauss-newton-bartlett", loss=F.cross_entropy).step()
    elif kind == "part":
        optimizer.accumulate(problem.closure, part="all")  # type: ignore[arg-type]
    elif kind == "complex":
        AdaHessian([torch.zeros(2, dtype=torch.complex64, requires_grad=True)])
    elif kind == "not finite":
        w = torch.zeros(2, requires_grad=True)
        AdaHessian([w]).step(lambda: (w**1.5).sum())


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("backward in the closure", InputError, "call no backward"),
        ("no graph in the closure", InputError, "has no graph"),
        ("no graph when due", CheckFailedError, r"call step\(closure\)"),
        ("no graph when due", CheckFailedError, "process_group= given"),
        ("not a scalar", InputError, r"one entry, got \(12, 3\); reduce it"),
        ("not a tensor", InputError, "got NoneType"),
        ("outputs without loss", InputError, "loss= must be given"),
        ("loss without outputs", InputError, "closure that returns"),
        ("gradients without outputs", CheckFailedError, "closure that returns"),
        ("part", InputError, '"both", "gradient" or "curvature"'),
        ("complex", InputError, "view_as_real"),
        ("not finite", NonFiniteError, r"shape \(2,\)"),
    ],
)
def test_misuse_is_named(kind: str, error: type[CurvatureError], message: str) -> None:
    with pytest.raises(error, match=message):
        misuse(kind)


def test_sparse_gradients_of_embeddings_are_taken_as_dense_ones() -> None:
    moved = []
    for sparse in (True, False):
        torch.manual_seed(0)
        table = nn.Embedding(5, 2, sparse=sparse)
        optimizer = AdaHessian(table.parameters(), lr=0.1)
        optimizer.step(lambda table=table: table(torch.tensor([1, 3])).pow(4).sum())  # type: ignore[misc]
        moved.append(table.weight.detach())
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=0)


def test_after_a_refusal_gradients_hold_no_graph_and_the_step_can_be_taken() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=0.01)
    problem.closure().backward()
    with pytest.raises(CheckFailedError):
        optimizer.step()
    assert all(not p.grad.requires_grad for p in problem.params)
    optimizer.step(problem.closure)
    assert float(optimizer.state[problem.params[0]]["step"]) == 1


def test_zero_gradient_without_graph_creates_the_state_and_moves_nothing() -> None:
    """How torch.distributed.checkpoint makes the state of a fresh optimizer."""
    problem = convolutional()
    optimizer = AdaHessian(problem.params, lr=0.0, update_every=10)
    before = problem.flat()
    for p in problem.params:
        p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    torch.testing.assert_close(problem.flat(), before, **SAME)
    keys: set[Any] = {"step", "hessian_step", "exp_avg", "exp_hessian_diag_sq"}
    assert all(set(optimizer.state[p]) == keys for p in problem.params)
    assert optimizer.curvature_due  # it has measured none yet
    optimizer.step(problem.closure)
    assert float(optimizer.state[problem.params[0]]["hessian_step"]) == 1


def test_step_without_gradients_does_nothing() -> None:
    problem = mlp()
    optimizer = AdaHessian(problem.params, lr=0.1, weight_decay=0.1)
    before = problem.flat()
    with pytest.warns(UserWarning, match="nothing moves"):
        assert optimizer.step() is None
    torch.testing.assert_close(problem.flat(), before, **SAME)
    assert optimizer.param_groups[0]["num_steps"] == 0
