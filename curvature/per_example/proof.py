"""Proof, on every example of a batch, that rows of the outputs of layers belong to the examples they are taken for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvature.autograd.backward import pull_back
from curvature.engine.evaluation import Evaluation
from curvature.per_example.capture import Capture, Use
from curvature.per_example.layout import Layout
from curvature.per_example.row_order import follows

__all__ = ["Run", "with_proof"]


@dataclass(frozen=True)
class Run:
    """One batch, evaluated."""

    batch: Any
    index: int
    num_examples: int
    evaluation: Evaluation
    uses: list[Use]
    layouts: tuple[Layout | None, ...]


def with_proof(
    run: Run,
    capture: Capture,
    vectors: Tensor,
    deltas: Sequence[Tensor | None],
    generator: torch.Generator,
    proved: set[Any],
) -> Run:
    """Keep the layouts that hold for every example: tested once a structure, or each time if the model moves rows.

    The part of each example in the gradient at the outputs is multiplied by a number of its own: then so are its rows
    in the outputs of layers, and no others. Cost: the part of a backward pass that leads to these, a third of a
    gradient.

    Args:
        run: what is tested.
        capture: of the same calls.
        vectors: gradient in the outputs.
        deltas: gradient in the outputs of the uses.
        generator: draws the numbers.
        proved: what was proved before; added to.
    """
    outputs, N = run.evaluation.outputs, run.num_examples
    tested = [k for k, delta in enumerate(deltas) if delta is not None and run.layouts[k] is not None]
    key = (capture.structure, tuple(use.shape for use in run.uses), run.layouts, N)
    if not tested or not isinstance(outputs, Tensor) or (key in proved and not capture.moves_rows):
        return run
    if vectors.ndim == 0 or vectors.shape[0] % N:
        return replace(run, layouts=(None,) * len(run.layouts))
    scale = torch.randn(N, generator=generator).to(vectors)
    edges: Any = [run.uses[k].edge for k in tested]
    rows = (vectors.reshape(N, -1) * scale[:, None]).reshape(vectors.shape)
    found = pull_back([outputs], edges, [rows])
    verdicts = []
    with torch.no_grad():
        for k, scaled in zip(tested, found, strict=True):
            delta, layout, shape = deltas[k], run.layouts[k], run.uses[k].shape
            assert delta is not None
            assert layout is not None
            verdicts.append(
                follows(delta.reshape(shape), None if scaled is None else scaled.reshape(shape), layout, scale)
            )
        kept = dict(zip(tested, torch.stack(verdicts).tolist(), strict=True))  # one wait for the device
    if all(kept.values()):
        proved.add(key)
        return run
    return replace(run, layouts=tuple(x if kept.get(k, True) else None for k, x in enumerate(run.layouts)))
