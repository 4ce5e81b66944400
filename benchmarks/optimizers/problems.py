"""Small training runs for comparing optimizers: digits, characters, and a differential equation.

Each problem knows its mini-batches, its loss as (outputs, targets), and what is measured between steps. They are small
enough that a run takes a second or two on one core, and differ in what makes them hard: noise of mini-batches, scales
of an embedding and of attention, ill-conditioning.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common.problems import make_gpt
from benchmarks.common.trained import zen

__all__ = ["TRAINING", "WIDTHS", "TrainingProblem", "make_training"]

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class TrainingProblem:
    """A model at its start, its batches and its measures."""

    name: str
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor
    batch_size: int
    steps: int
    """Length of a run."""
    outputs: Callable[[nn.Module, Tensor], Tensor]
    """(model, inputs) -> what the loss takes."""
    score: Callable[[nn.Module], float]
    """Accuracy on test data, or the error of the solution."""

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def batch(self, generator: torch.Generator) -> Pair:
        """Return random examples, all of them where the batch is the whole set."""
        if self.batch_size >= len(self.inputs):
            return self.inputs, self.targets
        chosen = torch.randperm(len(self.inputs), generator=generator)[: self.batch_size]
        return self.inputs[chosen], self.targets[chosen]

    def evaluate(self, batch: Pair) -> tuple[Tensor, Tensor]:
        """Return (outputs, targets) of a batch, with graph."""
        return self.outputs(self.model, batch[0]), batch[1].flatten()

    def loss_of(self, batch: Pair) -> Tensor:
        """Return the loss of a batch, with graph."""
        loss: Tensor = self.loss(*self.evaluate(batch))
        return loss

    def training_loss(self) -> float:
        """Return the loss over all training examples (the first 512 of many), with the state of the model kept."""
        state = {name: b.clone() for name, b in self.model.named_buffers()}
        value = float(self.loss_of((self.inputs[:512], self.targets[:512])).detach())
        for name, b in self.model.named_buffers():
            b.copy_(state[name])
        return value

    def gradient_norm(self, batch: Pair) -> float:
        """Return the norm of a batch's gradient."""
        state = {name: b.clone() for name, b in self.model.named_buffers()}
        norm = torch.nn.utils.get_total_norm(torch.autograd.grad(self.loss_of(batch), self.params))
        for name, b in self.model.named_buffers():
            b.copy_(state[name])
        return float(norm)


def make_training(name: str, *, seed: int = 0) -> TrainingProblem:
    """Return the named problem; the seed draws the network, not the data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return {**TRAINING, **WIDTHS}[name]()


def _plain(model: nn.Module, inputs: Tensor) -> Tensor:
    outputs: Tensor = model(inputs)
    return outputs


def _accuracy(inputs: Tensor, targets: Tensor) -> Callable[[nn.Module], float]:
    @torch.no_grad()
    def accuracy(model: nn.Module) -> float:
        model.eval()
        right = model(inputs).argmax(1) == targets.flatten()
        model.train()
        return float(right.double().mean())

    return accuracy


def _digits(name: str, *, num_images: int, batch_size: int, steps: int) -> Callable[[], TrainingProblem]:
    def make() -> TrainingProblem:
        from analysis.tasks.bundled import BUNDLED
        from analysis.tasks.digits import load_digits

        (images, labels), test = load_digits()
        model = BUNDLED["digits-cnn"].make_model()
        chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:num_images]
        return TrainingProblem(
            name,
            model,
            nn.CrossEntropyLoss(),
            images[chosen],
            labels[chosen],
            batch_size,
            steps,
            _plain,
            _accuracy(*test),
        )

    return make


def _characters(
    name: str = "gpt", *, context: int = 32, width: int = 32, num_heads: int = 2, texts: int = 8
) -> TrainingProblem:
    text = zen()
    places = {character: i for i, character in enumerate(sorted(set(text)))}
    windows = torch.tensor([places[character] for character in text]).unfold(0, context + 1, 1)
    cut = len(windows) * 9 // 10
    train, test = windows[:cut], windows[cut + context :: context]  # no character of the one is in the other
    model = make_gpt(vocabulary=len(places), context=context, width=width, num_heads=num_heads, num_layers=2)
    shuffled = train[torch.randperm(cut, generator=torch.Generator().manual_seed(0))]
    return TrainingProblem(
        name,
        model,
        nn.CrossEntropyLoss(),
        shuffled[:, :-1],
        shuffled[:, 1:],
        texts,
        96,
        _plain,
        _accuracy(test[:, :-1], test[:, 1:]),
    )


def _poisson() -> TrainingProblem:
    """-u'' = f on [0, 1] with u = 0 at both ends, where u = sin(pi x) + sin(4 pi x) / 4: stiff."""
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    x = torch.linspace(0, 1, 48, dtype=torch.float64)[:, None]
    f = math.pi**2 * (torch.sin(math.pi * x) + 4 * torch.sin(4 * math.pi * x))
    exact = torch.sin(math.pi * x) + torch.sin(4 * math.pi * x) / 4

    def solution(model: nn.Module, x: Tensor) -> Tensor:
        u: Tensor = x * (1 - x) * model(x)
        return u

    def second_derivative(model: nn.Module, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (first,) = torch.autograd.grad(solution(model, x).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
        return second.flatten()

    @torch.no_grad()
    def error(model: nn.Module) -> float:
        return float((solution(model, x) - exact).norm() / exact.norm())

    return TrainingProblem("pinn", model, nn.MSELoss(), x, -f, len(x), 240, second_derivative, error)


TRAINING: dict[str, Callable[[], Any]] = {
    "digits-cnn": _digits("digits-cnn", num_images=200, batch_size=32, steps=80),
    "gpt": _characters,
    "pinn": _poisson,
    "digits-cnn, batch 512": _digits("digits-cnn, batch 512", num_images=1442, batch_size=512, steps=80),
}
WIDTHS: dict[str, Callable[[], Any]] = {
    f"gpt, width {width}, {64 * texts} tokens": partial(
        _characters, f"gpt, width {width}, {64 * texts} tokens", context=64, width=width, num_heads=4, texts=texts
    )
    for width, texts in ((128, 64), (512, 128))
}
"""Whose steps are measured, for methods that precondition matrices: their work does not grow with the tokens."""
