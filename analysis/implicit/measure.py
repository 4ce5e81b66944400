"""What finite steps add to the loss: the penalties on gradients that SGD follows without being told.

By backward error analysis the mean iterate after an epoch of m steps in random order lies, up to O(m^3 lr^3), on the
flow of

    C + lr/4 |grad C|^2 + lr/4 (1/m) sum_k |grad C_k - grad C|^2

with C_k the loss of batch k and C their mean (Smith, Dherin, Barrett and De 2021; for one batch Barrett and Dherin
2020). Weight decay (L2) is part of every C_k: it enters |grad C|^2 and leaves the variance alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from analysis.implicit.results import (
    ImplicitRegularization,
    PenaltyDirection,
    batch_sizes,
    expected_batch_variance,
    momentum_factors,
    penalty_factors,
)
from analysis.noise.measure import inner_products, notes_on_errors, takes_one_pass
from analysis.records.plan import Plan, from_plan, setting
from analysis.show.listener import Progress
from curvature.arguments import checked, checked_fields
from curvature.data.tensors import tensors_in
from curvature.environment.autocast import full_precision
from curvature.errors import DataError, InputError
from curvature.linalg import eigsh
from curvature.objective.objective import Objective
from curvature.objective.shards import in_whole_vectors
from curvature.objective.third_order import curvature_gradient
from curvature.operators.hessian import HessianOperator
from curvature.per_example import GradientNorms, gradient_norms
from curvature.results.estimates import EigenPairs
from curvature.results.intervals import spread_of, tail_exponent

__all__ = ["ImplicitPlan", "adam_correction", "example_trace_gradient", "implicit_regularization", "penalty_gradients"]

_UNEQUAL = (
    "Examples count unequally in their batch: the expectation over partitions is to first order, which in batches of "
    "few examples was off by 40 to 75 % in trials; errors do not hold that."
)


@checked_fields
@dataclass(frozen=True, kw_only=True)
class ImplicitPlan(Plan):
    """How the model was, or would be, trained."""

    lr: float = setting(text="Learning rate of SGD.", above=0)
    batch_size: int | None = setting(None, "Batch size, in examples. Default: the batches of the task as they are.")
    drop_last: bool = setting(False, "Leave out the last, incomplete batch of an epoch.")
    momentum: float = setting(0.0, "Heavy-ball momentum of SGD.", least=0, below=1)
    weight_decay: float = setting(0.0, "Weight decay of SGD.", least=0)
    directions: bool = setting(True, "Also compute the gradients of the penalties.")
    k: int = setting(3, "Number of sharpest directions to compare these gradients with.", least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.drop_last and self.batch_size is None:
            raise InputError("drop_last= goes with batch_size=; without it the batches are taken as they are.")


_STAGE = "penalties"


@in_whole_vectors
@from_plan(ImplicitPlan, directions=False)
@full_precision
@checked
def implicit_regularization(
    objective: Objective,
    plan: ImplicitPlan,
    *,
    top: EigenPairs | None = None,
    norms: GradientNorms | None = None,
    generator: torch.Generator | None = None,
    progress: Progress | None = None,
) -> ImplicitRegularization:
    """Measure both penalties of the loss that SGD descends, layer by layer, and where their gradients point.

    Cost: a gradient (without `batch_size`) or a pass over single examples (with it). For `directions` two Hessian
    products a batch, or with `batch_size` one an example: they are those of the expectation, not of one partition. With
    `top` a third derivative along the first eigenvector, about 6 gradients.

    Args:
        objective: its batches are the C_k, each counted alike whatever its size, as SGD does.
        plan: settings; or pass them one by one. With `batch_size` B the penalties are the expectation over all
            partitions of the N examples into batches of B, the last one short, or with `drop_last` left out, if B does
            not divide N. Exact where all examples count alike in their batch; with class weights, ignored targets and
            the like to first order, as the notes say. Factors of momentum are those of `momentum_factors`.
        top: eigenpairs of the Hessian of the loss; adds angles and the change of the largest eigenvalue.
            By default the `k` largest with `directions` and a generator, none without.
        norms: `gradient_norms` or `gradient_moments` of this very point, if taken before; spares their pass.
        generator: source of start vectors for these, on the objective's device, or a seed.
        progress: told how many products and batches are done, for `directions`.

    Raises:
        InputError: for settings out of range, or several ranks.
        DataError: if no batch counts, or as `gradient_norms`.

    Reference: Smith, Dherin, Barrett and De (2021), On the origin of implicit regularization in stochastic gradient
    descent, eq. 20 and appendix A; Barrett and Dherin (2020), Implicit gradient regularization.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.zeros_(model.weight)
        >>> x, y = torch.ones(2, 1), torch.tensor([[1.0], [3.0]])  # gradients -2 and -6
        >>> found = implicit_regularization(Objective(model, nn.MSELoss(), (x, y)), lr=0.5, batch_size=1)
        >>> found.full_penalty, found.batch_penalty, found.modified_loss
        (2.0, 0.5, 7.5)
    """
    if plan.batch_size is not None and objective.is_sum:
        raise InputError('batch_size= needs a loss that averages; use reduction="mean", or the batches as they are.')
    refuse_ranks(objective)
    lr, batch_size, drop_last = plan.lr, plan.batch_size, plan.drop_last
    momentum, weight_decay, space = plan.momentum, plan.weight_decay, objective.space
    tell, products, units = progress or (lambda *_: None), 0, 0
    if plan.directions:
        units = num_pieces(objective, batch_size) if progress is not None else 0
        if top is None and generator is not None:
            products = num_products(plan.k)
            units += products
            top = eigsh(
                objective,
                min(plan.k, objective.num_params),
                generator=generator,
                callback=lambda spent, _: tell("sharpest directions", min(spent, products), units),
            )
        tell(_STAGE, products, units)

    def further(stage: str, done: int, _: int) -> None:
        tell(stage, products + done, units)

    notes: tuple[str, ...] = ()
    if batch_size is None:
        loss, g, variances, sizes = _of_batches(objective)
        num_batches, B = float(len(sizes)), sum(sizes) / len(sizes)
        examples, gamma, share, stderr, lopsided, dof = math.nan, math.nan, 1.0, math.nan, 0.0, math.inf
        P, V = momentum_factors(lr, momentum, num_batches)
    else:
        if norms is None:
            norms = gradient_norms(objective, along_mean=takes_one_pass(objective))
        N = norms.num_examples
        num_batches = float(sum(count for count, _ in batch_sizes(N, batch_size, drop_last=drop_last)))
        B, examples, loss, g = float(batch_size), float(N), norms.loss, norms.mean
        gamma, stderr, lopsided, dof, notes = _example_trace(objective, norms)
        P, V = penalty_factors(lr, momentum, N, batch_size, drop_last=drop_last)
        share = expected_batch_variance(1.0, N, batch_size, drop_last=drop_last)
        total = float(norms.trace)
        variances = norms.layer_traces.double() * (share * gamma / total if total > 0 else 0.0)
        stderr *= share
    theta = torch.cat([t.detach().reshape(-1) for t in space.tensors.values()]).to(g)
    whole = g + weight_decay * theta
    full = batch = None
    if plan.directions or top is not None:
        if batch_size is None:
            of_full, of_batch, _ = penalty_gradients(objective, weight_decay=weight_decay, progress=further)
        else:
            of_full = 2 * (HessianOperator(objective) @ whole + weight_decay * whole)
            of_batch = share * example_trace_gradient(objective, g, progress=further)
        slope = None if top is None else curvature_gradient(objective, top.eigenvectors[:, 0].to(g))
        full = _direction(P * of_full, whole, top, slope)
        batch = _direction(V * of_batch, whole, top, slope)
    return ImplicitRegularization(
        loss=loss + weight_decay / 2 * float(theta.double().square().sum()),
        lr=lr,
        momentum=momentum,
        batch_size=B,
        num_batches=num_batches,
        drop_last=drop_last,
        squared_norm=float(whole.double().square().sum()),
        batch_variance=float(variances.sum()),
        batch_variance_stderr=stderr,
        batch_variance_skewness=lopsided,
        batch_variance_dof=dof,
        full_factor=P,
        batch_factor=V,
        layers=tuple(block.name for block in space.blocks),
        layer_squared_norms=torch.stack([block.take(whole).double().square().sum() for block in space.blocks]),
        layer_batch_variances=variances,
        example_trace=gamma,
        num_examples=examples,
        full=full,
        batch=batch,
        eigenvalues=() if top is None else tuple(top.eigenvalues.tolist()),
        notes=notes,
    )


def num_products(k: int) -> int:
    """Return about how many products k of the sharpest directions take."""
    return 12 + 8 * k


def refuse_ranks(objective: Objective) -> None:
    """Raise InputError where the batches of an epoch are shared out over ranks."""
    if objective.process_group is not None:
        raise InputError("the batches of an epoch must lie on one rank; measure on a single one.")


def num_pieces(objective: Objective, batch_size: int | None) -> int:
    """Return how many batches, or with a batch size examples, have their gradients' penalties differentiated."""
    if batch_size is None:
        return objective.num_batches or 1
    return sum(next((t.shape[0] for t in tensors_in(b) if t.ndim > 0), 1) for b in objective.batches())


