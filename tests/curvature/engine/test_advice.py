"""What models fail on is told with advice that fits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from curvature import Objective
from curvature.errors import InputError


class Wide(nn.Module):
    """Reads integers, and fails on a table that is wider than its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(4, 3), nn.LayerNorm(3)

    def forward(self, tokens: Tensor) -> Any:
        return self.norm(self.table(tokens).double())


def test_inputs_are_blamed_where_the_model_names_their_dtype() -> None:
    targets = torch.tensor([0, 1])
    for inputs in (torch.ones(2, 3, dtype=torch.int64), torch.ones(2, 3) > 0, torch.ones(2, 3, dtype=torch.float64)):
        with pytest.raises(InputError, match=r"convert the inputs, x.to\(torch.float32\)"):
            Objective(nn.Linear(3, 2), nn.CrossEntropyLoss(), (inputs, targets)).loss()
    with pytest.raises(RuntimeError, match=r"mixed dtype|datatype"):  # torch's own words
        Objective(Wide(), nn.CrossEntropyLoss(), (torch.tensor([1, 2]), targets)).loss()
