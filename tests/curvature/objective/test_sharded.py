"""Two processes that hold parts of a model, or of the data, compute what one with all of it does."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvature import (
    EmpiricalFisherOperator,
    FisherOperator,
    GGNOperator,
    GradientCovarianceOperator,
    HessianOperator,
    ModelSize,
    Objective,
    eigsh,
    plan,
    solve,
)
from curvature.errors import InputError
from curvature.linalg import (
    ThickRestartLanczos,
    diagonal,
    lanczos,
    lanczos_runs,
    matrix_function,
    spectral_density,
    trace,
)
from curvature.objective.shards import refuse_settings
from curvature.objective.shift import gradient_at, loss_at, shifted
from curvature.objective.standing_in import param_groups, place
from curvature.sharding.collectives import COUNTS, RECEIVED, reduce_scatter
from curvature.sharding.layout import Layout
from curvature.sharding.tensors import ShardedTensor, in_parts, whole
from tests.checks import BATCHING_TOLERANCE, assert_close
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES


class Net(nn.Module):
    """Widths that two ranks do not divide, a tied table, a scalar, normalisation and attention by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 3)
        self.norm = nn.LayerNorm(3)
        self.up, self.down = nn.Linear(3, 6), nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.tensor([0.7]))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.norm(self.table(tokens))
        x = x + torch.softmax(x @ x.mT * self.scale, dim=-1) @ x
        x = x + self.down(torch.tanh(self.up(x)))
        return x[:, -1] @ self.table.weight.T


def net() -> Any:
    torch.manual_seed(0)
    return Net().double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 5, (7, 4), generator=generator)
    y = torch.randint(0, 5, (7,), generator=generator)
    return [(x[i : i + 2], y[i : i + 2]) for i in range(0, 7, 2)]


def objective(model: nn.Module, data: Any, **settings: Any) -> Objective:
    return Objective(model, nn.CrossEntropyLoss(), data, **settings)


