"""Are the examples of a batch functions of their own? Found by cutting a batch in two.

With l a loss that is a mean over what a batch S counts, w that number, and A and B the two parts of S,

    w_S l_S = w_A l_A + w_B l_B

in value and gradient, unless the model or the loss compares examples (batch statistics, contrastive losses, rankings),
or w is not what the loss divides by (masks or class weights of its own). No list of such layers and losses is kept.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from curvature.autograd.backward import joined, no_autocast, pull_back, walk
from curvature.data.parts import take, ways_to_cut
from curvature.engine.evaluation import Evaluation, Evaluator
from curvature.environment.device import is_gpu
from curvature.errors import CurvatureError
from curvature.losses.weights import fit_of_loss
from curvature.objective.steady_draws import SteadyDraws

__all__ = ["Cuts", "Verdict", "cut_in_two"]

_MOST = 16  # examples that a batch is tested on
_CHUNK = 1 << 22  # entries that are compared at a time


@dataclass(frozen=True)
class Verdict:
    """What cutting a batch showed.

    Attributes:
        coupled: why its examples are not functions of their own; None if they are.
        weights: why the parts do not count as much as the loss has them count; None if they do.
        gap: largest relative difference between the batch and the sum of its parts.
        refused: whether the reason is that a part could not be evaluated.
    """

    coupled: str | None = None
    weights: str | None = None
    gap: float = 0.0
    refused: bool = False

    @property
    def problem(self) -> str | None:
        return self.coupled or self.weights


class Cuts:
    """Verdicts on an objective, one for each mode of its model."""

    def __init__(self) -> None:
        self._found: dict[tuple[bool, ...], Verdict] = {}

    def forget(self) -> None:
        """Cut anew at the next use: model, loss or data have changed."""
        self._found.clear()

    def verdict(
        self, evaluator: Evaluator, batch: Any, index: int, *, of_examples: bool = False, any_way: bool = False
    ) -> Verdict:
        """Cut a batch in two, once for a mode of the model. Cost: two gradients of at most 16 examples.

        A batch of one example tells nothing and is not remembered.

        Args:
            evaluator: of the objective.
            batch: on the device of the parameters.
            index: its place in the data.
            of_examples: count by the loss's own terms, whatever whole batches are said to count by `weight=`.
            any_way: examples may lie otherwise than along the first dimension of the first tensor.
        """
        of_examples = of_examples and evaluator.weight is not None
        key = (of_examples, any_way, *(module.training for module in evaluator.model.modules()))
        if key not in self._found:
            if of_examples:
                evaluator = copy.copy(evaluator)
                evaluator.weight = None
            verdict = cut_in_two(evaluator, batch, index, any_way=any_way)
            if verdict is None:
                return Verdict()
            self._found[key] = verdict
        return self._found[key]


def cut_in_two(
    evaluator: Evaluator, batch: Any, index: int, share: float = 0.5, *, any_way: bool = True
) -> Verdict | None:
    """Compare a batch, or some of its examples, with its two parts; None if it holds one example.

    Args:
        evaluator: of the objective.
        batch: on the device of the parameters.
        index: its place in the data.
        share: of the examples in the first part, whose number is made odd, lest pairs stay together.
        any_way: try all ways in which the batch may hold examples; else the likeliest.
    """
    evaluator = copy.copy(evaluator)
    evaluator.batch_weights = None  # parts are no batches
    found: list[Verdict] = []
    for count, whole in itertools.islice(ways_to_cut(batch), None if any_way else 1):
        for size in dict.fromkeys((min(count, _MOST), count)):  # all of them, where some have nothing to tell
            if size < 2:
                continue
            rows = [i * count // size for i in range(size)]
            at = max(1, min(size - 1, int(share * size)))
            at -= at > 2 and at % 2 == 0
            for place, flattened in itertools.product(dict.fromkeys((at, size - 1, 1)), (False, True)):
                pieces = [take(whole, part, count, flattened=flattened) for part in (rows, rows[:place], rows[place:])]
                verdict = _compare(evaluator, pieces, index)
                if verdict is None or not verdict.refused:
                    break
            if verdict is not None:
                found.append(verdict)
                break
        if found and found[-1].problem is None:
            return found[-1]
    return found[0] if found else None


# -- one cut ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Part:
    evaluation: Evaluation
    """With its graph and its outputs only where they were to be kept."""
    gradient: list[Tensor | None]
    eps: float


class _Sum:
    """|S - A - B| / (|S| + |A| + |B|) of gradients that come one after another, each times its weight: one is held."""

    def __init__(self) -> None:
        self._rest: list[Tensor | None] = []
        self._unit, self._norms = 1.0, 0.0

    def add(self, part: _Part) -> None:
        """Take S, then A and B; the gradient is freed on the way."""
        first, weight = not self._rest, part.evaluation.weight
        if first:
            self._rest = [None] * len(part.gradient)
            self._unit = weight or 1.0  # so that nothing overflows that does not by itself
        factor = (1.0 if first else -1.0) * weight / self._unit
        self._norms += abs(factor) * _norm(part.gradient) if factor else 0.0
        for i, rest in enumerate(self._rest):
            g, part.gradient[i] = part.gradient[i], None
            if g is not None and factor:
                g = g.detach().to(torch.promote_types(g.dtype, torch.float32))
                self._rest[i] = g * factor if rest is None else rest.add_(g, alpha=factor)

    @property
    def gap(self) -> float | None:
        """The result, infinite for NaN; None where all is zero."""
        if self._norms == 0:
            return None
        gap = _norm(self._rest) / self._norms
        return gap if gap == gap else math.inf


def _norm(gradient: Sequence[Tensor | None]) -> float:
    """Return the norm, no square of which vanishes or overflows, with no vector in float64."""
    parts = [g.detach() for g in gradient if g is not None and g.numel() > 0]
    sizes = [max(map(abs, torch.stack(torch.aminmax(g)).tolist())) for g in parts]
    largest = math.nan if any(map(math.isnan, sizes)) else max(sizes, default=0.0)
    if not 0 < largest < math.inf:
        return largest
    squares = (float((c.double() / largest).square().sum()) for g in parts for c in g.flatten().split(_CHUNK))
    return largest * math.sqrt(sum(squares))


def _compare(evaluator: Evaluator, pieces: Sequence[Any], index: int) -> Verdict | None:
    """Return what three batches, the last two of which are the first, say; None where all is zero."""
    noise = None

    def evaluated() -> tuple[list[_Part], float | None]:
        gradients, found = _Sum(), []
        for piece in pieces:
            part = _evaluate(evaluator, piece, index, noise)
            gradients.add(part)
            found.append(replace(part, gradient=[]))
            del part
        return found, gradients.gap

    try:
        everything, of_gradient = evaluated()
        if everything[0].evaluation.drew_random_numbers:
            noise = SteadyDraws
            everything, of_gradient = evaluated()
    except CurvatureError as error:
        return Verdict(coupled=f"a part of a batch cannot be evaluated alone: {error}", refused=True)
    except Exception as error:  # whatever the model or the loss raises
        reason = " ".join(str(error).split())[:200]
        return Verdict(coupled=f"the model does not run on a part of a batch ({reason})", refused=True)
    eps = max(part.eps for part in everything)
    weights = [part.evaluation.weight for part in everything]
    if evaluator.rule is not None and evaluator.rule.reduction == "sum" and evaluator.weight is None:
        additive = True
    else:
        additive = abs(weights[0] - weights[1] - weights[2]) <= 1e-6 * sum(weights)
    of_loss = _gap([part.evaluation.loss.reshape(1) for part in everything], weights)
    if of_loss is None and of_gradient is None:
        return None
    gap = max(value for value in (of_loss, of_gradient, 0.0) if value is not None)
    close = (of_loss is None or of_loss <= min(200 * eps, 0.05)) and (of_gradient is None or of_gradient <= eps**0.5)
    if close and additive:
        return Verdict(gap=gap)
    kept = [_evaluate(evaluator, piece, index, noise, keep=True) for piece in pieces]
    return _explain(evaluator, kept, eps, gap)


def _gap(values: Sequence[Tensor], weights: Sequence[float] = (1.0, 1.0, 1.0)) -> float | None:
    """Return |S - A - B| / (|S| + |A| + |B|), each times its weight, infinite for NaN; None where all is zero."""
    sizes = [
        abs(w) * float(v.abs().max()) if v.numel() and w != 0 else 0.0 for v, w in zip(values, weights, strict=True)
    ]
    largest = max(sizes) if all(size == size for size in sizes) else math.nan
    if largest == 0:
        return None
    squares = torch.zeros(4, dtype=torch.float64)
    for chunk in zip(*(value.flatten().split(_CHUNK) for value in values), strict=True):  # no vector in float64
        parts = [
            c.double() * (w / largest) if w != 0 else torch.zeros_like(c) for c, w in zip(chunk, weights, strict=True)
        ]
        whole, first, second = parts  # squares might overflow
        squares += torch.stack([(whole - first - second).square().sum(), *(p.square().sum() for p in parts)]).cpu()
    apart, *norms = squares.sqrt().tolist()
    gap = apart / sum(norms)
    return gap if gap == gap else math.inf


def _explain(evaluator: Evaluator, parts: Sequence[_Part], eps: float, gap: float) -> Verdict:
    """Tell the model from the loss, by the outputs: is the model coupled, the loss, or are the weights not the loss's?

    Near a minimum losses and gradients may drown in rounding, which the outputs do not.
    """
    moved = "losses and gradients of a batch are not those of its parts together"
    rule = evaluator.rule
    outputs = [part.evaluation.outputs for part in parts if isinstance(part.evaluation.outputs, Tensor)]
    if rule is None:
        return _explain_scalar(evaluator, parts, eps, Verdict(coupled=f"{moved} ({gap:.1e} relative)", gap=gap))
    if len(outputs) != len(parts) or not all(z.ndim > 0 for z in outputs):
        return Verdict(coupled=f"{moved} ({gap:.1e} relative)", gap=gap)
    whole, first, second = outputs
    if len(whole) != len(first) + len(second) or whole.shape[1:] != first.shape[1:]:
        return Verdict(coupled="the outputs of a batch are not those of its parts, one after another", gap=gap)
    apart = torch.cat([first.detach(), second.detach()])
    of_outputs = _gap([whole.detach(), apart, torch.zeros_like(apart)]) or 0.0
    if not of_outputs <= min(1e3 * eps, 0.05):
        return Verdict(
            coupled=f"the model couples the examples of a batch (alone, their outputs differ by {of_outputs:.1e})",
            gap=gap,
        )
    u = torch.randn(whole.shape, generator=torch.Generator().manual_seed(0)).to(whole)
    pulled = [
        joined(_pulled(evaluator, z, v), evaluator.parameters)
        for z, v in zip(outputs, (u, *u.split([len(first), len(second)])), strict=True)
    ]
    of_jacobian = _gap(pulled) or 0.0
    if not of_jacobian <= eps**0.5:
        return Verdict(
            coupled=f"the model couples the examples of a batch in its derivatives ({of_jacobian:.1e} relative)",
            gap=gap,
        )
    targets = [part.evaluation.targets for part in parts]
    fit = fit_of_loss(rule, outputs, targets)
    if fit.kind == "coupled":
        return Verdict(coupled=f"the loss compares the examples of a batch ({fit.message})", gap=gap)
    if fit.kind == "weights":
        return Verdict(weights=fit.message, gap=gap)
    if evaluator.weight is not None:
        weights = [part.evaluation.weight for part in parts]
        shares = [rule.num_terms(z, t) for z, t in zip(outputs, targets, strict=True)]
        if shares[0] and not abs(weights[1] * shares[0] - shares[1] * weights[0]) <= 1e-6 * weights[0] * shares[0]:
            return Verdict(
                weights=f"weight= gives a batch {weights[0]:g} and its parts {weights[1]:g} and {weights[2]:g}, where "
                f"the loss counts {shares[0]:g}, {shares[1]:g} and {shares[2]:g} terms",
                gap=gap,
            )
    return Verdict(gap=gap)


def _explain_scalar(evaluator: Evaluator, parts: Sequence[_Part], eps: float, otherwise: Verdict) -> Verdict:
    """Say so, if the batch's loss is a mean of those of its parts, with other weights."""
    whole, *both = (joined(part.gradient, evaluator.parameters, torch.float64) for part in parts)
    basis = torch.stack(both, dim=1)
    shares = torch.linalg.lstsq(basis, whole[:, None], driver="gelsd" if basis.device.type == "cpu" else None).solution
    values = [float(part.evaluation.loss.detach()) for part in parts]
    tolerance = 10 * eps**0.5
    first, second = shares.flatten().tolist()
    fits = float((basis @ shares - whole[:, None]).norm()) <= tolerance * float(whole.norm())
    mean = abs(values[0] - first * values[1] - second * values[2]) <= tolerance * sum(map(abs, values))
    if not (fits and mean and abs(first + second - 1) <= tolerance):
        return otherwise
    counted = [part.evaluation.weight for part in parts]
    return Verdict(
        weights=f"of a batch's loss {100 * first:.3g} % come from the part that was counted as "
        f"{100 * counted[1] / counted[0] if counted[0] else 0:.3g} % of it",
        gap=otherwise.gap,
    )


