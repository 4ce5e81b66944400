"""Exact diagonals of curvature matrices, through BackPACK where it is right and by autograd elsewhere.

    diag G = sum_b w_b sum_n sum_v s_v (J_n' r_vn)^2 / sum_b w_b

BackPACK propagates the columns of all examples through layers it has rules for: far cheaper than autograd for linear
layers, on convolutions not always. Which models those are is decided beforehand, and the first batch's answer is
checked: a few entries against products of the engine, and whole tensors of Gauss-Newton diagonals against autograd on
two examples. Where either says no, autograd does the work (`curvature.layerwise.pull_back`) and the result says why.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.cost import timed
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError, NonFiniteError
from curvature.layerwise.diagonal_work import DiagonalKind, DiagonalWork, Route
from curvature.objective.objective import Objective
from curvature.results.estimates import _Record

__all__ = ["ExactDiagonal", "backpack_refusal", "exact_diagonal"]

KINDS = ("ggn", "hessian", "ggn-mc", "fisher-mc")


@dataclass(frozen=True, kw_only=True)
class ExactDiagonal(_Record):
    """The diagonal of a curvature matrix of an objective."""

    _large = ("values", "stderr")

    values: Tensor
    """(n,), units of the loss per squared unit of the parameter."""
    stderr: Tensor
    """(n,), standard error over the Monte Carlo samples; zeros where the values are exact, infinite for one sample."""
    kind: str
    """Which matrix: "ggn", "hessian", or a Monte Carlo estimate of the Gauss-Newton diagonal."""
    route: str
    """What did the work: "backpack", "per-example", "one-by-one", "columns" or "products", or several."""
    reason: str
    """Why not BackPACK, or what it was checked against."""
    num_columns: int
    """Columns pulled back, or products, summed over batches: about a gradient of a batch each."""
    num_samples: int
    """Monte Carlo samples; 0 where the values are exact."""
    seconds: float
    """Wall-clock time, with checks."""
    layout: tuple[tuple[str, tuple[int, ...]], ...]
    """Names and shapes of the parameters, in the order of `values`."""

    def by_parameter(self) -> dict[str, Tensor]:
        """Return views of `values` in the parameters' shapes, by name."""
        sizes = [torch.Size(shape).numel() for _, shape in self.layout]
        return {name: part.view(s) for (name, s), part in zip(self.layout, self.values.split(sizes), strict=True)}


@full_precision
@one_matrix
@checked
def exact_diagonal(
    objective: Objective,
    kind: DiagonalKind = "ggn",
    *,
    route: Route = "auto",
    mc_samples: int = 1,
    generator: torch.Generator | None = None,
    memory_budget: int | None = None,
    max_columns: int | None = 10_000,
) -> ExactDiagonal:
    """Return the diagonal of the Gauss-Newton matrix or the Hessian over all data, exactly or by Monte Carlo.

    Measured with ten classes, one batch, checks included (benchmarks/exact/README.md): diag G took 13 gradients for a
    perceptron and 45 for a convolutional net through BackPACK, 980 and 25 by torch.func. "auto" takes BackPACK wherever
    it is right, so "func" is worth a try on convolutions. Where examples meet, N C gradients; diag H takes n products
    where BackPACK has no rules, and many columns where activations are curved. The Monte Carlo kinds cost one
    column a sample: "ggn-mc" takes random combinations of the loss Hessian's columns and serves any loss, "fisher-mc"
    draws targets from the model's own distribution. Both are unbiased for diag G.

    Args:
        objective: the data are taken as it weights them; micro-batches are its own.
        kind: "ggn", "hessian", "ggn-mc" or "fisher-mc".
        route: "auto", or "backpack" (an error where it has no rules), or "func" (autograd alone).
        mc_samples: samples of the Monte Carlo kinds, each a pass over the data; 2 or more for a standard error.
        generator: source of the Monte Carlo kinds.
        memory_budget: bytes that columns in flight may take. Default: half of what is free.
        max_columns: refuse work beyond so many columns (or products) instead of beginning it; None forces.

    Raises:
        InputError: for arguments out of range; for an objective without split (Gauss-Newton kinds); if the cost is
            beyond `max_columns`; if route="backpack" and BackPACK is not to be used, with the reason.
        NonFiniteError: if an entry is not finite.

    Reference: Dangel, Kunstner and Hennig (2020), BackPACK: Packing more into backprop.

    Example:
        >>> import torch
        >>> from curvature import Objective
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> exact_diagonal(objective).values  # of (2 / N) x'x
        tensor([1., 4.])
    """
    _validate(objective, kind, route, mc_samples, generator, memory_budget, max_columns)
    work = DiagonalWork(objective, kind, route, generator, memory_budget, max_columns)
    samples = mc_samples if kind.endswith("-mc") else 1
    n, dtype = objective.num_params, objective.dtype
    mean, squares = (torch.zeros(n, dtype=dtype, device=objective.device) for _ in range(2))

    def run() -> None:
        for count in range(1, samples + 1):  # Welford's recurrence; a pass over the data each
            step = objective.reduce(work.of_batch) - mean
            mean.add_(step / count)
            squares.add_(step * (step * (count - 1) / count))

    _, seconds = timed(run, objective.device)
    if not bool(torch.isfinite(mean).all()):
        raise NonFiniteError("entries of the diagonal are not finite: outputs or columns overflow; use a wider dtype.")
    if not kind.endswith("-mc"):
        stderr = torch.zeros_like(mean)
    elif samples == 1:
        stderr = torch.full_like(mean, torch.inf)
    else:
        stderr = (squares / (samples - 1) / samples).sqrt()
    shapes = [tuple(shape) for shape in objective.space.shapes]
    return ExactDiagonal(
        values=mean,
        stderr=stderr,
        kind=kind,
        route="+".join(work.routes),
        reason="; ".join(work.reasons) + ".",
        num_columns=work.num_columns,
        num_samples=samples if kind.endswith("-mc") else 0,
        seconds=seconds,
        layout=tuple(zip(objective.space.names, shapes, strict=True)),
    )


@checked
def backpack_refusal(objective: Objective, kind: DiagonalKind = "ggn") -> str | None:
    """Return why BackPACK is not to be used for the diagonal of an objective, as far as its model tells; None if it is.

    Nothing is evaluated. What only the data can tell, a check of the first batch finds out when the work begins.
    """
    try:
        DiagonalWork(objective, kind, "backpack", None, None, None)
    except InputError as error:
        return str(error.__cause__)
    return None


def _validate(
    objective: Objective, kind: Any, route: Any, mc_samples: Any, generator: Any, memory_budget: Any, max_columns: Any
) -> None:
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    if route not in ("auto", "backpack", "func"):
        raise InputError(f"route must be 'auto', 'backpack' or 'func', got {route!r}.")
    if kind != "hessian" and not objective.has_split:
        raise InputError(
            f"kind={kind!r} needs the split between model and loss: give the objective loss= and a forward that "
            "returns (outputs, targets), instead of loss=None."
        )
    if not isinstance(mc_samples, int) or mc_samples < 1:
        raise InputError(f"mc_samples must be an integer of at least 1, got {mc_samples!r}.")
    if kind.endswith("-mc") and generator is None:
        raise InputError(f"kind={kind!r} draws at random: pass generator=, e.g. torch.Generator().manual_seed(0).")
    if memory_budget is not None and memory_budget < 1:
        raise InputError(f"memory_budget must be a number of bytes >= 1, got {memory_budget!r}.")
    if max_columns is not None and max_columns < 1:
        raise InputError(f"max_columns must be at least 1, or None, got {max_columns!r}.")
