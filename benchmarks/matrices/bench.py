"""Optimizers that precondition matrices.

`python -m benchmarks.matrices.bench costs|runs [--problems ...] [--methods ...]`:

    costs   a step of a small GPT in steps of AdamW, factors measured and refreshed every tenth step: medians of the
            steps that do so and of the others, each beside a step of AdamW, put together nine to one
    runs    training runs of equal length, cosine over each, a small grid of learning rates with the first seed, the
            best one with further seeds; loss on training data, seconds of the process, gradients

Widths name the tokens of a step: the overhead does not grow with these.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.common.harness import Conditions
from benchmarks.common.problems import make_gpt
from benchmarks.common.suite import Row, Rows, command, stored
from benchmarks.newton.autoencoder import autoencoder
from optimizers import EKFAC, KFAC, SOAP, DampingRule, GaussNewton

__all__ = ["COSTS", "METHODS", "PROBLEMS", "cost_row", "main", "run_row"]

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Step = Callable[[nn.Module, Batch, float, "bool | None"], float]
"""(model, batch, factor on lr, whether a refresh is due; None leaves that to the optimizer) -> gradients it cost."""
PERIOD = 10
COSTS = {"width 128, 4096 tokens": (128, 64), "width 512, 8192 tokens": (512, 128)}
"""Width and sequences of 64 tokens."""


class Plain:
    """A first-order optimizer, stepped from a backward pass."""

    def __init__(self, make: Callable[[nn.Module, float], list[torch.optim.Optimizer]]) -> None:
        self.make = make

    def build(self, model: nn.Module, lr: float, loss: Loss) -> Step:
        """Return its step."""
        optimizers = self.make(model, lr)

        def step(model: nn.Module, batch: Batch, factor: float, due: bool | None) -> float:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr * factor
                for state in optimizer.state.values() if due is not None else ():
                    if "step" in state:  # refreshes fall on multiples
                        state["step"].fill_(10 * PERIOD - 1 if due else 10 * PERIOD)
                optimizer.zero_grad()
            loss(model(batch[0]), batch[1]).backward()
            for optimizer in optimizers:
                optimizer.step()
            return 1.0

        return step


class Closures:
    """One of ours that takes (outputs, targets), with its matrix from the first `share` of a batch drawn anew."""

    def __init__(self, make: Callable[..., Any], share: float = 1.0, **settings: Any) -> None:
        self.make, self.share, self.settings = make, share, settings

    def build(self, model: nn.Module, lr: float, loss: Loss) -> Step:
        """Return its step."""
        optimizer = self.make(model.parameters(), lr, loss=loss, **self.settings)
        generator = torch.Generator().manual_seed(7)
        share = self.share

        def step(model: nn.Module, batch: Batch, factor: float, due: bool | None) -> float:
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
                if due is not None:
                    group["num_steps"] = 0 if due else 1
            for state in optimizer.state.values() if due else ():
                if "schedule" in state:
                    state["schedule"][3] = -1e6  # its refresh is long ago
            measured = getattr(optimizer, "statistics_due", False)
            part = {} if share == 1 else {"curvature_closure": _part_of(batch, share, model, generator)}
            optimizer.step(lambda: (model(batch[0]), batch[1]), **part)
            if isinstance(optimizer, GaussNewton):
                assert optimizer.last_step is not None
                once = 2 / 3 if share == 1 else share  # the draw; with a forward pass of its own
                return 1 + once + 4 / 3 * share * optimizer.last_step.num_products + 1 / 3
            return 1 + 2 / 3 * measured

        return step


def _part_of(batch: Batch, share: float, model: nn.Module, generator: torch.Generator) -> Callable[[], Any]:
    """Return a closure on a random part of a batch, drawn once a step."""
    inputs, targets = batch
    chosen = torch.randperm(len(inputs), generator=generator)[: max(1, round(share * len(inputs)))]
    own = targets.reshape(len(inputs), -1, *targets.shape[1:]) if len(targets) != len(inputs) else targets
    part, wanted = inputs[chosen], own[chosen].flatten(0, 1) if own is not targets else targets[chosen]
    return lambda: (model(part), wanted)


def _adamw(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)]


def _muon(model: nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    inner = matrices[:-1] if tables else matrices  # and the head of a language model
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    first = torch.optim.Muon(inner, lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    return [first, torch.optim.AdamW(rest, lr, betas=(0.9, 0.99), weight_decay=0.0)]


_FLOORED = DampingRule(increase=2.0, decrease=0.5, minimum=1e-3)
METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "AdamW": (Plain(_adamw), (3e-3, 1e-2)),
    "SOAP": (Plain(lambda m, lr: [SOAP(m.parameters(), lr, weight_decay=0.0)]), (3e-3, 1e-2, 3e-2)),
    "Muon": (Plain(_muon), (1e-2, 3e-2, 1e-1)),
    "KFAC": (Closures(KFAC), (1e-2, 3e-2)),
    "KFAC, every 10th": (Closures(KFAC, update_every=PERIOD), (1e-2, 3e-2)),
    "EKFAC, every 10th": (Closures(EKFAC, update_every=PERIOD), (1e-2, 3e-2)),
    "GaussNewton": (Closures(GaussNewton, damping=0.3), (1.0,)),
    "GaussNewton, 3 iterations": (Closures(GaussNewton, damping=0.3, iterations=3), (1.0,)),
    "GaussNewton, damping >= 1e-3": (Closures(GaussNewton, damping=0.3, damping_rule=_FLOORED), (1.0,)),
    "GaussNewton, a system a layer": (
        Closures(GaussNewton, damping=0.3, blocks="layer", damping_rule=_FLOORED),
        (1.0,),
    ),
}
"""Method -> how it is built, and its learning rates."""
COSTED = ("KFAC", "KFAC, every 10th", "EKFAC, every 10th")
"""Those that need a closure; `benchmarks.optimizers.bench widths` has the others."""


# -- costs ------------------------------------------------------------------------------------------------------------


def cost_row(name: str, method: str, *, rounds: int) -> Row:
    """Return the cost of a step in steps of AdamW: due, not due, and nine to one."""
    width, sequences = COSTS[name]
    torch.manual_seed(0)
    steps = {}
    text = torch.randint(65, (sequences, 65))
    batch = text[:, :-1].contiguous(), text[:, 1:].flatten()
    for who in ("AdamW", method):
        model = make_gpt(vocabulary=65, context=64, width=width, num_heads=4, num_layers=2)
        steps[who] = (model, METHODS[who][0].build(model, 1e-6, F.cross_entropy))
        steps[who][1](model, batch, 1.0, True)
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(rounds):
        for due in (True, False):
            spent = {}
            for who, (model, step) in steps.items():
                start = time.process_time()
                step(model, batch, 1.0, due)
                spent[who] = time.process_time() - start
            ratios[due].append(spent[method] / spent["AdamW"])
    refreshing, other = (statistics.median(ratios[k]) for k in (True, False))
    row: Row = {"kind": "cost", "problem": name, "method": method, "due": refreshing, "other": other, "rounds": rounds}
    row |= {"adamw_steps": (refreshing + (PERIOD - 1) * other) / PERIOD}
    return row | asdict(Conditions())


# -- runs -------------------------------------------------------------------------------------------------------------


class Characters:
    """The character GPT: Python's own documentation, 4096 tokens a step."""

    def __init__(self, seed: int) -> None:
        import pydoc_data.topics as topics

        text = "".join(value for _, value in sorted(topics.topics.items())).lower()
        places = {character: i for i, character in enumerate(sorted(set(text)))}
        self.data = torch.tensor([places[character] for character in text])
        self.cut = len(self.data) * 9 // 10
        torch.manual_seed(seed)
        self.model = make_gpt(vocabulary=len(places), context=64, width=64, num_heads=4, num_layers=2)
        self.loss: Loss = F.cross_entropy
        self.fixed = self.batch(torch.Generator().manual_seed(999), 128)

    def batch(self, generator: torch.Generator, count: int = 64) -> Batch:
        """Return random windows."""
        at = torch.randint(self.cut - 65, (count, 1), generator=generator) + torch.arange(65)
        window = self.data[at]
        return window[:, :-1], window[:, 1:].flatten()


