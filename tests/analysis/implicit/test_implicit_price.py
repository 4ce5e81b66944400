"""The price of `curvature implicit` knows how many batches there are, and its bar ends where it said."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from analysis.implicit.measure import ImplicitPlan, num_pieces
from analysis.implicit.study import STUDY
from analysis.run.study import Work
from curvature import Objective
from curvature.engine.linearize import Linearization
from curvature.parameters import Block


def _objective() -> Objective:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, generator=g), torch.randn(24, 2, generator=g)
    return Objective(nn.Linear(3, 2), nn.MSELoss(), [(x[:14], y[:14]), (x[14:], y[14:])])


@pytest.mark.parametrize(("size", "pieces"), [(None, 2), (1, 24), (14, 24)])
def test_the_price_is_that_of_every_piece(size: int | None, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    objective = _objective()
    objective.loss()
    assert num_pieces(objective, size) == pieces
    plan = ImplicitPlan(lr=0.1, batch_size=size, k=1)
    work = STUDY.price(objective, plan)
    assert isinstance(work, Work)
    assert (work.products, sum(part.count for part in work.parts)) == (22, 0 if size is None else pieces)
    seen: list[tuple[int, int]] = []
    counted: list[int] = []
    hvp = Linearization.hvp

    def watched(lin: Linearization, X: Tensor, block: Block | None = None) -> Tensor:
        counted.append(len(X))
        return hvp(lin, X, block)

    monkeypatch.setattr(Linearization, "hvp", watched)
    generator = torch.Generator().manual_seed(0)
    STUDY.measure(objective, plan, generator=generator, progress=lambda _, done, total: seen.append((done, total)))
    assert seen[-1] == (20 + pieces, 20 + pieces)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert counted.count(2 if size is None else 1) >= pieces  # two products a batch, or one an example
