"""K-FAC and EKFAC against dense blocks, plain loops and themselves: cut, resumed, on ranks, under a scaler."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from curvature.errors import CheckFailedError, InputError, NonFiniteError
from optimizers import EKFAC, KFAC, check_optimizer
from tests.optimizers.problems import Problem, mlp

EXACT: dict[str, Any] = {"fisher": "type-2", "graft": None, "damping": 0.1, "damping_form": "exact", "lr": 1.0}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def jacobian(model: nn.Module, x: Any, names: tuple[str, ...]) -> Tensor:
    """Return the Jacobian of all outputs in some parameters, (outputs, n)."""
    start = values(model)

    def outputs(part: dict[str, Tensor]) -> Tensor:
        return functional_call(model, {**start, **part}, (x,)).reshape(-1)

    found = jacrev(outputs)({name: start[name] for name in names})
    return torch.cat([found[name].reshape(len(found[name]), -1) for name in names], 1)


def newton_steps(model: nn.Module, x: Any, y: Tensor, loss: Any, damping: float) -> dict[tuple[str, ...], Tensor]:
    """Return -(G + damping I)^-1 g for the exact block of each module."""
    named = dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(loss(model(x), y), list(named.values())), strict=True))
    blocks: dict[str, list[str]] = {}
    for name in named:
        blocks.setdefault(name.rpartition(".")[0], []).append(name)
    factor = 2.0 if loss.reduction == "sum" else 2.0 / y.numel()
    steps = {}
    for names in map(tuple, blocks.values()):
        J = jacobian(model, x, names)
        g = torch.cat([grads[name].reshape(-1) for name in names])
        steps[names] = -torch.linalg.solve(factor * J.T @ J + damping * torch.eye(len(g)), g)
    return steps


class Table(nn.Module):
    """An embedding of single tokens, summed into a linear map."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 2, bias=False)

    def forward(self, index: Tensor) -> Tensor:
        return self.head(self.table(index))


def linear_nets() -> dict[str, tuple[nn.Module, Any]]:
    torch.manual_seed(0)
    index = torch.tensor([0, 1, 1, 4, 5, 5, 5])
    return {
        "deep": (nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Linear(2, 3)), torch.randn(7, 3)),
        "conv1d": (nn.Sequential(nn.Conv1d(2, 4, 3), nn.Flatten(), nn.Linear(4, 2)), torch.randn(7, 2, 3)),
        "conv2d": (nn.Sequential(nn.Conv2d(2, 4, 2), nn.Flatten(), nn.Linear(4, 2)), torch.randn(7, 2, 2, 2)),
        "conv3d": (nn.Sequential(nn.Conv3d(1, 4, 2), nn.Flatten(), nn.Linear(4, 2)), torch.randn(7, 1, 2, 2, 2)),
        "embedding": (Table(), index),
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["deep", "conv1d", "conv2d", "conv3d", "embedding"])
def test_steps_are_those_of_the_exact_blocks_on_linear_nets(name: str, reduction: str) -> None:
    model, x = linear_nets()[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y = torch.randn_like(model(x))
    loss = nn.MSELoss(reduction=reduction)
    expected, before = newton_steps(model, x, y, loss, 0.1), values(model)
    optimizer = KFAC(model.named_parameters(), loss=loss, **EXACT)
    optimizer.step(lambda: (model(x), y))
    assert all(route.startswith("KFAC") for route in optimizer.routes().values())
    after = values(model)
    for names, step in expected.items():
        moved = torch.cat([(after[n] - before[n]).reshape(-1) for n in names])
        torch.testing.assert_close(moved, step, rtol=1e-12, atol=1e-12)


@pytest.fixture(autouse=True)
def double() -> Any:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)])
def test_scales_and_shifts_of_normalisation_have_their_exact_blocks(norm: nn.Module) -> None:
    """The last layers of a net, so that batch statistics couple nothing behind them."""
    torch.manual_seed(1)
    norm = copy.deepcopy(norm).double()
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), norm, nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(9, 3), torch.randn(9, 2)
    before = values(model)
    named = dict(model.named_parameters())
    grads = dict(zip(named, torch.autograd.grad(F.mse_loss(model(x), y), list(named.values())), strict=True))
    frozen = copy.deepcopy(model)
    optimizer = KFAC(model.named_parameters(), loss=nn.MSELoss(), **EXACT)
    optimizer.step(lambda: (model(x), y))
    for name in [n for n in named if n.startswith("2.")]:
        J = jacobian_of_copy(frozen, x, name)
        G = 2.0 / y.numel() * J.T @ J
        step = -torch.linalg.solve(G + 0.1 * torch.eye(len(G)), grads[name])
        torch.testing.assert_close(values(model)[name] - before[name], step, rtol=1e-10, atol=1e-12)


