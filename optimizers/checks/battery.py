"""The checks that `optimizers.checks.check.check_optimizer` runs, by name."""

from __future__ import annotations

import copy
import gc
import io
import pickle
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.errors import InputError

__all__ = ["CHECKS", "NotApplicable", "StepForm", "Subject", "refuse_unknown"]

StepForm = Literal["backward", "graph", "closure", "loss", "outputs"]


class NotApplicable(Exception):
    """A check that an optimizer's kind has nothing to say to."""


@dataclass
class Subject:
    """An optimizer class, how it steps, and a small least-squares problem to step on."""

    make: Callable[..., torch.optim.Optimizer]
    form: StepForm
    settings: dict[str, Any] = field(default_factory=dict)

    def new(self, params: Iterable[Any], **more: Any) -> torch.optim.Optimizer:
        settings = {**self.settings, **more}
        if self.form == "outputs":
            settings.setdefault("loss", nn.MSELoss(reduction="sum"))
        return self.make(params, **settings)

    def step(self, optimizer: torch.optim.Optimizer, outputs: Callable[[], Tensor]) -> Any:
        """Take a step on the sum of squares of `outputs()`."""

        def loss() -> Tensor:
            return outputs().square().sum()

        if self.form == "loss":
            return optimizer.step(loss)  # type: ignore[arg-type]
        if self.form == "outputs":
            return optimizer.step(lambda: _with_zero_targets(outputs()))  # type: ignore[arg-type,return-value]

        def closure() -> Tensor:
            optimizer.zero_grad()
            value = loss()
            value.backward(create_graph=self.form == "graph")
            return value

        if self.form == "closure":
            return optimizer.step(closure)  # type: ignore[arg-type]
        closure()
        return optimizer.step()

    def run(self, optimizer: torch.optim.Optimizer, outputs: Callable[[], Tensor], steps: int) -> None:
        for _ in range(steps):
            self.step(optimizer, outputs)


def _with_zero_targets(z: Tensor) -> tuple[Tensor, Tensor]:
    return z, torch.zeros_like(z)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def _problem(
    contiguous: bool = True, dtype: torch.dtype = torch.float64
) -> tuple[list[nn.Parameter], Callable[[], Tensor]]:
    """Return weight, bias and the residuals of a linear least-squares problem."""
    generator = torch.Generator().manual_seed(2)
    A = torch.randn(10, 5, generator=generator, dtype=torch.float64)
    weight = A if contiguous else torch.stack([A, A], dim=2)[..., 0]
    params = [nn.Parameter(weight.to(dtype)), nn.Parameter(torch.randn(10, generator=generator).to(dtype))]
    return params, _residuals(params)


def _residuals(params: Sequence[Tensor]) -> Callable[[], Tensor]:
    x = torch.linspace(-1.5, 1.2, 5, dtype=torch.float64).to(params[0].dtype)
    return lambda: params[0] @ x + params[1]


def _value(outputs: Callable[[], Tensor]) -> float:
    return float(outputs().detach().double().square().sum())


def _copies(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in params]


def _same(a: Iterable[Tensor], b: Iterable[Tensor], what: str, *, rtol: float = 0.0, atol: float = 0.0) -> None:
    for x, y in zip(a, b, strict=True):
        _require(torch.allclose(x.detach(), y.detach(), rtol=rtol, atol=atol, equal_nan=True), what)


# -- steps ------------------------------------------------------------------------------------------------------------


def _right_direction(s: Subject) -> None:
    for contiguous in (True, False):
        params, outputs = _problem(contiguous)
        before = _value(outputs)
        s.run(s.new(params), outputs, 20)
        _require(_value(outputs) < before, f"the loss went from {before:.4g} to {_value(outputs):.4g} in 20 steps")


def _schedulers(s: Subject) -> None:
    for make in (
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.9),
        lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.5, 1.0, 4),
        lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.99),
    ):
        params, outputs = _problem()
        optimizer = s.new(params)
        schedule, before = make(optimizer), _value(outputs)
        for _ in range(12):
            s.step(optimizer, outputs)
            schedule.step()
        _require(_value(outputs) < before, "the loss did not decrease under a scheduler")


