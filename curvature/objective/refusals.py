"""What is refused where the examples or batches of the data are not functions of their own."""

from __future__ import annotations

from typing import Any

from curvature.data.tensors import move_batch
from curvature.engine.linearize import Linearization
from curvature.errors import DataError
from curvature.objective.coupling import cut_in_two
from curvature.objective.interface import ObjectiveLike

__all__ = ["describe_cuts", "refuse_coupling", "refuse_other_batches", "refuse_pieces"]


def refuse_other_batches(objective: ObjectiveLike, lin: Linearization) -> None:
    """Refuse data whose batches change from pass to pass, or are cut, where that makes another function.

    Raises:
        DataError: with the reason and the remedy.
    """
    data = objective.source
    refuse_pieces(objective)
    if data.shuffles and lin.drew_random_numbers:
        raise DataError(
            "the loader shuffles and dropout masks are fixed by batch: every pass would be another function. Pass a "
            "loader with shuffle=False, list(loader), or call model.eval()."
        )
    if data.regroups:
        verdict = objective.cuts.verdict(objective.evaluator, lin.batch, lin.index, any_way=True)
        if verdict.coupled is not None:
            raise DataError(
                f"the loader shuffles and {verdict.coupled}: every pass would be another function. Pass a loader with "
                "shuffle=False, list(loader), or, if that comes from batch statistics, call model.eval()."
            )
    if objective.rule is None and objective.evaluator.weight is None and lin.index == 1:
        verdict = objective.cuts.verdict(objective.evaluator, lin.batch, lin.index, any_way=True)
        if verdict.weights is not None:
            raise _unknown_weights(verdict.weights)


def refuse_pieces(objective: ObjectiveLike) -> None:
    """Refuse micro_batch= where pieces of a batch do not add up to it; call it once a batch was read.

    Raises:
        DataError: with the reason and the remedy.
    """
    if objective.settings["micro_batch"] is None or objective.source.sample is None:
        return
    verdict = objective.cuts.verdict(objective.evaluator, move_batch(objective.source.sample, objective.device), 0)
    if verdict.coupled is not None:
        raise DataError(
            f"micro_batch= would change the loss: {verdict.coupled}. Leave micro_batch= out or, if that comes from "
            "batch statistics, call model.eval()."
        )
    if verdict.weights is not None:
        raise DataError(
            f"micro_batch= would change the loss: {verdict.weights}. Pass weight= (batch -> number, what the loss of "
            "that batch divides by), or leave micro_batch= out."
        )


def refuse_coupling(objective: ObjectiveLike, batch: Any, index: int) -> None:
    """Refuse to take the examples of a batch one by one where they are not functions of their own.

    Raises:
        DataError: with the reason and the remedy.
    """
    verdict = objective.cuts.verdict(objective.evaluator, batch, index, of_examples=True)
    if verdict.coupled is not None:
        raise DataError(
            f"no example has a gradient of its own: {verdict.coupled}. If that comes from batch statistics, call "
            "model.eval() first."
        )
    if verdict.weights is not None:
        raise DataError(
            f"the share of each example in the loss is not known: {verdict.weights}. Use one of torch's losses, whose "
            "shares are, or a mean over examples that count alike."
        )


def describe_cuts(objective: ObjectiveLike, batch: Any) -> str:
    """Cut a batch at several places and return what that shows in a sentence.

    Raises:
        DataError: if several batches count by something else than their loss divides by.
    """
    verdicts = [cut_in_two(objective.evaluator, batch, 0, share) for share in (0.5, 0.25, 0.8)]
    known = [verdict for verdict in verdicts if verdict is not None]
    if not known:
        return "The first batch holds one example, or has no gradient: it was not cut in two."
    coupled = next((verdict.coupled for verdict in known if verdict.coupled is not None), None)
    if coupled is not None:
        return f"Per-example quantities, micro_batch= and new batches at each pass are refused: {coupled}."
    weights = next((verdict.weights for verdict in known if verdict.weights is not None), None)
    if weights is None:
        gap = max(verdict.gap for verdict in known)
        return f"Cut in two, a batch's loss and gradient are those of its parts to {gap:.1e}."
    if objective.evaluator.weight is None and objective.num_batches != 1:
        raise _unknown_weights(weights)
    return f"Batches of other content would not count as their loss does: {weights}."


def _unknown_weights(why: str) -> DataError:
    return DataError(
        f"how much each batch counts is not known: {why}. Pass weight= (batch -> number, what the loss of that batch "
        "divides by) to the objective."
    )
