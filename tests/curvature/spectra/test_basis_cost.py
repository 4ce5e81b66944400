"""What a basis takes beside products, counted by hand, and that no second one is held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from curvature.linalg import ThickRestartLanczos, eigsh
from curvature.linalg.krylov import _krylov_space
from curvature.linalg.krylov._krylov_space import KrylovSpace
from curvature.results.estimates import Status
from curvature.spectra import analysis, basis_cost
from curvature.spectra.basis_cost import block_seconds
from curvature.spectra.spectrum import spectrum
from curvature.spectra.spectrum_plan import SpectrumPlan

CPU = torch.device("cpu")


def _timed(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float]:
    """A machine that reads 16 rows of 2^21 entries of four bytes, 128 MiB, in a second."""
    assert device == CPU
    return work(), 1.0


def test_a_basis_is_read_four_times_a_step_and_once_for_each_pass_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis_cost, "timed", _timed)
    n = 1 << 22  # a vector is 16 MiB, an eighth of what is read in a second
    own: dict[str, Any] = {"width": 4, "steps": 10, "singles": 0, "passes": 0, "place": CPU}
    every = block_seconds(n, torch.float32, **own)
    assert every == pytest.approx(4 * 10 * 20 / 8)  # half of 40 vectors on average, in ten steps
    assert block_seconds(n, torch.float32, **{**own, "passes": 4}) == pytest.approx(2 * every)
    assert block_seconds(n, torch.float32, **{**own, "singles": 5}) == pytest.approx(
        every + 5 * 40 / 8
    )  # of one vector
    on_disk = block_seconds(n, torch.float32, **{**own, "place": "disk"})
    assert on_disk == pytest.approx(every + 10 * 20 * n * 4 / 1.2e9)
    assert block_seconds(1000, torch.float32, **own) == 0  # not worth a timing


def test_the_price_of_a_spectrum_holds_its_bases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every matrix that is not computed entry by entry, with groups where there are batches enough for them."""
    calls: list[dict[str, Any]] = []

    def counted(n: int, dtype: torch.dtype, **how: Any) -> float:
        assert n >= 10**5
        assert dtype == torch.float32
        calls.append(how)
        return 2.0

    monkeypatch.setattr("curvature.spectra.spectrum_plan.block_seconds", counted)
    A, made = torch.eye(4), SpectrumPlan()
    assert made.seconds_of_bases(A, [10**6, 20, 10**5], CPU, num_batches=5) == 4
    steps = made.num_steps_for(10**6)
    assert calls[0] == {"width": 4, "steps": steps, "singles": 58, "passes": 2, "place": CPU}
    assert made.seconds_of_bases(A, [10**6], "disk", num_batches=3) == 2
    assert (calls[-1]["passes"], calls[-1]["place"]) == (0, "disk")


@pytest.mark.parametrize("place", [None, "disk"])
def test_pairs_are_continued_where_the_basis_was_and_without_it(
    place: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    spaces: list[KrylovSpace] = []
    begin = KrylovSpace.start
    seen: list[tuple[Any, int]] = []

    def started(space: KrylovSpace, X: Tensor) -> None:
        spaces.append(space)
        begin(space, X)

    def continued(*args: Any, **how: Any) -> Any:
        seen.append((how["basis_device"], len(spaces[0].rows)))
        return eigsh(*args, **how)

    monkeypatch.setattr(KrylovSpace, "start", started)
    monkeypatch.setattr(analysis, "eigsh", continued)
    A = torch.diag(torch.linspace(0, 1, 600, dtype=torch.float64))
    settings = SpectrumPlan(k=8, num_bottom=2, rtol=1e-3, num_steps=5)
    found = spectrum(A, settings, generator=0, basis_device=place)
    assert bool(found.top.converged.all())
    assert seen == [(CPU if place is None else "disk", 0)] * len(seen)
    assert seen
    torch.testing.assert_close(
        found.top.eigenvalues, torch.linspace(0, 1, 600, dtype=torch.float64).flip(0)[:8], rtol=1e-4, atol=0
    )


@pytest.mark.parametrize("small", [0, 1 << 25])
def test_a_plan_knows_what_a_basis_holds_while_a_chain_makes_it_grow(
    monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    monkeypatch.setattr(_krylov_space, "_SMALL", small)
    held: list[int] = []
    made = _krylov_space.empty_rows

    def noted(count: int, *rest: Any) -> Tensor:
        held.append(count)
        return made(count, *rest)

    monkeypatch.setattr(_krylov_space, "empty_rows", noted)
    A = torch.diag(torch.linspace(1, 2, 400, dtype=torch.float64) ** 12)
    solver = ThickRestartLanczos(A, 3, generator=0)
    assert solver.run().status is Status.CONVERGED
    assert len(held) > 1, "the chain needed no room, and nothing was tested"
    used = solver.space.count + solver.space.num_directions
    filled = min(held[1], used)  # rows that were never written take no memory
    most = max(held[0] + held[0], filled) if small else held[-2] + held[-1]
    assert _krylov_space.most_rows(held[0], used, A.shape[0]) == most
