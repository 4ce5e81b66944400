"""Effective dimension, measured over a grid of regularisers: what `curvature dimension` does."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from analysis.generalization.dimension.results import EffectiveDimension, MatrixDimension
from analysis.records.plan import Plan, from_plan, setting
from analysis.show.listener import Progress, stages
from curvature.arguments import checked, checked_fields
from curvature.environment.autocast import full_precision
from curvature.errors import CurvatureError, InputError
from curvature.linalg.stochastic.functionals import effective_dimension as dimension_of_density
from curvature.linop import SymmetricOperator
from curvature.losses.rules import AnyLoss, CrossEntropy, SquaredError
from curvature.objective.objective import Objective
from curvature.operators.ggn import GGNOperator
from curvature.operators.hessian import HessianOperator
from curvature.operators.jacobian import JacobianOperator
from curvature.operators.ntk import NTKOperator
from curvature.results.estimates import mean_and_stderr
from curvature.results.intervals import student_quantile
from curvature.spectra.results import Spectrum
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

__all__ = ["EffectiveDimensionPlan", "effective_dimension"]

_DECADES = 6  # below the largest eigenvalue


@checked_fields
@dataclass(frozen=True, kw_only=True)
class EffectiveDimensionPlan(Plan):
    """Which regularisers, and how well spectra are resolved."""

    lowest: float | None = setting(
        None, "Smallest regulariser. Default: 1e-6 times the largest eigenvalue, or 1.", above=0
    )
    highest: float | None = setting(None, "Largest regulariser. Default: the largest eigenvalue, or 1.", above=0)
    points: int = setting(25, "How many, evenly spaced on a logarithmic scale.", least=2)
    probes: int = setting(6, "Random start vectors of each spectrum.", least=2)
    steps: int = setting(40, "Steps of each.", least=2)
    kernel: bool = setting(
        True, "Also take the kernel J J' of the outputs, in which the loss has no part.", flag="--kernel/--no-kernel"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lowest is not None and self.highest is not None and not self.lowest < self.highest:
            raise InputError(f"lowest must be below highest, got {self.lowest} and {self.highest}.")

    @property
    def spectrum(self) -> SpectrumPlan:
        """The plan of each spectrum."""
        return SpectrumPlan(k=1, num_bottom=0, num_probes=self.probes, num_steps=self.steps, confidence=None)


@full_precision
@checked
@from_plan(EffectiveDimensionPlan)
def effective_dimension(
    objective: Objective,
    plan: EffectiveDimensionPlan,
    *,
    generator: torch.Generator,
    progress: Progress | None = None,
) -> EffectiveDimension:
    """Measure how many directions the data determine beside a regulariser, for a grid of them.

        d(alpha) = sum_i lambda_i / (lambda_i + alpha)

    with lambda the eigenvalues above 0 of the Gauss-Newton matrix and of the Hessian of the loss summed over its terms
    (of a mean: its matrix times the number of terms), so that alpha is the precision of a normal prior. It is the
    number of parameters for alpha = 0 and full rank, and falls as alpha rises (MacKay 1992).

    Maddox, Benton and Wilson (2020) propose it as what tracks the test loss where the number of parameters does not.
    Under cross-entropy that holds on networks that fit their labels: their curvature carries p (1 - p), which goes to 0
    with the training loss. Under squared error it does not: there d rises with width while the test loss falls
    (notebook 12). So it partly measures confidence; compare networks of the same loss and a like training loss, and
    look at d of the kernel J J' beside it, in which the loss has no part.

    Cost: probes x steps products with each matrix; graphs of the data are kept where they fit.

    Args:
        objective: the loss at its point.
        plan: settings; or pass them one by one.
        generator: of the probes, on the objective's device, or a seed.
        progress: told the matrices as they are done.

    Raises:
        InputError: for settings out of range, a loss without any positive curvature, or one that does not divide by its
            number of terms, such as a sum written by oneself.
        NonFiniteError: if a product is not finite.

    Reference: MacKay (1992), Bayesian interpolation; Maddox, Benton and Wilson (2020), Rethinking parameter counting.

    Examples:
        >>> from torch import nn
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])  # squared error over 2 terms: eigenvalues 2 and 18 of the sum
        >>> objective = Objective(nn.Linear(2, 1, bias=False), nn.MSELoss(), (x, torch.zeros(2, 1)))
        >>> found = effective_dimension(objective, lowest=1.0, highest=4.0, points=3, generator=0)
        >>> [round(float(d), 4) for d in found.of("ggn").values]  # 2/(2 + a) + 18/(18 + a), a = 1, 2, 4
        [1.614, 1.4, 1.1515]
    """
    about, notes = _about_terms(objective), list[str]()
    matrices: dict[str, Callable[[], SymmetricOperator]] = {
        "ggn": lambda: GGNOperator(objective),
        "hessian": lambda: HessianOperator(objective),
    }
    if plan.kernel and objective.has_split and objective.process_group is None and objective.ranks is None:
        matrices["kernel"] = lambda: _kernel(objective)
    if not objective.has_split:
        del matrices["ggn"]
        notes.append("The objective has no split between model and loss, so there is no Gauss-Newton matrix.")
    tell = stages(progress, len(matrices))
    spectra: dict[str, Spectrum] = {}
    for name, make in matrices.items():
        tell(name)
        try:
            spectra[name] = spectrum(make(), plan.spectrum, generator=generator)
        except CurvatureError as error:
            if name != "kernel":
                raise
            notes.append(f"There is no kernel of the outputs: {error}")
    weight = 1.0 if objective.is_sum else objective.total_weight
    scale = {name: 1.0 if name == "kernel" else weight for name in spectra}
    tops = {name: scale[name] * float(found.density.nodes.max()) for name, found in spectra.items()}
    main = tops.get("ggn", tops["hessian"])
    if not max(main, tops["hessian"]) > 0:
        raise InputError("no eigenvalue is above 0: the data determine nothing here, and d is 0 for every regulariser.")
    main = main if main > 0 else tops["hessian"]
    low = plan.lowest or min(1.0, main * 10.0**-_DECADES)
    high = plan.highest or max(1.0, main)
    if not low < high:
        raise InputError(f"lowest must be below highest, got {low:.4g} and {high:.4g}; give both.")
    alphas = torch.logspace(math.log10(low), math.log10(high), plan.points, dtype=torch.float64)
    return EffectiveDimension(
        regularisers=alphas,
        matrices=tuple(_of_matrix(name, found, alphas / scale[name], tops[name]) for name, found in spectra.items()),
        num_params=objective.num_params,
        total_weight=objective.total_weight,
        loss=_loss_name(objective),
        train_loss=float(objective.loss()),
        notes=(*notes, *about),
    )


def _about_terms(objective: Objective) -> list[str]:
    """Return a note where the number of terms is a guess; refuse a loss that does not divide by it."""
    if objective.is_sum or objective.settings["weight"] is not None or not isinstance(objective.rule, AnyLoss | None):
        return []
    if objective.ranks is None:
        verdict = objective.cuts.verdict(objective.evaluator, next(objective.batches()), 0)
        if verdict.weights is not None:
            raise InputError(
                f"the sum of the loss over its terms is not known: {verdict.weights}. Give a mean over the examples, "
                "one of torch's losses (reduction='mean' or 'sum'), or weight= (batch -> what its loss divides by)."
            )
    terms = f"{objective.total_weight:g}"
    return [f"The loss was taken to be a mean of {terms} terms, and their sum to be {terms} times as much."]


class _OfParameters(SymmetricOperator):
    """J'J, (n, n), whose eigenvalues other than zero are those of J J'."""

    def __init__(self, jacobian: JacobianOperator) -> None:
        self.jacobian = jacobian
        n = jacobian.shape[1]
        super().__init__((n, n), jacobian.dtype, jacobian.device)

    def _matmat(self, X: Tensor) -> Tensor:
        return self.jacobian.T @ (self.jacobian @ X)


def _kernel(objective: Objective) -> SymmetricOperator:
    """Return J J' or J'J, whichever is smaller."""
    ntk = NTKOperator(objective)
    return ntk if ntk.shape[0] <= ntk.jacobian.shape[1] else _OfParameters(ntk.jacobian)


def _determined(eigenvalues: Tensor, damping: Tensor) -> Tensor:
    """Return lambda / (lambda + z), of negative eigenvalues 0."""
    positive = eigenvalues.clamp_min(0)
    return positive / (positive + damping)


def _of_matrix(name: str, found: Spectrum, dampings: Tensor, top: float) -> MatrixDimension:
    """Return d for each damping beside the matrix as it is."""
    estimates = [found.spectral_sum(partial(_determined, damping=z)) for z in dampings]
    intervals = torch.tensor([estimate.interval() for estimate in estimates], dtype=torch.float64)
    lower, upper = intervals.unbind(1)
    if name != "hessian" and not found.exact:  # eigenvalues are not negative: the rule has bounds
        noise = max(0.0, -float(found.density.nodes.min()))
        known = dampings > noise
        if bool(known.any()):
            low, high = dimension_of_density(found.density, dampings[known]).interval()
            lower[known], upper[known] = low.double(), high.double()
    if name == "hessian" and not found.exact:
        low, high = _sides_of_zero(found, dampings)
        lower, upper = torch.minimum(lower, low), torch.maximum(upper, high)
    values = torch.tensor([float(e.value) for e in estimates], dtype=torch.float64)
    stderr = torch.tensor([e.error[0] for e in estimates], dtype=torch.float64)
    data = [e.data_stderr for e in estimates]
    n = found.density.dimension
    return MatrixDimension(
        matrix=name,
        values=values,
        stderr=torch.maximum(stderr, torch.maximum(values - lower, upper - values) / 2)
        if name == "hessian"
        else stderr,
        lower=lower.clamp(0, n),
        upper=upper.clamp(0, n),
        data_stderr=torch.tensor([math.nan if d is None else float(d) for d in data], dtype=torch.float64),
        largest=top,
        num_matvecs=found.num_matvecs,
        exact=found.exact,
    )


def _sides_of_zero(found: Spectrum, dampings: Tensor) -> tuple[Tensor, Tensor]:
    """Return what d is if eigenvalues near 0 stand on the other side of it, with 95 % over probes.

    x/(x + z) above 0, and 0 below, does not fall with x. What a rule has at a node may lie anywhere between the next
    ones (for one start vector: Chebyshev, Markov and Stieltjes; for p of them, p nodes on). A bulk near 0, such as that
    of parameters which hardly matter, may so count in full or not at all where z is small.
    """
    nodes, weights, known = found.rule.nodes.double(), found.rule.weights.double(), found.rule.is_known
    p, n = len(weights), found.density.dimension
    f = nodes.clamp_min(0) / (nodes.clamp_min(0) + dampings[:, None])  # (m, nodes)
    free = torch.arange(len(nodes))[~known]
    above, below = free[nodes[free] > 0][:p], free[nodes[free] <= 0][-p:]  # p on either side of 0
    low, high = f.clone(), f.clone()
    low[:, above] = 0
    if len(above):
        high[:, below] = f[:, above[-1:]]
        high[:, above] = f[:, above[-1:]]
    ends = []
    for values, sign in ((low, -1.0), (high, 1.0)):
        mean, stderr = mean_and_stderr(n * (weights @ values.T))
        ends.append(mean + sign * student_quantile(p - 1.0, 0.95) * stderr)
    return ends[0], ends[1]


def _loss_name(objective: Objective) -> str:
    if not objective.has_split:
        return "the objective's own"
    rule = objective.rule
    if isinstance(rule, CrossEntropy):
        return "cross-entropy"
    if isinstance(rule, SquaredError):
        return "squared error"
    loss = objective.settings["loss"]
    return getattr(loss, "__name__", type(loss).__name__)
