"""The self-check passes on what is right and names the cause of what is not."""

from __future__ import annotations

import copy
import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import curvature.losses.rules
from curvature import Objective
from curvature.engine.linearize import Linearization
from curvature.errors import CheckFailedError, DataError
from curvature.objective import check
from tests.cases import BY_NAME, CASES, Case
from tests.checks import assert_untouched

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
Y = torch.tensor([0, 1, 2, 1, 0, 2])


def objective(*layers: nn.Module, loss: Any = None, **settings: Any) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), *layers, nn.Linear(5, 3)).double()
    return Objective(model, loss or nn.CrossEntropyLoss(), [(X[:4], Y[:4]), (X[4:], Y[4:])], **settings)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_passes_on_every_case(case: Case) -> None:
    model = case.model()
    with assert_untouched(model):
        report = Objective(model, case.loss, case.ragged()).check()
    assert report.passed
    assert len(report.messages) == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["MLP tanh", "LayerNorm", "MultiheadAttention eval"])
def test_passes_in_narrow_dtypes(name: str, dtype: torch.dtype) -> None:
    case = BY_NAME[name]
    x, y = case.data()
    y = y.to(dtype) if y.is_floating_point() else y
    assert Objective(case.model().to(dtype), case.loss, (x.to(dtype), y)).check().passed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("tanh", [False, True])
def test_passes_where_the_data_are_fitted(dtype: torch.dtype, tanh: bool) -> None:
    """Loss and gradient are rounding there, and differences of the loss lie above both."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 8), *([nn.Tanh()] if tanh else []), nn.Linear(8, 1)).double()
        x = torch.randn(7, 3, dtype=torch.float64)
    last = model[-1]
    inner = nn.Sequential(*model[:-1])(x).detach()
    with torch.no_grad():
        y = torch.sin(x.sum(1, keepdim=True)) if tanh else 0.3 * model(x)
        columns = torch.cat([inner, torch.ones(7, 1, dtype=torch.float64)], 1)
        solution = torch.linalg.lstsq(columns, y, driver="gelsd").solution
        last.weight.copy_(solution[:8].T)
        last.bias.copy_(solution[8])
    objective = Objective(model.to(dtype), nn.MSELoss(), (x.to(dtype), y.to(dtype)))
    assert float(objective.loss()) < (1e-25 if dtype == torch.float64 else 1e-8)
    assert objective.check().passed


@functools.cache
def trained(activation: type[nn.Module]) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x, y = torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,))
        layers = [nn.Linear(5, 24), activation(), nn.Linear(24, 24), activation(), nn.Linear(24, 3)]
    model = nn.Sequential(*layers).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(800):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return model, (x, y)


def certain(activation: type[nn.Module], dtype: torch.dtype = torch.float64) -> tuple[nn.Sequential, Any]:
    """Return a classifier whose predictions are right and nearly certain."""
    model, (x, y) = trained(activation)
    return copy.deepcopy(model).to(dtype), (x.to(dtype), y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.GELU])
@pytest.mark.parametrize("split", [True, False])
def test_passes_where_predictions_are_nearly_certain(
    activation: type[nn.Module], dtype: torch.dtype, split: bool
) -> None:
    """What is left of 1 - p of p near 1 has few digits."""
    model, data = certain(activation, dtype)
    own = {} if split else {"forward": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])}
    subject = Objective(model, nn.CrossEntropyLoss() if split else None, data, **own)  # type: ignore[arg-type]
    assert float(subject.loss()) < 1e-4
    assert subject.check().passed


def test_kinks_are_named_and_not_held_against_the_model() -> None:
    messages = objective(nn.ReLU()).check().messages
    assert any("ReluBackward0 has kinks" in message for message in messages)
    assert not any("kinks" in message for message in objective(nn.Tanh()).check().messages)


# -- functions that move ----------------------------------------------------------------------------------------------


class NumpyNoise(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + float(np.random.default_rng().normal())


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x * (1 + 0.1 * self.calls)


@pytest.mark.parametrize("culprit", [NumpyNoise, Counts])
def test_module_that_does_not_repeat_is_named(culprit: type[nn.Module]) -> None:
    subject = objective(nn.Tanh(), culprit())
    with assert_untouched(subject.model), pytest.raises(CheckFailedError, match=rf"'2' \({culprit.__name__}\)"):
        subject.check()


def test_loss_that_does_not_repeat() -> None:
    noise = np.random.default_rng(0)
    subject = objective(nn.Tanh(), loss=lambda z, y: nn.functional.cross_entropy(z, y) * (1 + float(noise.random())))
    with pytest.raises(CheckFailedError, match="every module repeats, so the loss"):
        subject.check()


def test_loader_that_does_not_repeat() -> None:
    class Moving(TensorDataset):
        def __getitem__(self, i: int) -> tuple[Tensor, ...]:
            x, y = super().__getitem__(i)
            return x + torch.randn(4, dtype=torch.float64), y

    subject = Objective(objective().model, nn.CrossEntropyLoss(), DataLoader(Moving(X, Y)))
    with pytest.raises(DataError, match="other data at each pass"):
        subject.check()


def test_state_in_a_buffer_is_guarded() -> None:
    class CountsInBuffer(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x * (1 + 0.1 * self.calls)

    subject = objective(CountsInBuffer())
    with assert_untouched(subject.model):
        assert subject.check().passed


# -- derivatives that are wrong ---------------------------------------------------------------------------------------


class WrongGradient(torch.autograd.Function):
    """sin, with 1.1 cos for its derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return 1.1 * u * ctx.saved_tensors[0].cos()