def _learning_rates_of_groups(s: Subject) -> None:
    params, outputs = _problem()
    still = params[1].detach().clone()
    moved = params[0].detach().clone()
    s.run(s.new([{"params": params[:1]}, {"params": params[1:], "lr": 0.0}]), outputs, 3)
    _same([params[1]], [still], "a group with lr = 0 moved")
    _require(not torch.equal(params[0].detach(), moved), "a group with lr > 0 did not move")


def _weight_decay_of_groups(s: Subject) -> None:
    params, outputs = _problem()
    if "weight_decay" not in s.new(params).defaults:
        raise NotApplicable("there is no weight_decay")
    ends = []
    for decay in (0.0, 0.5):
        params, outputs = _problem()
        s.run(s.new([{"params": params[:1], "weight_decay": decay}, {"params": params[1:]}]), outputs, 2)
        ends.append(params[0].detach().norm())
    _require(float(ends[1]) < float(ends[0]), "weight decay did not shrink the weights of its group")


def _tensor_learning_rate(s: Subject) -> None:
    params, outputs = _problem()
    lr = float(s.new(params).param_groups[0]["lr"])
    s.run(s.new(params, lr=lr), outputs, 3)
    twins, other = _problem()
    s.run(s.new(twins, lr=torch.tensor(lr, dtype=torch.float64)), other, 3)
    _same(params, twins, "a tensor lr moves otherwise than a number", rtol=1e-6, atol=1e-9)


def _no_gradients(s: Subject) -> None:
    params, _ = _problem()
    before = _copies(params)
    optimizer = s.new(params)
    if s.form in ("closure", "loss", "outputs"):
        _tolerant_step(optimizer, s)
    else:
        optimizer.step()
    _same(params, before, "a step without gradients moved parameters")


def _tolerant_step(optimizer: torch.optim.Optimizer, s: Subject) -> None:
    if s.form == "closure":
        optimizer.step(lambda: 0.0)
    else:
        optimizer.step()


def _zero_gradients(s: Subject) -> None:
    params, _ = _problem()
    before = _copies(params)
    optimizer = s.new(params, **({"weight_decay": 0.0} if "weight_decay" in s.new(params).defaults else {}))
    for p in params:
        p.grad = torch.zeros_like(p)
    if s.form == "closure":
        optimizer.step(lambda: 0.0)
    else:
        optimizer.step(closure=None)
    _same(params, before, "a step with zero gradients moved parameters")


def _return_types(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    kinds = {type(s.step(optimizer, outputs)) for _ in range(3)}
    _require(len(kinds) == 1, f"step returned {sorted(k.__name__ for k in kinds)}")


def _shapes(s: Subject) -> None:
    if s.form == "outputs":
        raise NotApplicable("covered by the forms with a loss")
    for shape in [(), (3,), (2, 3), (2, 3, 2), (2, 3, 2, 2), (2, 1, 2, 2, 2), (0, 3)]:
        p = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        other = nn.Parameter(torch.ones(2, dtype=torch.float64))
        s.run(s.new([p, other]), lambda p=p, other=other: torch.cat([p.reshape(-1), other]), 2)  # type: ignore[misc]
        _require(bool(torch.isfinite(p).all()), f"not finite for shape {shape}")


def _dtypes(s: Subject) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params, outputs = _problem(dtype=dtype)
        before = _value(outputs)
        s.run(s.new(params), outputs, 5)
        _require({p.dtype for p in params} == {dtype}, "a step changed the dtype of parameters")
        _require(_value(outputs) < before, f"the loss did not decrease in {dtype}")


def _storage(s: Subject) -> None:
    params, outputs = _problem()
    pointers = [p.data_ptr() for p in params]
    s.run(s.new(params), outputs, 3)
    _require([p.data_ptr() for p in params] == pointers, "parameters were given new storage instead of being updated")


def _frozen_and_unused(s: Subject) -> None:
    params, outputs = _problem()
    params[1].requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    before = [params[1].detach().clone(), unused.detach().clone()]
    s.run(s.new([*params, unused]), outputs, 3)
    _same([params[1], unused], before, "a frozen or unused parameter moved")


def _linear_parameter(s: Subject) -> None:
    if s.form == "outputs":
        raise NotApplicable("the loss is a square of the outputs")
    w, b = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(2))
    optimizer = s.new([w, b], lr=1e-6)

    def outputs() -> Tensor:  # square().sum() of it is |w|^2 + sum b
        return torch.cat([w, (b.sum() + 100).sqrt()[None]])

    s.step(optimizer, outputs)
    _require(bool(torch.isfinite(torch.cat([w, b])).all()), "not finite where the curvature is zero")


