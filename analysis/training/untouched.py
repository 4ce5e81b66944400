"""Measuring amid a training run without its noticing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import Tensor, nn

from curvature.data.random_states import RandomStates, generators_of
from curvature.environment.lock import one_at_a_time
from curvature.objective.objective import Objective

__all__ = ["untouched"]


@contextlib.contextmanager
def untouched(objective: Objective, *, evaluation_mode: bool = True) -> Iterator[None]:
    """Put back, after what runs inside and also after an error, all that a measurement might move.

    Random states (torch on CPU and GPU, NumPy, Python, the generators of the objective's loader and its sampler), the
    model's buffers and gradients, and modes. Buffers are exchanged for copies and gradients taken away inside, not
    written back, so that graphs of the training loop stay valid.

    Args:
        objective: whose model and data are looked after.
        evaluation_mode: switch the model to `eval()` inside.
    """
    with one_at_a_time, _put_back(objective, evaluation_mode):
        yield


@contextlib.contextmanager
def _put_back(objective: Objective, evaluation_mode: bool) -> Iterator[None]:
    model: nn.Module = objective.model
    modes = [(module, module.training) for module in model.modules()]
    places = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    copies: dict[Tensor, Tensor] = {buffer: buffer.detach().clone() for _, _, buffer in places}
    gradients = [(p, p.grad) for p in model.parameters()]
    states = RandomStates([objective.device], generators_of(objective.settings["data"]))
    try:
        for module, name, buffer in places:
            module._buffers[name] = copies[buffer]
        for p, _ in gradients:
            p.grad = None
        if evaluation_mode:
            for module, _ in modes:
                module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training
        for module, name, buffer in places:
            module._buffers[name] = buffer
        for p, gradient in gradients:
            p.grad = gradient
        states.restore()
