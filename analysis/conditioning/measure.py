"""How ill-conditioned a loss is, where it comes from, and which preconditioner helps.

Hessians of networks are singular to rounding, so max |lambda| / min |lambda| is meaningless. Here the ratio runs
over the numerical range, the eigenvalues beyond a stated share of the largest; it depends on that share where the
spectrum has no gap there, and quantities that need no threshold (effective and stable rank) stand beside it.

Reference: Roy and Vetterli (2007), The effective rank; MacKay (1992), Bayesian interpolation; Ghorbani, Krishnan and
Xiao (2019) for what normalisation layers do to the spectrum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from analysis.conditioning.kronecker import kfac_root
from analysis.conditioning.results import Condition, Conditioning, ConditioningComparison
from analysis.records.measured import Bounded, Measured
from analysis.records.plan import Plan, from_plan, setting
from analysis.show.listener import Progress, stages
from curvature.arguments import checked, checked_fields
from curvature.environment.autocast import full_precision
from curvature.generators import AnyGenerator, as_generator, spawn
from curvature.linalg import diagonal
from curvature.linop import LinearOperator, MatrixLike
from curvature.objective.objective import Objective
from curvature.operators.ggn import GGNOperator
from curvature.operators.hessian import HessianOperator
from curvature.operators.preconditioned import PreconditionedOperator
from curvature.parameters import Block
from curvature.results.intervals import combined_error
from curvature.spectra.counts import count_between, smallest_beyond
from curvature.spectra.results import Spectrum
from curvature.spectra.spectrum import layer_spectra, spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["ConditioningPlan", "compare_conditioning", "measure_conditioning"]

_POINTS = 25  # of the effective dimension


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ConditioningPlan(Plan):
    """What to measure of the conditioning."""

    matrix: Literal["hessian", "ggn"] = setting("hessian", "The Hessian, or the Gauss-Newton matrix.")
    floor: float = setting(
        1e-6, "The numerical range leaves out eigenvalues below this share of the largest.", above=0, below=1
    )
    jacobi: bool = setting(True, "Also measure with the diagonal as preconditioner.")
    block_diagonal: bool = setting(
        False, "Also measure with the blocks of the layers, built in full, as preconditioner."
    )
    kfac: bool = setting(
        False, "Also measure with K-FAC's factors as preconditioner, and each layer under every preconditioner."
    )
    layers: bool = setting(True, "Look at each layer, too.")
    num_probes: int = setting(4, "Probes of each spectrum.", least=1)
    num_steps: int = setting(30, "Block Lanczos steps of each spectrum.", least=1)
    diagonal_matvecs: int = setting(64, "Products for the diagonal.", least=1)

    @property
    def spectrum(self) -> SpectrumPlan:
        """The plan of each spectrum."""
        return SpectrumPlan(k=1, num_bottom=1, num_probes=self.num_probes, num_steps=self.num_steps, num_groups=0)


@from_plan(ConditioningPlan)
@full_precision
@checked
def measure_conditioning(
    objective: Objective,
    plan: ConditioningPlan,
    *,
    optimizers: Mapping[str, Any] | None = None,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> Conditioning:
    """Measure condition numbers and ranks of a loss, of its layers, and with preconditioners.

    Each number carries the error of the quadrature (and of the probes). Condition number,
    smallest eigenvalue and numerical rank stand between bounds, which are close where the matrix is built in full, as
    one with few columns is, where the lowest pair is positive, and where the spectrum has a gap that num_steps resolve.
    Elsewhere nothing says that no eigenvalue lies just beyond the floor: then the condition number is known from below
    only, 1 / floor being the most that it can be, and the bounds on the rank are far apart.

    - "jacobi": P = |diag A|, entries below `floor` times the largest raised to it; estimated with `diagonal_matvecs`
      products, exact if the matrix has no more columns.
    - "block diagonal": P = |A_ll| of each layer by its eigenvalues, raised likewise. Blocks are built in full: as many
      products as the largest layer has parameters, and its square of memory.
    - "kfac": P = B (x) A + floor times its largest eigenvalue for linear and convolutional layers, with the factors of
      `kronecker_factors(objective, "kfac")` from 16 draws; other parameters as under "jacobi".
    - optimizers: P as `optimizer_divisor` reads it, e.g. of Adam or AdaHessian; 1 for what they have not moved.

    Cost: num_probes x num_steps products for the matrix and for each preconditioner, and with `layers` as many with
    the blocks of all layers together; with `kfac` these once more for each preconditioner, and 16 gradients.

    Args:
        objective: the loss.
        plan: settings; or pass them one by one.
        optimizers: by name, optimizers with state that hold these parameters.
        generator: source of the probes, on the objective's device.
        progress: told the spectra as they are done.

    Raises:
        InputError: for settings out of range, or an optimizer of an unknown kind.
        NonFiniteError: if a product is not finite.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 10.0]])
        >>> objective = Objective(model, nn.MSELoss(), (x, torch.zeros(2, 1)))  # H = diag(1, 100)
        >>> found = measure_conditioning(objective, generator=torch.Generator().manual_seed(0))
        >>> round(found.whole.condition.value, 3), round(found.gains["jacobi"].value, 3), round(found.max_stable_lr, 4)
        (100.0, 100.0, 0.02)
    """
    floor = plan.floor
    A = HessianOperator(objective) if plan.matrix == "hessian" else GGNOperator(objective)
    settings = plan.spectrum
    num_changed = plan.jacobi + plan.block_diagonal + plan.kfac + len(optimizers or {})
    tell = stages(progress, 1 + num_changed * (1 + (plan.layers and plan.kfac)) + plan.layers)
    tell("the whole")
    found = spectrum(A, settings, generator=generator)
    whole = _condition(found, "none", floor)
    notes = list(found.notes)
    changed: dict[str, MatrixLike] = {}
    diagonal_noise = 0.0
    if whole.largest.value > 0:
        if plan.jacobi or plan.kfac:
            estimate = diagonal(A, num_matvecs=plan.diagonal_matvecs, generator=generator)
            divisor = _raised(estimate.value.abs(), floor).to(A.dtype)
        if plan.jacobi:
            changed["jacobi"] = PreconditionedOperator(A, divisor)
            if estimate.method != "exact":
                diagonal_noise = float(estimate.stderr.norm() / estimate.value.norm())
                notes.append(
                    f"The diagonal of the Jacobi preconditioner is estimated; relative noise {diagonal_noise:.2g}."
                )
        if plan.block_diagonal:
            changed["block diagonal"] = _WithRoot(A, _block_root(A, _inverse_roots(A, floor)))
        if plan.kfac:
            root, uncovered = kfac_root(objective, divisor, floor, generator)
            notes += [f"K-FAC: {uncovered}"] if uncovered else []
            if root is not None:
                changed["kfac"] = _WithRoot(A, root)
    elif plan.jacobi or plan.block_diagonal or plan.kfac:
        notes.append("The matrix is zero, so that it has no preconditioner.")
    for name, optimizer in (optimizers or {}).items():
        changed[name] = PreconditionedOperator.from_optimizer(A, optimizer, missing="identity")
    preconditioned = []
    for name, P in changed.items():
        tell(f"with {name}")
        condition = _condition(spectrum(P, settings, generator=generator), name, floor)
        preconditioned.append(replace(condition, estimated=name == "jacobi" and diagonal_noise > 0))
    if plan.layers:
        tell("layer by layer")
    blocks = layer_spectra(A, settings, generator=generator) if plan.layers else {}
    under: dict[str, tuple[Condition, ...]] = {}
    for name, P in changed.items() if plan.layers and plan.kfac else ():
        tell(f"layer by layer with {name}")
        found_under = [
            (block.name, spectrum(_block_of(P, block), settings, generator=generator))
            for block in objective.space.blocks
        ]
        under[name] = tuple(_condition(one, layer, floor) for layer, one in found_under)
    top = float(found.top.eigenvalues[0])
    damping = max(whole.largest.value, torch.finfo(torch.float32).tiny) * torch.logspace(
        math.log10(floor), 1, _POINTS, dtype=torch.float64
    )
    dimension = found.estimate(lambda x, w: found.density.dimension * (w @ _shares(x, damping)))
    return Conditioning(
        matrix=plan.matrix,
        floor=floor,
        whole=whole,
        preconditioned=tuple(preconditioned),
        layers=tuple(_condition(block, name, floor) for name, block in blocks.items()),
        max_stable_lr=2 / top if top > 0 else math.inf,
        damping=damping,
        effective_dimension=dimension.value,
        effective_dimension_stderr=torch.hypot(dimension.stderr, dimension.rule),
        notes=tuple(notes),
        layers_under=under,
    )


@checked
def compare_conditioning(
    first: Objective, second: Objective, *, generator: AnyGenerator, **settings: Any
) -> ConditioningComparison:
    """Measure two models alike, e.g. one with normalisation layers and the same without; settings as `conditioning`.

    Both see the same random numbers where they have as many parameters.
    """
    source = as_generator(generator, first.device)
    seed = spawn(source, 1)[0].initial_seed()
    found = [measure_conditioning(objective, generator=seed, **settings) for objective in (first, second)]
    return ConditioningComparison(first=found[0], second=found[1])


# -- one matrix -------------------------------------------------------------------------------------------------------


def _condition(found: Spectrum, name: str, floor: float) -> Condition:
    n = found.density.dimension
    ends = [(abs(float(p.eigenvalues[i])), float(p.residual_norms[i])) for p, i in ((found.top, 0), (found.bottom, -1))]
    largest, residual = max(ends)
    cut = floor * largest

    def entropy(nodes: Tensor, weights: Tensor) -> Tensor:
        """Of the mean over the probes, in the first order of each probe's share."""
        size = nodes.abs()
        mean = weights.mean(dim=0)
        total = (mean * size).sum()
        logs = torch.where(size > 0, size * size.clamp_min(torch.finfo(size.dtype).tiny).log(), 0)
        s, t = (weights * size).sum(dim=1), (weights * logs).sum(dim=1)
        value = total.log() + math.log(n) - (mean * logs).sum() / total
        slope = 1 / total + (mean * logs).sum() / total.square()
        return value + slope * (s - total) - (t - (mean * logs).sum()) / total

    if largest == 0:
        nothing = Measured(value=math.nan, stderr=math.nan)
        bounds = {"smallest": Bounded.between(0, 0), "condition": Bounded.between(math.nan, math.nan)}
        bounds["rank"] = Bounded.between(0, 0)
        effective = stable_rank = nothing
    else:
        least, most = smallest_beyond(found, cut)
        most = min(most, largest)
        near = [float(end) for end in count_between(found, -cut, cut).interval()]
        ratios = max((largest - residual) / most, 1), (largest + residual) / min(least, most)
        bounds = {
            "smallest": Bounded.between(least, most),
            "condition": Bounded.between(*ratios, value=math.sqrt(ratios[0] * ratios[1])),
            "rank": Bounded.between(n - near[1], n - near[0]),
        }
        log_rank = _measured(found, entropy)
        squares = _measured(found, lambda x, w: n * (w * x.square()).sum(dim=1))
        rank = math.exp(log_rank.value)
        effective = replace(log_rank, value=rank, stderr=rank * log_rank.stderr)
        stable = squares.value / largest**2
        of_largest = (2 * stable * residual / largest, math.inf)
        stderr, dof = combined_error([(squares.stderr / largest**2, squares.dof), of_largest])
        stable_rank = replace(squares, value=stable, stderr=stderr, dof=dof)
    return Condition(
        name=name,
        num_params=n,
        largest=Measured(value=largest, stderr=residual, residual=True),
        smallest=bounds["smallest"],
        condition=bounds["condition"],
        rank=bounds["rank"],
        effective_rank=effective,
        stable_rank=stable_rank,
        exact=found.exact,
        num_matvecs=found.num_matvecs,
    )


