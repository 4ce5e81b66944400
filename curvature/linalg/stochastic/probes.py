"""Random probe vectors z with E[z z'] = I, as columns.

References: Hutchinson (1990), for signs; Girard (1989), for normal entries; Epperly, Tropp and Webber (2024), for
the sphere.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.cost import check_fits
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator
from curvature.linalg.base.validate import check_count
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor


@checked
def rademacher(
    n: int,
    k: int,
    *,
    generator: AnyGenerator,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    sharding: Layout | None = None,
) -> Tensor:
    """Return k columns of random signs, (n, k).

    They have the least variance for traces: Var(z'Az) = 2 sum_{i != j} A_ij^2 for symmetric A. Columns are independent,
    but drawn anew where all are one vector up to sign, which for 1 < n <= 64 happens and would tell no spread; means of
    z'Az and |Az|^2 stay unbiased. The device is that of the generator by default, which may be a seed. With `sharding`,
    as operators have it, they are sharded; on CPUs they are the same numbers.
    """
    source = _source(n, k, generator, dtype, device)
    draw = partial(torch.randint, 0, 2, generator=source, device=device or source.device)
    while True:
        bits = draw((k, n)) if sharding is None else sharding.drawn(lambda count: draw((count,)), k, dtype)
        Z = _placed((2 * bits - 1).to(dtype), sharding)
        if not (1 < n <= 64 and one_direction(Z)):
            return Z


@checked
def normal(
    n: int,
    k: int,
    *,
    generator: AnyGenerator,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    sharding: Layout | None = None,
) -> Tensor:
    """Return k columns of independent standard normal entries, (n, k). Var(z'Az) = 2 |A|_F^2 for symmetric A."""
    source = _source(n, k, generator, dtype, device)
    draw = partial(torch.randn, generator=source, dtype=dtype, device=device or source.device)
    return _placed(draw(k, n) if sharding is None else sharding.drawn(draw, k, dtype), sharding)


@checked
def sphere(
    n: int,
    k: int,
    *,
    generator: AnyGenerator,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    sharding: Layout | None = None,
) -> Tensor:
    """Return k independent columns, uniform on the sphere of radius sqrt(n), (n, k).

    Var(z'Az) = 2n/(n+2) (|A|_F^2 - (tr A)^2 / n) for symmetric A: exact for multiples of the identity.
    """
    z = normal(n, k, generator=generator, dtype=dtype, device=device, sharding=sharding)
    return z * (n**0.5 / z.norm(dim=0))


def _placed(rows: Tensor, sharding: Layout | None) -> Tensor:
    """Return rows, or this rank's part of them, as columns."""
    return rows.T if sharding is None else ShardedTensor(rows, sharding).T


DISTRIBUTIONS = {"rademacher": rademacher, "normal": normal, "sphere": sphere}


def one_direction(Z: Tensor) -> bool:
    """Return whether all columns, two at least, are one vector up to sign: then their samples agree and tell no spread.

    Of k sign vectors of length n that happens with probability 2^((1 - n) (k - 1)).
    """
    squares = (Z.T @ Z[:, :1]).square().flatten()
    return Z.shape[1] > 1 and bool((squares >= (1 - 1e-6) * Z.square().sum(dim=0) * squares[0].sqrt()).all())


def _source(
    n: int, k: int, generator: AnyGenerator, dtype: torch.dtype, device: torch.device | str | None
) -> torch.Generator:
    """Return the generator to draw from; refuse what is no probe or does not fit."""
    check_count("n", n, 0)
    check_count("k", k, 0)
    if not dtype.is_floating_point:
        raise InputError(f"dtype must be floating-point, got {dtype}.")
    source = as_generator(generator, device or getattr(generator, "device", None) or "cpu")
    if n * k * dtype.itemsize > 2**28:
        check_fits(n * k * dtype.itemsize, source.device, f"{k} probes of length {n}", "take fewer")
    return source
