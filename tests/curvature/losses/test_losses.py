"""Losses: the second derivative in the outputs in closed form, and what a mean divides by."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from curvature import EmpiricalFisherOperator, GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from curvature.losses.recognised import loss_rule
from tests.checks import assert_close

G = torch.Generator().manual_seed(0)
MSE: Any = F.mse_loss  # whose type stubs lack weight=
WEIGHTS = torch.tensor([0.5, 2.0, 1.5, 0.1], dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G, dtype=torch.float64)


CLASSES = torch.tensor([0, 3, 1, 2, 3, 0])
PADDED = torch.tensor([0, -100, 1, -100, 3, 0])
PIXELS = torch.tensor([[[0, 1], [2, 3]], [[-100, 1], [0, -100]]])
BITS = (real(6, 4) > 0).double()
LOSSES: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "mse": (nn.MSELoss(), real(6, 4), real(6, 4)),
    "mse sum": (nn.MSELoss(reduction="sum"), real(6, 4), real(6, 4)),
    "mse function": (F.mse_loss, real(6), real(6)),
    "mse weights": (functools.partial(MSE, weight=real(6, 4).abs()), real(6, 4), real(6, 4)),
    "mse weights sum": (functools.partial(MSE, weight=real(6).abs(), reduction="sum"), real(6), real(6)),
    "ce": (nn.CrossEntropyLoss(), real(6, 4), CLASSES),
    "ce function": (F.cross_entropy, real(6, 4), CLASSES),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), real(6, 4), CLASSES),
    "ce ignored": (nn.CrossEntropyLoss(), real(6, 4), PADDED),
    "ce ignore_index": (nn.CrossEntropyLoss(ignore_index=3), real(6, 4), CLASSES),
    "ce class weights": (nn.CrossEntropyLoss(weight=WEIGHTS), real(6, 4), PADDED),
    "ce class weights sum": (nn.CrossEntropyLoss(weight=WEIGHTS, reduction="sum"), real(6, 4), PADDED),
    "ce smoothing": (nn.CrossEntropyLoss(label_smoothing=0.2), real(6, 4), PADDED),
    "ce smoothing, weights": (nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.2), real(6, 4), PADDED),
    "ce probabilities": (nn.CrossEntropyLoss(), real(6, 4), real(6, 4).softmax(1)),
    "ce probabilities, all": (
        nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.3),
        real(6, 4),
        real(6, 4).softmax(1),
    ),
    "ce unnormalised targets": (nn.CrossEntropyLoss(), real(6, 4), real(6, 4).exp()),
    "ce pixels": (nn.CrossEntropyLoss(weight=WEIGHTS), real(2, 4, 2, 2), PIXELS),
    "ce pixels, probabilities": (nn.CrossEntropyLoss(), real(2, 4, 2, 2), real(2, 4, 2, 2).softmax(1)),
    "ce one example": (nn.CrossEntropyLoss(), real(4), torch.tensor(2)),
    "ce partial": (functools.partial(F.cross_entropy, weight=WEIGHTS, label_smoothing=0.1), real(6, 4), CLASSES),
    "bce": (nn.BCEWithLogitsLoss(), real(6, 4), BITS),
    "bce function": (F.binary_cross_entropy_with_logits, real(6, 4), BITS),
    "bce sum": (nn.BCEWithLogitsLoss(reduction="sum"), real(6, 4), BITS),
    "bce soft": (nn.BCEWithLogitsLoss(), real(6, 4), real(6, 4).sigmoid()),
    "bce pos_weight": (nn.BCEWithLogitsLoss(pos_weight=3 * WEIGHTS), real(6, 4), BITS),
    "bce weight": (nn.BCEWithLogitsLoss(weight=WEIGHTS, pos_weight=3 * WEIGHTS), real(6, 4), BITS),
}
FUNCTIONS: dict[type, Callable[..., Tensor]] = {
    nn.MSELoss: F.mse_loss,
    nn.CrossEntropyLoss: F.cross_entropy,
    nn.BCEWithLogitsLoss: F.binary_cross_entropy_with_logits,
}
OTHER: dict[str, tuple[Callable[..., Tensor], Tensor, Tensor]] = {
    "own": (lambda z, y: (z - y).pow(4).mean() + z.prod(1).mean(), real(3, 4), real(3, 4)),
    "nll": (nn.NLLLoss(), real(6, 4), CLASSES),
    "l1": (nn.L1Loss(), real(3, 4), real(3, 4)),
    "poisson": (nn.PoissonNLLLoss(), real(3, 4), real(3, 4).exp()),
    "positional partial": (
        functools.partial(lambda factor, z, y: factor * (z - y).pow(4).sum(), 3.0),
        real(4),
        real(4),
    ),
}


@pytest.mark.parametrize("name", [*LOSSES, *OTHER])
def test_output_hessian(name: str) -> None:
    loss, outputs, targets = (LOSSES | OTHER)[name]
    rule = loss_rule(loss)
    assert rule.closed_form == (name in LOSSES)
    n = outputs.numel()
    expected = torch.func.jacrev(torch.func.grad(loss))(outputs, targets).reshape(n, n)
    product = rule.output_hessian(outputs.clone(), targets)
    columns = [product(e.view(outputs.shape)).reshape(-1) for e in torch.eye(n, dtype=outputs.dtype)]
    assert_close(torch.stack(columns, dim=1), expected, 1e-12)


@pytest.mark.parametrize("num_samples", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_sampled_fisher_is_unbiased(name: str, num_samples: int) -> None:
    """Its mean over draws is the Hessian, of these losses; entry by entry, in units of its own standard error."""
    loss, outputs, targets = LOSSES[name]
    rule = loss_rule(loss)
    n, seeds = outputs.numel(), 400
    u, v = real(2, *outputs.shape)
    exact = torch.func.jacrev(torch.func.grad(loss))(outputs, targets).reshape(n, n) @ v.reshape(-1)
    generator = torch.Generator().manual_seed(0)
    draws = [rule.sampled_fisher(outputs, targets, num_samples, generator) for _ in range(seeds)]
    products = torch.stack([draw(v).reshape(-1) for draw in draws])
    for samples, mean in (
        (products @ u.reshape(-1), exact @ u.reshape(-1)),
        (products @ v.reshape(-1), exact @ v.reshape(-1)),
    ):
        z = float((samples.mean() - mean) / (samples.std() / seeds**0.5))
        assert abs(z) < 4, f"the mean is {z:+.1f} standard errors from the exact value"
    first = draws[0]
    assert_close((u * first(v)).sum(), (v * first(u)).sum(), 1e-12)
    assert float((v * first(v)).sum()) >= 0


@pytest.mark.parametrize("name", LOSSES)
def test_output_gradient(name: str) -> None:
    loss, outputs, targets = LOSSES[name]
    assert_close(loss_rule(loss).output_gradient(outputs, targets), torch.func.grad(loss)(outputs, targets), 1e-12)


def test_other_losses_draw_no_targets() -> None:
    for name, (loss, outputs, targets) in OTHER.items():
        rule = loss_rule(loss)
        assert not rule.is_likelihood, name
        with pytest.raises(InputError, match="targets can be drawn for"):
            rule.sampled_fisher(outputs, targets, 1, torch.Generator())


@pytest.mark.parametrize("name", LOSSES)
def test_number_of_terms_is_what_the_mean_divides_by(name: str) -> None:
    loss, outputs, targets = LOSSES[name]
    if isinstance(loss, nn.Module):
        settings: dict[str, Any] = {k: getattr(loss, k) for k in ("weight", "pos_weight") if hasattr(loss, k)}
        settings |= {k: getattr(loss, k) for k in ("ignore_index", "label_smoothing") if hasattr(loss, k)}
        function: Callable[..., Tensor] = FUNCTIONS[type(loss)]
        summed, mean = (function(outputs, targets, reduction=r, **settings) for r in ("sum", "mean"))
    else:
        summed, mean = loss(outputs, targets, reduction="sum"), loss(outputs, targets, reduction="mean")
    assert loss_rule(loss).num_terms(outputs, targets) == pytest.approx(float(summed / mean), rel=1e-12)


def test_subclass_of_known_loss_is_not_taken_for_it() -> None:
    class Twice(nn.MSELoss):
        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return 2 * super().forward(z, y)

    z = real(3)
    rule = loss_rule(Twice())
    assert not rule.closed_form
    assert_close(rule.output_hessian(z, real(3))(z), 4 / 3 * z)


@pytest.mark.parametrize(
    ("loss", "targets", "terms"),
    [
        (nn.NLLLoss(), PADDED, 4.0),
        (nn.NLLLoss(weight=WEIGHTS), PADDED, 2 * 0.5 + 2.0 + 0.1),
        (nn.L1Loss(), torch.zeros(6, 4), 24.0),
        (nn.L1Loss(reduction="sum"), torch.zeros(6, 4), 24.0),
        (nn.KLDivLoss(reduction="batchmean"), torch.zeros(6, 4), 6.0),
        (lambda z, y: (z - y).mean(), torch.zeros(6, 4), 6.0),
        (lambda z, y: (z - y).mean(), PADDED, 4.0),
        (lambda z, y: (z - y).mean(), torch.tensor(1.0), 1.0),
    ],
)
def test_number_of_terms_of_other_losses(loss: Callable[..., Tensor], targets: Tensor, terms: float) -> None:
    assert loss_rule(loss).num_terms(None, targets) == pytest.approx(terms)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["ce", "bce", "mse"])
def test_narrow_outputs(name: str, dtype: torch.dtype) -> None:
    loss, outputs, targets = LOSSES[name]
    u = real(*outputs.shape)
    targets = targets.to(dtype) if targets.is_floating_point() else targets
    exact = loss_rule(loss).output_hessian(outputs.to(dtype).double(), targets)(u)
    narrow = loss_rule(loss).output_hessian(outputs.to(dtype), targets)(u.float())
    assert_close(narrow.double(), exact, 1e-5)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(reduction="none"), "reduction must be 'mean' or 'sum', got 'none'"),
        (functools.partial(F.mse_loss, reduction="none"), "got 'none'"),
        (nn.L1Loss(reduction="none"), "got 'none'"),
        (3.0, "loss must be a function"),
    ],
)
def test_bad_loss(loss: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        loss_rule(loss)


class Plain(nn.CrossEntropyLoss):
    """A subclass that computes what torch's class does."""


