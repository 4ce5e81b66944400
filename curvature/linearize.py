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
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from curvature.backward import differentiable, no_autocast, walk
from curvature.backward import pull_back as _pull_back
from curvature.errors import CheckFailedError, InputError, NonFiniteError
from curvature.evaluation import Evaluator
from curvature.lean import LeanLayers
from curvature.losses import OutputMap
from curvature.memory import HeldMemory
from curvature.output_metrics import BatchOutputs, LossHessian, OutputMetric
from curvature.parameters import Block, ParameterSpace

__all__ = ["LeanTrust", "Linearization", "walk"]

LOSS_HESSIAN = LossHessian()


class LeanTrust:
    """Whether lean layers may be used on a model: each product is first compared with autograd's own.

    Attributes:
        revoked: True once a comparison failed; from then on layers are recorded as autograd has them.
        differences: product -> relative difference found, for the products compared so far.
    """

    def __init__(self) -> None:
        self.revoked = False
        self.differences: dict[str, float] = {}

    def compare(self, product: str, lean: Tensor, reference: Tensor, eps: float) -> None:
        """Note the difference of two products with one vector; revoke the trust if it is beyond rounding."""
        difference = float((lean - reference).norm() / reference.norm().clamp_min(torch.finfo(reference.dtype).tiny))
        self.differences[product] = difference
        self.revoked = not difference <= max(1e-5, 10 * eps**0.5)  # also on NaN


