"""TF32 and bfloat16 in the place of float32: products that keep 10 or 7 bits, switched off where curvature is computed.

GPUs round to TF32 where they may, CPUs that can to bfloat16 under `torch.set_float32_matmul_precision("medium")`.

PyTorch has two interfaces to it: `allow_tf32` flags, and `fp32_precision` for each backend, whose settings the flags
refuse to speak of. Each is answered here in its own terms, so that neither finds a state it takes for a mixture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch

from curvature.environment.device import is_gpu

__all__ = ["tf32_in_use", "tf32_off"]

_CONVOLUTIONS = ("conv", "rnn")
_ROUNDED = ("tf32", "bf16")
_get: Callable[[str, str], str] = torch._C._get_fp32_precision_getter
_set: Callable[[str, str, str], object] = torch._C._set_fp32_precision_setter


def tf32_in_use(device: torch.device) -> bool:
    """Return whether float32 products on a device may be rounded to TF32 or bfloat16 at present."""
    backend = "cuda" if is_gpu(device) else "mkldnn"
    products, convolutions, recurrences = _get(backend, "matmul"), _get(backend, "conv"), _get(backend, "rnn")
    return products in _ROUNDED or convolutions in _ROUNDED or recurrences in _ROUNDED


@contextlib.contextmanager
def tf32_off() -> Iterator[None]:
    """Compute float32 products in float32, on all devices; leave the settings as they were found, also on an error.

    No other thread should change them meanwhile: they belong to the process. PyTorch's default for convolutions, "tf32"
    too, cannot be told from that setting afterwards: `torch.backends.fp32_precision` no longer overrides it.
    """
    with contextlib.ExitStack() as stack:
        if _get("cuda", "matmul") == "tf32":
            stack.enter_context(_products_off())
        if "tf32" in (_get("cuda", "conv"), _get("cuda", "rnn")):
            stack.enter_context(_convolutions_off())
        stack.enter_context(_cpus_off())
        yield


@contextlib.contextmanager
def _cpus_off() -> Iterator[None]:
    found = {operation: _get("mkldnn", operation) for operation in ("matmul", *_CONVOLUTIONS)}
    changed = {operation: value for operation, value in found.items() if value in _ROUNDED}
    for operation in changed:
        _set("mkldnn", operation, "ieee")
    try:
        yield
    finally:
        for operation, value in changed.items():
            _set("mkldnn", operation, "none")
            if _get("mkldnn", operation) != value:  # else it follows what is set for all
                _set("mkldnn", operation, value)


@contextlib.contextmanager
def _products_off() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    if not _answers(lambda: matmul.allow_tf32):
        with _ieee("matmul"):
            yield
        return
    precision = torch.get_float32_matmul_precision()  # "high" or "medium", which differ on CPUs
    on_cpus = _get("mkldnn", "matmul")
    matmul.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32 = True
        if precision == "medium":
            torch.set_float32_matmul_precision(precision)
            if _get("mkldnn", "matmul") != on_cpus:
                _set("mkldnn", "matmul", on_cpus)


@contextlib.contextmanager
def _convolutions_off() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    flag = _answers(lambda: cudnn.allow_tf32)
    if flag:
        cudnn.allow_tf32 = False
    try:
        with _ieee(*_CONVOLUTIONS):  # where a setting for all backends still says "tf32"
            yield
    finally:
        if flag:
            cudnn.allow_tf32 = True
            _put_back(_CONVOLUTIONS)


@contextlib.contextmanager
def _ieee(*operations: str) -> Iterator[None]:
    """Set "ieee" where it says "tf32"."""
    changed = [operation for operation in operations if _get("cuda", operation) == "tf32"]
    for operation in changed:
        _set("cuda", operation, "ieee")
    try:
        yield
    finally:
        _put_back(changed)


def _put_back(operations: Sequence[str]) -> None:
    """Let operations read "tf32" again, by what is set for their backend if that says so."""
    for operation in operations:
        _set("cuda", operation, "none")
        if _get("cuda", operation) != "tf32":
            _set("cuda", operation, "tf32")


def _answers(flag: Callable[[], bool]) -> bool:
    """Return whether a flag speaks of the present state: it raises where `fp32_precision` was used."""
    try:
        flag()
    except RuntimeError:
        return False
    return True
