"""SOAP: Adam in the eigenbasis of Shampoo's factors.

Reference: Vyas, Morwani, Zhao, Kwun, Shapira, Brandfonbrener, Janson and Kakade (2024), SOAP: improving and stabilizing
Shampoo using Adam, Algorithm 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from optimizers.kronecker.eigen import eigenbasis, improved_basis
from optimizers.kronecker.matrices import Block, as_matrix, blocks_of, refusal
from optimizers.kronecker.shell import MatrixCommon, MatrixOptimizer, Routed
from optimizers.shared.base import Group

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["SOAP"]

_DTYPES = {"float32": torch.float32, "float64": torch.float64}


class SOAP(MatrixOptimizer):
    """Adam in the eigenbasis of Shampoo's two factors, which is refreshed every few steps.

    For a matrix with gradient G (n x m), factors L = EMA of G G' and R = EMA of G' G, and bases Q_L, Q_R:

        G~ = Q_L' G Q_R                       M = beta1 M + (1 - beta1) G~       V = beta2 V + (1 - beta2) G~ * G~
        W <- W - lr Q_L [ (M / (1 - beta1^t)) / ((V / (1 - beta2^t))^(1/2) + eps) ] Q_R' - lr weight_decay W

    Both bases start as the identity, so the first step is Adam's. After it they are the eigenvectors of the factors,
    and after every `update_every`-th step they are brought up to date. M moves to the new basis, and so does V as a
    variance: by the squares of the entries of Q_new' Q_old.

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
        refresh: "qr", a step of orthogonal iteration from the old basis, or "eigh", the eigenvectors anew.
        eigen_dtype: of that work: "float32" or "float64". TF32 is switched off for all products.
        max_dim: longest side that gets a factor.
        large: a longer side has none ("one-sided"), or is cut into parts that have one each ("blocks").
        shared: method, adamw_scale, adamw_betas, check_finite, foreach, maximize, loss, process_group: see
            `MatrixCommon` and `Common`.

    Raises:
        InputError: for settings out of range.

    Differs from the authors' code: that takes no step with the first gradient, and keeps V as it is at a refresh.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> optimizer = SOAP(model.parameters(), lr=0.01)
        >>> model(torch.ones(1, 3)).square().sum().backward()
        >>> optimizer.step()
    """

    _late_settings: ClassVar[dict[str, Any]] = {
        **MatrixOptimizer._late_settings,
        **{"factor_beta": None, "update_every": 10, "refresh": "qr", "eigen_dtype": "float32"},
        **{"max_dim": 10_000, "large": "one-sided"},
    }
    _counts = ("update_every", "max_dim")
    _choices: ClassVar[dict[str, tuple[str, ...]]] = {
        **MatrixOptimizer._choices,
        **{"refresh": ("qr", "eigh"), "eigen_dtype": tuple(_DTYPES), "large": ("one-sided", "blocks")},
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
        refresh: Literal["qr", "eigh"] = "qr",
        eigen_dtype: Literal["float32", "float64"] = "float32",
        max_dim: int = 10_000,
        large: Literal["one-sided", "blocks"] = "one-sided",
        **shared: Unpack[MatrixCommon],
    ) -> None:
        defaults: Group = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"factor_beta": factor_beta, "update_every": update_every, "refresh": refresh}
        defaults |= {"eigen_dtype": eigen_dtype, "max_dim": max_dim, "large": large}
        super().__init__(params, defaults, **shared)

    def _refusal(self, p: Tensor, group: Group) -> str | None:
        return refusal(p.shape, group)

    def _matrix_state(self, p: Tensor, group: Group) -> dict[str, Tensor]:
        matrix = as_matrix(torch.empty(p.shape, dtype=torch.promote_types(p.dtype, torch.float32), device="meta"))
        state = {name: torch.zeros_like(matrix, device=p.device) for name in ("exp_avg", "exp_avg_sq")}
        for block in blocks_of(p.shape, group):
            sizes = dict(zip(("left", "right"), block.of(matrix).shape, strict=True))
            for side, name in block.sides.items():
                state[name] = matrix.new_zeros((sizes[side], sizes[side]), device=p.device)
                state[f"basis.{name}"] = torch.eye(sizes[side], dtype=matrix.dtype, device=p.device)
        return state

    def _directions(self, routed: Routed) -> list[Tensor]:
        group, states = routed.group, routed.states
        (beta1, beta2), eps = group["betas"], group["eps"]
        grads = [as_matrix(g) for g in routed.grads]
        blocks = [blocks_of(p.shape, group) for p in routed.params]
        rotated = [_rotated(g, cuts, state) for g, cuts, state in zip(grads, blocks, states, strict=True)]
        ms, vs = ([state[name] for state in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [float(state["step"]) for state in states]
        torch._foreach_lerp_(ms, rotated, 1 - beta1)
        torch._foreach_mul_(vs, beta2)
        torch._foreach_addcmul_(vs, rotated, rotated, 1 - beta2)
        updates = list(torch._foreach_div(vs, [1 - beta2**t for t in steps]))
        torch._foreach_sqrt_(updates)
        torch._foreach_add_(updates, eps)
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, ms)
        torch._foreach_div_(updates, [1 - beta1**t for t in steps])
        directions = [_rotated(u, cuts, s, back=True) for u, cuts, s in zip(updates, blocks, states, strict=True)]
        beta = beta2 if group["factor_beta"] is None else group["factor_beta"]
        for g, cuts, state in zip(grads, blocks, states, strict=True):
            _add_to_factors(g, cuts, state, beta)
            t = int(state["step"])
            if t == 1 or t % group["update_every"] == 0:
                for block in cuts:
                    _refresh(block, state, "eigh" if t == 1 else group["refresh"], _DTYPES[group["eigen_dtype"]])
        return [d.view(p.shape) for d, p in zip(directions, routed.params, strict=True)]


def _turn(part: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """Return left' part right; None stands for the identity."""
    part = part if left is None else left.T @ part
    return part if right is None else part @ right


