"""The shell of every optimizer driven by curvature: what is not the update rule.

It evaluates closures, takes gradients and curvature without leaving a graph behind, adds them up over micro-batches,
averages them over ranks, and hands lists of tensors to the update rule of a subclass. What a run needs to be resumed
bit for bit lies in `state_dict()`: random numbers are functions of counters.
"""

from __future__ import annotations

import contextlib
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.autograd.guards import refuse_undifferentiable
from curvature.engine.repeated_evaluation import RunningBuffers
from curvature.environment.autocast import as_around
from curvature.environment.device import is_gpu, refuse_capture
from curvature.errors import CheckFailedError, InputError, NonFiniteError
from optimizers.diagonal.curvature_source import WIDE, BatchGraph, CurvatureSource
from optimizers.shared.base import COUNTERS, BaseOptimizer, Group, Shared
from optimizers.shared.closures import loss_of, own_gradients
from optimizers.shared.differentiation import curvature_session, gradients, leaves
from optimizers.shared.gradients import add_to_grad, all_zero, poison, refuse_non_finite, refuse_sparse
from optimizers.shared.ranks import average_gradients, average_over_ranks, compare_ranks, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from torch.distributed import ProcessGroup
    from typing_extensions import Unpack

__all__ = ["Closure", "CurvatureOptimizer", "State", "Tensors"]

Closure = Callable[[], Any]
Part = Literal["both", "gradient", "curvature"]
Tensors = list[Tensor]
State = dict[str, Tensors]  # name of a counter or an average -> one tensor a parameter


