"""Parameters that a model uses otherwise than by the calls of layers that were seen: their factors would miss a part.

Held against autograd: the gradient of <outputs, u> with u drawn must be the sum of what the seen calls add to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from curvature.autograd.backward import dtypes_of_graph, pull_back, walk
from curvature.per_example.capture import Capture
from curvature.per_example.probe import Probe
from curvature.per_example.tolerances import tolerance
from optimizers.kronecker.layers import seen_calls

__all__ = ["Uncounted"]

_WHY = "it is also used otherwise than by layers that have factors"


@dataclass
class Uncounted:
    """What was found over the steps of a run.

    Attributes:
        reasons: place of a parameter -> why it has no factors from here on.
        shown: graphs, by their calls and number of nodes, in which every gradient was compared.
    """

    reasons: dict[int, str] = field(default_factory=dict)
    shown: set[Any] = field(default_factory=set)

    def look(self, capture: Capture, outputs: Tensor, params: Sequence[Tensor]) -> None:
        """Compare the gradients, where the graph is another than before. Cost: a backward pass.

        A gradient that is zero, or not finite, shows nothing: the next batch is looked at, too.
        """
        nodes = list(walk([outputs.grad_fn]))
        graph = (capture.structure, len(nodes))
        if graph in self.shown:
            return
        calls = [call for call in seen_calls(capture) if call.layer.main not in self.reasons]
        places = list(dict.fromkeys(call.layer.main for call in calls))
        if not places:
            return
        generator = torch.Generator().manual_seed(0)
        u = torch.randn(outputs.shape, generator=generator).to(outputs)
        ends: Any = [*(call.use.edge for call in calls), *(params[i] for i in places)]
        found = pull_back([outputs], ends, [u])
        gradients = dict(zip(places, found[len(calls) :], strict=True))
        dtypes = {*dtypes_of_graph([outputs.grad_fn]), *(params[i].dtype for i in places)}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        complete = True
        for i in places:
            gradient = gradients[i]
            if gradient is None or not bool(gradient.isfinite().all()) or not bool(gradient.any()):
                complete = False
                continue
            gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            probe = Probe.draw(gradient.shape, generator, gradient)
            rest = probe.of(gradient.reshape(-1))
            size = rest.abs()
            for call, delta in zip(calls, found, strict=False):
                if call.layer.main == i and delta is not None:
                    part = call.projected(delta, params[i], probe)
                    if part is None:  # refused elsewhere: it has no rows
                        break
                    rest, size = rest - part[0].to(rest), size + part[1].to(rest)
            else:
                if not bool(rest.abs() <= tolerance(1e3 * eps) * size):
                    self.reasons[i] = _WHY
        if complete:
            self.shown.add(graph)
