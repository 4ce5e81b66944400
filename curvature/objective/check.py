"""The self-check: is this objective one well-defined, twice differentiable function, and are its products right?

Run once before anything expensive. It costs two gradients of the data and, on the first batch, two Hessian products
and a few gradients, some of them of 16 examples only; more where something does not agree at first. Each finding names
its cause and the remedy.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvature.arguments import checked
from curvature.autograd.backward import dtypes_of_graph
from curvature.autograd.guards import custom_functions
from curvature.engine.linearize import Linearization, walk
from curvature.environment.autocast import full_precision
from curvature.errors import CheckFailedError
from curvature.losses.rules import AnyLoss
from curvature.objective.dependence import Dependence
from curvature.objective.interface import ObjectiveLike
from curvature.objective.moving import moving_module
from curvature.objective.product_noise import product_noise
from curvature.objective.ranks import together
from curvature.objective.refusals import describe_cuts, refuse_other_batches
from curvature.objective.shift import shifted
from curvature.objective.unsaturated import Unsaturated, sizes, unsaturated

__all__ = ["CheckReport", "check_objective"]

_KINKS = (  # stems of autograd nodes of functions with jumps in their first derivative
    *("Abs", "AdaptiveMax", "Amax", "Amin", "Clamp", "Floor", "Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh"),
    *("L1Loss", "LeakyRelu", "Max", "Median", "Min", "PreluKernel", "Relu", "Round", "RreluWithNoise", "Sign"),
    *("Softshrink", "Sort", "Threshold", "Topk"),
)
_SINGLE_STEPS = (1e-3, 3e-3, 1e-4)  # steps tried in float32, relative to the norm of the parameters
_HALF_STEPS = (3e-2, 1e-2, 3e-3)
_SHORTER = 1e-2  # of the step in float64
_TELLING = 0.1  # of the gradient: noise of a difference that can tell whether it is right
_ROUNDED = 100  # rounding errors that every tolerance allows for


@dataclass(frozen=True)
class CheckReport:
    """What the self-check found."""

    passed: bool
    messages: tuple[str, ...]
    """One sentence a test, with its figure."""


@together
@full_precision
@torch.inference_mode(mode=False)
@torch.enable_grad()
@checked
def check_objective(objective: ObjectiveLike, *, rtol: float | None = None) -> CheckReport:
    """Check that loss and gradient repeat and belong together, and that the Hessian is symmetric and their derivative.

    Args:
        objective: what to check; its kept graphs and the model are left as they are.
        rtol: relative tolerance of the repeat, symmetry and loss-Hessian tests. Default: 100 sqrt(n) rounding errors,
            at most 1e-2. The finite-difference tests have their own: 1e-4 in float64, 5e-2 in float32, 0.4 below.

    Raises:
        CheckFailedError: with the cause (which module, which function) and the remedy; also where kept graphs are of
            a function that has changed since in a way that no look sees.
        DataError: if the data differ from pass to pass, or batches do not count by what the loss divides by.
    """
    with _explained():
        objective.freshness.check_kept()
        found = _first_that_counts(objective)
    if found is None:  # all data are on other ranks, which look at one batch each
        return CheckReport(True, (_repeats(objective, 1e-2 if rtol is None else rtol), *_noise(objective)))
    lin, batch = found
    eps = _working_precision(lin, objective)
    tolerance = min(1e-2, 100 * objective.num_params**0.5 * eps) if rtol is None else rtol
    messages = [_repeats(objective, tolerance)]
    with _explained():
        messages += _derivatives(lin, objective, batch, tolerance, eps)
        if objective.closed_form_loss:
            messages.append(_output_hessian(lin, objective, tolerance))
    messages.append(describe_cuts(objective, batch))
    return CheckReport(True, (*messages, *_noise(objective)))


def _first_that_counts(objective: ObjectiveLike) -> tuple[Linearization, Any] | None:
    """Return the first batch of this rank in which a target counts."""
    for batch in objective.batches():
        lin = objective.linearise(batch)
        if lin.weight != 0:
            return lin, batch
    return None


# -- repeatability ----------------------------------------------------------------------------------------------------


def _repeats(objective: ObjectiveLike, tolerance: float) -> str:
    (loss, gradient), (loss_again, gradient_again) = _fresh_pass(objective), _fresh_pass(objective)
    changes = _relative(loss, loss_again), _relative(gradient, gradient_again)
    change = max(changes)
    if not all(c <= tolerance for c in changes):  # nor NaN
        raise CheckFailedError(
            f"two evaluations at the same parameters differ by {change:.1e} relative: {moving_module(objective)}"
        )
    return f"Loss and gradient repeat to {change:.1e}."


def _fresh_pass(objective: ObjectiveLike) -> tuple[Tensor, Tensor]:
    dependence = Dependence(objective.dependence.whole)

    def parts() -> Iterator[tuple[float, Tensor]]:
        for index, _, batch in objective.source:
            lin = objective.linearise(batch, index)
            refuse_other_batches(objective, lin)
            dependence.note(lin)
            yield lin.weight, torch.cat([lin.loss.to(objective.dtype)[None], lin.gradient()])
        dependence.require()

    mean = objective.mean(parts())
    return mean[0], mean[1:]


# -- second derivative ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Turn torch's refusal to differentiate twice into an error that says what the user can do."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, CheckFailedError):
            raise
        reason = str(error).splitlines()[0]
        raise CheckFailedError(
            f"the model has no second derivative by autograd: {reason} Replace that operation by a twice "
            "differentiable one, or work with the Gauss-Newton matrix where only the loss is concerned."
        ) from error


@dataclass(frozen=True)
class _AtPoint:
    """What tests compare with, of one linearised batch: computed once."""

    lin: Linearization
    gradient: Tensor
    probes: tuple[Tensor, Tensor]
    products: Tensor
    """H u and H v of the probes, (2, n)."""

    @property
    def direction(self) -> tuple[Tensor, Tensor]:
        """The first probe as a unit vector, and the product with it."""
        size = self.probes[0].norm()
        return self.probes[0] / size, self.products[0] / size


def _derivatives(lin: Linearization, objective: ObjectiveLike, batch: Any, tolerance: float, eps: float) -> list[str]:
    """Test symmetry and differences, with rounding relative to what is there; where that fails, to what cancelled."""
    probes = _probes(objective)
    products = lin.hvp(torch.stack(probes))  # first: the gradient is a part of their graph
    here = _AtPoint(lin, lin.gradient(), probes, products)
    v, Hv = here.direction
    own = sizes(lin.loss, here.gradient, Hv)

    def found(rounded: Unsaturated) -> list[str]:
        symmetric = _symmetric(here, tolerance, rounded)
        return [symmetric, *_differences(here, objective, batch, eps, rounded)]

    try:
        return found(own)  # a test that passes by less allowance passes by more
    except CheckFailedError:
        return found(unsaturated(lin, objective, batch, v, own))


def _symmetric(here: _AtPoint, tolerance: float, sizes: Unsaturated) -> str:
    (u, v), (Hu, Hv) = here.probes, here.products
    scale = u.norm() * Hv.norm() + v.norm() * Hu.norm()
    rounding = u.norm() * v.norm() * sizes.product / _ROUNDED  # tolerances are that many errors, and more
    gap = float((u @ Hv - v @ Hu).abs() / torch.maximum(scale, rounding).clamp_min(torch.finfo(u.dtype).tiny))
    if not gap <= tolerance:
        raise CheckFailedError(
            f"the Hessian of batch 0 is not symmetric (u'Hv and v'Hu differ by {gap:.1e} relative): some backward "
            f"formula is wrong. {_custom_functions(here.lin)}"
        )
    return f"The Hessian is symmetric to {gap:.1e}."


@dataclass(frozen=True)
class _Difference:
    """Central differences along one unit direction v, beside what they should be."""

    slope_error: float
    """|difference of the loss - g'v| beyond rounding and its own error, over |g|."""
    tells: bool
    """Whether the difference of the loss is larger than its rounding by far."""
    curve_error: float
    """|difference of the gradient - Hv| over the larger of the two."""
    drowned: bool
    """Whether the difference of the gradient is no larger than its own rounding."""


