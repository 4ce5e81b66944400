"""Products with the matrices of perceptrons, written out in matrix products.

A graph of linear layers and elementwise functions, one after another, needs no second backward pass. With a layer
a = h W' + b followed by f, a vector (V, c) and R for derivatives along it (Pearlmutter 1994):

    forward     R a = h V' + c + (R h) W',   R f(a) = f'(a) R a
    backward    R d = f'(a) R g + f''(a) g R a,   R dL/dW = (R d)'h + d'(R h),   R g_before = (R d) W + d V

with g the gradient in f(a) and d that in a. f', f'' g and d are of the point and are computed once; products are added
up inside matrix products. That is the count of double backward, less what autograd spends on sums, copies and calls.
Gauss-Newton products are the same without what holds d.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors
from torch.autograd.graph import GradientEdge

from curvature.autograd.backward import pull_back, walk
from curvature.autograd.lean_functions import Activation, Relu
from curvature.data.tensors import tensors_in
from curvature.engine.beside import leaves_beside
from curvature.engine.recording import all_finite

__all__ = ["Chain", "find_chain"]

_FUNCTIONS = (
    *("Tanh", "Sigmoid", "Relu", "Gelu", "Silu", "Mish", "Softplus", "Elu", "LeakyRelu", "Hardtanh", "LogSigmoid"),
    *("Sin", "Cos", "Exp", "Log1P", "Atan", "Erf", "Sqrt"),
)
_ELEMENTWISE = frozenset(f"{name}Backward0" for name in _FUNCTIONS)


@dataclass(frozen=True)
class _Layer:
    """a = h W' + b, followed by elementwise functions, as autograd recorded them."""

    node: Any
    weight: int
    """Place among the parameters."""
    bias: int | None
    functions: tuple[Any, ...]
    """From the last one back."""


@dataclass
class _Factors:
    """What a layer's products are made of, at the point."""

    inputs: Tensor
    """h, (N, m)."""
    weight: Tensor | None
    """W, (k, m); None where nothing before it depends on parameters."""
    slope: Tensor | None
    """f'(a), (N, k); None for f(a) = a."""
    bend: Tensor | None = None
    """f''(a) g; None where it is zero."""
    gradient: Tensor | None = None
    """d."""