class CurvatureOptimizer(BaseOptimizer):
    """Base of optimizers whose step uses a diagonal curvature.

    Three ways to take a step, which do the same:

        optimizer.step(closure)                              # closure returns the loss and calls no backward()

        optimizer.zero_grad()
        optimizer.accumulate(closure_or_loss)                # instead of loss.backward(); once per micro-batch
        clip_grad_norm_(model.parameters(), 1.0)             # optional: curvature is not touched
        optimizer.step()

        optimizer.zero_grad()
        loss.backward(create_graph=optimizer.curvature_due)  # the classic form
        optimizer.step()

    Each leaves `.grad` detached and no graph; `step(closure)` needs no `zero_grad()`. Where curvature is due, closures
    run with attention under the math kernel and compiled models eagerly: fused kernels and compiled graphs have no
    second derivative. Methods that sample targets take closures that return (outputs, targets), and `loss=`.

    Data-parallel runs pass `process_group=`: gradients and curvature are averaged over ranks here, outside the hooks of
    `DistributedDataParallel`, under which PyTorch cannot differentiate twice. Closures may call the wrapper or its
    module. Gradients that DDP has averaged already may be kept: `loss.backward()` through DDP, then, where
    `optimizer.curvature_due`, `optimizer.accumulate(closure, part="curvature")`, then `step()`.

    With a `GradScaler`: `accumulate(closure, scaler=scaler)`, `scaler.step(optimizer)`, `scaler.update()`; curvature is
    unscaled, and a product that overflows makes the scaler skip the step.

    Every group holds the settings of the method and of `Shared`, and `num_steps` and `num_refreshes`: its steps so far,
    and those on which curvature was measured. A parameter is not moved before its curvature was measured once. State of
    every parameter: `step`, `hessian_step` (scalars) and the averages of the method, in float32 or wider.

    Args:
        params: parameters or groups of them.
        defaults: settings of the method, kept in every group: `lr`, `weight_decay` (decoupled, times lr),
            `update_every` (curvature is measured on every so many-th step) and its own.
        curvature: where curvature comes from.
        check_finite, loss, process_group, and settings of groups: see `Shared`.

    Raises:
        InputError: for complex parameters, settings out of range, closures that return something else than agreed.
        CheckFailedError: where curvature is due and cannot be computed; the message says what to call.
        NonFiniteError: see `check_finite`.
    """

    _kept = (*BaseOptimizer._kept, "curvature", "check_finite")
    _late_settings: ClassVar[dict[str, Any]] = {
        **{"update_first": 1, "update_every": 1, "maximize": False, "foreach": None, "capturable": False, "seed": 0},
        **{"num_steps": 0, "num_refreshes": 0},
    }
    _counts = ("update_first", "update_every")
    _averages: tuple[str, ...]  # names of the state tensors of a parameter's shape; they start at zero
    _sums: list[list[Tensor]] | None
    _num_measured: int
    _counted: list[tuple[Tensor | None, Any]]
    _synchronized: bool
    _step_supports_amp_scaling = True  # the scaler then says how it scaled, instead of unscaling behind our back

    def __init__(self, params: Any, defaults: Group, curvature: CurvatureSource, **shared: Unpack[Shared]) -> None:
        self.curvature, self.check_finite = curvature, shared.pop("check_finite", True)
        super().__init__(params, defaults, **shared)

    @abstractmethod
    def _update(self, group: Group, params: Tensors, grads: Tensors, curvatures: Tensors | None, state: State) -> None:
        """Move the parameters of a group that have a gradient; `curvatures` is None on steps without refresh."""

    @property
    def curvature_due(self) -> bool:
        """Whether the coming step measures curvature."""
        return any(_is_due(group) for group in self.param_groups)

    @on_all_ranks
    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Closure | None = None,
        *,
        curvature_closure: Closure | None = None,
        before_update: Callable[[], object] | None = None,
    ) -> Tensor | None:
        """Take one step and return the closure's loss, detached.

        Args:
            closure: returns the loss, or (outputs, targets) where `loss=` was given; calls no backward(). None if
                gradients were accumulated before.
            curvature_closure: evaluated in place of `closure` for the curvature: a smaller or another batch.
            before_update: called when gradients lie in `.grad` and curvature is measured, before parameters move; for
                clipping.
        """
        found_inf, loss = getattr(self, "found_inf", None), None
        if closure is not None:
            if found_inf is not None:
                raise InputError("a GradScaler cannot step with a closure; use accumulate(closure, scaler=scaler).")
            self.zero_grad()
            part: Part = "both" if curvature_closure is None else "gradient"
            loss = self.accumulate(closure, part=part, synchronize=None if curvature_closure is None else False)
            if curvature_closure is not None and self.curvature_due:
                self.accumulate(curvature_closure, part="curvature", synchronize=False)
        elif curvature_closure is not None:
            self.accumulate(curvature_closure, part="curvature")
        old = closure is None and self._has_old_gradients()
        self._forget_if_cleared()
        self._take_graphs_off_gradients()
        if found_inf is not None:
            if bool(found_inf):
                self._forget_measured()
                return None
            scale: Tensor | None = getattr(self, "grad_scale", None)
            for p in (p for group in self.param_groups for p in group["params"]):
                if scale is not None and p.grad is not None:
                    p.grad.div_(scale.to(p.device))
        if self.process_group is not None and not self._synchronized:
            self._join(self.process_group)
        self._look_for_gradients(computed=closure is not None, old=old)
        if before_update is not None:
            before_update()
        self._move()
        self._see_gradients()
        return loss

    @on_all_ranks
    @_disable_dynamo  # differentiation is not compiled; the update of a compiled step is
    @torch.no_grad()
    def accumulate(
        self,
        closure: Closure | Tensor,
        *,
        weight: float = 1.0,
        part: Part = "both",
        scaler: GradScaler | None = None,
        synchronize: bool | None = True,
    ) -> Tensor:
        """Add a batch's gradient to `.grad`, and its curvature to what the coming step will use.

        Stands in for `loss.backward()`. Micro-batches with weights that add up to 1 give the step of the joined batch.

        Args:
            closure: as of `step`; or the loss itself.
            weight: factor on the batch's loss, its share in the step.
            part: "gradient" and "curvature" leave out the other one.
            scaler: scales the gradients in `.grad` as `scaler.scale(loss).backward()` would; curvature is unscaled.
            synchronize: average over `process_group` now. False on all but the last micro-batch saves communication;
                what was not averaged is averaged by `step()`. None is False where `step()` comes next.

        Returns:
            The loss, detached and without weight.
        """
        if part not in ("both", "gradient", "curvature"):
            raise InputError(f'part must be "both", "gradient" or "curvature", got {part!r}.')
        self._forget_if_cleared()
        measured = part != "gradient" and self.curvature_due
        params = self._trained()
        with (
            curvature_session() if measured and not isinstance(closure, Tensor) else contextlib.nullcontext(),
            as_around(),
            torch.enable_grad(),
        ):
            loss, outputs, targets = self._evaluated(closure, moves_buffers=part != "curvature")
            scaled = loss if weight == 1.0 else loss * weight
            scaled = scaled if scaler is None else scaler.scale(scaled)
        looks = self.check_finite and scaler is None and self.process_group is None
        looks = looks and (measured or not is_gpu(loss.device))
        if looks and not math.isfinite(loss.item()):
            raise NonFiniteError(
                f"the loss is {loss.item()}: parameters are left as they are. Look at the batch, lower lr, or pass "
                "check_finite=False."
            )
        second_order = measured and self.curvature.second_order
        grads: list[Tensor | None] = [None] * len(params)
        if part != "curvature" or second_order:
            grads = gradients(scaled, params, create_graph=second_order, retain_graph=measured)
        if measured:
            scale = None if scaler is None else scaler.scale(loss.new_ones(()))
            self._measure(params, grads, scale, outputs=outputs, targets=targets, weight=weight)
        if self.process_group is not None:
            known = weight == 1.0 and not self._counted and outputs is not None
            self._counted.append((outputs.detach(), targets) if known and outputs is not None else (None, None))
        if part != "curvature":
            add_to_grad(params, grads)
            if self.process_group is None:
                self._refuse_unreached()
        if scaler is not None and self._sums is not None:
            poison(params, self._sums)  # the scaler skips the step and lowers its scale
        self._synchronized = False
        if synchronize and self.process_group is not None:
            self._join(self.process_group)
        if self._sums is not None or self._counted:
            self._follow(came=part != "curvature", looks=synchronize is not None)
        return loss.detach()

    def _evaluated(self, closure: Closure | Tensor, *, moves_buffers: bool) -> tuple[Tensor, Tensor | None, Any]:
        """Return (loss, outputs, targets), the latter two None where the closure returned the loss itself."""
        if isinstance(closure, Tensor):
            return loss_of(closure, None)
        measured = self._num_measured
        with contextlib.ExitStack() as stack, self._no_wrapper_alone():
            if not moves_buffers:
                buffers = RunningBuffers()
                stack.enter_context(buffers.watched())
                stack.enter_context(buffers.evaluation(moves=False))
            params = self._trained()
            stack.enter_context(own_gradients(params))
            corrected = self.curvature_due or self._recorder.forward_differentiates
            returned = self._recorder.run(closure, params) if corrected else closure()
        if self._num_measured != measured:
            raise InputError("the closure must not call zero_grad(): the curvature of earlier micro-batches is lost.")
        return loss_of(returned, self.loss)

    def _curved(self) -> list[Tensor]:
        """Return the parameters whose curvature is due, in an order that all ranks share."""
        return [p for group in self.param_groups if _is_due(group) for p in group["params"] if p.requires_grad]

    def _measure(self, params: Tensors, grads: list[Tensor | None], scale: Tensor | None, **of_batch: Any) -> None:
        refuse_sparse(grads, type(self).__name__)
        curved = self._curved()
        refuse_capture(params[0].device, "curvature is due and its random numbers belong to this very step")
        group, settings = self.process_group, self.param_groups
        ranks, rank = (1, 0) if group is None else (group.size(), group.rank())
        if len(curved) < len(params):
            chosen = {id(p) for p in curved}
            grads = [g for p, g in zip(params, grads, strict=True) if id(p) in chosen]
        batch = BatchGraph(
            **of_batch,
            params=curved,
            gradients=grads,
            rule=self._rule,
            seed=settings[0]["seed"],
            step=max(g["num_steps"] for g in settings),
            place=self._num_measured * ranks + rank,
            first=any(_is_due(g) and g["num_refreshes"] == 0 for g in settings),
        )
        sums = self.curvature.measure(batch)
        if scale is not None and self.curvature.second_order:
            inverse = scale.to(torch.float32).reciprocal()
            sums = [[t * inverse.to(t.device) for t in tensors] for tensors in sums]
        if self._sums is not None:
            sums = [list(torch._foreach_add(a, b)) for a, b in zip(self._sums, sums, strict=True)]
        self._sums = sums
        self._num_measured += 1

    @_disable_dynamo
    def _take_graphs_off_gradients(self) -> None:
        """The classic form: gradients that hold their graph. Measure curvature from it if due, then let go of it."""
        self._refuse_unlike(*self.param_groups)
        torch.clear_autocast_cache()  # of casts of the weights, which are about to move
        owners = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        with_graph = [p for p in owners if p.grad is not None and p.grad.requires_grad]
        # a backward pass with a graph has left one in the gradients of inputs too, which nobody would ever free
        inputs = leaves([p.grad for p in with_graph if p.grad is not None])
        try:
            if self._sums is None and any(p.grad is not None for p in self._curved()):
                zero = not with_graph and all_zero([p.grad for p in owners if p.grad is not None])
                if not zero and not self.curvature.second_order:
                    raise CheckFailedError(
                        "targets are sampled from the model's outputs, which gradients do not show: call step(closure) "
                        "or accumulate(closure) with a closure that returns (outputs, targets), and give loss= to the "
                        'optimizer; or pass curvature="hessian-diagonal".'
                    )
                if with_graph:
                    self._measure_from_gradients()
                elif not zero:
                    raise CheckFailedError(
                        "curvature is due at this step and the gradients have no graph: call step(closure) with a "
                        "closure that returns the loss, or optimizer.accumulate(loss) in place of loss.backward(), or "
                        "loss.backward(create_graph=optimizer.curvature_due). Under DistributedDataParallel only the "
                        "first two work, with process_group= given to the optimizer; in a transformers.Trainer "
                        "analysis.accumulate_in(trainer) puts the second in place."
                    )
        finally:
            for leaf in (*with_graph, *inputs):
                if leaf.grad is not None:
                    leaf.grad = leaf.grad.detach()

    def _measure_from_gradients(self) -> None:
        scale = getattr(self, "grad_scale", None)
        if getattr(self, "found_inf", None) is not None:
            if scale is None:
                raise CheckFailedError(
                    "scaler.unscale_() changed the gradients but not their graph, so that curvature would be scaled: "
                    "use optimizer.accumulate(loss, scaler=scaler) in place of scaler.scale(loss).backward()."
                )
            if self.process_group is not None:
                raise CheckFailedError(
                    "ranks would judge infinities apart: use optimizer.accumulate(loss, scaler=scaler), which averages "
                    "before the scaler looks."
                )
        params = self._trained()
        refuse_undifferentiable([p.grad for p in params], of_gradients=True)
        self._measure(params, [p.grad for p in params], scale)

    @torch.compiler.disable
    def _join(self, group: ProcessGroup) -> None:
        compare_ranks(self, f"gradients of {type(self).__name__}", point=True)
        outputs, targets = self._counted[0] if len(self._counted) == 1 else (None, None)
        share = share_of_rank(self, outputs, targets)
        average_gradients(self._trained(), group, share)
        if self._sums is not None:
            means = iter(average_over_ranks([t for tensors in self._sums for t in tensors], group, share))
            self._sums = [[next(means) for _ in tensors] for tensors in self._sums]
        self._synchronized = True

    def _forget_measured(self) -> None:
        """Drop what was accumulated for the coming step beside `.grad`."""
        super()._forget_measured()
        self._sums, self._counted = None, []
        self._num_measured, self._synchronized = 0, False

    def _move(self) -> None:
        """Hand every group's gradients and curvature to the update rule."""
        refuse_sparse((p.grad for group in self.param_groups for p in group["params"]), type(self).__name__)
        found: dict[int, Tensor] = {}
        if self._sums is not None:
            curved, estimates = self._curved(), self.curvature.finish(self._sums)
            if self.check_finite and getattr(self, "found_inf", None) is None:
                refuse_non_finite(curved, estimates)
            found = {id(p): estimate for p, estimate in zip(curved, estimates, strict=True)}
        self._forget_measured()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [g if g.dtype in WIDE else g.float() for g in (p.grad for p in params) if g is not None]
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                if not state:
                    state.update(self._new_state(p, group))
            refreshed = bool(found) and _is_due(group)
            curvatures = [found[id(p)] for p in params] if refreshed else None
            if group["maximize"]:
                grads = list(torch._foreach_neg(grads))
                if curvatures is not None and self.curvature.signed:
                    curvatures = list(torch._foreach_neg(curvatures))
            by_name = {name: [state[name] for state in states] for name in states[0]}
            for key in COUNTERS if refreshed else COUNTERS[:1]:  # a plain 1 would be made a tensor once for each
                torch._foreach_add_(by_name[key], _ONE if by_name[key][0].is_cpu else 1)
            lr = group["lr"] if group["capturable"] else float(group["lr"])
            if group["weight_decay"] != 0:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            self._update({**group, "lr": lr}, params, grads, curvatures, by_name)
            group["num_steps"] += 1
            group["num_refreshes"] += refreshed

    def _new_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        device = p.device if group["capturable"] else torch.device("cpu")
        state = {key: torch.zeros((), dtype=torch.float32, device=device) for key in COUNTERS}
        for name in self._averages:
            state[name] = torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        return state


_ONE = torch.tensor(1.0)


def _is_due(group: Group) -> bool:
    step = group["num_steps"]
    return step < group["update_first"] or step % group["update_every"] == 0 or group["num_refreshes"] == 0
