"""What graphs hold, what they may hold, and how much there is."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import GGNOperator, HessianOperator, Objective, SpectrumPlan, eigsh, plan, spectrum
from curvature.engine import kept_graphs, recording
from curvature.engine.linearize import Linearization
from curvature.environment.device import GpuMemory
from curvature.environment.memory import HeldMemory, _group_rooms, available_memory, drop_pages
from curvature.errors import InputError
from curvature.linalg.base import places
from curvature.linop import as_matrix
from curvature.objective import coupling
from curvature.spectra import planning, ways
from curvature.spectra.product_cost import product_cost
from tests.checks import BATCHING_TOLERANCE, assert_close
from tests.memory_meter import PeakBytes

CPU = torch.device("cpu")
NUM_BATCHES = 3


class Reversing:
    """A loader that yields its batches in the reverse of the order it had last."""

    def __init__(self, data: list[tuple[Tensor, Tensor]]) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.data = self.data[::-1]
        return iter(self.data)


def net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(1)
    return [
        (torch.randn(6, 5, generator=g, dtype=torch.float64), torch.randint(0, 3, (6,), generator=g))
        for _ in range(NUM_BATCHES)
    ]


def objective(**settings: object) -> Objective:
    return Objective(net(), nn.CrossEntropyLoss(), batches(), **settings)  # type: ignore[arg-type]


def calls(of: Objective, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    return {
        "loss": of.loss,
        "gradient": of.gradient,
        "H": lambda: HessianOperator(of) @ v,
        "G": lambda: GGNOperator(of) @ v,
    }


def _v(of: Objective) -> Tensor:
    return torch.randn(of.num_params, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("share", [0, 0.3, 0.6, 1.2])
def test_the_budget_holds_whatever_is_called_in_whatever_order(share: float) -> None:
    free = objective(keep_graphs=True)
    v = _v(free)
    expected = {name: call() for name, call in calls(objective(keep_graphs=False), v).items()}
    for call in calls(free, v).values():
        call()
    budget = int(share * free.held_bytes)
    for order in itertools.product(expected, repeat=2):
        of = objective(memory_budget=budget)
        for name in order:
            assert_close(calls(of, v)[name](), expected[name], BATCHING_TOLERANCE)
            assert of.held_bytes <= budget, order
    assert (share > 0) == (len(of.kept) > 0)
    assert of.keeps_all_graphs == (share > 1)


def test_the_budget_holds_between_batches_and_after_an_abandoned_walk() -> None:
    budget = objective(keep_graphs=True)
    v = _v(budget)
    _ = HessianOperator(budget) @ v
    limit = budget.held_bytes // 2
    of = objective(memory_budget=limit)
    of.loss()
    for _ in range(2):
        of.reduce(lambda lin: lin.hvp(v[None])[0], observe=lambda *_: _check(of, limit))
        of.reduce(lambda lin: lin.ggnvp(v[None])[0], observe=lambda *_: _check(of, limit))
    of = objective(memory_budget=0)
    walk = of.linearizations()
    next(walk).hvp(v[None])
    assert of.held_bytes == 0


def _check(of: Objective, limit: int) -> None:
    assert of.held_bytes <= limit


@pytest.mark.parametrize("shuffles", [False, True])
def test_graphs_dropped_in_the_middle_of_a_walk_are_built_again(shuffles: bool) -> None:
    """All graphs of the Hessian fit; those of the Gauss-Newton matrix beside them do not."""
    probe = objective(keep_graphs=True)
    probe.trust.revoke("a chain needs little beside the other")
    v = _v(probe)
    H = HessianOperator(probe) @ v
    data = Reversing(batches()) if shuffles else batches()
    own = sum(t.nbytes for batch in batches() for t in batch) if shuffles else 0
    limit = int(1.05 * probe.held_bytes) + own
    G = GGNOperator(probe) @ v
    of = Objective(net(), nn.CrossEntropyLoss(), data, memory_budget=limit)
    of.trust.revoke("as above")
    assert_close(HessianOperator(of) @ v, H, BATCHING_TOLERANCE)
    assert len(of.kept) == NUM_BATCHES
    for _ in range(3):
        assert_close(GGNOperator(of) @ v, G, BATCHING_TOLERANCE)
        assert len(of.kept) < NUM_BATCHES
        assert_close(HessianOperator(of) @ v, H, BATCHING_TOLERANCE)
        assert 0 < of.held_bytes <= limit


def test_an_objective_shares_its_budget_with_those_made_from_it() -> None:
    probe = objective(keep_graphs=True)
    _ = HessianOperator(probe) @ _v(probe)
    limit = int(1.1 * probe.held_bytes)
    whole = objective(memory_budget=limit)
    parts = [whole, whole.restrict("0"), whole.split(3)]
    for of in parts + parts[::-1]:
        v = torch.ones(of.num_params, dtype=torch.float64)
        expected = HessianOperator(objective(params=None if of is not parts[1] else "0", keep_graphs=False)) @ v
        assert_close(HessianOperator(of) @ v, expected, BATCHING_TOLERANCE)
        assert 0 < of.held_bytes <= sum(each.held_bytes for each in parts) <= limit


def test_the_default_budget_follows_the_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    free = 1 << 30
    monkeypatch.setattr(kept_graphs, "available_memory", lambda _: free)
    monkeypatch.setattr(kept_graphs, "_PATIENCE", 0.0)
    of = objective()
    v = _v(of)
    expected = HessianOperator(of) @ v
    assert len(of.kept) == NUM_BATCHES
    free = 0  # what is held may be half of what it takes
    assert_close(HessianOperator(of) @ v, expected, BATCHING_TOLERANCE)
    assert len(of.kept) < NUM_BATCHES


def test_graphs_fit_the_memory_that_building_them_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of a graph took four, within the second in which what was free is believed."""
    free = objective(keep_graphs=True)
    _ = HessianOperator(free) @ _v(free)
    of = objective()
    monkeypatch.setattr(kept_graphs, "available_memory", lambda _: 3 * free.held_bytes - 4 * of.held_bytes)
    _ = HessianOperator(of) @ _v(of)
    assert 0 < of.held_bytes <= of.kept.budget.num_bytes
    assert of.num_batches is not None
    assert len(of.kept) < of.num_batches


