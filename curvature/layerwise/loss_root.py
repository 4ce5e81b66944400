"""Square roots of a loss's Hessian in the model's outputs, example by example.

A diagonal, or a Kronecker factor, of a Gauss-Newton matrix is a sum of squares of pulled-back columns:

    H_n = sum_v s_v r_vn r_vn',   diag G = sum_n sum_v s_v (J_n' r_vn)^2

with H_n the Hessian of the reduced loss in the outputs of example n, and signs s_v that are -1 only where the loss is
not convex in the outputs. Whatever the loss normalises by, ignores or weights is thus in the columns, and what pulls
them back need know nothing of losses.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.engine.beside import refuse_what_is_beside
from curvature.engine.evaluation import Evaluation
from curvature.errors import InputError
from curvature.generators import as_generator
from curvature.losses.rules import BinaryCrossEntropyWithLogits, CrossEntropy, LossRule, SquaredError

__all__ = ["LossRoot", "UnsupportedError", "check_sampling", "loss_root", "loss_root_alone"]

Draw = Literal["ggn-mc", "fisher-mc"]


class UnsupportedError(Exception):
    """Why a way to compute something does not serve here. Never leaves the package."""


class LossRoot(ABC):
    """The columns r_v of all examples at once.

    Attributes:
        shape: of the outputs, (N, ...).
        num_columns: V, how many columns an example has.
        num_positive: how many of them, the first ones, have the sign +1.
    """

    def __init__(self, shape: torch.Size, num_columns: int, num_positive: int | None = None) -> None:
        self.shape = shape
        self.num_columns = num_columns
        self.num_positive = num_columns if num_positive is None else num_positive

    @abstractmethod
    def columns(self, start: int, stop: int, examples: slice = slice(None)) -> Tensor:
        """Return columns start to stop of some examples, (k, N', ...)."""

    @abstractmethod
    def combined(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        """Return sum_v z_vn r_vn with independent signs z, (N, ...), for each sign that occurs, and the sign."""

    def labelled(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:  # noqa: ARG002
        """Return the loss gradient of targets that the model's own distribution draws, (N, ...)."""
        raise InputError(
            "kind='fisher-mc' draws targets from the model's distribution, which is known for cross-entropy, squared "
            "error and binary cross-entropy with logits only; use kind='ggn-mc', which serves any loss."
        )

    def draw(self, kind: Draw, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        """Return random columns whose signed outer product has the mean H_n, independent over examples."""
        return self.combined(generator) if kind == "ggn-mc" else self.labelled(generator)

    def bounds(self, width: int) -> list[tuple[int, int, float]]:
        """Return (start, stop, sign) of runs of at most `width` columns that cover all of them."""
        runs = []
        for first, last, sign in ((0, self.num_positive, 1.0), (self.num_positive, self.num_columns, -1.0)):
            runs += [(i, min(i + width, last), sign) for i in range(first, last, width)]
        return runs


class DiagonalRoot(LossRoot):
    """Losses that act on every output alone: H_n = diag(d_n), d >= 0."""

    def __init__(self, diagonal: Tensor, spread: Tensor, logits: Tensor | None) -> None:
        super().__init__(diagonal.shape, diagonal[0].numel() if diagonal.ndim else 1)
        self._root = diagonal.sqrt().reshape(len(diagonal), -1)
        self._spread, self._logits = spread.sqrt(), logits

    def columns(self, start: int, stop: int, examples: slice = slice(None)) -> Tensor:
        root = self._root[examples]
        columns = root.new_zeros(stop - start, *root.shape)
        place = torch.arange(stop - start, device=root.device)
        columns[place, :, start + place] = root[:, start:stop].T
        return columns.reshape(stop - start, len(root), *self.shape[1:])

    def combined(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        return [((self._root * _signs(self._root, generator)).reshape(self.shape), 1.0)]

    def labelled(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        if self._logits is None:  # squared error: a normal distribution around the outputs
            noise = 2**0.5 * torch.erfinv(2 * _uniform(self._spread.expand(self.shape), generator) - 1)
            return [(self._spread * noise, 1.0)]
        s = self._logits.sigmoid()
        return [(self._spread * (s - (_uniform(s, generator) < s).to(s.dtype)), 1.0)]


class SoftmaxRoot(LossRoot):
    """Cross-entropy: at a site of weight a, H = a (diag p - p p'), of rank C - 1.

    Its columns are those of the Cholesky factor, which holds no differences: with t_c = sum_{i > c} p_i,
    r_c = sqrt(a p_c t_c / (p_c + t_c)) (e_c - sum_{i > c} p_i e_i / t_c), and none for the last class.
    """

    def __init__(self, shape: torch.Size, p: Tensor, site_weight: Tensor) -> None:
        self._each = max(1, p.shape[2] - 1)
        super().__init__(shape, p.shape[1] * self._each)
        self._p, self._a = p, site_weight  # (N, T, C), (N, T)

    def columns(self, start: int, stop: int, examples: slice = slice(None)) -> Tensor:
        p, a = self._p[examples], self._a[examples]
        v = torch.arange(start, stop, device=p.device)
        site, c = v // self._each, v % self._each
        k = torch.arange(len(v), device=p.device)
        later = torch.arange(p.shape[2], device=p.device) > c[:, None]
        q = p[:, site].movedim(1, 0)  # (k, N, C)
        after = q * later.unsqueeze(1)
        own, t = q[k, :, c], after.sum(-1)
        tiny = torch.finfo(p.dtype).tiny
        column = -after / t.clamp_min(tiny).unsqueeze(-1)
        column[k, :, c] = 1
        column *= (a[:, site].T * own * (t / (own + t).clamp_min(tiny))).sqrt().unsqueeze(-1)
        full = p.new_zeros(len(v), *p.shape)
        full[k, :, site] = column
        return self._shaped(full)

    def combined(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        u = self._p.sqrt() * _signs(self._p, generator)
        column = (u - self._p * u.sum(-1, keepdim=True)) * self._a.sqrt().unsqueeze(-1)
        return [(self._shaped(column[None])[0], 1.0)]

    def labelled(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        p = self._p.reshape(-1, self._p.shape[-1])
        cdf = p.cumsum(1)
        label = torch.searchsorted(cdf, _uniform(cdf[:, -1:], generator) * cdf[:, -1:]).clamp_(max=p.shape[1] - 1)
        column = p.scatter_add(1, label, -torch.ones_like(label, dtype=p.dtype)).reshape(self._p.shape)
        return [(self._shaped((column * self._a.sqrt().unsqueeze(-1))[None])[0], 1.0)]

    def _shaped(self, columns: Tensor) -> Tensor:
        """(k, N, T, C) -> (k, N, C, ...)."""
        k, n = columns.shape[:2]
        if len(self.shape) == 1:
            return columns.reshape(k, *self.shape)
        return columns.movedim(3, 2).reshape(k, n, *self.shape[1:])


class DenseRoot(LossRoot):
    """Any loss: the eigendecomposition of each example's Hessian, (N, D, D)."""

    def __init__(self, shape: torch.Size, H: Tensor) -> None:
        values, vectors = torch.linalg.eigh(H)
        floor = H.shape[-1] * torch.finfo(H.dtype).eps * values.abs().amax(-1, keepdim=True)
        values = values.where(values.abs() > floor, 0)  # rounding would make a convex loss look indefinite
        self._parts: list[Tensor] = []  # per sign (N, D, k)
        for sign in (1.0, -1.0):
            used = (sign * values > 0).any(0)
            self._parts.append((vectors * (sign * values).clamp_min(0).sqrt().unsqueeze(1))[:, :, used])
        super().__init__(shape, sum(part.shape[2] for part in self._parts), self._parts[0].shape[2])
        self._root = torch.cat(self._parts, dim=2)

    def columns(self, start: int, stop: int, examples: slice = slice(None)) -> Tensor:
        part = self._root[examples, :, start:stop]
        return part.movedim(2, 0).reshape(stop - start, len(part), *self.shape[1:])

    def combined(self, generator: torch.Generator) -> list[tuple[Tensor, float]]:
        draws = []
        for part, sign in zip(self._parts, (1.0, -1.0), strict=True):
            if part.shape[2]:
                z = _signs(part[:, 0], generator)
                draws.append((torch.einsum("ndk,nk->nd", part, z).reshape(self.shape), sign))
        return draws


def loss_root_alone(rule: LossRule, evaluation: Evaluation, params: Sequence[Tensor]) -> LossRoot:
    """Return the root for a batch whose loss depends on the parameters through the outputs alone.

    Raises:
        UnsupportedError: if it depends on them by other ways; if the loss couples examples.
    """
    outputs = evaluation.outputs
    assert outputs is not None
    try:
        refuse_what_is_beside(evaluation.loss, outputs, evaluation.targets, params)
    except InputError as error:
        raise UnsupportedError(str(error)) from error
    return loss_root(rule, outputs, evaluation.targets)


def loss_root(rule: LossRule, outputs: Tensor, targets: Any) -> LossRoot:
    """Return the root of a reduced loss's Hessian at some outputs (N, ...), whose first dimension counts examples.

    Cost: none for cross-entropy, squared error and binary cross-entropy with logits; for any other loss one product
    with the loss Hessian an output of an example, and an eigendecomposition of (N, D, D).

    Raises:
        UnsupportedError: if the loss couples examples.
    """
    outputs = outputs.detach()
    H = rule.output_hessian(outputs, targets)
    if isinstance(rule, CrossEntropy):
        dim = 1 if outputs.ndim > 1 else 0
        logits = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        a = rule._site_weights(logits, targets, dim) * rule._scale(outputs, targets)
        if bool((a >= 0).all()):
            p = logits.softmax(dim).movedim(dim, -1)
            examples = outputs.shape[0] if outputs.ndim > 1 else 1
            p = p.reshape(examples, -1, p.shape[-1])
            return SoftmaxRoot(outputs.shape, p, a.reshape(examples, -1))
    if isinstance(rule, (SquaredError, BinaryCrossEntropyWithLogits)) and outputs.ndim > 0:
        diagonal = H(torch.ones_like(outputs))
        if bool((diagonal >= 0).all()):
            if isinstance(rule, SquaredError):
                return DiagonalRoot(diagonal, diagonal, None)
            flat = torch.zeros_like(outputs)  # there s (1 - s) = 1/4: what is left is the weight of the entry
            spread = 4 * rule.output_hessian(flat, targets)(torch.ones_like(outputs))
            return DiagonalRoot(diagonal, spread, outputs.to(diagonal.dtype))
    return DenseRoot(outputs.shape, _blocks(H, outputs))


def _blocks(H: Callable[[Tensor], Tensor], outputs: Tensor) -> Tensor:
    """Return the Hessian of each example in its outputs, (N, D, D), and make sure that there is nothing between them.

    Raises:
        UnsupportedError: if the loss couples examples.
    """
    n, d = outputs.shape[0] if outputs.ndim else 1, outputs[0].numel() if outputs.ndim else 1
    rows = []
    for i in range(d):
        u = outputs.new_zeros(n, d)
        u[:, i] = 1
        rows.append(H(u.reshape(outputs.shape)).reshape(n, d).detach())
    blocks = torch.stack(rows, dim=2)
    probe = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(blocks)
    expected = torch.einsum("nij,nj->ni", blocks, probe)
    found = H(probe.to(outputs.dtype).reshape(outputs.shape)).reshape(n, d)
    eps = torch.finfo(outputs.dtype).eps
    if bool((found - expected).norm() > 100 * d * eps * expected.norm()) or not bool(torch.isfinite(blocks).all()):
        raise UnsupportedError("the loss couples the examples of a batch")
    return (blocks + blocks.mT) / 2


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    return (2 * (_uniform(like, generator) < 0.5) - 1).to(like)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from (0, 1), one number after the other: on a CPU the numbers of two draws are those of a joint one."""
    u = torch.rand(like.shape, generator=generator, device=generator.device, dtype=torch.float64)
    return u.clamp_(min=2.0**-54).to(like.device).to(like.dtype).clamp_(max=1 - torch.finfo(like.dtype).eps / 2)


def check_sampling(
    objective: Any, kind: str, mc_samples: Any, generator: Any, max_columns: Any, *, draws: bool
) -> torch.Generator | None:
    """Refuse arguments of what is computed from columns of a loss's root, and return what it draws from.

    Raises:
        InputError: with the argument, what is allowed and what was given.
    """
    if kind != "hessian" and not objective.has_split:
        raise InputError(
            f"kind={kind!r} needs the split between model and loss: give the objective loss= and a forward that "
            "returns (outputs, targets), instead of loss=None."
        )
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise InputError(f"mc_samples must be an integer of at least 1, got {mc_samples!r}.")
    if draws and generator is None:
        raise InputError(f"kind={kind!r} draws at random: pass generator=, e.g. torch.Generator().manual_seed(0).")
    if max_columns is not None and max_columns < 1:
        raise InputError(f"max_columns must be at least 1, or None, got {max_columns!r}.")
    return as_generator(generator) if isinstance(generator, int) else generator
