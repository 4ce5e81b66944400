"""K-FAC: natural gradients with one Kronecker product a layer.

Reference: Martens and Grosse (2015), Optimizing neural networks with Kronecker-factored approximate curvature; Grosse
and Martens (2016), for convolutions; Eschenhagen, Immer, Turner, Schneider and Hennig (2023), Kronecker-factored
approximate curvature for modern neural network architectures (expand and reduce).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo

from curvature.engine.repeated_evaluation import RunningBuffers
from curvature.environment.autocast import as_around
from curvature.errors import CheckFailedError, InputError
from optimizers.kronecker.averages import adam_members, exchange, fold, layer_directions
from optimizers.kronecker.eigen import DTYPES
from optimizers.kronecker.factors import State
from optimizers.kronecker.fisher import FISHERS, fisher_columns, has_terms
from optimizers.kronecker.layers import Layer, remembered_layers
from optimizers.kronecker.shell import MatrixCommon, MatrixOptimizer, Routed
from optimizers.kronecker.statistics import Statistics
from optimizers.kronecker.uncounted import Uncounted
from optimizers.shared.base import Group, check_choice
from optimizers.shared.closures import loss_of, own_gradients
from optimizers.shared.gradients import all_zero
from optimizers.shared.probes import counter_generator
from optimizers.shared.ranks import compare_ranks, on_all_ranks, share_of_rank

if TYPE_CHECKING:
    from torch.amp import GradScaler
    from typing_extensions import Unpack

__all__ = ["KFAC"]

_STREAM = 21  # of the seed: targets that the model draws


class KFAC(MatrixOptimizer):
    """Natural gradients with a Kronecker product for each layer's block of the Fisher matrix, and AdamW for the rest.

    For a layer whose gradient is sum_t l_t r_t' over its positions t (`optimizers.kronecker.layers`):

        L = EMA of sum_t l_t l_t'      R = EMA of the mean of r_t r_t'      M = EMA of the gradient [W b]
        factored    D = (L + pi sqrt(damping) I)^-1 M (R + sqrt(damping) / pi I)^-1,  pi^2 = mean eigenvalue of L / of R
        exact       D = (L (x) R + damping I)^-1 M
        graft       W <- W - lr D |Adam's update| / |D| - lr weight_decay W

    Layers are found in the forward pass: linear maps (attention's too), convolutions, embeddings (a diagonal factor
    over the table), scales and shifts of normalisation layers (their exact block, or its diagonal), tied weights. AdamW
    moves what has no factors; `routes()` says which that is, and why. Averages are corrected for their start at zero,
    and their decay is per step, however rarely they are measured.

    Steps. The closure returns (outputs, targets) and calls no backward():

        optimizer.step(lambda: (model(x), y))

        optimizer.zero_grad()                                  # the same from micro-batches
        for x, y in parts:
            optimizer.accumulate(lambda: (model(x), y), weight=len(y) / total)
        optimizer.step()

        loss.backward()                                        # where statistics are not due, as any optimizer
        if optimizer.statistics_due:
            optimizer.accumulate(lambda: (model(x), y), part="statistics")
        optimizer.step()

    First derivatives only. A loss that is a sum has the factors of the mean, times the number of terms; how a batch is
    cut into parts changes nothing, the targets that are drawn included. With a `GradScaler`:
    `accumulate(closure, scaler=scaler)`, `scaler.step(optimizer)`. With ranks see `MatrixOptimizer`; closures may call
    the `DistributedDataParallel` wrapper. `torch.distributed.checkpoint` loads into tensors that are there: take a step
    on any batch with a new optimizer, then load model and state. Models in parts (`fully_shard`) are trained by
    `Sharded(model, KFAC, loss=..., ...)`: every rank then keeps all factors.

    Cost of a step with statistics: a backward pass through activations for each column ("monte-carlo": num_samples,
    "empirical": 1, "type-2": the outputs of an example), and for a layer with T positions T (o^2 + i^2)
    multiplications; a refresh o^3 + i^3; every step 2 o i (o + i). Memory: Adam's, and two of o^2 + i^2.

    Args:
        params: parameters, named parameters, or groups of them. Settings may differ by group, but for `fisher`,
            `sharing`, `num_samples`, `update_every` and `seed`.
        lr: learning rate; with `graft="adam"` one for Adam.
        betas: decay of the gradient's average and of its square's.
        eps: added to Adam's denominator.
        weight_decay: decoupled, times lr.
        loss: `loss(outputs, targets)`; required.
        fisher: "monte-carlo", targets drawn from the model's distribution (for a loss that is no likelihood: random
            combinations of the columns of its Hessian's root); "empirical", the targets there are, each term of the
            loss an example (`optimizers.kronecker.fisher`); "type-2", the Gauss-Newton matrix without chance.
        damping: units of the matrix, that is of loss per squared parameter.
        damping_form: "factored" or "exact", see above.
        factor_beta: decay of the factors a step.
        graft: "adam", a layer's step is as long as Adam's would be; "rms", root mean square entry 0.2; None, D itself.
        kl_clip: scales all steps by nu <= 1 with nu^2 sum lr^2 D . M <= kl_clip, each parameter by its own lr, also
            where M and the gradient part; None for none.
        sharing: where a layer's weights are used at several positions of an example: "expand" takes each as an example,
            "reduce" the mean of the inputs and the sum of the gradients. Examples are what its output's first dimension
            counts.
        update_every: steps between measurements of the factors.
        refresh_every: steps between inversions, beside those after the first, second, fourth, ... measurement.
        num_samples: draws of "monte-carlo" an example.
        max_dim: longest side with a full factor; a longer one keeps its diagonal, and so does a vector beyond 256.
        factor_dtype: "float64" adds up, averages, decomposes and applies factors in it, whatever the model's dtype.
        shared: method, adamw_scale, adamw_betas, check_finite, foreach, maximize, seed, process_group: see
            `MatrixCommon` and `Common`.

    Raises:
        InputError: for settings out of range; for a closure that does not return (outputs, targets).
        CheckFailedError: if statistics are due, there are gradients, and nothing was measured.
        NonFiniteError: if factors or gradients are not finite; nothing has moved then.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = KFAC(model.named_parameters(), loss=torch.nn.functional.cross_entropy)
        >>> loss = optimizer.step(lambda: (model(torch.ones(4, 3)), torch.tensor([0, 1, 1, 0])))
        >>> optimizer.routes()
        {'weight': 'KFAC, 2 x 3', 'bias': 'KFAC, 2'}
    """

    _late_settings: ClassVar[dict[str, Any]] = {
        **MatrixOptimizer._late_settings,
        **{"fisher": "monte-carlo", "damping": 1e-3, "damping_form": "factored", "factor_beta": 0.95, "graft": "adam"},
        **{"kl_clip": None, "sharing": "expand", "update_every": 1, "refresh_every": 10, "num_samples": 1},
        **{"max_dim": 8192, "factor_dtype": "float32", "num_steps": 0},
    }
    _takes_parts = False
    _counts = ("update_every", "refresh_every", "num_samples", "max_dim")
    _fractions = ("factor_beta",)
    _alike = ("fisher", "sharing", "num_samples", "update_every", "seed")
    _positive = ("damping",)
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **MatrixOptimizer._choices,
        **{"fisher": FISHERS, "damping_form": ("factored", "exact"), "sharing": ("expand", "reduce")},
        **{"factor_dtype": tuple(DTYPES)},
    }
    _corrects_eigenvalues = False

    _statistics: Statistics | None
    _layers: dict[int, Layer] | None
    _generators: list[torch.Generator] | None
    _reasons: dict[int, str]
    _uncounted: Uncounted

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        fisher: Literal["monte-carlo", "empirical", "type-2"] = "monte-carlo",
        damping: float = 1e-3,
        damping_form: Literal["factored", "exact"] = "factored",
        factor_beta: float = 0.95,
        graft: Literal["adam", "rms"] | None = "adam",
        kl_clip: float | None = None,
        sharing: Literal["expand", "reduce"] = "expand",
        update_every: int = 1,
        refresh_every: int = 10,
        num_samples: int = 1,
        max_dim: int = 8192,
        factor_dtype: Literal["float32", "float64"] = "float32",
        **shared: Unpack[MatrixCommon],
    ) -> None:
        if shared.get("loss") is None:
            raise InputError(
                f"{type(self).__name__} needs loss=, e.g. loss=torch.nn.functional.cross_entropy, and closures that "
                "return (outputs, targets)."
            )
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "fisher": fisher}
        defaults |= {"damping": damping, "damping_form": damping_form, "factor_beta": factor_beta, "graft": graft}
        defaults |= {"kl_clip": kl_clip, "sharing": sharing, "update_every": update_every}
        defaults |= {"refresh_every": refresh_every, "num_samples": num_samples, "max_dim": max_dim}
        defaults |= {"factor_dtype": factor_dtype}
        super().__init__(params, defaults, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate({**group, "method": "auto"} if group["method"] == "matrix" else group)
        if group["graft"] is not None:
            check_choice("graft", group["graft"], ("adam", "rms"))
        if group["kl_clip"] is not None and not group["kl_clip"] > 0:
            raise InputError(f"kl_clip must be positive, or None, got {group['kl_clip']!r}.")

    # -- layers -------------------------------------------------------------------------------------------------------

    def _all_params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _known_layers(self) -> dict[int, Layer]:
        """Return the layers seen so far, by the place of each of their parameters; those of a loaded state, too."""
        if self._layers is None:
            self._places = {id(p): place for place, p in enumerate(self._all_params())}
            self._layers = remembered_layers([self.state.get(p, {}) for p in self._all_params()])
        return self._layers

    def _refusal(self, p: Tensor, group: Group) -> str | None:  # noqa: ARG002
        layers = self._known_layers()
        place = self._places.get(id(p))
        if place in layers:
            return None
        return self._reasons.get(-1 if place is None else place, "no layer was seen to use it yet")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its layers get factors when statistics are measured next."""
        self._layers = None
        super().add_param_group(param_group)

    def _matrix_state(self, p: Tensor, group: Group) -> State:  # noqa: ARG002
        wide = torch.promote_types(p.dtype, torch.float32)
        return {name: torch.zeros_like(p, dtype=wide) for name in ("exp_avg", "exp_avg_sq")}

    def _units(self, group: Group) -> list[list[Tensor]]:
        if self._corrects_eigenvalues:
            return []  # all ranks rotate their rows into the bases of all layers, and so keep them
        params, own = self._all_params(), {id(p) for p in group["params"]}
        layers = {layer.main: layer for layer in self._known_layers().values()}
        return [[params[i] for i in layer.members] for main, layer in layers.items() if id(params[main]) in own]

    # -- statistics ---------------------------------------------------------------------------------------------------

    @property
    def statistics_due(self) -> bool:
        """Whether the coming step measures factors."""
        first = self.param_groups[0]
        return bool(first["num_steps"] % first["update_every"] == 0) or not self._known_layers()

    @on_all_ranks
    @_disable_dynamo
    @torch.no_grad()
    def accumulate(
        self,
        closure: Callable[[], Any],
        *,
        weight: float = 1.0,
        part: Literal["both", "gradient", "statistics"] = "both",
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """Add a batch's gradient to `.grad`, and its factors to the coming step's, where they are due.

        Stands in for `loss.backward()`. Micro-batches with weights that add up to 1 give the step of the joined batch.

        Args:
            closure: returns (outputs, targets).
            weight: factor on the batch's loss.
            part: "gradient" and "statistics" leave out the other one.
            scaler: scales the gradients; factors are unscaled.

        Returns:
            The loss, detached and without weight.
        """
        check_choice("part", part, ("both", "gradient", "statistics"))
        self._refuse_unlike(*self.param_groups)
        return self._run(closure, weight, part, scaler)[0]

    def _run(self, closure: Callable[[], Any], weight: float, part: str, scaler: Any) -> tuple[Tensor, Tensor, Any]:
        measured, params = part != "gradient" and self.statistics_due, self._all_params()
        self._forget_if_cleared()
        chosen = [p if g["method"] != "adamw" else p.new_empty(0) for g in self.param_groups for p in g["params"]]
        statistics = self._statistics or Statistics(chosen, self._uncounted)
        capture = statistics.capture() if measured else contextlib.nullcontext()
        with contextlib.ExitStack() as stack:
            if part == "statistics":
                buffers = RunningBuffers()
                stack.enter_context(buffers.watched())
                stack.enter_context(buffers.evaluation(moves=False))
            if measured:
                stack.enter_context(self._no_wrapper_alone())
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(as_around())
            stack.enter_context(torch.enable_grad())
            stack.enter_context(own_gradients(params))
            with capture:
                returned = closure()
            loss, outputs, targets = loss_of(returned, self.loss)
        if outputs is None or not outputs.requires_grad:
            raise InputError(
                "the closure must return (outputs, targets), the outputs with their graph: compute them from the "
                "parameters with gradients enabled, do not detach them, and leave the loss to loss=."
            )
        if measured and has_terms(self._rule, outputs, targets):  # type: ignore[arg-type]
            self._statistics = statistics
            self._observe(capture, outputs, targets, weight)
        if part != "statistics":
            with torch.enable_grad():
                scaled = loss if weight == 1.0 else loss * weight
                (scaled if scaler is None else scaler.scale(scaled)).backward()
            if self.process_group is None:
                self._refuse_unreached()
        if self._statistics is not None:
            self._follow(came=part != "statistics")
        return loss.detach(), outputs, targets

    def _observe(self, capture: Any, outputs: Tensor, targets: Any, weight: float) -> None:
        first, rule, statistics = self.param_groups[0], self._rule, self._statistics
        assert rule is not None and statistics is not None  # noqa: PT018
        if self._generators is None:  # on the host, and the same through all micro-batches: cuts change no number
            rank = 0 if self.process_group is None else self.process_group.rank()
            counters = (torch.device("cpu"), _STREAM, first["seed"], first["num_steps"], rank)
            self._generators = [counter_generator(*counters, sample) for sample in range(first["num_samples"])]
        groups = [group for group in self.param_groups for _ in group["params"]]
        statistics.observe(
            capture,
            outputs,
            fisher_columns(first["fisher"], rule, outputs, targets, self._generators),
            weight=weight,
            sharing=first["sharing"],
            max_dims=dict(enumerate(group["max_dim"] for group in groups)),
            dtypes=dict(enumerate(group["factor_dtype"] for group in groups)),
            states=lambda i: self.state.get(statistics.params[i]) if self._corrects_eigenvalues else None,
        )
        self._reasons = statistics.reasons
        states = [self.state.get(p, {}) for p in statistics.params]
        changed = exchange(self._known_layers(), statistics.layers.values(), self._uncounted.reasons, states)
        self._split = None if changed else self._split

    def _forget_measured(self) -> None:
        super()._forget_measured()
        self._statistics, self._generators = None, None

    def _forget(self) -> None:
        super()._forget()
        self._layers, self._reasons, self._uncounted = None, {}, Uncounted()

    # -- steps --------------------------------------------------------------------------------------------------------

    def _evaluated(self, closure: Callable[[], Any]) -> tuple[Any, float]:
        self.zero_grad()
        loss, outputs, targets = self._run(closure, 1.0, "both", None)
        return loss, 1.0 if self.process_group is None else share_of_rank(self, outputs, targets)

    def _synchronize(self, share: float) -> None:
        super()._synchronize(share)
        if self.process_group is not None and self._statistics is not None:
            compare_ranks(self, f"factors of {self._statistics.structure}")
            self._statistics.average(self.process_group, share)

    def _move(self) -> None:
        self._forget_if_cleared()
        statistics = self._statistics
        if statistics is None and self.statistics_due:
            if not all_zero([p.grad for p in self._all_params() if p.grad is not None]):
                raise CheckFailedError(
                    "factors are due at this step and nothing was measured: call step(closure) or accumulate(closure) "
                    "with a closure that returns (outputs, targets) and calls no backward(); after loss.backward(), "
                    'accumulate(closure, part="statistics") wherever optimizer.statistics_due. Nothing has moved.'
                )
        elif statistics is not None:
            if self.check_finite:
                statistics.refuse_non_finite()
            for group in self.param_groups:  # known from here on, where it is not when a group is added
                if group["method"] == "matrix":
                    super()._validate(group)
        super()._move()
        params = self._all_params()
        for place, layer in self._known_layers().items():
            if self.state.get(params[place]):
                self.state[params[place]]["layer"] = torch.tensor(layer.main)
        for group in self.param_groups:
            group["num_steps"] += 1
        self._forget_measured()

    def _all_directions(self, routed: list[Routed]) -> list[list[Tensor]]:
        params = self._all_params()
        members = {id(p): member for one in routed for p, member in zip(one.params, adam_members(one), strict=True)}
        sums = {} if self._statistics is None else self._statistics.sums
        found, falls = dict[int, Tensor](), list[Tensor]()
        for layer in dict.fromkeys(self._known_layers().values()):
            own = [members[id(params[i])] for i in layer.members if id(params[i]) in members]
            if len(own) < len(layer.members):
                continue  # another rank's work, or without a gradient in this step: Adam's direction
            group, state = own[0].group, own[0].state
            if layer.main in sums:
                by_bases = self._corrects_eigenvalues or group["damping_form"] == "exact"
                fold(state, sums[layer.main], group, by_bases=by_bases)
            directions = layer_directions(own, group)
            if group["kl_clip"] is not None:
                slopes = [m.group["lr"] ** 2 * (d * m.average).sum() for d, m in zip(directions, own, strict=True)]
                falls.append(torch.stack(slopes).sum() / group["kl_clip"])
            found |= {id(params[i]): d for i, d in zip(layer.members, directions, strict=True)}
        scale = self._clip(falls)
        return [[scale * found.get(id(p), members[id(p)].adam) for p in one.params] for one in routed]

    def _clip(self, falls: list[Tensor]) -> Tensor | float:
        """Return the factor on all steps; `falls` are layers' lr^2 D . M in units of kl_clip."""
        if not any(group["kl_clip"] is not None for group in self.param_groups):
            return 1.0
        device = self.param_groups[0]["params"][0].device
        total = torch.stack([torch.zeros((), device=device), *(f.to(device, torch.float32) for f in falls)]).sum()
        if self._working_group is not None and not self._corrects_eigenvalues:
            dist.all_reduce(total, group=self._working_group)
        return total.clamp(min=1.0).rsqrt()
