"""Set-up of all tests."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and sums come out alike on every machine


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Models are drawn from torch's own generator: the same ones in every run and every order of the tests."""
    torch.manual_seed(0)
