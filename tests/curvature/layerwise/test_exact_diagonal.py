"""Exact diagonals against dense matrices, by every route, and what may not be left behind on the user's model."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, Objective
from curvature.errors import InputError, NonFiniteError
from curvature.layerwise import bends as bends_module
from curvature.layerwise import exact_diagonal, num_columns
from curvature.layerwise import loss_root as roots
from curvature.layerwise.loss_root import loss_root
from curvature.losses.recognised import loss_rule
from curvature.per_example.forms import Factors
from tests.cases import CASES, Case
from tests.checks import assert_close, assert_untouched, relative_error
from tests.curvature.layerwise.exact_cases import (
    BY_LAYER,
    BY_LOSS,
    LAYERS,
    LOSSES,
    Layer,
    Loss,
    cut,
    ggn,
    hessian,
    targets,
)
from tests.references import dense_ggn, dense_hessian, total_loss

DENSE = {"ggn": ggn, "hessian": hessian}
CE = BY_LOSS["cross-entropy"]


def setting(layer: str = "Tanh", loss: Loss = CE) -> tuple[nn.Module, Any, Tensor, Tensor]:
    chosen = BY_LAYER[layer]
    return chosen.model(loss.outputs), loss.build(), chosen.inputs(), targets(loss)


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_layers(layer: Layer, kind: Any) -> None:
    model, loss, x, y = setting(layer.name)
    dense = DENSE[kind](model, loss, x, y).diagonal()
    found = exact_diagonal(Objective(model, loss, cut(x, y)), kind)
    assert_close(found.value, dense)
    curved = kind == "hessian" and layer.name in ("LayerNorm", "GroupNorm")
    assert found.route == ("products" if curved else "rules")


@pytest.mark.parametrize(("kind", "route"), [("ggn", "rules"), ("ggn", "vmap"), ("ggn", "loop"), ("hessian", "rules")])
@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.name)
def test_losses(loss: Loss, kind: Any, route: Any) -> None:
    model, function, x, y = setting("Tanh", loss)
    found = exact_diagonal(Objective(model, function, cut(x, y)), kind, route=route)
    assert_close(found.value, DENSE[kind](model, function, x, y).diagonal())
    assert found.route == route


HESSIANS = ("MLP tanh", "MLP SiLU", "BatchNorm", "dropout", "tied", "checkpointed", "frozen")  # the others are products


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, "ggn") for case in CASES] + [(case, "hessian") for case in CASES if case.name.startswith(HESSIANS)],
    ids=str,
)
def test_every_kind_of_model(case: Case, kind: Any) -> None:
    model = case.model()
    data = [case.data()] if case.depends_on_batches else case.ragged()
    objective = Objective(model, case.loss, data)
    params, forward = list(objective.space.tensors.values()), case.forward(model)
    if kind == "ggn":
        dense = dense_ggn(forward, data, case.criterion, params)
    else:
        dense = dense_hessian(lambda: total_loss(forward, data, case.criterion), params)
    with assert_untouched(model):
        found = exact_diagonal(objective, kind)
    assert_close(found.value, dense.diagonal())


# -- awkward models ------------------------------------------------------------------------------------------------


class Tied(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self[2].weight = self[0].weight


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.relu = nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(inplace=True)
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(self.norm(self.conv(x)) + x)
        return self.head(torch.flatten(self.pool(x), 1))


class OwnParameter(nn.Module):
    """A parameter that belongs to no layer, as positions in a transformer."""

    def __init__(self) -> None:
        super().__init__()
        self.shift, self.head = nn.Parameter(torch.ones(4)), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(x + self.shift))


class Centred(nn.Module):
    """Examples meet without any batch normalisation that could be seen from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.head(x))
        return z - z.mean(0)


class Hooked(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3))
        self[0].register_forward_hook(lambda _m, _x, z: 3 * z)


class Scaled(nn.Linear):
    """A subclass that computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Doubled(torch.autograd.Function):
    """A function of the user's, which curves and says so to nobody."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return 2 * x.sin()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * gradients[0] * x.cos()


class Own(nn.Module):
    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 4), inner, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.first(x)))


AWKWARD = {  # model, shape of an input, routes of the diagonals of G and H
    "tied": (Tied, (4,), "rules", "products"),
    "own parameter": (OwnParameter, (4,), "rules", "rules"),
    "examples meet": (Centred, (4,), "columns", "products"),
    "hooks": (Hooked, (4,), "rules", "rules"),
    "subclass": (lambda: nn.Sequential(Scaled(4, 3)), (4,), "rules", "rules"),
    "one size of batch": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.Unflatten(0, (5, 2)), nn.Flatten(), nn.Linear(8, 3)),
        (2, 4),
        "columns",
        "products",
    ),
    "gate": (lambda: Own(lambda z: z * z), (4,), "rules", "products"),
    "function of the user": (lambda: Own(Doubled.apply), (4,), "rules", "products"),
    "recurrent": (lambda: nn.Sequential(Last(nn.GRU(4, 3, batch_first=True)), nn.Linear(3, 3)), (2, 4), "", "products"),
    "time first": (lambda: TimeFirst(), (5, 4), "rules", "products"),
}