def jacobian_of_copy(model: nn.Module, x: Tensor, name: str) -> Tensor:
    """Return the Jacobian by a backward pass an output: batch normalisation moves buffers, which jacrev refuses."""
    p = dict(model.named_parameters())[name]
    return torch.stack([torch.autograd.grad(out, p, retain_graph=True)[0] for out in model(x).reshape(-1)])


class Sequence(nn.Module):
    """Tokens, a tied table, positions looked up once for all examples, and a gain of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(7, 4), nn.Embedding(3, 4)
        self.mix = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.ones(4))

    def forward(self, index: Tensor) -> Tensor:
        x = self.table(index) + self.places(torch.arange(3))
        x = torch.tanh(self.mix(x)) * self.gain
        return F.linear(x, self.table.weight).flatten(0, 1)


def rows_of(model: Any, index: Tensor, y: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Return (inputs, gradients in the outputs) of the calls, by hand, for the loss's own targets times N."""
    e = model.table(index) + model.places(torch.arange(3))
    h = model.mix(e)
    g = torch.tanh(h) * model.gain
    z = F.linear(g, model.table.weight)
    loss = F.cross_entropy(z.flatten(0, 1), y, reduction="sum")
    de, dh, dz = torch.autograd.grad(loss, [e, h, z])
    one_hot = F.one_hot(index, 7).to(e)
    ones = torch.ones(*e.shape[:2], 1)
    return {
        "table": [(dz, g), (one_hot, de)],
        "places": [(F.one_hot(torch.arange(3), 3).expand(5, 3, 3).to(e), de)],
        "mix": [(dh, torch.cat([e, ones], 2))],
    }


