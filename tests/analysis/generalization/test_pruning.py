"""Scores of pruning and displacements against closed forms."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

import analysis
from analysis.generalization.pruning.inverse import InverseBlocks, block_places, dense_inverse, recursive_inverse
from analysis.generalization.pruning.removal import Products, loss_changes
from analysis.generalization.pruning.scores import METHODS
from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from curvature.layerwise import kronecker_factors
from curvature.linop import to_dense
from tests.analysis.generalization.prunable import make_objective, masked

F64 = torch.float64


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
