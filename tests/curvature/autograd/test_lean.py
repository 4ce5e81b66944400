"""Layers recorded in their lean form against autograd's own second derivatives, and the comparison that guards them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from curvature import GGNOperator, HessianOperator, Objective
from curvature.autograd import lean_functions
from curvature.autograd.lean import LeanLayers
from curvature.autograd.lean_trust import LeanTrust
from curvature.engine import linearize
from tests.cases import BY_NAME
from tests.checks import assert_close
from tests.references import dense_ggn, dense_hessian, derivative_along, flat_gradient, total_loss


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def positive(*shape: int) -> Tensor:
    return real(*shape, seed=9).abs() + 0.5


def norm_buffers() -> tuple[Tensor, Tensor]:
    return real(4, seed=8), positive(4)


def attention(*args: Tensor, **kwargs: Any) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):  # of which torch has a second derivative
        return F.scaled_dot_product_attention(*args, **kwargs)


Layer = tuple[Callable[..., Tensor], list[Tensor]]
CONVOLUTIONS: dict[str, Layer] = {
    "conv1d": (lambda x, w, b: F.conv1d(x, w, b), [real(2, 3, 6), real(4, 3, 3), real(4)]),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b, padding=1), [real(2, 2, 4, 4), real(4, 2, 3, 3), real(4)]),
    "conv2d no bias": (lambda x, w: F.conv2d(x, w), [real(2, 2, 4, 4), real(3, 2, 3, 3)]),
    "conv2d strided": (
        lambda x, w, b: F.conv2d(x, w, b, stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        [real(2, 2, 5, 5), real(4, 2, 3, 2), real(4)],
    ),
    "conv2d grouped": (lambda x, w, b: F.conv2d(x, w, b, groups=2), [real(2, 4, 3, 3), real(4, 2, 2, 2), real(4)]),
    "conv3d": (lambda x, w, b: F.conv3d(x, w, b), [real(1, 1, 3, 3, 3), real(2, 1, 2, 2, 2), real(2)]),
}
CONVOLUTIONS |= {
    f"conv1d, relu {i}": (lambda x, w, f=f: f(F.conv1d(x, w)), [real(2, 3, 6), real(4, 3, 3)])
    for i, f in enumerate((F.relu, torch.relu, Tensor.relu))
}
POOLS: dict[str, Layer] = {
    f"conv2d, means over {kernel}": (
        lambda x, w, kernel=kernel, kw=kw: F.avg_pool2d(F.conv2d(x, w), kernel, **kw),
        [real(2, 2, 5, 7), real(3, 2, 2, 2)],
    )
    for kernel, kw in [(2, {}), ((4, 3), {"stride": [4, 3]}), ((1, 2), {"stride": (1, 2), "ceil_mode": True})]
}
NORMS: dict[str, Layer] = {
    "layer norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), [real(3, 5), real(5), real(5)]),
    "layer norm plain": (lambda x: F.layer_norm(x, (5,), eps=0.1), [real(3, 5)]),
    "layer norm without bias": (lambda x, w: F.layer_norm(x, (5,), w), [real(2, 3, 5), real(5)]),
    "layer norm 2d": (lambda x, w: F.layer_norm(x, (3, 4), w), [real(2, 3, 4), real(3, 4)]),
    "batch norm": (lambda x, w, b: F.batch_norm(x, *norm_buffers(), w, b), [real(3, 4, 2), real(4), real(4)]),
    "conv, batch norm": (
        lambda x, k, w, b: F.batch_norm(F.conv2d(x, k), *norm_buffers(), w, b, eps=0.1),
        [real(2, 2, 3, 3), real(4, 2, 2, 2), real(4), real(4)],
    ),
    "linear, batch norm": (
        lambda x, k, c, w, b: F.batch_norm(F.linear(x, k, c), *norm_buffers(), w, b),
        [real(3, 5), real(4, 5), real(4), real(4), real(4)],
    ),
    "conv, batch norm, shared": (  # the output of the convolution is used besides
        lambda x, k: (lambda y: F.batch_norm(y, *norm_buffers()) * y)(F.conv1d(x, k)),
        [real(2, 2, 3), real(4, 2, 2)],
    ),
}
ACTIVATIONS: dict[str, Layer] = {
    f.__name__ + suffix: (lambda x, f=f, kw=kw: f(x, **kw), [2 * real(3, 4)])
    for f, kw, suffix in [
        *((F.gelu, {}, ""), (F.gelu, {"approximate": "tanh"}, " tanh"), (F.silu, {}, ""), (F.mish, {}, "")),
        *((F.softplus, {"beta": 2.0}, ""), (F.elu, {"alpha": 0.7}, ""), (F.selu, {}, ""), (F.celu, {"alpha": 0.7}, "")),
        (F.logsigmoid, {}, ""),
    ]
}
SEEN = torch.arange(12).view(3, 4) % 3 > 0
ATTENTIONS: dict[str, Layer] = {
    name: (lambda q, k, v, kw=kw: attention(q, k, v, **kw), [real(*shape, seed=i) for i, shape in enumerate(shapes)])
    for name, kw, shapes in [
        ("attention", {}, [(2, 2, 3, 5)] * 3),
        ("attention, causal", {"is_causal": True}, [(2, 3, 5)] * 3),
        ("attention, causal, other lengths", {"is_causal": True, "scale": 0.3}, [(2, 3, 5), (2, 4, 5), (2, 4, 2)]),
        ("attention, some seen", {"attn_mask": SEEN}, [(2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 2)]),
        (
            "attention, a row sees nothing",
            {"attn_mask": SEEN & (torch.arange(3) > 0)[:, None]},
            [(3, 5), (4, 5), (4, 5)],
        ),
        ("attention, added", {"attn_mask": real(2, 1, 3, 4, seed=7)}, [(2, 2, 3, 5), (2, 2, 4, 5), (2, 2, 4, 5)]),
    ]
}
LAYERS = CONVOLUTIONS | POOLS | NORMS | ACTIVATIONS | ATTENTIONS


def second_derivative(
    function: Callable[..., Tensor], inputs: list[Tensor], chosen: list[int], layers: LeanLayers | None = None
) -> Tensor:
    """Return g and H v of a curved function of the layer's output, in some of the inputs, the layer as recorded."""
    leaves = [x.clone().requires_grad_(i in chosen) for i, x in enumerate(inputs)]
    with contextlib.nullcontext() if layers is None else layers:
        y = function(*leaves)
    value = (y.sin() * real(*y.shape, seed=5)).sum()
    params = [leaves[i] for i in chosen]
    g = torch.autograd.grad(value, params, create_graph=True)
    v = [real(*p.shape, seed=6 + i) for i, p in enumerate(params)]
    Hv = torch.autograd.grad(g, params, v)
    return torch.cat([part.reshape(-1) for part in (*g, *Hv)]).detach()


