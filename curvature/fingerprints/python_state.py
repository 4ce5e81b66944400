"""What a model and a loss are besides their parameters and buffers: plain attributes, modules, hooks, closures.

`PythonState` lists all of it as (owner, name) -> value, so that two looks can be compared entry by entry. It reads
attributes of modules and of other objects, containers, arguments of `functools.partial`, cells of closures, and what
functions name: globals and, of Python modules and classes of one's own, attributes. Of own classes all methods count.
What it does not follow is known by identity: modules of Python, classes and functions of torch and of the standard
library, and what lies deeper than a few steps. Of large containers it reads some entries, and of the functions of one
package it follows some hundreds: vendored libraries would cost seconds a look.

Where every thing read is still the very same object, nothing has changed: `stands` says so without another walk.
"""

from __future__ import annotations

import contextlib
import enum
import functools
import math
import operator
import sys
import types
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvature.fingerprints.contents import Contents
from curvature.fingerprints.digest import digest, version

__all__ = ["PythonState"]

Key = tuple[int, Hashable]

_PLAIN = frozenset({int, float, bool, str, bytes, complex, type(None), torch.dtype, torch.device, torch.Size})
_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})  # looked at by themselves
_DEPTH = 6
_MOST = 256  # entries of a container; of larger ones as many are looked at, evenly spread, but for ...
_NUMBERS = 2**17  # ... so many plain numbers and strings
_ENTRIES = 2**20  # of a tensor that is neither parameter nor buffer; of larger ones stripes are looked at
_COPIED = 2**16  # bytes of such a tensor that are kept; of more a digest is
_FUNCTIONS = 500  # of one package whose names are followed: of a library that lies among own code, the first it calls
_FOREIGN = ("torch.", "numpy.", "builtins", "functools", "typing", "collections")  # their functions are not followed
_OPAQUE = frozenset({"_thread", "asyncio", "concurrent", "io", "_io", "logging", "multiprocessing", "random", "socket"})
_OPAQUE |= {"threading", "weakref", "curvature", "optimizers", "analysis"}  # whose objects change in the course of work


