"""Is the function still the one that the graphs were built at?

`Freshness.look()` takes in all that can be seen without evaluating anything: contents of parameters, buffers and other
tensors, Python state of the modules and of what the objective calls, batches in memory. Two looks are compared entry by
entry. What cannot be seen (state behind a compiled function, random numbers from outside torch) shows in values only:
now and then a batch is evaluated once more, and always before an answer made of many products is returned.
"""

from __future__ import annotations

import math
import operator
import time
import weakref
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from curvature.autograd.backward import dtypes_of_graph
from curvature.autograd.lean import LeanLayers
from curvature.data.tensors import tensors_in
from curvature.environment import autocast
from curvature.environment.lock import one_at_a_time
from curvature.environment.one_matrix import in_run, in_use, note_use
from curvature.errors import CheckFailedError
from curvature.fingerprints.contents import Contents
from curvature.fingerprints.digest import version
from curvature.fingerprints.python_state import Key, PythonState
from curvature.losses.recognised import loss_rule
from curvature.objective.cancellation import see_cancellation
from curvature.objective.comparison import follow
from curvature.objective.dependence import Dependence
from curvature.objective.interface import ObjectiveLike
from curvature.objective.moving import moving_module

if TYPE_CHECKING:
    from curvature.engine.linearize import Linearization

__all__ = ["Freshness"]

_DATA_ENTRIES = 2**12  # of batches in memory that are looked at, in stripes; writes that autograd counts are all seen
_SHARE = 0.02  # of the time between them, what evaluating a batch once more may take ...
_LOOKS = 0.03  # ... and looks within one run, which looks again before its answer is returned
_MOVED = "something that cannot be seen from outside (a loss, forward or model whose results changed)"


@dataclass(frozen=True)
class Look:
    """What was seen."""

    state: PythonState
    loader: PythonState
    """What makes the batches, where these are not in memory."""
    contents: Contents
    others: list[tuple[int, int]]
    """Ids and versions of parameters that no module holds; `contents` keeps them alive."""
    data: Contents
    sources: list[Any]
    """Batches in memory and their tensors, or what makes batches; known by their ids, and kept alive for it."""
    settings: tuple[object, ...]
    """Of torch: autocast and the default dtype."""
    measured: dict[Hashable, Any] = field(default_factory=dict)
    """What was measured at this point, and is to be measured once."""

    def stands(self, sources: list[Any]) -> bool:
        """Say whether another look would see the same; False where only that look can tell."""
        same = len(sources) == len(self.sources) and all(map(operator.is_, sources, self.sources))
        same = same and self.settings == _settings()
        return same and self.state.stands() and self.loader.stands() and self.contents.stand() and self.data.stand()


@dataclass(frozen=True)
class _Witness:
    """A batch and what it gave when it was first evaluated at this point."""

    batch: Any
    index: int
    loss: Tensor
    outputs: Any
    lean: LeanLayers
    in_blocks: bool


