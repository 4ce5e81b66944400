"""Which weights to remove: a score for each, the predicted change of the loss when it alone goes, lowest first.

References: LeCun, Denker and Solla (1990), Optimal brain damage; Hassibi and Stork (1993), Optimal brain surgeon; Singh
and Alistarh (2020), WoodFisher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from analysis.generalization.pruning.inverse import (
    InverseBlocks,
    block_places,
    dense_inverse,
    greedy_scores,
    recursive_inverse,
)
from analysis.generalization.pruning.kronecker import KroneckerMatrix, diagonal_of, inverse_diagonal_of
from analysis.generalization.pruning.masks import masks_of
from analysis.generalization.pruning.removal import DiagonalMetric, LiveProducts, Products
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError, NonFiniteError
from curvature.generators import AnyGenerator, as_generator
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.linop import as_matrix, to_dense
from curvature.objective.objective import Objective
from curvature.operators.ggn import GGNOperator
from curvature.per_example import gradient_moments, gradient_norms, per_example_gradients
from curvature.results.record import Result

__all__ = ["METHODS", "PruningMethod", "PruningScores", "pruning_scores"]

PruningMethod = Literal["random", "magnitude", "fisher", "obd", "woodfisher", "kfac", "kfac-cg", "obs", "obs-greedy"]
METHODS: dict[str, str] = {
    "random": "a random number; predicts nothing",
    "magnitude": "w²/2: the identity in the place of the Hessian",
    "fisher": "the diagonal of the empirical Fisher matrix",
    "obd": "optimal brain damage: the exact diagonal of the Gauss-Newton matrix or the Hessian",
    "woodfisher": "optimal brain surgeon with the empirical Fisher matrix in blocks, inverted by its recursion",
    "kfac": "optimal brain surgeon with Kronecker factors of the Gauss-Newton matrix",
    "kfac-cg": "scores of Kronecker factors; the others move by 50 steps of conjugate gradients on the exact matrix",
    "obs": "optimal brain surgeon with the exact inverse, as a dense matrix",
    "obs-greedy": "the same, weights chosen one after the other, with the others moved before the next is chosen",
}
"""What the score of each method is."""
LARGEST_DENSE = 4096
"""Parameters up to which an inverse is formed."""
_CHUNK = 64
_CG_STEPS = 50  # of kfac-cg: later ones lower the model, hardly the loss


class Metric(Protocol):
    """A matrix in the place of the Hessian."""

    def displacement(self, w: Tensor, pruned: Tensor) -> tuple[Tensor, float]:
        """Return where the weights go if some are removed, and 1/2 d'A d."""


