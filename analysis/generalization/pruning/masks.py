"""Masks, and the sub-network that a mask leaves: its kept weights are the parameters, the others are not there.

A mask is a dict from parameter names to boolean tensors, True where a weight is kept; parameters that it does not name
are kept whole. `sparse_model` stores the kept weights of each masked tensor as one vector and builds the tensor from it
in every forward pass. Nothing that trains or measures can then move a pruned weight: no weight decay, no momentum, no
noise; and products, diagonals and eigenpairs are those of the sub-network, since its parameters are all there is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from analysis.generalization.suited import copy_of
from curvature.arguments import checked
from curvature.errors import InputError, ParameterSelectionError

__all__ = ["Masks", "dense_model", "masks_of", "sparse_model"]

Masks: TypeAlias = Mapping[str, Tensor]
"""Parameter name -> boolean tensor of its shape, True where kept."""


class Kept(nn.Module):
    """A tensor of zeros with the kept weights, a vector, in their places."""

    places: Tensor
    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask.clone())
        self.register_buffer("places", _places(mask), persistent=False)

    def forward(self, values: Tensor) -> Tensor:
        """Return the tensor of these kept weights."""
        return torch.cat([values, values.new_zeros(1)]).index_select(0, self.places).view(self.mask.shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Return the kept weights of a tensor."""
        return weight[self.mask]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        mask, errors = state_dict.get(f"{prefix}mask"), others[-1]
        if isinstance(mask, Tensor) and mask.shape == self.mask.shape and mask.sum() != self.mask.sum():
            errors.append(
                f"{prefix}mask keeps {int(mask.sum())} weights and the model's {int(self.mask.sum())}: make the model "
                "again, sparse_model with the masks of the state."
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *others)
        self.places = _places(self.mask)


def _places(mask: Tensor) -> Tensor:
    """Return where each entry finds its weight among those kept; a pruned one reads the zero at their end."""
    count = int(mask.sum())
    places = torch.full((mask.numel(),), count, device=mask.device)
    places[mask.flatten()] = torch.arange(count, device=mask.device)
    return places


@checked
def sparse_model(model: nn.Module, masks: Masks) -> nn.Module:
    """Return a copy of the model whose masked tensors have their kept weights as parameters.

    Every analysis, optimizer and `Objective` takes it as it is. With P the selection of the kept weights, its gradient
    is P g, its Hessian P H P', both of the dense model with zeros in the pruned places. The kept weights of `weight`
    are `parametrizations.weight.original`, (k,); where all are pruned it is empty. Normalisation
    by filter takes the kept weights of a row as one; Kronecker factors need the tensor's shape and refuse a masked
    layer with a sentence.

    Cost: a copy of the model, and an indexing of each masked tensor in every forward pass. No pass gets cheaper.

    Args:
        model: stays as it is.
        masks: parameter name -> boolean tensor of its shape, True where kept.

    Raises:
        ParameterSelectionError: for a name that is no parameter.
        InputError: for a mask of another shape or dtype; for tensors that are tied, parametrised already, or read by
            their module past its attributes (recurrent layers, scripted modules).

    Examples:
        >>> model = nn.Linear(2, 1, bias=False)
        >>> small = sparse_model(model, {"weight": torch.tensor([[True, False]])})
        >>> [tuple(p.shape) for p in small.parameters()], bool(small.weight[0, 1] == 0)
        ([(1,)], True)
    """
    _check(model, masks)
    result = copy_of(model)
    for name, mask in masks.items():
        owner, _, key = name.rpartition(".")
        module = result.get_submodule(owner)
        requires_grad = getattr(module, key).requires_grad
        kept = Kept(mask.to(getattr(module, key).device))
        if parametrize.is_parametrized(module):
            _own_class(module)
        parametrize.register_parametrization(module, key, kept, unsafe=True)  # the check wants one shape before, after
        module.get_parameter(f"parametrizations.{key}.original").requires_grad_(requires_grad)
    return result


@checked
def dense_model(model: nn.Module) -> nn.Module:
    """Return a copy of a sparse model with ordinary tensors: zeros where it was pruned, free to move again."""
    result = copy_of(model)
    for module in result.modules():
        if keys := _masked_keys(module):
            _own_class(module)
        for key in keys:
            parametrize.remove_parametrizations(module, key, leave_parametrized=True)
    return result


@checked
def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """Return the masks that a sparse model was made with, by the names of the dense model's parameters."""
    found = {}
    for path, module in model.named_modules():
        for key in _masked_keys(module):
            kept = cast("Any", module.parametrizations)[key][0]
            found[f"{path}.{key}" if path else key] = kept.mask.clone()
    return found


def _own_class(module: nn.Module) -> None:
    """Give a parametrised module a class of its own: torch edits the class, which a copy shares with its original."""
    own = {name: value for name, value in vars(type(module)).items() if name not in ("__dict__", "__weakref__")}
    module.__class__ = type(type(module).__name__, type(module).__bases__, own)


def _masked_keys(module: nn.Module) -> list[str]:
    if not parametrize.is_parametrized(module):
        return []
    lists = cast("nn.ModuleDict", module.parametrizations)
    return [key for key, parts in lists.items() if any(isinstance(part, Kept) for part in cast("nn.ModuleList", parts))]


def _check(model: nn.Module, masks: Masks) -> None:
    every = dict(model.named_parameters(remove_duplicate=False))
    for name, mask in masks.items():
        if name not in every:
            masked = [n for n in every if n.endswith(f"parametrizations.{name.rpartition('.')[2]}.original")]
            hint = " the model is sparse already: dense_model(model) first." if masked else ""
            raise ParameterSelectionError(f"masks name {name!r}, which is no parameter of the model.{hint}")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != every[name].shape:
            raise InputError(
                f"the mask of {name!r} must be boolean, of shape {tuple(every[name].shape)}, True where kept; got "
                f"{f'{mask.dtype} of shape {tuple(mask.shape)}' if isinstance(mask, Tensor) else type(mask).__name__}."
            )
        twins = [other for other, tensor in every.items() if tensor is every[name] and other != name]
        if twins:
            raise InputError(
                f"{name!r} is tied to {', '.join(twins)}: a mask on one would untie them. Leave it out, or untie first."
            )
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, (nn.RNNBase, torch.jit.ScriptModule)):
            raise InputError(
                f"{name!r} belongs to a {type(module).__name__}, which reads its weights past the module's attributes "
                "and would not see the mask; leave it out."
            )
        if hasattr(every[name], "device_mesh"):
            raise InputError(f"{name!r} lies on several ranks; masks need whole tensors: prune before sharding.")
        if parametrize.is_parametrized(module, name.rpartition(".")[2]) or ".parametrizations." in f".{name}":
            raise InputError(f"{name!r} is parametrised already; remove that first, or leave it out.")
