"""The shell of matrix optimizers: routes, AdamW inside, closures, dtypes, scalers, groups and states."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature.errors import InputError, NonFiniteError
from optimizers import ASAM, EKFAC, KFAC, SAM, SASSHA, SOAP, AdaHessian, Shampoo
from tests.optimizers.problems import Problem, convolutional, mlp

METHODS: dict[str, Any] = {"SOAP": SOAP, "Shampoo": Shampoo}
OF_CLOSURES: dict[str, Any] = {
    **METHODS,
    "SAM": lambda params, lr: SAM(params, torch.optim.SGD, lr=lr),
    "ASAM": lambda params, lr: ASAM(params, torch.optim.SGD, lr=lr),
}


def steps(problem: Problem, optimizer: Any, count: int) -> Tensor:
    for _ in range(count):
        optimizer.zero_grad()
        problem.closure().backward()
        optimizer.step()
    return problem.flat()


@pytest.mark.parametrize("name", METHODS)
def test_vectors_take_the_steps_of_torchs_adamw(name: str) -> None:
    """Bit for bit: it is torch's, with its own betas and its share of lr under a scheduler."""
    ours, theirs = mlp(), mlp()
    biases = [p for p in theirs.params if p.ndim == 1]
    optimizer = METHODS[name](ours.params, lr=0.02, weight_decay=0.1, adamw_betas=(0.9, 0.99), adamw_scale=0.5)
    adamw = torch.optim.AdamW(biases, lr=0.01, weight_decay=0.1, betas=(0.9, 0.99), eps=1e-8, foreach=True)
    schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, adamw)]
    for _ in range(4):
        gradients = torch.autograd.grad(ours.closure(), ours.params)
        for p, q, g in zip(ours.params, theirs.params, gradients, strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        adamw.step()
        for schedule in schedules:
            schedule.step()
        for p, q in zip(ours.params, theirs.params, strict=True):
            if p.ndim == 1:
                assert torch.equal(p, q)


def test_routes_say_what_goes_where_and_why() -> None:
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(30, 4),
            "conv": nn.Conv2d(3, 5, 2),
            "one": nn.Linear(7, 1, bias=False),
            "wide": nn.Linear(12, 11, bias=False),
        }
    )
    model.register_parameter("scale", nn.Parameter(torch.ones(())))
    model.register_parameter("none", nn.Parameter(torch.ones(0, 3)))
    named = dict(model.named_parameters())
    embedding = [("embedding.weight", named.pop("embedding.weight"))]
    optimizer = SOAP([{"params": embedding, "method": "adamw"}, {"params": list(named.items())}], max_dim=10)
    assert optimizer.routes() == {
        "embedding.weight": "AdamW: by choice",
        "scale": "AdamW: a scalar",
        "none": "AdamW: empty",
        "conv.weight": "SOAP, 5 x 3 x 2 x 2",
        "conv.bias": "AdamW: a vector",
        "one.weight": "AdamW: a vector in effect",
        "wide.weight": "AdamW: both sides above max_dim = 10",
    }
    with pytest.raises(InputError, match=r'method="adamw", or take "auto"'):
        SOAP(model.conv.parameters(), method="matrix")  # type: ignore[union-attr]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("problem", [mlp, convolutional])
def test_closures_of_both_kinds_take_the_step_of_a_backward_pass(name: str, problem: Callable[[], Problem]) -> None:
    def calls_backward(p: Problem, optimizer: Any) -> Callable[[], Tensor]:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = p.closure()
            loss.backward()
            return loss

        return closure

    def pair(p: Problem, _: Any) -> Callable[[], Any]:
        return p.pair

    def loss(p: Problem, _: Any) -> Callable[[], Any]:
        return p.closure

    plain = problem()
    expected = steps(plain, METHODS[name](plain.params, lr=0.01), 4)
    for kind in (calls_backward, pair, loss):
        p = problem()
        optimizer = METHODS[name](p.params, lr=0.01, loss=nn.CrossEntropyLoss())
        for _ in range(4):
            before = float(p.closure().detach())
            returned = optimizer.step(kind(p, optimizer))
            assert float(returned) == before
            assert not returned.requires_grad
        assert torch.equal(p.flat(), expected)


