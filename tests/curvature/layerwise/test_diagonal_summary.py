"""Summaries of diagonals against numbers taken entry by entry."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from curvature.errors import InputError
from curvature.layerwise.diagonal_summary import LEVELS, summarise_diagonal
from curvature.linalg import diagonal
from curvature.parameters import ParameterSpace
from curvature.results.estimates import DiagonalEstimate
from tests.matrices import F64, generator, spectra, with_spectrum


def space() -> ParameterSpace:
    model = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)).double()
    return ParameterSpace.from_model(model)


def test_rows_are_the_numbers_of_their_entries() -> None:
    parameters = space()
    values = torch.randn(parameters.num_params, generator=generator(), dtype=F64)
    stderr = torch.rand(parameters.num_params, generator=generator(1), dtype=F64)
    estimate = DiagonalEstimate(value=values, stderr=stderr, num_matvecs=7, method="hutchinson")
    for by, expected in (
        ("layer", {"0": (0, 25), "1": (25, 35), "2": (35, 53)}),
        (
            "parameter",
            {
                "0.weight": (0, 20),
                "0.bias": (20, 25),
                "1.weight": (25, 30),
                "1.bias": (30, 35),
                "2.weight": (35, 50),
                "2.bias": (50, 53),
            },
        ),
    ):
        summary = summarise_diagonal(estimate, parameters, by=by)  # type: ignore[arg-type]
        assert [row.name for row in summary.rows] == list(expected)
        assert (summary.num_matvecs, summary.method) == (7, "hutchinson")
        for row, (start, stop) in zip(summary.rows, expected.values(), strict=True):
            x, e = values[start:stop].numpy(), stderr[start:stop].numpy()
            assert row.num_params == stop - start
            assert row.mean == pytest.approx(x.mean())
            assert row.quantiles == pytest.approx(np.quantile(x, LEVELS).tolist())
            assert row.share_negative == pytest.approx((x < 0).sum() / len(x))
            assert row.relative_noise == pytest.approx(math.sqrt((e**2).sum() / (x**2).sum()))
            assert row.mean_stderr == pytest.approx(math.sqrt(2 * (e**2).sum()) / len(x))
        json.dumps(summary.to_dict())


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
def test_the_standard_error_of_a_mean_is_the_truth(method: str) -> None:
    parameters = space()
    A = with_spectrum(spectra(53)["flat"])
    z = []
    for seed in range(400):
        estimate = diagonal(
            A, method=method, num_matvecs=50, generator=generator(seed), keep_samples=True, block_size=50
        )
        row = summarise_diagonal(estimate, parameters).rows[0]
        assert row.mean_stderr is not None
        z.append((row.mean - float(A.diagonal()[:25].mean())) / row.mean_stderr)
    assert 0.85 < torch.tensor(z).std() < 1.15


def test_the_standard_error_of_a_mean_without_samples_is_a_bound() -> None:
    parameters, A, z = space(), with_spectrum(spectra(53)["flat"]), []
    others = A.square().fill_diagonal_(0)[:25]
    expected = float((others.sum() + others[:, :25].sum()) / (2 * others.sum())) ** 0.5  # of the bound
    for seed in range(400):
        estimate = diagonal(A, method="hutchinson", num_matvecs=50, generator=generator(seed), block_size=50)
        row = summarise_diagonal(estimate, parameters).rows[0]
        assert row.mean_stderr is not None
        z.append((row.mean - float(A.diagonal()[:25].mean())) / row.mean_stderr)
    assert 0.85 * expected < torch.tensor(z).std() < 1.15 * expected < 1.15


def test_exact_diagonals_have_no_error() -> None:
    parameters = space()
    A = with_spectrum(spectra(53)["indefinite"])
    estimate = diagonal(A, num_matvecs=60, generator=generator())
    for row in summarise_diagonal(estimate, parameters).rows:
        assert row.mean_stderr == 0
        assert row.relative_noise == 0


def test_zero_diagonals_and_single_entries() -> None:
    one = ParameterSpace({"a": torch.zeros(1)})
    zero = DiagonalEstimate(value=torch.zeros(1), stderr=torch.zeros(1), num_matvecs=2)
    (row,) = summarise_diagonal(zero, one).rows
    assert row.quantiles == (0.0,) * 5
    assert row.share_negative == 0
    assert math.isnan(row.relative_noise)


def test_bad_input() -> None:
    estimate = diagonal(torch.eye(9), method="hutchinson", num_matvecs=2, generator=generator())
    with pytest.raises(InputError, match=r"shape \(53,\) as the parameters have, got \(9,\)"):
        summarise_diagonal(estimate, space())
    with pytest.raises(InputError, match='by must be "layer" or "parameter"'):
        summarise_diagonal(estimate, ParameterSpace({"a": torch.zeros(9)}), by="module")  # type: ignore[arg-type]
