"""Examples of a batch: how many there are, and the model on some of them.

An example is what one place along the first dimension of the inputs makes of the model's outputs and of the targets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from curvature.autograd.backward import pull_back
from curvature.autograd.lazy_logits import LazyLogits
from curvature.autograd.lean import LeanLayers
from curvature.data.parts import num_examples, sparse_rows
from curvature.data.tensors import map_tensors, tensors_in
from curvature.engine.evaluation import Evaluator, _seeded
from curvature.engine.stand_ins import StandIns
from curvature.environment.device import ATTENTION_KERNELS
from curvature.environment.lock import one_at_a_time
from curvature.errors import CurvatureError, DataError
from curvature.per_example.capture import Capture
from curvature.per_example.layout import Examples, Layout

__all__ = ["cut", "inputs_of", "layouts_of_uses", "leading_size", "outputs_of", "seeded", "session"]


def leading_size(evaluator: Evaluator, batch: Any) -> int:
    """Return the number of examples of a batch: the length of the first dimension of its first tensor.

    Raises:
        DataError: if it holds no tensor with a dimension.
    """
    count = num_examples(inputs := inputs_of(evaluator, batch))
    if not count and not any(t.ndim for t in tensors_in(inputs)):
        raise DataError(
            "per-example gradients need batches whose tensors hold the examples along their first dimension; got none."
        )
    return count


def inputs_of(evaluator: Evaluator, batch: Any) -> Any:
    """Return what outputs are made from: the first of a pair, or all that a custom forward takes."""
    return batch[0] if evaluator.forward is None else batch


def seeded(evaluator: Evaluator, index: int) -> AbstractContextManager[Any]:
    """Put torch's generators into the state that batch `index` is evaluated under."""
    return _seeded(evaluator.seed + index, evaluator.parameters[0].device)


@contextlib.contextmanager
def session(evaluator: Evaluator, buffers: StandIns) -> Iterator[LeanLayers]:
    """Evaluate and differentiate once, leaving no trace; yields what records the layers.

    First derivatives need no detour around fused attention; in train mode it stays, since kernels draw other masks.
    """
    with one_at_a_time:
        trains = any(module.training for module in evaluator.model.modules())
        fused = not trains and any(is_on() for is_on, _ in ATTENTION_KERNELS.values())
        lean = evaluator.corrected_layers()
        with evaluator.session(buffers, lean, fused_attention=fused):
            yield lean


def cut(evaluator: Evaluator, batch: Any, rows: Tensor, num_examples: int) -> Any:
    """Return the batch with only some of its examples; where the batch is a pair, its inputs only."""

    def part(t: Tensor) -> Tensor:
        if t.ndim == 0 or t.shape[0] != num_examples:
            return t
        return t[rows] if t.layout is torch.strided else sparse_rows(t, rows)

    return map_tensors(inputs_of(evaluator, batch), part)


def outputs_of(evaluator: Evaluator, part: Any) -> Tensor:
    """Return the model's outputs on what `cut` returned, inside a session."""
    returned = evaluator.model(part) if evaluator.forward is None else evaluator.forward(evaluator.model, part)[0]
    assert isinstance(returned, Tensor)
    return returned


def layouts_of_uses(
    evaluator: Evaluator, batch: Any, index: int, num_examples: int, *, in_blocks: bool = False
) -> tuple[tuple[Any, tuple[Layout | None, ...]], bool]:
    """Find where the examples lie in the output of every use of a parameter, on two examples of a batch.

    A vector in the outputs of one example is pulled back: in the right layout it reaches no row of the other. With
    `in_blocks` it is one in what goes into a head that works in blocks.

    Returns:
        The structure of the uses that were seen, and the layout of each, None where rows mix examples; and whether each
        was reached by something else than zeros, as it is not behind a layer whose weights are zero.

    Raises:
        DataError: if the model does not run on two examples alone.
    """
    device = evaluator.parameters[0].device
    two = cut(evaluator, batch, torch.tensor([0, num_examples - 1], device=device), num_examples)
    capture = Capture(evaluator.parameters)
    generator = torch.Generator().manual_seed(0)
    with session(evaluator, evaluator.copy_buffers()):
        try:
            blocks = evaluator.head_in_blocks(least=0) if in_blocks else None
            with seeded(evaluator, index), capture, blocks or contextlib.nullcontext():
                outputs = outputs_of(evaluator, two)
                outputs = outputs.h if isinstance(outputs, LazyLogits) else outputs
        except CurvatureError:
            raise
        except Exception as error:
            raise DataError(
                f"the model runs on batch {index} but not on two of its {num_examples} examples: {error}. Examples "
                "must lie along the first dimension of all inputs; pass forward= that arranges them so."
            ) from error
        if outputs.ndim == 0 or outputs.shape[0] % 2:
            return (capture.structure, (None,) * len(capture.uses)), True
        found = []
        for place in (0, 1) if outputs.requires_grad and capture.uses else ():
            vector = torch.zeros(outputs.shape, dtype=outputs.dtype, device=device)
            own = vector.view(2, -1)[place]
            own.copy_(torch.randn(own.shape, generator=generator))
            found.append(pull_back([outputs], [use.edge for use in capture.uses], [vector]))
    layouts, shown = [], True
    for i, use in enumerate(capture.uses):
        mine = [deltas[i] for deltas in found]
        rows = [None if delta is None else delta.detach().reshape(use.shape) for delta in mine]
        spared = (
            layout for layout in Layout if all(_spares(r, layout, other=1 - place) for place, r in enumerate(rows))
        )
        layouts.append(next(spared, None))
        shown = shown and all(r is None or bool(r.any()) for r in rows)
    return (capture.structure, tuple(layouts)), shown


def _spares(delta: Tensor | None, layout: Layout, other: int) -> bool:
    """Return whether the rows of one of two examples are zero."""
    if delta is None:
        return True
    arranged = Examples(2, layout).arranged(delta)
    return arranged is not None and not bool(arranged[other].count_nonzero())
