"""One batch: the gradient of its loss, or the pull-back of any vector in its outputs, told apart by example.

Parts h_i come from the layers' inputs and the gradients in their outputs. They are not taken on trust: for every
parameter a random projection of their sum is compared with that of autograd's gradient; uses of parameters whose rows
mix examples are found on two examples before; and that each row belongs to its example is proved on all of them, by
scaling every example's part of the vector by a number of its own.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from curvature.autograd.backward import joined, no_autocast, pull_back
from curvature.autograd.lazy_logits import HeadInBlocks, LazyLogits, NotInBlocksError
from curvature.engine.kept_graphs import BUDGET_SHARE
from curvature.environment.memory import keep_freed, lately_available
from curvature.errors import CheckFailedError, DataError, InputError, NonFiniteError
from curvature.losses.rules import CrossEntropy
from curvature.objective.objective import Objective
from curvature.per_example.capture import Capture
from curvature.per_example.columns import ColumnSquares
from curvature.per_example.cutting import layouts_of_uses, leading_size, session
from curvature.per_example.fallback import OneByOne
from curvature.per_example.forms import Direct, Form, merge
from curvature.per_example.head_rows import head_forms, serves
from curvature.per_example.layout import Layout
from curvature.per_example.probe import Probe
from curvature.per_example.row_order import follows
from curvature.per_example.run import Part, Run
from curvature.per_example.tolerances import coarsest_eps, tolerance

__all__ = ["CHUNK_BYTES", "PartOfParameters", "Splitter", "flat_gradient"]

CHUNK_BYTES = 2**25  # temporary tensors: larger ones leave the caches and are slower, too
PartOfParameters = tuple[tuple[int, ...], Form]
"""Places of parameters, and their gradients."""
_NONE: Mapping[int, Form] = {}
_PROVED: WeakKeyDictionary[Objective, set[Any]] = WeakKeyDictionary()
_PROBES: WeakKeyDictionary[Objective, dict[int, Probe]] = WeakKeyDictionary()
_LAYOUTS: WeakKeyDictionary[Objective, dict[Any, tuple[Any, tuple[Layout | None, ...]]]] = WeakKeyDictionary()


class Splitter:
    """Splits gradients of batches into those of their examples.

    Args:
        objective: whose model and loss are known apart.
        route: "auto", "rules", "vmap" or "loop".
        memory_budget: bytes for gradients that are held. Default: half of what is free.

    Raises:
        InputError: for arguments out of range, and for an objective with `loss=None`.
    """

    def __init__(self, objective: Objective, *, route: str, memory_budget: int | None) -> None:
        if route not in ("auto", "rules", "vmap", "loop"):
            raise InputError(f"route must be 'auto', 'rules', 'vmap' or 'loop', got {route!r}.")
        if not objective.has_split:
            raise InputError(
                "per-example gradients need the split between model and loss: give the objective loss= and a forward "
                "that returns (outputs, targets), instead of loss=None."
            )
        keep_freed()  # gradients in all outputs of layers come and go at once
        self._objective, self._evaluator = objective, objective.evaluator
        space = objective.space
        self._params, self._numels = list(space.tensors.values()), space.numels
        self._route = route
        self._serves = route in ("auto", "rules")
        if memory_budget is not None and memory_budget < 1:
            raise InputError(f"memory_budget must be a positive number of bytes, got {memory_budget}.")
        free = BUDGET_SHARE * lately_available(objective.device) if memory_budget is None else memory_budget
        self.budget = int(free)
        self.chunk_bytes = min(CHUNK_BYTES, max(1, self.budget // 4))
        self._probes = _PROBES.setdefault(objective, {})

    @functools.cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)

    def open(self, batch: Any, index: int, *, in_blocks: bool = False) -> Run:
        """Evaluate a batch and record the uses of the parameters; with its logits in blocks, where that is told to."""
        blocks = self._evaluator.head_in_blocks() if in_blocks and self._serves else None
        if blocks is not None:
            with contextlib.suppress(Exception):  # the model's own error comes again without blocks
                run = self._evaluated(batch, index, blocks)
                outputs = run.evaluation.outputs
                served = not isinstance(outputs, LazyLogits) or serves(outputs, self._evaluator.rule, self._params)
                if served and not blocks.refusal:
                    self._evaluator.head_in_use |= run.evaluation.in_blocks
                    return run
                self._serves = served
                del run
            self._evaluator.head_refusal = blocks.refusal
        return self._evaluated(batch, index, None)

    def _evaluated(self, batch: Any, index: int, blocks: HeadInBlocks | None) -> Run:
        capture, buffers = Capture(self._params), self._evaluator.copy_buffers()
        with session(self._evaluator, buffers) as lean, capture:
            evaluation = self._evaluator.evaluate(batch, index, blocks)
        count = leading_size(self._evaluator, batch)
        return Run(batch, index, count, evaluation, capture, buffers, lean.saw_hooks)

    def _backward_session(self, run: Run) -> AbstractContextManager[Any]:
        return session(self._evaluator, run.buffers) if run.runs_again else self._evaluator.backward_session()

    def split(self, run: Run, vectors: Tensor | None = None) -> tuple[tuple[Part, ...], Tensor, Tensor]:
        """Return the parts of a vector's pull-back, their sum (n,) as autograd has it, and the vector; checked.

        Args:
            run: from `open`, of examples that are functions of their own (`refuse_coupling`).
            vectors: in the shape of the outputs; None for the loss's gradient in them, or in what goes into a head that
                works in blocks.

        Raises:
            NotInBlocksError: if parameters have no rules, so that examples are taken one by one: logits must be whole.
        """
        if not run.checked:
            run.layouts = self._layouts_in(run)
        outputs, edges = run.place, [use.edge for use in run.capture.uses]
        assert isinstance(outputs, Tensor)
        inputs: Any = [*edges, *self._params]
        with self._backward_session(run), no_autocast(self._objective.device):
            if vectors is None:
                vectors, *found = pull_back([run.evaluation.loss], [outputs, *inputs])
            else:
                found = list(pull_back([outputs], inputs, [vectors]))
            vectors = torch.zeros_like(outputs) if vectors is None else vectors
            deltas, gradients = found[: len(edges)], found[len(edges) :]
            if not run.checked:
                self._prove_layouts(run, vectors, deltas)
        with torch.no_grad():
            parts, flat = self._parts(run, vectors, deltas, gradients)
        run.checked = True
        return parts, flat, vectors

    @torch.no_grad()
    def sum_of_squares(
        self,
        run: Run,
        columns: Iterable[tuple[Tensor, float | Tensor]],
        source: Any = None,
        also: Callable[[list[PartOfParameters], float | Tensor], object] | None = None,
    ) -> Tensor:
        """Return sum_v sum_i s_vi (h_i of column v)^2 over columns and their signs, (n,).

        Args:
            run: that was split once, so that all checks are made.
            columns: vectors in the outputs, and a sign for all examples or for each (N,).
            source: a place of the graph, if they are vectors there and not in the outputs; rules alone serve then.
            also: takes the gradients of each column and its sign, too.
        """
        assert run.checked
        assert source is None or not run.left
        space, N = self._objective.space, run.num_examples
        inputs: Any = self._params if N == 1 else [use.edge for use in run.capture.uses]
        total = torch.zeros(space.num_params, dtype=space.dtype, device=space.device)
        pieces, sums = total.split(space.numels), dict[int, ColumnSquares]()
        place: Any = run.evaluation.outputs if source is None else source
        for column, sign in columns:
            with self._backward_session(run), no_autocast(space.device):
                found = pull_back([place], inputs, [column]) if inputs else ()
            forms = list(self._forms(run, column, found))
            if also is not None:
                also(forms, sign)
            for positions, form in forms:
                if len(positions) == 1:
                    i = positions[0]
                    sums.setdefault(i, ColumnSquares(pieces[i], self.chunk_bytes)).add(form, sign)
                    continue
                squared = form.squares(total.new_ones(N) * sign, self.chunk_bytes).total
                assert squared is not None
                for k, piece in zip(positions, squared.split(form.numels), strict=True):
                    pieces[k].add_(piece)
        for of_parameter in sums.values():
            of_parameter.flush()
        return total

    def _forms(self, run: Run, column: Tensor, found: Sequence[Tensor | None]) -> Iterator[PartOfParameters]:
        if run.num_examples == 1:
            pieces = self._flat(found, run).split(self._numels)
            yield from (((i,), Direct(piece[None])) for i, piece in enumerate(pieces) if found[i] is not None)
            return
        reached = {use.parameter for use, delta in zip(run.capture.uses, found, strict=True) if delta is not None}
        for i in sorted(reached - set(run.left)):
            form, reason = self._by_rules(i, run, found)
            if form is None:
                raise CheckFailedError(f"{self._objective.space.names[i]}: {reason}")
            yield (i,), form
        if run.left:
            yield tuple(run.left), self._lazy(run, column).held(self.budget // 4)

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _parts(
        self, run: Run, vectors: Tensor, deltas: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> tuple[tuple[Part, ...], Tensor]:
        flat = self._flat(gradients, run)
        pieces = flat.split(self._numels)
        reached = [i for i, gradient in enumerate(gradients) if gradient is not None]
        if run.num_examples == 1:
            return tuple(Part((i,), Direct(pieces[i][None]), "single") for i in reached), flat
        known: list[tuple[int, Form, float]] = []
        run.left = {}
        outputs, of_head = run.evaluation.outputs, dict[int, Form]()
        if isinstance(outputs, LazyLogits):
            rule = self._evaluator.rule
            assert isinstance(rule, CrossEntropy)
            of_head = head_forms(outputs, rule, run.evaluation.targets, run.num_examples, self._params)
        for i in reached:
            form, reason = self._by_rules(i, run, deltas, of_head) if self._route in ("auto", "rules") else (None, "")
            if form is None:
                run.left[i] = reason
                continue
            own = (d for u, d in zip(run.capture.uses, deltas, strict=True) if u.parameter == i)
            known.append((i, form, tolerance(1e3 * coarsest_eps(self._params[i], *own))))
        agree = self._agreements(known, pieces) if known else []
        parts: list[Part] = []
        for (i, form, _), agrees in zip(known, agree, strict=True):
            if agrees:
                parts.append(Part((i,), form, form.route))
            else:
                run.left[i] = "its uses by known layers do not add up to its gradient"
        if run.left:
            if run.evaluation.in_blocks:
                raise NotInBlocksError("examples are taken one by one")
            parts.append(self._one_by_one(run, vectors, pieces))
        return tuple(parts), flat

    def _by_rules(
        self, i: int, run: Run, deltas: Sequence[Tensor | None], of_head: Mapping[int, Form] = _NONE
    ) -> tuple[Form | None, str]:
        """Return the per-example gradients of parameter i from its uses, or why they cannot be had."""
        forms: list[Form] = [of_head[i]] if i in of_head else []
        uses = run.capture.uses
        mine = [k for k, use in enumerate(uses) if use.parameter == i and deltas[k] is not None]
        replaced = {k for k in mine if run.layouts[k] is None and any(uses[j].place.source == k for j in mine)}
        for k in mine:
            use, delta, layout = uses[k], deltas[k], run.layouts[k]
            if k in replaced or (use.place.source is not None and use.place.source not in replaced):
                continue  # what is looked up in a table counts where it is looked up, or where it is used
            form = None
            if layout is not None and delta is not None:
                delta = delta.detach().to(self._objective.dtype)
                form = use.form(delta, run.num_examples, layout, self._params[i])
            if form is None:
                return None, f"rows of {use.kind} do not belong to single examples"
            forms.append(form)
        if not forms:
            return None, "no rule for the functions that use it"
        return merge(forms, self.chunk_bytes), ""

    def _lazy(self, run: Run, vectors: Tensor) -> OneByOne:
        return OneByOne(
            self._evaluator,
            run.batch,
            run.index,
            vectors,
            run.num_examples,
            list(run.left),
            self._objective.dtype,
            loop=self._route == "loop",
        )

    def _one_by_one(self, run: Run, vectors: Tensor, pieces: Sequence[Tensor]) -> Part:
        left = run.left
        names = ", ".join(self._objective.space.names[i] for i in left)
        reason = "; ".join(sorted({r for r in left.values() if r}))
        if self._route == "rules":
            raise InputError(f"route='rules' but {names} cannot be had by rules ({reason}); pass route='auto'.")
        if run.evaluation.drew_random_numbers:
            raise DataError(
                f"{names}: {reason or 'asked for'}, so that examples are taken one by one, and the model draws random "
                "numbers for the whole batch (dropout in train mode?). Call model.eval(), or choose other params."
            )
        if vectors.ndim == 0 or vectors.shape[0] % run.num_examples:
            raise DataError(
                f"the outputs have shape {tuple(vectors.shape)}, which are no rows of {run.num_examples} examples; "
                "pass forward= that returns outputs with the examples along their first dimension."
            )
        lazy = self._lazy(run, vectors)
        form = lazy.held(self.budget // 4)
        total = torch.stack([form.dense(*chunk).sum(0) for chunk in form.chunks(self.chunk_bytes)]).sum(0)
        size = torch.stack([form.dense(*chunk).norm(dim=0) for chunk in form.chunks(self.chunk_bytes)]).norm()
        expected = torch.cat([pieces[i] for i in left])
        eps = coarsest_eps(vectors, *(self._params[i] for i in left))
        rounding = 10 * eps * torch.cat(list(pieces)).norm()  # of parameters whose gradient is zero for every example
        if not bool((total - expected).norm() <= tolerance(1e4 * eps) * run.num_examples**0.5 * size + rounding):
            raise CheckFailedError(
                f"the gradients of single examples do not add up to the gradient of batch {run.index} for "
                f"{names}: examples are coupled (statistics of the batch, a loss that compares examples), "
                "or the loss depends on parameters otherwise than through the outputs."
            )
        why = "; ".join(r for r in (reason, lazy.reason) if r)
        return Part(tuple(left), form, f"{lazy.route}: {why}" if why else lazy.route)

    def _flat(self, gradients: Sequence[Tensor | None], run: Run) -> Tensor:
        return flat_gradient(gradients, self._params, self._objective.dtype, run.index)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _agreements(self, known: Sequence[tuple[int, Form, float]], pieces: Sequence[Tensor]) -> list[bool]:
        """Return whether the sums of the examples' parts are the gradients of the parameters, as projections show."""
        found = []
        for i, form, _ in known:
            if i not in self._probes:
                self._probes[i] = Probe.draw(self._params[i].shape, self._generator, pieces[i])
            found.append((*form.project(self._probes[i]), self._probes[i].of(pieces[i])))
        values, sizes, expected = (torch.stack(of_all) for of_all in zip(*found, strict=True))
        agree: list[bool] = ((values - expected).abs() <= sizes * sizes.new_tensor([t for *_, t in known])).tolist()
        return agree  # after one wait for the device

    def _layouts_in(self, run: Run) -> tuple[Layout | None, ...]:
        """Return where examples lie in the output of each use, found once for an objective in this mode."""
        structure = run.capture.structure
        if run.num_examples == 1 or self._route in ("vmap", "loop"):
            return (None,) * len(structure)
        known = _LAYOUTS.setdefault(self._objective, {})
        key = (structure, tuple((id(m), type(m), m.training) for m in self._evaluator.model.modules()))
        found = known.get(key)
        if found is None:
            found, shown = layouts_of_uses(
                self._evaluator, run.batch, run.index, run.num_examples, in_blocks=run.evaluation.in_blocks
            )
            if shown:
                known[key] = found
        seen, layouts = found
        return layouts if seen == structure else (None,) * len(structure)

    def _prove_layouts(self, run: Run, vectors: Tensor, deltas: Sequence[Tensor | None]) -> None:
        """Keep the layouts that hold for every example: tested once a structure, or each time if the model moves rows.

        Cost: the part of a backward pass that leads to the outputs of uses, a third of a gradient.
        """
        uses, N = run.capture.uses, run.num_examples
        tested = [k for k, delta in enumerate(deltas) if delta is not None and run.layouts and run.layouts[k]]
        proved = _PROVED.setdefault(self._objective, set())
        key = (run.capture.structure, tuple(use.shape for use in uses), run.layouts, N)
        if not tested or (key in proved and not run.capture.moves_rows):
            return
        kept: dict[int, bool] = dict.fromkeys(range(len(uses)), False)
        shown = False  # zeros are in every layout
        if vectors.ndim > 0 and vectors.shape[0] % N == 0:
            scaled, scale = self._scaled(run, vectors)
            found = pull_back([run.place], [uses[k].edge for k in tested], [scaled])
            verdicts, nonzero = [], []
            with torch.no_grad():
                for k, other in zip(tested, found, strict=True):
                    delta, layout, shape = deltas[k], run.layouts[k], uses[k].shape
                    assert delta is not None
                    assert layout is not None
                    reshaped = None if other is None else other.reshape(shape)
                    verdicts.append(follows(delta.reshape(shape), reshaped, layout, scale))
                    nonzero.append(delta.any())
                kept = dict(zip(tested, torch.stack(verdicts).tolist(), strict=True))  # one wait for the device
                shown = bool(torch.stack(nonzero).all())
        if all(kept.values()) and shown:
            proved.add(key)
        run.layouts = tuple(x if kept.get(k, True) else None for k, x in enumerate(run.layouts))

    def holds_examples(self, run: Run, places: Sequence[Any], shapes: Sequence[tuple[int, ...]]) -> bool:
        """Return whether places of the graph have an example in each row, whose gradients scale as its outputs do."""
        outputs = run.evaluation.outputs
        assert isinstance(outputs, Tensor)
        vectors = torch.randn(outputs.shape, generator=self._generator).to(outputs)
        scaled, scale = self._scaled(run, vectors)
        with self._backward_session(run), no_autocast(self._objective.device):
            plain, other = (pull_back([outputs], places, [v]) for v in (vectors, scaled))
        return all(
            len(shape) > 0 and shape[0] == len(scale) and bool(a is not None and follows(a, b, Layout.BLOCKS, scale))
            for a, b, shape in zip(plain, other, shapes, strict=True)
        )

    def _scaled(self, run: Run, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """Return vectors with each example's part multiplied by a number of its own, and the numbers (N,)."""
        scale = torch.randn(run.num_examples, generator=self._generator).to(vectors)
        return (vectors.reshape(run.num_examples, -1) * scale[:, None]).reshape(vectors.shape), scale


def flat_gradient(
    gradients: Sequence[Tensor | None], params: Sequence[Tensor], dtype: torch.dtype, index: int
) -> Tensor:
    """Return gradients of parameters as one vector.

    Raises:
        NonFiniteError: if an entry is not finite.
    """
    flat = joined(gradients, params, dtype)
    if not math.isfinite(float(flat.sum())) and not bool(flat.isfinite().all()):  # the sum is cheap and may overflow
        raise NonFiniteError(f"the gradient is not finite on batch {index}; see objective.check().")
    return flat
