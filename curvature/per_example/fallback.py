"""Per-example gradients of parameters no rule is known for: one pull-back for each example.

The outputs of example i depend on its inputs alone; with u_i the gradient of the batch's loss in them, the example's
part of that loss has the gradient J_i' u_i. `torch.func.vmap` computes several examples at a time; where a model does
not go through it, examples are taken one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from curvature.autograd.backward import joined, pull_back
from curvature.autograd.functional import call_with
from curvature.data.tensors import map_tensors, tensors_in
from curvature.engine.evaluation import Evaluator
from curvature.errors import DataError
from curvature.per_example.cutting import cut, inputs_of, outputs_of, seeded, session
from curvature.per_example.forms import Direct, Form
from curvature.per_example.probe import Probe

__all__ = ["OneByOne"]


class OneByOne(Form):
    """Gradients that are computed anew whenever they are asked for, `per_call` examples at a time.

    Args:
        evaluator: of the objective.
        batch: the batch, all of it.
        index: its place in the data.
        vectors: u, gradient of the loss in the batch's outputs, of their shape.
        num_examples: N.
        positions: which of the evaluator's parameters.
        dtype: of the results.
        loop: take examples one by one from the start.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        batch: Any,
        index: int,
        vectors: Tensor,
        num_examples: int,
        positions: Sequence[int],
        dtype: torch.dtype,
        *,
        loop: bool,
    ) -> None:
        self._evaluator, self._batch, self._index = evaluator, batch, index
        self._by_example, self._dtype = vectors.reshape(num_examples, -1, *vectors.shape[1:]), dtype
        self.positions = tuple(positions)
        self.num_examples = num_examples
        self._params = [evaluator.parameters[i] for i in positions]
        self.numels = tuple(p.numel() for p in self._params)
        self._names = _names(evaluator, self._params)
        self._loop = loop or self._names is None
        self.route = "loop" if self._loop else "vmap"
        self.reason = "" if self._names is not None or loop else "a parameter is no part of the model"

    def held(self, chunk_bytes: int) -> Form:
        """Return the same, held in memory if that takes no more than `chunk_bytes`; else self."""
        if 8 * self.num_examples * self.numel > chunk_bytes:
            return self
        values = self.dense(0, self.num_examples)
        return Direct(values, self.numels, self.route)

    def dense(self, start: int, stop: int) -> Tensor:
        rows = torch.arange(start, stop, device=self._by_example.device)
        with session(self._evaluator, self._evaluator.copy_buffers()), seeded(self._evaluator, self._index):
            if not self._loop:
                try:
                    return self._vmapped(rows)
                except Exception as error:
                    self._loop, self.route = True, "loop"
                    self.reason = f"vmap: {type(error).__name__}: {' '.join(str(error).split())}"[:200]
            return torch.stack([self._single(i) for i in range(start, stop)])

    def _vmapped(self, rows: Tensor) -> Tensor:
        assert self._names is not None
        whole, names = _Outputs(self._evaluator), self._names
        inputs = inputs_of(self._evaluator, self._batch)
        leaves = [t for t in tensors_in(inputs) if self._is_of_examples(t)]

        def value(params: list[Tensor], vector: Tensor, *parts: Tensor) -> Tensor:
            remaining = iter(parts)
            one = map_tensors(inputs, lambda t: next(remaining)[None] if self._is_of_examples(t) else t)
            outputs = call_with(whole, dict(zip(names, params, strict=True)), one)
            self._check_shape(outputs, vector)
            return (outputs * vector).sum()

        with torch.no_grad():  # leaves of the graph outside, which `grad` does not see, would record
            gradients = vmap(grad(value), in_dims=(None, *[0] * (1 + len(leaves))), randomness="different")(
                [p.detach() for p in self._params], self._by_example[rows], *(leaf[rows] for leaf in leaves)
            )
        return torch.cat([g.reshape(len(rows), -1).to(self._dtype) for g in gradients], dim=1)

    def _single(self, place: int) -> Tensor:
        rows = torch.tensor([place], device=self._by_example.device)
        outputs = outputs_of(self._evaluator, cut(self._evaluator, self._batch, rows, self.num_examples))
        self._check_shape(outputs, self._by_example[place])
        gradients: Sequence[Tensor | None] = [None] * len(self._params)
        if outputs.requires_grad:
            gradients = pull_back([outputs], self._params, [self._by_example[place]])
        return joined(gradients, self._params, self._dtype)

    def project(self, probe: Probe) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("sums are compared entry by entry")

    def _is_of_examples(self, t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == self.num_examples

    def _check_shape(self, outputs: Tensor, vector: Tensor) -> None:
        if outputs.shape != vector.shape:
            raise DataError(
                f"the outputs of one example have shape {tuple(outputs.shape)}, their part of the whole batch's has "
                f"{tuple(vector.shape)}; examples must lie along the first dimension of inputs and outputs."
            )


class _Outputs(nn.Module):
    """The model with its forward, as a module whose parameters can be replaced."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__()
        self.model = evaluator.model
        self._evaluator = evaluator

    def forward(self, part: Any) -> Tensor:
        return outputs_of(self._evaluator, part)


def _names(evaluator: Evaluator, params: Sequence[Tensor]) -> list[str] | None:
    """Return the parameters' names in `_Outputs`, or None if one is not the model's."""
    known = {id(p): f"model.{name}" for name, p in evaluator.model.named_parameters()}
    return [known[id(p)] for p in params] if all(id(p) in known for p in params) else None