def _difference(
    here: _AtPoint, objective: ObjectiveLike, batch: Any, eps: float, step: float, sizes: Unsaturated
) -> _Difference:
    g, (v, Hv) = here.gradient, here.direction
    theta = objective.space.current()
    half = step * max(1.0, float(theta.norm()))
    (loss_up, g_up), (loss_down, g_down) = (_at(objective, batch, theta + sign * half * v) for sign in (1.0, -1.0))
    slope, curve = (loss_up - loss_down) / (2 * half), (g_up - g_down) / (2 * half)
    rounding = eps / (2 * half)  # of a difference, relative to what is subtracted
    largest = max(sizes.loss, *(abs(float(loss)) for loss in (loss_up, loss_down)))
    third = abs(float((g_up + g_down - 2 * g) @ v)) / 6  # by which differences of the loss err
    of_gradient = 10 * eps * (max(1.0, float(theta.norm())) * float(Hv.norm()) + sizes.gradient)
    noise = 20 * rounding * largest + of_gradient
    gap, size = abs(float(slope - g @ v)) - noise - 2 * third, max(float(g.norm()), torch.finfo(g.dtype).tiny)
    return _Difference(
        slope_error=0.0 if gap <= 0 else gap / size,
        tells=noise <= _TELLING * size,
        curve_error=_relative(curve, Hv),
        drowned=all(float(part.norm()) <= 30 * rounding * sizes.gradient for part in (curve, Hv)),
    )