@pytest.mark.parametrize("name", LAYERS)
def test_lean_layer_agrees_with_autograd(name: str) -> None:
    function, inputs = LAYERS[name]
    places = range(len(inputs))
    for chosen in (list(places), *([i] for i in places)):
        expected = second_derivative(function, inputs, chosen)
        lean = LeanLayers()
        actual = second_derivative(function, inputs, chosen, lean)
        if 0 in chosen:
            assert lean.num_replaced > 0
        assert_close(actual, expected, 1e-11)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_weight_norm_is_replaced_even_without_lean_layers(dim: int) -> None:
    v, g = real(3, 4), positive(*{0: (3, 1), 1: (1, 4), -1: ()}[dim])
    for corrections_only in (True, False):
        leaves = [v.clone().requires_grad_(), g.clone().requires_grad_()]

        def gradient(leaves: list[Tensor] = leaves, layers: LeanLayers | None = None) -> Tensor:
            with contextlib.nullcontext() if layers is None else layers:
                value = torch._weight_norm(leaves[0], leaves[1], dim).sin().sum()
            return flat_gradient(value, leaves, create_graph=True)

        x = real(v.numel() + g.numel(), seed=3)
        by_differences = derivative_along(gradient, leaves, x)
        product = flat_gradient(gradient(layers=LeanLayers(corrections_only=corrections_only)) @ x, leaves)
        assert_close(product, by_differences, 1e-8)


@pytest.mark.parametrize("relu", [F.relu, torch.relu, Tensor.relu])
def test_no_zeros_stand_for_the_second_derivative_of_a_rectified_linear_unit(relu: Callable[[Tensor], Tensor]) -> None:
    x, u = real(3, 4).requires_grad_(), real(3, 4).requires_grad_()
    with LeanLayers() as lean:
        y = relu(F.softplus(x) - 0.7)
        assert lean.num_replaced == 2
        z = x.detach().requires_grad_()
        y = relu(z)
    (slope,) = torch.autograd.grad(y, z, u, create_graph=True)
    assert torch.autograd.grad(slope.sum(), z, allow_unused=True, retain_graph=True) == (None,)
    (in_u,) = torch.autograd.grad(slope.sum(), u)
    assert torch.equal(in_u, (x > 0).to(x))