class WrongCurvature(torch.autograd.Function):
    """sin, with the right derivative, of which autograd does not know that it depends on x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return u * ctx.saved_tensors[0].detach().cos()


class Once(torch.autograd.Function):
    """sin, to be differentiated once only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, u: Tensor) -> Tensor:
        return u * ctx.saved_tensors[0].cos()


class Custom(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function.apply(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (WrongGradient, "not the derivative of the loss.*WrongGradientBackward"),
        (WrongCurvature, "second derivative is wrong.*WrongCurvatureBackward"),
        (Once, "OnceBackward"),
    ],
)
def test_wrong_backward_is_found_and_named(function: type[torch.autograd.Function], message: str) -> None:
    subject = objective(Custom(function))
    with assert_untouched(subject.model), pytest.raises(CheckFailedError, match=message):
        subject.check()


@pytest.mark.parametrize("of", ["gradient", "curvature"])
def test_wrong_backward_is_found_where_predictions_are_nearly_certain(of: str) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.tanh()

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            return 1.05 * u * (1 - x.tanh() ** 2) if of == "gradient" else u * (1 - x.tanh().detach() * x.tanh())

    model, data = certain(nn.Tanh)
    for place in (1, 3):
        model[place] = Custom(Bad)  # type: ignore[index, operator]
    message = "not the derivative of the loss" if of == "gradient" else "second derivative is wrong|not symmetric"
    with pytest.raises(CheckFailedError, match=message):
        Objective(model, nn.CrossEntropyLoss(), data).check()


def test_derivative_that_autograd_leaves_out_is_found() -> None:
    """Autograd passes over the error that `once_differentiable` plants, where no parameter lies behind it."""
    model = nn.Sequential(nn.Linear(4, 3), Custom(Once)).double()
    with pytest.raises(CheckFailedError, match="OnceBackward"):
        Objective(model, nn.CrossEntropyLoss(), (X, Y)).check()


def test_operation_without_second_derivative() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.ctc_loss(outputs.log_softmax(-1), targets, torch.full((3,), 10), torch.full((3,), 4))

    data = torch.randn(10, 3, 4), torch.randint(1, 6, (3, 4))
    with pytest.raises(CheckFailedError, match=r"second derivative"):
        Objective(nn.Linear(4, 6), loss, data).check()


def test_unsymmetric_hessian_is_found() -> None:
    class Lopsided(torch.autograd.Function):
        """(x, y) -> x y, where the derivative in x forgets that it depends on y."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, u: Tensor) -> tuple[Tensor, Tensor]:
            x, y = ctx.saved_tensors
            return u * y.detach(), u * x

    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return Lopsided.apply(x, self.scale.expand_as(x))

    with pytest.raises(CheckFailedError, match=r"not symmetric.*LopsidedBackward"):
        objective(Product()).check()


def test_wrong_closed_form_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = curvature.losses.rules.CrossEntropy
    monkeypatch.setattr(rule, "_scale", lambda *_: 0.3)
    with pytest.raises(CheckFailedError, match="closed form of the loss Hessian differs"):
        objective(nn.Tanh()).check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_what_agrees_at_once_takes_two_products_and_two_gradients_elsewhere(
    dtype: torch.dtype, activation: type[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    points: list[Tensor] = []
    products: list[int] = []
    shifted, hvp = check.shifted, Linearization.hvp
    monkeypatch.setattr(check, "product_noise", lambda *_: 0.0)  # which takes products of its own
    monkeypatch.setattr(check, "shifted", lambda o, point: points.append(point) or shifted(o, point))
    monkeypatch.setattr(Linearization, "hvp", lambda lin, X, *block: products.append(len(X)) or hvp(lin, X, *block))
    subject = objective(activation())
    subject = Objective(subject.model.to(dtype), nn.CrossEntropyLoss(), (X.to(dtype), Y))
    theta = subject.space.current()
    assert subject.check().passed
    assert products == [2]
    first = 1e-3 if dtype == torch.float32 else torch.finfo(dtype).eps ** (1 / 3)
    assert [float((point - theta).norm()) for point in points] == pytest.approx(2 * [first * float(theta.norm())], 1e-3)


def test_a_step_that_does_not_agree_is_followed_by_others(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[float] = []

    def difference(*given: Any) -> Any:
        steps.append(given[4])
        return check._Difference(slope_error=0.01, tells=True, curve_error=errors[len(steps) - 1], drowned=False)

    monkeypatch.setattr(check, "_difference", difference)
    subject = objective(nn.Tanh())
    subject = Objective(subject.model.float(), nn.CrossEntropyLoss(), (X.float(), Y))
    errors = [0.06, 0.07, 0.04]
    assert subject.check().passed
    assert steps == list(check._SINGLE_STEPS)
    errors += [0.06] * 6
    steps.clear()
    errors[:3] = [0.06] * 3
    with pytest.raises(CheckFailedError, match="second derivative is wrong"):
        subject.check()
    assert steps == 2 * list(check._SINGLE_STEPS)  # once more with the allowance of what cancelled


def test_tolerance_can_be_set() -> None:
    assert objective(nn.Tanh()).check(rtol=1e-6).passed
    with pytest.raises(CheckFailedError):
        objective(nn.Tanh()).check(rtol=0.0)
