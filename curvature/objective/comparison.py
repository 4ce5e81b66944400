"""Sharded models are followed to their present point, and compared once with their own forward and backward pass.

What is differentiated is the plain model, or one whose modules run one at a time. Either is right only if it is the
model that the user trains: its loss must be the same, and, module by module, its gradient, as a tensor that reaches a
module otherwise than through its arguments would be taken for a constant there. Torch's own first derivative is right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.data.tensors import move_batch, tensors_in
from curvature.engine.evaluation import Evaluator
from curvature.errors import CheckFailedError, InputError
from curvature.fingerprints.portable import content
from curvature.objective.by_module import gradient_of_batch
from curvature.objective.interface import ObjectiveLike
from curvature.objective.shards import Shards, is_part
from curvature.objective.standing_in import fsdp_states, has_torch_hooks, param_groups
from curvature.sharding.collectives import all_reduce, explained

__all__ = ["follow"]

_Known = tuple[Any, Callable[[], Any], Callable[[], Any]]
_COMPARED: weakref.WeakKeyDictionary[nn.Module, list[_Known]] = weakref.WeakKeyDictionary()
"""Models -> (route, parameters, modes), forward and loss that were compared with their own."""


def follow(objective: ObjectiveLike, *, moved: bool) -> bool:
    """Gather anew if the parameters moved on any rank; all ranks look together. Say whether they did.

    Raises:
        RankError: if ranks that must hold the same data do not.
        CheckFailedError: where the model is not what it is by its own forward and backward pass.
        InputError: where that cannot be had.
    """
    shards, ranks = objective.shards, objective.ranks
    assert shards is not None
    assert ranks is not None
    if shards.pinned and objective.may_keep_graphs:
        raise InputError(
            "away from its point, a model in parts is evaluated by an objective that keeps no graphs: use loss_at "
            "and gradient_at, or objective.replace(keep_graphs=False)."
        )
    if ranks.everywhere(shards.pinned or not (moved or shards.stale()), "a look at the parameters"):
        return False
    shards.gather()
    batch = next((batch for _, _, batch in objective.source), None)
    ranks.agree("reading the first batch")
    if shards.data is None or shards.data.size() < shards.group.size():
        place = 0 if shards.data is None else shards.data.rank()
        ranks.same_data(place, content(tensors_in(batch)))
    if not ranks.everywhere(_is_known(objective), "a look at what was compared"):
        batch = _lent(objective, batch)
        if batch is not None:
            _compare(objective, shards, move_batch(batch, objective.device))
    return True


def _key(objective: ObjectiveLike, shards: Shards) -> Any:
    modes = tuple(module.training for module in objective.model.modules())
    return shards.by_module, tuple(objective._space.names) if shards.by_module else (), modes


def _is_known(objective: ObjectiveLike) -> bool:
    shards, evaluator = objective.shards, objective.evaluator
    assert shards is not None
    if not (shards.by_module or has_torch_hooks(shards.model)):
        return True
    loss = None if evaluator.rule is None else evaluator.rule.loss
    return any(
        key == _key(objective, shards) and forward() is evaluator.forward and criterion() is loss
        for key, forward, criterion in _COMPARED.get(shards.model, [])
    )


def _reference(value: Any) -> Callable[[], Any]:
    """Return a weak reference; to what has none, and what is gone, one that is like nothing."""
    if value is None:
        return lambda: None
    try:
        found = weakref.ref(value)
    except TypeError:
        return object
    return lambda: _or_nothing(found())


def _or_nothing(value: Any) -> Any:
    return object() if value is None else value


def _lent(objective: ObjectiveLike, batch: Any) -> Any:
    """Return this rank's batch, or that of another rank where it has none; None where no rank has one."""
    ranks = objective.ranks
    assert ranks is not None
    if ranks.everywhere(batch is not None, "the first batch"):
        return batch
    has: list[Any] = [None] * ranks.group.size()
    with explained():
        dist.all_gather_object(has, batch is not None, group=ranks.group)
    if not any(has):
        return None
    first, told = has.index(True), [None]
    if ranks.group.rank() == first:
        told = [pickle.dumps(move_batch(batch, torch.device("cpu")))]  # type: ignore[list-item] # bytes
    ranks.agree("lending the first batch")
    with explained():
        dist.broadcast_object_list(told, src=dist.get_global_rank(ranks.group, first), group=ranks.group)
    return pickle.loads(told[0]) if batch is None else batch  # type: ignore[arg-type] # bytes of another rank's


