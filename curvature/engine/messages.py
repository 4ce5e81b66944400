"""Does the forward pass of a model send anything to other ranks? Then no rank's loss is a function of its own data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from curvature.errors import InputError

__all__ = ["NoMessages", "has_other_ranks", "refuse_synchronised"]

_WHY = (
    "the loss of a rank's batch then depends on the batches of the others, while losses, gradients and products are "
    "sums over ranks of what each makes of its own data"
)


def has_other_ranks(group: Any = None) -> bool:
    """Whether this process is one of several of a group; None for all of them."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def refuse_synchronised(layers: Iterable[nn.SyncBatchNorm]) -> None:
    """Refuse layers that would take their statistics over the batches of several ranks.

    Raises:
        InputError: on each rank, before any of them waits for another.
    """
    for layer in layers:
        if layer.training and has_other_ranks(layer.process_group):
            raise InputError(
                f"the model holds a SyncBatchNorm in train mode, whose statistics are those of all ranks' batches: "
                f"{_WHY}, and torch's layer has no second derivative. Call model.eval(), or put nn.BatchNorm in its "
                "place, which takes each batch alone, as one process would."
            )


class NoMessages(TorchDispatchMode):
    """Refuses what the ranks of a process group send each other, before it is sent."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Never runs under the compiler; saying so to it would import it."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if "c10d" in getattr(func, "namespace", ""):
            raise InputError(
                f"the forward pass of the model, or its loss, sends tensors to other ranks ({func}): {_WHY}. Leave it "
                "out while curvature is measured: take statistics over each rank's batch alone, call model.eval() if "
                "that is where they are not taken, or give all of the data to one process. Models in parts are taken "
                "as fully_shard or parallelize_module make them."
            )
        return func(*args, **(kwargs or {}))
