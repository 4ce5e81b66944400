"""Block Krylov runs on a curvature matrix and its diagonal blocks, side by side, with one walk over the data a step.

Each step asks all runs which columns they want multiplied, multiplies them batch by batch, and hands the products back.
On their way into the sum the products of a group of batches, A_g X, are projected on the run's basis V. So every run
ends with T = V A V' and with T_g = V A_g V' for every group g: all that a jackknife over the data needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError
from curvature.linalg.base.checkpoint import NOT_KEPT, Checkpoint
from curvature.linalg.base.places import Place, normal_rows
from curvature.linalg.base.validate import check_finite
from curvature.linalg.krylov._krylov_space import KrylovSpace
from curvature.linop import MatrixLike
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.parameters import Block
from curvature.sharding.layout import Layout
from curvature.spectra.basis_cost import num_together

__all__ = ["AllEntries", "BlockKrylov", "GroupSums", "Run", "advance"]

COLUMNS = 8  # of the identity that are multiplied at a time


class Run(Protocol):
    """A projection of a matrix that grows by a few columns a step."""

    @property
    def num_matvecs(self) -> int:
        """Products so far."""

    def propose(self) -> Tensor:
        """Return the columns to multiply next, (n, k); none, (n, 0), at the end."""

    def absorb(self, AX: Tensor) -> None:
        """Take their products, (n, k)."""

    def project(self, AX: Tensor, width: int) -> Tensor:
        """Return V A X, (m + width, c), in float64 on the CPU, for c columns A X; V includes the `width` proposed."""

    @property
    def T(self) -> Tensor:
        """V A V', (m, m), symmetric, float64 on the CPU."""


class BlockKrylov:
    """The block Krylov space of `num_probes` normal probes Z, up to `num_steps` block steps."""

    def __init__(
        self,
        A: MatrixLike,
        *,
        n: int,
        num_probes: int,
        num_steps: int,
        generator: torch.Generator,
        place: Place,
        sharding: Layout | None = None,
    ) -> None:
        self.num_steps, self.place = num_steps, place
        self.num_probes = min(num_probes, n)
        shape = _Shape(A, n, sharding)
        self.probes = normal_rows(shape, self.num_probes, generator).T.to(A.dtype)
        self.first_products: Tensor | None = None
        self._A = A
        self._steps = 0
        self.space = KrylovSpace(
            shape,
            size=self.num_probes * num_steps,
            num_directions=self.num_probes,
            known=self.probes.new_zeros(n, 0),
            generator=generator,
            place=place,
        )
        self.space.start(self.probes.T)
        self._start = self.space.P.T.clone()
        self.invariant = False
        """Whether the space holds all that the probes can see: later directions are random ones."""

    @property
    def num_matvecs(self) -> int:
        return self.space.num_matvecs

    @property
    def T(self) -> Tensor:
        return self.space.T

    def propose(self) -> Tensor:
        space = self.space
        width = min(self.num_probes, space.dimension - space.count)
        self.invariant = self.invariant or width == 0 or (self._steps > 0 and space.exhausted())
        if self._steps == self.num_steps or width == 0:
            return self.probes[:, :0]
        return space.propose(width).to(self._A.device, self._A.dtype)

    def absorb(self, AX: Tensor) -> None:
        if self._steps == 0:  # A Z, from the products with the orthonormal columns that span Z
            self.first_products = AX @ (self._start.to(AX).T @ self.probes)
        self._steps += 1
        self.space.absorb(AX)

    @property
    def rule_steps(self) -> int | None:
        """Block steps of the probes' quadrature; None if it is exact."""
        return None if self.invariant else self._steps

    def project(self, AX: Tensor, width: int) -> Tensor:
        rows = self.space.rows[: self.space.count + width]
        return (rows @ AX.to(rows)).double().cpu()

    def start(self) -> Tensor:
        """Return B = V Z, (m, p)."""
        first = (self._start.to(self.probes).T @ self.probes).double().cpu()
        return torch.cat([first, first.new_zeros(self.space.count - len(first), first.shape[1])])


class AllEntries:
    """The matrix itself, column by column: V is the identity."""

    def __init__(self, A: MatrixLike, *, n: int) -> None:
        self._A, self._n = A, n
        self._columns: list[Tensor] = []

    @property
    def num_matvecs(self) -> int:
        return sum(columns.shape[1] for columns in self._columns)

    @property
    def matrix(self) -> Tensor:
        """The entries as the products gave them, (n, n), float64 on the CPU: symmetric up to rounding."""
        return torch.cat(self._columns, dim=1)

    @property
    def T(self) -> Tensor:
        return (self.matrix + self.matrix.T) / 2

    def propose(self) -> Tensor:
        first = self.num_matvecs
        width = min(COLUMNS, self._n - first)
        X = torch.zeros(self._n, width, dtype=self._A.dtype, device=self._A.device)
        X[range(first, first + width), range(width)] = 1
        return X

    def absorb(self, AX: Tensor) -> None:
        self._columns.append(check_finite(AX, self.num_matvecs + AX.shape[1]).double().cpu())

    def project(self, AX: Tensor, width: int) -> Tensor:
        return AX[: self.num_matvecs + width].double().cpu()


