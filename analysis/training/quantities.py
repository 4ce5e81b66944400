"""What a tracker can measure around one step, and how."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.implicit.measure import implicit_regularization
from analysis.noise.measure import gradient_noise
from analysis.training.critical_sharpness import losses_along, rounding_of, search_critical_step
from analysis.training.depth import jacobian_norms
from analysis.training.point import PointBlock, PointHessian
from analysis.training.results import CriticalSharpness
from analysis.training.smoothness import along_gradient
from analysis.training.untouched import untouched
from curvature.errors import InputError
from curvature.linalg import spectral_density, trace
from curvature.linalg.krylov.following import Followed, follow_largest
from curvature.linop import MatrixLike
from curvature.objective.objective import Objective
from curvature.objective.shift import loss_at, shifted
from curvature.operators.preconditioned import PreconditionedOperator
from curvature.per_example import gradient_moments

__all__ = ["QUANTITIES", "Measurer", "StepTaken", "refuse_penalties"]

QUANTITIES = {
    "sharpness": "largest eigenvalue of the Hessian: 2 to 5 products a reading",
    "preconditioned": "that of the Hessian as the optimizer sees it, against the edge of stability: 2 to 5 products",
    "alignment": "cosine between gradient and the sharpest direction: a gradient, free after products",
    "oscillation": "how the gradient along the sharpest direction changes over the step: one gradient",
    "update": "curvature along the step, and the change of the loss, predicted and true: a product and a loss",
    "critical": "critical sharpness from at most 6 losses along the step",
    "layers": "sharpness of each layer: 2 to 5 products with its block",
    "depth": "gradient and Jacobian norms of each layer: a forward and 4 backward passes",
    "smoothness": "loss and gradient within a few steps along the gradient: 4 gradients",
    "spectrum": "nodes of the Hessian's spectrum for a waterfall: 24 products",
    "trace": "trace of the Hessian: 8 products",
    "noise": "gradient noise and the noise scale, in evaluation mode: a pass over single examples",
    "penalties": "implicit regularization of SGD: a pass over single examples, shared with noise",
}
"""Name -> what it is and costs."""

NEED_STEP = frozenset({"preconditioned", "oscillation", "update", "critical", "smoothness"})
_TRACE_PRODUCTS, _MOST_LOSSES, _CRITICAL_RTOL, _JACOBIAN_PROBES = 8, 6, 0.02, 4
_SPECTRUM_STEPS = 24
_NEXT, _LATER = 3e-2, 1e-2  # relative residuals, one step after the last reading and many, when other vectors lead


@dataclass(frozen=True, kw_only=True)
class StepTaken:
    """A step of the optimizer, in flat vectors of the objective's parameters."""

    before: Tensor
    """(n,)"""
    after: Tensor
    """(n,)"""
    divisor: Tensor | None
    """What the optimizer divides by, weighted by the thresholds of groups; None where it is 1."""
    lr: float
    threshold: float
    momentum: float
    weight_decay: float


