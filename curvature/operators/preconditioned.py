"""A matrix as a preconditioned method sees it, and the preconditioners that optimizers carry."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linop import MatrixLike, SymmetricOperator
from curvature.operators._objective_operator import ObjectiveOperator, block_within
from curvature.parameters import ParameterSpace, Selection
from curvature.sharding.tensors import ShardedTensor, whole


class PreconditionedOperator(SymmetricOperator):
    """P^-1/2 A P^-1/2 for a diagonal P > 0: symmetric, with the eigenvalues of P^-1 A.

    With A the Hessian and P an optimizer's preconditioner (`from_optimizer`) the largest eigenvalue is the
    preconditioned sharpness. A method that steps along -lr P^-1 m is stable on a quadratic as long as it stays below

    - 2 / lr for m the gradient (RMSprop, Adagrad, Adam with beta1 = 0);
    - (2 + 2 beta1) / ((1 - beta1) lr) for m the average (1 - beta1) g + beta1 m: 38 / lr for Adam and AdaHessian with
      beta1 = 0.9. In full-batch training the sharpness rises to this edge and stays there.

    An infinite entry of P leaves its parameter out: its row and column are zero. An eigenvector u of this matrix is
    P^1/2 times one of P^-1 A; `unscale` takes it back to parameters.

    Cost of one product: one with A.

    Args:
        A: symmetric, (n, n).
        divisor: the diagonal of P, (n,), positive: what a method divides by. The `preconditioner` of a
            solver is its inverse.

    Raises:
        InputError: if A is not square, or the divisor is not positive in every entry.

    Reference: Cohen et al. (2022), Adaptive gradient methods at the edge of stability.

    Examples:
        >>> A = torch.tensor([[8.0, 2.0], [2.0, 1.0]])
        >>> PreconditionedOperator(A, torch.tensor([4.0, 1.0])).to_dense()
        tensor([[2., 1.],
                [1., 1.]])
    """

    @checked
    def __init__(self, A: MatrixLike, divisor: Tensor) -> None:
        n = A.shape[0] if len(A.shape) else 0
        if len(A.shape) != 2 or A.shape[1] != n:
            raise InputError(f"PreconditionedOperator needs a square matrix, got shape {tuple(A.shape)}.")
        if divisor.shape != (n,):
            raise InputError(f"divisor must have shape ({n},), got {tuple(divisor.shape)}.")
        if divisor.is_complex() or divisor.device != A.device:
            got = f"{divisor.dtype} on {divisor.device}"
            raise InputError(f"divisor must be real and on the device of A, {A.device}, got {got}.")
        positive = divisor > 0  # not so for NaN
        if not bool(positive.all()):
            i = int((~positive).nonzero()[0])
            raise InputError(
                f"divisor must be positive, got {float(divisor[i])} in entry {i} "
                f"({int((~positive).sum())} of {n} are not); entries whose gradient has always been zero need an eps."
            )
        super().__init__((n, n), A.dtype, A.device)
        self.A = A
        self.divisor = divisor.detach().to(A.dtype)
        self._factor = self.divisor.rsqrt()

    @property
    def overhead(self) -> float:
        return float(getattr(self.A, "overhead", 0.0))

    @classmethod
    def from_optimizer(
        cls,
        A: ObjectiveOperator,
        optimizer: Any,
        *,
        include_lr: bool = False,
        missing: Literal["error", "identity", "exclude"] = "error",
    ) -> Self:
        """Return a matrix of an objective as the optimizer that trains its parameters sees it at this moment.

        `include_lr`, `missing` and errors are those of `optimizer_divisor`; A may be a diagonal block.
        """
        if not isinstance(A, ObjectiveOperator):
            raise InputError(
                f"from_optimizer needs a matrix of an objective, whose parameters are known, got {type(A).__name__}; "
                "pass optimizer_divisor(optimizer, space) as divisor of other matrices."
            )
        space = A.objective.space
        if A.block is not None:
            space = ParameterSpace({name: space.tensors[name] for name in A.block.parameters})
        return cls(A, optimizer_divisor(optimizer, space, include_lr=include_lr, missing=missing))

    def restrict(self, selection: Selection) -> Self:
        """Return the diagonal block for some of the parameters, which costs less; see `HessianOperator.restrict`."""
        if not isinstance(self.A, ObjectiveOperator):
            raise InputError(
                f"restrict needs a matrix of an objective, got {type(self.A).__name__}; restrict the matrix and the "
                "divisor themselves."
            )
        block = block_within(self.A.objective, self.A.block, selection)
        outer, diagonal = self.A.block, self.divisor
        full = diagonal if outer is None else outer.embed(diagonal, self.A.objective.num_params)
        return type(self)(self.A.restrict(block), block.take(full))

    def unscale(self, U: Tensor) -> Tensor:
        """Return P^-1/2 U, (n,) or (n, k): eigenvectors of P^-1 A from those of this matrix."""
        found = self._factor * U if U.ndim == 1 else self._factor[:, None] * U
        return found if isinstance(U, ShardedTensor) else whole(found)

    def _matmat(self, X: Tensor) -> Tensor:
        found = self._factor[:, None] * (self.A @ (self._factor[:, None] * X))
        return found if isinstance(X, ShardedTensor) else whole(found)  # a divisor in parts makes parts of all


# -- what optimizers divide by ----------------------------------------------------------------------------------------


@checked
def optimizer_divisor(
    optimizer: Any,
    space: ParameterSpace,
    *,
    include_lr: bool = False,
    missing: Literal["error", "identity", "exclude"] = "error",
    unseen: Literal["keep", "exclude"] = "keep",
) -> Tensor:
    """Return the diagonal P, (n,), with which the optimizer's last step was -lr P^-1 m, m its average of gradients.

    Read from the optimizer's state after its step t; parameters are found by identity. Weight decay is not part of it.

    - Adam, AdamW: (1 - beta1^t) ((v / (1 - beta2^t))^1/2 + eps), v the maximum so far with `amsgrad`.
    - AdaHessian (any optimizer with its state `exp_hessian_diag_sq`): (1 - beta1^t) ((v / (1 - beta2^s))^(k/2) + eps)
      with k its `hessian_power` and s the refreshes of the curvature where it counts these, else t.
    - RMSprop: v^1/2 + eps; `centered`: (v - a^2)^1/2 + eps with a the average gradient.
    - Adagrad: (1 + (t - 1) lr_decay) (v^1/2 + eps). SGD: 1.

    Args:
        optimizer: one of these.
        space: the parameters, in the order of P.
        include_lr: divide by the learning rate of each parameter's group: the edge of stability is then the same number
            for all groups, e.g. 38 for Adam with beta1 = 0.9.
        missing: what stands for parameters that the optimizer does not hold or has not moved yet: "error", or
            "identity" for 1 (1 / lr of their group, where they have one, with `include_lr`), or "exclude" for infinity,
            which leaves them out of the spectrum as the step leaves them where they are.
        unseen: what stands for entries whose gradient has always been zero, as in rows of an embedding: "keep" for
            their eps, 1e-8 for Adam, which lets them rule the spectrum, or "exclude" for infinity, which leaves them
            out.

    Reference: Cohen et al. (2022), Adaptive gradient methods at the edge of stability.

    Raises:
        InputError: for another kind of optimizer, or parameters without state.

    Examples:
        >>> from torch import nn
        >>> model = nn.Linear(2, 1, bias=False)
        >>> adam = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.5, 0.999), eps=0.0)
        >>> model(torch.tensor([3.0, 4.0])).sum().backward()
        >>> adam.step()
        >>> optimizer_divisor(adam, ParameterSpace.from_model(model))  # (1 - 0.5) |g|
        tensor([1.5000, 2.0000])
    """
    if missing not in ("error", "identity", "exclude"):
        raise InputError(f"missing must be 'error', 'identity' or 'exclude', got {missing!r}.")
    if unseen not in ("keep", "exclude"):
        raise InputError(f"unseen must be 'keep' or 'exclude', got {unseen!r}.")
    if not hasattr(optimizer, "param_groups") or not hasattr(optimizer, "state"):
        raise InputError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}.")
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    parts = []
    for name, p in space.tensors.items():
        group = group_of.get(id(p))
        state = {} if group is None else optimizer.state.get(p, {})
        diagonal = None if group is None else _diagonal(optimizer, p, state, group)
        if diagonal is None:
            if missing == "error":
                why = "does not hold" if group is None else "has not moved"
                raise InputError(
                    f"the optimizer {why} {name!r}, so that nothing is known of its preconditioner; select other "
                    "parameters, take a step that moves it, or pass missing='identity' or 'exclude'."
                )
            diagonal = torch.full_like(p, math.inf if missing == "exclude" else 1.0)
        second = next((state[name] for name in _SECOND_MOMENTS if name in state), None)
        if unseen == "exclude" and second is not None:
            diagonal = diagonal.masked_fill(second == 0, math.inf)
        scale = float(group["lr"]) if include_lr and group is not None else 1.0
        parts.append(diagonal.detach().reshape(-1).to(space.device, space.dtype) / scale)
    return torch.cat(parts)


def _diagonal(optimizer: Any, p: Tensor, state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor | None:
    """Return the diagonal for one parameter, in its shape; None if it was not moved yet."""
    if isinstance(optimizer, torch.optim.SGD):
        return torch.ones_like(p)
    rule = next((rule for kind, rule in _RULES.items() if isinstance(optimizer, kind)), None)
    if rule is None and any("exp_hessian_diag_sq" in s for s in optimizer.state.values()):
        rule = _adahessian
    if rule is None and (optimizer.state or type(optimizer).__name__ != "AdaHessian"):
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise InputError(
            f"the preconditioner of {type(optimizer).__name__} is not known: known are {known}, AdaHessian and SGD; "
            "pass its diagonal as a tensor."
        )
    if rule is None or not state or float(state.get("step", 0)) == 0:
        return None
    return rule(state, group)


def _adam(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    t = float(state["step"])
    beta1, beta2 = (float(beta) for beta in group["betas"])
    v: Tensor = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    return (1 - beta1**t) * ((v / (1 - beta2**t)).sqrt() + group["eps"])


def _adahessian(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    t = float(state["step"])
    by_steps = group.get("bias_correction") == "steps" or group.get("stale") == "repeat"
    s = t if by_steps else float(state.get("hessian_step", t))
    beta1, beta2 = group["betas"]
    v: Tensor = state["exp_hessian_diag_sq"]
    return (1 - beta1**t) * ((v / (1 - beta2**s)).pow(group["hessian_power"] / 2) + group["eps"])


def _rmsprop(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    v: Tensor = state["square_avg"]
    if group["centered"]:
        v = v - state["grad_avg"].square()
    return v.sqrt() + group["eps"]


def _adagrad(state: Mapping[str, Any], group: Mapping[str, Any]) -> Tensor:
    v: Tensor = state["sum"]
    return (1 + (float(state["step"]) - 1) * group["lr_decay"]) * (v.sqrt() + group["eps"])


_SECOND_MOMENTS = ("exp_avg_sq", "exp_hessian_diag_sq", "square_avg", "sum")  # zero where no gradient ever was
_RULES: dict[type, Callable[[Mapping[str, Any], Mapping[str, Any]], Tensor]] = {
    torch.optim.Adam: _adam,
    torch.optim.AdamW: _adam,
    torch.optim.RMSprop: _rmsprop,
    torch.optim.Adagrad: _adagrad,
}


def stability_limit(optimizer: Any, group: int = 0) -> float:
    """Return c, where steps with a learning rate lr are stable on a quadratic: largest eigenvalue of P^-1 H < c / lr.

    P is that of `optimizer_divisor` (1 for SGD), held fixed. Weight decay is not part of it.

    - SGD, also RMSprop with momentum: 2 + 2 momentum; over 1 - dampening where momentum is in use.
    - SGD with Nesterov's momentum b: (2 + 2 b) / (1 + 2 b).
    - Adam, AdamW, AdaHessian: (2 + 2 beta1) / (1 - beta1), 38 for beta1 = 0.9.
    - Adagrad: 2.

    Args:
        optimizer: one of these.
        group: which of its groups of parameters.

    Raises:
        InputError: for another kind of optimizer, or one that maximizes.

    Reference: Cohen et al. (2021), Gradient descent on neural networks typically occurs at the edge of stability
    (arXiv 2103.00065); Cohen et al. (2022), Adaptive gradient methods at the edge of stability (arXiv 2207.14484).

    Examples:
        >>> stability_limit(torch.optim.SGD([torch.zeros(1)], lr=0.1, momentum=0.9))
        3.8
    """
    settings = optimizer.param_groups[group]
    if settings.get("maximize"):
        raise InputError("the optimizer maximizes, and stability is that of descent; minimize the negative loss.")
    if isinstance(optimizer, torch.optim.SGD):
        beta = float(settings["momentum"])
        if settings["nesterov"]:
            return (2 + 2 * beta) / (1 + 2 * beta)
        return (2 + 2 * beta) / (1 - float(settings["dampening"]) if beta else 1.0)
    if isinstance(optimizer, torch.optim.RMSprop):
        return 2 + 2 * float(settings["momentum"])
    if isinstance(optimizer, torch.optim.Adagrad):
        return 2.0
    if isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW)) or type(optimizer).__name__ == "AdaHessian":
        beta = float(settings["betas"][0])
        return (2 + 2 * beta) / (1 - beta)
    raise InputError(
        f"the edge of stability of {type(optimizer).__name__} is not known: known are SGD, Adam, AdamW, RMSprop, "
        "Adagrad and AdaHessian; read sharpness alone, or critical sharpness, which holds for any optimizer."
    )