@pytest.mark.parametrize("sharing", ["expand", "reduce"])
def test_shared_and_tied_weights_against_sums_by_hand(sharing: str) -> None:
    torch.manual_seed(2)
    model = Sequence()
    index, y = torch.randint(7, (5, 3)), torch.randint(7, (15,))
    rows = rows_of(model, index, y)
    optimizer = KFAC(
        model.named_parameters(), loss=F.cross_entropy, fisher="empirical", sharing=sharing, damping_form="exact"
    )
    optimizer.step(lambda: (model(index), y))
    assert not any(route.startswith("AdamW") for route in optimizer.routes().values())
    named = dict(model.named_parameters())
    for name, found in (
        ("mix.weight", rows["mix"]),
        ("table.weight", rows["table"]),
        ("places.weight", rows["places"]),
    ):
        terms = []
        for left, right in found:
            embeds = right.shape == (*left.shape[:2], 4) and left.shape[2] in (3, 7) and bool((left.sum(2) == 1).all())
            if sharing == "reduce" and not embeds:
                left, right = left.sum(1, keepdim=True), right.mean(1, keepdim=True)
            left, right = left.flatten(0, 1), right.flatten(0, 1)
            L, R = left.T @ left, right.T @ right / len(left)
            terms.append((L / 15, R) if not embeds else (L, R / 15))
        L, R = optimizer.state[named[name]]["left"], optimizer.state[named[name]]["right"][0]
        L = torch.diag(L[0]) if L.ndim == 2 else L[0]
        # what is kept has the traces of the sum over either side
        torch.testing.assert_close(L * R.trace(), sum(a * b.trace() for a, b in terms), rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(R * L.trace(), sum(b * a.trace() for a, b in terms), rtol=1e-10, atol=1e-12)


def plain_kfac(problem: Problem, steps: int, s: dict[str, Any]) -> Tensor:
    """K-FAC with the empirical Fisher and factored damping, as the papers have it, for the net of `mlp`."""
    W = [p.detach().clone() for p in problem.params]
    m, v = [torch.zeros_like(p) for p in W], [torch.zeros_like(p) for p in W]
    A: list[Tensor] = [torch.zeros(4, 4), torch.zeros(5, 5)]
    B: list[Tensor] = [torch.zeros(4, 4), torch.zeros(3, 3)]
    inverses: list[Any] = [None, None]
    x, n, seen, measured, refreshed = problem.x, len(problem.x), 0.0, 0, 0
    for t in range(1, steps + 1):
        ones = torch.ones(n, 1)
        h = torch.tanh(x @ W[0].T + W[1])
        z = h @ W[2].T + W[3]
        d1 = (z.softmax(1) - F.one_hot(problem.y, 3)).to(x)  # of each example
        d0 = (d1 @ W[2]) * (1 - h * h)
        inputs, deltas = [torch.cat([x, ones], 1), torch.cat([h, ones], 1)], [d0, d1]
        g = [d0.T @ x / n, d0.mean(0), d1.T @ h / n, d1.mean(0)]
        if (t - 1) % s["update_every"] == 0:
            beta = s["factor_beta"] ** (s["update_every"] if measured else 1)
            seen, measured = beta * seen + 1 - beta, measured + 1
            for k in (0, 1):
                A[k] = A[k] + (1 - beta) / seen * (inputs[k].T @ inputs[k] / n - A[k])
                B[k] = B[k] + (1 - beta) / seen * (deltas[k].T @ deltas[k] / n - B[k])
            if t - refreshed >= s["refresh_every"] or measured in (1, 2, 4) or not refreshed:
                refreshed = t
                for k in (0, 1):
                    pi = ((A[k].trace() / len(A[k])) / (B[k].trace() / len(B[k]))) ** 0.5
                    root = s["damping"] ** 0.5
                    inverses[k] = (
                        torch.linalg.inv(A[k] + pi * root * torch.eye(len(A[k]))),
                        torch.linalg.inv(B[k] + root / pi * torch.eye(len(B[k]))),
                    )
        for i in range(4):
            m[i] = 0.9 * m[i] + 0.1 * g[i]
            v[i] = 0.99 * v[i] + 0.01 * g[i] ** 2
        for k in (0, 1):
            i = 2 * k
            M = torch.cat([m[i], m[i + 1][:, None]], 1) / (1 - 0.9**t)
            D = inverses[k][1] @ M @ inverses[k][0]
            adam = [m[j] / (1 - 0.9**t) / ((v[j] / (1 - 0.99**t)).sqrt() + 1e-8) for j in (i, i + 1)]
            D = D * (sum(a.square().sum() for a in adam) ** 0.5 / D.norm())
            W[i] = W[i] - s["lr"] * (D[:, :-1] + s["weight_decay"] * W[i])
            W[i + 1] = W[i + 1] - s["lr"] * (D[:, -1] + s["weight_decay"] * W[i + 1])
    return torch.cat([w.reshape(-1) for w in W])


def test_follows_a_plain_loop_with_stale_factors_and_grafting() -> None:
    settings = {"lr": 0.03, "weight_decay": 0.1, "damping": 1e-2, "factor_beta": 0.9, "update_every": 2}
    settings |= {"refresh_every": 5}
    problem = mlp()
    expected = plain_kfac(problem, 17, settings)
    optimizer = KFAC(problem.params, loss=F.cross_entropy, fisher="empirical", **settings)  # type: ignore[arg-type]
    for _ in range(17):
        optimizer.step(problem.pair)
    torch.testing.assert_close(problem.flat(), expected, rtol=1e-10, atol=1e-12)


def test_ekfac_measures_the_diagonal_in_the_eigenbasis() -> None:
    """The second step's eigenvalues are the mean of the product's and of the dense block's diagonal in that basis."""
    problem = mlp()
    settings = {**EXACT, "lr": 0.0, "factor_beta": 0.5}
    del settings["damping_form"]
    optimizer = EKFAC(problem.params, loss=F.cross_entropy, **settings)
    optimizer.step(problem.pair)
    state = optimizer.state[problem.params[0]]
    L, R, before = (state[name][0].clone() for name in ("left_basis", "right_basis", "spread"))
    optimizer.param_groups[0]["refresh_every"] = 1  # no refresh after a second measurement
    state["schedule"][3] = 2
    optimizer.step(problem.pair)
    names = ("0.weight", "0.bias")
    J = jacobian(problem.model, problem.x, names)
    p = problem.model(problem.x).softmax(1).detach()
    H = torch.block_diag(*[torch.diag(q) - torch.outer(q, q) for q in p]) / len(p)
    order = torch.cat([torch.arange(12).view(4, 3), 12 + torch.arange(4)[:, None]], 1).reshape(-1)
    G = (J.T @ H @ J)[order][:, order]
    Q = torch.kron(L, R)
    expected = (Q.T @ G @ Q).diagonal().view(4, 4)
    torch.testing.assert_close(state["spread"][0], (before + expected) / 2, rtol=1e-9, atol=1e-12)


def test_factors_in_float64_are_moved_less_by_rounding() -> None:
    """Rounding over the gaps between eigenvalues is what the order of the examples moves EKFAC's steps by."""

    def end(seed: int, order: Tensor, factor_dtype: Any) -> Tensor:
        torch.manual_seed(seed)
        x, y = torch.randn(48, 8).float(), torch.randint(0, 3, (48,))
        model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).float()
        optimizer = EKFAC(
            model.parameters(), 0.02, loss=F.cross_entropy, fisher="type-2", refresh_every=2, factor_dtype=factor_dtype
        )
        for _ in range(5):
            optimizer.step(lambda: (model(x[order]), y[order]))
        state = next(iter(optimizer.state.values()))
        assert all(state[name].dtype == getattr(torch, factor_dtype) for name in ("left", "right_basis", "spread"))
        return torch.cat([p.detach().reshape(-1) for p in model.parameters()])

    moved = {}
    for name in ("float32", "float64"):
        pairs = [(end(s, torch.arange(48), name), end(s, torch.arange(48).flip(0), name)) for s in range(6)]
        moved[name] = sum(float((a - b).norm() / a.norm()) for a, b in pairs) / len(pairs)
    assert moved["float64"] < moved["float32"] / 2
    assert moved["float64"] < 1e-6


