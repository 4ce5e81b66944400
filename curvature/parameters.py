"""The parameters an objective is a function of: which ones, in which order, grouped how.

A `ParameterSpace` lists leaf tensors under their names in the model and fixes the flat vector all operators act on: the
entries of the first tensor in row-major order, then those of the second, and so on. A tensor that a model holds under
several names (tied weights) is one entry, under its first name. Blocks collect the tensors one module owns.
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from curvature.arguments import checked
from curvature.errors import InputError, ParameterSelectionError

__all__ = ["Block", "ParameterSpace", "Selection"]

ROOT = "(root)"


@dataclass(frozen=True)
class Block:
    """Some parameters of a space, and where they lie in its flat vector."""

    name: str
    """Name of the module that owns them, or what the selection was called."""
    parameters: tuple[str, ...]
    """Names of the tensors, in the order of the space."""
    positions: tuple[int, ...]
    """Places of the tensors in the space."""
    slices: tuple[slice, ...]
    """Places of their entries in the flat vector (n,), ascending, adjacent ones merged."""

    @property
    def num_params(self) -> int:
        return sum(s.stop - s.start for s in self.slices)

    def take(self, flat: Tensor) -> Tensor:
        """Return the block's entries of `flat`, (n, ...) -> (m, ...)."""
        return flat[self.slices[0]] if len(self.slices) == 1 else torch.cat([flat[s] for s in self.slices])

    def embed(self, part: Tensor, num_params: int) -> Tensor:
        """Return `part` (m, ...) in its place in a vector of zeros, (num_params, ...)."""
        flat = part.new_zeros(num_params, *part.shape[1:])
        self.put(part, flat)
        return flat

    def put(self, part: Tensor, flat: Tensor) -> None:
        """Write `part` (m, ...) into its place in `flat`, (n, ...)."""
        start = 0
        for s in self.slices:
            flat[s] = part[start : start + s.stop - s.start]
            start += s.stop - s.start


_Item: TypeAlias = "str | nn.Module | Tensor"
Selection: TypeAlias = (
    "str | nn.Module | Block | Callable[[str, Tensor], bool] | Mapping[str, Tensor] | Sequence[_Item]"
)


