"""Looks away from the point: right values, with their error over the data, and no trace."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from curvature.errors import InputError, NonFiniteError
from curvature.objective.objective import Objective
from curvature.objective.shift import gradient_at, loss_at, rows_at_once, shifted
from curvature.operators.hessian import HessianOperator
from tests.cases import CASES, Case
from tests.ranks import IN_TWO_PROCESSES, in_two_processes, process_group


def regression(n: int = 30, **settings: object) -> tuple[Objective, Tensor, Tensor]:
    x, y = torch.randn(n, 3).double(), torch.randn(n, 1).double()
    data = list(zip(x.split(7), y.split(7), strict=True))
    return Objective(nn.Linear(3, 1).double(), nn.MSELoss(), data, **settings), x, y  # type: ignore[arg-type]


def snapshot(model: nn.Module) -> list[tuple[int, int, bool, Tensor]]:
    tensors = [*model.parameters(), *model.buffers()]
    return [(t.data_ptr(), t._version, t.requires_grad, t.detach().clone()) for t in tensors]


def assert_same(before: list[tuple[int, int, bool, Tensor]], after: list[tuple[int, int, bool, Tensor]]) -> None:
    for (pointer, version, grad, values), (pointer2, version2, grad2, values2) in zip(before, after, strict=True):
        assert (pointer, version, grad) == (pointer2, version2, grad2)
        assert torch.equal(values, values2)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_is_the_loss_of_the_model_with_those_parameters(case: Case) -> None:
    model, (x, y) = case.model(), case.data()
    objective = Objective(model, case.loss, (x, y))
    there = objective.space.current() + 0.1 * torch.randn(objective.num_params, dtype=torch.float64)
    before, state = snapshot(model), torch.get_rng_state()
    value = loss_at(objective, there).value
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)
    moved = Objective(case.model(), case.loss, (x, y))
    with torch.no_grad():
        for p, values in zip(moved.space.tensors.values(), moved.space.to_dict(there).values(), strict=True):
            p.copy_(values)
    assert value == pytest.approx(float(moved.loss()), rel=1e-12)


def test_it_equals_a_functional_call_and_its_gradient() -> None:
    objective, x, y = regression()
    there = torch.randn(4, dtype=torch.float64, requires_grad=True)
    loss = nn.functional.mse_loss(functional_call(objective.model, objective.space.to_dict(there), (x,)), y)
    (gradient,) = torch.autograd.grad(loss, there)
    expected = loss.item()
    assert loss_at(objective, there).value == pytest.approx(expected, rel=1e-13)
    value, found = gradient_at(objective, there)
    assert value == pytest.approx(expected, rel=1e-13)
    torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-13)


def test_graphs_kept_at_the_point_stay_valid() -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    objective = Objective(model, nn.MSELoss(), (torch.randn(9, 3).double(), torch.randn(9, 1).double()))
    H, v = HessianOperator(objective), torch.randn(objective.num_params, dtype=torch.float64)
    product, point = H @ v, objective.freshness.point()
    loss_at(objective, v)
    gradient_at(objective, v)
    assert objective.keeps_all_graphs
    assert objective.freshness.point() is point
    torch.testing.assert_close(H @ v, product, rtol=0, atol=0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_everything_is_restored_after_an_error(error: type[BaseException]) -> None:
    class Breaks(nn.BatchNorm1d):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise error

    model = nn.Sequential(nn.Linear(3, 3), Breaks(3)).train()
    objective = Objective(model, nn.MSELoss(), (torch.randn(5, 3), torch.randn(5, 3)))
    there = torch.randn(objective.num_params)
    before, state = snapshot(model), torch.get_rng_state()
    with pytest.raises(error):
        loss_at(objective, there)
    assert_same(before, snapshot(model))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_error_over_the_data_is_that_of_the_mean() -> None:
    objective, x, y = regression(28)
    residuals = (objective.model(x) - y).detach().square()
    means = torch.stack([r.mean() for r in residuals.split(7)])
    found = loss_at(objective, objective.space.current())
    assert found.value == pytest.approx(float(means.mean()), rel=1e-13)
    assert found.stderr == pytest.approx(float(means.std() / 2), rel=1e-12)
    whole = Objective(objective.model, nn.MSELoss(), (x, y))
    assert math.isnan(loss_at(whole, whole.space.current()).stderr)


def test_the_error_over_the_data_is_right_over_many_draws() -> None:
    """400 data sets of four unequal batches: z-scores of the loss have standard deviation 1, up to t-distribution's."""
    generator, scores = torch.Generator().manual_seed(0), []
    model = nn.Linear(1, 1, bias=False).double()
    sizes = [12, 8, 10, 9, 11, 10, 9, 11, 12, 8, 10, 10]
    for _ in range(400):
        y = torch.randn(sum(sizes), 1, generator=generator, dtype=torch.float64)
        data = [(torch.ones_like(part), part) for part in y.split(sizes)]
        found = loss_at(Objective(model, nn.MSELoss(), data), torch.zeros(1, dtype=torch.float64))
        scores.append((found.value - 1) / found.stderr)
    spread = torch.tensor(scores).std()
    assert spread == pytest.approx((11 / 9) ** 0.5, abs=0.12)  # Student's t with 11 degrees of freedom