@pytest.mark.parametrize("fisher", ["monte-carlo", "empirical", "type-2"])
@pytest.mark.parametrize("method", [KFAC, EKFAC])
def test_cuts_of_the_batch_change_nothing(method: Any, fisher: str) -> None:
    ends = []
    for cuts in ([12], [5, 6, 1], [1, 11]):
        problem = mlp()
        optimizer = method(problem.params, loss=F.cross_entropy, fisher=fisher, num_samples=2, refresh_every=2)
        for _ in range(6):
            optimizer.zero_grad()
            for part, size in zip(torch.arange(12).split(cuts), cuts, strict=True):
                optimizer.accumulate(problem.pair_of(slice(int(part[0]), int(part[-1]) + 1)), weight=size / 12)
            optimizer.step()
        ends.append(problem.flat())
    torch.testing.assert_close(ends[1], ends[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-9, atol=1e-11)


def test_drawn_targets_give_the_exact_factors_on_average() -> None:
    """z-scores of the entries of L over 400 draws; the seed is fixed."""
    problem = mlp()
    exact = KFAC(problem.params, loss=F.cross_entropy, fisher="type-2", lr=0.0)
    exact.step(problem.pair)
    draws = []
    for seed in range(400):
        optimizer = KFAC(problem.params, loss=F.cross_entropy, lr=0.0, seed=seed)
        optimizer.step(problem.pair)
        draws.append(optimizer.state[problem.params[0]]["left"][0])
    found = torch.stack(draws)
    z = (found.mean(0) - exact.state[problem.params[0]]["left"][0]) / found.std(0) * 400**0.5
    assert float(z.abs().max()) < 4
    assert float(found.std(0).min()) > 0


def test_attention_and_grouped_convolutions_have_factors() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(4, 2, batch_first=True)
    conv = nn.Conv2d(4, 6, 3, groups=2)

    def forward() -> tuple[Tensor, Tensor]:
        return attention(tokens, tokens, tokens)[0].flatten(1), torch.ones(3, 20)

    tokens = torch.randn(3, 5, 4)
    optimizer = KFAC(attention.named_parameters(), loss=nn.MSELoss())
    optimizer.step(forward)
    assert set(optimizer.routes().values()) == {"KFAC, 12 x 4", "KFAC, 12", "KFAC, 4 x 4", "KFAC, 4"}

    images = torch.randn(5, 4, 3, 3)
    optimizer = KFAC(conv.named_parameters(), loss=nn.MSELoss(), **EXACT)
    y = torch.randn(5, 6, 1, 1)
    halves = [nn.Conv2d(2, 3, 3) for _ in range(2)]  # each group is a layer of its own
    before = values(conv)
    expected = {}
    for k, half in enumerate(halves):
        half.load_state_dict({name: v[3 * k : 3 * k + 3] for name, v in before.items()})
        steps = newton_steps(
            half, images[:, 2 * k : 2 * k + 2], y[:, 3 * k : 3 * k + 3], nn.MSELoss(reduction="sum"), 3.0
        )
        expected[k] = steps[("weight", "bias")] * 1.0
    optimizer.step(lambda: (conv(images), y))
    for k, step in expected.items():  # a mean over 30 entries: G and g of the sum, divided by it
        moved = torch.cat([(values(conv)[n] - before[n])[3 * k : 3 * k + 3].reshape(-1) for n in ("weight", "bias")])
        torch.testing.assert_close(moved, step, rtol=1e-10, atol=1e-12)


def test_what_has_no_factors_goes_to_adamw_and_says_so() -> None:
    torch.manual_seed(0)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)
            self.power = nn.Parameter(torch.ones(3))
            self.unused = nn.Linear(2, 2)
            self.halves = nn.Linear(3, 4, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            x = self.inner(x).abs() ** self.power
            return F.linear(x, self.halves.weight[:2])

    model, x = Odd(), torch.randn(6, 3)
    groups = [{"params": list(model.named_parameters())}]
    optimizer = KFAC(groups, loss=nn.MSELoss())
    assert set(optimizer.routes().values()) == {"AdamW: no layer was seen to use it yet"}
    optimizer.step(lambda: (model(x), torch.zeros(6, 2)))
    assert optimizer.routes() == {
        "inner.weight": "KFAC, 3 x 3",
        "inner.bias": "KFAC, 3",
        "power": "AdamW: no layer that has factors uses it",
        "unused.weight": "AdamW: no layer that has factors uses it",
        "unused.bias": "AdamW: no layer that has factors uses it",
        "halves.weight": "AdamW: a part of it is used by linear",
    }
    optimizer = KFAC([{"params": list(model.parameters()), "method": "matrix"}], loss=nn.MSELoss())
    with pytest.raises(InputError, match='method="matrix"'):
        optimizer.step(lambda: (model(x), torch.zeros(6, 2)))


def test_kl_clip_bounds_the_predicted_change() -> None:
    problem = mlp()
    before = problem.flat()
    settings = {**EXACT, "lr": 0.5, "kl_clip": 1e-4}
    optimizer = KFAC(problem.params, loss=F.cross_entropy, **settings)
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(problem.closure(), problem.params)])
    optimizer.step(problem.pair)
    step = problem.flat() - before  # -lr nu D, and nu^2 lr^2 D.g = kl_clip
    free = mlp()
    KFAC(free.params, loss=F.cross_entropy, **EXACT).step(free.pair)
    D = before - free.flat()
    nu = (1e-4 / (0.25 * float(D @ gradient))) ** 0.5
    assert nu < 1
    torch.testing.assert_close(step, -0.5 * nu * D, rtol=1e-6, atol=1e-12)


