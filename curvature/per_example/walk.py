"""One pass over the data: every batch's per-example gradients, each parameter's in the form that its uses allow.

With l_b the loss of batch b and h_i the part of its gradient that example i contributes, sum_i h_i = grad l_b. The
parts come from the layers' inputs and the gradients in their outputs, all of one forward and one backward pass. They
are not taken on trust: for every parameter of every batch, a random projection of their sum is compared with that of
autograd's gradient; uses of parameters whose rows mix examples are found on two examples before; and that each row
belongs to its example is proved on all of them, by scaling every example's part of the loss by a number of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from curvature.autograd.backward import no_autocast, pull_back
from curvature.engine.evaluation import Evaluation
from curvature.errors import CheckFailedError, DataError, InputError, NonFiniteError
from curvature.losses.rules import AnyLoss
from curvature.objective.coupling import refuse_coupling
from curvature.objective.dependence import Dependence
from curvature.objective.objective import Objective
from curvature.per_example.capture import Capture
from curvature.per_example.cutting import layouts_of_uses, leading_size, session
from curvature.per_example.fallback import OneByOne
from curvature.per_example.forms import Direct, Form, Probe, merge
from curvature.per_example.layout import Layout
from curvature.per_example.proof import Run, with_proof

__all__ = ["Group", "Part", "Walk"]

_COARSEST = 0.05  # relative difference that a check lets pass in the narrowest dtypes
_PROVED: WeakKeyDictionary[Objective, set[Any]] = WeakKeyDictionary()
_LAYOUTS: WeakKeyDictionary[Objective, dict[Any, tuple[Any, tuple[Layout | None, ...]]]] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """The gradients of some parameters."""

    positions: tuple[int, ...]
    """Places of the parameters in the objective's space."""
    form: Form
    route: str
    """How they were had; a second clause says why not by a rule."""


@dataclass(frozen=True)
class Group:
    """Examples whose gradients come out of one backward pass."""

    places: Tensor
    """(E,), their numbers in the whole data."""
    weights: Tensor
    """(E,), float64: how much each counts."""
    scale: Tensor
    """(E,): g_i = scale_i h_i, up to the total weight of a summed loss."""
    share: float
    """What `gradient` counts in the objective's, before division by the total weight."""
    gradient: Tensor
    """(n,), sum_i h_i."""
    parts: tuple[Part, ...]
    """What does not occur here has gradient zero."""


