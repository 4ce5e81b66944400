"""Kronecker factors of the Gauss-Newton matrix's layer blocks: KFLR, KFAC and KFRA.

A layer z_t = W a_t + b sees inputs a_t at T positions (T = 1 for a linear layer on vectors; the pixels of a
convolution, whose a_t are patches; the tokens of a sequence). With d_t = J' r the columns of the loss Hessian's root
pulled back to z_t, the layer's block is sum_nv (sum_t d_nvt (x) a_nt)(...)'. It is replaced by one Kronecker product,

    G_[W b]  ~  B (x) A,    B = (1/T) sum_n sum_v sum_t d_nvt d_nvt',    A = (1/N) sum_n sum_t a_nt a_nt',

a with a 1 appended for the bias. The loss's own divisor is in the columns, and so in B. Where T = 1 and a and d are
independent over examples this is exact: a deep linear net under squared error, or any layer behind one example. It is
the convention of Grosse and Martens (2016); BackPACK's for convolutions is larger by a factor about T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.cost import timed
from curvature.environment.one_matrix import one_matrix
from curvature.errors import InputError, NonFiniteError
from curvature.generators import AnyGenerator
from curvature.layerwise.kronecker_work import KroneckerKind, KroneckerWork, LayerUse
from curvature.layerwise.loss_root import check_sampling
from curvature.linop import SymmetricOperator
from curvature.objective.objective import Objective
from curvature.results.record import Result

__all__ = ["KroneckerFactors", "LayerFactors", "kronecker_factors"]


@dataclass(frozen=True, kw_only=True, repr=False)
class LayerFactors(Result):
    """The factors of one layer's block: B (x) A for the matrix [W b] (o, i + 1), row by row."""

    _large = ("A", "B")

    name: str
    """Of the module."""
    A: Tensor
    """(i, i), second moment of the inputs, summed over positions; (i + 1, i + 1) with a bias, which comes last."""
    B: Tensor
    """(o, o), of the loss columns at the layer's outputs, averaged over positions; units of the loss per unit of the
    outputs squared."""
    weight: str | None
    """Name of the weight, None if it is not among the objective's parameters."""
    bias: str | None
    """Name of the bias, likewise."""
    positions: float
    """T, positions an example."""

    def matmat(self, V: Tensor) -> Tensor:
        """Return B V A for V of the shape of [W b], (o, i + 1), or of those of them that are parameters."""
        return self.B @ V @ self.A


