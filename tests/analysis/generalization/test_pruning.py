"""Pruning: masks that hold, scores and displacements against closed forms, predicted against true changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import analysis
from analysis.generalization.pruning.inverse import InverseBlocks, block_places, dense_inverse, recursive_inverse
from analysis.generalization.pruning.removal import Products, loss_changes, true_changes
from analysis.generalization.pruning.scores import METHODS
from analysis.sharpness.measure import measures_for
from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError, ParameterSelectionError
from curvature.layerwise import exact_diagonal, kronecker_factors
from curvature.linop import to_dense
from curvature.objective.shift import shifted

F64 = torch.float64


def make_objective(seed: int = 0, *, trained: bool = True, batches: int = 4) -> Objective:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
        x = torch.randn(40, 4, dtype=F64)
    y = (x @ torch.linspace(-1, 1, 12, dtype=F64).view(4, 3)).argmax(1)
    if trained:
        optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20)

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)  # type: ignore[arg-type]
    model.zero_grad()
    return Objective(model, nn.CrossEntropyLoss(), list(zip(x.chunk(batches), y.chunk(batches), strict=True)))


def quadratic(n: int = 6) -> tuple[Objective, Tensor, Tensor]:
    """Return (theta - t)'A(theta - t) / 2 as least squares of a linear model, its A and its minimum."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(30, n, generator=g, dtype=F64)
    t = torch.randn(n, generator=g, dtype=F64)
    model = nn.Linear(n, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(t[None])
    A = 2 * x.T @ x / 30
    return Objective(model, nn.MSELoss(), (x, (x @ t)[:, None])), A, t


def least(A: Tensor, w: Tensor, pruned: Tensor) -> Tensor:
    """Return the displacement of optimal brain surgeon from its optimality conditions, as one linear system."""
    n, q = len(w), pruned.nonzero()[:, 0]
    E = torch.eye(n, dtype=A.dtype)[q]
    K = torch.cat([torch.cat([A, E.T], 1), torch.cat([E, torch.zeros(len(q), len(q), dtype=A.dtype)], 1)])
    return torch.linalg.solve(K, torch.cat([torch.zeros(n, dtype=A.dtype), -w[q]]))[:n]


# -- masks ------------------------------------------------------------------------------------------------------------


def masked(objective: Objective, share: float = 0.5) -> tuple[Objective, dict[str, Tensor], Tensor]:
    """Return the objective of a sub-network, its masks, and the places of its parameters in the dense vector."""
    g = torch.Generator().manual_seed(3)
    names = {n: t for n, t in objective.space.tensors.items() if t.ndim > 1}
    masks = {n: torch.rand(t.shape, generator=g) > share for n, t in names.items()}
    sparse = analysis.sparse_model(objective.model, masks)
    starts, start = {}, 0
    for name, tensor in objective.space.tensors.items():
        keep = masks.get(name, torch.ones(tensor.shape, dtype=torch.bool)).flatten()
        starts[name] = start + keep.nonzero()[:, 0]
        start += tensor.numel()
    small = objective_of(objective, sparse)
    dense_name = [n.replace("parametrizations.", "").removesuffix(".original") for n in small.space.names]
    return small, masks, torch.cat([starts[n] for n in dense_name])


def objective_of(objective: Objective, model: nn.Module) -> Objective:
    return Objective(model, objective.settings["loss"], objective.settings["data"])


def test_everything_about_a_sub_network_is_that_of_the_rows_and_columns_that_are_kept() -> None:
    objective = make_objective()
    small, masks, places = masked(objective)
    zeroed = copy.deepcopy(objective.model)
    with torch.no_grad():
        for name, mask in masks.items():
            zeroed.get_parameter(name).mul_(mask)
    dense = objective_of(objective, zeroed)
    assert small.num_params == len(places) < objective.num_params
    for kind in (HessianOperator, GGNOperator):
        expected = to_dense(kind(dense))[places][:, places]
        torch.testing.assert_close(to_dense(kind(small)), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(small.gradient(), dense.gradient()[places])
    for of in ("ggn", "hessian"):
        found = exact_diagonal(small, of)
        torch.testing.assert_close(found.value, exact_diagonal(dense, of).value[places], rtol=1e-9, atol=1e-12)
    assert analysis.measure("inspect", small, generator=0).inspection.num_params == len(places)
    partly = analysis.sparse_model(objective.model, {"0.weight": masks["0.weight"]})
    assert set(kronecker_factors(objective_of(objective, partly)).layers) == {"2"}
    layers = kronecker_factors(dense).uncovered
    assert layers == {}
    with pytest.raises(InputError, match="no layer"):
        kronecker_factors(small)  # refused, not those of the dense layer
    assert "relative_flatness" not in measures_for(small)
    with pytest.raises(InputError, match="a mask"):
        analysis.measure_sharpness(objective_of(objective, partly), measures=("relative_flatness",), generator=0)
    back = analysis.dense_model(small.model)
    for name, p in back.named_parameters():
        assert torch.equal(p, zeroed.get_parameter(name))
    assert all(torch.equal(analysis.masks_of(small.model)[name], mask) for name, mask in masks.items())


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_masks_hold_through_training(kind: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    masks = {"0.weight": torch.rand(4, 1, 3, 3) > 0.5, "4.weight": torch.rand(3, 64) > 0.8}
    sparse = analysis.sparse_model(model, masks)
    params = list(sparse.parameters())
    settings: dict[str, Any] = {"lr": 0.05, "weight_decay": 0.1}
    optimizer: Any = torch.optim.AdamW(params, **settings)
    if kind == "sgd":
        optimizer = torch.optim.SGD(params, momentum=0.9, **settings)
    x, y = torch.randn(16, 1, 6, 6), torch.randint(3, (16,))
    before = copy.deepcopy(sparse.state_dict())
    for _ in range(5):
        optimizer.zero_grad()
        nn.functional.cross_entropy(sparse(x), y).backward()
        optimizer.step()
    dense = analysis.dense_model(sparse)
    for name, mask in masks.items():
        weight = dense.get_parameter(name)
        assert bool((weight[~mask] == 0).all())
        assert not torch.equal(weight[mask], model.get_parameter(name)[mask])
    assert not torch.equal(sparse.state_dict()["1.running_mean"], before["1.running_mean"])
    again = analysis.sparse_model(model, masks)
    again.load_state_dict(sparse.state_dict())
    assert torch.equal(again(x), sparse(x))


def test_loaded_masks_bring_their_places() -> None:
    model = nn.Linear(4, 1, bias=False)
    first, second, more = (
        analysis.sparse_model(model, {"weight": torch.tensor([keep], dtype=torch.bool)})
        for keep in ([1, 1, 0, 0], [0, 1, 0, 1], [1, 1, 1, 0])
    )
    for assign in (False, True):
        taken = copy.deepcopy(first)
        taken.load_state_dict(second.state_dict(), assign=assign)
        assert torch.equal(taken.weight, second.weight)
        assert torch.equal(analysis.dense_model(taken).weight, second.weight)
    with pytest.raises(RuntimeError, match="keeps 3 weights"):
        taken.load_state_dict(more.state_dict())


def test_masks_on_a_parametrised_model_leave_it_as_it_is() -> None:
    x, bias = torch.randn(2, 3), {"0.bias": torch.tensor([True, False])}
    sparse = analysis.sparse_model(nn.Sequential(nn.Linear(3, 2)), {"0.weight": torch.rand(2, 3) > 0.5})
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    for model in (sparse, normed):
        before = model(x)
        twice = analysis.sparse_model(model, bias)
        assert torch.equal(model(x), before)
        assert torch.equal(twice(x)[:, 0], before[:, 0])
        assert torch.equal(analysis.dense_model(twice)(x), twice(x))
    assert set(analysis.masks_of(analysis.sparse_model(sparse, bias))) == {"0.weight", "0.bias"}


def test_a_whole_layer_can_go() -> None:
    objective = make_objective()
    masks = {"2.weight": torch.zeros(3, 5, dtype=torch.bool)}
    small = objective_of(objective, analysis.sparse_model(objective.model, masks))
    assert small.num_params == objective.num_params - 15
    H = to_dense(HessianOperator(small))
    assert int((H.abs().sum(0) > 1e-12).sum()) == 3  # the biases of the outputs


def test_masks_that_would_not_hold_are_refused() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    whole = torch.ones(3, 3, dtype=torch.bool)
    for masks, error, said in (
        ({"0.wieght": whole}, ParameterSelectionError, "no parameter"),
        ({"0.weight": whole.float()}, InputError, "boolean"),
        ({"0.weight": whole[:2]}, InputError, "shape"),
    ):
        with pytest.raises(error, match=said):
            analysis.sparse_model(model, masks)
    with pytest.raises(ParameterSelectionError, match="dense_model"):
        analysis.sparse_model(analysis.sparse_model(model, {"0.weight": whole}), {"0.weight": whole})
    model[1].weight = model[0].weight
    with pytest.raises(InputError, match="tied"):
        analysis.sparse_model(model, {"0.weight": whole})
    with pytest.raises(InputError, match="LSTM"):
        analysis.sparse_model(nn.LSTM(2, 2), {"weight_hh_l0": torch.ones(8, 2, dtype=torch.bool)})
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    with pytest.raises(InputError, match="parametrised"):
        analysis.sparse_model(normed, {"parametrizations.weight.original1": whole})


# -- scores and displacements -----------------------------------------------------------------------------------------


def test_surgeon_is_exact_on_a_quadratic() -> None:
    objective, A, t = quadratic()
    scores = analysis.pruning_scores(objective, "obs", damping=0.0)
    torch.testing.assert_close(scores.scores, t.square() / (2 * torch.linalg.inv(A).diagonal()), rtol=1e-10, atol=0)
    for sparsity in (0.17, 0.5, 1.0):
        pruned = scores.pruned(sparsity)
        d = least(A, t, pruned)
        rise = float(d @ A @ d / 2)
        found = scores.removal(pruned)[0]
        torch.testing.assert_close(found, d, rtol=1e-10, atol=1e-10)
        assert bool((t + found)[pruned].abs().max() == 0)
        changes = loss_changes(objective, found[:, None])
        for value in (scores.removal(pruned)[1], float(changes.predicted), float(changes.true)):
            assert value == pytest.approx(rise, rel=1e-10, abs=1e-10)
        by_products = Products(GGNOperator(objective), 0.0, rtol=1e-13)
        torch.testing.assert_close(by_products.displacement(t, pruned)[0], d, rtol=1e-10, atol=1e-10)


def test_greedy_surgeon_adds_the_weight_that_costs_least_to_those_removed() -> None:
    objective, A, t = quadratic()
    scores = analysis.pruning_scores(objective, "obs-greedy", damping=0.0)
    gone, rises = torch.zeros(6, dtype=torch.bool), []
    for _ in range(6):
        costs = {}
        for q in (~gone).nonzero()[:, 0].tolist():
            d = least(A, t, gone | (torch.arange(6) == q))
            costs[q] = float(d @ A @ d / 2)
        best = min(costs, key=lambda q: costs[q])
        gone[best] = True
        rises.append(costs[best])
        assert float(scores.scores[best]) == pytest.approx(rises[-1], rel=1e-9)
        assert torch.equal(scores.pruned(len(rises) / 6), gone)
        assert scores.removal(gone)[1] == pytest.approx(rises[-1], rel=1e-9)
    with pytest.raises(InputError, match="linear"):
        analysis.pruning_scores(objective, "obs-greedy", linear=True)


def test_linear_term_is_in_the_prediction_away_from_a_stationary_point() -> None:
    objective, A, t = quadratic()
    shift = torch.linspace(-1, 1, 6, dtype=F64)
    with torch.no_grad():
        objective.model.weight.add_(shift)
    w, g = t + shift, A @ shift
    pruned = torch.tensor([True, False, False, True, False, False])
    for method, d in (("obs", least(A, w, pruned)), ("obd", torch.where(pruned, -w, 0.0))):
        scores = analysis.pruning_scores(objective, method, damping=0.0)
        changes = loss_changes(objective, scores.removal(pruned)[0][:, None])
        assert float(changes.linear) == pytest.approx(float(g @ d), rel=1e-9)
        assert float(changes.true) == pytest.approx(float(g @ d + d @ A @ d / 2), rel=1e-9)
    assert analysis.pruning_scores(objective, "obs", damping=0.0).removal(pruned)[1] == pytest.approx(
        float(g @ least(A, w, pruned) + least(A, w, pruned) @ A @ least(A, w, pruned) / 2), rel=1e-9
    )
    for method in ("obd", "obs"):  # the score with the linear term is the change when one weight goes
        scores = analysis.pruning_scores(objective, method, damping=0.0, linear=True)
        for q in range(6):
            alone = torch.arange(6) == q
            d = least(A, w, alone) if method == "obs" else torch.where(alone, -w, 0.0)
            assert float(scores.scores[q]) == pytest.approx(float(g @ d + d @ A @ d / 2), rel=1e-8)


def test_each_method_is_its_formula() -> None:
    objective = make_objective()
    n, w = objective.num_params, objective.space.current()
    G, H = to_dense(GGNOperator(objective)), to_dense(HessianOperator(objective))
    rows = []
    for x, y in objective.settings["data"]:
        for i in range(len(x)):
            one = Objective(objective.model, nn.CrossEntropyLoss(), (x[i : i + 1], y[i : i + 1]))
            rows.append(one.gradient())
    R = torch.stack(rows)
    F = R.T @ R / len(R)
    where = torch.cat([torch.arange(20), torch.arange(25, 40)])  # two matrices; biases stay
    bias = torch.tensor([i for i in range(n) if i not in where.tolist()])
    K = torch.zeros(n, n, dtype=F64)
    factors = kronecker_factors(objective)
    K[:25, :25], K[25:, 25:] = factors.to_dense("0"), factors.to_dense("2")
    eye, half = torch.eye(n, dtype=F64), w.square() / 2
    expected = {
        "magnitude": half,
        "fisher": half * F.diagonal(),
        "obd": half * G.diagonal(),
        "kfac": half / torch.linalg.inv(K + 0.01 * eye).diagonal(),
        "kfac-cg": half / torch.linalg.inv(K + 0.01 * eye).diagonal(),
        "obs": half / torch.linalg.inv(G + 0.01 * eye).diagonal(),
    }
    for method, values in expected.items():
        scores = analysis.pruning_scores(objective, method, damping=0.01)
        torch.testing.assert_close(scores.scores[where], values[where], rtol=1e-8, atol=1e-14)
        assert bool(torch.isinf(scores.scores[bias]).all())
    found = analysis.pruning_scores(objective, "obd", matrix="hessian")
    torch.testing.assert_close(found.scores[where], (half * H.diagonal())[where], rtol=1e-8, atol=1e-14)
    pruned = analysis.pruning_scores(objective, "kfac", damping=0.01).pruned(0.4)
    for method, A in (("kfac", K), ("kfac-cg", G), ("obs", G)):
        d = least(A + 0.01 * eye, w, pruned)
        scores = analysis.pruning_scores(objective, method, damping=0.01)
        torch.testing.assert_close(scores.removal(pruned)[0], d, rtol=1e-3, atol=1e-4)
        rise = float(objective.gradient() @ d + d @ A @ d / 2)
        assert scores.removal(pruned)[1] == pytest.approx(rise, rel=1e-3)
    wood = analysis.pruning_scores(objective, "woodfisher", damping=0.01, block_size=6)
    for start, stop in ((0, 6), (6, 12), (12, 18), (18, 20), (25, 31), (31, 37), (37, 40)):
        inverse = torch.linalg.inv(F[start:stop, start:stop] + 0.01 * torch.eye(stop - start, dtype=F64))
        values = w[start:stop].square() / (2 * inverse.diagonal())
        torch.testing.assert_close(wood.scores[start:stop], values, rtol=1e-9, atol=0)
    blocks = torch.block_diag(*(F[a:b, a:b] for a, b in ((0, 6), (6, 12), (12, 18), (18, 20))))
    d = least(blocks + 0.01 * torch.eye(20, dtype=F64), w[:20], pruned[:20])
    torch.testing.assert_close(wood.removal(pruned)[0][:20], d, rtol=1e-9, atol=1e-12)


def test_parameters_without_factors_get_their_diagonal_and_samples_serve_many_outputs() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(6, 4)).double()
        x, y = torch.randint(7, (50, 2)), torch.randint(4, (50,))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    w, G = objective.space.current(), to_dense(GGNOperator(objective))
    factors = kronecker_factors(objective)
    assert set(factors.uncovered) == {"0.weight"}
    A = torch.block_diag(torch.diag(G.diagonal()[:21]), factors.to_dense("2"))
    scores = analysis.pruning_scores(objective, "kfac", damping=0.01)
    C = torch.linalg.inv(A + 0.01 * torch.eye(len(A), dtype=F64))
    torch.testing.assert_close(scores.scores[:45], (w.square() / (2 * C.diagonal()))[:45], rtol=1e-8, atol=1e-14)
    pruned = scores.pruned(0.4)
    d, rise = scores.removal(pruned)
    torch.testing.assert_close(d, least(A + 0.01 * torch.eye(len(A), dtype=F64), w, pruned), rtol=1e-3, atol=1e-4)
    assert rise == pytest.approx(float(objective.gradient() @ d + d @ A @ d / 2), rel=1e-4)
    for method in ("obd", "kfac"):
        exact = analysis.pruning_scores(objective, method, damping=0.01).scores[:45]
        drawn = analysis.pruning_scores(objective, method, damping=0.01, mc_samples=400, generator=0).scores[:45]
        assert float((drawn - exact).norm() / exact.norm()) < 0.15
    for settings in ({"mc_samples": 4}, {"mc_samples": -1, "generator": 0}):
        with pytest.raises(InputError, match="mc_samples"):
            analysis.pruning_scores(objective, "obd", **settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="Gauss-Newton"):
        analysis.pruning_scores(objective, "obd", matrix="hessian", mc_samples=4, generator=0)


def test_scores_of_a_summed_loss_are_those_of_the_mean_times_its_terms() -> None:
    objective = make_objective(trained=False)
    weights = torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    y = torch.cat([y for _, y in objective.settings["data"]])
    for settings, terms in (({}, 40.0), ({"weight": weights}, float(weights[y].sum()))):
        mean, total = (
            objective.replace(loss=nn.CrossEntropyLoss(reduction=reduction, **settings))
            for reduction in ("mean", "sum")
        )
        for method in METHODS.keys() - {"random", "magnitude", "obs-greedy"}:
            one, all_ = (analysis.pruning_scores(o, method) for o in (mean, total))  # type: ignore[arg-type]
            pruned = one.pruned(0.3)
            where = torch.isfinite(one.scores)
            torch.testing.assert_close(all_.scores[where], terms * one.scores[where], rtol=1e-5, atol=1e-12)
            assert all_.damping == pytest.approx(terms * one.damping, rel=1e-6)
            assert all_.removal(pruned)[1] == pytest.approx(terms * one.removal(pruned)[1], rel=1e-2)


def test_conjugate_gradients_stop_and_know_their_weights() -> None:
    objective = make_objective()
    scores = analysis.pruning_scores(objective, "kfac-cg", damping=1e-4)
    pruned, w = scores.pruned(0.4), scores.weights
    assert isinstance(scores.metric, Products)
    short = dataclasses.replace(scores.metric, inverse=None, max_iterations=2)
    d, rise = short.displacement(w, pruned)
    assert torch.equal(d[pruned], -w[pruned])
    assert scores.metric.displacement(w, pruned)[1] < rise  # better than 2 steps, which are taken as they are
    with torch.no_grad():
        objective.model[0].weight.mul_(2)
    with pytest.raises(InputError, match="score again"):
        scores.removal(pruned)


def test_recursion_is_the_inverse_whatever_the_chunks() -> None:
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(25, 3, 4, generator=g, dtype=F64)
    expected = torch.linalg.inv(torch.einsum("ika,ikb->kab", rows, rows) + 0.5 * torch.eye(4, dtype=F64))
    start = (torch.eye(4, dtype=F64) / 0.5).expand(3, 4, 4)
    for size in (1, 7, 25):
        torch.testing.assert_close(recursive_inverse(rows.split(size), start), expected, rtol=1e-10, atol=1e-12)
    places = block_places([(2, 7), (9, 11)], 4, torch.device("cpu"))
    assert places.tolist() == [[2, 3, 4, 5], [6, -1, -1, -1], [9, 10, -1, -1]]
    with pytest.raises(InputError, match="positive definite"):
        dense_inverse(torch.diag(torch.tensor([1.0, -1.0])), 0.0)
    assert isinstance(InverseBlocks(places, start, 0.5), InverseBlocks)


def test_sparsity_counts_and_ties() -> None:
    objective = make_objective()
    with torch.no_grad():
        objective.model[0].weight.fill_(0.3)
    scores = analysis.pruning_scores(objective, "magnitude")
    assert scores.num_prunable == 35
    for sparsity in (0.0, 0.31, 0.5, 1.0):
        assert int(scores.pruned(sparsity).sum()) == round(35 * sparsity)
    first = scores.pruned(0.5, only="0.weight")
    assert first[:10].all()
    assert not first[10:].any()  # equal scores: the first go
    drawn = scores.pruned(0.5, only="0.weight", generator=0)
    assert int(drawn.sum()) == 10
    assert not torch.equal(drawn, first)
    uniform = scores.masks(scores.pruned(0.4, scope="uniform"))
    assert [int((~mask).sum()) for mask in uniform.values()] == [8, 6]
    for wrong in ({"sparsity": 1.2}, {"sparsity": 0.5, "scope": "each"}, {"sparsity": 0.5, "only": "0"}):
        with pytest.raises(InputError):
            scores.pruned(**wrong)


def test_what_cannot_be_scored_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = make_objective()
    for settings, said in (
        ({"method": "best"}, "method must be"),
        ({"method": "random"}, "generator"),
        ({"method": "obd", "damping": -1.0}, "damping"),
        ({"method": "woodfisher", "block_size": 0}, "block_size"),
        ({"method": "woodfisher", "damping": 0.0}, "positive damping"),
        ({"method": "obs", "matrix": "hessian", "damping": 0.0}, "positive definite"),
    ):
        with pytest.raises(InputError, match=said):
            analysis.pruning_scores(objective, **settings)  # type: ignore[arg-type]
    scores = analysis.pruning_scores(objective, "obd")
    for pruned, said in (
        (torch.ones(3, dtype=torch.bool), "boolean"),
        (torch.ones(objective.num_params), "boolean"),
        (torch.ones(objective.num_params, dtype=torch.bool), "never removed"),
    ):
        for call in (scores.removal, scores.masks):
            with pytest.raises(InputError, match=said):
                call(pruned)
    small, _, _ = masked(objective)
    with pytest.raises(InputError, match="dense_model"):
        analysis.pruning_scores(small, "magnitude")
    with pytest.raises(InputError, match="two dimensions"):
        analysis.pruning_scores(objective.restrict("0.bias"))
    monkeypatch.setattr("analysis.generalization.pruning.scores.LARGEST_DENSE", 10)
    with pytest.raises(InputError, match="woodfisher"):
        analysis.pruning_scores(objective, "obs")
    assert set(METHODS) >= {"random", "magnitude", "obd", "obs"}


def test_changes_and_their_errors_are_those_of_the_batches() -> None:
    objective = make_objective(batches=5, trained=False)
    g = torch.Generator().manual_seed(0)
    D = 1e-3 * torch.randn(objective.num_params, 2, generator=g, dtype=F64)
    found = loss_changes(objective, D)
    H, gradient = to_dense(HessianOperator(objective)), objective.gradient()
    torch.testing.assert_close(found.linear, D.T @ gradient)
    torch.testing.assert_close(found.curvature, ((H @ D) * D).sum(0) / 2)
    assert bool(((found.true - found.predicted).abs() < 1e-2 * found.curvature.abs()).all())
    true, predicted = [], []
    for batch in objective.settings["data"]:
        one = Objective(objective.model, nn.CrossEntropyLoss(), batch)
        true.append(loss_changes(one, D).true)
        predicted.append(loss_changes(one, D).predicted)
    for values, stderr in ((true, found.true_stderr), (predicted, found.predicted_stderr)):
        torch.testing.assert_close(stderr, torch.stack(values).std(0) / 5**0.5, rtol=1e-6, atol=0)
    with pytest.raises(InputError, match="shape"):
        loss_changes(objective, D[:-1])
    x, y = objective.settings["data"][0]
    for loss in (
        nn.CrossEntropyLoss(reduction="sum"),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double()),
    ):
        other = Objective(objective.model, loss, [(x[:5], y[:5]), (x[5:], y[5:])])
        here = other.loss()
        moved = loss_changes(other, D[:, :1])
        with torch.no_grad():
            start = 0
            for p in objective.model.parameters():
                p.add_(D[start : start + p.numel(), 0].view(p.shape))
                start += p.numel()
        assert float(moved.true) == pytest.approx(float(other.loss() - here), rel=1e-6)
        assert float(moved.predicted) == pytest.approx(float(moved.true), rel=1e-2)
    steep = nn.Linear(1, 1, bias=False).double()
    steep_loss = Objective(steep, None, [torch.ones(2, 1, dtype=F64)], forward=lambda m, x: m(x).exp().mean())
    far = loss_changes(steep_loss, torch.tensor([[0.0, 1e4]], dtype=F64))
    assert far.true.tolist() == [0.0, float("inf")]  # the loss overflows there; its quadratic model does not


class Shuffled:
    """A loader that shuffles."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y, self.g = x, y, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        rows = torch.randperm(len(self.x), generator=self.g)
        return iter([(self.x[r], self.y[r]) for r in rows.split(5)])


def test_changes_over_a_loader_that_shuffles_are_paired() -> None:
    objective = make_objective(batches=1)
    D = torch.full((objective.num_params, 1), 1e-4, dtype=F64)
    shuffled = objective.replace(data=Shuffled(*objective.settings["data"][0]))
    fixed = objective.split(5)
    for keep_graphs in ("auto", False):
        found, expected = (loss_changes(o.replace(keep_graphs=keep_graphs), D) for o in (shuffled, fixed))
        torch.testing.assert_close(found.true, expected.true)
        torch.testing.assert_close(found.predicted, expected.predicted)
        assert 0.2 < float(found.true_stderr / expected.true_stderr) < 5
        assert float(found.true_stderr) == pytest.approx(float(found.predicted_stderr), rel=0.5)
    torch.testing.assert_close(true_changes(shuffled, D)[0], expected.true)


def test_errors_under_class_weights_are_those_of_a_ratio_of_sums() -> None:
    """Against the bootstrap over examples."""
    objective = make_objective(trained=False, batches=1)
    ((x, y),) = objective.settings["data"]
    weights = torch.tensor([1.0, 20.0, 0.1], dtype=F64)
    D = torch.randn(objective.num_params, 1, generator=torch.Generator().manual_seed(1), dtype=F64)
    found = loss_changes(objective.replace(loss=nn.CrossEntropyLoss(weight=weights)).split(1), D)
    before = nn.functional.cross_entropy(objective.model(x), y, reduction="none")
    with shifted(objective, objective.space.current() + D[:, 0]), torch.no_grad():
        change = nn.functional.cross_entropy(objective.model(x), y, reduction="none") - before.detach()
    rows = torch.randint(len(x), (4000, len(x)), generator=torch.Generator().manual_seed(0))
    drawn = (weights[y] * change)[rows].sum(1) / weights[y][rows].sum(1)
    assert float(found.true_stderr) == pytest.approx(float(drawn.std()), rel=0.12)


def test_errors_over_data_cover_the_change_of_the_population() -> None:
    """z-scores over 60 draws of the data have mean 0 and standard deviation 1: least squares, a given displacement."""
    g = torch.Generator().manual_seed(4)
    w, d = torch.tensor([1.0, -0.5, 0.3], dtype=F64), torch.tensor([[0.4], [0.5], [-0.3]], dtype=F64)
    model = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w[None])
    truth = torch.tensor([1.2, -0.4, 0.0], dtype=F64)  # y = x'truth + noise, x normal: L = |w - truth|^2 + 1
    change = float((w + d[:, 0] - truth).square().sum() - (w - truth).square().sum())
    scores = []
    for _ in range(60):
        x = torch.randn(120, 3, generator=g, dtype=F64)
        y = x @ truth[:, None] + torch.randn(120, 1, generator=g, dtype=F64)
        found = loss_changes(Objective(model, nn.MSELoss(), list(zip(x.split(10), y.split(10), strict=True))), d)
        assert float(found.true) == pytest.approx(float(found.predicted), rel=1e-9)
        scores.append([(float(found.true) - change) / float(e) for e in (found.true_stderr, found.predicted_stderr)])
    z = torch.tensor(scores)
    assert bool((z.mean(0).abs() < 4 * 1.13 / 60**0.5).all())
    assert bool(((z.std(0) > 0.7) & (z.std(0) < 1.5)).all())  # Student's t of 11 degrees: 1.1, known to 10 %