class Chain:
    """The outputs of one batch as a chain of layers.

    Args:
        layers: from the first to the last.
        outputs: of the last.
        params: in the order of vectors.
    """

    def __init__(self, layers: Sequence[_Layer], outputs: Tensor, params: Sequence[Tensor]) -> None:
        self._layers, self._outputs = layers, outputs
        self._params = [p.detach() for p in params]
        self._factors: list[_Factors] | None = None
        self.knows_loss = False
        """Whether products with the Hessian can begin."""

    @property
    def num_layers(self) -> int:
        """How many linear layers there are."""
        return len(self._layers)

    @property
    def prepared(self) -> bool:
        """Whether products with J and J' can begin."""
        return self._factors is not None

    def kind(self) -> Hashable:
        """Return what is equal for chains of the same functions."""
        return tuple((layer.bias is None, *(f.name() for f in layer.functions)) for layer in self._layers)

    def signature(self) -> int:
        """Return a number that is equal for chains of the same functions and shapes."""
        return hash((self.kind(), tuple(p.shape for p in self._params), self._outputs.shape, self._outputs.dtype))

    # -- at the point -------------------------------------------------------------------------------------------------

    def prepare(self, loss: Tensor | None = None) -> None:
        """Compute what products with J and J' need, and with a loss, what those with its Hessian do."""
        if self._factors is None:
            self._factors = [_factors(layer) for layer in self._layers]
        if loss is None or self.knows_loss:
            return
        (g,) = pull_back([loss], [self._outputs])
        assert g is not None
        for layer, own in zip(reversed(self._layers), reversed(self._factors), strict=True):
            if own.slope is not None:
                curved = _derivatives(layer)[1]
                own.bend = None if curved is None else g * curved
                g = g * own.slope
            own.gradient = g
            if own.weight is not None:
                g = g @ own.weight
        self.knows_loss = True

    @property
    def is_finite(self) -> bool:
        """Whether the gradients in the layers are finite, which the loss's gradient is made of."""
        return all(own.gradient is not None and all_finite(own.gradient) for own in self._factors or ())

    # -- products -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def push(self, x: Tensor) -> Tensor:
        """Return J x in the shape of the outputs."""
        return self._forward(self._parts(x))[-1][1]

    @torch.no_grad()
    def pull(self, u: Tensor) -> Tensor:
        """Return J'u, (n,)."""
        return self._backward(u.to(self._outputs.dtype))

    @torch.no_grad()
    def hessian(self, x: Tensor, loss_hessian: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the product with x, (n,), of the Hessian of a loss whose own on the outputs is given."""
        vectors = self._parts(x)
        moved = self._forward(vectors)
        return self._backward(loss_hessian(moved[-1][1]).to(self._outputs.dtype), vectors, moved)

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return _unflatten_dense_tensors(x, self._params)

    def _forward(self, vectors: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return R a and R f(a) of every layer."""
        assert self._factors is not None
        found: list[tuple[Tensor, Tensor]] = []
        for layer, own in zip(self._layers, self._factors, strict=True):
            V = vectors[layer.weight].T
            a = own.inputs @ V if layer.bias is None else torch.addmm(vectors[layer.bias], own.inputs, V)
            if found:
                assert own.weight is not None
                a.addmm_(found[-1][1], own.weight.T)
            found.append((a, a if own.slope is None else a * own.slope))
        return found

    def _backward(
        self, u: Tensor, vectors: Sequence[Tensor] = (), moved: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> Tensor:
        """Return J'u; with the vectors and what they moved, add what the Hessian has beside J' M J."""
        assert self._factors is not None
        result = u.new_empty(sum(p.numel() for p in self._params))
        places = self._parts(result)
        for i in reversed(range(len(self._layers))):
            layer, own = self._layers[i], self._factors[i]
            if own.slope is not None:
                u = u * own.slope if i == len(self._layers) - 1 else u.mul_(own.slope)
                if moved and own.bend is not None:
                    u.addcmul_(own.bend, moved[i][0])
            place = torch.mm(u.T, own.inputs, out=places[layer.weight])
            if layer.bias is not None:
                torch.sum(u, 0, out=places[layer.bias])
            if i == 0:
                break
            assert own.weight is not None
            before = u @ own.weight
            if moved:
                assert own.gradient is not None
                place.addmm_(own.gradient.T, moved[i - 1][1])
                before.addmm_(own.gradient, vectors[layer.weight])
            u = before
        return result


def find_chain(loss: Tensor, outputs: Any, targets: Any, params: Sequence[Tensor]) -> Chain | None:
    """Return the outputs as a chain, if that is what autograd recorded; None for anything else.

    Every parameter must have one place in it, and the loss must depend on parameters through the outputs only, as its
    first argument: targets that are made of the outputs have a part in its Hessian that its rule does not know.
    """
    if any(t.requires_grad for t in tensors_in(targets)):
        return None
    if not isinstance(outputs, Tensor) or outputs.device.type != "cpu" or outputs.ndim != 2 or outputs.grad_fn is None:
        return None
    if outputs.dtype not in (torch.float32, torch.float64) or any(p.dtype != outputs.dtype for p in params):
        return None
    places = {id(p): i for i, p in enumerate(params)}
    layers: list[_Layer] = []
    node: Any = outputs.grad_fn
    while node is not None:
        functions = []
        while node is not None and _is_elementwise(node):
            functions.append(node)
            node = node.next_functions[0][0]
        layer = None if node is None else _linear(node, tuple(functions), places)
        if layer is None:
            return None
        layers.insert(0, layer)
        node = node.next_functions[-2][0]
    used = [place for layer in layers for place in (layer.weight, layer.bias) if place is not None]
    if sorted(used) != list(range(len(params))) or _depends_beside(loss, outputs):
        return None
    return Chain(layers, outputs, params)


def _is_elementwise(node: Any) -> bool:
    """Say whether a node is of an elementwise function of one tensor: torch's own by name, a lean one by its class."""
    lean = getattr(type(node), "_forward_cls", None) in (Activation, Relu)
    return (lean or node.name() in _ELEMENTWISE) and not any(before for before, _ in node.next_functions[1:])


def _linear(node: Any, functions: tuple[Any, ...], places: dict[int, int]) -> _Layer | None:
    """Return the layer that a node is of, if it is x W' + b or x W' with parameters W and b."""
    if node.name() == "AddmmBackward0":
        (of_bias, _), _, (of_weight, _) = node.next_functions
        if node._saved_alpha != 1 or node._saved_beta != 1:
            return None
    elif node.name() == "MmBackward0":
        of_bias, (of_weight, _) = None, node.next_functions[1]
    else:
        return None
    if of_weight is None or of_weight.name() != "TBackward0":
        return None
    weight = getattr(of_weight.next_functions[0][0], "variable", None)
    if weight is None or id(weight) not in places:
        return None
    if of_bias is None:
        return _Layer(node, places[id(weight)], None, functions) if node.name() == "MmBackward0" else None
    bias = getattr(of_bias, "variable", None)
    if bias is None or id(bias) not in places or bias.shape != weight.shape[:1]:
        return None
    return _Layer(node, places[id(weight)], places[id(bias)], functions)


def _depends_beside(loss: Tensor, outputs: Tensor) -> bool:
    """Say whether the loss depends on leaves that are not behind the outputs, or not on the outputs."""
    return any(True for _ in leaves_beside([loss], outputs)) or outputs.grad_fn not in list(walk([loss.grad_fn]))


def _factors(layer: _Layer) -> _Factors:
    first = layer.node.next_functions[-2][0] is None
    inputs = layer.node._saved_self if layer.bias is None else layer.node._saved_mat1
    weight = None if first else layer.node._saved_mat2.detach().T
    return _Factors(inputs.detach(), weight, _derivatives(layer)[0])


def _derivatives(layer: _Layer) -> tuple[Tensor | None, Tensor | None]:
    """Return f'(a) and f''(a), entrywise; None for f' = 1 and f'' = 0."""
    if not layer.functions:
        return None, None
    end, start = GradientEdge(layer.functions[0], 0), GradientEdge(layer.node, 0)
    kind = layer.functions[0]._input_metadata[0]
    ones = torch.ones(kind.shape, dtype=kind.dtype, device=kind.device)
    (slope,) = pull_back([end], [start], [ones], create_graph=True)
    assert slope is not None
    curved = pull_back([slope], [start], [ones])[0] if slope.requires_grad else None
    return slope.detach(), curved
