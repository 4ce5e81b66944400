"""Optimizers of models whose parameters lie in parts on several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.objective.shards import spread

__all__ = ["Sharded"]


class Sharded:
    """An optimizer of this package on a model that `fully_shard` or tensor parallelism has split, as it is.

    A step gathers whole parameters, lets the optimizer take its step on them, its gradients and curvature averaged over
    the ranks that hold different data, and writes each rank's part back. So the update is that of one process. The
    optimizer's state is whole on every rank: two vectors for `AdaHessian`, all factors for `KFAC`, beside parameters
    and gradient. Parameters may be frozen and unfrozen between steps.

    Args:
        model: as `curvature.Objective` takes it. Closures call it as usual.
        method: the optimizer, e.g. `AdaHessian`; called with the parameters, `process_group=` and the settings.
        settings: of the optimizer.

    Attributes:
        inner: the optimizer, for schedulers and for its state.

    Raises:
        InputError: for a model that is not split; give its parameters to the optimizer itself.

    Examples:
        >>> from torch.distributed.fsdp import fully_shard
        >>> model = fully_shard(model)  # doctest: +SKIP
        >>> optimizer = Sharded(model, AdaHessian, lr=0.1)  # doctest: +SKIP
        >>> loss = optimizer.step(lambda: loss_of(model(x), y))  # doctest: +SKIP
    """

    @checked
    def __init__(self, model: nn.Module, method: Callable[..., torch.optim.Optimizer], **settings: Any) -> None:
        _, shards, data = spread(model, settings.pop("process_group", None))
        if shards is None:
            raise InputError(
                "the model is not sharded: give its parameters to the optimizer itself, with process_group= where "
                "ranks hold different data."
            )
        self._shards = shards
        shards.gather()
        leaves = [leaf for leaf in shards.leaves.values() if leaf.is_floating_point() or leaf.is_complex()]
        self.inner = method(leaves, process_group=data, **settings)
        self.inner._shares_work = False  # type: ignore[attr-defined] # of matrix optimizers: the state is whole
        self._places = _places(model)

    def step(self, closure: Callable[[], Any], **settings: Any) -> Tensor | None:
        """Take one step, all ranks together, and return what the optimizer's `step` returns.

        Where it raises, the parameters stay as they were.
        """
        if _places(self._shards.model) != self._places:
            raise InputError(
                "the model has other layers or parameters than when the optimizer was built, which would not train "
                "them: build the optimizer anew, then load its state."
            )
        self._shards.gather()
        self._follow_requires_grad()
        closures = {name: self._installing(given) for name, given in settings.items() if name == "curvature_closure"}
        with self._shards.installed():
            found: Any = self.inner.step(self._installing(closure), **{**settings, **closures})
        self._shards.write()
        loss: Tensor | None = found
        return loss

    def _follow_requires_grad(self) -> None:
        """Freeze and unfreeze whole parameters as those of the model are now."""
        for module, key, name in self._shards.places:
            p, leaf = module._parameters[key], self._shards.leaves[name]
            if p is not None and p.requires_grad != leaf.requires_grad:
                leaf.requires_grad_(p.requires_grad)
                leaf.grad = None

    def _installing(self, closure: Any) -> Any:
        """Have a closure see parameters as they are when it runs: FSDP2's casts of them are copies."""
        if not callable(closure):
            return closure

        def run() -> Any:
            self._shards.install()
            return closure()

        return run

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the optimizer's gradients."""
        self.inner.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's state, whole and alike on every rank."""
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state that `state_dict` returned, for any number of ranks."""
        self.inner.load_state_dict(state)


def _places(model: nn.Module) -> list[tuple[int, str]]:
    return [(id(module), name) for module in model.modules() for name in module._parameters]
