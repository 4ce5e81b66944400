"""Do two micro-batches take the steps of the batch that they make up? On digits, after 25 steps.

Both accumulate the same gradient but for rounding. What an optimizer makes of the difference is how far a run can be
repeated on another number of devices.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.optimizers.peers import Method

__all__ = ["MICRO", "micro_differences"]

MICRO = (
    *("adamw", "muon", "soap", "soap-continuous", "shampoo"),
    *("official-soap", "kozistr-soap", "kozistr-shampoo", "meta-shampoo"),
)
EXAMPLES, STEPS, LR = 32, 25, 3e-3


def micro_differences(method: Method, *, seeds: int) -> list[float]:
    """Return, for every seed, how far the 25th update of 2 x 16 examples is from that of 1 x 32, relative to it."""
    from analysis.tasks.digits import load_digits

    (images, labels), _ = load_digits()
    found = []
    for seed in range(seeds):
        joined, parts = (_last_update(method, images.flatten(1), labels, seed, n) for n in (1, 2))
        found.append(float((joined - parts).norm() / joined.norm()))
    return found


def _last_update(method: Method, x: Tensor, y: Tensor, seed: int, num_parts: int) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))
    params = list(model.parameters())
    optimizer = method.make(params, LR, nn.CrossEntropyLoss())
    generator = torch.Generator().manual_seed(seed)
    before: list[Tensor] = []
    for _ in range(STEPS):
        before = [p.detach().clone() for p in params]
        rows = torch.randperm(len(x), generator=generator)[:EXAMPLES]
        optimizer.zero_grad()
        for part in rows.chunk(num_parts):
            (F.cross_entropy(model(x[part]), y[part]) / num_parts).backward()
        optimizer.step()
    return torch.cat([(p.detach() - q).flatten() for p, q in zip(params, before, strict=True)])
