"""Do processes that hold parts of a model compute what one with all of it does, and at what price?

    python -m benchmarks.sharded.bench [--what exact cost peers speed] [--ranks 2 4] [--out FILE]

`exact`: relative errors against one process, in float64, of a network with normalisation and widths that ranks do not
divide, on ragged data; collectives of a product and of a step of Lanczos. `cost`: peak resident memory of `eigsh` with
a basis of 20 vectors, 10 million parameters in float64, graph rebuilt, bytes that a product moves and its seconds,
beside what `plan` says. `peers`: the routes of plain torch and of hessian-eigenthings, with their errors. `speed`:
seconds of steps of Lanczos on several ranks and on one, in turn, by the clock and of the processor (of the slowest
rank), and medians of their ratios: a busy machine shares the processors, and ranks wait for each other; beside what
`plan` says for ranks as fast as one process, as far as there are processors, and for messages as fast as those that are
timed in the same run. Processes talk over gloo; one thread each.
"""

from __future__ import annotations

import os
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import spawn

from benchmarks.common.suite import Rows, command
from curvature import (
    Cluster,
    GGNOperator,
    HessianOperator,
    MCFisherOperator,
    ModelSize,
    Objective,
    eigsh,
    solve,
)
from curvature.linalg import ThickRestartLanczos, spectral_density, trace
from curvature.sharding.collectives import COUNTS, RECEIVED, all_gather, all_reduce, reduce_scatter
from curvature.sharding.tensors import in_parts, whole
from curvature.spectra.many_devices import rank_cost

LAYOUTS = ("DDP", "FSDP2", "FSDP2, nested", "DTensor", "column- and row-parallel", "tensor-parallel and FSDP2")
PEERS = (
    "torch, double backward through FSDP2",
    "torch, differences of FSDP2 gradients",
    "torch, double backward through column-parallel modules",
    "hessian-eigenthings, DDP, differences",
    "hessian-eigenthings, DDP, autograd",
)
DEPTH, SIDE = 24, 640  # of the network whose cost is measured: 24 x 640^2 is 10 million
PAIRS = 7  # of steps that are timed
COSTS = ("FSDP2", "FSDP2, module by module")


