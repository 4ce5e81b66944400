"""From the projection of a matrix on one block Krylov space to its spectrum: eigenpairs, quadrature, errors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from curvature.linalg import eigsh
from curvature.linalg.base.checkpoint import NOT_KEPT, Checkpoint
from curvature.linalg.base.validate import noise_level, product_noise, rounding_level, with_noise
from curvature.linalg.krylov._completeness import Bound, grow_chain, judge
from curvature.linalg.stochastic.quadrature import Quadrature, quadrature
from curvature.linalg.stochastic.slq import COARSE_SHARES, smoothed
from curvature.linop import MatrixLike
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.parameters import Block
from curvature.results.estimates import EigenPairs, Status
from curvature.spectra.results import DataSpread, Spectrum
from curvature.spectra.runs import AllEntries, BlockKrylov, GroupSums, Run
from curvature.spectra.spectrum_plan import SMALL, SpectrumPlan

__all__ = ["SpectrumAnalysis"]


class SpectrumAnalysis:
    """From the projections of one run to its spectrum."""

    def __init__(
        self,
        A: MatrixLike,
        run: Run,
        block: Block | None,
        plan: SpectrumPlan,
        groups: GroupSums | None,
        saved: Checkpoint = NOT_KEPT,
    ) -> None:
        self.run, self.plan, self.groups, self.saved = run, plan, groups, saved
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
        found = Spectrum(
            top=top,
            bottom=bottom,
            density=replace(template, product_noise=product_noise(self.A) or None),
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
        return replace(found, density=replace(found.density, rule=found.density_rule_error()))

    def _pairs(
        self, run: BlockKrylov, generator: torch.Generator, progress: Callable[[int], None] | None
    ) -> tuple[EigenPairs, EigenPairs, int, int]:
        """Return the pairs wanted at both ends, and how many pairs from either end are as good as exact."""
        theta, S, residuals = run.space.ritz()
        m, plan = len(theta), self.plan
        floor = max(run.space.rounding(), torch.finfo(torch.float64).tiny)
        atol = SMALL * float(theta.abs().max())

        def of_high(values: Tensor) -> Tensor:
            return (plan.rtol * values.abs()).clamp_min(floor)

        def of_low(values: Tensor) -> Tensor:
            return (plan.bottom_rtol * values.abs()).clamp_min(max(floor, atol))

        high_tolerance, low_tolerance = of_high(theta), of_low(theta)
        high = _leading((residuals <= high_tolerance).flip(0), min(max(plan.k, plan.num_deflated), m // 2))
        low = _leading(residuals <= low_tolerance, min(self.num_bottom, m - high))
        top = self._gather(range(m - 1, m - 1 - self.k, -1), theta, S, residuals, high_tolerance, plan.rtol, run)
        bottom = self._gather(
            range(self.num_bottom - 1, -1, -1), theta, S, residuals, low_tolerance, plan.bottom_rtol, run
        )
        if plan.confidence is not None:
            top = self._searched(top, 1.0, of_high, progress)
            bottom = self._searched(bottom, -1.0, of_low, progress)
        if plan.patience > 0 and not bool(top.converged.all() and bottom.converged.all()):
            run.space.give_up()  # before there is another
        if plan.patience > 0 and not bool(top.converged.all()):
            top = self._continue(top, "LA", plan.rtol, 0.0, generator, progress)
        if plan.patience > 0 and not bool(bottom.converged.all()):
            bottom = self._continue(bottom, "SA", plan.bottom_rtol, atol, generator, progress)
        norm = float(theta.abs().max())
        return self._with_noise(top, of_high, norm), self._with_noise(bottom, of_low, norm), low, high

    def _with_noise(self, pairs: EigenPairs, tolerance: Callable[[Tensor], Tensor], norm: float) -> EigenPairs:
        """Return the pairs with the rounding error of products in their residuals, unless `eigsh` did that."""
        if pairs.product_noise is not None or not (noise := product_noise(self.A)):
            return pairs
        residuals, _ = with_noise(self.A, pairs.residual_norms, norm)
        converged = residuals <= tolerance(pairs.eigenvalues)
        is_within = pairs.status is Status.CONVERGED and not bool(converged.all())
        status = Status.WITHIN_NOISE if is_within else pairs.status
        return replace(pairs, residual_norms=residuals, converged=converged, status=status, product_noise=noise)

    def _searched(
        self,
        pairs: EigenPairs,
        sign: float,
        tolerance: Callable[[Tensor], Tensor],
        progress: Callable[[int], None] | None,
    ) -> EigenPairs:
        """Look outside the Krylov space for eigenvalues that belong among pairs from one end that have converged.

        If one was missed, the direction found is added to the vectors and nothing has converged, so that the pairs are
        computed again from there.
        """
        run, confidence = self.run, self.plan.confidence
        assert isinstance(run, BlockKrylov)
        assert confidence is not None
        if not len(pairs.eigenvalues) or not bool(pairs.converged.all()):
            return pairs
        innermost, space = pairs.eigenvalues[-1 if sign > 0 else 0].double().cpu(), run.space
        bound = Bound(sign, float(innermost + sign * tolerance(innermost)))
        chain, rival = grow_chain(
            self.A,
            space.V.T,
            bound,
            (space.P.T, space.schur_correction(bound, tolerance)),
            norm=space.norm,
            allowed=1 - confidence,
            max_steps=20,
            generator=space.generator,
        )
        self.extra_matvecs += len(chain.alphas)
        if progress is not None:
            progress(len(chain.alphas))
        if not rival.shape[1]:
            return judge(pairs, chain.miss_probability(), 1 - confidence)
        vectors = torch.cat([pairs.eigenvectors, rival.to(pairs.eigenvectors)], dim=1)
        return replace(pairs, eigenvectors=vectors, converged=torch.zeros_like(pairs.converged))

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

        assert isinstance(self.run, BlockKrylov)
        k, place = len(pairs.eigenvalues), self.run.place
        lost = pairs.eigenvectors.shape[1] > k
        found = eigsh(
            self.A,
            k,
            which=which,  # type: ignore[arg-type]
            method="lanczos",
            block_size=1,
            rtol=rtol,
            atol=atol,
            v0=pairs.eigenvectors,
            generator=generator,
            num_basis=min(self.n, max(2 * k + 1, self.run.num_matvecs)),
            max_matvecs=self.plan.patience * self.run.num_matvecs,
            basis_device=place,
            confidence=self.plan.confidence if lost else None,
            callback=callback,
            checkpoint=self.saved.part(which),
        )
        self.extra_matvecs += found.num_matvecs
        if lost or self.plan.confidence is None:
            return found
        return judge(found, 1.0, 1 - self.plan.confidence)  # nobody looked for what the continued run missed

    def _exact_pairs(self, run: AllEntries) -> tuple[EigenPairs, EigenPairs]:
        """Return the pairs of a matrix known entry by entry; residuals show how far products are from symmetric.

        They are no less than rounding: entries that came otherwise than by products may be symmetric and rounded.
        """
        matrix = run.matrix
        values, U = torch.linalg.eigh(self.T)
        values, U = values.flip(0), U.flip(1)
        rounding = rounding_level(self.A) * float(values.abs().max())

        def pairs(chosen: slice, rtol: float) -> EigenPairs:
            residuals = (matrix @ U[:, chosen] - values[chosen] * U[:, chosen]).norm(dim=0).clamp_min(rounding)
            exact = EigenPairs(
                eigenvalues=values[chosen].to(self.A.device),
                eigenvectors=U[:, chosen].to(self.A.device),
                residual_norms=residuals.to(self.A.device),
                converged=torch.ones_like(residuals, dtype=torch.bool).to(self.A.device),
                num_matvecs=run.num_matvecs,
                status=Status.CONVERGED,
                rtol=torch.finfo(self.A.dtype).eps,
            )
            least = SMALL * float(values.abs().max())
            return self._with_noise(exact, lambda found: (rtol * found.abs()).clamp_min(least), least / SMALL)

        top, bottom = slice(0, self.k), slice(self.n - self.num_bottom, self.n)
        return pairs(top, self.plan.rtol), pairs(bottom, self.plan.bottom_rtol)

    def _rounding(self, rule: Quadrature) -> float:
        return noise_level(self.A) * float(rule.nodes.abs().max())

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
        return isinstance(self.A, ObjectiveOperator) and self.A.objective.is_sum

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
