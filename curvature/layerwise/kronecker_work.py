"""Inputs of layers, and loss columns at their outputs, of one batch after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvature.autograd.backward import no_autocast, pull_back
from curvature.engine.linearize import Linearization
from curvature.errors import InputError
from curvature.layerwise.loss_root import LossRoot, UnsupportedError, loss_root
from curvature.objective.objective import Objective
from curvature.objective.refusals import refuse_coupling
from curvature.parameters import ROOT
from curvature.per_example.tolerances import coarsest_eps, tolerance

__all__ = ["KroneckerKind", "KroneckerWork", "LayerUse"]

KroneckerKind = Literal["kflr", "kfac", "kfra"]
_Calls = list[list[tuple[Tensor, GradientEdge | None]]]
"""By layer and call: its input, and where its output lies in the graph."""
_Gradients = Sequence[Tensor | None]
_ACTIVATIONS = (nn.ReLU, nn.Tanh, nn.Sigmoid)


@dataclass(frozen=True)
class LayerUse:
    """A layer that gets factors."""

    name: str
    module: nn.Module
    weight: str | None
    bias: str | None
    num_inputs: int
    num_outputs: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of its parameters, the weight first."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Of what is summed over the data: columns, second and first moment of inputs, positions and examples."""
        return self.num_outputs**2, self.num_inputs**2, self.num_inputs, 2

    def inputs(self, x: Tensor) -> Tensor:
        """Return the layer's inputs at all positions of all examples, (N T, i)."""
        if isinstance(self.module, nn.Conv2d):
            conv = self.module
            padding = conv._reversed_padding_repeated_twice
            mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
            patches = F.unfold(F.pad(x, padding, mode=mode), conv.kernel_size, conv.dilation, 0, conv.stride)
            return patches.mT.reshape(-1, self.num_inputs)
        return x.reshape(-1, self.num_inputs)

    def outputs(self, d: Tensor) -> Tensor:
        """Return what arrives at the layer's outputs at all positions of all examples, (N T, o)."""
        return (d.movedim(1, -1) if isinstance(self.module, nn.Conv2d) else d).reshape(-1, self.num_outputs)


