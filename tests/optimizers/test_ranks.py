"""Two processes over gloo take the steps of one on the joined batch, in every form, and stay equal."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from analysis import GradientPenalty
from curvature.errors import CheckFailedError, InputError, RankError
from optimizers import (
    ESGD,
    KFAC,
    SASSHA,
    AdaHessian,
    ForwardGradient,
    GaussNewton,
    NaturalGradient,
    NewtonCG,
    Sharded,
    Sophia,
    TrustRegionNewton,
)
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group

pytestmark = IN_TWO_PROCESSES
STEPS = 6
FORMS = ("closure", "closure through ddp", "accumulate", "micro-batches", "ddp gradients", "closure, one rank unused")


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return torch.randn(12, 3, dtype=torch.float64), torch.randint(0, 3, (12,))


class Model(nn.Module):
    """With a part that only positive sums of a batch use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        self.extra = nn.Linear(3, 3, bias=False).double()
        self.never = nn.Linear(3, 3, bias=False).double()

    def forward(self, x: Tensor, extra: bool = False) -> Tensor:
        return self.net(x) + (self.extra(x) if extra else 0)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def run(form: str, rank: int, ranks: int, group: Any) -> Tensor:
    torch.manual_seed(100 + rank)  # ranks share no global seed
    model = Model()
    x, y = data()
    rows = slice(rank * 12 // ranks, (rank + 1) * 12 // ranks)
    partly = form == "closure, one rank unused"
    used = [model.net, model.extra, model.never] if partly else [model.net]
    optimizer = AdaHessian(
        [p for m in used for p in m.parameters()], lr=0.05, update_every=2, num_probes=2, process_group=group
    )

    def loss_of(part: slice) -> Tensor:
        if partly and ranks == 1:  # the joined batch: the second half uses the extra part
            first, second = slice(0, 6), slice(6, 12)
            return (F.cross_entropy(model(x[first]), y[first]) + F.cross_entropy(model(x[second], True), y[second])) / 2
        return F.cross_entropy(model(x[part], partly and rank == 1), y[part])

    ddp = DistributedDataParallel(model.net) if ranks > 1 and "ddp" in form else model.net
    middle = (rows.start + rows.stop) // 2
    first_half, second_half = slice(rows.start, middle), slice(middle, rows.stop)
    for _ in range(STEPS):
        if form in ("closure", "closure, one rank unused"):
            optimizer.step(lambda: loss_of(rows))
            continue
        if form == "closure through ddp":
            optimizer.step(lambda: F.cross_entropy(ddp(x[rows]), y[rows]))
            continue
        optimizer.zero_grad()
        if form == "accumulate":
            optimizer.accumulate(lambda: loss_of(rows))
        elif form == "ddp gradients":
            F.cross_entropy(ddp(x[rows]), y[rows]).backward()
            if optimizer.curvature_due:
                optimizer.accumulate(lambda: loss_of(rows), part="curvature")
        else:
            optimizer.accumulate(lambda: loss_of(first_half), weight=0.5, synchronize=False)
            optimizer.accumulate(lambda: loss_of(second_half), weight=0.5)
        optimizer.step()
    assert all(p not in optimizer.state for p in model.never.parameters())
    return flat(model)


def ddp_misuse(group: Any) -> str:
    """Return what the error says where curvature is due and DDP's gradients have no graph."""
    x, y = data()
    ddp = DistributedDataParallel(Model().net)
    F.cross_entropy(ddp(x), y).backward()
    try:
        AdaHessian(ddp.parameters(), process_group=group).step()
    except CheckFailedError as error:
        return str(error)
    return ""


def sampled(group: Any) -> tuple[Tensor, Tensor]:
    """Return the curvature of two ranks with the same data, from sampled targets, and that of one alone."""
    model = Model().net
    x, y = data()
    own, joined = (
        AdaHessian(
            model.parameters(),
            lr=0.0,
            betas=(0.0, 0.0),
            curvature="gauss-newton-bartlett",
            loss=F.cross_entropy,
            process_group=g,
        )
        for g in (None, group)
    )
    values = []
    for optimizer in (own, joined):
        optimizer.step(lambda: (model(x), y))
        values.append(torch.cat([optimizer.state[p]["exp_hessian_diag_sq"].reshape(-1) for p in model.parameters()]))
    return values[1].sqrt(), values[0].sqrt()


UNEQUAL: dict[str, Any] = {
    "NaturalGradient": lambda p, **k: NaturalGradient(p, damping=0.1, rtol=1e-12, max_iterations=60, **k),
    "NewtonCG": lambda p, **k: NewtonCG(p, curvature="ggn", stop=None, rtol=1e-12, keep=None, **k),
    "TrustRegionNewton": lambda p, **k: TrustRegionNewton(p, rtol=1e-12, **k),
    "AdaHessian": lambda p, **k: AdaHessian(p, lr=0.05, **k),
    "ESGD": lambda p, **k: ESGD(p, update_every=1, **k),
    "SASSHA": lambda p, **k: SASSHA(p, update_every=1, **k),
}


DIFFERENT = {"weights": r"parameter 0 of shape \(4, 3\)", "seed": "differ in what they gave", "failure": "on purpose"}


def unequal(name: str, rank: int, ranks: int, group: Any, reduction: str) -> Tensor:
    """Take steps where rank 0 holds 9 examples, two of them ignored, and rank 1 holds 3; or one process all."""
    model = Model().net
    x, y = data()
    y[:2] = -100
    rows = slice(12) if ranks == 1 else (slice(9), slice(9, 12))[rank]
    optimizer = UNEQUAL[name](model.parameters(), loss=nn.CrossEntropyLoss(reduction=reduction), process_group=group)
    for _ in range(3):
        optimizer.step(lambda: (model(x[rows]), y[rows]))
    return flat(model)


def refused(name: str, what: str, rank: int, group: Any) -> str:
    """Return what a step says where rank 1 differs in weights, in its seed, or fails."""
    model = Model().net
    x, y = data()
    if rank == 1 and what == "weights":
        with torch.no_grad():
            next(model.parameters())[:2].neg_()
    more = {"seed": rank} if what == "seed" else {}
    optimizer = UNEQUAL[name](model.parameters(), loss=F.cross_entropy, process_group=group, **more)

    def closure() -> tuple[Tensor, Tensor]:
        if rank == 1 and what == "failure":
            raise ZeroDivisionError("on purpose")
        return model(x), y

    try:
        optimizer.step(closure)
    except (RankError, ZeroDivisionError) as error:
        return str(error)
    return "taken"


IN_PARTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdaHessian": (AdaHessian, {"lr": 0.1}),
    "Sophia": (Sophia, {"lr": 0.05, "curvature": "hessian-diagonal"}),
    "SASSHA": (SASSHA, {"lr": 0.1}),
    "NewtonCG": (NewtonCG, {}),
}