def values(o: Objective, *, more: bool = False) -> dict[str, Tensor]:
    """Return what is compared; vectors that are multiplied are sharded where those of the objective are."""
    n = o.num_params
    X = torch.randn(n, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S = in_parts(X, o.sharding, 0)
    loss, gradient = o.loss_and_gradient()
    theta = o.space.current()
    H, G = HessianOperator(o), GGNOperator(o)
    layer = o.space.block(o.model.up, o.model)
    named = o.space.block([o.model.down.weight], o.model)
    found = {
        **{"loss": loss, "gradient": gradient, "parameters": theta, "Hessian": H @ S, "of whole vectors": H @ X},
        **{"Gauss-Newton": G @ S, "layer": H.restrict(layer) @ layer.take(S)},
        **{"one parameter": H.restrict(named) @ named.take(S)},
    }
    if more:
        pairs = eigsh(H, 2, rtol=1e-7, generator=0)
        found |= {
            **{"Fisher": FisherOperator(o) @ S, "empirical": EmpiricalFisherOperator(o) @ S},
            **{"covariance": GradientCovarianceOperator(o) @ S, "values": pairs.eigenvalues},
            **{"vectors": pairs.eigenvectors.square(), "trace": trace(G, num_matvecs=8, generator=1).value},
            "signs": trace(H, method="hutchinson", num_matvecs=4, generator=1).value,
            "diagonal": diagonal(H, method="hutchinson", num_matvecs=4, generator=1).value,
            "solution": solve(G, gradient, damping=1.0, rtol=1e-10).x,
            "elsewhere": torch.tensor(loss_at(o, theta + 0.1 * gradient).value),
            "gradient elsewhere": gradient_at(o, theta + 0.1 * gradient)[1],
        }
    return {name: whole(value).double() for name, value in found.items()}


# -- models in parts --------------------------------------------------------------------------------------------------


def fully_sharded(rank: int) -> dict[str, Tensor]:
    model = _fully_sharded()
    o = objective(model, batches()[:1] if rank == 0 else batches()[1:])
    found = values(o, more=True)
    vector = o.gradient()
    assert isinstance(vector, ShardedTensor)
    assert vector.local.numel() < o.num_params
    before = dict(COUNTS)
    HessianOperator(o) @ vector
    counts = {name: COUNTS[name] - before[name] for name in COUNTS}
    assert counts == {"all_reduce": 0, "all_gather": 1, "reduce_scatter": 1}, counts
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    found["after a step"] = whole(HessianOperator(o) @ vector)
    with torch.no_grad():
        if rank == 0:  # what only this rank sees of a step
            model.scale.to_local().mul_(2.0)
    return {**found, "after a step on one rank": o.loss()}


def bytes_a_product(rank: int) -> dict[str, tuple[int, int]]:
    """Return the bytes that a rank received for a product, and those that are planned, by route."""
    from torch.distributed.fsdp import fully_shard

    found = {}
    for budget in (None, 0):
        layers = [nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)]
        model: Any = nn.Sequential(*layers).double()
        size = ModelSize.of(model, tokens=8, batch_tokens=2)
        x = torch.randn(4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        data: Any = [(part, part) for part in x.split(2)]
        o = Objective(fully_shard(model), nn.MSELoss(), data, memory_budget=budget, keep_graphs=False)
        H, v = HessianOperator(o), o.gradient()
        H @ v
        before = RECEIVED["bytes"]
        H @ v
        cost = plan(size, "product", world_size=2)
        planned = {c.route: c.bytes_per_matvec for c in (cost, cost.other) if c is not None}
        route = "whole parameters" if budget is None else "module by module"
        found[route] = (RECEIVED["bytes"] - before, planned[route])
    return found


def one_all_reduce_a_step(_: int) -> int:
    """Return the all-reduces of five steps of Lanczos: the difference between ten steps and five."""
    solver = ThickRestartLanczos(objective(_fully_sharded(), batches()), 2, rtol=1e-14, confidence=None, generator=0)
    seen = []
    for limit in (6, 11, 21):
        solver.run(max_matvecs=limit)
        seen.append(COUNTS["all_reduce"])
    return (seen[2] - seen[1]) - (seen[1] - seen[0])


def all_reduces_of_runs(_: int) -> dict[str, int]:
    """Return the all-reduces of five steps of Lanczos runs that keep all vectors, for one and for three at a time."""
    o = objective(_fully_sharded(), batches())
    G, X = GGNOperator(o), torch.randn(o.num_params, 3, generator=torch.Generator().manual_seed(0)).double()
    S = in_parts(X, o.sharding, 0)
    calls: dict[str, Callable[[int], Any]] = {
        "lanczos": lambda steps: lanczos(G, S[:, 0], num_steps=steps),
        "lanczos_runs": lambda steps: lanczos_runs(G, S, num_steps=steps),
        "matrix_function": lambda steps: matrix_function(G, S[:, 0], "sqrt", rtol=None, num_steps=steps, damping=1.0),
        "spectral_density": lambda steps: spectral_density(G, num_probes=2, num_steps=steps, generator=0),
    }
    found = {}
    for name, call in calls.items():
        seen = []
        for steps in (3, 8):
            before = COUNTS["all_reduce"]
            call(steps)
            seen.append(COUNTS["all_reduce"] - before)
        found[name] = seen[1] - seen[0]
    return found


def _fully_sharded() -> Any:
    from torch.distributed.fsdp import fully_shard

    model = net()
    fully_shard(model.up)
    fully_shard(model)
    return model


def module_by_module(rank: int) -> dict[str, Tensor]:
    """No rank holds whole parameters; the table is read outside of its module, too, and data are uneven."""
    o = objective(_fully_sharded(), batches()[:1] if rank == 0 else batches()[1:], memory_budget=0)
    assert all(leaf.untyped_storage().nbytes() < 16 for leaf in o.evaluator.parameters), "a leaf was gathered"
    found, vector = values(o), o.gradient()
    X = torch.randn(o.num_params, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found |= {"Fisher": whole(FisherOperator(o) @ in_parts(X, o.sharding, 0)), "again": o.loss()}
    with torch.no_grad():
        for p in o.model.parameters():
            p.mul_(1.5)
    return {**found, "after a step": whole(HessianOperator(o) @ vector)}


def nobody_but_one(rank: int) -> dict[str, Tensor]:
    """One rank has all data, the other takes part in its products."""
    o = objective(_fully_sharded(), batches() if rank == 1 else [], memory_budget=0)
    X = torch.randn(o.num_params, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"loss": o.loss(), "of whole vectors": HessianOperator(o) @ X}


def tensor_parallel(_: int) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = net()
    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return values(objective(model, batches()))


def replicas(rank: int) -> dict[str, Tensor]:
    model = nn.parallel.DistributedDataParallel(net())
    return values(objective(model, batches()[:1] if rank == 0 else batches()[1:]))


def stepped() -> Any:
    model = net()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    return model


def in_lower_precision(rank: int) -> dict[str, Tensor]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = net()
    fully_shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=torch.float64))
    o = objective(model, batches()[:1] if rank == 0 else batches()[1:])
    return {"gradient": whole(o.gradient()), "Hessian": whole(HessianOperator(o) @ o.space.current())}


