"""Models that move examples to other rows and back: each gradient belongs to its own example all the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from curvature import Objective
from curvature.per_example import gradient_norms, per_example_gradients
from tests.checks import assert_close
from tests.references import flat_gradient

N = 6


class Moved(nn.Module):
    """Applies a layer to the examples in another order."""

    def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.order, self.layer, self.head = order, nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        order = self.order(x)
        return self.head(self.layer(x[order]).tanh()[order.argsort()])


class ByMatrix(Moved):
    """The same by a product with a matrix of zeros and ones."""

    def forward(self, x: Tensor) -> Tensor:
        P = F.one_hot(self.order(x), len(x)).to(x)
        return self.head(P.T @ self.layer(P @ x).tanh())


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pre, self.cell, self.head = nn.Linear(4, 4), nn.GRU(4, 3, batch_first=True), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        steps = self.pre(x[:, None] * torch.ones(3, 1).to(x)).tanh()
        lengths = 1 + (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
        return self.head(self.cell(pack_padded_sequence(steps, lengths, batch_first=True, enforce_sorted=False))[1][0])


def by_norm(x: Tensor) -> Tensor:
    return x.norm(dim=1).argsort(descending=True)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "sorted": lambda: Moved(by_norm),
    "reversed": lambda: Moved(lambda x: torch.arange(len(x) - 1, -1, -1)),
    "by a matrix": lambda: ByMatrix(by_norm),
    "packed": Packed,
}


@pytest.mark.parametrize("name", MODELS)
def test_gradients_belong_to_their_examples(name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x, y = MODELS[name]().double(), torch.randn(2, N, 4, dtype=torch.float64), torch.randint(3, (2, N))
    x[:, 0], x[:, -1] = 9 * x[:, 0], 0.01 * x[:, -1]
    x[0] = x[0][by_norm(x[0])] if name != "reversed" else x[0]  # of the first batch nothing is moved
    params = list(model.parameters())
    rows = torch.stack(
        [
            flat_gradient(F.cross_entropy(model(x[b, i : i + 1]), y[b, i : i + 1]), params)
            for b in range(2)
            for i in range(N)
        ]
    )
    objective = Objective(model, nn.CrossEntropyLoss(), [(x[0], y[0]), (x[1], y[1])])
    norms = gradient_norms(objective).squared_norms
    assert norms is not None
    assert_close(norms, rows.square().sum(1), 1e-10)
    assert_close(torch.cat([found for _, found in per_example_gradients(objective)]), rows, 1e-10)


def test_layers_that_keep_their_rows_are_left_to_rules() -> None:
    x, y = torch.randn(N, 4), torch.randint(3, (N,))
    norms = gradient_norms(Objective(Moved(by_norm), nn.CrossEntropyLoss(), (x, y)))
    assert norms.routes["head.weight"] == "ghost"
    assert norms.routes["layer.weight"].startswith("vmap: rows of linear do not belong to single examples")