def test_sums_scale_and_ignored_batches_do_not_count() -> None:
    objective, x, y = regression(28)
    data = list(zip(x.split(7), y.split(7), strict=True))
    summed = Objective(objective.model, nn.MSELoss(reduction="sum"), data)
    mean, total = (loss_at(o, o.space.current()) for o in (objective, summed))
    assert total.value == pytest.approx(28 * mean.value)
    assert total.stderr == pytest.approx(28 * mean.stderr)
    weighted = Objective(objective.model, nn.MSELoss(), data, weight=lambda batch: float(batch[0] is not data[0][0]))
    assert loss_at(weighted, weighted.space.current()).value == pytest.approx(float(weighted.loss()))


def work(rank: int, folder: str) -> None:
    with process_group(rank, folder):
        torch.manual_seed(0)
        objective, x, y = regression(28)
        mine = list(zip(x.split(7), y.split(7), strict=True))[rank * 3 : 3 + rank]  # three batches and one
        part = Objective(objective.model, nn.MSELoss(), mine, process_group=dist.group.WORLD)
        found, whole = (loss_at(o, o.space.current()) for o in (part, objective))
        assert found.value == pytest.approx(whole.value, rel=1e-12)
        assert found.stderr == pytest.approx(whole.stderr, rel=1e-12)


@IN_TWO_PROCESSES
def test_two_ranks_equal_one_process(tmp_path: Path) -> None:
    in_two_processes(work, str(tmp_path))


def test_an_overflow_is_nan_there_and_an_error_for_gradients() -> None:
    objective, *_ = regression()
    far = torch.full((4,), 1e200, dtype=torch.float64)
    assert math.isnan(loss_at(objective, far).value)
    with pytest.raises(NonFiniteError):
        gradient_at(objective, far)


def test_forward_passes_that_differentiate_themselves() -> None:
    def penalty(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        loss = nn.functional.mse_loss(model(batch[0]), batch[1])
        (g,) = torch.autograd.grad(loss, [model.weight], create_graph=True)  # type: ignore[list-item]
        return loss + g.square().sum()

    x, y = torch.randn(8, 2).double(), torch.randn(8, 1).double()
    objective = Objective(nn.Linear(2, 1).double(), None, (x, y), forward=penalty)
    assert loss_at(objective, objective.space.current()).value == pytest.approx(float(objective.loss()), rel=1e-12)


def test_buffers_are_set_and_restored() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).double().eval()
    x, y = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    objective = Objective(model, nn.MSELoss(), (x, y))
    before = snapshot(model)
    mean = torch.ones(3, dtype=torch.float64)
    found = loss_at(objective, objective.space.current(), buffers={"1.running_mean": mean}).value
    assert_same(before, snapshot(model))
    model[1].running_mean = mean  # type: ignore[union-attr]
    assert found == pytest.approx(float(objective.loss()), rel=1e-13)


def test_bad_arguments() -> None:
    objective, *_ = regression()
    with pytest.raises(InputError, match=r"shape \(4,\), got \(3,\)"), shifted(objective, torch.zeros(3)):
        pass
    buffers = {"no": torch.zeros(1)}
    with pytest.raises(InputError, match="'no'"), shifted(objective, torch.zeros(4), buffers=buffers):
        pass


