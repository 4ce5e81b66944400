"""Kronecker factors where they are exact, and sums written out in loops where they are not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from curvature import Objective
from curvature.errors import DataError, InputError
from curvature.layerwise import KroneckerFactors, kronecker_factors
from tests.checks import assert_close, assert_untouched
from tests.curvature.layerwise.exact_cases import BY_LAYER, BY_LOSS, cut, dense_jacobian, ggn, output_hessian, targets


def real(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def built(build: Any) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = build().double()
    return model


def blocks(factors: KroneckerFactors) -> Tensor:
    return torch.block_diag(*(factors.to_dense(name) for name in factors.layers))


def dense_blocks(G: Tensor, factors: KroneckerFactors) -> Tensor:
    """Return the blocks of a dense matrix that belong to the layers."""
    parts = []
    for f in factors.layers.values():
        names = [n for n in (f.weight, f.bias) if n is not None]
        index = torch.cat([torch.arange(*factors.slices[n]) for n in names])
        parts.append(G[index][:, index])
    return torch.block_diag(*parts)


def deep_linear() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3))


@pytest.mark.parametrize("kind", ["kflr", "kfra"])
def test_exact_on_a_deep_linear_net(kind: Any) -> None:
    """Under squared error the columns are the same for all examples, so that they are independent of the inputs."""
    model, x, y = built(deep_linear), real(6, 3), real(6, 3, seed=1)
    objective = Objective(model, nn.MSELoss(), [(x[:4], y[:4]), (x[4:], y[4:])])
    with assert_untouched(model):
        factors = kronecker_factors(objective, kind)
    G = ggn(model, nn.MSELoss(), x, y)
    assert_close(blocks(factors), dense_blocks(G, factors))
    assert factors.uncovered == {}
    v = real(G.shape[0], seed=2)
    assert_close(factors.matvec(v), dense_blocks(G, factors) @ v)  # parameters lie layer by layer


@pytest.mark.parametrize("loss", list(BY_LOSS.values()), ids=lambda loss: loss.name)
def test_exact_on_one_example(loss: Any) -> None:
    """With one example and one position a layer's block is a Kronecker product if it is the last one, or alone."""
    model, x, y = nn.Linear(4, loss.outputs).double(), BY_LAYER["Tanh"].inputs()[:1], targets(loss)[:1]
    if "ignore_index" in loss.name:
        y = torch.zeros_like(y)
    factors = kronecker_factors(Objective(model, loss.build(), (x, y)))
    assert_close(factors.to_dense("(root)"), ggn(model, loss.build(), x, y))


