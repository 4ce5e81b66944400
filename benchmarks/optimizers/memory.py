"""What 1000 steps of an optimizer add to a process's memory: `python -m benchmarks.optimizers.memory METHOD`.

The problem is the physics-informed one, whose loss holds derivatives in its inputs: gradients that keep their graph
leak all of it. Every method has a process of its own, since memory that one has freed hides what the next one takes.
"""

from __future__ import annotations

import json
import sys
import warnings

import torch

from benchmarks.common.harness import one_line, peak_mebibytes
from benchmarks.optimizers.bench import Row, new_row
from benchmarks.optimizers.peers import method_of, take_step
from benchmarks.optimizers.problems import make_training

__all__ = ["memory_row"]

FIRST = 100
"""Steps after which all that is kept has been made."""


def memory_row(name: str, *, problem_name: str = "pinn", steps: int = 1000) -> Row:
    """Return a row with the growth of the peak of the resident set, in MiB."""
    row = new_row("memory", problem_name, name)
    problem, method = make_training(problem_name), method_of(name)
    try:
        optimizer = method.make(problem.params, 1e-9, problem.loss)
        batch = problem.batch(torch.Generator().manual_seed(0))
        for step in range(FIRST + steps):
            if step == FIRST:
                before = peak_mebibytes()
            take_step(method, optimizer, problem, batch)
    except Exception as error:
        return {**row, "failure": one_line(error)}
    return {**row, "steps": steps, "grown_mebibytes": peak_mebibytes() - before}


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print(json.dumps(memory_row(sys.argv[1])))