class PythonState:
    """One look at a model and the callables around it.

    Args:
        model: whose modules are walked, parameters and buffers left out but for their identity.
        others: what else there is, such as loss and forward, by name.
        volatile: entries to pass over, which evaluating the model changes by itself.

    Attributes:
        entries: (id of owner, name) -> what is there.
        parameters, buffers: of the modules met, in order; their contents are not looked at.
    """

    def __init__(self, model: nn.Module | None, others: Mapping[str, Any], volatile: set[Key]) -> None:
        self.entries: dict[Key, Hashable] = {}
        self.buffers: list[Tensor] = []
        self.parameters: list[Tensor] = []
        self._volatile = volatile
        self._held: list[Any] = []  # so that no id is given to another object
        self._seen: set[int] = set()
        self._modules: set[int] = set()
        self._registered: set[int] = set()
        self._watched = True  # until something turns up whose changes would leave all objects the same
        self._sources: list[Iterable[Any]] = []
        self._empty: list[Any] = []
        self._attributes: list[tuple[Any, str]] = []
        self._globals: list[tuple[dict[str, Any], str]] = []
        self._contents: list[Contents] = []
        self._followed: Counter[str] = Counter()
        if model is not None:
            self._walk(model, copied=True)
        for name, other in others.items():
            self._note(0, name, other, 0)
        self._objects = self._read() if self._watched else []
        self._nothing = not (self._sources or self._attributes or self._globals or self._empty or self._contents)

    def stands(self) -> bool:
        """Say whether all that was read is still the same; False where that would take another look."""
        if self._nothing or not self._watched:
            return self._watched
        try:
            now = self._read()
        except Exception:  # of an object that makes its attributes when asked
            return False
        same = len(now) == len(self._objects) and all(map(operator.is_, now, self._objects)) and not any(self._empty)
        return same and all(contents.stand() for contents in self._contents)

    def _read(self) -> list[Any]:
        """Return every object that the walk met, but for what is in parameters, buffers and other tensors."""
        attributes = [getattr(owner, name, None) for owner, name in self._attributes]
        return [*chain.from_iterable(self._sources), *attributes, *(space.get(name) for space, name in self._globals)]

    def _watch(self, container: Any, most: float = math.inf) -> None:
        if len(container) > most:
            self._watched = False
        elif len(container) == 0 and isinstance(container, (dict, list, set)):  # hooks, mostly
            self._empty.append(container)
        elif isinstance(container, (dict, types.MappingProxyType)):
            self._sources += [container, container.values()]
        elif isinstance(container, (list, set)) or type(container).__name__ == "deque":
            self._sources.append(container)
        elif not isinstance(container, (tuple, frozenset)):
            self._watched = False

    def changes(self, other: PythonState) -> set[Key]:
        """Return the entries that differ from those of another look, volatile ones left out."""
        mine, theirs = self.entries, other.entries
        if mine == theirs:
            return set()
        missing = object()
        found = {key for key in mine.keys() | theirs.keys() if mine.get(key, missing) != theirs.get(key, missing)}
        return {key for key in found if not {key, (key[0], "length")} & self._volatile}  # nor a container that grows

    # -- modules ------------------------------------------------------------------------------------------------------

    def _walk(self, root: nn.Module, *, copied: bool = False) -> None:
        if id(root) in self._modules:
            return
        modules: list[nn.Module] = []
        stack = [root]
        while stack:
            module = stack.pop()
            owner = id(module)
            if owner in self._modules:
                continue
            self._modules.add(owner)
            self._held.append(module)
            modules.append(module)
            self._watch_object(module)
            for container in (module._modules, module._parameters, module._buffers):
                self._watch(container)
            children = [child for child in module._modules.values() if child is not None]
            stack.extend(reversed(children))
            self.entries[owner, "modules"] = tuple((name, id(child)) for name, child in module._modules.items())
            for kind, tensors, found in (
                ("parameters", module._parameters, self.parameters),
                ("buffers", module._buffers, self.buffers),
            ):
                if tensors:
                    noted: list[Hashable] = []
                    for name, t in tensors.items():
                        if t is not None and id(t) not in self._registered:
                            self._registered.add(id(t))
                            found.append(t)
                        noted.append((name, None if t is None else self._facts(t, copied and kind == "buffers")))
                    self.entries[owner, kind] = tuple(noted)
        for module in modules:
            owner = id(module)
            for name, value in module.__dict__.items():
                if type(value) in _PLAIN:
                    self.entries[owner, name] = value
                elif isinstance(value, dict) and not value:
                    self._watch(value)
                elif name not in _OWN:
                    self._note(owner, name, value, 1)
            self._note_class(type(module))

    def _facts(self, t: Tensor, copied: bool) -> Hashable:
        """What makes a graph unusable although contents are the same; graphs hold copies of the model's buffers."""
        if copied:
            return t.shape, t.dtype, t.device
        self._held.append(t)
        return id(t), version(t), t.shape, t.dtype, t.device

    def _note_class(self, kind: type) -> None:
        for base in kind.__mro__:
            if base in (object, nn.Module) or f"{base.__module__}.".startswith(_FOREIGN) or id(base) in self._seen:
                continue
            self._seen.add(id(base))
            self._watch(vars(base))
            own = _is_own(base.__module__)
            for name, value in vars(base).items():
                if name in ("forward", "__call__") or (not name.startswith("__") and _is_data(value)):
                    self._note(id(base), name, value, 2)
                elif own and name != "__init__":
                    for function in _functions(value):
                        self._note(id(base), (name, function.__name__), function, 2)

    # -- anything else ------------------------------------------------------------------------------------------------

    def _note(self, owner: int, name: Hashable, value: Any, depth: int) -> None:
        key = (owner, name)
        if key in self._volatile:
            self._watched = False
            return
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(part) in _PLAIN for part in value)):
            self.entries[key] = value
        elif isinstance(value, Tensor):
            self.entries[key] = id(value) if id(value) in self._registered else self._content(value)
        elif isinstance(value, (np.ndarray, np.generic)):
            self._watched = self._watched and isinstance(value, np.generic)
            self.entries[key] = self._array(value)
        else:
            self.entries[key] = (kind, id(value))
            if id(value) not in self._seen and depth < _DEPTH:
                self._seen.add(id(value))
                self._held.append(value)
                with contextlib.suppress(Exception):  # what does not let itself be read is known by identity
                    self._follow(value, depth + 1)

    def _content(self, t: Tensor) -> Hashable:
        self._watched = self._watched and t.grad_fn is None  # a result of forward: its graph is not to be held
        self._contents.append(Contents([t], _ENTRIES, room=_COPIED))
        return version(t), t.shape, t.dtype, *self._contents[-1].found

    def _array(self, value: np.ndarray | np.generic) -> Hashable:
        array = np.ascontiguousarray(value)
        if array.dtype.hasobject:
            return id(value)
        flat = array.reshape(-1).view(np.uint8)
        words = torch.from_numpy(flat if flat.flags.writeable else flat.copy())
        return array.shape, str(array.dtype), digest([words], most=8 * _ENTRIES)

    def _follow(self, value: Any, depth: int) -> None:
        owner = id(value)
        if isinstance(value, nn.Module):
            self._walk(value)
        elif isinstance(value, (Mapping, list, tuple, set, frozenset)) or type(value).__name__ == "deque":
            self._container(value, depth)
        elif isinstance(value, functools.partial):
            for name in ("func", "args", "keywords"):
                self._attributes.append((value, name))
                self._note(owner, name, getattr(value, name), depth)
        elif isinstance(value, types.MethodType):
            self._note(owner, "self", value.__self__, depth)
            self._note(owner, "function", value.__func__, depth)
        elif isinstance(value, types.FunctionType):
            self._function(value, depth)
        elif isinstance(value, type) and _is_own(value.__module__):
            self._seen.discard(owner)  # known as a value, not yet as a class
            self._note_class(value)
        elif isinstance(value, (type, types.ModuleType, enum.Enum)) or _is_opaque(str(type(value).__module__)):
            return
        else:
            self._object(value, depth)

    def _container(self, value: Any, depth: int) -> None:
        owner, length = id(value), len(value)
        self._watch(value, 16 * _MOST)
        if (owner, "length") in self._volatile:
            self._watched = False
            return
        self.entries[owner, "length"] = length
        pairs: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, Mapping) else enumerate(value)
        if _MOST < length <= _NUMBERS:
            parts = (*value, *value.values()) if isinstance(value, Mapping) else tuple(value)
            if _PLAIN.issuperset(map(type, parts)):
                self._note(owner, "contents", parts, depth)
                return
        for name, item in islice(pairs, 0, None, math.ceil(length / _MOST) or 1):
            self._note(owner, name if isinstance(name, (str, int)) else repr(name), item, depth)

    def _object(self, value: Any, depth: int) -> None:
        owner = id(value)
        self._watch_object(value)
        fields = getattr(value, "__dict__", None)
        if isinstance(fields, dict):
            for name, part in list(islice(fields.items(), 2 * _MOST)):  # so that one that comes later moves no other
                self._note(owner, name, part, depth)
        for base in type(value).__mro__:
            slots = vars(base).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__"):
                    self._attributes.append((value, name))
                    self._note(owner, name, getattr(value, name, None), depth)
        self._note_class(type(value))

    def _watch_object(self, value: Any) -> None:
        self._attributes += [(value, "__class__"), (value, "__dict__")]
        if isinstance(fields := getattr(value, "__dict__", None), dict):
            self._watch(fields, math.inf if isinstance(value, nn.Module) else 2 * _MOST)

    def _function(self, function: types.FunctionType, depth: int) -> None:
        owner = id(function)
        self._attributes += [(function, "__code__"), (function, "__defaults__"), (function, "__kwdefaults__")]
        self.entries[owner, "code"] = id(function.__code__)
        self._held.append(function.__code__)
        self._followed[top := str(function.__module__).partition(".")[0]] += 1
        if f"{function.__module__}.".startswith(_FOREIGN) or self._followed[top] > _FUNCTIONS:
            return
        for name, part in (("defaults", function.__defaults__), ("keywords", function.__kwdefaults__)):
            if part:
                self._note(owner, name, part, depth)
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._attributes.append((cell, "cell_contents"))
            try:
                self._note(owner, name, cell.cell_contents, depth)
            except ValueError:  # not yet filled
                self._watched = False
        names = _names(function.__code__)
        spaces = [function.__globals__]
        spaces += [vars(part) for name in names if _is_own_module(part := spaces[0].get(name))]
        for space in spaces:
            for name in names:
                self._globals.append((space, name))
                if name in space:
                    self._note(id(space), name, space[name], depth)
        self._sources.append(function.__dict__)
        if function.__dict__:
            self._note(owner, "__dict__", function.__dict__, depth)


@lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """Return the global names that a function and those written inside it may use."""
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return tuple(dict.fromkeys([*code.co_names, *inner]))


def _functions(value: Any) -> list[types.FunctionType]:
    """Return what is called by a method, static or of the class, or a property."""
    found = [value, *(getattr(value, name, None) for name in ("__func__", "fget", "fset", "func"))]
    return [part for part in found if isinstance(part, types.FunctionType)]


@lru_cache(maxsize=4096)
def _is_own(module: str) -> bool:
    """Say whether a module of Python is neither installed nor of the standard library."""
    top = module.partition(".")[0]
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    if top in _OPAQUE | sys.stdlib_module_names or "-packages" in file:
        return False
    depth = module.count(".") + Path(file).name.startswith("__init__.")
    return top not in _installed_in(Path(file).parents[depth]) if depth < len(Path(file).parents) else True


@lru_cache(maxsize=64)
def _installed_in(folder: Path) -> frozenset[str]:
    """Return the top-level modules that an installer put into a folder, as `pip install --target` does."""
    records = (record.read_text("utf-8", "replace").splitlines() for record in folder.glob("*.dist-info/RECORD"))
    return frozenset(
        line.partition(",")[0].partition("/")[0].removesuffix(".py") for lines in records for line in lines
    )


def _is_own_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and _is_own(value.__name__)


def _is_data(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, (Tensor, np.ndarray, list, dict, tuple))


@lru_cache(maxsize=4096)
def _is_opaque(name: str) -> bool:
    return name.partition(".")[0] in _OPAQUE or name.startswith(("torch._C", "torch.distributed"))