@pytest.mark.parametrize("name", METHODS)
def test_states_of_bfloat16_stay_float32_through_a_file(name: str) -> None:
    def make() -> tuple[nn.Linear, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3).bfloat16()
        return model, METHODS[name](model.parameters(), lr=0.01)

    def step(model: nn.Linear, optimizer: Any, number: int) -> None:
        x = torch.randn(5, 4, generator=torch.Generator().manual_seed(number)).bfloat16()
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, optimizer = make()
    for number in range(12):
        step(model, optimizer, number)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    twin, other = make()
    twin.load_state_dict(states[0])
    other.load_state_dict(states[1])
    kinds = {t.dtype for state in other.state.values() for t in state.values()}
    assert kinds == {torch.float32}
    for number in range(12, 24):
        step(model, optimizer, number)
        step(twin, other, number)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_a_scaler_skips_infinities_and_takes_the_same_steps(name: str) -> None:
    plain, scaled = mlp(), mlp()
    optimizer = METHODS[name](scaled.params, lr=0.01)
    expected = steps(plain, METHODS[name](plain.params, lr=0.01), 3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for overflows in (False, True, False, False):
        optimizer.zero_grad()
        scaler.scale(scaled.closure()).backward()
        if overflows:
            assert scaled.params[0].grad is not None
            scaled.params[0].grad[0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(scaled.flat(), expected, rtol=1e-12, atol=1e-14)
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_gradient_is_refused_and_nothing_moves(name: str) -> None:
    problem = mlp()
    optimizer = METHODS[name](problem.params, lr=0.01)
    steps(problem, optimizer, 2)
    before, state = problem.flat(), copy.deepcopy(optimizer.state_dict())
    problem.closure().backward()
    assert problem.params[2].grad is not None
    problem.params[2].grad[1, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"the first of shape \(3, 4\)"):
        optimizer.step()
    assert torch.equal(problem.flat(), before)
    torch.testing.assert_close(optimizer.state_dict()["state"], state["state"], rtol=0, atol=0)
    sparse = nn.Embedding(5, 4, sparse=True)
    sparse(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="sparse=False"):
        METHODS[name](sparse.parameters()).step()
    with pytest.raises(InputError, match="view_as_real"):
        METHODS[name]([nn.Parameter(torch.ones(2, 2, dtype=torch.complex64))])
    with pytest.raises(InputError, match="must return the loss"):
        METHODS[name](problem.params).step(lambda: problem.pair()[0])
    with pytest.raises(InputError, match="adamw_betas"):
        METHODS[name](problem.params, adamw_betas=(0.9, 1.0))


@pytest.mark.parametrize("name", METHODS)
def test_clipping_before_the_update(name: str) -> None:
    ends = []
    for clips in (True, False):
        problem = mlp()
        optimizer = METHODS[name](problem.params, lr=0.01)
        if clips:
            optimizer.step(problem.closure, before_update=lambda p=problem: nn.utils.clip_grad_norm_(p.params, 1e-3))
        else:
            problem.closure().backward()
            nn.utils.clip_grad_norm_(problem.params, 1e-3)
            optimizer.step()
        ends.append(problem.flat())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", OF_CLOSURES)
@pytest.mark.parametrize("calls", [True, False])
def test_a_closure_may_clear_gradients_in_place(name: str, calls: bool) -> None:
    """`zero_()` writes to gradients, too, and is no backward()."""
    cleared, plain = mlp(), mlp()
    ours, theirs = (OF_CLOSURES[name](p.params, lr=0.02) for p in (cleared, plain))

    def closure() -> Tensor:
        ours.zero_grad(set_to_none=False)
        loss = cleared.closure()
        if calls:
            loss.backward()
        return loss

    for _ in range(4):
        assert float(ours.step(closure)) == float(theirs.step(plain.closure))
    assert torch.equal(cleared.flat(), plain.flat())


@pytest.mark.parametrize("name", OF_CLOSURES)
def test_a_loss_without_a_graph_is_refused_unless_gradients_were_found(name: str) -> None:
    problem = mlp()
    optimizer = OF_CLOSURES[name](problem.params, lr=0.02)
    with pytest.raises(InputError, match="no graph"):
        optimizer.step(torch.no_grad()(problem.closure))
    with pytest.warns(UserWarning, match="nothing moves"):
        assert optimizer.step(lambda: 0.0) == 0.0
    assert torch.equal(problem.flat(), mlp().flat())

    def cleared() -> Tensor:
        optimizer.zero_grad(set_to_none=False)
        return problem.closure().detach()

    optimizer.step(problem.closure)  # leaves gradients
    before = problem.flat()
    number = [lambda: problem.closure().item()] if name in METHODS else []  # SAM has no old gradients then
    for closure in (*number, lambda: problem.closure().detach(), cleared):
        with pytest.raises(InputError, match=r"its loss has no graph: compute it from the parameters"):
            optimizer.step(closure)
        assert torch.equal(problem.flat(), before)

    def by_hand() -> Tensor:
        loss = problem.closure()
        for p, g in zip(problem.params, torch.autograd.grad(loss, problem.params), strict=True):
            p.grad = g
        return loss.detach()

    optimizer.step(by_hand)
    assert not torch.equal(problem.flat(), before)


@pytest.mark.parametrize("method", [*OF_CLOSURES.values(), KFAC, EKFAC, AdaHessian, SASSHA])
def test_parameters_that_the_model_no_longer_holds_are_refused(method: Any) -> None:
    problem = mlp()
    more = {"loss": nn.functional.cross_entropy} if method in (KFAC, EKFAC) else {}
    closure = problem.pair if more else problem.closure
    optimizer = method(problem.params, lr=0.01, **more)
    optimizer.step(closure)
    problem.model.load_state_dict({k: v.clone() for k, v in problem.model.state_dict().items()}, assign=True)
    before = problem.flat()

    def classic() -> Tensor:
        problem.model.zero_grad()
        loss = problem.closure()
        loss.backward()
        return loss

    for one in (closure, classic) if method in OF_CLOSURES.values() else (closure,):
        with pytest.raises(InputError, match=r"assign=True.* build the optimizer anew"):
            optimizer.step(one)
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize("name", METHODS)
def test_the_old_gradient_of_a_frozen_parameter_counts_once_at_most(name: str) -> None:
    problem = mlp()
    frozen = problem.params[0]
    problem.closure().backward()
    frozen.requires_grad_(False)
    before = frozen.clone()
    METHODS[name](problem.params, lr=0.01).step(problem.closure)
    assert torch.equal(frozen, before)
