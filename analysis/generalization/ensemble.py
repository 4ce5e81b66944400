"""Networks of one shape, trained side by side: repeats of one training share every matrix product.

The members differ in their parameters, the order of their batches and, where there are several, their labels; what an
optimizer does entry by entry it does to a stack of them as to each alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from analysis.generalization.suited import copy_of
from analysis.training.loop import initialise
from curvature.data.random_states import random_states_kept
from curvature.environment.cost import timed
from curvature.errors import InputError

__all__ = ["Ensemble", "Fit", "Recipe", "device_of", "fresh", "seconds_of_step"]

_ENTRYWISE = (
    nn.Tanh,
    nn.ReLU,
    nn.GELU,
    nn.SiLU,
    nn.Sigmoid,
    nn.ELU,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Identity,
    nn.Dropout,
)

_STEPS = 10  # that are timed

Loss = Callable[[Tensor, Tensor], Tensor]


def fresh(model: nn.Module, seed: int) -> nn.Module:
    """Return a copy of a model in train mode whose parameters are drawn anew, by a seed: the same on any device."""
    made, device = copy_of(model).cpu(), device_of(model)
    with random_states_kept():
        torch.manual_seed(seed)
        try:
            initialise(made)
        except InputError as error:
            cause = str(error).partition(";")[0]
            raise InputError(
                f"these networks start from parameters that are drawn anew, and {cause}; give it one, or leave "
                "parametrisations and other modules without one out of the model."
            ) from error
    return made.to(device).train()


def device_of(model: nn.Module) -> torch.device:
    """Return where the first parameter of a model lies."""
    return next(model.parameters()).device


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train."""

    steps: int
    lr: float
    optimizer: Literal["adam", "sgd"] = "adam"
    batch_size: int | None = None
    """In examples; None takes all at once."""
    weight_decay: float = 0.0
    """Of the optimizer; Adam's is decoupled."""
    rho: float = 0.0
    """Radius of sharpness-aware minimisation; 0 is none."""
    decay: bool = True
    """Whether the rate falls to a hundredth along half a cosine."""


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How well each member does on some data."""

    loss: Tensor
    """(R,), the mean over examples."""
    error: Tensor
    """(R,), share of examples whose largest output is another class."""


class Ensemble:
    """R copies of a model, each with parameters drawn by a seed of its own, where the model is.

    Args:
        model: whose modules can draw their parameters.
        seeds: of the members.

    Raises:
        InputError: for a module that cannot draw its parameters, or a model that does not run under vmap.
    """

    def __init__(self, model: nn.Module, seeds: Sequence[int]) -> None:
        made = [fresh(model, seed) for seed in seeds]
        self.seeds = tuple(seeds)
        self.params, self.buffers = stack_module_state(made)
        self.params = {name: value.detach().clone().requires_grad_() for name, value in self.params.items()}
        self._layers = _layers(made[0])
        kinds = nn.modules.conv._ConvNd
        self._one_by_one = any(isinstance(m, kinds) for m in made[0].modules())  # grouped convolutions are slower
        self.device = device_of(made[0])
        self._base, self._whole = made[0], copy.deepcopy(made[0])  # functional_call leaves tied parameters changed

    def __len__(self) -> int:
        return len(self.seeds)

    def outputs(self, inputs: Tensor, *, train: bool = False) -> Tensor:
        """Return the outputs (R, N, C) on inputs that all share (N, ...), or each its own, (R, N, ...), in train."""
        self._base.train(train)
        if self._layers is not None:
            return self._through_layers(inputs if train else inputs.expand(len(self), *inputs.shape))
        if self._one_by_one:
            return torch.stack([self._of_member(i, inputs[i] if train else inputs) for i in range(len(self))])

        def of_one(params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor) -> Any:
            return functional_call(self._base, (params, buffers), (x,))

        own = 0 if train else None
        try:
            found = vmap(of_one, in_dims=(0, 0, own), randomness="different")(self.params, self.buffers, inputs)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"{type(self._base).__name__} does not run for several members at once under torch.vmap "
                f"({' '.join(str(error).split())[:200]}); give a model without data-dependent control flow."
            ) from error
        return cast("Tensor", found)

    def _of_member(self, i: int, x: Tensor) -> Tensor:
        params, buffers = ({name: t[i] for name, t in held.items()} for held in (self.params, self.buffers))
        return cast("Tensor", functional_call(self._base, (params, buffers), (x,)))

    def _through_layers(self, x: Tensor) -> Tensor:
        """Return what vmap would of a chain of linear layers, in half the time where these are small."""
        assert self._layers is not None
        for name, layer in self._layers:
            if isinstance(layer, nn.Flatten):
                x = x.flatten(2)
            elif isinstance(layer, nn.Linear):
                weight, bias = self.params[f"{name}.weight"].mT, self.params.get(f"{name}.bias")
                x = torch.bmm(x, weight) if bias is None else torch.baddbmm(bias[:, None], x, weight)
            else:
                x = layer(x)
        return x

    def losses(self, loss: Loss, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return the loss of each member, (R,), of outputs (R, N, C) and targets (R, N)."""
        plain = type(loss) is nn.CrossEntropyLoss and vars(loss) | vars(nn.CrossEntropyLoss()) == vars(loss)
        if loss is F.cross_entropy or plain:
            R, N, _ = outputs.shape
            each = F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none")
            return each.reshape(R, N).sum(dim=1) / (targets != -100).sum(dim=1)  # torch's ignore_index
        return vmap(loss)(outputs, targets)

    @property
    def num_params(self) -> int:
        """Number of parameters of one member."""
        return sum(p[0].numel() for p in self.params.values())

    def norms(self) -> Tensor:
        """Return the Euclidean norm of each member's parameters, (R,)."""
        return _norms([p.detach() for p in self.params.values()])

    def gradient_norms(self, loss: Loss, inputs: Tensor, labels: Tensor) -> Tensor:
        """Return the norm of each member's gradient, in eval mode, (R,); inputs (N, ...), labels (R, N)."""
        total = self.losses(loss, self.outputs(inputs), labels).sum()
        return _norms(torch.autograd.grad(total, list(self.params.values())))

    def member(self, index: int) -> nn.Module:
        """Return one member as a model of its own, in eval mode."""
        model = copy.deepcopy(self._whole)
        with torch.no_grad():  # by name, not by a state dict: that holds tied tensors twice, and not all buffers
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                tensor.copy_((self.params if name in self.params else self.buffers)[name][index])
        return model.eval()

    @torch.no_grad()
    def fit(self, loss: Loss, inputs: Tensor, labels: Tensor) -> Fit:
        """Return loss and error of each member on inputs (N, ...) with labels (N,) or (R, N), in eval mode."""
        outputs = self.outputs(inputs)
        labels = labels.expand(len(self), -1)
        wrong = (outputs.argmax(dim=2) != labels).double().mean(dim=1)
        wrong = torch.where(outputs.isfinite().all(dim=2).all(dim=1), wrong, math.nan)
        return Fit(loss=self.losses(loss, outputs, labels).double(), error=wrong)

    def train(
        self,
        loss: Loss,
        inputs: Tensor,
        labels: Tensor,
        recipe: Recipe,
        *,
        change: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        each: Callable[[int], bool] | None = None,
    ) -> int:
        """Train all members and return the steps taken.

        Args:
            loss: of one member's outputs (N, C) and labels (N,).
            inputs: (N, ...), of all, on the members' device.
            labels: (N,) or (R, N), there too.
            recipe: how.
            change: what is done to the inputs of a batch, such as a shift, by a generator on the CPU.
            each: told the number of steps taken, 0 first; training ends where it returns True.
        """
        R, N = len(self), labels.shape[-1]
        inputs, labels = inputs.expand(R, *inputs.shape), labels.expand(R, N)
        size = min(N, recipe.batch_size or N)
        orders = [torch.Generator().manual_seed(seed) for seed in self.seeds]
        params = list(self.params.values())
        optimizer = _optimizer(params, recipe)
        rows = torch.arange(R, device=self.device)[:, None]
        queue = torch.empty(R, 0, dtype=torch.int64)
        with random_states_kept():
            torch.manual_seed(self.seeds[0])  # dropout
            for step in range(recipe.steps):
                if each is not None and each(step):
                    return step
                x, y = inputs, labels
                if size < N:
                    if queue.shape[1] < size:
                        queue = torch.stack([torch.randperm(N, generator=g) for g in orders])
                    places, queue = queue[:, :size].to(self.device), queue[:, size:]
                    x, y = inputs[rows, places], labels[rows, places]
                if change is not None:
                    x = torch.stack([change(part, g) for part, g in zip(x, orders, strict=True)])
                if recipe.decay:
                    share = 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
                    optimizer.param_groups[0]["lr"] = recipe.lr * (0.01 + 0.99 * share)
                self._step(optimizer, params, loss, x, y, recipe.rho)
        if each is not None:
            each(recipe.steps)
        return recipe.steps

    def _step(
        self, optimizer: torch.optim.Optimizer, params: list[Tensor], loss: Loss, x: Tensor, y: Tensor, rho: float
    ) -> None:
        def gradients() -> tuple[Tensor, ...]:
            total = self.losses(loss, self.outputs(x, train=True), y).sum()  # each member's gradient is that of its own
            return torch.autograd.grad(total, params)

        found = gradients()
        if rho > 0:
            norm = _norms(found).to(found[0].dtype).clamp_min(1e-30)
            moves = [rho * g / norm.reshape(-1, *[1] * (g.ndim - 1)) for g in found]
            with torch.no_grad():
                torch._foreach_add_(params, moves)
            found = gradients()
            with torch.no_grad():
                torch._foreach_sub_(params, moves)
        for p, g in zip(params, found, strict=True):
            p.grad = g
        optimizer.step()
        optimizer.zero_grad()


