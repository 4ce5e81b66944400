"""Squares of pulled-back columns by autograd alone: what serves every model BackPACK has no rules for.

Four orders of the same sum, each exact:

- "per-example": torch.func pulls the V columns of each example back through that example alone, a chunk of examples at
  a time. About V gradients of the data; needs outputs that depend on their own example only.
- "one-by-one": the same with a graph an example, for models that vmap does not take (recurrent cells, checkpointing).
- "columns": each column of each example is pulled back through the graph of the whole batch. N V gradients of a batch;
  right also where examples meet (batch normalisation in train mode) or share a draw of random numbers (dropout).
- "products": the product with each unit vector, of which one entry is kept. n products; cheapest for few parameters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvature.autograd.backward import no_autocast, pull_back
from curvature.autograd.functional import call_with
from curvature.data.tensors import map_tensors, tensors_in
from curvature.engine.linearize import Linearization
from curvature.layerwise.support import UnsupportedError
from curvature.objective.objective import Objective

__all__ = ["by_columns", "by_products", "check_separable", "one_by_one", "per_example", "same_outputs"]


class _Fed(nn.Module):
    """The model as it is fed: a batch in, outputs out, so that its parameters can be swapped functionally."""

    def __init__(self, objective: Objective) -> None:
        super().__init__()
        self.model = objective.model
        self._forward = objective._evaluator.forward

    def forward(self, batch: Any) -> Any:
        if self._forward is None:
            return self.model(batch[0])
        return self._forward(self.model, batch)[0]


def per_example(
    objective: Objective, lin: Linearization, blocks: Iterator[tuple[Tensor, float]], budget: int
) -> Tensor:
    """Return sum_n sum_v s_v (J_n' r_vn)^2, (n,), for one batch, through each example alone.

    Raises:
        UnsupportedError: if the model cannot run on single examples under vmap, or computes other outputs there.
    """
    space, batch = objective.space, lin._batch
    outputs, _ = lin.outputs_and_targets()
    num_examples = _separable(objective, lin)
    fed = _Fed(objective)
    params = {f"model.{name}": t.detach() for name, t in space.tensors.items()}

    def is_cut(t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == num_examples

    in_dims = map_tensors(batch, lambda t: 0 if is_cut(t) else None)  # type: ignore[arg-type,return-value]

    def output(p: dict[str, Tensor], example: Any) -> Tensor:
        lifted = _lift(example, in_dims)
        return call_with(fed, p, lifted)[0]

    def squares(example: Any, columns: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        out, pull = torch.func.vjp(lambda p: output(p, example), params)  # type: ignore[misc]
        with no_autocast(space.device):
            rows = torch.func.vmap(lambda s: pull(s)[0])(columns)
        return {name: row.square().sum(0) for name, row in rows.items()}, out

    total = torch.zeros(space.num_params, dtype=space.dtype, device=space.device)
    evaluator = objective._evaluator
    with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # vmap warns of operations that it loops over
        for columns, sign in blocks:
            columns = columns.to(outputs.dtype)
            held = outputs.element_size() * len(columns) * (2 * space.num_params + 4 * outputs[0].numel())
            width = max(1, min(num_examples, budget // max(held, 1)))
            for start in range(0, num_examples, width):
                stop = min(start + width, num_examples)
                piece = _examples(batch, start, stop, num_examples)
                try:
                    parts, alone = torch.func.vmap(squares, in_dims=(in_dims, 1))(piece, columns[:, start:stop])
                except Exception as error:
                    first = str(error).strip().split("\n")[0]
                    raise UnsupportedError(
                        f"the model does not run under torch.func.vmap ({type(error).__name__}: {first})"
                    ) from error
                same_outputs(alone.detach(), outputs[start:stop])
                flat = [parts[f"model.{name}"].sum(0).reshape(-1).to(space.dtype) for name in space.names]
                total += sign * torch.cat(flat)
    return total


def one_by_one(objective: Objective, lin: Linearization, blocks: Iterator[tuple[Tensor, float]]) -> Tensor:
    """Return the same with a graph for each example.

    Raises:
        UnsupportedError: if the model computes other outputs on single examples.
    """
    space, batch = objective.space, lin._batch
    outputs, _ = lin.outputs_and_targets()
    num_examples = _separable(objective, lin)
    fed, evaluator, params = _Fed(objective), objective._evaluator, list(space.tensors.values())
    total = torch.zeros(space.num_params, dtype=space.dtype, device=space.device)
    for columns, sign in blocks:
        for n in range(num_examples):
            with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()):
                try:
                    alone = fed(_examples(batch, n, n + 1, num_examples))
                except (RuntimeError, ValueError, TypeError, IndexError) as error:
                    first = str(error).strip().split("\n")[0]
                    raise UnsupportedError(f"the model does not run on one example ({first})") from error
                same_outputs(alone.detach(), outputs[n : n + 1])
                if not alone.requires_grad:
                    continue
                with no_autocast(space.device):
                    for column in columns[:, n : n + 1].to(alone.dtype):
                        total += sign * lin._flatten(pull_back([alone], params, [column])).square()
    return total


def by_columns(
    objective: Objective,
    lin: Linearization,
    blocks: Iterator[tuple[Tensor, float]],
    examples: Sequence[int] | None = None,
) -> Tensor:
    """Return the same through the graph of the whole batch, one column of one example at a time; of some examples."""
    space = objective.space
    outputs = lin._evaluation.outputs
    assert isinstance(outputs, Tensor)
    total = torch.zeros(space.num_params, dtype=space.dtype, device=space.device)
    if not outputs.requires_grad:
        return total
    params = list(space.tensors.values())
    with lin._session(), no_autocast(space.device):
        for columns, sign in blocks:
            for column in columns.to(outputs.dtype):
                rows = column.reshape(outputs.shape[0] if outputs.ndim else 1, -1)
                for n in range(len(rows)) if examples is None else examples:
                    single = torch.zeros_like(rows)
                    single[n] = rows[n]
                    parts = pull_back([outputs], params, [single.reshape(outputs.shape)])
                    total += sign * lin._flatten(parts).square()
    return total


def by_products(objective: Objective, lin: Linearization, product: Literal["hvp", "ggnvp"], budget: int) -> Tensor:
    """Return the diagonal of a batch's Hessian or Gauss-Newton matrix from its products with all unit vectors.

    They are taken a tensor at a time, restricted to that tensor: what a product with a block costs is less.
    """
    space = objective.space
    parts = []
    for name, size in zip(space.names, space.numels, strict=True):
        if size == 0:
            continue
        block = space.block({name: space.tensors[name]})
        width = max(1, min(size, budget // (4 * size * torch.finfo(space.dtype).bits // 8)))
        for start in range(0, size, width):
            k = min(width, size - start)
            X = torch.zeros(k, size, dtype=space.dtype, device=space.device)
            X[torch.arange(k), start + torch.arange(k)] = 1
            rows = getattr(lin, product)(X, block)
            parts.append(rows[torch.arange(k), start + torch.arange(k)])
    return torch.cat(parts)


def check_separable(objective: Objective, lin: Linearization) -> None:
    """Make sure, on one example of a batch, that outputs depend on their own example only.

    Raises:
        UnsupportedError: if they do not, or the model does not run on one example.
    """
    num_examples = _separable(objective, lin)
    outputs, _ = lin.outputs_and_targets()
    evaluator = objective._evaluator
    with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()), torch.no_grad():
        try:
            alone = _Fed(objective)(_examples(lin._batch, 0, 1, num_examples))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            first = str(error).strip().split("\n")[0]
            raise UnsupportedError(f"the model does not run on one example ({first})") from error
    same_outputs(alone, outputs[:1])


def _separable(objective: Objective, lin: Linearization) -> int:
    """Return the number of examples of a batch that can be cut into them.

    Raises:
        UnsupportedError: with the reason why it cannot.
    """
    outputs, _ = lin.outputs_and_targets()
    if lin.drew_random_numbers:
        raise UnsupportedError("the model draws random numbers, which belong to the whole batch")
    num_examples = outputs.shape[0] if outputs.ndim else 0
    if num_examples == 0 or not any(t.ndim > 0 and t.shape[0] == num_examples for t in tensors_in(lin._batch)):
        raise UnsupportedError("outputs and batch do not share a first dimension that counts examples")
    for module in objective.model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and (module.training or not module.track_running_stats):
            raise UnsupportedError("batch normalisation couples the examples of a batch")
    return num_examples


def _examples(batch: Any, start: int, stop: int, num_examples: int) -> Any:
    """Cut the tensors of a batch that have one entry an example."""
    return map_tensors(batch, lambda t: t[start:stop] if t.ndim > 0 and t.shape[0] == num_examples else t)


def _lift(example: Any, in_dims: Any) -> Any:
    """Give the tensors that were cut into examples their first dimension back."""
    if isinstance(example, Tensor):
        return example if in_dims is None else example[None]
    if isinstance(example, dict):
        return type(example)({key: _lift(value, in_dims[key]) for key, value in example.items()})
    if isinstance(example, (list, tuple)):
        lifted = [_lift(value, dim) for value, dim in zip(example, in_dims, strict=True)]
        return type(example)(*lifted) if hasattr(example, "_fields") else type(example)(lifted)
    return example


def same_outputs(found: Tensor, expected: Tensor) -> None:
    """Refuse a route on which the model computes something else than on the whole batch."""
    eps = torch.finfo(expected.dtype).eps
    if found.shape != expected.shape or bool((found - expected).norm() > 100 * eps**0.75 * expected.norm()):
        raise UnsupportedError("the outputs differ from those of the whole batch: examples meet, or hooks act")