class Walk:
    """A pass over the per-example gradients of an objective.

    Attributes:
        num_examples: seen so far.
        num_backwards: backward passes through whole batches so far.
        num_batches: batches seen so far.
        num_groups: groups yielded so far.
        loss: sum of the batches' losses times what they count, so far; (), float64.

    Args:
        objective: whose model and loss are known apart.
        per: "sequence" or "target".
        route: "auto", "rules", "vmap" or "loop".
        chunk_bytes: size of temporary tensors.
        hold_bytes: what gradients without a rule may hold.
    """

    def __init__(self, objective: Objective, *, per: str, route: str, chunk_bytes: int, hold_bytes: int) -> None:
        _validate(objective, per, route)
        self._objective, self._evaluator = objective, objective._evaluator
        self._params = list(objective.space.tensors.values())
        self._per, self._route = per, route
        self._chunk_bytes, self._hold_bytes = chunk_bytes, hold_bytes
        self._generator = torch.Generator().manual_seed(0)
        self._probes: dict[int, Probe] = {}
        self.num_examples = self.num_backwards = 0
        self.num_batches = 0
        self._dependence = Dependence(objective._dependence.whole)
        self.num_groups = 0
        self.loss = torch.zeros((), dtype=torch.float64, device=objective.device)

    def __iter__(self) -> Iterator[Group]:
        """Yield the groups in the order of the data."""
        for index, batch in enumerate(self._objective.batches()):
            self.num_batches += 1
            for group in self._batch(batch, index):
                self.num_groups += 1
                yield group
        self._dependence.require(self._evaluator)

    def count_terms(self) -> float:
        """Return the sum of all weights, over ranks too. Cost: a forward pass."""
        total = 0.0
        for index, batch in enumerate(self._objective.batches()):
            with session(self._evaluator, self._evaluator.copy_buffers()), torch.no_grad():
                evaluation = self._evaluator.evaluate(batch, index)
            total += float(self._terms(evaluation, leading_size(self._evaluator, batch), index).sum())
        if self._objective._ranks is not None:
            _, total = self._objective._ranks.sum(torch.zeros(0, dtype=torch.float64), total)
        return total

    # -- one batch ----------------------------------------------------------------------------------------------------

    def _batch(self, batch: Any, index: int) -> Iterator[Group]:
        N = leading_size(self._evaluator, batch)
        capture, buffers = Capture(self._params), self._evaluator.copy_buffers()
        with session(self._evaluator, buffers), capture:
            evaluation = self._evaluator.evaluate(batch, index)
        self._dependence.note_loss(evaluation.loss, evaluation.weight, self._params)
        terms = self._terms(evaluation, N, index)
        if N > 1:
            refuse_coupling(self._objective, batch, index)
        if evaluation.loss.requires_grad and not evaluation.outputs.requires_grad:  # type: ignore[union-attr]
            raise CheckFailedError(
                "the loss depends on the chosen parameters but the model's outputs do not: no example has a part in it."
            )
        run = Run(batch, index, N, evaluation, capture.uses, self._layouts_in(batch, index, N, capture))
        per_sequence = self._per == "sequence"
        start = self.num_examples
        width = 1 if per_sequence else terms.shape[1]
        self.num_examples += N * width
        counts = terms.sum(1, keepdim=True) if per_sequence else terms
        share = 1.0 if self._objective.sums else evaluation.weight
        if evaluation.weight != 0:
            self.loss += share * evaluation.loss.detach().double()
        total = float(terms.sum())
        if evaluation.weight == 0 or total == 0 or not evaluation.loss.requires_grad:
            weights = counts * (evaluation.weight / total if total > 0 and not self._objective.sums else 1.0)
            yield self._empty(start, weights.reshape(-1))
            return
        weights = counts if self._objective.sums else counts * (evaluation.weight / total)
        sums = []
        columns = [c for c in range(width) if bool(counts[:, c].any())]
        for c in columns:
            with session(self._evaluator, buffers), no_autocast(self._objective.device):
                vectors, deltas, gradients = self._pull_back(run, None if per_sequence else (c, width))
            self.num_backwards += 1
            if c == columns[0]:
                with session(self._evaluator, buffers), no_autocast(self._objective.device):
                    proved = _PROVED.setdefault(self._objective, set())
                    run = with_proof(run, capture, vectors, deltas, self._generator, proved)
            with torch.no_grad():
                self._check_weightless(vectors, counts[:, c], index)
                parts, flat = self._parts(run, vectors, deltas, gradients)
            sums.append(flat)
            places = start + c + width * torch.arange(N, device=flat.device)
            scale = torch.where(weights[:, c] > 0, share / weights[:, c], 0.0).to(flat.dtype)
            yield Group(places, weights[:, c], scale, share, flat, parts)
        for c in set(range(width)) - set(columns):
            yield self._empty(start + c, weights[:, c], width)
        if not per_sequence:
            self._check_columns(batch, index, torch.stack(sums).sum(0))

    def _pull_back(
        self, run: Run, column: tuple[int, int] | None
    ) -> tuple[Tensor, Sequence[Tensor | None], Sequence[Tensor | None]]:
        """Return the gradient in the outputs, in the outputs of the uses, and in the parameters."""
        evaluation, edges = run.evaluation, [use.edge for use in run.uses]
        outputs = evaluation.outputs
        assert isinstance(outputs, Tensor)
        inputs: Any = [*edges, *self._params]
        if column is None:
            found_vectors, *found = pull_back([evaluation.loss], [outputs, *inputs])
        else:
            (found_vectors,) = pull_back([evaluation.loss], [outputs])
            c, width = column
            mask = _column_mask(outputs, evaluation.targets, self._evaluator.rule, run.num_examples, c, width)
            found_vectors = torch.zeros_like(outputs) if found_vectors is None else found_vectors * mask
            found = list(pull_back([outputs], inputs, [found_vectors]))
        vectors = torch.zeros_like(outputs) if found_vectors is None else found_vectors
        return vectors, found[: len(edges)], found[len(edges) :]

    # -- parameters ---------------------------------------------------------------------------------------------------

    def _parts(
        self, run: Run, vectors: Tensor, deltas: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> tuple[tuple[Part, ...], Tensor]:
        flat = self._flat(gradients, run.index)
        pieces = flat.split(self._objective.space.numels)
        parts: list[Part] = []
        left: dict[int, str] = {}
        known: list[tuple[int, Form, Tensor]] = []
        for i, gradient in enumerate(gradients):
            if gradient is None:
                continue
            if run.num_examples == 1:
                parts.append(Part((i,), Direct(pieces[i][None]), "single"))
                continue
            form, reason = self._by_rules(i, run, deltas) if self._route in ("auto", "rules") else (None, "")
            if form is not None:
                own = (d for u, d in zip(run.uses, deltas, strict=True) if u.parameter == i)
                eps = _coarsest_eps(self._params[i], *own)
                known.append((i, form, self._agreement(i, form, pieces[i], eps)))
            else:
                left[i] = reason
        agree = torch.stack([verdict for *_, verdict in known]).tolist() if known else []  # one wait for the device
        for (i, form, _), agrees in zip(known, agree, strict=True):
            if agrees:
                parts.append(Part((i,), form, form.route))
            else:
                left[i] = "its uses by known layers do not add up to its gradient"
        if left:
            parts.append(self._one_by_one(run, left, vectors, pieces))
        return tuple(parts), flat

    def _by_rules(self, i: int, run: Run, deltas: Sequence[Tensor | None]) -> tuple[Form | None, str]:
        """Return the per-example gradients of parameter i from its uses, or why they cannot be had."""
        forms: list[Form] = []
        mine = [k for k, use in enumerate(run.uses) if use.parameter == i and deltas[k] is not None]
        replaced = {k for k in mine if run.layouts[k] is None and any(run.uses[j].place.source == k for j in mine)}
        for k in mine:
            use, delta, layout = run.uses[k], deltas[k], run.layouts[k]
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
        return merge(forms, self._chunk_bytes), ""

    def _agreement(self, i: int, form: Form, gradient: Tensor, eps: float) -> Tensor:
        """Return whether the sum of the examples' parts is the gradient of parameter i, as a projection shows; ()."""
        if i not in self._probes:
            self._probes[i] = Probe.draw(self._params[i].shape, self._generator, gradient)
        value, size = form.project(self._probes[i])
        return (value - self._probes[i].of(gradient)).abs() <= min(1e3 * eps, _COARSEST) * size

    def _one_by_one(self, run: Run, left: dict[int, str], vectors: Tensor, pieces: Sequence[Tensor]) -> Part:
        names = [self._objective.space.names[i] for i in left]
        reason = "; ".join(sorted({r for r in left.values() if r}))
        if self._route == "rules":
            raise InputError(
                f"route='rules' but {', '.join(names)} cannot be had by rules ({reason}); pass route='auto'."
            )
        if run.evaluation.drew_random_numbers:
            raise DataError(
                f"{', '.join(names)}: {reason or 'asked for'}, so that examples are taken one by one, and the model "
                "draws random numbers for the whole batch (dropout in train mode?). Call model.eval(), or choose other "
                "params."
            )
        if vectors.ndim == 0 or vectors.shape[0] % run.num_examples:
            raise DataError(
                f"the outputs have shape {tuple(vectors.shape)}, which are no rows of {run.num_examples} examples; "
                "pass forward= that returns outputs with the examples along their first dimension."
            )
        lazy = OneByOne(
            self._evaluator,
            run.batch,
            run.index,
            vectors,
            run.num_examples,
            list(left),
            self._objective.dtype,
            loop=self._route == "loop",
        )
        form = lazy.held(self._hold_bytes)
        total = torch.stack([form.dense(*chunk).sum(0) for chunk in form.chunks(self._chunk_bytes)]).sum(0)
        size = torch.stack([form.dense(*chunk).norm(dim=0) for chunk in form.chunks(self._chunk_bytes)]).norm()
        expected = torch.cat([pieces[i] for i in left])
        eps = _coarsest_eps(vectors, *(self._params[i] for i in left))
        rounding = 10 * eps * torch.cat(list(pieces)).norm()  # of parameters whose gradient is zero for every example
        if not bool((total - expected).norm() <= min(1e4 * eps, _COARSEST) * run.num_examples**0.5 * size + rounding):
            raise CheckFailedError(
                f"the gradients of single examples do not add up to the gradient of batch {run.index} for "
                f"{', '.join(names)}: examples are coupled (statistics of the batch, a loss that compares examples), "
                "or the loss depends on parameters otherwise than through the outputs."
            )
        why = "; ".join(r for r in (reason, lazy.reason) if r)
        return Part(tuple(left), form, f"{lazy.route}: {why}" if why else lazy.route)

    # -- weights and checks -------------------------------------------------------------------------------------------

    def _terms(self, evaluation: Evaluation, N: int, index: int) -> Tensor:
        """Return the weights of the loss terms, (N, terms of an example), float64."""
        rule, outputs = self._evaluator.rule, evaluation.outputs
        assert rule is not None
        if not isinstance(outputs, Tensor):
            raise InputError(
                f"per-example gradients need outputs that are one tensor, got {type(outputs).__name__}; pass forward= "
                "that picks it."
            )
        weights = rule.term_weights(outputs, evaluation.targets).double()
        if weights.ndim == 0 or weights.shape[0] % N:
            raise DataError(
                f"batch {index} has {N} examples along the first dimension of its inputs and loss terms of shape "
                f"{tuple(weights.shape)}; pass forward= that returns targets with the examples along their first "
                "dimension, or rows of them in the order of the examples."
            )
        return weights.reshape(N, -1)

    def _layouts_in(self, batch: Any, index: int, N: int, capture: Capture) -> tuple[Layout | None, ...]:
        """Return where examples lie in the output of each use, found once for an objective in this mode."""
        structure = capture.structure
        if N == 1 or self._route in ("vmap", "loop"):
            return (None,) * len(structure)
        known = _LAYOUTS.setdefault(self._objective, {})
        key = (structure, tuple((id(m), type(m), m.training) for m in self._evaluator.model.modules()))
        if key not in known:
            known[key] = layouts_of_uses(self._evaluator, batch, index, N)
        seen, layouts = known[key]
        return layouts if seen == structure else (None,) * len(structure)

    def _check_weightless(self, vectors: Tensor, weights: Tensor, index: int) -> None:
        N = len(weights)
        if vectors.ndim == 0 or vectors.shape[0] % N or bool((weights > 0).all()):
            return
        if bool(vectors.reshape(N, -1)[weights == 0].count_nonzero()):
            raise DataError(
                f"batch {index} holds examples of weight zero whose loss has a gradient all the same (label smoothing "
                "of a class with weight zero?): a mean over their terms does not exist."
            )

    def _check_columns(self, batch: Any, index: int, total: Tensor) -> None:
        """Compare the sum over targets with the gradient: does the loss come from single outputs only?"""
        evaluator = self._evaluator
        with session(evaluator, evaluator.copy_buffers()), no_autocast(self._objective.device):
            loss = evaluator.evaluate(batch, index).loss
            gradient = self._flat(pull_back([loss], self._params), index)
        eps = _coarsest_eps(*self._params)
        if not bool((gradient - total).norm() <= min(1e4 * eps, _COARSEST) * (gradient.norm() + total.norm())):
            raise CheckFailedError(
                f"the gradients of single targets do not add up to the gradient of batch {index}: the loss is no sum "
                "of terms that depend on the outputs of one target each. Use per='sequence'."
            )

    def _flat(self, gradients: Sequence[Tensor | None], index: int) -> Tensor:
        dtype = self._objective.dtype
        flat = torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).reshape(-1).to(dtype)
                for g, p in zip(gradients, self._params, strict=True)
            ]
        ).detach()
        if not bool(flat.sum().isfinite()) and not bool(flat.isfinite().all()):  # the sum is cheap and may overflow
            raise NonFiniteError(f"the gradient is not finite on batch {index}; see objective.check().")
        return flat

    def _empty(self, start: int, weights: Tensor, step: int = 1) -> Group:
        places = start + step * torch.arange(len(weights), device=weights.device)
        zero = torch.zeros(self._objective.num_params, dtype=self._objective.dtype, device=self._objective.device)
        return Group(places, weights, torch.zeros_like(weights).to(zero.dtype), 0.0, zero, ())


