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

__all__ = ["counter_generator", "mixed_seed", "random_signs"]

_MASK = (1 << 64) - 1
_PROBES = 1  # keeps this stream apart from others under the same seed


def mixed_seed(*counters: int) -> int:
    """Return 64 bits that differ in about half of the places when any counter changes.

    Each counter goes through the finaliser of SplitMix64 (Steele, Lea and Flood, 2014), which spreads neighbouring
    integers over all 64 bits.

    Example:
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
    kinds = dict.fromkeys((p.device, p.dtype) for p in params)
    if len(kinds) == 1:  # nearly always, and small models feel every operation
        ((device, dtype),) = kinds
        return list(_signs_on(device, [dtype], params, seed, step, sample)[dtype])
    signs: list[Tensor] = [torch.empty(0)] * len(params)
    for device in dict.fromkeys(device for device, _ in kinds):
        here = [i for i, p in enumerate(params) if p.device == device]
        dtypes = [dtype for other, dtype in kinds if other == device]
        views = _signs_on(device, dtypes, [params[i] for i in here], seed, step, sample)
        for place, i in enumerate(here):
            signs[i] = views[params[i].dtype][place]
    return signs


def _signs_on(
    device: torch.device, dtypes: Sequence[torch.dtype], params: Sequence[Tensor], seed: int, step: int, sample: int
) -> dict[torch.dtype, Sequence[Tensor]]:
    """Return the signs of parameters on one device, in each dtype: +1 or -1 as a random byte has its sign."""
    n = sum(p.numel() for p in params)
    words = torch.empty((n + 7) // 8, dtype=torch.int64, device=device)
    words.random_(-(2**63), None, generator=counter_generator(device, _PROBES, seed, step, sample))
    signed = words.view(torch.int8)
    ones = {dtype: torch.ones((), dtype=dtype, device=device) for dtype in dtypes}
    return {dtype: _unflatten_dense_tensors(torch.copysign(one, signed), params) for dtype, one in ones.items()}