def _bases(block: Block, state: dict[str, Tensor]) -> list[Tensor | None]:
    return [state[f"basis.{block.sides[side]}"] if side in block.sides else None for side in ("left", "right")]


def _rotated(matrix: Tensor, blocks: list[Block], state: dict[str, Tensor], *, back: bool = False) -> Tensor:
    """Return a matrix in the eigenbases of its blocks, or back from there."""
    parts = []
    for block in blocks:
        bases = [q.T if back and q is not None else q for q in _bases(block, state)]
        parts.append(_turn(block.of(matrix), *bases))
    if len(parts) == 1:
        return parts[0]
    whole = torch.empty_like(matrix)
    for block, part in zip(blocks, parts, strict=True):
        block.of(whole).copy_(part)
    return whole


def _add_to_factors(g: Tensor, blocks: list[Block], state: dict[str, Tensor], beta: float) -> None:
    for block in blocks:
        part = block.of(g)
        for side, name in block.sides.items():
            rows = part if side == "left" else part.T
            torch.addmm(state[name], rows, rows.T, beta=beta, alpha=1 - beta, out=state[name])


def _refresh(block: Block, state: dict[str, Tensor], refresh: str, dtype: torch.dtype) -> None:
    """Bring the bases of a block up to date, and its averages into them."""
    changes: dict[str, Tensor] = {}
    for side, name in block.sides.items():
        old = state[f"basis.{name}"]
        found = eigenbasis(state[name], dtype) if refresh == "eigh" else improved_basis(state[name], old, dtype)
        if found is not None:
            changes[side] = old.T @ found[1]
            old.copy_(found[1])
    left, right = changes.get("left"), changes.get("right")
    m, v = block.of(state["exp_avg"]), block.of(state["exp_avg_sq"])
    m.copy_(_turn(m, left, right))
    v.copy_(_turn(v, None if left is None else left.square(), None if right is None else right.square()))
