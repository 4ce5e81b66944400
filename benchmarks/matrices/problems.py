"""What the optimizers of the race are trained on: models at their starts, batches, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.problems import make_gpt
from benchmarks.newton.autoencoder import autoencoder
from benchmarks.newton.burgers import BURGERS
from benchmarks.newton.convection import CONVECTION
from benchmarks.newton.poisson import POISSON

__all__ = ["PINNS", "PROBLEMS"]

PINNS = {"poisson": POISSON, "convection": CONVECTION, "burgers": BURGERS}
Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class Characters:
    """The character GPT: Python's own documentation, 4096 tokens a step."""

    def __init__(self, seed: int) -> None:
        import pydoc_data.topics as topics

        text = "".join(value for _, value in sorted(topics.topics.items())).lower()
        places = {character: i for i, character in enumerate(sorted(set(text)))}
        self.data = torch.tensor([places[character] for character in text])
        self.cut = len(self.data) * 9 // 10
        torch.manual_seed(seed)
        self.model = make_gpt(vocabulary=len(places), context=64, width=64, num_heads=4, num_layers=2)
        self.loss: Loss = F.cross_entropy
        self.fixed = self.batch(torch.Generator().manual_seed(999), 128)

    def batch(self, generator: torch.Generator, count: int = 64) -> Batch:
        """Return random windows."""
        at = torch.randint(self.cut - 65, (count, 1), generator=generator) + torch.arange(65)
        window = self.data[at]
        return window[:, :-1], window[:, 1:].flatten()


class Autoencoder:
    """The deep autoencoder of `benchmarks.newton`, all images at once."""

    def __init__(self, seed: int) -> None:
        self.model, images = autoencoder(seed)
        self.loss: Loss = F.mse_loss
        self.fixed = (images, images)

    def batch(self, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """Return all of them."""
        return self.fixed


class Digits:
    """The bundled convolutional network, untrained, on 64 images of handwritten digits a step."""

    def __init__(self, seed: int) -> None:
        from analysis.tasks.bundled import BUNDLED
        from analysis.tasks.digits import load_digits

        (self.images, self.labels), _ = load_digits()
        torch.manual_seed(seed)
        self.model = BUNDLED["digits-cnn"].make_model()
        self.loss: Loss = F.cross_entropy
        self.fixed = (self.images, self.labels)

    def batch(self, generator: torch.Generator, count: int = 64) -> Batch:
        """Return random images."""
        at = torch.randint(len(self.images), (count,), generator=generator)
        return self.images[at], self.labels[at]


class Logistic:
    """Logistic regression on 400 examples whose 30 columns have scales from 1e-3 to 1, all of them at once.

    The condition number of the Hessian is about 1e6; labels follow a plane that weighs the columns alike.
    """

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        scales = torch.logspace(-3, 0, 30, dtype=torch.float64)
        x = torch.randn(400, 30, generator=generator, dtype=torch.float64)
        plane = torch.randn(30, generator=generator, dtype=torch.float64) / 5
        chance = torch.rand(400, generator=generator, dtype=torch.float64)
        self.model = nn.Linear(30, 1, dtype=torch.float64)
        nn.init.zeros_(self.model.weight)
        nn.init.zeros_(self.model.bias)
        self.loss: Loss = F.binary_cross_entropy_with_logits
        self.fixed = (x * scales, (chance < torch.sigmoid(x @ plane)).double()[:, None])

    def batch(self, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """Return all of them."""
        return self.fixed


class _Residuals(nn.Module):
    """The residuals of a network in a differential equation, (m, 1), as outputs of a model."""

    def __init__(self, network: nn.Module, residuals: Callable[[], Tensor]) -> None:
        super().__init__()
        self.network, self.residuals = network, residuals

    def forward(self, place: Tensor) -> Tensor:  # noqa: ARG002  the points are the residuals' own
        """Return them at their points, so that their mean square is half of the sum that is minimised."""
        found = self.residuals()[:, None]
        return found * math.sqrt(len(found) / 2)


class Equation:
    """A differential equation of `benchmarks.newton`, at points that stay; half the sum of its squared residuals."""

    def __init__(self, name: str, seed: int) -> None:
        problem = PINNS[name]
        network, residuals = problem.make(seed)
        self.model = _Residuals(network, residuals)
        self.loss: Loss = F.mse_loss
        count = len(residuals())
        self.fixed = (torch.zeros(count, 1, dtype=torch.float64), torch.zeros(count, 1, dtype=torch.float64))
        self.score = lambda: problem.error(network)

    def batch(self, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """Return what stands for the points."""
        return self.fixed


PROBLEMS: dict[str, Any] = {
    "gpt": Characters,
    "autoencoder": Autoencoder,
    "digits-cnn": Digits,
    "logistic": Logistic,
    **{name: partial(Equation, name) for name in PINNS},
}
"""Name -> what makes it from a seed."""