@dataclass(frozen=True, kw_only=True, repr=False)
class KroneckerFactors(Result):
    """A block-diagonal approximation of the Gauss-Newton matrix, one Kronecker product a layer."""

    layers: dict[str, LayerFactors]
    """By the module's name, in the order of the parameters."""
    kind: str
    """"kflr", "kfac" or "kfra"."""
    uncovered: dict[str, str]
    """Parameters that have no factors, and why; `matvec` gives zeros for them."""
    num_columns: int
    """Columns pulled back, summed over batches: about a gradient of a batch each."""
    seconds: float
    """Wall-clock time."""
    slices: dict[str, tuple[int, int]]
    """Where each parameter lies in the objective's flat vector."""
    num_params: int
    """n."""

    def to_dense(self, layer: str) -> Tensor:
        """Return the block of one layer, (m, m): its weight's entries row by row, then its bias's."""
        f = self._layer(layer)
        dense = torch.kron(f.B, f.A)
        return dense if f.bias is None or f.weight is None else dense[self._order(f)][:, self._order(f)]

    def matvec(self, v: Tensor) -> Tensor:
        """Return the product of the block-diagonal matrix with v (n,); zeros for parameters without factors."""
        if v.shape != (self.num_params,):
            raise InputError(f"matvec needs a vector of shape ({self.num_params},), got {tuple(v.shape)}.")
        result = torch.zeros_like(v)
        for f in self.layers.values():
            names = [name for name in (f.weight, f.bias) if name is not None]
            parts = [v[slice(*self.slices[name])].reshape(len(f.B), -1) for name in names]
            product = f.matmat(torch.cat(parts, dim=1).to(f.A.dtype)).to(v.dtype)
            for name, piece in zip(names, product.split([p.shape[1] for p in parts], dim=1), strict=True):
                result[slice(*self.slices[name])] = piece.reshape(-1)
        return result

    def preconditioner(
        self, damping: float, *, power: float = 1.0, others: Tensor | None = None
    ) -> KroneckerPreconditioner:
        """Return (G + damping I)^-1 with these factors in the place of G, for `cg`, `solve` and `NewtonCG`.

        Args:
            damping: positive.
            power: of that inverse; 1/2 for the root that goes on both sides of a matrix.
            others: (n,), what parameters without factors are divided by, before the power. Default: the damping.

        Raises:
            InputError: for a damping that is not positive and finite.
        """
        return KroneckerPreconditioner(self, damping=damping, power=power, others=others)

    def _layer(self, name: str) -> LayerFactors:
        if name not in self.layers:
            raise InputError(f"no factors for {name!r}; there are: {', '.join(map(repr, self.layers)) or 'none'}.")
        return self.layers[name]

    @staticmethod
    def _order(f: LayerFactors) -> Tensor:
        """Places of weight entries and then bias entries among those of [W b] row by row."""
        places = torch.arange(len(f.A) * len(f.B), device=f.A.device).view(len(f.B), len(f.A))
        return torch.cat([places[:, :-1].reshape(-1), places[:, -1]])


@full_precision
@one_matrix
@checked
def kronecker_factors(
    objective: Objective,
    kind: KroneckerKind = "kflr",
    *,
    mc_samples: int = 1,
    generator: AnyGenerator | None = None,
    max_columns: int | None = 10_000,
) -> KroneckerFactors:
    """Return Kronecker factors for every nn.Linear and nn.Conv2d that holds parameters of the objective.

    - "kflr": all columns of the loss Hessian; C gradients for C outputs an example, no randomness.
    - "kfac": columns of targets drawn from the model's distribution (random combinations of columns for losses that
      are no likelihood); a gradient a sample.
    - "kfra": the matrix that is propagated is averaged over the batch at every layer (chains of nn.Linear
      with ReLU, Tanh or Sigmoid only); depends on how the data are cut into batches.

    Factors of several batches are combined as the objective weights the batches; A weighs all examples the same.

    Args:
        objective: one with split between model and loss.
        kind: "kflr", "kfac" or "kfra".
        mc_samples: targets an example for "kfac".
        generator: source of "kfac", or a seed.
        max_columns: refuse more columns a batch than this; None forces.

    Raises:
        InputError: for arguments out of range, for an objective without split, or if no layer is of a kind that has
            factors.
        DataError: if examples meet (batch normalisation in train mode).
        NonFiniteError: if a factor is not finite.

    Reference: Botev, Ritter and Barber (2017), Practical Gauss-Newton optimisation for deep learning (KFLR, KFRA);
    Martens and Grosse (2015), Grosse and Martens (2016) (KFAC, convolutions).

    Examples:
        >>> import torch
        >>> from curvature import Objective
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> objective = Objective(torch.nn.Linear(2, 1, bias=False), torch.nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> kronecker_factors(objective).to_dense("(root)")
        tensor([[1., 0.],
                [0., 4.]])
    """
    if kind not in ("kflr", "kfac", "kfra"):
        raise InputError(f"kind must be 'kflr', 'kfac' or 'kfra', got {kind!r}.")
    source = check_sampling(objective, kind, mc_samples, generator, max_columns, draws=kind == "kfac")
    work = KroneckerWork(objective, kind, mc_samples, source, max_columns)
    total, seconds = timed(lambda: objective.reduce(work.of_batch), objective.device)
    if not bool(torch.isfinite(total).all()):
        raise NonFiniteError("the factors are not finite: activations or columns overflow; use a wider dtype.")
    slices, start = {}, 0
    for name, size in zip(objective.space.names, objective.space.numels, strict=True):
        slices[name] = (start, start + size)
        start += size
    return KroneckerFactors(
        layers=dict(_unpack(work.uses, total)),
        kind=kind,
        uncovered=work.uncovered,
        num_columns=work.num_columns,
        seconds=seconds,
        slices=slices,
        num_params=objective.num_params,
    )


