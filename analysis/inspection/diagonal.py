"""The diagonal of the Hessian layer by layer: exact where columns give it, estimated elsewhere."""

from __future__ import annotations

from analysis.inspection.plan import DIAGONAL, DIAGONAL_MATVECS, MOST_COLUMNS
from analysis.inspection.results import LayerDiagonals
from analysis.show.listener import Progress
from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.memory import available_memory
from curvature.errors import InputError
from curvature.generators import AnyGenerator
from curvature.layerwise import ExactDiagonal, exact_diagonal
from curvature.layerwise.blocks import DiagonalBlocks
from curvature.layerwise.diagonal import diagonal_with_blocks
from curvature.layerwise.diagonal_summary import summarise_diagonal
from curvature.linalg import diagonal
from curvature.objective.by_module import goes_by_module
from curvature.objective.objective import Objective
from curvature.objective.shards import gathered
from curvature.operators.hessian import HessianOperator
from curvature.results.estimates import DiagonalEstimate, EigenPairs

__all__ = ["diagonals_of", "exactly", "layer_diagonals"]

_KEPT = 6  # vectors for each product, where samples are kept


def exactly(objective: Objective, beside: DiagonalBlocks | None = None) -> ExactDiagonal | str:
    """Return the Hessian's diagonal from at most `MOST_COLUMNS` columns, or why it cannot be had so.

    Args:
        objective: what the Hessian is of.
        beside: blocks of it that are filled from the same columns.
    """
    try:
        if beside is not None:
            return diagonal_with_blocks(beside, "hessian", max_columns=MOST_COLUMNS)
        return exact_diagonal(objective, "hessian", route="rules", max_columns=MOST_COLUMNS)
    except InputError as error:
        return str(error).rstrip(".")


@full_precision
@checked
def layer_diagonals(
    objective: Objective,
    *,
    top: EigenPairs | None = None,
    num_matvecs: int = DIAGONAL_MATVECS,
    generator: AnyGenerator,
    progress: Progress | None = None,
) -> LayerDiagonals:
    """Return quantiles, mean and share of negative entries of the Hessian's diagonal, for each layer.

    Cost: about a gradient for each output of an example and each unit of a curved activation, up to `MOST_COLUMNS`,
    where the model allows it (`exact_diagonal`), and the result is exact; otherwise `num_matvecs` products, by sign
    vectors on what known eigenpairs leave over. Memory: six vectors a product; where these do not fit, some eight in
    all, the estimate is less accurate, and the errors of the layers' means are upper bounds.

    Args:
        objective: what the Hessian is of.
        top: eigenpairs that are known; they are taken out of the estimate at no product.
        num_matvecs: products to spend where the diagonal has to be estimated.
        generator: source of the sign vectors, on the objective's device, or a seed.
        progress: told after each product how many are done.

    Raises:
        NonFiniteError: if an entry or a product is not finite.
    """
    return diagonals_of(exactly(objective), objective, top, num_matvecs, generator, progress)


@full_precision
def diagonals_of(
    exact: ExactDiagonal | str,
    objective: Objective,
    top: EigenPairs | None,
    num_matvecs: int,
    generator: AnyGenerator,
    progress: Progress | None,
) -> LayerDiagonals:
    """Return `layer_diagonals` from what `exactly` returned, which differs among ranks in what it cost."""
    if isinstance(exact, str):
        return _estimated(objective, exact, top, num_matvecs, generator, progress)
    known = DiagonalEstimate(value=exact.value, stderr=exact.stderr, num_matvecs=0)
    rows = summarise_diagonal(known, objective.space).rows
    how = f"Exactly, from {exact.num_columns} columns propagated ({exact.reason.rstrip('.')})."
    return LayerDiagonals(rows=rows, exact=True, how=how)


def _estimated(
    objective: Objective,
    refusal: str,
    top: EigenPairs | None,
    num_matvecs: int,
    generator: AnyGenerator,
    progress: Progress | None,
) -> LayerDiagonals:
    H, budget = HessianOperator(objective), max(4, num_matvecs)  # the least it takes; never more than parameters
    fits = _KEPT * budget * objective.num_params * objective.dtype.itemsize <= available_memory(objective.device)
    if objective.ranks is not None:
        fits = objective.ranks.everywhere(fits and not goes_by_module(objective), "the memory of a diagonal")
    estimate = diagonal(
        H,
        method="auto" if fits else "hutchinson",
        num_matvecs=budget,
        deflate=top,
        generator=generator,
        keep_samples=fits,
        callback=None if progress is None else lambda spent, _: progress(DIAGONAL, spent, num_matvecs),
    )
    estimate = gathered(estimate)  # vectors in parts: layers are summed over
    rows = summarise_diagonal(estimate, objective.space).rows
    exact = not bool(estimate.stderr.any())
    how = f"By {estimate.method} from {estimate.num_matvecs} products, since an exact one is out of reach: {refusal}."
    return LayerDiagonals(rows=rows, exact=exact, how=how)
