"""The curvature of one trained network: what classical counting would go by, and what it misses.

With J the Jacobian of the outputs and H_i the Hessian of example i's loss in them, the Gauss-Newton matrix of the mean
loss is G = (1/N) sum_i J_i' H_i J_i. Its eigenvalues other than zero are those of R R', R = N^(-1/2) S'J with
S S' = H, and R R' follows from the kernel J J': the smaller of the two sides is made, in float64.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from curvature.linalg.krylov.eigsh import eigsh
from curvature.linalg.stochastic.functionals import effective_dimension
from curvature.objective.objective import Objective
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["DENSE", "PointCurvature", "curvature_at", "gauss_newton_spectra", "seconds_at", "spread_of_nonzero"]

DENSE = 4000
"""Up to here, the smaller of the number of parameters and that of outputs, all eigenvalues are computed."""
_CHUNK = 64
_CELLS = 12_000_000  # of a block of the Jacobian, float64: 100 MB

Piece = tuple[str, int, int]  # name of a parameter, and a stretch of its entries


@dataclass(frozen=True, kw_only=True)
class PointCurvature:
    """Of the training loss, labels as they were trained on."""

    sharpness: float
    """Largest eigenvalue of the Hessian."""
    trace: float
    """Of the Gauss-Newton matrix."""
    effective_dimension: float
    """sum lambda / (lambda + alpha), lambda of the Gauss-Newton matrix of the loss summed over examples."""
    effective_dimension_stderr: float
    """Over probes; 0 where all eigenvalues are known."""
    condition: float
    """Of the kernel J J': largest over smallest eigenvalue other than zero; NaN where it is too large a matrix."""
    rank: int
    """Number of eigenvalues of J J' above the cutoff, largest x size x 2.2e-16; -1 where they are not known."""


def curvature_at(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor, *, regulariser: float, seed: int
) -> PointCurvature:
    """Measure a model at its present point, in eval mode and float64.

    Args:
        model: a classifier.
        loss: the mean over examples.
        x: (N, ...).
        y: (N,).
        regulariser: alpha, beside the loss summed over examples.
        seed: of what is drawn.
    """
    model = copy.deepcopy(model).double().eval()
    x = x.double() if x.is_floating_point() else x
    objective = Objective(model, loss, (x, y))
    top = eigsh(objective, 1, rtol=1e-3, atol=1e-12, generator=seed)
    sharpness = float(top.eigenvalues[0])
    found = gauss_newton_spectra(model, loss, x, y)
    if found is None:
        spread = spectrum(objective, SpectrumPlan(num_groups=0), matrix="ggn", generator=seed)
        dimension = effective_dimension(spread.density, regulariser / len(y))
        return PointCurvature(
            sharpness=sharpness,
            trace=float(spread.trace().value),
            effective_dimension=float(dimension.value),
            effective_dimension_stderr=float(dimension.stderr),
            condition=math.nan,
            rank=-1,
        )
    ggn, kernel = found
    summed = len(y) * ggn.clamp_min(0)
    condition, rank = spread_of_nonzero(kernel)
    return PointCurvature(
        sharpness=sharpness,
        trace=float(ggn.sum()),
        effective_dimension=float((summed / (summed + regulariser)).sum()),
        effective_dimension_stderr=0.0,
        condition=condition,
        rank=rank,
    )


def seconds_at(model: nn.Module, num_outputs: int) -> float:
    """Return about how long `curvature_at` takes for a network with so many outputs in all, on one core."""
    size = min(sum(p.numel() for p in model.parameters()), num_outputs, DENSE)
    return 0.4 + 2e-10 * size**3


def spread_of_nonzero(eigenvalues: Tensor) -> tuple[float, int]:
    """Return largest over smallest of the eigenvalues above largest x count x eps, and how many these are."""
    top = float(eigenvalues.max())
    kept = eigenvalues[eigenvalues > top * len(eigenvalues) * torch.finfo(eigenvalues.dtype).eps]
    return (top / float(kept.min()), len(kept)) if top > 0 else (math.nan, 0)


