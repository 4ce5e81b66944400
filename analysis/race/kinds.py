"""The optimizers that can enter a race, by name: torch's, this toolkit's, peers where installed, and a user's own."""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

import optimizers
from analysis.tasks.load import function_of
from curvature.errors import InputError

__all__ = ["GROUPS", "Form", "Kind", "kind_of", "names_of"]

Form = Literal["backward", "closure", "loss", "outputs", "residuals"]
"""What a step takes: gradients in `.grad`; a closure that calls backward(); one that returns the loss, the outputs and
targets, or residuals, and does not."""


@dataclass(frozen=True)
class Kind:
    """An optimizer, before it has parameters."""

    title: str
    """What it is, for people."""
    form: Form
    cls: Callable[..., torch.optim.Optimizer]
    lr: float | None
    """A usual rate, in the middle of those that are tried; None: it sets the length of its steps itself."""
    settings: Mapping[str, Any] = field(default_factory=dict)

    def make(self, params: list[Tensor], lr: float | None, **run: Any) -> torch.optim.Optimizer:
        """Return the optimizer.

        Args:
            params: what it trains.
            lr: its rate; None leaves its own.
            **run: what a run has to say: `loss`, `model` and `num_steps`, for those that need them; `seed`,
                `weight_decay`, `steps_per_epoch`, each passed on if the optimizer takes it and it is not None.
        """
        loss, model, num_steps = run.pop("loss"), run["model"], run.pop("num_steps")
        given = {name: value for name, value in run.items() if value is not None and self.takes(name)}
        given |= {name: {MODEL: model, NUM_STEPS: num_steps}.get(value, value) for name, value in self.settings.items()}
        if self.form == "outputs":
            given["loss"] = loss
        return self.cls(params, **({} if lr is None else {"lr": lr}), **given)

    def takes(self, name: str) -> bool:
        """Return whether the optimizer has a setting of this name."""
        if name == "weight_decay" and "base" in self.settings:  # handed on to it
            return True
        return name in self.named and name not in self.settings

    @property
    def takes_rate(self) -> bool:
        """Whether it can be given a learning rate."""
        return self.lr is not None or "lr" in inspect.signature(self.cls).parameters

    @property
    def named(self) -> frozenset[str]:
        """Names of its settings."""
        late = getattr(self.cls, "_late_settings", {})  # of this toolkit: what stands behind **shared
        return frozenset(inspect.signature(self.cls).parameters) | frozenset(late)


class FeedbackAndSGD(torch.optim.SGD):
    """SGD with momentum on the gradients of direct feedback, whose hooks are on the model while it trains."""

    def __init__(self, params: Iterable[Tensor], lr: float, model: nn.Module, seed: int = 0, **settings: Any) -> None:
        super().__init__(params, lr, momentum=0.9, foreach=True, **settings)
        self._model, self._seed = model, seed
        self._feedback: optimizers.DirectFeedbackAlignment | None = None

    def train(self) -> None:
        """Put the hooks on the model."""
        if self._feedback is None:
            self._feedback = optimizers.DirectFeedbackAlignment(self._model, seed=self._seed)

    def eval(self) -> None:
        """Take them off: the model has its own gradients again."""
        if self._feedback is not None:
            self._feedback.remove()
            self._feedback = None


class MuonAndAdamW(torch.optim.Optimizer):
    """torch's Muon for matrices and its AdamW for everything else, as groups of one optimizer."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2, weight_decay: float = 0.01) -> None:
        every = list(params)
        matrices, rest = [p for p in every if p.ndim == 2], [p for p in every if p.ndim != 2]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            muon = torch.optim.Muon(matrices, lr, weight_decay, adjust_lr_fn="match_rms_adamw")
            self.parts.append(muon)
        if rest:
            self.parts.append(torch.optim.AdamW(rest, lr, weight_decay=weight_decay, foreach=True))
        super().__init__(every, {"lr": lr})
        self.param_groups = [group for part in self.parts for group in part.param_groups]  # schedulers move both

    def step(self, closure: Any = None) -> Any:
        """Take a step of both."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


