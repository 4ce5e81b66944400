"""The models every operator is tried on: small, in float64, one for each kind of layer and of parameter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.references import BINARY_CROSS_ENTROPY, CROSS_ENTROPY, SQUARED_ERROR, Criterion

Pair: TypeAlias = "tuple[Tensor, Tensor]"
NUM_EXAMPLES = 7


@dataclass(frozen=True)
class Case:
    """A model with data and a loss."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[], Pair]
    """Draws inputs and targets of NUM_EXAMPLES examples."""
    loss: nn.Module
    criterion: Criterion
    """The same loss, written out."""
    train: bool = False
    depends_on_batches: bool = False
    """Whether the loss is another function when the data are cut into other batches (batch statistics, masks)."""
    written_out: Callable[[nn.Module, Tensor], Tensor] | None = None
    """The forward pass by hand, where autograd's own second derivative of the module is wrong."""

    def model(self) -> nn.Module:
        """Return the model, always the same, with no parameter or buffer at a special value."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.build().double()
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(0.2 * torch.randn_like(p))
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_(std=0.3)
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 1.5)
        return model.train(self.train)

    def data(self) -> Pair:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            return self.draw()

    def ragged(self) -> list[Pair]:
        """Return the data in three batches of unequal size."""
        x, y = self.data()
        return list(zip(x.split((4, 2, 1)), y.split((4, 2, 1)), strict=True))

    def forward(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """Return the model as a function to build references with."""
        written_out = self.written_out
        return model if written_out is None else lambda x: written_out(model, x)

    def __str__(self) -> str:
        return self.name


# -- data -------------------------------------------------------------------------------------------------------------


def _real(*shape: int) -> Tensor:
    return torch.randn(NUM_EXAMPLES, *shape, dtype=torch.float64)


def _classes(*shape: int, num: int = 3) -> Tensor:
    return torch.randint(num, (NUM_EXAMPLES, *shape))


def _padded_classes() -> Tensor:
    """Return targets (N, 4) with a different number of ignored places in each example."""
    y = _classes(4)
    for i in range(NUM_EXAMPLES):
        y[i, 4 - i % 4 :] = -100
    return y


def _tokens() -> Tensor:
    return torch.randint(4, (NUM_EXAMPLES, 4))


# -- models -----------------------------------------------------------------------------------------------------------


def _mlp(activation: nn.Module, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), activation, nn.Linear(5, 4), activation, nn.Linear(4, outputs))


def _convolutional(*normalisation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *normalisation, nn.Tanh(), nn.Flatten(), nn.Linear(4 * 9, 3))


class CausalAttention(nn.Module):
    """Embedding, one head of attention, per-token logits; written by hand or by torch's fused function."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.qkv = nn.Linear(4, 12)
        self.head = nn.Linear(4, 3)
        self.fused = fused

    def forward(self, tokens: Tensor) -> Tensor:
        q, k, v = self.qkv(self.embedding(tokens)).chunk(3, dim=-1)
        if self.fused:
            mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], is_causal=True)[:, 0]
        else:
            future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=q.device).triu(1)
            scores = (q @ k.mT / q.shape[-1] ** 0.5).masked_fill(future, float("-inf"))
            mixed = scores.softmax(-1) @ v
        return self.head(mixed).movedim(-1, 1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0].mean(1))


class Transformer(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 5, dropout, activation="gelu", batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x).mean(1))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.LSTM | nn.GRU]) -> None:
        super().__init__()
        self.cell = kind(3, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class TiedWeights(nn.Module):
    """A language model whose output map is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 4)
        self.mix = nn.Linear(4, 4)
        self.head = nn.Linear(4, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embedding(tokens)))).movedim(-1, 1)


class UsedTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = nn.Sequential(nn.Linear(4, 4), nn.SiLU())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.step(self.step(x)))


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.GELU(), nn.Linear(5, 4), nn.Tanh())
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(checkpoint(self.body, x, use_reentrant=False))


def weight_normalised() -> nn.Sequential:
    norm = nn.utils.parametrizations.weight_norm
    return nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), norm(nn.Linear(5, 3), dim=1))


def weight_normalised_by_hand(model: nn.Module, x: Tensor) -> Tensor:
    for place, dim in ((0, 1), (2, 0)):  # the dimension that the norm runs over
        layer = model.get_submodule(str(place))
        g, v = (layer.get_parameter(f"parametrizations.weight.original{i}") for i in (0, 1))
        weight = g * v / (v * v).sum(dim, keepdim=True).sqrt()
        x = x @ weight.T + layer.get_parameter("bias")
        x = x.tanh() if place == 0 else x
    return x


class FrozenAndUnused(nn.Module):
    """Some parameters do not require a gradient, others never reach the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(3, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.frozen(x))).tanh()