class KroneckerWork:
    """Sums over one batch."""

    def __init__(
        self,
        objective: Objective,
        kind: KroneckerKind,
        mc_samples: int,
        generator: torch.Generator | None,
        max_columns: int | None,
    ) -> None:
        self.objective, self.kind, self.generator = objective, kind, generator
        self.mc_samples, self.max_columns = mc_samples, max_columns
        self.num_columns = 0
        self.uses, self.uncovered = layer_uses(objective)
        if not self.uses:
            why = "; ".join(f"{name}: {reason}" for name, reason in list(self.uncovered.items())[:3])
            raise InputError(f"no layer has Kronecker factors ({why}); exact_diagonal serves all layers.")
        self._chain = _chain_of(objective) if kind == "kfra" else []

    def of_batch(self, lin: Linearization) -> Tensor:
        """Return the sums of one batch, flat, divided by its weight as far as they do not depend on it."""
        if lin.weight == 0:
            sizes = [size for use in self.uses for size in use.sizes]
            return torch.zeros(sum(sizes), dtype=self.objective.dtype, device=self.objective.device)
        if len(lin.batch_outputs().outputs) > 1:
            refuse_coupling(self.objective, lin.batch, lin.index)
        return torch.cat([p.reshape(-1).to(self.objective.dtype) for p in self._sums(lin)])

    def _sums(self, lin: Linearization) -> list[Tensor]:
        evaluator, rule = self.objective.evaluator, self.objective.rule
        assert rule is not None
        parts: list[Tensor] = []
        with (
            evaluator.session(evaluator.copy_buffers(), evaluator.corrected_layers()),
            contextlib.ExitStack() as autocast_off,
        ):
            with _captured(self.uses) as calls:
                evaluation = evaluator.evaluate(lin.batch, lin.index)
            outputs: Any = evaluation.outputs
            for use, call in zip(self.uses, calls, strict=True):
                if len(call) > 1:
                    raise InputError(
                        f"layer {use.name!r} is called {len(call)} times in a forward pass, for which factors are not "
                        "defined; leave it out by params=, or use exact_diagonal or GGNOperator."
                    )
            autocast_off.enter_context(no_autocast(self.objective.device))
            root = loss_root_of_examples(rule, outputs, evaluation.targets, self.kind)
            dtype = self.objective.dtype  # that of activations may be narrower, by autocast
            S = [torch.zeros(u.num_outputs, u.num_outputs, dtype=dtype, device=outputs.device) for u in self.uses]
            reached = [k for k, call in enumerate(calls) if call and call[0][1] is not None]
            if self.kind == "kfra":
                of_layer = self._propagate(lin, root)
                S, reached = [of_layer[id(use.module)].detach().to(dtype) for use in self.uses], []
            for i, (column, sign) in enumerate(self._columns(root) if self.kind != "kfra" else ()):
                places: Any = [calls[k][0][1] for k in reached]
                if not outputs.requires_grad:
                    continue
                if i == 0:
                    places += [self.objective.space.tensors[name] for use in self.uses for name in use.names]
                arrived = pull_back([outputs], places, [column.to(outputs.dtype)])
                if i == 0:
                    self._refuse_other_uses(calls, dict(zip(reached, arrived, strict=False)), arrived[len(reached) :])
                for k, d in zip(reached, arrived, strict=False):
                    if d is not None:
                        D = self.uses[k].outputs(d).to(dtype)
                        S[k].addmm_(D.T, D, alpha=sign)
        examples = outputs.shape[0]
        for use, call, s in zip(self.uses, calls, S, strict=True):
            a = use.inputs(call[0][0]) if call else outputs.new_zeros(examples, use.num_inputs)
            a = a.to(dtype)
            counts = a.new_tensor([len(a), examples])
            parts += [s, *(p / lin.weight for p in (a.T @ a, a.sum(0), counts))]
        return parts

    def _refuse_other_uses(self, calls: _Calls, arrived: dict[int, Tensor | None], gradients: _Gradients) -> None:
        """Compare what a column gives the parameters by their layers' calls with what autograd gives them.

        Raises:
            InputError: with the layer, if it has a part in the outputs by other ways than one call of it.
        """
        rest = iter(gradients)
        for k, use in enumerate(self.uses):
            own, d = [next(rest) for _ in use.names], arrived.get(k)
            D = None if d is None else use.outputs(d)
            size = gap = 0.0
            for name, g in zip(use.names, own, strict=True):
                if g is None:
                    continue
                by_call = torch.zeros_like(g)
                if D is not None:
                    found = D.T @ use.inputs(calls[k][0][0]).to(D.dtype) if name == use.weight else D.sum(0)
                    by_call = found.view(g.shape)
                size += float(g.double().square().sum())
                gap += float((g - by_call).double().square().sum())
            eps = coarsest_eps(d, *(self.objective.space.tensors[name] for name in use.names))
            if gap > (tolerance(1e4 * eps) ** 2) * size:
                raise InputError(
                    f"layer {use.name!r} has a part in the outputs by other ways than a call of its module (its weight "
                    "in a function, module.forward, a hook on what it returns), for which factors are not defined; "
                    "leave it out by params=, or use exact_diagonal or GGNOperator."
                )

    def _columns(self, root: LossRoot) -> Iterator[tuple[Tensor, float]]:
        """Yield columns of all examples, (N, ...), and their weights."""
        if self.kind == "kfac":
            assert self.generator is not None
            assert self.objective.rule is not None
            for _ in range(self.mc_samples):
                draw = root.draw("fisher-mc" if self.objective.rule.closed_form else "ggn-mc", self.generator)
                yield from ((column, sign / self.mc_samples) for column, sign in draw)
            self.num_columns += self.mc_samples
            return
        if self.max_columns is not None and root.num_columns > self.max_columns:
            raise InputError(
                f"kind='kflr' takes {root.num_columns} columns of every example, about as many gradients, and "
                f"max_columns={self.max_columns}; kind='kfac' takes mc_samples of them; max_columns=None computes "
                "it all the same."
            )
        for start, stop, sign in root.bounds(1):
            yield root.columns(start, stop)[0], sign
        self.num_columns += root.num_columns

    def _propagate(self, lin: Linearization, root: LossRoot) -> dict[int, Tensor]:
        """Return by module the matrices of Botev et al., from the outputs down: W'H W, and H o mean_n s'(z) s'(z)'."""
        flat = root.columns(0, root.num_columns).flatten(2)
        signs = flat.new_ones(root.num_columns)
        signs[root.num_positive :] = -1
        H = torch.einsum("v,vni,vnj->ij", signs, flat, flat)
        self.num_columns += root.num_columns
        z, inputs = lin.batch[0], []
        for layer in self._chain:
            inputs.append(z.detach())
            z = layer(z)
        found = {}
        for layer, z in zip(reversed(self._chain), reversed(inputs), strict=True):
            if z.ndim != 2 and not isinstance(layer, nn.Flatten):
                raise InputError("kind='kfra' takes layers that work on vectors; kind='kflr' serves others.")
            if isinstance(layer, nn.Linear):
                found[id(layer)] = H
                H = layer.weight.T @ H @ layer.weight
            elif isinstance(layer, _ACTIVATIONS):
                with torch.enable_grad():
                    leaf = z.requires_grad_()
                    (slope,) = torch.autograd.grad(layer(leaf).sum(), leaf)
                H = H * (slope.T @ slope / len(slope))
        return found


