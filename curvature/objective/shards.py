"""Models whose parameters lie in parts on several ranks: FSDP2, tensor parallelism, or both on one mesh.

Curvature is that of the plain model. Whole parameters are gathered into leaves once a point, and stand in the model in
place of its own while it is evaluated; torch's hooks, which would gather them again or split activations, are left out,
their casts to lower precision are made in the graph. So every derivative is one of ordinary autograd, to any order, and
vectors are summed over ranks and cut into parts outside of it.

The hooks of column-parallel modules have no second derivative: with them, products are wrong and no error is raised.
Without them the model is what it would be on one device, which is compared with its own loss before the first product.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature.environment.memory import available_memory
from curvature.errors import CheckFailedError, InputError
from curvature.fingerprints.digest import version
from curvature.objective.standing_in import fsdp_states, param_dtypes, param_groups, place, without_hooks
from curvature.parameters import Block, ParameterSpace, Selection
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor, whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "Shards",
    "WholeSpace",
    "gathered",
    "in_whole_vectors",
    "is_part",
    "mesh_group",
    "refuse_by_module",
    "refuse_settings",
    "space_of",
    "spread",
]

_Function = TypeVar("_Function", bound=Callable[..., Any])
_WHOLE = 6  # vectors that a product holds beside the basis where parameters are whole


def is_part(tensor: Tensor) -> bool:
    """Whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "placements")


def spread(model: Any, group: ProcessGroup | None) -> tuple[Any, Shards | None, ProcessGroup | None]:
    """Return the module to evaluate, how its parameters lie over ranks, and the ranks that hold different data.

    Raises:
        InputError: for wrappers without second derivative or around parts, and for placements that are not known.
    """
    if not isinstance(model, nn.Module) or not dist.is_available():
        return model, None, group
    wrapped = getattr(model, "_orig_mod", model)  # by torch.compile
    if isinstance(wrapped, nn.parallel.DistributedDataParallel):
        return wrapped.module, None, group or wrapped.process_group
    for name, module in model.named_modules():
        if isinstance(module, nn.parallel.DistributedDataParallel) and module.process_group.size() > 1:
            raise InputError(
                f"DistributedDataParallel wraps a part of the model ({name}), so that each rank would answer for its "
                f"own data: wrap the whole, or put {name}.module in its place and pass process_group=."
            )
    if any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules()):
        raise InputError(
            "FullyShardedDataParallel has no second derivative: shard the model by torch.distributed.fsdp.fully_shard, "
            "which is handed in as it is, or pass one that is not sharded, with process_group=."
        )
    for module in fsdp_states(model):
        module.reshard()  # type: ignore[operator] # a method of FSDP's; after a forward pass the root is left whole
    parts = [p for p in model.parameters() if is_part(p)]
    if not parts:
        return model, None, group
    mesh = max((p.device_mesh for p in parts), key=lambda m: m.size())  # type: ignore[attr-defined] # of DTensors
    meshes = {of_group.mesh_info.mesh for of_group in param_groups(model)}
    if group is None and meshes:
        group = mesh_group(max(meshes, key=lambda m: m.size()))
    return model, Shards(model, mesh_group(mesh), group), group


def mesh_group(mesh: Any) -> ProcessGroup:
    """Return the group of all ranks of a mesh."""
    if mesh.ndim == 1:
        group: ProcessGroup = mesh.get_group()
        return group
    if mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    flat: ProcessGroup = mesh._flatten().get_group()
    return flat


class WholeSpace(ParameterSpace):
    """The chosen parameters of a model that is held in parts, as whole tensors; vectors are sharded ones.

    Raises:
        CheckFailedError: by `tensors`, where the parameters have changed since they were gathered.
    """

    def __init__(self, shards: Shards, names: Sequence[str], aliases: Mapping[str, str]) -> None:
        self._shards = shards
        super().__init__({name: shards.leaves[name] for name in names}, aliases)
        every = list(shards.leaves)
        self._layout = shards.layout.of([every.index(name) for name in names])

    @property
    def sharding(self) -> Layout | None:
        """How vectors lie over ranks; None while they are whole."""
        return None if _whole_vectors.get() else self._layout

    @property
    def tensors(self) -> dict[str, Tensor]:
        if self._shards.stale():
            raise CheckFailedError(
                "the parameters have changed since the ranks gathered them; call objective.loss() on all ranks first."
            )
        return self._leaves

    @tensors.setter
    def tensors(self, tensors: dict[str, Tensor]) -> None:
        self._leaves = tensors

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._leaves)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(t.shape for t in self._leaves.values())

    @property
    def numels(self) -> tuple[int, ...]:
        return tuple(t.numel() for t in self._leaves.values())

    def block(self, selection: Selection, model: nn.Module | None = None) -> Block:
        """Do what the base does, for modules and parameters of the model that is held in parts."""
        items = [selection] if isinstance(selection, nn.Module) else selection
        if isinstance(items, (list, tuple)):
            selection = [name for item in items for name in self._shards.names_of(item, self.names)]
        return super().block(selection, model)

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Return whole tensors in the parameters' shapes, by name; a sharded vector is gathered, all ranks together."""
        return super().to_dict(whole(flat))

    def current(self) -> Tensor:
        """Return the parameters' present values, (n,), sharded."""
        parts = [self._shards.present(name) for name in self.names]
        found = ShardedTensor(torch.cat([p.detach().reshape(-1).to(self.dtype) for p in parts]), self._layout)
        return found if self.sharding is not None else found.whole()


