"""A diagonal in a few numbers a layer: where curvature sits, how it is spread, and how much of it is noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.parameters import Block, ParameterSpace
from curvature.results.estimates import DiagonalEstimate
from curvature.results.record import Result

__all__ = ["LEVELS", "DiagonalRow", "DiagonalSummary", "summarise_diagonal"]

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalRow(Result):
    """The diagonal entries of one layer or one parameter."""

    name: str
    """Of the parameter, or of the module that owns the parameters."""
    num_params: int
    """How many entries there are."""
    mean: float
    """Mean of the entries; units of A."""
    mean_stderr: float | None
    """Standard error of `mean`; units of A. None where the estimate kept no samples: entries share probes, so it does
    not follow from their own standard errors."""
    quantiles: tuple[float, ...]
    """At `LEVELS`, linear between entries; units of A. Noise widens them."""
    share_negative: float
    """Share of entries below zero, in [0, 1]."""
    relative_noise: float
    """|stderr|_2 / |values|_2 over the entries: 0 is exact, at 1 single entries mean nothing. NaN if all are zero."""


@dataclass(frozen=True, kw_only=True, repr=False)
class DiagonalSummary(Result):
    """Rows in the order of the flat vector, and the price."""

    rows: tuple[DiagonalRow, ...]
    """One a layer or a parameter."""
    num_matvecs: int
    """Products with A that were spent on the diagonal."""
    method: str
    """Which estimator gave the diagonal."""


@full_precision
def summarise_diagonal(
    estimate: DiagonalEstimate, space: ParameterSpace, *, by: Literal["layer", "parameter"] = "layer"
) -> DiagonalSummary:
    """Return mean, quantiles, share of negative entries and noise of a diagonal, for each layer or parameter.

    Args:
        estimate: from `diagonal`; with `keep_samples=True` means get a standard error, "hutchinson" an upper bound.
        space: the parameters whose flat vector the diagonal belongs to.
        by: "layer", all parameters of a module together, or "parameter".

    Raises:
        InputError: if the diagonal is not of the space's size, or for another `by`.

    Examples:
        >>> model = torch.nn.Linear(3, 1)
        >>> space = ParameterSpace.from_model(model)
        >>> exact = DiagonalEstimate(value=torch.arange(4.0), stderr=torch.zeros(4), num_matvecs=4)
        >>> [(row.name, row.mean) for row in summarise_diagonal(exact, space, by="parameter").rows]
        [('weight', 1.0), ('bias', 3.0)]
    """
    if estimate.value.shape != (space.num_params,):
        raise InputError(
            f"the diagonal must have shape ({space.num_params},) as the parameters have, got "
            f"{tuple(estimate.value.shape)}; pass the space of the operator it was estimated from."
        )
    if by not in ("layer", "parameter"):
        raise InputError(f'by must be "layer" or "parameter", got {by!r}.')
    blocks = {block.name: block for block in space.blocks}
    if by == "parameter":
        blocks = {name: space.block({name: tensor}) for name, tensor in space.tensors.items()}
    rows = [_row(name, block, estimate) for name, block in blocks.items()]
    return DiagonalSummary(rows=tuple(rows), num_matvecs=estimate.num_matvecs, method=estimate.method)


def _row(name: str, block: Block, estimate: DiagonalEstimate) -> DiagonalRow:
    values, stderr = block.take(estimate.value), block.take(estimate.stderr)
    return DiagonalRow(
        name=name,
        num_params=block.num_params,
        mean=float(values.mean()),
        mean_stderr=_mean_stderr(block, stderr, estimate),
        quantiles=tuple(np.quantile(values.cpu().numpy(), LEVELS).tolist()),
        share_negative=float((values < 0).double().mean()),
        relative_noise=float(torch.linalg.vector_norm(stderr) / torch.linalg.vector_norm(values)),
    )


def _mean_stderr(block: Block, stderr: Tensor, estimate: DiagonalEstimate) -> float | None:
    """Return the standard error of the mean, from the means of the samples, or an upper bound without them.

    With random signs z, Cov(z_i (A z)_i, z_j (A z)_j) = A_ij^2, so that the sum over a block varies by the sum of
    A_ij^2 over i in it and j elsewhere, and twice that inside: by no more than twice the sum of the variances.

    Where samples share a basis they are correlated, and the standard errors of entries are larger than their spread by
    one factor for all, which is put on here too.
    """
    if not bool(stderr.any()):
        return 0.0
    if estimate.samples is None:
        independent = estimate.method == "hutchinson"
        return float(2**0.5 * torch.linalg.vector_norm(stderr)) / block.num_params if independent else None
    samples = block.take(estimate.samples)
    k = samples.shape[1]
    spread = samples.var(dim=1).sum() / k
    inflation = (stderr.square().sum() / spread).sqrt() if bool(spread > 0) else 1.0
    return float(samples.mean(dim=0).std() / k**0.5 * inflation)
