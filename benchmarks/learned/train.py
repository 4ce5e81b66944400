"""Meta-train the learned optimizer: `python -m benchmarks.learned.train`.

Every meta-step draws a task and trains it from beginning to end under pairs of networks, weights plus and minus noise
e of size sigma; a pair shares its start and batches. With L the loss on all training data,

    F = log L at the end + 0.2 (mean of log L at 1/4, 1/2 and 3/4 of the training)
    gradient = mean over pairs of (F(w + e) - F(w - e)) / (2 sigma^2) e

and Adam moves the weights by it: evolution strategies, over whole trainings and so without the bias of truncated ones
(Metz et al. 2022). It begins with Adam of rate 0.06. The state lies in a file, and a run goes on from there; at the end
the average of the last weights is written to where the package reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.learned.tasks import Digits, drawn
from optimizers.learned.network import DECAYS, NUM_WEIGHTS, SQUARES, WEIGHTS, initial_weights, update

__all__ = ["adam_direction", "main", "meta_step", "outcome", "trained"]

PAIRS, SIGMA, RATE, AVERAGE = 6, 0.06, 0.02, 0.98
MOST = 2.0
"""By which a pair's outcomes count as different at most: a training that diverged says no more than that."""


def trained(task: Digits, weights: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Train every copy by its network, (copies, NUM_WEIGHTS); return parameters, and log-losses at the quarters."""
    params = [p.clone() for p in task.params]
    means, squares = ([[torch.zeros_like(p) for _ in decays] for p in params] for decays in (DECAYS, SQUARES))
    total, logs = task.draw.steps, []
    quarters = {round(total * k / 4) for k in (1, 2, 3, 4)}
    for t in range(1, total + 1):
        grads = task.gradients(params, t)
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            change, means[i], squares[i] = update(
                weights, p, g, means[i], squares[i], shape=task.shapes[i], step=t, num_steps=total
            )
            p += change
        if t in quarters:
            logs.append(task.losses(params).log())
    return params, logs


def outcome(logs: list[Tensor]) -> Tensor:
    """Return what meta-training lowers, (copies,)."""
    return logs[-1] + 0.2 * torch.stack(logs[:-1]).mean(0)


def begin() -> dict[str, Any]:
    """Return the state before the first meta-step."""
    weights, zero = initial_weights(), torch.zeros(NUM_WEIGHTS)
    return {"meta_step": 0, "weights": weights, "average": weights.clone(), "m": zero, "v": zero.clone()}


def adam_direction(gradient: Tensor, m: Tensor, v: Tensor, step: int, *, beta2: float) -> Tensor:
    """Return what Adam multiplies its rate with, elementwise and so for any number of copies; m and v are moved."""
    m.lerp_(gradient, 0.1)
    v.lerp_(gradient.square(), 1 - beta2)
    return (m / (1 - 0.9**step)) / ((v / (1 - beta2**step)).sqrt() + 1e-8)


@torch.no_grad()
def meta_step(state: dict[str, Any], num_steps: float, *, device: str = "cpu") -> dict[str, float]:
    """Take one step of Adam on a task of its own."""
    number = state["meta_step"] + 1
    generator = torch.Generator().manual_seed(number)
    task = Digits(drawn(generator), PAIRS, 2, generator, device)
    noise = SIGMA * torch.randn(PAIRS, NUM_WEIGHTS, generator=generator)
    weights = state["weights"] + torch.stack([noise, -noise], 1).flatten(0, 1)
    found = outcome(trained(task, weights.to(device))[1]).cpu()
    found = found.nan_to_num(nan=10.0).clamp(-20.0, 10.0).unflatten(0, (PAIRS, 2))  # a loss may be 0
    difference = (found[:, 0] - found[:, 1]).clamp(-MOST, MOST)
    gradient = (difference[:, None] * noise).mean(0) / (2 * SIGMA**2)
    state["meta_step"], m, v = number, state["m"], state["v"]
    direction = adam_direction(gradient, m, v, number, beta2=0.99)
    state["weights"] -= RATE * 0.5 * (1 + math.cos(math.pi * min(1.0, number / num_steps))) * direction
    state["average"].lerp_(state["weights"], 1 - AVERAGE)
    return {"meta_step": number, "steps": task.draw.steps, "outcome": float(found.mean())}


def main() -> None:
    """Take meta-steps, from where the last run stopped, and write the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=920, help="meta-steps in all")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--state", type=Path, default=Path("learned-state.pt"))
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    given = parser.parse_args()
    state = torch.load(given.state, weights_only=True) if given.state.exists() else begin()
    state.setdefault("seconds", 0.0)
    while state["meta_step"] < given.steps:
        began = time.process_time()
        row = meta_step(state, given.steps, device=given.device)
        state["seconds"] += time.process_time() - began
        if row["meta_step"] % 20 == 0:
            print(json.dumps({**row, "seconds": round(state["seconds"], 1)}), flush=True)
            torch.save(state, given.state)
    torch.save(state, given.state)
    about = {
        "meta_steps": state["meta_step"],
        "pairs": PAIRS,
        "cpu_minutes": round(state["seconds"] / 60, 1),
        "tasks": "benchmarks.learned.tasks.drawn",
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
    weights = [round(float(w), 5) for w in state["average"]]
    given.out.write_text(json.dumps({"about": about, "weights": weights}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
