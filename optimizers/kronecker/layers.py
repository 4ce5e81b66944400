"""Which layers of a forward pass get Kronecker factors, and the rows that these are sums of.

A layer's gradient, seen as G matrices (rows x columns) or one for each group of a convolution, is a sum over its
positions (examples, tokens, pixels) of outer products l r', one of l and r an input of the layer, the other the
gradient in an output:

    linear, convolution    [W b] (o, i + 1)     l gradient,    r input or patch, with a 1 for the bias
    x @ W, transposed      W (i, o)             l input,       r gradient
    embedding              table (V, d)         l one-hot,     r gradient
    normalisation, gains   a vector (m)         l the example's gradient, no r

Layers are found where they are computed: attention that hands its weights to a function, tied weights and modules
that are called several times are calls with a parameter among their arguments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from curvature.per_example.capture import Capture, Use
from curvature.per_example.forms import Direct, Factors, Form, Indexed
from curvature.per_example.layout import Examples
from curvature.per_example.probe import Probe
from curvature.per_example.rules import RULES, Claim

__all__ = ["KFAC_RULES", "Layer", "LayerCall", "Rows", "layer_calls", "remembered_layers", "seen_calls"]

_WITH_BIAS = ("linear", "conv1d", "conv2d", "conv3d")  # gradients (o, i): a bias is a column more


def _batch_norm(x: Tensor, *args: Any, **kwargs: Any) -> list[Claim]:
    """Scale and shift of batch normalisation in train mode, too: their inputs are what the batch's statistics make."""
    names = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not (given.get("training") or given.get("running_mean") is None):
        return RULES[F.batch_norm](x, *args, **kwargs)
    eps = given.get("eps", 1e-5)

    def of_weight(d: Tensor, ex: Examples) -> Form | None:
        return _per_channel(d * F.batch_norm(x.to(d.dtype), None, None, None, None, True, 0.0, eps), ex)

    return [Claim(given.get("weight"), of_weight), Claim(given.get("bias"), _per_channel)]


def _per_channel(terms: Tensor, ex: Examples) -> Form | None:
    grouped = ex.arranged(terms)
    return None if grouped is None else Direct(grouped.sum((1, *range(3, grouped.ndim))))


KFAC_RULES = {**RULES, F.batch_norm: _batch_norm}


class _ByRow(Examples):
    """Each place along the first dimension of a layer's output by itself; a vector is one place."""

    def arranged(self, x: Tensor) -> Tensor | None:
        return super().arranged(x[None] if self.count == 1 and (x.ndim == 0 or len(x) != 1) else x)

    def rows(self, x: Tensor) -> Tensor | None:
        return x.view(1, 1, 1, -1) if x.ndim == 1 else super().rows(x)


@dataclass(frozen=True)
class Layer:
    """Parameters whose gradients together are one matrix.

    Attributes:
        main: place of the parameter that the factors belong to.
        bias: place of the bias that is its last column; None if there is none.
    """

    main: int
    bias: int | None = None

    @property
    def members(self) -> tuple[int, ...]:
        return (self.main,) if self.bias is None else (self.main, self.bias)


@dataclass(frozen=True)
class Rows:
    """The rows of one call: K = sum over positions of l l' (x) r r', with l and r taken for independent.

    Attributes:
        left: (G, R, rows), or the index (R,) of the single 1 of each.
        right: (G, R, columns); None for a vector.
        num_rows: length of l where it is an index.
        loss_left: whether l holds the gradients, which a batch's weight belongs to; else r does.
    """

    left: Tensor
    right: Tensor | None
    num_rows: int
    loss_left: bool

    def double(self) -> Rows:
        """Return the rows in float64."""
        left = self.left if self.num_rows else self.left.double()
        return replace(self, left=left, right=None if self.right is None else self.right.double())


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer."""

    layer: Layer
    use: Use

    @property
    def kind(self) -> str:
        """Calls of one kind add up; "linear" and "embedding" of a tied table do not."""
        return f"{self.use.kind}{' transposed' if self.use.place.transposed else ''}"

    def rows(self, delta: Tensor, parameter: Tensor, sharing: str) -> Rows | None:
        """Return the rows of one vector in the outputs, given what arrives in this call's output; None if it has none.

        Args:
            delta: the gradient in the call's output.
            parameter: the layer's.
            sharing: "expand", every position a row; "reduce", the inputs' mean and the gradients' sum over positions.
        """
        form, count = self._form(delta, parameter)
        if isinstance(form, Factors):
            left, right = form.left, form.right.take(0, count)
            loss_left = self.use.kind in _WITH_BIAS and not self.use.place.transposed
            loss_left |= self.use.kind in ("matmul", "mm", "addmm") and self.use.place.transposed
            if self.layer.bias is not None:
                right = torch.cat([right, right.new_ones(*right.shape[:3], 1)], 3)
            if sharing == "reduce":
                left, right = (
                    (t.sum(2, keepdim=True) if of_loss else t.mean(2, keepdim=True))
                    for t, of_loss in ((left, loss_left), (right, not loss_left))
                )
            left, right = (t.transpose(0, 1).reshape(t.shape[1], -1, t.shape[3]) for t in (left, right))
            return Rows(left, right, 0, loss_left)
        if isinstance(form, Indexed):
            values = form.values.reshape(1, -1, form.values.shape[-1])
            return Rows(form.index.reshape(-1), values, form.num_rows, False)
        if isinstance(form, Direct):
            return Rows(form.values[None], None, 0, True)
        return None

    def projected(self, delta: Tensor, parameter: Tensor, probe: Probe) -> tuple[Tensor, Tensor] | None:
        """Return the inner product with a probe of what this call adds to its parameter's gradient, and its size."""
        form, _ = self._form(delta, parameter)
        return form.project(probe) if isinstance(form, (Factors, Indexed, Direct)) else None

    def _form(self, delta: Tensor, parameter: Tensor) -> tuple[Form | None, int]:
        """Return the gradients of the call's rows, and their number."""
        wide = torch.promote_types(torch.promote_types(delta.dtype, parameter.dtype), torch.float32)
        delta = delta.detach().to(wide).reshape(self.use.shape)
        count = 1 if delta.ndim <= 1 and self.use.kind in _WITH_BIAS else len(delta) if delta.ndim else 1
        return self._form_of_rows(delta, count, parameter), count

    def _form_of_rows(self, delta: Tensor, count: int, parameter: Tensor) -> Form | None:
        place = self.use.place
        examples = _ByRow(count)
        if place.source is not None:  # what was looked up in a table, added to what examples have
            index = place.index()[..., 0] // parameter.shape[1]  # type: ignore[misc]
            return Indexed(index.expand(delta.shape[:-1]).flatten(1), delta.flatten(1, -2), len(parameter))
        form = self.use.build(delta, examples)
        if place.transposed and isinstance(form, Factors):
            return form.transposed()
        return form if place.index is None else None


