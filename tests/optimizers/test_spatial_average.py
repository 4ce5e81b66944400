"""Spatial averages against sums written out entry by entry."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from curvature.errors import InputError
from optimizers.diagonal.spatial_average import RULES, spatial_average
from tests.matrices import F64, generator


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(3), dtype=F64)


def kernel_means(values: Tensor) -> Tensor:
    """The mean over the axes from the third on, entry by entry."""
    result = torch.empty_like(values)
    for out, inward in itertools.product(range(values.shape[0]), range(values.shape[1])):
        entries = values[out, inward].reshape(-1).tolist()
        result[out, inward] = sum(entries) / len(entries)
    return result


@pytest.mark.parametrize("shape", [(4, 3, 5), (4, 3, 3, 2), (2, 3, 2, 3, 2), (1, 1, 1, 1)])
@pytest.mark.parametrize("rule", ["paper", 1, 7])
def test_convolution_kernels_are_averaged_over_their_spatial_axes(shape: tuple[int, ...], rule: str | int) -> None:
    values = drawn(*shape)
    torch.testing.assert_close(spatial_average(values, rule), kernel_means(values))


def test_rows_are_averaged_in_blocks() -> None:
    values = drawn(5, 12)
    for b in (1, 2, 3, 4, 6, 12):
        average = spatial_average(values, b)
        for i, j in itertools.product(range(5), range(12)):
            first = j // b * b
            expected = sum(float(values[i, k]) for k in range(first, first + b)) / b
            assert abs(float(average[i, j]) - expected) < 1e-14


def test_public_implementations_by_name() -> None:
    matrix, kernels, series = drawn(4, 16), drawn(4, 3, 3, 3), drawn(2, 3, 4)
    for rule in ("official", "torch_optimizer"):
        assert spatial_average(matrix, rule) is matrix
        torch.testing.assert_close(spatial_average(kernels, rule), kernel_means(kernels))
    torch.testing.assert_close(spatial_average(kernels, "instruction"), kernel_means(kernels))
    torch.testing.assert_close(spatial_average(series, "instruction"), kernel_means(series))
    torch.testing.assert_close(spatial_average(matrix, "instruction"), spatial_average(matrix, 16))
    blocks = spatial_average(matrix, "fairseq")  # flat blocks of 32 cross the rows of 16
    for first in (0, 2):
        expected = sum(matrix[first : first + 2].reshape(-1).tolist()) / 32
        torch.testing.assert_close(blocks[first : first + 2], torch.full((2, 16), expected, dtype=F64))
    for rule in ("none", "davda54", "kozistr", None):
        assert spatial_average(kernels, rule) is kernels


@pytest.mark.parametrize("rule", [*RULES, None, 3])
def test_vectors_and_scalars_stay_as_they_are(rule: str | int | None) -> None:
    for values in (drawn(5), torch.tensor(2.0)):
        assert spatial_average(values, rule) is values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_the_result_is_a_tensor_of_its_own_with_the_layout_of_the_values(dtype: torch.dtype) -> None:
    values = drawn(4, 6, 3, 3).to(dtype).to(memory_format=torch.channels_last)
    before = values.clone()
    average = spatial_average(values)
    assert average.dtype == dtype
    assert average.stride() == values.stride()
    average.mul_(2)  # an expanded view would refuse
    assert torch.equal(values, before)


def test_the_noise_of_one_probe_falls_by_the_block() -> None:
    noise = torch.randn(200, 50, 3, 3, generator=generator(), dtype=F64)
    assert abs(float(spatial_average(noise).std()) * 3 - 1) < 0.02
    assert abs(float(spatial_average(noise.reshape(2000, 45), 9).std()) * 3 - 1) < 0.02


@pytest.mark.parametrize(
    ("shape", "rule", "message"),
    [
        ((4, 10), 4, r"blocks of b = 4 entries must divide a row, but the shape is \(4, 10\)"),
        ((4, 10), 0, "an integer b >= 1 or None, got 0"),
        ((4, 10), True, "rule must be one of paper"),
        ((4, 10), 2.0, "rule must be one of paper"),
        ((4, 10), "papre", "rule must be one of paper, none, .*, got 'papre'"),
        ((3, 3), "fairseq", "blocks of b = 32 entries must divide a tensor"),
        ((2, 3, 4), "official", "'official' has no rule for tensors of 3 dimensions"),
        ((2, 3, 4, 5, 6), "instruction", "'instruction' has no rule for tensors of 5 dimensions"),
        ((2, 3, 4, 5), "fairseq", "'fairseq' has no rule for tensors of 4 dimensions"),
    ],
)
def test_bad_input(shape: tuple[int, ...], rule: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spatial_average(drawn(*shape), rule)
