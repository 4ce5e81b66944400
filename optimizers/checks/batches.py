"""Checks of what reaches an optimizer: gradients in micro-batches, spikes, parameters of which a rank holds a part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.errors import InputError
from optimizers.checks.subject import NotApplicable, Subject

__all__ = ["BATCH_CHECKS"]

_SPIKE = 1e3
"""Factor on residuals, of which the gradient of their squares has the square."""


def _matrix_problem() -> tuple[list[nn.Parameter], Callable[..., Tensor]]:
    """Return weight (6, 5), bias, and residuals(rows, weight, bias) of examples; gradients have full rank."""
    generator = torch.Generator().manual_seed(4)
    weight, x, y = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((6, 5), (12, 5), (12, 6)))
    params = [nn.Parameter(weight), nn.Parameter(torch.zeros(6, dtype=torch.float64))]
    return params, lambda rows, *given: nn.functional.linear(x[rows], *(given or params)) - y[rows]


_ALL, _HALVES = [slice(12)], [slice(0, 4), slice(4, 12)]


def _steps(s: Subject, parts: list[slice], **settings: Any) -> list[Tensor]:
    """Return the parameters after steps on batches that come in parts."""
    params, residuals = _matrix_problem()
    optimizer = s.new(params, **settings)

    def backward() -> Tensor:
        optimizer.zero_grad()
        losses = [residuals(rows).square().sum() for rows in parts]
        for loss in losses:
            loss.backward()
        return torch.stack(losses).sum()

    for _ in range(8):
        if s.form == "closure":
            optimizer.step(backward)
        elif s.form == "backward":
            backward()
            optimizer.step()
        else:
            optimizer.zero_grad()
            for rows in parts:
                optimizer.accumulate(lambda rows=rows: (z := residuals(rows), torch.zeros_like(z)))
            optimizer.step()
    return [p.detach() for p in params]


def _micro_batches(s: Subject, **settings: Any) -> None:
    if s.form in ("graph", "loss") or (s.form == "outputs" and not hasattr(s.make, "accumulate")):
        raise NotApplicable("a step sees the joined batch")
    joined = _steps(s, _ALL, **settings)
    if "seed" in s.new(_matrix_problem()[0]).defaults:
        other = _steps(s, _ALL, **settings, seed=1)
        if not all(torch.equal(a, b) for a, b in zip(joined, other, strict=True)):
            raise NotApplicable("it draws random numbers, others for every micro-batch")
    for a, b in zip(joined, _steps(s, _HALVES, **settings), strict=True):
        if not torch.allclose(a, b, rtol=1e-7, atol=1e-9):
            raise AssertionError(f"two micro-batches and the joined batch part by {float((a - b).abs().max()):.1e}")


def _refresh_among_micro_batches(s: Subject) -> None:
    s.needs("update_every")
    _micro_batches(s, update_every=3)


def _spike(s: Subject) -> None:
    """Averages may take hundreds of steps to forget a spike, so the loss is followed until it is back."""

    def loss() -> float:
        return float(outputs().detach().square().sum())

    params, outputs, optimizer = s.trained(0)
    start = loss()
    s.run(optimizer, outputs, 10)
    s.step(optimizer, lambda: _SPIKE * outputs())
    peak = loss()
    for _ in range(12):
        s.run(optimizer, outputs, 60)
        states = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]
        if not all(bool(t.isfinite().all()) for t in [*params, *states]):
            raise AssertionError("parameters or state are not finite after a gradient of a million times the usual")
        peak = max(peak, loss())
        if loss() <= max(start, 0.5 * peak):
            return
    raise AssertionError(f"720 steps after a spike of the gradient the loss is {loss():.3g}; it began at {start:.3g}")


@contextlib.contextmanager
def _some_ranks() -> Iterator[None]:
    """Use the process group that there is, or one of this process alone."""
    if dist.is_initialized():
        yield
        return
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _parts(s: Subject) -> None:
    if not dist.is_available():
        raise NotApplicable("torch was built without torch.distributed")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    whole, residuals = _matrix_problem()
    s.run(s.new(whole), lambda: residuals(slice(12)), 6)
    with _some_ranks():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        parts = [nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in _matrix_problem()[0]]
        try:
            optimizer = s.new(parts)
        except InputError as refusal:
            raise NotApplicable(f"refused with a reason: {refusal}") from None

        s.run(optimizer, lambda: residuals(slice(12), *[p.full_tensor() for p in parts]), 6)  # type: ignore[attr-defined]
        for p, q in zip(parts, whole, strict=True):
            if not torch.allclose(p.detach().full_tensor(), q.detach(), rtol=1e-7, atol=1e-9):  # type: ignore[attr-defined]
                raise AssertionError("parameters in parts take other steps than whole ones")


BATCH_CHECKS: dict[str, Callable[[Subject], None]] = {
    "micro-batches: the step of the joined batch": _micro_batches,
    "micro-batches: with a refresh due among them": _refresh_among_micro_batches,
    "a spike of the gradient is survived": _spike,
    "parameters in parts (DTensor): the steps of whole ones": _parts,
}