def seconds_of_step(ensemble: Ensemble, loss: Loss, inputs: Tensor, labels: Tensor, plan: Any) -> float:
    """Return what a step of a training takes; it moves the members."""
    for steps in (2, _STEPS):  # the first ones warm up
        recipe = Recipe(steps=steps, lr=plan.lr, optimizer=plan.optimizer, batch_size=plan.batch_size)
        _, seconds = timed(partial(ensemble.train, loss, inputs, labels, recipe), ensemble.device)
    return seconds / _STEPS


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]] | None:
    """Return the layers of a chain of linear ones with functions of single entries between; None of other models."""
    chains = {name for name, m in model.named_modules() if type(m) is nn.Sequential}
    leaves = [(name, m) for name, m in model.named_modules() if name not in chains]
    inside = all("".join(name.rpartition(".")[:1]) in chains for name, _ in leaves)
    repeated = sum(len(m) for m in model.modules() if type(m) is nn.Sequential) != len(leaves) + len(chains) - 1
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if "" not in chains or not inside or repeated or hooked:
        return None
    plain = all(
        type(m) in (nn.Linear, *_ENTRYWISE) or (type(m) is nn.Flatten and m.start_dim == 1 and m.end_dim == -1)
        for _, m in leaves
    )
    return leaves if plain else None


def _norms(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([t.double().flatten(1).square().sum(1) for t in tensors]).sum(0).sqrt()


def _optimizer(params: list[Tensor], recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimizer == "adam":
        return torch.optim.AdamW(params, lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(params, lr=recipe.lr, momentum=0.9, weight_decay=recipe.weight_decay)
