"""The networks that are measured: perceptrons, convolutional networks, decoders; small ones, and for GPUs.

Each comes with one batch of synthetic data, seeded: what a product costs does not depend on what the numbers are.
Models return (terms, classes), targets are (terms,), so that the cross-entropy of every library applies as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["GPU_PROBLEMS", "PROBLEMS", "TINY_PROBLEMS", "Problem", "make_gpt", "make_problem"]

Made = tuple[nn.Module, Tensor, Tensor]


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

    def to(self, dtype: torch.dtype) -> Problem:
        """Return the problem with weights and real inputs in another dtype; the model is changed in place."""
        inputs = self.inputs.to(dtype) if self.inputs.is_floating_point() else self.inputs
        return replace(self, model=self.model.to(dtype), inputs=inputs)


def make_problem(name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Problem:
    """Return the named problem, the same on every call for a device, up to rounding to `dtype`."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), torch.device(device):
        torch.manual_seed(0)
        model, inputs, targets = {**PROBLEMS, **GPU_PROBLEMS, **TINY_PROBLEMS}[name]()
    return Problem(name, model.eval(), nn.CrossEntropyLoss(), inputs, targets).to(dtype)


def _mlp(width: int = 256, batch: int = 256) -> Made:
    hidden = [nn.Linear(784, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*hidden, nn.Linear(width, 10)), torch.randn(batch, 784), torch.randint(10, (batch,))


def _cnn(width: int = 16, batch: int = 64) -> Made:
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
) -> Made:
    model = _GPT(vocabulary=vocabulary, context=context, width=width, num_heads=num_heads, num_layers=num_layers)
    text = torch.randint(vocabulary, (batch, context + 1))
    return model, text[:, :-1].contiguous(), text[:, 1:].flatten()


class _Logits(nn.Module):
    """A Hugging Face decoder as a function of tokens alone; returns logits (B * T, vocabulary)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits.reshape(-1, logits.shape[-1])

    def get_output_embeddings(self) -> nn.Module:
        """Return the last layer, whose logits torch-curvature works in blocks."""
        head: nn.Module = self.model.get_output_embeddings()
        return head


def _texts(model: Any, batch: int, length: int) -> Made:
    text = torch.randint(model.config.vocab_size, (batch, length + 1))
    return _Logits(model), text[:, :-1].contiguous(), text[:, 1:].flatten()


def _gpt2(batch: int, length: int, **measures: Any) -> Made:
    """GPT-2 with random weights; its measures are those of the one with 124 million parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return _texts(GPT2LMHeadModel(GPT2Config(**{"bos_token_id": 0, "eos_token_id": 0, **measures})), batch, length)


def _llama(
    batch: int, length: int, *, width: int, hidden: int, layers: int, heads: int, groups: int, vocabulary: int = 151_936
) -> Made:
    """Return a decoder with random weights, RMSNorm, rotary positions, SwiGLU, grouped queries and tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return _texts(LlamaForCausalLM(config), batch, length)


def _llama_half_billion(batch: int = 4, length: int = 256) -> Made:
    return _llama(batch, length, width=896, hidden=4864, layers=24, heads=14, groups=2)  # Qwen2.5-0.5B's measures


def _llama_billion_and_half(batch: int = 2, length: int = 256) -> Made:
    return _llama(batch, length, width=1536, hidden=8960, layers=28, heads=12, groups=2)  # Qwen2.5-1.5B's measures


PROBLEMS: dict[str, Callable[[], Made]] = {"mlp": _mlp, "cnn": _cnn, "gpt": _gpt}
GPU_PROBLEMS: dict[str, Callable[[], Made]] = {
    "mlp-20m": lambda: _mlp(width=4096, batch=4096),
    "cnn-1m": lambda: _cnn(width=128, batch=512),
    "gpt2-124m": lambda: _gpt2(4, 128),
    "gpt2-124m-long": lambda: _gpt2(8, 512),
    "llama-0.5b": _llama_half_billion,
    "llama-1.5b": _llama_billion_and_half,
}
"""Large enough that a GPU computes for most of the time."""
TINY_PROBLEMS: dict[str, Callable[[], Made]] = {
    "mlp-tiny": lambda: _mlp(width=8, batch=8),
    "cnn-tiny": lambda: _cnn(width=2, batch=4),
    "gpt2-tiny": lambda: _gpt2(2, 8, n_layer=1, n_embd=8, n_head=2, vocab_size=32),
    "llama-tiny": lambda: _llama(2, 8, width=8, hidden=16, layers=1, heads=2, groups=1, vocabulary=32),
}
"""For trying out what is measured with those for GPUs."""