def narrow(model: nn.Module, batch: Any) -> Any:
    single = {name: p.float() for name, p in model.named_parameters()}
    return torch.func.functional_call(model, single, (batch[0],)).double(), batch[1]


# -- what is refused --------------------------------------------------------------------------------------------------


class LocalHeads(Net):
    """Divides by a number of units that depends on how it is split."""

    def forward(self, tokens: Tensor) -> Tensor:
        local: Any = self.up.weight
        return super().forward(tokens) * (len(local.to_local()) if hasattr(local, "to_local") else len(local))


def _local_heads(_: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(LocalHeads().double(), init_device_mesh("cpu", (2,)), plan)
    return objective(model, batches()).gradient()


def _failing(rank: int) -> Any:
    def forward(model: nn.Module, batch: Any) -> Any:
        if rank == 1:
            raise ValueError("no such file")
        return model(batch[0]), batch[1]

    model = nn.Linear(2, 2)
    from torch.distributed.fsdp import fully_shard

    fully_shard(model)
    o = Objective(model, nn.MSELoss(), (torch.ones(2, 2), torch.ones(2, 2)), forward=forward)
    return HessianOperator(o) @ o.space.current()


def _out_of_step(rank: int) -> Any:
    o = objective(_fully_sharded(), batches())
    return o.loss() if rank == 0 else eigsh(o, 1, generator=0)


def _other_data(rank: int) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    plan: Any = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    model = parallelize_module(net(), init_device_mesh("cpu", (2,)), plan)
    return objective(model, batches()[rank:]).gradient()


def _away(_: int) -> Any:
    o = objective(_fully_sharded(), batches())
    with shifted(o, o.space.current()):
        return o.gradient()


def _failing_by_module(rank: int) -> Any:
    def forward(model: nn.Module, batch: Any) -> Any:
        if rank == 1:
            raise ValueError("no such file")
        return model(batch[0]), batch[1]

    return objective(_fully_sharded(), batches(), forward=forward, memory_budget=0).gradient()


class Skipping(Net):
    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) if self.skips else self.down(self.up(self.table(tokens)))[:, -1].repeat(1, 2)


def _other_modules(rank: int) -> Any:
    from torch.distributed.fsdp import fully_shard

    model: Any = fully_shard(Skipping().double())
    model.skips = rank == 1
    return objective(model, batches(), memory_budget=0).gradient()


