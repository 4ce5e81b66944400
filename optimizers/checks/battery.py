"""The checks that `optimizers.checks.check.check_optimizer` runs, by name."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.checks.subject import (
    NotApplicable,
    Subject,
    copies,
    least_squares,
    require,
    residuals_of,
    same,
    value_of,
)

__all__ = ["BASIC_CHECKS"]


def _right_direction(s: Subject) -> None:
    for contiguous in (True, False):
        params, outputs = least_squares(contiguous)
        before = value_of(outputs)
        s.run(s.new(params), outputs, 20)
        require(value_of(outputs) < before, f"the loss went from {before:.4g} to {value_of(outputs):.4g} in 20 steps")


def _schedulers(s: Subject) -> None:
    schedulers = torch.optim.lr_scheduler
    for make in (
        lambda o: schedulers.StepLR(o, 3, 0.9),
        lambda o: schedulers.LinearLR(o, 0.5, 1.0, 4),
        lambda o: schedulers.ExponentialLR(o, 0.99),
    ):
        _, outputs, optimizer = s.trained(0)
        schedule, before = make(optimizer), value_of(outputs)
        for _ in range(12):
            s.step(optimizer, outputs)
            schedule.step()
        require(value_of(outputs) < before, "the loss did not decrease under a scheduler")


def _learning_rates_of_groups(s: Subject) -> None:
    params, outputs = least_squares()
    moved, still = copies(params)
    s.run(s.new([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}]), outputs, 3)
    same([params[1]], [still], "a group with lr = 0 moved")
    require(not torch.equal(params[0].detach(), moved), "a group with lr > 0 did not move")


def _weight_decay_of_groups(s: Subject) -> None:
    s.needs("weight_decay")
    ends = []
    for decay in (0.0, 0.5):
        params, outputs = least_squares()
        s.run(s.new([{"params": params[:1], "weight_decay": decay}, {"params": params[1:]}]), outputs, 2)
        ends.append(float(params[0].detach().norm()))
    require(ends[1] < ends[0], "weight decay did not shrink the weights of its group")


def _new_groups(s: Subject) -> None:
    params, outputs = least_squares()
    optimizer = s.new(params[:1])
    s.run(optimizer, outputs, 2)
    before = params[1].detach().clone()
    optimizer.add_param_group({"params": params[1:]})
    s.run(optimizer, outputs, 2)
    require(not torch.equal(params[1].detach(), before), "a group that was added in the middle of a run did not move")


def _tensor_learning_rate(s: Subject) -> None:
    lr = float(s.trained(0)[2].param_groups[0]["lr"])
    by_number, by_tensor = s.trained(3, lr=lr)[0], s.trained(3, lr=torch.tensor(lr, dtype=torch.float64))[0]
    same(by_number, by_tensor, "a tensor lr moves otherwise than a number", rtol=1e-6, atol=1e-9)


def _stays(s: Subject, params: Sequence[Tensor], optimizer: Any, what: str) -> None:
    before = copies(params)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"step\(\) found no gradient", UserWarning)  # an optimizer may say so
        optimizer.step(*[lambda: 0.0] if s.form == "closure" else [])
    same(params, before, f"a step {what} moved parameters")


def _no_gradients(s: Subject) -> None:
    params, _, optimizer = s.trained(0)
    _stays(s, params, optimizer, "without gradients")


def _zero_gradients(s: Subject) -> None:
    params, _, optimizer = s.trained(0)
    optimizer = s.new(params, weight_decay=0.0) if "weight_decay" in optimizer.defaults else optimizer
    for p in params:
        p.grad = torch.zeros_like(p)
    _stays(s, params, optimizer, "with zero gradients")


def _return_types(s: Subject) -> None:
    _, outputs, optimizer = s.trained(0)
    kinds = {type(s.step(optimizer, outputs)) for _ in range(3)}
    require(len(kinds) == 1, f"step returned {sorted(k.__name__ for k in kinds)}")


def _shapes(s: Subject) -> None:
    if s.form == "outputs":
        raise NotApplicable("covered by the forms with a loss")
    for shape in [(), (3,), (2, 3), (2, 3, 2), (2, 3, 2, 2), (2, 1, 2, 2, 2), (0, 3)]:
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        other = nn.Parameter(torch.ones(2, dtype=torch.float64))
        s.run(s.new([p, other]), lambda p=p, other=other: torch.cat([p.reshape(-1), other]), 2)  # type: ignore[misc]
        require(bool(torch.isfinite(p).all()), f"not finite for shape {shape}")


def _dtypes(s: Subject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params, outputs = least_squares(dtype=dtype)
        before = value_of(outputs)
        s.run(s.new(params), outputs, 5)
        require({p.dtype for p in params} == {dtype}, "a step changed the dtype of parameters")
        require(value_of(outputs) < before, f"the loss did not decrease in {dtype}")


def _storage(s: Subject) -> None:
    params, outputs, optimizer = s.trained(0)
    pointers = [p.data_ptr() for p in params]
    s.run(optimizer, outputs, 3)
    require([p.data_ptr() for p in params] == pointers, "parameters were given new storage instead of being updated")


def _frozen_and_unused(s: Subject) -> None:
    params, outputs = least_squares()
    params[1].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = copies([params[1], unused])
    s.run(s.new([*params, unused]), outputs, 3)
    same([params[1], unused], before, "a frozen or unused parameter moved")


def _linear_parameter(s: Subject) -> None:
    if s.form == "outputs":
        raise NotApplicable("the loss is a square of the outputs")
    w, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    # the sum of their squares is |w|^2 + sum b
    s.step(s.new([w, b], lr=1e-6), lambda: torch.cat([w, (b.sum() + 100).sqrt()[None]]))
    require(bool(torch.isfinite(torch.cat([w, b])).all()), "not finite where the curvature is zero")


def _foreach(s: Subject) -> None:
    s.needs("foreach")
    loop, lists = s.trained(5, foreach=False)[0], s.trained(5, foreach=True)[0]
    same(loop, lists, "foreach and the loop over tensors differ", rtol=1e-5, atol=1e-8)


def _maximize(s: Subject) -> None:
    s.needs("maximize")
    _, outputs, _ = s.trained(3, maximize=True)
    require(value_of(outputs) > value_of(least_squares()[1]), "the loss did not increase under maximize")


def _memory(s: Subject) -> None:
    def num_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    params, outputs, optimizer = s.trained(5)
    before = num_tensors()
    s.run(optimizer, outputs, 40)
    growth = num_tensors() - before
    require(growth <= 8, f"{growth} tensors more after 40 steps")
    held = any(p.grad is not None and p.grad.grad_fn is not None for p in params)
    require(not held, "gradients hold their graph after the step")


def _hooks(s: Subject) -> None:
    _, outputs, optimizer = s.trained(0)
    names = [f"{name}_{when}_hook" for name in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")]
    seen: list[str] = []
    for name in names:
        getattr(optimizer, f"register_{name}")(lambda *_, name=name: seen.append(name))
    s.step(optimizer, outputs)
    optimizer.load_state_dict(optimizer.state_dict())
    require(seen == names, f"hooks fired as {seen}")


def _bad_arguments(s: Subject) -> None:
    params, _, optimizer = s.trained(0)
    bad = [name for name in ("lr", "weight_decay") if name in optimizer.defaults]
    attempts: list[Any] = [lambda name=name: s.new(params, **{name: -1.0}) for name in bad]
    attempts.append(lambda: optimizer.add_param_group({"params": params[0]}))
    for what, attempt in zip([*bad, "a parameter in two groups"], attempts, strict=True):
        try:
            attempt()
        except ValueError:
            continue
        raise AssertionError(f"bad argument taken: {what}")


def _printed(s: Subject) -> None:
    text = repr(s.trained(0)[2])
    require("Parameter Group 0" in text and "lr" in text, "repr shows no groups")


def _resumed(s: Subject, way: Callable[[Any, Any], None]) -> None:
    params, outputs, optimizer = s.trained(5)
    twins, other, fresh = s.trained(0)
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    way(optimizer, fresh)
    s.run(optimizer, outputs, 5)
    torch.rand(7)  # a resumed process stands elsewhere in the global stream
    s.run(fresh, other, 5)
    same(params, twins, "the resumed run is another one")


def _through_file(old: Any, new: Any) -> None:
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))


def _through_distributed_checkpoint(old: Any, new: Any) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    of_old, of_new = (nn.ParameterList(optimizer.param_groups[0]["params"]) for optimizer in (old, new))
    set_optimizer_state_dict(of_new, new, copy.deepcopy(get_optimizer_state_dict(of_old, old)))


def _reloaded(s: Subject, changed: Callable[[dict[str, Any]], None]) -> None:
    _, outputs, optimizer = s.trained(2)
    saved = copy.deepcopy(optimizer.state_dict())
    changed(saved)
    optimizer.load_state_dict(saved)
    s.run(optimizer, outputs, 2)


def _older(saved: dict[str, Any]) -> None:
    for group in saved["param_groups"]:
        for flag in ("foreach", "maximize", "differentiable", "capturable", "fused"):
            group.pop(flag, None)


def _with_numbers(saved: dict[str, Any]) -> None:
    steps = [state for state in saved["state"].values() if isinstance(state.get("step"), Tensor)]
    if not steps:
        raise NotApplicable("the state has no tensor step")
    for state in steps:
        state["step"] = state["step"].item()


def _deterministic_state(s: Subject) -> None:
    a, b = (optimizer.state_dict() for optimizer in [s.trained(2)[2]] * 2)
    require(a["param_groups"] == b["param_groups"] and list(a["state"]) == list(b["state"]), "state_dict differs")


def _filled_state(s: Subject) -> None:
    require(all(s.trained(1)[2].state.values()), "a state is empty after a step")


def _named_parameters(s: Subject) -> None:
    params, outputs = least_squares()
    optimizer = s.new([("weight", params[0]), ("bias", params[1])])
    s.run(optimizer, outputs, 1)
    require(optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"], "names were lost")


def _copied(s: Subject, copied: Callable[[Any], Any]) -> None:
    params, outputs, optimizer = s.trained(3)
    twin = copied(optimizer)
    public = {n for n in vars(optimizer) if not n.startswith("_")}
    require(public <= set(vars(twin)), f"a copy has lost {sorted(public - set(vars(twin)))}")
    twins = [p for group in twin.param_groups for p in group["params"]]
    s.run(optimizer, outputs, 3)
    s.run(twin, residuals_of(twins), 3)
    same(params, twins, "a copy takes other steps")


BASIC_CHECKS: dict[str, Callable[[Subject], None]] = {
    "decreases a quadratic, contiguous or not": _right_direction,
    "works under schedulers": _schedulers,
    "groups: learning rate": _learning_rates_of_groups,
    "groups: weight decay": _weight_decay_of_groups,
    "groups: added during a run": _new_groups,
    "tensor learning rate": _tensor_learning_rate,
    "no gradients: nothing moves": _no_gradients,
    "zero gradients: nothing moves": _zero_gradients,
    "step returns one type": _return_types,
    "shapes: 0-d to 5-d, empty": _shapes,
    "dtypes: float32, bfloat16": _dtypes,
    "parameters keep their storage": _storage,
    "frozen and unused parameters stay": _frozen_and_unused,
    "zero curvature: finite": _linear_parameter,
    "foreach agrees with the loop": _foreach,
    "maximize": _maximize,
    "memory is flat": _memory,
    "hooks fire once, in order": _hooks,
    "bad arguments are refused": _bad_arguments,
    "can be printed": _printed,
    "resume: state_dict": lambda s: _resumed(s, lambda old, new: new.load_state_dict(copy.deepcopy(old.state_dict()))),
    "resume: file, weights only": lambda s: _resumed(s, _through_file),
    "resume: distributed checkpoint": lambda s: _resumed(s, _through_distributed_checkpoint),
    "state_dict: older version": lambda s: _reloaded(s, _older),
    "state_dict: step as a number": lambda s: _reloaded(s, _with_numbers),
    "state_dict: deterministic": _deterministic_state,
    "state_dict: filled": _filled_state,
    "named parameters": _named_parameters,
    "deepcopy": lambda s: _copied(s, copy.deepcopy),
    "pickle": lambda s: _copied(s, lambda optimizer: pickle.loads(pickle.dumps(optimizer))),
}
