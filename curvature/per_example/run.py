"""One batch, evaluated, and what it is split into."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from curvature.autograd.lazy_logits import LazyLogits
from curvature.engine.evaluation import Evaluation
from curvature.engine.stand_ins import StandIns
from curvature.per_example.capture import Capture
from curvature.per_example.forms import Form
from curvature.per_example.layout import Layout

__all__ = ["Part", "Run"]


@dataclass(frozen=True)
class Part:
    """The gradients of some parameters."""

    positions: tuple[int, ...]
    """Places of the parameters in the objective's space."""
    form: Form
    route: str
    """How they were had; a second clause says why not by a rule."""


@dataclass
class Run:
    """One batch, evaluated."""

    batch: Any
    index: int
    num_examples: int
    evaluation: Evaluation
    capture: Capture
    buffers: StandIns
    runs_again: bool
    """Whether parts of the model run in every backward pass, as activation checkpointing has it."""
    layouts: tuple[Layout | None, ...] = ()
    checked: bool = False
    left: dict[int, str] = field(default_factory=dict)
    """Parameters without rules, and why; known once the run is checked."""

    @property
    def place(self) -> Any:
        """Where vectors are pulled back from: the outputs, or what goes into a head that works in blocks."""
        outputs = self.evaluation.outputs
        return outputs.h if isinstance(outputs, LazyLogits) else outputs
