"""Every mistake a user can make is met by an error of ours that says what to do."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from curvature import GGNOperator, HessianOperator, Objective, SubmatrixOperator
from curvature.errors import CurvatureError, DataError, InputError, NonFiniteError, ParameterSelectionError
from tests.checks import assert_untouched

X = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
Y = torch.tensor([0, 1, 2, 1, 0, 2, 2])
CE = nn.CrossEntropyLoss()


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def objective(data: Any = (X, Y), model: nn.Module | None = None, loss: Any = CE, **settings: Any) -> Objective:
    return Objective(net() if model is None else model, loss, data, **settings)


# -- operands ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", [HessianOperator, GGNOperator])
@pytest.mark.parametrize(
    ("operand", "message"),
    [
        (torch.zeros(42), r"shape \(43,\) or \(43, k\), got \(42,\)"),
        (torch.zeros(3, 43), r"got \(3, 43\)"),
        (torch.zeros(43, 1, 1), r"got \(43, 1, 1\)"),
        (torch.tensor(1.0), r"got \(\)"),
        (torch.zeros(43, dtype=torch.float64), r"float32, got torch.float64; convert it"),
        (torch.zeros(43, dtype=torch.int64), r"got torch.int64"),
        (torch.zeros(43, device="meta"), "on cpu but X on meta"),
        ([0.0] * 43, "got list"),
    ],
)
def test_bad_operand(operator: type[HessianOperator | GGNOperator], operand: Any, message: str) -> None:
    A = operator(objective())
    with pytest.raises(InputError, match=message):
        A @ operand


def test_blocks_of_another_space() -> None:
    small, large = objective(params="0"), objective()
    with pytest.raises(InputError, match="reach entry 43 of an operator of size 25"):
        SubmatrixOperator(HessianOperator(small), small.space.block("0"), large.space.block("2"))


# -- data -------------------------------------------------------------------------------------------------------------


def one_shot() -> Iterator[tuple[Tensor, Tensor]]:
    yield X, Y


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return X[i] + 0.01 * torch.randn(4), Y[i]


class Growing:
    """A stream that yields one batch more each time."""

    def __init__(self) -> None:
        self.length = 1

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from [(X, Y)] * self.length
        self.length += 1


class RunsDry:
    def __init__(self) -> None:
        self.batches = iter([(X, Y)])

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from self.batches


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "data is an empty list"),
        (one_shot(), "generator, which can be walked only once"),
        (iter([(X, Y)]), "walked only once"),
        (zip([X], [Y], strict=True), "zip, which can be walked only once"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_bad_data(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        objective(data)


@pytest.mark.parametrize("keep_graphs", [True, False, "auto"])
@pytest.mark.parametrize(
    "build",
    [
        lambda: DataLoader(Augmented(), batch_size=3),
        lambda: DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True, drop_last=True),
        Growing,
    ],
    ids=["augmenting", "drop_last", "growing"],
)
def test_loader_whose_data_change(build: Callable[[], Any], keep_graphs: Any) -> None:
    subject = objective(build(), keep_graphs=keep_graphs)
    with pytest.raises(DataError, match="other data at each pass"):  # noqa: PT012 - which pass notices is left open
        for _ in range(8):
            subject.loss()
            subject.release()


def test_loader_without_batches_or_run_dry() -> None:
    with pytest.raises(DataError, match="no batch"):
        objective(DataLoader(TensorDataset(X[:0], Y[:0]))).loss()
    dry = objective(RunsDry(), keep_graphs=False)
    dry.loss()
    with pytest.raises(DataError, match="no batch"):
        dry.loss()


@pytest.mark.parametrize("batch", [(X, Y, Y), (X,), {"x": X, "y": Y}, X], ids=["three", "one", "mapping", "tensor"])
def test_batch_that_is_no_pair(batch: Any) -> None:
    if isinstance(batch, dict):
        batch = {**batch, "z": Y}
    with pytest.raises(DataError, match=r"pair \(inputs, targets\).*forward="):
        objective([batch]).loss()


def test_all_weights_zero() -> None:
    with pytest.raises(DataError, match="weights of all batches are zero"):
        objective((X, torch.full_like(Y, -100))).loss()


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(4), r"the model couples the examples of a batch .*model\.eval\(\)"),
        (nn.Dropout(0.5), "dropout masks are fixed by batch"),
    ],
)
def test_shuffling_where_the_order_matters(layer: nn.Module, message: str) -> None:
    loader = DataLoader(TensorDataset(X, Y), batch_size=4, shuffle=True)
    subject = objective(loader, model=nn.Sequential(layer, net()))
    with pytest.raises(DataError, match=message):  # noqa: PT012 - one pass may by chance repeat the order
        for _ in range(4):
            subject.loss()
            subject.release()


def test_micro_batches_of_batch_norm() -> None:
    with pytest.raises(DataError, match="micro_batch="):
        objective(model=nn.Sequential(nn.BatchNorm1d(4), net()), micro_batch=2).loss()


def test_micro_batches_of_scalars() -> None:
    with pytest.raises(DataError, match="first dimension"):
        objective([(torch.tensor(1.0), torch.tensor(1))], micro_batch=2).loss()


# -- values -----------------------------------------------------------------------------------------------------------


def test_nan_in_a_parameter_is_named() -> None:
    model = net()
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"loss is nan on batch 0.*'2.weight'"):
        objective(model=model).loss()


def test_nan_in_the_data_names_the_batch() -> None:
    bad = X.clone()
    bad[5, 1] = float("nan")
    data = list(zip(bad.split(2), Y.split(2), strict=True))
    with pytest.raises(NonFiniteError, match="on batch 2: the batch itself"):
        objective(data).loss()


def test_nan_in_a_buffer_is_named() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), net()).eval()
    model.get_buffer("0.running_mean").fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"the buffer '0.running_mean'"):
        objective(model=model).loss()


def test_overflow_of_outputs_and_of_the_loss() -> None:
    with pytest.raises(NonFiniteError, match="outputs are not: they overflow"):
        objective(forward=lambda m, b: ((100 * m(b[0]).abs() + 100).exp(), b[1])).loss()
    with pytest.raises(NonFiniteError, match="the loss function itself"):
        objective(loss=lambda z, _: (z - z).sum() / (z - z).sum()).loss()


def test_infinite_gradient_is_named() -> None:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        model.bias.zero_()
    subject = objective(
        forward=lambda m, b: (m.weight.sum() + m.bias.norm().sqrt(), b[1]), model=model, loss=lambda z, _: z
    )
    with pytest.raises(NonFiniteError, match="gradient of 'bias' is not finite on batch 0"):
        HessianOperator(subject) @ torch.zeros(15)


# -- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": lambda x: x}, "model must be a Module, got a function"),
        ({"loss": nn.CrossEntropyLoss(reduction="none")}, "'mean' or 'sum', got 'none'"),
        ({"loss": functools.partial(F.mse_loss, reduction="none")}, "got 'none'"),
        ({"loss": "cross_entropy"}, "loss must be callable or None, got 'cross_entropy'"),
        ({"loss": None}, "loss=None needs a forward"),
        ({"keep_graphs": "yes"}, "True, False or 'auto', got 'yes'"),
        ({"memory_budget": -1}, ">= 0, got -1"),
        ({"micro_batch": 0}, "at least 1, got 0"),
        ({"device": "meta"}, "device must be a device that there is here"),
    ],
)
def test_bad_arguments(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        objective(**settings)


@pytest.mark.parametrize("params", ["wieght", ["0", "0.wight"], [], lambda _n, _t: False, nn.Linear(2, 2)])
def test_bad_selection(params: Any) -> None:
    with pytest.raises(ParameterSelectionError):
        objective(params=params)


def test_unknown_pattern_names_what_is_near() -> None:
    with pytest.raises(ParameterSelectionError, match=r"'0.weigth'.*near: '0.weight'"):
        objective(params="0.weigth")
    with pytest.raises(ParameterSelectionError, match=r"'2.biass'.*'2.bias'"):
        HessianOperator(objective()).restrict("2.biass")
    with pytest.raises(ParameterSelectionError, match=r"'0.weight'"):
        objective().restrict("2").restrict("0.weight")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": lambda z, y: (z - y[:, None]).abs()}, r"tensor with one entry, got \(7, 3\)"),
        ({"loss": lambda _z, _y: 1.0}, "one entry, got float"),
        ({"loss": None, "forward": lambda m, b: (m(b[0]), b[1])}, "one entry, got tuple"),
        ({"forward": lambda m, b: m(b[0])}, r"must return \(outputs, targets\), got a tensor of shape \(7, 3\)"),
        ({"forward": lambda m, b: (m(b[0]), b[1], b[1])}, "got a tuple of 3"),
        ({"weight": lambda _: -1.0}, "finite and not negative, got -1.0"),
        ({"weight": lambda _: float("nan")}, "finite and not negative, got nan"),
    ],
)
def test_bad_functions(settings: dict[str, Any], message: str) -> None:
    model = net()
    with assert_untouched(model), pytest.raises(InputError, match=message):
        objective(model=model, **settings).loss()


def test_mapping_with_labels_needs_a_weight() -> None:
    batch = {"input_ids": X, "labels": Y}
    with pytest.raises(InputError, match="weight="):
        objective([batch], loss=None, forward=lambda m, b: F.cross_entropy(m(b["input_ids"]), b["labels"])).loss()


def test_gauss_newton_needs_outputs_and_loss() -> None:
    with pytest.raises(InputError, match="split between model and loss"):
        GGNOperator(objective(loss=None, forward=lambda m, b: CE(m(b[0]), b[1])))
    subject = objective(loss=lambda z, y: CE(z[0], y), forward=lambda m, b: ((m(b[0]), 1), b[1]), weight=lambda _: 1.0)
    assert torch.isfinite(HessianOperator(subject) @ torch.ones(43)).all()
    with pytest.raises(InputError, match="outputs that are one tensor, got tuple"):
        GGNOperator(subject) @ torch.ones(43)


def test_all_errors_are_ours() -> None:
    for error in (DataError, InputError, NonFiniteError, ParameterSelectionError):
        assert issubclass(error, CurvatureError)
