"""Dense matrices by the book, to compare operators with. Nothing here comes from the package under test.

Losses are written out for one site (an example, a token, a pixel) and summed over all sites; second derivatives come
row by row from autograd, from `torch.func` on the written-out loss, or from differences of a gradient.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Batches: TypeAlias = "Sequence[tuple[Tensor, Tensor]]"
Forward: TypeAlias = "Callable[[Tensor], Tensor]"


@dataclass(frozen=True)
class Criterion:
    """A mean-reduced loss, written out."""

    sites: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(outputs, targets) -> outputs (S, C) and targets (S, ...) of the sites that count."""
    value: Callable[[Tensor, Tensor], Tensor]
    """Loss of one site, (C,), target -> ()."""
    terms_per_site: Callable[[Tensor], int]
    """What a site adds to the denominator, from its outputs (C,)."""
    distribution: Callable[[Tensor], list[tuple[Tensor, Tensor]]]
    """Outputs of one target -> (probability, target) pairs under which second moments of gradients are the model's."""

    def split(self, z: Tensor, y: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs and targets of a site as single targets: its entries, where each has a loss of its own."""
        return (
            [(z, y)]
            if self.terms_per_site(z) == 1 and len(z) > 1
            else [(z[i, None], y[i, None]) for i in range(len(z))]
        )


def _class_sites(outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    Z, y = outputs.movedim(1, -1).reshape(-1, outputs.shape[1]), targets.reshape(-1)
    return Z[y != -100], y[y != -100]


def _classes(z: Tensor) -> list[tuple[Tensor, Tensor]]:
    return [(p, torch.tensor(c)) for c, p in enumerate(z.exp() / z.exp().sum())]


def _normal(z: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Two points with the mean z and the variance 1/2 of the density exp(-(z - y)^2) / pi^(1/2)."""
    return [(torch.tensor(0.5, dtype=z.dtype), z + sign * 0.5**0.5) for sign in (-1, 1)]


def _coin(z: Tensor) -> list[tuple[Tensor, Tensor]]:
    s = 1 / (1 + (-z).exp())
    return [(s.squeeze(), torch.ones_like(z)), (1 - s.squeeze(), torch.zeros_like(z))]


CROSS_ENTROPY = Criterion(
    _class_sites, lambda z, y: z.exp().sum().log() - (z * one_hot(y, z)).sum(), lambda _: 1, _classes
)
SQUARED_ERROR = Criterion(
    lambda z, y: (z.reshape(len(z), -1), y.reshape(len(y), -1)), lambda z, y: ((z - y) ** 2).sum(), len, _normal
)
BINARY_CROSS_ENTROPY = Criterion(
    lambda z, y: (z.reshape(len(z), -1), y.reshape(len(y), -1)),
    lambda z, y: ((1 + z.exp()).log() - y * z).sum(),
    len,
    _coin,
)


def one_hot(y: Tensor, z: Tensor) -> Tensor:
    return (torch.arange(len(z)) == y).to(z)


@contextlib.contextmanager
def twice_differentiable_attention() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def total_loss(forward: Forward, batches: Batches, criterion: Criterion) -> Tensor:
    """Return the sum of the losses of all sites over their number; batch i runs under the random state `i`."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for z, y in all_sites(forward, batches, criterion):
        total = total + criterion.value(z, y)
        count += criterion.terms_per_site(z)
    return total / count


def all_sites(forward: Forward, batches: Batches, criterion: Criterion) -> list[tuple[Tensor, Tensor]]:
    pairs: list[tuple[Tensor, Tensor]] = []
    with torch.random.fork_rng(devices=[]):
        for i, (x, y) in enumerate(batches):
            torch.manual_seed(i)
            pairs += zip(*criterion.sites(forward(x), y), strict=True)
    return pairs


def flat_gradient(value: Tensor, params: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
    """Return the gradient of a scalar, (n,), with zeros where there is no dependence."""
    if not value.requires_grad:
        return torch.zeros(sum(p.numel() for p in params), dtype=value.dtype)
    grads = torch.autograd.grad(value, params, create_graph=create_graph, retain_graph=True, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for g, p in zip(grads, params, strict=True)]
    )


def dense_hessian(loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Tensor:
    """Return the Hessian of `loss()` in `params`, (n, n), one row at a time."""
    with twice_differentiable_attention():
        gradient = flat_gradient(loss(), params, create_graph=True)
        return torch.stack([flat_gradient(entry, params) for entry in gradient])


def dense_ggn(forward: Forward, batches: Batches, criterion: Criterion, params: Sequence[Tensor]) -> Tensor:
    """Return the Gauss-Newton matrix (n, n): the sum over sites of J' L J, over the number of loss terms."""
    n = sum(p.numel() for p in params)
    G, count = torch.zeros(n, n, dtype=torch.float64), 0
    with twice_differentiable_attention():
        for z, y in all_sites(forward, batches, criterion):
            J = torch.stack([flat_gradient(entry, params) for entry in z])
            L = torch.func.jacrev(torch.func.grad(criterion.value))(z.detach(), y)
            G += J.T @ L @ J
            count += criterion.terms_per_site(z)
    return G / count


def example_gradients(
    forward: Forward, batches: Batches, criterion: Criterion, params: Sequence[Tensor], per: str
) -> tuple[Tensor, Tensor]:
    """Return the shares (N,), which add up to 1, and the gradients (N, n) of single examples, one at a time."""
    shares, gradients = [], []
    with twice_differentiable_attention(), torch.random.fork_rng(devices=[]):
        for i, (x, y) in enumerate(batches):
            torch.manual_seed(i)
            z = forward(x)
            for row in range(len(z)):
                sites = zip(*criterion.sites(z[row, None], y[row, None]), strict=True)
                targets = [target for site in sites for target in criterion.split(*site)]
                for group in [targets] if per == "example" else [[target] for target in targets]:
                    if group:
                        loss = torch.stack([criterion.value(*target) for target in group]).mean()
                        shares.append(len(group))
                        gradients.append(flat_gradient(loss, params))
    p = torch.tensor(shares, dtype=torch.float64)
    return p / p.sum(), torch.stack(gradients)


def dense_fisher(forward: Forward, batches: Batches, criterion: Criterion, params: Sequence[Tensor]) -> Tensor:
    """Return the mean over targets of E g g', the expectation over what the model itself would answer, one by one."""
    n = sum(p.numel() for p in params)
    F, count = torch.zeros(n, n, dtype=torch.float64), 0
    with twice_differentiable_attention():
        for site in all_sites(forward, batches, criterion):
            for z, _ in criterion.split(*site):
                for probability, y in criterion.distribution(z.detach()):
                    g = flat_gradient(criterion.value(z, y), params)
                    F += probability * g[:, None] * g
                count += 1
    return F / count


def dense_jacobian(forward: Forward, batches: Batches, params: Sequence[Tensor]) -> Tensor:
    """Return the derivatives of all outputs (M, n), one row at a time; batch i runs under the random state `i`."""
    rows = []
    with twice_differentiable_attention(), torch.random.fork_rng(devices=[]):
        for i, (x, _) in enumerate(batches):
            torch.manual_seed(i)
            rows += [flat_gradient(entry, params) for entry in forward(x).reshape(-1)]
    return torch.stack(rows)


def derivative_along(
    gradient: Callable[[], Tensor], params: Sequence[Tensor], v: Tensor, *, step: float = 1e-3
) -> Tensor:
    """Return the derivative of a gradient along v (n,), by differences of fourth order; `params` are put back."""
    originals = [p.detach().clone() for p in params]
    parts = v.split([p.numel() for p in params])
    total = torch.zeros_like(v)
    for shift, factor in ((1, 8.0), (-1, -8.0), (2, -1.0), (-2, 1.0)):
        with torch.no_grad():
            for p, original, part in zip(params, originals, parts, strict=True):
                p.copy_(original + shift * step * part.view(p.shape))
        total += factor / (12 * step) * gradient().detach()
    with torch.no_grad():
        for p, original in zip(params, originals, strict=True):
            p.copy_(original)
    return total