def _differences(here: _AtPoint, objective: ObjectiveLike, batch: Any, eps: float, sizes: Unsaturated) -> list[str]:
    """Compare g'v with differences of the loss, and Hv with differences of the gradient, along one random direction.

    Steps are tried until one agrees with either, and all of them before it is said that none does.
    """
    double, single = eps < 1e-12, eps < 1e-6
    tolerance = 1e-4 if double else 5e-2 if single else 0.4  # in half precision differences see gross errors only
    steps = (eps ** (1 / 3),) if double else _SINGLE_STEPS if single else _HALF_STEPS
    kink, found = _first_kink(here.lin), list[_Difference]()
    for step in steps:
        found.append(d := _difference(here, objective, batch, eps, step, sizes))
        if d.slope_error <= tolerance and (kink is not None or (not d.drowned and d.curve_error <= tolerance)):
            break
    if double and not found[0].slope_error <= tolerance:  # a kink on the way, or a step that is long for this loss
        shorter = _difference(here, objective, batch, eps, _SHORTER * steps[0], sizes)
        found += [shorter] if shorter.tells else []
    slope_error = min((d.slope_error for d in found if not math.isnan(d.slope_error)), default=math.nan)
    curve_errors = [d.curve_error for d in found if not d.drowned]
    curve_error = min((error for error in curve_errors if not math.isnan(error)), default=math.nan)
    if not slope_error <= tolerance:
        raise CheckFailedError(
            f"the gradient is not the derivative of the loss (off by {slope_error:.1e} of its norm along a random "
            f"direction). {_custom_functions(here.lin)}"
        )
    agreement = f"{slope_error:.1e}" if slope_error > 0 else "rounding"
    message = f"The gradient agrees with differences of the loss to {agreement}."
    if kink is not None:
        reason = f"{kink} has kinks, where they measure jumps instead"
    elif not curve_errors:
        reason = "they drown in the rounding of the model's dtype"
    elif not curve_error <= tolerance:
        raise CheckFailedError(
            f"H v differs from differences of the gradient by {curve_error:.1e} relative: the second derivative is "
            f"wrong. {_custom_functions(here.lin)}"
        )
    else:
        return [message, f"H v agrees with differences of the gradient to {curve_error:.1e}."]
    return [message, f"Finite differences skipped: {reason}."]


def _at(objective: ObjectiveLike, batch: Any, point: Tensor) -> tuple[Tensor, Tensor]:
    """Return loss and gradient of batch 0 at another point."""
    with shifted(objective, point):
        lin = objective.linearise(batch)
        return lin.loss.to(point.dtype), lin.gradient()


def _output_hessian(lin: Linearization, objective: ObjectiveLike, tolerance: float) -> str:
    """Compare the closed form of the loss Hessian on the outputs with double backward on the loss alone."""
    outputs, targets = lin.outputs_and_targets()
    targets = targets.detach()
    rule = objective.rule
    assert rule is not None
    u = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0)).to(outputs)
    closed = rule.output_hessian(outputs, targets)(u)
    by_autograd = AnyLoss(rule.loss, rule.reduction).output_hessian(outputs, targets)(u)
    plain = rule.output_hessian(torch.zeros_like(outputs), targets)(u)  # what is left of it has the same rounding
    gap = _relative(closed.to(by_autograd.dtype), by_autograd, float(plain.norm()) / _ROUNDED)
    if not gap <= max(tolerance, 1e3 * torch.finfo(outputs.dtype).eps):
        raise CheckFailedError(
            f"the closed form of the loss Hessian differs from autograd's by {gap:.1e}; please report this loss as a "
            "bug."
        )
    return f"The closed form of the loss Hessian agrees with autograd to {gap:.1e}."


def _probes(objective: ObjectiveLike) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, objective.num_params, generator=generator, dtype=torch.float64).to(
        objective.device, objective.dtype
    )
    return u, v


def _relative(a: Tensor, b: Tensor, least: float = 0.0) -> float:
    least = max(least, torch.finfo(a.dtype).tiny)
    return float((a - b).norm() / torch.maximum(a.norm(), b.norm()).clamp_min(least))


def _noise(objective: ObjectiveLike) -> list[str]:
    """Say what rounding makes of Hessian products; nothing in float64."""

    def product(of: Any, Z: Tensor) -> Tensor:
        found: Tensor = of.reduce(lambda lin: lin.hvp(Z.T.contiguous()))
        return found.T

    key = "hvp of a check"
    found = product_noise(objective, "the Hessian", key, objective.num_params, product)
    known = objective.freshness.measured().get(key)
    return [known.note()] if found and known is not None else []


# -- what the graph is made of ----------------------------------------------------------------------------------------


def _working_precision(lin: Linearization, objective: ObjectiveLike) -> float:
    """Return the rounding error of the narrowest dtype in the graph, which may be narrower than the parameters'."""
    dtypes = {t.dtype for t in objective.space.tensors.values()}
    return max(torch.finfo(dtype).eps for dtype in dtypes | dtypes_of_graph([lin.graph_root()]))


def _first_kink(lin: Linearization) -> str | None:
    names = sorted({node.name() for node in walk([lin.graph_root()])})
    stems = {name: name.rstrip("0123456789").removesuffix("Backward") for name in names}
    return next((name for name, stem in stems.items() if stem.startswith(_KINKS)), None)


def _custom_functions(lin: Linearization) -> str:
    customs = custom_functions([lin.graph_root()])
    if customs:
        names = ", ".join(customs)
        return (
            f"First suspects are the custom autograd functions {names}; check them with torch.autograd.gradgradcheck."
        )
    return "The graph holds torch's own functions only; check with torch.autograd.gradgradcheck and please report it."
