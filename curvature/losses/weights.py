"""Does a loss divide by what its batches are counted by? Found on the outputs alone, by cutting them in two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.errors import CurvatureError, DataError
from curvature.losses.rules import AnyLoss, LossRule

__all__ = ["Fit", "WeightsOfBatches", "fit_of_loss"]

_MOST_ENTRIES = 2**22  # of outputs that a loss is tried on
_KEPT = 8  # outputs of the first batch, to be joined to those of others


@dataclass(frozen=True)
class Fit:
    """How a loss over a batch goes with the losses over its two parts."""

    kind: Literal["fits", "weights", "coupled"]
    message: str = ""


def fit_of_loss(rule: LossRule, outputs: Sequence[Tensor], targets: Sequence[Any]) -> Fit:
    """Compare a loss on outputs with that on two parts of them. Cost: two losses; on a mismatch two gradients more.

    Args:
        rule: of the loss.
        outputs: of the whole and of its two parts, which are its rows.
        targets: likewise.
    """
    leaves = [z.detach().requires_grad_() for z in outputs]
    with torch.inference_mode(False), torch.enable_grad():
        losses = [rule.value(z, t).reshape(()) for z, t in zip(leaves, targets, strict=True)]
    counts = (
        [1.0] * 3 if rule.reduction == "sum" else [rule.num_terms(z, t) for z, t in zip(leaves, targets, strict=True)]
    )
    terms = [n * float(loss.detach()) if n else 0.0 for n, loss in zip(counts, losses, strict=True)]
    eps = torch.finfo(outputs[0].dtype).eps
    tolerance, close = min(100 * eps, 0.02), min(1e3 * eps, 0.05)
    if abs(terms[0] - terms[1] - terms[2]) <= tolerance * sum(map(abs, terms)):
        return Fit("fits")
    whole, first, second = (
        torch.autograd.grad(loss, z, allow_unused=True)[0] if loss.requires_grad else None
        for loss, z in zip(losses, leaves, strict=True)
    )
    if whole is None:
        return Fit("coupled", "its value on a batch is not the mean of its values on parts")
    shares = []
    for of_whole, alone in zip(whole.split([len(leaves[1]), len(leaves[2])]), (first, second), strict=True):
        of_part = torch.zeros_like(of_whole) if alone is None else alone.nan_to_num()
        size = float(of_part.double().square().sum())
        share = float((of_whole.double() * of_part.double()).sum()) / size if size else 0.0
        if not float((of_whole - share * of_part).norm()) <= close * float(whole.norm()):
            return Fit("coupled", "its derivatives on a part depend on the rest of the batch")
        shares.append(share)
    if abs(shares[0] - 1) + abs(shares[1] - 1) <= close:
        return Fit(
            "weights",
            "the loss adds up over a batch instead of averaging; divide it by their number, or say so by an argument "
            "reduction='sum' among its defaults",
        )
    values = [share * float(loss.detach()) if share else 0.0 for share, loss in zip(shares, losses[1:], strict=True)]
    rounding = close * (abs(float(losses[0].detach())) + sum(map(abs, values)))
    if not abs(float(losses[0].detach()) - sum(values)) <= rounding or not abs(sum(shares) - 1) <= close:
        return Fit("coupled", "its value on a batch is not a mean of its values on parts")
    return Fit(
        "weights",
        f"a part that was counted as {100 * counts[1] / counts[0] if counts[0] else 0:.3g} % of its batch has "
        f"{100 * shares[0]:.3g} % of the weight in the loss (masks, ignored targets or class weights of its own?)",
    )


class WeightsOfBatches:
    """Finds, while batches are evaluated, whether a custom loss divides by what its batches are counted by.

    Where there are several batches, each is cut in two, and joined to some outputs of the first, once.
    """

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._first: tuple[Tensor, Tensor] | None = None
        self._pending: str | None = None

    def see(self, rule: LossRule, outputs: Any, targets: Any, index: int) -> None:
        """Test a batch, unless its place was tested before; of a first batch nothing is said before a second comes.

        Raises:
            DataError: if the weights of batches are not what the loss divides by.
        """
        if index in self._seen or not isinstance(rule, AnyLoss) or rule.reduction == "sum":
            return
        self._seen.add(index)
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or not isinstance(targets, Tensor):
            return
        n = max(2, min(len(outputs), _MOST_ENTRIES // max(1, outputs[0].numel() if len(outputs) else 1)))
        found = self._cut(rule, outputs[:n], targets if len(targets) != len(outputs) else targets[:n])
        if index == 0:
            if targets.ndim > 0 and len(targets) == len(outputs):
                self._first = outputs[:_KEPT].detach().clone(), targets[:_KEPT].detach().clone()
            self._pending = found
            return
        found = self._pending or found or self._joined(rule, outputs[:_KEPT], targets[:_KEPT])
        if found is not None:
            raise DataError(
                f"how much each batch counts is not known: {found}. Pass weight= (batch -> number, what the loss of "
                "that batch divides by) to the objective."
            )

    def _cut(self, rule: LossRule, outputs: Tensor, targets: Tensor) -> str | None:
        if len(outputs) < 2 or targets.ndim == 0 or len(targets) != len(outputs):
            return None
        at = max(1, 7 * len(outputs) // 16)
        parts = [(outputs, targets), (outputs[:at], targets[:at]), (outputs[at:], targets[at:])]
        return _problem(rule, parts)

    def _joined(self, rule: LossRule, outputs: Tensor, targets: Tensor) -> str | None:
        if self._first is None or len(outputs) != len(targets):
            return None
        (z, t), outputs = self._first, outputs.detach()
        if z.shape[1:] != outputs.shape[1:] or t.shape[1:] != targets.shape[1:] or z.dtype != outputs.dtype:
            return None
        return _problem(rule, [(torch.cat([z, outputs]), torch.cat([t, targets])), (z, t), (outputs, targets)])


def _problem(rule: LossRule, parts: Sequence[tuple[Tensor, Tensor]]) -> str | None:
    """Return what is wrong with the weights; a loss that compares examples, or cannot be cut, has no right ones."""
    try:
        fit = fit_of_loss(rule, [z for z, _ in parts], [t for _, t in parts])
    except CurvatureError:
        raise
    except Exception:  # whatever the loss raises on a part; nothing is known then
        return None
    return fit.message if fit.kind == "weights" else None
