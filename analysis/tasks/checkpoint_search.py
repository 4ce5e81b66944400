"""The state dict of a model in what a file holds: under whatever keys and prefixes a framework put it."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from analysis.tasks.checkpoint_files import StandIn
from curvature.errors import CheckpointError

__all__ = ["Found", "find_state", "some"]

WRAPPERS = frozenset({"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"})
"""Parts of names that compilation, sharding and activation checkpointing put in, at any depth."""
_DEEPEST, _MOST_NODES, _SHOWN = 6, 20_000, 3


@dataclass(frozen=True)
class Found:
    """A set of tensors that may be the state of the model."""

    key: str
    """Where it stands: keys and prefix, joined by dots; "" for the whole file, which users write as "."."""
    node: str
    """The same without the prefix."""
    tensors: dict[str, Tensor]
    """By the model's names, as far as they match; other names without the prefix."""
    beside: tuple[str, ...]
    """Names that do not have the prefix."""


def find_state(
    stored: Any, wanted: Mapping[str, Tensor], ties: Sequence[Sequence[str]], key: str | None, path: object
) -> Found:
    """Return the one state dict in `stored` that fits.

    Names may have a prefix that all share, and the parts that wrappers put in.

    Args:
        stored: what the file holds.
        wanted: the tensors of the model by name.
        ties: names of one and the same tensor, of which files may hold the first or any other only.
        key: which to take; None if there is only one.
        path: of the file, for messages.

    Raises:
        CheckpointError: if there is none, several that differ, or none that fits; the message says which keys there are
            and what does not fit.
    """
    nodes = [(name, _tensors(node)) for name, node in _nodes(stored, "", set(), iter(range(_MOST_NODES)))]
    nodes = [(name, tensors) for name, tensors in nodes if any(isinstance(k, str) for k in tensors)]
    if not nodes:
        raise CheckpointError(f"the checkpoint {path} holds {_content(stored)}; save model.state_dict().")
    found = [one for name, tensors in nodes for one in _candidates(name, tensors, wanted, ties)]
    if key is not None:
        if not (chosen := [one for one in found if key in (one.key or ".", one.node or ".")]):
            near = difflib.get_close_matches(key, _keys(found), n=2, cutoff=0.5)
            raise CheckpointError(
                f"the checkpoint {path} has no state dict under the key {some([key])!r}; give one of "
                f"{some(near or _keys(found), 8)}."
            )
        found = chosen
    whole = [one for one in found if _fits(one, wanted) and not one.beside]
    parts = [one for one in found if _fits(one, wanted) and one.beside and one.key != one.node]
    fitting = whole or [one for one in parts if one.key == key]
    if parts and not fitting:
        raise CheckpointError(
            f"the checkpoint {path} holds the model as a part, {some(_keys(parts))}, beside {some(parts[0].beside)}; "
            f"choose it with --checkpoint-key {parts[0].key} (checkpoint_key= in Python)."
        )
    if not fitting:
        best = max(found, key=lambda one: sum(name in one.tensors for name in wanted) - len(one.beside) / 1e9)
        raise CheckpointError(_misfit(best, wanted, path))
    first = fitting[0]
    if others := [one for one in fitting[1:] if not _same(one, first, wanted)]:
        raise CheckpointError(
            f"the checkpoint {path} holds several state dicts that fit and differ: {some(_keys([first, *others]), 8)}; "
            f"choose one with --checkpoint-key {_keys([first])[0]} (checkpoint_key= in Python)."
        )
    return first


def some(names: Sequence[object], shown: int = _SHOWN) -> str:
    """Return the first few names, and how many more there are; what a terminal should not get is escaped."""
    texts = [str(name) for name in names[:shown]]
    texts = [text if text.isprintable() else ascii(text)[1:-1] for text in texts]
    texts = [text if len(text) <= 80 else f"{text[:60]}..." for text in texts]
    return ", ".join(texts) + ("" if len(names) <= shown else f" and {len(names) - shown} more")