def _foreach(s: Subject) -> None:
    params, outputs = _problem()
    if "foreach" not in s.new(params).defaults:
        raise NotApplicable("there is no foreach")
    s.run(s.new(params, foreach=False), outputs, 5)
    twins, other = _problem()
    s.run(s.new(twins, foreach=True), other, 5)
    _same(params, twins, "foreach and the loop over tensors differ", rtol=1e-5, atol=1e-8)


def _maximize(s: Subject) -> None:
    params, outputs = _problem()
    if "maximize" not in s.new(params).defaults:
        raise NotApplicable("there is no maximize")
    before = _value(outputs)
    s.run(s.new(params, maximize=True), outputs, 3)
    _require(_value(outputs) > before, "the loss did not increase under maximize")


def _new_groups(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params[:1])
    s.run(optimizer, outputs, 2)
    before = params[1].detach().clone()
    optimizer.add_param_group({"params": params[1:]})
    s.run(optimizer, outputs, 2)
    _require(not torch.equal(params[1].detach(), before), "a group that was added in the middle of a run did not move")


def _memory(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 5)
    gc.collect()
    before = sum(issubclass(type(o), Tensor) for o in gc.get_objects())
    s.run(optimizer, outputs, 40)
    gc.collect()
    growth = sum(issubclass(type(o), Tensor) for o in gc.get_objects()) - before
    _require(growth <= 8, f"{growth} tensors more after 40 steps")
    held = [p for p in params if p.grad is not None and p.grad.grad_fn is not None]
    _require(not held, "gradients hold their graph after the step")


