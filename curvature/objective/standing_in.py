"""What stands in a sharded model while it is evaluated: casts for torch's hooks, tensors for its own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from curvature.data.tensors import map_tensors

__all__ = ["fsdp_states", "has_torch_hooks", "param_dtypes", "param_groups", "place", "renew_weights", "without_hooks"]


def fsdp_states(model: nn.Module) -> dict[nn.Module, Any]:
    """Return FSDP2's state of every module that it wraps."""
    return {m: m._get_fsdp_state() for m in model.modules() if callable(getattr(m, "_get_fsdp_state", None))}  # type: ignore[operator] # a method of FSDP's


def param_groups(model: nn.Module) -> list[Any]:
    """Return FSDP2's groups of parameters: a list of every module it wraps, in older torch one or none of each."""
    groups: list[Any] = []
    for state in fsdp_states(model).values():
        several = getattr(state, "_fsdp_param_groups", None)
        groups += [state._fsdp_param_group] if several is None else several
    return [group for group in groups if group is not None]


def has_torch_hooks(model: nn.Module) -> bool:
    """Whether modules have hooks of torch's that gather parameters or split activations."""
    return any(_is_of_torch(hook) for store in _stores(model) for hook in store.values())


def _stores(model: nn.Module) -> list[dict[int, Any]]:
    return [store for m in model.modules() for store in (m._forward_pre_hooks, m._forward_hooks)]


def _is_of_torch(hook: Any) -> bool:
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed")


@contextlib.contextmanager
def without_hooks(model: nn.Module) -> Iterator[None]:
    """Leave torch's hooks out inside the context; their casts to lower precision are made in the graph."""
    kept = [(store, dict(store)) for store in _stores(model) if store]
    handles: list[Any] = []
    try:
        for store, _ in kept:
            for handle in [i for i, hook in store.items() if _is_of_torch(hook)]:
                del store[handle]
        for module, state in fsdp_states(model).items():
            handles += _casting(module, state._mp_policy)
        yield
    finally:
        for handle in handles:
            handle.remove()
        for store, before in kept:
            store.clear()
            store.update(before)


def place(module: nn.Module, key: str, value: Any) -> None:
    """Put a tensor in the place of a module's parameter."""
    module._parameters[key] = value
    renew_weights(module)


def renew_weights(module: nn.Module) -> None:
    """Have a recurrent network run with the parameters that it holds: it keeps a list of them."""
    if isinstance(module, nn.RNNBase):
        found = [module._parameters.get(name) for name in module._flat_weights_names]
        module._flat_weights = found  # not by setattr, which takes no casts


def param_dtypes(model: nn.Module) -> dict[nn.Module, torch.dtype]:
    """Return the dtype that FSDP2 casts the parameters of each module to, by the innermost wrapped one around it."""
    states = fsdp_states(model)
    found: dict[nn.Module, torch.dtype | None] = {}
    for path, module in model.named_modules():
        parent = found.get(model.get_submodule(path.rpartition(".")[0])) if path else None
        found[module] = states[module]._mp_policy.param_dtype if module in states else parent
    return {module: dtype for module, dtype in found.items() if dtype is not None}


def _casting(module: nn.Module, policy: Any) -> list[Any]:
    """Register the casts of inputs and outputs that FSDP2's own hooks make; return the handles."""
    handles: list[Any] = []
    if policy.cast_forward_inputs and policy.param_dtype is not None:
        handles.append(
            module.register_forward_pre_hook(
                lambda _, args, kwargs: _cast((args, kwargs), policy.param_dtype), prepend=True, with_kwargs=True
            )
        )
    if policy.output_dtype is not None:
        handles.append(module.register_forward_hook(lambda _, __, outputs: _cast(outputs, policy.output_dtype)))
    return handles


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return map_tensors(values, lambda t: t.to(dtype) if t.is_floating_point() else t)
