"""What optimizers share that solve for a step jointly over all parameters: Newton's family.

A step linearises the closure once, lets the method propose and try points, writes the best and reports. Whatever
happens in between, an exception included, parameters end at a point that the method accepted, or where they were.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.objective.objective import Objective
from curvature.results.record import Result
from curvature.results.solves import SubproblemResult
from optimizers.newton.damping import reduction_ratio
from optimizers.newton.evaluations import Evaluations, Kind, Linearised, Mean
from optimizers.newton.flat import FlatParams
from optimizers.newton.functions import Function, FunctionEvaluations, function_of
from optimizers.shared.base import BaseOptimizer, Common, Group, check_choice
from optimizers.shared.differentiation import curvature_session
from optimizers.shared.gradients import all_zero
from optimizers.shared.probes import counter_generator
from optimizers.shared.ranks import average_over_ranks, compare_ranks, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["Curvature", "Evaluated", "FullBatchOptimizer", "Move", "Proposal", "StepReport"]

Curvature = Literal["hessian", "ggn"]
Evaluated = Callable[[], Any] | Objective | Function


@dataclass(frozen=True)
class Move:
    """What a method decided: a step, or none and why."""

    step: Tensor | None  # (n,), what to add to the parameters; None to stay
    loss: float  # at the end
    solver: str
    message: str
    model_decrease: float = math.nan
    ratio: float = math.nan


@dataclass(frozen=True)
class Proposal:
    """A step to try."""

    step: Tensor
    model_decrease: float
    length: float  # |step|; not finite where there is no step to try
    solver: str
    note: str = ""

    @classmethod
    def of(cls, found: SubproblemResult) -> Proposal:
        """Return the solution of a subproblem as a step."""
        return cls(found.step, found.model_decrease, found.step_norm, found.status.value)


@dataclass(frozen=True, kw_only=True, repr=False)
class StepReport(Result):
    """One step: `optimizer.last_step`."""

    loss_before: float  # at the parameters the step started from
    loss_after: float
    """At those it ended at; `loss_before` if nothing was accepted. NaN where the method does not look."""
    gradient_norm: float  # 2-norm of the gradient at the start
    gradient_max: float  # largest entry of the gradient at the start, in magnitude
    step_norm: float  # 2-norm of what was added to the parameters; 0 if nothing was accepted
    model_decrease: float  # by how much the quadratic (or cubic) model falls along the step; NaN where there is none
    ratio: float  # decrease of the loss over that of the model; NaN where either is not known
    accepted: bool  # whether the parameters moved
    stationary: bool  # whether the gradient was zero, or within the tolerance asked for, so that no step was tried
    num_products: int  # products with the curvature matrix, or with J and J'
    num_evaluations: int  # of the closure, those with gradient included
    num_gradients: int  # of the loss
    solver: str  # why the inner solver stopped
    message: str  # how the step ended; where nothing was accepted, why
    damping: float | None = None  # lambda that the next step starts with
    radius: float | None = None  # trust-region radius that the next step starts with
    sigma: float | None = None  # weight of the cubic term that the next step starts with


class FullBatchOptimizer(BaseOptimizer):
    """Base of optimizers whose step couples all parameters.

    `step(closure)` evaluates the closure as often as it needs; the closure calls no `backward()`, and may itself
    differentiate with `create_graph=True`. `step(closure, curvature_closure)` takes the matrix from a second closure.
    `.grad` then holds the gradient at the point the step started from, and `last_step` what happened. All groups are
    solved jointly, so that `lr` alone may differ between them; settings that the method adapts (damping, radius) are
    written to all.

    Settings kept in every parameter group, beside those of the method: `lr`, a factor on the group's part of a step
    before anything is tried, for methods that take one; `maximize` and `seed` (see `Common`); `num_steps` taken so far.

    Raises:
        InputError: for complex parameters, settings out of range or that differ between groups, closures that return
            something else than agreed.
        NonFiniteError: if the loss or its gradient is not finite where a step starts.
    """

    _kept = (*BaseOptimizer._kept, "kind", "last_step")
    _late_settings: ClassVar[dict[str, Any]] = {"lr": 1.0, "maximize": False, "seed": 0, "num_steps": 0}
    _adapted: str = ""  # setting that the method adapts
    _not_alike = ("lr", "num_steps")
    _takes_lr = True

    last_step: StepReport | None

    def __init__(self, params: Any, defaults: Group, kind: Kind, **shared: Unpack[Common]) -> None:
        if kind != "residuals":
            check_choice("curvature", kind, ("hessian", "ggn"))
        elif shared.get("process_group") is not None:
            raise InputError(
                "residuals are solved for on one rank: gather them there, or use NewtonCG or NaturalGradient with "
                "loss=, which average over ranks."
            )
        if kind == "ggn" and shared.get("loss") is None:
            raise InputError('curvature="ggn" needs loss=, and a closure that returns (outputs, targets).')
        self.kind, self.last_step = kind, None
        super().__init__(params, defaults, **shared)

    # -- what a method supplies ---------------------------------------------------------------------------------------

    @abstractmethod
    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        """Decide on a step from `evaluations.start`, (n,), where the parameters stay."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, after a check of its settings."""
        if self._adapted and self.param_groups:
            param_group.setdefault(self._adapted, self.param_groups[0][self._adapted])
        super().add_param_group(param_group)

    def _refuse_unlike(self, *groups: Group) -> None:
        super()._refuse_unlike(*groups)
        if not self._takes_lr and any(float(group["lr"]) != 1 for group in groups):
            raise InputError(
                f"{type(self).__name__} finds the length of its steps itself and takes no lr, got "
                f"{[float(group['lr']) for group in groups]}: leave it, and schedulers, out."
            )

    def _adapt(self, value: float) -> None:
        for group in self.param_groups:
            group[self._adapted] = value

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if group["maximize"] and self.kind != "hessian":
            raise InputError(
                'maximize=True has no Gauss-Newton model, whose matrix is that of a minimum; use curvature="hessian".'
            )

    @property
    def _matrix_is_needed(self) -> bool:
        """Whether the coming step multiplies by the matrix; if not, gradients are taken without graph."""
        return True

    @property
    def _moves_without_gradient(self) -> bool:
        """Whether the method looks for negative curvature where the gradient vanishes."""
        return bool(self.param_groups[0].get("escape", False))

    # -- steps --------------------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Evaluated | None = None, curvature_closure: Callable[[], Any] | None = None
    ) -> Tensor | None:
        """Take one step and return the loss before it, detached.

        Args:
            closure: returns what the method takes: the loss, (outputs, targets) where `loss=` was given, or residuals.
                Or a `curvature.Objective` of the parameters, whose batches are walked for each evaluation and product.
            curvature_closure: evaluated in place of `closure` for the matrix: a smaller or another batch.
        """
        return self._step(closure, curvature_closure, 0.0)

    @full_precision
    @on_all_ranks
    def _step(
        self,
        closure: Evaluated | None,
        curvature_closure: Callable[[], Any] | None,
        gtol: float,
        *,
        moves_buffers: bool = True,
    ) -> Tensor | None:
        """Take a step unless the largest entry of the gradient is at most `gtol`.

        Where none is taken, `moves_buffers=False` leaves random streams and running statistics as they were found.
        """
        flat = self._flat()
        if closure is None:
            # a checkpoint is loaded into an optimizer that was stepped with zero gradients and without closure
            if all_zero([p.grad for p in flat.params if p.grad is not None]):
                self._count(flat, moved=False)
                return None  # state is made, nothing moves
            raise InputError(f"{type(self).__name__} evaluates the loss several times a step: call step(closure).")
        self._refuse_unlike(*self.param_groups)
        if curvature_closure is not None and self.kind == "residuals":
            raise InputError("residuals and their Jacobian come from one closure; leave curvature_closure out.")
        evaluations = self._evaluations(flat, closure, curvature_closure, self.kind)
        compare_ranks(self, f"a step of {type(self).__name__}", point=True)
        start = evaluations.start
        move: Move | None = None
        try:
            with curvature_session(), evaluations.watched(), self._no_wrapper_alone():
                here = evaluations.linearise(with_matrix=self._matrix_is_needed)
                for p, g in zip(flat.params, flat.split(evaluations.sign * here.gradient), strict=True):
                    p.grad = g.clone()
                largest = float(here.gradient.abs().max())
                # squares of anything smaller underflow
                vanishes = largest <= max(gtol, torch.finfo(flat.dtype).tiny ** 0.5)
                if vanishes and (gtol == torch.inf or not self._moves_without_gradient):
                    move = Move(None, here.loss, "not run", "the gradient vanishes")
                else:
                    move = self._move(evaluations, here)
            if move.step is not None:
                flat.set(start + move.step, keep=evaluations.unused if self.process_group is None else None)
                if torch.equal(flat.get(), start):
                    message = "the step is below rounding of the parameters"
                    move = replace(move, step=None, loss=here.loss, message=message)
        finally:
            evaluations.finish(keep=move is not None and (moves_buffers or move.step is not None))
        moved = move.step is not None
        self.last_step = StepReport(
            loss_before=evaluations.sign * here.loss,
            loss_after=evaluations.sign * move.loss,
            gradient_norm=float(torch.linalg.vector_norm(here.gradient)),
            gradient_max=largest,
            step_norm=0.0 if move.step is None else float(torch.linalg.vector_norm(move.step)),
            model_decrease=move.model_decrease,
            ratio=move.ratio,
            accepted=moved,
            stationary=vanishes and not moved,
            num_products=0 if here.matrix is None else here.matrix.num_matvecs,
            num_evaluations=evaluations.num_evaluations,
            num_gradients=evaluations.num_gradients,
            solver=move.solver,
            message=move.message,
            **({self._adapted: float(self.param_groups[0][self._adapted])} if self._adapted else {}),
        )
        self._count(flat, moved=moved)
        for group in self.param_groups:
            group["num_steps"] += 1
        return torch.tensor(evaluations.sign * here.loss, dtype=flat.dtype, device=flat.device)

    def _count(self, flat: FlatParams, *, moved: bool) -> None:
        for p in flat.params:
            if "step" not in self.state[p]:
                self.state[p]["step"] = torch.zeros((), dtype=torch.float32)
            self.state[p]["step"] += moved

    def _flat(self) -> FlatParams:
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        if not params:
            raise InputError("no parameter requires a gradient.")
        return FlatParams(params)

    def _evaluations(
        self, flat: FlatParams, closure: Evaluated, curvature_closure: Callable[[], Any] | None, kind: Kind
    ) -> Evaluations:
        sign = -1.0 if self.param_groups[0]["maximize"] else 1.0
        if isinstance(closure, Objective):
            closure = function_of(closure, flat.params)
        if isinstance(closure, Function):
            if curvature_closure is not None:
                raise InputError("an objective has its own matrix: leave curvature_closure out.")
            return FunctionEvaluations(flat, closure, kind, sign)
        return Evaluations(
            flat,
            closure,
            curvature_closure,
            kind=kind,
            loss=self.loss,
            rule=self._rule,
            sign=sign,
            mean_of=None if self.process_group is None else self._mean_over_ranks,
            recorder=self._recorder,
        )

    def _mean_over_ranks(self, outputs: Tensor | None, targets: Any) -> Mean:
        """Return the mean over ranks that each count by their share of the joined batch."""
        group = cast("ProcessGroup", self.process_group)
        share = share_of_rank(self, outputs, targets)

        def mean(t: Tensor) -> Tensor:
            compare_ranks(self, "a mean", total=t)
            return average_over_ranks([t], group, share)[0]

        return mean

    # -- shared by methods --------------------------------------------------------------------------------------------

    def _rates(self, flat: FlatParams) -> Tensor | float:
        """Return lr for every entry, or one number where all groups agree."""
        rates = [float(group["lr"]) for group in self.param_groups]
        if len(set(rates)) == 1:
            return rates[0]
        by_param = {id(p): rate for group, rate in zip(self.param_groups, rates, strict=True) for p in group["params"]}
        return flat.flatten([torch.full_like(p, by_param[id(p)]) for p in flat.params])

    def _generator(self, flat: FlatParams, stream: int) -> torch.Generator:
        first = self.param_groups[0]
        return counter_generator(flat.device, stream, first["seed"], first["num_steps"])

    def _remember(self, flat: FlatParams, **vectors: Tensor) -> None:
        """Keep vectors (n,), or bases (n, r), in the state of the parameters they belong to."""
        for name, vector in vectors.items():
            offset = 0
            for p, size in zip(flat.params, flat.sizes, strict=True):
                part = vector[offset : offset + size]
                self.state[p][name] = part.clone().reshape((*p.shape, *vector.shape[1:]))
                offset += size

    def _recall(self, flat: FlatParams, name: str) -> Tensor | None:
        """Return what was kept under a name, (n,) or (n, r); None if a parameter has none, or one of another width."""
        parts = []
        for p in flat.params:
            part = self.state[p].get(name)
            if part is None:
                return None
            parts.append(part.reshape(p.numel(), *part.shape[p.ndim :]).to(flat.device, flat.dtype))
        return torch.cat(parts) if len({part.shape[1:] for part in parts}) == 1 else None

    def _try(
        self,
        evaluations: Evaluations,
        here: Linearised,
        propose: Callable[[float], Proposal],
        follow: Callable[[float, float, float], float],
        accept: float,
    ) -> Move:
        """Try steps until the loss falls by `accept` of what the model promised, under ever other adapted settings.

        Args:
            evaluations: of the closure.
            here: where the step starts.
            propose: setting -> step.
            follow: (setting, ratio, |step|) -> the next setting; one that stays ends the trials.
            accept: ratio from which a step is taken.
        """
        group, name, start = self.param_groups[0], self._adapted, evaluations.start
        eps, size = torch.finfo(start.dtype).eps, float(torch.linalg.vector_norm(start))
        value, message, solver = float(group[name]), "not tried", "not run"
        for trial in range(1, group["max_trials"] + 1):
            found, ratio = propose(value), -math.inf
            solver = found.solver
            if found.model_decrease == 0 and found.length == 0:
                return Move(None, here.loss, solver, "the model has its minimum here")
            if math.isfinite(found.length):
                loss = evaluations.value(start + found.step)
                ratio = reduction_ratio(here.loss, loss, found.model_decrease, eps)
                message = f"no step down to a length of {found.length:.2g} lowers the loss"
            following = follow(value, ratio, found.length)
            if ratio >= accept:
                self._adapt(following)
                message = f"accepted at the {trial}. {name} tried{found.note}"
                return Move(found.step, loss, solver, message, found.model_decrease, ratio)
            if found.length <= eps * max(size, eps):
                message += ", below rounding of the parameters"
                break
            if following == value:
                break
            value = following
        self._adapt(value)
        return Move(None, here.loss, solver, message)
