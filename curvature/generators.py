"""Random numbers: a generator from whatever names one, and independent streams from a single generator."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import torch

from curvature.errors import InputError

AnyGenerator: TypeAlias = torch.Generator | int
"""A generator, or the seed of one."""


def as_generator(generator: AnyGenerator, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator on the device: the one given, or a new one from an integer seed.

    Raises:
        InputError: for a generator on another kind of device, or anything else.
    """
    device = torch.device(device)
    if isinstance(generator, (int, np.integer)) and not isinstance(generator, bool):
        return torch.Generator(device).manual_seed(int(generator))
    if not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator must be an integer seed or a torch.Generator, such as torch.Generator({str(device)!r})"
            f".manual_seed(0), got {generator!r:.50}."
        )
    if generator.device.type != device.type:
        raise InputError(
            f"generator lives on {generator.device} but the matrix on {device}; make it with "
            f"torch.Generator({str(device)!r}), or pass an integer seed."
        )
    return generator


def spawn(generator: AnyGenerator, n: int) -> list[torch.Generator]:
    """Return n new generators, on the generator's device, whose streams do not overlap: `n` seeds of 62 bits.

    One draw moves the generator on, so a second call gives other streams; the same state gives the same streams.

    Raises:
        InputError: for what is no generator and no seed.
    """
    generator = as_generator(generator, getattr(generator, "device", "cpu"))
    seeds = torch.randint(2**62, (n,), generator=generator, device=generator.device).tolist()
    return [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
