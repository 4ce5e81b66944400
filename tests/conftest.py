"""Set-up of all tests."""

from __future__ import annotations

import gc

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that no process is left alone with them at the end."""
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)


def pytest_collection_finish() -> None:
    """Take what imports made, 400,000 objects, out of all later collections and counts: tests ask for many."""
    gc.collect()
    gc.freeze()