class Leaking(nn.Module):
    """Hands tensors over otherwise than as arguments and results, in one of several ways."""

    class Layer(nn.Module):
        def __init__(self, how: str, other: list[nn.Linear]) -> None:
            super().__init__()
            self.how, self.other, self.weight = how, other, nn.Parameter(torch.linspace(-1, 1, 9).view(3, 3).clone())
            self.given: Any = None

        def forward(self, x: Tensor) -> Tensor:
            if self.how == "in place":
                return x.mul_(self.weight[0])
            self.kept = (x @ self.weight).square().mean()
            if self.how == "a complex result":
                return torch.complex(x @ self.weight, x)
            return (
                x
                @ (self.other[0].weight if self.how == "a list" else self.weight)
                * (1.0 if self.given is None else self.given)
            )

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.first, self.last = how, nn.Linear(3, 3), nn.Linear(3, 3)
        self.layer = Leaking.Layer(how, [self.first])
        if how == "a hook":
            nn.utils.weight_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        if self.how == "an attribute before" or (self.how == "a branch by data" and bool((x.abs() > 0.999).any())):
            self.layer.given = x.mean()
        if self.how == "constants":
            self.layer.given = 1.5 + torch.linspace(0, 1, 3).to(x) * x.detach().mean()
        y = self.layer(x)
        y = (y * y).imag if y.is_complex() else y
        y = self.last(torch.tanh(y))
        return y + self.layer.kept if self.how == "an attribute after" else y


def leaking(rank: int, how: str, **settings: Any) -> Objective:
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = fully_shard(Leaking(how).double()) if rank >= 0 else Leaking(how).double()
    x = torch.linspace(-1, 1, 18, dtype=torch.float64).view(6, 3)
    data = [(x[:4], x[:4].sin()), (x[4:], x[4:].cos())]
    if how == "a branch by data":  # in the second batch of every rank, and none is compared before
        return Objective(model, nn.MSELoss(), [*data[rank : rank + 1], (100 * x, x)], **settings)
    return Objective(model, nn.MSELoss(), data if rank < 0 else data[rank : rank + 1], **settings)


def complex_results(rank: int) -> dict[str, Tensor]:
    """What goes between modules may be complex; what the model had of gradients and hooks stays as it was."""
    o = leaking(rank, "a complex result", memory_budget=0 if rank >= 0 else None)
    hits: list[Any] = []
    for p in o.model.parameters():
        p.grad = torch.ones_like(p)
        p.register_post_accumulate_grad_hook(hits.append)
    gradient = o.gradient()
    assert not hits
    assert all(bool((getattr(p.grad, "_local_tensor", p.grad) == 1).all()) for p in o.model.parameters())
    return {"gradient": whole(gradient), "Hessian": whole(HessianOperator(o) @ gradient)}


def constants(rank: int) -> dict[str, Tensor]:
    """What does not move with the parameters may reach a module in any way."""
    o = leaking(rank, "constants", memory_budget=0 if rank >= 0 else None)
    gradient = o.gradient()
    return {"gradient": whole(gradient), "Hessian": whole(HessianOperator(o) @ gradient)}


def _by_value(model: nn.Module, batch: Any) -> Any:
    return model(batch[0]) * sum(p.square().sum() for p in model.parameters()), batch[1]


def _compared_on_the_other_route(rank: int) -> Any:
    """What was compared with whole parameters was not module by module; a rank has no data."""
    from torch.distributed.fsdp import fully_shard

    model = fully_shard(net())
    data = batches() if rank == 0 else []
    objective(model, data, forward=_by_value).loss()
    return objective(model, data, forward=_by_value, memory_budget=0).loss()


def _gradient_beside_loss(rank: int) -> Any:
    o = objective(_fully_sharded(), batches(), memory_budget=0)
    return o.gradient() if rank == 0 else o.loss()


def _other_products(rank: int, budget: int | None = 0) -> Any:
    o = objective(_fully_sharded(), batches(), memory_budget=budget)
    return (HessianOperator if rank == 0 else GGNOperator)(o) @ o.space.current()


def _other_parameters(rank: int) -> Any:
    """The parts have different sizes, and a gather of both would not come back."""
    o = objective(_fully_sharded(), batches())
    A = HessianOperator(o).restrict("up*" if rank == 0 else "norm*")
    assert A.sharding is not None
    return A @ ShardedTensor(torch.ones(A.sharding.num_local, dtype=torch.float64), A.sharding)


