"""Layers, losses and dense references that exact quantities are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

N = 5


@dataclass(frozen=True)
class Layer:
    name: str
    build: Callable[[], list[nn.Module]]
    """Layers that end in 12 features, by way of the layer in question."""
    shape: tuple[int, ...]
    """Of one input."""
    classes: int = 0
    """Inputs are integers below this, if it is not 0."""

    def model(self, outputs: int = 3) -> nn.Sequential:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = nn.Sequential(*self.build(), nn.Flatten(), nn.LazyLinear(outputs)).double().eval()
            model(self.inputs())
            with torch.no_grad():
                for name, buffer in model.named_buffers():
                    if name.endswith("running_mean"):
                        buffer.normal_(std=0.3)
                    elif name.endswith("running_var"):
                        buffer.uniform_(0.5, 1.5)
                for p in model.parameters():
                    p.add_(0.1 * torch.randn_like(p))
        return model

    def inputs(self) -> Tensor:
        g = torch.Generator().manual_seed(1)
        if self.classes:
            return torch.randint(self.classes, (N, *self.shape), generator=g)
        return torch.randn(N, *self.shape, generator=g, dtype=torch.float64)


def _behind_linear(*layers: nn.Module) -> list[nn.Module]:
    return [nn.Linear(4, 6), *layers]


def _twice(activation: nn.Module) -> list[nn.Module]:
    """One module at two places."""
    return _behind_linear(activation, nn.Linear(6, 5), activation)


def _behind_conv(*layers: nn.Module) -> list[nn.Module]:
    return [nn.Conv2d(2, 4, 3, padding=1), *layers]


LAYERS = [
    Layer("Linear", lambda: [nn.Linear(4, 6)], (4,)),
    Layer("Linear, no bias", lambda: [nn.Linear(4, 6, bias=False)], (4,)),
    Layer("Linear on (N, T, D)", lambda: [nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)], (3, 4)),
    *(
        Layer(name, lambda make=make: _twice(make()), (4,))  # type: ignore[misc]
        for name, make in {
            "ReLU": nn.ReLU,
            "Tanh": nn.Tanh,
            "Sigmoid": nn.Sigmoid,
            "LeakyReLU": lambda: nn.LeakyReLU(0.3),
            "LogSigmoid": nn.LogSigmoid,
            "ELU": lambda: nn.ELU(0.7),
            "SELU": nn.SELU,
        }.items()
    ),
    Layer("ReLU(inplace)", lambda: _behind_linear(nn.ReLU(inplace=True), nn.Linear(6, 4)), (4,)),
    Layer("Identity", lambda: _behind_linear(nn.Identity(), nn.Tanh()), (4,)),
    Layer("Dropout (eval)", lambda: _behind_linear(nn.Dropout(0.5), nn.Tanh()), (4,)),
    Layer("Flatten", lambda: [nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Linear(9, 4), nn.Tanh()], (2, 4)),
    Layer("Conv1d", lambda: [nn.Conv1d(2, 4, 2, stride=2, padding=1, dilation=2), nn.Tanh()], (2, 6)),
    Layer("Conv2d", lambda: [nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 2, 2, stride=2)], (2, 4, 4)),
    Layer("Conv2d, groups", lambda: [nn.Conv2d(2, 4, 2, groups=2), nn.Tanh(), nn.Conv2d(4, 4, 1, groups=4)], (2, 3, 3)),
    Layer(
        "Conv2d, dilation", lambda: [nn.Conv2d(2, 3, 2, dilation=2, padding=(1, 0), bias=False), nn.Tanh()], (2, 4, 4)
    ),
    Layer("Conv2d, circular padding", lambda: [nn.Conv2d(2, 3, 3, padding=1, padding_mode="circular")], (2, 3, 3)),
    Layer("Conv2d, padding='same'", lambda: [nn.Conv2d(2, 3, 3, padding="same"), nn.Tanh()], (2, 3, 3)),
    Layer("Conv3d", lambda: [nn.Conv3d(1, 2, 2), nn.Tanh()], (1, 3, 3, 2)),
    Layer("ConvTranspose1d", lambda: [nn.ConvTranspose1d(2, 3, 2, stride=2), nn.Tanh()], (2, 3)),
    Layer("ConvTranspose2d", lambda: [nn.ConvTranspose2d(2, 3, 2, padding=1, stride=2), nn.Tanh()], (2, 3, 3)),
    Layer("ConvTranspose2d, groups", lambda: [nn.ConvTranspose2d(2, 4, 2, groups=2), nn.Tanh()], (2, 3, 3)),
    Layer(
        "ConvTranspose2d, output padding", lambda: [nn.ConvTranspose2d(2, 2, 2, stride=2, output_padding=1)], (2, 2, 2)
    ),
    Layer("ConvTranspose3d", lambda: [nn.ConvTranspose3d(1, 2, 2), nn.Tanh()], (1, 2, 2, 2)),
    Layer("MaxPool1d", lambda: [nn.Conv1d(2, 3, 2), nn.MaxPool1d(2, stride=1, padding=1)], (2, 5)),
    Layer("MaxPool2d", lambda: _behind_conv(nn.MaxPool2d(2, stride=1)), (2, 3, 3)),
    Layer("MaxPool2d, ceil, dilation", lambda: _behind_conv(nn.MaxPool2d(2, dilation=2, ceil_mode=True)), (2, 4, 4)),
    Layer("MaxPool3d", lambda: [nn.Conv3d(1, 2, 1), nn.MaxPool3d(2, stride=1)], (1, 3, 2, 2)),
    Layer("AvgPool1d", lambda: [nn.Conv1d(2, 3, 2), nn.AvgPool1d(2)], (2, 5)),
    Layer("AvgPool2d", lambda: _behind_conv(nn.AvgPool2d(2, stride=1, padding=1)), (2, 3, 3)),
    Layer(
        "AvgPool2d, pads not counted", lambda: _behind_conv(nn.AvgPool2d(2, 1, 1, count_include_pad=False)), (2, 3, 3)
    ),
    Layer("AvgPool2d, ceil", lambda: _behind_conv(nn.AvgPool2d(2, ceil_mode=True)), (2, 3, 3)),
    Layer("AvgPool2d, divisor", lambda: _behind_conv(nn.AvgPool2d(2, divisor_override=3)), (2, 4, 4)),
    Layer("AvgPool3d", lambda: [nn.Conv3d(1, 2, 1), nn.AvgPool3d(2)], (1, 4, 2, 2)),
    Layer("AdaptiveAvgPool1d", lambda: [nn.Conv1d(2, 3, 2), nn.AdaptiveAvgPool1d(2)], (2, 5)),
    Layer("AdaptiveAvgPool2d", lambda: _behind_conv(nn.AdaptiveAvgPool2d(2)), (2, 4, 4)),
    Layer("AdaptiveAvgPool2d, indivisible", lambda: _behind_conv(nn.AdaptiveAvgPool2d(2)), (2, 3, 3)),
    Layer("AdaptiveAvgPool3d", lambda: [nn.Conv3d(1, 2, 1), nn.AdaptiveAvgPool3d(1)], (1, 2, 2, 2)),
    Layer("ZeroPad2d", lambda: [nn.Conv2d(2, 3, 2), nn.ZeroPad2d((1, 0, 0, 2)), nn.Conv2d(3, 2, 2)], (2, 3, 3)),
    Layer("BatchNorm1d (eval)", lambda: _behind_linear(nn.BatchNorm1d(6), nn.Tanh()), (4,)),
    Layer("BatchNorm2d (eval)", lambda: _behind_conv(nn.BatchNorm2d(4), nn.Tanh()), (2, 3, 3)),
    Layer("BatchNorm3d (eval)", lambda: [nn.Conv3d(1, 2, 1), nn.BatchNorm3d(2)], (1, 2, 2, 2)),
    Layer("BatchNorm2d (eval), no affine", lambda: _behind_conv(nn.BatchNorm2d(4, affine=False)), (2, 3, 3)),
    Layer("Embedding", lambda: [nn.Embedding(6, 3), nn.Tanh()], (3,), classes=6),
    Layer("Embedding, padding_idx", lambda: [nn.Embedding(6, 3, padding_idx=0), nn.Tanh()], (3,), classes=6),
    Layer("GELU", lambda: _behind_linear(nn.GELU()), (4,)),
    Layer("SiLU", lambda: _behind_linear(nn.SiLU()), (4,)),
    Layer("LayerNorm", lambda: _behind_linear(nn.LayerNorm(6)), (4,)),
    Layer("GroupNorm", lambda: _behind_conv(nn.GroupNorm(2, 4)), (2, 3, 3)),
]


@dataclass(frozen=True)
class Loss:
    name: str
    build: Callable[[], Callable[..., Tensor]]
    targets: Callable[[torch.Generator], Tensor]
    outputs: int = 3


def _classes(g: torch.Generator) -> Tensor:
    return torch.randint(3, (N,), generator=g)


def _some_ignored(g: torch.Generator) -> Tensor:
    return _classes(g).index_fill(0, torch.tensor([1, 3]), -100)


def _real(g: torch.Generator) -> Tensor:
    return torch.randn(N, 3, generator=g, dtype=torch.float64)


def _soft(g: torch.Generator) -> Tensor:
    return torch.rand(N, 3, generator=g, dtype=torch.float64).softmax(1)


def twice_cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return 2 * nn.functional.cross_entropy(z, y)


W3 = torch.tensor([0.5, 2.0, 1.5], dtype=torch.float64)
LOSSES = [
    Loss("cross-entropy", nn.CrossEntropyLoss, _classes),
    Loss("cross-entropy, sum", lambda: nn.CrossEntropyLoss(reduction="sum"), _classes),
    Loss("cross-entropy, ignored targets", nn.CrossEntropyLoss, _some_ignored),
    Loss("cross-entropy, ignore_index=1", lambda: nn.CrossEntropyLoss(ignore_index=1), _classes),
    Loss("cross-entropy, class weights", lambda: nn.CrossEntropyLoss(weight=W3), _classes),
    Loss("cross-entropy, label smoothing", lambda: nn.CrossEntropyLoss(label_smoothing=0.2), _classes),
    Loss("cross-entropy, class probabilities", nn.CrossEntropyLoss, _soft),
    Loss("mean squared error", nn.MSELoss, _real),
    Loss("mean squared error, sum", lambda: nn.MSELoss(reduction="sum"), _real),
    Loss("binary cross-entropy", nn.BCEWithLogitsLoss, lambda g: (_real(g)[:, :1] > 0).double(), outputs=1),
    Loss("binary cross-entropy, 3 outputs", nn.BCEWithLogitsLoss, lambda g: (_real(g) > 0).double()),
    Loss(
        "binary cross-entropy, pos_weight",
        lambda: nn.BCEWithLogitsLoss(pos_weight=W3),
        lambda g: (_real(g) > 0).double(),
    ),
    Loss("smooth L1", lambda: nn.SmoothL1Loss(beta=0.7), _real),
    Loss("2 x cross-entropy", lambda: twice_cross_entropy, _classes),
    Loss("not convex", lambda: lambda z, y: (z.sin() * y + z[:, :1] * z[:, 1:2]).sum(1).mean(), _real),
]
BY_LOSS = {loss.name: loss for loss in LOSSES}
BY_LAYER = {layer.name: layer for layer in LAYERS}


def targets(loss: Loss) -> Tensor:
    return loss.targets(torch.Generator().manual_seed(2))


def cut(x: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Ragged batches of the same data."""
    return [(x[:3], y[:3]), (x[3:], y[3:])]


