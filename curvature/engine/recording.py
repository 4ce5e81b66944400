"""One batch's loss as it is recorded for derivatives, and what every derivative of it needs."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from curvature.autograd.backward import End, ends_of
from curvature.autograd.guards import failing_operation
from curvature.autograd.lazy_logits import HeadInBlocks, LazyLogits
from curvature.autograd.lean import LeanLayers
from curvature.autograd.lean_trust import LeanTrust
from curvature.engine.evaluation import Evaluator
from curvature.environment.memory import HeldMemory
from curvature.errors import DataError, InputError, NonFiniteError
from curvature.parameters import Block, ParameterSpace

__all__ = ["NOT_OF_LAYERS", "Recording", "all_finite", "invisibly", "stacked"]

NOT_OF_LAYERS = (InputError, DataError, torch.OutOfMemoryError)
"""Errors that recording a model without lean layers would not mend."""

P = ParamSpec("P")
R = TypeVar("R", bound="Recording")
T = TypeVar("T")

_NAMED = 4  # parameters that a message names
_LARGE = 1 << 20  # entries of a vector from which memory counts more than calls, ...
_FRUGAL = 1 << 25  # ... and bytes from which a gradient is rather computed again than held beside its graph


def invisibly(method: Callable[Concatenate[R, P], T]) -> Callable[Concatenate[R, P], T]:
    """Let a method that fails with lean layers run again without them: what it raises then is the model's own."""

    @functools.wraps(method)
    def falls_back(self: R, /, *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:
            trust = self._trust
            if trust is None or self.num_lean_layers == 0 or isinstance(error, NOT_OF_LAYERS):
                raise
            reason = f"they raised {type(error).__name__}"
        self._record_plainly()
        result = method(self, *args, **kwargs)
        trust.revoke(reason)
        return result

    return falls_back


def all_finite(rows: Tensor) -> bool:
    """Say whether no entry is NaN or infinite, by one reduction."""
    return math.isfinite(float(rows.sum())) or bool(rows.isfinite().all())  # a sum may overflow


class Recording:
    """The loss of one batch at the present parameters, with its graph.

    Args:
        evaluator: how the model is evaluated.
        space: the chosen parameters.
        batch: the batch, on the device of the parameters.
        index: its place in the data, which fixes its random numbers.
        trust: allows lean layers, after a comparison with autograd; None records layers as autograd has them.
        third_order: records layers so that a third derivative is right.
        meter: watches what the graphs hold (a little slower to build).
    """

    def __init__(
        self,
        evaluator: Evaluator,
        space: ParameterSpace,
        batch: Any,
        index: int,
        *,
        trust: LeanTrust | None = None,
        third_order: bool = False,
        meter: HeldMemory | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._space = space
        self._params = list(space.tensors.values())
        plain = all(type(p) in (Tensor, torch.nn.Parameter) for p in self._params)
        self._uniform = plain and all(p.dtype == space.dtype and p.numel() > 0 for p in self._params)
        self.batch = batch
        self.index = index
        self._meter = meter
        self._third_order = third_order or bool(evaluator.forward_differentiates)
        self.holds_gradient = self.vector_bytes < _FRUGAL
        """Whether a graph is kept with the vector that it yields."""
        self._allows_blocks = True
        self._trust = None if trust is None or trust.revoked or self._third_order else trust
        self._record()
        self.weight = self._evaluation.weight
        self.loss = self._evaluation.loss.detach()
        self.drew_random_numbers = self._evaluation.drew_random_numbers

    # -- evaluation ---------------------------------------------------------------------------------------------------

    def _evaluate(self) -> None:
        """Run the model as the present settings say; a subclass gives up what it built on the graph before."""
        blocks = None if self._third_order or not self._allows_blocks else self._evaluator.head_in_blocks()
        if blocks is not None and self._evaluated_in(blocks):
            self._evaluator.head_in_use |= blocks.in_use
            return
        self._evaluate_with(None)
        if blocks is not None:
            self._evaluator.head_in_use, self._evaluator.head_refusal = False, blocks.refusal

    def _evaluated_in(self, blocks: HeadInBlocks) -> bool:
        """Evaluate with the head in blocks, and say whether that went well; without, if it never came to that."""
        try:
            self._evaluate_with(blocks)
        except Exception as error:
            if not blocks.in_use or self._lean.must_record_anew:
                raise
            blocks.refusal = blocks.refusal or f"with logits in blocks the model raised {type(error).__name__}"
        return not blocks.refusal

    def _evaluate_with(self, blocks: HeadInBlocks | None) -> None:
        self._lean = LeanLayers(corrections_only=self._trust is None, third_order=self._third_order)
        with self._metered():
            self._buffers = self._evaluator.copy_buffers()
            with self._session():
                self._evaluation = self._evaluator.evaluate(self.batch, self.index, blocks)

    @property
    def in_blocks(self) -> bool:
        """Whether the model's outputs are logits of a head that works in blocks."""
        return isinstance(self._evaluation.outputs, LazyLogits)

    def _leave_blocks(self) -> None:
        """Record the logits as torch has them, for what needs all of them."""
        if self.in_blocks:
            self._allows_blocks = False
            self._evaluate()

    def _record(self) -> None:
        """Run the model; anew where it fails with lean layers or turns out to differentiate itself."""
        trust = self._trust
        try:
            self._evaluate()
        except Exception as error:
            if not self._lean.must_record_anew:
                if trust is None or isinstance(error, NOT_OF_LAYERS):
                    raise
                self._trust = None
                self._record()
                trust.revoke(f"they raised {type(error).__name__}")
                return
        inside = self._lean.forward_differentiates
        if self._lean.must_record_anew:
            self._third_order = True
            self._record_plainly()
        self._evaluator.forward_differentiates = inside or bool(self._evaluator.forward_differentiates)
        if inside and trust is not None:
            trust.revoke("the model differentiates in its forward pass, and they hold two derivatives only")

    def _record_plainly(self) -> None:
        self._trust = None
        self._evaluate()

    @property
    def vector_bytes(self) -> int:
        """Of a vector with an entry for each parameter."""
        return self._space.num_params * self._space.dtype.itemsize

    def _ends(self, parts: Sequence[Tensor | None]) -> Sequence[End | None]:
        """Return what products begin with."""
        return parts if self.holds_gradient else ends_of(parts)

    @property
    def num_lean_layers(self) -> int:
        """How many layers were recorded in their lean form."""
        return self._lean.num_replaced

    def _backward_session(self) -> AbstractContextManager[Any]:
        """What products need: as much as building the graph did only where parts of the model run again."""
        return self._session() if self._lean.saw_hooks else self._evaluator.backward_session()

    def _session(self) -> AbstractContextManager[None]:
        return self._evaluator.session(self._buffers, self._lean)

    def _metered(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._meter is None else self._meter

    # -- flat vectors <-> parameter tensors ---------------------------------------------------------------------------

    def _positions(self, block: Block | None) -> Sequence[int]:
        return range(len(self._params)) if block is None else block.positions

    def _unflatten(self, x: Tensor, chosen: Sequence[int]) -> list[Tensor]:
        params = [self._params[i] for i in chosen]
        if self._uniform:
            return list(_unflatten_dense_tensors(x, params))
        parts = x.split([p.numel() for p in params])
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]

    def _flatten(self, parts: Sequence[Tensor | None], chosen: Sequence[int] | None = None) -> Tensor:
        """Return the parts as one vector; a list of them may be emptied on the way."""
        params = self._params if chosen is None else [self._params[i] for i in chosen]
        contiguous = [part for part in parts if part is not None and part.is_contiguous()]
        if self._uniform and len(contiguous) == len(parts) and self._space.num_params < _LARGE:
            joined: Tensor = _flatten_dense_tensors(contiguous)
            return joined
        return _gathered(parts if isinstance(parts, list) else list(parts), params, self._space.dtype)

    def _check_finite(self, gradient: Sequence[Tensor | None]) -> None:
        used = {name: g.detach() for name, g in zip(self._space.names, gradient, strict=True) if g is not None}
        if self.weight == 0 or not used or bool(torch.stack(torch._foreach_norm(list(used.values()))).isfinite().all()):
            return
        for name, g in used.items():
            if not bool(torch.isfinite(g).all()):
                raise NonFiniteError(
                    f"the gradient of {name!r} is not finite on batch {self.index} although the loss is: the function "
                    "is not "
                    "differentiable there (sqrt or norm at 0?) or overflows; shift the argument or use a wider dtype."
                )

    def _refuse(
        self, rows: Tensor, X: Tensor, chosen: Sequence[int], again: Callable[[], Any] | None = None
    ) -> NoReturn:
        """Raise for a product with X that is not finite, with its parameter and, if `again` shows it, the operation."""
        if not bool(X.isfinite().all()):
            raise NonFiniteError("the vector that the matrix is applied to holds values that are not finite.")
        sizes = [self._params[i].numel() for i in chosen]
        bad = [not bool(part.isfinite().all()) for part in rows.split(sizes, dim=-1)] if sizes else []
        rows_of = [repr(self._space.names[i]) for i, is_bad in zip(chosen, bad, strict=True) if is_bad]
        more = f" and {len(rows_of) - _NAMED} more" if len(rows_of) > _NAMED else ""
        names = ", ".join(rows_of[:_NAMED]) + more
        operation = "" if again is None else failing_operation(again)
        raise NonFiniteError(
            f"the product is not finite on batch {self.index}"
            + (f" in the rows of {names}" if names else "")
            + (f", first in {operation}" if operation else "")
            + ", although loss and vector are: the loss is not twice differentiable there (a norm or sqrt at 0?) or "
            "overflows; shift the argument or use a wider dtype."
        )


def _gathered(parts: list[Tensor | None], params: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Return the parts as one vector, each copied once and freed then: never two vectors at once."""
    flat = torch.empty(sum(p.numel() for p in params), dtype=dtype, device=params[0].device)
    for i, place in enumerate(flat.split([p.numel() for p in params])):
        part, parts[i] = parts[i], None
        if part is None:
            place.zero_()
        else:
            place.view(part.shape).copy_(part)
    return flat


def stacked(rows: Iterable[Tensor], count: int) -> Tensor:
    """Return the rows as one tensor; a single one is not copied, and of more no two are held beside it."""
    together: Tensor | None = None
    for i, row in enumerate(rows):
        if count == 1:
            return row[None]
        together = row.new_empty(count, *row.shape) if together is None else together
        together[i] = row
        del row
    assert together is not None
    return together
