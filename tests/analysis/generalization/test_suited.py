"""What a training cannot serve is refused before it begins, in a sentence; what it can is what it says."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from analysis import double_descent, lottery_tickets, random_labels, regularization_by_curvature
from analysis.generalization.data import labelled
from analysis.generalization.descent.measure import DescentPlan, setup
from analysis.generalization.ensemble import Ensemble
from analysis.generalization.point import curvature_at
from curvature import GGNOperator, Objective
from curvature.errors import DataError, InputError
from curvature.linop import to_dense

G = torch.Generator().manual_seed(0)
X = torch.randn(30, 4, generator=G)
Y = torch.randint(0, 3, (30,), generator=G)
SHORT: dict[str, Any] = {"steps": 2, "repeats": 2, "processes": 1, "generator": 0}
ALONG: dict[str, Any] = {"vary": "samples", "values": (8, 12, 20), **SHORT}


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def prepared(own: Any, y: Tensor = Y, test: Any = None, **plan: Any) -> Any:
    objective = Objective(net(), own, (X, y))
    return setup(objective, DescentPlan(vary="samples", **plan), torch.Generator().manual_seed(0), test)


def branching(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels) if labels.max() >= 0 else outputs.sum()


def soft_margin(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.softplus(outputs - outputs.gather(-1, labels[..., None])).mean()


def summed(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 1.0])), "--loss cross-entropy"),
        (nn.CrossEntropyLoss(torch.tensor([1.0, 5.0, 1.0]).double()), "--loss cross-entropy"),
        (nn.CrossEntropyLoss(reduction="sum"), "each example counts alike"),
        (nn.CrossEntropyLoss(ignore_index=1), "each example counts alike"),
        (summed, "each example counts alike"),
        (branching, "torch.vmap"),
    ],
)
def test_losses_in_which_examples_count_differently_are_refused(loss: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(loss)
    prepared(loss, loss="cross-entropy")  # the way out
    for study in (random_labels, regularization_by_curvature):
        with pytest.raises(InputError, match=message):
            study(Objective(net(), loss, (X, Y)), width=5, **{**SHORT, "steps": 10})


@pytest.mark.parametrize(
    "loss",
    [nn.CrossEntropyLoss(label_smoothing=0.2), soft_margin, lambda z, t: F.nll_loss(z.log_softmax(1), t)],
)
def test_other_means_are_served(loss: Any) -> None:
    shared = prepared(loss)
    point = curvature_at(shared.model, shared.loss, X, Y, regulariser=1.0, seed=0)
    ggn = GGNOperator(Objective(shared.model.double(), loss, (X.double(), Y)))
    assert point.trace == pytest.approx(float(to_dense(ggn).trace()), rel=1e-6)


def test_labels_that_are_no_classes_are_refused_and_take_no_part_in_accuracy() -> None:
    ignored = Y.clone()
    ignored[::3] = -100
    for model in ("task", "random-features"):
        with pytest.raises(InputError, match="10 of the test labels are not, such as -100"):
            prepared(nn.CrossEntropyLoss(), Y, (X, ignored), model=model)
    with pytest.raises(InputError, match="training labels are not, such as -100"):
        prepared(nn.CrossEntropyLoss(), ignored)
    objective = Objective(net(), nn.CrossEntropyLoss(), (X, ignored))
    settings: dict[str, Any] = {"steps": 150, "num_seeds": 1, "kinds": (), "batch_size": None, "generator": 0}
    kept = ignored >= 0
    some, all_of_them = (lottery_tickets(objective, held, **settings) for held in ((X, ignored), (X[kept], Y[kept])))
    assert some.metric == "accuracy"
    assert [row.values for row in some.rows] == [row.values for row in all_of_them.rows]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ((torch.randn(9, 7), Y[:9]), r"\(N, 4\) of torch.float32; got \(9, 7\)"),
        ((X.double(), Y), "Convert the test data"),
        ((X, Y[:9]), "a label for each example"),
        ((X[:0], Y[:0]), "are empty"),
        ([(X, Y), (X, F.one_hot(Y))], "one shape and dtype in all batches"),
    ],
)
def test_test_data_that_do_not_fit_are_refused(test: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prepared(nn.CrossEntropyLoss(), Y, test)


def test_integer_rows_are_rows() -> None:
    whole, halves = (
        prepared(lambda z, t: F.mse_loss(z, t.to(z.dtype)), rows) for rows in (F.one_hot(Y, 3), F.one_hot(Y, 3).float())
    )
    z = torch.randn(len(whole.data.labels), 3)
    assert whole.data.one_hot
    assert torch.equal(whole.loss(z, whole.data.labels), halves.loss(z, halves.data.labels))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.b.weight = self.a.weight
        self.register_buffer("scale", torch.tensor(2.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.tanh(self.b(torch.tanh(self.a(x))))) * self.scale


def test_tied_weights_and_buffers_that_are_not_saved_come_with_a_member() -> None:
    ensemble = Ensemble(Tied(), [1, 2])
    ensemble.buffers["scale"][1] = 3.0
    for i in range(2):
        torch.testing.assert_close(ensemble.member(i)(X), ensemble.outputs(X)[i])
    found = double_descent(Objective(Tied(), nn.CrossEntropyLoss(), (X, Y)), **ALONG)
    assert bool(torch.tensor([row.trace for row in found.rows]).isfinite().all())


def test_old_weight_norm_is_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    objective = Objective(model, nn.CrossEntropyLoss(), (X, Y))
    with pytest.raises(InputError, match="remove_weight_norm"):
        double_descent(objective, **ALONG)
    with pytest.raises(InputError, match="remove_weight_norm"):
        lottery_tickets(objective, (X, Y), steps=2, generator=0)


def test_modules_that_cannot_be_drawn_and_data_of_another_dtype_are_refused() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(InputError, match=r"drawn anew, and the module '0.parametrizations.weight'"):
        double_descent(Objective(model, nn.CrossEntropyLoss(), (X, Y)), **ALONG)
    with pytest.raises(InputError, match="model and data of one shape and dtype"):
        double_descent(Objective(net(), nn.CrossEntropyLoss(), (X.double(), Y)), **ALONG)


def test_models_in_float64_are_regularised_too() -> None:
    objective = Objective(net().double(), nn.CrossEntropyLoss(), (X.double(), Y))
    found = regularization_by_curvature(objective, width=5, **{**SHORT, "steps": 10})
    assert "batch norm" in found.conditions


def test_smoothing_is_compared_where_the_loss_has_none() -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(label_smoothing=0.1), (X, Y))
    found = regularization_by_curvature(objective, width=5, **{**SHORT, "steps": 10})
    assert "label smoothing" not in found.conditions
    assert any("smooths labels already" in note for note in found.notes)


def test_a_model_in_train_mode_is_left_as_it_is() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).train()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    labelled(Objective(model, nn.CrossEntropyLoss(), (X, Y)), None, 0)
    assert model.training
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_a_loader_that_shuffles_gives_one_answer_and_one_that_drops_is_refused() -> None:
    data = TensorDataset(X, Y)
    objective = Objective(net(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=7, shuffle=True))
    a, b = (labelled(objective, None, 3) for _ in range(2))
    assert torch.equal(a.inputs, b.inputs)
    assert torch.equal(a.test_labels, b.test_labels)
    assert {tuple(x.tolist()) for x in [*a.inputs, *a.test_inputs]} == {tuple(x.tolist()) for x in X}
    in_order = Objective(net(), nn.CrossEntropyLoss(), DataLoader(data, batch_size=7))
    plain = Objective(net(), nn.CrossEntropyLoss(), (X, Y))
    assert torch.equal(labelled(in_order, None, 3).inputs, labelled(plain, None, 3).inputs)
    dropping = DataLoader(data, batch_size=7, shuffle=True, drop_last=True)
    with pytest.raises(DataError, match="other data at each pass"):
        labelled(Objective(net(), nn.CrossEntropyLoss(), dropping), None, 3)


def test_tickets_and_dense_networks_see_the_same_batches_of_a_loader_that_shuffles() -> None:
    seen: list[list[float]] = []

    class Watched(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                seen.append(x[:, 0].tolist())
            return super().forward(x)

    loader = DataLoader(TensorDataset(X, Y), batch_size=15, shuffle=True)
    objective = Objective(Watched(4, 3), nn.CrossEntropyLoss(), loader)
    seen.clear()
    lottery_tickets(objective, (X, Y), steps=4, num_seeds=1, batch_size=None, kinds=("ticket",), generator=0)
    assert seen[:4] == seen[4:8]


def test_data_that_nothing_can_be_trained_on_are_refused_before_it() -> None:
    bad = X.clone()
    bad[3, 1] = torch.nan
    for data, test, says in (
        ((X[:1], Y[:1]), None, "at least 2 examples"),
        ((X[:1], Y[:1]), (X, Y), "at least 2 examples"),
        ((bad, Y), None, "the data of the objective have inputs that are NaN"),
        ((X, Y), (bad, Y), "the test data have inputs that are NaN"),
    ):
        with pytest.raises(InputError, match=says):
            labelled(Objective(net(), nn.CrossEntropyLoss(), data), test, 0)
