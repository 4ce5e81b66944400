"""What a sharded model will take on many devices: bytes a rank, bytes moved, seconds; before there are any devices.

Two routes are planned, as `curvature.Objective` takes them. With *whole parameters* a product gathers its vector and
reduce-scatters the result, whatever the number of batches. *Module by module* a batch gathers every parameter four
times, the vector once, and reduce-scatters two contributions; activations stay those of its batch.

With n parameters of p bytes, vectors of v bytes an entry, W ranks and B batches on each, a Hessian product takes

    whole:   2 (W - 1)/W n v bytes,             16 n flops a token
    module:  (W - 1)/W n (5 p + 2 v) B bytes,   16 n flops a token

(a forward pass takes 2 n, a backward pass 4 n; module by module layers other than linear ones take 26 n, as they run
again in each pass, and are not told apart). Nothing is taken to overlap. Memory and bytes were compared
with two and four ranks, seconds with two (`benchmarks/sharded`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from curvature.arguments import checked, checked_fields
from curvature.environment.cost import gibibytes
from curvature.errors import InputError
from curvature.results.record import Result

__all__ = ["Cluster", "ModelSize", "RankCost", "Route", "rank_cost"]

Route = Literal["whole parameters", "module by module"]
_WHOLE = 3  # vectors that every rank holds whole beside the parameters: gradients; and the columns and their products
_MODULE = 4  # tensors of the largest module's size: parameters, gradient, two on their way; and directions and products
_OWN = 4  # parts of vectors beside the basis
_DERIVATIVES = 1.8  # of what a graph holds, with a derivative for most activations
_FLOPS = 16  # of a product, a token and parameter
_BUCKET = 1 << 22  # entries that a collective moves at a time
_CONTROL = 6  # small messages a product, one of them for inner products


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How large a model and its data are.

    Raises:
        InputError: for counts below 1, modules beyond the parameters, negative bytes, and dtypes without derivative.
    """

    num_params: int
    """Parameters, n."""
    largest_module: int
    """Most parameters that one module has by itself."""
    num_modules: int
    """Modules that have parameters by themselves."""
    tokens: int
    """Tokens, or examples of a model that uses each parameter once for each, over which a product sums on all ranks."""
    batch_tokens: int
    """Tokens in one batch of one rank."""
    token_bytes: int = 0
    """Bytes of activations that the graph of a batch holds for each token."""
    param_dtype: torch.dtype = torch.float32
    """Of parameters; vectors are float32 or wider."""

    def __post_init__(self) -> None:
        for name in ("num_params", "largest_module", "num_modules", "tokens", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("largest_module", "num_modules"):
            if getattr(self, name) > self.num_params:
                raise InputError(
                    f"{name} must be at most num_params = {self.num_params}, got {getattr(self, name)}: modules "
                    "without parameters of their own do not count."
                )
        if self.token_bytes < 0:
            raise InputError(f"token_bytes must be at least 0, got {self.token_bytes}.")
        if not self.param_dtype.is_floating_point:
            raise InputError(f"param_dtype must be a floating-point dtype, got {self.param_dtype}.")

    @classmethod
    def of(cls, model: nn.Module, *, tokens: int, batch_tokens: int, token_bytes: int = 0) -> ModelSize:
        """Return the size of a model, which may lie on the meta device, where it takes no memory.

        Examples:
            >>> with torch.device("meta"):
            ...     model = torch.nn.Sequential(torch.nn.Linear(4096, 16384), torch.nn.Linear(16384, 4096))
            >>> size = ModelSize.of(model, tokens=10**6, batch_tokens=4096)
            >>> size.num_params, size.largest_module, size.num_modules
            (134238208, 67125248, 2)
        """
        own = [sum(p.numel() for p in m.parameters(recurse=False)) for m in model.modules()]
        every = list(model.parameters())
        if not every:
            raise InputError("the model has no parameters.")
        return cls(
            num_params=sum(p.numel() for p in every),
            largest_module=max(own),
            num_modules=sum(count > 0 for count in own),
            tokens=tokens,
            batch_tokens=batch_tokens,
            token_bytes=token_bytes,
            param_dtype=every[0].dtype,
        )

    @property
    def dtype(self) -> torch.dtype:
        """Of vectors."""
        return torch.promote_types(self.param_dtype, torch.float32)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What a rank has; by default an H100 in a node with NVLink.

    Raises:
        InputError: for values that are not positive.
    """

    memory: float = 80e9
    """Bytes."""
    flops: float = 2e14
    """Operations a second that products reach."""
    link: float = 2e11
    """Bytes a second that a rank receives in collectives."""
    latency: float = 3e-5
    """Seconds that a collective takes at least."""

    def __post_init__(self) -> None:
        for name in ("memory", "flops", "link", "latency"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}.")


@dataclass(frozen=True, kw_only=True, repr=False)
class RankCost(Result):
    """What a call will take on each of many ranks, computed from sizes and speeds; nothing is run."""

    world_size: int
    """Ranks over which parameters and data are spread."""
    route: Route
    """Whether ranks hold whole parameters, or those of one module at a time."""
    num_matvecs: int
    """Products."""
    rank_bytes: int
    """Most bytes that a rank holds, without the process itself."""
    parts: dict[str, int]
    """What they are held for, bytes."""
    bytes_per_matvec: int
    """Bytes that a rank receives for a product."""
    collectives_per_matvec: int
    """Collectives that a product takes, small messages included."""
    compute_seconds: float
    """Of a product, seconds of arithmetic on each rank."""
    link_seconds: float
    """Of a product, seconds that collectives take."""
    seconds: float
    """Of all products."""
    fits: bool
    """Whether a rank has that much memory."""
    other: RankCost | None
    """The other route."""


@checked
def rank_cost(
    size: ModelSize,
    *,
    num_matvecs: int,
    num_basis: int,
    others: int,
    width: int = 1,
    world_size: int,
    cluster: Cluster | None = None,
) -> RankCost:
    """Return what products and a basis take on each rank, by the faster route that fits; the other one beside it.

    Args:
        size: of model and data.
        num_matvecs: products.
        num_basis: vectors of the basis.
        others: vectors beside it, such as eigenvectors.
        width: columns that are multiplied at a time.
        world_size: ranks.
        cluster: what each has.

    Raises:
        InputError: if no route fits.
    """
    if world_size < 1:
        raise InputError(f"world_size must be at least 1, got {world_size}.")
    cluster = Cluster() if cluster is None else cluster
    routes: tuple[Route, Route] = ("whole parameters", "module by module")
    found = [_by(route, size, num_matvecs, num_basis, others, width, world_size, cluster) for route in routes]
    fitting = sorted((cost for cost in found if cost.fits), key=lambda cost: cost.seconds)
    if not fitting:
        least = min(found, key=lambda cost: cost.rank_bytes)
        raise InputError(
            f"no route fits into {gibibytes(cluster.memory)} on each of {world_size} ranks: {least.route} takes "
            f"{gibibytes(least.rank_bytes)}; plan more ranks, fewer pairs or probes, or smaller batches."
        )
    other = next(cost for cost in found if cost is not fitting[0])
    return RankCost(**{**vars(fitting[0]), "other": other})


def _by(
    route: Route,
    size: ModelSize,
    num_matvecs: int,
    num_basis: int,
    others: int,
    width: int,
    world_size: int,
    cluster: Cluster,
) -> RankCost:
    n, p, v, W = size.num_params, size.param_dtype.itemsize, size.dtype.itemsize, world_size
    is_whole = route == "whole parameters"
    mine = math.ceil(n / W)
    share = math.ceil(size.tokens / W)
    batch = min(size.batch_tokens, share)
    batches = math.ceil(share / batch)
    graph = int(batch * size.token_bytes * _DERIVATIVES)
    if is_whole:
        whole = n * (p * (W > 1) + (_WHOLE + 2 * width) * v)
    else:
        whole = (_MODULE + 2 * width) * size.largest_module * v
    parts = {
        "parameters": mine * p,
        "basis": num_basis * mine * v,
        "vectors": (others + _OWN * (W > 1)) * mine * v,  # on one rank they are the whole ones
        "whole parameters and vectors": whole,
        "graph of a batch": graph,
    }
    moved = 2 * n * v if is_whole else batches * n * (5 * p + 2 * v)
    moved = int(moved * (W - 1) / W)
    if is_whole:
        collectives = 2 * math.ceil(n / max(_BUCKET, size.largest_module)) + _CONTROL
    else:
        collectives = _CONTROL + batches * (2 * 7 * size.num_modules + 2)
    collectives = collectives if W > 1 else 0
    compute = _FLOPS * n * share / cluster.flops
    link = moved / cluster.link + collectives * cluster.latency
    return RankCost(
        world_size=W,
        route=route,
        num_matvecs=num_matvecs,
        rank_bytes=sum(parts.values()),
        parts=parts,
        bytes_per_matvec=moved,
        collectives_per_matvec=collectives,
        compute_seconds=compute,
        link_seconds=link,
        seconds=num_matvecs * (compute + link),
        fits=sum(parts.values()) <= cluster.memory,
        other=None,
    )
