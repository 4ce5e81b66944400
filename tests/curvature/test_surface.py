"""What a caller hands in: matrices in all their forms, seeds, NumPy vectors; and substreams of generators."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import curvature
from curvature import HessianOperator, JacobianOperator, Objective, linalg
from curvature.errors import InputError
from curvature.generators import as_generator, spawn
from curvature.linop import LinearOperator, Scaled, to_dense
from tests.matrices import F64


def make_objective() -> Objective:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    return Objective(model, nn.CrossEntropyLoss(), (torch.randn(12, 3, dtype=F64), torch.randint(2, (12,))))


N = 26
B = torch.linspace(1, 2, N, dtype=F64)
CALLS: dict[str, Callable[..., Any]] = {
    "eigsh": lambda A, **k: linalg.eigsh(A, 2, method="lanczos", rtol=1e-8, generator=1, **k).eigenvalues,
    "class": lambda A, **k: linalg.ThickRestartLanczos(A, 2, rtol=1e-8, generator=1, **k).run().eigenvalues,
    "lobpcg": lambda A, **k: linalg.lobpcg(A, 2, rtol=1e-8, generator=1, **k).eigenvalues,
    "randomized_eigh": lambda A, **k: linalg.randomized_eigh(A, 3, generator=1, **k).eigenvalues,
    "trace": lambda A, **k: linalg.trace(A, num_matvecs=9, generator=1, **k).value,
    "diagonal": lambda A, **k: linalg.diagonal(A, num_matvecs=9, generator=1, **k).value,
    "frobenius_norm": lambda A, **k: linalg.frobenius_norm(A, num_matvecs=9, generator=1, **k).value,
    "spectral_norm": lambda A, **k: linalg.spectral_norm(A, generator=1, **k).lower,
    "spectral_density": lambda A, **k: linalg.spectral_density(A, num_probes=2, num_steps=4, generator=1, **k).nodes,
    "spectrum": lambda A, **k: curvature.spectrum(A, generator=1, **k).top.eigenvalues,
    "lanczos": lambda A, **k: linalg.lanczos(A, B, num_steps=3, **k).alpha,
    "matrix_function": lambda A, **k: linalg.matrix_function(A, B, "exp", **k).value,
    "cg": lambda A, **k: linalg.cg(A, B, damping=3.0, **k).x,
    "minres": lambda A, **k: linalg.minres(A, B, damping=3.0, **k).x,
    "gltr": lambda A, **k: linalg.gltr(A, B, 0.5, **k).step,
    "trust_region": lambda A, **k: linalg.trust_region(A, B, 0.5, **k).step,
    "cubic_subproblem": lambda A, **k: linalg.cubic_subproblem(A, B, 0.5, **k).step,
    "plan": lambda A, **k: torch.tensor(curvature.plan(A, **k).num_matvecs),
}


@pytest.mark.parametrize("name", CALLS)
def test_all_forms_of_a_matrix_give_the_same(name: str) -> None:
    call, objective = CALLS[name], make_objective()
    dense = to_dense(HessianOperator(objective))
    dense = (dense + dense.T) / 2
    expected = call(dense)
    for A in (dense.numpy(), HessianOperator(objective), objective):
        torch.testing.assert_close(call(A), expected, rtol=1e-6, atol=1e-8)
    ggn = to_dense(curvature.GGNOperator(objective))
    torch.testing.assert_close(call(objective, matrix="ggn"), call((ggn + ggn.T) / 2), rtol=1e-6, atol=1e-8)


def test_nystrom_and_layers_take_an_objective() -> None:
    objective = make_objective()
    found = linalg.nystrom(objective, rank=26, matrix="ggn", generator=1)
    expected = torch.linalg.eigvalsh(to_dense(curvature.GGNOperator(objective))).flip(0)
    torch.testing.assert_close(found.eigenvalues[:4], expected[:4], rtol=1e-6, atol=0)
    layers = curvature.layer_spectra(objective, generator=1)
    by_operator = curvature.layer_spectra(HessianOperator(objective), generator=torch.Generator().manual_seed(1))
    assert torch.equal(layers["0"].top.eigenvalues, by_operator["0"].top.eigenvalues)
    with pytest.raises(InputError, match="layers are those of an objective"):
        curvature.layer_spectra(torch.eye(3), generator=1)


def test_a_seed_is_a_generator() -> None:
    A = torch.diag(torch.linspace(1, 50, 50))
    given = linalg.trace(A, num_matvecs=10, method="xtrace", generator=torch.Generator().manual_seed(5))
    for seed in (5, np.int64(5)):
        assert torch.equal(linalg.trace(A, num_matvecs=10, method="xtrace", generator=seed).samples, given.samples)
    assert torch.equal(
        linalg.normal(3, 2, generator=5, dtype=F64),
        linalg.normal(3, 2, generator=torch.Generator().manual_seed(5), dtype=F64),
    )
    for wrong in (None, True, "0", 1.0):
        with pytest.raises(InputError, match=r"generator must be an integer seed or a torch.Generator"):
            as_generator(wrong)  # type: ignore[arg-type]


def test_substreams_differ_from_each_other_and_are_the_same_from_the_same_state() -> None:
    first, second = (torch.stack([torch.rand(4, generator=g) for g in spawn(3, 3)]) for _ in range(2))
    assert torch.equal(first, second)
    assert len(first.unique()) == 12
    source = torch.Generator().manual_seed(3)
    again, later = (torch.stack([torch.rand(4, generator=g) for g in spawn(source, 3)]) for _ in range(2))
    assert torch.equal(again, first)
    assert len(torch.cat([again, later]).unique()) == 24


def test_transposes_and_numpy_vectors() -> None:
    objective = make_objective()
    H, J = HessianOperator(objective), JacobianOperator(objective)
    x, u = torch.linspace(-1, 1, N, dtype=F64), torch.linspace(0, 1, 24, dtype=F64)
    assert H.T is H
    product = H @ x.numpy()
    assert isinstance(product, np.ndarray)
    np.testing.assert_array_equal(product, (H @ x).numpy())
    dense = J.to_dense()
    for operator, expected in (
        (J.T, dense.T),
        (J.T.T, dense),
        ((J @ H).T, (dense @ H.to_dense()).T),
        (Scaled(J, 2.0).T, 2 * dense.T),
        ((J + J).T, 2 * dense.T),
    ):
        torch.testing.assert_close(to_dense(operator), expected, rtol=1e-10, atol=1e-12)
    exported = J.to_scipy()
    np.testing.assert_allclose(exported.rmatvec(u.numpy()), (dense.T @ u).numpy(), atol=1e-12)
    np.testing.assert_allclose(exported.rmatmat(u.numpy()[:, None]), (dense.T @ u).numpy()[:, None], atol=1e-12)

    class Forward(LinearOperator):
        def _matmat(self, X: Tensor) -> Tensor:
            return X

    with pytest.raises(InputError, match="Forward knows products with A only"):
        _ = Forward((3, 3), F64, "cpu").T @ torch.ones(3, dtype=F64)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_objectives_operators_and_results_can_be_copied_and_pickled(duplicate: Callable[[Any], Any]) -> None:
    objective = make_objective()
    v = torch.linspace(-1, 1, N, dtype=F64)
    expected = HessianOperator(objective) @ v  # graphs are kept from here on
    assert duplicate(objective).held_bytes == 0
    drawn = curvature.MCFisherOperator(objective, generator=1)
    for A in (HessianOperator(objective), drawn, JacobianOperator(objective)):
        assert torch.equal(duplicate(A) @ v, A @ v)
        assert torch.equal(duplicate(A).T @ (A @ v), A.T @ (A @ v))
    assert torch.equal(HessianOperator(duplicate(objective)) @ v, expected)
    found = curvature.spectrum(objective, generator=1)
    assert torch.equal(duplicate(found).top.eigenvectors, found.top.eigenvectors)
    solved = curvature.solve(objective, v, matrix="ggn", damping=1.0)
    assert duplicate(solved).status is solved.status


def test_parameters_may_be_named_by_themselves() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    data = (torch.randn(5, 3), torch.randint(2, (5,)))
    whole = Objective(model, nn.CrossEntropyLoss(), data, params=list(model.parameters()))
    assert whole.space.names == ("0.weight", "0.bias", "2.weight", "2.bias")
    last = Objective(model, nn.CrossEntropyLoss(), data, params=[model[2].bias, model[0].weight])
    assert last.space.names == ("0.weight", "2.bias")
    assert HessianOperator(whole).restrict([model[2].bias]).shape == (2, 2)
    with pytest.raises(curvature.CurvatureError, match=r"a tensor of shape \(2, 2\) .* is none of the model's param"):
        Objective(model, nn.CrossEntropyLoss(), data, params=[torch.ones(2, 2)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there_is_refused_in_a_sentence() -> None:
    model, data = nn.Linear(2, 1), (torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(InputError, match=r"device must be a device that there is here, .*got 'cuda'"):
        Objective(model, nn.MSELoss(), data, device="cuda")
    with pytest.raises(InputError, match="device must be a device that there is here"):
        linalg.normal(3, 2, generator=0, dtype=F64, device="cuda")
