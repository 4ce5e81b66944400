"""Forward gradients: an unbiased gradient from forward passes alone.

References: Baydin, Pearlmutter, Syme, Wood and Torr (2022), Gradients without backpropagation; Ren, Kornblith, Liao and
Hinton (2023), Scaling forward gradient with local losses (perturbed activities).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from curvature.engine.repeated_evaluation import RepeatedEvaluation
from curvature.errors import InputError
from optimizers.shared.around import AroundAnother
from optimizers.shared.closures import loss_of
from optimizers.shared.differentiation import curvature_session, leaves
from optimizers.shared.gradients import UNREACHED
from optimizers.shared.probes import counter_generator, random_normals, random_signs
from optimizers.shared.ranks import average_over_ranks, compare_ranks, on_all_ranks, share_of_rank
from optimizers.without_backprop.activities import layers_of, local_gradients, perturbed, refuse_coupled
from optimizers.without_backprop.look import bits_of, refuse_mixed_rows, refuse_other_rows, refuse_uncounted

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = ["ForwardGradient"]

_STREAM = 21
_LOOK = 0, 0, 0  # counters of the random numbers of a look


class ForwardGradient(AroundAnother):
    """Steps of any optimizer with a gradient estimated by forward-mode differentiation: no backward pass, no graph.

        estimate = (1/m) sum_j (g . v_j) v_j           v_j: random directions of all parameters, E v v' = I

    g . v is one pass in forward mode. The estimate is unbiased, and its error is known (`relative_variance`), with P
    parameters:

        E |estimate - g|^2 = (P + 1)/m |g|^2        normal directions
                             (P - 1)/m |g|^2        signs

    so that steps must be about m / P times as long as with the gradient: this is for few parameters, or for studying
    what a network learns without a backward pass.

    With `activities_of=model`, directions u are drawn for the outputs of the layers that hold the parameters, and each
    layer's gradient is its own vector-Jacobian product with (directional derivative) u. Where the closure returns
    (outputs, targets) and `loss=` is given, every example has a directional derivative of its own; P is then the number
    of outputs of all layers for one example, and errors of examples average out. Where it returns the loss, P is that
    number times the batch. That parameters act through their layers alone, and rows of layers on their own example
    alone, is looked at once for each batch size and structure of calls; other models are refused. The look does not see
    a model that puts its examples in order where that batch happened to be in order.

        loss = optimizer.step(closure)         # the closure returns the loss, or (outputs, targets)
        loss = optimizer.estimate(closure)     # the estimate in `.grad`, and no step

    A parameter that the loss does not use moves with the noise of the others, around a gradient of zero: leave it out.
    Random numbers of the closure (dropout) are the same for all directions, running statistics move once. Ranks: with
    `process_group=`, directions are alike and derivatives are averaged. Attention runs under its math kernel, the only
    one with a forward mode.

    Cost: m passes in forward mode, of two to three forward passes each; a look takes 3 + 2 log2(N) more. Memory: two
    copies of the parameters, and nothing that grows with depth; by activities, what the layers' own gradients need.

    Args:
        params: parameters or groups of them.
        base: the optimizer, e.g. `torch.optim.SGD`: one that steps on gradients in `.grad`.
        num_directions: m.
        directions: "normal" or "signs", whose error is smaller by 2/m.
        activities_of: a module that holds the parameters: perturb what its layers give out instead of the weights.
        seed: of the directions, which are functions of (seed, step, j). The same in all groups.
        loss: `loss(outputs, targets)`, for closures that return both.
        process_group: ranks that hold parts of each batch.
        settings: of base.

    Raises:
        InputError: for settings out of range, closures that call backward() or do not reach the parameters, and
            operations without a forward mode; with `activities_of`, for layers that return no tensor,
            parameters used outside of their layers, and (outputs, targets) where rows of layers are not the examples.

    Examples:
        >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
        >>> optimizer = ForwardGradient([w], torch.optim.SGD, num_directions=2000, lr=0.1)
        >>> loss = optimizer.estimate(lambda: 0.5 * w.square().sum())
        >>> bool((w.grad - w.detach()).norm() < 0.5)  # the gradient is w
        True
        >>> optimizer.relative_variance
        0.0015
    """

    _late_settings: ClassVar[dict[str, Any]] = {"num_directions": 1, "directions": "normal", "seed": 0, "num_steps": 0}
    _counts = ("num_directions",)
    _alike = (*AroundAnother._alike, "num_directions", "directions")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"directions": ("normal", "signs")}
    _kept = (*AroundAnother._kept, "activities_of")

    def __init__(
        self,
        params: Any,
        base: Callable[..., torch.optim.Optimizer],
        *,
        num_directions: int = 1,
        directions: Literal["normal", "signs"] = "normal",
        activities_of: nn.Module | None = None,
        seed: int = 0,
        loss: Callable[..., Tensor] | None = None,
        process_group: ProcessGroup | None = None,
        **settings: Any,
    ) -> None:
        self.activities_of = activities_of
        own = {"num_directions": num_directions, "directions": directions, "seed": seed}
        super().__init__(params, base, own, settings, loss=loss, process_group=process_group)

    @property
    def relative_variance(self) -> float | None:
        """E |estimate - g|^2 / |g|^2; None for perturbed activities, where it depends on the network."""
        if self.activities_of is not None:
            return None
        settings, size = self.param_groups[0], sum(p.numel() for p in self._trained())
        return (size + (1 if settings["directions"] == "normal" else -1)) / float(settings["num_directions"])

    @_disable_dynamo
    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, before_update: Callable[[], object] | None = None
    ) -> Any:
        """Estimate the gradient, let base take its step, and return the loss before it, detached.

        Args:
            closure: returns the loss, or (outputs, targets) where `loss=` was given; calls no backward(). Without one
                base steps on what `estimate` left in `.grad`.
            before_update: called when the estimate lies in `.grad`, before base's step; for clipping.
        """
        loss = None if closure is None else self.estimate(closure)
        if before_update is not None:
            before_update()
        self.base.step()
        return loss

    @on_all_ranks
    @_disable_dynamo
    @torch.no_grad()
    def estimate(self, closure: Callable[[], Any]) -> Tensor:
        """Put an estimate of the gradient into `.grad` and return the loss, detached."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, of torch.jit
            forward_ad._maybe_load_decompositions()
        self._refuse_unlike(*self.param_groups)
        params, settings = self._trained(), self.param_groups[0]
        sums: dict[int, Tensor] = {}
        loss, kept = torch.zeros(()), False
        repeated = RepeatedEvaluation(params)
        try:
            with repeated.watched(), curvature_session(), self._no_wrapper_alone():
                for j in range(settings["num_directions"]):
                    counters = settings["seed"], settings["num_steps"], j
                    way = self._through_weights if self.activities_of is None else self._through_activities
                    loss, found = way(closure, repeated, params, counters)
                    for i, g in enumerate(found):
                        if g is not None:
                            sums[i] = sums[i] + g if i in sums else g
            kept = True
        finally:
            repeated.finish(keep=kept)
        for i, p in enumerate(params):
            p.grad = sums[i] / settings["num_directions"] if i in sums else None
        for group in self.param_groups:
            group["num_steps"] += 1
        return loss

    def _through_weights(
        self, closure: Callable[[], Any], repeated: RepeatedEvaluation, params: list[Tensor], counters: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        draw = random_normals if self.param_groups[0]["directions"] == "normal" else random_signs
        directions = draw(params, *counters)
        with _frozen(params), _sentences(), forward_ad.dual_level():
            for p, v in zip(params, directions, strict=True):
                p.copy_(forward_ad.make_dual(p.clone(), v))  # the parameter itself carries the tangent
            loss, outputs, targets = loss_of(repeated.call(closure), self.loss)
            value, slope = forward_ad.unpack_dual(loss)
        if slope is None:
            raise InputError(f"the loss does not depend on the optimizer's parameters. {UNREACHED}")
        slope = self._mean(slope, outputs, targets)
        return value.detach(), [(slope * v).to(v.dtype) for v in directions]

    def _through_activities(
        self, closure: Callable[[], Any], repeated: RepeatedEvaluation, params: list[Tensor], counters: tuple[int, ...]
    ) -> tuple[Tensor, list[Tensor | None]]:
        assert self.activities_of is not None
        layers, normal = layers_of(self.activities_of, params), self.param_groups[0]["directions"] == "normal"
        rank = 0 if self.process_group is None else self.process_group.rank()  # ranks hold other examples
        generators: dict[torch.device, torch.Generator] = {}

        def draw(like: Tensor) -> Tensor:
            if like.device not in generators:
                generators[like.device] = counter_generator(like.device, _STREAM, *counters, rank)
            drawn = torch.randn(like.shape, generator=generators[like.device], device=like.device, dtype=like.dtype)
            return drawn if normal else drawn.sign()

        with _frozen(params, moved=False), _sentences():
            with forward_ad.dual_level(), perturbed(layers, params, draw) as calls:
                returned = repeated.call(closure)
                pair = self._is_pair(returned)
                _refuse_leaks(returned[0] if pair else returned, params)
                if pair:
                    refuse_coupled(self.activities_of)
                    outputs, tangent = forward_ad.unpack_dual(returned[0])
                    returned = (outputs.detach(), returned[1])
                loss, _, targets = loss_of(returned, self.loss)
                value, slope = forward_ad.unpack_dual(loss)
            if (tangent if pair else slope) is None:
                raise InputError(f"the loss does not depend on the layers that hold the parameters. {UNREACHED}")
            share = 1.0
            if pair:
                with torch.enable_grad():
                    leaf = outputs.detach().requires_grad_()
                    (errors,) = torch.autograd.grad(loss_of((leaf, targets), self.loss)[0], leaf)
                slope = (errors * tangent).reshape(len(errors), -1).sum(1)
                refuse_other_rows(calls, len(slope))
                share = 1.0 if self.process_group is None else share_of_rank(self, outputs, targets)
        found = local_gradients(calls, slope.detach(), params)
        count = len(slope) if pair else None
        structure = count, *((id(call.own[0]), call.direction.ndim) for call in calls if call.own)
        del calls
        self._look(closure, repeated, layers, params, structure, draw)
        if self.process_group is not None:
            compare_ranks(self, "means of gradients")
            whole = [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]
            found = list(average_over_ranks(whole, self.process_group, share))
        return value.detach(), found

    def _look(
        self,
        closure: Callable[[], Any],
        repeated: RepeatedEvaluation,
        layers: list[nn.Module],
        params: list[Tensor],
        structure: tuple[Any, ...],
        draw: Callable[[Tensor], Tensor],
    ) -> None:
        """Refuse models whose estimates would be biased, where batch size or calls are others than before."""
        assert self.activities_of is not None
        count = structure[0]
        need = torch.tensor([structure not in self._shown, 0 if count is None else bits_of(count)])
        if self.process_group is not None:  # ranks evaluate alike often
            compare_ranks(self, "a look at the model")
            need = need.to(params[0].device)
            torch.distributed.all_reduce(need, torch.distributed.ReduceOp.MAX, self.process_group)
        due, bits = need.tolist()
        if not due:
            return

        def given() -> Tensor:
            returned = repeated.call(closure, moves=False)
            return returned[0] if self._is_pair(returned) else loss_of(returned, self.loss)[0]

        names = {id(p): name for name, p in self.activities_of.named_parameters()}
        with _frozen(params), _sentences():
            shifts = random_normals(params, *_LOOK)
            finite = refuse_uncounted(given, layers, [(names[id(p)], p) for p in params], shifts)
            if count is not None:
                finite &= refuse_mixed_rows(given, layers, params, count, bits, draw)
        if finite:
            self._shown.add(structure)

    def _is_pair(self, returned: Any) -> bool:
        return self.loss is not None and isinstance(returned, (tuple, list)) and len(returned) == 2

    def _forget(self) -> None:
        super()._forget()
        self._shown: set[Any] = set()  # batch sizes and structures that were looked at

    def _mean(self, slope: Tensor, outputs: Tensor | None, targets: Any) -> Tensor:
        if self.process_group is None:
            return slope
        compare_ranks(self, "means of slopes")
        share = 1.0 if outputs is None else share_of_rank(self, outputs, targets)
        return average_over_ranks([slope], self.process_group, share)[0]


def _refuse_leaks(given: Any, params: list[Tensor]) -> None:
    """Refuse what depends on a layer's own parameters otherwise than by the layer's output, whose graph is cut."""
    own = {id(p) for p in params}
    if isinstance(given, Tensor) and any(id(leaf) in own for leaf in leaves([given])):
        raise InputError(
            "a layer of activities_of hands on something made of its parameters beside the tensor that it returns (a "
            "penalty kept as an attribute), which is not perturbed: leave activities_of out."
        )


@contextlib.contextmanager
def _frozen(params: list[Tensor], *, moved: bool = True) -> Any:
    """Keep a closure from recording graphs of these parameters, and put those moved back as they were, to the bit."""
    before = [p.clone() for p in params] if moved else []
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p, x in zip(params, before, strict=False):
            p.copy_(x)
        for p in params:
            p.requires_grad_(True)


@contextlib.contextmanager
def _sentences() -> Any:
    try:
        yield
    except NotImplementedError as error:
        if "forward AD" not in str(error):
            raise
        raise InputError(
            f"the closure has an operation without a forward mode ({str(error).split(' that does')[0]}): replace it, "
            "or take the gradient by a backward pass."
        ) from error
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise InputError(
            "the closure must return the loss, differentiate nothing by the parameters, and call no backward(): "
            "forward gradients are taken without one."
        ) from error
