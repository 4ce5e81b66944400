"""Runs that the tests of stores, figures and reports share: real ones, of models that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.inspection.plan import InspectionPlan
from analysis.inspection.study import STUDY, InspectionRun
from analysis.run.preparation import Request
from analysis.run.study import run_study

TASK = """
import torch
from torch import nn
from analysis.tasks import Task

def task():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 20, generator=generator)
    y = torch.randint(0, 4, (64,), generator=generator)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 4))
    return Task(name="toy", model=model, description="A <b>toy</b> & nothing else.", loss=nn.CrossEntropyLoss(),
                train_data=(x, y), metadata={"accuracy": 0.25, "recipe": {"epochs": 0}})
"""


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> InspectionRun:
    """Return a run whose density is estimated, with one layer estimated and one built entry by entry."""
    file = tmp_path_factory.mktemp("task") / "toy_task.py"
    file.write_text(TASK)
    plan = InspectionPlan(k=4, num_probes=3, num_steps=16)
    request = Request(task=f"{file}:task", seed=1, command="curvature inspect toy_task.py:task --seed 1")
    return run_study(STUDY, request, plan)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "toy"