def gauss_newton_spectra(
    model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor
) -> tuple[Tensor, Tensor] | None:
    """Return the eigenvalues of G and of J J', the min(P, N C) largest of each; None where these are more than `DENSE`.

    Args:
        model: of floating-point parameters, P in all, in eval mode.
        loss: a mean over examples, each of which has its own part.
        x: (N, ...).
        y: (N,).
    """
    model = copy.deepcopy(model)  # functional_call does not put tied parameters back as they were
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        outputs = model(x)
    N, C = outputs.shape
    P = sum(p.numel() for p in params.values())
    if min(P, N * C) > DENSE:
        return None
    bends = vmap(jacrev(jacrev(lambda z, t: loss(z[None], t[None]))))(outputs, y) / N  # (N, C, C)
    if P <= N * C:
        ggn, kernel = x.new_zeros(P, P), x.new_zeros(P, P)
        whole = [(name, 0, p.numel()) for name, p in params.items()]
        for start in range(0, N, _CHUNK):
            J = _rows(model, whole, x[start : start + _CHUNK])
            flat = J.flatten(0, 1)
            kernel += flat.T @ flat
            ggn += (bends[start : start + _CHUNK] @ J).flatten(0, 1).T @ flat
    else:
        kernel = _kernel(model, params, x, C)
        values, vectors = torch.linalg.eigh(bends)
        roots = vectors * values.clamp_min(0).sqrt()[:, None]  # (N, C, C), S of each
        half = torch.einsum("jdnc,ncb->jdnb", kernel.reshape(N, C, N, C), roots)
        ggn = torch.einsum("jda,jdnb->janb", roots, half).reshape(N * C, N * C)
    return torch.linalg.eigvalsh((ggn + ggn.T) / 2), torch.linalg.eigvalsh(kernel)


def _rows(model: nn.Module, pieces: list[Piece], x: Tensor) -> Tensor:
    """Return the derivatives (n, C, p) of the outputs in some stretches of flattened parameters."""
    state = {name: t.detach() for name, t in [*model.named_parameters(), *model.named_buffers()]}
    parts = [state[name].flatten()[a:b] for name, a, b in pieces]

    def of_one(parts: list[Tensor], one: Tensor) -> Any:
        changed = dict(state)
        for (name, a, b), part in zip(pieces, parts, strict=True):
            flat = state[name].flatten()
            changed[name] = torch.cat([flat[:a], part, flat[b:]]).reshape(state[name].shape)
        return functional_call(model, changed, (one[None],))[0]

    jacobians = vmap(lambda one: jacrev(of_one)(parts, one))(x)
    return torch.cat(jacobians, dim=2)


def _kernel(model: nn.Module, params: dict[str, Tensor], x: Tensor, C: int) -> Tensor:
    """Return J J', a sum over parameters: of linear layers from their inputs, of others a stretch at a time."""
    N = len(x)
    kernel, left = x.new_zeros(N * C, N * C), dict(params)
    v = torch.randn(N, C, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(x)
    for name, inputs in _linear_inputs(model, x).items():
        weight, bias = f"{name}weight", f"{name}bias"
        if weight in left and bias in left:  # dz/dW = (dz/db) a'
            D = _whole(model, [(bias, 0, left[bias].numel())], x)
            rows = (D.view(N, C, -1) * v[:, :, None]).sum(1)
            if not _only_there(model, weight, v, x, rows.T @ inputs):
                continue
            along = (inputs @ inputs.T).repeat_interleave(C, 0).repeat_interleave(C, 1)
            kernel += (D @ D.T) * (1 + along)
            del left[weight], left[bias]
    step = max(1, _CELLS // (N * C))
    for name, p in left.items():
        for a in range(0, p.numel(), step):
            J = _whole(model, [(name, a, min(a + step, p.numel()))], x)
            kernel += J @ J.T
    return kernel


def _only_there(model: nn.Module, name: str, v: Tensor, x: Tensor, by_call: Tensor) -> bool:
    """Say whether the gradient of v'z in a weight is what the one call of its layer gives: no function has it, too."""
    state = {key: t.detach() for key, t in [*model.named_parameters(), *model.named_buffers()]}
    weight = state[name].clone().requires_grad_()
    with torch.enable_grad():
        outputs = functional_call(model, state | {name: weight}, (x,))
        (g,) = torch.autograd.grad((outputs * v).sum(), weight)
    eps = torch.finfo(x.dtype).eps
    return float((g - by_call).norm()) <= 1e4 * eps * float(g.norm() + by_call.norm())


def _whole(model: nn.Module, pieces: list[Piece], x: Tensor) -> Tensor:
    chunks = [_rows(model, pieces, x[i : i + _CHUNK]) for i in range(0, len(x), _CHUNK)]
    return torch.cat(chunks).flatten(0, 1)


def _linear_inputs(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the inputs (N, d) of the linear layers that see each example once, by the prefix of their parameters."""
    seen: dict[str, list[Tensor]] = {}
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    handles = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and all(owners[id(p)] == 1 for p in module.parameters(recurse=False)):
            calls = seen.setdefault(f"{name}." if name else "", [])
            handles.append(module.register_forward_pre_hook(lambda _, given, calls=calls: calls.append(given[0])))
    try:
        with torch.no_grad():
            model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: calls[0] for name, calls in seen.items() if len(calls) == 1 and calls[0].ndim == 2}