def _elsewhere(function: Callable[..., Any]) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        o = objective(_fully_sharded(), batches(), memory_budget=0)
        return function(o, o.space.current())

    return call


REFUSED: dict[str, tuple[Callable[[int], Any], str]] = {
    "a forward that depends on the split": (_local_heads, "is not that of the plain one"),
    "other data on a tensor-parallel rank": (_other_data, "differ in their first batch"),
    "a rank that fails": (_failing, "no such file"),
    "a rank that fails in a walk module by module": (_failing_by_module, "no such file"),
    "ranks at different modules": (_other_modules, "at different modules"),
    "whole parameters module by module": (
        lambda _: objective(_fully_sharded(), batches(), memory_budget=0).check(),
        "needs whole parameters",
    ),
    **{
        f"{how}, module by module": (lambda rank, how=how: leaking(rank, how, memory_budget=0).loss(), text)
        for how, text in {
            **dict.fromkeys(("a list", "a hook", "an attribute before", "an attribute after"), "would be a constant"),
            "a branch by data": "would be a constant",
            "in place": "writes into a tensor that it is given",
        }.items()
    },
    "a comparison on the other route": (_compared_on_the_other_route, "is not that of the plain one"),
    "a gradient beside a loss": (_gradient_beside_loss, "different calls"),
    "products with other matrices, module by module": (_other_products, "different calls"),
    "products with other matrices": (
        lambda rank: _other_products(rank, None),
        "rank 0 at products of HessianOperator (1 x all parameters), rank 1 at products of GGNOperator",
    ),
    "products with other blocks": (_other_parameters, "different calls"),
    "a loss away from the point": (_elsewhere(loss_at), "needs whole parameters"),
    "a gradient away from the point": (_elsewhere(gradient_at), "needs whole parameters"),
    "ranks at different calls": (_out_of_step, "different calls"),
    "an objective that keeps graphs of another point": (_away, "keeps no graphs"),
    "half a parameter": (lambda _: objective(_fully_sharded(), batches()).gradient()[:4], "cut a parameter"),
    "an unknown operation": (lambda _: objective(_fully_sharded(), batches()).gradient().cumsum(0), "cumsum is not kn"),
}