# -- cases ------------------------------------------------------------------------------------------------------------


def _classifier(
    name: str,
    build: Callable[[], nn.Module],
    inputs: Callable[[], Tensor],
    targets: Callable[[], Tensor] = _classes,
    **settings: bool | Callable[[nn.Module, Tensor], Tensor],
) -> Case:
    return Case(name, build, lambda: (inputs(), targets()), nn.CrossEntropyLoss(), CROSS_ENTROPY, **settings)  # type: ignore[arg-type]


def _row() -> Tensor:
    return _real(4)


def _image() -> Tensor:
    return _real(2, 3, 3)


def _sequence() -> Tensor:
    return _real(3, 4)


CASES = [
    Case("linear regression", lambda: nn.Linear(4, 2), lambda: (_row(), _real(2)), nn.MSELoss(), SQUARED_ERROR),
    Case("MLP tanh", lambda: _mlp(nn.Tanh(), 2), lambda: (_row(), _real(2)), nn.MSELoss(), SQUARED_ERROR),
    Case(
        "MLP sigmoid, binary",
        lambda: _mlp(nn.Sigmoid(), 2),
        lambda: (_row(), _classes(2, num=2).double()),
        nn.BCEWithLogitsLoss(),
        BINARY_CROSS_ENTROPY,
    ),
    _classifier("MLP ReLU", lambda: _mlp(nn.ReLU()), _row),
    _classifier("MLP SiLU", lambda: _mlp(nn.SiLU()), _row),
    _classifier("MLP GELU", lambda: _mlp(nn.GELU(approximate="tanh")), _row),
    _classifier("BatchNorm eval", lambda: _convolutional(nn.BatchNorm2d(4)), _image),
    _classifier(
        "BatchNorm train", lambda: _convolutional(nn.BatchNorm2d(4)), _image, train=True, depends_on_batches=True
    ),
    _classifier("LayerNorm", lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 3)), _row),
    _classifier("GroupNorm", lambda: _convolutional(nn.GroupNorm(2, 4)), _image),
    _classifier("InstanceNorm", lambda: _convolutional(nn.InstanceNorm2d(4, affine=True)), _image),
    _classifier(
        "embedding", lambda: nn.Sequential(nn.Embedding(4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(12, 3)), _tokens
    ),
    _classifier("attention by hand", lambda: CausalAttention(fused=False), _tokens, _padded_classes),
    _classifier("attention fused", lambda: CausalAttention(fused=True), _tokens, lambda: _classes(4)),
    _classifier("MultiheadAttention eval", SelfAttention, _sequence),
    _classifier("MultiheadAttention train", SelfAttention, _sequence, train=True),
    _classifier("TransformerEncoderLayer eval", Transformer, _sequence),
    _classifier(
        "TransformerEncoderLayer dropout", lambda: Transformer(0.1), _sequence, train=True, depends_on_batches=True
    ),
    _classifier("LSTM", lambda: Recurrent(nn.LSTM), lambda: _real(3, 3)),
    _classifier("GRU", lambda: Recurrent(nn.GRU), lambda: _real(3, 3)),
    _classifier(
        "dropout",
        lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)),
        _row,
        train=True,
        depends_on_batches=True,
    ),
    _classifier("tied weights", TiedWeights, _tokens, _padded_classes),
    _classifier("module used twice", UsedTwice, _row),
    _classifier("checkpointed", Checkpointed, _row),
    _classifier("weight norm", weight_normalised, _row, written_out=weight_normalised_by_hand),
    _classifier("frozen and unused", FrozenAndUnused, _row),
]
BY_NAME = {case.name: case for case in CASES}