def test_its_error_under_class_weights_is_that_of_a_ratio_of_sums() -> None:
    """Against a bootstrap of single examples, whose weights are those of their classes."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(200, 4, generator=g, dtype=torch.float64)
    y = (torch.rand(200, generator=g) < 0.15).long()
    weights = torch.tensor([1.0, 12.0], dtype=torch.float64)
    model = nn.Linear(4, 2).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(2, 4, generator=g))
        model.bias.zero_()
    loss = nn.CrossEntropyLoss(weight=weights)
    objective = Objective(model, loss, [(x[i : i + 1], y[i : i + 1]) for i in range(len(x))])
    found = loss_at(objective, objective.space.current())
    single = nn.functional.cross_entropy(model(x), y, reduction="none").detach()
    drawn = torch.randint(len(x), (20_000, len(x)), generator=g)
    means = (weights[y] * single)[drawn].sum(1) / weights[y][drawn].sum(1)
    assert found.stderr == pytest.approx(float(means.std()), rel=0.04)


def in_pieces(model: nn.Module, size: int | None = 4, **settings: object) -> Objective:
    x, y = torch.randn(22, 3, 4, 4).double(), torch.randint(5, (22,))
    y[:4] = -100  # a piece that does not count
    objective = Objective(model.double(), nn.CrossEntropyLoss(), (x, y), micro_batch=size, **settings)  # type: ignore[arg-type]
    objective.gradient()
    return objective


def small_net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 5))


@pytest.mark.parametrize("size", [None, 4, 5])
def test_examples_that_share_a_pass_have_the_losses_of_their_pieces(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest output holds 22 x 4 x 2 x 2 entries and the model 197: without caches, two passes."""
    objective, seen = in_pieces(small_net(), size), list[int]()
    monkeypatch.setattr("curvature.objective.shift._CACHE", 0)
    at_once = rows_at_once(objective)
    assert at_once == 11
    there = torch.randn(objective.num_params, dtype=torch.float64)
    apart = loss_at(objective, there)
    handle = objective.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = loss_at(objective, there, at_once=at_once)
    handle.remove()
    assert seen == [11, 11]
    assert found.value == pytest.approx(apart.value, rel=1e-12)
    assert found.stderr == pytest.approx(apart.stderr, rel=1e-11, nan_ok=True)
    assert math.isnan(apart.stderr) == (size is None)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("size", [None, 4, 5])
def test_gradients_of_shared_passes_are_those_of_pieces(size: int | None, reduction: str) -> None:
    x, y = torch.randn(22, 3, 4, 4).double(), torch.randint(5, (22,))
    y[:4] = -100
    loss = nn.CrossEntropyLoss(torch.rand(5).double() + 0.5, reduction=reduction, label_smoothing=0.1)
    data, model = [(x[:15], y[:15]), (x[15:], y[15:])], nn.Sequential(small_net(), nn.BatchNorm1d(5).eval()).double()
    objective = Objective(model, loss, data, micro_batch=size)
    there, seen = torch.randn(objective.num_params, dtype=torch.float64), list[int]()
    value, gradient = gradient_at(objective, there)
    before = snapshot(objective.model)
    handle = objective.model.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    found = gradient_at(objective, there, at_once=6)
    handle.remove()
    assert_same(before, snapshot(objective.model))
    assert seen == [6, 6, 3, 6, 1]
    assert found[0] == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(found[1], gradient, rtol=1e-10, atol=1e-13)


def test_a_gradient_of_shared_passes_that_overflows_is_an_error() -> None:
    objective = in_pieces(small_net())
    with pytest.raises(NonFiniteError, match="not finite at that point"):
        gradient_at(objective, torch.full((objective.num_params,), 1e308, dtype=torch.float64), at_once=11)
    with pytest.raises(InputError, match="must be positive"):
        gradient_at(objective, objective.space.current(), at_once=0)


def test_pieces_share_one_pass_where_outputs_are_small_and_whole_data_stay_as_they_are() -> None:
    assert rows_at_once(in_pieces(small_net())) == 22
    assert rows_at_once(in_pieces(small_net(), None)) is None