MODEL, NUM_STEPS = object(), object()
"""Stand for the model, and the steps that a training will take, among settings."""
_TORCH: dict[str, tuple[str, float, dict[str, Any]]] = {
    "sgd": ("SGD", 0.1, {}),
    "momentum": ("SGD", 0.03, {"momentum": 0.9}),
    "nesterov": ("SGD", 0.03, {"momentum": 0.9, "nesterov": True}),
    "asgd": ("ASGD", 0.1, {}),
    "adagrad": ("Adagrad", 0.03, {}),
    "adadelta": ("Adadelta", 1.0, {}),
    "rmsprop": ("RMSprop", 3e-3, {}),
    "rprop": ("Rprop", 3e-3, {}),
    "adam": ("Adam", 0.01, {}),
    "amsgrad": ("Adam", 0.01, {"amsgrad": True}),
    "adamax": ("Adamax", 0.01, {}),
    "adamw": ("AdamW", 0.01, {}),
    "nadam": ("NAdam", 0.01, {}),
    "radam": ("RAdam", 0.01, {}),
    "adafactor": ("Adafactor", 0.01, {}),
}
_OURS: dict[str, tuple[str, Form, float | None, dict[str, Any]]] = {
    "lion": ("Lion", "backward", 1e-3, {}),
    "yogi": ("Yogi", "backward", 0.01, {}),
    "sls": ("SLS", "loss", None, {}),
    "cocob": ("COCOB", "backward", None, {}),
    "learned": ("LearnedOptimizer", "backward", None, {"num_steps": NUM_STEPS}),
    "adahessian": ("AdaHessian", "loss", 0.1, {}),
    "sophia": ("Sophia", "outputs", 3e-3, {"update_first": 20}),
    "esgd": ("ESGD", "loss", 0.1, {"update_first": 20}),
    "sassha": ("SASSHA", "loss", 0.1, {"update_first": 20}),
    "soap": ("SOAP", "backward", 0.01, {}),
    "shampoo": ("Shampoo", "backward", 0.01, {}),
    "kfac": ("KFAC", "outputs", 0.01, {}),
    "ekfac": ("EKFAC", "outputs", 0.01, {}),
    "sam": ("SAM", "loss", 0.01, {"base": torch.optim.AdamW}),
    "asam": ("ASAM", "loss", 0.01, {"base": torch.optim.AdamW}),
    "gauss-newton": ("GaussNewton", "outputs", None, {}),
    "natural-gradient": ("NaturalGradient", "outputs", 0.3, {}),
    "newton-cg": ("NewtonCG", "loss", None, {}),
    "trust-region": ("TrustRegionNewton", "loss", None, {}),
    "cubic-newton": ("CubicNewton", "loss", None, {}),
    "saddle-free": ("SaddleFreeNewton", "loss", None, {}),
    "sketchy-newton": ("SketchyNewton", "loss", 0.1, {}),
    "ss-broyden": ("SSBroyden", "loss", None, {"iterations": 1}),
    "levenberg-marquardt": ("LevenbergMarquardt", "residuals", None, {}),
    "forward-gradient": ("ForwardGradient", "loss", 1e-3, {"base": torch.optim.SGD}),
    "forward-activities": ("ForwardGradient", "outputs", 0.01, {"base": torch.optim.SGD, "activities_of": MODEL}),
}
_PEERS: dict[str, tuple[str, str, float | None, dict[str, Any]]] = {
    "schedule-free": ("schedulefree", "AdamWScheduleFree", 0.01, {}),
    "prodigy": ("prodigyopt", "Prodigy", None, {}),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "first-order": (
        "sgd",
        "momentum",
        "nesterov",
        "adagrad",
        "rmsprop",
        "adam",
        "adamw",
        "nadam",
        "radam",
        "amsgrad",
        "yogi",
        "lion",
    ),
    "no-rate": ("sls", "cocob", "learned", "prodigy"),
    "no-backprop": ("forward-gradient", "forward-activities", "direct-feedback"),
    "curvature": ("adahessian", "sophia", "sassha", "soap", "shampoo", "kfac", "ekfac", "gauss-newton"),
    "sharpness-aware": ("sam", "asam", "sassha"),
    "newton": ("lbfgs", "newton-cg", "trust-region", "cubic-newton", "saddle-free"),
}
"""Names that stand for several; those that are not installed are left out of them."""


@functools.cache
def _kinds() -> dict[str, Kind]:
    """Return all that are there."""
    found: dict[str, Kind] = {}
    for name, (cls, lr, settings) in _TORCH.items():
        fast = {"foreach": True} if "foreach" in inspect.signature(getattr(torch.optim, cls)).parameters else {}
        said = "".join(f", {key} {value}" for key, value in settings.items() if value is not True)
        said += "".join(f", {key}" for key, value in settings.items() if value is True)
        found[name] = Kind(f"torch {cls}{said}", "backward", getattr(torch.optim, cls), lr, {**settings, **fast})
    if hasattr(torch.optim, "Muon"):
        found["muon"] = Kind("torch Muon for matrices, AdamW for the rest", "backward", MuonAndAdamW, 0.01)
    wolfe = {"line_search_fn": "strong_wolfe", "max_iter": 10}
    found["lbfgs"] = Kind("torch LBFGS, strong Wolfe, 10 iterations a step", "closure", torch.optim.LBFGS, None, wolfe)
    for name, (cls, form, rate, settings) in _OURS.items():
        if hasattr(optimizers, cls):
            of = f" of {settings['base'].__name__}" if "base" in settings else ""
            of += ", activities perturbed" if "activities_of" in settings else ""
            found[name] = Kind(f"torch-curvature {cls}{of}", form, getattr(optimizers, cls), rate, settings)
    found["direct-feedback"] = Kind("torch SGD, momentum 0.9, on direct feedback", "backward", FeedbackAndSGD, 0.03)
    for name, (library, cls, rate, settings) in _PEERS.items():
        if importlib.util.find_spec(library) is not None:
            made = getattr(importlib.import_module(library), cls)
            found[name] = Kind(f"{library} {cls}", "backward", made, rate, settings)
    return found


def kind_of(name: str) -> Kind:
    """Return the optimizer of a name, or of "file.py:make" or "package.module:make": a class, or f(params, lr).

    Raises:
        InputError: for a name that nothing is known of, or a library that is not installed.
    """
    if ":" in name:
        return Kind(name, "backward", function_of(name), 0.01)
    known = _kinds()
    if name in known:
        return known[name]
    if name in _PEERS:
        raise InputError(f"{name} is of {_PEERS[name][0]}, which is not installed: pip install {_PEERS[name][0]}.")
    near = difflib.get_close_matches(name, [*known, *GROUPS], n=2, cutoff=0.5)
    hint = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise InputError(
        f"there is no optimizer {name!r}{hint}; there are {', '.join(known)}; groups {', '.join(GROUPS)}; or give "
        "file.py:make, a function of (params, lr)."
    )


def names_of(given: Iterable[str]) -> tuple[str, ...]:
    """Return names with groups spelled out, each once."""
    known = _kinds()
    names = [n for name in given for n in GROUPS.get(name, (name,)) if name not in GROUPS or n in known]
    return tuple(dict.fromkeys(names))
