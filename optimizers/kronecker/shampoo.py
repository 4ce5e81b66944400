"""Shampoo: gradients between inverse roots of two Kronecker factors.

References: Gupta, Koren and Singer (2018), Shampoo: preconditioned stochastic tensor optimization; Anil, Gupta, Koren,
Regan and Singer (2020), Scalable second order optimization for deep learning (grafting, blocks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.kronecker.eigen import DTYPES, eigenbasis, restarted_if_overflown
from optimizers.kronecker.matrices import (
    Block,
    add_to_factors,
    as_matrix,
    blocks_of,
    by_blocks,
    factor_state,
    refusal,
    refuse_decay,
)
from optimizers.kronecker.shell import MatrixCommon, MatrixOptimizer, Routed
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["Shampoo"]

State = dict[str, Tensor]


class Shampoo(MatrixOptimizer):
    """Gradients between inverse roots of two Kronecker factors, with the step length of another method.

    For a matrix with gradient G (n x m), in step t:

        M = beta1 M + (1 - beta1) G               V = beta2 V + (1 - beta2) G * G
        L = EMA or sum of G G'                    R = EMA or sum of G' G
        U = (L + damping l I)^-e  M / (1 - beta1^t)  (R + damping r I)^-e          l, r: the largest eigenvalues
        W <- W - lr U |A| / |U| - lr weight_decay W

    e is 1/4 with two factors and 1/2 with one. A is the step whose length is taken over ("grafted"): AdamW's, RMSprop's
    G / (V^(1/2) + eps), or SGD's, which is M. EMAs are corrected for their start at zero. Roots are brought up to date
    in each of the first `update_first` steps and in every `update_every`-th, before they are used. Steps before the
    first gradient that is not zero do not count among those first ones; the root of a zero factor is the identity.

    Cost: products of 4 n m (n + m) flops a step and matrix; a refresh takes about 25 (n^3 + m^3) for the eigenvectors.
    Memory: two averages of the matrix (one for `graft="sgd"` and None), and twice n^2 + m^2.

    How to take steps, micro-batches, ranks, models in parts, what goes to AdamW: see `MatrixOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square.
        eps: added to the denominator of grafted steps.
        weight_decay: decoupled, times lr.
        factors: "ema", with decay `factor_beta`, or "sum", as in the paper of 2018.
        factor_beta: decay of the factors; None takes beta2.
        exponent: e; None takes 1/4 with two factors and 1/2 with one.
        damping: share of the largest eigenvalue that is added to all of a factor.
        graft: "adamw", "rmsprop", "sgd"; None keeps the length of U, which follows a spike of the gradient between two
            refreshes.
        start_step: the first step that is taken along U; those before are the grafted method's own.
        update_every: steps between refreshes of the roots.
        update_first: roots are refreshed in each of the first so many steps.
        eigen_dtype: of decompositions: "float32" or "float64". TF32 is switched off for all products.
        max_dim: longest side that gets a factor.
        large: a longer side has none ("one-sided"), or is cut into parts that have one each ("blocks"); each block then
            takes over the length of its own part of A.
        shared: method, adamw_scale, adamw_betas, check_finite, foreach, maximize, loss, process_group: see
            `MatrixCommon` and `Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> w = torch.nn.Parameter(torch.zeros(2, 2))
        >>> optimizer = Shampoo([w], lr=1.0, graft=None, weight_decay=0.0)
        >>> w.grad = torch.tensor([[100.0, 0.0], [0.0, -1.0]])
        >>> optimizer.step()
        >>> w.detach().round(decimals=3)  # the first step is the gradient with all singular values 1
        tensor([[-1.,  0.],
                [ 0.,  1.]])
    """

    _known_starts: dict[tuple[int, str], int] | None
    _late_settings: ClassVar[dict[str, Any]] = {
        **MatrixOptimizer._late_settings,
        **{"factors": "ema", "factor_beta": None, "exponent": None, "damping": 1e-10, "graft": "adamw"},
        **{"start_step": 1, "update_every": 10, "update_first": 20, "eigen_dtype": "float32"},
        **{"max_dim": 10_000, "large": "one-sided"},
    }
    _least: ClassVar[dict[str, float]] = {**MatrixOptimizer._least, "damping": 0.0}
    _counts = ("start_step", "update_every", "update_first", "max_dim")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **MatrixOptimizer._choices,
        **{"factors": ("ema", "sum"), "eigen_dtype": tuple(DTYPES), "large": ("one-sided", "blocks")},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factors: Literal["ema", "sum"] = "ema",
        factor_beta: float | None = None,
        exponent: float | None = None,
        damping: float = 1e-10,
        graft: Literal["adamw", "rmsprop", "sgd"] | None = "adamw",
        start_step: int = 1,
        update_every: int = 10,
        update_first: int = 20,
        eigen_dtype: Literal["float32", "float64"] = "float32",
        max_dim: int = 10_000,
        large: Literal["one-sided", "blocks"] = "one-sided",
        **shared: Unpack[MatrixCommon],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "factors": factors}
        defaults |= {"factor_beta": factor_beta, "exponent": exponent, "damping": damping, "graft": graft}
        defaults |= {"start_step": start_step, "update_every": update_every, "update_first": update_first}
        defaults |= {"eigen_dtype": eigen_dtype, "max_dim": max_dim, "large": large}
        super().__init__(params, defaults, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        refuse_decay("factor_beta", group["factor_beta"])
        graft, exponent = group["graft"], group["exponent"]
        if graft not in ("adamw", "rmsprop", "sgd", None):
            raise InputError(f"graft must be adamw, rmsprop, sgd or None, got {graft!r}.")
        if exponent is not None and not (isinstance(exponent, (int, float)) and 0 < exponent <= 1):
            raise InputError(f"exponent must be None or in (0, 1], got {exponent!r}.")

    def _refusal(self, p: Tensor, group: Group) -> str | None:
        return refusal(p.shape, group)

    def _matrix_state(self, p: Tensor, group: Group) -> State:
        squares = ("exp_avg_sq",) if group["graft"] in ("adamw", "rmsprop") else ()
        state = factor_state(p, group, ("exp_avg", *squares))
        factors = {name: t for name, t in state.items() if "." in name}
        roots = {f"root.{name}": torch.eye(len(t)).to(t) for name, t in factors.items()}
        return state | roots | {f"start.{name}": torch.zeros(()) for name in factors}

    def _directions(self, routed: Routed) -> list[Tensor]:
        group, states = routed.group, routed.states
        grads = [as_matrix(g) for g in routed.grads]
        moments, lengths = _moments(group, grads, states)
        beta = group["betas"][1] if group["factor_beta"] is None else group["factor_beta"]
        decay, share = (1.0, 1.0) if group["factors"] == "sum" else (beta, 1 - beta)
        directions = []
        for p, g, m, graft, state in zip(routed.params, grads, moments, lengths, states, strict=True):
            blocks, t = blocks_of(p.shape, group), int(state["step"])
            add_to_factors(g, blocks, state, decay, share)
            correction = 1.0 if group["factors"] == "sum" else 1 - beta**t
            for block in blocks:
                for name in block.sides.values():
                    start = self._starts.get((id(p), name), 0)
                    first = t - start < group["update_first"] if start else bool(state[name].any())
                    if first or t % group["update_every"] == 0:
                        filled = _refreshed(name, state, group, correction, len(block.sides))
                        self._starts[id(p), name] = (start or t) if filled else 0
                        state[f"start.{name}"] = torch.tensor(float(self._starts[id(p), name]))
            direction = m if graft is None else graft
            if t >= group["start_step"]:
                direction = by_blocks(lambda b, m=m, a=graft, s=state: _along(b, m, a, s), m, blocks)  # type: ignore[misc]
            directions.append(direction.view(p.shape))
        return directions

    @property
    def _starts(self) -> dict[tuple[int, str], int]:
        """The step of the first gradient of every factor, by parameter and name; 0 while it is zero. On the host."""
        if self._known_starts is None:
            states = [
                (p, state) for group in self.param_groups for p in group["params"] if (state := self.state.get(p))
            ]
            self._known_starts = {
                (id(p), name.removeprefix("start.")): int(value)
                for p, state in states
                for name, value in state.items()
                if name.startswith("start.")
            }
        return self._known_starts

    def _forget(self) -> None:
        super()._forget()
        self._known_starts = None


def _moments(group: Group, grads: list[Tensor], states: list[State]) -> tuple[list[Tensor], list[Any]]:
    """Return the corrected averages of gradients, and the steps whose lengths are grafted, None for none."""
    (beta1, beta2), graft = group["betas"], group["graft"]
    steps = [float(state["step"]) for state in states]
    averages = [state["exp_avg"] for state in states]
    torch._foreach_lerp_(averages, grads, 1 - beta1)
    moments = list(torch._foreach_div(averages, [1 - beta1**t for t in steps]))
    if graft is None or graft == "sgd":
        return moments, [None] * len(moments) if graft is None else moments
    squares = [state["exp_avg_sq"] for state in states]
    torch._foreach_mul_(squares, beta2)
    torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)
    roots = list(torch._foreach_div(squares, [1 - beta2**t for t in steps]))
    torch._foreach_sqrt_(roots)
    torch._foreach_add_(roots, group["eps"])
    return moments, list(torch._foreach_div(moments if graft == "adamw" else grads, roots))


def _refreshed(name: str, state: State, group: Group, correction: float, sides: int) -> bool:
    """Renew the inverse root of a factor and say whether it has one; where the decomposition fails, it stays."""
    factor, root = state[name], state[f"root.{name}"]
    found = None if restarted_if_overflown(factor) else eigenbasis(factor, DTYPES[group["eigen_dtype"]])
    if found is None:
        return bool(factor.any())
    values, basis = found[0] / correction, found[1]
    tiny = torch.finfo(values.dtype).tiny
    if bool(values[0] <= tiny):
        root.copy_(torch.eye(len(root)))
        return False
    floor = max(group["damping"], torch.finfo(values.dtype).eps ** 2)  # zero has no root: rounding is not inverted
    values = (values + floor * values[0]).clamp(min=tiny)
    root.copy_((basis * values ** -(group["exponent"] or 1 / (2 * sides))) @ basis.T)
    return True


def _along(block: Block, moment: Tensor, graft: Tensor | None, state: State) -> Tensor:
    """Return the direction of a block, of the length of the grafted step's part."""
    part = block.of(moment)
    if "left" in block.sides:
        part = state[f"root.{block.sides['left']}"] @ part
    if "right" in block.sides:
        part = part @ state[f"root.{block.sides['right']}"]
    if graft is None:
        return part
    norm = part.norm()
    return part * torch.where(norm > 0, block.of(graft).norm() / norm, 0.0)