def in_parts(name: str, rank: int | None) -> Tensor:
    """Return the parameters after some steps: of a model in parts on two ranks, or on one process."""
    from torch.distributed.fsdp import fully_shard

    model, (method, settings) = Model().net, IN_PARTS[name]
    x, y = data()
    rows = slice(12) if rank is None else slice(6 * rank, 6 * rank + 6)
    if rank is not None:
        fully_shard(model[0])
        fully_shard(model)
        with pytest.raises(InputError, match=r"optimizers\.Sharded"):
            method(model.parameters(), **settings)
    optimizer = method(model.parameters(), **settings) if rank is None else Sharded(model, method, **settings)
    for _ in range(3):
        optimizer.step(lambda: F.cross_entropy(model(x[rows]), y[rows]))
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return torch.cat([p.detach().reshape(-1) for p in whole])


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        group = dist.group.WORLD
        results: dict[str, Any] = {form: run(form, rank, 2, group) for form in FORMS}
        results |= {
            f"{name}, {reduction}": unequal(name, rank, 2, group, reduction)
            for name in UNEQUAL
            for reduction in ("mean", "sum")
        }
        results |= {f"{n}, {what}": refused(n, what, rank, group) for n in UNEQUAL for what in DIFFERENT}
        results["misuse"] = ddp_misuse(group)
        results["sampled"] = sampled(group)
        results |= {f"{name}, in parts": in_parts(name, rank) for name in IN_PARTS}
        torch.save(results, Path(folder) / f"{rank}.pt")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    in_two_processes(work, str(folder))
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("form", FORMS)
def test_two_ranks_take_the_steps_of_one(two_ranks: list[dict[str, Any]], form: str) -> None:
    a, b = (results[form] for results in two_ranks)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    alone = run("closure, one rank unused" if form == FORMS[-1] else "closure", 0, 1, None)
    torch.testing.assert_close(a, alone, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_with_unequal_parts_take_the_steps_of_one(
    two_ranks: list[dict[str, Any]], name: str, reduction: str
) -> None:
    a, b = (results[f"{name}, {reduction}"] for results in two_ranks)
    torch.testing.assert_close(a, b, rtol=0, atol=0)
    torch.testing.assert_close(a, unequal(name, 0, 1, None, reduction), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("what", DIFFERENT)
@pytest.mark.parametrize("name", UNEQUAL)
def test_ranks_that_differ_or_fail_raise_on_all(two_ranks: list[dict[str, Any]], name: str, what: str) -> None:
    for results in two_ranks:
        assert re.search(DIFFERENT[what], results[f"{name}, {what}"])


def test_micro_batches_of_all_ranks_draw_apart() -> None:
    """Targets drawn for the same data on every rank and in every micro-batch differ."""

    class Rank:
        group_name = "some"

        def __init__(self, place: int) -> None:
            self.place = place

        def size(self) -> int:
            return 3

        def rank(self) -> int:
            return self.place

    model = Model().net
    x, y = data()
    draws = set()
    for rank in range(3):
        optimizer = Sophia(model.parameters(), loss=F.cross_entropy, process_group=Rank(rank))  # type: ignore[arg-type]
        before = torch.zeros((), dtype=torch.float64)
        for _ in range(3):
            optimizer.accumulate(lambda: (model(x), y), synchronize=False)
            assert optimizer._sums is not None
            total = torch.stack([t.sum() for t in optimizer._sums[0]]).sum()
            draws.add(round(float(total - before), 12))
            before = total
    assert len(draws) == 9


@pytest.mark.parametrize("name", IN_PARTS)
def test_a_model_in_parts_takes_the_steps_of_one_process(two_ranks: list[dict[str, Any]], name: str) -> None:
    for results in two_ranks:
        torch.testing.assert_close(results[f"{name}, in parts"], in_parts(name, None), rtol=1e-9, atol=1e-12)


ALONE = {
    "AdaHessian": lambda params: AdaHessian(params),
    "SASSHA": lambda params: SASSHA(params),
    "Sophia": lambda params: Sophia(params, loss=F.cross_entropy),
    "NewtonCG": lambda params: NewtonCG(params),
    "GaussNewton": lambda params: GaussNewton(params, loss=F.cross_entropy),
    "KFAC": lambda params: KFAC(params, lr=0.1, loss=F.cross_entropy),
    "ForwardGradient": lambda params: ForwardGradient(params, torch.optim.SGD, lr=0.1),
}


def alone(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        x, y = data()
        for name, make in ALONE.items():
            ddp = DistributedDataParallel(Model().net)
            optimizer, before = make(ddp.parameters()), flat(ddp)
            pairs = optimizer.loss is not None

            def closure(ddp: nn.Module = ddp, pairs: bool = pairs) -> Any:
                return (ddp(x), y) if pairs else F.cross_entropy(ddp(x), y)

            with pytest.raises(InputError, match=f"averages {name} does not see"):
                optimizer.step(closure)
            assert torch.equal(flat(ddp), before)
        ddp = DistributedDataParallel(Model().net)
        penalty = GradientPenalty(torch.optim.SGD(ddp.parameters(), lr=0.1), strength=0.1)
        with pytest.raises(InputError, match="averages GradientPenalty does not see"):
            penalty.step(lambda: F.cross_entropy(ddp(x), y))


def test_a_wrapper_of_ranks_that_an_optimizer_does_not_join_is_refused(tmp_path: Path) -> None:
    in_two_processes(alone, str(tmp_path))


def test_errors_say_what_to_call(two_ranks: list[dict[str, Any]]) -> None:
    for results in two_ranks:
        assert "process_group= given to the optimizer" in results["misuse"]


def test_ranks_sample_targets_apart_and_average_them(two_ranks: list[dict[str, Any]]) -> None:
    (joined, alone), (other, _) = (results["sampled"] for results in two_ranks)
    torch.testing.assert_close(joined, other, rtol=0, atol=0)
    second = 2 * joined - alone  # what the second rank drew
    assert bool((second >= -1e-12).all())
    assert not torch.allclose(second, alone, rtol=0.1)
