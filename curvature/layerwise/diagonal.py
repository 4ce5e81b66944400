"""Exact diagonals of curvature matrices: squares of pulled-back columns, from the layers' own forms where these serve.

    diag G = sum_b w_b sum_n sum_v s_v (J_n' r_vn)^2 / sum_b w_b

with r_v the columns of the loss Hessian's root. Each is pulled back through a batch once, and told apart by example as
per-example gradients are (`curvature.per_example`), with the checks made there. The Hessian has more columns where
activations curve (`curvature.layerwise.bends`). Where examples meet, columns go through the graph of the batch one by
one, or products with unit vectors do the work. Before trust, a few entries are compared with products of the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.autograd.backward import no_autocast
from curvature.engine.linearize import Linearization
from curvature.environment.autocast import full_precision
from curvature.environment.cost import timed
from curvature.environment.one_matrix import one_matrix
from curvature.errors import CheckFailedError, DataError, InputError, NonFiniteError
from curvature.generators import AnyGenerator
from curvature.layerwise.bends import Bend, bends
from curvature.layerwise.blocks import DiagonalBlocks
from curvature.layerwise.loss_root import LossRoot, UnsupportedError, check_sampling, loss_root, loss_root_alone
from curvature.layerwise.results import ExactDiagonal
from curvature.objective.objective import Objective
from curvature.objective.refusals import refuse_coupling
from curvature.operators.ggn import GGNOperator
from curvature.operators.hessian import HessianOperator
from curvature.per_example.batch import Splitter
from curvature.per_example.cutting import session
from curvature.per_example.run import Run

__all__ = ["ExactDiagonal", "diagonal_with_blocks", "exact_diagonal", "num_columns"]

DiagonalKind = Literal["ggn", "hessian", "ggn-mc", "fisher-mc"]
Route = Literal["auto", "rules", "vmap", "loop"]
KINDS = ("ggn", "hessian", "ggn-mc", "fisher-mc")
_COLUMN_ENTRIES = 2**18  # of columns that are written out at a time
NUM_CHECKED = 3  # entries compared with products
_FAILURES = (UnsupportedError, DataError, CheckFailedError)
"""Why examples cannot be taken one by one."""


@full_precision
@one_matrix
@checked
def exact_diagonal(
    objective: Objective,
    kind: DiagonalKind = "ggn",
    *,
    route: Route = "auto",
    mc_samples: int = 1,
    generator: AnyGenerator | None = None,
    memory_budget: int | None = None,
    max_columns: int | None = 10_000,
) -> ExactDiagonal:
    """Return the diagonal of the Gauss-Newton matrix or the Hessian over all data, exactly or by Monte Carlo.

    Cost: diag G takes C columns for C outputs an example, C - 1 for cross-entropy, each between a third of a gradient
    (linear layers on vectors) and two; N C gradients where examples meet. diag H takes a column more for each unit of a
    curved activation (tanh, GELU, ...), and n products for models with other curved functions (softmax, layer
    normalisation). The Monte Carlo kinds cost one column a sample: "ggn-mc" takes random combinations of the loss
    Hessian's columns and serves any loss, "fisher-mc" draws targets from the model's own distribution. Both are
    unbiased for diag G.

    Args:
        objective: the data are taken as it weights them; micro-batches are its own.
        kind: "ggn", "hessian", "ggn-mc" or "fisher-mc".
        route: "auto", or "rules" (an error where layers have none), "vmap" or "loop" over examples, as in
            `curvature.per_example.gradient_norms`.
        mc_samples: samples of the Monte Carlo kinds, each a pass over the data; 2 or more for a standard error.
        generator: source of the Monte Carlo kinds, or a seed.
        memory_budget: bytes for gradients of examples that are held. Default: half of what is free.
        max_columns: refuse work beyond so many columns (or products) instead of beginning it; None forces.

    Raises:
        InputError: for arguments out of range; for an objective without split (Gauss-Newton kinds); if the cost is
            beyond `max_columns`; if another route than "auto" does not serve, with the reason.
        NonFiniteError: if an entry is not finite.

    Reference: Dangel, Kunstner and Hennig (2020), BackPACK: Packing more into backprop (the sums over columns).

    Examples:
        >>> import torch
        >>> from curvature import Objective
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> exact_diagonal(objective).value  # of (2 / N) x'x
        tensor([1., 4.])
    """
    if kind not in KINDS:
        raise InputError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}.")
    source = check_sampling(objective, kind, mc_samples, generator, max_columns, draws=kind.endswith("-mc"))
    work = _Work(objective, kind, route, source, memory_budget, max_columns)
    return _found(work, mc_samples if work.draws else 1)


@full_precision
@one_matrix
def diagonal_with_blocks(
    beside: DiagonalBlocks, kind: Literal["ggn", "hessian"], *, max_columns: int | None
) -> ExactDiagonal:
    """Return `exact_diagonal` by rules, and fill blocks of the same matrix from the same columns."""
    return _found(_Work(beside.objective, kind, "rules", None, None, max_columns, beside), 1)


def _found(work: _Work, samples: int) -> ExactDiagonal:
    objective, kind = work.objective, work.kind
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
    if not work.draws:
        stderr = torch.zeros_like(mean)
    elif samples == 1:
        stderr = torch.full_like(mean, torch.inf)
    else:
        stderr = (squares / (samples - 1) / samples).sqrt()
    noise = (HessianOperator if kind == "hessian" else GGNOperator)(objective).product_noise
    if noise:
        stderr = torch.hypot(stderr, noise / 2 * mean.abs().clamp_min(mean.square().mean().sqrt()))
    shapes = [tuple(shape) for shape in objective.space.shapes]
    return ExactDiagonal(
        value=mean,
        stderr=stderr,
        kind=kind,
        route="+".join(dict.fromkeys(work.routes)),
        reason="; ".join([*work.reasons, work.checked]) + ".",
        num_columns=work.num_columns,
        num_samples=samples if work.draws else 0,
        seconds=seconds,
        layout=tuple(zip(objective.space.names, shapes, strict=True)),
        product_noise=noise or None,
    )


@checked
def num_columns(objective: Objective, kind: Literal["ggn", "hessian"] = "ggn") -> int:
    """Return how many columns of a batch the exact diagonal takes by rules. Cost: up to two gradients of a batch.

    Raises:
        InputError: if rules do not serve, as far as the graph tells, with the reason.
    """
    if kind not in ("ggn", "hessian"):
        raise InputError(f"kind must be 'ggn' or 'hessian', got {kind!r}.")
    work, lin = _Work(objective, kind, "rules", None, None, None), next(objective.linearizations(), None)
    if lin is None:  # of a rank without data
        return 0
    try:
        _, root, places = work.opened(lin)
    except _FAILURES as error:
        raise InputError(f"rules do not serve here: {error}") from error
    return work.count(root, places)


class _Work:
    """The diagonal of one batch after the other, and what was learnt on the way."""

    def __init__(
        self,
        objective: Objective,
        kind: DiagonalKind,
        route: Route,
        generator: torch.Generator | None,
        memory_budget: int | None,
        max_columns: int | None,
        beside: DiagonalBlocks | None = None,
    ) -> None:
        self.beside = beside
        self.objective, self.kind, self.route, self.generator = objective, kind, route, generator
        self.max_columns, self.num_columns, self.checked = max_columns, 0, "nothing was left to check"
        self._known: dict[Any, tuple[Any, dict[int, str]]] = {}
        self.routes: list[str] = []
        self.reasons: list[str] = []
        self.splitter = None
        if objective.has_split:
            self.splitter = Splitter(objective, route=route, memory_budget=memory_budget)
        self.draws = kind.endswith("-mc")

    def of_batch(self, lin: Linearization) -> Tensor:
        if lin.weight == 0:
            return self._zero()
        try:
            return self._by_example(lin)
        except _FAILURES as error:
            if self.route != "auto":
                raise InputError(f"route={self.route!r} does not serve here: {error}") from error
            reason = f"not example by example: {str(error).rstrip('.')}"
            if reason not in self.reasons:
                self.reasons.append(reason)
        return self._by_batch(lin)

    # -- example by example -------------------------------------------------------------------------------------------

    def opened(self, lin: Linearization) -> tuple[Run, LossRoot, list[Bend]]:
        """Evaluate a batch and find the columns."""
        if self.splitter is None:
            raise UnsupportedError("model and loss are not known apart")
        run = self.splitter.open(lin.batch, lin.index)
        outputs, rule = run.evaluation.outputs, self.objective.rule
        assert rule is not None
        if not isinstance(outputs, Tensor) or outputs.ndim == 0 or len(outputs) != run.num_examples:
            raise UnsupportedError("outputs and inputs do not share a first dimension that counts examples")
        root = loss_root_alone(rule, run.evaluation, list(self.objective.space.tensors.values()))
        if run.num_examples > 1:
            refuse_coupling(self.objective, run.batch, run.index)
        if self.kind != "hessian":
            return run, root, []
        with session(self.objective.evaluator, run.buffers), no_autocast(self.objective.device):
            places = bends(outputs, run.evaluation.loss)
        edges, shapes = [bend.edge for bend in places], [tuple(bend.second.shape) for bend in places]
        if places and not self.splitter.holds_examples(run, edges, shapes):
            raise UnsupportedError("examples do not lie along the first dimension where activations curve")
        if self.count(root, places) > self.objective.num_params:
            raise UnsupportedError("there are fewer parameters than columns")
        return run, root, places

    def count(self, root: LossRoot, places: list[Bend]) -> int:
        if self.draws:
            return 1
        return root.num_columns + sum(bend.second[0].numel() for bend in places if len(bend.second))

    def _by_example(self, lin: Linearization) -> Tensor:
        run, root, places = self.opened(lin)
        assert self.splitter is not None
        columns = self.count(root, places)
        self._afford(columns, "columns of every example")
        outputs = run.evaluation.outputs
        assert isinstance(outputs, Tensor)
        also = None
        if self.beside is not None:
            self.beside.begin(run, lin.weight, columns, curved=self.kind == "hessian")
            also = self.beside.add
        if not outputs.requires_grad:
            return self._zero()
        key = (lin.index, run.num_examples, run.capture.structure)
        routes: list[str] = []
        if key in self._known and not run.capture.moves_rows:  # checked at the sample before
            run.layouts, run.left, run.checked = *self._known[key], True
        else:
            routes = self._check_examples(run, outputs)
            self._known[key] = run.layouts, run.left
        if places and run.left:
            raise UnsupportedError(f"{', '.join(self._names(run))}: {'; '.join({*run.left.values()})}")
        total = self.splitter.sum_of_squares(run, self._columns(root, outputs.dtype), also=also)
        for bend in places:
            total += self.splitter.sum_of_squares(run, bend.columns(), bend.edge, also)
        if not self.draws:
            self._check_entries(total, lin)
        self.checked = "checked against autograd on a random vector" + ("" if self.draws else " and unit vectors")
        self.routes += routes
        self.num_columns += columns
        return total

    def _check_examples(self, run: Run, outputs: Tensor) -> list[str]:
        """Split the pull-back of a random vector, with all checks, and return how its parts were had."""
        assert self.splitter is not None
        routes = []
        probe = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
        for part in self.splitter.split(run, probe)[0]:
            route, _, why = part.route.partition(": ")
            routes.append(route if route in ("vmap", "loop") else "rules")
            if why and f"{route}: {why}" not in self.reasons:
                self.reasons.append(f"{route}: {why}")
        return routes

    def _names(self, run: Run) -> list[str]:
        return [self.objective.space.names[i] for i in run.left]

    def _columns(self, root: LossRoot, dtype: torch.dtype) -> Iterator[tuple[Tensor, float]]:
        if self.draws:
            assert self.generator is not None
            draws = root.draw(self.kind, self.generator)  # type: ignore[arg-type]
            yield from ((column.to(dtype), sign) for column, sign in draws)
            return
        for start, stop, sign in root.bounds(max(1, _COLUMN_ENTRIES // max(1, root.shape.numel()))):
            yield from ((column, sign) for column in root.columns(start, stop).to(dtype))

    def _check_entries(self, diagonal: Tensor, lin: Linearization) -> None:
        """Compare a few entries, the largest and random ones, with products of the engine; once."""
        if self.routes:
            return
        n = len(diagonal)
        generator = torch.Generator().manual_seed(0)
        chosen = [int(diagonal.abs().argmax()), *torch.randint(n, (NUM_CHECKED - 1,), generator=generator).tolist()]
        expected = self._products(lin, chosen)
        eps = max(torch.finfo(t.dtype).eps for t in self.objective.space.tensors.values())
        scale = expected.abs() + eps**0.5 * expected.abs().max()
        if not bool(((diagonal[chosen] - expected).abs() <= 10 * eps**0.5 * scale).all()):
            raise UnsupportedError("entries differ from products with unit vectors")

    # -- where examples meet ------------------------------------------------------------------------------------------

    def _by_batch(self, lin: Linearization) -> Tensor:
        n = self.objective.num_params
        if self.kind == "hessian":
            self._afford(n, "Hessian products")
            return self._by_products(lin)
        batch = lin.batch_outputs()
        outputs = batch.outputs
        try:
            root = loss_root(batch.rule, outputs, batch.targets)
        except UnsupportedError as error:
            if self.draws:
                raise InputError(
                    f"kind={self.kind!r} draws a column an example, but {error}; use kind='ggn'."
                ) from error
            self._afford(n, "products")
            return self._by_products(lin)
        columns = (1 if self.draws else root.num_columns) * (len(outputs) if outputs.ndim else 1)
        if not self.draws and 2 * n < columns:
            self._afford(n, "products")
            return self._by_products(lin)
        self._afford(columns, "columns, one of one example at a time")
        self.routes.append("columns")
        self.num_columns += columns
        total = self._zero()
        for column, sign in self._columns(root, outputs.dtype):
            for n_th in range(len(outputs) if outputs.ndim else 1):
                single = torch.zeros_like(column)
                single[... if outputs.ndim == 0 else n_th] = column[... if outputs.ndim == 0 else n_th]
                total += sign * lin.vjp(single.reshape(1, -1).to(self.objective.dtype))[0].square()
        return total

    def _by_products(self, lin: Linearization) -> Tensor:
        n = self.objective.num_params
        self.routes.append("products")
        self.num_columns += n
        return self._products(lin, range(n))

    def _products(self, lin: Linearization, entries: Sequence[int]) -> Tensor:
        """Return entries of the diagonal of a batch's matrix: e'He from a product, e'Ge = (Je)'H(Je) from half of one.

        Each is restricted to the tensor that the entry lies in: what a product with a block costs is less.
        """
        space = self.objective.space
        found = torch.zeros(len(entries), dtype=space.dtype, device=space.device)
        curve: Callable[[Tensor], Tensor] | None = None
        if self.kind != "hessian":
            batch = lin.batch_outputs()
            outputs, curve = batch.outputs, batch.rule.output_hessian(batch.outputs, batch.targets)
        start = 0
        for name, size in zip(space.names, space.numels, strict=True):
            block = space.block({name: space.tensors[name]})
            inside = [(k, entry - start) for k, entry in enumerate(entries) if start <= entry < start + size]
            for k, place in inside:
                unit = torch.zeros(1, size, dtype=space.dtype, device=space.device)
                unit[0, place] = 1
                if curve is None:
                    found[k] = lin.hvp(unit, block)[0, place]
                else:
                    pushed = lin.jvp(unit, block).view(outputs.shape)
                    found[k] = (pushed * curve(pushed)).sum()
            start += size
        return found

    # -- accounts -----------------------------------------------------------------------------------------------------

    def _afford(self, cost: int, what: str) -> None:
        if self.max_columns is not None and cost > self.max_columns:
            cheaper = (
                "kind='ggn-mc' estimates the Gauss-Newton diagonal at the price of a gradient a sample"
                if self.kind != "hessian"
                else "curvature.linalg.diagonal(objective, ...) estimates it"
            )
            raise InputError(
                f"the exact diagonal takes {cost} {what}, about as many gradients, and max_columns={self.max_columns}; "
                f"{cheaper}; max_columns=None computes it all the same."
            )

    def _zero(self) -> Tensor:
        return torch.zeros(self.objective.num_params, dtype=self.objective.dtype, device=self.objective.device)
