"""The diagonal of one batch after the other: which route takes it, what is checked, what it costs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from curvature.engine.linearize import Linearization
from curvature.environment.cost import gibibytes
from curvature.environment.memory import available_memory
from curvature.errors import InputError
from curvature.layerwise.backpack_access import open_session
from curvature.layerwise.loss_root import LossRoot, loss_root
from curvature.layerwise.pull_back import by_columns, by_products, one_by_one, per_example
from curvature.layerwise.support import UnsupportedError
from curvature.objective.objective import Objective

if TYPE_CHECKING:
    from curvature.layerwise.backpack_session import BackpackSession

__all__ = ["DiagonalKind", "DiagonalWork", "Route"]

DiagonalKind = Literal["ggn", "hessian", "ggn-mc", "fisher-mc"]
Route = Literal["auto", "backpack", "func"]
BUDGET_SHARE = 0.5  # of the free memory
COLUMNS_AT_ONCE = 64  # of all examples; a root of a language model has thousands
NUM_CHECKED = 3  # entries compared with products
FAILURES = (UnsupportedError, NotImplementedError, RuntimeError, ValueError, AssertionError, AttributeError)
"""What BackPACK raises where it has no rule, as far as that is not known beforehand."""


class DiagonalWork:
    """The diagonal of one batch after the other, and what was learnt on the way."""

    def __init__(
        self,
        objective: Objective,
        kind: DiagonalKind,
        route: Route,
        generator: torch.Generator | None,
        memory_budget: int | None,
        max_columns: int | None,
    ) -> None:
        self.objective, self.kind, self.route, self.generator = objective, kind, route, generator
        self.budget = int(BUDGET_SHARE * available_memory(objective.device)) if memory_budget is None else memory_budget
        self.max_columns = max_columns
        self.routes: list[str] = []
        self.reasons: list[str] = []
        self.num_columns = 0
        self._refused: set[str] = set()
        self._checked = False
        self._session: BackpackSession | None = None
        if route != "func":
            self._open()
        else:
            self.reasons.append("route='func' was asked for")

    def of_batch(self, lin: Linearization) -> Tensor:
        if lin.weight == 0:
            return torch.zeros(self.objective.num_params, dtype=self.objective.dtype, device=self.objective.device)
        if self.kind == "hessian":
            return self._hessian(lin)
        outputs, targets = lin.outputs_and_targets()
        assert self.objective._rule is not None
        try:
            root = loss_root(self.objective._rule, outputs, targets)
        except UnsupportedError as error:
            return self._coupled_loss(lin, error)
        if self._session is not None and not self._quicker_by_autograd(self._session):
            try:
                return self._propagate(self._session, lin, root)
            except FAILURES as error:
                self._refuse(error)
        return self._pull_back(lin, root)

    # -- BackPACK -----------------------------------------------------------------------------------------------------

    def _open(self) -> None:
        quantity: Literal["diag_hessian", "diag_ggn"] = "diag_hessian" if self.kind == "hessian" else "diag_ggn"
        try:
            self._session = open_session(self.objective, quantity)
        except UnsupportedError as error:
            self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        first = str(error).strip().split("\n")[0].rstrip(".")
        reason = first if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {first}"
        if self.route == "backpack":
            raise InputError(
                f"BackPACK is not to be used here: {reason}. route='auto' takes the next best route."
            ) from error
        self._session = None
        self.reasons.append(f"not BackPACK: {reason}")

    def _propagate(self, session: BackpackSession, lin: Linearization, root: LossRoot) -> Tensor:
        if self.kind == "ggn":
            width, pieces = self._cut(session, lin, root.num_columns)
            blocks: list[tuple[int, int, float]] = root.bounds(width)
            total = self._zero()
            for piece in pieces:
                for start, stop, sign in blocks:
                    total += sign * self._pass(session, lin, piece, root.columns(start, stop, piece))
            if not self._checked:
                self._check_examples(session, lin)
                self._check_entries(total, lin, "ggnvp")
        else:
            if not self._checked:
                self._check_examples(session, lin)
            total = self._zero()
            _, pieces = self._cut(session, lin, 1)
            for column, sign in root.draw(self.kind, self._source()):  # type: ignore[arg-type]
                for piece in pieces:
                    total += sign * self._pass(session, lin, piece, column[piece][None])
        self._note("backpack", root.num_columns if self.kind == "ggn" else 1)
        if not self._checked:
            self._checked = True
            against = "autograd on two examples" + (" and products with unit vectors" if self.kind == "ggn" else "")
            self.reasons.append(f"BackPACK has a rule for every layer; checked against {against}")
        return total

    def _pass(self, session: BackpackSession, lin: Linearization, piece: slice, columns: Tensor) -> Tensor:
        """Return one BackPACK pass, (n,), for some examples and columns (k, N', ...)."""
        outputs, _ = lin.outputs_and_targets()
        zero = torch.zeros_like(outputs[piece])
        found = session.run(
            lin._batch[0][piece],
            self.objective._evaluator.seed + lin.index,
            "diag_ggn",
            zero,
            columns.to(outputs.dtype),
            expected=outputs[piece],
        )
        return self._flat(found, lin)

    def _cut(self, session: BackpackSession, lin: Linearization, num_columns: int) -> tuple[int, list[slice]]:
        """Return how many columns, and which examples, go through at a time within the memory budget."""
        inputs, outputs = lin._batch[0], lin.outputs_and_targets()[0]
        if not isinstance(inputs, Tensor) or outputs.ndim < 2 or len(inputs) != len(outputs):
            raise UnsupportedError("inputs and outputs are not tensors whose first dimension counts examples")
        session.measure(inputs[:1])
        size, width = len(inputs), num_columns
        per_example = session.bytes_per_example(num_columns, outputs.element_size())
        if per_example > self.budget and self.kind != "hessian":
            width = max(1, num_columns * self.budget // per_example)
            per_example = session.bytes_per_example(width, outputs.element_size())
        chunk = max(1, min(size, self.budget // max(per_example, 1)))
        if chunk < size and lin.drew_random_numbers:
            raise UnsupportedError(f"{gibibytes(size * per_example)} for a batch that dropout forbids to cut")
        return width, [slice(a, min(a + chunk, size)) for a in range(0, size, chunk)]

    def _flat(self, found: dict[str, Any], lin: Linearization) -> Tensor:
        """Return what BackPACK left on the parameters as one vector; only an unused parameter may have nothing."""
        space = self.objective.space
        parts = []
        for name, shape in zip(space.names, space.shapes, strict=True):
            part = found[name]
            if part is None:
                if _is_used(lin, space.tensors[name]):
                    raise UnsupportedError(f"BackPACK left nothing on {name}")
                part = torch.zeros(shape, dtype=space.dtype, device=space.device)
            elif part.shape != shape:
                raise UnsupportedError(f"BackPACK left a tensor of shape {tuple(part.shape)} on {name}")
            parts.append(part.detach().reshape(-1).to(space.dtype))
        return torch.cat(parts)

    # -- autograd -----------------------------------------------------------------------------------------------------

    def _pull_back(self, lin: Linearization, root: LossRoot) -> Tensor:
        outputs, _ = lin.outputs_and_targets()
        examples = outputs.shape[0] if outputs.ndim else 1
        exact: Literal["hvp", "ggnvp"] | None = {"ggn": "ggnvp", "hessian": "hvp"}.get(self.kind)  # type: ignore[assignment]
        draws = None if exact else root.draw(self.kind, self._source())  # type: ignore[arg-type]
        columns = root.num_columns if draws is None else 1
        held = outputs.element_size() * examples * max(outputs[:1].numel(), 1)
        width = max(1, min(COLUMNS_AT_ONCE, self.budget // max(2 * held, 1)))

        def blocks() -> Iterator[tuple[Tensor, float]]:
            if draws is not None:
                yield from ((column[None], sign) for column, sign in draws)
                return
            for start, stop, sign in root.bounds(width):
                yield root.columns(start, stop), sign

        for name in [name for name in ("per-example", "one-by-one") if name not in self._refused]:
            self._afford(columns, "columns of every example")
            try:
                if name == "per-example":
                    total = per_example(self.objective, lin, blocks(), self.budget)
                else:
                    total = one_by_one(self.objective, lin, blocks())
                if not self._checked and exact:
                    self._check_entries(total, lin, exact)
            except UnsupportedError as error:
                self._refused.add(name)
                if not any(str(error) in reason for reason in self.reasons):
                    self.reasons.append(f"not {name}: {error}")
            else:
                self._checked = True
                self._note(name, columns)
                return total
        if exact and 2 * self.objective.num_params < examples * columns:
            self._afford(self.objective.num_params, "products")
            self._note("products", self.objective.num_params)
            return by_products(self.objective, lin, exact, self.budget)
        self._afford(examples * columns, "columns, one of one example at a time")
        self._note("columns", examples * columns)
        return by_columns(self.objective, lin, blocks())

    def _coupled_loss(self, lin: Linearization, error: UnsupportedError) -> Tensor:
        if self.kind != "ggn":
            raise InputError(f"kind={self.kind!r} draws a column an example, but {error}; use kind='ggn'.") from error
        if self.route == "backpack" or not self.reasons or str(error) not in self.reasons[-1]:
            self._refuse(error)
        self._afford(self.objective.num_params, "products")
        self._note("products", self.objective.num_params)
        return by_products(self.objective, lin, "ggnvp", self.budget)

    def _hessian(self, lin: Linearization) -> Tensor:
        if self._session is not None:
            try:
                if self._quicker_by_autograd(self._session) and self._session.is_piecewise_linear:
                    return self._gauss_newton(lin)
                return self._propagate_hessian(self._session, lin)
            except FAILURES as error:
                self._refuse(error)
        self._afford(self.objective.num_params, "Hessian products")
        self._note("products", self.objective.num_params)
        return by_products(self.objective, lin, "hvp", self.budget)

    def _gauss_newton(self, lin: Linearization) -> Tensor:
        """Return the Gauss-Newton diagonal: the Hessian's where the model is linear in each layer by pieces."""
        rule = self.objective._rule
        assert rule is not None
        return self._pull_back(lin, loss_root(rule, *lin.outputs_and_targets()))

    def _quicker_by_autograd(self, session: BackpackSession) -> bool:
        """Say whether BackPACK's rules cost more than autograd's, as those of convolutions do, and say why once."""
        if self.route != "auto" or not session.has_convolutions:
            return False
        if not self.reasons:
            self.reasons.append("autograd is quicker than BackPACK on convolutions; checked against unit vectors")
        return True

    def _propagate_hessian(self, session: BackpackSession, lin: Linearization) -> Tensor:
        outputs, targets = lin.outputs_and_targets()
        rule = self.objective._rule
        assert rule is not None
        root = loss_root(rule, outputs, targets)
        _, pieces = self._cut(session, lin, root.num_columns)
        leaf = outputs.clone().requires_grad_()
        with torch.enable_grad():
            (gradient,) = torch.autograd.grad(rule.loss(leaf, targets), leaf)
        total = self._zero()
        for piece in pieces:
            signed = [
                (root.columns(a, b, piece).to(outputs.dtype), sign) for a, b, sign in root.bounds(root.num_columns)
            ]
            found = session.run(
                lin._batch[0][piece],
                self.objective._evaluator.seed + lin.index,
                "diag_hessian",
                gradient[piece],
                signed,
                expected=outputs[piece],
            )
            total += self._flat(found, lin)
        if not self._checked:
            self._check_entries(total, lin, "hvp")
            self._checked = True
            self.reasons.append("BackPACK has a rule for every layer; checked against products with unit vectors")
        self._note("backpack", root.num_columns)
        return total

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_examples(self, session: BackpackSession, lin: Linearization) -> None:
        """Compare every entry with autograd's, for random columns of two examples: cheap, and blind to no tensor."""
        outputs = lin._evaluation.outputs
        assert isinstance(outputs, Tensor)
        generator = torch.Generator().manual_seed(0)
        column = torch.zeros_like(outputs)
        picked = sorted({0, len(outputs) - 1})
        column[picked] = torch.randn(column[picked].shape, generator=generator).to(column)
        piece = slice(None) if lin.drew_random_numbers else slice(0, len(outputs))
        found = self._pass(session, lin, piece, column[None])
        expected = by_columns(self.objective, lin, iter([(column[None], 1.0)]), picked)
        tolerance = 10 * torch.finfo(outputs.dtype).eps ** 0.5
        for name, a, b in zip(
            self.objective.space.names,
            found.split(self.objective.space.numels),
            expected.split(self.objective.space.numels),
            strict=True,
        ):
            if not bool((a - b).norm() <= tolerance * b.norm()):
                raise UnsupportedError(f"on two examples BackPACK and autograd differ in {name}")

    def _check_entries(self, diagonal: Tensor, lin: Linearization, product: Literal["hvp", "ggnvp"]) -> None:
        """Compare a few entries, the largest and random ones, with products of the engine."""
        n = len(diagonal)
        generator = torch.Generator().manual_seed(0)
        chosen = [int(diagonal.abs().argmax()), *torch.randint(n, (NUM_CHECKED - 1,), generator=generator).tolist()]
        units = torch.zeros(len(chosen), n, dtype=diagonal.dtype, device=diagonal.device)
        units[torch.arange(len(chosen)), chosen] = 1
        expected = getattr(lin, product)(units)[torch.arange(len(chosen)), chosen]
        eps = max(torch.finfo(t.dtype).eps for t in self.objective.space.tensors.values())
        scale = expected.abs() + eps**0.5 * expected.abs().max()
        if not bool(((diagonal[chosen] - expected).abs() <= 10 * eps**0.5 * scale).all()):
            raise UnsupportedError("entries differ from products with unit vectors")

    # -- accounts -----------------------------------------------------------------------------------------------------

    def _afford(self, cost: int, what: str) -> None:
        if self.max_columns is not None and cost > self.max_columns:
            cheaper = (
                "kind='ggn-mc' estimates the Gauss-Newton diagonal at the price of a gradient a sample"
                if self.kind != "hessian"
                else "hutchinson_diagonal(HessianOperator(objective), ...) estimates it"
            )
            raise InputError(
                f"the exact diagonal takes {cost} {what}, about as many gradients, and max_columns={self.max_columns}; "
                f"{cheaper}; max_columns=None computes it all the same."
            )

    def _note(self, route: str, columns: int) -> None:
        if route not in self.routes:
            self.routes.append(route)
        self.num_columns += columns

    def _source(self) -> torch.Generator:
        assert self.generator is not None
        return self.generator

    def _zero(self) -> Tensor:
        return torch.zeros(self.objective.num_params, dtype=self.objective.dtype, device=self.objective.device)


def _is_used(lin: Linearization, tensor: Tensor) -> bool:
    outputs = lin._evaluation.outputs
    if not isinstance(outputs, Tensor) or not outputs.requires_grad:
        return False
    with lin._session():
        (g,) = torch.autograd.grad(outputs, [tensor], torch.zeros_like(outputs), retain_graph=True, allow_unused=True)
    return g is not None
