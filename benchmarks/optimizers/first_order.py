"""First-order methods and those without backpropagation, ours and public ones: what their steps cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.optimizers.peers import Make, Method, ours, peer

__all__ = ["FIRST_ORDER"]


def _without_rate(library: str, name: str, **settings: Any) -> Callable[[], Make]:
    """Return a public method that takes no learning rate."""

    def load() -> Make:
        cls = peer(library, name)()
        return lambda params, lr: cls(params, **settings)  # noqa: ARG005

    return load


class _Feedback(torch.optim.SGD):
    """SGD on the gradients of direct feedback."""

    def __init__(self, params: Iterable[Tensor], lr: float, model: nn.Module) -> None:
        from optimizers import DirectFeedbackAlignment

        super().__init__(params, lr, momentum=0.9)
        self.feedback = DirectFeedbackAlignment(model)


_SGD = (("base", torch.optim.SGD),)


def _method(label: str, load: Callable[[], Make], form: Any = "backward", **fields: Any) -> Method:
    return Method(label, load, form, (), ours=label.startswith("torch-curvature"), **fields)


FIRST_ORDER: dict[str, Method] = {
    "our-lion": _method("torch-curvature Lion", ours("Lion")),
    "our-yogi": _method("torch-curvature Yogi", ours("Yogi")),
    "kozistr-yogi": _method("pytorch-optimizer Yogi", peer("pytorch_optimizer", "Yogi")),
    "our-cocob": _method("torch-curvature COCOB", ours("COCOB")),
    "parameterfree-cocob": _method("parameterfree COCOB", _without_rate("parameterfree", "COCOB")),
    "our-sls": _method("torch-curvature SLS", ours("SLS"), "loss"),
    "official-sls": _method(  # its folder sls on the path
        "SLS, its authors' code", _without_rate("sls", "Sls", init_step_size=1e-9), "loss"
    ),
    "learned": _method("torch-curvature LearnedOptimizer", ours("LearnedOptimizer"), settings=(("num_steps", 100),)),
    "forward-gradient": _method(
        "torch-curvature ForwardGradient of SGD", ours("ForwardGradient"), "loss", settings=_SGD
    ),
    "forward-activities": _method(
        "torch-curvature ForwardGradient of SGD, activities perturbed",
        ours("ForwardGradient"),
        "loss",
        settings=_SGD,
        model_as="activities_of",
    ),
    "direct-feedback": _method("torch-curvature DirectFeedbackAlignment, SGD", lambda: _Feedback, model_as="model"),
}
