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

from curvature.arguments import checked
from curvature.environment.autocast import full_precision
from curvature.environment.device import synchronize
from curvature.errors import InputError
from curvature.generators import AnyGenerator, as_generator, spawn
from curvature.linalg.base.checkpoint import AnyCheckpoint, Checkpoint, open_run
from curvature.linalg.base.places import BasisDevice, place_of
from curvature.linalg.base.validate import check_square
from curvature.linop import AnyMatrix, MatrixLike, MatrixName, as_matrix
from curvature.operators._objective_operator import ObjectiveOperator
from curvature.parameters import Block
from curvature.sharding.layout import Layout
from curvature.spectra.analysis import SpectrumAnalysis
from curvature.spectra.results import Spectrum
from curvature.spectra.runs import AllEntries, BlockKrylov, GroupSums, Run, advance
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["layer_spectra", "spectrum"]


@full_precision
@checked
def spectrum(
    A: AnyMatrix,
    plan: SpectrumPlan | None = None,
    *,
    matrix: MatrixName = "hessian",
    generator: AnyGenerator,
    basis_device: BasisDevice = None,
    progress: Callable[[int], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> Spectrum:
    """Return eigenpairs at both ends, density, trace and what follows, from one block Krylov space.

    Cost: plan.num_probes x plan.num_steps products, or n if that is less; some 5 to 15 more that look for eigenvalues
    which the probes could not see (`plan.confidence`), and more if eigenpairs that are asked for have not converged.
    Memory: as many vectors.

    Args:
        A: symmetric, (n, n).
        matrix: which one of an objective; see `as_matrix`.
        plan: what to compute and how well. Default: `SpectrumPlan()`.
        generator: for the probes, on A's device, or a seed.
        basis_device: where the Krylov space is held: "cpu" for one that does not fit beside the model on a device,
            "disk" for one that does not fit into memory, in a temporary file. Default: A's device.
        progress: told the number of columns after each product.
        checkpoint: a folder for what has come out; after an interruption the same call goes on from there, to the same
            numbers. On ranks all of them reach it.

    Raises:
        InputError: for settings out of range, or a space that does not fit into memory.
        NonFiniteError: if a product is not finite.

    Examples:
        >>> A = torch.diag(torch.cat([torch.tensor([50.0, 20.0]), torch.linspace(0, 1, 998)]))
        >>> found = spectrum(A, SpectrumPlan(k=2, num_bottom=1), generator=0)
        >>> found.top.eigenvalues.round(decimals=3)
        tensor([50., 20.])
        >>> 120 < found.num_matvecs <= 150
        True
    """
    saved = open_run("spectrum", locals())
    A = as_matrix(A, matrix)
    generators = [as_generator(generator, A.device)]
    (found,) = _spectra(A, [None], plan or SpectrumPlan(), generators, basis_device, progress, saved)
    return found


@full_precision
@checked
def layer_spectra(
    A: AnyMatrix,
    plan: SpectrumPlan | None = None,
    *,
    matrix: MatrixName = "hessian",
    blocks: Sequence[Block] | None = None,
    generator: AnyGenerator,
    basis_device: BasisDevice = None,
    progress: Callable[[int], None] | None = None,
    checkpoint: AnyCheckpoint = None,
) -> dict[str, Spectrum]:
    """Return the spectrum of each layer's diagonal block, by name, all from the same walks over the data.

    Cost: for each layer, products with its block, plan.num_probes x plan.num_steps or as many as it has parameters; a
    graph that is not kept is built once a step for all layers. Memory: as many vectors, of all layers together (n,).
    `plan(A, "layers")` says what that is; `progress` counts to its `num_matvecs`.

    Args:
        A: an objective, or an operator of one.
        matrix: which one of an objective; see `as_matrix`.
        plan: for each layer. Default: `SpectrumPlan()`.
        blocks: the layers. Default: the modules that own parameters.
        generator: seeds one generator a layer; on A's device, or a seed.
        basis_device: where the Krylov spaces are held, as for `spectrum`.
        progress: told the number of columns after each step.
        checkpoint: as for `spectrum`.

    Raises:
        InputError: as for `spectrum`.
        NonFiniteError: if a product is not finite.
    """
    saved = open_run("layer_spectra", locals())
    A = as_matrix(A, matrix)
    if not isinstance(A, ObjectiveOperator):
        raise InputError(f"layers are those of an objective; A must be one, or an operator of it, got {A!r:.80}.")
    chosen = A.objective.space.blocks if blocks is None else tuple(blocks)
    generators = spawn(as_generator(generator, A.device), len(chosen))
    found = _spectra(A, list(chosen), plan or SpectrumPlan(), generators, basis_device, progress, saved)
    return {block.name: each for block, each in zip(chosen, found, strict=True)}


def _spectra(
    A: MatrixLike,
    blocks: Sequence[Block | None],
    plan: SpectrumPlan,
    generators: Sequence[torch.Generator],
    basis_device: BasisDevice,
    progress: Callable[[int], None] | None,
    saved: Checkpoint,
) -> list[Spectrum]:
    n = check_square(A)
    sizes = [n if block is None else block.num_params for block in blocks]
    place = place_of(basis_device, A.device)
    plan.check_memory(A, sizes, place)
    runs: list[Run] = []
    for block, size, generator in zip(blocks, sizes, generators, strict=True):
        sharding: Layout | None = getattr(A, "sharding", None)
        sharding = sharding if sharding is None or block is None else sharding.of(block.positions)
        if plan.all_entries(size):
            runs.append(AllEntries(A, n=size))
        else:
            runs.append(
                BlockKrylov(
                    A,
                    n=size,
                    num_probes=plan.num_probes,
                    num_steps=plan.num_steps_for(size),
                    generator=generator,
                    place=place,
                    sharding=sharding,
                )
            )
    num_groups, reason = _num_groups(A, plan)
    start = time.perf_counter()
    groups = [GroupSums(run, _num_batches(A), num_groups) for run in runs] if num_groups else []
    advance(A, runs, blocks, groups, progress or (lambda _: None), saved)
    if groups and isinstance(A, ObjectiveOperator) and A.objective.shuffles and not A.objective.keeps_all_graphs:
        groups, reason = [], "the loader shuffles, so that its batches cannot be followed (shuffle=False)"
    synchronize(A.device)
    found = []
    for i, (run, block, generator) in enumerate(zip(runs, blocks, generators, strict=True)):
        of_run = groups[i] if groups else None
        analysis = SpectrumAnalysis(A, run, block, plan, of_run, saved.part(f"pairs-{i}"))
        found.append(analysis.result(generator, time.perf_counter() - start, reason, progress))
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
    if A.objective.ranks is not None:
        return 0, "each rank sees its own batches only"
    num_batches = _num_batches(A)
    if num_batches < plan.least_groups:
        batches = "1 batch" if num_batches == 1 else f"{num_batches} batches"
        return 0, f"the data came in {batches}, and {plan.least_groups} at least are needed (micro_batch=)"
    return min(plan.num_groups, num_batches), None
