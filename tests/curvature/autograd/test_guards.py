"""Models that autograd differentiates wrongly in silence: derivatives inside forward, marked functions, norms, NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import curvature.objective.check as check_module
from curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    HessianOperator,
    JacobianOperator,
    Objective,
    eigsh,
)
from curvature.autograd import lean_functions
from curvature.autograd.lean_trust import LeanTrust
from curvature.engine.linearize import Linearization
from curvature.errors import CheckFailedError, CurvatureError, InputError, NonFiniteError
from curvature.objective.third_order import curvature_gradient
from curvature.per_example import gradient_norms
from tests.cases import BY_NAME
from tests.checks import assert_close
from tests.references import dense_hessian, derivative_along, flat_gradient, total_loss


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def network(*inner: nn.Module, outputs: int = 1) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), *inner, nn.Linear(4, outputs)).double()


def params_of(model: nn.Module) -> list[Tensor]:
    return list(model.parameters())


class WrittenOut(nn.Module):
    """Layer normalisation, or batch normalisation by the batch's statistics, in elementary operations."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self.bias, self.dim = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4)), dim

    def forward(self, x: Tensor) -> Tensor:
        c = x - x.mean(self.dim, keepdim=True)
        return c / (c.square().mean(self.dim, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


# -- derivatives inside forward ---------------------------------------------------------------------------------------


def penalised(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    y = model(x)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return g.square().sum(1).mean() + y.square().mean()


def by_transform(model: nn.Module, x: Tensor) -> Tensor:
    g = torch.func.grad(lambda z: model(z).sum())(x)
    return g.square().sum(1).mean()


def residual(model: nn.Module, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad((g[:, 0] * x[:, 1].detach()).sum(), x, create_graph=True)
    return (second[:, 0] + x[:, 1].sin()).square().mean()


LAYERS: list[Callable[[], nn.Module]] = [
    *(nn.Tanh, nn.SiLU, nn.GELU, nn.Softplus, nn.Mish, nn.CELU, nn.LogSigmoid),
    *(
        lambda: nn.LayerNorm(4),
        lambda: nn.BatchNorm1d(4, track_running_stats=False),
        lambda: nn.BatchNorm1d(4).eval(),
        lambda: nn.GroupNorm(2, 4),
    ),
    *(lambda: nn.RMSNorm(4), lambda: nn.Sequential(nn.Unflatten(1, (1, 4)), nn.InstanceNorm1d(1), nn.Flatten())),
]


@pytest.mark.parametrize("loss", [penalised, by_transform])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_loss_that_holds_a_gradient(layer: Callable[[], nn.Module], loss: Callable[..., Tensor]) -> None:
    """The gradient holds second derivatives, which torch has right; the Hessian holds third ones."""
    model, x = network(layer(), nn.Tanh()), real(5, 2)
    params = params_of(model)
    objective = Objective(model, None, x, forward=loss)
    v = real(objective.num_params, seed=1)
    expected = derivative_along(lambda: flat_gradient(penalty(loss, model, x), params), params, v)
    for _ in range(2):
        assert_close(HessianOperator(objective) @ v, expected, 1e-6)


def penalty(loss: Callable[..., Tensor], model: nn.Module, x: Tensor) -> Tensor:
    """`torch.func` itself has third derivatives of norms wrong in the gradient; the penalty without it is the same."""
    if loss is penalised:
        return penalised(model, x)
    x = x.detach().requires_grad_()
    (g,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return g.square().sum(1).mean()


@pytest.mark.parametrize(("norm", "dim"), [(nn.LayerNorm, -1), (nn.BatchNorm1d, 0)])
def test_a_residual_of_second_derivatives_through_norms(norm: type[nn.Module], dim: int) -> None:
    for activation in (nn.Identity, nn.SiLU) if dim else (nn.SiLU,):  # outputs normalised over the batch add up to 0
        model, by_hand, x = network(norm(4), activation()), network(WrittenOut(dim), activation()), real(6, 2)
        by_hand.load_state_dict(model.state_dict(), strict=False)
        objective = Objective(model, None, x, forward=residual)

        def reference(f: nn.Module = by_hand, x: Tensor = x) -> Tensor:
            return residual(f, x)

        H = dense_hessian(reference, params_of(by_hand))
        assert_close(HessianOperator(objective).to_dense(), H, 1e-9)
        assert_close(objective.gradient(), flat_gradient(residual(by_hand, x), params_of(by_hand)), 1e-9)


class Forces(nn.Module):
    """Energy and its gradient in the positions."""

    def __init__(self) -> None:
        super().__init__()
        self.potential = network(nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        energy = self.potential(x)
        return torch.cat([energy, torch.autograd.grad(energy.sum(), x, create_graph=True)[0]], 1)


def test_gauss_newton_of_energies_and_forces() -> None:
    model, x = Forces(), real(5, 2)
    objective = Objective(model, nn.MSELoss(), [(x[:3], torch.zeros(3, 3)), (x[3:], torch.zeros(2, 3))])
    J = torch.stack([flat_gradient(z, params_of(model)) for z in model(x).reshape(-1)])
    assert_close(GGNOperator(objective).to_dense(), 2 * J.T @ J / 15, 1e-10)
    assert any("differentiates in its forward pass" in note for note in objective.notes)


def test_a_forward_that_differentiates_on_some_batches_only() -> None:
    model, data = network(nn.LayerNorm(4), nn.GELU()), [real(3, 2), real(4, 2, seed=1)]

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return penalised(model, x) if len(x) == 4 else model(x).square().mean()

    params = params_of(model)
    objective = Objective(model, None, data, forward=loss, weight=len)
    v = real(objective.num_params, seed=2)
    expected = derivative_along(
        lambda: flat_gradient((3 * loss(model, data[0]) + 4 * loss(model, data[1])) / 7, params), params, v
    )
    assert_close(HessianOperator(objective) @ v, expected, 1e-6)


# -- third derivatives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS)
def test_third_derivatives_through_layers(layer: Callable[[], nn.Module]) -> None:
    model, x, y = network(layer(), nn.Tanh(), outputs=3), real(5, 2), torch.tensor([0, 1, 2, 1, 0])
    params = params_of(model)
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    v = real(objective.num_params, seed=1) / 4

    def Hv() -> Tensor:
        return flat_gradient(flat_gradient(F.cross_entropy(model(x), y), params, create_graph=True) @ v, params)

    assert_close(curvature_gradient(objective, v), derivative_along(Hv, params, v), 1e-7)


def test_norms_that_cannot_be_replaced_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        norm = torch.jit.trace(nn.LayerNorm(4).double(), real(3, 4), check_trace=False)
    objective = Objective(network(norm), nn.MSELoss(), (real(3, 2), real(3, 1)))
    HessianOperator(objective).to_dense()  # right to the second order
    with pytest.raises(InputError, match=r"third derivative of NativeLayerNorm is wrong"):
        curvature_gradient(objective, real(objective.num_params))


# -- functions without a second derivative ----------------------------------------------------------------------------


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * g


class Squares(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Square.apply(x)


DATA = (real(5, 2), torch.tensor([0, 1, 2, 1, 0]))
ROUTES: dict[str, Callable[[Objective], Any]] = {
    "Hessian": lambda o: HessianOperator(o).to_dense(),
    "GGN": lambda o: GGNOperator(o).to_dense(),
    "Fisher": lambda o: FisherOperator(o).to_dense(),
    "empirical Fisher": lambda o: EmpiricalFisherOperator(o).to_dense(),
    "Jacobian": lambda o: JacobianOperator(o).to_dense(),
    "eigenpairs": lambda o: eigsh(o, 1, generator=torch.Generator()),
    "third order": lambda o: curvature_gradient(o, real(o.num_params)),
    "check": lambda o: o.check(),
}


@pytest.mark.parametrize("route", ROUTES)
def test_marked_functions_are_refused_again_and_again(route: str) -> None:
    objective = Objective(network(Squares(), outputs=3), nn.CrossEntropyLoss(), DATA)
    for again in (route, route, *ROUTES):
        with pytest.raises(CurvatureError, match=r"once_differentiable.*SquareBackward"):
            ROUTES[again](objective)


def test_marked_functions_are_found_where_their_gradient_needs_no_graph() -> None:
    """What comes back to the function is a constant: torch plants no error, and the gradient has no graph."""
    model = nn.Linear(2, 1).double()
    objective = Objective(model, None, real(3, 2), forward=lambda m, x: Square.apply(m(x)).sum())
    own_loss = Objective(model, lambda z, y: Square.apply(z - y).sum(), (real(3, 2), real(3, 1)))
    for call in (
        lambda: HessianOperator(objective).to_dense(),
        lambda: GGNOperator(own_loss).to_dense(),
        lambda: curvature_gradient(objective, real(3)),
    ):
        for _ in range(2):
            with pytest.raises(CurvatureError, match="once_differentiable"):
                call()


def test_marked_functions_in_the_forward_pass_of_a_residual() -> None:
    objective = Objective(network(Squares()), None, real(3, 2), forward=penalised)
    for _ in range(2):
        with pytest.raises(CheckFailedError, match="once_differentiable"):
            objective.gradient()


# -- lean layers are invisible ----------------------------------------------------------------------------------------


def breaking(after: int) -> Callable[..., Any]:
    calls = 0

    def broken(right: Callable[..., Any], ctx: Any, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise AttributeError("torch has changed")
        return right(ctx, *args)

    return broken


def patched(monkeypatch: pytest.MonkeyPatch, function: str, method: str, wrapper: Callable[..., Any]) -> None:
    right = getattr(getattr(lean_functions, function), method)
    monkeypatch.setattr(
        getattr(lean_functions, function), method, staticmethod(lambda ctx, *args: wrapper(right, ctx, *args))
    )


@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize(
    ("function", "method"),
    [("Activation", "forward"), ("Activation", "backward"), ("ActivationBackward", "backward")],
)
def test_lean_layers_that_raise_are_not_used(
    function: str, method: str, after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    patched(monkeypatch, function, method, breaking(after))
    case = BY_NAME["MLP GELU"]
    model = case.model()
    params = params_of(model)
    g = flat_gradient(total_loss(model, [case.data()], case.criterion), params, create_graph=True)
    v = real(len(g), seed=1)
    Hv = flat_gradient(g @ v, params)
    objective = Objective(model, case.loss, case.ragged())
    for _ in range(2):
        assert_close(objective.gradient(), g.detach())
        assert_close(HessianOperator(objective) @ v, Hv)
    assert any("raised AttributeError" in note for note in objective.notes)


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_lean_layers_wrong_on_one_batch_only(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batches have 4, 2 and 1 examples; a kernel for the last one only is wrong, or yields NaN."""

    def wrong(right: Callable[..., Any], ctx: Any, *args: Any) -> Any:
        scale = factor if len(args[0]) == 1 else 1.0
        return tuple(scale * part if isinstance(part, Tensor) else part for part in right(ctx, *args))

    patched(monkeypatch, "ActivationBackward", "backward", wrong)
    case = BY_NAME["MLP GELU"]
    model = case.model()
    dense = dense_hessian(lambda: total_loss(model, [case.data()], case.criterion), params_of(model))
    objective = Objective(model, case.loss, case.ragged())
    assert_close(HessianOperator(objective).to_dense(), dense)
    assert objective.trust.revoked


def test_comparisons_that_yield_nan_revoke() -> None:
    for bad in (float("nan"), float("inf")):
        for lean, reference in ((torch.tensor([1.0, bad]), torch.ones(2)), (torch.ones(2), torch.tensor([1.0, bad]))):
            trust = LeanTrust()
            trust.compare("hvp", 0, lean, reference, [1, 1], 1e-7)
            assert trust.revoked
            assert not trust.covers("hvp", 0)


def test_a_small_parameter_is_compared_on_its_own() -> None:
    trust, reference = LeanTrust(), torch.tensor([1.0, 1e-2])
    trust.compare("hvp", 0, reference * torch.tensor([1.0, 1.1]), reference, [1, 1], 1e-7)
    assert trust.revoked


# -- NaN --------------------------------------------------------------------------------------------------------------


def group_lasso(zero_rows: bool = True) -> Objective:
    torch.manual_seed(0)
    last = nn.Linear(4, 3, bias=False)
    model = nn.Sequential(nn.Linear(4, 4), last).double()
    if zero_rows:
        last.weight.data[0] = 0
    data = [(real(3, 4), real(3, 3)), (real(2, 4, seed=1), real(2, 3, seed=2))]

    def loss(m: Any, batch: Any) -> Tensor:
        fit = (m(batch[0]) - batch[1]).square().mean()
        return fit + m[1].weight.norm(dim=1).sum() if len(batch[0]) == 2 else fit

    return Objective(model, None, data, forward=loss, weight=lambda batch: len(batch[0]))


def test_curvature_that_is_not_finite_names_batch_and_parameter() -> None:
    objective = group_lasso()
    assert bool(objective.gradient().isfinite().all())
    calls: list[Callable[[], Any]] = [
        lambda: HessianOperator(objective) @ real(objective.num_params),
        lambda: eigsh(objective, 1, generator=torch.Generator()),
        lambda: curvature_gradient(objective, real(objective.num_params)),
    ]
    for call in calls:
        with pytest.raises(NonFiniteError, match=r"not finite on batch 1 in the rows of '1\.weight'"):
            call()
    with pytest.raises(NonFiniteError):
        Objective(objective.model, None, list(objective.batches())[::-1], **forward_of(objective)).check()


def test_a_message_names_a_few_parameters_and_counts_the_others() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(7))).double()
    for layer in model:
        layer.weight.data[0] = 0

    def loss(m: Any, batch: Any) -> Tensor:
        return m(batch).square().mean() + sum(layer.weight.norm(dim=1).sum() for layer in m)

    objective = Objective(model, None, [real(2, 3)], forward=loss, weight=len)
    with pytest.raises(NonFiniteError, match=r"in the rows of '0\.weight', .*'3\.weight' and 3 more"):
        _ = HessianOperator(objective) @ real(objective.num_params)


def forward_of(objective: Objective) -> dict[str, Any]:
    return {"forward": objective.evaluator.forward, "weight": objective.evaluator.weight}


def test_a_vector_that_is_not_finite_is_told_apart() -> None:
    objective = group_lasso(zero_rows=False)
    v = real(objective.num_params)
    HessianOperator(objective) @ v
    v[3] = float("nan")
    with pytest.raises(NonFiniteError, match="the vector"):
        HessianOperator(objective) @ v


def test_a_gradient_that_is_not_finite_is_refused() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    with pytest.raises(NonFiniteError, match="gradient of 'weight' is not finite on batch 0"):
        Objective(model, None, real(3, 2), forward=lambda m, x: m(x).square().sum().sqrt()).gradient()


@pytest.mark.parametrize("place", ["_relative", "_difference", "_symmetric"])
def test_the_self_check_does_not_pass_on_nan(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = Objective(network(nn.Tanh(), outputs=3), nn.CrossEntropyLoss(), DATA)
    assert objective.check().passed
    nan = float("nan")
    if place == "_relative":
        monkeypatch.setattr(check_module, place, lambda *_: nan)
    elif place == "_difference":
        wrong = check_module._Difference(slope_error=nan, tells=True, curve_error=nan, drowned=False)
        monkeypatch.setattr(check_module, place, lambda *_: wrong)
    else:
        monkeypatch.setattr(Linearization, "hvp", lambda _, X: torch.full_like(X, nan))
    with pytest.raises(CheckFailedError):
        objective.check()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 1)).double()

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = checkpoint(self.net, x, use_reentrant=False)
        return u + torch.autograd.grad(u.sum(), x, create_graph=True)[0].sum(dim=1, keepdim=True)


def test_checkpointed_parts_that_are_differentiated_inside_are_refused_in_a_sentence() -> None:
    torch.manual_seed(0)
    batch = (torch.randn(6, 3).double(), torch.randn(6, 1).double())
    objective = Objective(Checkpointed(), nn.MSELoss(), batch)
    for _ in range(2):
        with pytest.raises(CheckFailedError, match="switch checkpointing off"):
            HessianOperator(objective) @ torch.ones(objective.num_params, dtype=torch.float64)


class Reentrant(Checkpointed):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.net, x.clone().requires_grad_(), use_reentrant=True)


@pytest.mark.parametrize(
    "measure", [Objective.gradient, lambda o: HessianOperator(o).to_dense(), gradient_norms], ids=["g", "H", "norms"]
)
def test_reentrant_checkpoints_are_refused_before_they_write_to_grad(measure: Callable[[Objective], object]) -> None:
    """Parameters inside get their derivatives in `.grad`, and autograd.grad none: rows of zeros, gradients without."""
    model = Reentrant()
    objective = Objective(model, nn.MSELoss(), (torch.randn(6, 3).double(), torch.randn(6, 1).double()))
    with pytest.raises(CheckFailedError, match="pass use_reentrant=False"):
        measure(objective)
    assert all(p.grad is None for p in model.parameters())
