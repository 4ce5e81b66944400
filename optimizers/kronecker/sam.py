"""Sharpness-aware minimisation: the gradient at the worst point nearby, for any optimizer.

References: Foret, Kleiner, Mobahi and Neyshabur (2021), Sharpness-aware minimization for efficiently improving
generalization; Kwon, Kim, Park and Choi (2021), ASAM: adaptive sharpness-aware minimization.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.engine.repeated_evaluation import RepeatedEvaluation, RunningBuffers
from curvature.errors import InputError
from curvature.objective.shards import is_part
from optimizers.shared.around import AroundAnother
from optimizers.shared.base import Group
from optimizers.shared.closures import backward_of
from optimizers.shared.gradients import all_zero, refuse_sparse
from optimizers.shared.ranks import average_gradients, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ASAM", "SAM"]

Closure = Callable[[], Any]
Context = Callable[[], contextlib.AbstractContextManager[Any]]


class SAM(AroundAnother):
    """Steps of any optimizer with the gradient at the worst point nearby, for flat minima.

        e = rho g / |g|                  g: the gradient at theta, over all parameters
        base optimizer's step from theta with the gradient at theta + e

    `adaptive` measures distance relative to the weights (ASAM): with T = |theta| + eta, e = rho T^2 g / |T g|.

    Two ways to take a step:

        optimizer.step(closure)                        # the closure returns the loss; backward() is called for it,
                                                       # unless it does so itself; it is evaluated twice

        optimizer.zero_grad()
        loss_of(batch).backward()                      # or scaler.scale(...)
        optimizer.perturb()                            # moves to theta + e, and clears gradients
        loss_of(batch).backward()
        optimizer.step()                               # or scaler.step(optimizer): moves back, takes base's step, and
                                                       # clears gradients

    The second evaluation draws the same random numbers (in `step(closure)`; dropout masks repeat) and leaves running
    statistics alone: they are those of the first (in both forms). With a `GradScaler`, the second form; an infinity in
    either pass skips the step, and parameters are back at theta.

    m-SAM: `step([closure, closure, ...])` perturbs for each micro-batch by its own gradient and takes the mean of the
    gradients found. Under `DistributedDataParallel` the first pass may stay on its rank, `step(closure,
    first_pass=ddp.no_sync)`: every rank then perturbs by its own gradient, as the paper's code does, and one
    communication is saved. Without it ranks perturb alike, and the step is that of one process. Without DDP, pass
    `process_group=`. Models in parts by `fully_shard` take both forms.

    Cost: two gradients a step, a copy of the parameters, and base's step.

    Args:
        params: parameters or groups of them; `rho`, `adaptive` and `eta` may differ by group.
        base: the optimizer, e.g. `torch.optim.AdamW` or `optimizers.SOAP`: one that steps on gradients in `.grad`.
        rho: length of the perturbation.
        adaptive: in units of the weights.
        eta: what is added to the weights then.
        loss: `loss(outputs, targets)`, for closures that return both.
        process_group: ranks that hold parts of each batch, where no wrapper averages gradients.
        settings: of base.

    Attributes:
        base: the optimizer inside. Groups and state are shared with it: `state_dict()` holds both, and schedulers and
            `add_param_group` are given to this one.

    Raises:
        InputError: for settings out of range, a base that needs closures (LBFGS), and a step on gradients without
            `perturb()` before.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = SAM([w], torch.optim.SGD, rho=5.0, lr=0.1)
        >>> loss = optimizer.step(lambda: 0.5 * w.square().sum())  # the gradient at w + 5 w / |w| is 2 w
        >>> w.detach()
        tensor([2.4000, 3.2000])
    """

    _takes_parts = True
    _late_settings: ClassVar[dict[str, Any]] = {"rho": 0.05, "adaptive": False, "eta": 0.01}
    _least: ClassVar[dict[str, float]] = {"rho": 0.0, "eta": 0.0}
    _step_supports_amp_scaling = True  # a scaler that left the step out would leave the parameters perturbed
    _moved: list[tuple[Tensor, Tensor]] | None
    _watch: contextlib.ExitStack | None

    def __init__(
        self,
        params: Any,
        base: Callable[..., torch.optim.Optimizer],
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        eta: float = 0.01,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        super().__init__(params, base, own, settings, loss=loss, process_group=process_group)

    def _forget(self) -> None:
        self._moved, self._watch = None, None
        super()._forget()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_moved" not in self.__dict__:
            self._forget()

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if not isinstance(group["adaptive"], bool):
            raise InputError(f"adaptive must be True or False, got {group['adaptive']!r}.")

    def state_dict(self) -> dict[str, Any]:
        """Return base's state and settings, and those of the perturbation."""
        self._refuse_perturbed("saved")
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load base's state and settings, and those of the perturbation."""
        self._refuse_perturbed("loaded")
        super().load_state_dict(state_dict)

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_perturbed("copied")
        return super().__getstate__()

    def _refuse_perturbed(self, what: str) -> None:
        if self._moved is not None:
            raise InputError(
                f"parameters are perturbed: take step() before the state is {what}. After zero_grad(), step() moves "
                "them back and no further."
            )

    # -- steps --------------------------------------------------------------------------------------------------------

    @on_all_ranks
    @_disable_dynamo
    @torch.no_grad()
    def step(
        self,
        closure: Closure | Sequence[Closure] | None = None,
        *,
        first_pass: Context = contextlib.nullcontext,
        before_update: Callable[[], object] | None = None,
    ) -> Any:
        """Take one step and return the closure's loss at theta, detached; the mean for several closures.

        Args:
            closure: evaluated at theta and at theta + e; returns the loss, or (outputs, targets) where `loss=` was
                given. Several, of micro-batches that count alike, each with a perturbation of its own. None after
                `perturb()`.
            first_pass: a context for the evaluations at theta: `no_sync` of DistributedDataParallel.
            before_update: called when gradients lie in `.grad`, unscaled, before base's step; for clipping.
        """
        found_inf = getattr(self, "found_inf", None)
        if closure is not None:
            if found_inf is not None:
                raise InputError("a GradScaler cannot step with a closure; use perturb() between two backward passes.")
            if self._moved is not None:
                raise InputError("perturb() was called: step() takes no closure then.")
            closures = [closure] if callable(closure) else list(closure)
            if len(closures) != 1:
                self.zero_grad()
            losses = [self._at_both_points(one, first_pass, len(closures)) for one in closures]
            loss = sum(losses[1:], losses[0]) / len(losses) if len(losses) > 1 else losses[0]
        else:
            loss = None
            self._move_back()
            if self.process_group is not None:
                self._average(None, None)
        scale = getattr(self, "grad_scale", None)
        if found_inf is None or not bool(found_inf):
            for p in self._trained():
                if scale is not None and p.grad is not None:
                    p.grad.div_(scale.to(p.device))
            if before_update is not None:
                before_update()
            self.base.step()
        if closure is None:  # they are of the perturbed point, and must not enter the next perturbation
            self.zero_grad()
        return loss

    @_disable_dynamo
    @torch.no_grad()
    def perturb(self) -> None:
        """Move from theta to theta + e by what lies in `.grad`, and clear it.

        Gradients may be scaled: their scale cancels. Until `step()`, forward passes leave running statistics alone.
        """
        if self._moved is not None:
            raise InputError("perturb() was called before: take step() first.")
        if self.process_group is not None:
            self._average(None, None)
        self._look_for_gradients(computed=False, old=False)
        buffers = RunningBuffers()
        self._watch = contextlib.ExitStack()
        self._watch.enter_context(buffers.watched())
        norm = self._move_away()
        self.zero_grad()
        for p in self._trained()[:1]:  # where a gradient was not finite, that of the second pass is none either
            if norm is not None:
                p.grad = torch.zeros_like(p) + (norm * 0).to(p.dtype)

    def _at_both_points(self, closure: Closure, first_pass: Context, parts: int) -> Any:
        """Add the gradient at the perturbed point, divided by the number of parts, to `.grad`; return the loss."""
        params = self._trained()
        earlier = [p.grad for p in params] if parts > 1 else [None] * len(params)
        repeated, kept = RepeatedEvaluation(params), False
        try:
            with repeated.watched():
                self.zero_grad()
                with repeated.evaluation(), first_pass():
                    loss, *of_batch = backward_of(closure, params, self.loss)
                self._average(*of_batch)
                self._look_for_gradients(computed=isinstance(loss, Tensor), old=False)
                self._move_away()
                try:
                    self.zero_grad()
                    with repeated.evaluation(moves=False):
                        _, *of_batch = backward_of(closure, params, self.loss)
                    self._average(*of_batch)
                finally:
                    self._move_back()
            kept = True
        finally:
            repeated.finish(keep=kept)
        for p, before in zip(params, earlier, strict=True):
            if p.grad is not None and parts > 1:
                p.grad.div_(parts)
            if before is not None:
                p.grad = before if p.grad is None else p.grad.add_(before)
        return loss

    def _average(self, outputs: Tensor | None, targets: Any) -> None:
        if self.process_group is None:
            return
        share = 1.0 if outputs is None else share_of_rank(self, outputs, targets)
        average_gradients([p for p in self._trained() if not is_part(p)], self.process_group, share)

    def _move_away(self) -> Tensor | None:
        """Move to theta + e, nowhere if the gradient is zero or not finite; return the norm of (T) g."""
        found: list[tuple[Tensor, Tensor, float]] = []
        refuse_sparse((p.grad for p in self._trained()), type(self).__name__)
        for group in self.param_groups:
            length = group["rho"] * (-1 if group.get("maximize") else 1)
            for p in group["params"]:
                if p.grad is not None and p.requires_grad:  # a frozen one may keep an old gradient
                    wide = p.grad.to(torch.promote_types(p.dtype, torch.float32))
                    scaled = wide * (p.abs() + group["eta"]) if group["adaptive"] else wide
                    found.append((p, scaled, length))
        self._moved = [(p, p.clone()) for p, *_ in found]
        if not found:
            return None
        norm: Any = torch.nn.utils.get_total_norm([scaled for _, scaled, _ in found])
        norm = norm.full_tensor() if is_part(norm) else norm
        inverse = torch.where(norm.isfinite() & (norm > 0), 1 / norm, 0.0)
        adaptive = {id(p): g["eta"] for g in self.param_groups if g["adaptive"] for p in g["params"]}
        for p, scaled, length in found:
            share = scaled * (p.abs() + adaptive[id(p)]) if id(p) in adaptive else scaled
            p.add_((share * (length * inverse.to(p.device))).nan_to_num_(0.0, 0.0, 0.0))
        return norm

    def _move_back(self) -> None:
        if self._watch is not None:
            self._watch.close()
        if self._moved is None:
            with_grad = [p.grad for p in self._trained() if p.grad is not None]
            if not all_zero([g.to_local() if is_part(g) else g for g in with_grad]):  # type: ignore[attr-defined]
                raise InputError(
                    "gradients were not taken at the perturbed point: call step(closure), or perturb() and a second "
                    "backward pass before step()."
                )
        for p, before in self._moved or ():
            p.copy_(before)
        self._moved, self._watch = None, None


class ASAM(SAM):
    """SAM with distances relative to the weights: its neighbourhood does not change when layers are rescaled.

    Args:
        params: parameters or groups of them.
        base: the optimizer.
        rho: length of the perturbation, in units of the weights.
        settings: of `SAM`, and of base.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> ASAM([w], torch.optim.SGD, lr=0.1).param_groups[0]["adaptive"]
        True
    """

    def __init__(
        self, params: Any, base: Callable[..., torch.optim.Optimizer], *, rho: float = 0.5, **settings: Any
    ) -> None:
        super().__init__(params, base, rho=rho, **{"adaptive": True, **settings})
