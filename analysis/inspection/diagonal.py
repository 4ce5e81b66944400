"""The diagonal of the Hessian layer by layer: exact where BackPACK has rules for the model, estimated elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import torch

from analysis.inspection.plan import DIAGONAL_MATVECS
from analysis.inspection.results import LayerDiagonals
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import InputError
from curvature.layerwise import backpack_refusal, exact_diagonal
from curvature.layerwise.diagonal_summary import summarise_diagonal
from curvature.linalg import diagonal
from curvature.objective.objective import Objective
from curvature.operators import HessianOperator
from curvature.results.estimates import DiagonalEstimate, EigenPairs

__all__ = ["layer_diagonals"]

_MOST_COLUMNS = (
    1000  # outputs of an example; beyond them, or without rules after all, an estimate is the better bargain
)


@full_precision
@checked
def layer_diagonals(
    objective: Objective,
    *,
    top: EigenPairs | None = None,
    num_matvecs: int = DIAGONAL_MATVECS,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> LayerDiagonals:
    """Return quantiles, mean and share of negative entries of the Hessian's diagonal, for each layer.

    Cost: about a gradient for each output of an example where BackPACK has rules for all of the model, and the result
    is exact; otherwise `num_matvecs` products, by sign vectors on what known eigenpairs leave over.

    Args:
        objective: what the Hessian is of.
        top: eigenpairs that are known; they are taken out of the estimate at no product.
        num_matvecs: products to spend where the diagonal has to be estimated.
        generator: source of the sign vectors, on the objective's device.
        progress: told the number of columns after each product.

    Raises:
        NonFiniteError: if an entry or a product is not finite.
    """
    refusal = backpack_refusal(objective, "hessian")
    if refusal is None:
        try:
            exact = exact_diagonal(objective, "hessian", max_columns=_MOST_COLUMNS)
        except InputError as error:  # what only the data could tell
            refusal = str(error)
    if refusal is not None:
        return _estimated(objective, refusal.rstrip("."), top, num_matvecs, generator, progress)
    known = DiagonalEstimate(values=exact.values, stderr=exact.stderr, num_matvecs=0)
    rows = summarise_diagonal(known, objective.space).rows
    by = "BackPACK" if exact.route == "backpack" else "autograd"
    how = f"Exactly, by {by}, {exact.num_columns} columns propagated ({exact.reason.rstrip('.')})."
    return LayerDiagonals(rows=rows, exact=True, how=how)


def _estimated(
    objective: Objective,
    refusal: str,
    top: EigenPairs | None,
    num_matvecs: int,
    generator: torch.Generator,
    progress: Callable[[int], None] | None,
) -> LayerDiagonals:
    before = 0

    def callback(spent: int, _: str) -> None:
        nonlocal before
        if progress is not None:
            progress(spent - before)
        before = spent

    estimate = diagonal(
        HessianOperator(objective),
        num_matvecs=max(4, num_matvecs),  # the least it takes; never more than parameters are spent
        eigenpairs=top,
        generator=generator,
        keep_samples=True,
        callback=callback,
    )
    rows = summarise_diagonal(estimate, objective.space).rows
    exact = not bool(estimate.stderr.any())
    how = f"By {estimate.method} from {estimate.num_matvecs} products, since an exact one is out of reach: {refusal}."
    return LayerDiagonals(rows=rows, exact=exact, how=how)
