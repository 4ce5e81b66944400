"""SAM and ASAM against plain loops: groups, m-SAM, dropout, batch norm, scalers, ranks and models in parts."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from curvature.errors import InputError
from optimizers import ASAM, SAM, SOAP, Shampoo
from tests.optimizers.problems import Problem, mlp
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

LR, MOMENTUM = 0.05, 0.9


def perturbed_gradient(problem: Problem, closure: Any, rhos: list[float], eta: float | None) -> list[Tensor]:
    """The papers' formulas, at the present parameters."""
    params = problem.params
    before = [p.detach().clone() for p in params]
    g = torch.autograd.grad(closure(), params)
    T = [torch.ones_like(p) if eta is None else p.detach().abs() + eta for p in params]
    norm = torch.cat([(t * x).flatten() for t, x in zip(T, g, strict=True)]).norm()
    with torch.no_grad():
        for p, t, x, rho in zip(params, T, g, rhos, strict=True):
            p.add_(rho * t * t * x / norm)
    found = torch.autograd.grad(closure(), params)
    with torch.no_grad():
        for p, q in zip(params, before, strict=True):
            p.copy_(q)
    return list(found)


def plain(problem: Problem, parts: list[slice], steps: int, rhos: list[float], eta: float | None = None) -> Tensor:
    velocity = [torch.zeros_like(p) for p in problem.params]
    for _ in range(steps):
        found = [perturbed_gradient(problem, problem.part(rows), rhos, eta) for rows in parts]
        with torch.no_grad():
            for p, v, *gs in zip(problem.params, velocity, *found, strict=True):
                v.mul_(MOMENTUM).add_(torch.stack(gs).mean(0))
                p.sub_(LR * v)
    return problem.flat()


def groups(problem: Problem) -> list[dict[str, Any]]:
    return [{"params": problem.params[:2], "rho": 0.3}, {"params": problem.params[2:]}]


@pytest.mark.parametrize("method", [SAM, ASAM])
def test_both_forms_take_the_papers_step(method: Any) -> None:
    eta = 0.01 if method is ASAM else None
    expected = plain(mlp(), [slice(12)], 4, [0.3, 0.3, 0.1, 0.1], eta)
    for form in ("closure", "calls backward", "two calls"):
        problem = mlp()
        optimizer = method(groups(problem), torch.optim.SGD, rho=0.1, lr=LR, momentum=MOMENTUM)

        def classic(p: Problem = problem, o: Any = optimizer) -> Tensor:
            o.zero_grad()
            loss = p.closure()
            loss.backward()
            return loss

        for _ in range(4):
            before = float(problem.closure().detach())
            if form == "two calls":
                classic()
                optimizer.perturb()
                problem.closure().backward()
                optimizer.step()
            else:
                assert float(optimizer.step(problem.closure if form == "closure" else classic)) == before
        torch.testing.assert_close(problem.flat(), expected, rtol=1e-10, atol=1e-12)