def loss_root_of_examples(rule: Any, outputs: Any, targets: Any, kind: str) -> LossRoot:
    """Return the root of the loss.

    Raises:
        InputError: if outputs are not one tensor, or the loss couples examples.
    """
    if not isinstance(outputs, Tensor) or outputs.ndim == 0:
        raise InputError(
            f"the outputs must be one tensor whose first dimension counts examples, got {type(outputs).__name__}; "
            "pass forward= that picks it."
        )
    try:
        return loss_root(rule, outputs, targets)
    except UnsupportedError as error:
        raise InputError(f"kind={kind!r} sums over examples, and {error}; use GGNOperator.") from error


def layer_uses(objective: Objective) -> tuple[list[LayerUse], dict[str, str]]:
    """Return the layers that get factors, and the parameters that get none, with the reason."""
    if objective.shards is not None:
        raise InputError(
            "Kronecker factors are those of layers that a rank holds whole, and this model lies in parts on several "
            "ranks: take exact_diagonal, or build them before it is sharded."
        )
    names = {id(tensor): name for name, tensor in objective.space.tensors.items()}
    holders: dict[int, int] = {}
    for module in objective.model.modules():
        for p in module.parameters(recurse=False):
            holders[id(p)] = holders.get(id(p), 0) + 1
    uses: list[LayerUse] = []
    uncovered: dict[str, str] = {}
    for module_name, module in objective.model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) in names}
        why = None
        if type(module) not in (nn.Linear, nn.Conv2d):
            why = f"belongs to a {type(module).__name__}, and factors are those of nn.Linear and nn.Conv2d"
        elif any(holders[id(p)] > 1 for p in own.values()):
            why = "is shared by several modules"
        elif isinstance(module, nn.Conv2d) and module.groups != 1:
            why = f"belongs to a convolution in {module.groups} groups"
        if why is not None:
            uncovered |= {names[id(p)]: why for p in own.values()}
            continue
        why = "is no weight or bias of its layer, but what one is made of (pruned?) or beside them"
        uncovered |= {names[id(p)]: why for key, p in own.items() if key not in ("weight", "bias")}
        own = {key: p for key, p in own.items() if key in ("weight", "bias")}
        if own:
            assert isinstance(module, (nn.Linear, nn.Conv2d))
            weight, bias = (names[id(own[key])] if key in own else None for key in ("weight", "bias"))
            shape = module.weight.shape
            uses.append(LayerUse(module_name or ROOT, module, weight, bias, shape[1:].numel(), shape[0]))
    held = {id(p) for p in objective.model.parameters()}
    uncovered |= {name: "is not a parameter of the model" for key, name in names.items() if key not in held}
    return uses, uncovered


def _chain_of(objective: Objective) -> list[nn.Module]:
    """Return the layers of a model that is a chain of linear layers and activations, for KFRA.

    Raises:
        InputError: at the first layer that is another.
    """
    if objective.evaluator.forward is not None:
        raise InputError("kind='kfra' takes models that are fed as model(inputs), without forward=; kind='kflr' any.")
    chain: list[nn.Module] = []

    def collect(name: str, module: nn.Module) -> None:
        if module._forward_hooks or module._forward_pre_hooks:
            raise InputError(
                f"kind='kfra' takes layers without hooks on their forward pass, and {name or ROOT!r} has some; "
                "take kind='kflr'."
            )
        if type(module) is nn.Sequential:
            for key, child in module.named_children():
                collect(f"{name}.{key}" if name else key, child)
        elif type(module) in (nn.Linear, *_ACTIVATIONS, nn.Flatten, nn.Identity) or (
            type(module) is nn.Dropout and not module.training
        ):
            chain.append(module)
        else:
            raise InputError(
                f"kind='kfra' takes chains of nn.Linear with ReLU, Tanh or Sigmoid: layer {name or ROOT!r} is a "
                f"{type(module).__name__}; kind='kflr' or 'kfac' serves any nn.Linear and nn.Conv2d."
            )

    collect("", objective.model)
    return chain


@contextlib.contextmanager
def _captured(uses: list[LayerUse]) -> Iterator[_Calls]:
    """Collect inputs of every call of the layers, and where in the graph its output is before anything changes it."""
    calls: _Calls = [[] for _ in uses]
    with contextlib.ExitStack() as stack:
        for use, call in zip(uses, calls, strict=True):

            def note(_: Any, arguments: Any, keywords: Any, output: Tensor, call: Any = call) -> None:
                x = arguments[0] if arguments else keywords["input"]
                call.append((x.detach(), get_gradient_edge(output) if output.requires_grad else None))

            stack.callback(use.module.register_forward_hook(note, prepend=True, with_kwargs=True).remove)
        yield calls