# -- evaluation -------------------------------------------------------------------------------------------------------


def _evaluate(
    evaluator: Evaluator, piece: Any, index: int, noise: Callable[[], Any] | None, *, keep: bool = False
) -> _Part:
    with evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()):
        with contextlib.nullcontext() if noise is None else noise():
            evaluation = None if keep else _in_blocks(evaluator, piece, index)
            evaluation = evaluator.evaluate(piece, index) if evaluation is None else evaluation
        loss = evaluation.loss
        with no_autocast(loss.device):
            gradients = (
                pull_back([loss], evaluator.parameters, retain_graph=keep)
                if loss.requires_grad
                else [None] * len(evaluator.parameters)
            )
    dtypes = {p.dtype for p in evaluator.parameters} | {
        entry.dtype for node in walk([loss.grad_fn]) for entry in node._input_metadata if entry.dtype.is_floating_point
    }
    eps = max(torch.finfo(dtype).eps for dtype in dtypes)
    if evaluator.allow_tf32 and is_gpu(loss.device):
        eps = max(eps, 2.0**-11)
    if not keep:
        evaluation = replace(evaluation, loss=loss.detach(), outputs=None)
    return _Part(evaluation, list(gradients), eps)


def _in_blocks(evaluator: Evaluator, piece: Any, index: int) -> Evaluation | None:
    """Evaluate with a head whose logits are never whole; None where there is none, or it does not go."""
    blocks = evaluator.head_in_blocks()
    if blocks is None:
        return None
    with contextlib.suppress(Exception):  # the model's own error comes again without blocks
        evaluation = evaluator.evaluate(piece, index, blocks)
        return None if blocks.refusal else evaluation
    return None


def _pulled(evaluator: Evaluator, outputs: Tensor, vector: Tensor) -> Sequence[Tensor | None]:
    if not outputs.requires_grad:
        return [None] * len(evaluator.parameters)
    with evaluator.backward_session(), torch.enable_grad(), no_autocast(outputs.device):
        return pull_back([outputs], evaluator.parameters, [vector])