class Net(nn.Module):
    """A layer, two wide ones around a residual connection, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 12), nn.Linear(12, 6)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.stem(x))
        return self.head(self.norm(x + self.down(torch.tanh(self.up(x)))))


def net() -> Net:
    """Return the network, alike in every process."""
    torch.manual_seed(0)
    return Net().double()


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return all data."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(13, 6, generator=generator, dtype=torch.float64), torch.arange(13) % 5
    return [(x[i : i + 2], y[i : i + 2]) for i in range(0, 13, 2)]


def part(rank: int, ranks: int) -> list[tuple[Tensor, Tensor]]:
    """Return the batches of a rank: one for the first, the others dealt to the rest."""
    every = batches()
    return every[:1] if rank == 0 else every[1:][rank - 1 :: ranks - 1]


def laid_out(layout: str, rank: int, ranks: int) -> tuple[Any, list[tuple[Tensor, Tensor]]]:
    """Return the network as the layout has it, and the batches of this rank."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model, plan = net(), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    if layout == "DDP":
        return nn.parallel.DistributedDataParallel(model), part(rank, ranks)
    if layout.startswith("FSDP2"):
        if "nested" in layout:
            fully_shard(model.up)
            fully_shard(model.down)
        return fully_shard(model), part(rank, ranks)
    if layout == "DTensor":
        mesh = init_device_mesh("cpu", (ranks,))
        for module, place in ((model.up, Shard(0)), (model.down, Shard(1)), (model.head, Shard(0))):
            module.weight = nn.Parameter(distribute_tensor(module.weight.detach(), mesh, [place]))
        return model, batches()
    if "FSDP2" not in layout:
        return parallelize_module(model, init_device_mesh("cpu", (ranks,)), plan), batches()
    across = 2 if ranks > 2 else 1
    mesh = init_device_mesh("cpu", (ranks // across, across), mesh_dim_names=("data", "model"))
    parallelize_module(model, mesh["model"], plan)
    return fully_shard(model, mesh=mesh["data"]), part(mesh.get_local_rank("data"), ranks // across)


def numbers(o: Objective) -> dict[str, Tensor]:
    """Return what is compared."""
    X = torch.randn(o.num_params, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    S, (loss, g) = in_parts(X, o.sharding, 0), o.loss_and_gradient()
    H, G = HessianOperator(o), GGNOperator(o)
    density = spectral_density(H, num_probes=2, num_steps=8, generator=2)
    found = {
        **{"loss": loss, "gradient": g, "Hessian product": H @ S, "Gauss-Newton product": G @ S},
        "10 eigenvalues": eigsh(H, 10, rtol=1e-6, confidence=None, generator=0).eigenvalues,
        "trace": trace(G, num_matvecs=20, generator=1).value,
        "nodes of the density": density.nodes,
        "solution": solve(G, g, damping=0.1, rtol=1e-11).x,
    }
    return {name: whole(torch.as_tensor(value)) for name, value in found.items()}


def _counted(call: Callable[[], Any]) -> dict[str, int]:
    before = dict(COUNTS)
    call()
    return {name: COUNTS[name] - before[name] for name in COUNTS}


def exact(rank: int, ranks: int, layout: str) -> dict[str, Any]:
    """Return the errors of a layout, and its collectives."""
    model, mine = laid_out(layout, rank, ranks)
    o = Objective(model, nn.CrossEntropyLoss(), mine)
    alone = numbers(Objective(net(), nn.CrossEntropyLoss(), batches()))
    errors = {k: float((v - alone[k]).norm() / alone[k].norm()) for k, v in numbers(o).items()}
    H, v = HessianOperator(o), o.gradient()
    steps: Any = {"rtol": 1e-14, "confidence": None, "generator": 0}
    few, more = (_counted(partial(eigsh, H, 1, max_matvecs=n, **steps)) for n in (6, 12))
    place, drawn = 0 if o.process_group is None else o.process_group.rank(), MCFisherOperator(o, generator=3) @ v
    errors["Monte Carlo Fisher product"] = _fisher_error(o, whole(drawn), whole(v), mine, place)
    return {
        "errors": errors,
        "product": _counted(lambda: H @ v),
        "all_reduces_a_step": (more["all_reduce"] - few["all_reduce"]) / 6,
    }


def _fisher_error(o: Objective, found: Tensor, v: Tensor, mine: Any, place: int) -> float:
    """Return the error against the weighted mean of what each rank's plain model gives under the rank's own draws."""
    from curvature.engine.output_metrics import SampledFisher
    from curvature.generators import spawn as seeds
    from curvature.operators._objective_operator import MetricOperator

    alone = Objective(net(), nn.CrossEntropyLoss(), mine)
    seed = seeds(3, 1)[0].initial_seed()
    product = (MetricOperator(alone, SampledFisher(1, seed, place)) @ v) * alone.total_weight
    weight = torch.tensor(alone.total_weight, dtype=torch.float64)
    if o.process_group is not None:
        dist.all_reduce(product, group=o.process_group)
        dist.all_reduce(weight, group=o.process_group)
    return float((found - product / weight).norm() / found.norm())


def _size(examples: int) -> ModelSize:
    layers = (nn.Linear(SIDE, SIDE, bias=False, dtype=torch.float64, device="meta") for _ in range(DEPTH))
    size = ModelSize.of(nn.Sequential(*layers), tokens=examples, batch_tokens=examples)
    return replace(size, token_bytes=3 * DEPTH * SIDE * 8)


def _deep(ranks: int) -> Any:
    """Return a network of 10 million parameters, in parts where there are several ranks."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model: Any = nn.Sequential()
    for _ in range(DEPTH):
        layer: Any = nn.Linear(SIDE, SIDE, bias=False, dtype=torch.float64)
        model.extend([layer if ranks == 1 else fully_shard(layer), nn.Tanh()])
    return model if ranks == 1 else fully_shard(model)


def cost(rank: int, ranks: int, layout: str) -> dict[str, Any]:
    """Return peak memory of `eigsh` and seconds of a product, of a network of 10 million parameters."""
    model, size = _deep(ranks), _size(64)
    x = torch.randn(64, SIDE, dtype=torch.float64)[rank::ranks]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    budget = 0 if "module" in layout else None
    o = Objective(model, nn.MSELoss(), (x, torch.zeros_like(x)), keep_graphs=False, memory_budget=budget)
    H, v = HessianOperator(o), o.gradient()
    H @ v
    moved, start = RECEIVED["bytes"], time.perf_counter()
    H @ v
    seconds, moved = time.perf_counter() - start, RECEIVED["bytes"] - moved
    eigsh(H, 1, num_basis=20, max_matvecs=24, rtol=1e-9, confidence=None, generator=0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    route = COSTS[1] if budget == 0 else "whole parameters"
    costs = rank_cost(size, num_matvecs=24, num_basis=21, others=1, world_size=ranks, cluster=Cluster(memory=1e15))
    planned = next(c for c in (costs, costs.other) if c is not None and c.route in route)
    return {
        **{"peak_mib": peak, "before_mib": before, "product_seconds": seconds, "parameters": o.num_params},
        **{"planned_mib": planned.rank_bytes / 2**20, "moved_mib": moved / 2**20},
        "planned_moved_mib": planned.bytes_per_matvec / 2**20,
    }


def _lanczos(ranks: int, x: Tensor, budget: int | None) -> Callable[[int], list[float]]:
    """Return what brings a run of Lanczos to so many products: seconds by the clock and of the processor."""
    o = Objective(_deep(ranks), nn.MSELoss(), (x, torch.zeros_like(x)), keep_graphs=False, memory_budget=budget)
    solver = ThickRestartLanczos(o, 1, rtol=1e-12, confidence=None, generator=0)

    def until(done: int) -> list[float]:
        start = time.perf_counter(), time.process_time()
        solver.run(max_matvecs=done)
        return [time.perf_counter() - start[0], time.process_time() - start[1]]

    until(2)
    return until


def _messages(ranks: int) -> tuple[float, float]:
    """Return bytes a second that a rank receives of 32 MiB that are gathered or summed, and seconds of a message."""
    group: Any = dist.group.WORLD
    part = torch.ones(2**22 // ranks, dtype=torch.float64)
    seconds = []
    for _ in range(3):
        before, start = RECEIVED["bytes"], time.perf_counter()
        reduce_scatter(all_gather(part, group), group)
        seconds.append((time.perf_counter() - start) / (RECEIVED["bytes"] - before))
        start = time.perf_counter()
        for _ in range(20):
            all_reduce(part[:1], group)
        seconds.append((time.perf_counter() - start) / 20)
    return 1 / median(seconds[::2]), median(seconds[1::2])


def _planned(ranks: int, layout: str, alone: float, speeds: tuple[float, float]) -> dict[str, float]:
    """Return what a product should take, from the seconds of one process and of messages."""
    size = _size(512)
    asked: Any = {"num_matvecs": 1, "num_basis": 1, "others": 0}
    flops = rank_cost(size, **asked, world_size=1, cluster=Cluster(flops=1.0, memory=1e15)).compute_seconds / alone
    share = min(1.0, (os.cpu_count() or 1) / ranks)
    cluster = Cluster(flops=flops * share, link=speeds[0], latency=speeds[1], memory=1e15)
    costs = rank_cost(size, **asked, world_size=ranks, cluster=cluster)
    route = COSTS[1] if "module" in layout else "whole parameters"
    cost = next(c for c in (costs, costs.other) if c is not None and c.route in route)
    return {
        **{"planned_seconds": cost.seconds, "planned_link_seconds": cost.link_seconds},
        **{"link_bytes_a_second": speeds[0], "message_seconds": speeds[1]},
    }


def speed(rank: int, ranks: int, layout: str) -> dict[str, Any]:
    """Return the seconds of steps of Lanczos on 512 examples: on all ranks, and on the first alone, in turn."""
    x = torch.randn(512, SIDE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    alone = _lanczos(1, x, None) if rank == 0 else None
    together = _lanczos(ranks, x[rank::ranks], 0 if "module" in layout else None)
    taken = []
    for done in range(3, 3 + PAIRS):
        taken.append([*(alone(done) if alone is not None else (0.0, 0.0))])
        dist.barrier()
        taken[-1] += together(done)
        dist.barrier()
    names = ("alone_seconds", "alone_cpu_seconds", "step_seconds", "step_cpu_seconds")
    found: dict[str, Any] = dict(zip(names, zip(*taken, strict=True), strict=True))
    speeds = _messages(ranks)
    planned = _planned(ranks, layout, median(found["alone_seconds"]), speeds) if rank == 0 else {}
    return {**found, **planned, "load": os.getloadavg()[0]}


def peer(rank: int, ranks: int, layout: str) -> dict[str, Any]:
    """Return the error of a Hessian product by another route, or what it raised."""
    whole_batch = [torch.cat(parts) for parts in zip(*batches(), strict=True)]
    v = torch.randn(sum(p.numel() for p in net().parameters()), generator=torch.Generator().manual_seed(0)).double()
    Hv = HessianOperator(Objective(net(), nn.CrossEntropyLoss(), tuple(whole_batch))) @ v
    try:
        found = _by_peer(layout, rank, ranks, v)
    except Exception as error:
        return {"failure": f"{type(error).__name__}: {error}".partition("\n")[0][:160]}
    return {"errors": {"Hessian product": float((found.double() - Hv).norm() / Hv.norm())}}


def _by_peer(layout: str, rank: int, ranks: int, v: Tensor) -> Tensor:
    x, y = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    rows = slice(rank * 13 // ranks, (rank + 1) * 13 // ranks)  # ragged: 13 examples
    if layout.startswith("hessian-eigenthings"):
        from hessian_eigenthings.operators.distributed.ddp import DDPHessianOperator

        method: Any = "autograd" if "autograd" in layout else "finite_difference"
        wrapped, mine = nn.parallel.DistributedDataParallel(net()), [(x[rows], y[rows])]
        A = DDPHessianOperator(wrapped, mine, lambda m, b: F.cross_entropy(m(b[0]), b[1]), method=method)
        return A.matvec(v)
    if "column" in layout:
        model, _ = laid_out(LAYOUTS[4], rank, ranks)
        sizes = [p.numel() for p in model.parameters()]
        g = torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()), create_graph=True)
        parts = [s.view(p.shape) for s, p in zip(v.split(sizes), net().parameters(), strict=True)]
        from torch.distributed.tensor import DTensor, distribute_tensor

        vs = [
            distribute_tensor(s, p.device_mesh, p.placements) if isinstance(p, DTensor) else s
            for s, p in zip(parts, model.parameters(), strict=True)
        ]
        Hv = torch.autograd.grad(g, list(model.parameters()), vs)
        return torch.cat([(h.full_tensor() if isinstance(h, DTensor) else h).reshape(-1) for h in Hv])
    model, _ = laid_out("FSDP2", rank, ranks)
    params = list(model.parameters())
    if "double backward" in layout:
        g = torch.autograd.grad(F.cross_entropy(model(x[rows]), y[rows]), params, create_graph=True)
        torch.autograd.grad(g, params, [torch.ones_like(p) for p in params])
        raise AssertionError("it did not fail")
    share = (rows.stop - rows.start) * ranks / 13  # so that ranks that count alike make up the mean
    from torch.distributed.tensor import distribute_tensor

    steps = [
        distribute_tensor(s.view(p.shape), p.device_mesh, p.placements)
        for s, p in zip(v.split([p.numel() for p in params]), params, strict=True)
    ]
    found, eps = [], 1e-5
    for sign in (1, -2):
        for p, s in zip(params, steps, strict=True):
            p.data.add_(s, alpha=sign * eps)
        model.zero_grad()
        (share * F.cross_entropy(model(x[rows]), y[rows])).backward()
        found.append(torch.cat([p.grad.full_tensor().reshape(-1) for p in params]))
    return (found[0] - found[1]) / (2 * eps)


WORK: dict[str, Callable[[int, int, str], dict[str, Any]]] = {
    **{"exact": exact, "cost": cost, "peers": peer, "speed": speed}
}


def work(rank: int, ranks: int, folder: str, what: str, layout: str) -> None:
    """Measure in one of several processes, and leave what was found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks, timeout=timedelta(seconds=300)
    )
    try:
        torch.save(WORK[what](rank, ranks, layout), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def measured(what: str, layout: str, ranks: int) -> dict[str, Any]:
    """Return the row of one measurement: of the worst rank."""
    with tempfile.TemporaryDirectory() as folder:
        spawn(work, (ranks, folder, what, layout), nprocs=ranks)
        found = [torch.load(f"{folder}/{rank}.pt") for rank in range(ranks)]
    row = {"what": what, "layout": layout, "ranks": ranks, **found[0]}
    if "errors" in row:
        row["errors"] = {k: max(f["errors"][k] for f in found) for k in row["errors"]}
    if what == "speed":
        for name in ("step_seconds", "step_cpu_seconds"):
            row[name] = [max(steps) for steps in zip(*(f[name] for f in found), strict=True)]
        for kind in ("", "cpu_"):
            pairs = zip(row[f"step_{kind}seconds"], row[f"alone_{kind}seconds"], strict=True)
            row[f"{kind}ratio"] = median(step / one for step, one in pairs)
    return row | {
        k: max(f[k] for f in found) for k in ("peak_mib", "before_mib", "product_seconds", "moved_mib") if k in row
    }


def main() -> None:
    """Measure what is asked for."""
    parser = command("sharded", __doc__)
    parser.add_argument("--what", nargs="+", default=list(WORK), choices=list(WORK))
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS, help="of `exact`")
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    asked = parser.parse_args()
    tasks = [("exact", layout, n) for layout in asked.layouts for n in asked.ranks]
    tasks += [("cost", layout, n) for n in (1, *asked.ranks) for layout in COSTS[: 1 if n == 1 else 2]]
    tasks += [("peers", name, 2) for name in PEERS]
    tasks += [("speed", layout, n) for n in asked.ranks for layout in COSTS]
    tasks = [task for task in tasks if task[0] in asked.what]
    with Rows(asked.out, ("what", "layout", "ranks"), len(tasks)) as rows:
        for task in tasks:
            rows.begin(f"{task[1]}, {task[2]} ranks")
            rows.add(measured(*task))


if __name__ == "__main__":
    main()