class GroupSums:
    """w_g T_g for groups g of consecutive batches, as the steps of a run yield them.

    The products of a few groups are projected together, see `basis_cost.num_together`.

    Args:
        run: whose products are looked at.
        num_batches: how many batches a walk over the data has.
        num_groups: how many groups to form, at most `num_batches`.
    """

    def __init__(self, run: Run, num_batches: int, num_groups: int) -> None:
        self._run, self._num_batches = run, num_batches
        self.weights = torch.zeros(num_groups, dtype=torch.float64)
        self.T = torch.zeros(num_groups, 0, 0, dtype=torch.float64)
        self._parts = torch.zeros(0)
        self._sums = torch.zeros(0, 0)
        self._summed: list[int] = []

    def begin(self, width: int) -> None:
        """Make room for the columns that a step multiplies."""
        groups, m = len(self.T), self.T.shape[1]
        self._parts = torch.zeros(groups, m + width, width, dtype=torch.float64)
        self.weights.zero_()

    def add(self, index: int, weight: float, AX: Tensor) -> None:
        """Count the products of one batch; batches come in order."""
        group, width = index * len(self.T) // self._num_batches, AX.shape[1]
        if group not in self._summed:
            if len(self._summed) * width == len(self._sums):
                self._close()
                self._sums = AX.new_zeros(min(num_together(AX.nbytes), len(self.T)) * width, len(AX))
            self._summed.append(group)
        first = (len(self._summed) - 1) * width
        self._sums[first : first + width].add_(AX.T, alpha=weight)
        self.weights[group] += weight

    def seen(self) -> tuple[Tensor, Tensor]:
        """Return the step's columns, and the weights of the groups."""
        self._close()
        return self._parts, self.weights

    def end(self, parts: Tensor, weights: Tensor) -> None:
        """Append the step's columns, and by symmetry its rows."""
        m, width = self.T.shape[1], parts.shape[2]
        grown = torch.zeros(len(self.T), m + width, m + width, dtype=torch.float64)
        grown[:, :m, :m], grown[:, :, m:] = self.T, parts
        grown[:, m:, :m] = parts[:, :m].mT
        grown[:, m:, m:] = (parts[:, m:] + parts[:, m:].mT) / 2
        self.T, self.weights = grown, weights

    def _close(self) -> None:
        width = self._parts.shape[2]
        if self._summed:
            found = self._run.project(self._sums[: len(self._summed) * width].T, width)
            self._parts[self._summed] = torch.stack(found.split(width, dim=1))
        self._sums, self._summed = torch.zeros(0, 0), []


@one_matrix
def advance(
    A: MatrixLike,
    runs: Sequence[Run],
    blocks: Sequence[Block | None],
    groups: Sequence[GroupSums],
    report: Callable[[int], None],
    saved: Checkpoint = NOT_KEPT,
) -> None:
    """Run all to their end.

    Args:
        A: the matrix, an operator of an objective if there are blocks or groups.
        runs: one for every block.
        blocks: diagonal blocks of A; None stands for A.
        groups: of the runs; none if the data's own spread is not asked for.
        report: told the number of columns multiplied in each step.
        saved: keeps the products of each step.
    """
    while True:
        wanted = [run.propose() for run in runs]
        going = [i for i, X in enumerate(wanted) if X.shape[1] > 0]
        if not going:
            return
        chosen = [wanted[i] for i in going], [blocks[i] for i in going], [groups[i] for i in going if groups]
        products, seen = saved.piece(partial(_multiply, A, *chosen))
        if len(seen) != len(chosen[2]):
            raise InputError(
                "the run in the folder of checkpoint was made on another number of ranks, with other errors over the "
                "data: go on with as many, or give a new folder."
            )
        for group, of_step in zip(chosen[2], seen, strict=True):
            group.end(*of_step)
        for i, AX in zip(going, products, strict=True):
            runs[i].absorb(AX)
        report(sum(wanted[i].shape[1] for i in going))


def _multiply(
    A: MatrixLike, X: Sequence[Tensor], blocks: Sequence[Block | None], groups: Sequence[GroupSums]
) -> tuple[list[Tensor], list[tuple[Tensor, Tensor]]]:
    """Return the products of X, and what the groups have seen of them."""
    if not isinstance(A, ObjectiveOperator):
        return [A @ x for x in X], []
    blocks = [A.block if block is None else block for block in blocks]
    if not groups:
        return A.products(X, blocks), []

    def observe(index: int, weight: float, parts: list[Tensor]) -> None:
        for group, part in zip(groups, parts, strict=True):
            group.add(index, weight, part)

    for group, x in zip(groups, X, strict=True):
        group.begin(x.shape[1])
    products = A.products(X, blocks, observe=observe)
    return products, [group.seen() for group in groups]


class _Shape:
    """What a Krylov space asks of a block of a matrix that somebody else multiplies with."""

    def __init__(self, A: MatrixLike, n: int, sharding: Layout | None) -> None:
        self.shape, self.dtype, self.device, self.sharding = (n, n), A.dtype, A.device, sharding

    def __matmul__(self, X: Tensor, /) -> Tensor:
        raise NotImplementedError("the products of a run are made for all runs together")