@in_whole_vectors
@full_precision
@checked
def penalty_gradients(
    objective: Objective, *, weight_decay: float = 0.0, progress: Progress | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients (n,) of |g|^2 and of (1/m) sum_k |g_k - g|^2 over the objective's batches, and g, (n,).

    2 H g and (2/m) sum_k H_k g_k - 2 H g, batches counted alike: two Hessian products a batch and a gradient, each on
    one batch's graph. Weight decay adds lambda theta to every g_k and lambda to every H_k's diagonal.

    Raises:
        InputError: for data on several ranks.
    """
    refuse_ranks(objective)
    g = _of_batches(objective)[1]
    count, Hg, own = 0, torch.zeros_like(g), torch.zeros_like(g)
    theta = torch.cat([t.detach().reshape(-1) for t in objective.space.tensors.values()]).to(g)
    whole = g + weight_decay * theta
    for lin in objective.linearizations():
        if lin.weight == 0:
            continue
        products = lin.hvp(torch.stack([whole, lin.gradient() - g]))  # H_k g and H_k (g_k - g): nothing cancels
        Hg += products[0]
        own += products[1]
        count += 1
        if progress is not None:
            progress(_STAGE, count, objective.num_batches or count)
    # sum_k H_k g_k / m - H g = sum_k H_k (g_k - g) / m, decay and all: its terms lambda (g_k - g) add up to zero
    return 2 * (Hg / count + weight_decay * whole), 2 * own / count, whole


@full_precision
@checked
def example_trace_gradient(objective: Objective, g: Tensor, *, progress: Progress | None = None) -> Tensor:
    """Return the gradient (n,) of Gamma = (1/N) sum_i (w_i / w)^2 |g_i - g|^2, g the objective's gradient.

    (2/N) sum_i (w_i / w)^2 (H_i - H)(g_i - g): a gradient and a Hessian product an example, each on its own graph.

    Raises:
        InputError: for a model that draws random numbers, which one example alone has others of than in its batch.
    """
    count, total = 0, 0.0
    own, rest = torch.zeros_like(g, dtype=torch.float64), torch.zeros_like(g, dtype=torch.float64)
    pieces = objective.split(1)
    for lin in pieces.linearizations():
        count += 1
        if lin.drew_random_numbers:
            raise InputError(
                "the model draws random numbers (dropout?), and an example alone gets others than in its batch, so "
                "that its gradients are no parts of the loss's; call model.eval()."
            )
        if lin.weight != 0:
            total += lin.weight
            apart = lin.gradient() - g
            own += lin.weight**2 * lin.hvp(apart[None])[0].double()
            rest += lin.weight**2 * apart.double()
        if progress is not None:
            progress(_STAGE, count, pieces.num_batches or count)
    rest = rest.to(g)  # zero but for rounding where all examples count alike
    return (2 * count / total**2 * (own - (HessianOperator(objective) @ rest).double())).to(g)


@in_whole_vectors
@full_precision
@checked
def adam_correction(
    objective: Objective, *, lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8
) -> Tensor:
    """Return what finite steps add to the gradient in the flow of full-batch Adam, (n,), once averages have settled.

    Adam follows theta_j' = -(g_j + c_j) / (g_j^2 + eps)^(1/2) with

        c_j = (lr/2) [(1 + b1) / (1 - b1) - (1 + b2) / (1 - b2) g_j^2 / (g_j^2 + eps)] d_j |g|_{1,eps},

    |g|_{1,eps} = sum_i (g_i^2 + eps)^(1/2), whose gradient is one Hessian product, H (g / (g^2 + eps)^(1/2)). With the
    usual betas the bracket is negative where |g_j|^2 is above eps: Adam then resists a fall of the one-norm.

    Cost: a gradient and a Hessian product.

    Args:
        objective: C, taken as a full batch.
        lr: learning rate.
        betas: b1 of the gradient's average, b2 of its squares'; each in [0, 1).
        eps: added to the square under the root; `torch.optim.Adam` adds its own beside the root.

    Raises:
        InputError: for arguments out of range.

    Checked: by runs of full-batch Adam with eps under the root to a fixed time, whose error against this flow is of
    order lr^2, and of order lr against the one without c. Large eps gives gradient descent with momentum b1 and the
    factor of Ghosh et al., lr / eps^(1/2) in the step's place; for small eps the sign is that of b1 - b2, as the
    paper's abstract has it (typically a fall of the one-norm is resisted). The formula in its text was not at hand.

    Reference: Cattaneo, Klusowski and Shigida (2024), On the implicit bias of Adam (eps inside the root, bias
    corrections on).
    """
    if not (lr > 0 and eps > 0 and all(0 <= b < 1 for b in betas)):
        raise InputError(f"lr and eps must be positive and betas in [0, 1), got {lr}, {eps} and {betas}.")
    g = objective.gradient()
    size = (g.square() + eps).sqrt()
    pull = HessianOperator(objective) @ (g / size)
    first, second = ((1 + b) / (1 - b) for b in betas)
    return lr / 2 * (first - second * g.square() / size.square()) * pull


# -- parts ------------------------------------------------------------------------------------------------------------


def _of_batches(objective: Objective) -> tuple[float, Tensor, Tensor, list[float]]:
    """Return the mean loss, the mean gradient, the layers' variances over batches and the batches' weights."""
    blocks = objective.space.blocks
    mean: Tensor | None = None
    spread = torch.zeros(len(blocks), dtype=torch.float64, device=objective.device)
    losses, sizes = 0.0, []
    for lin in objective.linearizations():
        if lin.weight == 0:
            continue
        sizes.append(lin.weight)
        losses += float(lin.loss)
        row = lin.gradient().double()
        mean = torch.zeros_like(row) if mean is None else mean
        change, count = row - mean, len(sizes)  # Welford: no difference of large sums
        mean = mean + change / count
        spread += torch.stack([block.take(change).square().sum() for block in blocks]) * (count - 1) / count
    if mean is None:
        raise DataError("the weights of all batches are zero: no target counts (all ignored or masked?).")
    return losses / len(sizes), mean.to(objective.dtype), spread / len(sizes), sizes


def _example_trace(objective: Objective, norms: GradientNorms) -> tuple[float, float, float, float, tuple[str, ...]]:
    """Return Gamma, its error over data of the same size with skewness and degrees of freedom, and notes on these."""
    if norms.squared_norms is None:
        raise InputError("norms hold no norms of single examples' gradients; take them with norms=True.")
    N, g = norms.num_examples, norms.mean
    weights = N * norms.weights / norms.weights.sum()
    alike = bool((weights - 1).abs().max() <= 1e-9)
    apart = norms.squared_norms.double() - 2 * inner_products(objective, norms) + float(g.double().square().sum())
    values = weights.square() * apart.clamp_min(0)
    gamma = float(norms.trace.double() if alike else values.mean())
    influences = values - 2 * gamma * weights  # of the mean of w^2 |g_i - g|^2 over the squared mean of w
    notes = list(notes_on_errors(N, tail_exponent(values)))
    if not alike:
        notes.insert(0, _UNEQUAL)
    dof, lopsided = spread_of(values, influences)
    stderr = float(influences.std()) / N**0.5 if dof > 0 else math.nan  # the parts of two examples are always alike
    return gamma, stderr, lopsided, dof, tuple(notes)


def _direction(gradient: Tensor, g: Tensor, top: EigenPairs | None, slope: Tensor | None) -> PenaltyDirection:
    norm = float(gradient.double().norm())
    size = norm * float(g.double().norm())
    cosines = change = None
    if top is not None:
        U = top.eigenvectors.to(gradient)
        cosines = (U.T @ gradient).abs() / norm if norm > 0 else torch.full_like(U[0], torch.nan)
        change = -float(slope.double() @ gradient.double()) if slope is not None else None
    cosine = float(gradient.double() @ g.double()) / size if size > 0 else math.nan
    return PenaltyDirection(
        gradient=gradient, norm=norm, cosine_with_gradient=cosine, cosines_with_top=cosines, sharpness_change=change
    )
