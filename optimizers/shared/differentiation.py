"""Derivatives of a loss by `torch.autograd.grad`: no `.grad` is touched, no graph outlives the step, no hook is missed.

`loss.backward(create_graph=True)` leaves gradients that hold their graph, which holds the parameters, which hold the
gradients: memory that is never freed. It also meets the hooks of data-parallel wrappers, which write in place. Neither
happens to derivatives that are asked for by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from curvature.autograd.backward import differentiable, no_autocast, pull_back, walk
from curvature.autograd.guards import refuse_undifferentiable
from curvature.autograd.lean import LeanLayers, MustRecordAnewError
from curvature.engine.repeated_evaluation import Attempts
from curvature.environment.device import ATTENTION_KERNELS, is_gpu
from curvature.environment.lock import one_at_a_time
from curvature.environment.memory import keep_freed
from curvature.errors import CheckFailedError, CurvatureError, InputError

__all__ = ["ClosureRecorder", "curvature_session", "gradients", "leaves", "products"]

T = TypeVar("T")

_KERNELS = [(*switches, kernel is SDPBackend.MATH) for kernel, switches in ATTENTION_KERNELS.items()]
"""`torch.nn.attention.sdpa_kernel` does the same as these switches and takes as long as a small layer."""


class curvature_session:  # a generator's context takes three times as long
    """Let a forward pass be differentiated twice: attention by the math kernel, compiled models run eagerly."""

    def __enter__(self) -> None:
        one_at_a_time.__enter__()
        self._stance = torch.compiler.set_stance("force_eager")  # entered by being made
        self._switched = [(switch, not wanted) for is_on, switch, wanted in _KERNELS if is_on() != wanted]
        for switch, was_on in self._switched:
            switch(not was_on)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stance.__exit__(kind, error, trace)
        for switch, was_on in self._switched:
            switch(was_on)
        one_at_a_time.__exit__(kind, error, trace)


@dataclass
class ClosureRecorder:
    """Runs closures with the layers replaced that torch differentiates wrongly, as far as it has seen them need it.

    Attributes:
        forward_differentiates: a closure was seen to differentiate itself (a PINN, a gradient penalty).
    """

    forward_differentiates: bool = False
    _attempts: Attempts = field(default_factory=Attempts)

    def run(self, closure: Callable[[], T], params: Sequence[Tensor] | None = None) -> T:
        """Return what the closure does; it runs twice when it first turns out to need derivatives beyond the second.

        The run that is broken off leaves no trace in buffers and random streams if parameters are given, whose devices
        have such streams; otherwise the closure sees to that.
        """
        layers = LeanLayers(corrections_only=True, third_order=self.forward_differentiates, as_trained=True)
        undone = params is not None and not self.forward_differentiates
        try:
            with self._attempts.attempt(params or ()) if undone else contextlib.nullcontext(), layers:
                returned = closure()
        except MustRecordAnewError:
            if not layers.must_record_anew:
                raise
        self.forward_differentiates |= layers.forward_differentiates
        if not layers.must_record_anew:
            return returned
        with LeanLayers(third_order=True, as_trained=True):
            return closure()


def gradients(loss: Tensor, params: Sequence[Tensor], *, create_graph: bool, retain_graph: bool) -> list[Tensor | None]:
    """Return the gradient of the loss in every parameter, None where it does not depend on it.

    Raises:
        InputError: if the loss has no graph, or one that a call of backward() has used up.
        CheckFailedError: for a graph of the gradient, if autograd would leave something out of it.
    """
    if not loss.requires_grad:
        raise InputError(
            "the loss has no graph: the closure must compute it from the parameters with gradients enabled, not under "
            "torch.no_grad() and not detached."
        )
    if create_graph:
        refuse_undifferentiable([loss])
    return _derivatives([loss], params, create_graph=create_graph, retain_graph=retain_graph or create_graph)


def products(
    functions: Sequence[Tensor | None], params: Sequence[Tensor], vectors: Sequence[Tensor], *, retain_graph: bool
) -> list[Tensor]:
    """Return sum_i vectors_i' d functions_i / d params: a Hessian product, if the functions are gradients.

    Functions that are None or have no graph do not depend on anything: they count as constants.

    Raises:
        CheckFailedError: if the model holds a function without a second derivative.
    """
    chosen, along = differentiable(functions, vectors)
    if not chosen:
        return [torch.zeros_like(p) for p in params]
    if not is_gpu(params[0].device):
        keep_freed()  # a graph comes and goes with each step
    parts = _derivatives(chosen, params, along, retain_graph=retain_graph)
    return [torch.zeros_like(p) if part is None else part for part, p in zip(parts, params, strict=True)]


def leaves(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the leaves that the graphs of some tensors reach: parameters, and inputs that ask for a gradient."""
    nodes = walk([t.grad_fn for t in tensors])
    return [node.variable for node in nodes if getattr(node, "variable", None) is not None]


def _derivatives(
    functions: list[Tensor], params: Sequence[Tensor], vectors: list[Tensor] | None = None, **graphs: bool
) -> list[Tensor | None]:
    """Return what `pull_back` does; its errors tell what to do about them."""
    try:
        with no_autocast(functions[0].device):
            return list(pull_back(functions, params, vectors, **graphs))
    except RuntimeError as error:
        for mark, kind, advice in _CAUSES:
            if mark in str(error):
                raise kind(advice) from error
        raise


_CLOSURE = "hand step() or accumulate() a closure, which is run"
_CAUSES: tuple[tuple[str, type[CurvatureError], str], ...] = (  # what torch says -> what to do about it
    (
        "a second time",
        InputError,
        "the graph of the loss was used up: the closure must return the loss and call no backward() itself.",
    ),
    (
        "scaled_dot_product",
        CheckFailedError,
        f"a fused attention kernel has no second derivative: {_CLOSURE} under the math kernel, or compute the loss "
        "under torch.nn.attention.sdpa_kernel(SDPBackend.MATH).",
    ),
    *(
        (mark, CheckFailedError, f"a compiled model has no second derivative: {_CLOSURE} eagerly.")
        for mark in ("donated buffer", "does not currently support double backward")
    ),
    (
        "once_differentiable",
        CheckFailedError,
        "the model holds a function whose backward is marked once_differentiable: write its backward in "
        'differentiable operations, or use curvature="gauss-newton-bartlett", which needs first derivatives only.',
    ),
    (
        "CuDNN RNN",
        CheckFailedError,
        "cuDNN's recurrent layers have no second derivative: compute the loss under "
        "torch.backends.cudnn.flags(enabled=False).",
    ),
)