def test_means_over_small_windows_side_by_side_are_matrix_products_beside_other_lean_layers() -> None:
    x, w = real(2, 4, 5, 5).requires_grad_(), real(4, 4, 2, 2)
    for settings in [
        *({"stride": 1}, {"padding": 1}, {"divisor_override": 3}, {"kernel_size": 3}),
        {"kernel_size": 1, "stride": 2},
    ]:
        expected = F.avg_pool2d(y := F.conv2d(x, w), **(settings := {"kernel_size": 2, **settings}))
        with LeanLayers() as lean:
            found = F.avg_pool2d(F.conv2d(x, w), **settings)
        assert lean.num_replaced == 1
        assert_close(found.detach(), expected.detach(), 1e-12)
    for image in (y, y.to(memory_format=torch.channels_last), y.repeat(1, 1, 1, 9), y[0], y[..., :-1]):
        with LeanLayers() as lean:
            F.conv2d(x, w)
            found = F.avg_pool2d(image, 2)
        assert lean.num_replaced == 1 + (image is y or image.ndim == 3)
        assert_close(found.detach(), F.avg_pool2d(image, 2).detach(), 1e-12)
    with LeanLayers() as lean:
        F.avg_pool2d(y, 2)
    assert lean.num_replaced == 0


def test_layers_with_nothing_lean_are_left_alone() -> None:
    x = real(3, 4, 2).requires_grad_()
    lean = LeanLayers()
    with lean:
        F.batch_norm(x, None, None, training=True)
        F.silu(x.clone(), inplace=True)
        F.gelu(x.detach())
        F.relu(x)  # beside others only
        F.scaled_dot_product_attention(x.mT, x.mT, x.mT, dropout_p=0.5)
        F.scaled_dot_product_attention(x, x[:1], x[:1])
        F.scaled_dot_product_attention(x[None].mT, x[None, :1].mT, x[None, :1].mT, enable_gqa=True)
        F.scaled_dot_product_attention(x, x, x, attn_mask=real(4, 4).requires_grad_())
        F.scaled_dot_product_attention(x.detach(), x.detach(), x.detach())
        F.layer_norm(x, (2,), None, real(2))
        F.conv1d(x, real(2, 4, 1), padding="same")
        with torch.no_grad():
            F.gelu(x)
        with torch.autocast("cpu"):
            F.gelu(x)
    assert lean.num_replaced == 0


@pytest.mark.parametrize("change", [lambda y: y.mul_(2.0), lambda y: y.add_(y.detach()), lambda y: y.relu_()])
def test_batch_norm_is_not_folded_into_what_was_changed_in_place(change: Callable[[Tensor], Tensor]) -> None:
    def function(x: Tensor, k: Tensor, w: Tensor) -> Tensor:
        y = F.conv1d(x, k)
        change(y)
        return F.batch_norm(y, *norm_buffers(), w)

    inputs = [real(2, 3, 4), real(4, 3, 2), real(4)]
    expected = second_derivative(function, inputs, [0, 1, 2])
    actual = second_derivative(function, inputs, [0, 1, 2], LeanLayers())
    assert_close(actual, expected, 1e-11)


# -- trust ------------------------------------------------------------------------------------------------------------