def test_each_micro_batch_has_a_perturbation_of_its_own() -> None:
    parts = [slice(0, 4), slice(4, 8), slice(8, 12)]
    expected = plain(mlp(), parts, 3, [0.1] * 4)
    problem = mlp()
    optimizer = SAM(problem.params, torch.optim.SGD, rho=0.1, lr=LR, momentum=MOMENTUM)
    for _ in range(3):
        optimizer.step([problem.part(rows) for rows in parts])
    torch.testing.assert_close(problem.flat(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_running_statistics_are_those_of_one_pass(form: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    x = torch.randn(8, 4)
    once = copy.deepcopy(model)
    once(x)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=1.0, lr=0.1)
    if form == "closure":
        optimizer.step(lambda: model(x).square().mean())
    else:
        model(x).square().mean().backward()
        optimizer.perturb()
        model(x).square().mean().backward()
        optimizer.step()
    for a, b in zip(model.buffers(), once.buffers(), strict=True):
        assert torch.equal(a, b)
    model(x)  # and move again afterwards
    assert int(model[1].num_batches_tracked) == 2  # type: ignore[arg-type]


def test_dropout_masks_repeat() -> None:
    problem = mlp()
    seen = []

    def closure() -> Tensor:
        mask = torch.rand(12, 3) < 0.5
        seen.append(mask)
        return F.cross_entropy(problem.model(problem.x * mask), problem.y)

    SAM(problem.params, torch.optim.SGD, lr=0.1).step(closure)
    assert len(seen) == 2
    assert torch.equal(*seen)


@pytest.mark.parametrize("overflow", [None, "first", "second"])
def test_a_scaler_skips_the_step_and_parameters_are_back(overflow: str | None) -> None:
    ours, twin = mlp(), mlp()
    optimizer, plain_one = (SAM(p.params, torch.optim.SGD, rho=0.1, lr=LR) for p in (ours, twin))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    before = ours.flat()
    for number in ("first", "second"):
        scaler.scale(ours.closure()).backward()
        if overflow == number:
            assert ours.params[1].grad is not None
            ours.params[1].grad[0] = torch.inf
        if number == "first":
            optimizer.perturb()
    scaler.step(optimizer)
    scaler.update()
    if overflow is not None:
        assert torch.equal(ours.flat(), before)
        assert scaler.get_scale() == 2.0**7
        return
    plain_one.step(twin.closure)
    torch.testing.assert_close(ours.flat(), twin.flat(), rtol=1e-10, atol=1e-12)


def test_what_makes_no_sense_is_refused() -> None:
    problem = mlp()
    optimizer = SAM(problem.params, torch.optim.AdamW, lr=0.1)
    problem.closure().backward()
    with pytest.raises(InputError, match="gradients were not taken at the perturbed point"):
        optimizer.step()
    optimizer.perturb()
    with pytest.raises(InputError, match="perturb"):
        optimizer.perturb()
    with pytest.raises(InputError, match="before the state is saved"):
        optimizer.state_dict()
    with pytest.raises(InputError, match="takes no closure then"):
        optimizer.step(problem.closure)
    problem.closure().backward()
    optimizer.step()
    for settings in ({"rho": -1.0}, {"eta": -1.0}, {"adaptive": 1}):
        with pytest.raises(InputError):
            SAM(problem.params, torch.optim.SGD, lr=0.1, **settings)  # type: ignore[arg-type]
    before = problem.flat()
    with pytest.raises(ZeroDivisionError):
        optimizer.step(_failing_at_second(problem))
    assert torch.equal(problem.flat(), before)


def _failing_at_second(problem: Problem) -> Any:
    calls = []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise ZeroDivisionError
        return problem.closure()

    return closure


def test_base_sees_groups_schedulers_and_its_own_settings() -> None:
    problem = mlp()
    optimizer = SAM(problem.params[:2], SOAP, lr=0.01, update_every=3, rho=0.2)
    optimizer.add_param_group({"params": problem.params[2:], "update_every": 5})
    assert optimizer.base.param_groups is optimizer.param_groups
    assert [g["update_every"] for g in optimizer.param_groups] == [3, 5]
    assert [g["rho"] for g in optimizer.param_groups] == [0.2, 0.2]
    torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    optimizer.step(problem.closure)
    assert "basis.left.0" in optimizer.state_dict()["state"][0]
    with pytest.raises(InputError, match="update_every"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "update_every": 0})
    assert len(optimizer.param_groups) == 2


def test_clipping_sees_unscaled_gradients() -> None:
    """theta = (3, 4) with loss |theta|^2 / 2: one step of length 1 along the unit vector (0.6, 0.8)."""
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM([w], torch.optim.SGD, lr=1.0, rho=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    norms: list[Tensor] = []
    for overflows in (True, False):
        scaler.scale(w.square().sum() / 2).backward()
        optimizer.perturb()
        scaler.scale(w.square().sum() / 2).backward()
        if overflows:
            assert w.grad is not None
            w.grad[0] = torch.inf
        scaler.step(optimizer, before_update=lambda: norms.append(nn.utils.clip_grad_norm_([w], 1.0)))
        scaler.update()
    assert [float(norm) for norm in norms] == [5.0]  # and none where the step is skipped
    torch.testing.assert_close(w.detach(), torch.tensor([2.4, 3.2]), rtol=1e-6, atol=1e-6)


def test_the_second_gradient_does_not_enter_the_next_perturbation() -> None:
    problem = mlp()
    optimizer = SAM(problem.params, torch.optim.SGD, rho=0.1, lr=LR, momentum=MOMENTUM)
    for _ in range(4):
        problem.closure().backward()
        optimizer.perturb()
        problem.closure().backward()
        optimizer.step()
    torch.testing.assert_close(problem.flat(), plain(mlp(), [slice(12)], 4, [0.1] * 4), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("form", ["closure", "two calls"])
def test_a_frozen_parameter_with_an_old_gradient_is_left_alone(form: str) -> None:
    """It neither moves nor counts in |g|."""
    ends = []
    for old in (True, False):
        problem = mlp()
        frozen = problem.params[0].requires_grad_(False)
        frozen.grad = torch.ones_like(frozen) if old else None
        optimizer = SAM(problem.params, torch.optim.SGD, rho=0.1, lr=LR)
        if form == "closure":
            optimizer.step(problem.closure)
        else:
            problem.closure().backward()
            optimizer.perturb()
            assert torch.equal(frozen, mlp().params[0])
            problem.closure().backward()
            optimizer.step()
        ends.append(problem.flat())
    assert torch.equal(*ends)


def test_states_are_neither_loaded_nor_copied_at_the_perturbed_point() -> None:
    problem = mlp()
    optimizer = SAM(problem.params, torch.optim.SGD, rho=0.1, lr=LR)
    state, before = optimizer.state_dict(), problem.flat()
    problem.closure().backward()
    optimizer.perturb()
    for call in (lambda: optimizer.load_state_dict(state), optimizer.state_dict, lambda: copy.deepcopy(optimizer)):
        with pytest.raises(InputError, match=r"perturbed: take step\(\)"):
            call()
    optimizer.zero_grad()
    optimizer.step()  # as the message says
    assert torch.equal(problem.flat(), before)
    optimizer.load_state_dict(state)


def test_a_base_that_needs_a_closure_is_refused() -> None:
    with pytest.raises(InputError, match=r"base must step on gradients in `.grad`, and .* needs a closure"):
        SAM(mlp().params, torch.optim.LBFGS)


def test_shampoo_inside_goes_on_from_a_loaded_state() -> None:
    """Its root of a zero factor is renewed with the first gradient, after a state was loaded, too."""
    ends = []
    for resumes in (True, False):
        torch.manual_seed(0)
        p = nn.Parameter(torch.zeros(3, 2))
        optimizer = SAM([p], Shampoo, lr=0.1, update_first=1)
        closures = [lambda scale=scale, p=p: (p * torch.eye(3, 2) + p**2).sum() * scale for scale in (0, 0, 1, 1)]
        for number, closure in enumerate(closures):
            if resumes and number in (1, 2):
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            optimizer.step(closure)
        ends.append(p.detach().clone())
    assert torch.equal(*ends)
    assert bool(ends[0].any())


FORMS = ("group", "ddp", "ddp, first pass apart", "fsdp", "fsdp, two calls")


def run(form: str, rank: int, group: Any) -> Tensor:
    from torch.distributed.fsdp import fully_shard

    problem = mlp()
    model, rows = problem.model, slice(6 * rank, 6 * rank + 6)
    if "fsdp" in form:
        fully_shard(model)
    called = DistributedDataParallel(model) if "ddp" in form else model
    more: dict[str, Any] = {"process_group": group} if form == "group" else {}
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=LR, momentum=MOMENTUM, **more)
    apart = {"first_pass": called.no_sync} if form == FORMS[2] else {}  # type: ignore[dict-item]

    def closure() -> Tensor:
        return F.cross_entropy(called(problem.x[rows]), problem.y[rows])

    for _ in range(3):
        if "two calls" in form:
            optimizer.zero_grad()
            closure().backward()
            optimizer.perturb()
            closure().backward()
            optimizer.step()
        else:
            optimizer.step(closure, **apart)  # type: ignore[arg-type]
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        torch.save({form: run(form, rank, dist.group.WORLD) for form in FORMS}, Path(folder) / f"{rank}.pt")


@IN_TWO_PROCESSES
def test_two_ranks_take_the_steps_of_one(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))
    together = plain(mlp(), [slice(12)], 3, [0.1] * 4)
    apart = plain(mlp(), [slice(0, 6), slice(6, 12)], 3, [0.1] * 4)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        for form in FORMS:
            expected = apart if form == FORMS[2] else together
            torch.testing.assert_close(found[form], expected, rtol=1e-9, atol=1e-11, msg=form)