class Focal(nn.CrossEntropyLoss):
    def forward(self, *given: Tensor) -> Tensor:
        outputs, target = given
        entropy = F.cross_entropy(outputs, target, reduction="none", ignore_index=self.ignore_index)
        return ((1 - (-entropy).exp()).square() * entropy)[target != self.ignore_index].mean()


def _patched() -> nn.Module:
    loss = nn.MSELoss()
    vars(loss)["forward"] = lambda z, y: 3 * F.mse_loss(z, y)
    return loss


def _hooked() -> nn.Module:
    loss = nn.BCEWithLogitsLoss()
    loss.register_forward_hook(lambda *call: 3 * call[-1])
    return loss


@pytest.mark.parametrize(
    ("loss", "targets", "closed_form", "terms"),
    [
        (Plain(weight=WEIGHTS, label_smoothing=0.1), PADDED, True, 2 * 0.5 + 2.0 + 0.1),
        (Focal(), PADDED, False, 4.0),
        (Focal(ignore_index=3), CLASSES, False, 4.0),
        (Focal(), torch.full((6,), -100), False, 0.0),
        (_patched(), real(6, 4), False, 24.0),
        (_hooked(), BITS, False, 24.0),
        (functools.partial(MSE, weight=2 * BITS), real(6, 4), True, 2 * float(BITS.sum())),
        (functools.partial(F.mse_loss, size_average=True), real(6, 4), False, 6.0),
        (functools.partial(F.cross_entropy, reduce=True), CLASSES, False, 6.0),
    ],
)
def test_rules_serve_what_they_are_exact_for(
    loss: Callable[..., Tensor], targets: Tensor, closed_form: bool, terms: float
) -> None:
    rule = loss_rule(loss)
    assert rule.closed_form == closed_form
    outputs = real(6, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of arguments that torch deprecates
        assert rule.num_terms(outputs, targets) == pytest.approx(terms)
        if terms:
            expected = torch.func.jacrev(torch.func.grad(loss))(outputs, targets).reshape(24, 24)
            assert_close(
                rule.output_hessian(outputs, targets)(outputs).reshape(-1), expected @ outputs.reshape(-1), 1e-12
            )


def test_settings_are_read_when_they_are_used() -> None:
    loss = nn.CrossEntropyLoss()
    rule = loss_rule(loss)
    loss.weight, loss.label_smoothing, loss.ignore_index = WEIGHTS, 0.3, 2
    outputs = real(6, 4)
    fresh = loss_rule(nn.CrossEntropyLoss(weight=WEIGHTS, label_smoothing=0.3, ignore_index=2))
    assert rule.num_terms(outputs, CLASSES) == fresh.num_terms(outputs, CLASSES)
    assert_close(rule.output_hessian(outputs, CLASSES)(outputs), fresh.output_hessian(outputs, CLASSES)(outputs))


def test_targets_of_unknown_kind_need_a_weight() -> None:
    with pytest.raises(InputError, match="weight="):
        loss_rule(lambda z, _: z.mean()).num_terms(None, {"boxes": torch.zeros(3)})


@pytest.mark.parametrize("dim", [0, 1])
def test_the_hessian_of_nearly_certain_predictions_has_all_its_digits(dim: int) -> None:
    """p (u - p'u) of p near 1 is a difference of numbers alike; against float64, in which it has digits left."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 4, generator=generator)
    z[:, 2] += 14
    z, u, targets = (z, torch.randn(6, 4, generator=generator), torch.full((6,), 2))
    if dim == 0:
        z, u, targets = z[0], u[0], targets[0]
    rule = loss_rule(nn.CrossEntropyLoss())
    found, exact = (rule.output_hessian(z.to(t), targets)(u.to(t)) for t in (torch.float32, torch.float64))
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-12)


WRITING: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]] = {
    "sub_": (lambda z, y: z.sub_(y).square().mean(), lambda z, y: (z - y).square().mean(), real(6, 4)),
    "clamp_": (
        lambda z, y: F.cross_entropy(z.clamp_(-1, 1), y),
        lambda z, y: F.cross_entropy(z.clamp(-1, 1), y),
        CLASSES,
    ),
    "through a view": (
        lambda z, y: F.cross_entropy(z[:, :2].mul_(3.0)._base, y),
        lambda z, y: F.cross_entropy(torch.cat([3.0 * z[:, :2], z[:, 2:]], 1), y),
        CLASSES,
    ),
    "past autograd's count": (
        lambda z, y: (F.cross_entropy(z.tanh(), y), z.data.zero_())[0],
        lambda z, y: F.cross_entropy(z.tanh(), y),
        CLASSES,
    ),
    "by NumPy": (
        lambda z, y: (F.cross_entropy(z.tanh(), y), z.detach().numpy().fill(0.0))[0],
        lambda z, y: F.cross_entropy(z.tanh(), y),
        CLASSES,
    ),
}


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator, EmpiricalFisherOperator])
@pytest.mark.parametrize("name", WRITING)
def test_a_loss_that_writes_into_the_outputs_writes_into_copies(name: str, operator: Any) -> None:
    writing, plain, y = WRITING[name]
    model, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double(), real(6, 3)
    objectives = [Objective(model, loss, (x, y)) for loss in (writing, plain)]
    found, expected = (operator(objective).to_dense() for objective in objectives)
    assert_close(found, expected, 1e-12)
    found, expected = (objective.gradient() for objective in objectives)
    assert_close(found, expected, 1e-12)


def test_a_loss_that_begins_to_write_into_the_outputs_is_refused_once() -> None:
    writes: list[bool] = []

    def loss(z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(z.mul_(2.0) if writes else 2.0 * z, y)

    rule, z = loss_rule(loss), real(6, 4)
    before = rule.value(z, CLASSES)
    writes.append(True)
    kept = z.clone()
    with pytest.raises(InputError, match="which it did not do before"):
        rule.value(z, CLASSES)
    z = kept.clone()
    assert torch.equal(rule.value(z, CLASSES), before)
    assert torch.equal(z, kept)
