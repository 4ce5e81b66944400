"""The methods that are measured: this toolkit's, plain autograd as one would write it, and other libraries'.

A method turns (problem, operator) into a product: a function of a vector (n,), or of a block (n, k) where `columns` is
k. Libraries are imported when first asked for, so that one can be measured where another is not installed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.common.problems import Problem

__all__ = ["GPU_METHODS", "METHODS", "Method", "Operator", "Product"]

Operator = Literal["hessian", "ggn"]
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class Method:
    """How a product is made, and how it is called in the table."""

    name: str
    label: str
    make: Callable[[Problem, Operator], Product]
    load: Callable[[], Any]
    """Imports what it needs, before memory is measured."""
    operators: tuple[Operator, ...] = ("hessian", "ggn")
    columns: int = 1
    ours: bool = False


# -- this toolkit -----------------------------------------------------------------------------------------------------


def _load_ours() -> Any:
    import curvature

    return curvature


def _ours(keep_graphs: bool) -> Callable[[Problem, Operator], Product]:
    def make(problem: Problem, operator: Operator) -> Product:
        curvature = _load_ours()
        data = (problem.inputs, problem.targets)
        objective = curvature.Objective(problem.model, problem.loss, data, keep_graphs=keep_graphs)
        A = {"hessian": curvature.HessianOperator, "ggn": curvature.GGNOperator}[operator](objective)
        return _Ours(A)

    return make


class _Ours:
    """A product, and the look at the present point that it begins with."""

    def __init__(self, A: Any) -> None:
        self.A, self.look = A, A.objective.freshness.look

    def __call__(self, X: Tensor) -> Tensor:
        product: Tensor = self.A @ X
        return product


# -- plain autograd ---------------------------------------------------------------------------------------------------


def flatten(tensors: tuple[Tensor, ...]) -> Tensor:
    """Return the entries of all tensors as one vector."""
    return torch.cat([t.reshape(-1) for t in tensors])


def by_hand(problem: Problem, operator: Operator) -> Product:
    """Ordinary double backward on a graph that is kept. In float64 this is the reference for all others."""
    params = problem.params
    sizes = [p.numel() for p in params]

    def split(v: Tensor) -> list[Tensor]:
        return [part.view_as(p) for part, p in zip(v.split(sizes), params, strict=True)]

    if operator == "hessian":
        gradient = torch.autograd.grad(problem.evaluate(), params, create_graph=True)
        return lambda v: flatten(torch.autograd.grad(gradient, params, split(v), retain_graph=True))

    outputs = problem.model(problem.inputs)
    u = torch.zeros_like(outputs, requires_grad=True)
    transposed = torch.autograd.grad(outputs, params, u, create_graph=True)  # J'u, linear in u
    leaf = outputs.detach().requires_grad_()
    (loss_gradient,) = torch.autograd.grad(problem.loss(leaf, problem.targets), leaf, create_graph=True)

    def product(v: Tensor) -> Tensor:
        (Jv,) = torch.autograd.grad(transposed, u, split(v), retain_graph=True)
        (HJv,) = torch.autograd.grad(loss_gradient, leaf, Jv, retain_graph=True)
        return flatten(torch.autograd.grad(outputs, params, HJv, retain_graph=True))

    return product


def _by_hand_replayed(problem: Problem, operator: Operator) -> Product:
    """Capture the kernels of a product by hand in a CUDA graph, and replay them without launching each."""
    v = torch.zeros(problem.num_params, device=problem.inputs.device, dtype=problem.params[0].dtype)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # backward passes run on the streams of their forward passes
        product = by_hand(problem, operator)
        for _ in range(3):
            product(v)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result = product(v)

    def replayed(x: Tensor, _alive: Product = product) -> Tensor:
        v.copy_(x)
        graph.replay()
        return result.clone()

    return replayed


def _compiled(problem: Problem, operator: Operator) -> Product:
    """Forward mode over reverse mode, compiled: torch.func has no graph that is kept."""
    assert operator == "hessian"
    names = [name for name, _ in problem.model.named_parameters()]
    sizes = [p.numel() for p in problem.params]

    def loss(*values: Tensor) -> Tensor:
        outputs = torch.func.functional_call(problem.model, dict(zip(names, values, strict=True)), problem.inputs)
        result: Tensor = problem.loss(outputs, problem.targets)
        return result

    gradient = torch.func.grad(loss, argnums=tuple(range(len(names))))
    torch.compiler.reset()  # another network's shapes would make these dynamic

    @torch.compile
    def product(values: tuple[Tensor, ...], directions: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        result: tuple[Tensor, ...] = torch.func.jvp(gradient, values, directions)[1]
        return result

    values = tuple(p.detach() for p in problem.params)

    def flat(v: Tensor) -> Tensor:
        parts = v.split(sizes)
        return flatten(product(values, tuple(part.view_as(p) for part, p in zip(parts, values, strict=True))))

    return flat


def _load_cuda() -> None:
    if not torch.cuda.is_available():
        raise ImportError("there is no CUDA device")


# -- other libraries --------------------------------------------------------------------------------------------------


def _load_curvlinops() -> Any:
    import curvlinops

    return curvlinops


def _curvlinops(problem: Problem, operator: Operator) -> Product:
    library = _load_curvlinops()
    kind = {"hessian": library.HessianLinearOperator, "ggn": library.GGNLinearOperator}[operator]
    data = [(problem.inputs, problem.targets)]
    A = kind(
        problem.model, problem.loss, problem.params, data, check_deterministic=False
    )  # its guard costs 10 gradients
    return lambda X: A @ X


def _load_hessian_eigenthings() -> Any:
    import hessian_eigenthings.operators

    return hessian_eigenthings.operators


def _hessian_eigenthings(method: str) -> Callable[[Problem, Operator], Product]:
    def make(problem: Problem, operator: Operator) -> Product:
        library = _load_hessian_eigenthings()
        data = [(problem.inputs, problem.targets)]

        def forward(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            outputs: Tensor = model(batch[0])
            return outputs

        def loss_of_output(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
            loss: Tensor = problem.loss(outputs, batch[1])
            return loss

        if operator == "ggn":
            A = library.GGNOperator(problem.model, data, forward, loss_of_output)
        else:
            A = library.HessianOperator(
                problem.model, data, lambda model, batch: loss_of_output(forward(model, batch), batch), method=method
            )
        return lambda v: A @ v

    return make


def _load_pyhessian() -> Any:
    import pyhessian

    return pyhessian


def _pyhessian(problem: Problem, operator: Operator) -> Product:
    assert operator == "hessian"
    library = _load_pyhessian()
    data = (problem.inputs, problem.targets)
    A = library.hessian(problem.model, problem.loss, data=data, cuda=problem.inputs.is_cuda)
    sizes = [p.numel() for p in A.params]

    def product(v: Tensor) -> Tensor:
        parts = [part.view_as(p) for part, p in zip(v.split(sizes), A.params, strict=True)]
        return flatten(library.utils.hessian_vector_product(A.gradsH, A.params, parts))

    return product


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(name="kept", label="graph kept", make=_ours(True), load=_load_ours, ours=True),
        Method(
            name="kept-16", label="graph kept, block of 16", make=_ours(True), load=_load_ours, columns=16, ours=True
        ),
        Method(name="rebuilt", label="graph rebuilt", make=_ours(False), load=_load_ours, ours=True),
        Method(
            name="rebuilt-16",
            label="graph rebuilt, block of 16",
            make=_ours(False),
            load=_load_ours,
            columns=16,
            ours=True,
        ),
        Method(name="by-hand", label="double backward by hand, graph kept", make=by_hand, load=lambda: None),
        Method(name="curvlinops", label="curvlinops 3.0.1", make=_curvlinops, load=_load_curvlinops),
        Method(
            name="curvlinops-16",
            label="curvlinops 3.0.1, block of 16",
            make=_curvlinops,
            load=_load_curvlinops,
            columns=16,
        ),
        Method(
            name="hessian-eigenthings",
            label="hessian-eigenthings 1.0.0a5",
            make=_hessian_eigenthings("autograd"),
            load=_load_hessian_eigenthings,
        ),
        Method(
            name="hessian-eigenthings-fd",
            label="hessian-eigenthings 1.0.0a5, finite differences",
            make=_hessian_eigenthings("finite_difference"),
            load=_load_hessian_eigenthings,
            operators=("hessian",),
        ),
        Method(
            name="pyhessian",
            label="PyHessian 0.1, one batch",
            make=_pyhessian,
            load=_load_pyhessian,
            operators=("hessian",),
        ),
    )
}
GPU_METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method(
            name="by-hand-replayed",
            label="double backward by hand, CUDA graph",
            make=_by_hand_replayed,
            load=_load_cuda,
        ),
        Method(
            name="compiled",
            label="forward over reverse mode by hand, torch.compile",
            make=_compiled,
            load=lambda: None,
            operators=("hessian",),
        ),
    )
}
"""Tried on GPUs only, where launching kernels is what a small network's product may cost."""