class Freshness:
    """Holds an objective to its present point: graphs of another one are dropped, and no answer mixes two.

    Args:
        objective: whose model, loss, data and parameters are watched.
    """

    def __init__(self, objective: ObjectiveLike) -> None:
        self._latest: Look | None = None
        self._volatile: set[Key] = set()
        self._ref = weakref.ref(objective)  # no cycle, so that graphs are freed with the objective
        self._forget()

    @property
    def _objective(self) -> ObjectiveLike:
        objective = self._ref()
        assert objective is not None
        return objective

    def _forget(self) -> None:
        self._point: Look | None = None
        self._volatile.clear()
        self._losses: dict[int, tuple[int, Tensor]] = {}
        self._witness: _Witness | None = None
        self._checked, self._cost = time.perf_counter(), 0.0
        self._turn = 0
        self._looked, self._look_cost = -math.inf, 0.0
        self._versions: tuple[int, ...] = ()

    # -- at the ends of a walk over the data --------------------------------------------------------------------------

    def enter(self) -> None:
        """Drop what belongs to another point; to be called before each walk.

        Raises:
            CheckFailedError: if the point moved although a run of products with one matrix goes on.
        """
        recent = in_use(self) and time.perf_counter() - self._looked < self._look_cost / _LOOKS
        if recent and self._versions == self._present_versions() and self._objective.shards is None:
            return
        with one_at_a_time:
            self._enter()
        note_use(self)

    def _enter(self) -> None:
        start = time.perf_counter()
        now = self.look()
        self._looked = time.perf_counter()
        self._look_cost = self._looked - start
        if in_run():  # else nobody asks for them
            self._versions = self._present_versions()
        what = [] if self._point is None else self._changes(self._point, now)
        first, shards = self._point is None, self._objective.shards
        if shards is not None and follow(self._objective, moved=bool(what) or first):
            what = what or ["parameters that other ranks hold"] * (not first)
            now = self.look()  # FSDP2 has set itself up, where the model's own forward pass ran for the first time
        if what:
            self._move(what, structure=self._point is not None and now.state.changes(self._point.state) != set())
        elif len(self._objective.kept) > 0 and time.perf_counter() - self._checked >= self._cost / _SHARE:
            self._repeat()
        if self._point is None:
            self._objective._space.verify()
            self._point = now

    def _present_versions(self) -> tuple[int, ...]:
        return tuple(version(t) for t in self._watched())

    def _watched(self) -> Iterable[Tensor]:
        """Return the chosen parameters; whole copies of what ranks hold in parts are none of them."""
        return () if self._objective.shards is not None else self._objective.space.tensors.values()

    def built(self, lin: Linearization, mark: int) -> None:
        """Compare a batch that was evaluated anew with what it gave before at this point."""
        if self._witness is None:
            self._witness = _witness_of(lin, keep_outputs=False)
            self.measured()["recorded"] = dtypes_of_graph([lin.graph_root()])
        known = self._losses.get(lin.index)
        if known is None:
            see_cancellation(self.measured(), lin)
        if known is None or known[0] != mark:
            self._losses[lin.index] = (mark, lin.loss)
        elif lin.weight != 0 and not _agree(known[1], lin.loss, _scale_of(lin)):
            if not self._agrees(_witness_of(lin, keep_outputs=True), recorded=True):
                self._refuse_noise()
            mixed = lin.index > 0
            self._move([_MOVED])
            self.enter()
            self._losses[lin.index] = (mark, lin.loss)
            if mixed:  # batches of this walk were those of before
                raise CheckFailedError(f"{_MOVED} during a walk over the data; call again.")

    def leave(self) -> None:
        """Learn, after a walk in which graphs were built, what evaluating the model changes by itself."""
        if self._point is None:
            return
        with one_at_a_time:
            after = self.look()
        self._volatile |= after.state.changes(self._point.state) | after.loader.changes(self._point.loader)
        if self._changes(self._point, after):  # a forward pass that writes to parameters
            self._point = after
            self._objective.release()

    def confirm(self) -> None:
        """Look once more, and evaluate a batch once more, before an answer made of many products is returned.

        Raises:
            CheckFailedError: if anything moved.
            DataError: if a loader gives other data.
        """
        if self._ref() is None or self._point is None:
            return
        with one_at_a_time:
            what = self._changes(self._point, self.look())
            if what:
                self._move(what, mixed=True)
            self._objective.source.confirm()
            self._repeat(mixed=True)

    def check_kept(self) -> None:
        """Evaluate every batch whose graph is kept once more, unless a look tells already that graphs will be dropped.

        Raises:
            CheckFailedError: if one of them gives something else.
        """
        with one_at_a_time:
            if self._point is None or self._changes(self._point, self.look()):
                return
            for _ in range(len(self._objective.kept)):
                self._repeat()
                if self._point is None:
                    raise CheckFailedError(
                        f"{_MOVED} since graphs were built: products since then may be of the function as it was. The "
                        "graphs are dropped; call again, and call objective.release() after each change of this kind."
                    )

    def point(self) -> object:
        """Return an object that stands for the present point: the same one until anything changes."""
        self.enter()
        return self._point

    def current(self) -> object:
        """Return what `point` does as of the latest walk, without a look."""
        return self.point() if self._point is None else self._point

    def measured(self) -> dict[Hashable, Any]:
        """Return what was measured at the point of the latest walk, to add to; of no account before it."""
        return {} if self._point is None else self._point.measured

    # -- looking ------------------------------------------------------------------------------------------------------

    def look(self) -> Look:
        """Take in what there is to be seen. Cost: little more than one read of the parameters."""
        objective = self._objective
        data = objective.source
        batches: list[Any] = []
        leaves: list[Tensor] = []
        made_by: dict[str, Any] = {}
        if data.in_memory:
            batches = list(data.given)
            leaves = [t for batch in batches for t in tensors_in(batch)]
        elif isinstance(data.given, DataLoader):
            made_by = {"dataset": data.given.dataset, "collate_fn": data.given.collate_fn}
        else:
            made_by = {"loader": data.given}
        sources = [*batches, *leaves, *made_by.values()]
        if self._latest is not None and self._latest.stands(sources):
            return self._latest
        evaluator = objective.evaluator
        loss = None if objective.rule is None else objective.rule.loss
        called = {"loss": loss, "forward": evaluator.forward, "weight": evaluator.weight}
        state = PythonState(objective.model, called, self._volatile)
        loader = PythonState(None, made_by, self._volatile)
        met = {id(t) for t in state.parameters}
        others = [t for t in self._watched() if id(t) not in met]
        contents = Contents([*state.parameters, *others, *state.buffers])
        if data.in_memory:
            of_data = Contents(leaves, max(64, _DATA_ENTRIES // max(1, len(leaves))))
        else:
            of_data = Contents([*loader.parameters, *loader.buffers])
        known = [(id(t), version(t)) for t in others]
        self._latest = Look(state, loader, contents, known, of_data, sources, _settings())
        return self._latest

    def _changes(self, before: Look, after: Look) -> list[str]:
        """Say what differs, in words."""
        if before is after:
            return []
        names = sorted({repr(str(name)) for _, name in after.state.changes(before.state) - self._volatile})
        found = [*names[:3], "..."] if len(names) > 3 else names
        if before.contents.found != after.contents.found or before.others != after.others:
            found = ["values of parameters or buffers", *found]
        same = before.data.found == after.data.found and before.data.places == after.data.places
        same = same and [*map(id, before.sources)] == [*map(id, after.sources)]
        if not same or after.loader.changes(before.loader) - self._volatile:
            found.append("the data")
        return found if before.settings == after.settings else [*found, "autocast or the default dtype"]

    # -- evaluating once more -----------------------------------------------------------------------------------------

    def _repeat(self, *, mixed: bool = False) -> None:
        kept = list(self._objective.kept)
        if kept:
            self._turn += 1
            witness = _witness_of(kept[self._turn % len(kept)], keep_outputs=True)
        elif self._witness is not None:
            witness = self._witness
        else:
            return
        start = time.perf_counter()
        agrees = self._agrees(witness, recorded=False) or self._agrees(witness, recorded=True)
        self._checked = time.perf_counter()
        self._cost = self._checked - start
        if agrees:
            return
        loss, outputs = self._evaluate(witness, recorded=True)
        if not self._agrees(replace(witness, loss=loss, outputs=outputs), recorded=True):
            self._refuse_noise()
        self._move([_MOVED], mixed=mixed)
        self._point = None

    def _agrees(self, witness: _Witness, *, recorded: bool) -> bool:
        try:
            loss, outputs = self._evaluate(witness, recorded=recorded)
        except RuntimeError:
            if recorded:
                raise
            return False  # a forward pass that differentiates in the parameters itself
        scale = witness.loss.abs()
        if isinstance(witness.outputs, Tensor) and isinstance(outputs, Tensor):
            size = _size(witness.outputs)
            if witness.outputs.shape != outputs.shape or not _agree(witness.outputs, outputs, size):
                return False
            scale = scale + size.to(scale)
        return _agree(witness.loss, loss, scale)

    def _evaluate(self, witness: _Witness, *, recorded: bool) -> tuple[Tensor, Any]:
        """Evaluate a batch as its linearisation did, or without recording a graph; grad mode stays on for both."""
        evaluator = self._objective.evaluator
        with evaluator.session(evaluator.copy_buffers(), witness.lean.alike()):
            try:
                for p in evaluator.parameters:
                    p.requires_grad_(recorded)
                found = evaluator.evaluate(
                    witness.batch, witness.index, evaluator.head_in_blocks() if witness.in_blocks else None
                )
            finally:
                for p in evaluator.parameters:
                    p.requires_grad_(True)
        return found.loss.detach(), found.shown

    # -- what follows -------------------------------------------------------------------------------------------------

    def _move(self, what: list[str], *, mixed: bool = False, structure: bool = False) -> None:
        objective = self._objective
        in_run = mixed or in_use(self)
        objective.release()
        if structure and objective.rule is not None:  # its reduction or hooks may be others; refused at each call
            objective.rule = objective.evaluator.rule = loss_rule(objective.settings["loss"])
        if structure or "the data" in what:  # what was proved of these modules and batches is to be proved again
            for proof in (objective.trust, objective.cuts, objective.evaluator):
                proof.forget()
        if "the data" in what:
            objective.source.reset()
        objective.dependence, objective._total_weight = Dependence(objective.dependence.whole), None
        self._forget()
        if in_run:
            raise CheckFailedError(
                f"{', '.join(what)} changed while products with one matrix went on: the answer would mix two. Leave "
                "model, loss and data as they are until the call returns."
            )

    def _refuse_noise(self) -> None:
        self._objective.release()
        self._forget()
        raise CheckFailedError(
            f"two evaluations of one batch at the same parameters differ: {moving_module(self._objective)}"
        )


def _settings() -> tuple[object, ...]:
    return (*autocast.present(), torch.get_default_dtype())


def _witness_of(lin: Linearization, *, keep_outputs: bool) -> _Witness:
    found = lin._evaluation
    return _Witness(lin.batch, lin.index, lin.loss, found.shown if keep_outputs else None, lin._lean, found.in_blocks)


def _scale_of(lin: Linearization) -> Tensor:
    outputs, size = lin._evaluation.shown, lin.loss.abs()
    return size if outputs is None else size + _size(outputs).to(size)


def _size(t: Tensor) -> Tensor:
    return t.abs().max().nan_to_num() if t.numel() and not t.is_complex() else torch.zeros((), device=t.device)


def _agree(a: Tensor, b: Tensor, scale: Tensor) -> bool:
    """Say whether two results are equal up to rounding; what is not finite must be so in both."""
    if a.dtype != b.dtype or torch.equal(a, b):
        return a.dtype == b.dtype
    eps = torch.finfo(a.dtype).eps if a.is_floating_point() else 0.0
    tolerance = (100 if eps < 1e-6 else 4) * eps * float(scale.nan_to_num())
    return bool(torch.isclose(a, b, rtol=0, atol=tolerance, equal_nan=True).all())
