"""The calls whose costs the questions tell, by name: what is measured, and how many units it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

import analysis
from analysis.race.kinds import kind_of
from analysis.race.steps import Stepper
from analysis.tasks import load_task
from analysis.training.loop import batches_of, put_back, training_loss
from curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    JacobianOperator,
    LinearOperator,
    MCFisherOperator,
    NTKOperator,
    Objective,
    PreconditionedOperator,
    eigsh,
    layer_spectra,
    layerwise,
    linalg,
    optimizer_divisor,
    per_example,
    plan,
    solve,
    spectrum,
)

__all__ = ["CALLS", "NETS", "Call", "Net"]

EXAMPLES = {"digits-mlp": None, "digits-cnn": 300, "text-gpt": 128}
"""Bundled networks, of 870, 14 458 and 53 472 parameters, and how many training examples are their data; None: all."""
NETS = tuple(EXAMPLES)
STEPS = torch.linspace(-1, 1, 11)


@dataclass(frozen=True)
class Net:
    """A bundled network."""

    name: str

    @cached_property
    def batch(self) -> Any:
        """Mini-batch of 128 examples."""
        return next(iter(batches_of(self.objective, 128, 0)))

    @cached_property
    def task(self) -> Any:
        """The task."""
        return load_task(self.name)

    @cached_property
    def objective(self) -> Objective:
        """Its loss on all training data."""
        found: Objective = self.task.objective()
        if (count := EXAMPLES[self.name]) is None:
            return found
        (batch,) = found.batches()
        return found.replace(data=tuple(part[:count] for part in batch))

    @cached_property
    def g(self) -> Tensor:
        """The gradient."""
        return self.objective.gradient()

    @cached_property
    def v(self) -> Tensor:
        """A vector."""
        return torch.randn(self.objective.num_params, generator=torch.Generator().manual_seed(0))

    @cached_property
    def adam(self) -> torch.optim.Optimizer:
        """Adam after three steps of rate zero."""
        params = list(self.objective.space.tensors.values())
        adam = torch.optim.Adam(params, lr=0.0)
        for _ in range(3):
            for p, part in zip(params, self.objective.space.to_dict(self.g).values(), strict=True):
                p.grad = part.clone()
            adam.step()
            adam.zero_grad()
        return adam


@dataclass(frozen=True)
class Call:
    """What is timed beside gradients of the same loss."""

    work: Callable[[Net], Any]
    nets: tuple[str, ...] = NETS
    per: Callable[[Net, Any], float] = field(default=lambda net, result: 1.0)  # noqa: ARG005
    """The cost is divided by it: points, layers, steps of trainings."""
    kept: bool = False
    """Measure with graphs that an earlier call has left, as products are."""
    batch: bool = False
    """Beside gradients of a mini-batch instead of all data."""


SMALL = NETS[:2]
"""Networks whose inputs are images: for what tells classes apart or needs one prediction an example."""
TINY = NETS[:1]


def _layers(net: Net, result: Any) -> float:  # noqa: ARG001
    return float(len({name.rpartition(".")[0] for name in net.objective.space.tensors}))


def _points(net: Net, result: Any) -> float:  # noqa: ARG001
    return float(len(STEPS))


def _direction(net: Net) -> Any:
    return analysis.random_direction(net.objective, generator=0)


def _path(net: Net) -> Any:
    here = analysis.present_place(net.objective)
    there = replace(here, name="elsewhere", vector=here.vector + 0.01)
    return analysis.loss_along_path(net.objective, here, there, torch.linspace(0, 1, len(STEPS)))


def _product(make: Callable[..., LinearOperator], **settings: Any) -> Call:
    made: dict[str, tuple[LinearOperator, Tensor]] = {}

    def work(net: Net) -> Any:
        if net.name not in made:
            A = make(net.objective, **settings)
            made[net.name] = A, torch.randn(A.shape[1], generator=torch.Generator().manual_seed(0))
        A, x = made[net.name]
        return A @ x

    return Call(work, kept=True)


def _penalty(net: Net) -> Any:
    model, batch = net.objective.model, next(iter(net.objective.batches()))
    optimizer = analysis.GradientPenalty(torch.optim.SGD(model.parameters(), lr=0.0), strength=0.1)
    return optimizer.step(lambda: training_loss(net.objective, batch))


def _subnetwork(net: Net) -> Any:
    scores = analysis.pruning_scores(net.objective, "magnitude")
    sparse = analysis.sparse_model(net.objective.model, scores.masks(scores.pruned(0.5)))
    return Objective(sparse, net.objective.settings["loss"], net.objective.settings["data"]).gradient()


STEPS_TIMED = 10
"""Of an optimizer: whole periods of those that refresh curvature every tenth."""


def _step(name: str, nets: tuple[str, ...] = NETS) -> Call:
    """Steps of an optimizer at its defaults, from where the network is, on one mini-batch."""
    kind = kind_of(name)
    kind = replace(kind, settings={key: value for key, value in kind.settings.items() if key != "update_first"})

    def work(net: Net) -> None:
        model, params = net.objective.model, list(net.objective.space.tensors.values())
        objective = net.objective
        if kind.form == "residuals":  # a sum of squares, of the same network
            objective = Objective(model, nn.MSELoss(), net.objective.settings["data"])
        with put_back(model):
            run = {"loss": objective.settings["loss"], "model": model, "num_steps": 100, "seed": 0}
            optimizer = kind.make(params, None if kind.lr is None else 1e-9, **run, steps_per_epoch=10)
            switch = getattr(optimizer, "train", None)
            if callable(switch):
                switch()
            stepper = Stepper(kind.form, optimizer, objective)
            x, y = net.batch
            if kind.form == "residuals":
                y = nn.functional.one_hot(y, 10).to(x.dtype)
            for _ in range(STEPS_TIMED):
                stepper.step((x, y))
            if callable(switch):
                optimizer.eval()  # type: ignore[attr-defined]

    return Call(work, nets, per=lambda net, result: float(STEPS_TIMED), batch=True)  # noqa: ARG005


STEPPED = (
    *("sgd", "adamw", "lion", "yogi", "cocob", "learned", "sls", "adahessian", "sophia", "esgd", "sassha", "soap"),
    *("shampoo", "kfac", "ekfac", "sam", "asam", "gauss-newton", "newton-cg", "trust-region", "cubic-newton"),
    *("saddle-free", "sketchy-newton", "forward-gradient", "direct-feedback"),
)
"""Optimizers by their names in races; those that hold matrices of all parameters are measured on the smallest."""


def _descent(net: Net) -> Any:
    settings = {"values": (4, 8, 16), "repeats": 2, "steps": 50, "curvature": False, "processes": 1}
    return analysis.double_descent(net.objective, **settings, test_data=net.task.test_data, generator=0)


_FEW: dict[str, Any] = {"samples": 200, "repeats": 2, "steps": 50, "processes": 1}


CALLS: dict[str, Call] = {
    # How sharp, how curved
    "top": Call(lambda n: eigsh(n.objective, 1, generator=0)),
    "top 10": Call(lambda n: eigsh(n.objective, 10, generator=0)),
    "lobpcg 10": Call(lambda n: linalg.lobpcg(n.objective, 10, generator=0)),
    "smallest": Call(lambda n: eigsh(n.objective, 3, which="SA", atol=1e-4, generator=0)),
    "norm": Call(lambda n: linalg.spectral_norm(n.objective, generator=0)),
    "spectrum": Call(lambda n: spectrum(n.objective, generator=0)),
    "inspect": Call(lambda n: analysis.inspect(n.objective, generator=0, check=False)),
    "density": Call(lambda n: linalg.spectral_density(n.objective, num_probes=4, num_steps=30, generator=0)),
    "trace 5 %": Call(lambda n: linalg.trace(HessianOperator(n.objective), rtol=0.05, generator=0)),
    "trace 1 %": Call(lambda n: linalg.trace(HessianOperator(n.objective), rtol=0.01, generator=0)),
    "frobenius": Call(lambda n: linalg.frobenius_norm(HessianOperator(n.objective), num_matvecs=40, generator=0)),
    "diagonal": Call(lambda n: linalg.diagonal(HessianOperator(n.objective), rtol=0.1, generator=0)),
    "exact GGN diagonal": Call(lambda n: layerwise.exact_diagonal(n.objective, kind="ggn")),
    "exact Hessian diagonal": Call(lambda n: layerwise.exact_diagonal(n.objective, kind="hessian"), SMALL),
    "factors": Call(lambda n: layerwise.kronecker_factors(n.objective)),
    "GGN spectrum": Call(lambda n: spectrum(n.objective, matrix="ggn", generator=0)),
    "function": Call(lambda n: linalg.matrix_function(HessianOperator(n.objective), n.v, "exp")),
    "nystrom": Call(lambda n: linalg.nystrom(n.objective, rank=10, matrix="ggn", generator=0)),
    "randomized": Call(lambda n: linalg.randomized_eigh(n.objective, 10, generator=0)),
    "sharpness": Call(lambda n: analysis.measure_sharpness(n.objective, generator=0)),
    "symmetries": Call(lambda n: analysis.rescaling_symmetries(n.objective)),
    "along": Call(lambda n: analysis.loss_along(n.objective, _direction(n), STEPS), per=_points),
    # Layers
    "layers": Call(lambda n: layer_spectra(n.objective, generator=0), per=_layers),
    "conditioning": Call(lambda n: analysis.measure_conditioning(n.objective, generator=0)),
    "gains": Call(lambda n: analysis.measure_conditioning(n.objective, optimizers={"adam": n.adam}, generator=0)),
    "coupling": Call(lambda n: analysis.layer_coupling(n.objective, generator=0), per=_layers),
    "layer diagonals": Call(lambda n: analysis.layer_diagonals(n.objective, generator=0)),
    "jacobians": Call(lambda n: analysis.layer_jacobians(n.objective, generator=0)),
    "classes": Call(lambda n: analysis.class_structure(n.objective), SMALL),
    "noise": Call(lambda n: analysis.gradient_noise(n.objective)),
    # The point
    "critical": Call(lambda n: analysis.critical_points(n.objective, generator=0)),
    "alignment": Call(lambda n: analysis.gradient_alignment(n.objective, 5, generator=0)),
    "path": Call(_path, per=_points),
    # Fewer weights
    "scores": Call(lambda n: analysis.pruning_scores(n.objective, "kfac")),
    "removal": Call(lambda n: analysis.loss_changes(n.objective, n.v[:, None])),
    "sub-network": Call(_subnetwork),
    "tickets": Call(
        lambda n: analysis.lottery_tickets(n.objective, n.task.test_data, num_seeds=2, steps=40, generator=0),
        SMALL,
    ),
    # Capacity and generalization
    "descent": Call(_descent, TINY),
    "complexity": Call(
        lambda n: analysis.effective_model_complexity(n.objective, **{**_FEW, "repeats": 3}, generator=0),
        TINY,
    ),
    "dimension": Call(lambda n: analysis.effective_dimension(n.objective, generator=0)),
    "bias": Call(lambda n: analysis.implicit_bias(n.objective, generator=0), TINY),
    # Training
    "preconditioned top": Call(
        lambda n: eigsh(
            PreconditionedOperator(HessianOperator(n.objective), optimizer_divisor(n.adam, n.objective.space)),
            1,
            generator=0,
        )
    ),
    "lr": Call(lambda n: analysis.critical_learning_rate(n.objective, steps=40, generator=0), SMALL),
    "race": Call(
        lambda n: analysis.race_optimizers(
            n.objective,
            optimizers=("adamw", "momentum"),
            budget="20 steps",
            batch_size=128,
            measures=("none",),
            noise=False,
            workers=1,
            generator=0,
        ),
        SMALL,
    ),
    "critical sharpness": Call(lambda n: analysis.critical_sharpness(n.objective, -0.1 * n.g, lr=0.1)),
    "smoothness": Call(lambda n: analysis.gradient_smoothness(n.objective, lr=0.1)),
    "curvature noise": Call(lambda n: analysis.curvature_noise(n.objective, generator=0)),
    "implicit": Call(lambda n: analysis.implicit_regularization(n.objective, lr=0.1, batch_size=32)),
    "penalty": Call(_penalty),
    "solve": Call(lambda n: solve(n.objective, n.g, matrix="ggn", damping=1e-3)),
    "cg": Call(lambda n: linalg.cg(GGNOperator(n.objective), n.g, damping=1e-3)),
    "minres": Call(lambda n: linalg.minres(HessianOperator(n.objective), n.g, damping=1e-2)),
    "lsmr": Call(
        lambda n: linalg.lsmr(JacobianOperator(n.objective), _outputs(n), damping=0.1, max_iterations=50), TINY
    ),
    "trust region": Call(lambda n: linalg.trust_region(HessianOperator(n.objective), n.g, 1.0)),
    "gltr": Call(lambda n: linalg.gltr(HessianOperator(n.objective), n.g, 1.0, generator=0)),
    "cubic": Call(lambda n: linalg.cubic_subproblem(HessianOperator(n.objective), n.g, 1.0, generator=0)),
    "example norms": Call(lambda n: per_example.gradient_norms(n.objective)),
    "example moments": Call(lambda n: per_example.gradient_moments(n.objective)),
    "example dots": Call(lambda n: per_example.gradient_dots(n.objective), SMALL),
    "example gradients": Call(lambda n: sum(1 for _ in per_example.per_example_gradients(n.objective)), SMALL),
    # Size
    "plan": Call(lambda n: plan(n.objective, "product")),
    # Matrices and parts
    "Hessian product": _product(HessianOperator),
    "GGN product": _product(GGNOperator),
    "Fisher product": _product(FisherOperator),
    "drawn Fisher product": _product(MCFisherOperator, generator=0),
    "empirical Fisher product": _product(EmpiricalFisherOperator),
    "covariance product": _product(GradientCovarianceOperator),
    "Jacobian product": _product(JacobianOperator),
    "kernel product": _product(NTKOperator),
    # Optimizers
    **{f"step of {name}": _step(name) for name in STEPPED},
    **{f"step of {name}": _step(name, TINY) for name in ("natural-gradient", "ss-broyden", "levenberg-marquardt")},
}


def _outputs(net: Net) -> Tensor:
    size = JacobianOperator(net.objective).shape[0]
    return torch.randn(size, generator=torch.Generator().manual_seed(0))
