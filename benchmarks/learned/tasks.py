"""Small networks on digits, in many copies at once: what the learned optimizer is trained on."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from analysis.tasks.digits import load_digits

__all__ = ["Digits", "Draw", "drawn"]


@dataclass(frozen=True)
class Draw:
    """A task of the distribution: which digits, a network, and how long it is trained."""

    classes: tuple[int, ...]
    side: int
    """Of the images: 8, or 4 where pixels are averaged by fours."""
    centred: bool
    """Whether the pixels' means are taken off."""
    channels: int
    """Of a 3 x 3 convolution before everything else, averaged by fours; 0: none."""
    widths: tuple[int, ...]
    """Of hidden layers."""
    activation: str
    gain: float
    """Factor on He's or Glorot's standard deviation."""
    batch_size: int
    steps: int
    loss: Literal["cross-entropy", "squares"] = "cross-entropy"
    """The second one, of outputs from one-hot labels, is in no task that is drawn."""


def drawn(generator: torch.Generator) -> Draw:
    """Draw a task."""

    def one_of(*values: int) -> int:
        return values[int(torch.randint(len(values), (), generator=generator))]

    def between(low: float, high: float) -> float:
        return math.exp(math.log(low) + math.log(high / low) * float(torch.rand((), generator=generator)))

    channels = one_of(0, 0, 0, 4, 8)
    return Draw(
        classes=tuple(torch.randperm(10, generator=generator)[: one_of(4, 6, 8, 10, 10)].tolist()),
        side=8 if channels else one_of(4, 8),
        centred=bool(one_of(0, 1)),
        channels=channels,
        widths=() if channels else tuple(one_of(8, 12, 16, 24, 32) for _ in range(one_of(1, 1, 2))),
        activation=("tanh", "relu", "gelu")[one_of(0, 1, 2)],
        gain=between(0.5, 2.0),
        batch_size=one_of(16, 32, 64),
        steps=round(between(50, 150)),
    )


_ACTIVATIONS = {"tanh": torch.tanh, "relu": torch.relu, "gelu": F.gelu}


_digits = functools.cache(load_digits)


class Digits:
    """Copies of one task, each with its parameters: tensors (copies, entries), laid out as torch lays out a layer's.

    Args:
        draw: the task.
        starts: how many starts and orders of batches there are.
        each: copies that share one of these, neighbours.
        generator: source of starts and batches.
        device: where it is trained.
    """

    def __init__(self, draw: Draw, starts: int, each: int, generator: torch.Generator, device: str = "cpu") -> None:
        self.draw, self._each = draw, each
        (self.x, self.y), (self.test_x, self.test_y) = (
            [tensor.to(device) for tensor in self._part(*part)] for part in _digits()
        )
        if draw.centred:
            mean = self.x.mean(0)
            self.x, self.test_x = self.x - mean, self.test_x - mean
        inputs, self.shapes = draw.side**2, list[tuple[int, ...]]()
        if draw.channels:
            self.x, self.test_x = _patches(self.x), _patches(self.test_x)
            self.shapes += [(draw.channels, 9), (draw.channels,)]
            inputs = draw.channels * 9
        for width in (*draw.widths, len(draw.classes)):
            self.shapes += [(width, inputs), (width,)]
            inputs = width
        self.params: list[Tensor] = []
        for shape in self.shapes:
            std = 0.0
            if len(shape) > 1:
                std = draw.gain * ((1.0 if draw.activation == "tanh" else 2.0) / shape[1]) ** 0.5
            start = torch.randn(starts, math.prod(shape), generator=generator) * std
            self.params.append(start.repeat_interleave(each, 0).to(device))
        self._rows = torch.randint(len(self.y), (draw.steps, starts, draw.batch_size), generator=generator).to(device)

    def _part(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        places = torch.full((10,), -1)
        places[list(self.draw.classes)] = torch.arange(len(self.draw.classes))
        kept = places[labels] >= 0
        images = images[kept] if self.draw.side == 8 else F.avg_pool2d(images[kept], 2)
        return images.flatten(1), places[labels[kept]]

    def outputs(self, params: list[Tensor], x: Tensor) -> Tensor:
        """Return the logits of every copy, (copies, N, classes); x is (copies, N, ...) or (1, N, ...)."""
        act, layers = _ACTIVATIONS[self.draw.activation], len(params) // 2
        for i in range(layers):
            W, b = params[2 * i].unflatten(-1, self.shapes[2 * i]), params[2 * i + 1][:, None]
            if i == 0 and self.draw.channels:
                at = x.flatten(1, 2)  # (copies, N * 36, 9)
                h = act(at @ W.mT + b)
                h = h.unflatten(1, (x.shape[1], 3, 2, 3, 2)).mean((3, 5))  # (copies, N, 3, 3, channels)
                x = h.flatten(2)
            else:
                x = x @ W.mT + b
                x = act(x) if i < layers - 1 else x
        return x

    def losses(self, params: list[Tensor], rows: Tensor | None = None) -> Tensor:
        """Return the loss of every copy, (copies,): on its rows, (copies, batch), or on all data."""
        x, y = (self.x[None], self.y.expand(len(params[0]), -1)) if rows is None else (self.x[rows], self.y[rows])
        outputs = self.outputs(params, x)
        if self.draw.loss == "squares":
            return (outputs - F.one_hot(y, outputs.shape[-1])).square().sum(-1).mean(1)
        return F.cross_entropy(outputs.transpose(1, 2), y, reduction="none").mean(1)

    def gradients(self, params: list[Tensor], step: int) -> list[Tensor]:
        """Return the gradients of every copy on its batch of a step, 1 the first."""
        rows = self._rows[step - 1].repeat_interleave(self._each, 0)
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in params]
            loss = self.losses(leaves, rows).sum()
            return list(torch.autograd.grad(loss, leaves))

    def accuracy(self, params: list[Tensor]) -> Tensor:
        """Return the share of test images that every copy classifies correctly, (copies,)."""
        found = self.outputs(params, self.test_x[None]).argmax(-1)
        return (found == self.test_y).float().mean(1)


def _patches(images: Tensor) -> Tensor:
    """Return the 3 x 3 patches of 8 x 8 images, (N, 36, 9)."""
    return F.unfold(images.unflatten(1, (1, 8, 8)), 3).mT.contiguous()