_whole_vectors: ContextVar[bool] = ContextVar("whole vectors", default=False)


def in_whole_vectors(function: _Function) -> _Function:
    """Have vectors be whole, alike on every rank, inside a function of an objective, for what reads single entries.

    Raises:
        InputError: by the function, for a sharded model of which no rank holds whole parameters.
    """

    @functools.wraps(function)
    def wrapped(objective: Any, *args: Any, **settings: Any) -> Any:
        shards = getattr(objective, "shards", None)
        if shards is None:
            return function(objective, *args, **settings)
        refuse_by_module(shards, f"{function.__name__}()")
        token = _whole_vectors.set(True)
        try:
            return function(objective, *gathered(args), **gathered(settings))
        finally:
            _whole_vectors.reset(token)

    return cast("_Function", wrapped)


def gathered(value: Any) -> Any:
    """Return arguments with whole vectors in place of sharded ones."""
    if isinstance(value, ShardedTensor):
        return value.whole()
    if isinstance(value, dict):
        return {key: gathered(item) for key, item in value.items()}
    if type(value) in (list, tuple):
        return type(value)(gathered(item) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changes = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        changes = {name: item.whole() for name, item in changes.items() if isinstance(item, ShardedTensor)}
        return dataclasses.replace(value, **changes) if changes else value
    return value


def space_of(model: nn.Module, selection: Selection | None, shards: Shards | None) -> ParameterSpace:
    """Return the space of the chosen parameters: of the model's own tensors, or of whole ones gathered from ranks."""
    if shards is None:
        return ParameterSpace.from_model(model, selection)
    if isinstance(selection, Mapping):
        selection = list(selection)
    chosen = ParameterSpace.from_model(model, selection)
    for name, leaf in shards.leaves.items():
        leaf.requires_grad_(name in chosen.tensors)
    return WholeSpace(shards, chosen.names, chosen.aliases)


class Shards:
    """The parameters of a model, as they lie over ranks and as whole leaves.

    Args:
        model: some of whose parameters are DTensors.
        group: all ranks that hold parts.
        data: those of them that hold different data, which are summed over; None if all hold the same.

    Attributes:
        layout: of all parameters of the model, in its order.
        leaves: whole tensors by the parameters' names, gathered once a point.
    """

    def __init__(self, model: nn.Module, group: ProcessGroup, data: ProcessGroup | None) -> None:
        self.model, self.group, self.data = model, group, data
        named = dict(model.named_parameters())
        first = {id(p): name for name, p in named.items()}
        self.places = [
            (module, key, first[id(p)])
            for module in model.modules()
            for key, p in module._parameters.items()
            if p is not None
        ]
        for name, buffer in model.named_buffers():
            if is_part(buffer) and not all(p.is_replicate() for p in buffer.placements):  # type: ignore[attr-defined] # of a DTensor
                raise InputError(f"the buffer {name!r} is sharded; replicate it over the ranks.")
        self.layout = Layout.agreed(list(named.values()), group)
        self.leaves: dict[str, nn.Parameter] = {}
        for name, p in named.items():  # without memory, until they are gathered
            nothing = self.present(name).new_full((), torch.nan if p.is_floating_point() else 0)
            self.leaves[name] = nn.Parameter(nothing.expand(p.shape), requires_grad=p.requires_grad)
        self.pinned = False
        """Whether the leaves are at another point than the model, for a while."""
        self.by_module = False
        """Whether leaves are never gathered, and products take the parameters of one module at a time."""

    def choose(self, memory_budget: int | None, ranks: Any, keep_graphs: bool | str, head: Any) -> bool:
        """Go module by module where whole vectors exceed the budget, or what some rank has free; say whether."""
        each = sum(leaf.numel() * max(4, leaf.element_size()) for leaf in self.leaves.values())
        device = next(iter(self.leaves.values())).device
        room = available_memory(device) if memory_budget is None else memory_budget
        self.by_module = not ranks.everywhere(_WHOLE * each <= room, "the choice of a route")
        refuse_settings(self.by_module, keep_graphs, head)
        self.gather()
        return self.by_module

    def __deepcopy__(self, memo: Any) -> Any:
        raise InputError("a sharded model cannot be copied; build another objective of it.")

    def names_of(self, item: Any, chosen: Sequence[str]) -> list[Any]:
        """Return the names of the chosen parameters that a module or a parameter is; anything else as it is."""
        if not isinstance(item, (nn.Module, Tensor)):
            return [item]
        held = {id(p) for p in (item.parameters() if isinstance(item, nn.Module) else (item,))}
        named = {**dict(self.model.named_parameters()), **{f"\0{n}": leaf for n, leaf in self.leaves.items()}}
        return [n.lstrip("\0") for n, p in named.items() if id(p) in held and n.lstrip("\0") in chosen]

    def present(self, name: str) -> Tensor:
        """Return this rank's part of a parameter as it is now."""
        module, key, _ = next(place for place in self.places if place[2] == name)
        p = module._parameters[key]
        assert p is not None
        part: Tensor = p.to_local() if is_part(p) else p  # type: ignore[attr-defined] # of a DTensor
        return part.detach()

    def _versions(self) -> tuple[int, ...]:
        return tuple(
            version(p) + (version(p._local_tensor) if is_part(p) else 0)  # type: ignore[attr-defined] # of a DTensor
            for module, key, _ in self.places
            for p in [module._parameters[key]]
            if p is not None
        )

    def stale(self) -> bool:
        """Whether autograd has counted writes to this rank's parts since they were gathered."""
        return not self.pinned and self._seen != self._versions()

    def gather(self) -> None:
        """Write the whole parameters, as they are now, into the leaves, if they are held. All ranks do so."""
        for module in fsdp_states(self.model):
            module.reshard()  # type: ignore[operator] # a method of FSDP's
        for i, (name, leaf) in enumerate(self.leaves.items() if not self.by_module else ()):
            whole = self.layout.of([i]).whole(self.present(name).reshape(1, -1))
            if leaf.untyped_storage().nbytes() < leaf.numel() * leaf.element_size():
                leaf.data = torch.empty(leaf.shape, dtype=leaf.dtype, device=leaf.device)
            leaf.data.copy_(whole.view(leaf.shape))
        self._seen = self._versions()

    @torch.no_grad()
    def write(self) -> None:
        """Write this rank's parts of the leaves, alike on every rank, into the model's parameters."""
        for i, (name, leaf) in enumerate(self.leaves.items()):
            part = self.present(name)
            part.copy_(self.layout.of([i]).part(leaf.detach().reshape(1, -1)).view(part.shape))
        self._seen = self._versions()

    # -- standing in --------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have the whole parameters stand in the model, without torch's hooks, inside the context."""
        originals = [(module, key, module._parameters[key]) for module, key, _ in self.places]
        with without_hooks(self.model):
            try:
                self.install()
                yield
            finally:
                for module, key, original in originals:
                    place(module, key, original)

    def install(self) -> None:
        """Put the whole parameters, as they are now, and cast as FSDP2 does, in their places."""
        dtypes = param_dtypes(self.model)
        cast: dict[tuple[str, torch.dtype], Tensor] = {}
        for module, key, name in self.places:
            leaf, dtype = self.leaves[name], dtypes.get(module)
            if dtype is not None and leaf.is_floating_point() and leaf.dtype != dtype:
                if (name, dtype) not in cast:
                    cast[name, dtype] = leaf.to(dtype)
                leaf = cast[name, dtype]  # type: ignore[assignment] # no parameter
            place(module, key, leaf)

    def dtypes(self) -> set[torch.dtype]:
        """Return the dtypes that FSDP2 casts parameters to."""
        return set(param_dtypes(self.model).values())


def refuse_settings(by_module: bool, keep_graphs: bool | str, head: Any) -> None:
    """Raise InputError for settings of an objective that do not hold module by module."""
    for name, value, plain in (("keep_graphs", keep_graphs, "auto"), ("head", head, "auto")):
        if by_module and value not in (plain, False, None):
            raise InputError(
                f"{name}={value!r:.60} does not hold for a model that is differentiated module by module, whose graphs "
                "are built anew and whose logits are whole; leave it out, or give a memory_budget that six vectors of "
                "all parameters fit in."
            )


def refuse_by_module(shards: Shards | None, what: str) -> None:
    """Raise InputError where there are no whole parameters."""
    if shards is not None and shards.by_module:
        raise InputError(
            f"{what} needs whole parameters on every rank, and memory_budget, or the memory that is free, allows for "
            "those of one module at a time; raise it. Losses, gradients and products with the Hessian, Gauss-Newton "
            "and Fisher matrices do without, and all that is made of them."
        )