def _compare(objective: ObjectiveLike, shards: Shards, batch: Any) -> None:
    """Compare with the model's own on a batch. All ranks do so together.

    Raises:
        CheckFailedError: if they differ, or the model's own cannot be had.
    """
    evaluator, ranks = objective.evaluator, objective.ranks
    assert ranks is not None
    own = dataclasses.replace(evaluator, stand_ins=None, batch_weights=None, head=None, between_ranks=True)
    gradient: Tensor | None = None
    if shards.by_module:
        sharding: Any = objective._space.sharding  # type: ignore[attr-defined] # of whole spaces
        _refuse_what_has_no_gradient(objective, shards)
        loss, gradient = gradient_of_batch(objective, batch, sharding)
    else:
        assert evaluator.stand_ins is not None
        with torch.no_grad(), evaluator.copy_buffers().installed(), evaluator.stand_ins():
            loss = float(own.evaluate(batch, 0).loss)
    ranks.agree("the loss of the plain model")  # the other one takes collectives, which wait for those that failed
    theirs: Any = None
    if gradient is None:
        with torch.no_grad(), evaluator.copy_buffers().installed():
            evaluation = own.evaluate(batch, 0)
            for module in fsdp_states(shards.model):
                module.reshard()  # type: ignore[operator] # a method of FSDP's
    else:
        evaluation, theirs = _own_gradient(own, shards, list(objective._space.names), batch)
    eps = max(torch.finfo(t.dtype).eps for t in (*shards.leaves.values(), evaluation.loss))
    rounded = [torch.finfo(dtype).eps for dtype in _dtypes(shards, objective.device)]
    allowed = max(min(1e4 * eps, 0.05), 1e4 * min(max([eps, *rounded]), torch.finfo(torch.float32).eps))
    value = float(evaluation.loss.detach())
    if not abs(value - loss) <= allowed * max(abs(value), 1e-8):
        raise CheckFailedError(
            f"the loss of the model as it is parallelised, {value:.8g}, is not that of the plain one, "
            f"{loss:.8g}: its forward depends on how it was split (a number of local heads?). Products "
            "through torch's hooks would be wrong in silence; pass the plain model with fully_shard, or with "
            "process_group=."
        )
    ranks.agree("a comparison of losses")
    if gradient is not None:
        _compare_gradients(objective, shards, gradient, theirs, max([eps, *rounded]))
    rule = evaluator.rule
    known = (_key(objective, shards), _reference(evaluator.forward), _reference(None if rule is None else rule.loss))
    _COMPARED.setdefault(shards.model, []).append(known)


def _compare_gradients(
    objective: ObjectiveLike, shards: Shards, ours: Tensor, theirs: list[Tensor], eps: float
) -> None:
    parts = ours.double().split([t.numel() for t in theirs])
    pairs = [(a, b.reshape(-1).double()) for a, b in zip(parts, theirs, strict=True)]
    squares = torch.stack([torch.stack([(a - b).square().sum(), b.square().sum()]) for a, b in pairs])
    gaps, norms = all_reduce(squares, shards.group).sqrt().unbind(1)
    allowed = min(1e4 * eps, 0.1) * norms + min(100 * eps, 0.05) * norms.norm()
    wrong = [i for i, ok in enumerate((gaps <= allowed).tolist()) if not ok]
    if wrong:
        worst = max(wrong, key=lambda i: float(gaps[i]))
        raise CheckFailedError(
            f"taken module by module, the gradient in {objective._space.names[worst]!r} differs by "
            f"{float(gaps[worst]):.3g} from that of the model's own backward pass, of norm {float(norms[worst]):.3g}: "
            "a tensor enters or leaves some module otherwise than through the arguments and the result of its forward "
            "(an attribute, a list, a data class, a weight of another module or one that a hook computes) and would be "
            "taken for a constant, or a module reads a buffer that it writes. Hand it over in tensors, tuples, lists "
            "or dicts, call model.eval(), or give a memory_budget that whole parameters fit in."
        )