def test_refuses_what_it_cannot_do() -> None:
    problem = mlp()
    with pytest.raises(InputError, match="needs loss="):
        KFAC(problem.params)
    for wrong in ({"fisher": "true"}, {"graft": "sgd"}, {"kl_clip": 0.0}, {"damping": 0.0}, {"refresh_every": 0}):
        with pytest.raises(InputError, match=next(iter(wrong))):
            KFAC(problem.params, loss=F.cross_entropy, **wrong)  # type: ignore[arg-type]
    optimizer = KFAC(problem.params, loss=F.cross_entropy)
    with pytest.raises(InputError, match="must return"):
        optimizer.step(problem.closure)
    problem.closure().backward()
    with pytest.raises(CheckFailedError, match="nothing was measured"):
        optimizer.step()
    before = problem.flat()
    with pytest.raises(NonFiniteError):
        optimizer.step(lambda: (problem.model(problem.x * torch.inf), problem.y))
    assert torch.equal(problem.flat(), before)
    wide = nn.Linear(3, 1200)
    with pytest.raises(InputError, match="takes 1199 backward passes for the outputs of an example"):
        KFAC(wide.parameters(), loss=F.cross_entropy, fisher="type-2").step(
            lambda: (wide(problem.x), torch.zeros(12, dtype=torch.long))
        )