# -- what there is ----------------------------------------------------------------------------------------------------


def _nodes(stored: Any, name: str, above: set[int], count: Iterator[int]) -> Iterator[tuple[str, Any]]:
    """Yield the dicts and modules in nested dicts, lists and objects, from the outside in."""
    if len(above) > _DEEPEST or id(stored) in above or next(count, None) is None:
        return
    inside = stored.attributes if isinstance(stored, StandIn) else stored
    if isinstance(inside, Mapping):
        yield name, inside
        if "_parameters" in inside and "_modules" in inside:
            return
        items = list(inside.items())
    elif isinstance(inside, (list, tuple)):
        items = list(enumerate(inside))
    else:
        return
    for key, value in items:
        if isinstance(value, (Mapping, StandIn, list, tuple)):
            yield from _nodes(value, f"{name}.{key}" if name else str(key), {*above, id(stored)}, count)


def _tensors(node: Mapping[Any, Any]) -> dict[Any, Tensor]:
    if "_parameters" in node and "_modules" in node:
        return dict(_of_module(node, "", set(), iter(range(_MOST_NODES))))
    tensors = {key: value for key, value in node.items() if isinstance(value, Tensor)}
    if "n_averaged" in tensors and all(str(key).startswith("module.") for key in tensors if key != "n_averaged"):
        del tensors["n_averaged"]  # of torch.optim.swa_utils.AveragedModel, beside its module
    return tensors


def _of_module(module: Any, prefix: str, above: set[int], count: Iterator[int]) -> Iterator[tuple[str, Tensor]]:
    """Yield the state of a pickled module whose class was not imported."""
    inside = module.attributes if isinstance(module, StandIn) else module
    if not isinstance(inside, Mapping) or id(inside) in above or next(count, None) is None:
        return
    transient = inside.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        own = inside.get(kind)
        for name, value in own.items() if isinstance(own, Mapping) else ():
            if isinstance(value, Tensor) and not (kind == "_buffers" and name in transient):
                yield f"{prefix}{name}", value
    modules = inside.get("_modules")
    for name, child in modules.items() if isinstance(modules, Mapping) else ():
        yield from _of_module(child, f"{prefix}{name}.", {*above, id(inside)}, count)


def _candidates(
    node: str, tensors: Mapping[Any, Tensor], wanted: Mapping[str, Tensor], ties: Sequence[Sequence[str]]
) -> list[Found]:
    """Return the ways to read a dict as the model's state: as it is, and by each prefix the model's names are under."""
    plain = _plainly(tensors)
    ours = _plainly({name: name for name in wanted})
    shared = _shared_prefix(list(ours))
    found = [_by_prefix(node, plain, ours, "", ties)]
    for names in [ours, {name.removeprefix(shared): real for name, real in ours.items()}][: 2 if shared else 1]:
        one, real = next(iter(names.items()), ("", ""))
        tied = {name for name in names if any({names[name], real} <= set(group) for group in ties)}
        ends = [
            key.removesuffix(name)
            for name in sorted({one, *tied})
            for key in plain
            if isinstance(key, str) and f".{key}".endswith(f".{name}")
        ]
        prefixes = [prefix for prefix in dict.fromkeys(ends) if prefix or names is not ours]
        read = [_by_prefix(node, plain, names, prefix, ties) for prefix in prefixes]
        found += [way for way in read if all(name in way.tensors for name in wanted)]
    if any(_fits(one, wanted) and not one.beside for one in found):
        return [one for one in found if not one.beside]
    prefix = _shared_prefix([key for key in plain if isinstance(key, str)])
    return [*found, _by_prefix(node, plain, ours, prefix, ties)] if prefix and len(found) == 1 else found


