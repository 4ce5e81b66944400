"""Set-up of all tests."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(1)  # the models are tiny, and sums come out alike on every machine


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)
