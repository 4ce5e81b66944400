"""The bundled tasks: small networks that were trained here, and how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from analysis.tasks.digits import load_digits, make_cnn, make_mlp
from analysis.tasks.text import load_text, make_gpt

__all__ = ["BUNDLED", "Bundled", "Data", "Recipe"]

CHECKPOINTS = Path(__file__).parent / "checkpoints"
Data = tuple[Tensor, Tensor]
_STRATIFIED = "stratified: every fifth image of each class, in the order of the file, is for testing"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a bundled model was trained; see `analysis.tasks.train`."""

    epochs: int
    """Of the optimizer, the learning rate falling to 0 along half a cosine."""
    learning_rate: float
    weight_decay: float
    """lambda in L + (lambda / 2) |theta|^2, on all parameters; that of AdamW is decoupled."""
    batch_size: int
    momentum: float | None = None
    """Of SGD; None trains with AdamW."""
    frozen_epochs: int = 0
    """Of further SGD with batch normalisation in eval mode."""
    frozen_learning_rate: float = 0.0
    polish_tolerance: float | None = None
    """Where a final full-batch L-BFGS in float64 stops: |gradient of L + (lambda / 2) |theta|^2|; None skips it."""


@dataclass(frozen=True, kw_only=True)
class Bundled:
    """A bundled task before its checkpoint is loaded."""

    name: str
    description: str
    make_model: Callable[[], nn.Module]
    recipe: Recipe
    load_data: Callable[[], tuple[Data, Data]]
    """Returns inputs and targets for training, and those for testing."""
    split: str
    """How these were told apart, in words."""

    @property
    def checkpoint(self) -> Path:
        return CHECKPOINTS / f"{self.name}.pt"


BUNDLED: dict[str, Bundled] = {
    task.name: task
    for task in (
        Bundled(
            name="digits-cnn",
            description="Three convolutions with batch normalisation and ReLU, trained on 8 x 8 handwritten digits.",
            make_model=make_cnn,
            load_data=load_digits,
            split=_STRATIFIED,
            recipe=Recipe(
                epochs=60,
                learning_rate=0.1,
                momentum=0.9,
                weight_decay=5e-4,
                batch_size=64,
                frozen_epochs=20,
                frozen_learning_rate=0.01,
            ),
        ),
        Bundled(
            name="digits-mlp",
            description="A 64-10-10-10 tanh network at a minimum of its regularised loss on 8 x 8 handwritten digits.",
            make_model=make_mlp,
            load_data=load_digits,
            split=_STRATIFIED,
            recipe=Recipe(
                epochs=200,
                learning_rate=0.1,
                momentum=0.9,
                weight_decay=1e-3,
                batch_size=64,
                polish_tolerance=1e-6,
            ),
        ),
        Bundled(
            name="text-gpt",
            description="A GPT of three blocks, trained to predict the next word of sentences that a grammar draws.",
            make_model=make_gpt,
            load_data=load_text,
            split="the last 192 of 960 texts are for testing",
            recipe=Recipe(epochs=15, learning_rate=3e-3, weight_decay=0.1, batch_size=32),
        ),
    )
}
