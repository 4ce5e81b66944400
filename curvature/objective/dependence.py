"""Does the loss depend on the chosen parameters at all? If no batch does, zeros are no result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from curvature.autograd.backward import walk
from curvature.errors import CheckFailedError

if TYPE_CHECKING:
    from curvature.engine.linearize import Linearization

__all__ = ["Dependence", "depends"]


def depends(root: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Say whether autograd's graph of `root` holds one of the parameters. Cost: a walk that ends at the first one."""
    wanted = {id(p) for p in parameters}
    if root.grad_fn is None:
        return id(root) in wanted
    return any(id(getattr(node, "variable", None)) in wanted for node in walk([root.grad_fn]))


class Dependence:
    """What the batches of one point have shown; a batch that depends on nothing is fine as long as another one does.

    Args:
        whole: makes the objective whose parameters these are some of; where it depends on the others, zeros are right.

    Attributes:
        used: places of the parameters that some batch depends on; None before a graph was built.
    """

    def __init__(self, whole: Callable[[], Any] | None = None) -> None:
        self.whole = whole
        self.used: set[int] | None = None
        self._of_loss: bool | None = None
        self._of_outputs: bool | None = None
        self._recorded = False

    def note(self, lin: Linearization) -> None:
        """Take in a batch, after it was used."""
        self.note_loss(lin._evaluation.loss, lin.weight, lin._params)
        used = lin.used_parameters()
        if used is not None:
            self.used = (self.used or set()) | {i for i, is_used in enumerate(used) if is_used}
        if lin.weight != 0 and not self._of_outputs and lin._jacobian is not None:
            self._of_outputs = any(part is not None for part in lin._jacobian[0])

    def note_loss(self, loss: Tensor, weight: float, parameters: Sequence[Tensor]) -> None:
        """Take in the loss of a batch, with its graph."""
        if weight != 0 and not self._of_loss:
            self._of_loss = depends(loss, parameters)
            self._recorded = self._recorded or loss.requires_grad

    def require(self) -> None:
        """Raise an error if batches were seen and none depends on a parameter.

        Raises:
            CheckFailedError: with cause and remedy.
        """
        if self._of_loss is False and self.whole is not None:
            self.whole().gradient()  # refuses itself
            self._of_loss = True
        if self._of_loss is False:
            raise CheckFailedError(f"the loss of no batch depends on any of the chosen parameters: {self._reason()}.")
        if self._of_outputs is False and self.whole is None:
            raise CheckFailedError(
                "the model's outputs depend on none of the chosen parameters, although the loss does: their Jacobian "
                "and the Gauss-Newton matrix are zero. Have forward return outputs that were not detached, or use the "
                "Hessian."
            )

    def _reason(self) -> str:
        if not self._recorded:
            return (
                "no gradient was recorded; take torch.no_grad(), detach(), .item(), NumPy and argmax out of forward "
                "and loss"
            )
        return (
            "forward computes with other tensors (copies, or layers that were not chosen); choose with params= what "
            "it uses, and hand in the module that it calls"
        )
