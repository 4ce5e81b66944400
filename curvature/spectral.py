"""One set of products, many quantities: the whole spectrum of a curvature matrix from one block Krylov space.

The probes of the density span the start block. What grows from them yields, with no further product, the eigenpairs at
both ends with their residuals, density, trace, norms, moments and all that follows from a density. The products of each
batch are looked at on their way into the sum, which says how far all of it would move with other data.

Reference: Ubaru, Chen and Saad (2017), Fast estimation of tr f(A) via stochastic Lanczos quadrature; Golub and Meurant
(2010), Matrices, Moments and Quadrature with Applications.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.autocast import full_precision
from curvature.cost import synchronize
from curvature.krylov_runs import AllEntries, BlockKrylov, GroupSums, Run, advance
from curvature.linalg import eigsh
from curvature.linalg._completeness import judge, look_outside
from curvature.linalg._validate import check_generator, check_square, rounding_level
from curvature.linalg.quadrature import Quadrature, quadrature
from curvature.linalg.slq import COARSE_SHARES, smoothed
from curvature.linop import MatrixLike
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.parameters import Block
from curvature.planning import PATIENCE, SMALL, SpectrumPlan
from curvature.results import EigenPairs, Status
from curvature.spectrum_results import DataSpread, Spectrum

__all__ = ["layer_spectra", "spectrum"]


@full_precision
@checked
def spectrum(
    A: MatrixLike,
    plan: SpectrumPlan | None = None,
    *,
    generator: torch.Generator,
    basis_device: torch.device | str | None = None,
    progress: Callable[[int], None] | None = None,
) -> Spectrum:
    """Return eigenpairs at both ends, density, trace and what follows, from one block Krylov space.

    Cost: plan.num_probes x plan.num_steps products, or n if that is less; some 5 to 15 more that look for eigenvalues
    which the probes could not see (`plan.confidence`), and more if eigenpairs that are asked for have not converged.
    Memory: as many vectors.

    Args:
        A: symmetric, (n, n): an operator of an objective, any other, or a tensor.
        plan: what to compute and how well. Default: `SpectrumPlan()`.
        generator: for the probes, on A's device.
        basis_device: where the Krylov space is held, "cpu" for one that does not fit beside the model.
        progress: told the number of columns after each product.

    Raises:
        InputError: for settings out of range, or a space that does not fit into memory.
        NonFiniteError: if a product is not finite.

    Example:
        >>> A = torch.diag(torch.cat([torch.tensor([50.0, 20.0]), torch.linspace(0, 1, 998)]))
        >>> found = spectrum(A, SpectrumPlan(k=2, num_bottom=1), generator=torch.Generator().manual_seed(0))
        >>> found.top.eigenvalues.round(decimals=3)
        tensor([50., 20.])
        >>> 120 < found.num_matvecs <= 150
        True
    """
    (found,) = _spectra(A, [None], plan or SpectrumPlan(), [generator], basis_device, progress)
    return found


@full_precision
@checked
def layer_spectra(
    A: ObjectiveOperator,
    plan: SpectrumPlan | None = None,
    *,
    blocks: Sequence[Block] | None = None,
    generator: torch.Generator,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Spectrum]:
    """Return the spectrum of each layer's diagonal block, by name, all from the same walks over the data.

    Cost: for each layer, products with its block, plan.num_probes x plan.num_steps or as many as it has parameters; a
    graph that is not kept is built once a step for all layers. Memory: as many vectors, of all layers together (n,).

    Args:
        A: an operator of an objective.
        plan: for each layer. Default: `SpectrumPlan()`.
        blocks: the layers. Default: the modules that own parameters.
        generator: seeds one generator a layer; on A's device.
        progress: told the number of columns after each step.

    Raises:
        InputError: as for `spectrum`.
        NonFiniteError: if a product is not finite.
    """
    chosen = A.objective.space.blocks if blocks is None else tuple(blocks)
    check_generator(A, generator)
    seeds = torch.randint(2**62, (len(chosen),), generator=generator, device=generator.device).tolist()
    generators = [torch.Generator(generator.device).manual_seed(seed) for seed in seeds]
    found = _spectra(A, list(chosen), plan or SpectrumPlan(), generators, None, progress)
    return {block.name: each for block, each in zip(chosen, found, strict=True)}


def _spectra(
    A: MatrixLike,
    blocks: Sequence[Block | None],
    plan: SpectrumPlan,
    generators: Sequence[torch.Generator],
    basis_device: torch.device | str | None,
    progress: Callable[[int], None] | None,
) -> list[Spectrum]:
    n = check_square(A)
    sizes = [n if block is None else block.num_params for block in blocks]
    plan.check_memory(A, sizes, basis_device)
    runs: list[Run] = []
    for size, generator in zip(sizes, generators, strict=True):
        check_generator(A, generator)
        if plan.all_entries(size):
            runs.append(AllEntries(A, n=size))
        else:
            device = None if basis_device is None else torch.device(basis_device)
            runs.append(
                BlockKrylov(
                    A,
                    n=size,
                    num_probes=plan.num_probes,
                    num_steps=plan.num_steps_for(size),
                    generator=generator,
                    device=device,
                )
            )
    num_groups, reason = _num_groups(A, plan)
    start = time.perf_counter()
    groups = [GroupSums(run, _num_batches(A), num_groups) for run in runs] if num_groups else []
    advance(A, runs, blocks, groups, progress or (lambda _: None))
    if groups and isinstance(A, ObjectiveOperator) and A.objective.shuffles and not A.objective.keeps_all_graphs:
        groups, reason = [], "the loader shuffles, so that its batches cannot be followed (shuffle=False)"
    synchronize(A.device)
    found = []
    for i, (run, block, generator) in enumerate(zip(runs, blocks, generators, strict=True)):
        of_run = groups[i] if groups else None
        found.append(
            _Analysis(A, run, block, plan, of_run).result(generator, time.perf_counter() - start, reason, progress)
        )
    return found


def _num_batches(A: MatrixLike) -> int:
    assert isinstance(A, ObjectiveOperator)
    if A.objective.num_batches is None:
        A.objective.loss()  # the first walk counts them
    assert A.objective.num_batches is not None
    return A.objective.num_batches


def _num_groups(A: MatrixLike, plan: SpectrumPlan) -> tuple[int, str | None]:
    """Return how many groups of batches the jackknife has, none if there is a reason."""
    if plan.num_groups == 0 or not isinstance(A, ObjectiveOperator):
        return 0, None
    if A.objective.process_group is not None:
        return 0, "each rank sees its own batches only"
    num_batches = _num_batches(A)
    if num_batches < plan.least_groups:
        batches = "1 batch" if num_batches == 1 else f"{num_batches} batches"
        return 0, f"the data came in {batches}, and {plan.least_groups} at least are needed (micro_batch=)"
    return min(plan.num_groups, num_batches), None


class _Analysis:
    """From the projections of one run to its spectrum."""

    def __init__(
        self, A: MatrixLike, run: Run, block: Block | None, plan: SpectrumPlan, groups: GroupSums | None
    ) -> None:
        self.run, self.plan, self.groups = run, plan, groups
        if block is not None:
            assert isinstance(A, ObjectiveOperator)
            A = A.restrict(block)
        self.A = A
        self.n = int(A.shape[0])
        self.k, self.num_bottom = min(plan.k, self.n), min(plan.num_bottom, self.n)
        self.T = run.T
        self.extra_matvecs = 0

    def result(
        self, generator: torch.Generator, seconds: float, reason: str | None, progress: Callable[[int], None] | None
    ) -> Spectrum:
        exact = isinstance(self.run, AllEntries)
        coarse: tuple[Quadrature, ...] = ()
        if isinstance(self.run, AllEntries):
            top, bottom = self._exact_pairs(self.run)
            rule = quadrature(self.T, self.T.new_zeros(self.n, 1), n=self.n, num_steps=None, num_low=0, num_high=self.n)
            low, high, B = 0, self.n, self.T.new_zeros(self.n, 1)
        else:
            assert isinstance(self.run, BlockKrylov)
            top, bottom, low, high = self._pairs(self.run, generator, progress)
            B = self.run.start()
            rule = quadrature(self.T, B, n=self.n, num_steps=self.run.rule_steps, num_low=low, num_high=high)
            coarse = tuple(self._coarse(B, low, high, rule, share) for share in COARSE_SHARES)
        spent = self.run.num_matvecs + self.extra_matvecs
        template = smoothed(
            rule.nodes.expand(len(rule.weights), -1),
            rule.weights,
            n=self.n,
            num_steps=rule.num_steps,
            known=rule.known,
            num_matvecs=spent,
        )
        return Spectrum(
            top=top,
            bottom=bottom,
            density=template,
            rule=rule,
            coarse=coarse,
            exact=exact,
            rounding=self._rounding(rule),
            spread=self._spread(B, low, high, rule),
            layer_trace_samples=self._layer_traces(top),
            num_matvecs=spent,
            seconds=seconds,
            notes=() if reason is None else (f"No error over the data is given: {reason}.",),
        )

    def _pairs(
        self, run: BlockKrylov, generator: torch.Generator, progress: Callable[[int], None] | None
    ) -> tuple[EigenPairs, EigenPairs, int, int]:
        """Return the pairs wanted at both ends, and how many pairs from either end are as good as exact."""
        theta, S, residuals = run.space.ritz()
        m, plan = len(theta), self.plan
        floor = max(run.space.rounding(), torch.finfo(torch.float64).tiny)
        atol = SMALL * float(theta.abs().max())
        high_tolerance = (plan.rtol * theta.abs()).clamp_min(floor)
        low_tolerance = (plan.bottom_rtol * theta.abs()).clamp_min(max(floor, atol))
        high = _leading((residuals <= high_tolerance).flip(0), min(max(plan.k, plan.num_deflated), m // 2))
        low = _leading(residuals <= low_tolerance, min(self.num_bottom, m - high))
        top = self._gather(range(m - 1, m - 1 - self.k, -1), theta, S, residuals, high_tolerance, plan.rtol, run)
        bottom = self._gather(
            range(self.num_bottom - 1, -1, -1), theta, S, residuals, low_tolerance, plan.bottom_rtol, run
        )
        if plan.confidence is not None:
            top, bottom = self._searched(top, high_tolerance, bottom, low_tolerance, generator, progress)
        if not bool(top.converged.all()):
            top = self._continue(top, "LA", plan.rtol, 0.0, generator, progress)
        if not bool(bottom.converged.all()):
            bottom = self._continue(bottom, "SA", plan.bottom_rtol, atol, generator, progress)
        return top, bottom, low, high

    def _searched(
        self,
        top: EigenPairs,
        high_tolerance: Tensor,
        bottom: EigenPairs,
        low_tolerance: Tensor,
        generator: torch.Generator,
        progress: Callable[[int], None] | None,
    ) -> tuple[EigenPairs, EigenPairs]:
        """Look outside the Krylov space for eigenvalues that belong among the pairs that have converged."""
        run, confidence = self.run, self.plan.confidence
        assert isinstance(run, BlockKrylov)
        assert confidence is not None
        found = look_outside(
            self.A,
            run.space.V.T,
            (
                (top, 1.0, high_tolerance[len(high_tolerance) - self.k :]),
                (bottom, -1.0, low_tolerance[: self.num_bottom]),
            ),
            norm=run.space.norm,
            allowed=1 - confidence,
            max_steps=20,
            generator=generator,
        )
        self.extra_matvecs += found.num_matvecs
        if progress is not None:
            progress(found.num_matvecs)
        return found.ends[0], found.ends[1]

    def _gather(
        self,
        places: Sequence[int],
        theta: Tensor,
        S: Tensor,
        residuals: Tensor,
        tolerance: Tensor,
        rtol: float,
        run: BlockKrylov,
    ) -> EigenPairs:
        chosen = torch.tensor(list(places), dtype=torch.long)
        U = run.space.vectors(S[:, chosen])
        norms = residuals[chosen].clamp_min(run.space.rounding())
        converged = norms <= tolerance[chosen]
        return EigenPairs(
            eigenvalues=theta[chosen].to(U),
            eigenvectors=U,
            residual_norms=norms.to(U),
            converged=converged.to(U.device),
            num_matvecs=run.num_matvecs,
            status=Status.CONVERGED if bool(converged.all()) else Status.MAX_MATVECS,
            rtol=rtol,
        )

    def _continue(
        self,
        pairs: EigenPairs,
        which: str,
        rtol: float,
        atol: float,
        generator: torch.Generator,
        progress: Callable[[int], None] | None,
    ) -> EigenPairs:
        """Go on from Ritz vectors that have not converged, by single products with restarts."""
        before = [0]

        def callback(spent: int, _: str) -> None:
            if progress is not None:
                progress(spent - before[0])
            before[0] = spent

        k = len(pairs.eigenvalues)
        lost = pairs.eigenvectors.shape[1] > k
        found = eigsh(
            self.A,
            k,
            which=which,  # type: ignore[arg-type]
            rtol=rtol,
            atol=atol,
            v0=pairs.eigenvectors,
            generator=generator,
            num_basis=min(self.n, max(2 * k + 1, self.run.num_matvecs)),
            max_matvecs=PATIENCE * self.run.num_matvecs,
            confidence=self.plan.confidence if lost else None,
            callback=callback,
        )
        self.extra_matvecs += found.num_matvecs
        if lost or self.plan.confidence is None:
            return found
        return judge(found, 1.0, 1 - self.plan.confidence)  # nobody looked for what the continued run missed

    def _exact_pairs(self, run: AllEntries) -> tuple[EigenPairs, EigenPairs]:
        """Return the pairs of a matrix known entry by entry; residuals show how far products are from symmetric."""
        matrix = run.matrix
        values, U = torch.linalg.eigh(self.T)
        values, U = values.flip(0), U.flip(1)

        def pairs(chosen: slice) -> EigenPairs:
            residuals = (matrix @ U[:, chosen] - values[chosen] * U[:, chosen]).norm(dim=0)
            return EigenPairs(
                eigenvalues=values[chosen].to(self.A.device),
                eigenvectors=U[:, chosen].to(self.A.device),
                residual_norms=residuals.to(self.A.device),
                converged=torch.ones_like(residuals, dtype=torch.bool).to(self.A.device),
                num_matvecs=run.num_matvecs,
                status=Status.CONVERGED,
                rtol=torch.finfo(self.A.dtype).eps,
            )

        return pairs(slice(0, self.k)), pairs(slice(self.n - self.num_bottom, self.n))

    def _rounding(self, rule: Quadrature) -> float:
        return rounding_level(self.A) * float(rule.nodes.abs().max())

    def _coarse(self, B: Tensor, low: int, high: int, rule: Quadrature, share: float) -> Quadrature:
        """Return the rule of the first steps, with the same pairs known."""
        m = max(int(share * len(self.T)), min(len(self.T), low + high + B.shape[1]))
        steps = max(m // B.shape[1], 1)
        return quadrature(
            self.T[:m, :m], B[:m], n=self.n, num_steps=steps, num_low=low, num_high=high, known=rule.known
        )

    def _spread(self, B: Tensor, low: int, high: int, rule: Quadrature) -> DataSpread | None:
        if self.groups is None:
            return None
        weights = self.groups.weights
        total = weights.sum()
        scale = 1.0 if self._sums() else total
        rules, top, bottom = [], [], []
        for weight, T_g in zip(weights, self.groups.T, strict=True):
            T = (self.T - T_g / scale) * (total / (total - weight))
            theta = torch.linalg.eigvalsh(T)
            top.append(theta[len(theta) - self.k :].flip(0))
            bottom.append(theta[: self.num_bottom].flip(0))
            rules.append(quadrature(T, B, n=self.n, num_steps=rule.num_steps, num_low=low, num_high=high))
        return DataSpread(
            shares=weights / total,
            top=torch.stack(top),
            bottom=torch.stack(bottom),
            rules=tuple(rules),
            fraction=self.plan.fraction,
        )

    def _sums(self) -> bool:
        return isinstance(self.A, ObjectiveOperator) and self.A.objective.sums

    def _layer_traces(self, top: EigenPairs) -> Tensor | None:
        """Return z_l'(A z)_l for the parameters of every layer l and probe z, the largest eigenpairs taken exactly.

        A = U L U' + R gives tr A_ll = sum_i lambda_i |u_i,l|^2 + E[z_l'(R z)_l], whatever U is.
        """
        A, run = self.A, self.run
        if not isinstance(A, ObjectiveOperator) or A.block is not None or not isinstance(run, BlockKrylov):
            return None
        assert run.first_products is not None
        Z, U = run.probes, top.eigenvectors.to(run.probes)
        values = top.eigenvalues.to(Z)
        products = Z * (run.first_products - U @ (values[:, None] * (U.T @ Z)))
        exact = U.square() @ values
        blocks = A.objective.space.blocks
        return torch.stack([b.take(products).sum(dim=0) + b.take(exact).sum() for b in blocks]).double().cpu()


def _leading(good: Tensor, limit: int) -> int:
    """Return how many of the first entries are true without a gap, at most `limit`."""
    gaps = (~good).nonzero()
    return min(limit, int(gaps[0]) if len(gaps) else len(good))