def dense_jacobian(outputs: Tensor, params: list[Tensor]) -> Tensor:
    """Return the Jacobian of all outputs in all parameters, (numel, n), row by row."""
    rows = []
    for z in outputs.reshape(-1):
        grads = torch.autograd.grad(z, params, retain_graph=True, allow_unused=True)
        rows.append(
            torch.cat(
                [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params, strict=True)]
            )
        )
    return torch.stack(rows)


def output_hessian(loss: Callable[..., Tensor], outputs: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian of torch's own loss in all outputs of the data, (numel, numel)."""
    flat = torch.autograd.functional.hessian(lambda z: loss(z, y), outputs.detach())
    assert isinstance(flat, Tensor)
    size = outputs.numel()
    return flat.reshape(size, size)


def ggn(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the Gauss-Newton matrix of the data as one batch, (n, n)."""
    outputs = model(x)
    J = dense_jacobian(outputs, list(model.parameters()))
    return J.T @ output_hessian(loss, outputs, y) @ J


def hessian(model: nn.Module, loss: Callable[..., Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Return the Hessian of the data as one batch, (n, n)."""
    params: list[Tensor] = list(model.parameters())
    grads = torch.autograd.grad(loss(model(x), y), params, create_graph=True)
    return dense_jacobian(torch.cat([g.reshape(-1) for g in grads]), params)