@dataclass(frozen=True, kw_only=True, repr=False)
class PruningScores(Result):
    """A score for each weight that may be removed, and what a method says of removing many.

    Weights that may be removed are entries of tensors with two dimensions or more; biases and the vectors of
    normalisation layers stay, and count in no sparsity.
    """

    _large = ("scores", "weights", "gradient", "metric")

    method: str
    """One of `METHODS`."""
    scores: Tensor
    """(n,), in the order of the objective's vector; units of the loss (random, magnitude: none). Infinite where a
    weight may not be removed."""
    weights: Tensor
    """(n,), w."""
    gradient: Tensor
    """(n,), g."""
    tensors: Mapping[str, tuple[int, tuple[int, ...]]]
    """Tensors whose entries may be removed: where each begins in the vector, and its shape."""
    damping: float
    """Added to the matrix that is inverted; 0 where none is."""
    metric: Metric | None
    """The method's matrix; None for random."""

    @property
    def num_prunable(self) -> int:
        """How many weights may be removed."""
        return sum(math.prod(shape) for _, shape in self.tensors.values())

    def pruned(
        self,
        sparsity: float,
        *,
        scope: Literal["global", "uniform"] = "global",
        only: str | None = None,
        generator: AnyGenerator | None = None,
    ) -> Tensor:
        """Return which weights go, (n,), boolean: exactly round(sparsity x how many there are) with the lowest scores.

        Args:
            sparsity: share of the weights that may be removed, from 0 to 1.
            scope: "global" ranks all of them together, "uniform" each tensor by itself.
            only: a tensor's name; all others stay whole.
            generator: draws which of equal scores go; without, those that come first in the vector.

        Raises:
            InputError: for a sparsity outside [0, 1], an unknown scope or name.
        """
        if not (isinstance(sparsity, (int, float)) and 0 <= sparsity <= 1):
            raise InputError(f"sparsity must be from 0 to 1, got {sparsity!r}.")
        if scope not in ("global", "uniform"):
            raise InputError(f"scope must be 'global' or 'uniform', got {scope!r}.")
        if only is not None and only not in self.tensors:
            raise InputError(f"only must name one of {', '.join(map(repr, self.tensors))}; got {only!r}.")
        every = [self._places(name) for name in self.tensors if only in (None, name)]
        groups = [torch.cat(every)] if scope == "global" else every
        found = torch.zeros_like(self.scores, dtype=torch.bool)
        for places in groups:
            order = places
            if generator is not None:
                drawn = as_generator(generator, places.device)
                order = places[torch.randperm(len(places), generator=drawn, device=places.device)]
            lowest = self.scores[order].argsort(stable=True)[: round(sparsity * len(order))]
            found[order[lowest]] = True
        return found

    def masks(self, pruned: Tensor) -> dict[str, Tensor]:
        """Return masks, True where kept, of pruned weights (n,): what `sparse_model` takes."""
        self._check(pruned)
        masks = {}
        for name, (_, shape) in self.tensors.items():
            masks[name] = ~pruned[self._places(name)].view(shape)
        return masks

    def removal(self, pruned: Tensor) -> tuple[Tensor, float]:
        """Return the displacement d (n,) by which the method removes these weights, and what it says of the loss.

        The removed go to zero, and a brain surgeon moves the others. The change is g'd + 1/2 d'A d with the method's
        own matrix A: NaN for random, without g'd for magnitude.

        Raises:
            InputError: for weights that may not be removed, or kfac-cg on a model whose weights have changed since.
        """
        self._check(pruned)
        metric = DiagonalMetric(torch.zeros_like(self.weights)) if self.metric is None else self.metric
        d, rise = metric.displacement(self.weights, pruned)
        if self.metric is None:
            return d, math.nan
        return d, rise + (0.0 if self.method == "magnitude" else float(self.gradient.double() @ d.double()))

    def _check(self, pruned: Tensor) -> None:
        if pruned.dtype != torch.bool or pruned.shape != self.scores.shape:
            raise InputError(
                f"pruned weights must be boolean, of shape {tuple(self.scores.shape)}, as pruned() gives them; got "
                f"{pruned.dtype} of shape {tuple(pruned.shape)}."
            )
        if bool((pruned & torch.isinf(self.scores)).any()):
            raise InputError("pruned names weights that are never removed: those of biases and normalisation layers.")

    def _places(self, name: str) -> Tensor:
        start, shape = self.tensors[name]
        return torch.arange(start, start + math.prod(shape), device=self.scores.device)