def _validate(objective: Objective, per: str, route: str) -> None:
    if per not in ("sequence", "target"):
        raise InputError(f"per must be 'sequence' or 'target', got {per!r}.")
    if route not in ("auto", "rules", "vmap", "loop"):
        raise InputError(f"route must be 'auto', 'rules', 'vmap' or 'loop', got {route!r}.")
    if not objective.has_split:
        raise InputError(
            "per-example gradients need the split between model and loss: give the objective loss= and a forward that "
            "returns (outputs, targets), instead of loss=None."
        )


def _column_mask(outputs: Tensor, targets: Any, rule: Any, N: int, column: int, width: int) -> Tensor:
    """Return 1 where an output belongs to the loss term of this column, else 0; broadcasts to `outputs`."""
    shape = rule.term_weights(outputs, targets).shape
    mask = torch.zeros(N, width, dtype=outputs.dtype, device=outputs.device)
    mask[:, column] = 1
    mask = mask.view(shape)
    if width == 1 or outputs.shape == shape:
        return mask.view(*shape, *[1] * (outputs.ndim - len(shape))) if outputs.ndim >= len(shape) else mask
    if isinstance(rule, AnyLoss) and not isinstance(rule.loss, nn.NLLLoss):
        raise InputError(
            f"per='target' needs to know which outputs, {tuple(outputs.shape)}, belong to which of the loss terms, "
            f"{tuple(shape)}, and the loss is not one of torch's; use per='sequence'."
        )
    return mask.unsqueeze(1)


def _coarsest_eps(*tensors: Tensor | None) -> float:
    return max(torch.finfo(t.dtype).eps for t in tensors if t is not None)