def algebra(group: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return pairs of what an expression gives for sharded tensors and for whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    generator = torch.Generator().manual_seed(3)
    shapes: list[tuple[tuple[int, ...], Any]] = [((9, 3), Shard(0)), ((1,), Shard(0)), ((4, 6), Shard(1))]
    shapes += [((), Replicate())]
    tensors = [distribute_tensor(torch.randn(s, generator=generator), mesh, [p]) for s, p in shapes]
    layout = Layout.agreed(tensors, group)
    n = layout.num_entries
    X, Y = torch.randn(2, n, 3, generator=generator, dtype=torch.float64)
    C = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    expressions: dict[str, Callable[[Tensor, Tensor], Any]] = {
        "sum": lambda x, y: x + 2 * y / x.abs().clamp_min(0.5),
        "with a whole": lambda x, _: x - X,
        "products": lambda x, y: x.T @ y,
        "combination": lambda x, _: x @ C,
        "projection": lambda x, y: torch.addmm(x, y, y.T @ x, alpha=-1),
        "norms": lambda x, _: x.norm(dim=0),
        "largest": lambda x, _: torch.stack([*torch.aminmax(x), x.abs().amax()]),
        "means": lambda x, y: torch.stack([x.mean(), (x * y).sum(), x.sum(dim=1).sum()]),
        "rows": lambda x, y: torch.cat([x.T[1:], y.T[[0, 2]]]),
        "tensors": lambda x, y: torch.cat([x[:27], y[27:28]]),
        "dot": lambda x, y: (x[:, 0] @ y[:, 1])[None],
        "batched": lambda x, y: x.T[:, None] @ y.T[:, :, None],
        "triangle": lambda x, _: torch.linalg.qr(x)[1].abs(),
        "orthonormal": lambda x, _: torch.linalg.qr(x)[0] @ torch.linalg.qr(x)[1],
        "singular values": lambda x, _: torch.linalg.svd(x, full_matrices=False)[1],
        "written": _written,
    }
    x, y = (ShardedTensor(layout.part(each, 0), layout, 0) for each in (X, Y))
    found = {name: (whole(f(x, y)), f(X, Y)) for name, f in expressions.items()}
    drawn = layout.drawn(lambda count: torch.randn(count, generator=generator), 3, torch.float32)
    again = torch.Generator().manual_seed(3)
    for s, _ in shapes:
        torch.randn(s, generator=again)
    torch.randn(2, n, 3, generator=again, dtype=torch.float64)
    torch.randn(3, 3, generator=again, dtype=torch.float64)
    found["draws"] = (ShardedTensor(drawn, layout).whole(), torch.randn(3, n, generator=again))
    sizes = (6, 7), (140000, 3)  # the latter in four pieces a rank
    layouts = [Layout.agreed([distribute_tensor(torch.zeros(size), mesh, [Shard(0)])], group) for size in sizes]
    layouts.append(Layout.agreed([distribute_tensor(torch.zeros(140001, 3), mesh, [Shard(0)]), torch.zeros(0)], group))
    for each in layouts:
        rows = torch.arange(float(each.num_entries), dtype=torch.float64)[None]
        part = each.summed((group.rank() + 1) * rows, group, 0.5)
        found[f"sum of {each.num_entries}"] = (each.whole(part), 1.5 * rows)
    found["sum of nothing"] = (reduce_scatter(torch.ones(group.size(), 0), group).sum()[None], torch.zeros(1))
    return found


def _written(x: Tensor, y: Tensor) -> Tensor:
    rows = x.clone().T.contiguous()
    rows[0] = y[:, 0]
    return rows


# -- both processes ---------------------------------------------------------------------------------------------------

CASES = {
    **{"fully sharded": fully_sharded, "module by module": module_by_module, "all data on one rank": nobody_but_one},
    **{"tensor parallel": tensor_parallel, "replicas": replicas},
}


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        mine: dict[str, Any] = {name: case(rank) for name, case in CASES.items()}
        mine["complex results"], mine["constants"] = complex_results(rank), constants(rank)
        mine["lower precision"] = in_lower_precision(rank)
        mine["algebra"] = algebra(dist.group.WORLD)
        mine["all-reduces of five steps"] = one_all_reduce_a_step(rank)
        mine["all-reduces of runs"] = all_reduces_of_runs(rank)
        mine["bytes"] = bytes_a_product(rank)
        for name, (call, _) in REFUSED.items():
            try:
                call(rank)
                mine[name] = "nothing was raised"
            except Exception as error:
                mine[name] = f"{type(error).__name__}: {error}"
        torch.save(mine, f"{folder}/rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work, str(folder))
    return [{**torch.load(folder / f"rank{rank}.pt"), "folder": folder} for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Tensor]:
    o = objective(net(), batches())
    later = objective(stepped(), batches())
    found = {**values(o, more=True), "after a step": HessianOperator(later) @ o.gradient(), "again": o.loss()}
    with torch.no_grad():
        later.model.scale.mul_(2.0)
    return {**found, "after a step on one rank": later.loss()}


@pytest.mark.parametrize("case", CASES)
def test_ranks_equal_one_process(ranks: list[dict[str, Any]], alone: dict[str, Tensor], case: str) -> None:
    for rank in ranks:
        assert set(rank[case]) <= set(alone)
        for what, value in rank[case].items():
            tolerance = 1e-6 if what in ("values", "vectors", "solution") else BATCHING_TOLERANCE
            assert_close(value, alone[what].double(), tolerance)


def test_casts_of_a_precision_policy_are_in_the_graph(ranks: list[dict[str, Any]]) -> None:
    o = Objective(net(), nn.CrossEntropyLoss(), batches(), forward=narrow)
    wide = objective(net(), batches())
    for rank in ranks:
        assert_close(rank["lower precision"]["gradient"], o.gradient(), 1e-6)
        assert_close(rank["lower precision"]["Hessian"], HessianOperator(o) @ o.space.current(), 1e-5)
        assert float((rank["lower precision"]["gradient"] - wide.gradient()).norm()) > 1e-9


@pytest.mark.parametrize(("what", "of"), [("complex results", complex_results), ("constants", constants)])
def test_what_modules_may_hand_over(ranks: list[dict[str, Any]], what: str, of: Callable[[int], Any]) -> None:
    alone = of(-1)
    for rank in ranks:
        for name, value in rank[what].items():
            assert_close(value, alone[name], BATCHING_TOLERANCE)


def test_a_step_of_lanczos_takes_one_all_reduce(ranks: list[dict[str, Any]]) -> None:
    assert [rank["all-reduces of five steps"] for rank in ranks] == [5, 5]


def test_a_step_of_runs_that_keep_all_vectors_takes_two_all_reduces(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert len(rank["all-reduces of runs"]) == 4
        for name, count in rank["all-reduces of runs"].items():
            assert count == 2 * 5 * (2 if name == "spectral_density" else 1), name  # two probes, one by one


def test_a_product_moves_the_bytes_that_are_planned(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert set(rank["bytes"]) == {"whole parameters", "module by module"}
        moved, planned = rank["bytes"]["whole parameters"]
        assert moved == planned
        moved, planned = rank["bytes"]["module by module"]  # the first module contributes once, not twice
        assert moved <= planned <= 1.1 * moved


def test_recurrent_networks_run_with_what_stands_in() -> None:
    lstm = torch.nn.LSTM(3, 4)
    x, before = torch.randn(2, 3), lstm.weight_ih_l0
    plain = lstm(x)[0]
    place(lstm, "weight_ih_l0", (2 * before).to(torch.bfloat16).float())  # no parameter, as a cast of one is
    assert not torch.equal(lstm(x)[0], plain)
    place(lstm, "weight_ih_l0", before)
    assert torch.equal(lstm(x)[0], plain)


def test_settings_that_one_route_cannot_keep_are_refused() -> None:
    for settings in ({"keep_graphs": True, "head": "auto"}, {"keep_graphs": "auto", "head": "lm_head"}):
        refuse_settings(False, **settings)  # type: ignore[arg-type]
        with pytest.raises(InputError, match="does not hold for a model that is differentiated module by module"):
            refuse_settings(True, **settings)  # type: ignore[arg-type]
    refuse_settings(True, False, None)


def test_algebra_of_parts_is_that_of_the_whole(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for name, (of_parts, of_whole) in rank["algebra"].items():
            assert of_parts.shape == of_whole.shape, name
            assert float((of_parts - of_whole).abs().max()) <= 1e-12 * max(1.0, float(of_whole.abs().max())), name


@pytest.mark.parametrize("name", REFUSED)
def test_nothing_wrong_is_answered(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert REFUSED[name][1] in rank[name], rank[name]


def test_groups_of_parameters_are_found_in_the_states_of_older_and_newer_torch() -> None:
    class Wrapped(nn.Linear):
        def __init__(self, **state: Any) -> None:
            super().__init__(1, 1)
            self.state = SimpleNamespace(**state)

        def _get_fsdp_state(self) -> SimpleNamespace:
            return self.state

    older = nn.Sequential(Wrapped(_fsdp_param_group="a"), nn.Tanh(), Wrapped(_fsdp_param_group=None))
    newer = nn.Sequential(Wrapped(_fsdp_param_groups=["a", "b"]), Wrapped(_fsdp_param_groups=[]))
    assert param_groups(older) == ["a"]
    assert param_groups(newer) == ["a", "b"]
