"""Norms, inner products and moments of the gradients of single examples, in one pass over the data.

Reference: McCandlish, Kaplan, Amodei and the OpenAI Dota team (2018), An empirical model of large-batch training; Liu,
Jiang, Bai, Chen and Wang (2020), Understanding why neural networks generalize well through GSNR of parameters.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.errors import DataError, InputError
from curvature.objective.objective import Objective
from curvature.objective.ranks import together
from curvature.per_example.gram import Gram
from curvature.per_example.held import Held
from curvature.per_example.results import GradientMoments, GradientNorms
from curvature.per_example.walk import Group, Walk

__all__ = ["gradient_dots", "gradient_moments", "gradient_norms", "per_example_gradients", "refuse_shuffling"]

Per = Literal["example", "target"]
Route = Literal["auto", "rules", "vmap", "loop"]


@together
@full_precision
@checked
def gradient_norms(
    objective: Objective,
    *,
    per: Per = "example",
    along_mean: bool = False,
    route: Route = "auto",
    memory_budget: int | None = None,
) -> GradientNorms:
    """Return |g_i|^2 for every example, with the mean gradient and the trace of the gradients' covariance.

    Gradients are not written out where their norms do not need it: a linear map's from inner products of its inputs
    and of the gradients in its outputs (`Factors`). Cost: one gradient and between 0.1 and 2 more. Where a head works
    in blocks (`Objective(head=)`) its logits are not held: gradients of its weight are written out one at a time, where
    the rows of an example do not fit into a block; per="target" and inner products of pairs take logits whole.

    Args:
        objective: with `loss=` and outputs that are one tensor, examples along the first dimension of inputs, outputs
            and targets (or consecutive rows of them). Restrict it to some parameters by `objective.restrict`.
        per: "example" takes what one place of the first dimension holds for an example; "target" every target (each
            token of a text), at a backward pass for each target of a sequence.
        along_mean: also return g_i'g. Where all data are one batch that costs between nothing and a third of a
            gradient, as for several, whose mean is known only at the end, while what their gradients are made of fits
            into `memory_budget`; else, or if the objective keeps no graphs, a second pass, of a gradient and a half.
        route: "auto" takes rules for the layers they are known for and computes the gradients of other parameters
            example by example, with `torch.func.vmap` or, where the model does not go through that, in a loop; "rules"
            refuses where rules do not do; "vmap" and "loop" take these for all parameters.
        memory_budget: bytes for gradients that are held. Default: half of what is free.

    Raises:
        DataError: if examples are coupled (found by cutting a batch in two) or do not lie along the first dimension;
            if all weights are zero; if dropout draws a mask for the whole batch where examples have to be taken one by
            one.
        CheckFailedError: if the examples' gradients do not add up to the batch's.
        InputError: for arguments out of range, an objective with `loss=None`, or route="rules" where it does not do.
    """
    return _collect(objective, per, route, memory_budget, moments=False, norms=True, dots=False, along_mean=along_mean)


@full_precision
@checked
def gradient_dots(
    objective: Objective, *, per: Per = "example", route: Route = "auto", memory_budget: int | None = None
) -> GradientNorms:
    """Return g_i' g_j for all pairs of examples besides what `gradient_norms` returns.

    Cost: that of norms, and the products of what is kept of all examples, their factors or gradients: N^2 times their
    entries. Arguments and errors are those of `gradient_norms`.

    Raises:
        InputError: also if what has to be kept does not fit into `memory_budget`, and for data on several ranks.
    """
    return _collect(objective, per, route, memory_budget, moments=False, norms=True, dots=True, along_mean=False)


@together
@full_precision
@checked
def gradient_moments(
    objective: Objective,
    *,
    per: Per = "example",
    pairwise: bool = False,
    norms: bool = True,
    along_mean: bool = False,
    route: Route = "auto",
    memory_budget: int | None = None,
) -> GradientMoments:
    """Return mean and variance of every entry of the gradient over examples, and what `gradient_norms` returns.

    With p_i the share of example i in all loss terms, g = sum_i p_i g_i is the objective's gradient and the variance is
    sum_i p_i g_i^2 - g^2, that of these data. The population's is estimated without bias by `unbiased_factor` times it,
    1 / (1 - sum p_i^2), which is N / (N - 1) where all examples count alike.

    Cost: one gradient, one more for the squares of layers whose inputs have one row for each example, and about two for
    those with many (tokens, places of an image), whose gradients are written out a few examples at a time.

    Args:
        objective: see `gradient_norms`, as for `per`, `route`, `memory_budget` and errors.
        per: "example" or "target".
        pairwise: also return all inner products g_i' g_j.
        norms: also return |g_i|^2.
        along_mean: also return g_i'g, see `gradient_norms`.
        route: "auto", "rules", "vmap" or "loop".
        memory_budget: bytes for gradients and inner products that are held.

    Raises:
        InputError: also for pairwise products that do not fit into `memory_budget`, or over several ranks.

    Examples:
        >>> from torch import nn
        >>> x, y = torch.eye(2), torch.tensor([[1.0], [3.0]])
        >>> model = nn.Linear(2, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> moments = gradient_moments(Objective(model, nn.MSELoss(), (x, y)))
        >>> moments.mean, moments.variance, moments.squared_norms
        (tensor([-1., -3.]), tensor([1., 9.]), tensor([ 4., 36.]))
    """
    result = _collect(
        objective, per, route, memory_budget, moments=True, norms=norms, dots=pairwise, along_mean=along_mean
    )
    assert isinstance(result, GradientMoments)
    return result


@full_precision
@checked
def per_example_gradients(
    objective: Objective,
    *,
    per: Per = "example",
    chunk_size: int | None = None,
    route: Route = "auto",
    memory_budget: int | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (numbers of examples (c,), their gradients (c, n)) until all N have come, in chunks that fit.

    sum_i p_i g_i is the objective's gradient; `GradientNorms` defines p_i and g_i. `objective.space.to_dict` splits a
    row by parameter. A summed loss takes a forward pass beforehand to count the terms.

    Args:
        objective: see `gradient_norms`, as for `per`, `route` and errors.
        per: "example" or "target".
        chunk_size: most rows of a chunk; no chunk spans two batches. Default: what fits into a quarter of the budget.
        route: "auto", "rules", "vmap" or "loop".
        memory_budget: bytes for gradients that are held.
    """
    if chunk_size is not None and chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, got {chunk_size}.")
    walk = Walk(objective, per=per, route=route, memory_budget=memory_budget)
    return _rows(objective, walk, chunk_size or max(1, walk.budget // 4 // (8 * objective.num_params)))


def _rows(objective: Objective, walk: Walk, chunk_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    factor = walk.count_terms() if objective.is_sum else 1.0
    starts = torch.tensor([0, *objective.space.numels]).cumsum(0).tolist()
    for group in walk:
        for start in range(0, len(group.places), chunk_size):
            stop = min(start + chunk_size, len(group.places))
            with torch.no_grad():
                rows = torch.empty(stop - start, objective.num_params, dtype=objective.dtype, device=objective.device)
                scale = (factor * group.scale[start:stop])[:, None]
                absent = set(range(len(objective.space.names)))
                for part in group.parts:
                    dense = part.form.dense(start, stop)
                    for i, columns in zip(part.positions, dense.split(part.form.numels, dim=1), strict=True):
                        torch.mul(columns, scale, out=rows[:, starts[i] : starts[i + 1]])
                    absent -= set(part.positions)
                for i in absent:
                    rows[:, starts[i] : starts[i + 1]] = 0
            yield group.places[start:stop], rows


# -- sums over the data -----------------------------------------------------------------------------------------------


@dataclass
class _Sums:
    """What is added up over groups; of squares the parts h_i, times what makes them w_i g_i^2."""

    squares: Tensor | None
    gradient: Tensor | None = None
    share: float | None = None
    """What `gradient`, the first group's, counts; None once it is a sum."""
    places: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    norms: list[Tensor] = field(default_factory=list)
    """(parameters, E) a group."""
    routes: dict[int, str] = field(default_factory=dict)
    along: list[Tensor] = field(default_factory=list)
    """(E,) a group, of its own gradient sum_i h_i with all its g_i; only where asked for."""

    def settle(self) -> Tensor:
        """Return the sum of the gradients so far, to be added to."""
        assert self.gradient is not None
        if self.share is not None:
            self.gradient, self.share = self.gradient * self.share, None
        return self.gradient

    def add(self, group: Group, starts: list[int], chunk_bytes: int, *, norms: bool, along: bool) -> None:
        if self.gradient is None:
            self.gradient, self.share = group.gradient, group.share  # one group alone needs no pass over it
        else:
            self.settle().add_(group.gradient, alpha=group.share)
        self.places.append(group.places)
        self.weights.append(group.weights)
        found: list[Tensor | None] = [None] * (len(starts) - 1 if norms else 0)
        factors = None
        if self.squares is not None:
            factors = (group.weights * group.scale.double().square()).to(group.gradient.dtype)
        if along:
            inner = torch.zeros(len(group.places), dtype=torch.float64, device=group.scale.device)
        for part in group.parts:
            for i in part.positions:
                if i not in self.routes or self.routes[i] == "single" or ":" in part.route:  # the one that tells most
                    self.routes[i] = part.route
            if self.squares is None and not norms:
                continue
            own = _at(group.gradient, part.positions, starts) if along else None
            total, squared, dots = part.form.squares(factors, chunk_bytes, own)
            if dots is not None:
                inner += dots.double()
            if norms:
                rows = [squared] if len(squared) == 1 else squared.split(1)
                for i, row in zip(part.positions, rows, strict=True):
                    found[i] = row
            if self.squares is not None:
                assert total is not None
                for i, piece in zip(part.positions, total.split(part.form.numels), strict=True):
                    self.squares[starts[i] : starts[i + 1]] += piece
        if norms:
            nothing = group.scale.new_zeros(1, len(group.scale))
            rows = [nothing if row is None else row for row in found]
            self.norms.append(torch.cat(rows) * group.scale.square())
        if along:
            self.along.append(inner * group.scale.double())


@torch.no_grad()
def _collect(
    objective: Objective,
    per: str,
    route: str,
    memory_budget: int | None,
    *,
    moments: bool,
    norms: bool,
    dots: bool,
    along_mean: bool,
) -> GradientNorms:
    if dots and objective.process_group is not None:
        raise InputError("inner products of examples on different ranks are not computed; gather the data on one.")
    clock = time.perf_counter()
    blocks = not dots  # factors of gradients, which pairs need, hold what logits would
    walk = Walk(objective, per=per, route=route, memory_budget=memory_budget, in_blocks=blocks)
    space = objective.space
    starts = list(itertools.accumulate(space.numels, initial=0))
    squares = torch.zeros(objective.num_params, dtype=objective.dtype, device=objective.device) if moments else None
    sums = _Sums(squares)
    gram = Gram(walk.budget) if dots else None
    alone = along_mean and objective.process_group is None and objective.num_batches in (1, None)
    may_hold = along_mean and objective.process_group is None and objective.num_batches != 1
    held = Held(walk.budget if may_hold and objective.may_keep_graphs else 0)
    share = 0.0
    for group in walk:
        share = group.share
        held.add(group, walk.batch)
        sums.add(group, starts, walk.chunk_bytes, norms=norms, along=alone and walk.num_groups == 1)
        if gram is not None:
            for part in group.parts:
                gram.add(part.positions, part.form, group.scale, group.places)
    order = torch.cat(sums.places).argsort() if walk.num_groups > 1 else slice(None)
    none = torch.zeros(len(space.names), 0, dtype=torch.float64, device=objective.device)  # of a rank without data
    weights = torch.cat(sums.weights or [none[0]])[order]
    squared_norms = torch.cat(sums.norms or [none.to(objective.dtype)], dim=1)[:, order] if norms else None
    gradient, squares, total, sum_squares, weighted_norms, loss = _over_ranks(
        objective, sums, weights, squared_norms, walk.loss
    )
    if total == 0:
        raise DataError("the weights of all examples are zero: no target counts (all ignored or masked?).")
    unit = total if objective.is_sum else 1.0  # of gradients: a summed loss is that many times the mean
    factor = (1.0 if sums.share is None else sums.share) / (1.0 if objective.is_sum else total)
    mean = gradient if factor == 1 else gradient * factor
    second = None if squares is None else squares.mul_(unit**2 / total)
    inner = None
    if along_mean and len(sums.along) == walk.num_groups == 1:  # the mean is this group's gradient, but for a factor
        inner = sums.along[0] * unit * (share if objective.is_sum else share / total)
    elif along_mean:
        groups: Iterable[Group] | None = held.groups
        if groups is None:
            groups = Walk(objective, per=per, route=route, memory_budget=memory_budget, in_blocks=blocks)
        inner = _along(groups, mean, starts, walk.chunk_bytes)[order] * unit
        if held.groups is None:
            refuse_shuffling(objective)
    if squared_norms is not None and unit != 1:
        squared_norms *= unit**2
    layers, pieces = space.blocks, mean.split(space.numels)
    within = _within(tuple(block.positions for block in layers), len(pieces), mean.dtype, mean.device)
    of_mean = within @ torch.stack(torch._foreach_norm(pieces)).square()
    if second is None:
        assert weighted_norms is not None
        of_second = within.double() @ weighted_norms * (unit**2 / total)
    else:
        of_second = within @ torch.stack([piece.sum() for piece in second.split(space.numels)])
    result: dict[str, Any] = {
        "mean": mean,
        "loss": loss if objective.is_sum else loss / total,
        "weights": weights,
        "squared_norms": None if squared_norms is None else squared_norms.sum(0),
        "layers": tuple(block.name for block in layers),
        "layer_squared_norms": None if squared_norms is None else within @ squared_norms,
        "layer_mean_squared_norms": of_mean,
        "layer_traces": (of_second - of_mean).clamp_min(0),
        "sum_squared_shares": sum_squares / total**2,
        "routes": {name: sums.routes.get(i, "unused") for i, name in enumerate(space.names)},
        "along_mean": inner,
        "dots": None if gram is None else gram.matrix(len(weights), mean) * unit**2,
        "num_examples": len(weights),
        "num_backwards": walk.num_backwards / max(1, walk.num_batches),
        "seconds": time.perf_counter() - clock,
    }
    if second is None:
        return GradientNorms(**result)
    return GradientMoments(**result, second_moment=second, blocks=layers)


def refuse_shuffling(objective: Objective) -> None:
    """Refuse two passes over single examples that were seen to come in different orders.

    Raises:
        DataError: with the remedy.
    """
    if objective.shuffles:
        raise DataError("the loader shuffles, but two passes must meet the examples in one order; pass list(loader).")


def _over_ranks(
    objective: Objective, sums: _Sums, weights: Tensor, squared_norms: Tensor | None, loss: float
) -> tuple[Tensor, Tensor | None, float, float, Tensor | None, float]:
    """Return sums over all data: of gradients, of w g^2, of w, of w^2, by parameter of w |g|^2, and of losses."""
    weighted_norms = None if squared_norms is None else squared_norms.double() @ weights
    if sums.gradient is None:
        sums.gradient = weights.new_zeros(objective.num_params, dtype=objective.dtype)
    totals = [sums.gradient if objective.ranks is None else sums.settle(), sums.squares, weighted_norms]
    weight, squared, losses = float(weights.sum()), float(weights @ weights), loss
    if objective.ranks is not None:
        packed = torch.cat([weights.new_tensor([squared, losses]), *(t.double() for t in totals if t is not None)])
        packed, weight = objective.ranks.sum(packed, weight)
        squared, losses = packed[:2].tolist()
        parts = list(packed[2:].split([len(t) for t in totals if t is not None]))
        totals = [None if t is None else parts.pop(0).to(t.dtype) for t in totals]
    gradient, squares, norms = totals
    assert gradient is not None
    return gradient, squares, weight, squared, norms, losses


def _along(groups: Iterable[Group], vector: Tensor, starts: list[int], chunk_bytes: int) -> Tensor:
    """Return scale_i h_i'v for all examples, (N,), float64, in the order of the groups."""
    found = []
    for group in groups:
        inner = torch.zeros(len(group.places), dtype=torch.float64, device=vector.device)
        for part in group.parts:
            inner += part.form.along(_at(vector, part.positions, starts), chunk_bytes).double()
        found.append(inner * group.scale.double())
    return torch.cat(found or [torch.zeros(0, dtype=torch.float64, device=vector.device)])


@functools.lru_cache(16)
def _within(
    positions: tuple[tuple[int, ...], ...], num_parameters: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return 1 where a parameter is one of a layer's, else 0, (L, parameters)."""
    rows = [[float(i in set(own)) for i in range(num_parameters)] for own in positions]
    return torch.tensor(rows, dtype=dtype, device=device).reshape(len(positions), num_parameters)


def _at(vector: Tensor, positions: Sequence[int], starts: list[int]) -> Tensor:
    """Return the entries of a vector (n,) that belong to these parameters."""
    pieces = [vector[starts[i] : starts[i + 1]] for i in positions]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
