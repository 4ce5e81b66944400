"""Digests that are alike in all processes and on every device."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["argument", "content", "text_digest"]

_WIDTH = 4096
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int32}  # sums of 64 bits would drop high ones


def text_digest(*values: Any) -> int:
    """Return 61 bits of what values print as, alike in all processes."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "big") >> 3


def content(tensors: Iterable[Tensor]) -> int:
    """Return 61 bits of the bits of tensors. Cost: two reads.

    Sums of integers, exact and the same on every device: of the rows and of the columns of a matrix 4096 words wide,
    each weighted by its place, so that permutations and moves that cancel show.
    """
    found = [part for t in tensors for part in _sums(t)]
    if not found:
        return 0
    return text_digest(torch.stack([part.to("cpu") for part in found]).tolist())


def argument(name: str, value: Any) -> int | None:
    """Return a digest of what a call is given, alike where the same is given in other processes, or on other devices.

    None for None, and for what is not compared: functions, which one rank alone may give, parts of tensors, collections
    of tensors, which may be its own data, and all but numbers, texts, tensors, generators, and records and collections
    of these. A seed is the generator that it stands for; 3, np.int64(3), 3.0 and torch.tensor(3) are one number.
    """
    if name == "generator" and isinstance(value, (int, np.integer)):
        value = torch.Generator().manual_seed(int(value))
    if isinstance(value, torch.Generator):
        return content([value.get_state()])
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if type(value) is Tensor and value.ndim == 0 and not value.is_complex():
        value = value.item()  # passes as a number, as NumPy's do
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) in (Tensor, torch.nn.Parameter):
        return text_digest(tuple(value.shape), content([value]))
    if isinstance(value, (str, torch.device)):
        return text_digest(str(value).partition(":")[0])  # "cuda:1" is what "cuda:0" is to another rank
    if isinstance(value, (bool, int, float, complex, torch.dtype)):
        return text_digest(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if "seconds" not in f.name}
    if isinstance(value, Mapping):
        return text_digest(sorted((str(k), argument("", v)) for k, v in value.items()))
    if isinstance(value, (set, frozenset)):
        return text_digest(sorted(str(argument("", v)) for v in value))
    if isinstance(value, (list, tuple, range)):
        return text_digest([None if isinstance(v, Tensor) else argument("", v) for v in value])
    return None


def _sums(t: Tensor) -> list[Tensor]:
    t = t.detach()
    if t.layout != torch.strided:
        t = t.to_dense()
    if t.numel() == 0:
        return []
    flat = t.reshape(-1).contiguous()
    flat = torch.view_as_real(flat).reshape(-1) if flat.is_complex() else flat
    words = flat.view(_WORDS[flat.element_size()])
    full = len(words) // _WIDTH * _WIDTH
    parts = [words[:full].view(-1, _WIDTH)] if full else []
    parts += [words[full:].view(1, -1)] if full < len(words) else []
    sums = []
    for part in parts:
        for dim in (0, 1):
            s = part.sum(dim, dtype=torch.int64)
            places = torch.arange(1, 2 * len(s), 2, dtype=torch.int64, device=s.device)
            sums.append((s * (places * 0x9E3779B97F4A7C1)).sum())
    return sums
