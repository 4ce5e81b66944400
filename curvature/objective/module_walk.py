"""A walk over the data for which no rank holds whole parameters: they are gathered module by module.

Ranks make the same collectives in the same order, whatever data they hold. Before each, they compare in a small message
where they are; a rank that has nothing to compute, as its batches are used up, it has none or one that counts nothing,
takes part in what the others ask for. Ranks at different modules, or in walks for different things, and one that
failed, are found out by that message.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from curvature.environment.memory import return_unused
from curvature.fingerprints.portable import text_digest
from curvature.objective.leaks import Leaks
from curvature.objective.module_graph import Call, Pass, whole_in_graph
from curvature.objective.shards import Shards
from curvature.objective.standing_in import param_dtypes, without_hooks
from curvature.sharding.layout import Layout

__all__ = ["Walk"]

_BEGIN, _PARAMETERS, _DIRECTIONS, _CONTRIBUTE = range(4)


class Walk:
    """What the ranks exchange while they walk over their data.

    Args:
        shards: the parameters.
        ranks: compares the ranks.
        vectors: (k, entries of this rank), what is multiplied; None for a gradient.
        chosen: how vectors lie over the ranks; None where nothing is differentiated.
        what: the walk is for, which must be the same on all ranks.

    Attributes:
        total: (k, entries of this rank), the sum over batches and ranks of weight * product.
        weight: of the batch at work.
    """

    def __init__(
        self, shards: Shards, ranks: Any, vectors: Tensor | None, chosen: Layout | None, what: str = "the loss"
    ) -> None:
        count = "" if vectors is None else f" with {len(vectors)} vectors"
        entries = "" if chosen is None else f" ({chosen.num_entries} entries, {text_digest(chosen.positions):x})"
        self._what = f"a walk over the data for {what}{count}{entries}"
        self.shards, self.ranks, self.vectors, self.chosen = shards, ranks, vectors, chosen
        self.which: Pass = "build"
        self.leaks = Leaks()
        self.row, self.weight, self.num_sums = 0, 0.0, 0
        self.total: Tensor | None = None
        named = list(shards.leaves)
        self.parts = [shards.present(name) for name in named]
        self._is_installed, self._on_cpu = False, self.parts[0].device.type == "cpu"
        if chosen is not None:
            for i in chosen.positions:
                self.parts[i].requires_grad_()
            dtype = torch.float32 if vectors is None else vectors.dtype
            for i in chosen.positions:
                dtype = torch.promote_types(dtype, self.parts[i].dtype)
            self.give_back()  # an earlier total's, say, of which the C library does not make this one
            self.total = self.parts[0].new_zeros(1 if vectors is None else len(vectors), chosen.num_local, dtype=dtype)
        self._held: dict[tuple[int, bool], Tensor] = {}
        self._groups: list[tuple[int, ...]] = [(i,) for i in range(len(named))]
        self._modules: list[tuple[nn.Module, dict[str, int]]] = []
        self._others: list[tuple[nn.Module, dict[str, int]]] = []
        places: dict[nn.Module, dict[str, int]] = {}
        for module, key, name in shards.places:
            places.setdefault(module, {})[key] = named.index(name)
        for module, keys in places.items():
            inside = any(child in places for child in module.modules() if child is not module)
            group = tuple(sorted(set(keys.values())))
            if inside or len({self.parts[i].dtype for i in group}) > 1:
                self._others.append((module, keys))
                continue
            self._modules.append((module, keys))
            self._groups += [group] if group not in self._groups else []

    # -- what modules ask for -----------------------------------------------------------------------------------------

    def parameters(self, places: tuple[int, ...]) -> list[Tensor]:
        """Return whole parameters."""
        found = self._exchanged(_PARAMETERS, places)
        shapes = self.shards.layout.of(places).shapes
        pieces = found[0].split([int(torch.Size(shape).numel()) for shape in shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    def directions(self, places: tuple[int, ...]) -> dict[int, Tensor]:
        """Return their parts of the vector that is multiplied, whole."""
        chosen = self._chosen(places)
        layout = self.shards.layout.of(chosen)
        found = self._exchanged(_DIRECTIONS, places)
        pieces = found[0].split([int(torch.Size(shape).numel()) for shape in layout.shapes])
        return {i: p.view(shape) for i, p, shape in zip(chosen, pieces, layout.shapes, strict=True)}

    def contribute(self, places: tuple[int, ...], products: Mapping[int, Tensor]) -> None:
        """Add weight * products, summed over the ranks, to this rank's part of the total."""
        chosen = self._chosen(places)
        if not chosen:
            return
        assert self.total is not None
        layout = self.shards.layout.of(chosen)
        sizes = [int(torch.Size(shape).numel()) for shape in layout.shapes]
        flat = [products[i].reshape(-1) if i in products else None for i in chosen]
        rows = [self.total.new_zeros(n) if f is None else f.to(self.total) for f, n in zip(flat, sizes, strict=True)]
        self._exchanged(_CONTRIBUTE, places, _joined(rows)[None])

    def _chosen(self, places: Sequence[int]) -> tuple[int, ...]:
        return tuple(i for i in places if self.chosen is not None and i in self.chosen.positions)

    def _exchanged(self, what: int, places: tuple[int, ...], rows: Tensor | None = None) -> Any:
        code = what + 4 * (self._groups.index(places) + len(self._groups) * self.row)
        with torch._C.DisableTorchFunction():  # what watches the model would be asked at each call
            self.ranks.step(code, self._what)
            return self._taken(what, places, self.row, rows)

    def _taken(self, what: int, places: tuple[int, ...], row: int, rows: Tensor | None) -> Any:
        """Take part in a collective; with nothing to contribute, where rows is None."""
        self.give_back()  # what the module before had
        if what == _PARAMETERS:
            mine = _joined([self.parts[i].detach().reshape(-1) for i in places])
            return self.shards.layout.of(places).whole(mine[None])
        assert self.chosen is not None
        chosen = self._chosen(places)
        layout, starts = self.shards.layout.of(chosen), self.chosen.local_starts[self.chosen.rank]
        slices = [slice(starts[j], starts[j + 1]) for j in map(self.chosen.positions.index, chosen)]
        if what == _DIRECTIONS:
            assert self.vectors is not None
            mine = _joined([self.vectors[row, s] for s in slices]).to(self.parts[places[0]].dtype)
            return layout.whole(mine[None])
        assert self.total is not None
        self.num_sums += 1
        mine = self.total.new_zeros(1, layout.num_entries) if rows is None else rows
        found = layout.summed(mine, self.shards.data, self.weight)[0]
        first = 0
        for s in slices:
            self.total[row, s] += found[first : first + s.stop - s.start]
            first += s.stop - s.start
        return None

    def give_back(self) -> None:
        """Let go of memory that nobody uses and the C library keeps."""
        if self._on_cpu:
            return_unused()

    # -- the ranks in step --------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Take part in what other ranks ask for, until none asks for anything."""
        while (code := self.ranks.step(None, self._what)) is not None:
            place, what = divmod(code, 4)
            row, group = divmod(place, len(self._groups))
            self._taken(what, self._groups[group], row, None)

    def in_step(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield this rank's batches, each together with one of every rank that has more."""
        for batch in batches:
            self.ranks.step(_BEGIN, self._what)
            self._held.clear()
            yield batch
            self._held.clear()
            self.serve()
        while self.ranks.step(None, self._what) is not None:
            self.serve()

    # -- in the model -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Have modules gather their parameters when they run, inside the context."""
        if self._is_installed:
            yield
            return
        dtypes = param_dtypes(self.shards.model)
        every = [*self._modules, *self._others]
        before = [(module, module._parameters, module.__dict__.get("forward")) for module, _ in every]
        with without_hooks(self.shards.model), self.leaks:
            self._is_installed = True
            try:
                for module, keys in self._modules:
                    forward, dtype = module.forward, dtypes.get(module)
                    module.forward = _recorded(self, module, keys, forward, dtype)
                for module, keys in every:
                    parts = {key: self.parts[i] for key, i in keys.items()}
                    module._parameters = _Gathered({**module._parameters, **parts}, self, keys, dtypes.get(module))
                yield
            finally:
                self._is_installed = False
                for module, parameters, own in before:
                    module._parameters = parameters
                    module.__dict__.pop("forward", None)
                    if own is not None:
                        module.__dict__["forward"] = own

    def held(self, place: int) -> Tensor:
        """Return a whole parameter, recorded, and held as long as the batch is at work."""
        key = (place, torch.is_grad_enabled())
        if key not in self._held:
            self._held[key] = whole_in_graph(self, place)
        return self._held[key]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


def _recorded(walk: Walk, module: nn.Module, keys: dict[str, int], forward: Any, dtype: Any) -> Callable[..., Any]:
    def called(*args: Any, **kwargs: Any) -> Any:
        return Call(walk, module, keys, forward, dtype)(*args, **kwargs)

    return called


class _Gathered(dict[str, Any]):
    """The parameters of a module; what reads one outside of its forward function gathers it."""

    def __init__(self, values: Mapping[str, Any], walk: Walk, keys: Mapping[str, int], dtype: Any) -> None:
        super().__init__(values)
        self._walk, self._keys, self._dtype = walk, keys, dtype

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            return super().__getitem__(key)
        place = self._keys[key]
        if self._walk.parts[place].requires_grad:
            self._walk.leaks.refuse_inside("a weight of another module, a tensor")
        found = self._walk.held(place)
        return found if self._dtype is None or not found.is_floating_point() else found.to(self._dtype)
