"""The networks that are measured: a multilayer perceptron, a convolutional network, a GPT; small ones, and for GPUs.

Each comes with one batch of synthetic data, seeded: what a product costs does not depend on what the numbers are.
Models return (terms, classes), targets are (terms,), so that the cross-entropy of every library applies as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPU_PROBLEMS", "PROBLEMS", "Problem", "make_gpt", "make_problem"]


@dataclass(frozen=True)
class Problem:
    """A model in eval mode, its loss and one batch."""

    name: str
    model: nn.Module
    loss: nn.Module
    inputs: Tensor
    targets: Tensor

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def num_params(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def evaluate(self) -> Tensor:
        """Return the loss of the batch."""
        loss: Tensor = self.loss(self.model(self.inputs), self.targets)
        return loss


def make_problem(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """Return the named problem, the same on every call up to rounding to `dtype`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, inputs, targets = {**PROBLEMS, **GPU_PROBLEMS}[name]()
    model.eval()
    inputs = inputs.to(device=device, dtype=dtype if inputs.is_floating_point() else None)
    return Problem(name, model.to(device=device, dtype=dtype), nn.CrossEntropyLoss(), inputs, targets.to(device))


def _mlp(width: int = 256, batch: int = 256) -> tuple[nn.Module, Tensor, Tensor]:
    hidden = [nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, 10)), torch.randn(batch, 784), torch.randint(10, (batch,))


def _cnn(width: int = 16, batch: int = 64) -> tuple[nn.Module, Tensor, Tensor]:
    def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]

    blocks = [*block(3, width, 1), *block(width, 2 * width, 2), *block(2 * width, 4 * width, 2)]
    model = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10))
    images = torch.randn(batch, 3, 32, 32)
    with torch.no_grad():
        model(images)  # in train mode: running statistics that are not 0 and 1
    return model, images, torch.randint(10, (batch,))


class _Attention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, T, width = x.shape
        heads = (B, T, 3, self.num_heads, width // self.num_heads)
        q, k, v = self.qkv(x).view(heads).permute(2, 0, 3, 1, 4)  # each (B, heads, T, width / heads)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(B, T, width))


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = _Attention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _GPT(nn.Module):
    """A decoder with learned positions; returns logits (B * T, vocabulary)."""

    def __init__(self, *, vocabulary: int, context: int, width: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(_Block(width, num_heads) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits.flatten(0, 1)


def make_gpt(*, vocabulary: int, context: int, width: int, num_heads: int, num_layers: int) -> nn.Module:
    """Return a character-level decoder of the given measures."""
    return _GPT(vocabulary=vocabulary, context=context, width=width, num_heads=num_heads, num_layers=num_layers)


def _gpt(
    vocabulary: int = 65, context: int = 64, width: int = 96, num_heads: int = 4, num_layers: int = 4, batch: int = 16
) -> tuple[nn.Module, Tensor, Tensor]:
    model = _GPT(vocabulary=vocabulary, context=context, width=width, num_heads=num_heads, num_layers=num_layers)
    text = torch.randint(vocabulary, (batch, context + 1))
    return model, text[:, :-1].contiguous(), text[:, 1:].flatten()


PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}
GPU_PROBLEMS: dict[str, Callable[[], tuple[nn.Module, Tensor, Tensor]]] = {
    "mlp-20m": lambda: _mlp(width=4096, batch=4096),
    "cnn-1m": lambda: _cnn(width=128, batch=512),
    "gpt-98m": lambda: _gpt(vocabulary=8192, context=256, width=768, num_heads=12, num_layers=12, batch=8),
}
"""Large enough that a GPU computes for most of the time."""
