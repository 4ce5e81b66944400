"""Random numbers that depend on counters alone: (seed, step, sample), never on what was drawn before.

A resumed run draws what the uninterrupted one would have drawn, ranks of a data-parallel run agree without telling each
other, and the user's own random stream is left alone. Each step's numbers come from one packed draw over all
parameters, so that many small tensors cost as much as one large one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

__all__ = ["counter_generator", "mixed_seed", "random_normals", "random_signs"]

_MASK = (1 << 64) - 1
_PROBES, _NORMALS = 1, 2  # keep these streams apart from others under the same seed


def mixed_seed(*counters: int) -> int:
    """Return 64 bits that differ in about half of the places when any counter changes.

    Each counter goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), which spreads neighbouring
    integers over all 64 bits.

    Examples:
        >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
        (True, False)
    """
    state = 0
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def counter_generator(device: torch.device, *counters: int) -> torch.Generator:
    """Return a generator whose stream is a function of the counters."""
    return torch.Generator(device).manual_seed(mixed_seed(*counters))


def random_signs(params: Sequence[Tensor], seed: int, step: int, sample: int) -> list[Tensor]:
    """Return independent random signs in the shape, dtype and device of each parameter.

    The signs of a parameter are a function of (seed, step, sample) and of its place in `params`; those on a GPU differ
    from those on a CPU, whose generators differ. Cost: an eighth of a random 64-bit word an entry, one draw a device.
    """
    signs: dict[int, Tensor] = {}
    for device in dict.fromkeys(p.device for p in params):
        here = [i for i, p in enumerate(params) if p.device == device]
        ours = [params[i] for i in here]
        words = torch.empty((sum(p.numel() for p in ours) + 7) // 8, dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=counter_generator(device, _PROBES, seed, step, sample))
        for dtype in dict.fromkeys(p.dtype for p in ours):  # +1 or -1 as a random byte has its sign
            ones = torch.copysign(torch.ones((), dtype=dtype, device=device), words.view(torch.int8))
            views = zip(here, _unflatten_dense_tensors(ones, ours), strict=True)
            signs |= {i: view for i, view in views if params[i].dtype == dtype}
    return [signs[i] for i in range(len(params))]


def random_normals(params: Sequence[Tensor], seed: int, step: int, sample: int) -> list[Tensor]:
    """Return independent standard normal numbers in the shape, dtype and device of each parameter.

    They are a function of (seed, step, sample) and of the parameter's place in `params`; those on a GPU differ from
    those on a CPU, whose generators differ.
    """
    found: dict[int, Tensor] = {}
    for device in dict.fromkeys(p.device for p in params):
        here = [i for i, p in enumerate(params) if p.device == device]
        ours = [params[i] for i in here]
        generator = counter_generator(device, _NORMALS, seed, step, sample)
        dtype = torch.float64 if any(p.dtype == torch.float64 for p in ours) else torch.float32
        flat = torch.randn(sum(p.numel() for p in ours), generator=generator, device=device, dtype=dtype)
        found |= {i: v.to(params[i].dtype) for i, v in zip(here, _unflatten_dense_tensors(flat, ours), strict=True)}
    return [found[i] for i in range(len(params))]