class Measurer:
    """Takes the quantities of a step, each from where it was at the reading before.

    Args:
        objective: the function that is measured.
        wanted: names of quantities.
        relative_to: other objectives of the same model, by name.
        batch_size: of the training, for the penalties.
        generator: source of random numbers.
    """

    def __init__(
        self,
        objective: Objective,
        wanted: frozenset[str],
        relative_to: Mapping[str, Objective],
        batch_size: int | None,
        generator: torch.Generator,
    ) -> None:
        self.objective, self.wanted, self.generator = objective, wanted, generator
        self.relative_to, self.batch_size = dict(relative_to), batch_size
        self.followed: dict[str, Followed] = {}
        self.next_step = False  # whether the reading before was one step ago
        self.factors: dict[str, float] = {}  # of the latest critical steps

    def load(self, followed: Mapping[str, Mapping[str, Any]], factors: Mapping[str, float]) -> None:
        """Go on from where eigenvectors were in another process.

        Raises:
            InputError: if they are of a model with other parameters.
        """
        for name, found in followed.items():
            v, n = found["vector"].to(self.objective.device), self.objective.num_params
            if len(v) != n and not name.startswith("layer "):
                raise InputError(f"the state is of a model with {len(v)} parameters, and this one has {n}.")
            moved: dict[str, Any] = {k: x.to(v.device) if isinstance(x, Tensor) else x for k, x in found.items()}
            self.followed[name] = Followed(**moved)
        self.factors = dict(factors)

    def take(self, step: StepTaken | None, batches: list[Any] | None) -> dict[str, Any]:
        """Return the fields of a reading, at the parameters before the step; at the present ones without a step.

        Raises:
            NonFiniteError: if loss, gradient or a product is not finite.
        """
        here = self.objective.space.current() if step is None else step.before
        with shifted(self.objective, here):
            found = self._at_start(step, batches)
        if step is None:
            return found
        if "oscillation" in self.wanted:
            v = self.followed["sharpness"].vector
            with shifted(self.objective, step.after):
                _, after = PointHessian(self.objective, batches).loss_and_gradient()
            before = float(found["_gradient"] @ v)
            found["oscillation"] = float(after @ v) / before if before else math.nan
        return self._along(step, found, batches)

    def _at_start(self, step: StepTaken | None, batches: list[Any] | None) -> dict[str, Any]:
        wanted, found = self.wanted, dict[str, Any]()
        H = PointHessian(self.objective, batches)
        if "sharpness" in wanted:
            top = self._follow("sharpness", H)
            found |= {"sharpness": top.value, "sharpness_residual": top.residual}
        if "preconditioned" in wanted and step is not None:
            if step.divisor is None and "sharpness" in wanted:
                top = self.followed["sharpness"]
            elif step.divisor is None:
                top = self._follow("preconditioned", H)
            else:
                top = self._follow("preconditioned", PreconditionedOperator(H, step.divisor))
            found |= {"preconditioned": top.value, "preconditioned_residual": top.residual}
            layers = self.objective.space.blocks
            shares = torch.stack([layer.take(top.vector).square().sum() for layer in layers])
            place = int(shares.argmax())
            found |= {"sharpest_layer": layers[place].name, "sharpest_layer_share": float(shares[place])}
        if "layers" in wanted:
            blocks = [(block.name, PointBlock(H, block)) for block in self.objective.space.blocks]
            tops = {name: self._follow(f"layer {name}", A) for name, A in blocks}
            found["layers"] = {name: top.value for name, top in tops.items()}
            found["layer_residuals"] = {name: top.residual for name, top in tops.items()}
        if "spectrum" in wanted:
            num_steps = min(_SPECTRUM_STEPS, self.objective.num_params)
            nodes = spectral_density(H, num_probes=1, num_steps=num_steps, generator=self._same())
            found["ritz_values"] = tuple(nodes.nodes[0].tolist())
            found["ritz_weights"] = tuple(nodes.weights[0].tolist())
        if "trace" in wanted:
            estimate = trace(H, num_matvecs=_TRACE_PRODUCTS, generator=self.generator)
            found |= {"hessian_trace": float(estimate.value), "hessian_trace_stderr": float(estimate.stderr)}
        if step is not None and "update" in wanted:
            found["_curvature"] = H @ (step.after - step.before)
        found["loss"], gradient = H.loss_and_gradient()
        found |= {"_gradient": gradient, "gradient_norm": float(gradient.norm()), "num_matvecs": H.num_matvecs}
        if "alignment" in wanted:
            norm = found["gradient_norm"]
            along = abs(float(gradient @ self.followed["sharpness"].vector))
            found["alignment"] = along / norm if norm else math.nan
        if "depth" in wanted:
            found["layer_gradients"] = {b.name: float(b.take(gradient).norm()) for b in self.objective.space.blocks}
            found["layer_jacobians"] = jacobian_norms(self.objective, batches, _JACOBIAN_PROBES, self._same())
        if {"noise", "penalties"} & wanted:
            found |= self._noise(step, batches)
        if step is not None and "critical" in wanted:
            for name, other in self.relative_to.items():
                loss, slope = PointHessian(other).loss_and_gradient()
                found[f"_start {name}"] = (loss, slope)
        return found

    def _along(self, step: StepTaken, found: dict[str, Any], batches: list[Any] | None) -> dict[str, Any]:
        """Add what the step itself shows."""
        u, gradient = step.after - step.before, found.pop("_gradient")
        norm, slope, loss, known = float(u.norm()), float(gradient @ u), found["loss"], dict[float, float]()
        found |= {"update_norm": norm, "num_losses": 0}
        starts = {name: found.pop(f"_start {name}", None) for name in self.relative_to}
        curvature = found.pop("_curvature", None)
        if norm == 0:
            return found
        if "smoothness" in self.wanted and found["gradient_norm"] > 0:
            lr = norm / found["gradient_norm"]
            path = along_gradient(self.objective, step.before, gradient, lr=lr, batches=batches)
            found |= {"path_loss_low": path.loss_low, "path_loss_high": path.loss_high}
            found |= {
                "gradient_change_low": path.gradient_change_low,
                "gradient_change_high": path.gradient_change_high,
            }
            found["effective_smoothness"] = path.effective_smoothness
        if curvature is not None:
            bend = float(u @ curvature)
            known[1.0] = loss_at(self.objective, step.after, batches=batches).value
            found |= {"rayleigh": bend / norm**2, "change": known[1.0] - loss, "num_losses": 1}
            found |= {"linear_change": slope, "quadratic_change": slope + bend / 2}
        if "critical" in self.wanted and step.lr > 0:
            own = self._critical("", self.objective, step, (loss, slope), known, batches)
            found |= {"critical_sharpness": own.value, "critical_status": own.status.name}
            found["num_losses"] += own.num_losses
            others = {
                name: self._critical(name, self.relative_to[name], step, (start[0], float(start[1] @ u)), {}, None)
                for name, start in starts.items()
                if start is not None
            }
            found["relative"] = {name: other.value for name, other in others.items()}
            found["relative_status"] = {name: other.status.name for name, other in others.items()}
        return found

    def _critical(
        self,
        name: str,
        objective: Objective,
        step: StepTaken,
        start: tuple[float, float],
        known: dict[float, float],
        batches: list[Any] | None,
    ) -> CriticalSharpness:
        found = search_critical_step(
            losses_along(objective, step.before, step.after - step.before, batches),
            *start,
            lr=step.lr,
            max_losses=_MOST_LOSSES - len(known),
            rtol=_CRITICAL_RTOL,
            eps=rounding_of(objective),
            first=1.0 if known else self.factors.get(name, 1.0),
            known=known,
        )
        if found.status.ok:
            self.factors[name] = found.step / step.lr
        return found

    def _follow(self, name: str, A: MatrixLike) -> Followed:
        rtol = _NEXT if self.next_step else _LATER
        self.followed[name] = follow_largest(A, self.followed.get(name), rtol=rtol, generator=self.generator)
        return self.followed[name]

    def _same(self) -> torch.Generator:
        """Return a source of numbers that are the same at each reading."""
        return torch.Generator(self.objective.device).manual_seed(self.generator.initial_seed())

    def _noise(self, step: StepTaken | None, batches: list[Any] | None) -> dict[str, Any]:
        """Measure in evaluation mode: batch statistics would couple the examples."""
        objective = self.objective if batches is None else self.objective.replace(data=batches)
        with untouched(objective):
            return self._noise_of(objective, step)

    def _noise_of(self, objective: Objective, step: StepTaken | None) -> dict[str, Any]:
        moments = gradient_moments(objective, along_mean=True)  # one for both
        found: dict[str, Any] = {}
        if "noise" in self.wanted:
            noise = gradient_noise(objective, moments=moments)
            found |= {"noise_trace": noise.trace.value, "evidence": noise.evidence}
            found |= {"noise_scale": noise.noise_scale.value, "noise_scale_lower": noise.noise_scale.lower}
            found["noise_scale_upper"] = noise.noise_scale.upper
        if "penalties" in self.wanted and step is not None and step.lr > 0:
            added = implicit_regularization(
                objective,
                lr=step.lr,
                batch_size=self.batch_size,
                momentum=step.momentum,
                weight_decay=step.weight_decay,
                norms=moments,
            )
            found |= {"full_penalty": added.full_penalty, "batch_penalty": added.batch_penalty}
        objective.release()  # graphs of a point that training leaves at once
        return found


def refuse_penalties(optimizer: Any, batch_size: int | None) -> None:
    """Refuse penalties for a training that is not the one which they belong to.

    Raises:
        InputError: with the reason.
    """
    if batch_size is None:
        raise InputError("penalties depend on the batch size of the training; pass it as batch_size=.")
    groups = getattr(optimizer, "param_groups", ())
    settings = {tuple(float(g.get(name, 0)) for name in ("lr", "momentum", "weight_decay")) for g in groups}
    if not isinstance(optimizer, torch.optim.SGD):
        why = f"the optimizer is {type(optimizer).__name__}"
    elif any(g["nesterov"] or g["dampening"] for g in groups):
        why = "this one has Nesterov's momentum or dampening"
    elif len(settings) > 1:
        why = "its groups of parameters have different settings"
    else:
        return
    raise InputError(f"penalties are those of SGD with one rate and heavy-ball momentum, and {why}; leave them out.")
