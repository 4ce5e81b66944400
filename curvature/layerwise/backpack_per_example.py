"""Per-example gradients and their moments through BackPACK, for the layers it knows.

With w_i the weight of example i's loss terms, p_i = w_i / sum w and g_i the gradient of the mean over its terms, the
gradient of the objective is sum_i p_i g_i. BackPACK computes squares and norms of what each example adds to the loss;
as the gradient in the outputs is handed to it here, each example's part is scaled first, so that they come out as
p-weighted moments of g_i, whatever the loss ignores or weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.engine.linearize import Linearization
from curvature.environment.autocast import full_precision
from curvature.environment.cost import check_fits
from curvature.environment.memory import available_memory
from curvature.errors import InputError, NonFiniteError
from curvature.layerwise.backpack_access import open_session
from curvature.layerwise.diagonal_work import FAILURES
from curvature.layerwise.pull_back import by_columns
from curvature.layerwise.support import Leaves, UnsupportedError
from curvature.objective.coupling import refuse_coupling
from curvature.objective.objective import Objective
from curvature.results.estimates import _Record

__all__ = ["BackpackPerExample", "backpack_per_example"]

QUANTITIES = ("grad", "variance", "second_moment", "norms")
BUDGET_SHARE = 0.5  # of the free memory


@dataclass(frozen=True, kw_only=True)
class BackpackPerExample(_Record):
    """What the gradients g_i of single examples are like, with sum_i p_i g_i the gradient of the objective."""

    _large = ("gradient", "grad", "variance", "second_moment", "norms", "weights")

    gradient: Tensor
    """(n,), of the objective."""
    weights: Tensor
    """(N,), p_i, summing to 1; in the order of the data."""
    grad: Tensor | None
    """(N, n), g_i; None if not asked for, like those below."""
    variance: Tensor | None
    """(n,), sum_i p_i (g_i - g)^2, as second moment less squared mean: its rounding error is relative to the former."""
    second_moment: Tensor | None
    """(n,), sum_i p_i g_i^2."""
    norms: Tensor | None
    """(N,), |g_i|."""
    num_examples: int
    """N."""


@full_precision
@checked
def backpack_per_example(
    objective: Objective,
    quantities: Sequence[str] = QUANTITIES,
    *,
    memory_budget: int | None = None,
) -> BackpackPerExample:
    """Return per-example gradients, their norms and moments over all data, through BackPACK's rules alone.

    A sum-reduced loss counts all examples alike: p_i = 1 / N and g_i is N times what example i adds. Cost, in
    gradients: about 2 for norms, 2 to 4 for moments; 5 to 40 for all gradients, which hold N n numbers. What BackPACK
    leaves is compared with autograd on two examples of the first batch, and the sum of gradients with the objective's.

    Args:
        objective: with split, fed as (inputs, targets); its model is a chain of layers BackPACK knows, or converts.
        quantities: any of "grad", "variance", "second_moment" and "norms".
        memory_budget: bytes that one pass may take. Default: half of what is free.

    Raises:
        InputError: for arguments out of range; if BackPACK is not to be used with the model, with the first offender
            (`curvature.per_example` serves any model); if N n numbers do not fit.
        NonFiniteError: if a gradient is not finite.

    Reference: Dangel, Kunstner and Hennig (2020), BackPACK: Packing more into backprop.

    Example:
        >>> import torch
        >>> from curvature import Objective
        >>> x = torch.tensor([[1.0], [2.0]])
        >>> model = torch.nn.Linear(1, 1, bias=False).requires_grad_()
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> objective = Objective(model, torch.nn.MSELoss(), (x, torch.ones(2, 1)))  # g_i = -2 x_i
        >>> backpack_per_example(objective, ["variance"]).variance.round(decimals=3)
        tensor([1.])
    """
    unknown = [q for q in quantities if q not in QUANTITIES]
    if unknown or isinstance(quantities, str) or not quantities:
        raise InputError(f"quantities must be some of {', '.join(map(repr, QUANTITIES))}, got {quantities!r}.")
    if memory_budget is not None and memory_budget < 1:
        raise InputError(f"memory_budget must be a number of bytes >= 1, got {memory_budget!r}.")
    if not objective.has_split:
        raise InputError(
            "BackPACK needs the split between model and loss: give the objective loss= instead of loss=None."
        )
    if objective.process_group is not None:
        raise InputError("per-example quantities through BackPACK are of one process; use curvature.per_example.")
    work = _Work(objective, set(quantities), memory_budget)
    sums = objective.reduce(work.of_batch)
    if not bool(torch.isfinite(sums).all()):
        raise NonFiniteError("per-example gradients are not finite: squares overflow; use a wider dtype.")
    return work.result(sums)


class _Work:
    def __init__(self, objective: Objective, quantities: set[str], memory_budget: int | None) -> None:
        self.objective, self.quantities = objective, quantities
        self.budget = int(BUDGET_SHARE * available_memory(objective.device)) if memory_budget is None else memory_budget
        self.rows: list[Tensor] = []
        self.squared_norms: list[Tensor] = []
        self.weights: list[Tensor] = []
        self.moments = bool(quantities & {"variance", "second_moment"})
        self._checked = False
        try:
            self.session = open_session(objective, "first_order")
        except UnsupportedError as error:
            raise _refusal(error) from error
        # BackPACK 1.7.1 gets the norms wrong where a convolution has groups; its gradients are right
        self.norms_from_rows = any(getattr(layer, "groups", 1) != 1 for _, layer in self.session.layers)

    def of_batch(self, lin: Linearization) -> Tensor:
        """Return the gradient of a batch and its examples' share in the second moment, (2 n,)."""
        n, dtype, device = self.objective.num_params, self.objective.dtype, self.objective.device
        outputs, targets = lin.outputs_and_targets()
        rule = self.objective._rule
        assert rule is not None
        if lin.weight == 0:
            self._keep(torch.zeros(len(outputs), n, dtype=dtype, device=device), None, outputs.new_zeros(len(outputs)))
            return torch.zeros(2 * n, dtype=dtype, device=device)
        refuse_coupling(self.objective, lin._batch, lin.index)
        try:
            leaf = outputs.clone().requires_grad_()
            with torch.inference_mode(False), torch.enable_grad():
                (added,) = torch.autograd.grad(rule.loss(leaf, targets), leaf)
            share = self._shares(outputs, rule.term_weights(outputs, targets))
            per_row = share.view(-1, *[1] * (outputs.ndim - 1))
            own = torch.where(per_row > 0, added / per_row, 0)  # of each example's own loss
            second = torch.zeros(n, dtype=dtype, device=device)
            if not self._checked:
                self._check(lin, own)
            for piece in self._pieces(lin):
                if self.moments:
                    found = self._run(lin, "sum_of_squares", piece, own[piece] * per_row[piece].sqrt())
                    second += self._flat(found, ())
                if "norms" in self.quantities:
                    self.squared_norms.append(self._squared_norms(lin, piece, own[piece]))
                if "grad" in self.quantities:
                    rows = len(own[piece])
                    needed = rows * n * torch.finfo(dtype).bits // 8
                    check_fits(needed, device, f"gradients of {rows} examples", "ask for norms or moments")
                    self.rows.append(self._flat(self._run(lin, "gradients", piece, own[piece]), (rows,)))
            if "grad" in self.quantities:
                self._check_sum(lin, share)
        except FAILURES as error:
            raise error if isinstance(error, InputError) else _refusal(error) from error
        self._checked = True
        self.weights.append(share * (1.0 if self.objective.sums else lin.weight))
        return torch.cat([lin.gradient(), second])

    def result(self, sums: Tensor) -> BackpackPerExample:
        gradient, second = sums.chunk(2)
        weights = torch.cat(self.weights).to(gradient.dtype)
        factor = 1.0
        if self.objective.sums:  # what was added up, as a mean of N times that
            factor = float(len(weights))
            second = second * factor
            weights = torch.full_like(weights, 1 / factor)
        else:
            weights = weights / weights.sum()
        asked = self.quantities
        return BackpackPerExample(
            gradient=gradient,
            weights=weights,
            grad=torch.cat(self.rows) * factor if "grad" in asked else None,
            variance=(second - gradient.square()).clamp_min(0) if "variance" in asked else None,
            second_moment=second if "second_moment" in asked else None,
            norms=torch.cat(self.squared_norms).sqrt() * factor if "norms" in asked else None,
            num_examples=len(weights),
        )

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _shares(self, outputs: Tensor, terms: Tensor) -> Tensor:
        """Return what share of the batch's loss terms each example has, (N,); 1 where the loss sums."""
        if outputs.ndim < 2 or terms.ndim == 0 or len(terms) != len(outputs):
            raise UnsupportedError("outputs and targets do not share a first dimension that counts examples")
        own = terms.reshape(len(terms), -1).sum(1).to(outputs.dtype)
        if self.objective._rule is not None and self.objective._rule.reduction == "sum":
            return torch.ones_like(own)
        return own / own.sum()

    def _keep(self, rows: Tensor, _: None, weights: Tensor) -> None:
        if "grad" in self.quantities:
            self.rows.append(rows)
        if "norms" in self.quantities:
            self.squared_norms.append(rows.new_zeros(len(rows)))
        self.weights.append(weights)

    def _pieces(self, lin: Linearization) -> list[slice]:
        inputs, outputs = lin._batch[0], lin.outputs_and_targets()[0]
        if not isinstance(inputs, Tensor) or len(inputs) != len(outputs):
            raise UnsupportedError("inputs are not one tensor whose first dimension counts examples")
        self.session.measure(inputs[:1])
        width = self.session.bytes_per_example(1, outputs.element_size())
        chunk = max(1, min(len(inputs), self.budget // max(width, 1)))
        if lin.drew_random_numbers and chunk < len(inputs):
            raise UnsupportedError("dropout forbids to cut the batch, which does not fit into memory_budget")
        return [slice(a, min(a + chunk, len(inputs))) for a in range(0, len(inputs), chunk)]

    def _run(self, lin: Linearization, leaves: Leaves, piece: slice, gradient: Tensor) -> dict[str, Tensor | None]:
        seed = self.objective._evaluator.seed + lin.index
        expected = lin.outputs_and_targets()[0][piece]
        found: dict[str, Tensor | None] = self.session.run(
            lin._batch[0][piece], seed, leaves, gradient.to(expected.dtype), None, expected=expected
        )
        return found

    def _squared_norms(self, lin: Linearization, piece: slice, gradient: Tensor) -> Tensor:
        dtype = self.objective.dtype
        if self.norms_from_rows:
            rows = self._flat(self._run(lin, "gradients", piece, gradient), (len(gradient),))
            return rows.square().sum(1)
        parts = [p for p in self._run(lin, "squared_norms", piece, gradient).values() if p is not None]
        return torch.stack(parts).sum(0).to(dtype) if parts else gradient.new_zeros(len(gradient), dtype=dtype)

    def _flat(self, found: dict[str, Tensor | None], lead: tuple[int, ...]) -> Tensor:
        space, parts = self.objective.space, []
        for name, shape in zip(space.names, space.shapes, strict=True):
            part = found[name]
            if part is None:
                part = torch.zeros(*lead, *shape, dtype=space.dtype, device=space.device)
            parts.append(part.detach().reshape(*lead, -1).to(space.dtype))
        return torch.cat(parts, dim=-1)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check(self, lin: Linearization, own: Tensor) -> None:
        """Compare squares, summed over two examples, and their norms with autograd's."""
        picked = sorted({0, len(own) - 1})
        two = torch.zeros_like(own)
        two[picked] = own[picked]
        whole = slice(0, len(own))
        found = self._flat(self._run(lin, "sum_of_squares", whole, two), ())
        expected = by_columns(self.objective, lin, iter([(two[None], 1.0)]), picked)
        if not bool(torch.isfinite(expected).all()):
            raise NonFiniteError("per-example gradients are not finite: squares overflow; use a wider dtype.")
        tolerance = 10 * torch.finfo(own.dtype).eps ** 0.5
        numels = self.objective.space.numels
        for name, a, b in zip(self.objective.space.names, found.split(numels), expected.split(numels), strict=True):
            if not bool((a - b).norm() <= tolerance * b.norm()):
                raise UnsupportedError(f"on two examples BackPACK and autograd differ in {name}")
        total = self._squared_norms(lin, whole, two).sum()
        if not bool((total - expected.sum()).abs() <= tolerance * expected.sum()):
            raise UnsupportedError("on two examples BackPACK's norms and autograd's differ")

    def _check_sum(self, lin: Linearization, share: Tensor) -> None:
        rows = torch.cat(self.rows)[-len(share) :]
        gradient = lin.gradient()
        gap = (share.to(rows.dtype) @ rows - gradient).norm()
        size = (share.to(rows.dtype) @ rows.norm(dim=1)) + gradient.norm()
        if not bool(gap <= 100 * torch.finfo(share.dtype).eps ** 0.75 * size):
            raise UnsupportedError("the gradients of the examples do not add up to the gradient of the batch")


def _refusal(error: Exception) -> InputError:
    first = str(error).strip().split("\n")[0].rstrip(".")
    return InputError(f"BackPACK is not to be used here: {first}. curvature.per_example serves any model.")