class Linearization:
    """The loss of one batch at the present parameters, ready for products.

    Args:
        evaluator: how the model is evaluated.
        space: the chosen parameters.
        batch: the batch, on the device of the parameters.
        index: its place in the data, which fixes its random numbers.
        trust: allows lean layers, after a comparison with autograd; None records layers as autograd has them.
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
        meter: HeldMemory | None = None,
    ) -> None:
        self._evaluator = evaluator
        self._space = space
        self._params = list(space.tensors.values())
        self._gradient: Sequence[Tensor | None] | None = None
        self._jacobian: tuple[Sequence[Tensor | None], Tensor] | None = None
        self._output_maps: WeakKeyDictionary[OutputMetric, OutputMap] = WeakKeyDictionary()
        self._meter = meter
        self._trust = None if trust is None or trust.revoked else trust
        self._lean = LeanLayers(corrections_only=self._trust is None)
        self._batch = batch
        self.index = index
        with self._metered():
            self._buffers = evaluator.copy_buffers()
            with self._session():
                self._evaluation = evaluator.evaluate(batch, index)
        self.weight = self._evaluation.weight
        self.loss = self._evaluation.loss.detach()
        self.drew_random_numbers = self._evaluation.drew_random_numbers

    # -- gradient -----------------------------------------------------------------------------------------------------

    def gradient(self) -> Tensor:
        """Return the gradient of the batch's loss, (n,)."""
        if self._gradient is not None:
            return self._flatten([None if g is None else g.detach() for g in self._gradient])
        if not self._evaluation.loss.requires_grad:
            return self._flatten([None] * len(self._params))
        with self._session(), no_autocast(self._space.device):
            parts = _pull_back([self._evaluation.loss], self._params)
        return self._flatten(parts)

    def used_parameters(self) -> tuple[bool, ...] | None:
        """Say for each parameter whether this batch depends on it; None before a graph was built."""
        if self._gradient is not None:
            return tuple(g is not None for g in self._gradient)
        if self._jacobian is not None:
            return tuple(j is not None for j in self._jacobian[0])
        return None

    def outputs_and_targets(self) -> tuple[Tensor, Any]:
        """Return the model's outputs on this batch, detached, and the targets.

        Raises:
            InputError: if forward returned something else than one tensor of outputs.
        """
        outputs = self._evaluation.outputs
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"the outputs must be one tensor, got {type(outputs).__name__}; pass forward= that picks it."
            )
        return outputs.detach(), self._evaluation.targets

    def batch_outputs(self) -> BatchOutputs:
        """Return the model's outputs on this batch, detached, beside the loss and the targets it compares them with."""
        outputs, rule = self._outputs("matrix"), self._evaluator.rule
        assert rule is not None
        return BatchOutputs(rule, outputs.detach(), self._evaluation.targets, self.index)

    def graph_root(self) -> Any:
        """Return the node of the loss in autograd's graph; None if the loss depends on no parameter."""
        return self._evaluation.loss.grad_fn

    # -- products -----------------------------------------------------------------------------------------------------

    def hvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return H X for X (k, m), one vector a row; H is the batch's Hessian, or its diagonal block."""
        if self.weight == 0:  # nothing counts in this batch: its mean is 0 / 0
            return torch.zeros_like(X)
        self._verify("hvp")
        gradient = self._build_gradient()
        chosen = self._positions(block)
        params = [self._params[i] for i in chosen]
        with self._backward_session(), no_autocast(self._space.device):
            rows = [self._curve(gradient, chosen, params, x) for x in X.unbind()]
        return _stack(rows)

    def _curve(
        self, gradient: Sequence[Tensor | None], chosen: Sequence[int], params: list[Tensor], x: Tensor
    ) -> Tensor:
        g, v = differentiable([gradient[i] for i in chosen], self._unflatten(x, chosen))
        if not g:
            return torch.zeros_like(x)
        return self._flatten(_pull_back(g, params, v), chosen)

    def curvature_gradient(self, v: Tensor) -> Tensor:
        """Return the gradient of v'H v in the parameters, (n,), v held fixed.

        Raises:
            InputError: if an operation of the model has no third derivative.
        """
        if self.weight == 0:
            return torch.zeros_like(v)
        slopes: Sequence[Tensor | None] = self._build_gradient()
        parts = self._unflatten(v, range(len(self._params)))
        with self._session(), no_autocast(self._space.device):
            for last in (False, True):  # g'v differentiated is H v, and v'H v what is asked for
                along, directions = differentiable(slopes, parts)
                if not along:
                    return torch.zeros_like(v)
                if last and _refusals(along):
                    raise InputError(
                        "the model holds an operation without a third derivative (its double backward is marked "
                        "once_differentiable); write that in differentiable operations."
                    )
                inner = torch.stack([(a * d).sum() for a, d in zip(along, directions, strict=True)]).sum()
                try:
                    slopes = _pull_back([inner], self._params, create_graph=not last)
                except RuntimeError as error:
                    raise InputError(f"the model holds an operation without a third derivative ({error}).") from error
        return self._flatten(slopes)

    def ggnvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return G X for X (k, m), one vector a row; G = J' H_loss J of the batch, or its diagonal block."""
        return self.metric_product(X, LOSS_HESSIAN, block)

    def metric_product(self, X: Tensor, metric: OutputMetric, block: Block | None = None) -> Tensor:
        """Return J'M J X for X (k, m), one vector a row, M a matrix on the outputs; or that of a diagonal block."""
        if self.weight == 0:
            return torch.zeros_like(X)
        self._verify("ggnvp")
        M = self._map(metric)
        dtype = self._outputs("Gauss-Newton matrix").dtype
        rows = []
        with self._backward_session(), no_autocast(self._space.device):
            for x in X.unbind():
                Jx = self._push(x, block)
                rows.append(torch.zeros_like(x) if Jx is None else self._pull(M(Jx).to(dtype), block))
        return _stack(rows)

    @property
    def num_outputs(self) -> int:
        """How many numbers the model returns for this batch."""
        return self._outputs("Jacobian").numel()

    def jvp(self, X: Tensor, block: Block | None = None) -> Tensor:
        """Return J X, (k, num_outputs), for X (k, m), one vector a row; columns outside the block are left out of J."""
        self._verify("ggnvp")
        self._build_jacobian()
        with self._backward_session(), no_autocast(self._space.device):
            rows = [self._push(x, block) for x in X.unbind()]
        zero = X.new_zeros(self.num_outputs)
        return _stack([zero if row is None else row.reshape(-1).to(X.dtype) for row in rows])

    def vjp(self, U: Tensor, block: Block | None = None) -> Tensor:
        """Return J'U, (k, m), for U (k, num_outputs), one vector a row."""
        self._verify("ggnvp")
        self._build_jacobian()
        outputs = self._outputs("Jacobian")
        with self._backward_session(), no_autocast(self._space.device):
            return _stack([self._pull(u.reshape(outputs.shape).to(outputs.dtype), block) for u in U.unbind()])

    def _push(self, x: Tensor, block: Block | None) -> Tensor | None:
        """Return J x in the shape of the outputs; None where they do not depend on the block."""
        transposed, u = self._build_jacobian()
        chosen = self._positions(block)
        Jt, v = differentiable([transposed[i] for i in chosen], self._unflatten(x, chosen))
        return _pull_back(Jt, [u], v)[0] if Jt else None

    def _pull(self, u: Tensor, block: Block | None) -> Tensor:
        """Return J'u, (m,)."""
        outputs, chosen = self._outputs("Jacobian"), self._positions(block)
        params = [self._params[i] for i in chosen]
        if not outputs.requires_grad:
            return self._flatten([None] * len(params), chosen)
        return self._flatten(_pull_back([outputs], params, [u]), chosen)

    def prepare(self, product: Literal["hvp", "ggnvp"] | OutputMetric) -> None:
        """Build the graph of a product, which its first use would do."""
        if self.weight == 0:
            return
        self._verify("hvp" if product == "hvp" else "ggnvp")
        if product == "hvp":
            self._build_gradient()
        else:
            self._map(LOSS_HESSIAN if isinstance(product, str) else product)

    # -- lean layers --------------------------------------------------------------------------------------------------

    @property
    def num_lean_layers(self) -> int:
        """How many layers were recorded in their lean form."""
        return self._lean.num_replaced

    def _verify(self, product: Literal["hvp", "ggnvp"]) -> None:
        """Before lean layers first serve for a product on this model, compare it with autograd's own on this batch."""
        if self._trust is None or self.num_lean_layers == 0 or product in self._trust.differences:
            return
        trust, self._trust = self._trust, None
        meter = None if self._meter is None else HeldMemory()
        reference = Linearization(self._evaluator, self._space, self._batch, self.index, meter=meter)
        eps = max(torch.finfo(p.dtype).eps for p in self._params)
        generator = torch.Generator().manual_seed(0)
        v = torch.randn(1, self._space.num_params, generator=generator).to(self._space.device, self._space.dtype)
        trust.compare(product, self._compared(product, v), reference._compared(product, v), eps)
        if trust.revoked:
            self._adopt(reference)
        else:
            self._trust = trust

    def _compared(self, product: Literal["hvp", "ggnvp"], v: Tensor) -> Tensor:
        """Products with J and J' are compared whatever the loss: its own Hessian may be zero and hide them."""
        return self.hvp(v) if product == "hvp" else self.vjp(self.jvp(v))

    def _adopt(self, reference: Linearization) -> None:
        self._lean, self._buffers, self._evaluation = reference._lean, reference._buffers, reference._evaluation
        self._gradient, self._jacobian = reference._gradient, reference._jacobian
        self._output_maps = reference._output_maps
        if self._meter is not None and reference._meter is not None:
            self._meter.take_over(reference._meter)

    # -- graphs -------------------------------------------------------------------------------------------------------

    def _build_gradient(self) -> Sequence[Tensor | None]:
        if self._gradient is None:
            loss = self._evaluation.loss
            if not loss.requires_grad:
                self._gradient = (None,) * len(self._params)
                return self._gradient
            with self._session(), no_autocast(self._space.device), self._metered():
                self._gradient = _pull_back([loss], self._params, create_graph=True)
            self._check_finite(self._gradient)
            self._check_twice_differentiable(self._gradient, "hvp")
        return self._gradient

    def _build_jacobian(self) -> tuple[Sequence[Tensor | None], Tensor]:
        if self._jacobian is None:
            outputs = self._outputs("Gauss-Newton matrix")
            with self._session(), no_autocast(self._space.device), self._metered():
                u = torch.zeros_like(outputs, requires_grad=True)
                transposed: Sequence[Tensor | None] = (None,) * len(self._params)
                if outputs.requires_grad:
                    transposed = _pull_back([outputs], self._params, [u], create_graph=True)
            self._check_twice_differentiable(transposed, "ggnvp")
            self._jacobian = (transposed, u)
        return self._jacobian

    def _map(self, metric: OutputMetric) -> OutputMap:
        """Return u -> M u on this batch's outputs, with the Jacobian's graph built."""
        self._build_jacobian()
        if metric not in self._output_maps:
            with self._session(), no_autocast(self._space.device), self._metered():
                self._output_maps[metric] = metric.at(self.batch_outputs())
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

    def _backward_session(self) -> AbstractContextManager[None]:
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
        parts = x.split([p.numel() for p in params])
        return [part.view(p.shape).to(p.dtype) for part, p in zip(parts, params, strict=True)]

    def _flatten(self, parts: Sequence[Tensor | None], chosen: Sequence[int] | None = None) -> Tensor:
        params = self._params if chosen is None else [self._params[i] for i in chosen]
        dtype = self._space.dtype
        flat = [
            torch.zeros(p.numel(), dtype=dtype, device=p.device) if part is None else part.reshape(-1).to(dtype)
            for part, p in zip(parts, params, strict=True)
        ]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def _check_twice_differentiable(self, first: Sequence[Tensor | None], product: str) -> None:
        """Refuse functions marked `once_differentiable`: autograd passes over them where no parameter lies behind."""
        if product in self._evaluator.graphs_seen:
            return
        self._evaluator.graphs_seen.add(product)
        if _refusals([t for t in first if t is not None]):
            custom = {type(n).__name__ for n in walk([self.graph_root()]) if isinstance(n, BackwardCFunction)}
            names = ", ".join(sorted(custom))
            raise CheckFailedError(
                f"the model holds a function whose backward is marked once_differentiable ({names}): "
                "products differentiate it again. Write its backward in differentiable operations and drop the mark."
            )

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


def _refusals(tensors: Sequence[Tensor]) -> bool:
    """Say whether a graph holds what a function marked `once_differentiable` leaves; autograd passes over it."""
    return any("Error" in node.name() for node in walk([t.grad_fn for t in tensors]))


def _stack(rows: list[Tensor]) -> Tensor:
    return rows[0][None] if len(rows) == 1 else torch.stack(rows)  # one row is not copied
