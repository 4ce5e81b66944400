"""The budget against loops whose times are known."""

from __future__ import annotations

import pytest
import torch

from analysis.training.budget import Budget


class Loop:
    """Rounds of one second; the first two after a reading take half a second more, hooks a hundredth."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, device: str, share: float) -> None:
        self.now, self.work, self.reads = 0.0, 0.0, list[int]()
        name = "process_time" if device == "cpu" else "perf_counter"
        monkeypatch.setattr(f"analysis.training.budget.time.{name}", lambda: self.now)
        self.budget = Budget(share, torch.device(device))

    def go(self, steps: int) -> None:
        for step in range(steps):
            self.now += 1.0 + 0.5 * (bool(self.reads) and step - self.reads[-1] <= 2)
            self.work += 1.0
            begun = self.budget.begin_round()
            self.now += 0.01
            if self.budget.steps_to_wait(step) > 0:
                self.budget.end_round(begun)
                continue
            begun = self.budget.begin()
            self.now += 4.0
            self.budget.end(begun)
            self.reads.append(step)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_that_a_tracker_does_is_charged(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    loop = Loop(monkeypatch, device, 0.1)
    loop.go(2000)
    training, readings, hooks = loop.budget.times()
    assert training == pytest.approx(2000, rel=0.01)
    assert readings == pytest.approx(len(loop.reads) * 5, rel=0.05)  # 4 seconds, and twice a half
    assert hooks == pytest.approx(20, rel=0.1)
    assert 0.085 < loop.now / loop.work - 1 < 0.09 + 1e-9  # a tenth is left for what no clock here sees


def test_a_budget_goes_on_from_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, "cpu", 0.1)
    loop.go(300)
    again = Budget(0.1, torch.device("cpu"))
    again.load(loop.budget.state())
    assert again.times() == pytest.approx(loop.budget.times())
    assert again.steps_to_wait(300) == pytest.approx(loop.budget.steps_to_wait(300))


def test_hooks_leave_half_of_the_budget_to_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    loop = Loop(monkeypatch, "cpu", 0.012)  # of which hooks alone take 0.01
    loop.go(8000)
    assert len(loop.reads) > 5