def _by_prefix(
    node: str, plain: Mapping[Any, Tensor], names: Mapping[str, str], prefix: str, ties: Sequence[Sequence[str]]
) -> Found:
    tensors: dict[str, Tensor] = {}
    beside, taken = [], set(names.values())
    for name, tensor in plain.items():
        short = name[len(prefix) :] if isinstance(name, str) and name.startswith(prefix) else None
        if short is None or (short in taken and short not in names):  # outside, or in the way of a name that is meant
            beside.append(str(name))
        else:
            tensors[names.get(short, short)] = tensor
    for group in ties:
        held = next((tensors[name] for name in group if name in tensors), None)
        tensors |= {name: held for name in group if name not in tensors and held is not None}
    key = ".".join(part for part in (node, prefix.rstrip(".")) if part)
    return Found(key, node, tensors, tuple(beside))


def _plainly(named: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return names without the parts that wrappers put in, unless two would become one."""
    plain = {
        ".".join(part for part in name.split(".") if part not in WRAPPERS) if isinstance(name, str) else name: value
        for name, value in named.items()
    }
    return plain if len(plain) == len(named) else dict(named)


def _shared_prefix(names: Sequence[str]) -> str:
    """Return the longest run of leading parts that all names share, with its dot, and leave each a part of its own."""
    if not names:
        return ""
    least, most = (name.split(".")[:-1] for name in (min(names), max(names)))
    shared = 0
    for a, b in zip(least, most, strict=False):
        if a != b or not all(name.split(".")[shared : shared + 1] == [a] for name in names):
            break
        shared += 1
    return "".join(f"{part}." for part in least[:shared])


# -- whether it fits --------------------------------------------------------------------------------------------------


def _fits(one: Found, wanted: Mapping[str, Tensor]) -> bool:
    return one.tensors.keys() == wanted.keys() and all(
        _shape(one.tensors[name]) == tuple(tensor.shape) for name, tensor in wanted.items()
    )


def _shape(tensor: Tensor) -> tuple[int, ...] | str:
    return "nested" if tensor.is_nested else "unknown" if torch.nn.parameter.is_lazy(tensor) else tuple(tensor.shape)


def _same(one: Found, other: Found, wanted: Mapping[str, Tensor]) -> bool:
    def equal(a: Tensor, b: Tensor) -> bool:
        comparable = a.dtype == b.dtype and a.layout == b.layout == torch.strided and not (a.is_meta or b.is_meta)
        return a is b or (comparable and torch.equal(a, b))

    return all(equal(one.tensors[name], other.tensors[name]) for name in wanted)


def _misfit(one: Found, wanted: Mapping[str, Tensor], path: object) -> str:
    missing = [name for name in wanted if name not in one.tensors]
    surplus = [name for name in [*one.tensors, *one.beside] if name not in wanted]
    reshaped = [
        f"{name} of shape {_shape(one.tensors[name])} instead of {tuple(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in one.tensors and _shape(one.tensors[name]) != tuple(tensor.shape)
    ]
    told = (("lacks", missing), ("adds", surplus), ("has", reshaped))
    faults = [f"{what} {some(names)}" for what, names in told if names]
    near = difflib.get_close_matches(missing[0], surplus, n=1, cutoff=0.7) if missing else []
    hint = f" (is {some(near)} its {missing[0]}?)" if near else ""
    place = f", under {one.key!r}," if one.key else ""
    return (
        f"the checkpoint {path}{place} does not fit the model: it {' and '.join(faults)}{hint}; use the checkpoint of "
        "this architecture."
    )


def _keys(found: Sequence[Found]) -> list[str]:
    return list(dict.fromkeys(one.key or "." for one in found))


def _content(stored: Any) -> str:
    if not isinstance(stored, Mapping):
        return f"a {type(stored).__name__}, not a state dict"
    if {"state", "param_groups"} <= {key for key in stored if isinstance(key, str)}:
        return "the state of an optimizer, not that of a model"
    return f"{some(list(stored)) or 'nothing'} but no state dict"