@full_precision
@checked
def pruning_scores(
    objective: Objective,
    method: PruningMethod = "obd",
    *,
    matrix: Literal["ggn", "hessian"] = "ggn",
    damping: float | None = None,
    block_size: int = 128,
    linear: bool = False,
    mc_samples: int = 0,
    generator: AnyGenerator | None = None,
) -> PruningScores:
    """Return a score for each weight: the change of the loss, by the method's matrix A, when it alone is removed.

        fisher, obd:                     A_qq w_q^2 / 2                  -g_q w_q
        woodfisher, kfac, kfac-cg, obs:  w_q^2 / (2 C_qq)                -w_q (C g)_q / C_qq,    C = (A + damping I)^-1
        obs-greedy: the sum of w_q^2 / (2 C_qq) over the weights removed until then, w and C being those that are left

    The linear term, on the right, is left out of scores by default, as in the sources: of one weight it is part of the
    change, but ranked by it, weights are chosen whose small slopes all point one way, and the curvature between them
    makes the loss rise. What `PruningScores.removal` and `loss_changes` predict of a choice always contains it.

    Kronecker factors cover linear and convolutional layers; other parameters get their Gauss-Newton diagonal.

    Cost: fisher and woodfisher 2 to 4 gradients by example and, for woodfisher, N n block_size operations; obd 4 to 15
    gradients; kfac as many and the eigenvalues of the factors; obs and obs-greedy n products and n^3 operations.

    Args:
        objective: whose parameters may be removed; those of `params=` only. All of them may move.
        method: one of `METHODS`.
        matrix: of obd, obs and obs-greedy. The Hessian may be indefinite: an inverse then needs a damping that makes it
            definite.
        damping: in units of the matrix. Default: 1e-2 times its mean diagonal entry over weights that may be removed.
        block_size: of woodfisher, consecutive weights of a tensor.
        linear: add the linear term to the scores, which may then be negative.
        mc_samples: draw so many samples for the Gauss-Newton diagonal and the factors, where their exact columns are
            too many (3696 an example for a text of 16 tokens out of 231); 0 is exact. `num_columns` counts them.
        generator: source of random scores and of samples.

    Raises:
        InputError: for arguments out of range, a method that does not serve, or no weight that may be removed.
        NonFiniteError: for scores that are not finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.ones_(model.weight)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(model, nn.MSELoss(), (x, x.sum(1, keepdim=True)))
        >>> pruning_scores(objective, "obd").scores
        tensor([0.5000, 2.0000])
    """
    if method not in METHODS:
        raise InputError(f"method must be one of {', '.join(METHODS)}; got {method!r}.")
    if damping is not None and not (damping >= 0 and math.isfinite(damping)):
        raise InputError(f"damping must be at least 0 and finite, got {damping}.")
    if linear and method == "obs-greedy":
        raise InputError("obs-greedy adds up scores without the linear term; leave linear out, or take obs.")
    if block_size < 1:
        raise InputError(f"block_size must be at least 1, got {block_size}.")
    if mc_samples < 0 or ((method == "random" or mc_samples) and generator is None):
        raise InputError(
            f"random scores and samples need generator=, a seed or a torch.Generator; mc_samples is {mc_samples}."
        )
    drawn = None if generator is None else as_generator(generator, objective.device)
    if objective.sharding is not None or objective.process_group is not None:
        raise InputError("pruning works in one process, on whole tensors; prune before the model is distributed.")
    if masks_of(objective.model):
        raise InputError(
            "the model is sparse already, and its kept weights have no shape of a tensor: prune dense_model(model), "
            "whose removed weights are zeros and have the lowest scores."
        )
    tensors = _prunable(objective)
    w, n = objective.space.current(), objective.num_params
    g = objective.gradient()
    slope = g if linear else torch.zeros_like(g)
    known: dict[str, Any] = {"method": method, "weights": w, "gradient": g, "tensors": tensors}
    may = torch.zeros_like(w, dtype=torch.bool)
    for start, shape in tensors.values():
        may[start : start + math.prod(shape)] = True

    def made(scores: Tensor, metric: Metric | None, damping: float = 0.0) -> PruningScores:
        if not bool(torch.isfinite(scores[may]).all()):
            raise NonFiniteError(f"scores of {method} are not finite; use a wider dtype, or raise the damping.")
        return PruningScores(scores=torch.where(may, scores, torch.inf), metric=metric, damping=damping, **known)

    if method == "random":
        return made(torch.rand(n, generator=drawn, dtype=w.dtype, device=w.device), None)
    if method == "magnitude":
        return made(w.square() / 2, DiagonalMetric(torch.ones_like(w)))
    if method in ("fisher", "obd"):
        diagonal = (
            fisher_diagonal(objective)
            if method == "fisher"
            else curvature_diagonal(objective, matrix, mc_samples, drawn)
        )
        return made(diagonal * w.square() / 2 - slope * w, DiagonalMetric(diagonal))
    if method in ("kfac", "kfac-cg"):
        sampled: dict[str, Any] = {"mc_samples": mc_samples, "generator": drawn} if mc_samples else {}
        factors = kronecker_factors(objective, "kfac" if mc_samples else "kflr", **sampled)
        rest = torch.zeros_like(w)
        if any(name in factors.uncovered for name in tensors):
            rest = curvature_diagonal(objective, "ggn", mc_samples, drawn)
            for name in set(factors.slices) - set(factors.uncovered):
                rest[slice(*factors.slices[name])] = 0
        damping = _damping(damping, (diagonal_of(factors) + rest)[may])
        inverse = factors.preconditioner(damping, others=rest + damping)
        diagonal, solved = inverse_diagonal_of(factors, damping, rest), inverse @ slope
        metric: Metric = Products(KroneckerMatrix(factors, rest), damping, inverse)
        if method == "kfac-cg":
            metric = LiveProducts(GGNOperator(objective), damping, inverse, max_iterations=_CG_STEPS)
    else:
        if method == "woodfisher":
            damping = _damping(damping, fisher_diagonal(objective)[may])
            blocks = _fisher_inverse(objective, tensors, damping, block_size)
        else:
            blocks = _exact_inverse(objective, matrix, damping, may)
        if method == "obs-greedy":
            scores = greedy_scores(blocks.C[0], w, may)
            return made(scores.to(w.dtype), blocks, blocks.damping)
        metric, damping = blocks, blocks.damping
        diagonal, solved = blocks.diagonal(n).to(w.dtype), blocks.solve(slope).to(w.dtype)
    if not bool((diagonal[may] > 0).all()):
        raise InputError(f"the inverse under a damping of {damping:.3g} is lost to rounding; raise the damping.")
    return made((-w * solved + w.square() / 2) / diagonal, metric, damping)