def test_a_shared_pass_that_overflows_is_no_number() -> None:
    objective = in_pieces(small_net())
    there = torch.full((objective.num_params,), 1e308, dtype=torch.float64)
    assert math.isnan(loss_at(objective, there, at_once=22).value)


def test_what_couples_examples_or_cannot_be_cut_again_shares_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = torch.randn(22, 3, 4, 4).double(), torch.randint(5, (22,))
    batches = [(x[:8], y[:8]), (x[8:], y[8:])]

    def shares(model: nn.Module, data: object, **settings: object) -> int | None:
        objective = Objective(model.double(), data=data, **{"loss": nn.CrossEntropyLoss(), **settings})  # type: ignore[arg-type]
        objective.loss()
        return rows_at_once(objective)

    assert shares(small_net(), batches, micro_batch=3) == 14
    dropping = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(48, 5))
    assert shares(dropping, (x, y), micro_batch=3) is None
    normalising = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(48), nn.Linear(48, 2), nn.Linear(2, 5))
    monkeypatch.setattr("curvature.objective.shift._CACHE", 0)
    assert shares(normalising, (x, y)) is None  # the statistics of some are not those of all
    monkeypatch.undo()
    assert shares(small_net(), batches, micro_batch=3, keep_graphs=False) is None
    assert shares(small_net(), DataLoader(batches, batch_size=None), micro_batch=3) is None
    assert shares(small_net(), (x, y), micro_batch=3, weight=lambda batch: len(batch[0])) is None
    forward = {"loss": None, "forward": lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])}
    assert shares(small_net(), (x, y), micro_batch=3, **forward) is None


class Dropping(nn.Module):
    """A model with dropout that fits its targets but for a rounding: masks hardly show in its losses there."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((3,), 1e-9, dtype=torch.float64))
        self.shift = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.shift + nn.functional.dropout(self.scale * x, 0.5, self.training)


@pytest.mark.parametrize("hidden", ["small", "zero"])
def test_dropout_that_hardly_shows_at_the_point_shares_no_pass(hidden: str) -> None:
    x = torch.randn(22, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    model = Dropping()
    if hidden == "zero":
        nn.init.zeros_(model.scale)
    objective = Objective(model, nn.MSELoss(), (x, torch.ones_like(x)), micro_batch=4)
    objective.gradient()
    assert rows_at_once(objective) is None


def test_a_model_that_fits_still_shares_its_passes() -> None:
    x = torch.randn(22, 3, dtype=torch.float64)
    model = nn.Linear(3, 2).double()
    objective = Objective(model, nn.MSELoss(), (x, model(x).detach()), micro_batch=4)
    objective.gradient()
    assert rows_at_once(objective) == 22


def test_what_takes_no_shared_pass_says_so() -> None:
    x, y = torch.randn(22, 3).double(), torch.randn(22, 2).double()

    def ask(model: nn.Module, loss: object = None, data: object = (x, y), at_once: int = 22, **more: object) -> None:
        objective = Objective(model.double(), loss or nn.MSELoss(), data, micro_batch=4, **more)  # type: ignore[arg-type]
        loss_at(objective, objective.space.current(), at_once=at_once)

    def own(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.mse_loss(model(batch[0]), batch[1])

    class InTwo(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return super().forward(x), x

    def of_two(z: tuple[Tensor, Tensor], t: Tensor) -> Tensor:
        return nn.functional.mse_loss(z[0], t)

    for at_once in (0, -3):
        with pytest.raises(InputError, match="must be positive"):
            ask(nn.Linear(3, 2), at_once=at_once)
    with pytest.raises(InputError, match="without weight="):
        ask(nn.Linear(3, 2), weight=lambda batch: len(batch[0]))
    with pytest.raises(InputError, match="batches in memory"):
        ask(nn.Linear(3, 2), data=DataLoader([(x, y)], batch_size=None))
    with pytest.raises(InputError, match="outputs are a tensor"):
        ask(InTwo(3, 2), of_two)
    with pytest.raises(InputError, match="draws no random numbers"):
        ask(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)))
    objective = Objective(nn.Linear(3, 2).double(), None, (x, y), forward=own)
    with pytest.raises(InputError, match="loss from outputs and targets"):
        loss_at(objective, objective.space.current(), at_once=22)
