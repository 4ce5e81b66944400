"""The engine: the loss of one batch, linearised once and applied to many vectors.

Two graphs are built on one forward pass, each when it is first needed:

- Hessian: g = grad(loss, params) with its own graph; H v = grad(g, params, v). Two gradients' work a product, at best.
- Jacobian of the outputs: J'u as a function of a dummy u; J v = grad(J'u, u, v). A product J'M J v goes on with a
  matrix M on the outputs (the loss Hessian for Gauss-Newton, in closed form where the loss is known), then with J'
  through the first graph. 4/3 of a gradient's work a product, at best.

Both are ordinary reverse-mode double backward, the route that is right for every differentiable layer.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvature.autograd.backward import End, differentiable, no_autocast, walk
from curvature.autograd.backward import pull_back as _pull_back
from curvature.autograd.guards import refuse_undifferentiable
from curvature.autograd.lazy_logits import LazyLogits, NotInBlocksError
from curvature.autograd.lean import LeanLayers
from curvature.engine.beside import refuse_what_is_beside
from curvature.engine.chain import find_chain
from curvature.engine.output_metrics import BatchOutputs, LossHessian, OutputMetric, Per, example_shares
from curvature.engine.recording import all_finite, invisibly, stacked
from curvature.engine.replays import Replays, agree
from curvature.engine.verified import VerifiedRecording
from curvature.environment.device import is_gpu
from curvature.errors import InputError
from curvature.parameters import Block

__all__ = ["Linearization", "walk"]

LOSS_HESSIAN = LossHessian()
HESSIAN = frozenset({"hvp"})  # a name, as an output metric is that of its products


class Linearization(VerifiedRecording):
    """The loss of one batch at the present parameters, ready for products."""

    def _evaluate(self) -> None:
        self._gradient: Sequence[End | None] | None = None
        self._jacobian: tuple[Sequence[End | None], list[Tensor]] | None = None
        self._output_maps: WeakKeyDictionary[OutputMetric, Any] = WeakKeyDictionary()
        self._roots: list[Tensor] = []
        self._replays: Replays | None = None
        self._params = list(self._space.tensors.values())
        super()._evaluate()
        rule = self._evaluator.rule
        lean = self._trust is not None and self._uniform and not self._lean.saw_hooks
        lean = lean and rule is not None and rule.closed_form
        found = self._evaluation
        self._chain = find_chain(found.loss, found.outputs, found.targets, self._params) if lean else None

    def _recorded_again(self, beside: AbstractContextManager[None]) -> bool:
        """Record the batch on another stream, for products that are replayed from now on; False if it cannot be."""
        replays, own, before, good = self._replays, self._evaluator, self.gradient(), False
        try:
            with contextlib.suppress(Exception), beside, own.with_new_leaves() as self._evaluator:
                self._evaluate()
                self._params = list(self._evaluator.parameters)
                good = agree(self.gradient(), before)  # it is not where a loss holds parameters that the model does not
        finally:
            self._evaluator = own
        if not good:
            self._evaluate()
        self._replays = replays
        return good

    # -- gradient -----------------------------------------------------------------------------------------------------

    @invisibly
    def gradient(self) -> Tensor:
        """Return the gradient of the batch's loss, (n,).

        Raises:
            NonFiniteError: with batch and parameter.
        """
        if self._gradient is not None and self.holds_gradient:
            return self._flatten([g.detach() if isinstance(g, Tensor) else None for g in self._gradient])
        if not self._evaluation.loss.requires_grad:
            return self._flatten([None] * len(self._params))
        with self._session(), no_autocast(self._space.device):
            parts = _pull_back([self._evaluation.loss], self._params)
        self._check_finite(parts)
        return self._flatten(parts)

    def used_parameters(self) -> tuple[bool, ...] | None:
        """Say for each parameter whether this batch depends on it; None before a graph was built."""
        transposed = None if self._jacobian is None else self._jacobian[0]
        parts = transposed if self._gradient is None else self._gradient
        if self._chain is not None:  # it holds all of them
            return (True,) * len(self._params)
        return None if parts is None else tuple([part is not None for part in parts])

    def outputs_and_targets(self) -> tuple[Tensor, Any]:
        """Return the model's outputs on this batch, detached, and the targets.

        Raises:
            InputError: if forward returned something else than one tensor of outputs.
        """
        self._leave_blocks()
        outputs = self._evaluation.outputs
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"the outputs must be one tensor, got {type(outputs).__name__}; pass forward= that picks it."
            )
        return outputs.detach(), self._evaluation.targets

    def batch_outputs(self) -> BatchOutputs:
        """Return the model's outputs on this batch, detached, beside the loss and the targets it compares them with.

        Raises:
            InputError: if the loss depends on the parameters by other ways than through the outputs.
        """
        self._leave_blocks()
        return self._batch_outputs()

    def example_shares(self, per: Per) -> Tensor:
        """Return what each example counts in the batch, as `output_metrics.example_shares`."""
        return example_shares(self._batch_outputs(), per)

    def _batch_outputs(self) -> BatchOutputs:
        outputs, rule = self._outputs("matrix"), self._evaluator.rule
        assert rule is not None
        if not self.in_blocks:  # what ends in blocks is a function of the logits
            refuse_what_is_beside(self._evaluation.loss, outputs, self._evaluation.targets, self._params)
        return BatchOutputs(rule, outputs.detach(), self._evaluation.targets, self.index)

    def graph_root(self) -> Any:
        """Return the node of the loss in autograd's graph; None if the loss depends on no parameter."""
        return self._evaluation.loss.grad_fn

    # -- products -----------------------------------------------------------------------------------------------------

    @invisibly
    def hvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return H X for X (k, m), one vector a row; H is the batch's Hessian, or its diagonal block."""
        if self.weight == 0:  # nothing counts in this batch: its mean is 0 / 0
            return torch.zeros_like(X)
        self._verify("hvp")
        self._build("hvp", block)
        chosen = self._positions(block)
        if self._chain is not None and block is None:
            chain, M = self._chain, self._map(LOSS_HESSIAN)
            return self._products(X, lambda x: chain.hessian(x, M), chosen, HESSIAN)
        return self._products(X, lambda x: self._curve(chosen, x), chosen, HESSIAN)

    def _products(
        self, X: Tensor, product: Callable[[Tensor], Tensor], chosen: Sequence[int], which: object = None
    ) -> Tensor:
        """Return the product with each row of X; if it is said which matrix that is, it may be replayed."""
        run, device = product, self._space.device
        if which is not None and self._meter is not None and is_gpu(device) and not self._lean.saw_hooks:
            self._replays = self._replays or Replays(device, self._meter)
            run = functools.partial(self._replays.run, self._recorded_again, which, chosen, product)
        with self._backward_session(), no_autocast(self._space.device):
            rows = stacked(map(run, X.unbind()), len(X))
        if not all_finite(rows):
            self._refuse(rows, X, chosen, lambda: [product(x) for x in X.unbind()])
        return rows

    def _curve(self, chosen: Sequence[int], x: Tensor) -> Tensor:
        gradient, params = self._build_gradient(), [self._params[i] for i in chosen]
        g, v = differentiable([gradient[i] for i in chosen], self._unflatten(x, chosen))
        if not g:
            return torch.zeros_like(x)
        return self._flatten(list(_pull_back(g, params, v)), chosen)

    def curvature_gradient(self, v: Tensor) -> Tensor:
        """Return the gradient of v'H v in the parameters, (n,), v held fixed.

        Raises:
            InputError: if an operation of the model has no third derivative.
        """
        if self.weight == 0:
            return torch.zeros_like(v)
        parts, everywhere = self._unflatten(v, range(len(self._params))), range(len(self._params))
        try:
            slopes = self._build_gradient()
            with self._session(), no_autocast(self._space.device):
                for last in (False, True):  # g'v differentiated is H v, and v'H v what is asked for
                    along, directions = differentiable(slopes, parts)
                    if not along:
                        return torch.zeros_like(v)
                    refuse_undifferentiable(along, "third")
                    slopes = _pull_back(along, self._params, directions, create_graph=not last)
        except RuntimeError as error:
            raise InputError(f"the model holds an operation without a third derivative ({error})") from error
        result = self._flatten([part if isinstance(part, Tensor) else None for part in slopes])
        if not all_finite(result):
            self._refuse(result[None], v[None], everywhere)
        return result

    def ggnvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return G X for X (k, m), one vector a row; G = J' H_loss J of the batch, or its diagonal block."""
        return self.metric_product(X, LOSS_HESSIAN, block)

    @invisibly
    def metric_product(self, X: Tensor, metric: OutputMetric, block: Block | None = None) -> Tensor:
        """Return J'M J X for X (k, m), one vector a row, M a matrix on the outputs; or that of a diagonal block."""
        if self.weight == 0:
            return torch.zeros_like(X)
        self._verify("ggnvp")
        self._build(metric, block)
        chosen = self._positions(block)

        def product(x: Tensor) -> Tensor:
            M, Jx = self._map(metric), self._push(x, block)
            if all(part is None for part in Jx):
                return torch.zeros_like(x)
            return self._pull(M(Jx) if self.in_blocks else [M(Jx[0])], block)

        return self._products(X, product, chosen, metric)

    @property
    def num_outputs(self) -> int:
        """How many numbers the model returns for this batch."""
        self._leave_blocks()
        return self._outputs("Jacobian").numel()

    @invisibly
    def jvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return J X, (k, num_outputs), for X (k, m), one vector a row; columns outside the block are left out of J."""
        self._leave_blocks()
        self._verify("ggnvp")
        self._build_outputs(block)
        zero = X.new_zeros(self.num_outputs)

        def product(x: Tensor) -> Tensor:
            row = self._push(x, block)[0]
            return zero if row is None else row.reshape(-1).to(X.dtype)

        return self._products(X, product, ())

    @invisibly
    def vjp(self, U: Tensor, block: Block | None = None) -> Tensor:
        """Return J'U, (k, m), for U (k, num_outputs), one vector a row."""
        self._leave_blocks()
        self._verify("ggnvp")
        self._build_outputs(block)
        outputs = self._outputs("Jacobian")

        def product(u: Tensor) -> Tensor:
            return self._pull([u.reshape(outputs.shape)], block)

        return self._products(U, product, self._positions(block))

    def _push(self, x: Tensor, block: Block | None) -> Sequence[Tensor | None]:
        """Return J x in the shapes of the roots; None where they do not depend on the block."""
        if self._chain is not None and block is None:
            return [self._chain.push(x)]
        transposed, u = self._build_jacobian()
        chosen = self._positions(block)
        Jt, v = differentiable([transposed[i] for i in chosen], self._unflatten(x, chosen))
        return _pull_back(Jt, u, v) if Jt else [None] * len(u)

    def _pull(self, u: Sequence[Tensor | None], block: Block | None) -> Tensor:
        """Return J'u, (m,)."""
        if self._chain is not None and block is None:
            assert u[0] is not None
            return self._chain.pull(u[0])
        chosen = self._positions(block)
        params = [self._params[i] for i in chosen]
        roots = [(root, part.to(root.dtype)) for root, part in zip(self._roots, u, strict=True) if part is not None]
        outputs, vectors = differentiable(*zip(*roots, strict=True)) if roots else ([], [])
        if not outputs:
            return self._flatten([None] * len(params), chosen)
        return self._flatten(list(_pull_back(outputs, params, vectors)), chosen)

    @invisibly
    def prepare(self, product: Literal["hvp", "ggnvp"] | OutputMetric) -> None:
        """Build the graph of a product, which its first use would do."""
        if self.weight == 0:
            return
        self._verify("hvp" if product == "hvp" else "ggnvp")
        self._build(product)

    @property
    def _is_built(self) -> bool:
        return self._gradient is not None or self._jacobian is not None

    def _compared(self, product: Literal["hvp", "ggnvp"], v: Tensor) -> Tensor:
        """Products with J and J' are compared whatever the loss: its own Hessian may be zero and hide them."""
        if product == "hvp":
            return self.hvp(v)
        if not self.in_blocks:
            return self.vjp(self.jvp(v))
        self._build_jacobian()
        with self._backward_session(), no_autocast(self._space.device):
            return self._pull(self._push(v[0], None), None)[None]

    # -- graphs -------------------------------------------------------------------------------------------------------

    def _build(self, product: Literal["hvp", "ggnvp"] | OutputMetric, block: Block | None = None) -> None:
        """Build what products with a matrix, or a diagonal block of it, go by."""
        if product != "hvp":
            self._build_outputs(block)
            self._map(LOSS_HESSIAN if isinstance(product, str) else product)
        elif self._chain is None or block is not None:
            self._build_gradient()
        elif not self._chain.knows_loss:
            self._map(LOSS_HESSIAN)
            with self._session(), no_autocast(self._space.device), self._metered():
                self._chain.prepare(self._evaluation.loss)
            if not self._chain.is_finite:
                self.gradient()  # refuses it, with the parameter

    def _build_outputs(self, block: Block | None) -> None:
        """Build what products with J and J' go by."""
        if self._chain is None or block is not None:
            self._build_jacobian()
        elif not self._chain.prepared:
            self._outputs("Gauss-Newton matrix")
            with self._session(), no_autocast(self._space.device), self._metered():
                self._chain.prepare()

    def _build_gradient(self) -> Sequence[End | None]:
        if self._gradient is None:
            loss = self._evaluation.loss
            gradient: Sequence[End | None] = (None,) * len(self._params)
            if loss.requires_grad:
                refuse_undifferentiable([loss])
                with self._session(), no_autocast(self._space.device), self._metered():
                    parts = _pull_back([loss], self._params, create_graph=True)
                    self._check_finite(parts)
                    gradient, parts = self._ends(parts), ()  # before what is held is counted
            self._gradient = gradient
        return self._gradient

    def _build_jacobian(self) -> tuple[Sequence[End | None], list[Tensor]]:
        """Return J'u, a part for each parameter, and u; J is that of the outputs, or of what a head in blocks takes."""
        if self._jacobian is None:
            outputs = self._outputs("Gauss-Newton matrix")
            refuse_undifferentiable([outputs])
            with self._session(), no_autocast(self._space.device), self._metered():
                self._roots = outputs.roots if isinstance(outputs, LazyLogits) else [outputs]
                u = [torch.zeros_like(root, requires_grad=True) for root in self._roots]
                transposed: Sequence[End | None] = (None,) * len(self._params)
                if any(root.requires_grad for root in self._roots):
                    transposed = self._ends(_pull_back(self._roots, self._params, u, create_graph=True))
            self._jacobian = (transposed, u)
        return self._jacobian

    def _map(self, metric: OutputMetric) -> Callable[[Any], Any]:
        """Return u -> M u on the outputs, or on the roots of logits in blocks."""
        if self.in_blocks:
            self._build_jacobian()
        if metric not in self._output_maps:
            plain = self._evaluator.session(self._buffers, LeanLayers(corrections_only=True))
            with plain, no_autocast(self._space.device), self._metered():
                try:
                    self._output_maps[metric] = metric.at(self._batch_outputs())
                except NotInBlocksError:
                    self._leave_blocks()
            return self._map(metric)
        return self._output_maps[metric]

    def _outputs(self, what: str) -> Tensor:
        outputs = self._evaluation.outputs
        if self._evaluator.rule is None:
            raise InputError(
                f"the {what} needs the split between model and loss: pass loss= and a forward that returns "
                "(outputs, targets), instead of loss=None."
            )
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"the {what} needs outputs that are one tensor, got {type(outputs).__name__}; "
                "pass forward= that picks it, e.g. lambda model, batch: (model(batch[0]).logits, batch[1])."
            )
        return outputs
