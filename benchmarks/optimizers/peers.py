"""The optimizers that are compared: torch's, ours, and the public AdaHessians; each with how it takes a step.

What a step needs differs: a plain backward pass, one that keeps a graph, or a closure. `take_step` does what the
documentation of each asks for, and nothing that would slow it down.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.common.harness import math_attention
from benchmarks.optimizers.problems import Pair, TrainingProblem

__all__ = [
    "BESIDE_MATRIX",
    "CHECK_ONLY",
    "COST_ONLY",
    "MATRIX",
    "METHODS",
    "VARIANTS",
    "Make",
    "Method",
    "StepForm",
    "ours",
    "peer",
    "take_step",
]

StepForm = Literal["backward", "graph", "closure", "loss", "outputs"]
Make = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class Method:
    """An optimizer with the learning rates that it chooses from."""

    label: str
    load: Callable[[], Make]
    form: StepForm | Literal["calls"]
    rates: tuple[float, ...]
    """Tried first; further ones follow while the best lies at an end."""
    ours: bool = False
    settings: tuple[tuple[str, Any], ...] = ()
    training_settings: tuple[tuple[str, Any], ...] = ()
    """Further settings of training runs, which steps whose cost is measured do without."""
    curvature_part: int = 1
    """Curvature is measured on every so many-th example of a batch."""
    clip: float | None = None
    """Gradients are clipped at this share of the norm that they have at the start."""
    compiled: bool = False
    model_as: str = ""
    """The argument by which it takes the model; empty: it takes none."""

    def make(
        self,
        params: Sequence[Tensor],
        lr: float,
        loss: torch.nn.Module,
        *,
        training: bool = False,
        model: torch.nn.Module | None = None,
    ) -> torch.optim.Optimizer:
        """Return the optimizer for some parameters.

        Raises:
            ImportError: if its library is not installed.
        """
        settings = dict(self.settings) | ({"loss": loss} if self.form == "outputs" else {})
        if self.model_as:
            settings[self.model_as] = model
        return self.load()(params, lr=lr, **settings, **(dict(self.training_settings) if training else {}))


def take_step(
    method: Method, optimizer: torch.optim.Optimizer, problem: TrainingProblem, batch: Pair, *, limit: float = 0.0
) -> None:
    """Take one step on a batch; `limit` is the norm at which methods that clip do so."""
    if method.form == "loss":
        settings: dict[str, Any] = {}
        if method.curvature_part > 1:
            part = batch[0][:: method.curvature_part], batch[1][:: method.curvature_part]
            settings["curvature_closure"] = lambda: problem.loss_of(part)
        if method.clip is not None:
            settings["before_update"] = lambda: torch.nn.utils.clip_grad_norm_(problem.params, limit)
        optimizer.step(lambda: problem.loss_of(batch), **settings)  # type: ignore[arg-type,return-value]
    elif method.form == "outputs":
        optimizer.step(lambda: problem.evaluate(batch))  # type: ignore[arg-type,return-value]
    elif method.form == "closure":

        def closure() -> float:
            optimizer.zero_grad()
            loss = problem.loss_of(batch)
            loss.backward()
            return float(loss.detach())

        optimizer.step(closure)
    elif method.form == "calls":
        with math_attention():
            graphs = torch.autograd.grad(problem.loss_of(batch), problem.params, create_graph=True)
            torch.autograd.grad(graphs, problem.params, [torch.ones_like(p) for p in problem.params])
    elif method.form == "graph":
        optimizer.zero_grad()
        with math_attention(), warnings.catch_warnings():  # they cannot differentiate fused attention twice
            warnings.simplefilter("ignore")
            problem.loss_of(batch).backward(create_graph=True)
            optimizer.step()
    else:
        optimizer.zero_grad()
        problem.loss_of(batch).backward()
        if method.clip is not None:
            torch.nn.utils.clip_grad_norm_(problem.params, limit)
        optimizer.step()


def _torch(name: str) -> Callable[[], Make]:
    return lambda: getattr(torch.optim, name)


def ours(name: str, preset: str | None = None) -> Callable[[], Make]:
    """Return what loads an optimizer of this toolkit; of AdaHessian perhaps with the settings of another library."""

    def load() -> Make:
        import optimizers

        if preset is None:
            return getattr(optimizers, name)
        return lambda params, **settings: optimizers.AdaHessian.like(preset, params, **settings)

    return load


def peer(library: str, name: str) -> Callable[[], Make]:
    """Return what loads an optimizer of another library, without its warnings."""

    def load() -> Make:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return getattr(importlib.import_module(library), name)

    return load


def _meta_shampoo() -> Make:
    """Return Meta's Shampoo with the update of ours: EMAs, two factors a matrix, the length of Adam's steps."""
    meta: Any = importlib.import_module("distributed_shampoo")  # github.com/facebookresearch/optimizers, on the path
    return partial(
        meta.DistributedShampoo,
        betas=(0.9, 0.99),
        epsilon=1e-12,
        weight_decay=0.01,
        max_preconditioner_dim=10_000,
        precondition_frequency=10,
        grafting_config=meta.AdamPreconditionerConfig(beta2=0.99, epsilon=1e-8),
        preconditioner_config=meta.RootInvShampooPreconditionerConfig(inverse_exponent_override={1: 0.0}),
        distributed_config=meta.SingleDeviceDistributedConfig(target_parameter_dimensionality=2),
    )


class _MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and its AdamW for the rest, each with its own state."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        every = list(params)
        super().__init__(every, {"lr": lr})
        matrices = [p for p in every if p.ndim == 2]
        rest = [p for p in every if p.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, lr, weight_decay=0.01, foreach=True)]
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"))

    def step(self, closure: Any = None) -> Any:
        """Take a step of both."""
        for part in self.parts:
            part.step()
        return closure


def _around(name: str) -> Callable[[], Make]:
    def load() -> Make:
        import optimizers

        return partial(getattr(optimizers, name), base=torch.optim.AdamW)

    return load


_ADA = (0.01, 0.03, 0.1, 0.3, 1.0)
_ADAM = (1e-3, 3e-3, 0.01, 0.03, 0.1)
_SIGNS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01)
_OURS = "torch-curvature AdaHessian"
_TENTH = (("update_every", 10),)
_DENSE_START = (("update_first", 20),)


def _adahessian(what: str, *, preset: str | None = None, form: StepForm = "loss", **fields: Any) -> Method:
    return Method(f"{_OURS}{what}", ours("AdaHessian", preset), form, _ADA, ours=True, **fields)


METHODS: dict[str, Method] = {
    "sgd": Method(
        "torch SGD, momentum 0.9",
        _torch("SGD"),
        "backward",
        (3e-3, 0.01, 0.03, 0.1, 0.3),
        settings=(("momentum", 0.9),),
    ),
    "adam": Method("torch Adam", _torch("Adam"), "backward", _ADAM, settings=(("foreach", True),)),
    "adamw": Method("torch AdamW", _torch("AdamW"), "backward", _ADAM, settings=(("foreach", True),)),
    "lion": Method("pytorch-optimizer Lion", peer("pytorch_optimizer", "Lion"), "backward", _SIGNS),
    "lbfgs": Method(
        "torch LBFGS, strong Wolfe",
        _torch("LBFGS"),
        "closure",
        (0.03, 0.1, 0.3, 1.0, 3.0),
        settings=(("line_search_fn", "strong_wolfe"), ("max_iter", 10)),
    ),
    "adahessian": _adahessian(""),
    "adahessian-10": _adahessian(", every 10th", settings=_TENTH, training_settings=_DENSE_START),
    "adahessian-4-probes": _adahessian(
        ", 4 probes every 10th", settings=(*_TENTH, ("num_probes", 4)), training_settings=_DENSE_START
    ),
    "adahessian-gnb": _adahessian(
        ", Gauss-Newton-Bartlett every 10th",
        form="outputs",
        settings=(*_TENTH, ("curvature", "gauss-newton-bartlett")),
        training_settings=_DENSE_START,
    ),
    "adahessian-davda54": _adahessian('.like("davda54")', preset="davda54"),
    "sophia-h": Method(
        "torch-curvature Sophia-H, every 10th",
        ours("Sophia"),
        "loss",
        _ADAM,
        ours=True,
        settings=(("curvature", "hessian-diagonal"), ("gamma", 0.01), *_TENTH),
        training_settings=_DENSE_START,
    ),
    "sophia-g": Method(
        "torch-curvature Sophia-G, every 10th",
        ours("Sophia"),
        "outputs",
        _ADAM,
        ours=True,
        settings=_TENTH,
        training_settings=_DENSE_START,
    ),
    "esgd": Method(
        "torch-curvature ESGD, every 10th",
        ours("ESGD"),
        "loss",
        _ADA,
        ours=True,
        settings=_TENTH,
        training_settings=_DENSE_START,
    ),
    "sassha": Method(
        "torch-curvature SASSHA, every 10th",
        ours("SASSHA"),
        "loss",
        _ADA,
        ours=True,
        training_settings=_DENSE_START,
    ),
    "torch-optimizer": Method("torch_optimizer Adahessian", peer("torch_optimizer", "Adahessian"), "graph", _ADA),
    "kozistr": Method("pytorch-optimizer AdaHessian", peer("pytorch_optimizer", "AdaHessian"), "graph", _ADA),
    "kozistr-10": Method(
        "pytorch-optimizer AdaHessian, every 10th",
        peer("pytorch_optimizer", "AdaHessian"),
        "graph",
        _ADA,
        settings=(("update_period", 10),),
    ),
    "kozistr-sophia": Method(
        "pytorch-optimizer SophiaH, every 10th", peer("pytorch_optimizer", "SophiaH"), "graph", _ADAM
    ),
}
_OFFICIAL = (("precondition_frequency", 10),)
METHODS |= {
    "muon": Method("torch Muon, AdamW for the rest", lambda: _MuonAndAdamW, "backward", _ADAM),
    "soap": Method("torch-curvature SOAP, every 10th", ours("SOAP"), "backward", _ADAM, ours=True),
    "soap-continuous": Method(
        "torch-curvature SOAP, continuous",
        ours("SOAP"),
        "backward",
        _ADAM,
        ours=True,
        settings=(("refresh", "continuous"),),
    ),
    "soap-authors": Method(
        "torch-curvature SOAP, as its authors' code, every 10th",
        ours("SOAP"),
        "backward",
        _ADAM,
        ours=True,
        settings=(("start", "gradient"), ("update_first", 1)),
    ),
    "shampoo": Method("torch-curvature Shampoo, every 10th", ours("Shampoo"), "backward", _ADAM, ours=True),
    "sam": Method("torch-curvature SAM of AdamW", _around("SAM"), "loss", _ADAM, ours=True),
    "asam": Method("torch-curvature ASAM of AdamW", _around("ASAM"), "loss", _ADAM, ours=True),
    "official-soap": Method(  # its file soap.py on the path
        "SOAP, its authors' code, every 10th", peer("soap", "SOAP"), "backward", _ADAM, settings=_OFFICIAL
    ),
    "kozistr-soap": Method(
        "pytorch-optimizer SOAP, every 10th",
        peer("pytorch_optimizer", "SOAP"),
        "backward",
        _ADAM,
        settings=_OFFICIAL,
    ),
    "kozistr-shampoo": Method(
        "pytorch-optimizer ScalableShampoo, every 10th",
        peer("pytorch_optimizer", "ScalableShampoo"),
        "backward",
        _ADAM,
        settings=(("preconditioning_compute_steps", 10), ("start_preconditioning_step", 1)),
    ),
    "meta-shampoo": Method("Meta's DistributedShampoo, every 10th", lambda: _meta_shampoo(), "backward", _ADAM),
}
_STEADY = (("update_first", 1),)
_BLOCKS = (("max_dim", 1024), ("large", "blocks"))
MATRIX: dict[str, Method] = {  # for steps at some widths: the frequent refreshes of the first steps left out
    **{
        f"{name}-steady": replace(METHODS[name], settings=(*METHODS[name].settings, *_STEADY))
        for name in ("soap", "soap-continuous", "shampoo")
    },
    "soap-blocks": Method(
        "torch-curvature SOAP, every 10th, sides above 1024 in blocks",
        ours("SOAP"),
        "backward",
        (),
        ours=True,
        settings=(*_STEADY, *_BLOCKS),
    ),
}
BESIDE_MATRIX = ("muon", "official-soap", "kozistr-soap", "kozistr-shampoo", "meta-shampoo")
VARIANTS: dict[str, Method] = {  # of AdaHessian, on every step where the label says nothing else
    "no average": _adahessian(", no spatial average", settings=(("spatial_average", None),)),
    "rows": _adahessian(", rows of matrices averaged too", settings=(("spatial_average", "instruction"),)),
    "row norm": _adahessian(', "row-norm"', settings=(("curvature", "row-norm"),)),
    "4 probes": _adahessian(", 4 probes", settings=(("num_probes", 4),)),
    "quarter": _adahessian(", curvature of a quarter of the batch", curvature_part=4),
    "clipped": _adahessian(", gradients clipped", clip=0.1),
    "clipped-10": replace(METHODS["adahessian-10"], label=f"{_OURS}, every 10th, gradients clipped", clip=0.1),
    "adamw-clipped": replace(METHODS["adamw"], label="torch AdamW, gradients clipped", clip=0.1),
    "root": _adahessian(", power 1/2", settings=(("hessian_power", 0.5),)),
}
COST_ONLY: dict[str, Method] = {
    "calls": Method("forward pass, gradient with graph and product, by autograd alone", _torch("SGD"), "calls", ()),
    "sgd-compiled": replace(METHODS["sgd"], label="torch SGD, compiled model", compiled=True),
    "compiled": replace(METHODS["adahessian"], label=f"{_OURS}, compiled model", compiled=True),
    "compiled-10": replace(METHODS["adahessian-10"], label=f"{_OURS}, every 10th, compiled model", compiled=True),
    **{
        name: Method(f"torch-curvature {name}, every 10th", ours(name), "outputs", (), ours=True, settings=_TENTH)
        for name in ("KFAC", "EKFAC")
    },
    "GaussNewton": Method("torch-curvature GaussNewton, 5 CG steps", ours("GaussNewton"), "outputs", (), ours=True),
}


CHECK_ONLY: dict[str, Method] = {
    "ss-broyden": Method("torch-curvature SSBroyden", ours("SSBroyden"), "loss", (), ours=True),
    "newton-cg": Method("torch-curvature NewtonCG", ours("NewtonCG"), "loss", (), ours=True),
    "trust-region": Method("torch-curvature TrustRegionNewton", ours("TrustRegionNewton"), "loss", (), ours=True),
}