class ParameterSpace:
    """Named leaf tensors and the flat vector (n,) made of them.

    Args:
        tensors: name -> floating-point leaf tensor, in the order of the flat vector.
        aliases: further names of the same tensors (tied weights), alias -> name in `tensors`.

    Raises:
        ParameterSelectionError: if `tensors` is empty.
        InputError: if a tensor is no real floating-point leaf, or they lie on several devices.
    """

    @checked
    def __init__(self, tensors: Mapping[str, Tensor], aliases: Mapping[str, str] | None = None) -> None:
        if not tensors:
            raise ParameterSelectionError(
                "no parameters: the model has none that require a gradient; pass params= to choose some."
            )
        for name, tensor in tensors.items():
            if not isinstance(tensor, Tensor):
                raise InputError(f"parameter {name!r} must be a tensor, got {type(tensor).__name__}.")
            if is_lazy(tensor):
                raise InputError(
                    f"parameter {name!r} has no shape yet: run the model once on a batch, so that its lazy layers are "
                    "made."
                )
            if tensor.is_inference():
                raise InputError(
                    f"parameter {name!r} was made under torch.inference_mode, which autograd cannot differentiate: "
                    "build or load the model outside of it."
                )
            if not tensor.is_leaf or not tensor.is_floating_point() or tensor.layout is not torch.strided:
                facts = f"of dtype {tensor.dtype}, layout {tensor.layout}"
                kind = facts if tensor.is_leaf else "a non-leaf tensor"
                raise InputError(
                    f"parameter {name!r} must be a dense, real floating-point leaf tensor, got one that is {kind}."
                )
        devices = {t.device for t in tensors.values()}
        if len(devices) > 1:
            raise InputError(
                f"the parameters must lie on one device, got {sorted(map(str, devices))}; move the model or select "
                "fewer."
            )
        self.tensors = dict(tensors)
        self.aliases = dict(aliases or {})
        self.device = devices.pop()
        self.dtype = torch.float32
        self._starts: list[int] = []
        start = 0
        for tensor in self.tensors.values():
            self.dtype = torch.promote_types(self.dtype, tensor.dtype)
            self._starts.append(start)
            start += tensor.numel()
        self.num_params = start
        self._shapes = self.shapes
        self._places: list[_Place] = []

    @classmethod
    def from_model(cls, model: nn.Module, selection: Selection | None = None) -> ParameterSpace:
        """Return the space of a model's parameters: those that require a gradient, or the selected ones."""
        named = dict(model.named_parameters())
        first_name = {id(t): name for name, t in named.items()}
        every_name = model.named_parameters(remove_duplicate=False)
        aliases = {alias: first_name[id(t)] for alias, t in every_name if first_name[id(t)] != alias}
        if selection is None:
            space = cls({name: t for name, t in named.items() if t.requires_grad}, aliases)
        elif isinstance(selection, Mapping):
            space = cls(_distinct(selection), aliases)
        else:
            names = set(_selected_names(selection, named, aliases, model))
            space = cls({name: t for name, t in named.items() if name in names}, aliases)
        for name, tensor in space.tensors.items():
            if (inside := first_name.get(id(tensor))) is not None:  # else it is none of the model's: the loss holds it
                twins = [alias for alias, first in aliases.items() if first == inside]
                space._places += [_Place(name, *_split(each)) for each in (inside, *twins)]
        return space

    # -- the present point --------------------------------------------------------------------------------------------

    def follow(self, model: nn.Module) -> bool:
        """Take the tensors that stand in the model under the chosen names now; say whether any is another one.

        Raises:
            ParameterSelectionError: if a name is gone, or names that shared a tensor share it no longer.
        """
        found: dict[str, Tensor] = {}
        moved = False
        for place in self._places:
            tensor = place.tensor(model)
            if tensor is None:
                known = [name for name, _ in model.named_parameters()]
                raise ParameterSelectionError(
                    f"the chosen parameter {_near(place.path, known)} is no longer in the model, which was changed; "
                    "build a new Objective."
                )
            if found.setdefault(place.name, tensor) is not tensor:
                raise ParameterSelectionError(
                    f"{place.path!r} is no longer the same tensor as {place.name!r} (tied weights that were replaced?);"
                    " build a new Objective, or tie them again."
                )
            moved = moved or tensor is not self.tensors[place.name]
        if moved:
            if len({id(t) for t in found.values()}) < len(found):
                raise ParameterSelectionError("chosen parameters were tied to each other; build a new Objective.")
            for name, tensor in found.items():
                self.tensors[name] = tensor
            self.verify()
        return moved

    def verify(self) -> None:
        """Check that the tensors still have the shapes and the place that vectors were made for.

        Raises:
            InputError: with what to do.
        """
        for name, tensor, shape in zip(self.tensors, self.tensors.values(), self._shapes, strict=True):
            if tensor.shape != shape:
                raise InputError(
                    f"parameter {name!r} had shape {tuple(shape)} and has {tuple(tensor.shape)} now: vectors no longer "
                    "fit; build a new Objective."
                )
            if tensor.device != self.device:
                raise InputError(
                    f"parameter {name!r} lay on {self.device} and lies on {tensor.device} now; build a new Objective "
                    "after moving the model."
                )
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in self.tensors.values()), torch.float32)
        if dtype != self.dtype:
            raise InputError(
                f"the parameters were converted: vectors would be of {dtype}, not of {self.dtype}; build a new "
                "Objective after converting the model."
            )

    # -- what is in it ------------------------------------------------------------------------------------------------

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.tensors)

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        return tuple(t.shape for t in self.tensors.values())

    @property
    def numels(self) -> tuple[int, ...]:
        return tuple(t.numel() for t in self.tensors.values())

    @functools.cached_property
    def blocks(self) -> tuple[Block, ...]:
        """One block for each module that owns some of the parameters, named by the module, in flat order."""
        owners: dict[str, list[str]] = {}
        for name in self.tensors:
            owners.setdefault(_owner(name), []).append(name)
        blocks = (self._block(owner, names) for owner, names in owners.items())
        return tuple(block for block in blocks if block.num_params > 0)  # some hold empty tensors only

    def block(self, selection: Selection, model: nn.Module | None = None) -> Block:
        """Return the block of the parameters that `selection` picks out of this space.

        Args:
            selection: a glob over parameter names or module names, a list of them, a predicate (name, tensor) -> bool,
                a list of parameters, a `Block`, or (with `model`) a module or list of modules.
            model: where modules of the selection are looked up.

        Raises:
            ParameterSelectionError: if nothing is selected; the message says which names are near.
        """
        if isinstance(selection, Block):
            return self._block(selection.name, selection.parameters)
        if isinstance(selection, Mapping):
            names: Iterable[str] = selection
        else:
            names = _selected_names(selection, self.tensors, self.aliases, model)
        return self._block(selection if isinstance(selection, str) else "selection", set(names))

    def _block(self, name: str, names: Iterable[str]) -> Block:
        wanted = set(names)
        if missing := wanted - set(self.tensors):
            raise ParameterSelectionError(f"{_near(min(missing), self.tensors)} is not among the chosen parameters.")
        positions = tuple(i for i, n in enumerate(self.tensors) if n in wanted)
        numels, names, slices = self.numels, self.names, list[slice]()
        for i in positions:
            start, stop = self._starts[i], self._starts[i] + numels[i]
            if slices and slices[-1].stop == start:
                slices[-1] = slice(slices[-1].start, stop)
            else:
                slices.append(slice(start, stop))
        return Block(name, tuple(names[i] for i in positions), positions, tuple(slices))

    # -- flat <-> named -----------------------------------------------------------------------------------------------

    def to_dict(self, flat: Tensor) -> dict[str, Tensor]:
        """Return views of `flat` (n,) with the parameters' shapes, by name."""
        if flat.shape != (self.num_params,):
            raise InputError(f"to_dict needs a vector of shape ({self.num_params},), got {tuple(flat.shape)}.")
        parts = flat.split(self.numels)
        return {name: part.view(shape) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)}

    @checked
    def to_flat(self, named: Mapping[str, Tensor]) -> Tensor:
        """Return the vector (n,), of this space's dtype, made of tensors by name: all of the space's, in its shapes."""
        if set(named) != set(self.tensors):
            odd = min(set(named) ^ set(self.tensors))
            raise InputError(
                f"to_flat needs exactly the names of the space; {odd!r} is {'unknown' if odd in named else 'missing'}."
            )
        for name, shape in zip(self.names, self.shapes, strict=True):
            if named[name].shape != shape:
                raise InputError(f"{name!r} has shape {tuple(shape)}, got {tuple(named[name].shape)}.")
        return torch.cat([named[name].detach().reshape(-1).to(self.dtype) for name in self.names])

    def current(self) -> Tensor:
        """Return a copy of the parameters' present values, (n,)."""
        return self.to_flat(self.tensors)

    def __repr__(self) -> str:
        return f"ParameterSpace({self.num_params} parameters in {len(self.tensors)} tensors, {self.device})"


