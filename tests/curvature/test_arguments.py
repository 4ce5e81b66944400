"""Arguments of a wrong kind: a sentence that names the argument, what it may be and what it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from curvature import GGNOperator, HessianOperator, MCFisherOperator, Objective, SpectrumPlan, eigsh, solve
from curvature.arguments import checked
from curvature.errors import InputError
from curvature.linalg import RelativeProgress, cg, normal, spectral_density, trace

A = torch.diag(torch.arange(1.0, 7.0))
v = torch.ones(6)
G = torch.Generator().manual_seed(0)
OBJECTIVE = Objective(nn.Linear(2, 1), nn.MSELoss(), (torch.randn(3, 2), torch.randn(3, 1)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HessianOperator(None), r"objective must be an Objective, got None"),
        (lambda: GGNOperator(OBJECTIVE, "0"), r"block must be a Block or None, got '0'"),
        (lambda: MCFisherOperator(OBJECTIVE, generator="0"), r"generator must be .* or an integer, got '0'"),
        (
            lambda: eigsh(OBJECTIVE, 2, matrix="hesian", generator=G),
            r"matrix must be one of hessian, .*got 'hesian'",
        ),
        (
            lambda: eigsh(np.eye(3, dtype=int), 1, generator=G),
            r"A must be a matrix .*got a ndarray .* and int64",
        ),
        (lambda: solve(OBJECTIVE, v), r'say which matrix of the objective .* matrix="ggn"'),
        (lambda: eigsh(A, "2", generator=G), r"k must be an integer, got '2'"),
        (lambda: eigsh(A, True, generator=G), r"k must be an integer, got True"),
        (lambda: eigsh(A, 2.5, generator=G), r"k must be an integer, got 2.5"),
        (lambda: eigsh(A, 2, generator=G, basis_device="cuda:77"), r"basis_device must be a device that there is"),
        (
            lambda: eigsh(A, 2, generator=G, basis_dtype="half"),
            r"basis_dtype must be a torch.dtype or None, got 'half'",
        ),
        (lambda: cg(A, [1.0] * 6), r"B must be a dense tensor, got a list"),
        (lambda: cg(A, v.to_sparse()), r"B must be a dense tensor, got .*sparse_coo; call .to_dense\(\)"),
        (lambda: cg(A, v.to("meta")), r"B must be a dense tensor, got .* on meta"),
        (lambda: cg(A, v, damping="1"), r"damping must be a number, got '1'"),
        (lambda: cg(A, v, damping=10**400), r"damping must be a number, got a huge integer"),
        (lambda: cg(A, v, callback=3), r"callback must be callable or None, got 3"),
        (lambda: solve(A, v, x0=1), r"x0 must be a dense tensor or None, got 1"),
        (lambda: SpectrumPlan(k=None), r"k must be an integer, got None"),
        (lambda: RelativeProgress(share="a"), r"share must be a number, got 'a'"),
        (lambda: OBJECTIVE.space.to_flat(None), r"named must be a mapping, got None"),
        (
            lambda: trace(A, num_matvecs=4, generator=None),
            r"generator must be .* or an integer, got None",
        ),
        (lambda: normal(10**9, 10**9, generator=G, dtype=torch.float32), r"probes of length 1000000000 takes .* free"),
        (
            lambda: spectral_density(A, num_probes=2, num_steps=3, generator=G, num_points=10**12),
            "take fewer num_points",
        ),
        (lambda: Objective(nn.Linear(1, 1), nn.MSELoss(), v, params=np.ones(2)), "params must be globs, .*got ndarray"),
        (lambda: Objective(nn.Linear(1, 1), nn.MSELoss(), v, memory_budget="1G"), "memory_budget must be .*, got '1G'"),
    ],
)
def test_refused_in_a_sentence(call: Any, message: str) -> None:
    with pytest.raises((InputError, ValueError), match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_numbers_of_other_libraries_pass() -> None:
    found = eigsh(A, np.int64(2), rtol=np.float32(1e-4), generator=G)
    torch.testing.assert_close(found.eigenvalues, torch.tensor([6.0, 5.0]), check_dtype=False)
    x = cg(A, v, damping=torch.tensor(1.0)).x
    torch.testing.assert_close(x, 1 / torch.arange(2.0, 8.0), rtol=1e-4, atol=1e-5)


def test_python_says_what_is_missing() -> None:
    @checked
    def function(k: int, *rest: int, name: str = "") -> tuple[int, tuple[int, ...], str]:
        return k, rest, name

    assert function(1, 2, 3, name="a") == (1, (2, 3), "a")
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        function()  # type: ignore[call-arg]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_check_works_where_gradients_are_off(mode: Any) -> None:
    with mode():
        assert OBJECTIVE.check().messages == OBJECTIVE.check().messages