def sabotaged(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the second derivative of a lean function wrong by one part in a hundred."""
    function = getattr(lean_functions, rule)
    right = function.backward

    def wrong(ctx: Any, *grads: Any) -> Any:
        return tuple(1.01 * g if isinstance(g, Tensor) else g for g in right(ctx, *grads))

    monkeypatch.setattr(function, "backward", staticmethod(wrong))


SABOTAGE = [
    ("ActivationBackward", "MLP GELU"),
    ("NormaliseBackward", "LayerNorm"),
    ("ConvolutionBackward", "GroupNorm"),
    ("Activation", "MLP SiLU"),
    ("AttentionBackward", "attention fused"),
]


@pytest.mark.parametrize("keep_graphs", [True, False])
@pytest.mark.parametrize("matrix", ["Hessian", "GGN"])
@pytest.mark.parametrize(("rule", "name"), SABOTAGE)
def test_wrong_rule_is_found_out_and_not_used(
    rule: str, name: str, matrix: str, keep_graphs: bool, monkeypatch: pytest.MonkeyPatch, generator: torch.Generator
) -> None:
    sabotaged(rule, monkeypatch)
    monkeypatch.setattr(linearize, "find_chain", lambda *_: None)  # which would do without the rule
    case = BY_NAME[name]
    model = case.model()
    params = list(model.parameters())
    if matrix == "Hessian":
        dense = dense_hessian(lambda: total_loss(model, [case.data()], case.criterion), params)
    else:
        dense = dense_ggn(model, [case.data()], case.criterion, params)
    objective = Objective(model, case.loss, case.ragged(), keep_graphs=keep_graphs)
    operator = (HessianOperator if matrix == "Hessian" else GGNOperator)(objective)
    v = torch.randn(operator.shape[0], generator=generator, dtype=torch.float64)
    assert_close(operator @ v, dense @ v)
    assert objective.trust.revoked
    assert any("Lean layers are not used" in note for note in objective.notes)


def test_right_rules_are_used_and_noted() -> None:
    case = BY_NAME["LayerNorm"]
    objective = Objective(case.model(), case.loss, case.ragged())
    HessianOperator(objective).to_dense()
    GGNOperator(objective).to_dense()
    assert not objective.trust.revoked
    assert set(objective.trust.differences) == {"hvp", "ggnvp"}
    assert all(lin.num_lean_layers == 1 for lin in objective.linearizations())
    assert sum("Lean layers serve for products" in note for note in objective.notes) == 2


def test_trust_is_shared_with_restrictions(monkeypatch: pytest.MonkeyPatch) -> None:
    sabotaged("NormaliseBackward", monkeypatch)
    case = BY_NAME["LayerNorm"]
    objective = Objective(case.model(), case.loss, case.ragged())
    HessianOperator(objective).to_dense()
    assert all(lin.num_lean_layers == 0 for lin in objective.restrict("3").linearizations())


def test_module_with_batch_norm_keeps_its_statistics() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 1), nn.BatchNorm1d(2), nn.Tanh(), nn.Flatten()).double().train()
    before = {name: b.clone() for name, b in model.named_buffers()}
    HessianOperator(Objective(model, nn.MSELoss(), (real(3, 1, 2), real(3, 4)))).to_dense()
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_lean_layers_are_compared_on_a_part_of_the_batch() -> None:
    sizes: list[int] = []
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(8, 2)).double()
    model.register_forward_hook(lambda *call: sizes.append(len(call[-1])))
    x, y = torch.randn(16, 1, 4, 4, dtype=torch.float64), torch.arange(16) % 2
    for targets, part_decides in (
        (y, True),
        (y.where(torch.arange(16) > 3, -100), False),
    ):  # nothing counts in the part
        objective = Objective(model, nn.CrossEntropyLoss(), (x, targets), keep_graphs=True)
        sizes.clear()
        HessianOperator(objective) @ torch.ones(objective.num_params, dtype=torch.float64)
        assert (sizes.count(16) == 1) == part_decides
        assert any("agree with autograd" in note for note in objective.notes)


@pytest.mark.parametrize("place", [0, 5])
@pytest.mark.parametrize("of_lean", [True, False])
def test_a_comparison_that_is_not_a_number_is_none_passed(place: int, of_lean: bool) -> None:
    trust, good, bad = LeanTrust(), torch.ones(6), torch.ones(6)
    bad[place] = torch.nan
    trust.compare("hvp", 1, *((bad, good) if of_lean else (good, bad)), [2, 4], 1e-7)
    assert trust.revoked
    assert not trust.covers("hvp", 1)


@pytest.mark.parametrize(
    "layer",
    [
        lambda x: F.gelu(x),
        lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos()),
        lambda x: F.layer_norm(x.sin(), (4,), x[0, 0], x[1, 1]),
        lambda x: F.layer_norm(x, (3, 4)),
        lambda x: F.conv1d(x, x[:, :, :2].sin()),
    ],
    ids=["activation", "attention", "normalisation", "without weights", "convolution"],
)
def test_a_graph_of_the_second_derivative_is_refused(layer: Callable[[Tensor], Tensor]) -> None:
    x = real(2, 3, 4).requires_grad_()
    with LeanLayers() as layers:
        y = layer(x)
    assert layers.num_replaced == 1
    (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    torch.autograd.grad(g.sin().sum(), x, retain_graph=True)
    with pytest.raises(RuntimeError, match="holds two derivatives"):
        torch.autograd.grad(g.sin().sum(), x, create_graph=True)