class Mixed(nn.Module):
    """Convolutions, a linear layer on sequences, others in between; no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, (2, 3), stride=(1, 2), padding=(1, 0), dilation=(2, 1))
        self.reflect = nn.Conv2d(3, 2, 3, padding=1, padding_mode="reflect", bias=False)
        self.norm = nn.LayerNorm(4)
        self.token = nn.Linear(4, 3)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(self.conv(x))
        z = self.reflect(z) + z[:, :2]
        z = torch.tanh(self.token(self.norm(z.flatten(2)[..., :4])))
        return self.head(z.flatten(1))


def written_out(model: Mixed, x: Tensor, loss: Any, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Return (A, B) of the layers by loops over examples, columns and positions, from dense Hessians and Jacobians."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    handles = [
        layer.register_forward_hook(lambda _, a, z, name=name: seen.__setitem__(name, (a[0], z)))
        for name, layer in model.named_children()
        if name != "norm"
    ]
    outputs = model(x)
    for handle in handles:
        handle.remove()
    H = output_hessian(loss, outputs, y)
    factors = {}
    for name, (a, z) in seen.items():
        layer = getattr(model, name)
        J = dense_jacobian(outputs, [z])
        M = (J.T @ H @ J).reshape(*z.shape, *z.shape)
        B = torch.zeros(layer.weight.shape[0], layer.weight.shape[0], dtype=torch.float64)
        rows = []
        for n in range(len(x)):
            if isinstance(layer, nn.Conv2d):
                h, w = z.shape[2:]
                for s in range(h):
                    for t in range(w):
                        B += M[n, :, s, t, n, :, s, t]
                        # a row of patches is the derivative of one output in the kernel
                        kernel = layer.weight.detach().clone().requires_grad_()
                        value = layer._conv_forward(a[n : n + 1], kernel, None)[0, 0, s, t]
                        rows.append(torch.autograd.grad(value, kernel)[0][0].reshape(-1))
                positions = h * w
            else:
                flat = a[n].reshape(-1, a.shape[-1])
                positions = len(flat)
                Mn = M.reshape(len(x), positions, len(B), len(x), positions, len(B))
                for t in range(positions):
                    B += Mn[n, t, :, n, t]
                    rows.append(flat[t])
        patches = torch.stack(rows).detach()
        if layer.bias is not None:
            patches = torch.cat([patches, torch.ones(len(patches), 1, dtype=torch.float64)], dim=1)
        factors[name] = (patches.T @ patches / len(x), B.detach() / positions)
    return factors


@pytest.mark.parametrize("loss", ["cross-entropy, ignored targets", "mean squared error, sum", "not convex"])
def test_convolutions_and_sequences(loss: str) -> None:
    chosen = BY_LOSS[loss]
    model, x, y = built(Mixed), real(5, 2, 4, 5), targets(chosen)
    assert isinstance(model, Mixed)
    if "ignored" in loss:  # a batch without a term adds nothing, not even to the inputs' moments
        y[:] = torch.tensor([-100, 1, 0, 2, -100])
    with assert_untouched(model):
        factors = kronecker_factors(Objective(model, chosen.build(), cut(x, y)))
    for name, (A, B) in written_out(model, x, chosen.build(), y).items():
        assert_close(factors.layers[name].A, A)
        assert_close(factors.layers[name].B, B)
    assert list(factors.layers) == ["conv", "reflect", "token", "head"]
    assert set(factors.uncovered) == {"norm.weight", "norm.bias"}
    assert "LayerNorm" in factors.uncovered["norm.weight"]
    v = real(factors.num_params, seed=3)
    product = factors.matvec(v)
    for name, f in factors.layers.items():
        index = torch.cat([torch.arange(*factors.slices[n]) for n in (f.weight, f.bias) if n is not None])
        assert_close(product[index], factors.to_dense(name) @ v[index])
    assert float(product[slice(*factors.slices["norm.weight"])].abs().max()) == 0


def test_kfac_has_the_mean_of_kflr() -> None:
    model, x, y = nn.Linear(2, 3).double(), real(5, 2), targets(BY_LOSS["cross-entropy"])
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    exact = kronecker_factors(objective).layers["(root)"].B
    draws = torch.stack(
        [kronecker_factors(objective, "kfac", generator=seed).layers["(root)"].B for seed in range(400)]
    )
    z = (draws.mean(0) - exact) / (draws.std(0) / 20)
    assert float(z.abs().max()) < 4


@pytest.mark.parametrize("damping", [1e-3, 2.0])
def test_preconditioner_is_the_inverse_of_the_damped_blocks(damping: float) -> None:
    """Layer norms have no factors: there it divides by the damping. Biases lie behind their weights."""
    model = built(lambda: nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2, bias=False)))
    objective = Objective(model, nn.CrossEntropyLoss(), (real(5, 3), torch.tensor([0, 1, 1, 0, 1])))
    factors = kronecker_factors(objective)
    n = factors.num_params
    dense = torch.stack([factors.matvec(e) for e in torch.eye(n, dtype=torch.float64)])
    P, eye = factors.preconditioner(damping), torch.eye(n, dtype=torch.float64)
    assert_close(P @ (dense + damping * eye), eye)
    v = real(n)
    assert_close(P @ v, torch.linalg.solve(dense + damping * eye, v))


def test_a_preconditioner_needs_damping() -> None:
    objective = Objective(built(deep_linear), nn.MSELoss(), (real(4, 3), real(4, 3)))
    for damping in (0.0, -1.0, float("inf")):
        with pytest.raises(InputError, match="positive and finite"):
            kronecker_factors(objective).preconditioner(damping)


def test_chosen_parameters() -> None:
    model, x, y = built(deep_linear), real(6, 3), real(6, 3, seed=1)
    for params in (["0.weight", "2.bias"], ["*.bias"], ["1"]):
        objective = Objective(model, nn.MSELoss(), (x, y), params=params)
        factors = kronecker_factors(objective)
        names = list(objective.space.names)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        keep = torch.cat([torch.full((size,), name in names) for name, size in sizes.items()])
        G = ggn(model, nn.MSELoss(), x, y)[keep][:, keep]
        assert_close(blocks(factors), dense_blocks(G, factors))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.step(torch.tanh(self.step(x)))))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    model[2].weight = model[0].weight
    return model


def test_what_has_no_factors() -> None:
    x, y = BY_LAYER["Tanh"].inputs(), targets(BY_LOSS["cross-entropy"])
    loss = nn.CrossEntropyLoss()
    with pytest.raises(InputError, match="'step' is called 2 times"):
        kronecker_factors(Objective(Twice().double(), loss, (x, y)))
    factors = kronecker_factors(Objective(tied().double(), loss, (x, y)))
    assert "shared" in factors.uncovered["0.weight"]
    assert list(factors.layers) == ["3"]
    train = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    with pytest.raises(DataError, match=r"call model.eval\(\)"), assert_untouched(train):
        kronecker_factors(Objective(train, loss, (x, y)))
    with pytest.raises(InputError, match="no layer has Kronecker factors"):
        kronecker_factors(Objective(nn.LayerNorm(4).double(), nn.MSELoss(), (x, x)))
    with pytest.raises(DataError, match="compares the examples"):
        kronecker_factors(Objective(nn.Linear(4, 3).double(), lambda z, _: z.sum(0).square().mean(), (x, y)))
    with pytest.raises(InputError, match="max_columns=1"):
        kronecker_factors(Objective(nn.Linear(4, 3).double(), loss, (x, y)), max_columns=1)
    with pytest.raises(InputError, match="layer '1' is a GELU"):
        kronecker_factors(Objective(nn.Sequential(nn.Linear(4, 3), nn.GELU()).double(), loss, (x, y)), "kfra")
    with pytest.raises(InputError, match="no factors for 'body'"):
        factors.to_dense("body")
    with pytest.raises(InputError, match="shape"):
        factors.matvec(torch.zeros(3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ekfac"}, "kind must be"),
        ({"kind": "kfac"}, "pass generator="),
        ({"mc_samples": 0}, "mc_samples must be"),
        ({"max_columns": 0}, "max_columns must be"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    objective = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 1)))
    with pytest.raises(InputError, match=message):
        kronecker_factors(objective, **settings)


class Two(nn.Module):
    """A layer, used as `use` says, and another one."""

    def __init__(self, use: Any, hook: Any = None) -> None:
        super().__init__()
        self.first, self.second, self.use = nn.Linear(4, 4), nn.Linear(4, 4), use
        if hook is not None:
            self.first.register_forward_hook(hook)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.use(self, x)
        return z


def twice(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    return 2 * output


SAME = {
    "in place": lambda: Two(lambda m, x: m.second(m.first(x).relu_())),
    "module in place": lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)),
    "by name": lambda: Two(lambda m, x: m.second(m.first(input=x).tanh())),
    "hook": lambda: Two(lambda m, x: m.second(m.first(x).tanh()), twice),
}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("kind", ["kflr", "kfac"])
def test_what_follows_a_layer_is_no_part_of_it(name: str, kind: Any) -> None:
    """One example, for which the blocks of layers are Kronecker products."""
    model, x, y = built(SAME[name]), real(1, 4, seed=3), torch.tensor([2])
    samples = {"mc_samples": 2000, "generator": 0} if kind == "kfac" else {}
    factors = kronecker_factors(Objective(model, nn.CrossEntropyLoss(), (x, y)), kind, **samples)
    dense = dense_blocks(ggn(model, nn.CrossEntropyLoss(), x, y), factors)
    assert len(factors.layers) == 2
    assert_close(blocks(factors), dense, 1e-12 if kind == "kflr" else 0.1)


OTHER_USES = {
    "its weight once more": lambda m, x: F.linear(m.second(m.first(x).tanh()), m.first.weight),
    "its weight in a function": lambda m, x: m.second(F.linear(x, m.first.weight, m.first.bias).tanh()),
    "its bias once more": lambda m, x: m.second(m.first(x).tanh()) + m.first.bias,
    "past the module's call": lambda m, x: m.second(m.first.forward(x).tanh()),
}


@pytest.mark.parametrize("name", OTHER_USES)
def test_other_uses_of_a_layer_are_refused(name: str) -> None:
    model, x, y = built(lambda: Two(OTHER_USES[name])), real(6, 4, seed=3), torch.arange(6) % 4
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    for kind in ("kflr", "kfac"):
        with pytest.raises(InputError, match="layer 'first' has a part in the outputs by other ways"):
            kronecker_factors(objective, kind, generator=0)
    assert set(kronecker_factors(objective.restrict("second.*")).layers) == {"second"}


def test_a_batch_may_leave_a_layer_out() -> None:
    model = built(lambda: Two(lambda m, x: m.second(m.first(x).tanh() if x[0, 0] > 10 else x)))
    x, y = real(5, 4, seed=3), torch.arange(5) % 4
    x[:3, 0] += 20
    both = kronecker_factors(Objective(model, nn.CrossEntropyLoss(), [(x[:3], y[:3]), (x[3:], y[3:])]))
    alone = kronecker_factors(Objective(model, nn.CrossEntropyLoss(), (x[:3], y[:3])))
    assert_close(both.layers["first"].B, 0.6 * alone.layers["first"].B)


def test_a_pruned_weight_is_told_and_hooks_are_refused_by_kfra() -> None:
    model = built(lambda: Two(lambda m, x: m.second(m.first(x).tanh())))
    prune.random_unstructured(model.first, "weight", 0.5)
    factors = kronecker_factors(Objective(model, nn.CrossEntropyLoss(), (real(6, 4), torch.arange(6) % 4)))
    assert "pruned" in factors.uncovered["first.weight_orig"]
    assert factors.layers["first"].weight is None
    chain = built(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)))
    chain[1].register_forward_hook(twice)  # type: ignore[index]
    with pytest.raises(InputError, match="takes layers without hooks"):
        kronecker_factors(Objective(chain, nn.CrossEntropyLoss(), (real(6, 4), torch.arange(6) % 4)), "kfra")


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Linear(4, 3).double()

    def interrupted(z: Tensor, y: Tensor) -> Tensor:
        if model._forward_hooks:
            raise KeyboardInterrupt
        return nn.functional.cross_entropy(z, y)

    objective = Objective(model, interrupted, (BY_LAYER["Tanh"].inputs(), targets(BY_LOSS["cross-entropy"])))
    with pytest.raises(KeyboardInterrupt), assert_untouched(model):
        kronecker_factors(objective)
