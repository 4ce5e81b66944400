"""What every operator must satisfy, and what nothing may change."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

TOLERANCE = {torch.float64: 1e-8, torch.float32: 2e-4}  # of a product, relative to its norm
BATCHING_TOLERANCE = 1e-10  # float64: the same sum, cut otherwise


class Operator(Protocol):
    @property
    def shape(self) -> Any: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def __matmul__(self, X: Tensor, /) -> Any: ...


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |actual - expected| / |expected|; where that is 0/0, 0."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}"
    error, size = float((actual - expected).norm()), float(expected.norm())
    return 0.0 if error == size == 0 else error / max(size, torch.finfo(expected.dtype).tiny)


def assert_close(actual: Tensor, expected: Tensor, rtol: float | None = None) -> None:
    """Compare in norm, to the tolerance of the dtype unless a test has a reason for another."""
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype} instead of {expected.dtype}"
    error = relative_error(actual, expected)
    assert error <= (TOLERANCE[expected.dtype] if rtol is None else rtol), f"relative error {error:.1e}"


def check_operator(A: Operator, dense: Tensor, generator: torch.Generator, rtol: float | None = None) -> None:
    """Check a symmetric operator against a dense matrix and against the laws of matrices."""
    assert tuple(A.shape) == tuple(dense.shape)
    v, X = (torch.randn(A.shape[1], *k, generator=generator, dtype=A.dtype) for k in ((), (3,)))
    before = v.clone()
    Av, AX, columns = A @ v, A @ X, torch.stack([A @ x for x in X.T], dim=1)
    assert_close(Av, dense @ v, rtol)
    assert_close(AX, dense @ X, rtol)
    assert_close(AX, columns, rtol)  # a block is its columns
    assert_close(A @ (2 * v + X[:, 0]), 2 * Av + columns[:, 0], rtol)  # linear
    torch.testing.assert_close(A @ v, Av, rtol=0, atol=0)  # deterministic
    gap = abs(float(X[:, 0] @ Av - v @ columns[:, 0]))
    assert gap <= (rtol or TOLERANCE[A.dtype]) * float(dense.norm() * v.norm() * X[:, 0].norm())  # symmetric
    assert torch.equal(v, before)


@contextlib.contextmanager
def assert_untouched(model: nn.Module) -> Iterator[None]:
    """Check that what runs inside, even if it raises, leaves the model and torch's global state as they were."""
    before = _state(model)
    try:
        yield
    finally:
        after = _state(model)
        for what, value in before.items():
            assert _same(value, after[what]), f"{what} changed"


def _state(model: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {
        "random state": torch.get_rng_state(),
        "attention fast path": torch.backends.mha.get_fastpath_enabled(),
        "attention kernels": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
        ),
        "grad mode": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "training flags": [m.training for m in model.modules()],
        "set of buffers": [name for name, _ in model.named_buffers()],
        "set of hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
    }
    for name, p in model.named_parameters():
        state[f"value of {name}"] = p.detach().clone()
        state[f"storage of {name}"] = (id(p), p.data_ptr(), p._version)
        state[f"grad of {name}"] = None if p.grad is None else p.grad.clone()
        state[f"requires_grad of {name}"] = p.requires_grad
    for name, b in model.named_buffers():
        state[f"value of {name}"] = b.detach().clone()
        state[f"storage of {name}"] = (id(b), b.data_ptr(), b._version)
    return state


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else bool(a == b)