def _dtypes(shards: Shards, device: torch.device) -> set[torch.dtype]:
    """Return the dtypes that the model's own pass rounds to."""
    found = shards.dtypes() | {state._mp_policy.reduce_dtype for state in fsdp_states(shards.model).values()}
    if torch.is_autocast_enabled(device.type):
        found.add(torch.get_autocast_dtype(device.type))
    return {dtype for dtype in found if dtype is not None and dtype.is_floating_point}


# -- the model's own backward pass ------------------------------------------------------------------------------------


def _refuse_what_has_no_gradient(objective: ObjectiveLike, shards: Shards) -> None:
    """Raise InputError where the model's own backward pass would not leave the gradients of the parameters."""
    named, why = dict(shards.model.named_parameters()), ""
    if frozen := [name for name in objective._space.names if not named[name].requires_grad]:
        why = f"the parameter {frozen[0]!r} does not require a gradient: call requires_grad_() before fully_shard"
    elif not (fsdp_states(shards.model) or has_torch_hooks(shards.model)):
        why = "the model does not run on its own: shard it by fully_shard or parallelize_module"
    for group in param_groups(shards.model):
        if not (group.reduce_grads and group.all_reduce_grads):
            why = "its gradients are not summed over ranks: call model.set_requires_gradient_sync(True)"
        if any(p.unsharded_accumulated_grad is not None for p in group.fsdp_params):
            why = "gradients are being accumulated without a sum over ranks: do so with one, or set them to None"
        if shards.data is None or group.mesh_info.mesh.size() != shards.data.size():
            why = "its gradients are summed over other ranks than the data: leave process_group= out"
    if why:
        raise InputError(
            f"module by module, gradients are compared once with those of the model's own backward pass, and {why}; or "
            "give a memory_budget that whole parameters fit in."
        )


@contextlib.contextmanager
def _own_gradients(model: nn.Module, batch: Any) -> Iterator[None]:
    """Have no `.grad` inside the context, nor hooks that act on it; both are put back."""
    held = [t for t in (*model.parameters(), *tensors_in(batch)) if t.is_leaf]
    before = [(t, t.grad) for t in held]
    hooks = [h for t in held if (h := getattr(t, "_post_accumulate_grad_hooks", None))]
    left_out = [(store, dict(store)) for store in hooks]
    try:
        for t, _ in before:
            t.grad = None
        for store in hooks:
            store.clear()
        yield
    finally:
        for store, earlier in left_out:
            store.update(earlier)
        for t, grad in before:
            t.grad = grad


def _own_gradient(own: Evaluator, shards: Shards, names: list[str], batch: Any) -> tuple[Any, list[Tensor]]:
    """Return what the model itself makes of a batch, and this rank's parts of the sums over ranks of its gradients."""
    named = dict(shards.model.named_parameters())
    own.parameters = [p for p in named.values() if p.requires_grad]
    factors = {
        id(p.sharded_param): group.gradient_divide_factor or group.mesh_info.mesh.size()
        for group in param_groups(shards.model)
        for p in group.fsdp_params
    }
    with _own_gradients(shards.model, batch):
        nothing: Any = contextlib.nullcontext()  # layers as they are
        with own.session(own.copy_buffers(), nothing):
            evaluation = own.evaluate(batch, 0)
            evaluation.loss.backward()
        found = []
        for name in names:
            p = named[name]
            part = shards.present(name)
            grad = torch.zeros_like(part) if p.grad is None else _local(p.grad, p).to(part.dtype)
            if id(p) in factors:
                grad = grad * factors[id(p)]
            elif shards.data is not None:
                grad = all_reduce(grad.clone(), shards.data)
            found.append(grad)
    for module in fsdp_states(shards.model):
        module.reshard()  # type: ignore[operator] # a method of FSDP's
    return evaluation, found


def _local(grad: Any, p: Any) -> Tensor:
    """Return this rank's part of a gradient, laid out as its parameter is."""
    if not is_part(grad):
        return grad
    if is_part(p) and grad.placements != p.placements:
        grad = grad.redistribute(p.device_mesh, p.placements)
    local: Tensor = grad.to_local()
    return local