GROWTH = """
import psutil, torch
from torch import nn
from curvature import HessianOperator, Objective

torch.manual_seed(0)
net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10))
data = [(torch.randn(1024, 64), torch.randint(0, 10, (1024,))) for _ in range(12)]
objective, process = Objective(net, nn.CrossEntropyLoss(), data), psutil.Process()
before, v = process.memory_info().rss, torch.randn(objective.num_params)
objective.loss()
HessianOperator(objective) @ v
print((process.memory_info().rss - before) / objective.held_bytes)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries give back what is freed as they see fit")
def test_what_building_graphs_left_unused_goes_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, text=True, check=True)
    assert 0.9 < float(done.stdout) < 1.3


MAPPED = """
import ctypes, torch
from curvature.environment.memory import keep_freed
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
info = ctypes.CDLL("libc.so.6").mallinfo2
info.restype = Info
def mapped():
    before = info().hblks
    piece = torch.empty(2**24, dtype=torch.uint8)
    return info().hblks - before
before = mapped()
keep_freed()
print(before, mapped())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_large_pieces_of_memory_are_not_mapped_anew_each_time() -> None:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run([sys.executable, "-c", MAPPED], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.split() == ["1", "0"]


def test_views_of_what_was_there_hold_nothing() -> None:
    W, told = torch.ones(30, 40), []
    with HeldMemory(lambda: told.append(True)) as meter:
        view, made = W.t()[1:], W * 2
        W.add_(1)
        part = made[3:]
        del made
        gone = W * 3
        del gone
    assert meter.held_bytes() == 30 * 40 * 4
    assert told == [True]
    assert view.shape == (39, 30)
    del part
    assert meter.held_bytes() == 0


# -- what is there ----------------------------------------------------------------------------------------------------


def _tree(root: Path, files: dict[str, object]) -> Path:
    for name, value in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(f"{value}\n")
    return root / "proc"


def test_limits_of_control_groups_are_seen_up_the_tree(tmp_path: Path) -> None:
    """Version 2: the job's group has no limit of its own, the user's slice has."""
    mount = f"29 22 0:26 / {tmp_path}/cg rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
    proc = _tree(
        tmp_path,
        {
            "proc/cgroup": "0::/user/job",
            "proc/mountinfo": mount,
            "cg/user/job/memory.max": "max",
            "cg/user/job/memory.high": "max",
            "cg/user/job/memory.current": 500,
            "cg/user/memory.max": 1000,
            "cg/user/memory.high": 900,
            "cg/user/memory.current": 700,
            "cg/user/memory.stat": "anon 600\ninactive_file 50",
        },
    )
    assert list(_group_rooms(proc)) == [900 - 700 + 50]


def test_limits_of_control_groups_of_version_1_are_seen_in_a_container(tmp_path: Path) -> None:
    """The container's mount shows its own group only, under the path that it has outside."""
    mounts = f"""30 22 0:27 /docker/abc {tmp_path}/cpu ro - cgroup cgroup rw,cpu
31 22 0:28 /docker/abc {tmp_path}/mem ro - cgroup cgroup rw,memory"""
    proc = _tree(
        tmp_path,
        {
            "proc/cgroup": "4:cpu:/docker/abc\n5:memory:/docker/abc/step\n0::/",
            "proc/mountinfo": mounts,
            "mem/step/memory.limit_in_bytes": 9223372036854771712,
            "mem/step/memory.usage_in_bytes": 10,
            "mem/memory.limit_in_bytes": 100,
            "mem/memory.usage_in_bytes": 120,
            "mem/memory.stat": "inactive_file 3\ntotal_inactive_file 5",
        },
    )
    assert list(_group_rooms(proc)) == [100 - 120 + 5]
    assert list(_group_rooms(tmp_path / "none")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process are read on Linux")
@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_limits_of_the_process_are_seen(name: str) -> None:
    import resource

    import psutil

    limit, used = getattr(resource, name), psutil.Process().memory_info()
    before = resource.getrlimit(limit)
    size = used.vms if name == "RLIMIT_AS" else used.data
    try:
        resource.setrlimit(limit, (size + (1 << 28), before[1]))
        assert 0 < available_memory(CPU) <= 1 << 28
        resource.setrlimit(limit, (size // 2, before[1]))
        none = available_memory(CPU)
    finally:
        resource.setrlimit(limit, before)
    assert none == 0


# -- what is predicted ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
@pytest.mark.parametrize("keep", [True, False])
def test_a_plan_makes_no_product(
    operator: type[HessianOperator | GGNOperator], keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It knows what the graphs will hold: as much as they do once the products are made."""
    of = objective(keep_graphs=keep)
    A = operator(of)
    with monkeypatch.context() as patch:
        for product in ("hvp", "ggnvp", "metric_product"):
            patch.setattr(Linearization, product, None)
        planned = plan(A, ["trace"])
        cost = product_cost(A)
    assert planned.seconds > 0
    before = of.held_bytes
    _ = A @ _v(of)
    assert (of.held_bytes - before) / cost.graphs() == pytest.approx(1 if keep else 0, abs=0.2)


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans speak of the tensors that are added, and a basis does not grow for the chain."""
    for module in (planning, ways):
        monkeypatch.setattr(module, "present_memory", lambda _: 0)
    monkeypatch.setattr(planning, "peak_memory", lambda _: 0)
    monkeypatch.setattr(planning, "_HEAP", 0)
    monkeypatch.setattr(places, "_SPARE_BYTES", 0)


def wide(examples: int, **settings: object) -> Objective:
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    layers = [nn.Linear(200, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 10)]
    batch = torch.randn(examples, 200, generator=g), torch.randint(10, (examples,), generator=g)
    return Objective(nn.Sequential(*layers), nn.CrossEntropyLoss(), batch, **settings)  # type: ignore[arg-type]


@pytest.mark.usefixtures("nothing_held")
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
@pytest.mark.parametrize("examples", [32, 1024])  # vectors, or activations, are most of the memory
def test_a_plan_knows_the_peak_of_a_product_within_a_quarter(examples: int, matrix: Any) -> None:
    planned, of = plan(wide(examples), "product", matrix=matrix), wide(examples)
    v = torch.ones(of.num_params)
    with PeakBytes() as meter:
        _ = as_matrix(of, matrix) @ v
    assert planned.peak_bytes == pytest.approx(meter.peak, rel=0.25)


@pytest.mark.parametrize("micro_batch", [None, 16])
def test_a_product_holds_a_stated_multiple_of_what_a_gradient_holds(micro_batch: int | None) -> None:
    of = wide(128, keep_graphs=False, micro_batch=micro_batch)
    v, peaks = torch.ones(of.num_params), []
    for work in (of.gradient, lambda: HessianOperator(of) @ v, lambda: GGNOperator(of) @ v):
        work()  # the first compares lean layers and cuts a batch
        with PeakBytes() as meter:
            work()
        peaks.append(meter.peak)
    assert peaks[1] <= 3 * peaks[0]
    assert peaks[2] <= 2.2 * peaks[0]


@pytest.mark.usefixtures("nothing_held")
def test_a_plan_knows_the_peak_of_eigenpairs_within_a_quarter_whatever_the_basis() -> None:
    of, seen = wide(128, keep_graphs=False), 0
    planned = plan(of, "eigenpairs", k=3)
    _ = HessianOperator(of) @ torch.ones(of.num_params)  # lean layers are compared before rows are written
    for settings, peak in ((w.settings, w.peak_bytes) for w in (planned, *planned.ways) if not w.changes):
        if "basis_device" in settings or list(settings) == ["num_basis"]:  # pages of a file are no tensor's own memory
            continue
        with PeakBytes() as meter:
            eigsh(of, 3, max_matvecs=21, block_size=1, generator=0, confidence=None, **settings)
        assert peak == pytest.approx(meter.peak, rel=0.25), settings
        seen += 1
    assert seen == 2


@pytest.mark.usefixtures("nothing_held")
def test_a_plan_keeps_to_a_limit_or_says_what_the_least_is() -> None:
    free = plan(wide(128), "eigenpairs", k=3)
    least = min(way.peak_bytes for way in free.ways)
    bound = plan(wide(128), "eigenpairs", k=3, memory_limit=(free.peak_bytes + least) // 2)
    assert bound.peak_bytes <= (free.peak_bytes + least) // 2 < free.peak_bytes
    assert bound.changes or bound.settings
    of = wide(128).replace(**bound.changes)
    assert bool(eigsh(of, 3, rtol=0.1, generator=0, confidence=None, **bound.settings).converged.all())
    with pytest.raises(InputError, match=r"no way fits into .* GiB: the smallest takes .* GiB, with \{"):
        plan(wide(128), "eigenpairs", k=3, memory_limit=least // 2)


def test_a_basis_on_disk_gives_the_same_pairs_and_leaves_no_file(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    A = torch.diag(1 / torch.arange(1.0, 3001, dtype=torch.float64))
    for settings in ({}, {"basis_dtype": torch.bfloat16}):
        here, there = (
            eigsh(A, 3, method="lanczos", rtol=1e-2, num_basis=7, generator=0, basis_device=place, **settings)
            for place in (None, "disk")
        )
        torch.testing.assert_close(there.eigenvalues, here.eigenvalues, rtol=0, atol=0)
        torch.testing.assert_close(there.eigenvectors, here.eigenvectors, rtol=0, atol=0)
    plans = SpectrumPlan(k=2, num_bottom=0, num_steps=8, num_deflated=2)
    found = [spectrum(A, plans, generator=0, basis_device=place).top.eigenvalues for place in (None, "disk")]
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert not list(tmp_path.iterdir())


def test_cutting_a_batch_holds_a_few_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coupling, "_CHUNK", 1 << 12)
    of = wide(8)
    batch = next(of.batches())
    with PeakBytes() as meter:
        assert of.cuts.verdict(of.evaluator, batch, 0).problem is None
    assert meter.peak < 3.5 * 4 * of.num_params  # a sum, a gradient, and a copy of its largest part


def test_large_gradients_are_not_held_beside_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    v, found = torch.randn(wide(8).num_params, generator=torch.Generator().manual_seed(0)), []
    for limit in (recording._FRUGAL, 0):
        monkeypatch.setattr(recording, "_FRUGAL", limit)
        hessian, ggn = wide(8, keep_graphs=True), wide(8, keep_graphs=True)
        for of in (hessian, ggn):
            of.trust.revoke("a chain holds none")
        products = [HessianOperator(hessian) @ v, GGNOperator(ggn) @ v]
        assert_close(hessian.gradient(), wide(8).gradient())
        found.append((products, hessian.held_bytes, ggn.held_bytes))
    (held, *sizes), (not_held, *less) = found
    torch.testing.assert_close(not_held, held, rtol=0, atol=0)
    assert all(a - b > 0.99 * 4 * len(v) for a, b in zip(sizes, less, strict=True))


def test_a_basis_may_grow_into_a_quarter_of_a_gpu_where_its_size_was_not_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "gpu_memory", lambda _: GpuMemory(0, 0, 1 << 32))
    gpu = torch.device("cuda", 0)
    assert places.spare_bytes(gpu, size_given=False) == 1 << 30
    assert {places.spare_bytes(gpu, size_given=True), places.spare_bytes("disk", size_given=False)} == {1 << 28}
    assert places.spare_bytes(torch.device("cpu"), size_given=False) == 1 << 28


@pytest.mark.skipif(sys.platform != "linux", reason="pages are let go of on Linux")
def test_pages_of_a_part_are_dropped_and_its_neighbours_kept() -> None:
    x = torch.ones(100_000)
    drop_pages(x[10:90_000])
    drop_pages(x[99_000:99_010])  # less than a page
    assert bool((x[:10] == 1).all())
    assert bool((x[90_000:] == 1).all())
    assert 0 < float(x[10:90_000].sum()) / 89_990 < 0.05  # what lies in pages with others