class Last(nn.Module):
    """The last output of a recurrent layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        last: Tensor = self.layer(x)[0][:, -1]
        return last


class TimeFirst(nn.Module):
    """Where it curves examples lie along the second dimension, of the same size as the first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(self.first(x.transpose(0, 1).contiguous()))).sum(0)
        return z


@pytest.mark.parametrize("kind", DENSE)
@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_models(name: str, kind: Any) -> None:
    build, shape, *routes = AWKWARD[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build().double()  # type: ignore[operator]
        x, y = torch.randn(5, *shape, dtype=torch.float64), targets(CE)
    found = exact_diagonal(Objective(model, nn.CrossEntropyLoss(), (x, y)), kind)
    assert_close(found.value, DENSE[kind](model, nn.CrossEntropyLoss(), x, y).diagonal())
    expected = routes[kind == "hessian"]
    assert found.route == expected or (not expected and found.route in ("vmap", "loop", "rules+vmap", "rules+loop"))
    if expected in ("products", "columns"):
        with pytest.raises(InputError, match="route='rules' does not serve"):
            exact_diagonal(Objective(model, nn.CrossEntropyLoss(), (x, y)), kind, route="rules")


@pytest.mark.parametrize("kind", DENSE)
def test_residual_network(kind: Any) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = Residual().double().eval(), torch.randn(5, 2, 3, 3, dtype=torch.float64), targets(CE)
    with assert_untouched(model):
        found = exact_diagonal(Objective(model, nn.CrossEntropyLoss(), cut(x, y)), kind, route="rules")
    assert_close(found.value, DENSE[kind](model, nn.CrossEntropyLoss(), x, y).diagonal())


@pytest.mark.parametrize(
    "logits", [[0.3], [1.0, -2.0], [0.5, 0.1, -3.0, 2.0], [0.0, 60.0, -50.0], [-900.0, 0.0, -901.0]]
)
def test_columns_of_cross_entropy_are_the_root_of_its_hessian(logits: list[float]) -> None:
    z = torch.tensor([logits, logits[::-1]], dtype=torch.float64)
    root = loss_root(loss_rule(nn.CrossEntropyLoss(reduction="sum")), z, torch.zeros(2, dtype=torch.long))
    columns = root.columns(0, root.num_columns)
    assert root.num_columns == max(1, len(logits) - 1)
    p = z.softmax(1)
    others = torch.stack([p[:, [j for j in range(len(logits)) if j != i]].sum(1) for i in range(len(logits))], 1)
    H = torch.diag_embed(p * others) - (p[:, :, None] * p[:, None, :]).masked_fill(torch.eye(len(logits)).bool(), 0)
    found = torch.einsum("vni,vnj->nij", columns, columns)
    torch.testing.assert_close(
        found, H, rtol=1e-12, atol=1e-300
    )  # entry by entry: no differences of nearly equal numbers


def test_columns_are_counted_beforehand() -> None:
    model, loss, x, y = setting("Tanh")  # five or six units behind each of two activations, three outputs
    objective = Objective(model, loss, cut(x, y))
    assert num_columns(objective) == exact_diagonal(objective).num_columns / 2 == 2  # of cross-entropy
    assert num_columns(objective, "hessian") == exact_diagonal(objective, "hessian").num_columns / 2 == 13
    with pytest.raises(InputError, match="NativeLayerNorm"):
        num_columns(Objective(setting("LayerNorm")[0], loss, cut(x, y)), "hessian")


def test_dropout_on_exact_zeros() -> None:
    """What is zero behind a dropout need not have been dropped."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.3), nn.Linear(6, 3)).double()
    x, y = BY_LAYER["Tanh"].inputs(), targets(CE)
    with torch.no_grad():
        model[0].weight[:3] = 0
        model[0].bias[:3] = 0
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    assert_close(exact_diagonal(objective).value, GGNOperator(objective).to_dense().diagonal())


def test_loss_that_couples_examples() -> None:
    model, _, x, y = setting()
    loss = lambda z, _: z.sum(0).square().mean()  # noqa: E731
    found = exact_diagonal(Objective(model, loss, (x, y)))
    assert found.route == "products"
    assert_close(found.value, ggn(model, loss, x, y).diagonal())


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["Tanh", "Conv2d"])
@pytest.mark.parametrize("route", ["auto", "vmap"])
@pytest.mark.parametrize("budget", [1, 20_000])
@pytest.mark.parametrize("kind", DENSE)
def test_small_memory_gives_the_same(layer: str, route: Any, budget: int, kind: Any) -> None:
    route = route if kind == "ggn" else "auto"
    model, loss, x, y = setting(layer)
    found = exact_diagonal(Objective(model, loss, (x, y)), kind, route=route, memory_budget=budget)
    assert_close(found.value, DENSE[kind](model, loss, x, y).diagonal())


@pytest.mark.parametrize("route", ["auto", "vmap"])
def test_chosen_parameters_and_frozen_ones(route: Any) -> None:
    model, loss, x, y = setting("Conv2d")
    dense = ggn(model, loss, x, y).diagonal()
    params = dict(model.named_parameters())
    chosen = [name for name in params if name.endswith("bias")]
    for p in params.values():
        p.requires_grad_(False)
    found = exact_diagonal(Objective(model, loss, (x, y), params=chosen), route=route)
    offsets = torch.cat([torch.full((p.numel(),), float(name in chosen)) for name, p in params.items()])
    assert_close(found.value, dense[offsets.bool()])
    assert list(found.by_parameter()) == chosen
    assert all(found.by_parameter()[name].shape == params[name].shape for name in chosen)
    assert not any(p.requires_grad for p in params.values())


def test_weights_of_batches_and_batches_that_do_not_count() -> None:
    model, loss, x, y = setting()
    y[3:] = -100
    found = exact_diagonal(Objective(model, loss, cut(x, y)))
    assert_close(found.value, ggn(model, loss, x[:3], y[:3]).diagonal())
    y = targets(CE)
    objective = Objective(model, loss, cut(x, y), weight=lambda batch: 1.0 if len(batch[0]) == 3 else 5.0)
    expected = (ggn(model, loss, x[:3], y[:3]) + 5 * ggn(model, loss, x[3:], y[3:])).diagonal() / 6
    assert_close(exact_diagonal(objective).value, expected)


@pytest.mark.parametrize("route", ["auto", "vmap"])
def test_single_precision(route: Any) -> None:
    model, loss, x, y = setting("Conv2d")
    dense = ggn(model, loss, x, y).diagonal()
    found = exact_diagonal(Objective(model.float(), loss, cut(x.float(), y)), route=route)
    assert found.value.dtype == torch.float32
    assert relative_error(found.value.double(), dense) < 1e-5
    assert torch.get_default_dtype() == torch.float32


def test_small_things() -> None:
    one = nn.Linear(1, 1, bias=False).double()
    x = torch.tensor([[3.0]], dtype=torch.float64)
    assert_close(exact_diagonal(Objective(one, nn.MSELoss(), (x, x))).value, torch.tensor([18.0], dtype=torch.float64))
    model, loss, x, y = setting()
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(exact_diagonal(Objective(model, loss, (x, y))).value, ggn(model, loss, x, y).diagonal())


def test_sequence_outputs_and_refusal_of_what_is_too_dear() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh()).double()
    x, y = torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(3, (3, 5))
    loss = lambda z, t: nn.functional.cross_entropy(z.movedim(-1, 1), t)  # noqa: E731
    objective = Objective(model, loss, (x, y))
    dense = ggn(model, loss, x, y).diagonal()
    for route in ("rules", "vmap"):
        assert_close(exact_diagonal(objective, route=route).value, dense)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"takes 10 columns.*max_columns=9; kind='ggn-mc'"):
        exact_diagonal(objective, route="vmap", max_columns=9)
    with pytest.raises(InputError, match=r"linalg\.diagonal"):
        exact_diagonal(Objective(model, loss, (x, y)), "hessian", max_columns=10)
    assert_close(exact_diagonal(objective, route="vmap", max_columns=None).value, dense)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "fisher"}, "kind must be one of"),
        ({"route": "backpack"}, "route must be"),
        ({"mc_samples": 0}, "mc_samples must be"),
        ({"kind": "ggn-mc"}, "pass generator="),
        ({"memory_budget": 0}, "memory_budget must be"),
        ({"max_columns": 0}, "max_columns must be"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    model, loss, x, y = setting()
    with pytest.raises(InputError, match=message):
        exact_diagonal(Objective(model, loss, (x, y)), **settings)


def test_bad_objectives() -> None:
    model, loss, x, y = setting()
    no_split = Objective(model, None, (x, y), forward=lambda m, batch: loss(m(batch[0]), batch[1]))
    with pytest.raises(InputError, match="needs the split"):
        exact_diagonal(no_split)
    assert_close(exact_diagonal(no_split, "hessian").value, hessian(model, loss, x, y).diagonal())
    generator = torch.Generator().manual_seed(0)
    model, loss, x, y = setting("Tanh", BY_LOSS["smooth L1"])
    no_likelihood = Objective(model, loss, (x, y))
    with pytest.raises(InputError, match="kind='ggn-mc'"):
        exact_diagonal(no_likelihood, "fisher-mc", generator=generator)
    model, loss, x, y = setting("Tanh")
    with torch.no_grad():
        model[0].weight.zero_()  # the loss is finite, and so is a gradient; its square is not
    with pytest.raises(NonFiniteError, match="use a wider dtype"):
        exact_diagonal(Objective(model, loss, (1e200 * x, y)))


# -- Monte Carlo ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "route"), [("ggn-mc", "vmap"), ("fisher-mc", "rules")])
def test_monte_carlo_is_unbiased_and_knows_its_error(kind: Any, route: Any) -> None:
    model = nn.Linear(2, 3, bias=False).double()
    x, y = BY_LAYER["Tanh"].inputs()[:, :2], targets(CE)
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    exact = exact_diagonal(objective).value
    runs, errors = [], []
    for seed in range(400):
        found = exact_diagonal(
            objective, kind, route=route, mc_samples=2, generator=torch.Generator().manual_seed(seed)
        )
        runs.append(found.value)
        errors.append(found.stderr)
    samples = torch.stack(runs)
    z = (samples.mean(0) - exact) / (samples.std(0) / 20)
    assert z.abs().max() < 4
    ratio = float((samples - exact).square().mean() / torch.stack(errors).square().mean())
    assert 0.85 < ratio < 1.18, ratio


def test_monte_carlo_of_one_sample_and_of_indefinite_losses() -> None:
    model, loss, x, y = setting("Tanh", BY_LOSS["not convex"])
    objective = Objective(model, loss, (x, y))
    single = exact_diagonal(objective, "ggn-mc", generator=torch.Generator().manual_seed(0))
    assert torch.isinf(single.stderr).all()
    assert torch.equal(exact_diagonal(objective, "ggn-mc", generator=0).value, single.value)
    many = exact_diagonal(objective, "ggn-mc", mc_samples=200, generator=torch.Generator().manual_seed(0))
    drawn = many.stderr > 1e-12 * many.value.abs().max()  # what one column makes up is the same in every sample
    z = ((many.value - ggn(model, loss, x, y).diagonal()) / many.stderr)[drawn]
    assert drawn.sum() > 20
    assert float(z.abs().max()) < 4.5


# -- checks before trust ----------------------------------------------------------------------------------------------


def test_a_wrong_rule_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """A result that is wrong in one tensor only is seen, and another route taken."""
    model, loss, x, y = setting()
    right = ggn(model, loss, x, y).diagonal()
    init = Factors.__init__

    def tampered(self: Any, left: Tensor, right: Any) -> None:
        init(self, 1.01 * left if left.shape[-1] == 6 else left, right)

    monkeypatch.setattr(Factors, "__init__", tampered)
    found = exact_diagonal(Objective(model, loss, (x, y)))
    assert "do not add up" in found.reason
    assert found.route == "rules+vmap"
    assert_close(found.value, right)


def test_a_wrong_curve_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = setting()
    monkeypatch.setitem(bends_module._KINDS, "Tanh", 0)  # as if it were linear
    found = exact_diagonal(Objective(model, loss, (x, y)), "hessian")
    assert "differ from products" in found.reason
    assert found.route == "products"
    assert_close(found.value, hessian(model, loss, x, y).diagonal())


def test_a_wrong_root_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = setting()
    true_root = roots.loss_root

    def wrong_root(rule: Any, outputs: Tensor, y: Any) -> Any:
        return true_root(rule, 1.1 * outputs, y)

    monkeypatch.setattr(roots, "loss_root", wrong_root)
    with pytest.raises(InputError, match="products with unit vectors"):
        exact_diagonal(Objective(model, loss, (x, y)), route="rules")


# -- nothing is left behind -------------------------------------------------------------------------------------------


def _whole_state(model: nn.Module) -> list[Any]:
    state: list[Any] = []
    for module in model.modules():
        state.append((type(module), sorted(vars(module)), {k: len(v) for k, v in vars(module).items() if "hooks" in k}))
    return state + [sorted(vars(p)) for p in model.parameters()]


@pytest.mark.parametrize("kind", ["ggn", "hessian"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_model_is_left_as_it_was(kind: Any, interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, loss, x, y = setting("BatchNorm2d (eval)")
    loss(model(x), y).backward()
    before = _whole_state(model)
    objective = Objective(model, loss, (x, y))
    if interrupted:

        def fail(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Factors, "project", fail)
    with assert_untouched(model):
        if interrupted:
            with pytest.raises(KeyboardInterrupt):
                exact_diagonal(objective, kind)
        else:
            first, second = (exact_diagonal(objective, kind).value for _ in range(2))
            assert torch.equal(first, second)
            assert_close(first, DENSE[kind](model, loss, x, y).diagonal())
    assert _whole_state(model) == before
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), model(x))
