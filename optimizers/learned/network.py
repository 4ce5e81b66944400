"""The network inside the learned optimizer: what it sees of every entry of a tensor, and what it says.

The same code moves one model and, in meta-training, many copies of a model under many networks at once: the leading
dimension is that of copies.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from torch import Tensor

from curvature.errors import InputError

__all__ = ["DECAYS", "NUM_WEIGHTS", "SQUARES", "WEIGHTS", "initial_weights", "load_weights", "update"]

DECAYS = (0.5, 0.9, 0.99)
"""Of the averages of the gradient."""
SQUARES = (0.9, 0.99)
"""Of the averages of its square."""
WEIGHTS = Path(__file__).parent / "weights.json"
_LOG = 4.0
"""Logarithms are seen divided by this."""
_SEEN, _HIDDEN = 18, 16
_PARTS = (_SEEN * _HIDDEN, _HIDDEN, _HIDDEN * 2, _SEEN * 2, 2)
NUM_WEIGHTS = sum(_PARTS)
"""Entries of the flat vector: the hidden layer with its biases, the last layer, the direct one beside them, biases."""


def initial_weights(seed: int = 0) -> Tensor:
    """Return the network that answers with Adam of rate 0.06."""
    weights = torch.zeros(NUM_WEIGHTS)
    hidden, *_, last = weights.split(list(_PARTS))
    hidden.normal_(std=_SEEN**-0.5, generator=torch.Generator().manual_seed(seed))
    last[0] = math.log(0.06)
    return weights


def load_weights(path: Path | str = WEIGHTS) -> Tensor:
    """Return the flat vector of weights, (NUM_WEIGHTS,), that a file holds.

    Raises:
        InputError: if it is missing or holds none.
    """
    try:
        weights = json.loads(Path(path).read_text(encoding="utf-8"))["weights"]
        found = torch.tensor(weights, dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} holds no weights of a learned optimizer ({type(error).__name__}: {error}); give a file that "
            "python -m benchmarks.learned.train wrote."
        ) from error
    if found.shape != (NUM_WEIGHTS,) or not bool(found.isfinite().all()):
        raise InputError(f"{path} must hold {NUM_WEIGHTS} finite weights, got {found.numel()}; train them anew.")
    return found


def update(
    weights: Tensor,
    p: Tensor,
    g: Tensor,
    means: list[Tensor],
    squares: list[Tensor],
    *,
    shape: tuple[int, ...],
    step: int,
    num_steps: int,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return what to add to a tensor's entries, and the averages with this gradient in them.

        m_b <- b m_b + (1 - b) g,   v_b <- b v_b + (1 - b) g^2,   both corrected for their start
        change = -exp(s) (m_.9 / v_.99^(1/2) + d),   s and d the network's answers for the entry

    Args:
        weights: (copies, NUM_WEIGHTS), a network for each copy.
        p: entries of one tensor, (copies, n).
        g: its gradient, (copies, n).
        means: of the gradient, for each of `DECAYS`, (copies, n).
        squares: of its square, for each of `SQUARES`, (copies, n).
        shape: of the tensor.
        step: which step this is, 1 the first.
        num_steps: that the training will take; later steps are as the last.
    """
    means = [m.lerp(g, 1 - b) for m, b in zip(means, DECAYS, strict=True)]
    squares = [v.lerp(g * g, 1 - b) for v, b in zip(squares, SQUARES, strict=True)]
    least = torch.finfo(p.dtype).tiny ** 0.5
    roots = [(v / (1 - b**step)).sqrt() for v, b in zip(squares, SQUARES, strict=True)]
    moved = roots[-1] > least
    inverse = torch.where(moved, 1 / roots[-1].clamp_min(least), 0.0)
    u = [m * inverse / (1 - b**step) for m, b in zip(means, DECAYS, strict=True)]
    x = _features(p, g * inverse, u, roots, moved, shape, min(step, num_steps), num_steps)
    hidden, bias, last, direct, offset = weights.split(_PARTS, dim=-1)
    h = torch.baddbmm(bias[..., None], hidden.unflatten(-1, (_HIDDEN, _SEEN)), x).tanh_()
    answer = torch.baddbmm(offset[..., None], last.unflatten(-1, (2, _HIDDEN)), h)
    answer = torch.baddbmm(answer, direct.unflatten(-1, (_SEEN, 2)).mT, x)
    change = -answer[:, 0].clamp(-30, 5).exp() * torch.where(moved, u[1] + answer[:, 1], 0.0)
    return change, means, squares


def _features(
    p: Tensor,
    g: Tensor,
    u: list[Tensor],
    roots: list[Tensor],
    moved: Tensor,
    shape: tuple[int, ...],
    step: int,
    num_steps: int,
) -> Tensor:
    """Return what the network sees of every entry, (copies, 18, n); nothing depends on the scale of the loss."""
    n = p.shape[-1]
    least = torch.finfo(p.dtype).tiny ** 0.5
    size = p.square().mean(-1, keepdim=True).sqrt()
    typical = roots[-1].mean(-1, keepdim=True)
    log = [root.clamp_min(least).log() for root in roots]
    relative = torch.where(moved, log[-1] - typical.clamp_min(least).log(), 0.0)
    faster = torch.where(moved, log[0] - log[-1], 0.0)
    x = p.new_empty(len(p), _SEEN, n)
    for i, own in enumerate((g, *u, p / (size + 1e-6), relative, faster)):
        torch.clamp(own, -4, 4, out=x[:, i])
    left = (num_steps - step + 1) / num_steps
    tensor = (size.clamp_min(1e-3).log() / _LOG, u[1].abs().mean(-1, keepdim=True), u[2].abs().mean(-1, keepdim=True))
    for i, own in enumerate(tensor, 7):
        x[:, i] = own
    fan_in = math.prod(shape[1:])
    constants = (
        *(math.log(n) / 2 / _LOG, math.log(fan_in) / _LOG, float(len(shape) > 1)),
        *(math.log(left) / _LOG, step / num_steps, math.log(num_steps / 100) / _LOG),
        *(math.exp(-step / 3), math.exp(-step / 30)),
    )
    x[:, 10:] = p.new_tensor(constants)[:, None]
    return x
