"""Traces of the parts of a model, against its dense Hessian."""

from __future__ import annotations

import torch
from torch import nn

from analysis.tasks import Task
from benchmarks.pretrained.bench import traces_of_parts
from curvature import HessianOperator


def test_traces_of_parts_are_those_of_diagonal_blocks() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    data = (torch.randn(30, 5, dtype=torch.float64), torch.randint(3, (30,)))
    task = Task(name="small", model=model, loss=nn.CrossEntropyLoss(), train_data=data)
    rows = traces_of_parts(task, {"first": "0.*", "weights": ["*.weight"]}, 100)
    diagonal = HessianOperator(task.objective()).to_dense().diag()
    for row, places in zip(rows, (slice(24), [*range(20), *range(24, 36)]), strict=True):
        assert row["num_params"] == len(diagonal[places])
        assert abs(row["trace"] - float(diagonal[places].sum())) < 5 * row["trace_stderr"]
        assert 0 < row["trace_stderr"] < 0.5 * abs(row["trace"])
