"""Gradients that do not come, or were cleared by somebody else: a warning, and what was measured goes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from curvature.errors import InputError
from optimizers import (
    COCOB,
    EKFAC,
    ESGD,
    KFAC,
    SAM,
    SASSHA,
    SOAP,
    AdaHessian,
    CubicNewton,
    GaussNewton,
    LevenbergMarquardt,
    Lion,
    NaturalGradient,
    NewtonCG,
    SaddleFreeNewton,
    Shampoo,
    SketchyNewton,
    Sophia,
    TrustRegionNewton,
    Yogi,
)
from tests.optimizers.problems import Problem, mlp

CE = {"loss": F.cross_entropy}
OF_GRADIENTS: dict[str, Callable[..., Any]] = {
    **{"SOAP": SOAP, "Shampoo": Shampoo, "Lion": Lion, "Yogi": Yogi, "COCOB": COCOB, "AdaHessian": AdaHessian},
    **{"ESGD": ESGD, "KFAC": lambda p: KFAC(p, **CE), "EKFAC": lambda p: EKFAC(p, **CE)},
}
MEASURED: dict[str, Callable[..., Any]] = {
    "KFAC": lambda p: KFAC(p, lr=0.02, **CE),
    "EKFAC": lambda p: EKFAC(p, lr=0.02, fisher="type-2", **CE),
    "AdaHessian": lambda p: AdaHessian(p, lr=0.02, **CE),
    "Sophia": lambda p: Sophia(p, lr=0.02, update_every=1, **CE),
}


def measured_part(name: str) -> str:
    return "statistics" if "KFAC" in name else "curvature"


def given_other_parameters(problem: Problem) -> None:
    problem.model.load_state_dict({k: v.clone() for k, v in problem.model.state_dict().items()}, assign=True)


@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_a_step_without_gradients_says_so(name: str) -> None:
    """Replaced before the first step, the model gives the optimizer no gradient at all."""
    problem = mlp()
    optimizer, before = OF_GRADIENTS[name](problem.params), problem.flat()
    given_other_parameters(problem)
    for _ in range(2):
        optimizer.zero_grad()
        problem.closure().backward()
        with pytest.warns(UserWarning, match=r"nothing moves.* assign=True") as told:
            optimizer.step()
        assert told[0].filename == __file__, "which Python shows once for each line, not once for all optimizers"
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize("by_optimizer", [True, False])
@pytest.mark.parametrize("name", OF_GRADIENTS)
def test_a_step_on_old_gradients_says_so(name: str, by_optimizer: bool) -> None:
    """Those of a model whose parameters were replaced are never written to again, and cleared by the optimizer only."""
    problem = mlp()
    optimizer = OF_GRADIENTS[name](problem.params)
    optimizer.step(problem.pair if "KFAC" in name else problem.closure)
    if name in ("AdaHessian", "ESGD"):
        optimizer.param_groups[0]["update_every"] = 100  # else curvature is due, and has nothing to come from
    elif "KFAC" in name:
        optimizer.param_groups[0]["update_every"] = 100
    given_other_parameters(problem)
    if by_optimizer:
        optimizer.zero_grad(set_to_none=False)
    else:
        problem.model.zero_grad()
    problem.closure().backward()
    with pytest.warns(UserWarning, match=r"gradients of the step before.* assign=True"):
        optimizer.step()


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_accumulated_from_a_model_with_other_parameters_is_refused(name: str) -> None:
    problem = mlp()
    optimizer = MEASURED[name](problem.params)
    given_other_parameters(problem)
    with pytest.raises(InputError, match="assign=True"):
        optimizer.accumulate(problem.pair)


def test_a_perturbation_without_gradients_says_so() -> None:
    problem = mlp()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1)
    given_other_parameters(problem)
    problem.closure().backward()
    with pytest.warns(UserWarning, match="nothing moves"):
        optimizer.perturb()


def test_new_gradients_are_told_from_old_ones() -> None:
    """In place, replaced, by hand, of one parameter alone: no warning."""
    problem = mlp()
    optimizer = SOAP(problem.params)
    for _ in range(2):
        problem.closure().backward()  # adds to what is there
        optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    problem.closure().backward()
    optimizer.step()
    problem.model.zero_grad()
    problem.params[-1].grad = torch.ones_like(problem.params[-1])
    optimizer.step()
    for p in problem.params:
        p.grad = None if p.grad is None else p.grad.clone()
    optimizer.step()


# -- what was measured beside gradients that were cleared since --------------------------------------------------------

FIRST, SECOND, OTHER = slice(0, 4), slice(4, 12), slice(2, 9)


def micro_batch(problem: Problem, optimizer: Any, rows: slice, weight: float, order: str, part: str) -> None:
    def measure() -> None:
        optimizer.accumulate(problem.pair_of(rows), weight=weight, part=part)

    def differentiate() -> None:
        (weight * problem.part(rows)()).backward()

    if order == "both":
        optimizer.accumulate(problem.pair_of(rows), weight=weight)
    else:
        for one in (measure, differentiate) if order == "measured first" else (differentiate, measure):
            one()


@pytest.mark.parametrize("look", [True, False])
@pytest.mark.parametrize("order", ["both", "measured first", "measured last"])
@pytest.mark.parametrize("name", MEASURED)
def test_a_batch_that_is_left_out_takes_its_measurements_with_it(name: str, order: str, look: bool) -> None:
    """`model.zero_grad()` between two batches; without `look` the next gradients come before the optimizer sees it."""
    ends = []
    for leaves_out in (True, False):
        problem = mlp()
        optimizer = MEASURED[name](problem.params)
        for _ in range(3):
            if leaves_out:
                micro_batch(problem, optimizer, OTHER, 0.7, order, measured_part(name))
                problem.model.zero_grad()
            else:
                problem.model.zero_grad()
            if not look and order == "measured last":
                (problem.part(FIRST)() / 3).backward()
                optimizer.accumulate(problem.pair_of(FIRST), weight=1 / 3, part=measured_part(name))
            else:
                micro_batch(problem, optimizer, FIRST, 1 / 3, order, measured_part(name))
            micro_batch(problem, optimizer, SECOND, 2 / 3, order, measured_part(name))
            optimizer.step()
        ends.append(problem.flat())
    assert torch.equal(*ends)


@pytest.mark.parametrize("name", MEASURED)
def test_measurements_outlive_the_clearing_of_the_last_steps_gradients(name: str) -> None:
    """Measured first, then `model.zero_grad()` as at the beginning of a step: they belong to the gradients to come."""
    ends = []
    for clears_between in (True, False):
        problem = mlp()
        optimizer = MEASURED[name](problem.params)
        for _ in range(3):
            if not clears_between:
                problem.model.zero_grad()
            optimizer.accumulate(problem.pair, part=measured_part(name))
            if clears_between:
                problem.model.zero_grad()
            problem.closure().backward()
            optimizer.step()
        ends.append(problem.flat())
        assert not any(p._post_accumulate_grad_hooks for p in problem.params)
    assert torch.equal(*ends)


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
@pytest.mark.parametrize("cleared", ["before", "by the backward pass"])
def test_a_step_that_failed_leaves_no_curvature_to_the_next(cleared: str) -> None:
    """Its closure was measured, then something raised; the next gradients come another way, with their own graph."""
    ends = []
    for fails in (True, False):
        problem = mlp()
        optimizer = AdaHessian(problem.params, lr=0.02)
        optimizer.step(problem.closure)
        if fails:
            with pytest.raises(ZeroDivisionError):
                optimizer.step(problem.part(OTHER), before_update=lambda: 1 / 0)
        if cleared == "before":
            problem.model.zero_grad()
            optimizer.accumulate(problem.closure)
        else:
            problem.model.zero_grad()
            problem.closure().backward(create_graph=True)
        optimizer.step()
        ends.append(problem.flat())
    assert torch.equal(*ends)


def test_curvature_beyond_the_root_of_the_largest_number_is_finite() -> None:
    w = torch.nn.Parameter(torch.tensor([1e-20, 1.0]))
    optimizer = AdaHessian([w], lr=1.0, betas=(0.0, 0.0), eps=0.0, hessian_power=0.0)
    optimizer.step(lambda: (torch.tensor([1e30, 1.0]) * w**2).sum())
    assert w.isfinite().all()


@pytest.mark.parametrize("order", ["both", "measured first", "measured last"])
@pytest.mark.parametrize("name", MEASURED)
def test_gradients_that_are_clipped_out_of_place_keep_their_measurements(name: str, order: str) -> None:
    """`p.grad = ...` of what lay there, between two micro-batches and before the step, is no clearing."""
    ends = []
    for replaces in (True, False):
        problem = mlp()
        optimizer = MEASURED[name](problem.params)
        for _ in range(3):
            problem.model.zero_grad()
            for rows, weight in ((FIRST, 1 / 3), (SECOND, 2 / 3)):
                micro_batch(problem, optimizer, rows, weight, order, measured_part(name))
                for p in problem.params if replaces else ():
                    p.grad = None if p.grad is None else p.grad.clone()
            optimizer.step()
        ends.append(problem.flat())
    assert torch.equal(*ends)


# -- groups that one computation moves ---------------------------------------------------------------------------------

JOINT: dict[str, tuple[Callable[..., Any], str, Any]] = {
    "NewtonCG": (NewtonCG, "max_iterations", 3),
    "NewtonCG, adapted": (NewtonCG, "damping", 3.0),
    "TrustRegionNewton": (TrustRegionNewton, "radius", 0.37),
    "CubicNewton": (CubicNewton, "rtol", 1e-3),
    "SaddleFreeNewton": (SaddleFreeNewton, "basis_size", 3),
    "SketchyNewton": (SketchyNewton, "rho", 0.5),
    "LevenbergMarquardt": (LevenbergMarquardt, "acceleration", 0.0),
    "NaturalGradient": (NaturalGradient, "damping", 0.5),
    "GaussNewton": (lambda p: GaussNewton(p, **CE), "iterations", 2),
    "SASSHA": (SASSHA, "rho", 0.5),
    "SASSHA, sign": (SASSHA, "maximize", True),
    "KFAC": (lambda p: KFAC(p, **CE), "sharing", "reduce"),
    "KFAC, lazy": (lambda p: KFAC(p, **CE), "update_every", 3),
    "AdaHessian": (AdaHessian, "seed", 3),
    "SAM of SOAP": (lambda p: SAM(p, SOAP), "seed", 3),
}


@pytest.mark.parametrize("name", JOINT)
def test_settings_of_one_computation_must_agree_between_groups(name: str) -> None:
    make, setting, value = JOINT[name]
    problem = mlp()
    first, *rest = problem.params
    with pytest.raises(InputError, match=f"{setting} must be the same in all groups"):
        make([{"params": [first]}, {"params": rest, setting: value}])
    optimizer = make([{"params": [first]}, {"params": rest}])
    closure: Any = problem.closure
    if name.startswith(("Levenberg", "Natural")):
        closure = lambda: problem.model(problem.x) - F.one_hot(problem.y, 3)  # noqa: E731
    elif name.startswith(("Gauss", "KFAC")):
        closure = problem.pair
    for _ in range(3):
        optimizer.step(closure)  # what the method adapts stays the same in all
    before = problem.flat()
    optimizer.param_groups[1][setting] = value
    with pytest.raises(InputError, match=f"{setting} must be the same in all groups"):
        optimizer.step(closure)
    assert torch.equal(problem.flat(), before)


@pytest.mark.parametrize("method", [TrustRegionNewton, CubicNewton, LevenbergMarquardt])
def test_methods_without_learning_rate_refuse_one(method: Any) -> None:
    problem = mlp()
    with pytest.raises(InputError, match="takes no lr"):
        method([{"params": problem.params, "lr": 0.1}])
    optimizer = method(problem.params)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 0.5)
    with pytest.raises(InputError, match="takes no lr"):
        optimizer.step(lambda: problem.model(problem.x).square().mean())


def test_a_group_that_joins_is_damped_like_the_others() -> None:
    problem = mlp()
    optimizer = NewtonCG(problem.params[:1])
    for _ in range(3):
        optimizer.step(problem.closure)
    optimizer.add_param_group({"params": problem.params[1:]})
    assert optimizer.param_groups[1]["damping"] == optimizer.param_groups[0]["damping"] != 1.0
    optimizer.step(problem.closure)