def _unpack(uses: list[LayerUse], total: Tensor) -> Iterator[tuple[str, LayerFactors]]:
    """Turn sums over data into factors."""
    pieces = total.split([size for use in uses for size in use.sizes])
    for k, use in enumerate(uses):
        S, aa, a, counts = pieces[4 * k : 4 * k + 4]
        positions, examples = counts
        A, mean = aa.view(use.num_inputs, -1) / examples, a / examples
        T = positions / examples
        if use.bias is not None and use.weight is not None:
            A = torch.cat([torch.cat([A, mean[:, None]], 1), torch.cat([mean, T[None]])[None]])
        elif use.weight is None:
            A = T.view(1, 1)
        yield (
            use.name,
            LayerFactors(
                name=use.name,
                A=A,
                B=S.view(use.num_outputs, -1) / T,
                weight=use.weight,
                bias=use.bias,
                positions=float(T),
            ),
        )


class KroneckerPreconditioner(SymmetricOperator):
    """P = blockdiag(B (x) A) + damping I, as its inverse: `@` applies P^-power, P^-1 by default.

    With B = U b U' and A = V a V', P^-1 X = U ((U'XV) / (b a' + damping)) V' for a layer's X (o, i + 1): the damping is
    that of the whole block, not shared out over the factors. Parameters without factors are divided by the damping.
    Eigenvalues of factors below zero, which is rounding, count as zero. Cost: o^3 + i^3 a layer once, 2 o i (o + i) a
    column.

    Args:
        factors: as `kronecker_factors` returns them.
        damping: positive; that of the system to be solved.
        power: of P^-1 that is applied; 1/2 for P^-1/2 on both sides of a matrix.
        others: (n,), P's diagonal for parameters without factors. Default: the damping.

    Raises:
        InputError: for a damping that is not positive and finite.

    Reference: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature,
    appendix B.
    """

    def __init__(
        self, factors: KroneckerFactors, *, damping: float, power: float = 1.0, others: Tensor | None = None
    ) -> None:
        if not (damping > 0 and math.isfinite(damping)):
            raise InputError(f"damping must be positive and finite, got {damping}: blocks may be singular.")
        some = next(iter(factors.layers.values())).A
        n = factors.num_params
        super().__init__((n, n), torch.promote_types(some.dtype, torch.float32), some.device)
        self.damping = damping
        rest = torch.full((n,), damping, dtype=self.dtype, device=some.device) if others is None else others
        self._others = rest.to(self.dtype) ** power
        self._blocks = []
        for f in factors.layers.values():
            (a, V), (b, U) = (torch.linalg.eigh(M.to(self.dtype)) for M in (f.A, f.B))
            places = [torch.arange(*factors.slices[name]) for name in (f.weight, f.bias) if name is not None]
            index = torch.cat([p.view(len(b), -1) for p in places], dim=1).to(some.device)  # of the rows of [W b]
            spread = b.clamp_min(0)[:, None] * a.clamp_min(0) + damping
            self._blocks.append((index, U, V, spread**power))

    def _matmat(self, X: Tensor) -> Tensor:
        columns = X.T.to(self.dtype)
        result = columns / self._others
        for index, U, V, spread in self._blocks:
            part = U @ ((U.T @ columns[:, index] @ V) / spread) @ V.T
            result[:, index.reshape(-1)] = part.flatten(1)
        return result.T