def _measured(found: Spectrum, samples: Callable[[Tensor, Tensor], Tensor]) -> Measured:
    return Measured.of(found.estimate(samples))


def _shares(nodes: Tensor, damping: Tensor) -> Tensor:
    positive = nodes.clamp_min(0)[:, None]
    return positive / (positive + damping.to(nodes))


# -- preconditioners --------------------------------------------------------------------------------------------------


def _raised(values: Tensor, floor: float) -> Tensor:
    """Return positive values, the small ones raised to a share of the largest; 1 where all are zero."""
    largest = values.max()
    return values.clamp_min(floor * largest) if bool(largest > 0) else torch.ones_like(values)


def _inverse_roots(A: HessianOperator | GGNOperator, floor: float) -> list[Tensor]:
    """Return |A_ll|^-1/2 for every layer, (m, m)."""
    roots = []
    for block in A.objective.space.blocks:
        dense = A.restrict(block).to_dense().double()
        values, U = torch.linalg.eigh((dense + dense.T) / 2)
        roots.append(((U * _raised(values.abs(), floor).rsqrt()) @ U.T).to(A.dtype))
    return roots


def _block_root(A: HessianOperator | GGNOperator, roots: list[Tensor]) -> Callable[[Tensor], Tensor]:
    """Return X -> R X with R block-diagonal over the layers."""

    def scaled(X: Tensor) -> Tensor:
        Y = torch.zeros_like(X)
        for R, block in zip(roots, A.objective.space.blocks, strict=True):
            block.put(R @ block.take(X), Y)
        return Y

    return scaled


class _WithRoot(LinearOperator):
    """R A R, or its block for a layer, which is R_l A_ll R_l: no R here mixes layers."""

    def __init__(self, A: Any, root: Callable[[Tensor], Tensor], block: Block | None = None) -> None:
        self.A, self.root, self.block, self.num_params = A, root, block, A.shape[0]
        super().__init__(self.of.shape, A.dtype, A.device)

    @property
    def of(self) -> Any:
        """The matrix between the roots."""
        return self.A if self.block is None else self.A.restrict(self.block)

    def _matmat(self, X: Tensor) -> Tensor:
        return self._scaled(self.of @ self._scaled(X))

    def _scaled(self, X: Tensor) -> Tensor:
        if self.block is None:
            return self.root(X)
        return self.block.take(self.root(self.block.embed(X, self.num_params)))


def _block_of(P: Any, block: Block) -> Any:
    return P.restrict(block) if isinstance(P, PreconditionedOperator) else _WithRoot(P.A, P.root, block)
