"""Products by blocks that are known against the Hessian's own, and inspections with them against those without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from analysis.inspection import measure
from analysis.inspection.diagonal import exactly
from analysis.inspection.known_blocks import KnownBlocks, with_known_blocks
from curvature import HessianOperator, Objective
from curvature.engine.linearize import Linearization
from curvature.layerwise.blocks import DiagonalBlocks
from curvature.spectra.spectrum import layer_spectra
from curvature.spectra.spectrum_plan import SpectrumPlan


def objective(dtype: torch.dtype = torch.float64) -> Objective:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten()),
        *(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 3)),
    ).double()
    loss, x = nn.CrossEntropyLoss(ignore_index=0), torch.randn(160, 1, 6, 6).double().to(dtype)
    return Objective(net.eval().to(dtype), loss, (x, torch.randint(3, (160,))), micro_batch=36)


def known(o: Objective) -> KnownBlocks:
    H, _, (note,) = with_known_blocks(HessianOperator(o), o.space.blocks)
    assert isinstance(H, KnownBlocks)
    assert list(H.served) == ["0", "1", "5", "7"]
    assert all(difference < 1e-12 for difference in H.served.values())
    assert "the blocks of 0, 1, 5, 7 are made from their entries" in note
    return H


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def test_products_are_those_of_the_hessian_for_all_batches_and_each() -> None:
    o = objective()
    H, plain = known(o), HessianOperator(o)
    H._known.pop(o.space.blocks[2].parameters)  # one that was not filled
    X = torch.randn(o.num_params, 3, dtype=torch.float64)
    assert_same(H @ X, plain @ X)
    for chosen in ([None, *o.space.blocks], [o.space.blocks[1], o.space.blocks[0]]):
        parts = [X if block is None else block.take(X) for block in chosen]
        seen: list[list[Any]] = [[], []]
        for of, told in ((H, seen[0]), (plain, seen[1])):
            found = of.products(parts, chosen, observe=lambda *batch, told=told: told.append(batch))
            for block, x, y in zip(chosen, parts, found, strict=True):
                assert_same(y, plain.products([x], [block])[0])
        assert [batch[:2] for batch in seen[0]] == [batch[:2] for batch in seen[1]]
        for (*_, found), (*_, expected) in zip(*seen, strict=True):
            for y, z in zip(found, expected, strict=True):
                assert_same(y, z)
    for block in o.space.blocks:
        assert_same(H.restrict(block) @ block.take(X), plain.restrict(block) @ block.take(X))


def test_a_block_that_differs_from_products_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    o = objective()
    total = DiagonalBlocks.total

    def wrong(found: DiagonalBlocks, block: Any) -> Tensor:
        return total(found, block) * (1.001 if block.name == "1" else 1.0)

    monkeypatch.setattr(DiagonalBlocks, "total", wrong)
    H, _, _ = with_known_blocks(HessianOperator(o), o.space.blocks)
    assert isinstance(H, KnownBlocks)
    assert list(H.served) == ["0", "5", "7"]


def test_blocks_serve_at_their_point_alone() -> None:
    o = objective()
    H, block = known(o), o.space.blocks[1]
    z = torch.ones(block.num_params, 1, dtype=torch.float64)
    with torch.no_grad():
        next(o.model.parameters()).add_(0.1)
    assert_same(H.restrict(block) @ z, HessianOperator(o).restrict(block) @ z)


def test_an_inspection_is_that_without_them_and_takes_fewer_products(monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[int] = []
    hvp = Linearization.hvp

    def counted(lin: Linearization, X: Tensor, *block: Any) -> Tensor:
        rows.append(len(X))
        return hvp(lin, X, *block)

    monkeypatch.setattr(Linearization, "hvp", counted)
    found, spent = [], []
    for way in (with_known_blocks, lambda H, _: (H, exactly(H.objective), ())):
        monkeypatch.setattr(measure, "with_known_blocks", way)
        rows.clear()
        o = objective()
        settings = {"num_steps": 8, "k": 2, "num_bottom": 1}
        found.append(measure.inspect_model(o, generator=torch.Generator().manual_seed(0), **settings))  # type: ignore[arg-type]
        spent.append(sum(rows) / 5)
    of_layers = sum(layer.num_matvecs for layer in found[0].layers)
    assert spent[1] - spent[0] > of_layers - 10  # but a product a block
    rtol = 1e-6
    for one, other in zip(*(f.layers for f in found), strict=True):
        assert (one.name, one.exact, one.num_matvecs) == (other.name, other.exact, other.num_matvecs)
        assert one.top == pytest.approx(other.top, rel=rtol)
        assert one.bottom == pytest.approx(other.bottom, rel=rtol, abs=rtol * other.top)
        for name in ("trace", "effective_condition"):
            a, b = getattr(one, name), getattr(other, name)
            assert a.value == pytest.approx(b.value, rel=rtol)
            assert a.stderr == pytest.approx(b.stderr, rel=1e-2, abs=rtol * b.value)
            assert a.data_stderr == pytest.approx(b.data_stderr, rel=1e-2)
    assert torch.equal(found[0].top.eigenvalues, found[1].top.eigenvalues)


def test_eigenvalues_of_known_blocks_carry_their_rounding() -> None:
    """The entries are symmetric to the last bit, and no better than those of float32."""
    found = []
    for dtype in (torch.float32, torch.float64):
        o = objective(dtype)
        H, _, _ = with_known_blocks(HessianOperator(o), o.space.blocks)
        found.append(layer_spectra(H, SpectrumPlan(k=1, num_bottom=1), generator=0))
    for rounded, exact in zip(*(spectra.values() for spectra in found), strict=True):
        if rounded.exact:
            size = float(exact.top.eigenvalues[0])
            for one, other in ((rounded.top, exact.top), (rounded.bottom, exact.bottom)):
                gap = abs(float(one.eigenvalues[-1]) - float(other.eigenvalues[-1]))
                assert gap <= float(one.residual_norms[-1]) <= 1e-5 * size