def seen_calls(capture: Capture) -> list[LayerCall]:
    """Return every use of a parameter by a known function, each parameter by itself."""
    return [LayerCall(Layer(use.parameter), use) for use in _counted(capture.uses)]


def layer_calls(
    capture: Capture, shapes: Sequence[torch.Size], without: Mapping[int, str]
) -> tuple[list[LayerCall], dict[int, str]]:
    """Return the calls of layers of a forward pass, and of parameters without factors why there are none.

    Args:
        capture: that saw the pass.
        shapes: of the parameters.
        without: place of a parameter that gets no factors -> why.
    """
    uses, refused = list(_counted(capture.uses)), dict(without)
    for use in uses:
        if use.place.index is not None and not use.place.transposed and use.place.source is None:
            refused[use.parameter] = f"a part of it is used by {use.kind}"
    biases: dict[int, set[int | None]] = {}  # of each weight, over its calls
    weights: dict[int, set[int | None]] = {}
    for use in uses:
        if len(shapes[use.parameter]) > 1:
            own = {u.parameter for u in uses if u.edge == use.edge and len(shapes[u.parameter]) == 1}
            joined = use.kind in _WITH_BIAS and not use.place.transposed and len(own) == 1
            biases.setdefault(use.parameter, set()).add(own.pop() if joined else None)
    for use in uses:
        if len(shapes[use.parameter]) == 1:
            partners = {u.parameter for u in uses if u.edge == use.edge and len(shapes[u.parameter]) > 1}
            weights.setdefault(use.parameter, set()).add(partners.pop() if len(partners) == 1 else None)
    joined_to: dict[int, int] = {}
    for weight, found in biases.items():
        bias = next(iter(found)) if len(found) == 1 else None
        if bias is not None and weights[bias] == {weight} and weight not in refused and bias not in refused:
            joined_to[weight] = bias
    calls = []
    for use in uses:
        i = use.parameter
        if i not in refused and i not in joined_to.values():
            calls.append(LayerCall(Layer(i, joined_to.get(i)), use))
    known = {i for call in calls for i in call.layer.members}
    reasons = {i: "no layer that has factors uses it" for i in range(len(shapes)) if i not in known}
    return calls, {**reasons, **refused}


def remembered_layers(states: Sequence[Mapping[str, Tensor]]) -> dict[int, Layer]:
    """Return the layers that the states of all parameters tell of, by the place of each of their parameters."""
    joined: dict[int, list[int]] = {}
    for place, state in enumerate(states):
        if "layer" in state:
            joined.setdefault(int(state["layer"]), []).append(place)
    found: dict[int, Layer] = {}
    for main, places in joined.items():
        found |= dict.fromkeys(places, Layer(main, next((i for i in places if i != main), None)))
    return found


def _counted(uses: Sequence[Use]) -> Iterator[Use]:
    """Leave out one of two: what is looked up once for all examples counts where it meets them."""
    later = {use.place.source: use for use in uses if use.place.source is not None}
    for k, use in enumerate(uses):
        met = later.get(k)
        if use.place.source is not None:
            looked_up = uses[use.place.source]
            if use.kind == "add" and len(use.shape) > len(looked_up.shape):
                yield use
        elif met is None or not (met.kind == "add" and len(met.shape) > len(use.shape)):
            yield use