def test_gradients_may_come_from_elsewhere() -> None:
    """A closure, gradients of one's own with statistics beside them, and a scaler: the same steps."""
    ends = []
    for form in ("closure", "statistics", "scaler"):
        problem = mlp()
        optimizer = KFAC(problem.params, loss=F.cross_entropy, update_every=2, refresh_every=2)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        for _ in range(5):
            if form == "closure":
                optimizer.step(problem.pair)
                continue
            optimizer.zero_grad()
            if form == "statistics":
                if optimizer.statistics_due:
                    optimizer.accumulate(problem.pair, part="statistics")
                problem.closure().backward()
                optimizer.step()
            else:
                optimizer.accumulate(problem.pair, scaler=scaler)
                scaler.step(optimizer)
                scaler.update()
        ends.append(problem.flat())
    assert torch.equal(ends[0], ends[1])
    torch.testing.assert_close(ends[2], ends[0], rtol=1e-10, atol=1e-12)


CONFIGURATIONS: list[tuple[Any, dict[str, Any]]] = [
    (KFAC, {}),
    (KFAC, {"graft": None, "kl_clip": 0.1}),
    (KFAC, {"fisher": "type-2", "damping_form": "exact", "graft": "rms"}),
    (KFAC, {"fisher": "empirical", "sharing": "reduce", "update_every": 3}),
    (EKFAC, {}),
    (EKFAC, {"fisher": "type-2", "graft": "rms"}),
]


@pytest.mark.parametrize(("method", "settings"), CONFIGURATIONS)
def test_keeps_the_conventions_of_torch(method: Callable[..., Any], settings: dict[str, Any]) -> None:
    torch.set_default_dtype(torch.float32)
    report = check_optimizer(method, form="outputs", settings={"lr": 0.05, **settings})
    assert report.passed, str(report)