def _prunable(objective: Objective) -> dict[str, tuple[int, tuple[int, ...]]]:
    found, start = {}, 0
    for name, tensor in objective.space.tensors.items():
        if tensor.ndim >= 2 and tensor.numel():
            found[name] = (start, tuple(tensor.shape))
        start += tensor.numel()
    if not found:
        raise InputError("no parameter may be removed: the objective has no tensor of two dimensions or more.")
    return found


def curvature_diagonal(
    objective: Objective, matrix: Literal["ggn", "hessian"], mc_samples: int, generator: torch.Generator | None
) -> Tensor:
    """Return the diagonal (n,), exact, or of the Gauss-Newton matrix from samples."""
    if not mc_samples:
        return exact_diagonal(objective, matrix).value
    if matrix == "hessian":
        raise InputError("samples estimate the Gauss-Newton diagonal only; leave mc_samples out, or take matrix='ggn'.")
    return exact_diagonal(objective, "ggn-mc", mc_samples=mc_samples, generator=generator).value


def fisher_diagonal(objective: Objective) -> Tensor:
    """Return the diagonal (n,) of the empirical Fisher matrix, of a summed loss the sum over its terms."""
    moments = gradient_moments(objective, norms=False)
    return moments.second_moment / _terms(objective, moments.weights)


def _terms(objective: Objective, weights: Tensor) -> float:
    """Return what sum_i p_i g_i g_i' is to be divided by: g_i of a summed loss is of all terms times a term's."""
    return float(weights.double().sum()) if objective.is_sum else 1.0


def _damping(given: float | None, diagonal: Tensor) -> float:
    if given is not None:
        return given
    damping = 1e-2 * float(diagonal.abs().mean())
    if not damping > 0:
        raise InputError("the matrix has no diagonal: the gradients vanish; give damping=, or take magnitude.")
    return damping


def _exact_inverse(
    objective: Objective, matrix: Literal["ggn", "hessian"], damping: float | None, may: Tensor
) -> InverseBlocks:
    n = objective.num_params
    if n > LARGEST_DENSE:
        raise InputError(
            f"obs forms the inverse of all {n} parameters, at most {LARGEST_DENSE}; choose fewer by params=, or take "
            "kfac-cg or woodfisher."
        )
    A = to_dense(as_matrix(objective, matrix)).double()
    damping = _damping(damping, A.diagonal()[may])
    places = torch.arange(n, device=A.device)[None]
    return InverseBlocks(places, dense_inverse(A, damping)[None], damping)


def _fisher_inverse(
    objective: Objective, tensors: Mapping[str, tuple[int, tuple[int, ...]]], damping: float, block_size: int
) -> InverseBlocks:
    if not damping > 0:
        raise InputError("woodfisher starts from I / damping; give a positive damping.")
    slices = [(start, start + math.prod(shape)) for start, shape in tensors.values()]
    places = block_places(slices, block_size, objective.device)
    weights = gradient_norms(objective).weights
    roots = (weights.double() / weights.double().sum() / _terms(objective, weights)).sqrt()
    start = torch.eye(places.shape[1], dtype=torch.float64, device=objective.device) / damping
    blocks = InverseBlocks(places, start.expand(len(places), -1, -1), damping)

    def rows() -> Iterator[Tensor]:
        for numbers, gradients in per_example_gradients(objective, chunk_size=_CHUNK):
            scaled = gradients.double() * roots[numbers].to(gradients.device)[:, None]
            yield torch.where(places >= 0, scaled[:, places.clamp_min(0)], 0.0)

    return InverseBlocks(places, recursive_inverse(rows(), blocks.C), damping)
