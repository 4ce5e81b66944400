"""Shares, overlaps and class structure against dense eigenvectors, random subspaces and sums written out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import Tensor, nn

from analysis.alignment.class_structure import class_structure
from analysis.alignment.figures import plot_alignment, plot_class_structure, plot_overlaps
from analysis.alignment.measure import gradient_alignment, overlap_over_time, subspace_overlap
from curvature import GGNOperator, HessianOperator, Objective
from curvature.errors import InputError
from tests.cases import BY_NAME
from tests.checks import assert_close


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def classifier(classes: int = 4, batches: tuple[int, ...] = (20, 11)) -> tuple[Objective, nn.Module, Tensor, Tensor]:
    g = generator(4)
    N = sum(batches)
    x, y = torch.randn(N, 5, generator=g).double(), torch.randint(classes, (N,), generator=g)
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, classes)).double()
    data = list(zip(x.split(batches), y.split(batches), strict=True))
    return Objective(model, nn.CrossEntropyLoss(), data), model, x, y


# -- gradient and updates ---------------------------------------------------------------------------------------------


def test_shares_and_quotients_are_those_of_dense_eigenvectors() -> None:
    objective, *_ = classifier()
    H, g = HessianOperator(objective).to_dense(), objective.gradient()
    update = torch.randn(objective.num_params, generator=generator()).double()
    found = gradient_alignment(objective, 5, updates={"step": update, "none": 0 * g}, rtol=1e-8, generator=generator())
    values, U = torch.linalg.eigh(H)
    U = U.flip(1)[:, :5]
    assert_close(found.eigenvalues, values.flip(0)[:5], 1e-10)
    for vector, x in ((found.gradient, g), (found.updates[0], update)):
        assert_close(vector.shares, (U.T @ x).square().cumsum(0) / x.square().sum(), 1e-8)
        assert vector.rayleigh == pytest.approx(float(x @ H @ x / (x @ x)), rel=1e-10)
        assert vector.cosine == pytest.approx(-float(x @ g / (x.norm() * g.norm())), rel=1e-10)
        assert vector.norm == pytest.approx(float(x.norm()))
    assert found.gradient.cosine == pytest.approx(-1)
    assert math.isnan(found.updates[1].rayleigh)
    assert bool(found.updates[1].shares.isnan().all())
    assert_close(found.chance, torch.arange(1, 6).double() / objective.num_params, 1e-12)


def test_error_of_the_subspace_bounds_the_error_of_shares() -> None:
    objective, *_ = classifier()
    H, g = HessianOperator(objective).to_dense(), objective.gradient()
    U = torch.linalg.eigh(H).eigenvectors.flip(1)[:, :4]
    exact = (U.T @ g).square().cumsum(0) / g.square().sum()
    tightest = 1.0
    for seed in range(5):
        rough = gradient_alignment(objective, 4, rtol=0.03, generator=generator(seed))
        assert bool(((rough.gradient.shares - exact).abs() <= rough.share_error + 1e-12).all())
        tightest = min(tightest, float(rough.share_error.min()))
    assert tightest < 1
    whole = gradient_alignment(objective, objective.num_params, generator=generator())
    assert float(whole.gradient.shares[-1]) == pytest.approx(1)
    assert float(whole.share_error[-1]) == 0


def test_repeated_eigenvalues_have_no_subspace_of_their_own() -> None:
    model = nn.Linear(4, 1, bias=False).double()
    objective = Objective(model, nn.MSELoss(), (torch.eye(4).double(), torch.ones(4, 1).double()))
    found = gradient_alignment(objective, 2, generator=0)
    assert found.share_error.tolist() == [1, 1]


# -- subspaces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k", "m"), [(12, 1, 1), (15, 3, 5), (8, 7, 2)])
def test_chance_level_and_its_spread(n: int, k: int, m: int) -> None:
    g = generator()
    U = torch.eye(n).double()[:, :k]
    found = [subspace_overlap(U, torch.randn(n, m, generator=g).double()) for _ in range(1500)]
    overlaps = torch.tensor([f.overlap for f in found], dtype=torch.float64)
    z = (overlaps.mean() - found[0].chance) / (overlaps.std() / 1500**0.5)
    assert abs(float(z)) < 4
    assert float(overlaps.std()) == pytest.approx(found[0].chance_std, rel=0.1)


def test_overlap_of_known_subspaces() -> None:
    E = torch.eye(6).double()
    mixed = torch.stack([E[:, 0] + E[:, 3], 2 * E[:, 1]], dim=1)
    found = subspace_overlap(E[:, :2], mixed)
    assert found.overlap == pytest.approx(0.75)
    assert_close(found.cosines, torch.tensor([1.0, 0.5**0.5], dtype=torch.float64), 1e-12)
    assert subspace_overlap(E[:, :2], E[:, 2:]).overlap == 0
    over = overlap_over_time([E[:, :2], mixed, E[:, 4:]])
    expected = torch.tensor([[1, 0.75, 0], [0.75, 1, 0], [0, 0, 1]], dtype=torch.float64)
    torch.testing.assert_close(over, expected, rtol=1e-12, atol=1e-12)
    assert subspace_overlap(torch.ones(1, 1), torch.ones(1, 1)).overlap == pytest.approx(1)


def test_bases_that_are_none_are_refused() -> None:
    E = torch.eye(4)
    with pytest.raises(InputError, match="over one n"):
        subspace_overlap(E, torch.eye(3))
    with pytest.raises(InputError, match="linearly independent"):
        subspace_overlap(E, torch.ones(4, 2))
    with pytest.raises(InputError, match="at least one"):
        overlap_over_time([])
    objective, *_ = classifier()
    with pytest.raises(InputError, match="k must be"):
        gradient_alignment(objective, 0, generator=generator())
    with pytest.raises(InputError, match="update 'a'"):
        gradient_alignment(objective, 1, updates={"a": torch.ones(3)}, generator=generator())


# -- classes ----------------------------------------------------------------------------------------------------------


def by_hand(model: nn.Module, x: Tensor, y: Tensor, classes: int) -> dict[str, Tensor]:
    """Return the four terms, each summed over examples and classes as it is defined."""
    params = dict(model.named_parameters())
    J = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(params)
    J = torch.cat([part.reshape(len(x), classes, -1) for part in J.values()], dim=2).detach()
    p = model(x).softmax(1).detach()
    g = torch.einsum("icn,ikc->ikn", J, torch.eye(classes).double() - p[:, None])  # example, class taken for
    w = p / len(x)
    n = g.shape[2]
    terms = {name: torch.zeros(n, n).double() for name in ("class", "cross", "own", "within")}
    for c in range(classes):
        ours = y == c
        means = (w[ours][..., None] * g[ours]).sum(0) / w[ours].sum(0)[:, None]
        pair = w[ours].sum(0)
        others = [k for k in range(classes) if k != c]
        mean = (pair[others, None] * means[others]).sum(0) / pair[others].sum()
        terms["class"] += pair[others].sum() * torch.outer(mean, mean)
        for k in others:
            terms["cross"] += pair[k] * torch.outer(means[k] - mean, means[k] - mean)
        terms["own"] += pair[c] * torch.outer(means[c], means[c])
        for i in ours.nonzero()[:, 0].tolist():
            for k in range(classes):
                terms["within"] += w[i, k] * torch.outer(g[i, k] - means[k], g[i, k] - means[k])
    return terms


def test_class_structure_adds_up_to_the_gauss_newton_matrix() -> None:
    objective, model, x, y = classifier()
    found = class_structure(objective)
    terms = by_hand(model, x, y, 4)
    G = GGNOperator(objective).to_dense()
    assert_close(sum(terms.values()), G, 1e-12)  # type: ignore[arg-type]
    for name, F in (("class", found.class_factor), ("cross", found.cross_factor), ("own", found.own_factor)):
        assert_close(F @ F.T, terms[name], 1e-12)
    assert found.trace == pytest.approx(float(G.trace()), rel=1e-10)
    assert found.shares["within"] == pytest.approx(float(terms["within"].trace() / G.trace()), rel=1e-9)
    assert sum(found.shares.values()) == pytest.approx(1)
    assert_close(found.class_eigenvalues, torch.linalg.eigvalsh(terms["class"]).flip(0)[:4], 1e-10)
    assert float(found.weights.sum()) == pytest.approx(1)


def test_one_example_a_class_has_nothing_within() -> None:
    objective, *_ = classifier(batches=(1,))
    model = objective.model
    x, y = torch.randn(4, 5, generator=generator()).double(), torch.arange(4)
    found = class_structure(Objective(model, nn.CrossEntropyLoss(), (x, y)))
    assert found.shares["within"] == pytest.approx(0, abs=1e-12)
    missing = class_structure(objective)  # three classes without an example
    assert int((missing.weights.sum(1) > 0).sum()) == 1
    assert bool(missing.class_factor.isfinite().all())


@pytest.mark.parametrize("name", ["attention by hand", "tied weights"])
def test_tokens_with_ignored_places_are_examples(name: str) -> None:
    case = BY_NAME[name]
    objective = Objective(case.model(), case.loss, case.ragged())
    found = class_structure(objective)
    whole = class_structure(Objective(case.model(), case.loss, case.data()))
    assert_close(found.class_factor, whole.class_factor, 1e-10)
    assert found.trace == pytest.approx(float(GGNOperator(objective).to_dense().trace()), rel=1e-9)
    assert float(found.weights.sum()) == pytest.approx(1)
    assert 0 <= found.shares["within"] < 1


def test_losses_of_another_kind_are_refused() -> None:
    x, y = torch.randn(6, 3), torch.randint(2, (6,))
    model = nn.Linear(3, 2)
    for loss, message in (
        (nn.CrossEntropyLoss(weight=torch.ones(2)), "another loss"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), "label_smoothing"),
        (nn.MultiMarginLoss(), "another loss"),
    ):
        with pytest.raises(InputError, match=message):
            class_structure(Objective(model, loss, (x, y)))
    with pytest.raises(InputError, match="class indices"):
        class_structure(Objective(model, nn.CrossEntropyLoss(), (x, torch.full((6, 2), 0.5))))


def test_records_and_figures() -> None:
    objective, *_ = classifier()
    alignment = gradient_alignment(objective, 6, updates={"step": objective.gradient().flip(0)}, generator=generator())
    U = torch.linalg.eigh(GGNOperator(objective).to_dense()).eigenvectors.flip(1)[:, :4]
    structure = class_structure(objective, top=U)
    assert structure.overlap is not None
    assert structure.overlap.overlap > structure.overlap.chance
    for result in (alignment, structure, structure.overlap):
        json.dumps(result.to_dict(), allow_nan=False)
    assert "class_factor" not in structure.to_dict()
    assert plot_alignment(alignment).get_ylim()[1] > 1
    cells = plot_overlaps(overlap_over_time([U, U[:, :2]]), ["a", "b"])
    assert [text.get_text() for text in cells.texts] == ["1.00", "0.71", "1.00"]
    assert "of the trace" in plot_class_structure(structure).texts[0].get_text()