class Autoencoder:
    """The deep autoencoder of `benchmarks.newton`, all images at once."""

    def __init__(self, seed: int) -> None:
        self.model, images = autoencoder(seed)
        self.loss: Loss = F.mse_loss
        self.fixed = (images, images)

    def batch(self, generator: torch.Generator) -> Batch:  # noqa: ARG002
        """Return all of them."""
        return self.fixed


PROBLEMS: dict[str, Any] = {"gpt": Characters, "autoencoder": Autoencoder}


def run_row(problem: str, method: str, lr: float, *, seed: int, steps: int) -> Row:
    """Train once and return the curve: (steps, gradients, seconds of the process, loss)."""
    task = PROBLEMS[problem](seed)
    step = METHODS[method][0].build(task.model, lr, task.loss)
    generator = torch.Generator().manual_seed(1000 + seed)
    gradients, spent, curve = 0.0, 0.0, []
    for t in range(steps):
        batch = task.batch(generator)
        warm = min(1.0, (t + 1) / (3 if method.startswith("Gauss") else 10))
        factor = warm * (0.1 + 0.45 * (1 + math.cos(math.pi * t / steps)))
        start = time.process_time()
        gradients += step(task.model, batch, factor, None)
        spent += time.process_time() - start
        if (t + 1) % max(1, steps // 20) == 0 or t + 1 == steps:
            with torch.no_grad():
                loss = float(task.loss(task.model(task.fixed[0]), task.fixed[1]))
            curve.append((t + 1, round(gradients, 1), round(spent, 2), round(loss, 5)))
            if not math.isfinite(loss) or loss > 50:
                break
    facts: Row = {"kind": "run", "problem": problem, "method": method, "lr": lr, "seed": seed, "steps": steps}
    return facts | {
        "loss": curve[-1][3],
        "gradients": gradients,
        "seconds": spent,
        "curve": curve,
        **asdict(Conditions()),
    }


def main() -> None:
    """Measure, write the rows, print them."""
    parser = command("matrices", __doc__)
    parser.add_argument("what", choices=["costs", "runs"])
    parser.add_argument("--problems", nargs="+", default=None)
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    a = parser.parse_args()
    if a.what == "costs":
        cases = [(p, m) for p in a.problems or COSTS for m in a.methods or COSTED]
        with Rows(a.out, ("kind", "problem", "method"), len(cases)) as rows:
            for problem, method in cases:
                row = cost_row(problem, method, rounds=a.rounds)
                parts = f"{row['adamw_steps']:5.2f} steps of AdamW ({row['due']:.2f} due, {row['other']:.2f} else)"
                rows.add(row, said=f"{problem:24s} {method:20s} {parts}")
        return
    cases = [(p, m) for p in a.problems or PROBLEMS for m in a.methods or METHODS]
    with Rows(a.out, ("kind", "problem", "method", "lr", "seed", "steps"), len(cases) * a.seeds) as rows:
        for problem, method in cases:
            found = {}
            for lr in METHODS[method][1]:
                found[lr] = run_row(problem, method, lr, seed=0, steps=a.steps)
                rows.add(found[lr], said=_line(found[lr]), steps=0)
            best = min(found, key=lambda lr: found[lr]["loss"] if math.isfinite(found[lr]["loss"]) else math.inf)
            for seed in range(1, a.seeds):
                row = run_row(problem, method, best, seed=seed, steps=a.steps)
                rows.add(row, said=_line(row))
    print(len(stored(a.out)), "rows")


def _line(row: Row) -> str:
    facts = f"{row['problem']:12s} {row['method']:32s} lr {row['lr']:<7g} seed {row['seed']} steps {row['steps']}"
    return f"{facts}: loss {row['loss']:.4f}, {row['gradients']:.0f} gradients, {row['seconds']:.0f} s"


if __name__ == "__main__":
    main()
