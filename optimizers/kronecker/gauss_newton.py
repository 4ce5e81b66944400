"""Gauss-Newton steps on batches: a few conjugate gradient steps that K-FAC preconditions.

Reference: Martens (2010), Deep learning via Hessian-free optimization; Abreu, Vyas, Kakade and Morwani (2025), The
potential of second-order optimization for LLMs: a study with full Gauss-Newton (arXiv:2510.09378); Martens and Grosse
(2015), for the preconditioner.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from curvature.linalg.systems.cg import cg
from curvature.objective.objective import Objective
from optimizers.kronecker.averages import FACTORS, fold
from optimizers.kronecker.fisher import fisher_columns
from optimizers.kronecker.layers import Layer, remembered_layers
from optimizers.kronecker.preconditioner import LayerPreconditioner
from optimizers.kronecker.statistics import Statistics
from optimizers.kronecker.uncounted import Uncounted
from optimizers.newton.damping import DampingRule, reduction_ratio
from optimizers.newton.evaluations import Evaluations, GaussNewtonMatrix, Linearised
from optimizers.newton.flat import FlatParams
from optimizers.newton.full_batch import Evaluated, FullBatchOptimizer, Move
from optimizers.newton.functions import Function
from optimizers.shared.base import Group
from optimizers.shared.probes import counter_generator
from optimizers.shared.ranks import average_over_ranks, share_of_rank

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from optimizers.newton.evaluations import Kind
    from optimizers.shared.base import Common

__all__ = ["GaussNewton"]

_STREAM = 22  # of the seed: targets that the model draws


class GaussNewton(FullBatchOptimizer):
    """Steps from (G + lambda I) d = -g by a few steps of conjugate gradients, which K-FAC preconditions.

    They start from the last solution. G is the Gauss-Newton matrix of a batch: the one the gradient is of, or that of
    `curvature_closure`, which may be smaller. With `blocks="layer"` it is replaced by its diagonal blocks, one for each
    layer (a weight and its bias).
    The preconditioner is (L (x) R + lambda I)^-1 with the factors of `KFAC`, measured at every step by one draw of
    targets, averaged over steps, and decomposed every `refresh_every` steps; parameters without factors have a diagonal
    measured likewise.

    lambda follows the ratio of the loss's decrease on the gradient's batch to the model's. A step after which the loss
    is more than `tolerance` times its value above it is not taken: on batches a small rise says nothing.

    Cost of a step: a gradient, a backward pass through activations for the draw, `iterations` + 2 products with G
    (about 4/3 gradients of the curvature's batch each), a loss. With `blocks="layer"` a product is one for each layer,
    from its depth on: dearer than all at once. Memory: the graph of J'u, and 8 vectors.

    Args:
        params: parameters or groups of them.
        lr: factor on the step.
        loss: `loss(outputs, targets)`; closures return (outputs, targets).
        blocks: "all", one system; "layer", one for each layer.
        damping: lambda at first; units of G.
        damping_rule: maps (lambda, ratio) to the next lambda; None keeps it. On mini-batches the ratio is near 1 at any
            lambda, which falls to the rule's `minimum`: 1e-3 did best on a character GPT, the default is for full
            batches.
        iterations: steps of conjugate gradients.
        rtol: residual at which they end earlier, relative to |g|.
        warm_start: factor on the last solution; 0 for cold starts.
        tolerance: relative rise of the loss that is let pass; infinite takes every step.
        factor_beta: decay of the factors a step.
        refresh_every: steps between decompositions of the factors, beside those after the first, second, fourth, ...
        max_dim: longest side with a full factor; a longer one keeps its diagonal.
        shared: process_group, seed: see `Common`; there is no maximize.

    Raises:
        InputError: for settings out of range, closures that return no (outputs, targets).
        NonFiniteError: if loss, gradient or factors are not finite at the start of a step.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = GaussNewton(model.parameters(), loss=torch.nn.MSELoss())
        >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)), torch.zeros(4, 2)))
        >>> optimizer.last_step.accepted
        True
    """

    _kept = (*FullBatchOptimizer._kept, "damping_rule")
    _adapted = "damping"
    _counts = ("iterations", "refresh_every", "max_dim")
    _fractions = ("factor_beta",)
    _positive = ("damping", "rtol")
    _least: ClassVar[dict[str, float]] = {"tolerance": 0.0}
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {"blocks": ("all", "layer")}
    _seen: Any  # statistics, capture and what the closure returned, of this step
    _reasons: dict[int, str]
    _uncounted: Uncounted

    def __init__(
        self,
        params: Any,
        lr: float = 1.0,
        *,
        blocks: Literal["all", "layer"] = "all",
        damping: float = 1.0,
        damping_rule: Callable[[float, float], float] | None = DampingRule(  # noqa: B008  a frozen value
            increase=2.0, decrease=0.5, minimum=1e-8
        ),
        iterations: int = 5,
        rtol: float = 1e-6,
        warm_start: float = 0.9,
        tolerance: float = 0.05,
        factor_beta: float = 0.95,
        refresh_every: int = 5,
        max_dim: int = 8192,
        **shared: Unpack[Common],
    ) -> None:
        self.damping_rule = damping_rule
        defaults: Group = {"lr": lr, "blocks": blocks, "damping": damping, "iterations": iterations, "rtol": rtol}
        defaults |= {"warm_start": warm_start, "tolerance": tolerance, "factor_beta": factor_beta}
        defaults |= {"refresh_every": refresh_every, "max_dim": max_dim}
        super().__init__(params, defaults, "ggn", **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        if not 0 <= group["warm_start"] <= 1:
            raise InputError(f"warm_start must be in [0, 1], got {group['warm_start']}.")

    def uncovered(self) -> dict[str, str]:
        """Return the parameters without factors, by name or by place, and why they have none; empty before a step."""
        params = [p for group in self.param_groups for p in group["params"] if p.requires_grad]
        names = {
            id(p): name
            for number, group in enumerate(self.param_groups)
            for p, name in zip(
                group["params"],
                group.get("param_names") or [f"group {number}, parameter {i}" for i in range(len(group["params"]))],
                strict=True,
            )
        }
        return {names[id(params[i])]: reason for i, reason in self._reasons.items()}

    def _evaluations(
        self, flat: FlatParams, closure: Evaluated, curvature_closure: Callable[[], Any] | None, kind: Kind
    ) -> Evaluations:
        """Have the first forward pass of the matrix's closure watched for layers."""
        if isinstance(closure, (Objective, Function)):
            raise InputError(
                f"{type(self).__name__} takes closures that return (outputs, targets): layers are found as they run."
            )
        self._seen = None
        statistics = Statistics(flat.params, self._uncounted)

        def watched(inner: Callable[[], Any]) -> Callable[[], Any]:
            def run() -> Any:
                if self._seen is not None:
                    return inner()
                with statistics.capture() as capture:
                    returned = inner()
                self._seen = (statistics, capture, returned)
                return returned

            return run

        if curvature_closure is None:
            closure = watched(closure)
        else:
            curvature_closure = watched(curvature_closure)
        return super()._evaluations(flat, closure, curvature_closure, kind)

    def _move(self, evaluations: Evaluations, here: Linearised) -> Move:
        group, flat, g, start = self.param_groups[0], evaluations.flat, here.gradient, evaluations.start
        layers, states = self._measured(flat)
        damping, matrix = float(group["damping"]), here.matrix
        assert isinstance(matrix, GaussNewtonMatrix)
        last = self._recall(flat, "newton_direction") if group["warm_start"] > 0 else None
        x0 = None if last is None else group["warm_start"] * last
        if group["blocks"] == "all":
            P = LayerPreconditioner(flat, layers, states, damping)
            d, model, solver = self._solved(matrix, g, damping, P, x0)
        else:
            d, model, solver = self._by_layers(matrix, flat, layers, states, g, damping, x0)
        self._remember(flat, newton_direction=d)
        slope, rates = float(g @ d), self._rates(flat)
        step = rates * d
        if isinstance(rates, float):
            model = rates * slope + rates**2 * (model - slope)  # the difference is d'G d / 2
        else:
            model = float(g @ step) + self._bend(matrix, flat, layers, step)
        loss = evaluations.value(start + step)
        ratio = reduction_ratio(here.loss, loss, -model, torch.finfo(flat.dtype).eps) if model < 0 else math.nan
        rise = group["tolerance"] * abs(here.loss) if math.isfinite(group["tolerance"]) else math.inf
        accepted = loss <= here.loss + rise
        if self.damping_rule is not None and not (accepted and math.isnan(ratio)):
            self._adapt(self.damping_rule(damping, ratio if accepted else -math.inf))
        if not accepted:
            self._remember(flat, newton_direction=torch.zeros_like(d))
            return Move(None, here.loss, solver, "the loss would rise beyond the tolerance", -model, ratio)
        return Move(step, loss, solver, f"taken under damping {damping:.2g}", -model, ratio)

    def _solved(self, A: Any, g: Tensor, damping: float, P: Any, x0: Tensor | None) -> tuple[Tensor, float, str]:
        """Return d, g'd + d'A d / 2 and how conjugate gradients ended; from zero, if the start ended above zero."""
        group = self.param_groups[0]
        settings = {"rtol": group["rtol"], "max_iterations": group["iterations"]}
        for start in (None,) if x0 is None else (x0, None):
            found = cg(A, -g, damping=damping, preconditioner=P, x0=start, **settings)
            assert found.model_history is not None
            damped = float(found.model_history[~found.model_history.isnan()][-1])
            if damped < 0 and float(g @ found.x) < 0:
                break
        return found.x, damped - damping / 2 * float(found.x @ found.x), found.status.value

    def _by_layers(
        self,
        matrix: GaussNewtonMatrix,
        flat: FlatParams,
        layers: list[Layer],
        states: list[Any],
        g: Tensor,
        damping: float,
        x0: Tensor | None,
    ) -> tuple[Tensor, float, str]:
        covered = {i for layer in layers for i in layer.members}
        parts, models, solver = list(torch.zeros_like(g).split(flat.sizes)), [], ""
        pieces = g.split(flat.sizes)
        starts = None if x0 is None else x0.split(flat.sizes)
        for places in _blocks(flat, layers):
            part = FlatParams([flat.params[i] for i in places])
            one = [Layer(0, 1 if len(places) > 1 else None)] if places[0] in covered else []
            P = LayerPreconditioner(part, one, [states[i] for i in places], damping)
            b = torch.cat([pieces[i] for i in places])
            if not bool(b.any()):
                continue
            begin = None if starts is None else torch.cat([starts[i] for i in places])
            found, model, solver = self._solved(matrix.block(places), b, damping, P, begin)
            models.append(model)
            for i, piece in zip(places, found.split(part.sizes), strict=True):
                parts[i] = piece
        return torch.cat(parts), math.fsum(models), solver

    def _bend(self, matrix: GaussNewtonMatrix, flat: FlatParams, layers: list[Layer], step: Tensor) -> float:
        """Return step' G step / 2, with G as the system had it: one product more, or one a layer."""
        if self.param_groups[0]["blocks"] == "all":
            return float(step @ (matrix @ step)) / 2
        pieces, bends = step.split(flat.sizes), []
        for places in _blocks(flat, layers):
            part = torch.cat([pieces[i] for i in places])
            if bool(part.any()):
                bends.append(float(part @ (matrix.block(places) @ part)) / 2)
        return math.fsum(bends)

    def _measured(self, flat: FlatParams) -> tuple[list[Layer], list[Any]]:
        """Take this batch's factors into the averages, and return layers by places in `flat`, and states."""
        assert self._seen is not None
        (statistics, capture, (outputs, targets)), self._seen = self._seen, None
        group, rule = self.param_groups[0], self._rule
        assert rule is not None
        rank = 0 if self.process_group is None else self.process_group.rank()
        generator = counter_generator(torch.device("cpu"), _STREAM, group["seed"], group["num_steps"], rank)
        columns = list(fisher_columns("monte-carlo", rule, outputs, targets, [generator]))
        places = range(len(flat.params))
        dims, dtypes = dict.fromkeys(places, group["max_dim"]), dict.fromkeys(places, "float32")
        kept: dict[str, Any] = {"max_dims": dims, "dtypes": dtypes, "states": lambda _: None}
        statistics.observe(capture, outputs, columns, weight=1.0, sharing="expand", **kept)
        squares = self._squares(outputs, columns, [flat.params[i] for i in statistics.reasons])
        if self.process_group is not None:
            share = share_of_rank(self, outputs, targets)
            statistics.average(self.process_group, share)
            squares = average_over_ranks(squares, self.process_group, share)
        statistics.refuse_non_finite()
        states: list[Any] = [self.state[p] for p in flat.params]
        known = remembered_layers(states)
        for state in states:
            state.setdefault("step", torch.zeros((), dtype=torch.float32))
        for i in {j for k in statistics.uncounted.reasons if k in known for j in known[k].members}:
            for name in FACTORS:
                states[i].pop(name, None)
        for main, layer in statistics.layers.items():
            if any(known.get(i) != layer for i in layer.members):
                for name in FACTORS:
                    for i in layer.members:
                        states[i].pop(name, None)
            for i in layer.members:
                states[i]["layer"] = torch.tensor(main)
            fold(states[main], statistics.sums[main], group, by_bases=True)
        beta = group["factor_beta"]
        for i, square in zip(statistics.reasons, squares, strict=True):
            seen = float(states[i].get("diagonal_weight", 0.0)) * beta + 1 - beta
            old = states[i].get("diagonal")
            states[i]["diagonal"] = square if old is None else old.lerp(square, (1 - beta) / seen)
            states[i]["diagonal_weight"] = torch.tensor(seen, dtype=torch.float64)
        self._reasons = dict(statistics.reasons)
        layers = list(dict.fromkeys(remembered_layers(states).values()))
        for i, state in enumerate(states):
            if "diagonal" not in state and "layer" not in state:
                state["diagonal"] = torch.zeros_like(flat.params[i], dtype=flat.dtype)
        return layers, states

    @staticmethod
    def _squares(outputs: Tensor, columns: list[tuple[Tensor, float]], params: list[Tensor]) -> list[Tensor]:
        """Return the squares of J'u for a drawn u, an estimate of the diagonal of G."""
        total = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in params]
        for column, sign in columns if params else ():
            found = torch.autograd.grad(outputs, params, column.to(outputs.dtype), retain_graph=True, allow_unused=True)
            for t, d in zip(total, found, strict=True):
                if d is not None:
                    t.add_(d.to(t.dtype).square(), alpha=sign)
        return total

    def _forget(self) -> None:
        super()._forget()
        self._seen, self._reasons, self._uncounted = None, {}, Uncounted()


def _blocks(flat: FlatParams, layers: list[Layer]) -> list[tuple[int, ...]]:
    """Return the places of the parameters of each layer, and those of every other parameter."""
    covered = {i for layer in layers for i in layer.members}
    return [layer.members for layer in layers] + [(i,) for i in range(len(flat.params)) if i not in covered]