def _hooks(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("step"))
    optimizer.register_step_post_hook(lambda *_: seen.append("stepped"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("save"))
    optimizer.register_state_dict_post_hook(lambda *_: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda *_: seen.append("load"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("loaded"))
    s.step(optimizer, outputs)
    optimizer.load_state_dict(optimizer.state_dict())
    _require(seen == ["step", "stepped", "save", "saved", "load", "loaded"], f"hooks fired as {seen}")


def _bad_arguments(s: Subject) -> None:
    params, _ = _problem()
    for bad in ({"lr": -1.0}, {"weight_decay": -1.0}):
        if not set(bad) <= set(s.new(params).defaults):
            continue
        try:
            s.new(params, **bad)
        except ValueError:
            continue
        raise AssertionError(f"{bad} was taken")
    optimizer = s.new(params)
    try:
        optimizer.add_param_group({"params": params[0]})
    except ValueError:
        return
    raise AssertionError("a parameter was taken into two groups")


def _printed(s: Subject) -> None:
    params, _ = _problem()
    text = repr(s.new(params))
    _require("Parameter Group 0" in text and "lr" in text, "repr shows no groups")


# -- state ------------------------------------------------------------------------------------------------------------


def _resumed(s: Subject, way: Callable[[torch.optim.Optimizer, torch.optim.Optimizer], None]) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 5)
    twins, other = _problem()
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    fresh = s.new(twins)
    way(optimizer, fresh)
    s.run(optimizer, outputs, 5)
    torch.rand(7)  # a resumed process stands elsewhere in the global stream
    s.run(fresh, other, 5)
    _same(params, twins, "the resumed run is another one")


def _resume(s: Subject) -> None:
    _resumed(s, lambda old, new: new.load_state_dict(copy.deepcopy(old.state_dict())))


def _resume_from_file(s: Subject) -> None:
    def through_file(old: torch.optim.Optimizer, new: torch.optim.Optimizer) -> None:
        file = io.BytesIO()
        torch.save(old.state_dict(), file)
        file.seek(0)
        new.load_state_dict(torch.load(file, weights_only=True))

    _resumed(s, through_file)


def _distributed_checkpoint(s: Subject) -> None:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            (self.weight, self.bias), self.outputs = _problem()

    old, new = Model(), Model()
    first = s.new(old.parameters())
    s.run(first, old.outputs, 4)
    new.load_state_dict(old.state_dict())
    second = s.new(new.parameters())
    set_optimizer_state_dict(new, second, copy.deepcopy(get_optimizer_state_dict(old, first)))
    s.run(first, old.outputs, 3)
    s.run(second, new.outputs, 3)
    _same(old.parameters(), new.parameters(), "a run resumed from a distributed checkpoint is another one")


def _older_state(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 2)
    old = copy.deepcopy(optimizer.state_dict())
    for group in old["param_groups"]:
        for flag in ("foreach", "maximize", "differentiable", "capturable", "fused"):
            group.pop(flag, None)
    optimizer.load_state_dict(old)
    s.run(optimizer, outputs, 2)


def _number_as_step(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    steps = [state for state in saved["state"].values() if isinstance(state.get("step"), Tensor)]
    if not steps:
        raise NotApplicable("the state has no tensor step")
    for state in steps:
        state["step"] = state["step"].item()
    optimizer.load_state_dict(saved)
    s.run(optimizer, outputs, 2)


def _deterministic_state(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 2)
    a, b = optimizer.state_dict(), optimizer.state_dict()
    _require(a["param_groups"] == b["param_groups"] and list(a["state"]) == list(b["state"]), "state_dict differs")


def _filled_state(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 1)
    _require(all(len(state) > 0 for state in optimizer.state.values()), "a state is empty after a step")


def _named_parameters(s: Subject) -> None:
    params, outputs = _problem()
    optimizer = s.new([("weight", params[0]), ("bias", params[1])])
    s.run(optimizer, outputs, 1)
    _require(optimizer.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"], "names were lost")


def _copied(s: Subject, copied: Callable[[Any], Any]) -> None:
    params, outputs = _problem()
    optimizer = s.new(params)
    s.run(optimizer, outputs, 3)
    twin = copied(optimizer)
    public = {n for n in vars(optimizer) if not n.startswith("_")}
    _require(public <= set(vars(twin)), f"a copy has lost {sorted(public - set(vars(twin)))}")
    twins = [p for group in twin.param_groups for p in group["params"]]
    s.run(optimizer, outputs, 3)
    s.run(twin, _residuals(twins), 3)
    _same(params, twins, "a copy takes other steps")


def _deepcopied(s: Subject) -> None:
    _copied(s, copy.deepcopy)


def _pickled(s: Subject) -> None:
    _copied(s, lambda optimizer: pickle.loads(pickle.dumps(optimizer)))


CHECKS: dict[str, Callable[[Subject], None]] = {
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
    "resume: state_dict": _resume,
    "resume: file, weights only": _resume_from_file,
    "resume: distributed checkpoint": _distributed_checkpoint,
    "state_dict: older version": _older_state,
    "state_dict: step as a number": _number_as_step,
    "state_dict: deterministic": _deterministic_state,
    "state_dict: filled": _filled_state,
    "named parameters": _named_parameters,
    "deepcopy": _deepcopied,
    "pickle": _pickled,
}


def refuse_unknown(names: Iterable[str]) -> None:
    """Refuse names that are no checks.

    Raises:
        InputError: with the names there are.
    """
    unknown = sorted(set(names) - set(CHECKS))
    if unknown:
        raise InputError(f"skip names checks that do not exist: {unknown}; there are {', '.join(CHECKS)}.")