@dataclass(frozen=True)
class _Place:
    """Where a tensor of a space stands in the model."""

    name: str
    """Its name in the space."""
    modules: tuple[str, ...]
    key: str

    @property
    def path(self) -> str:
        return ".".join((*self.modules, self.key))

    def tensor(self, model: nn.Module) -> Tensor | None:
        module: nn.Module | None = model
        for name in self.modules:
            module = None if module is None or name not in module._modules else module._modules[name]
        if module is None or self.key not in module._parameters:  # those of scripted modules have no get()
            return None
        return module._parameters[self.key]


def _split(name: str) -> tuple[tuple[str, ...], str]:
    *modules, key = name.split(".")
    return tuple(modules), key


def _owner(name: str) -> str:
    """Return the name of the module that owns a parameter; a parametrised tensor belongs to the parametrised module."""
    module = (
        name.partition("parametrizations.")[0].rstrip(".") if "parametrizations." in name else name.rpartition(".")[0]
    )
    return module or ROOT


def _distinct(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keep every tensor under its first name only."""
    first_name = {id(t): name for name, t in reversed(list(tensors.items()))}
    return {name: t for name, t in tensors.items() if first_name[id(t)] == name}


def _selected_names(
    selection: Selection, named: Mapping[str, Tensor], aliases: Mapping[str, str], model: nn.Module | None
) -> list[str]:
    if isinstance(selection, (str, nn.Module)):
        selection = [selection]
    if callable(selection) and not isinstance(selection, type):
        chosen = [name for name, tensor in named.items() if selection(name, tensor)]
        if not chosen:
            raise ParameterSelectionError(f"the predicate selects none of the {len(named)} parameters.")
        return chosen
    if not isinstance(selection, Iterable) or hasattr(selection, "ndim") or not selection:
        raise ParameterSelectionError(
            f"params must be globs, modules, parameters, a predicate or a dict of tensors, got "
            f"{type(selection).__name__}."
        )
    chosen = []
    for item in selection:
        if isinstance(item, nn.Module):
            chosen += _names_of_module(item, named, model)
        elif isinstance(item, str):
            chosen += _names_matching(item, named, aliases)
        elif isinstance(item, Tensor):
            chosen += _names_of_tensor(item, named)
        else:
            raise ParameterSelectionError(
                f"a selection holds globs, modules and parameters, got {type(item).__name__}."
            )
    return chosen


def _names_matching(pattern: str, named: Mapping[str, Tensor], aliases: Mapping[str, str]) -> list[str]:
    """Match whole parameter names, or the names of modules that hold them: "conv1" is short for "conv1.*"."""
    every = {**{name: name for name in named}, **{a: n for a, n in aliases.items() if n in named}}
    hits = [name for alias, name in every.items() if fnmatchcase(alias, pattern) or fnmatchcase(alias, f"{pattern}.*")]
    if pattern == ROOT:
        hits = [name for name in named if _owner(name) == ROOT]
    if not hits:
        raise ParameterSelectionError(f"no parameter matches {_near(pattern, every)}")
    return hits


def _names_of_module(module: nn.Module, named: Mapping[str, Tensor], model: nn.Module | None) -> list[str]:
    if model is None or not any(m is module for m in model.modules()):
        raise ParameterSelectionError(
            f"the module {type(module).__name__} that was passed as a selection is not part of the model."
        )
    owned = {id(t) for t in module.parameters()}
    hits = [name for name, t in named.items() if id(t) in owned]
    if not hits:
        raise ParameterSelectionError(f"the module {type(module).__name__} holds none of the parameters.")
    return hits


def _names_of_tensor(tensor: Tensor, named: Mapping[str, Tensor]) -> list[str]:
    hits = [name for name, t in named.items() if t is tensor]
    if not hits:
        raise ParameterSelectionError(
            f"a tensor of shape {tuple(tensor.shape)} that was passed as a selection is none of the model's parameters."
        )
    return hits


def _near(name: str, names: Iterable[str]) -> str:
    """Quote `name` with what it may have been meant to be."""
    known = list(names)
    modules = {".".join(parts[:i]) for parts in (n.split(".") for n in known) for i in range(1, len(parts))}
    close = difflib.get_close_matches(name, [*known, *modules], n=3, cutoff=0.4)
    hint = (
        ", ".join(map(repr, close)) if close else ", ".join(map(repr, known[:4])) + (", ..." if len(known) > 4 else "")
    )
    return f"{name!r} (near: {hint})" if close else f"{name!r} (there are: {hint})"
