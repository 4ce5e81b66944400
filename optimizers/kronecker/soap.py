"""SOAP: Adam in the eigenbasis of Shampoo's factors.

Reference: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade (2024), SOAP: improving and stabilizing
Shampoo using Adam, Algorithm 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.kronecker.eigen import DTYPES, eigenbasis, improved_basis, restarted_if_overflown
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

__all__ = ["SOAP"]

_FLOOR = 3e-3
"""Added to the denominator of continuous updates, in root mean squares of the gradient: round-off is not normalised."""


class SOAP(MatrixOptimizer):
    """Adam in the eigenbasis of Shampoo's two factors, which is refreshed every few steps.

    For a matrix with gradient G (n x m), factors L = EMA of G G' and R = EMA of G' G, and bases Q_L, Q_R:

        G~ = Q_L' G Q_R                       M = beta1 M + (1 - beta1) G~       V = beta2 V + (1 - beta2) G~ * G~
        W <- W - lr Q_L [ (M / (1 - beta1^t)) / ((V / (1 - beta2^t))^(1/2) + eps) ] Q_R' - lr weight_decay W

    The bases start as the identity, so that the first step is Adam's, and are brought up to date after each of the
    first `update_first` steps and after every `update_every`-th. M follows the basis; V keeps its entries, in the order
    of the new columns.

    Micro-batches accumulate in `.grad`, so factors and V see the gradient of the joined batch. Yet rounding decides on
    eigenvectors whose eigenvalues are close, or zero up to rounding, and Adam's update depends on them: two
    micro-batches of 16 and one batch of 32 part by half of the update within 25 steps, and in float32 a model in parts
    and one process do. With `refresh="continuous"` they stay together to about 1e-4 (`benchmarks/optimizers`).

    Cost: products of 6 n m (n + m) flops a step and matrix, beside 6 n m a token for the gradient; a refresh takes
    about 8 (n^3 + m^3) by QR, thrice that by eigh. Memory: two averages of the matrix, and twice n^2 + m^2.

    How to take steps, micro-batches, ranks, models in parts, what goes to AdamW: see `MatrixOptimizer`.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        betas: decay of the averages of the gradient and of its square, both in the eigenbasis.
        eps: added to the denominator.
        weight_decay: decoupled, times lr.
        factor_beta: decay of the factors; None takes beta2.
        update_every: steps between refreshes of the bases.
        update_first: bases are refreshed after each of the first so many steps: a stale basis costs most there.
        refresh: "qr", a step of orthogonal iteration from the old basis; "continuous", one whose result is a continuous
            function of the gradients; "eigh", the eigenvectors anew.
        start: "identity"; or "gradient": the bases are eigenvectors of the first gradient's factors, and that gradient
            decays weights and takes no other step. With `update_first=1` this is the authors' code, to that decay.
        eigen_dtype: of decompositions: "float32" or "float64". TF32 is switched off for all products.
        max_dim: longest side that gets a factor.
        large: a longer side has none ("one-sided"), or is cut into parts that have one each ("blocks").
        shared: method, adamw_scale, adamw_betas, check_finite, foreach, maximize, loss, process_group: see
            `MatrixCommon` and `Common`.

    Raises:
        InputError: for settings out of range.

    Examples:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SOAP(model.parameters(), lr=0.01)
        >>> model(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
    """

    _late_settings: ClassVar[dict[str, Any]] = {
        **MatrixOptimizer._late_settings,
        **{"factor_beta": None, "update_every": 10, "update_first": 40, "refresh": "qr", "start": "identity"},
        **{"eigen_dtype": "float32", "max_dim": 10_000, "large": "one-sided"},
    }
    _counts = ("update_every", "update_first", "max_dim")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **MatrixOptimizer._choices,
        **{"refresh": ("qr", "continuous", "eigh"), "start": ("identity", "gradient")},
        **{"eigen_dtype": tuple(DTYPES), "large": ("one-sided", "blocks")},
    }

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 3e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        factor_beta: float | None = None,
        update_every: int = 10,
        update_first: int = 40,
        refresh: Literal["qr", "continuous", "eigh"] = "qr",
        start: Literal["identity", "gradient"] = "identity",
        eigen_dtype: Literal["float32", "float64"] = "float32",
        max_dim: int = 10_000,
        large: Literal["one-sided", "blocks"] = "one-sided",
        **shared: Unpack[MatrixCommon],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"factor_beta": factor_beta, "update_every": update_every, "update_first": update_first}
        defaults |= {"refresh": refresh, "start": start, "eigen_dtype": eigen_dtype}
        defaults |= {"max_dim": max_dim, "large": large}
        super().__init__(params, defaults, **shared)

    def _validate(self, group: Group) -> None:
        super()._validate(group)
        refuse_decay("factor_beta", group["factor_beta"])

    def _refusal(self, p: Tensor, group: Group) -> str | None:
        return refusal(p.shape, group)

    def _matrix_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        state = factor_state(p, group, ("exp_avg", "exp_avg_sq"))
        bases = {f"basis.{name}": torch.eye(len(t)).to(t) for name, t in state.items() if "." in name}
        return state | bases

    def _directions(self, routed: Routed) -> list[Tensor]:
        group, states = routed.group, routed.states
        grads = [as_matrix(g) for g in routed.grads]
        blocks = [blocks_of(p.shape, group) for p in routed.params]
        skipped = group["start"] == "gradient"
        steps = [int(state["step"]) - skipped for state in states]
        moved = [i for i, t in enumerate(steps) if t > 0]
        turned = [_rotated(grads[i], blocks[i], states[i]) for i in moved]
        updates = _adam(group, turned, [states[i] for i in moved], [steps[i] for i in moved]) if moved else []
        directions = {
            i: _rotated(update, blocks[i], states[i], back=True) for i, update in zip(moved, updates, strict=True)
        }
        beta = group["betas"][1] if group["factor_beta"] is None else group["factor_beta"]
        for g, cuts, state, t in zip(grads, blocks, states, steps, strict=True):
            add_to_factors(g, cuts, state, beta)
            if float(state["step"]) <= group["update_first"] or t % group["update_every"] == 0:
                for block in cuts:
                    _refresh(block, state, "eigh" if t == 0 else group["refresh"], DTYPES[group["eigen_dtype"]])
        found = [directions[i] if i in directions else torch.zeros_like(g) for i, g in enumerate(grads)]
        return [d.view(p.shape) for d, p in zip(found, routed.params, strict=True)]


def _adam(group: Group, grads: list[Tensor], states: list[dict[str, Tensor]], steps: list[int]) -> list[Tensor]:
    """Return Adam's update of gradients in their eigenbases."""
    beta1, beta2 = group["betas"]
    ms, vs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
    torch._foreach_lerp_(ms, grads, 1 - beta1)
    torch._foreach_mul_(vs, beta2)
    torch._foreach_addcmul_(vs, grads, grads, 1 - beta2)
    updates = list(torch._foreach_div(vs, [1 - beta2**t for t in steps]))
    torch._foreach_sqrt_(updates)
    if group["refresh"] == "continuous":
        norms = torch._foreach_norm(updates)
        floors = [norm * (_FLOOR / u.numel() ** 0.5) for norm, u in zip(norms, updates, strict=True)]
        torch._foreach_add_(updates, floors)
    torch._foreach_add_(updates, group["eps"])
    torch._foreach_mul_(updates, [1 - beta1**t for t in steps])
    return list(torch._foreach_div(ms, updates))


def _turn(part: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return left' part right; None stands for the identity."""
    part = part if left is None else left.T @ part
    return part if right is None else part @ right


def _rotated(matrix: Tensor, blocks: list[Block], state: dict[str, Tensor], *, back: bool = False) -> Tensor:
    """Return a matrix in the eigenbases of its blocks, or back from there."""

    def turned(block: Block) -> Tensor:
        bases = [state[f"basis.{block.sides[s]}"] if s in block.sides else None for s in ("left", "right")]
        return _turn(block.of(matrix), *[q.T if back and q is not None else q for q in bases])

    return by_blocks(turned, matrix, blocks)


def _refresh(block: Block, state: dict[str, Tensor], refresh: str, dtype: torch.dtype) -> None:
    """Bring the bases of a block up to date, and its averages into them."""
    m, v = block.of(state["exp_avg"]), block.of(state["exp_avg_sq"])
    old: dict[str, Tensor] = {}
    new: dict[str, Tensor] = {}
    for side, name in block.sides.items():
        basis = state[f"basis.{name}"]
        found = None if restarted_if_overflown(state[name]) else _next_basis(state[name], basis, refresh, dtype)
        if found is None:
            continue
        old[side], (new[side], order) = basis.clone(), found
        if order is not None:
            v.copy_(v.index_select(0 if side == "left" else 1, order))
        basis.copy_(new[side])
    if new:
        plain = _turn(m, *(old[side].T if side in old else None for side in ("left", "right")))
        m.copy_(_turn(plain, new.get("left"), new.get("right")))


def _next_basis(factor: Tensor, basis: Tensor, refresh: str, dtype: torch.dtype) -> tuple[Tensor, Tensor | None] | None:
    """Return the basis after a refresh and the order of the old columns in it, None for as they were."""
    if refresh != "eigh":
        return improved_basis(factor, basis, dtype, continuous=refresh == "continuous")
    found = eigenbasis(factor, dtype)
    return None if found is None else (found[1], None)
