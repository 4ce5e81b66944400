"""The door to BackPACK, which is imported when it is first used: without it autograd does the work, and says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

from curvature.layerwise.support import Quantity, UnsupportedError
from curvature.objective.objective import Objective

if TYPE_CHECKING:
    from curvature.layerwise.backpack_session import BackpackSession

__all__ = ["open_session"]


def open_session(objective: Objective, quantity: Quantity) -> BackpackSession:
    """Return an extended double of the objective's model.

    Raises:
        UnsupportedError: if BackPACK cannot be imported or is not to be used, with the reason.
    """
    if objective._evaluator.forward is not None:
        raise UnsupportedError("the objective feeds the model through forward=")
    if not objective.has_split:
        raise UnsupportedError("the objective has no split between model and loss")
    try:
        from curvature.layerwise.backpack_session import BackpackSession
    except Exception as error:  # what a missing or mismatched dependency raises, torchvision's among them
        why = f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
        raise UnsupportedError(
            f"it cannot be imported ({why}); pip install --no-deps backpack-for-pytorch einops unfoldNd"
        ) from error
    return BackpackSession(objective.model, objective.space.tensors, quantity)
